"""The table against JAX's own, and against what the TPU compiler calls its devices."""

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxopt_llm.sharding import topologies
from jaxopt_llm.sharding.chips import CHIPS, chip_of

# JAX's name, cores of a chip (JAX counts by core), the smallest slice
TPUS = {
    "v4": ("v4", 2, "2x2x1"),
    "v5e": ("v5e", 1, "2x2"),
    "v5p": ("v5p", 2, "2x2x1"),
    "v6e": ("v6e", 1, "2x2"),
    "tpu7x": ("7x", 2, "2x2x1"),
}


@pytest.mark.parametrize("name", TPUS)
def test_figures_are_those_of_jax(name):
    version, cores, _ = TPUS[name]
    known, chip = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(version), 1), CHIPS[name]
    assert chip.bf16_flops == pytest.approx(cores * known.bf16_ops_per_second, rel=0.02)
    assert (chip.int8_ops or 0) == pytest.approx(cores * known.int8_ops_per_second, rel=0.02)
    # JAX has 2.46 TB/s for v5p, Google's page 2.765
    assert chip.hbm_bandwidth == pytest.approx(cores * known.mem_bw_bytes_per_second, rel=0.13)
    assert chip.hbm_bytes == pytest.approx(
        cores * known.hbm_capacity_bytes, rel=0.05
    )  # less what is reserved


@pytest.mark.parametrize("name", TPUS)
def test_devices_to_compile_for_are_found_in_it(name):
    devices = topologies.tpu(name, TPUS[name][2])
    assert len(devices) >= 4
    assert chip_of(devices[0]) is CHIPS[name]


def test_other_devices_are_not():
    assert chip_of(jax.devices("cpu")[0]) is None
