"""Show that the tests kill wrong programs: build each mutant of mutants.toml and run the tests.

A mutant is killed when a test fails, hangs or crashes that passes without it, which is tried too.
Mutants that survive are listed and make the script fail, and so does one whose text is no longer
in the sources.

    python scripts/mutants.py [--tier x86-64-v3] [--jobs 2] [--only PART OF NAME]
                              [--python | --kernels] [--sample 5]

What makes it quick: one tier, without optimization; a mutant rebuilds one module, the one that its
``first`` tests call or that it names itself, and only where those tests pass also the others that
its file is part of; and the tests likeliest to see it run alone before the others are collected.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 3600
"""Seconds for one run of the tests, after which they count as hanging."""

SILENT = {
    "bench", "cli", "demo", "docs", "documents", "examples", "mutants", "readme", "stubs",
}  # fmt: skip
"""Tests of what no mutant is in, and of the mutants' own list."""

KERNELS = ("statistics", "normalization", "gradient")
CALLED_BY = {
    "test_statistics": "statistics", "test_moments": "statistics",
    "test_gradients": "gradient", "test_derivatives": "gradient",
}  # fmt: skip
"""The module that a file of tests calls first of all; normalization where it is not named."""


def test_files(first):
    """All test files that may kill a mutant but the first, those of the promises last."""
    tests = ROOT / "tests"
    files = [*sorted(tests.glob("test_*.py")), *sorted(tests.glob("*/test_*.py"))]
    names = [str(f.relative_to(ROOT)) for f in files if f.stem.removeprefix("test_") not in SILENT]
    return [name for name in names if name != first]


def modules_of(mutant):
    """The modules that a mutant is part of, that of its first tests before the others."""
    path = Path(mutant["file"])
    if path.parts[0] != "src":
        return []
    if path.stem in ("runtime", *KERNELS):
        return [path.stem]
    chosen = mutant.get("module", CALLED_BY.get(Path(mutant["first"]).stem, "normalization"))
    return [chosen, *(module for module in KERNELS if module != chosen)]


