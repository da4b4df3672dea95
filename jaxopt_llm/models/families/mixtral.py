"""Mixtral of experts (arXiv:2401.04088)."""

from typing import Any

from jaxopt_llm.models.config import Experts, ModelConfig
from jaxopt_llm.models.family import Family, HFConfig, decoder_names


def _read(hf: HFConfig) -> ModelConfig:
    experts = Experts(
        count=hf.count("num_local_experts"),
        per_token=hf.count("num_experts_per_tok"),
        d_ff=hf.count("intermediate_size"),
        layers=(True,) * hf.layers(),
    )
    windows = hf.one_window(hf.count("sliding_window", None))
    return hf.decoder("mixtral", windows=windows, experts=experts)


def _write(config: ModelConfig) -> dict[str, Any]:
    assert config.experts
    return {
        "sliding_window": config.windows[0],
        "num_local_experts": config.experts.count,
        "num_experts_per_tok": config.experts.per_token,
    }


FAMILY = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    read=_read,
    write=_write,
    names=decoder_names(
        moe__router__weight="block_sparse_moe.gate.weight",
        moe__gate__weight="block_sparse_moe.experts.{e}.w1.weight",
        moe__up__weight="block_sparse_moe.experts.{e}.w3.weight",
        moe__down__weight="block_sparse_moe.experts.{e}.w2.weight",
    ),
)
