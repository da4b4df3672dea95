"""Floor 4: from prompts to tokens."""

from jaxopt_llm.engine.config import EngineConfig
from jaxopt_llm.engine.engine import Engine, generate
from jaxopt_llm.engine.plan import Metrics
from jaxopt_llm.engine.prompt import Prompt, encode
from jaxopt_llm.engine.request import Chunk, Result, Score, TokenLogprob
from jaxopt_llm.engine.sampling import SamplingParams
from jaxopt_llm.engine.serving import ServingConfig
from jaxopt_llm.engine.stream import Stream
from jaxopt_llm.engine.timeline import Span, Timeline

__all__ = [
    "Chunk",
    "Engine",
    "EngineConfig",
    "Metrics",
    "Prompt",
    "Result",
    "SamplingParams",
    "Score",
    "ServingConfig",
    "Span",
    "Stream",
    "Timeline",
    "TokenLogprob",
    "encode",
    "generate",
]
