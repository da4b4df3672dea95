"""Runs of the engine that were measured, and the efficiency factors that explain them best."""

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from scipy.optimize import OptimizeResult, least_squares

from jaxopt_llm.engine import EngineConfig
from jaxopt_llm.evaluate import Speed
from jaxopt_llm.models import ModelConfig
from jaxopt_llm.sharding import MeshSpec
from jaxopt_llm.sharding.chips import CHIPS, Chip
from jaxopt_llm.size.efficiency import SERVER, Efficiency
from jaxopt_llm.size.here import settle
from jaxopt_llm.size.model import Shapes, Share
from jaxopt_llm.size.step import decode, prefill_s
from jaxopt_llm.size.topology import Topology

_FACTORS = ("weights", "cache", "flops", "attention", "links", "hop_s", "layer_s")
# A share of a published rate is at most 1. Of the machine at hand rates are measured: of float products, which integer
# ones may pass, and of reading more than its caches hold. What runs say nothing of stays where it begins.
_BEGIN = dataclasses.replace(SERVER, exposed=0.2)
_BOUNDS = {
    "weights": (0.05, 2.0),
    "cache": (0.02, 2.0),
    "flops": (0.02, 8.0),
    "attention": (0.005, 8.0),
    "links": (0.05, 1.0),
    "hop_s": (1e-8, 1e-5),
    "layer_s": (1e-7, 1e-2),
    "exposed": (0.02, 1.0),
}
_MORE = {  # runs that would tell of a factor
    "weights": "one sequence",
    "cache": "several long prompts",
    "flops": "several long prompts",
    "attention": "several long prompts",
    "layer_s": "a model of other layers",
    "exposed": "short prompts",
}
_OF_LINKS = ("links", "hop_s")  # runs are on one device
_NOISE, _VAGUE = 0.05, 0.3  # of a run's figures, and of a factor's logarithm
_PULL = 0.03  # towards where a factor begins, per factor of e: what runs tell anything of is far stronger


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Sequences that started together on an engine, and what it took.

    Attributes:
      config: of the model.
      chip, topology, mesh: where it ran; the figures of a chip that is not among the known are the machine's own.
      weights, kv: precisions, as `size` names them.
      prompt_tokens, output_tokens, concurrency: of each sequence, and how many.
      prefill_s: until every sequence had its first token.
      step_s: of a step in which all of them decode: a later token of each, but for what those that were first waited
        for while the prompts of the others were read.
    """

    config: ModelConfig
    chip: Chip
    topology: str
    mesh: str
    weights: str
    kv: str
    prompt_tokens: int
    output_tokens: int
    concurrency: int
    prefill_s: float
    step_s: float

    @classmethod
    def of(cls, found: Speed, *, prompt_tokens: int, concurrency: int, **what: Any) -> Self:
        """What `evaluate.speed` found on one device; `what` has the other fields."""
        return cls(
            topology=str(Topology.all_of(what["chip"])[0]),
            mesh=str(MeshSpec()),
            prompt_tokens=prompt_tokens,
            concurrency=concurrency,
            prefill_s=concurrency * prompt_tokens / found.prefill_tokens_per_s.median,
            step_s=concurrency / found.decode_tokens_per_s.median,
            **what,
        )

    def to_json(self) -> dict[str, Any]:
        known = CHIPS.get(self.chip.name) == self.chip
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return plain | {
            "config": self.config.to_json(),
            "chip": self.chip.name if known else dataclasses.asdict(self.chip),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """What `to_json` gave.

        Raises:
          TypeError, ValueError, KeyError: for anything else.
        """
        chip = values["chip"]
        known = CHIPS[chip] if isinstance(chip, str) else Chip(**chip | {"kinds": tuple(chip["kinds"])})
        return cls(**values | {"config": ModelConfig.from_json(values["config"]), "chip": known})

    def predicted(self, efficiency: Efficiency) -> tuple[float, float]:
        """`prefill_s` and `step_s`."""
        place, share = self._placed
        rows = -(-self.concurrency // MeshSpec.parse(self.mesh).data)
        middle = self.prompt_tokens + self.output_tokens // 2
        return (
            prefill_s(
                share, place, self.prompt_tokens, EngineConfig.max_tokens_per_step, efficiency, sequences=rows
            ),
            decode(share, place, rows, middle, efficiency).seconds,
        )

    @property
    def platform(self) -> str:
        return self._placed[0].platform

    @functools.cached_property
    def _placed(self) -> tuple[Topology, Share]:
        place, mesh = Topology.parse(self.chip, self.topology), MeshSpec.parse(self.mesh)
        return place, Share.of(Shapes.of(self.config), mesh, self.weights, self.kv, place.platform)


class HeldOut(NamedTuple):
    """A run that factors were not fitted to: predicted over measured, less 1."""

    run: Run
    prefill: float
    step: float


def append(path: Path, run: Run) -> None:
    """Adds a run to a file of them, which is made where there is none.

    Raises:
      ValueError: if the file is no such file.
    """
    runs = read(path) if path.exists() else []
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(json.dumps([one.to_json() for one in (*runs, run)], indent=1) + "\n", "utf-8")
    temporary.replace(path)


def read(path: Path) -> list[Run]:
    """The runs of a file that `append` wrote.

    Raises:
      OSError: if it cannot be read.
      ValueError: if it is no such file.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise ValueError("it is no list of objects")
        runs = [Run.from_json(value) for value in values]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no runs as jaxopt-llm bench engine --append={path.name} writes them: {error}"
        ) from None
    if not runs:
        raise ValueError(f"{path} holds no run; add some with jaxopt-llm bench engine --append={path.name}")
    return runs


