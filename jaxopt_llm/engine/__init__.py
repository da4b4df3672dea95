"""Floor 4: from prompts to tokens."""

from jaxopt_llm.engine.generator import Generator, generate
from jaxopt_llm.engine.prompt import Prompt
from jaxopt_llm.engine.request import Chunk, Result, TokenLogprob
from jaxopt_llm.engine.sampling import SamplingParams

__all__ = ["Chunk", "Generator", "Prompt", "Result", "SamplingParams", "TokenLogprob", "generate"]
