"""The best candidate as a config file that the commands which run a model read."""

import errno
import json
import math
import textwrap
from pathlib import Path

from jaxopt_llm.checkpoints.atomic import atomic_file
from jaxopt_llm.engine import EngineConfig, ServingConfig
from jaxopt_llm.models import ModelConfig
from jaxopt_llm.sharding import MeshSpec
from jaxopt_llm.size.candidate import Candidate, engine_of
from jaxopt_llm.size.model import FLOAT
from jaxopt_llm.size.traffic import Traffic

_WIDTH = 110


def serving(best: Candidate, model: str, config: ModelConfig, traffic: Traffic) -> ServingConfig:
    """How a candidate serves the model.

    Args:
      best: the candidate.
      model: as `--model` names it.
      config: of the model.
      traffic: that it was sized for.

    Raises:
      ValueError: if it does not fit.
    """
    if not best.fits:
        raise ValueError(
            f"{best.chip} {best.topology} does not hold {model}: there is nothing to serve it with; take more chips, "
            "fewer bits a weight or shorter sequences"
        )
    mesh = MeshSpec.parse(best.mesh)
    return ServingConfig(
        model=model,
        mesh=best.mesh if mesh.size > 1 else None,
        quantize=None if best.weights_dtype == FLOAT else best.weights_dtype,
        engine=engine_of(config, traffic, best.batch // mesh.data, best.kv_dtype),
    )


def source(found: ServingConfig, best: Candidate, traffic: Traffic, *, name: str, command: str) -> str:
    """The text of a file whose `config()` returns `found`.

    Args:
      found: from `serving`.
      best: the candidate it is of, for what to expect.
      traffic: that it was sized for.
      name: what `--config` will be.
      command: that made it.
    """
    prompt, output = math.ceil(traffic.prompt), math.ceil(traffic.output)
    rate = "" if traffic.rate is None else f", {traffic.rate:,.3g} requests a second"
    at_once = "" if traffic.concurrency is None else f", {traffic.concurrency} at once"
    said = [
        f"{found.model} on {best.chip} {best.topology} ({best.mesh}): what `jaxopt-llm size` ranks first.",
        _indented(
            f"jaxopt-llm bench engine --config={name} --prompt_tokens={prompt} --output_tokens={output}"
        ),
        textwrap.fill(
            f"Sized for prompts of {prompt:,} tokens and {output:,} of output on average{at_once}{rate}; weights "
            f"{best.weights_dtype}, keys and values {best.kv_dtype}. {_expected(best)}",
            _WIDTH,
        ),
        "Made by",
        _indented(command),
    ]
    text = "\n\n".join(said).replace("\\", "\\\\").replace('"', '\\"' if '"""' in "".join(said) else '"')
    engine = "".join(
        f"            {field}={_literal(value)},\n"
        for field, value in vars(found.engine).items()
        if value != getattr(EngineConfig, field)
    )
    other = "".join(
        f"        {field}={_literal(value)},\n"
        for field, value in (("mesh", found.mesh), ("quantize", found.quantize))
        if value is not None
    )
    return (
        f'"""{text}\n"""\n\n'
        "from jaxopt_llm.engine import EngineConfig, ServingConfig\n\n\n"
        "def config() -> ServingConfig:\n"
        "    return ServingConfig(\n"
        f"        model={_literal(found.model)},\n{other}"
        f"        engine=EngineConfig(\n{engine}        ),\n    )\n"
    )


def write(path: Path, text: str) -> None:
    """A new file, whole or not at all.

    Raises:
      OSError: if something stands there, or it cannot be written.
    """
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(text.encode())


def check_new(path: Path) -> None:
    """Raises FileExistsError if something stands there."""
    if path.exists():
        raise FileExistsError(
            errno.EEXIST, "stands there already, and is not written over; choose another --write", str(path)
        )


def _expected(best: Candidate) -> str:
    """Words for what service is expected."""
    assert best.ttft_ms is not None
    first = f"the first token after {best.ttft_ms.p50:,.0f} ms (95 %: {best.ttft_ms.p95:,.0f})"
    later = (
        ""
        if best.tpot_ms is None
        else f", then {best.tpot_ms.p50:,.1f} ms a token (95 %: {best.tpot_ms.p95:,.1f})"
    )
    cost = "" if best.usd_per_mtok is None else f", ${best.usd_per_mtok:,.2f} a million"
    meets = "" if best.meets else " It does not meet what was asked."
    return (
        f"Expect, by a model of the chip and not by a measurement, {first}{later}: {best.tokens_per_s or 0:,.0f} "
        f"tokens/s{cost}.{meets}"
    )


def _literal(value: object) -> str:
    """As Python spells it, text in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _indented(command: str) -> str:
    lines = textwrap.wrap(command, _WIDTH - 10, break_long_words=False, break_on_hyphens=False)
    return " \\\n".join(f"    {'' if i == 0 else '  '}{line}" for i, line in enumerate(lines))
