"""What a compiled program does, read from its text: `operations(compiled.as_text())`.

The compiler's own figures count twice what is fetched ahead, and a kernel tells none. Here an operation reads each
operand once, as far as it lies in main memory: of a table that it gathers from the rows it takes, of an array that it
updates in place nothing.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?(%\S+) = (.*)")
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "partition-id"}
_VIEWS = {"bitcast", "get-tuple-element", "tuple"}
_PICKS = {"gather", "slice", "dynamic-slice"}  # read of their first operand what they give
_PUTS = {"scatter": 2, "dynamic-update-slice": 1}  # write into their first operand what this one holds
_WRAPS = {"fusion", "call", "async-start"}  # do what the computation does that they call


class Shape(NamedTuple):
    """An array: its dtype in HLO's words, its dimensions, whether it lies in main memory."""

    dtype: str
    dims: tuple[int, ...]
    main: bool

    @property
    def nbytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return -(-math.prod(self.dims) * (int(bits[0]) if bits else 8) // 8)  # pred names no width


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation that is launched.

    Attributes:
      name, opcode: in the program; `fusion` where several operations became one.
      scope: where it comes from, the names of `jax.named_scope` among it; may be empty.
      read, written: bytes of main memory.
      flops: of the matrix products in it; of a kernel's own nothing is known.
      outputs: its arrays.
    """

    name: str
    opcode: str
    scope: str
    read: int
    written: int
    flops: int
    outputs: tuple[Shape, ...]


def operations(text: str) -> list[Operation]:
    """The operations of a compiled program, in order. A loop is one operation, with what its body does once; so is a
    conditional, with what the largest of its branches does.

    Raises:
      ValueError: if the text has no entry computation.
    """
    computations, entry = _parse(text)
    return _Reader(computations).operations(entry)


class _Instruction(NamedTuple):
    name: str
    opcode: str
    outputs: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str

    @property
    def called(self) -> list[str]:
        """Computations that it runs once a call: not the condition of a loop, nor what combines two elements."""
        names = re.findall(
            r"(?:calls|body|to_apply|branch_computations)=\{?([^},]*(?:, %[^},]*)*)", self.rest
        )
        return re.findall(r"%[^\s,]+", names[0]) if names else []


_Computation = dict[str, _Instruction]


def _parse(text: str) -> tuple[dict[str, _Computation], _Computation]:
    computations: dict[str, _Computation] = {}
    entry: _Computation | None = None
    current: _Computation = {}
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.endswith("{"):
            current = computations[line.removeprefix("ENTRY ").split()[0]] = {}
            entry = current if line.startswith("ENTRY") else entry
        elif found := _INSTRUCTION.match(line):
            current[found[1]] = _instruction(*found.groups())
    if entry is None:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    return computations, entry


def _instruction(name: str, text: str) -> _Instruction:
    end = _closing(text) if text.startswith("(") else text.index(" ")
    opcode, _, rest = text[end:].lstrip().partition("(")
    close = _closing("(" + rest) - 1
    operands = tuple(re.findall(r"%[^\s,()]+", rest[:close]))
    return _Instruction(name, opcode, _shapes(text[:end]), operands, rest)


def _closing(text: str) -> int:
    """Just after the bracket that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"a bracket stays open in {text[:80]!r}")


def _shapes(text: str) -> tuple[Shape, ...]:
    """All arrays of a type, tuples flattened. `S(1)` and such in a layout is a memory of the chip's own."""
    return tuple(
        Shape(dtype, tuple(map(int, filter(None, dims.split(",")))), "S(" not in layout)
        for dtype, dims, layout in _ARRAY.findall(text)
    )


