"""Real models on a mesh of forced host devices give one device's greedy tokens."""

import pytest

import jaxopt_llm as jo
from jaxopt_llm.kernels import QArray
from jaxopt_llm.models import weights

PROMPTS = ["The capital of France is", "def fibonacci(n):", "Water boils at"]


@pytest.mark.verify
@pytest.mark.parametrize(
    ("name", "mesh", "whole"),
    [
        ("smollm2-135m-instruct", "tensor=3", ()),  # 9 heads, 3 KV heads
        ("smollm2-135m-instruct", "stage=4", None),
        ("gemma3-270m", "tensor=4", (".attention.k.", ".attention.v.")),  # 4 heads, 1 KV head: replicated
    ],
)
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_mesh_gives_one_devices_tokens(name, mesh, whole, quantize):
    ask = {"max_tokens": 32, "ignore_eos": True}
    model, tokenizer = jo.load(name, dtype="float32", quantize=quantize)
    alone = jo.generate(model, tokenizer, PROMPTS, **ask)
    placed, _ = jo.load(name, dtype="float32", quantize=quantize, mesh=mesh)
    for parameter, value in weights(placed).items():
        data = value.data if isinstance(value, QArray) else value
        if whole is not None and data.ndim > 1:
            expected = any(part in parameter for part in whole)
            assert data.sharding.is_fully_replicated == expected, parameter
    together = jo.generate(placed, tokenizer, PROMPTS, **ask)
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]
