"""Text to tokens and back: tokenizers, chat templates, streaming."""

from jaxopt_llm.text.chat import Message
from jaxopt_llm.text.stream import Detokenizer, StopStrings
from jaxopt_llm.text.tokenizer import Tokenizer

__all__ = ["Detokenizer", "Message", "StopStrings", "Tokenizer"]
