"""gpt-oss (arXiv:2508.10925): attention sinks, biased experts with a clamped gate, every other layer local."""

from typing import Any

from jaxopt_llm.models.config import Experts, ModelConfig
from jaxopt_llm.models.family import Family, HFConfig, Source, decoder_names, windows_to_hf


def _read(hf: HFConfig) -> ModelConfig:
    bias = hf.flag("attention_bias", True)
    method = hf.table("quantization_config").get("quant_method", "mxfp4")
    if method != "mxfp4":
        raise ValueError(f"config.json has quant_method {method!r}; only 'mxfp4'")
    hf.take("initial_context_length", None)  # repeats rope_scaling's original_max_position_embeddings
    per_token = hf.count("num_experts_per_tok", None) or hf.count("experts_per_token")
    hf.expect("experts_per_token", per_token)
    hf.expect("swiglu_alpha", 1.702)
    experts = Experts(
        count=hf.count("num_local_experts"),
        per_token=per_token,
        d_ff=hf.count("intermediate_size"),
        layers=(True,) * hf.layers(),
        bias=True,
    )
    return hf.decoder(
        "gpt_oss",
        qkv_bias=bias,
        o_bias=bias,
        attention_sinks=True,
        windows=hf.windows(lambda i: i % 2 == 0, hf.count("sliding_window", 128)),
        swiglu_limit=hf.number("swiglu_limit", 7.0),
        experts=experts,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    assert config.experts
    return windows_to_hf(config) | {
        "attention_bias": config.o_bias,
        "num_local_experts": config.experts.count,
        "num_experts_per_tok": config.experts.per_token,
        "experts_per_token": config.experts.per_token,
        "swiglu_limit": config.swiglu_limit,
    }


FAMILY = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    read=_read,
    write=_write,
    names=decoder_names(
        attention__sinks="self_attn.sinks",
        moe__router__weight="mlp.router.weight",
        moe__router__bias="mlp.router.bias",
        moe__gate__weight=Source("mlp.experts.gate_up_proj", part=(0, 2), transposed=True),
        moe__gate__bias=Source("mlp.experts.gate_up_proj_bias", part=(0, 2)),
        moe__up__weight=Source("mlp.experts.gate_up_proj", part=(1, 2), transposed=True),
        moe__up__bias=Source("mlp.experts.gate_up_proj_bias", part=(1, 2)),
        moe__down__weight=Source("mlp.experts.down_proj", transposed=True),
        moe__down__bias=Source("mlp.experts.down_proj_bias"),
    ),
)
