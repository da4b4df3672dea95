"""The machine at hand as a chip: measured, with no links to others."""

import dataclasses
import os
import statistics
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxopt_llm.evaluate.roofline import Machine
from jaxopt_llm.sharding.chips import Chip

HERE = "this"


def here(measured: Sequence[Chip] = ()) -> Chip:
    """The default device, measured in a few seconds; one of `measured` where that is it, and then it is that one."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    memory = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for chip in measured:
        if _machine(chip) == (HERE, (device.device_kind,), memory):
            return chip
    machine = Machine.here(jnp.dtype(jnp.float32 if device.platform == "cpu" else jnp.bfloat16))
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


def settle(chips: Sequence[Chip]) -> list[Chip]:
    """The same chips, those that are one measured machine with the medians of their figures."""

    def settled(chip: Chip) -> Chip:
        same = [one for one in chips if _machine(one) == _machine(chip)]
        return dataclasses.replace(
            chip,
            hbm_bandwidth=statistics.median(one.hbm_bandwidth for one in same),
            bf16_flops=statistics.median(one.bf16_flops for one in same),
        )

    return [settled(chip) if chip.name == HERE else chip for chip in chips]


def _machine(chip: Chip) -> tuple[str, tuple[str, ...], int]:
    """What tells one measured machine from another."""
    return chip.name, chip.kinds, chip.hbm_bytes
