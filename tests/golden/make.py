"""Records what transformers makes of the tiny models of `tests/families.py`.

    python -m tests.golden.make [NAME ...]

Run from the root, in an environment with the `parity` extra; 20 s on 2 cores for all of them. `load`,
`logits` and `greedy` are also the live oracle of `tests/parity/`.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config, PreTrainedModel

from tests import families

BATCH, LENGTH = 2, 56
PROMPT_LENGTH, NEW_TOKENS = 7, 64
MIN_GAP = 1e-3  # between the two best logits of a greedy step: no rounding flips the recorded tokens
MIN_DISTINCT = 12  # a continuation that repeats itself shows little


def load(directory: Path) -> PreTrainedModel:
    """The checkpoint as transformers computes it in float32, without fused attention or experts.

    Raises:
      ValueError: if transformers misses a tensor or does not know one.
    """
    config = json.loads((directory / "config.json").read_text())
    mxfp4 = "quantization_config" in config
    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
        quantization_config=Mxfp4Config(dequantize=True) if mxfp4 else None,
    )
    if problems := {kind: names for kind, names in info.items() if names}:
        raise ValueError(f"transformers does not take {directory} as it is: {problems}")
    model.generation_config = transformers.GenerationConfig()  # no end-of-sequence token
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """float32 `[B, T, V]` for tokens `[B, T]`: one forward, no cache."""
    return model(input_ids=torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.numpy()


def greedy(model: PreTrainedModel, prompt: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` tokens after `prompt` and the logits `[count, V]` they were taken from, through the cache."""
    out = model.generate(
        torch.tensor(prompt[None], dtype=torch.long),
        do_sample=False,
        max_new_tokens=count,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt) :].numpy(), torch.cat(out.logits).numpy()


def layout(config: dict) -> dict[str, list[int]]:
    """Names and shapes of the tensors that transformers saves for a model with this `config.json`."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        (directory / "config.json").write_text(json.dumps(plain))
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).save_pretrained(directory)
        with safe_open(directory / "model.safetensors", "np") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return _pack_experts(shapes) if "quantization_config" in config else shapes


def _pack_experts(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """MXFP4 as openai/gpt-oss-20b has it: `[E, I, O]` as blocks `[E, O, I/32, 16]`, scales `[E, O, I/32]`."""
    packed = {}
    for name, shape in shapes.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = shape
            packed[f"{name}_blocks"] = [experts, outputs, inputs // 32, 16]
            packed[f"{name}_scales"] = [experts, outputs, inputs // 32]
        else:
            packed[name] = shape
    return packed


def as_saved(config: dict) -> dict:
    """The `config.json` that transformers 5 writes once it has read this one: `rope_parameters` and all."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        (directory / "config.json").write_text(json.dumps(config))
        AutoConfig.from_pretrained(directory).save_pretrained(directory)
        return json.loads((directory / "config.json").read_text())


def continuation(model: PreTrainedModel, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """A prompt whose greedy tokens vary and are clear of ties, those tokens, and their smallest gap."""
    vocab = model.get_input_embeddings().num_embeddings
    for _ in range(100):
        prompt = rng.integers(vocab, size=PROMPT_LENGTH)
        tokens, cached = greedy(model, prompt, NEW_TOKENS)
        second, first = np.sort(cached, axis=-1)[:, -2:].T
        gap = float((first - second).min())
        if gap > MIN_GAP and len(np.unique(tokens)) >= MIN_DISTINCT:
            full = logits(model, np.concatenate([prompt, tokens])[None])[0, PROMPT_LENGTH - 1 : -1]
            np.testing.assert_allclose(cached, full, rtol=0, atol=2e-5 * np.abs(full).max())
            return prompt, tokens, gap
    raise ValueError("no prompt gives a varied continuation without near-ties: scale the weights differently")


def record(name: str) -> None:
    config = families.TINY[name]
    recorded = {"config": config, "config_5": as_saved(config), "tensors": layout(config)}
    lines = ",\n".join(f'"{part}": {json.dumps(content)}' for part, content in recorded.items())
    (families.GOLDEN / f"{name}.json").write_text(f"{{\n{lines}\n}}\n")

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        old, new = Path(temporary) / "4", Path(temporary) / "5"
        families.write(name, old, transformers=4)
        families.write(name, new, transformers=5)
        model = load(old)
        tokens = rng.integers(model.get_input_embeddings().num_embeddings, size=(BATCH, LENGTH))
        expected = logits(model, tokens)
        np.testing.assert_array_equal(logits(load(new), tokens), expected)
    prompt, continued, gap = continuation(model, rng)
    np.savez_compressed(
        families.GOLDEN / f"{name}.npz",
        tokens=tokens.astype(np.int32),
        logits=expected,
        prompt=prompt.astype(np.int32),
        greedy=continued.astype(np.int32),
    )
    largest, distinct = np.abs(expected).max(), len(np.unique(continued))
    print(f"{name:18} max |logit| {largest:5.2f}  gap {gap:.4f}  distinct tokens {distinct}", flush=True)


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, numpy {np.__version__}")
    for name in sys.argv[1:] or families.TINY:
        record(name)


if __name__ == "__main__":
    main()
