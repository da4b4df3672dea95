"""llama.cpp's side of `llama_cpp_loads.py`: runs where llama-cpp-python is installed.

    python llama_cpp_greedy.py MODEL.gguf OUT.npz STEPS < PROMPTS.json

PROMPTS.json is a list of lists of token ids. OUT.npz gets, for prompt i, its greedy continuation `tokens_i`
[STEPS], and `logits_i` [STEPS, V], from which each token was taken.
"""

import ctypes
import json
import sys
from collections.abc import Sequence

import llama_cpp
import numpy as np


def main(path: str, out: str, steps: str) -> None:
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp cannot load {path}")
    results = {}
    for i, prompt in enumerate(json.load(sys.stdin)):
        results[f"tokens_{i}"], results[f"logits_{i}"] = greedy(model, prompt, int(steps))
    np.savez(out, **results)


def greedy(model: object, prompt: Sequence[int], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and logits, with a float32 cache and no fused attention: llama.cpp at its most exact."""
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = len(prompt) + steps
    parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
    parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, parameters)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    tokens: list[int] = []
    logits: list[np.ndarray] = []
    while len(tokens) < steps:
        decode(context, tokens[-1:] or prompt, len(prompt) + len(tokens) - 1 if tokens else 0)
        last = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocab,))
        logits.append(last.copy())
        tokens.append(int(last.argmax()))
    llama_cpp.llama_free(context)
    return np.array(tokens), np.stack(logits)


def decode(context: object, tokens: Sequence[int], start: int) -> None:
    """Feeds tokens at the positions from `start` on; the last has logits."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
        batch.seq_id[i][0], batch.logits[i] = 0, i == len(tokens) - 1
    if llama_cpp.llama_decode(context, batch):
        raise RuntimeError("llama_decode failed")
    llama_cpp.llama_batch_free(batch)


if __name__ == "__main__":
    main(*sys.argv[1:])
