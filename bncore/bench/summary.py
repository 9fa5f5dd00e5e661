"""What the rows come to: bncore's lead on each peer, and where it has none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bncore.bench.outcome import Outcome, grouped
from bncore.bench.runner import LIMIT, OURS, Result

OTHER_LAYOUT = ("onednn_blocked",)
"""Peers that have the data in a layout that NumPy's arrays do not come in."""


class Lead(NamedTuple):
    """How a peer fares over some rows.

    Attributes
    ----------
    mean, least : float
        Geometric mean and minimum of the peer's time by bncore's.
    rows, slower : int
        Rows compared, and those of them in which bncore is the slower one.
    """

    mean: float
    least: float
    rows: int
    slower: int


class Loss(NamedTuple):
    """A row in which a peer is faster."""

    ratio: float
    peer: str
    result: Result


def lead(ratios: Iterable[float | None]) -> Lead | None:
    """Of the ratios that there are.

    Examples
    --------
    >>> from bncore.bench.summary import lead
    >>> lead([0.25, None, 4.0])
    Lead(mean=1.0, least=0.25, rows=2, slower=1)
    """
    known = [ratio for ratio in ratios if ratio]
    if not known:
        return None
    slower = sum(ratio < 1 for ratio in known)
    return Lead(geometric_mean(known), min(known), len(known), slower)


def leads(results: Sequence[Result], contenders: Iterable[str]) -> dict[str, Lead | None]:
    """By peer, and under "best oneDNN" on oneDNN in whatever layout is its fastest."""
    found = {name: lead(r.ratios.get(name) for r in results) for name in contenders}
    return {**found, "best oneDNN": lead(best_onednn(results))}


def best_onednn(results: Iterable[Result]) -> list[float]:
    """bncore's lead in each layout on the fastest oneDNN has for the same shape in any layout."""

    def alike(result: Result):
        case = result.case
        return case.shape, case.direction, case.dtype, case.output, case.threads

    ratios = []
    for same in grouped(results, alike).values():
        times = [time for r in same for name, time in r.seconds.items() if "onednn" in name]
        ratios += [min(times) / r.seconds[OURS] for r in same if times and OURS in r.seconds]
    return ratios


def losses(outcome: Outcome) -> list[Loss]:
    """Where a peer is faster in the same layout: each such row once, beside its fastest peer, the
    worst first."""
    found = []
    for result in outcome.results:
        ratios = same_layout(result)
        if ratios and min(ratios.values()) < 1:
            peer = min(ratios, key=ratios.__getitem__)
            found.append(Loss(ratios[peer], peer, result))
    return sorted(found, key=lambda loss: loss.ratio)


def same_layout(result: Result) -> dict[str, float]:
    """The ratios to the peers that have the data in the same layout."""
    return {
        name: ratio
        for name, ratio in result.ratios.items()
        if name != LIMIT and name not in OTHER_LAYOUT
    }


def most_telling(results: Iterable[Result]) -> tuple[tuple[int, str, str], list[Result]]:
    """The conditions (threads, dtype, output) to show where only one can be, and their results:
    most threads, float32 and ``out=``, where there are such."""
    conditions = grouped(results, lambda r: (r.case.threads, r.case.dtype, r.case.output))
    return max(
        conditions.items(),
        key=lambda item: (item[0][0], item[0][1] == "float32", item[0][2] == "out"),
    )


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean log.

    Examples
    --------
    >>> from bncore.bench.summary import geometric_mean
    >>> round(geometric_mean([1.0, 4.0]), 12)
    2.0
    """
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs))
