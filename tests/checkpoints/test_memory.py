"""Peak memory: loading takes the model and little more, exporting one tensor.

One process writes a model of 134 MB in float32 and measures each case in a fork of its own, where JAX starts anew.
"""

import gc
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm import checkpoints
from jaxopt_llm.checkpoints import safetensors
from jaxopt_llm.models import abstract, num_bytes, specs, weights
from jaxopt_llm.models.families import family, parse_config
from tests import families

ROOT = Path(__file__).parents[2]
STATUS = Path("/proc/self/status")
CONFIG = families.LLAMA | {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_hidden_layers": 2,
    "num_key_value_heads": 16,
    "tie_word_embeddings": True,
    "vocab_size": 8192,
}
LOADS = {
    "safetensors": ("hf", {}),
    "safetensors int8": ("hf", {"quantize": "int8"}),
    "safetensors mesh": ("hf", {"mesh": "tensor=4"}),
    "safetensors mesh int8_block": ("hf", {"mesh": "data=2,tensor=4", "quantize": "int8_block"}),
    "gguf": ("q8_0.gguf", {}),
    "gguf int8_block": ("q8_0.gguf", {"quantize": "int8_block"}),
    "gguf native": ("q8_0.gguf", {"dtype": "native"}),
    "gguf mesh int8": ("q8_0.gguf", {"mesh": "tensor=4", "quantize": "int8"}),
}
RESTORES = {"orbax": ("orbax", {}), "orbax mesh": ("orbax", {"mesh": "tensor=4"})}
SAVES = {
    "export_hf": {},
    "export_gguf": {},
    "export_hf int8": {"quantize": "int8"},
    "export_gguf int8": {"quantize": "int8"},
    "save": {},
    "save int8": {"quantize": "int8"},
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, dict[str, int]]:
    """Bytes of each case: `peak` above what was there before, `final` size, `largest` tensor."""
    if not STATUS.exists():
        pytest.skip("reads /proc, as Linux has it")
    command = [sys.executable, "-W", "ignore", "-m", "tests.checkpoints.test_memory"]
    folder = tmp_path_factory.mktemp("models")
    done = subprocess.run([*command, folder], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", LOADS)
def test_loading_takes_the_model_and_less_than_two_tensors(measured, case):
    bytes_ = measured[case]
    assert bytes_["final"] < bytes_["peak"] + 4e6  # so that something was measured
    assert bytes_["peak"] < bytes_["final"] + 1.5 * bytes_["largest"]


@pytest.mark.parametrize("case", RESTORES)
def test_restoring_takes_the_model_and_a_few_tensors(measured, case):
    """Orbax copies what it has read, and the allocator keeps what Orbax has freed: measured at 1.0 to 2.0."""
    bytes_ = measured[case]
    assert bytes_["final"] < bytes_["peak"] + 4e6
    assert bytes_["peak"] < bytes_["final"] + 2.5 * bytes_["largest"]


@pytest.mark.parametrize("case", SAVES)
def test_exporting_takes_less_than_two_tensors(measured, case):
    """As floats: that is what quantized weights are written as."""
    assert measured[case]["peak"] < 1.5 * measured[case]["largest"]


def main(folder: Path) -> None:
    sizes = {}
    in_child(lambda: write_models(folder))
    for case, (name, options) in (LOADS | RESTORES).items():
        sizes[case] = in_child(lambda name=name, options=options: loading(folder, name, options))
    for case, options in SAVES.items():
        sizes[case] = in_child(lambda case=case, options=options: exporting(folder, case.split()[0], options))
    print(json.dumps(sizes))


def in_child(function: Callable[[], Any]) -> Any:
    """What a function returns in a forked process."""
    receive, send = os.pipe()
    if not os.fork():
        try:
            os.write(send, json.dumps(function()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(send)
    with open(receive) as file:
        result = file.read()
    if os.waitstatus_to_exitcode(os.wait()[1]):
        raise SystemExit("a measurement failed")
    return json.loads(result)


def write_models(folder: Path) -> None:
    """`hf`, a directory in bfloat16, `q8_0.gguf`, and `orbax`, our own in float32; a tiny one of each, `tiny-hf`..."""
    tiny = CONFIG | {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64}
    for prefix, values in (("tiny-", tiny), ("", CONFIG)):
        rng, tensors = np.random.default_rng(0), []
        for name, spec in specs(abstract(parse_config(values))).items():
            array = rng.random(spec.shape, np.float32).astype("bfloat16")
            tensors.append((family("llama").source(name).name, array.shape, array.dtype, array))
        directory = folder / f"{prefix}hf"
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(values))
        safetensors.write(directory, tensors, {"format": "pt"})
        model, _ = checkpoints.load(directory, quantize="int8_block")
        checkpoints.export_gguf(model, None, folder / f"{prefix}q8_0.gguf", dtype="Q8_0")
        jo.save(checkpoints.load(directory)[0], None, folder / f"{prefix}orbax")


def loading(folder: Path, name: str, options: Mapping[str, str]) -> dict[str, int]:
    jo.load(folder / f"tiny-{name}", **options)  # starts the devices and imports what is imported late
    before = resident()
    model, _ = jo.load(folder / name, **options)
    return {"peak": peak() - before, "final": num_bytes(model), "largest": largest(model)}


def exporting(folder: Path, function: str, options: Mapping[str, str]) -> dict[str, int]:
    write = getattr(checkpoints, function)
    suffix = ".gguf" if function == "export_gguf" else ""
    tiny, _ = jo.load(folder / "tiny-hf", **options)
    write(tiny, None, folder / f"tiny-{function}{suffix}")
    model, _ = jo.load(folder / "hf", **options)
    before = resident()
    write(model, None, folder / f"{function}{suffix}")
    floats = max(value.size for value in jax.tree.leaves(weights(model))) * 4
    return {"peak": peak() - before, "largest": floats}


def largest(model: Any) -> int:
    return max(weight.nbytes for weight in weights(model).values())


def resident() -> int:
    """Resident bytes; the peak starts from here."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    return status("VmHWM")


def status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]))
