"""Whether the stages of a pipeline overlap: how busy each is while all of them decode, and its schedule as a picture.

    python -m benchmarks.pipeline [--mesh=stage=2] [--quantize=int8_block] [--sequences=8]

On a CPU the stages are forced devices that share its cores. Beside it, in turn, the same requests on one device. The
exit code is 1 where a stage is busy for less than 80 % of its balanced share: of what it would be if the slowest never
waited. Writes benchmarks/results/pipeline.json and pipeline.svg.
"""

import statistics
import sys
import time
from collections.abc import Sequence

import jax
from absl import app, flags

import jaxopt_llm as jo
from benchmarks.record import RESULTS, record
from jaxopt_llm.engine import Engine, EngineConfig, SamplingParams
from jaxopt_llm.models import stages
from jaxopt_llm.report import draw_schedule
from jaxopt_llm.sharding import MeshSpec

_MODEL = flags.DEFINE_string("model", "smollm2-135m-instruct", "Checkpoint.")
_MESH = flags.DEFINE_string("mesh", "stage=2", "With stages.")
_QUANTIZE = flags.DEFINE_string("quantize", "int8_block", "Form of weights.")
_SEQUENCES = flags.DEFINE_integer("sequences", 8, "That run at once.")
_PROMPT, _OUTPUT, _ROUNDS = 32, 96, 3
_LEAST = 0.8


def main(_: Sequence[str]) -> None:
    jax.config.update("jax_num_cpu_devices", MeshSpec.parse(_MESH.value).size)
    staged, layers = _engine(_MESH.value)
    engines = {_MESH.value: staged, None: _engine(None)[0]}
    rates: dict[str | None, list[float]] = {mesh: [] for mesh in engines}
    timelines = []
    for _round in range(_ROUNDS):
        for mesh, engine in engines.items():
            with engine.watched() as timeline:
                rates[mesh].append(_tokens_per_s(engine))
            if engine is staged:
                timelines.append(timeline)
    timeline = sorted(timelines, key=lambda one: min(one.of_balanced()))[_ROUNDS // 2]
    spans = lambda stage: [1e3 * (s.end - s.start) for s in timeline.spans if s.decodes and s.stage == stage]
    result = {
        "model": _MODEL.value,
        "mesh": _MESH.value,
        "sequences": _SEQUENCES.value,
        "layers": layers,
        "stage_ms": [statistics.median(spans(stage)) for stage in range(timeline.stages)],
        "busy": timeline.busy(),
        "of_balanced_share": timeline.of_balanced(),
        "tokens_per_s": statistics.median(rates[_MESH.value]),
        "tokens_per_s_on_one_device": statistics.median(rates[None]),
    }
    record("pipeline", result)
    draw_schedule(timeline, RESULTS / "pipeline.svg")
    sys.exit(min(timeline.of_balanced()) < _LEAST)


def _engine(mesh: str | None) -> tuple[Engine, list[int]]:
    model, _ = jo.load(_MODEL.value, mesh=mesh, quantize=_QUANTIZE.value)
    config = EngineConfig(max_slots=_SEQUENCES.value, max_seq_len=_PROMPT + _OUTPUT, prefix_cache=False)
    engine = Engine(model, config=config)
    _tokens_per_s(engine)  # compiles
    return engine, [len(part.layers) for part in stages(model)]


def _tokens_per_s(engine: Engine) -> float:
    prompts = [[(i + 7 * n) % 1000 for i in range(_PROMPT)] for n in range(_SEQUENCES.value)]
    start = time.perf_counter()
    engine.generate(prompts, SamplingParams(max_tokens=_OUTPUT, ignore_eos=True))
    return len(prompts) * _OUTPUT / (time.perf_counter() - start)


if __name__ == "__main__":
    app.run(main)
