"""Talk to a model in the terminal.

Each line is a message; a line that begins with / is a command: /reset forgets the conversation, /exit (or Ctrl-D)
leaves. Ctrl-C stops an answer. When the conversation outgrows the model's context, its oldest turns are forgotten.
Reads messages from stdin where that is no terminal.
"""

import contextlib
import functools
import sys
from collections.abc import Sequence
from typing import Any

from jaxopt_llm.cli.flags import DRAFT_MODEL, HOSTS, LOADING, MODEL, PROMPT_LOOKUP, SAMPLING, SET
from jaxopt_llm.cli.hosts import together
from jaxopt_llm.cli.loading import load, load_draft
from jaxopt_llm.cli.measuring import stages
from jaxopt_llm.cli.serving import SERVING, engine_of, loading_of, model_of, serving
from jaxopt_llm.engine import Engine, EngineConfig, SamplingParams, ServingConfig

with contextlib.suppress(ImportError):  # not on every system
    import readline  # noqa: F401 - `input` then edits lines and remembers them

_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def main(argv: Sequence[str]) -> None:
    params, config = SamplingParams(**SAMPLING.value), serving(SERVING.value, SET.value)
    loading = loading_of(config, LOADING.value)
    with together(HOSTS.value, loading.get("mesh")) as follows:
        talk(params, config, loading, follows=follows)


def talk(
    params: SamplingParams, config: ServingConfig | None, loading: dict[str, Any], *, follows: bool
) -> None:
    """Loads the model and answers line by line; where this process follows another, does what that does."""
    model, tokenizer = load(model_of(config, MODEL), **loading)
    draft = load_draft(DRAFT_MODEL.value, tokenizer, **loading)
    sizes = engine_of(config, EngineConfig(max_slots=1), prompt_lookup=PROMPT_LOOKUP)
    engine = Engine(model, tokenizer, sizes, draft=draft, consume=True)
    if follows:
        engine.follow()
        return
    conversation = Conversation(engine, params)
    with stages("programs") as report:
        engine.warm_up(full=params.needs_full, progress=functools.partial(report, "compiling"))
    _say(_HELP)
    while (line := _read()) is not None:
        match line.strip():
            case "":
                pass
            case "/exit":
                break
            case "/reset":
                conversation.messages.clear()
                _say("the conversation is forgotten")
            case command if command.startswith("/"):
                _say(f"no command {command}; {_HELP}")
            case message:
                conversation.answer(message)


class Conversation:
    """Messages so far, kept short enough for the model's context.

    Raises:
      ValueError: if the model has no chat template.
    """

    def __init__(self, engine: Engine, params: SamplingParams):
        self.messages: list[dict[str, str]] = []
        self._engine, self._params = engine, params
        self._context = engine.config.scheduler(engine.model_config).max_seq_len
        engine.encode([{"role": "user", "content": "Hello"}])  # refuses a model that cannot chat

    def answer(self, message: str) -> None:
        """Prints the answer to a message as it comes; Ctrl-C ends it where it is."""
        self.messages.append({"role": "user", "content": message})
        ids = self._fit()
        if ids is None:
            self.messages.clear()
            _say(f"the message leaves no room for an answer in {self._context} tokens of context; shorten it")
            return
        pieces: list[str] = []
        stream = self._engine.submit(ids, self._params)
        try:
            for chunk in stream:
                pieces.append(chunk.text)
                print(chunk.text, end="", flush=True)
                if chunk.result and chunk.result.finish_reason == "length":
                    print(" ...", end="")
        except KeyboardInterrupt:
            stream.cancel()
            print(" (stopped)", end="")
        print(flush=True)
        self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _fit(self) -> list[int] | None:
        """The conversation's tokens, its oldest turns dropped until an answer has room; None if it never has."""
        assert self._engine.tokenizer
        room = min(self._params.max_tokens, self._context // 4)
        while True:
            ids = self._engine.tokenizer.encode_chat(self.messages)
            if len(ids) + room <= self._context:
                return ids
            if len(self.messages) == 1:
                return None
            del self.messages[:2]  # a message and its answer: templates want the two to alternate
            _say(f"the conversation outgrew {self._context} tokens of context: its oldest turn is forgotten")


def _read() -> str | None:
    """The next line; None at the end of input."""
    at_terminal = sys.stdin.isatty()
    while True:
        try:
            return input("> " if at_terminal else "")
        except EOFError:
            if at_terminal:
                print()
            return None
        except KeyboardInterrupt:
            print()


def _say(text: str) -> None:
    """Speaks as the program, not as the model."""
    print(f"({text})", file=sys.stderr)
