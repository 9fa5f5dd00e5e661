"""The picture: accuracy against steps, and what goes into a sigmoid while the network learns.

After figure 1 of Ioffe & Szegedy 2015. Colours are Okabe and Ito's, told apart with any colour
vision; every line is labelled where it is.
"""

from __future__ import annotations

import numpy as np

import bncore
from bncore.demo.data import TRAINING
from bncore.demo.network import GAINS
from bncore.demo.training import PERCENTILES

PLAIN, NORMALIZED = "#D55E00", "#0072B2"
INK, GREY = "#222222", "#777777"
SIZE, DPI = (12.0, 5.0), 150
"""Inches, and dots per inch: 1800 x 750 pixels."""

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def draw(plain, normalized, settings, path):
    """Draw the chosen runs of both networks into a PNG file.

    Parameters
    ----------
    plain, normalized : list of Run
        One run a seed, without and with batch normalization.
    settings : Settings
    path : path-like
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE, dpi=DPI)
        grid = figure.add_gridspec(
            1, 3, width_ratios=(1.5, 1, 1), left=0.06, right=0.965, top=0.91, bottom=0.26,
            wspace=0.22,
        )  # fmt: skip
        left, middle, right = (figure.add_subplot(cell) for cell in grid)
        draw_accuracy(left, plain, normalized)
        draw_inputs(middle, plain[0], PLAIN)
        draw_inputs(right, normalized[0], NORMALIZED)
        right.sharey(middle)
        right.tick_params(labelleft=False)
        head(left, "Test accuracy", INK)
        head(middle, f"Input of one {settings.activation}, without", PLAIN)
        head(right, "\N{HORIZONTAL ELLIPSIS} and with batch norm", NORMALIZED)
        middle.set_ylabel("percentiles of the input")
        for axes in (left, middle, right):
            axes.set_xlim(0, settings.steps)
            axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
            axes.set_xlabel("training step")
        figure.text(
            0.06, 0.03, caption(plain, normalized, settings), color=GREY, size=8.5, linespacing=1.6
        )
        figure.savefig(path, format="png")


def draw_accuracy(axes, plain, normalized):
    """Accuracy of every seed, thin, and their median, thick, with the step that reached 95 %."""
    for level in (0.90, 0.95):
        axes.axhline(level, color=GREY, linewidth=0.6, linestyle=(0, (1, 3)), zorder=0)
    for runs, color, name in (
        (normalized, NORMALIZED, "with batch norm"),
        (plain, PLAIN, "without"),
    ):
        steps = runs[0].steps
        accuracy = np.array([run.test for run in runs])
        axes.plot(steps, accuracy.T, color=color, linewidth=0.7, alpha=0.45)
        axes.plot(steps, np.median(accuracy, axis=0), color=color, linewidth=2.2)
        label_accuracy(axes, runs, color, name, above=runs is normalized)
    axes.set_ylim(0, 1.08)
    axes.set_yticks((0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0))
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")


def draw_inputs(axes, run, color):
    """Percentiles of a typical unit's inputs over training."""
    steps, (low, middle, high) = run.steps[1:], run.percentiles[:, :, typical_unit(run)].T
    axes.axhline(0, color=GREY, linewidth=0.6, linestyle=(0, (1, 3)), zorder=0)
    axes.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
    sides = ("top", "center", "bottom")
    for line, width, percent, side in zip((low, middle, high), (1.2, 2.2, 1.2), PERCENTILES, sides):
        axes.plot(steps, line, color=color, linewidth=width)
        axes.annotate(
            f"{percent}th", (steps[-1], line[-1]), (5, 0), textcoords="offset points",
            va=side, color=color, size=8.5, annotation_clip=False,
        )  # fmt: skip


def typical_unit(run):
    """The unit whose 50th percentile moves by the median amount of all units."""
    moved = np.ptp(run.percentiles[:, 1, :], axis=0)
    return int(np.argsort(moved)[len(moved) // 2])


def label_accuracy(axes, runs, color, name, above):
    """The name beside the line, and a dot where 95 % was reached."""
    reached = np.median([run.steps_to(0.95) for run in runs])
    if np.isfinite(reached):
        axes.plot(reached, 0.95, "o", color=color, markersize=8, markeredgecolor="white", zorder=5)
        words, place, side = f"{name}: 95 % after {reached:.0f} steps", (reached, 0.95), "left"
    else:
        # Clear of the lines' last half, which the words take up.
        late = [run.test[run.steps >= run.steps[-1] / 2] for run in runs]
        words, side = f"{name}: 95 % not reached", "right"
        above = above or np.median(late) < 0.5
        place = (runs[0].steps[-1], np.max(late) if above else np.min(late))
    axes.annotate(
        words, place, (0, 16 if above else -26), textcoords="offset points", ha=side,
        color=color, weight="bold",
    )  # fmt: skip


def head(axes, words, color):
    """A title flush with the left edge of its panel."""
    axes.set_title(words, loc="left", color=color, weight="bold", size=10.5, pad=10)


def caption(plain, normalized, settings):
    """What was trained and how, and what the lines are."""
    gain = GAINS[settings.activation]
    weights = "Glorot's initial weights" + (f" times {gain:g}" if gain != 1 else "")
    rates = ", ".join(f"{rate:g}" for rate in settings.learning_rates)
    seeds = len(settings.seeds)
    lines = f"median of {seeds} seeds (thick) and each seed (thin)" if seeds > 1 else "one seed"
    return (
        f"{settings.hidden_layers} hidden layers of {settings.width} {settings.activation} units; "
        f"{weights}, the same for both; minibatches of {settings.batch_size} of {TRAINING} images; "
        f"momentum {settings.momentum:g}; learning rate {plain[0].learning_rate:g} without\n"
        f"and {normalized[0].learning_rate:g} with batch norm, each the best of {rates} by "
        f"validation accuracy. Data: scikit-learn's handwritten digits. "
        f"Left: {lines}.\n"
        f"Right: percentiles over an epoch of what one unit of the last hidden layer gets: the one "
        f"whose 50th moves by the median amount of all (seed {plain[0].seed}). "
        f"bncore {bncore.__version__}."
    )
