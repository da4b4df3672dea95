"""What a model is calibrated on: pieces of a text, or what the model itself says."""

import jax
import numpy as np
from jaxtyping import Int

from jaxopt_llm.engine import SamplingParams, generate
from jaxopt_llm.models import Transformer
from jaxopt_llm.text import Tokenizer


def calibration_ids(
    model: Transformer,
    tokenizer: Tokenizer | None,
    text: str | None = None,
    *,
    sequences: int = 16,
    length: int = 512,
    seed: int = 0,
) -> Int[np.ndarray, "N T"]:
    """Token ids to calibrate on.

    Args:
      model: which they are for.
      tokenizer: of the text; None where there is no text.
      text: pieces of it are taken, spread evenly, none overlapping another; None: the model is sampled at temperature
        1, each sequence from a token drawn at random (after the BOS, where there is one), as arXiv:2305.17888 does.
      sequences, length: N pieces of T tokens.
      seed: of the samples.

    Raises:
      ValueError: if the text is too short, if there is no tokenizer for it, or for sizes that do not fit the context.
    """
    if sequences < 1 or not 3 <= length <= model.config.max_seq_len:
        raise ValueError(
            f"{sequences=} must be at least 1, and {length=} at least 3 and at most the model's context of "
            f"{model.config.max_seq_len}"
        )
    if text is None:
        return _sampled(model, sequences, length, seed)
    if tokenizer is None:
        raise ValueError(
            "a calibration text needs a tokenizer; without one, the model can be sampled (no text)"
        )
    return _pieces(np.asarray(tokenizer.encode(text, add_special=False), np.int32), sequences, length)


def _pieces(ids: Int[np.ndarray, "_"], sequences: int, length: int) -> Int[np.ndarray, "N T"]:
    if len(ids) < sequences * length:
        raise ValueError(
            f"the calibration text has {len(ids)} tokens, and {sequences} sequences of {length} need "
            f"{sequences * length}; give a longer text, or take fewer sequences"
        )
    starts = np.linspace(0, len(ids) - length, sequences).astype(int)
    return np.stack([ids[start : start + length] for start in starts])


def _sampled(model: Transformer, sequences: int, length: int, seed: int) -> Int[np.ndarray, "N T"]:
    config = model.config
    start = [] if config.bos_id is None else [config.bos_id]
    first = jax.random.randint(jax.random.key(seed), (sequences,), 0, config.vocab_size)
    prompts = [[*start, int(token)] for token in first]
    wanted = length - len(prompts[0])
    params = [
        SamplingParams(max_tokens=wanted, temperature=1.0, ignore_eos=True, seed=seed + number)
        for number in range(sequences)
    ]
    results = generate(model, None, prompts, params)
    failed = next((result.error for result in results if result.error), None)
    if failed:
        raise ValueError(f"the model cannot be sampled to calibrate it: {failed}")
    rows = [prompt + result.token_ids for prompt, result in zip(prompts, results, strict=True)]
    return np.asarray(rows, np.int32)
