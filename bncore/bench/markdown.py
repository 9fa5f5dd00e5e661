"""A short table for a text: GB/s of forward, backward and inference, a row per shape and layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from bncore.bench.outcome import TITLES, Outcome, grouped
from bncore.bench.runner import LIMIT, OURS, Result
from bncore.bench.summary import most_telling

DIRECTIONS = ("forward", "backward", "inference")
SUITE = "headline"


def save(outcome: Outcome, path: Path) -> None:
    """Write the table, of the headline suite where it was measured and else of all shapes."""
    path.write_text("\n".join(lines(outcome)) + "\n")


def lines(outcome: Outcome) -> Iterator[str]:
    """The table, line by line, and what it is of."""
    (threads, dtype, output), results = most_telling(outcome.results)
    results = [result for result in results if result.case.suite == SUITE] or results
    names = [LIMIT, OURS, *outcome.contenders]
    yield line(["shape", "layout", *(TITLES[name] for name in names)])
    yield line(["---", "---", *["---:"] * len(names)])
    for (shape, layout), same in grouped(results, lambda r: (r.case.shape, r.case.layout)).items():
        cells = (_cell(same, name) for name in names)
        yield line(["×".join(map(str, shape)), layout.replace("_", " "), *cells])
    how = "into a given array" if output == "out" else "into a fresh array"
    yield ""
    yield (
        f"GB/s of training forward / backward / inference, {dtype}, {threads} "
        f"thread{'s' * (threads > 1)} of {outcome.machine['cpu']}, {how}."
    )


def _cell(results: Iterable[Result], name: str) -> str:
    rates = {r.case.direction: r.bandwidth[name] / 1e9 for r in results if name in r.seconds}
    if not rates:
        return "–"
    return " / ".join(f"{rates[d]:.3g}" if d in rates else "–" for d in DIRECTIONS)


def line(cells: Iterable[str]) -> str:
    """A row of a table.

    Examples
    --------
    >>> from bncore.bench.markdown import line
    >>> line(["a", "1"])
    '| a | 1 |'
    """
    return f"| {' | '.join(cells)} |"
