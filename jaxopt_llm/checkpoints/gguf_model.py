"""GGUF files: where each parameter of a model lies, and under which name."""

from collections.abc import Mapping

from jaxopt_llm.checkpoints import located as lay
from jaxopt_llm.checkpoints.files import Tensor, TensorSource
from jaxopt_llm.checkpoints.gguf_config import ARCHITECTURES, ROPE_FACTORS, read_config
from jaxopt_llm.checkpoints.located import Located
from jaxopt_llm.models import ModelConfig, ParamSpec

__all__ = ["interleaved_heads", "locate", "read_config", "tensor_name"]

_NAMES = {
    "embed.weight": "token_embd.weight",
    "final_norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
}
_LAYER_NAMES = {
    "attention_norm": "attn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.o": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "attention_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "moe.router": "ffn_gate_inp",
    "moe.gate": "ffn_gate_exps",
    "moe.up": "ffn_up_exps",
    "moe.down": "ffn_down_exps",
    "mlp_post_norm": "post_ffw_norm",
}


def tensor_name(parameter: str, config: ModelConfig) -> str:
    """`blk.3.attn_q.weight` of `layers.3.attention.q.weight`."""
    if parameter in _NAMES:
        return _NAMES[parameter]
    _, layer, part = parameter.split(".", 2)
    if part == "attention.sinks":
        return f"blk.{layer}.attn_sinks.weight"
    part, leaf = part.rsplit(".", 1)
    if part == "mlp_norm" and config.family == "gpt_oss":
        return f"blk.{layer}.post_attention_norm.{leaf}"
    return f"blk.{layer}.{_LAYER_NAMES[part]}.{leaf}"


def interleaved_heads(parameter: str, config: ModelConfig) -> int | None:
    """Heads whose rows the file interleaves for a rope that turns neighbours; None where rows lie as ours."""
    if ARCHITECTURES[config.family] != "llama":
        return None
    heads = {".attention.q.": config.num_heads, ".attention.k.": config.num_kv_heads}
    return next((count for part, count in heads.items() if part in parameter), None)


def locate(source: TensorSource, config: ModelConfig, wanted: Mapping[str, ParamSpec]) -> dict[str, Located]:
    """Every parameter of the model in the file.

    Raises:
      CheckpointError: listing all missing, unexpected and misshapen tensors.
    """
    names = {parameter: tensor_name(parameter, config) for parameter in wanted}
    found = {
        parameter: _located(source[name], parameter, config, wanted[parameter])
        for parameter, name in names.items()
        if name in source
    }
    known = set(names.values())
    if ARCHITECTURES[config.family] == "llama":
        known.add(ROPE_FACTORS)  # read with the config
    lay.check(source.path, wanted, found, names, [name for name in source if name not in known])
    return found


def _located(tensor: Tensor, parameter: str, config: ModelConfig, spec: ParamSpec) -> Located:
    entry = lay.plain(tensor)
    if entry.shape != spec.shape:
        return entry  # reported as misshapen
    heads = interleaved_heads(parameter, config)
    if heads:
        return lay.unpermuted(entry, heads)
    if config.norm_offset and parameter.endswith("norm.weight"):
        return lay.shifted(entry, config.norm_offset)
    return entry
