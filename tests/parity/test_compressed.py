"""What we write in compressed-tensors' format, as its own package unpacks it and packs it again."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxopt_llm import checkpoints
from jaxopt_llm.checkpoints import safetensors
from jaxopt_llm.models import weights
from jaxopt_llm.models.families import family
from tests.engine import oracle

pytestmark = pytest.mark.parity

FORMATS = ["w8a8", "int8", "int8_g32", "int8_g64_zero", "int4_g32", "int4_g64_zero"]
# Runs without any code of ours: the values go to a file, and packing them again gives the very tensors.
ORACLE = """
import json, sys
from pathlib import Path
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

for directory in map(Path, sys.argv[1:]):
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(config)
    schemes = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    tensors, values = load_file(directory / "model.safetensors"), {}
    for module in {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}:
        (scheme,) = (one for one in schemes if {"Linear", module} & set(one.targets))
        own = {n.removeprefix(module + "."): t for n, t in tensors.items() if n.startswith(module + ".weight")}
        assert own.keys() == set(compressor.compression_param_names(scheme))
        whole = compressor.decompress(own, scheme)
        again = compressor.compress(whole, scheme)
        assert all(torch.equal(again[name], own[name]) for name in own), module
        values[module] = whole["weight"].float().contiguous()
    save_file(values, directory / "values.safetensors")
assert "jaxopt_llm" not in sys.modules
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """A directory for each format, with the package's values in it."""
    folder = tmp_path_factory.mktemp("compressed")
    for name in FORMATS:
        checkpoints.export_hf(oracle.wide(name), None, folder / name, codes=True)
    command = [sys.executable, "-c", ORACLE, *(folder / name for name in FORMATS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_values(unpacked: Path, name):
    """To the precision of float16, in which the package multiplies where scales are."""
    model, seen = oracle.wide(name), 0
    with safetensors.open_file(unpacked / name / "values.safetensors") as source:
        for parameter, value in weights(model).items():
            module = family("mistral").source(parameter).name.removesuffix(".weight")
            if module in source:
                np.testing.assert_allclose(source[module].read(), value.dequantize(), rtol=1e-3, atol=1e-5)
                seen += 1
    assert seen == 14
