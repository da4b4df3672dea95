"""Qwen3 mixture of experts (arXiv:2505.09388)."""

from typing import Any

from jaxopt_llm.models.config import Experts, ModelConfig
from jaxopt_llm.models.family import QK_NORMS, Family, HFConfig, decoder_names


def _read(hf: HFConfig) -> ModelConfig:
    bias = hf.flag("attention_bias", False)
    step, dense = hf.count("decoder_sparse_step", 1), hf.listed("mlp_only_layers", [])
    layers = range(hf.layers())
    experts = Experts(
        count=hf.count("num_experts", None) or hf.count("num_local_experts"),
        per_token=hf.count("num_experts_per_tok"),
        d_ff=hf.count("moe_intermediate_size"),
        layers=tuple(i not in dense and (i + 1) % step == 0 for i in layers),
        renormalize=hf.flag("norm_topk_prob", False),
    )
    slides = hf.flag("use_sliding_window", False)
    hf.take("max_window_layers", None)  # read by nobody in this family: its window is for all layers or none
    window = hf.count("sliding_window", None)
    return hf.decoder(
        "qwen3_moe",
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
        windows=hf.one_window(window if slides else None),
        experts=experts,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    assert config.experts
    return {
        "attention_bias": config.o_bias,
        "use_sliding_window": config.windows[0] is not None,
        "sliding_window": config.windows[0],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, sparse in enumerate(config.experts.layers) if not sparse],
        "num_experts": config.experts.count,
        "num_experts_per_tok": config.experts.per_token,
        "moe_intermediate_size": config.experts.d_ff,
        "norm_topk_prob": config.experts.renormalize,
    }


FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read=_read,
    write=_write,
    names=decoder_names(
        **QK_NORMS,
        moe__router__weight="mlp.gate.weight",
        moe__gate__weight="mlp.experts.{e}.gate_proj.weight",
        moe__up__weight="mlp.experts.{e}.up_proj.weight",
        moe__down__weight="mlp.experts.{e}.down_proj.weight",
    ),
)
