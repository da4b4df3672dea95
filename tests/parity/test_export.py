"""What we export, as transformers sees it in a process of its own: the same logits, the same tokens."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import jaxopt_llm as jo
from jaxopt_llm import checkpoints
from jaxopt_llm.prune import cut
from tests import families
from tests.cuts import kept_of

pytestmark = pytest.mark.parity

ROOT = Path(__file__).parents[2]
PRUNED = ["llama_bias", "qwen2", "qwen3", "mixtral", "gemma2", "gemma3_text", "olmo2"]
TEXTS = ["Once upon a time", "  Zoë's 🦊\n\nsaid:\t'hi'", "", "<s> ends here</s>"]

# Loads each directory's model, and its tokenizer where there is one, without any code of ours but the oracle's.
ORACLE = """
import json, sys
from pathlib import Path
import numpy as np
from transformers import AutoTokenizer
from tests.golden import make

texts = json.loads(sys.argv[1])
for directory in map(Path, sys.argv[2:]):
    np.save(directory / "logits.npy", make.logits(make.load(directory), np.load(directory / "tokens.npy")))
    if (directory / "tokenizer.json").exists():
        ids = [AutoTokenizer.from_pretrained(directory)(text).input_ids for text in texts]
        (directory / "ids.json").write_text(json.dumps(ids))
assert "jaxopt_llm" not in sys.modules
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory, data_dir):
    """A directory for each family and some `pruned`, `stories` with its tokenizer, `int8`; transformers' answers."""
    folder, models = tmp_path_factory.mktemp("exported"), {}
    for name in families.TINY:
        families.write(name, folder / f"{name} source")
        models[name] = jo.load(folder / f"{name} source", dtype="float32")
    for name in PRUNED:
        model, _ = models[name]
        models[f"{name} pruned"] = (cut(model, kept_of(model.config)), None)
    models["stories"] = jo.load(data_dir / "stories260K.gguf", dtype="float32")
    models["int8"] = (jo.quantize(models["llama"][0], "int8"), None)
    rng = np.random.default_rng(2)
    for name, (model, tokenizer) in models.items():
        checkpoints.export_hf(model, tokenizer, folder / name)
        np.save(folder / name / "tokens.npy", rng.integers(model.config.vocab_size, size=(2, 75)))
    directories = [folder / name for name in models]
    command = [sys.executable, "-c", ORACLE, json.dumps(TEXTS), *directories]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, models


@pytest.mark.parametrize("name", [*families.TINY, *(f"{name} pruned" for name in PRUNED), "stories", "int8"])
def test_logits(exported, name):
    folder, models = exported
    forward = nnx.jit(lambda model, tokens: model(tokens))
    ours = forward(models[name][0], np.load(folder / name / "tokens.npy"))
    assert families.relative_error(ours, np.load(folder / name / "logits.npy")) < 1e-4


def test_tokenizer(exported):
    folder, models = exported
    _, tokenizer = models["stories"]
    assert json.loads((folder / "stories" / "ids.json").read_text()) == tokenizer.encode_batch(
        TEXTS, parse_special=True
    )
