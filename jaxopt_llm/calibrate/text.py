"""What a model is calibrated on: pieces of a text, or what the model itself says."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Int

from jaxopt_llm.engine import Engine, EngineConfig, SamplingParams
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
    return np.asarray(continued(model, prompts, length=length, seed=seed, ignore_eos=True), np.int32)


def continued(
    model: Transformer,
    prompts: Sequence[list[int]],
    *,
    length: int,
    temperature: float = 1.0,
    seed: int = 0,
    ignore_eos: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Beginnings as a model goes on with them.

    Args:
      model: any model.
      prompts: token ids.
      length: tokens of each sequence at most, its beginning included.
      temperature: 0 takes the likeliest token.
      seed: of the first sequence; the next has the next.
      ignore_eos: go on past the end of a sequence.
      progress: called with (sequences done, of all).

    Raises:
      ValueError: for lengths beyond the context, or if the model gives no numbers.
    """
    params = [
        SamplingParams(
            max_tokens=length - len(prompt),
            temperature=temperature,
            seed=seed + number,
            ignore_eos=ignore_eos,
        )
        for number, prompt in enumerate(prompts)
    ]
    config = EngineConfig.fitting(model.config, requests=len(prompts), tokens=length)
    results = Engine(model, None, config).generate(prompts, params, progress=progress)
    failed = next((result.error for result in results if result.error), None)
    if failed:
        raise ValueError(f"the model cannot write text: {failed}")
    return [prompt + result.token_ids for prompt, result in zip(prompts, results, strict=True)]
