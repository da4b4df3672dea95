"""Candidates as a plot: cost against the time between tokens, and the line of those that nothing beats in both."""

from collections.abc import Sequence
from pathlib import Path

from jaxopt_llm.report.figures import save
from jaxopt_llm.size.candidate import Candidate


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is at most as high as in both coordinates, from the left to the right."""
    best: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def draw(candidates: Sequence[Candidate], path: Path) -> None:
    """Draws those that fit; without a price for every one, chips a million tokens an hour stand for the cost."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    priced = all(one.usd_per_mtok is not None for one in candidates if one.fits)
    points: dict[str, list[tuple[float, float]]] = {}
    for one in candidates:
        if one.tpot_ms is not None and one.tokens_per_s:
            cost = one.usd_per_mtok if priced else one.chips / one.tokens_per_s / 3600 * 1e6
            points.setdefault(one.chip, []).append((one.tpot_ms.p50, cost or 0.0))
    with mpl.rc_context({"svg.hashsalt": "size", "font.size": 9.5}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        for chip, places in points.items():
            axes.plot(*zip(*places, strict=True), "o", label=chip, alpha=0.8)
        if points:
            line = front([place for places in points.values() for place in places])
            axes.plot(
                *zip(*line, strict=True), color="0.4", linewidth=1, zorder=0, label="nothing beats these"
            )
            axes.set(xscale="log", yscale="log")
            axes.legend(frameon=False)
        axes.set(
            xlabel="time between tokens, median, ms",
            ylabel="US dollars a million tokens" if priced else "chip-hours a million tokens",
        )
        save(figure, path)
