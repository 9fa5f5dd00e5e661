"""What bncore sets itself in speed, checked against the rows that a run has.

The goals are for float32 into given arrays, on each number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bncore.bench.outcome import Outcome, grouped
from bncore.bench.runner import OURS, Result
from bncore.bench.summary import best_onednn, geometric_mean, same_layout

NEAR_LIMIT = 0.9  # of the copy or triad, where the tensors are larger than the cache
OVER_TORCH = 4.0  # geometric mean
OVER_ONEDNN = 1.3  # geometric mean, on its best layout
SMALL_OVER_TORCH = 2.0  # every call of the small shapes
SMALL_SHAPES = ((2, 16, 8, 8), (64, 100))
CLIFF = 1.5  # time per byte of an irregular shape by that of a regular one of like size
TWO_THREADS = 1.8  # by one thread, where the data is in the cache
TEAM_WORK = 1 << 18  # bytes from which two threads have enough to do
LARGE = 4 << 20  # bytes from which memory is what counts


@dataclass(frozen=True)
class Check:
    """A goal and what the rows say of it.

    Attributes
    ----------
    goal : str
    aim, reached : float
        Met where ``reached >= aim``.
    rows, met : int or None
        Of a goal that holds for every row: how many there are, and how many meet it.
    worst : Result or None
        The row that ``reached`` is of.
    at_limit : float or None
        Of a lead over a peer: what it would be if each row took as long as its limit, the copy or
        triad. An aim beyond it asks for more than the memory gives.
    """

    goal: str
    aim: float
    reached: float
    rows: int | None = None
    met: int | None = None
    worst: Result | None = None
    at_limit: float | None = None

    @property
    def holds(self) -> bool:
        return self.reached >= self.aim


def checks(outcome: Outcome) -> dict[int, list[Check]]:
    """By number of threads; goals that no row speaks to are left out."""
    told = [r for r in outcome.results if r.case.dtype == "float32" and r.case.output == "out"]
    told = [r for r in told if OURS in r.seconds]
    by_threads = grouped(told, lambda result: result.case.threads)
    found = {}
    for threads, results in by_threads.items():
        alone = by_threads.get(1, ()) if threads > 1 else ()
        found[threads] = [
            *_near_limit(results, outcome), *_ahead(results, outcome), *_small(results),
            *_no_cliff(results), *_threads(results, alone, outcome),
        ]  # fmt: skip
    return found


def _near_limit(results: Sequence[Result], outcome: Outcome) -> Iterator[Check]:
    large = [r for r in results if r.case.bytes_moved > outcome.machine["last_cache"]]
    for again, kind in ((False, "read once"), (True, "read twice")):
        values = [
            (share, r)
            for r in large
            if (share := outcome.share(r)) and (outcome.reads_again(r) > 1) == again
        ]
        yield from _each(f"larger than the cache, {kind}: of the limit", NEAR_LIMIT, values)


def _ahead(results: Sequence[Result], outcome: Outcome) -> Iterator[Check]:
    leads = [(min(ratios.values()), r) for r in results if (ratios := same_layout(r))]
    yield from _each("ahead of every peer in the same layout", 1.0, leads)
    calls = [r for r in results if r.case.direction != "layer"]
    torch = [r for r in calls if "torch" in r.ratios]
    large = [r for r in torch if r.case.tensor_bytes >= LARGE]
    for rows, goal in (
        (torch, "geometric mean over PyTorch"),
        (large, f"tensors from {LARGE >> 20} MB on, geometric mean over PyTorch"),
    ):
        bounds = [r.ratios["torch"] / share for r in rows if (share := outcome.share(r))]
        at_limit = geometric_mean(bounds) if bounds else None
        yield from _mean(goal, OVER_TORCH, [r.ratios["torch"] for r in rows], at_limit)
    yield from _mean("geometric mean over oneDNN's best layout", OVER_ONEDNN, best_onednn(calls))


def _small(results: Sequence[Result]) -> Iterator[Check]:
    calls = [
        r
        for r in results
        if r.case.shape in SMALL_SHAPES and r.case.direction in ("inference", "layer")
    ]
    for name, title, aim in (("torch", "PyTorch", SMALL_OVER_TORCH), ("onednn", "oneDNN", 1.0)):
        values = [(r.ratios[name], r) for r in calls if name in r.ratios]
        yield from _each(f"small shapes, inference and layer, by {title}", aim, values)


def _no_cliff(results: Sequence[Result]) -> Iterator[Check]:
    """An irregular shape's time per byte beside that of the nearest regular one in size."""
    values = []
    for same in grouped(results, lambda r: (r.case.channels_apart, r.case.direction)).values():
        regular = [r for r in same if _is_regular(r.case.shape)]
        for result in (r for r in same if r not in regular):
            near = min(regular, key=lambda r: _apart(r, result), default=None)
            if near and _apart(near, result) <= 1:
                rate = result.bandwidth[OURS] / near.bandwidth[OURS]
                values.append((rate * CLIFF, result))
    yield from _each(f"speed of irregular shapes, {CLIFF} x it by the regular", 1.0, values)


def _is_regular(shape: tuple[int, ...]) -> bool:
    plane = math.prod(shape[2:])
    return shape[0] > 1 and shape[1] % 16 == 0 and shape[1] < 4096 and (plane == 1 or plane >= 784)


def _apart(one: Result, other: Result) -> float:
    """How far apart two tensors are in size, in powers of two."""
    return abs(math.log2(one.case.tensor_bytes / other.case.tensor_bytes))


def _threads(
    results: Sequence[Result], alone: Sequence[Result], outcome: Outcome
) -> Iterator[Check]:
    def key(result: Result):
        return result.case.shape, result.case.layout, result.case.direction

    times = {key(r): r.seconds[OURS] for r in alone}
    values = [(times[key(r)] / r.seconds[OURS], r) for r in results if key(r) in times]
    cache = outcome.machine["last_cache"]
    cached = [
        v for v, r in values if TEAM_WORK <= r.case.tensor_bytes and r.case.bytes_moved < cache
    ]
    yield from _mean("by one thread, geometric mean in the cache", TWO_THREADS, cached)
    yield from _each("by one thread, every size", 1.0, values)


def _each(goal: str, aim: float, values: Sequence[tuple[float, Result]]) -> Iterator[Check]:
    if values:
        reached, worst = min(values, key=lambda value: value[0])
        met = sum(value >= aim for value, _ in values)
        yield Check(goal, aim, reached, len(values), met, worst)


def _mean(
    goal: str, aim: float, values: Sequence[float], at_limit: float | None = None
) -> Iterator[Check]:
    if values:
        yield Check(goal, aim, geometric_mean(values), at_limit=at_limit)
