"""oneDNN: its batch-normalization primitive, executed from C++ in the layout of the case."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path

import numpy as np

from bncore.bench.peers import EPS, Missing, Task, Unsupported, channels_second, data
from bncore.bench.workloads import Case

PACKAGE, HEADERS = "onednn-cpu-gomp", "onednn-devel-cpu-gomp"


class Peer:
    blocked = False

    def __init__(self, threads: int):
        # oneDNN takes its threads from OMP_NUM_THREADS.
        self.driver = _driver()
        self.version = self.driver.onednn_version().decode()

    def prepare(self, case: Case) -> Task:
        if case.dtype != "float32":
            raise Unsupported("has no float64")
        arrays = data(case)
        state = _State(self.driver, case, self.format(case), arrays)
        return Task(run=state.run, result=state.result)

    def format(self, case: Case) -> str:
        return case.layout


class _State:
    """A primitive with its memory."""

    def __init__(self, driver, case: Case, layout: str, arrays):
        self.driver, self.shape = driver, case.shape
        tensors = [
            None if array is None else np.ascontiguousarray(channels_second(array, case))
            for array in (arrays.x, arrays.dy)
        ]
        given = (*tensors, arrays.gamma, arrays.beta, arrays.mean, arrays.var)
        self.handle = driver.onednn_prepare(
            len(case.shape), (ctypes.c_long * len(case.shape))(*case.shape),
            layout.encode(), case.direction.encode(), case.output == "fresh", EPS,
            *(None if array is None else array.ctypes.data for array in given),
        )  # fmt: skip
        if not self.handle:
            raise Unsupported(driver.onednn_error().decode())

    def run(self, calls: int) -> float:
        return self.driver.onednn_run(self.handle, calls)

    def result(self) -> np.ndarray:
        self.run(1)
        result = np.empty(self.shape, np.float32)
        self.driver.onednn_result(self.handle, result.ctypes.data)
        return result

    def __del__(self):
        if getattr(self, "handle", None):
            self.driver.onednn_release(self.handle)


def _driver() -> ctypes.CDLL:
    """The driver, compiled at its first use and kept in the user's cache."""
    source = resources.files("bncore.bench").joinpath("onednn_driver.cpp").read_text()
    try:
        header = _file(HEADERS, "dnnl.hpp")
        library = _file(PACKAGE, "libdnnl.so.3")
    except importlib.metadata.PackageNotFoundError as error:
        raise Missing(f"needs `pip install {PACKAGE} {HEADERS}`") from error
    command = [
        os.environ.get("CXX", "g++"), "-std=c++17", "-O2", "-shared", "-fPIC", "-x", "c++", "-",
        f"-I{header.parent}", "-x", "none", str(library), f"-Wl,-rpath,{library.parent}",
    ]  # fmt: skip
    key = hashlib.sha256("\0".join([source, *command]).encode()).hexdigest()[:16]
    compiled = _cache() / f"onednn_driver-{key}.so"
    if not compiled.exists():
        compiled.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=compiled.parent) as directory:
            built = Path(directory, compiled.name)
            try:
                subprocess.run(
                    [*command, "-o", str(built)], input=source, text=True, check=True,
                    capture_output=True,
                )  # fmt: skip
            except FileNotFoundError as error:
                raise Missing("needs a C++ compiler for its driver") from error
            except subprocess.CalledProcessError as error:
                raise Missing(f"its driver does not compile: {error.stderr}") from error
            built.replace(compiled)
    driver = ctypes.CDLL(str(compiled))
    driver.onednn_version.restype = driver.onednn_error.restype = ctypes.c_char_p
    driver.onednn_prepare.restype = ctypes.c_void_p
    driver.onednn_prepare.argtypes = [
        ctypes.c_int, ctypes.POINTER(ctypes.c_long), ctypes.c_char_p, ctypes.c_char_p,
        ctypes.c_bool, ctypes.c_float, *[ctypes.c_void_p] * 6,
    ]  # fmt: skip
    driver.onednn_run.restype = ctypes.c_double
    driver.onednn_run.argtypes = [ctypes.c_void_p, ctypes.c_long]
    driver.onednn_result.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    driver.onednn_result.restype = None
    driver.onednn_release.argtypes = [ctypes.c_void_p]
    driver.onednn_release.restype = None
    return driver


def _file(distribution: str, name: str) -> Path:
    """A file that a distribution has installed."""
    for path in importlib.metadata.files(distribution) or ():
        if path.name == name:
            return Path(path.locate()).resolve()
    raise Missing(f"{distribution} has no {name}")


def _cache() -> Path:
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "bncore"
