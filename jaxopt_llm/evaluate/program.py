"""What a compiled program does, read from its text: `operations(compiled.as_text())`.

The compiler's own figures count twice what is fetched ahead, and a kernel tells none. Here an operation reads each
operand once, as far as it lies in main memory: of a table that it gathers from the rows it takes, of an array that it
updates in place nothing.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?(%\S+) = (.*)")
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "partition-id"}
_VIEWS = {"bitcast", "get-tuple-element", "tuple"}
_PICKS = {"gather", "slice", "dynamic-slice"}  # read of their first operand what they give
_PUTS = {"scatter": 2, "dynamic-update-slice": 1}  # write into their first operand what this one holds
_WRAPS = {"fusion", "fusion-start", "call", "async-start"}  # do what the computation does that they call


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
      scope: where it comes from, the names of `jax.named_scope` among it; of what the compiler added where its result
        goes; may be empty.
      read, written: bytes of main memory.
      flops: of the matrix products in it. Those of our kernels and of the TPU's attention follow from the shapes of
        their operands; of other kernels nothing is known.
      outputs: its arrays; one that shares memory with an operand is not written.
      kernel: what a custom call runs.
    """

    name: str
    opcode: str
    scope: str
    read: int
    written: int
    flops: int
    outputs: tuple[Shape, ...]
    kernel: str | None = None

    @property
    def launched(self) -> bool:
        """Whether it starts something, rather than to wait for it."""
        return not self.opcode.endswith("-done")


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
        if self.opcode == "conditional":
            which = "branch_computations|true_computation|false_computation"
        else:
            which = "calls|body|to_apply"
        named = re.findall(rf"(?:{which})=(?:\{{([^}}]*)\}}|(%[^\s,]+))", self.rest)
        return re.findall(r"%[^\s,]+", " ".join(map(" ".join, named)))


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
        empty = lambda one: one.outputs and not sum(shape.nbytes for shape in one.outputs)
        left_out = lambda one: one.opcode in _FREE or one.name in unused or empty(one)
        scopes = self._scopes(computation)
        return [
            self._operation(one, computation, scopes[one.name])
            for one in computation.values()
            if not left_out(one)
        ]

    def _scopes(self, computation: _Computation) -> dict[str, str]:
        """Where each instruction comes from; those without a name of their own go by what uses them."""
        scopes: dict[str, str] = {}
        of_users: dict[str, str] = {}
        for one in reversed(computation.values()):  # uses come first
            scope = scopes[one.name] = self._own_scope(one) or of_users.get(one.name, "")
            for operand in one.operands if scope else ():
                of_users[operand] = scope
        return scopes

    def _own_scope(self, one: _Instruction) -> str:
        inner = [each for name in one.called for each in self.computations.get(name, {}).values()]
        for each in (one, *reversed(inner)):
            scope = re.search(r'op_name="([^"]*)"', each.rest)
            if scope and "/" in scope[1]:  # else it is the name of an argument
                return scope[1]
        return ""

    def _operation(self, one: _Instruction, among: _Computation, scope: str) -> Operation:
        kernel = re.search(r'custom_call_target="([^"]*)"', one.rest)
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
        return Operation(
            one.name, one.opcode, scope, read, written, flops, one.outputs, kernel[1] if kernel else None
        )

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
            self._used(one, among) if _is_view(one) else self._read(one, place, among) for one, place in uses
        )

    def _written(self, one: _Instruction, among: _Computation) -> int:
        if one.opcode in _PUTS and one.outputs[0].main:
            return sum(shape.nbytes for shape in among[one.operands[_PUTS[one.opcode]]].outputs)
        aliased = re.search(r"output_to_operand_aliasing=\{((?:\{\d*\}: \(\d+, \{\}\)(?:, )?)+)\}", one.rest)
        kept = {int(place or 0) for place in re.findall(r"\{(\d*)\}:", aliased[1])} if aliased else set()
        whole = sum(shape.nbytes for i, shape in enumerate(one.outputs) if shape.main and i not in kept)
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
        if one.opcode == "reduce" and '/dot_general"' in one.rest:
            # A product of one row may become a sum of products. A GPU's sum of a product's parts has been counted.
            terms = among[one.operands[0]]
            return 2 * math.prod(terms.outputs[0].dims) if terms.opcode == "multiply" else 0
        if one.opcode == "custom-call":
            return _kernel_flops(one, [among[name].outputs[0].dims for name in one.operands])
        inner = [self.computations[name] for name in one.called if name in self.computations]
        return sum(self._flops(each, part) for part in inner for each in part.values())


def _is_view(one: _Instruction) -> bool:
    """Whether it gives its operand, perhaps by another name: so may a fusion inside another."""
    return one.opcode in _VIEWS or "output_to_operand_aliasing={{}: (0, {})}" in one.rest


def _kernel_flops(one: _Instruction, operands: Sequence[tuple[int, ...]]) -> int:
    """Of a kernel's matrix products; 0 where nothing is known of it."""
    if '"jaxopt_linear"' in one.rest:  # codes by panels and blocks, experts first: a row meets one expert
        rows, codes = operands[0][0], operands[1]
        bits = re.search(r"bits = (\d+)", one.rest)
        return 2 * rows * math.prod(codes[-5:]) * 8 // int(bits[1]) if bits else 0
    if '"jaxopt_attention"' in one.rest:
        heads, keys, values = operands[0][1], operands[7], operands[8]
        return 2 * heads // keys[1] * (math.prod(keys) + math.prod(values))
    if "ragged_paged_attention" in one.rest:  # keys and values in one, by turns
        (queries,) = (dims for dims in operands if len(dims) == 3)
        pages = next(dims for dims in operands if len(dims) == 4)
        return 4 * queries[1] // pages[2] * math.prod(pages)
    if "/paged_attention/" in one.rest:
        heads, (keys, values) = operands[4][1], (dims for dims in operands if len(dims) == 4)
        return 2 * heads // keys[2] * (math.prod(keys) + math.prod(values))
    return 0
