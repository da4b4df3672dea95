"""`ModelConfig`: what differs between decoder families.

Dimension letters, one meaning each throughout the project: `B` batch, `T` tokens, `S` key length, `D` model
width, `F` feed-forward width, `N` query heads, `K` key/value heads, `H` head width, `E` experts, `V`
vocabulary, `L` layers, `R` slots of the engine, `P` pages a slot, `G` kinds of attention; `O`, `I` output and
input features of a weight.
"""

import dataclasses
import inspect
import types
from collections.abc import Collection, Mapping
from typing import Any, Literal, Self, Union, get_args, get_origin

import jax.numpy as jnp

Activation = Literal["silu", "gelu", "gelu_tanh"]


def _check(settings: Any, above_zero: Collection[str]) -> None:
    """Raises ValueError for a field that is not of its type, or that is not above zero but must be."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if not _fits(value, field.type):
            kind = inspect.formatannotation(field.type)
            raise ValueError(f"{field.name}={value!r} must be of type {kind}, and within 32 bits")
        if field.name in above_zero and value is not None and value <= 0:
            raise ValueError(f"{field.name}={value!r} must be more than 0")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type: an integer is a float, a bool is no integer; NaN and infinity are none."""
    if get_origin(kind) in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(entry, get_args(kind)[0]) for entry in value)
    if kind is float:
        return type(value) in (int, float) and abs(value) < 2**127
    return type(value) is kind and (kind is not int or abs(value) < 2**31)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding (arXiv:2104.09864) and how its frequencies are scaled.

    Attributes:
      theta: base of the frequencies.
      kind: `default`; `linear` (arXiv:2306.15595); `llama3` (Llama 3.1's by-parts scaling); `yarn`
        (arXiv:2309.00071).
      factor: how much longer the context became.
      original_max_seq_len: context before scaling (llama3, yarn).
      low_freq_factor, high_freq_factor: llama3's borders, in wavelengths a context.
      beta_fast, beta_slow: yarn's borders, in rotations a context.
      truncate: yarn rounds its borders to whole dimensions.
      attention_factor: yarn's factor on cosine and sine; None computes it from the mscales.
      mscale, mscale_all_dim: yarn's temperature terms (DeepSeek's form), None for the paper's.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_seq_len: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self):
        _check(
            self,
            "factor original_max_seq_len low_freq_factor high_freq_factor beta_fast beta_slow "
            "attention_factor".split(),
        )
        if self.theta <= 1:
            raise ValueError(f"theta={self.theta!r} must be more than 1")
        if self.kind in ("llama3", "yarn") and self.original_max_seq_len is None:
            raise ValueError(f"rope kind {self.kind!r} needs original_max_seq_len")
        if self.low_freq_factor >= self.high_freq_factor:
            low, high = self.low_freq_factor, self.high_freq_factor
            raise ValueError(f"low_freq_factor={low!r} must be less than high_freq_factor={high!r}")
        if min(self.mscale or 0, self.mscale_all_dim or 0) < 0:
            raise ValueError(
                f"mscale={self.mscale}, mscale_all_dim={self.mscale_all_dim} must not be negative"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in place of the feed-forward layer.

    Attributes:
      count: E.
      per_token: experts that each token goes to.
      d_ff: width of one expert.
      layers: which layers have experts, one flag a layer.
      renormalize: the chosen experts' shares sum to one.
      bias: router and experts have biases.
    """

    count: int
    per_token: int
    d_ff: int
    layers: tuple[bool, ...]
    renormalize: bool = True
    bias: bool = False

    def __post_init__(self):
        _check(self, ("count", "per_token", "d_ff"))
        if self.per_token > self.count:
            raise ValueError(f"per_token={self.per_token} experts must not be more than count={self.count}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer.

    Attributes:
      family: name of the family file that knows its checkpoints.
      vocab_size, d_model, d_ff, num_layers, num_heads, num_kv_heads, head_dim: V, D, F, L, N, K, H.
      max_seq_len: longest context, tokens.
      norm_eps: added to the mean square.
      norm_offset: gains are stored less this (1 in Gemma).
      pre_norm, post_norm: a norm before, after each of attention and feed-forward.
      qk_norm: queries and keys are normalised over each head, over all heads at once, or not.
      qkv_bias, o_bias, mlp_bias: which projections have biases.
      activation: of the gate.
      swiglu_limit: gpt-oss's clamped gate, `(clip(up) + 1) * gate * sigmoid(1.702 * gate)`; None: plain.
      query_scale: factor on the scores; None: `head_dim ** -0.5`.
      attention_softcap, logit_softcap: `cap * tanh(x / cap)` on scores, on logits.
      attention_sinks: a learned score a head that takes part in the softmax without a value.
      windows: how many positions each layer sees, None for all; one entry a layer.
      rope: of layers that see all; of every layer where `rope_local` is None.
      rope_local: of windowed layers.
      experts: mixture of experts, or None.
      scale_embedding: embeddings are multiplied by `sqrt(d_model)`.
      tied: the head is the embedding.
      bos_id, eos_ids, pad_id: special tokens.
    """

    family: str
    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int
    windows: tuple[int | None, ...]
    rope: Rope
    rope_local: Rope | None = None
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: Literal["head", "width"] | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    swiglu_limit: float | None = None
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    attention_sinks: bool = False
    experts: Experts | None = None
    scale_embedding: bool = False
    tied: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self):
        _check(
            self,
            "vocab_size d_model d_ff num_layers num_heads num_kv_heads head_dim max_seq_len norm_eps "
            "swiglu_limit query_scale attention_softcap logit_softcap".split(),
        )
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"windows={self.windows} must be at least 1, or None")
        if any(index is not None and index < 0 for index in (self.bos_id, self.pad_id, *self.eos_ids)):
            raise ValueError("bos_id, eos_ids and pad_id must not be negative")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embedding turns pairs")
        per_layer = {"windows": self.windows} | (
            {"experts.layers": self.experts.layers} if self.experts else {}
        )
        for name, values in per_layer.items():
            if len(values) != self.num_layers:
                raise ValueError(f"{name} has {len(values)} entries for num_layers={self.num_layers}")

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    def kv_heads_of_shard(self, shards: int) -> int:
        """Key/value heads that one of so many tensor shards reads; where they do not divide, several read the same.

        Raises:
          ValueError: if a shard's query heads would read parts of several groups.
        """
        if self.num_kv_heads % shards == 0:
            return self.num_kv_heads // shards
        queries, group = self.num_heads // shards, self.num_heads // self.num_kv_heads
        if self.num_heads % shards or (queries % group and group % queries):
            raise ValueError(
                f"tensor={shards} splits {self.num_heads} query heads of {self.num_kv_heads} key/value heads across "
                f"their groups of {group}; take a divisor or a multiple of {self.num_kv_heads}"
            )
        return max(1, queries // group)

    @property
    def window_kinds(self) -> tuple[int | None, ...]:
        """The distinct windows, in the order of their first layer: G kinds of attention."""
        return tuple(dict.fromkeys(self.windows))

    def kind(self, layer: int) -> int:
        """Which of `window_kinds` a layer is."""
        return self.window_kinds.index(self.windows[layer])

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and self.experts.layers[layer]

    def layer_rope(self, layer: int) -> Rope:
        local = self.rope_local is not None and self.windows[layer] is not None
        return self.rope_local if local and self.rope_local else self.rope

    @property
    def units(self) -> dict[str, int]:
        """How many whole units each logical axis has: what a mesh axis must divide."""
        units = {
            "layers": self.num_layers,
            "embed": self.d_model,
            "heads": self.num_heads,
            "kv_heads": self.num_kv_heads,
            "mlp": self.d_ff,
            "vocab": self.vocab_size,
        }
        if self.experts:
            units |= {"experts": self.experts.count, "expert_mlp": self.experts.d_ff}
        return units

    def to_json(self) -> dict[str, Any]:
        """Plain values, read back by `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The config that `to_json` wrote.

        Raises:
          TypeError: for a field that is missing or unknown.
        """
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        for name in ("rope", "rope_local"):
            if fields.get(name) is not None:
                fields[name] = Rope(**fields[name])
        if fields.get("experts") is not None:
            experts = fields["experts"]
            fields["experts"] = Experts(**experts | {"layers": tuple(experts["layers"])})
        return cls(**fields)

    def kv_bytes_per_token(self, dtype: jnp.dtype) -> int:
        """Bytes of keys and values that one token adds while every layer still sees it."""
        return 2 * self.num_layers * self.kv_width * jnp.dtype(dtype).itemsize
