"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import bncore
from bncore.bench import (
    comparisons,
    features,
    features_report,
    markdown,
    plot,
    report,
    runner,
    workloads,
)
from bncore.bench import outcome as outcomes
from bncore.bench.disturbance import busy
from bncore.bench.extras import require
from bncore.bench.outcome import TITLES, Outcome
from bncore.bench.peers import NAMES
from bncore.bench.workloads import Case, Workload

QUICK_SECONDS = 48


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options to a parser.

    Examples
    --------
    >>> import argparse
    >>> from bncore import bench
    >>> parser = argparse.ArgumentParser()
    >>> bench.add_arguments(parser)
    >>> parser.parse_args(["--quick", "--suite", "small,mlp"]).suite
    ['small', 'mlp']
    """
    suites = list(dict.fromkeys(workload.suite for workload in workloads.load()))
    parser.add_argument(
        "--quick", action="store_true",
        help="under a minute: unless said otherwise a few shapes in float32 on all threads into "
        "given arrays, without the reference; it stops when its time is up",
    )  # fmt: skip
    parser.add_argument(
        "--features", action="store_true",
        help="no other library: what activation, residual, half precision, weights, in place and "
        "the choice of gradients cost, beside what they replace",
    )  # fmt: skip
    choose = parser.add_argument_group("what to measure (lists are comma-separated)")
    choose.add_argument("--suite", type=_list_of(suites), help=f"of {', '.join(suites)}")
    choose.add_argument(
        "--shape", type=_shape, action="append", metavar="N,C,...",
        help="instead of suites; may be given again",
    )  # fmt: skip
    choose.add_argument("--direction", type=_list_of(workloads.DIRECTIONS))
    choose.add_argument("--layout", type=_list_of(workloads.LAYOUTS))
    choose.add_argument("--dtype", type=_list_of(workloads.DTYPES))
    choose.add_argument(
        "--output", type=_list_of(workloads.OUTPUTS),
        help="out: into an array that is there; fresh: each call allocates",
    )  # fmt: skip
    choose.add_argument("--threads", type=_counts, help="1 and all CPUs where not given")
    choose.add_argument("--peers", type=_list_of(NAMES[1:]), help=f"of {', '.join(NAMES[1:])}")
    how = parser.add_argument_group("how")
    how.add_argument("--rounds", type=_positive, help="turns of each peer: 5, with --quick 3")
    how.add_argument(
        "--turn", type=float, help="about this many seconds a turn: 0.02, with --quick 0.01"
    )
    how.add_argument(
        "--busy", type=_positive, default=0, metavar="N",
        help="measure while so many other processes keep CPUs busy",
    )  # fmt: skip
    how.add_argument(
        "--stop-after", type=float, metavar="SECONDS",
        help=f"begin no case later than that; with --quick {QUICK_SECONDS}",
    )  # fmt: skip
    results = parser.add_argument_group("results")
    results.add_argument("--json", type=_writable, help="write the results to this file")
    results.add_argument("--markdown", type=_writable, help="write a short table to this file")
    results.add_argument("--plot", type=_writable, help="draw bandwidth against size (PNG, SVG)")
    results.add_argument(
        "--load", type=_readable, nargs="+",
        help="measure nothing: report on these JSON files together",
    )  # fmt: skip


def _writable(path: str) -> Path:
    """A file's path in a folder that is there, told before anything is measured."""
    if not Path(path).resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder for {path!r}")
    return Path(path)


def _readable(path: str) -> Path:
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {path!r}")
    return Path(path)


def main(args: argparse.Namespace) -> int:
    """Measure, or load, and report.

    Parameters
    ----------
    args : argparse.Namespace
        From a parser that `add_arguments` has prepared.

    Returns
    -------
    int
        The exit status.
    """
    if args.features:
        return _features(args)
    outcome = outcomes.load(args.load) if args.load else _measure(args)
    if not outcome.results:
        print("Nothing was measured.")
        return 1
    if args.json:
        outcomes.save(outcome, args.json)
    report.show(outcome)
    if args.plot:
        plot.plot(outcome, args.plot)
    if args.markdown:
        markdown.save(outcome, args.markdown)
    return 0


