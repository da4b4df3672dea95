"""What vendors publish about a chip: the data behind rooflines and plans. Only the usable memory is measured.

TPUs: Google Cloud's pages of each version ("TPU v5e" and so on, system architecture) and, for bandwidth a link, "How to
Scale Your Model" (jax-ml.github.io/scaling-book, chapter 2). The memory is what the compiler of libtpu 0.0.42.1 leaves
to a program. GPUs: NVIDIA's data sheets of each product, dense rates without sparsity; the memory is the card's own.
Prices: list prices of a chip and hour on Google Cloud, which change: give your own. Others differ too much from one
vendor to the next to have a default.
"""

import dataclasses

import jax

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Published figures of one chip, in bytes, operations and seconds.

    Attributes:
      name: as people say it.
      kinds: `device_kind`s that JAX reports for it.
      hbm_bytes: memory that a program can use.
      hbm_bandwidth: bytes a second.
      bf16_flops: floating-point operations a second, a multiply-add being two.
      int8_ops: the same of int8 products, or None where the chip has no faster ones.
      link_bandwidth: bytes a second of one link to a neighbour, in one direction.
      links: of a chip; a GPU's all lead to one switch and count as one.
      devices: that JAX sees of a chip; all other figures are of the whole chip.
      price: list price of an hour, in US dollars; None where there is no single one.
    """

    name: str
    kinds: tuple[str, ...]
    hbm_bytes: int
    hbm_bandwidth: float
    bf16_flops: float
    int8_ops: float | None
    link_bandwidth: float
    links: int = 1
    devices: int = 1
    price: float | None = None


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4", kinds=("TPU v4",),
            hbm_bytes=int(30.5 * _GIB), hbm_bandwidth=1.23e12,
            bf16_flops=275e12, int8_ops=None, link_bandwidth=45e9, links=6,
        ),
        Chip(
            name="v5e", kinds=("TPU v5 lite", "TPU v5e"),
            hbm_bytes=int(15.75 * _GIB), hbm_bandwidth=819e9,
            bf16_flops=197e12, int8_ops=394e12, link_bandwidth=50e9, links=4, price=1.20,
        ),
        Chip(
            name="v5p", kinds=("TPU v5", "TPU v5p"),
            hbm_bytes=int(95.73 * _GIB), hbm_bandwidth=2.765e12,
            bf16_flops=459e12, int8_ops=918e12, link_bandwidth=100e9, links=6, price=4.20,
        ),
        Chip(
            name="v6e", kinds=("TPU v6 lite", "TPU v6e"),
            hbm_bytes=int(31.24 * _GIB), hbm_bandwidth=1.638e12,
            bf16_flops=918e12, int8_ops=1836e12, link_bandwidth=100e9, links=4, price=2.70,
        ),
        Chip(  # without native int8; fp8 runs at twice the rate of bf16
            name="tpu7x", kinds=("TPU7x",),
            hbm_bytes=int(2 * 94.74 * _GIB), hbm_bandwidth=7.38e12,
            bf16_flops=2307e12, int8_ops=None, link_bandwidth=100e9, links=6, devices=2,
        ),
        Chip(
            name="a100-80", kinds=("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
            hbm_bytes=80 * 10**9, hbm_bandwidth=2.039e12,
            bf16_flops=312e12, int8_ops=624e12, link_bandwidth=300e9,
        ),
        Chip(
            name="h100", kinds=("NVIDIA H100 80GB HBM3",),
            hbm_bytes=80 * 10**9, hbm_bandwidth=3.35e12,
            bf16_flops=989e12, int8_ops=1979e12, link_bandwidth=450e9,
        ),
        Chip(
            name="h200", kinds=("NVIDIA H200",),
            hbm_bytes=141 * 10**9, hbm_bandwidth=4.8e12,
            bf16_flops=989e12, int8_ops=1979e12, link_bandwidth=450e9,
        ),
        Chip(
            name="b200", kinds=("NVIDIA B200",),
            hbm_bytes=180 * 10**9, hbm_bandwidth=7.7e12,
            bf16_flops=2250e12, int8_ops=4500e12, link_bandwidth=900e9,
        ),
        Chip(  # PCIe 4.0 of 16 lanes in place of NVLink
            name="l4", kinds=("NVIDIA L4",),
            hbm_bytes=24 * 10**9, hbm_bandwidth=300e9,
            bf16_flops=121e12, int8_ops=242e12, link_bandwidth=32e9,
        ),
        Chip(  # PCIe 3.0 of 16 lanes; it has no bfloat16: the rate is that of float16
            name="t4", kinds=("Tesla T4", "NVIDIA T4"),
            hbm_bytes=16 * 10**9, hbm_bandwidth=320e9,
            bf16_flops=65e12, int8_ops=130e12, link_bandwidth=16e9,
        ),
    )
}  # fmt: skip


def chip_of(device: jax.Device) -> Chip | None:
    """The chip that a device is, or is a part of; None for one that the table does not have."""
    return next((chip for chip in CHIPS.values() if device.device_kind in chip.kinds), None)
