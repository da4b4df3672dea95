"""Compares our tokenizers with llama.cpp's, id by id, on all the text there is.

    python -m benchmarks.tokenizer_agreement --peer=PYTHON [MODEL.gguf TOKENIZER_DIRECTORY ...]

PYTHON is an interpreter with llama-cpp-python. A directory's tokenizer is first written as GGUF metadata by
us; llama.cpp's ids are then held against those of the directory's own tokenizer. Texts are the files under
`--data` (`$JAXOPT_DATA`), tests/data/wikitext.txt and seeded random strings. Prints a line a tokenizer, then
one JSON object; the exit code is 1 where anything differs. Takes about a minute a tokenizer on one core.
"""

import hashlib
import json
import random
import re
import sys
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks import peer
from benchmarks.record import data_folder, record
from jaxopt_llm.checkpoints import gguf, resolve
from jaxopt_llm.text import Tokenizer

_ROOT = Path(__file__).parents[1]
_MODELS = ("smollm2-135m-instruct", "gemma3-270m", str(_ROOT / "tests" / "data" / "stories260K.gguf"))
_DATA = flags.DEFINE_string("data", str(data_folder()), "Folder with the larger texts.")

# Letters, marks and signs of several scripts, spaces of several kinds, controls, runs that are tokens.
_MATERIAL = [
    *"aAeEzZéßøñÅſ 0123456789²½Ⅷ٣।",
    *"日本語한국어кириллицаעבריתعربيไทยहिन्दीǅ",
    *"😀👩‍👩‍👧🇩🇪\u0301\u200b\u200d\ufeff\ufffd▁",
    *["  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x00", "\x85"],
    *[
        "'s",
        "'LL",
        "'ſ",
        "--",
        "....",
        "====",
        "```",
        "<s>",
        "</b>",
        "<|",
        "|>",
        "http://",
        "1234",
        "12.5",
        "the",
    ],
]

# llama.cpp takes these for control tokens, whatever their type.
_RETYPED = re.compile("fim|file_sep|repo")


def main(argv: Sequence[str]) -> None:
    results = [compare(resolve(name)) for name in argv[1:] or _MODELS]
    for result in results:
        print(
            "{name}: {tokens} tokens of {texts} texts, {different} texts differ".format(**result),
            file=sys.stderr,
        )
    record(Path(__file__).stem, {"llama_cpp": peer.version(), "tokenizers": results})
    sys.exit(any(result["different"] or result["pieces_different"] for result in results))


def compare(path: Path) -> dict[str, Any]:
    """How our ids and llama.cpp's agree for one tokenizer."""
    with tempfile.TemporaryDirectory() as scratch:
        if path.is_dir():
            tokenizer = Tokenizer.from_directory(path)
            model = Path(scratch) / "vocabulary.gguf"
            gguf.write(model, {"general.architecture": "llama"} | tokenizer.to_gguf(), [])
        else:
            model = path
            with gguf.open_file(path) as file:
                tokenizer = Tokenizer.from_gguf(file.metadata)
        texts = [*corpus(Path(_DATA.value)), *random_texts(tokenizer)]
        theirs = json.loads(peer.ask("llama_cpp_tokens.py", model, stdin=json.dumps(texts)))
    ours = {
        "plain": tokenizer.encode_batch(texts),
        "special": tokenizer.encode_batch(texts, parse_special=True),
    }
    different = [
        text
        for i, text in enumerate(texts)
        if any(ours[kind][i] != theirs[kind][i] for kind in ("plain", "special"))
    ]
    for text in different[:5]:
        print(f"{path}: differs on {text[:200]!r}", file=sys.stderr)
    pieces = [None if piece is None else bytes.fromhex(piece) for piece in theirs["pieces"]]
    return {
        "name": path.name,
        "texts": len(texts),
        "tokens": sum(map(len, ours["plain"])),
        "different": len(different),
        "pieces_different": sum(
            p is not None and tokenizer.token_bytes(i) != p for i, p in enumerate(pieces)
        ),
        "sha256": digest([index for ids in ours["plain"] for index in ids]),
        "wikitext_sha256": digest(tokenizer.encode(_wikitext().read_text())),
    }


def digest(ids: Sequence[int]) -> str:
    """SHA-256 of the ids as little-endian 32-bit integers."""
    return hashlib.sha256(np.asarray(ids, "<u4").tobytes()).hexdigest()


def corpus(folder: Path) -> Iterator[str]:
    """Whole text files, and every string in the JSON lines."""
    yield _wikitext().read_text()
    for path in sorted((folder / "wikitext").glob("*.raw")):
        yield path.read_text()
    for path in sorted(folder.glob("*/*.jsonl")):
        for line in path.read_text().splitlines():
            yield from _strings(json.loads(line))


def random_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Seeded, in NFC: llama.cpp does not normalise, where some of the models do."""
    generator = random.Random(0)
    tokens = [
        data.decode(errors="ignore") for data in map(tokenizer.token_bytes, range(tokenizer.vocab_size))
    ]
    tokens = [token for token in tokens if not _RETYPED.search(token)]
    for _ in range(3000):
        material = generator.choice([_MATERIAL, tokens, [*_MATERIAL, *generator.sample(tokens, 100)]])
        text = "".join(generator.choices(material, k=generator.randrange(40)))
        yield unicodedata.normalize("NFC", text)


def _wikitext() -> Path:
    return _ROOT / "tests" / "data" / "wikitext.txt"


def _strings(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case list():
            for item in value:
                yield from _strings(item)
        case dict():
            for item in value.values():
                yield from _strings(item)


if __name__ == "__main__":
    app.run(main)
