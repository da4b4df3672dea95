"""Text to token ids and back, for any tokenizer that a checkpoint brings."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, SupportsInt

from etils import epath
from tokenizers import Tokenizer as Backend

from jaxopt_llm.text import chat, directory, gguf_write
from jaxopt_llm.text.gguf_read import GGUFVocabulary
from jaxopt_llm.text.pieces import Spelling


class Tokenizer:
    """A Hugging Face `tokenizers.Tokenizer`, its special tokens and its chat templates.

    Attributes:
      backend: the tokenizer itself.
      special_tokens: text of the tokens with a role, by transformers' name of the role ("bos_token").
      eos_ids: ids that end an answer; chat models have several.
      chat_templates: Jinja templates by name; "default", and for some models "tool_use".
      space_prefix: whether encoding puts a space before the text, which decoding drops (Llama 2).
    """

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_ids: Iterable[int] = (),
        chat_templates: Mapping[str, str] | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.eos_ids = frozenset(eos_ids)
        self.chat_templates = dict(chat_templates or {})
        self._spelling = Spelling(backend)
        self.space_prefix = self._spelling.space_prefix
        self._lock = threading.Lock()

    @classmethod
    def from_directory(cls, path: epath.PathLike) -> "Tokenizer":
        """The tokenizer beside a Hugging Face model; `ValueError` says what is missing or malformed."""
        files = directory.TokenizerFiles(epath.Path(path))
        backend = files.backend()
        return cls(
            backend,
            special_tokens=files.special_tokens(backend),
            eos_ids=files.eos_ids(backend),
            chat_templates=files.chat_templates(),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """The tokenizer in a GGUF file's metadata; `ValueError` says what is missing or malformed."""
        vocabulary = GGUFVocabulary(metadata)
        return cls(
            vocabulary.backend(),
            special_tokens=vocabulary.special_tokens(),
            eos_ids=vocabulary.eos_ids(),
            chat_templates=vocabulary.chat_templates(),
        )

    def to_gguf(self) -> dict[str, Any]:
        """GGUF metadata that `from_gguf` and llama.cpp read; `ValueError` if GGUF cannot express it all."""
        return gguf_write.to_metadata(
            self.backend,
            special_tokens=self.special_tokens,
            eos_ids=self.eos_ids,
            chat_templates=self.chat_templates,
        )

    def save(self, path: epath.PathLike) -> None:
        """Writes what `from_directory`, and transformers' `AutoTokenizer`, read."""
        directory.write(
            epath.Path(path),
            self.backend,
            special_tokens=self.special_tokens,
            eos_ids=self.eos_ids,
            chat_templates=self.chat_templates,
        )

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, special_tokens={self.special_tokens})"

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; a model's embedding may have more rows."""
        return len(self._bytes)

    @property
    def bos_id(self) -> int | None:
        return self._role_id("bos_token")

    @property
    def pad_id(self) -> int | None:
        return self._role_id("pad_token")

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that are no text: markers of turns, ends, padding."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
          text: any Unicode text.
          add_special: put the tokens around it that the model wants around every text (BOS, mostly).
          parse_special: read special tokens written out in the text, as a chat template writes them. Off,
            they are text like any other, so that a prompt cannot forge them.

        Raises:
          ValueError: if the text has a lone surrogate, which UTF-8 cannot hold.
        """
        return self.encode_batch([text], add_special=add_special, parse_special=parse_special)[0]

    def encode_batch(
        self, texts: Sequence[str], *, add_special: bool = True, parse_special: bool = False
    ) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        for text in texts:
            _check_unicode(text)
        with self._lock:  # what follows `encode_special_tokens` must not see another thread's
            self.backend.encode_special_tokens = not parse_special
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special)
        return [encoding.ids for encoding in encodings]

    def encode_chat(self, messages: Sequence[chat.Message], **options: Any) -> list[int]:
        """Token ids of a conversation; options as for `apply_chat_template`."""
        text = self.apply_chat_template(messages, **options)
        return self.encode(text, add_special=False, parse_special=True)

    def apply_chat_template(
        self,
        messages: Sequence[chat.Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as the model's template writes it; see `chat.render`."""
        return chat.render(
            self.chat_templates,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **(self.special_tokens | variables),
        )

    def decode(self, ids: Iterable[SupportsInt], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        data = self.to_bytes(ids, skip_special=skip_special)
        if self.space_prefix:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def to_bytes(self, ids: Iterable[SupportsInt], *, skip_special: bool = True) -> bytes:
        """The bytes of `ids`, joined; `stream.Detokenizer` makes text of them as they come.

        Ids without a token, such as padding rows of an embedding, have none.

        Raises:
          ValueError: if an id is negative.
        """
        listed = [int(index) for index in ids]
        if listed and min(listed) < 0:
            raise ValueError(f"token ids are not negative, but one is {min(listed)}")
        table, skipped = self._bytes, self.special_ids if skip_special else frozenset()
        return b"".join(table[index] for index in listed if index < len(table) and index not in skipped)

    def token_bytes(self, index: int) -> bytes:
        """The bytes of one token, special or not."""
        return self.to_bytes([index], skip_special=False)

    @cached_property
    def _bytes(self) -> list[bytes]:
        return self._spelling.table(self.backend)

    def _role_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.backend.token_to_id(token)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate (U+{ord(text[error.start]):04X} at {error.start}), which is not "
            "Unicode text; read its source with errors='replace'"
        ) from None
