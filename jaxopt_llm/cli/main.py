"""The console script: `jaxopt-llm COMMAND [--flags]`."""

import importlib
import inspect
import itertools
import os
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

from absl import flags, logging

from jaxopt_llm import cache
from jaxopt_llm.cli import flags as shared
from jaxopt_llm.configs.overrides import nearest

# command: its module, imported only when it is called, and its line of help
COMMANDS = {
    "generate": ("jaxopt_llm.cli.generate", "continue a prompt, or answer it"),
    "chat": ("jaxopt_llm.cli.chat", "talk to a model in the terminal"),
    "eval": ("jaxopt_llm.cli.evaluate", "perplexity of a model, and its distance to another"),
    "optimize": ("jaxopt_llm.cli.optimize", "make a model smaller and faster, and tell what that cost"),
    "distill": ("jaxopt_llm.cli.distill", "train a small model to predict what a large one predicts"),
    "report": ("jaxopt_llm.cli.report", "compare models: a table, and a page with plots"),
    "convert": ("jaxopt_llm.cli.convert", "write a model in another format: orbax, hf, gguf"),
    "bench engine": ("jaxopt_llm.cli.bench_engine", "time the engine on a model"),
    "size": ("jaxopt_llm.cli.size", "which chips serve a model, how fast, and what they cost"),
    "inspect": ("jaxopt_llm.cli.inspect", "family, shapes and bytes of a model, without loading it"),
    "env": ("jaxopt_llm.cli.env", "versions, devices, kernels, caches"),
}
HELP = ("--help", "-help", "-h")
# Orbax abandons reads and writes when one of them fails; each would print a traceback whenever it ends.
ABANDONED = ("Event loop is closed", "Encountered error while reading array index")
METAVARS = {"int": "INT", "float": "FLOAT", "string": "TEXT", "multi string": "TEXT"}


def run(argv: Sequence[str] | None = None) -> int:
    """Runs one command; `argv` leaves out the program's name and defaults to `sys.argv[1:]`.

    Returns the exit code: 0 done; 2 the user's mistake, a `ValueError` or `OSError`, told in one line on
    stderr (`JAXOPT_TRACEBACK=1` lets it through); 130 interrupted; 141 nobody reads stdout any more.
    Whatever else a command raises is a bug and passes through.
    """
    logging.set_verbosity(logging.FATAL)  # Orbax narrates its saves, and logs what it also raises
    warnings.formatwarning = lambda message, *_, **__: f"jaxopt-llm: warning: {message}\n"
    sys.unraisablehook = _tell_unraisable
    try:
        _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it flushes at exit
        return 141
    except (ValueError, OSError) as error:
        if os.environ.get("JAXOPT_TRACEBACK"):
            raise
        print(f"jaxopt-llm: error: {_explain(error)}", file=sys.stderr)
        return 2
    return 0


def _dispatch(arguments: list[str]) -> None:
    match arguments:
        case [] | ["help"] | ["--help" | "-help" | "-h", *_]:
            print(_overview())
        case ["help", *words]:
            name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
            print(_help(name, _command(name)))
        case [first, second, *rest] if f"{first} {second}" in COMMANDS:
            _run(f"{first} {second}", rest)
        case [name, *rest]:
            _run(name, rest)


def _run(name: str, rest: list[str]) -> None:
    command = _command(name)
    if any(argument in HELP for argument in itertools.takewhile("--".__ne__, rest)):
        print(_help(name, command))
    else:
        positional = _parse(name, _flags(command), rest)
        if positional and not _arguments(command):
            raise ValueError(f"{name} takes flags only, not {positional[0]!r}; see jaxopt-llm {name} --help")
        command.main([f"jaxopt-llm {name}", *positional])


