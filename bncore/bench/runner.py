"""Turns and rounds: every library in its own process, one of them at work at a time."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bncore.bench.extras import require
from bncore.bench.workloads import Case

OURS, LIMIT = "bncore", "limit"

_START = """
import sys, types
package = types.ModuleType("bncore")
package.__path__ = [sys.argv[1]]
sys.modules["bncore"] = package
from bncore.bench import worker
worker.main(sys.argv[2], int(sys.argv[3]))
"""
"""Another library's process takes this package's benchmark without its kernels: they would bring
along an OpenMP runtime, and PyTorch would then use it in place of its own."""

_START_OURS = """
import sys
sys.path.insert(0, sys.argv[1] + "/..")
from bncore.bench import worker
worker.main(sys.argv[2], int(sys.argv[3]))
"""


class Worker:
    """A library's process.

    Attributes
    ----------
    name : str
    version, missing : str or None
        Of the library, or why it can't be had. Known from `wait` on.
    """

    def __init__(self, name: str, threads: int):
        self.name, self.version, self.missing = name, None, None
        ours = name in (OURS, "reference")
        environment = {**os.environ, **_team_of(threads)}
        if name == "reference":
            environment["BNCORE_BACKEND"] = "numpy"
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [
                sys.executable, "-c", _START_OURS if ours else _START,
                str(Path(__file__).parent.parent), name, str(threads),
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env=environment, text=True,
        )  # fmt: skip

    def wait(self) -> None:
        """Until the library is imported."""
        hello = self.receive()
        self.version, self.missing = hello.get("version"), hello.get("missing")

    def ask(self, **request) -> dict:
        self.send(**request)
        return self.receive()

    def send(self, **request) -> None:
        with suppress(BrokenPipeError):  # `receive` tells why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def receive(self) -> dict:
        """The answer; of a process that has ended its last words."""
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._errors.seek(0)
        reason = f"ended with {self._process.wait()}: {self._errors.read()[-500:].strip()}"
        return {"missing": reason, "unsupported": reason}

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


@dataclass
class Result:
    """What came out of a case.

    Attributes
    ----------
    case : Case
    seconds : dict
        Median time of a call by contender; "limit" is the pass over the memory.
    ratios : dict
        Median over the rounds of the contender's time by bncore's.
    skipped : dict
        Why a contender does not take part.
    """

    case: Case
    seconds: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def bandwidth(self) -> dict[str, float]:
        """Bytes a second by contender."""
        return {name: self.case.bytes_moved / time for name, time in self.seconds.items()}

    @classmethod
    def from_dict(cls, values: dict) -> Result:
        """From what `dataclasses.asdict` has made of it."""
        return cls(**{**values, "case": Case(**values["case"])})


def run(
    cases: Sequence[Case], peers: Iterable[str], *, rounds: int, seconds: float
) -> Iterator[Result | dict[str, Worker]]:
    """Measure the cases; each team of workers, as it starts, is announced as a dict.

    Parameters
    ----------
    cases : sequence of Case
        Those of a thread count together.
    peers : iterable of str
    rounds : int
    seconds : float
        What a turn may take; one call is made where it takes longer.
    """
    for threads, group in itertools.groupby(cases, key=lambda case: case.threads):
        workers = [Worker(name, threads) for name in peers]
        try:
            for worker in workers:
                worker.wait()
            yield {worker.name: worker for worker in workers}
            present = [worker for worker in workers if not worker.missing]
            for case in group:
                yield measure(case, present, rounds=rounds, seconds=seconds)
        finally:
            for worker in workers:
                worker.close()


def measure(case: Case, workers: Sequence[Worker], *, rounds: int, seconds: float) -> Result:
    """One case by all workers, in rounds forward and backward through them."""
    result = Result(case)
    keep = 4 * len(workers) * case.tensor_bytes < _free_memory() / 2
    if keep:
        workers = _prepared(workers, result)
    times: dict[str, dict[int, float]] = {}
    for turn in range(rounds):
        for worker in workers[:: 1 if turn % 2 == 0 else -1]:
            if worker.name != OURS and _is_slow(times.get(worker.name), seconds):
                continue
            if keep or _prepared([worker], result):
                for name, time in _times(worker, seconds).items():
                    times.setdefault(name, {})[turn] = time
            if not keep:
                worker.ask(do="release")
    if keep:
        for worker in workers:
            worker.ask(do="release")
    for name, by_turn in times.items():
        result.seconds[name] = statistics.median(by_turn.values())
        if name != OURS and OURS in times:
            paired = [time / times[OURS][turn] for turn, time in by_turn.items()]
            result.ratios[name] = statistics.median(paired)
    return result


def _prepared(workers: Sequence[Worker], result: Result) -> list[Worker]:
    """Those that have prepared the case; of the others the result says why not."""
    for worker in workers:
        worker.send(do="prepare", case=asdict(result.case))
    able = []
    for worker in workers:
        reason = worker.receive().get("unsupported")
        if reason:
            result.skipped[worker.name] = reason
        else:
            able.append(worker)
    return able


def _times(worker: Worker, seconds: float) -> dict[str, float]:
    """A worker's turn: its time of a call, and with ours the limit's."""
    answers = {worker.name: worker.ask(do="run", seconds=seconds)}
    if worker.name == OURS:
        answers[LIMIT] = worker.ask(do="limit", seconds=seconds)
    return {name: answer["seconds"] for name, answer in answers.items() if "seconds" in answer}


def _is_slow(times, seconds: float) -> bool:
    """Whether one turn of it is enough."""
    return bool(times) and min(times.values()) > 5 * seconds


def _team_of(threads: int) -> dict[str, str]:
    """What libraries read their number of threads from."""
    names = ("OMP", "OPENBLAS", "MKL", "BLIS")
    return {f"{name}_NUM_THREADS": str(threads) for name in names}


def _free_memory() -> int:
    return require("psutil").virtual_memory().available
