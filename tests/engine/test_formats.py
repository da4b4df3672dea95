"""Weights of every rounding through the engine: its greedy tokens are the plain forward's."""

import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm.engine import Engine, EngineConfig, SamplingParams
from tests.engine import oracle

SIZES = EngineConfig(max_slots=2, max_seq_len=oracle.LENGTH, max_tokens_per_step=32, decode_steps=4)
TIES = {"w8a8": 0.05}


@pytest.mark.parametrize("format", ["int4_g64_zero", "int3_g32_min", "w8a8", "fp8"])
def test_greedy_tokens(format):
    """Groups of 64 and 3 bits in kernels, rows of activations rounded before them, 8-bit floats without."""
    model = jo.quantize(oracle.wide(), format)
    prompts = oracle.prompts(model.config.vocab_size, 40, 3)
    results = Engine(model, None, SIZES).generate(prompts, SamplingParams(max_tokens=12, ignore_eos=True))
    tie = TIES.get(format, oracle.TIE)
    covered = [
        oracle.check_greedy(model, p, r.token_ids, tie=tie) for p, r in zip(prompts, results, strict=True)
    ]
    assert np.mean(covered) > 5, covered