def settled(runs: Sequence[Run]) -> list[Run]:
    """The same runs, the machine at hand with one set of figures: each measured its own, and no two measure alike."""
    chips = settle([run.chip for run in runs])
    return [dataclasses.replace(run, chip=chip) for run, chip in zip(runs, chips, strict=True)]


def fit(runs: Sequence[Run]) -> Efficiency:
    """The factors with the least squared errors of logarithms."""
    return _of(_names(runs), _fitted(settled(runs)).x)


def untold(runs: Sequence[Run]) -> list[str]:
    """The factors of one chip that these runs leave where they began, more or less: others would fit as well.

    Runs are taken to be right within 5 %; a factor that this makes uncertain by more than a third is not told.
    """
    slopes = _fitted(settled(runs)).jac
    spread = _NOISE * np.sqrt(np.diag(np.linalg.inv(slopes.T @ slopes)))
    return [
        name
        for name, factor in zip(_names(runs), spread, strict=True)
        if name not in _OF_LINKS and factor > _VAGUE
    ]


def _names(runs: Sequence[Run]) -> tuple[str, ...]:
    """The factors to fit: that reads and products hide each other is taken for granted but on a CPU."""
    on_cpu = all(run.platform == "cpu" for run in runs)
    return (*_FACTORS, "exposed") if on_cpu else _FACTORS


def _fitted(runs: Sequence[Run]) -> OptimizeResult:
    names = _names(runs)
    start = np.log([getattr(_BEGIN, name) for name in names])
    low, high = np.log(np.array([_BOUNDS[name] for name in names])).T
    start = np.clip(start, low + 1e-6, high - 1e-6)

    def errors(logs: np.ndarray) -> np.ndarray:
        found = _of(names, logs)
        missed = [_log_errors(run, found) for run in runs]
        return np.concatenate([np.ravel(missed), _PULL * (logs - start)])

    return least_squares(errors, start, bounds=(low, high))


def held_out(runs: Sequence[Run]) -> list[HeldOut]:
    """Every run, predicted from the others; none where there is but one."""
    if len(runs) < 2:
        return []
    runs, found = settled(runs), []
    for i, run in enumerate(runs):
        prefill, step = np.expm1(_log_errors(run, fit([*runs[:i], *runs[i + 1 :]])))
        found.append(HeldOut(run, float(prefill), float(step)))
    return found


def uncertainty(runs: Sequence[Run], left_out: Sequence[HeldOut]) -> str:
    """How far figures that were fitted to these runs can be trusted, and what would help, in a few sentences."""
    where = ", ".join(dict.fromkeys(run.chip.name for run in runs))
    fitted = f"Times are a model's, fitted to {len(runs)} runs on {where}"
    if not left_out:
        return f"{fitted}; with one run nothing tells how far off they are."
    worst = lambda name: max(abs(getattr(one, name)) for one in left_out)
    told = (
        f"{fitted}; a run that is left out comes out within {worst('step'):.0%} (time between tokens) and "
        f"{worst('prefill'):.0%} (prompts). Other chips were not compared with."
    )
    vague = untold(runs)
    if not vague:
        return told
    more = " and of ".join(dict.fromkeys(_MORE[name] for name in vague))
    return f"{told} These runs tell too little of {', '.join(vague)}, which stay near a server's: add runs of {more}."


def _log_errors(run: Run, efficiency: Efficiency) -> tuple[float, float]:
    prefill, step = run.predicted(efficiency)
    return math.log(prefill / run.prefill_s), math.log(step / run.step_s)


def _of(names: Sequence[str], logs: np.ndarray) -> Efficiency:
    return dataclasses.replace(
        SERVER, name="measured", **dict(zip(names, map(float, np.exp(logs)), strict=True))
    )
