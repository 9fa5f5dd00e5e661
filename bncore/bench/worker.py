"""One library's process: reads requests, a line of JSON each, and answers each with another.

    {"do": "prepare", "case": {...}}   -> {} or {"unsupported": "why"}
    {"do": "run", "seconds": 0.05}     -> {"seconds": per call}
    {"do": "limit", "seconds": 0.05}   -> {"seconds": per pass over the same memory} or {}
    {"do": "release"}                  -> {}

At the start it says {"version": ...}, or {"missing": "why"} and ends.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable

from bncore.bench.peers import Missing, Task, Unsupported
from bncore.bench.workloads import Case


def main(name: str, threads: int) -> None:
    """Serve as the peer ``name`` on so many CPUs until the input ends."""
    answers = _private_stdout()

    def answer(**message):
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    _keep_to(threads)
    try:
        module = importlib.import_module(f"bncore.bench.peers.{name}")
        peer = module.Peer(threads)
    except (ImportError, Missing) as error:
        answer(missing=str(error))
        return
    answer(version=peer.version)
    task = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            match request["do"]:
                case "prepare":
                    task = None
                    task = peer.prepare(Case(**request["case"]))
                    answer()
                case "release":
                    task = None
                    answer()
                case "run":
                    answer(seconds=per_call(task.run, request["seconds"]))
                case "limit":
                    answer(**_limit(task, request["seconds"]))
        except Unsupported as reason:
            answer(unsupported=str(reason))
        except Exception:
            answer(unsupported=f"failed: {traceback.format_exc(limit=-1)}")


def _limit(task: Task, seconds: float) -> dict:
    """The better of the ways over the same memory."""
    if not task.limits:
        return {}
    share = seconds / len(task.limits)
    return {"seconds": min(per_call(run, share) for run in task.limits)}


def per_call(run: Callable[[int], float], seconds: float) -> float:
    """Median time of a call, measured for about so many seconds.

    Longer where a call is long: of a few samples one that was disturbed is not the median.

    Examples
    --------
    >>> from bncore.bench.peers import looped
    >>> from bncore.bench.worker import per_call
    >>> per_call(looped(dict), 1e-3) > 0
    True
    """
    once = run(1)  # wakes the threads and fetches what the others have driven from the caches
    if once < 4 * seconds:
        once = min(once, run(1))
    calls = max(1, int(seconds / 9 / once))
    samples, spent = [], 0.0
    while spent < seconds or (len(samples) < 5 and spent < 10 * seconds):
        samples.append(run(calls))
        spent += samples[-1]
    _wait_for_rest()
    return statistics.median(samples) / calls


def _wait_for_rest() -> None:
    """Sleep until the threads of this process no longer spin: they would slow the next one's."""
    before = time.process_time()
    for _ in range(200):
        time.sleep(1e-3)
        now = time.process_time()
        if now - before < 2e-4:
            break
        before = now


def _keep_to(threads: int) -> None:
    """Keep this process to the first CPUs: not every library has a call for it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _private_stdout():
    """What was the standard output; from here on it is the standard error, for whoever prints."""
    private = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return private
