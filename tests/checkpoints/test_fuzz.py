"""Mutated files: an error or the right model each time, no crash, no hang, no memory beyond the file's size.

500 files of tensors and 500 of JSON by default; JAXOPT_FUZZ=10000 for more. The seed of a failing file is in the
message.
"""

import copy
import dataclasses
import itertools
import json
import os
import random
import signal
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf as reference_gguf
import jax
import numpy as np
import pytest
import safetensors
from flax import nnx

import jaxopt_llm as jo
from jaxopt_llm.checkpoints import blocks, gguf
from jaxopt_llm.checkpoints import safetensors as st
from jaxopt_llm.checkpoints.files import CheckpointError, TensorSource
from jaxopt_llm.models import ModelConfig, Transformer, weights
from jaxopt_llm.models.families import parse_config
from jaxopt_llm.text import Tokenizer
from tests import families

CASES = int(os.environ.get("JAXOPT_FUZZ", "500"))
SPARE = 4 << 20  # bytes a reader may take beyond the file's size: a piece in float32 and its temporaries
SECONDS = 20  # for one file of a few thousand bytes; far more than a busy machine needs

HUGE = [0, 1, 2, 7, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
ODD = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, 2**64, 10**400, 1.5, "", "F32", "F64", "BOOL", "..", "a/b", "\0",
    "\ud800", "x" * 300 + ".safetensors", [], [0], [1, 2], [2**40, 2**40], [0, 2**62], [1] * 100, [[]], {},
    {"a": 1},
]  # fmt: skip


def flip(data: bytearray, rng: random.Random, place: int) -> None:
    data[place] ^= 1 << rng.randrange(8)


def truncate(data: bytearray, rng: random.Random, place: int) -> None:
    del data[place:]


def grow(data: bytearray, rng: random.Random, place: int) -> None:
    data += rng.randbytes(rng.choice([1, 8, 64]))


def duplicate(data: bytearray, rng: random.Random, place: int) -> None:
    data[place:place] = data[place : place + rng.choice([1, 4, 8, 24, 100])]


def cut(data: bytearray, rng: random.Random, place: int) -> None:
    del data[place : place + rng.choice([1, 4, 8, 24])]


def scramble(data: bytearray, rng: random.Random, place: int) -> None:
    data[place : place + 4] = rng.randbytes(4)


def resize(data: bytearray, rng: random.Random, place: int) -> None:
    """Something that looks like a length or a count, its upper bytes being zero, becomes another."""
    for start in range(place, min(place + 64, len(data) - 8)):
        if data[start] and not any(data[start + 2 : start + 8]):
            data[start : start + 8] = rng.choice(HUGE).to_bytes(8, "little")
            return


def mutate_bytes(content: bytes, header: int, rng: random.Random) -> bytes:
    """One to three mutations, nine in ten of them in the first `header` bytes."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 3])):
        place = rng.randrange(min(header, len(data)) if rng.random() < 0.9 else len(data))
        rng.choice([flip, flip, truncate, grow, duplicate, cut, scramble, resize, resize])(data, rng, place)
        if not data:
            break
    return bytes(data)


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Replaces, drops, renames or copies a value somewhere in a tree."""
    value = copy.deepcopy(value)
    node = value
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return value
        key = rng.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.75:
            node = node[key]
            continue
        match rng.randrange(4):
            case 0:
                node[key] = rng.choice(ODD)
            case 1:
                del node[key]
            case 2 if isinstance(node, dict):
                node[rng.choice(["__metadata__", "x", *map(str, keys)])] = node.pop(key)
            case _:
                node[key] = copy.deepcopy(node[rng.choice(keys)])
        return value