class Worker:
    """A copy of the project, built, in which one mutant after the other is made and tested."""

    def __init__(self, directory, tier):
        self.directory, self.tier = directory, tier
        log = (directory / "build.log").read_text()
        lines = [line for line in log.splitlines() if re.match(r"g(cc|\+\+) ", line)]
        self.commands = [shlex.split(line) for line in lines]

    def kills(self, mutant, failing_anyway=()):
        """What killed the mutant, or None."""
        with self.mutated(mutant) as rebuild:
            modules = modules_of(mutant)
            for module in modules[:1]:
                rebuild(module)
            killer = self.run_tests([mutant["first"]], failing_anyway)
            if killer is None:
                for module in modules[1:]:
                    rebuild(module)
                again = [mutant["first"]] if len(modules) > 1 else []
                killer = self.run_tests([*again, *test_files(mutant["first"])], failing_anyway)
        if killer is not None and "::" in killer and self.run_tests([killer]) is not None:
            print(f"left out, fails without any mutant: {killer}", flush=True)
            return self.kills(mutant, [*failing_anyway, killer])
        return killer

    @contextmanager
    def mutated(self, mutant):
        """The copy with the mutant's text; gives a function that rebuilds a module by name."""
        originals = {}

        def replace(path, text=None):
            """Keep a file's content, to be put back, and write another one."""
            if path not in originals:
                originals[path] = path.read_bytes()
            if text is not None:
                path.write_text(text)

        source = self.directory / mutant["file"]
        text = source.read_text().replace(mutant["old"], mutant["new"])
        replace(source, text)
        for copied in self.directory.glob(f"build/*/src/{source.name}"):
            replace(copied, text)

        def rebuild(module):
            for path in self.products(module):
                replace(path)
            self.rebuild(module, translate=source.suffix in (".pyx", ".pxd"))

        try:
            yield rebuild
        finally:
            for path, content in originals.items():
                path.write_bytes(content)

    def products(self, module):
        """The C++ of a module and what is imported."""
        translated = [*self.directory.glob(f"build/*/src/{module}.c*")]
        libraries = [*self.directory.glob(f"bncore/**/{module}.*.so")]
        return translated + libraries + [*self.directory.glob(f"bncore/_{module}.*.so")]

    def rebuild(self, module, translate):
        """Translate, compile and link one module with the commands that first did it."""
        [source] = self.directory.glob(f"build/*/src/{module}.c*")
        [library] = [path for path in self.products(module) if path.suffix == ".so"]
        relative = str(source.relative_to(self.directory))
        if translate:
            name = ".".join(library.relative_to(self.directory).with_suffix("").parts)
            command = [sys.executable, "-m", "cython", "-3", "-I", "src", "--module-name",
                       name.split(".cpython")[0], "-X", "freethreading_compatible=True",
                       f"src/{module}.pyx", "-o", relative]  # fmt: skip
            self.call(command + ["--cplus"] * (source.suffix == ".cpp"))
        [compile_it] = [command for command in self.commands if relative in command]
        obj = compile_it[compile_it.index("-o") + 1]
        self.call(compile_it)
        [link] = [command for command in self.commands if obj in command and "-shared" in command]
        link[link.index("-o") + 1] = str(library.relative_to(self.directory))
        library.unlink()
        self.call(link)

    def call(self, command):
        done = subprocess.run(command, cwd=self.directory, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-3000:]}")

    def run_tests(self, tests, deselected=()):
        """What fails first: a test, or how the process ended; None if all pass."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("BNCORE_")}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"  # a mutant may be no newer than the original
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=no"]
        command += [f"--deselect={test}" for test in deselected]
        try:
            done = subprocess.run(
                [*command, *tests],
                cwd=self.directory,
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return "a hang"
        if done.returncode == 0:
            return None
        if done.returncode in (4, 5):  # pytest did not understand, or found nothing
            raise RuntimeError(
                f"pytest {' '.join(tests)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            )
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.MULTILINE)
        return failed[1] if failed else f"exit code {done.returncode}"


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


def chosen(mutants, options):
    """Those that the options ask for."""
    if options.only:
        mutants = [m for m in mutants if any(part in m["name"] for part in options.only)]
    if options.python or options.kernels:
        mutants = [m for m in mutants if m["file"].startswith("src/") == options.kernels]
    if options.sample and options.sample < len(mutants):
        mutants = [mutants[i * len(mutants) // options.sample] for i in range(options.sample)]
    return mutants


def make_workers(directory, tier, number):
    """Build one copy, and copy it for the others."""
    first = directory / "0"
    quickly = os.environ | {"OPTIMIZE": "-O0 -g0"}
    subprocess.run(
        [ROOT / "scripts" / "build_copy.sh", first, tier], env=quickly, check=True, cwd=ROOT
    )
    for i in range(1, number):
        shutil.copytree(first, directory / str(i))
    return [Worker(directory / str(i), tier) for i in range(number)]


def run_all(mutants, workers):
    """Names of the mutants with what killed each."""
    free = Queue()
    for worker in workers:
        free.put(worker)

    def run_one(mutant):
        worker, start = free.get(), time.monotonic()
        try:
            killer = worker.kills(mutant)
        finally:
            free.put(worker)
        seconds = time.monotonic() - start
        print(f"{mutant['name']:64} {seconds:4.0f} s  {killer or 'SURVIVES'}", flush=True)
        return mutant["name"], killer

    with ThreadPoolExecutor(len(workers)) as pool:
        return list(pool.map(run_one, mutants))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", default="x86-64-v3")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument(
        "--only", action="append", help="mutants with this in their name; may be given again"
    )
    parser.add_argument("--sample", type=int, help="so many of them, evenly over the list")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--python", action="store_true", help="leave the kernels' mutants out")
    which.add_argument("--kernels", action="store_true", help="leave the Python's mutants out")
    mutants = chosen(load(), options := parser.parse_args())

    directory = Path(tempfile.mkdtemp(prefix="mutants-"))
    try:
        results = run_all(mutants, make_workers(directory, options.tier, options.jobs))
    finally:
        shutil.rmtree(directory)
    survivors = [name for name, killer in results if killer is None]
    print(f"{len(results) - len(survivors)} of {len(results)} mutants killed")
    return bool(survivors) or not results


if __name__ == "__main__":
    sys.exit(main())
