"""Configs of well-known models, in short."""

from jaxopt_llm.models import Experts, ModelConfig, Rope


def llama(layers: int = 32, **changes) -> ModelConfig:
    """Llama-3.1-8B."""
    sizes = {
        "vocab_size": 128256,
        "d_model": 4096,
        "d_ff": 14336,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "max_seq_len": 131072,
        "windows": (None,) * layers,
    }
    return ModelConfig(family="llama", num_layers=layers, rope=Rope(), **(sizes | changes))


def mixtral() -> ModelConfig:
    """Mixtral-8x7B."""
    experts = Experts(count=8, per_token=2, d_ff=14336, layers=(True,) * 32)
    return llama(vocab_size=32000, experts=experts)
