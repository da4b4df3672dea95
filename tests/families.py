"""Tiny random models of every family, without torch: configs, weights, and what transformers makes of them.

`tests/golden/make.py` records transformers' outputs; a test that needs a small model of some family writes
one with `write`. The configs have the keys of the hub's files, with those that cannot change the forward.
Sizes are odd on purpose (`head_dim` is seldom `hidden_size / heads`), and 56 tokens run past every window and
every original context.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden"

COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.51.0",
    "use_cache": True,
}

LLAMA = COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "hidden_size": 48,
    "intermediate_size": 88,
    "mlp_bias": False,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "vocab_size": 101,
}

MISTRAL = COMMON | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "head_dim": 16,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "sliding_window": 16,
    "vocab_size": 97,
}

MIXTRAL = COMMON | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "vocab_size": 101,
}

QWEN2 = COMMON | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 56,
    "intermediate_size": 80,
    "max_window_layers": 2,
    "num_attention_heads": 7,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "sliding_window": 16,  # without effect unless use_sliding_window, as in the hub's files
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 103,
}

QWEN3 = COMMON | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 32,
    "hidden_size": 48,
    "intermediate_size": 72,
    "max_window_layers": 3,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 107,
}

QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "head_dim": 16,
    "hidden_size": 40,
    "mlp_only_layers": [1],
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}

GEMMA2 = COMMON | {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "attention_bias": False,
    "attn_logit_softcapping": 5.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 1.5,
    "head_dim": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 24,
    "rms_norm_eps": 1e-6,
    "sliding_window": 16,
    "tie_word_embeddings": True,
    "vocab_size": 109,
}

GEMMA3_TEXT = {k: v for k, v in GEMMA2.items() if k != "hidden_act"} | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "num_hidden_layers": 6,
    "num_key_value_heads": 1,
    "rope_local_base_freq": 100,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 5000,
    "sliding_window_pattern": 3,
}

# As in gemma-3-4b-it, most of text_config is left to the family's defaults: a global layer every six, the two
# rope bases, query_pre_attn_scalar=256.
GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 105,
    "eoi_token_index": 106,
    "eos_token_id": [1, 106],
    "image_token_index": 104,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 4,
    "model_type": "gemma3",
    "text_config": {
        "head_dim": 16,
        "hidden_size": 48,
        "intermediate_size": 72,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 7,
        "num_key_value_heads": 2,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 16,
        "vocab_size": 107,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {
        "hidden_size": 16,
        "image_size": 16,
        "intermediate_size": 24,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "patch_size": 4,
        "vision_use_head": False,
    },
}

GPT_OSS = COMMON | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "experts_per_token": 3,
    "head_dim": 32,
    "hidden_size": 40,
    "initial_context_length": 32,
    "intermediate_size": 56,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "pad_token_id": 0,
    "rope_scaling": {
        "beta_fast": 3.0,
        "beta_slow": 1.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 1500,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 16,
    "swiglu_limit": 2.0,  # low enough to be reached
    "vocab_size": 113,
}

OLMO2 = COMMON | {
    "architectures": ["Olmo2ForCausalLM"],
    "model_type": "olmo2",
    "attention_bias": False,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000,
    "vocab_size": 127,
}

TINY = {
    "llama": LLAMA,
    "llama_bias": LLAMA | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    "llama_linear": LLAMA | {"head_dim": 16, "rope_scaling": {"factor": 4.0, "type": "linear"}},
    "llama_llama3": LLAMA
    | {
        "head_dim": 16,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 32,
            "rope_type": "llama3",
        },
        "rope_theta": 500.0,
        "tie_word_embeddings": True,
    },
    "llama_yarn": LLAMA
    | {
        "head_dim": 16,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32, "rope_type": "yarn"},
    },
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "qwen2": QWEN2,
    "qwen2_window": QWEN2 | {"max_window_layers": 1, "use_sliding_window": True},
    "qwen3": QWEN3,
    "qwen3_yarn": QWEN3
    | {
        "max_position_embeddings": 160,
        "rope_scaling": {
            "attention_factor": 0.8,
            "beta_fast": 3.0,
            "beta_slow": 0.5,
            "factor": 4.0,
            "original_max_position_embeddings": 40,
            "type": "yarn",
        },
    },
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe_sparse": QWEN3_MOE
    | {"decoder_sparse_step": 2, "mlp_only_layers": [], "norm_topk_prob": False, "num_hidden_layers": 4},
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3_TEXT,
    "gemma3": GEMMA3,
    "gpt_oss": GPT_OSS,
    "gpt_oss_mxfp4": GPT_OSS
    | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
    },
    "olmo2": OLMO2,
}

SHARDED = "mixtral"  # written as two files and an index


def recorded(name: str) -> dict:
    """`tests/golden/NAME.json`: `config`, `config_5` (transformers 5 wrote it), shapes of the `tensors`."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def golden(name: str) -> dict[str, np.ndarray]:
    """`tests/golden/NAME.npz`: `tokens` [B, T], `logits` [B, T, V]; `prompt`, and its 64 `greedy` tokens."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference as a share of the largest expected magnitude."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def weights(name: str) -> dict[str, np.ndarray]:
    """Every tensor as the hub's checkpoints hold it, drawn from a seed of its own: model and tensor name."""
    return {tensor: _draw(name, tensor, shape) for tensor, shape in recorded(name)["tensors"].items()}


def _draw(name: str, tensor: str, shape: list[int]) -> np.ndarray:
    """Noise at a scale that lets every tensor matter; uniform, which NumPy draws alike everywhere."""
    rng = np.random.default_rng(zlib.crc32(f"{name}/{tensor}".encode()))
    if tensor.endswith("_blocks"):
        return rng.integers(0, 256, shape, dtype=np.uint8)
    if tensor.endswith("_scales"):
        return rng.integers(121, 125, shape, dtype=np.uint8)  # 2**(scale - 127)
    gemma = name.startswith("gemma")
    noise = rng.uniform(-math.sqrt(3), math.sqrt(3), shape)
    if tensor.endswith("norm.weight"):
        noise = 0.2 * noise + (not gemma)
    elif "embed_tokens" in tensor:
        noise *= 0.05 if gemma else 0.3  # gemma multiplies them by sqrt(hidden_size)
    elif tensor.endswith("bias"):
        noise *= 0.3
    elif tensor.endswith((".gate.weight", ".router.weight")):
        noise *= np.geomspace(0.5, 4, len(noise))[:, None] / math.sqrt(shape[-1])  # uneven loads
    elif not tensor.endswith("sinks"):
        fan_in = shape[-2] if ".experts." in tensor and len(shape) == 3 else shape[-1]
        noise *= 1.5 / math.sqrt(fan_in)
    return noise.astype(np.float32)


def write(name: str, directory: Path, *, transformers: int = 4) -> None:
    """Writes `config.json`, in the words of that major version of transformers, and the weights."""
    directory.mkdir(parents=True, exist_ok=True)
    config = recorded(name)["config" if transformers == 4 else "config_5"]
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    tensors = weights(name)
    if name != SHARDED:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    shards = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, directory / file, metadata={"format": "pt"})
        shards |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": shards}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
