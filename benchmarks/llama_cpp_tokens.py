"""llama.cpp's side of `tokenizer_agreement.py`: runs where llama-cpp-python is installed.

    python llama_cpp_tokens.py MODEL.gguf < TEXTS.json

TEXTS.json is a list of strings. Prints one JSON object: `plain` and `special`, the ids of each text with
special tokens read as text and as tokens, and `pieces`, the bytes of each token in hexadecimal.
"""

import ctypes
import json
import sys

import llama_cpp

_UNUSED = 1 << 1  # LLAMA_TOKEN_ATTR_UNUSED


def main(path: str) -> None:
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
    if not model:
        sys.exit(f"llama.cpp cannot load {path}")
    vocab = llama_cpp.llama_model_get_vocab(model)
    texts = [text.encode() for text in json.load(sys.stdin)]
    plain = [tokenize(vocab, text, special=False) for text in texts]
    special = [tokenize(vocab, text, special=True) for text in texts]
    pieces = [piece(vocab, index) for index in range(llama_cpp.llama_vocab_n_tokens(vocab))]
    json.dump({"plain": plain, "special": special, "pieces": pieces}, sys.stdout)


def tokenize(vocab: object, text: bytes, *, special: bool) -> list[int]:
    ids = (llama_cpp.llama_token * (len(text) + 8))()
    count = llama_cpp.llama_tokenize(vocab, text, len(text), ids, len(ids), True, special)
    return list(ids[:count])


def piece(vocab: object, index: int) -> str | None:
    """None for a token that the file marks as unused: llama.cpp does not show it."""
    if llama_cpp.llama_vocab_get_attr(vocab, index) & _UNUSED:
        return None
    buffer = ctypes.create_string_buffer(1024)
    count = llama_cpp.llama_token_to_piece(vocab, index, buffer, len(buffer), 0, True)
    return buffer.raw[:count].hex()


if __name__ == "__main__":
    main(sys.argv[1])
