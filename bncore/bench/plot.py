"""Achieved bandwidth against tensor size, under the memory's limit."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path

from bncore.bench.extras import require
from bncore.bench.outcome import TITLES, Outcome, grouped
from bncore.bench.runner import LIMIT, OURS, Result
from bncore.bench.workloads import DIRECTIONS, LAYOUTS

STYLES = {
    OURS: ("#c1121f", "o"), "torch": ("#e07a1f", "s"), "onednn": ("#1f6fb2", "^"),
    "onednn_blocked": ("#7db7e8", "v"), "jax": ("#5b8c3a", "D"), "onnxruntime": ("#8a5fbf", "P"),
    "numpy": ("#7f7f7f", "X"), "reference": ("#b8a9a0", "."),
}  # fmt: skip
LIMIT_COLOUR = "#3a3a3a"
BINS_PER_DECADE = 4
LAYOUT_TITLES = {"channels_first": "N C H W", "channels_last": "N H W C"}


def plot(outcome: Outcome, path: Path) -> None:
    """Draw to a file: a column of panels for each direction, a row for each layout.

    Of the results, those on most threads are drawn, of the narrowest dtype and with ``out=``, where
    there are any.

    Parameters
    ----------
    outcome : Outcome
    path : Path
        Its suffix is the format: PNG, SVG, PDF.
    """
    matplotlib = require("matplotlib")
    matplotlib.use("agg")
    pyplot = require("matplotlib.pyplot")
    (threads, dtype, output), results = _most_telling(outcome.results)
    directions = [d for d in DIRECTIONS if d != "layer" and any(r.case.direction == d for r in results)]
    layouts = [name for name in LAYOUTS if any(r.case.layout == name for r in results)]
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10}):
        figure, axes = pyplot.subplots(
            len(layouts), len(directions), squeeze=False, sharex=True, sharey=True,
            figsize=(1 + 3.7 * len(directions), 1.3 + 2.9 * len(layouts)), layout="constrained",
        )  # fmt: skip
        for row, layout in zip(axes, layouts, strict=True):
            for panel, direction in zip(row, directions, strict=True):
                shown = [
                    r for r in results if (r.case.layout, r.case.direction) == (layout, direction)
                ]
                _draw(panel, shown, outcome.contenders)
            row[0].set_ylabel(f"{LAYOUT_TITLES[layout]}\nGB/s")
        for panel, direction in zip(axes[0], directions, strict=True):
            what = "3 × tensor" if direction == "backward" else "2 × tensor"
            panel.set_title(f"{direction.capitalize()} ({what} / time)")
        for panel in axes[-1]:
            panel.set_xlabel("tensor, MB")
        handles = {}
        for panel in axes.flat:
            for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(
            handles.values(), handles.keys(), loc="outside upper center", frameon=False,
            ncols=len(handles),
        )  # fmt: skip
        how = "into a given array" if output == "out" else "into a fresh array"
        figure.supxlabel(
            f"{outcome.machine['cpu']}, {threads} thread{'s' * (threads > 1)}, {dtype}, {how}. "
            "A dot is a shape, a line the median over shapes of like size.",
            fontsize=8, color="#555555",
        )  # fmt: skip
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def _draw(panel, results: list[Result], contenders: Iterable[str]) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.grid(which="major", color="#e6e6e6", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_major_formatter("{x:g}")
    sizes, rates = _curve(_points(results, LIMIT))
    if sizes:
        panel.plot(
            sizes, rates, color=LIMIT_COLOUR, linewidth=1.6, linestyle=(0, (5, 2)), zorder=3,
            label=TITLES[LIMIT],
        )  # fmt: skip
    for name in [OURS, *contenders]:
        colour, marker = STYLES[name]
        points = _points(results, name)
        ours = name == OURS
        panel.plot(
            *zip(*points, strict=True) if points else ((), ()), marker=marker, linestyle="none",
            markersize=3, markeredgewidth=0, color=colour, alpha=0.35,
        )  # fmt: skip
        panel.plot(
            *_curve(points), color=colour, linewidth=2.4 if ours else 1.3, label=TITLES[name],
            zorder=4 if ours else 2,
        )  # fmt: skip


def _points(results: list[Result], name: str) -> list[tuple[float, float]]:
    """(MB, GB/s) of a contender, by size."""
    return sorted(
        (result.case.tensor_bytes / 1e6, result.bandwidth[name] / 1e9)
        for result in results
        if name in result.seconds
    )


def _curve(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Medians over bins of like size."""
    bins = grouped(points, lambda point: round(math.log10(point[0]) * BINS_PER_DECADE))
    medians = [
        [statistics.median(values) for values in zip(*inside, strict=True)]
        for inside in bins.values()
    ]
    return [size for size, _ in medians], [rate for _, rate in medians]


def _most_telling(results: list[Result]):
    conditions = grouped(results, lambda r: (r.case.threads, r.case.dtype, r.case.output))
    return max(
        conditions.items(),
        key=lambda item: (item[0][0], item[0][1] == "float32", item[0][2] == "out"),
    )
