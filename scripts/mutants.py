"""Show that the tests kill wrong programs: build each mutant of mutants.toml and run the suite.

A mutant is killed when a test fails, hangs or crashes that passes without it. Mutants that survive
are listed and make the script fail, and so does one whose text is no longer in the sources.

    python scripts/mutants.py [--tier x86-64-v3] [--workers 2] [--only PART OF NAME]
                              [--python | --kernels] [--green]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 1800
"""Seconds for one run of the tests, after which they count as hanging."""

SILENT = {
    "bench", "cli", "demo", "docs", "documents", "examples", "mutants", "readme", "stubs",
}  # fmt: skip
"""Tests of what no mutant is in, and of the mutants' own list."""


def test_files(first=None):
    """All test files that may kill a mutant, the likeliest first, then those of the promises."""
    tests = ROOT / "tests"
    files = [*sorted(tests.glob("test_*.py")), *sorted(tests.glob("*/test_*.py"))]
    names = [str(f.relative_to(ROOT)) for f in files if f.stem.removeprefix("test_") not in SILENT]
    return names if first is None else [first, *(name for name in names if name != first)]


class Worker:
    """A copy of the project in which one mutant after the other is built and tested."""

    def __init__(self, directory, tier):
        self.directory, self.tier = directory, tier
        self.built_from_sources = True
        script = ROOT / "scripts" / "build_copy.sh"
        quickly = os.environ | {"OPTIMIZE": "-Og -g0"}
        subprocess.run([script, directory, tier], env=quickly, check=True)

    def run_tests(self, *arguments, first=None):
        """The exit code of pytest, None if it hangs, and what it printed."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("BNCORE_")}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no"]
        try:
            done = subprocess.run(
                [*command, *arguments, *test_files(first)],
                cwd=self.directory,
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return None, ""
        return done.returncode, done.stdout

    def kills(self, mutant, known):
        """What killed the mutant, or None."""
        path = self.directory / mutant["file"]
        compiled = mutant["file"].startswith("src/")
        original = path.read_text()
        path.write_text(original.replace(mutant["old"], mutant["new"]))
        try:
            if compiled or not self.built_from_sources:
                self.build()
            self.built_from_sources = not compiled
            deselected = [f"--deselect={test}" for test in known]
            code, printed = self.run_tests("-x", *deselected, first=mutant.get("first"))
        finally:
            path.write_text(original)
        if code == 0:
            return None
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", printed, re.MULTILINE)
        return failed[1] if failed else "a hang" if code is None else f"exit code {code}"

    def build(self):
        environment = os.environ | {"BNCORE_TIERS": self.tier}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(
            command, cwd=self.directory, env=environment, check=True, capture_output=True
        )


def load():
    """The mutants, each with the one file in which its text stands."""
    mutants = tomllib.loads((ROOT / "scripts" / "mutants.toml").read_text())["mutant"]
    stale = []
    for mutant in mutants:
        files = [path for path in ROOT.glob(mutant["files"]) if path.is_file()]
        found = [path for path in files for _ in range(path.read_text().count(mutant["old"]))]
        if len(found) == 1:
            mutant["file"] = str(found[0].relative_to(ROOT))
        else:
            stale.append(
                f"{mutant['name']}: its text stands {len(found)} times in {mutant['files']}"
            )
    if stale:
        sys.exit("\n".join(stale))
    return mutants


def run_all(mutants, workers, known):
    """Names of the mutants with what killed each, in the order in which they were done."""
    free = Queue()
    for worker in workers:
        free.put(worker)

    def run_one(mutant):
        worker = free.get()
        try:
            killer = worker.kills(mutant, known)
        finally:
            free.put(worker)
        print(f"{mutant['name']:48} {killer or 'SURVIVES'}", flush=True)
        return mutant["name"], killer

    with ThreadPoolExecutor(len(workers)) as pool:
        return list(pool.map(run_one, mutants))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", default="x86-64-v3")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", default="", help="mutants with this in their name")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--python", action="store_true", help="leave the kernels' mutants out")
    which.add_argument("--kernels", action="store_true", help="leave the Python's mutants out")
    parser.add_argument("--green", action="store_true", help="the tests are known to pass")
    options = parser.parse_args()
    mutants = [mutant for mutant in load() if options.only in mutant["name"]]
    if options.python or options.kernels:
        mutants = [m for m in mutants if m["file"].startswith("src/") == options.kernels]

    directory = Path(tempfile.mkdtemp(prefix="mutants-"))
    try:
        workers = [Worker(directory / str(i), options.tier) for i in range(options.workers)]
        _, printed = (0, "") if options.green else workers[0].run_tests()
        known = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", printed, re.MULTILINE)
        for test in known:
            print(f"left out, fails without any mutant: {test}")
        results = run_all(mutants, workers, known)
    finally:
        shutil.rmtree(directory)
    survivors = [name for name, killer in results if killer is None]
    print(f"{len(results) - len(survivors)} of {len(results)} mutants killed")
    return bool(survivors) or not results


if __name__ == "__main__":
    sys.exit(main())
