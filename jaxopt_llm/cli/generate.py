"""Continue a prompt or, with --chat, answer it.

The text goes to stdout as it comes, token counts and times to stderr. Programs are compiled before the times start.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

from jaxopt_llm.cli import show
from jaxopt_llm.cli.flags import (
    CHAT,
    DRAFT_MODEL,
    HOSTS,
    JSON,
    LOADING,
    LOGPROBS,
    MODEL,
    PROMPT,
    PROMPT_LOOKUP,
    SAMPLING,
    SET,
)
from jaxopt_llm.cli.hosts import together
from jaxopt_llm.cli.loading import load, load_draft
from jaxopt_llm.cli.measuring import stages
from jaxopt_llm.cli.serving import SERVING, engine_of, loading_of, model_of, serving
from jaxopt_llm.engine import (
    Engine,
    EngineConfig,
    Metrics,
    Prompt,
    Result,
    SamplingParams,
    ServingConfig,
    encode,
)
from jaxopt_llm.text import Tokenizer


def main(argv: Sequence[str]) -> None:
    if not PROMPT.value:
        raise ValueError("--prompt is empty; give at least one character")
    params = SamplingParams(**SAMPLING.value, logprobs=0 if LOGPROBS.value else None)
    config = serving(SERVING.value, SET.value)
    loading = loading_of(config, LOADING.value)
    with together(HOSTS.value, loading.get("mesh")) as follows:
        run(params, config, loading, follows=follows)


def run(
    params: SamplingParams, config: ServingConfig | None, loading: dict[str, Any], *, follows: bool
) -> None:
    """Loads the model and answers; where this process follows another, does what that does."""
    model, tokenizer = load(model_of(config, MODEL), **loading)
    prompt: Prompt = [{"role": "user", "content": PROMPT.value}] if CHAT.value else PROMPT.value
    length = len(encode(prompt, tokenizer, model.config))
    fitting = EngineConfig.fitting(model.config, requests=1, tokens=length + params.max_tokens)
    sizes = engine_of(config, fitting, prompt_lookup=PROMPT_LOOKUP)
    draft = load_draft(DRAFT_MODEL.value, tokenizer, **loading)
    engine = Engine(model, tokenizer, sizes, draft=draft, consume=True)
    if follows:
        engine.follow()
        return
    with stages("programs") as report:
        progress = functools.partial(report, "compiling")
        engine.warm_up(prompt_tokens=length, rows=1, full=params.needs_full, progress=progress)
    result = stream(engine, prompt, params, quiet=JSON.value)
    if result.error:
        raise ValueError(result.error)
    if JSON.value:
        show.json_line(answer(result))
        return
    print()
    if result.logprobs and tokenizer:
        show.table(("token", "logprob"), _likelihoods(result, tokenizer))
    print(_times(result) + _drafts(engine.metrics()), file=sys.stderr)


def stream(engine: Engine, prompt: Prompt, params: SamplingParams, *, quiet: bool = False) -> Result:
    """Prints an answer as it comes."""
    for chunk in engine.submit(prompt, params):
        if not quiet:
            print(chunk.text, end="", flush=True)
        if chunk.result:
            return chunk.result
    raise AssertionError("a stream ends with its result")


def answer(result: Result) -> dict[str, object]:
    """What `--json` prints."""
    values = {
        "text": result.text,
        "prompt_tokens": result.prompt_tokens,
        "output_tokens": len(result.token_ids),
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "ttft_ms": result.ttft_ms,
        "tpot_ms": result.tpot_ms,
    }
    if result.logprobs is not None:
        values["logprobs"] = [entry.logprob for entry in result.logprobs]
    return values


def _likelihoods(result: Result, tokenizer: Tokenizer) -> list[tuple[str, float]]:
    return [
        (repr(tokenizer.decode([entry.token_id], skip_special=False)), entry.logprob)
        for entry in result.logprobs or ()
    ]


def _times(result: Result) -> str:
    later = "" if result.tpot_ms is None else f", then {result.tpot_ms:.2f} ms a token"
    return (
        f"{result.prompt_tokens} tokens in, {len(result.token_ids)} out ({result.finish_reason}); "
        f"first after {result.ttft_ms:.1f} ms{later}"
    )


def _drafts(metrics: Metrics) -> str:
    return f"; {metrics.accepted} of {metrics.drafted} drafts were right" if metrics.drafted else ""