def with_header(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@contextmanager
def limits(size: int) -> Iterator[None]:
    """Fails if the block takes too long, or more memory than `size` bytes and a little."""

    def late(*_: object) -> None:
        pytest.fail(f"still running after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
        assert peak < size + SPARE, f"{peak} bytes of memory for a file of {size}"
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read(open_: Callable[[Path], TensorSource], path: Path, size: int) -> dict[str, np.ndarray] | None:
    """All values within the limits, or none if the file is refused. Any other exception is a failure."""
    with limits(size):
        try:
            source = open_(path)
        except CheckpointError as error:
            str(error).encode()  # it can be printed
            return None
        with source:
            assert sum(tensor.nbytes for tensor in source.values()) <= size
            for tensor in source.values():
                if tensor.storage in ("Q4_0", "Q4_K"):
                    tensor.native()
            return {name: tensor.read() for name, tensor in source.items()}


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize("seed", [0])
def test_safetensors(tmp_path, seed):
    arrays = {f"layers.{i}.w": np.full((4, 8), i, t) for i, t in enumerate(["f4", "f2", "i8", "u1", "?"])}
    st.write(tmp_path, [(name, a.shape, a.dtype, a) for name, a in arrays.items()], {"format": "pt"})
    path = tmp_path / st.SINGLE
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    accepted = 0
    for case in range(CASES // 2):
        rng = random.Random(f"{seed} {case}")
        if case % 2:
            mutated = with_header(mutate_json(header, rng), data)
        else:
            mutated = mutate_bytes(content, 8 + length, rng)
        path.write_bytes(mutated)
        values = read(st.open_directory, tmp_path, len(mutated))
        if values is not None:  # then the library reads the same
            accepted += 1
            expected = {name: bytes(entry["data"]) for name, entry in safetensors.deserialize(mutated)}
            assert {name: bits(array) for name, array in values.items()} == expected, f"{seed=} {case=}"
    assert 0.01 < accepted / (CASES // 2) < 0.5  # the mutations neither destroy everything nor nothing


@pytest.mark.parametrize("seed", [0])
def test_index(tmp_path, seed):
    arrays = {f"w{i}": np.full(8, i, np.float32) for i in range(6)}
    st.write(tmp_path, [(n, a.shape, a.dtype, a) for n, a in arrays.items()], max_shard_bytes=70)
    path = tmp_path / st.INDEX
    index = json.loads(path.read_text())
    accepted = 0
    for case in range(CASES // 10):
        rng = random.Random(f"{seed} {case}")
        text = json.dumps(mutate_json(index, rng)).encode()
        path.write_bytes(mutate_bytes(text, len(text), rng) if case % 2 else text)
        values = read(st.open_directory, tmp_path, 10_000)
        accepted += values is not None
        for name, array in (values or {}).items():
            np.testing.assert_array_equal(array, arrays[name], err_msg=f"{seed=} {case=}")
    assert 0.01 < accepted / (CASES // 10) < 0.5


def mutants(path: Path, seed: int) -> Iterator[str]:
    """Writes mutations of a JSON file in its place, one after the other, and says which."""
    original = json.loads(path.read_text())
    for case in range(CASES // 4):
        rng = random.Random(f"{path.name} {seed} {case}")
        text = json.dumps(mutate_json(original, rng)).encode()
        path.write_bytes(mutate_bytes(text, len(text), rng) if case % 4 == 3 else text)
        yield f"{path.name} {seed=} {case=}: {path.read_bytes()!r}"


def attempt(load: Callable[[], Any], case: str) -> Any:
    """What is loaded, or None if it is refused in one printable line."""
    try:
        return load()
    except ValueError as error:
        message = str(error).encode()
    assert b"\n" not in message, case
    return None


def within(told: Any, written: Any) -> bool:
    """Whether all that one tree says stands in another."""
    if not isinstance(told, dict):
        return told == written
    return all(key in written and within(value, written[key]) for key, value in told.items())


def said(values: Mapping[str, Any], fields: Mapping[str, str], config: ModelConfig) -> bool:
    """Whether a config has what the file says, where it says it."""
    told = {field: values[key] for key, field in fields.items() if values.get(key) is not None}
    return all(getattr(config, field) == value for field, value in told.items())


@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize("name", ["qwen3_moe", "gemma3_text"])
def test_config_json(tmp_path, name, seed):
    """A model that loads has the file's settings, the weights of before, and a forward."""
    families.write(name, tmp_path)
    original = jo.load(tmp_path)[0]
    expected = weights(original)
    fields = {"vocab_size": "vocab_size", "num_hidden_layers": "num_layers", "rms_norm_eps": "norm_eps"}
    fields |= {"tie_word_embeddings": "tied", "max_position_embeddings": "max_seq_len"}
    accepted = 0
    for case in itertools.islice(mutants(tmp_path / "config.json", seed), CASES // 8):
        loaded = attempt(lambda: jo.load(tmp_path), case)
        if loaded:
            accepted += 1
            model, values = loaded[0], weights(loaded[0])
            assert said(json.loads((tmp_path / "config.json").read_bytes()), fields, model.config), case
            assert values.keys() == expected.keys(), case
            assert all(np.array_equal(values[key], expected[key]) for key in expected), case
            if model.config != original.config:
                check_forward(model)
    assert 0.1 < accepted / (CASES // 8) < 0.9


def check_forward(model: Transformer) -> None:
    logits = jax.eval_shape(lambda tokens: model(tokens), jax.ShapeDtypeStruct((1, 3), np.int32))
    assert logits.shape == (1, 3, model.config.vocab_size)


@pytest.mark.parametrize("seed", [0])
def test_jaxopt_llm_json(tmp_path, seed):
    """The config is the file's, and weights are those that were saved, whatever the file says of them."""
    config = dataclasses.replace(parse_config(families.LLAMA), num_layers=1, windows=(None,), vocab_size=16)
    model = jo.quantize(Transformer(config, rngs=nnx.Rngs(0)), "int8")
    jo.save(model, None, tmp_path / "saved")
    accepted = 0
    for case in mutants(tmp_path / "saved" / "jaxopt_llm.json", seed):
        loaded = attempt(lambda: jo.load(tmp_path / "saved"), case)
        if loaded:
            accepted += 1
            told = json.loads((tmp_path / "saved" / "jaxopt_llm.json").read_bytes())["config"]
            written = json.loads(json.dumps(loaded[0].config.to_json()))
            assert within(told, written), case
            for key, value in weights(loaded[0]).items():
                wanted = weights(model)[key]
                assert all(map(np.array_equal, jax.tree.leaves(value), jax.tree.leaves(wanted))), case
            check_forward(loaded[0])
    assert 0.01 < accepted / (CASES // 4) < 0.5


@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_tokenizer_files(tmp_path, name, seed, data_dir):
    """A tokenizer that loads gives text back, and ends where the files say."""
    _, tokenizer = jo.load(data_dir / "stories260K.gguf")
    tokenizer.save(tmp_path)
    added = {str(i): {"content": f"<{i}>", "special": i % 2 == 0} for i in range(512, 515)}
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {
        "add_bos_token": True,
        "added_tokens_decoder": added,
        "chat_template": [{"name": "default", "template": "x"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(
        '{"bos_token_id": 1, "eos_token_id": [2, 300], "top_k": 50}'
    )
    accepted = 0
    for case in mutants(tmp_path / name, seed):
        loaded = attempt(lambda: Tokenizer.from_directory(tmp_path), case)
        if loaded:
            accepted += 1
            assert loaded.decode(loaded.encode("Once upon a time, Zoë")) == "Once upon a time, Zoë", case
            listed = json.loads((tmp_path / "generation_config.json").read_bytes()).get("eos_token_id") or []
            ends = set(listed if isinstance(listed, list) else [listed]) - {-1}
            named = loaded.backend.token_to_id(loaded.special_tokens.get("eos_token", ""))
            assert ends <= loaded.eos_ids <= ends | {named}, case
    assert 0.1 < accepted / (CASES // 4) < 0.9


def gguf_file(path: Path) -> None:
    rng = np.random.default_rng(0)
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.rope.freq_base": 1e4,
        "general.alignment": 32,
        "flags": [True, False, True],
        "tokenizer.ggml.tokens": [f"token{i}" for i in range(20)],
        "tokenizer.ggml.scores": [0.5 * i for i in range(20)],
        "nested": [[1, 2], [3]],
    }
    blocked = lambda kind: rng.integers(0, 60, (3, 2 * blocks.SIZES[kind][1]), np.uint8)
    kinds = ("Q4_0", "Q8_0", "Q4_K", "IQ4_NL")
    gguf.write(
        path,
        metadata,
        [
            ("f32", (4, 8), "F32", rng.standard_normal((4, 8))),
            ("f16", (33,), "F16", rng.standard_normal(33)),
            *((kind, (3, 2 * blocks.SIZES[kind][0]), kind, blocked(kind)) for kind in kinds),
        ],
    )


@pytest.mark.parametrize("seed", [0])
def test_gguf(tmp_path, seed):
    path = tmp_path / "f.gguf"
    gguf_file(path)
    content = path.read_bytes()
    with gguf.open_file(path) as source:
        header = min(tensor.offset for tensor in source.values())
    accepted = 0
    for case in range(CASES // 2):
        rng = random.Random(f"{seed} {case}")
        mutated = mutate_bytes(content, header, rng)
        path.write_bytes(mutated)
        values = read(gguf.open_file, path, len(mutated))
        if values is not None:  # then the package reads the same
            accepted += 1
            expected = {t.name: t for t in reference_gguf.GGUFReader(path).tensors}
            assert list(values) == list(expected), f"{seed=} {case=}"
            for name, array in values.items():
                np.testing.assert_array_equal(array, dequantized(expected[name]), err_msg=f"{seed=} {case=}")
    assert 0.01 < accepted / (CASES // 2) < 0.5


def dequantized(tensor: reference_gguf.ReaderTensor) -> np.ndarray:
    if not tensor.data.size:  # which its dequantizer cannot reshape
        return np.empty(tensor.shape[::-1])
    if tensor.data.dtype != np.uint8:
        return np.array(tensor.data)
    with np.errstate(all="ignore"):
        return reference_gguf.quants.dequantize(tensor.data, tensor.tensor_type)
