"""A tiny trained model that chats."""

from pathlib import Path

import pytest

import jaxopt_llm as jo
from jaxopt_llm import checkpoints

TEMPLATE = (
    "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Once upon a time{% endif %}"
)


@pytest.fixture(scope="session")
def storyteller(data_dir, tmp_path_factory) -> Path:
    """stories260K with a chat template; a context of 512 tokens."""
    return _chatting(data_dir / "stories260K.gguf", tmp_path_factory)


@pytest.fixture(scope="session")
def shallow(data_dir, tmp_path_factory) -> Path:
    """The same of two layers, which compiles in half the time."""
    return _chatting(data_dir / "stories107K.gguf", tmp_path_factory)


def _chatting(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tokenizer = jo.load(gguf)
    tokenizer.chat_templates["default"] = TEMPLATE
    directory = tmp_path_factory.mktemp(gguf.stem) / "model"
    checkpoints.export_hf(model, tokenizer, directory)
    return directory
