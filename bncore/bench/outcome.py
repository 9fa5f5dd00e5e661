"""What was measured, on which machine, and its file."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bncore.bench import peers
from bncore.bench.extras import require
from bncore.bench.runner import LIMIT, OURS, Result

TITLES = {
    "bncore": "bncore", "torch": "PyTorch", "onednn": "oneDNN",
    "onednn_blocked": "oneDNN blocked", "jax": "JAX", "onnxruntime": "ONNX Runtime",
    "numpy": "NumPy", "reference": "bncore on NumPy", LIMIT: "memory limit",
}  # fmt: skip

DEFAULT_CACHE = {"own_cache": 1 << 20, "last_cache": 32 << 20}
"""Bytes, where the system does not tell."""


@dataclass
class Outcome:
    """A run: the machine, the versions, who was missing, the results."""

    machine: dict
    versions: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)

    @classmethod
    def here(cls, busy: int = 0) -> Outcome:
        """An empty one, of this machine, on which so many other processes are kept busy."""
        psutil = require("psutil")
        return cls(
            machine={
                "cpu": _cpu_name(),
                "cpus": psutil.cpu_count(),
                "own_cache": _cache(2) or DEFAULT_CACHE["own_cache"],
                "last_cache": _cache(3) or _cache(2) or DEFAULT_CACHE["last_cache"],
                "busy_before": psutil.cpu_percent(0.5) / 100,
                "busy": busy,
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
        return [name for name in peers.NAMES if name in seen and name != OURS]

    def share(self, result: Result) -> float | None:
        """The part of the limit that bncore reaches, where data that a core's cache can't keep
        between the two passes count twice; None where the limit was not measured."""
        share = result.ratios.get(LIMIT)
        return share and share * self.reads_again(result)

    def reads_again(self, result: Result) -> float:
        """Bytes that must be moved by those that would be with an unbounded cache; 1 or more."""
        return result.case.bytes_needed(self.machine["own_cache"]) / result.case.bytes_moved


def save(outcome: Outcome, path: Path) -> None:
    """Write an outcome as JSON."""
    path.write_text(json.dumps(asdict(outcome), indent=1) + "\n")


def load(paths: Iterable[Path]) -> Outcome:
    """What was saved; of several files together, and of a case that is in more than one the last.

    Parameters
    ----------
    paths : iterable of Path
        At least one; the machine is the first one's.
    """
    whole, results = None, {}
    for path in paths:
        values = json.loads(Path(path).read_text())
        found = [Result.from_dict(result) for result in values.pop("results")]
        part = Outcome(**values)
        whole = whole or part
        whole.versions.update(part.versions)
        whole.missing.update(part.missing)
        results.update((result.case, result) for result in found)
    whole.results = list(results.values())
    return whole


def grouped(items: Iterable, key: Callable) -> dict:
    """Lists of the items that have a key in common, by key, in the order met.

    Examples
    --------
    >>> from bncore.bench.outcome import grouped
    >>> grouped([1, 2, 3], lambda number: number % 2)
    {1: [1, 3], 0: [2]}
    """
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


def _cache(level: int) -> int | None:
    """Bytes of the first CPU's cache of this level."""
    try:
        path = Path(f"/sys/devices/system/cpu/cpu0/cache/index{level}/size")
        return int(path.read_text().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return None
