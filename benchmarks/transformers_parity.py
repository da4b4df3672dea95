"""Our default models against transformers on the same GGUF files, float32: greedy tokens and perplexity.

    .venv-parity/bin/python -m benchmarks.transformers_parity [--model=smollm2-135m-instruct,gemma3-270m]

Ten prompts of MT-bench, 48 tokens each, and windows of 1,024 tokens of wikitext test, from `$JAXOPT_DATA`. Writes
benchmarks/results/transformers_parity.json; the exit code is 1 where greedy tokens differ before a tie (the best two
logits within 1e-4) or perplexities by more than 0.1 %. About 5 minutes on 2 cores.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from absl import app, flags
from transformers import AutoModelForCausalLM

import jaxopt_llm as jo
from benchmarks.record import data_folder, record
from jaxopt_llm import checkpoints, evaluate

_MODEL = flags.DEFINE_list("model", ["smollm2-135m-instruct", "gemma3-270m"], "Aliases or GGUF files.")
_WINDOWS = flags.DEFINE_integer("windows", 4, "Windows of 1,024 tokens to score.")
_TOKENS, _WINDOW, _TIE = 48, 1024, 1e-4


def compare(name: str) -> dict[str, Any]:
    """Both engines on one model, on token ids that our tokenizer gives (transformers adds a BOS of its own)."""
    path = checkpoints.resolve(name)
    model, tokenizer = jo.load(name, dtype="float32")
    assert tokenizer
    questions = (data_folder() / "prompts" / "eagle_mt_bench.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [tokenizer.encode(json.loads(line)["turns"][0]) for line in questions[:10]]
    ours = jo.generate(model, None, ids, max_tokens=_TOKENS, ignore_eos=True)
    text = (data_folder() / "wikitext" / "wiki.test.raw").read_text(encoding="utf-8")
    scored = tokenizer.encode(text, add_special=False)[: _WINDOWS.value * _WINDOW]
    perplexity = evaluate.perplexity(model, scored, window=_WINDOW).perplexity
    del model
    peer = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    agreed = [agreement(peer, prompt, result.token_ids) for prompt, result in zip(ids, ours, strict=True)]
    theirs = peer_perplexity(peer, scored)
    return {
        "prompts": len(ids),
        "tokens_each": _TOKENS,
        "prompts_equal": sum(tokens == _TOKENS for tokens, _ in agreed),
        "gaps_where_they_part": [gap for tokens, gap in agreed if tokens < _TOKENS],
        "perplexity": perplexity,
        "transformers_perplexity": theirs,
        "relative_difference": perplexity / theirs - 1,
    }


@torch.no_grad()
def agreement(peer: Any, prompt: Sequence[int], continuation: Sequence[int]) -> tuple[int, float | None]:
    """How many of our tokens are transformers' best, and the gap of its best two where the first is not."""
    logits = peer(torch.tensor([[*prompt, *continuation[:-1]]])).logits[0, len(prompt) - 1 :].numpy()
    for i, (row, token) in enumerate(zip(logits, continuation, strict=True)):
        if int(row.argmax()) != token:
            second, first = np.partition(row, -2)[-2:]
            return i, float(first - second)
    return len(continuation), None


@torch.no_grad()
def peer_perplexity(peer: Any, ids: Sequence[int]) -> float:
    losses = []
    for first in range(0, len(ids), _WINDOW):
        window = torch.tensor([ids[first : first + _WINDOW]])
        logits = peer(window).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none"))
    return float(torch.cat(losses).mean().exp())


def main(argv: Sequence[str]) -> None:
    del argv
    results = {name: compare(name) for name in _MODEL.value}
    record(Path(__file__).stem, results)
    good = all(
        abs(r["relative_difference"]) < 1e-3 and all(gap < _TIE for gap in r["gaps_where_they_part"])
        for r in results.values()
    )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    app.run(main)
