"""How much of a chip's published figures programs reach."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Efficiency:
    """What divides the time that published figures allow, and what comes on top.

    Attributes:
      name: of the program whose figures these are fitted to.
      weights: share of HBM's bandwidth at which weights are read. Not fitted, as one model's table does not tell it
        from `layer_s`: a plain copy reaches 0.9 on an H200 (4,300 of 4,800 GB/s).
      cache: the same of keys and values.
      flops: share of the rate of products.
      attention: the same of attention, whose softmax does not run where products do.
      links: share of the links' bandwidth.
      hop_s: seconds from a chip to its neighbour; at most the "around 1 us" of scaling-book, chapter 3.
      layer_s: seconds that a layer takes beside all of that.
      exposed: share of the shorter of reading weights and multiplying by them that the longer does not hide: 0 where
        the two overlap, as a TPU's or a GPU's kernels have them, 1 where they add up. A CPU's few cores do a part of
        both, and with few rows multiply slower than with many, which looks alike.
    """

    name: str
    weights: float = 0.9
    cache: float
    flops: float
    attention: float
    links: float
    hop_s: float
    layer_s: float
    exposed: float = 0.0


ROOFLINE = Efficiency(
    name="roofline", weights=1.0, cache=1.0, flops=1.0, attention=1.0, links=1.0, hop_s=0.0, layer_s=0.0
)
"""The least that a chip needs: nothing is faster."""

SERVER = Efficiency(
    name="sglang-jax", cache=0.461, flops=0.75, attention=0.144, links=0.6, hop_s=1.9e-7, layer_s=7.19e-5
)
"""A server on a v6e-4: `benchmarks/size_published.py` fits it, and tells how far it is from other tables."""

UNCERTAINTY = (
    "Times are a model's, not a measurement: fitted to one table of a server on four v6e, they came out within 21 % of "
    "the table of another model there; of a third model the time between tokens was 43 % short, that to the first "
    "token 66 %. Other TPUs, GPUs and this engine were not compared with. "
    "least_tpot_ms is what the published figures of the chips allow at best."
)
