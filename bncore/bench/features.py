"""What bncore's features cost: each beside what it replaces, by turns in one process."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import bncore
from bncore.bench.comparisons import Comparison, prepare
from bncore.bench.worker import per_call
from bncore.bench.workloads import Case


@dataclass(frozen=True)
class Cost:
    """What came out of a comparison.

    Attributes
    ----------
    case : Case
    feature, against : str
        What is compared, as `bncore.bench.comparisons` names it.
    seconds, base : float
        Median times of a call; ``base`` is of what the feature is compared with, scaled.
    ratio : float
        Median over the rounds of the feature's time by the other's.
    aim : float or None
        What the ratio should be at most.
    """

    case: Case
    feature: str
    against: str
    seconds: float
    base: float
    ratio: float
    aim: float | None

    @property
    def missed(self) -> bool:
        return self.aim is not None and self.ratio > self.aim


def run(
    cases: Iterable[Case], machine: dict, *, rounds: int, seconds: float
) -> Iterator[list[Cost]]:
    """Measure each case; afterwards the number of threads is what it was.

    Parameters
    ----------
    cases : iterable of Case
    machine : dict
        As of `bncore.bench.outcome.Outcome`.
    rounds : int
    seconds : float
        About what a turn of a call takes.
    """
    team = bncore.get_num_threads()
    try:
        for case in cases:
            yield measure(prepare(case, machine), rounds=rounds, seconds=seconds)
    finally:
        bncore.set_num_threads(team)


def measure(comparison: Comparison, *, rounds: int, seconds: float) -> list[Cost]:
    """All ratios of a comparison, in rounds forward and backward through its calls."""
    used = {name for ratio in comparison.ratios for name in (ratio.feature, ratio.against)}
    names = [name for name in comparison.calls if name in used]
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[:: 1 if turn % 2 == 0 else -1]:
            ways = comparison.calls[name]
            times[name].append(min(per_call(way, seconds / len(ways)) for way in ways))
    costs = []
    for feature, against, aim, scale in comparison.ratios:
        base = [scale * time for time in times[against]]
        paired = [ours / other for ours, other in zip(times[feature], base)]
        costs.append(
            Cost(
                comparison.case, feature, against, statistics.median(times[feature]),
                statistics.median(base), statistics.median(paired), aim,
            )
        )  # fmt: skip
    return costs


def save(costs: Iterable[Cost], machine: dict, version: str, path: Path) -> None:
    """Write them as JSON."""
    content = {"machine": machine, "version": version, "costs": [asdict(cost) for cost in costs]}
    path.write_text(json.dumps(content, indent=1) + "\n")
