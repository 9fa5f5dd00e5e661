"""What is printed: the rows, bncore's lead on each peer, the goals and the worst rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from bncore.bench.extras import require
from bncore.bench.goals import Check, checks
from bncore.bench.outcome import TITLES, Outcome, grouped
from bncore.bench.runner import LIMIT, OURS, Result
from bncore.bench.summary import Lead, leads, losses, same_layout

WORST = 25
"""Rows listed in which a peer is faster."""


def show(outcome: Outcome) -> None:
    """Print everything."""
    show_all(list(_parts(outcome)))


def show_all(parts: Sequence) -> None:
    """Print texts and tables, as wide as these need to be."""
    make_console = require("rich.console").Console
    # A table squeezed into a narrow terminal, or into 80 columns of a file, can't be read.
    unbounded = make_console(width=1000)
    needed = max(unbounded.measure(part).maximum for part in parts if not isinstance(part, str))
    console = make_console(width=max(make_console().width, needed))
    for part in parts:
        console.print(part)


def _parts(outcome: Outcome) -> Iterator:
    for (threads, dtype, output), results in grouped(outcome.results, _conditions).items():
        yield rows(results, outcome, title=_conditions_title(threads, dtype, output))
    yield legend(outcome)
    yield lead_table(outcome)
    yield goal_table(outcome)
    yield from worst_rows(outcome)
    for name, reason in outcome.missing.items():
        yield f"{TITLES[name]} is left out: {reason}"


def rows(results: Iterable[Result], outcome: Outcome, title: str):
    """A row per case: bncore's time, bandwidth and share of the limit, its lead on each peer."""
    contenders = outcome.contenders
    table = empty_table(
        title,
        left=("shape", "layout", "direction"),
        right=("time", "GB/s", "limit", "of limit", *(TITLES[name] for name in contenders)),
    )
    before = None
    for result in results:
        case = result.case
        head = (case.suite, case.shape, case.layout)
        if before and before[:2] != head[:2]:
            table.add_section()
        table.add_row(
            *(("", "") if head == before else (_shape(result), _layout(result))),
            case.direction,
            _time(result.seconds.get(OURS)),
            _gigabytes(result.bandwidth.get(OURS)),
            _gigabytes(result.bandwidth.get(LIMIT)),
            _share(result, outcome),
            *(_ratio(result.ratios.get(name)) for name in contenders),
        )
        before = head
    return table


def lead_table(outcome: Outcome):
    """Geometric mean and minimum of bncore's lead, by direction and peer."""
    contenders = outcome.contenders
    table = empty_table(
        "bncore's lead: geometric mean (least) slower/rows",
        left=("threads", "dtype", "output", "direction"),
        right=(*(TITLES[name] for name in contenders), "best oneDNN"),
    )
    groups = grouped(outcome.results, lambda r: (*_conditions(r), r.case.direction))
    groups["", "", "", "all"] = outcome.results
    for (threads, dtype, output, direction), results in groups.items():
        cells = leads(results, contenders).values()
        table.add_row(str(threads), dtype, output, direction, *map(_lead, cells))
    return table


def goal_table(outcome: Outcome):
    """The goals, what was reached and in which row."""
    table = empty_table(
        "Goals (float32, into a given array)",
        left=("threads", "goal"),
        right=("aim", "reached", "at the limit", "rows met", "worst row"),
    )
    for threads, found in checks(outcome).items():
        for check in found:
            table.add_row(
                str(threads),
                check.goal,
                f"{check.aim:g}",
                _coloured(f"{check.reached:.2f}", check.holds),
                check.at_limit and f"{check.at_limit:.2f}",
                _rows_met(check),
                check.worst and _row(check.worst),
            )
        table.add_section()
    return table


def worst_rows(outcome: Outcome) -> Iterator:
    """How many rows a peer in the same layout is faster in, and the worst of them."""
    compared = sum(bool(same_layout(result)) for result in outcome.results)
    lost = losses(outcome)
    yield (
        f"A peer in the same layout is faster than bncore in {len(lost)} of {compared} rows"
        + (f"; the worst {WORST} are:" if len(lost) > WORST else ".")
    )
    table = empty_table(
        "Where a peer is faster",
        left=("shape", "layout", "direction", "dtype", "output", "threads", "peer"),
        right=("ratio", "time"),
    )
    for ratio, peer, result in lost[:WORST]:
        case = result.case
        table.add_row(
            _shape(result), _layout(result), case.direction, case.dtype, case.output,
            str(case.threads), TITLES[peer], _ratio(ratio), _time(result.seconds[OURS]),
        )  # fmt: skip
    if lost:
        yield table


def legend(outcome: Outcome) -> str:
    """The machine, the versions, and what the columns say."""
    versions = ", ".join(f"{TITLES[name]} {version}" for name, version in outcome.versions.items())
    machine = outcome.machine
    lines = [
        f"{machine['cpu']}, {machine['cpus']} CPUs. {versions}.",
        "GB/s count x and y, in backward dy, x and dx. limit: copy, in backward triad, over the "
        "same memory in the same process.",
        "of limit, in brackets: of what is left of it where data must be read twice. By peer: its "
        "time by bncore's, more than 1 where bncore is faster.",
    ]
    if machine["busy"]:
        lines.append(f"{machine['busy']} other processes were kept busy meanwhile.")
    if machine["busy_before"] > 0.1:
        busy = machine["busy_before"]
        lines.append(f"[red]Other programs kept {busy:.0%} of the CPUs busy at the start.[/red]")
    return "\n".join(lines)


def empty_table(title: str, *, left: Iterable[str], right: Iterable[str]):
    """One with these columns, of texts and of numbers."""
    table = require("rich.table").Table(title=title, header_style="bold")
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, no_wrap=True, justify="right")
    return table


def _conditions(result: Result) -> tuple:
    return result.case.threads, result.case.dtype, result.case.output


def _conditions_title(threads: int, dtype: str, output: str) -> str:
    how = {"out": "into a given array", "fresh": "into a fresh array"}[output]
    return f"{dtype}, {threads} thread{'s' * (threads > 1)}, {how}"


def _shape(result: Result) -> str:
    return "x".join(map(str, result.case.shape))


def _layout(result: Result) -> str:
    return result.case.layout.removeprefix("channels_")


def _row(result: Result) -> str:
    return f"{_shape(result)} {_layout(result)} {result.case.direction}"


def _rows_met(check: Check) -> str:
    return "" if check.rows is None else f"{check.met} of {check.rows}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    return f"{seconds * 1e3:.3g} ms"


def _gigabytes(rate: float | None) -> str:
    return "" if rate is None else f"{rate / 1e9:.3g}" if rate < 1e11 else f"{rate / 1e9:.0f}"


def _share(result: Result, outcome: Outcome) -> str:
    share = result.ratios.get(LIMIT)
    if share is None:
        return ""
    scaled = f" ({outcome.share(result):.2f})" if outcome.reads_again(result) > 1 else ""
    return f"{share:.2f}{scaled}"


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return _coloured(f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}", ratio >= 1)


def _coloured(text: str, good: bool) -> str:
    colour = "green" if good else "red"
    return f"[{colour}]{text}[/{colour}]"


def _lead(lead: Lead | None) -> str:
    if lead is None:
        return ""
    return f"{_ratio(lead.mean)} ({_ratio(lead.least)}) {lead.slower}/{lead.rows}"
