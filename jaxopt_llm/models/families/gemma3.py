"""Gemma 3, text (arXiv:2503.19786): qk-norm, five local layers to one global, a rope for each."""

from collections.abc import Mapping
from typing import Any

from jaxopt_llm.models.config import ModelConfig
from jaxopt_llm.models.families.gemma2 import gemma_keys, gemma_settings
from jaxopt_llm.models.family import QK_NORMS, SANDWICH_NORMS, Family, HFConfig, decoder_names, rope_to_hf

# What transformers assumes of a multimodal checkpoint's `text_config`, which the hub's files leave out.
TEXT_DEFAULTS = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


# Keys of the wrapper that say nothing of the text model.
_VISION_KEYS = """vision_config mm_tokens_per_image boi_token_index eoi_token_index image_token_index boi_token_id
    eoi_token_id image_token_id""".split()


def text_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the text model in a multimodal checkpoint, every other key of it accounted for."""
    wrapper = HFConfig(values)
    text = TEXT_DEFAULTS | wrapper.table("text_config")
    for key in _VISION_KEYS:
        wrapper.take(key, None)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
        text[key] = wrapper.take(key, text.get(key))
    wrapper.finish()
    return text


def _read(hf: HFConfig) -> ModelConfig:
    hf.expect("use_bidirectional_attention", False)
    period = hf.count("sliding_window_pattern", 6)
    period = hf.count("_sliding_window_pattern", period)
    local_theta = hf.number("rope_local_base_freq", 10000.0)
    context = hf.count("max_position_embeddings")
    full = hf.rope(context, theta=1e6, layer_type="full_attention")
    local = HFConfig({"rope_parameters": hf.table("rope_parameters")})
    return hf.decoder(
        "gemma3_text",
        windows=hf.windows(lambda i: (i + 1) % period != 0, hf.count("sliding_window", 4096)),
        rope=full,
        rope_local=local.rope(context, theta=local_theta, layer_type="sliding_attention"),
        qk_norm="head",
        **gemma_settings(hf),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    local = config.rope_local or config.rope
    keys = gemma_keys(config) | {"rope_local_base_freq": local.theta}
    if local.kind == "default":
        return keys
    ropes = {
        "full_attention": config.rope,
        "sliding_attention": local,
    }  # in the words of transformers 5 alone
    return keys | {
        "rope_parameters": {
            kind: rope_to_hf(rope) | {"rope_theta": rope.theta} for kind, rope in ropes.items()
        }
    }


FAMILY = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read=_read,
    write=_write,
    names=decoder_names(**QK_NORMS, **SANDWICH_NORMS),
    towers=("vision_tower", "multi_modal_projector"),
    heads_divide_width=True,
)
