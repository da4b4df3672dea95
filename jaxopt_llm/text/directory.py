"""Tokenizers as Hugging Face directories: tokenizer.json and the small files beside it."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from etils import epath
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from jaxopt_llm.text import pretokenizers
from jaxopt_llm.text.gguf_read import template

# Byte-level tokenizers published as vocab.json and merges.txt: the class says how they cut text.
_PRE_TOKENIZERS = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}

_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))


class TokenizerFiles:
    """The files that make a tokenizer in one directory.

    Raises:
      ValueError: says which file is missing or malformed.
    """

    def __init__(self, path: epath.Path):
        self._path = path
        self._config = self._json("tokenizer_config.json")
        self._map = self._json("special_tokens_map.json")

    def backend(self) -> Backend:
        """The tokenizer itself, with the tokens that only tokenizer_config.json knows."""
        backend = self._backend()
        added, known = self._added_tokens(), backend.get_added_tokens_decoder()
        backend.add_tokens([token for index, token in added if index not in known])
        for index, token in added:
            if backend.token_to_id(token.content) != index:
                raise ValueError(
                    f"{self._path}: {token.content!r} is {index} in tokenizer_config.json, but "
                    f"{backend.token_to_id(token.content)} in the vocabulary"
                )
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        missing = [token for token in dict.fromkeys(self._named().values()) if token not in special]
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
        self._set_post_processor(backend)
        return backend

    def special_tokens(self, backend: Backend) -> dict[str, str]:
        """Text by role; where no file names the token, config.json may give its id."""
        named = self._named()
        for role in ("bos_token", "eos_token", "pad_token"):
            ids = self._config_ids(role + "_id")
            token = backend.id_to_token(ids[0]) if ids else None
            if role not in named and token is not None:
                named[role] = token
        return named

    def eos_ids(self, backend: Backend) -> set[int]:
        """The end token, and those that generation_config.json and config.json list."""
        named = backend.token_to_id(self._named().get("eos_token", ""))
        return {*self._config_ids("eos_token_id"), *([] if named is None else [named])}

    def chat_templates(self) -> dict[str, str]:
        """By name; files override tokenizer_config.json, as in transformers."""
        match self._config.get("chat_template"):
            case None:
                templates = {}
            case str(text):
                templates = {"default": text}
            case [*entries] if all(
                isinstance(e, dict) and isinstance(e.get("name"), str) and isinstance(e.get("template"), str)
                for e in entries
            ):
                templates = {entry["name"]: entry["template"] for entry in entries}
            case other:
                raise ValueError(
                    f"{self._path}: chat_template in tokenizer_config.json is {type(other).__name__}, not a "
                    "string or a list of objects with 'name' and 'template'"
                )
        files = {"default": "chat_template.jinja", "tool_use": "additional_chat_templates/tool_use.jinja"}
        found = {name: file for name, file in files.items() if (self._path / file).exists()}
        return templates | {name: self._text(file) for name, file in found.items()}

    def _backend(self) -> Backend:
        if (self._path / "tokenizer.json").exists():
            try:
                return Backend.from_str(self._text("tokenizer.json"))
            except Exception as error:  # tokenizers raises no narrower one
                raise ValueError(f"{self._path / 'tokenizer.json'} is malformed: {error}") from error
        if (self._path / "vocab.json").exists() and (self._path / "merges.txt").exists():
            return self._byte_level_bpe()
        files = self._path.iterdir() if self._path.is_dir() else None
        found = "no such directory" if files is None else sorted(file.name for file in files)
        raise ValueError(
            f"{self._path} has no tokenizer.json (found: {found}); from a tokenizer.model, make one with "
            "transformers: AutoTokenizer.from_pretrained(path).save_pretrained(path)"
        )

    def _byte_level_bpe(self) -> Backend:
        kind = str(self._config.get("tokenizer_class", "")).removesuffix("Fast")
        if kind not in _PRE_TOKENIZERS:
            raise ValueError(
                f"{self._path} has vocab.json and merges.txt, but no tokenizer.json, which is needed for "
                f"tokenizer_class={kind!r} (all but {sorted(_PRE_TOKENIZERS)})"
            )
        lines = self._text("merges.txt").split("\n")
        pairs = (line.split(" ") for line in lines if line and not line.startswith("#version"))
        pre = pretokenizers.by_name(_PRE_TOKENIZERS[kind])
        try:
            merges = [(left, right) for left, right in pairs]
            backend = Backend(models.BPE(vocab=self._json("vocab.json"), merges=merges))
        except Exception as error:  # tokenizers raises no narrower one
            raise ValueError(f"{self._path}: vocab.json and merges.txt do not fit: {error}") from error
        if pre.nfc:
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre.build()
        backend.decoder = decoders.ByteLevel()
        return backend

    def _added_tokens(self) -> list[tuple[int, AddedToken]]:
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        try:
            entries = {
                int(index): entry for index, entry in self._config.get("added_tokens_decoder", {}).items()
            }
            return [
                (index, AddedToken(entry["content"], **{flag: entry.get(flag, False) for flag in flags}))
                for index, entry in sorted(entries.items())
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self._path}: added_tokens_decoder in tokenizer_config.json is malformed: {error!r}"
            ) from error

    def _named(self) -> dict[str, str]:
        """Tokens with a role: a string, or an object with its flags."""
        found = {}
        for key, value in (self._map | self._config).items():
            token = value.get("content") if isinstance(value, dict) else value
            if key in _ROLES and isinstance(token, str):
                found[key] = token
        return found

    def _set_post_processor(self, backend: Backend) -> None:
        """What transformers does: tokenizer_config.json's flags, if any, overrule tokenizer.json."""
        if "add_bos_token" not in self._config and "add_eos_token" not in self._config:
            return
        around = {}
        for role in ("bos_token", "eos_token"):
            wanted = self._config.get(f"add_{role}")
            if wanted is not None and type(wanted) is not bool:
                raise ValueError(
                    f"{self._path}: add_{role} in tokenizer_config.json is {wanted!r}; true or false was expected"
                )
            token = self._named().get(role, "")
            index = backend.token_to_id(token)
            around[role] = (token, index) if wanted and index is not None else None
        backend.post_processor = template(around["bos_token"], around["eos_token"])

    def _config_ids(self, key: str) -> list[int]:
        ids: list[int] = []
        for name in ("generation_config.json", "config.json"):
            value = self._json(name).get(key)
            listed = value if isinstance(value, list) else [] if value is None else [value]
            if any(type(index) is not int or not -1 <= index < 2**31 for index in listed):
                raise ValueError(f"{self._path / name} has {key}={value!r}; ids of tokens were expected")
            ids += [index for index in listed if index >= 0]  # some files write -1 for none
        return ids

    def _json(self, name: str) -> dict[str, Any]:
        if not (self._path / name).exists():
            return {}
        try:
            value = json.loads(self._text(name))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self._path / name} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{self._path / name} must hold a JSON object, not {type(value).__name__}")
        return value

    def _text(self, name: str) -> str:
        try:
            return (self._path / name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path / name} is not UTF-8: {error}") from error


def write(
    path: epath.Path,
    backend: Backend,
    *,
    special_tokens: Mapping[str, str],
    eos_ids: Collection[int],
    chat_templates: Mapping[str, str],
) -> None:
    """tokenizer.json, tokenizer_config.json and, where there are end tokens, generation_config.json."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **special_tokens,
    }
    if set(chat_templates) == {"default"}:
        config["chat_template"] = chat_templates["default"]
    elif chat_templates:
        config["chat_template"] = [{"name": name, "template": text} for name, text in chat_templates.items()]
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8"
    )
    if eos_ids:
        generation = json.dumps({"eos_token_id": sorted(eos_ids)}, indent=2)
        (path / "generation_config.json").write_text(generation, encoding="utf-8")
