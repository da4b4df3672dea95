"""One setting of a frozen dataclass from text, `a.b=value`, checked against the fields and their types."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")

SCALARS = (int, float, str, Path)
BOOLEANS = {"true": True, "false": False}


def override(config: Config, assignment: str) -> Config:
    """A copy of `config` with one setting changed: `steps.0.group=64` sets a field of the first of a tuple.

    Values are written as int, float, true or false, none, text, or comma-separated for a tuple.

    Raises:
      ValueError: unknown field, value of another type, index out of range, no `=`.
    """
    key, equals, text = assignment.partition("=")
    if not equals:
        raise ValueError(f"override {assignment!r} must be written field=value")
    try:
        return _set(config, type(config), key.split("."), text)
    except ValueError as error:
        raise ValueError(f"override {assignment}: {error}") from None


def is_frozen(value: object) -> bool:
    """Whether this is an instance of a frozen dataclass."""
    parameters = getattr(type(value), "__dataclass_params__", None)
    return parameters is not None and parameters.frozen


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """` (did you mean x?)` where a known name is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def _set(value: Any, hint: Any, keys: list[str], text: str) -> Any:
    """`value`, of the type `hint`, with what `keys` lead to replaced."""
    if not keys:
        return _parse(text, hint)
    name, *rest = keys
    if is_frozen(value):
        hints = typing.get_type_hints(type(value))
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        if name not in fields:
            owner = type(value).__name__
            raise ValueError(
                f"{owner} has no field {name!r}{nearest(name, fields)}; it has {', '.join(fields)}"
            )
        return dataclasses.replace(value, **{name: _set(getattr(value, name), hints[name], rest, text)})
    if isinstance(value, tuple):
        if name not in map(str, range(len(value))):
            raise ValueError(f"{name!r} must be an index below {len(value)}")
        index = int(name)
        item = _set(value[index], _item_hint(hint, index), rest, text)
        return (*value[:index], item, *value[index + 1 :])
    raise ValueError(f"{value!r} has no fields, so no {name!r}")


def _item_hint(hint: Any, index: int) -> Any:
    """The type of one item of a tuple."""
    arms = typing.get_args(hint) if _is_union(hint) else (hint,)
    tuples = (typing.get_args(arm) for arm in arms if typing.get_origin(arm) is tuple)
    items = next(tuples, (Any, ...))
    return items[0] if items[-1] is Ellipsis else items[index]


def _parse(text: str, hint: Any) -> Any:
    """The value that `text` spells in the type `hint`."""
    mismatch = ValueError(f"{text!r} is not {_spell(hint)}")
    arms = typing.get_args(hint)
    if _is_union(hint):
        for arm in sorted(arms, key=lambda arm: arm in (str, Path)):  # which take any text, so come last
            try:
                return _parse(text, arm)
            except ValueError:
                continue
    elif typing.get_origin(hint) is typing.Literal:
        for choice in arms:
            if str(choice) == text:
                return choice
    elif typing.get_origin(hint) is tuple:
        items = [item.strip() for item in text.strip("()").split(",") if item.strip()]
        if arms[-1] is Ellipsis or len(arms) == len(items):
            return tuple(_parse(item, _item_hint(hint, index)) for index, item in enumerate(items))
    elif hint is types.NoneType and text.lower() == "none":
        return None
    elif hint is bool and text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    elif hint in SCALARS:
        try:
            return hint(text)
        except ValueError:
            raise mismatch from None
    raise mismatch


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _spell(hint: Any) -> str:
    """The type as a message names it."""
    if _is_union(hint):
        return " or ".join(map(_spell, typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        fields = ", ".join(field.name for field in dataclasses.fields(hint))
        return f"a {hint.__name__}, which is set a field at a time ({fields})"
    if hint is types.NoneType:
        return "none"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
