"""Tiny models, and what a plain forward over a whole sequence says of what the engine gave."""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxopt_llm as jo
from jaxopt_llm.models import Transformer, weights, with_weights
from jaxopt_llm.models.families import parse_config
from tests import exportable, families

LENGTH = 96  # of every forward here, so that it compiles once a model
TIE, ROUNDED_TIE = (
    1e-4,
    1e-2,
)  # how close two scores are taken for equal; the second where activations are rounded


@functools.cache
def tiny(name: str, num_layers: int = 2, **changes: Any) -> Transformer:
    """A family's model with random weights at a scale that lets every one matter, two layers, of each kind one."""
    config = parse_config(families.TINY[name])
    first = {config.windows[i]: i for i in reversed(range(config.num_layers))}
    layers = (sorted(first.values()) * num_layers)[:num_layers]
    experts = config.experts and dataclasses.replace(config.experts, layers=(True,) * num_layers)
    changes = {"experts": experts, "windows": tuple(config.windows[i] for i in layers)} | changes
    config = dataclasses.replace(config, num_layers=num_layers, **changes)
    model = Transformer(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    values = {}
    for name, value in weights(model).items():
        noise = rng.normal(size=value.shape)
        if value.ndim == 1:
            values[name] = value + 0.2 * noise
        elif name == "embed.weight":
            values[name] = noise * (config.d_model**-0.5 if config.scale_embedding or config.tied else 0.5)
        else:
            values[name] = noise * 1.5 / np.sqrt(value.shape[-1])
    return with_weights(model, {name: jnp.asarray(value, jnp.float32) for name, value in values.items()})


@functools.cache
def wide(format: str | None = None) -> Transformer:
    """One whose sizes suit the packed kernels, with a window in one layer."""
    model = tiny("mistral", d_model=64, d_ff=128, head_dim=32, vocab_size=96, windows=(16, None))
    return model if format is None else jo.quantize(model, format)


@functools.cache
def q4_k_m() -> Transformer:
    """One out of a file that mixes several forms of weights, as most files do."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "model.gguf")
        exportable.write_q4_k_m(path)
        return jo.load(path, dtype="native")[0]


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The functions that were traced or compiled within."""
    seen: list[str] = []
    listen = lambda event, *_, **about: "compile" in event and seen.append(about.get("fun_name", event))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.clear_event_listeners()


def prompts(vocab: int, *lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, length).tolist() for length in lengths]


_FORWARD = nnx.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)[0], axis=-1))
_HIDDEN = nnx.jit(lambda model, tokens: model.forward(jo.Batch.dense(tokens), None)[0])


def logprobs(model: Transformer, tokens: list[int]) -> np.ndarray:
    """`[T, V]`, after each token."""
    return np.asarray(_FORWARD(model, _padded(tokens)))[: len(tokens)]


def hidden(model: Transformer, tokens: list[int]) -> np.ndarray:
    """`[T, D]`, after the final norm."""
    return np.asarray(_HIDDEN(model, _padded(tokens)))[: len(tokens)]


def _padded(tokens: list[int]) -> jax.Array:
    return jnp.asarray([tokens + [0] * (LENGTH - len(tokens))], jnp.int32)


def check_greedy(model: Transformer, prompt: list[int], output: list[int], *, tie: float = TIE) -> int:
    """Each token is the forward's best, up to the first tie; how many tokens that covers."""
    rows = logprobs(model, prompt + output)[len(prompt) - 1 :]
    for place, (token, row) in enumerate(zip(output, rows, strict=False)):
        second, best = np.sort(row)[-2:]
        if best - second < tie:
            return place
        assert token == row.argmax(), f"token {place} is {token}, the forward's {row.argmax()}"
    return len(output)
