"""Why a candidate wins, in one sentence, and what would change it."""

from collections.abc import Sequence

from jaxopt_llm.size.candidate import Candidate

_REMEDY = {
    "HBM bandwidth": "fewer bytes a weight or a key (int8, int4), or more concurrent sequences to share each read",
    "FLOPs": "a chip with a higher rate of products, or shorter prompts",
    "links": "fewer tensor shards, or more sequences on data shards instead",
    "overhead": "larger layers a chip, that is fewer shards: what layers take beside their work does not shrink",
    "capacity": "more memory for the cache: int8 weights, more chips, or shorter sequences",
}


def explanation(ranked: Sequence[Candidate], traffic_is_timed: bool) -> str:
    """Of the first candidate.

    Args:
      ranked: as `sweep` gives them.
      traffic_is_timed: whether requests come at their own times.
    """
    best = ranked[0]
    if not best.fits:
        return _nothing_fits(ranked)
    what = f"{_name(best)} wins: {_figures(best)}"
    if not best.meets:
        reason = "falls behind the traffic" if not best.keeps_up else "misses the levels of service"
        what = f"Nothing meets what was asked; {_name(best)} comes first, yet {reason}: {_figures(best)}"
    second = next((one for one in ranked[1:] if one.fits and _place(one) != _place(best)), None)
    against = (
        "; it is the only one that fits"
        if second is None
        else f", against {_figures(second)} of {_name(second)}"
    )
    idle = (
        best.capacity is not None and best.tokens_per_s is not None and best.tokens_per_s < best.capacity / 2
    )
    if traffic_is_timed and idle:
        change = "more traffic, of which it could take twice as much, would make larger slices pay"
    else:
        change = f"{best.bound} binds it, which {_REMEDY[best.bound]} would change"
    return f"{what}{against}; {change}."


def _nothing_fits(ranked: Sequence[Candidate]) -> str:
    largest = max(ranked, key=lambda one: one.chips)
    weights = largest.bytes_per_chip.weights / 1e9
    return (
        f"Nothing fits: on {_name(largest)} the weights alone take {weights:.1f} GB of each chip; "
        "fewer bits a weight, more chips or shorter sequences would change it."
    )


def _place(candidate: Candidate) -> tuple[str, str]:
    return candidate.chip, candidate.topology


def _name(candidate: Candidate) -> str:
    return f"{candidate.chip} {candidate.topology} ({candidate.mesh}, {candidate.weights_dtype})"


def _figures(candidate: Candidate) -> str:
    cost = (
        "no price" if candidate.usd_per_mtok is None else f"${candidate.usd_per_mtok:,.2f} a million tokens"
    )
    rate = (candidate.tokens_per_s or 0) / candidate.chips
    return f"{cost} at {rate:,.0f} tokens/s a chip"
