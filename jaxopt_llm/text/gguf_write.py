"""Tokenizers into GGUF metadata: the reverse of `gguf_read`, for llama.cpp and for ourselves.

Only the standard keys are written, for they are all that other programs read: a tokenizer that they cannot
express is refused, rather than written so that its readers silently get other ids.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from tokenizers import Tokenizer as Backend

from jaxopt_llm.text import pretokenizers, spm
from jaxopt_llm.text.gguf_read import CHAT_TEMPLATE, PREFIX, ROLES, TURN_ENDS, TokenType
from jaxopt_llm.text.pieces import Spelling


def to_metadata(
    backend: Backend,
    *,
    special_tokens: Mapping[str, str],
    eos_ids: Collection[int],
    chat_templates: Mapping[str, str],
) -> dict[str, Any]:
    """The `tokenizer.*` keys of a GGUF file, as plain Python values; `ValueError` if they cannot say it."""
    parsed = json.loads(backend.to_str())
    byte_level = Spelling(backend).byte_level
    tokens, types = _vocabulary(
        backend, parsed, unknown=None if byte_level else special_tokens.get("unk_token")
    )
    fields = _byte_level_fields(parsed) if byte_level else _sentencepiece_fields(parsed, tokens, types)
    fields |= {"tokens": tokens, "token_type": types}
    fields |= _role_fields(backend, special_tokens, eos_ids)
    metadata = {PREFIX + name: value for name, value in fields.items()}
    for name, template in chat_templates.items():
        metadata[CHAT_TEMPLATE if name == "default" else f"{CHAT_TEMPLATE}.{name}"] = template
    return metadata


def _vocabulary(
    backend: Backend, parsed: Mapping[str, Any], unknown: str | None
) -> tuple[list[str], list[int]]:
    """Token and type by id; ids without a token get unused fillers, as from llama.cpp's converters."""
    ids = backend.get_vocab(with_added_tokens=True)
    count = max(ids.values(), default=-1) + 1
    tokens, types = [f"[PAD{i}]" for i in range(count)], [int(TokenType.UNUSED)] * count
    byte_tokens = (
        {f"<0x{byte:02X}>" for byte in range(256)} if parsed["model"].get("byte_fallback") else set()
    )
    for token, index in ids.items():
        tokens[index] = token
        types[index] = int(TokenType.BYTE if token in byte_tokens else TokenType.NORMAL)
    for added in parsed["added_tokens"]:
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise ValueError(
                f"GGUF cannot hold the lstrip, rstrip or single_word flag of {added['content']!r}; "
                "keep the Hugging Face or Orbax form"
            )
        special = TokenType.UNKNOWN if added["content"] == unknown else TokenType.CONTROL
        types[added["id"]] = int(special if added["special"] else TokenType.USER_DEFINED)
    return tokens, types


def _byte_level_fields(parsed: Mapping[str, Any]) -> dict[str, Any]:
    merges = [" ".join(pair) for pair in _merges(parsed)]
    return {"model": "gpt2", "pre": pretokenizers.name_of(parsed), "merges": merges}


def _sentencepiece_fields(parsed: Mapping[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    pieces = [token for token, type_ in zip(tokens, types, strict=True) if type_ == TokenType.NORMAL]
    scores = spm.scores_from_merges(pieces, _merges(parsed))
    for index, type_ in enumerate(types):
        if type_ == TokenType.USER_DEFINED:  # GGUF has them as they are typed
            tokens[index] = tokens[index].replace("▁", " ")
    return {
        "model": "llama",
        "pre": "default",
        "scores": [scores.get(token, -float(len(tokens))) for token in tokens],
        "add_space_prefix": _space_prefix(parsed),
    }


def _merges(parsed: Mapping[str, Any]) -> list[tuple[str, str]]:
    """tokenizer.json writes a merge as "a b", or, since tokenizers 0.20, as ["a", "b"]."""
    merges = parsed["model"]["merges"]
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in pairs]


def _space_prefix(parsed: Mapping[str, Any]) -> bool:
    """Whether SentencePiece text gets a space in front; `ValueError` if more happens to it.

    GGUF readers add the space after every special token too, as the `Prepend` normalizer does; the newer
    `Metaspace` with scheme "first" adds it once. llama.cpp's own converters treat both alike.
    """
    normalizer, pre_tokenizer = parsed.get("normalizer"), parsed.get("pre_tokenizer") or {}
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if normalizer is None and pre_tokenizer.get("type") == "Metaspace" and not pre_tokenizer["split"]:
        return pre_tokenizer["prepend_scheme"] != "never"
    # Gemma's file also splits at spaces, of which its normalizer has left none.
    spaces = {"type": "Split", "pattern": {"String": " "}}
    if not pre_tokenizer or pre_tokenizer.items() >= spaces.items():
        if normalizer == escape:
            return False
        if normalizer == {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, escape]}:
            return True
    raise ValueError(f"GGUF cannot express this SentencePiece tokenizer's {normalizer=} and {pre_tokenizer=}")


def _role_fields(
    backend: Backend, special_tokens: Mapping[str, str], eos_ids: Collection[int]
) -> dict[str, Any]:
    ids = {role: backend.token_to_id(token) for role, token in special_tokens.items()}
    fields: dict[str, Any] = {
        f"{name}_token_id": ids[role] for role, name in ROLES.items() if ids.get(role) is not None
    }
    # Readers know some ends by their text; the two keys there are go to the others first.
    known = {index: backend.id_to_token(index) in TURN_ENDS for index in eos_ids}
    others = sorted(set(eos_ids) - {ids.get("eos_token")}, key=lambda index: (known[index], index))
    if not all(known[index] for index in others[2:]):
        raise ValueError(f"GGUF has keys for three end tokens; this tokenizer has {sorted(eos_ids)}")
    fields |= {f"{name}_token_id": index for name, index in zip(("eot", "eom"), others, strict=False)}
    before, after = _around(backend)
    bos, eos = ids.get("bos_token"), ids.get("eos_token")
    if before not in ([], [bos]) or after not in ([], [eos]):
        raise ValueError(
            f"GGUF can put only {bos=} and {eos=} around a text; this tokenizer puts {before}, {after}"
        )
    return fields | {"add_bos_token": bool(before), "add_eos_token": bool(after)}


def _around(backend: Backend) -> tuple[list[int], list[int]]:
    """The ids that encoding puts before and after those of a text."""
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    start = next(i for i in range(len(full) + 1) if full[i : i + len(bare)] == bare)
    return full[:start], full[start + len(bare) :]
