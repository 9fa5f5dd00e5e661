"""The table: what came out, without and with batch normalization."""

from __future__ import annotations

import numpy as np

from bncore.demo.data import TEST


def show(plain, normalized, settings):
    """Print the table.

    Parameters
    ----------
    plain, normalized : list of Run
        One run a seed, without and with batch normalization.
    settings : Settings
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    seeds = len(settings.seeds)
    table = Table(
        title=f"{settings.hidden_layers} hidden layers of {settings.width} {settings.activation} "
        f"units, {settings.steps} steps",
        caption=f"accuracy on {TEST} test images"
        + (f"; median of {seeds} seeds (lowest - highest)" if seeds > 1 else ""),
        box=box.SIMPLE_HEAD,
    )  # fmt: skip
    table.add_column()
    table.add_column("without", justify="right")
    table.add_column("with batch norm", justify="right")
    left, right = cells(plain), cells(normalized)
    for label in left:
        table.add_row(label, left[label], right[label])
    Console().print(table)


def cells(runs):
    """One column of the table.

    Parameters
    ----------
    runs : list of Run
        One run a seed, of one network with one learning rate.

    Returns
    -------
    dict of str to str
    """
    duration = np.median([run.seconds for run in runs])
    share = np.median([run.batch_norm_seconds / run.seconds for run in runs])
    return {
        "learning rate chosen": f"{runs[0].learning_rate:g}",
        "steps to 90 % accuracy": spread([run.steps_to(0.90) for run in runs], count),
        "steps to 95 % accuracy": spread([run.steps_to(0.95) for run in runs], count),
        "final accuracy": spread([run.test[-1] for run in runs], percent),
        "training time": f"{duration:.2f} s",
        "  in batch norm": f"{share * duration:.2f} s, {percent(share)}",
    }


def spread(values, text):
    """The median as text, and the range where there is one to see."""
    lowest, median, highest = map(text, (min(values), np.median(values), max(values)))
    return median if lowest == highest else f"{median} ({lowest} - {highest})"


def count(steps):
    return f"{steps:.0f}" if np.isfinite(steps) else "not reached"


def percent(share):
    return f"{100 * share:.1f} %"
