"""Which weight gets which format: rules by regular expression on names."""

import re
from collections.abc import Mapping, Sequence

from jaxopt_llm.kernels import Format, quantization_format
from jaxopt_llm.models import Transformer, quantizable, specs

Rules = Sequence[tuple[str, str | None]]
"""(pattern, format) pairs; the format None, or "float", leaves floats."""


def check_rules(rules: Rules) -> None:
    """Raises ValueError for a pattern that is no regular expression, or an unknown format."""
    for pattern, name in rules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"rule {pattern!r} is no regular expression: {error}") from None
        _format(name)


def assign(model: Transformer, format: str | None, rules: Rules = ()) -> dict[str, Format]:
    """The format of each matrix that gets one, by its dotted name.

    Args:
      model: whose matrices, embedding and head included; it may be abstract.
      format: of those that no rule names; None leaves them floats.
      rules: the first whose pattern is found in a matrix's name, such as `layers.0.mlp.down.weight`, decides.

    Raises:
      ValueError: for an unknown format, a pattern that is no regular expression, a rule that decides nothing, or a
        width that a format's groups do not divide; the message names the weight.
    """
    check_rules([*rules, (".*", format)])
    widths = {name: spec.shape[-1] for name, spec in specs(model).items() if quantizable(name, spec.shape)}
    deciding = {name: _first(rules, name) for name in widths}
    for number, (pattern, _) in enumerate(rules):
        if number not in deciding.values():
            raise ValueError(
                f"rule {pattern!r} decides nothing: it is found in no weight's name that an earlier rule left; "
                f"names are such as {next(reversed(widths))}"
            )
    names = {name: format if rule is None else rules[rule][1] for name, rule in deciding.items()}
    chosen = {name: rounding for name, own in names.items() if (rounding := _format(own))}
    for name, own in chosen.items():
        own.check(widths[name], name)
    return chosen


def exact_rules(assigned: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Rules that give each of these weights its own format."""
    return tuple((f"^{re.escape(name)}$", format) for name, format in assigned.items())


def _first(rules: Rules, name: str) -> int | None:
    return next((number for number, (pattern, _) in enumerate(rules) if re.search(pattern, name)), None)


def _format(name: str | None) -> Format | None:
    return None if name is None or name == "float" else quantization_format(name)