def _command(name: str) -> ModuleType:
    if name.startswith("-"):
        raise ValueError(f"the command comes before its flags, not {name!r}; see jaxopt-llm --help")
    if name not in COMMANDS:
        raise ValueError(f"no command {name!r}{nearest(name, COMMANDS)}; see jaxopt-llm --help")
    cache.prepare()
    return importlib.import_module(COMMANDS[name][0])


def _flags(command: ModuleType) -> flags.FlagValues:
    """The flags that the command's module holds, its own and those it imported, all at their defaults.

    Parsing these instead of absl's global flags refuses those that other modules define, absl's own included.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt()  # flags may follow arguments
    named = {holder.name: holder for holder in _holders(vars(command).values())}  # one may be in a group too
    for holder in named.values():
        is_shared = any(holder is known for known in vars(shared).values())
        flag = (shared.SHARED if is_shared else flags.FLAGS)[holder.name]
        flag.unparse()
        values[flag.name] = flag
    return values


def _holders(members: Iterable[object]) -> Iterator[flags.FlagHolder[Any]]:
    for member in members:
        if isinstance(member, flags.FlagHolder):
            yield member
        elif isinstance(member, shared.FlagGroup):
            yield from member


def _arguments(command: ModuleType) -> str:
    """What a command calls the arguments that it takes beside its flags; empty where it takes none."""
    return getattr(command, "ARGUMENTS", "")


def _parse(name: str, values: flags.FlagValues, arguments: list[str]) -> list[str]:
    """Sets the flags; what is no flag is left."""
    try:
        positional = values([name, *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        flag = f"--{error.flagname}{nearest(error.flagname, values, prefix='--')}"
        raise ValueError(f"{name} has no flag {flag}; see jaxopt-llm {name} --help") from None
    except flags.Error as error:
        missing = [f"--{flag}" for flag in values if values[flag].value is None and _required(values, flag)]
        if missing and values.is_parsed():  # so it was not a value that did not parse
            raise ValueError(f"{name} needs {' and '.join(missing)}") from None
        raise ValueError(str(error)) from None
    shared.SHARED.mark_as_parsed()
    flags.FLAGS.mark_as_parsed()
    return positional


def _required(values: flags.FlagValues, name: str) -> bool:
    """Whether a flag without a default must be given."""
    if values[name].default is not None:
        return False
    try:
        for validator in values[name].validators:
            validator.verify(values)
    except flags.ValidationError:
        return True
    return False


def _overview() -> str:
    commands = "\n".join(f"  {name:14}{line}" for name, (_, line) in COMMANDS.items())
    return (
        "usage: jaxopt-llm COMMAND [--flags]\n\n"
        "Make language models smaller, faster and bigger than one chip, without leaving JAX.\n\n"
        f"commands:\n{commands}\n\n"
        "jaxopt-llm COMMAND --help lists the flags of a command.\n"
        "JAXOPT_TRACEBACK=1 shows where an error comes from."
    )


def _help(name: str, command: ModuleType) -> str:
    values = _flags(command)
    required_first = sorted(values, key=lambda flag: not _required(values, flag))
    described = "\n".join(_describe(values, flag) for flag in required_first)
    usage = " ".join(filter(None, ["jaxopt-llm", name, _arguments(command), "[--flags]"]))
    return f"usage: {usage}\n\n{inspect.getdoc(command)}\n\nflags:\n{described}"


def _describe(values: flags.FlagValues, name: str) -> str:
    flag = values[name]
    head = f"--[no]{name}" if flag.boolean else f"--{name}={METAVARS.get(flag.flag_type(), 'VALUE')}"
    text = " ".join(flag.help.split())
    if _required(values, name):
        text += " (required)"
    elif flag.default:
        text += f" (default: {flag.default})"
    return f"  {head}\n" + textwrap.fill(text, 100, initial_indent=" " * 8, subsequent_indent=" " * 8)


def _tell_unraisable(what: Any) -> None:
    if not str(what.exc_value).startswith(ABANDONED):
        sys.__unraisablehook__(what)


def _explain(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