class _Reader(NamedTuple):
    computations: Mapping[str, _Computation]

    def operations(self, computation: _Computation) -> list[Operation]:
        *others, root = computation.values()
        used = {name for one in computation.values() for name in (root.name, *one.operands)}
        # What a run fetches last and does not use is for the next one, in place of what that would fetch first.
        unused = {one.operands[0] for one in others if one.opcode == "copy-done" and one.name not in used}
        left_out = lambda one: one.opcode in _FREE or one.name in unused
        return [self._operation(one, computation) for one in computation.values() if not left_out(one)]

    def _operation(self, one: _Instruction, among: _Computation) -> Operation:
        scope = re.search(r'op_name="([^"]*)"', one.rest)
        if one.opcode in ("while", "conditional"):
            parts = [self.operations(self.computations[name]) for name in one.called]
            read, written, flops = (
                max(sum(getattr(each, what) for each in part) for part in parts)
                for what in ("read", "written", "flops")
            )
        else:
            main = [any(shape.main for shape in among[name].outputs) for name in one.operands]
            read = sum(self._read(one, place, among) for place, there in enumerate(main) if there)
            written = 0 if one.opcode.endswith("-start") else self._written(one, among)
            flops = self._flops(one, among)
        return Operation(one.name, one.opcode, scope[1] if scope else "", read, written, flops, one.outputs)

    def _inner(self, one: _Instruction) -> _Computation:
        return self.computations[one.called[0]]

    def _read(self, one: _Instruction, place: int, among: _Computation) -> int:
        """Bytes of an operand that an instruction reads."""
        if one.opcode.endswith("-done"):
            return 0
        whole = sum(shape.nbytes for shape in among[one.operands[place]].outputs)
        if one.opcode in ("slice-start", "dynamic-slice-start"):
            return one.outputs[1].nbytes  # of (source, slice, context)
        if place == 0 and one.opcode in _PICKS:
            return min(whole, one.outputs[0].nbytes)
        if place == 0 and one.opcode in _PUTS:
            return 0
        if one.opcode in _WRAPS:
            inner = self._inner(one)
            parameters = [each for each in inner.values() if each.opcode == "parameter"]
            return min(
                whole,
                sum(self._used(each, inner) for each in parameters if each.rest.startswith(f"{place})")),
            )
        return whole

    def _used(self, value: _Instruction, among: _Computation) -> int:
        """Bytes of a value that a computation reads."""
        uses = [
            (one, place)
            for one in among.values()
            for place, name in enumerate(one.operands)
            if name == value.name
        ]
        return sum(
            self._used(one, among) if one.opcode in _VIEWS else self._read(one, place, among)
            for one, place in uses
        )

    def _written(self, one: _Instruction, among: _Computation) -> int:
        if one.opcode in _PUTS and one.outputs[0].main:
            return sum(shape.nbytes for shape in among[one.operands[_PUTS[one.opcode]]].outputs)
        whole = sum(shape.nbytes for shape in one.outputs if shape.main)
        if one.opcode in _WRAPS and whole:
            inner = self._inner(one)
            root = list(inner.values())[-1]
            while root.opcode == "bitcast":
                root = inner[root.operands[0]]
            return min(whole, self._written(root, inner)) if root.opcode in _PUTS else whole
        return whole

    def _flops(self, one: _Instruction, among: _Computation) -> int:
        if one.opcode == "dot":
            left = among[one.operands[0]].outputs[0].dims
            summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
            summed_dims = map(int, filter(None, summed[1].split(","))) if summed else ()
            return 2 * math.prod(one.outputs[0].dims) * math.prod(left[dim] for dim in summed_dims)
        if one.opcode == "convolution":  # what a product is on a TPU
            kernel = among[one.operands[1]].outputs[0].dims
            labels = re.search(r"dim_labels=\w+_(\w+)->", one.rest)
            own = kernel[labels[1].index("o")] if labels else 1
            return 2 * math.prod(one.outputs[0].dims) * math.prod(kernel) // own
        inner = [self.computations[name] for name in one.called if name in self.computations]
        return sum(self._flops(each, part) for part in inner for each in part.values())
