"""Chat templates: Jinja programs that come with a model and write a conversation as one text.

They are other people's code, so they run in jinja2's immutable sandbox, with the helpers that published
templates expect (those of transformers' `apply_chat_template`).
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]


def render(
    templates: Mapping[str, str],
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The conversation as text.

    Args:
      templates: by name; "tool_use" is taken when there are tools, "default" otherwise.
      messages: each with a "role", and mostly a "content".
      tools: functions the model may call, as JSON schemas.
      add_generation_prompt: end with what opens the answer.
      **variables: what else the template reads: `bos_token`, `enable_thinking`, `documents`.

    Raises:
      ValueError: if there is no template, the messages are malformed, or the template fails or refuses them.
    """
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(f"a chat message is a mapping with a 'role', not {message!r}")
    if not messages:
        raise ValueError("a chat needs at least one message, such as {'role': 'user', 'content': '...'}")
    variables = {"documents": None} | variables
    template = _select(templates, bool(tools))
    try:
        return _compile(template).render(
            messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )
    except Exception as error:  # whatever went wrong, it went wrong in the template's own code
        raise ValueError(f"the chat template failed: {error or type(error).__name__}") from error


def _select(templates: Mapping[str, str], tools: bool) -> str:
    if tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" not in templates:
        raise ValueError(
            f"the tokenizer has no default chat template (it has {sorted(templates)}), as base models have "
            "none; pass the prompt as a string, or set tokenizer.chat_templates['default']"
        )
    return templates["default"]


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's text for training; the text stays."""

    tags = {"generation"}  # noqa: RUF012 - the name and type that jinja2 reads

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment.from_string(template)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as models were trained on it: jinja2's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
