"""Achieved bandwidth against tensor size, under the memory's limit."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path

from bncore.bench.extras import require
from bncore.bench.outcome import TITLES, Outcome, grouped
from bncore.bench.runner import LIMIT, OURS, Result
from bncore.bench.summary import most_telling
from bncore.bench.workloads import DIRECTIONS

STYLES = {
    OURS: ("#c1121f", "o"), "torch": ("#e07a1f", "s"), "onednn": ("#1f6fb2", "^"),
    "onednn_blocked": ("#7db7e8", "v"), "jax": ("#5b8c3a", "D"), "onnxruntime": ("#8a5fbf", "P"),
    "numpy": ("#7f7f7f", "X"), "reference": ("#b8a9a0", "."),
}  # fmt: skip
LIMIT_COLOUR = "#3a3a3a"
BINS_PER_DECADE = 3
LEAST_BYTES = 8_000
"""Smaller tensors are a matter of latency, which the table shows."""

LAYOUT_TITLES = {True: "channels first (NCHW)", False: "channels last (NHWC, NC)"}
"""By `Case.channels_apart`."""


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
    conditions, results = most_telling(outcome.results)
    directions = [
        d for d in DIRECTIONS if d != "layer" and any(r.case.direction == d for r in results)
    ]
    layouts = sorted({r.case.channels_apart for r in results}, reverse=True)
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 11}):
        figure, axes = pyplot.subplots(
            len(layouts), len(directions), squeeze=False, sharex=True, sharey=True,
            figsize=(1 + 3.9 * len(directions), 1.3 + 3.0 * len(layouts)), layout="constrained",
        )  # fmt: skip
        for row, layout in zip(axes, layouts, strict=True):
            for panel, direction in zip(row, directions, strict=True):
                told = (r for r in results if r.case.direction == direction)
                shown = [r for r in told if r.case.channels_apart == layout]
                _axes(panel)
                _curves(panel, shown, outcome.contenders)
                _cache(panel, outcome.machine["last_cache"], 3 if direction == "backward" else 2)
        _bounds(axes.flat[0], results, outcome.contenders)
        _titles(figure, axes, layouts, directions, conditions, outcome.machine["cpu"])
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def _axes(panel) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.grid(which="major", color="#ececec", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)
    panel.xaxis.set_major_formatter(lambda size, _: _bytes(size))
    panel.yaxis.set_major_formatter("{x:g}")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_minor_formatter(lambda *_: "")


def _curves(panel, results: list[Result], contenders: Iterable[str]) -> None:
    sizes, rates = _curve(_points(results, LIMIT))
    panel.plot(
        sizes, rates, color=LIMIT_COLOUR, linewidth=1.5, linestyle=(0, (5, 2)), zorder=3,
        label=TITLES[LIMIT],
    )  # fmt: skip
    if sizes:
        panel.fill_between(sizes, rates, 1e6, color="#f4f4f4", linewidth=0, zorder=0)
    for name in [OURS, *contenders]:
        colour, marker = STYLES[name]
        points = _points(results, name)
        ours = name == OURS
        panel.plot(
            *zip(*points, strict=True) if points else ((), ()), marker=marker, linestyle="none",
            markersize=4 if ours else 3, markeredgewidth=0, color=colour,
            alpha=0.4 if ours else 0.2,
        )  # fmt: skip
        panel.plot(
            *_curve(points), color=colour, linewidth=2.8 if ours else 1.2, label=TITLES[name],
            zorder=4 if ours else 2, solid_capstyle="round", solid_joinstyle="round",
        )  # fmt: skip


def _cache(panel, size: int, tensors: int) -> None:
    """Where the tensors together fill the last cache."""
    panel.axvline(size / tensors, color="#a0a0a0", linewidth=0.8, linestyle=":", zorder=1)
    label = panel.text(
        size / tensors, 0.03, "cache full ", transform=panel.get_xaxis_transform(), ha="right",
        fontsize=7, color="#808080", clip_on=True,
    )  # fmt: skip
    label.set_in_layout(False)  # it may lie outside the panel


def _bounds(panel, results: list[Result], contenders: Iterable[str]) -> None:
    """From the smallest size drawn to the largest; far slower points are left below the edge."""
    sizes = [r.case.tensor_bytes for r in results if r.case.tensor_bytes >= LEAST_BYTES]
    if sizes and min(sizes) < max(sizes):
        panel.set_xlim(min(sizes) / 1.3, max(sizes) * 1.3)
    lines = [_curve(_points(results, name))[1] for name in (LIMIT, OURS, *contenders)]
    rates = [rate for line in lines for rate in line]
    if rates:
        panel.set_ylim(max(min(rates) / 1.5, max(rates) / 3000), max(rates) * 1.5)


def _titles(figure, axes, layouts, directions, conditions, cpu: str) -> None:
    for panel, direction in zip(axes[0], directions, strict=True):
        what = "dy, x, dx" if direction == "backward" else "x, y"
        panel.set_title(f"{direction} ({what})", fontweight="bold")
    for panel, layout in zip(axes[:, 0], layouts, strict=True):
        panel.set_ylabel(f"{LAYOUT_TITLES[layout]}\nGB/s")
    for panel in axes[-1]:
        panel.set_xlabel("size of the tensor")
    handles = {}
    for panel in axes.flat:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", frameon=False,
        ncols=len(handles),
    )  # fmt: skip
    threads, dtype, output = conditions
    how = "into a given array" if output == "out" else "into a fresh array"
    figure.supxlabel(
        f"{cpu}, {threads} thread{'s' * (threads > 1)}, {dtype}, {how}. "
        "A dot is a shape, a line the median over shapes of like size.",
        fontsize=8, color="#555555",
    )  # fmt: skip


def _points(results: list[Result], name: str) -> list[tuple[float, float]]:
    """(bytes, GB/s) of a contender, by size."""
    return sorted(
        (result.case.tensor_bytes, result.bandwidth[name] / 1e9)
        for result in results
        if name in result.seconds and result.case.tensor_bytes >= LEAST_BYTES
    )


def _curve(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Medians over bins of like size."""
    bins = grouped(points, lambda point: round(math.log10(point[0]) * BINS_PER_DECADE))
    medians = [
        [statistics.median(values) for values in zip(*inside, strict=True)]
        for inside in bins.values()
    ]
    return [size for size, _ in medians], [rate for _, rate in medians]


def _bytes(size: float) -> str:
    power = max(0, min(3, int(math.log10(size) // 3)))
    return f"{size / 1000**power:g} {('B', 'kB', 'MB', 'GB')[power]}"
