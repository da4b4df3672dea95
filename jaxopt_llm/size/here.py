"""The machine at hand as a chip: measured, with no links to others."""

import os

import jax
import jax.numpy as jnp

from jaxopt_llm.evaluate.roofline import Machine
from jaxopt_llm.sharding.chips import Chip

HERE = "this"


def here() -> Chip:
    """The default device, measured in a few seconds."""
    device = jax.devices()[0]
    machine = Machine.here(jnp.dtype(jnp.float32 if device.platform == "cpu" else jnp.bfloat16))
    stats = device.memory_stats() or {}
    memory = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Chip(
        name=HERE,
        kinds=(device.device_kind,),
        hbm_bytes=memory,
        hbm_bandwidth=machine.bandwidth,
        bf16_flops=machine.flops,
        int8_ops=None,
        link_bandwidth=0.0,
        links=0,
    )
