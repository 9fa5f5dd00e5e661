"""What was measured: kept as JSON, shown as a table and a summary."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bncore.bench import peers
from bncore.bench.extras import require
from bncore.bench.runner import LIMIT, OURS, Result
from bncore.bench.workloads import Case

TITLES = {
    "bncore": "bncore", "torch": "PyTorch", "onednn": "oneDNN",
    "onednn_blocked": "oneDNN blocked", "jax": "JAX", "onnxruntime": "ONNX Runtime",
    "numpy": "NumPy", "reference": "bncore on NumPy", LIMIT: "memory limit",
}  # fmt: skip


@dataclass
class Outcome:
    """A run: the machine, the versions, who was missing, the results."""

    machine: dict
    versions: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)

    @classmethod
    def here(cls) -> Outcome:
        """An empty one, of this machine."""
        psutil = require("psutil")
        return cls(
            machine={
                "cpu": _cpu_name(),
                "cpus": psutil.cpu_count(),
                "own_cache": _own_cache(),
                "busy_before": psutil.cpu_percent(0.5) / 100,
                "system": platform.platform(),
                "python": platform.python_version(),
            }
        )

    def meet(self, workers: dict) -> None:
        """Take down which libraries are there."""
        for name, worker in workers.items():
            if worker.missing:
                self.missing[name] = worker.missing
            else:
                self.versions[name] = worker.version

    @property
    def contenders(self) -> list[str]:
        """Those who were compared with bncore in any case."""
        seen = {name for result in self.results for name in result.ratios}
        return [name for name in peers.NAMES if name in seen]


def save(outcome: Outcome, path: Path) -> None:
    path.write_text(json.dumps(asdict(outcome), indent=1) + "\n")


def load(path: Path) -> Outcome:
    values = json.loads(Path(path).read_text())
    values["results"] = [Result.from_dict(result) for result in values["results"]]
    return Outcome(**values)


# ------------------------------------------------------------------------------------------ table


def show(outcome: Outcome) -> None:
    """Print a table for each thread count, dtype and kind of output, and the summary."""
    console = require("rich.console").Console()
    for (threads, dtype, output), results in grouped(outcome.results, _conditions).items():
        console.print(table(results, outcome, title=_conditions_title(threads, dtype, output)))
    console.print(_legend(outcome))
    console.print(summary(outcome))
    for name, reason in outcome.missing.items():
        console.print(f"{TITLES[name]} is left out: {reason}")


def table(results: Iterable[Result], outcome: Outcome, title: str):
    """A row per case: bncore's time and bandwidth, its share of the limit, its lead on each peer."""
    rich_table = require("rich.table")
    table = rich_table.Table(title=title, header_style="bold", row_styles=["", ""])
    for name in ("shape", "layout", "direction"):
        table.add_column(name)
    for name in ("time", "GB/s", "limit", "of limit"):
        table.add_column(name, justify="right")
    contenders = outcome.contenders
    for name in contenders:
        table.add_column(f"{TITLES[name]}", justify="right")
    shown = None
    for result in results:
        case = result.case
        head = (case.suite, case.shape, case.layout)
        if shown and shown[:2] != head[:2]:
            table.add_section()
        label = ("x".join(map(str, case.shape)), case.layout.removeprefix("channels_"))
        table.add_row(
            *(("", "") if head == shown else label),
            case.direction,
            _time(result.seconds.get(OURS)),
            _gigabytes(result.bandwidth.get(OURS)),
            _gigabytes(result.bandwidth.get(LIMIT)),
            _share(result, outcome.machine["own_cache"]),
            *(_ratio(result.ratios.get(name)) for name in contenders),
        )
        shown = head
    return table


def summary(outcome: Outcome):
    """Geometric mean and minimum of bncore's lead, by direction and peer."""
    rich_table = require("rich.table")
    table = rich_table.Table(title="bncore's lead: geometric mean (least)", header_style="bold")
    for name in ("threads", "dtype", "output", "direction"):
        table.add_column(name)
    contenders = outcome.contenders
    for name in (*contenders, "best oneDNN"):
        table.add_column(TITLES.get(name, name), justify="right")
    groups = grouped(
        outcome.results,
        lambda result: (*_conditions(result), result.case.direction),
    )
    for (threads, dtype, output, direction), results in groups.items():
        columns = [[result.ratios.get(name) for result in results] for name in contenders]
        columns.append(_best_of(results, ("onednn", "onednn_blocked")))
        table.add_row(str(threads), dtype, output, direction, *map(_lead, columns))
    return table


def _best_of(results: list[Result], names: tuple[str, ...]) -> list[float]:
    """bncore's lead, in each layout, on the fastest of these peers in whatever layout."""
    leads = []
    for by_shape in grouped(results, lambda result: result.case.shape).values():
        times = [r.seconds[name] for r in by_shape for name in names if name in r.seconds]
        leads += [min(times) / r.seconds[OURS] for r in by_shape if times and OURS in r.seconds]
    return leads


def _conditions(result: Result) -> tuple:
    return result.case.threads, result.case.dtype, result.case.output


def _conditions_title(threads: int, dtype: str, output: str) -> str:
    how = {"out": "into a given array", "fresh": "into a fresh array"}[output]
    return f"{dtype}, {threads} thread{'s' * (threads > 1)}, {how}"


def _legend(outcome: Outcome) -> str:
    versions = ", ".join(f"{TITLES[name]} {version}" for name, version in outcome.versions.items())
    machine = outcome.machine
    lines = [
        f"{machine['cpu']}, {machine['cpus']} CPUs. {versions}.",
        "GB/s count x and y, in backward dy, x and dx. limit: copy, in backward triad, over the same "
        "memory in the same process. of limit, in brackets: of what is left of it where data must be "
        "read twice. By peer: its time by bncore's, more than 1 where bncore is faster.",
    ]
    if machine["busy_before"] > 0.1:
        busy = machine["busy_before"]
        lines.append(f"[red]Other programs kept {busy:.0%} of the CPUs busy at the start.[/red]")
    return "\n".join(lines)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    return f"{seconds * 1e3:.3g} ms"


def _gigabytes(rate: float | None) -> str:
    return "" if rate is None else f"{rate / 1e9:.3g}" if rate < 1e11 else f"{rate / 1e9:.0f}"


def _share(result: Result, own_cache: int) -> str:
    share = result.ratios.get(LIMIT)
    if share is None:
        return ""
    needed = result.case.bytes_needed(own_cache) / result.case.bytes_moved
    return f"{share:.2f}" + (f" ({share * needed:.2f})" if needed > 1 else "")


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return ""
    text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
    return f"[red]{text}[/red]" if ratio < 1 else f"[green]{text}[/green]"


def _lead(ratios: list[float | None]) -> str:
    known = [ratio for ratio in ratios if ratio]
    if not known:
        return ""
    return f"{_ratio(geometric_mean(known))} ({_ratio(min(known))})"


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean log.

    Examples
    --------
    >>> from bncore.bench.report import geometric_mean
    >>> round(geometric_mean([1.0, 4.0]), 12)
    2.0
    """
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def grouped(items: Iterable, key: Callable) -> dict:
    """Lists of the items that have a key in common, by key, in the order met."""
    groups: dict = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _own_cache() -> int:
    """Bytes of a core's second-level cache; 1 MB where the system does not tell."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 1 << 20
