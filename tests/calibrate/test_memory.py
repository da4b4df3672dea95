"""What a CPU holds while it calibrates: a layer's weights, not the model's; sampled in a process of its own."""

import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import jaxopt_llm as jo
from jaxopt_llm import checkpoints
from jaxopt_llm.calibrate import Wants, walk
from jaxopt_llm.models import ModelConfig, Rope, Transformer, num_bytes

ROOT = Path(__file__).parents[2]
STATUS = Path("/proc/self/status")
CONFIG = ModelConfig(
    family="llama",
    vocab_size=64,
    d_model=512,
    d_ff=2048,
    num_layers=16,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    max_seq_len=64,
    windows=(None,) * 16,
    rope=Rope(),
    tied=True,
)
LAYERS = 5  # of float32 that may be held: one, another in its place, what XLA works in and what is not yet collected


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doubled:
    """Every weight of a layer is another array afterwards."""

    def wants(self, config, layer):
        return (Wants(products=("mlp.down",)),)

    def apply(self, config, layer, weights, statistics):
        return {name: 2 * value for name, value in weights.items()}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Anonymous bytes beyond those of a model that is not there, by whether it was offloaded, and its size."""
    if "RssAnon" not in (STATUS.read_text() if STATUS.exists() else ""):
        pytest.skip("reads /proc, as Linux has it")
    folder = tmp_path_factory.mktemp("calibration")
    checkpoints.export_hf(Transformer(CONFIG, rngs=nnx.Rngs(0)), None, folder / "model")
    command = [sys.executable, "-m", "tests.calibrate.test_memory", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_an_offloaded_model_is_held_a_layer_at_a_time(measured):
    layer = measured["model"] / CONFIG.num_layers
    assert measured["offloaded"] < LAYERS * layer
    assert measured["held"] > measured["model"]  # so that something was measured


def test_its_values_are_the_same(measured):
    assert measured["difference"] == 0


def main(folder: Path) -> None:
    ids = np.arange(32, dtype=np.int32).reshape(2, 16)
    tiny = Transformer(dataclasses.replace(CONFIG, num_layers=1, windows=(None,)), rngs=nnx.Rngs(0))
    walk(tiny, ids, [Doubled()], directory=folder / "tiny")  # compiles the programs of a layer
    before, found, results = anonymous(), {}, []
    for name, offload in (("offloaded", folder), ("held", None)):
        with highest() as peak:
            model, _ = jo.load(folder / "model", offload=offload)
            results.append(walk(model, ids, [Doubled()], directory=folder / "run" if offload else None))
        found[name] = peak[0] - before
    found["model"] = num_bytes(model)
    pairs = zip(*(jax.tree.leaves(nnx.state(result, nnx.Param)) for result in results), strict=True)
    found["difference"] = max(float(abs(a - b).max()) for a, b in pairs)
    print(json.dumps(found))


@contextmanager
def highest() -> Iterator[list[int]]:
    """The most anonymous bytes that are held meanwhile."""
    peak, done = [0], threading.Event()

    def look() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def anonymous() -> int:
    """Bytes of this process that no file stands behind: those that the system cannot drop."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]))
