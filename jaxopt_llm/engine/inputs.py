"""A plan as the arrays that the step takes, padded to one of a few sizes. Host only: NumPy in, NumPy out."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt32

from jaxopt_llm.engine.config import power_of_two
from jaxopt_llm.engine.generation import Generation
from jaxopt_llm.engine.plan import Piece, Plan
from jaxopt_llm.engine.program import Extras, Inputs
from jaxopt_llm.engine.sampling import MOST_BIASES, RowSampling, SamplingParams
from jaxopt_llm.engine.scheduler import SchedulerConfig

_SMALLEST = 32  # tokens of a step with prompts in it
_IDLE = SamplingParams()


def decodes_only(plan: Plan) -> bool:
    """Whether every row feeds the one token that it sampled last."""
    return all(piece.decodes for piece in plan.pieces)


def token_bucket(tokens: int, most: int) -> int:
    """The next of 32, 64, 128, ... tokens, at most `most`."""
    return min(most, max(_SMALLEST, power_of_two(tokens)))


def row_bucket(rows: int, most: int) -> int:
    """The next of 1, 2, 4, ... rows, at most `most`."""
    return min(most, power_of_two(rows))


class Shape(NamedTuple):
    """What a program is compiled for.

    Attributes:
      rows, tokens: B and T. Equal where every row decodes.
      steps: of decoding, at most; 1 where prompts may be in it.
      full: with every optional part.
    """

    rows: int
    tokens: int
    steps: int
    full: bool


def shape(plans: Sequence[Plan], sizes: SchedulerConfig, *, full: bool) -> Shape:
    """The smallest that serves all these plans, one a data shard."""
    if all(map(decodes_only, plans)):
        rows = row_bucket(max(len(plan.pieces) for plan in plans), sizes.max_slots)
        return Shape(rows, rows, sizes.decode_steps, full)
    tokens = max(sum(piece.length for piece in plan.pieces) for plan in plans)
    return Shape(sizes.max_slots, token_bucket(tokens, sizes.max_tokens_per_step), 1, full)


def shapes(
    sizes: SchedulerConfig,
    *,
    prompt_tokens: int | None = None,
    rows: int | None = None,
    full: bool,
) -> list[Shape]:
    """Every shape that plans may take.

    Args:
      sizes: of a data shard.
      prompt_tokens: only those of one prompt of this length; None for any prompts.
      rows: only those of so many requests that decode together; None for any number.
      full: as `Shape` has it.
    """
    most = sizes.max_tokens_per_step
    lengths = range(1, most + 1) if prompt_tokens is None else _chunks(prompt_tokens, most)
    counts = range(1, sizes.max_slots + 1) if rows is None else [rows]
    prefill = {Shape(sizes.max_slots, token_bucket(n, most), 1, full) for n in lengths}
    buckets = {row_bucket(n, sizes.max_slots) for n in counts}
    return sorted(prefill | {Shape(n, n, sizes.decode_steps, full) for n in buckets})


def rows_of_logits(sizes: SchedulerConfig, rooms: Sequence[int]) -> list[int]:
    """How many rows the programs sample at once.

    Args:
      sizes: of a data shard.
      rooms: drafts of a row that decoding has room for.
    """
    counts = {row_bucket(n, sizes.max_slots) for n in range(1, sizes.max_slots + 1)}
    return sorted({count * (1 + room) for count in counts for room in rooms})


def _chunks(tokens: int, most: int) -> list[int]:
    return [min(most, tokens - start) for start in range(0, tokens, most)]


class Widths(NamedTuple):
    """What the arrays of one engine have in common.

    Attributes:
      slots: of a data shard; also the slot of rows that are padding.
      vocab: V.
      stops: stop tokens of a request, at most.
    """

    slots: int
    vocab: int
    stops: int


def idle(shape: Shape, widths: Widths, page_table: np.ndarray) -> Inputs:
    """Arrays that do nothing: what compiles a program without touching the state."""
    plan = Plan(pieces=(), steps=1, page_table=page_table)
    return build(plan, (), shape, widths)


def build(
    plan: Plan,
    generations: Sequence[Generation],
    shape: Shape,
    widths: Widths,
    *,
    drafts: int = 0,
) -> Inputs:
    """The arrays of a plan.

    Args:
      plan: from the scheduler.
      generations: one for each piece.
      shape: that it fits in.
      widths: of the engine.
      drafts: of a row in a round, at most.
    """
    rows, total = shape.rows, shape.tokens
    pieces = plan.pieces
    tokens, positions = np.zeros(total, np.int32), np.zeros(total, np.int32)
    row_of = np.full(total, rows, np.int32)
    starts = np.cumsum([0, *(piece.length for piece in pieces)]).astype(np.int32)
    for row, (piece, at) in enumerate(zip(pieces, starts, strict=False)):
        place = slice(at, at + piece.length)
        tokens[place] = _tokens(piece)
        positions[place] = np.arange(piece.start, piece.start + piece.length)
        row_of[place] = row
    column = lambda values, fill: _padded(values, rows, fill)
    slots = column([piece.slot for piece in pieces], widths.slots)
    params = [generation.params for generation in generations] + [_IDLE] * (rows - len(pieces))
    seeds = [generation.seed for generation in generations] + [0] * (rows - len(pieces))
    return Inputs(
        tokens=tokens,
        positions=positions,
        rows=row_of,
        slots=slots,
        kv_len=column([piece.start + piece.length for piece in pieces], 0),
        query_start=_padded(starts, rows + 1, int(starts[-1])),
        num_rows=np.int32(len(pieces)),
        page_table=plan.page_table[:, np.minimum(slots, widths.slots - 1)],
        limit=column([piece.limit for piece in pieces], 0),
        stop_ids=_stop_ids(generations, rows, widths.stops),
        drafts=np.int32(drafts),
        sampling=RowSampling.stack(params, seeds),
        extras=_extras(pieces, generations, starts, total, rows, widths.vocab) if shape.full else None,
    )


def _padded(values: Sequence[int] | np.ndarray, size: int, fill: int) -> np.ndarray:
    out = np.full(size, fill, np.int32)
    out[: len(values)] = values
    return out


def _tokens(piece: Piece) -> Sequence[int]:
    if piece.decodes:
        return [-1]
    return piece.request.tokens[piece.start : piece.start + piece.length]


def _stop_ids(generations: Sequence[Generation], rows: int, width: int) -> np.ndarray:
    ids = np.full((rows, width), -1, np.int32)
    for row, generation in zip(ids, generations, strict=False):
        row[: len(generation.stop_ids)] = sorted(generation.stop_ids)
    return ids


def _extras(
    pieces: Sequence[Piece],
    generations: Sequence[Generation],
    starts: np.ndarray,
    total: int,
    rows: int,
    vocab_size: int,
) -> Extras:
    bias_ids, bias = np.full((rows, MOST_BIASES), -1, np.int32), np.zeros((rows, MOST_BIASES), np.float32)
    mask = np.full((rows, -(-vocab_size // 32)), 2**32 - 1, np.uint32)
    targets = np.full(total, -1, np.int32)
    for row, (piece, generation) in enumerate(zip(pieces, generations, strict=True)):
        shifts = generation.params.logit_bias or {}
        bias_ids[row, : len(shifts)], bias[row, : len(shifts)] = list(shifts), list(shifts.values())
        if piece.samples and (allowed := generation.may_come(vocab_size)) is not None:
            mask[row] = _packed(allowed)
        if generation.wanted.scores:
            after = piece.request.prompt[piece.start + 1 : piece.start + 1 + piece.length]
            targets[starts[row] : starts[row] + len(after)] = after
    return Extras(
        fresh=_padded([piece.begins for piece in pieces], rows, 0).astype(bool),
        prompt_len=_padded([len(piece.request.prompt) for piece in pieces], rows, 0),
        bias_ids=bias_ids,
        bias=bias,
        mask=mask,
        targets=targets,
        logprobs=np.bool_(any(generation.params.logprobs is not None for generation in generations)),
    )


def _packed(allowed: Bool[np.ndarray, "V"]) -> UInt32[np.ndarray, "words"]:
    """A bit for each token, as `Extras.mask` has them."""
    padded = np.pad(allowed, (0, -len(allowed) % 32))
    return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32)
