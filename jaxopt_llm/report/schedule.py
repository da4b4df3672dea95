"""The schedule of a pipeline as a plot: stage against time, from a real run."""

from pathlib import Path

from jaxopt_llm.engine import Timeline
from jaxopt_llm.report.figures import save

_SHOWN = 24  # dispatches


def draw_schedule(timeline: Timeline, path: Path) -> None:
    """Draws dispatches from the middle of a run, each with its number; of decoding, where there was any.

    Args:
      timeline: of the run.
      path: of the picture, `.svg` or `.png`.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    busy = timeline.busy()
    dispatches = sorted({span.dispatch for span in timeline.spans if span.decodes or not busy})
    middle = len(dispatches) // 2
    shown = set(dispatches[max(0, middle - _SHOWN // 2) : middle + _SHOWN // 2])
    spans = [span for span in timeline.spans if span.dispatch in shown]
    zero = min((span.start for span in spans), default=0.0)
    shares = [f", {share:.0%} busy" for share in busy] or [""] * timeline.stages
    with mpl.rc_context({"svg.hashsalt": "schedule", "font.size": 9.5}):
        figure = Figure(figsize=(8.0, 0.9 + 0.55 * timeline.stages), layout="constrained")
        axes = figure.add_subplot()
        for span in spans:
            start, length = 1e3 * (span.start - zero), 1e3 * (span.end - span.start)
            color = f"C{span.dispatch % timeline.stages}"  # of its micro-batch, where all of them decode
            axes.broken_barh([(start, length)], (span.stage - 0.38, 0.76), color=color, edgecolor="white")
            axes.text(
                start + length / 2, span.stage, str(span.dispatch), ha="center", va="center", color="white",
                fontsize=7, clip_on=True,
            )  # fmt: skip
        axes.set(xlabel="ms", ylim=(timeline.stages - 0.5, -0.5), xlim=(0, None))
        axes.set_yticks(
            range(timeline.stages), [f"stage {stage}{share}" for stage, share in enumerate(shares)]
        )
        axes.spines[["top", "right", "left"]].set_visible(False)
        save(figure, path)
