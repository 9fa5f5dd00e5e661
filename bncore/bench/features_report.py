"""What is printed of the features' costs: a row per ratio and a column per array."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bncore.bench import markdown, report
from bncore.bench.features import Cost
from bncore.bench.outcome import grouped


def show(costs: Sequence[Cost], machine: dict, version: str) -> None:
    """Print a table for each number of threads, and the ratios that miss their aims."""
    report.show_all(list(_parts(costs, machine, version)))


def _parts(costs: Sequence[Cost], machine: dict, version: str) -> Iterator:
    for threads, same in grouped(costs, lambda cost: cost.case.threads).items():
        yield _table(same, f"Time by that of what it is compared with, {_threads(threads)}")
    yield (
        f"{machine['cpu']}, {machine['cpus']} CPUs, bncore {version}; float32 into a given array "
        "unless said otherwise."
    )
    if machine["busy_before"] > 0.1:
        busy = machine["busy_before"]
        yield f"[red]Other programs kept {busy:.0%} of the CPUs busy at the start.[/red]"
    aimed = [cost for cost in costs if cost.aim is not None]
    missed = [cost for cost in aimed if cost.missed]
    yield f"{len(missed)} of {len(aimed)} ratios with an aim miss it."


def _table(costs: Sequence[Cost], title: str):
    arrays = list(dict.fromkeys(_array(cost) for cost in costs))
    table = report.empty_table(
        title, left=("direction", "feature", "compared with"), right=("at most", *arrays)
    )
    before = None
    for (direction, feature, against), same in grouped(costs, _row).items():
        if before and before != direction:
            table.add_section()
        found = {_array(cost): _coloured(cost) for cost in same}
        cells = (found.get(array, "") for array in arrays)
        table.add_row(
            "" if direction == before else direction, feature, against, _aim(same), *cells
        )
        before = direction
    return table


def save_markdown(costs: Sequence[Cost], path: Path) -> None:
    """Write the table of the most threads, for a text."""
    threads = max(cost.case.threads for cost in costs)
    path.write_text("\n".join(_lines([c for c in costs if c.case.threads == threads])) + "\n")


def _lines(costs: Sequence[Cost]) -> Iterator[str]:
    arrays = list(dict.fromkeys(_array(cost) for cost in costs))
    yield markdown.line(["direction", "feature", "compared with", "at most", *arrays])
    yield markdown.line(["---"] * 3 + ["---:"] * (1 + len(arrays)))
    for (direction, feature, against), same in grouped(costs, _row).items():
        found = {_array(cost): _ratio(cost) for cost in same}
        cells = (found.get(array, "") for array in arrays)
        yield markdown.line([direction, feature, against, _aim(same), *cells])


def _row(cost: Cost) -> tuple[str, str, str]:
    return cost.case.direction, cost.feature, cost.against


def _array(cost: Cost) -> str:
    last = " last" if cost.case.layout == "channels_last" else ""
    return "x".join(map(str, cost.case.shape)) + last


def _aim(costs: Iterable[Cost]) -> str:
    aims = {f"{cost.aim:.3g}" for cost in costs if cost.aim is not None}
    return " ".join(sorted(aims))


def _ratio(cost: Cost) -> str:
    return f"{cost.ratio:.2f}"


def _coloured(cost: Cost) -> str:
    if cost.aim is None:
        return _ratio(cost)
    colour = "red" if cost.missed else "green"
    return f"[{colour}]{_ratio(cost)}[/{colour}]"


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"
