"""Gemma 3, text (arXiv:2503.19786): qk-norm, five local layers to one global, a rope for each."""

import re
from typing import Any

from jaxopt_llm.models.config import ModelConfig
from jaxopt_llm.models.families.gemma2 import gemma_keys, gemma_settings
from jaxopt_llm.models.family import QK_NORMS, SANDWICH_NORMS, Family, HFConfig, decoder_names, rope_to_hf


def _read(hf: HFConfig) -> ModelConfig:
    hf.expect("use_bidirectional_attention", False)
    period = hf.take("sliding_window_pattern", 6)
    period = hf.take("_sliding_window_pattern", period)
    local_theta = hf.take("rope_local_base_freq", 10000.0)
    context = hf.take("max_position_embeddings")
    full = hf.rope(context, theta=1e6, layer_type="full_attention")
    local = HFConfig({"rope_parameters": hf.take("rope_parameters", {})})
    return hf.decoder(
        "gemma3_text",
        windows=hf.windows(lambda i: (i + 1) % period != 0, hf.take("sliding_window", 4096)),
        rope=full,
        rope_local=local.rope(context, theta=local_theta, layer_type="sliding_attention"),
        qk_norm="head",
        **gemma_settings(hf),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    assert config.rope_local
    scaling = None if config.rope.kind == "default" else rope_to_hf(config.rope)
    return gemma_keys(config) | {
        "rope_theta": config.rope.theta,
        "rope_scaling": scaling,
        "rope_local_base_freq": config.rope_local.theta,
    }


FAMILY = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read=_read,
    write=_write,
    names=decoder_names(**QK_NORMS, **SANDWICH_NORMS),
    skipped=re.compile(r"(vision_tower|multi_modal_projector)\..*"),
)
