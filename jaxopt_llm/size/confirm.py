"""Tier 2: the compiler's word on the candidates that come first."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from jaxopt_llm.models import ModelConfig
from jaxopt_llm.sharding import MeshSpec
from jaxopt_llm.sharding.chips import Chip
from jaxopt_llm.size.ahead import compile_ahead, devices_of
from jaxopt_llm.size.candidate import Candidate, engine_of, rank
from jaxopt_llm.size.topology import Topology
from jaxopt_llm.size.traffic import Traffic


def confirm(
    ranked: Sequence[Candidate],
    config: ModelConfig,
    traffic: Traffic,
    *,
    chips: Sequence[Chip],
    most: int = 3,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Candidate]:
    """The same candidates, the first of them compiled, and ranked anew by what the compiler says.

    Args:
      ranked: from `sweep`.
      config: of the model.
      traffic: as `sweep` had it.
      chips: as `sweep` had them.
      most: candidates to compile, each of another chip, slice or precision; where none fits, the first alone.
      progress: called with (candidate, programs compiled, of all).
    """
    chosen: dict[tuple[str, str, str], Candidate] = {}
    for one in [one for one in ranked if one.fits] or ranked[:1]:
        chosen.setdefault((one.chip, one.topology, one.weights_dtype), one)
    found, known = list(ranked), {chip.name: chip for chip in chips}
    for one in list(chosen.values())[:most]:
        mesh, place = MeshSpec.parse(one.mesh), Topology.parse(known[one.chip], one.topology)
        try:
            devices = devices_of(place)
        except (ModuleNotFoundError, ValueError) as error:
            found[found.index(one)] = dataclasses.replace(one, not_compiled=str(error))
            continue
        compiled = compile_ahead(
            config,
            place,
            mesh,
            engine_of(config, traffic, max(1, one.batch // mesh.data), one.kv_dtype),
            devices=devices,
            weights=one.weights_dtype,
            progress=progress and functools.partial(progress, f"compiling for {one.chip} {one.topology}"),
        )
        found[found.index(one)] = dataclasses.replace(one, fits=compiled.fits, compiled=compiled)
    return sorted(found, key=rank)
