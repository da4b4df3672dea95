"""What llama.cpp makes of prompts: run by `llama_cpp_loads.py` in an environment that has llama-cpp-python.

    python llama_cpp_greedy.py MODEL.gguf OUT.npz STEPS < prompts.json

Prompts are a list of `{"text": ..., "ids": [...]}`. For prompt i the file gets `tokens_i` [STEPS], the greedy
continuation of the ids, `logits_i` [STEPS, V], from which each was taken, and `ids_i`, its own ids of the text
(nothing where the file has no vocabulary).
"""

import ctypes
import json
import sys

import llama_cpp
import numpy as np


def decode(context, ids, start):
    """Feeds ids at positions start, start + 1, ... and returns the logits of the last."""
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), start + i, 1
        batch.seq_id[i][0], batch.logits[i] = 0, int(i == len(ids) - 1)
    if llama_cpp.llama_decode(context, batch):
        raise RuntimeError("llama_decode failed")
    llama_cpp.llama_batch_free(batch)
    vocab = llama_cpp.llama_vocab_n_tokens(
        llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(context))
    )
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocab,)).copy()


def greedy(model, ids, steps):
    """The continuation and its logits, in a fresh context whose cache is not rounded."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = len(ids) + steps
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, params)
    tokens, logits = [], [decode(context, ids, 0)]
    while True:
        tokens.append(int(logits[-1].argmax()))
        if len(tokens) == steps:
            break
        logits.append(decode(context, tokens[-1:], len(ids) + len(tokens) - 1))
    llama_cpp.llama_free(context)
    return np.array(tokens), np.stack(logits)


def tokenize(model, text):
    vocab = llama_cpp.llama_model_get_vocab(model)
    if llama_cpp.llama_vocab_type(vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        return np.zeros(0, np.int32)
    data, room = text.encode(), len(text.encode()) + 8
    ids = (llama_cpp.llama_token * room)()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), ids, room, True, False)
    return np.array(ids[:count], np.int32)


def main():
    path, out, steps = sys.argv[1:]
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp does not load {path}")
    results = {}
    for i, prompt in enumerate(json.load(sys.stdin)):
        results[f"tokens_{i}"], results[f"logits_{i}"] = greedy(model, prompt["ids"], int(steps))
        results[f"ids_{i}"] = tokenize(model, prompt["text"])
    np.savez(out, **results)


main()