def _measure(args: argparse.Namespace) -> Outcome:
    """What is asked for; where the user interrupts it, what there is until then."""
    tqdm = require("tqdm").tqdm
    seconds = args.stop_after or (QUICK_SECONDS if args.quick else math.inf)
    end = time.monotonic() + seconds
    cases = _cases(args)
    outcome = Outcome.here(busy=args.busy)
    events = runner.run(
        cases,
        ["bncore", *_peers(args)],
        rounds=args.rounds or (3 if args.quick else 5),
        seconds=args.turn or (0.01 if args.quick else 0.02),
    )
    with tqdm(total=len(cases), unit="case", leave=False) as progress:
        with suppress(KeyboardInterrupt), busy(args.busy):
            for event in events:
                _take(event, outcome, progress)
                if outcome.results and time.monotonic() > end:
                    break
        events.close()
    if len(outcome.results) < len(cases):
        print(f"{len(outcome.results)} of {len(cases)} cases were measured.")
    return outcome


def _features(args: argparse.Namespace) -> int:
    """Measure what features cost, and report; interrupted, on what there is until then."""
    for name in ("suite", "dtype", "output", "peers", "plot", "load"):
        if getattr(args, name):
            raise SystemExit(f"bncore bench: --features takes no --{name}")
    machine = outcomes.Outcome.here(busy=args.busy).machine
    costs = list(_costs(args, machine))
    if not costs:
        print("Nothing was measured.")
        return 1
    version = f"{bncore.__version__} ({bncore.backend()})"
    if args.json:
        features.save(costs, machine, version, args.json)
    features_report.show(costs, machine, version)
    if args.markdown:
        features_report.save_markdown(costs, args.markdown)
    return 0


def _costs(args: argparse.Namespace, machine: dict) -> Iterator[features.Cost]:
    layouts = args.layout or workloads.LAYOUTS
    settings = [setting for setting in comparisons.SETTINGS if setting[1] in layouts]
    if args.shape:
        settings = [(shape, layout) for shape in args.shape for layout in layouts]
    cases = comparisons.cases(
        settings, args.direction or comparisons.DIRECTIONS, args.threads or [_cpus()]
    )
    events = features.run(cases, machine, rounds=args.rounds or 5, seconds=args.turn or 0.02)
    end = time.monotonic() + (args.stop_after or math.inf)
    with suppress(KeyboardInterrupt), busy(args.busy):
        for costs in require("tqdm").tqdm(events, total=len(cases), unit="case", leave=False):
            yield from costs
            if time.monotonic() > end:
                break
    events.close()


def _take(event: runner.Result | dict[str, runner.Worker], outcome: Outcome, progress) -> None:
    if isinstance(event, runner.Result):
        outcome.results.append(event)
        progress.update()
        progress.set_postfix_str(_label(event.case))
        return
    told = set(outcome.missing)
    outcome.meet(event)
    for name in outcome.missing.keys() - told:
        progress.write(f"{TITLES[name]} is left out: {outcome.missing[name]}")


def _peers(args: argparse.Namespace) -> Sequence[str]:
    if args.peers or not args.quick:
        return args.peers or NAMES[1:]
    return [name for name in NAMES[1:] if name != "reference"]  # it alone would take half the time


def _cases(args: argparse.Namespace) -> list[Case]:
    if args.shape:
        chosen = [Workload("given", shape) for shape in args.shape]
        if args.direction and "layer" in args.direction:
            chosen = [Workload("given", shape, workloads.DIRECTIONS) for shape in args.shape]
    else:
        chosen = [w for w in workloads.load() if args.suite is None or w.suite in args.suite]
        if args.quick and not args.suite:
            chosen = [w for w in chosen if w.quick]
    cpus = _cpus()
    return list(
        workloads.cases(
            chosen,
            threads=args.threads or sorted({cpus} if args.quick else {1, cpus}),
            dtypes=args.dtype or (["float32"] if args.quick else workloads.DTYPES),
            outputs=args.output or (["out"] if args.quick else workloads.OUTPUTS),
            layouts=args.layout or workloads.LAYOUTS,
            directions=args.direction or workloads.DIRECTIONS,
        )
    )


def _cpus() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _label(case: Case) -> str:
    return f"{'x'.join(map(str, case.shape))} {case.direction}"


def _list_of(names: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in names:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(names)}")
        return chosen

    return parse


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(_counts(text))
    if len(shape) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape N,C,...")
    return shape


def _counts(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return number
