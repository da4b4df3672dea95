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
    model, tokenizer = jo.load(data_dir / "stories260K.gguf")
    tokenizer.chat_templates["default"] = TEMPLATE
    directory = tmp_path_factory.mktemp("storyteller") / "model"
    checkpoints.export_hf(model, tokenizer, directory)
    return directory
