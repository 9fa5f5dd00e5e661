"""The scripts that look for errors fit the kernels as they are: a checker that cannot start, or
whose planted error never reaches a kernel, shows nothing."""

import inspect
import runpy
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
if not SCRIPTS.exists():
    pytest.skip("the scripts are not in a source distribution", allow_module_level=True)


def test_the_planted_error_is_a_call_of_the_kernel(backend):
    planted = runpy.run_path(str(SCRIPTS / "planted_error.py"))
    inspect.signature(backend.normalization.forward).bind(**planted["ARGUMENTS"])


def test_the_workload_of_the_race_checker_runs(backend):
    workload = runpy.run_path(str(SCRIPTS / "race_workload.py"))
    before = workload["functional"].get_num_threads
    try:
        for dtype in ("float16", "float32", "float64"):
            workload["run"]((3, 5, 7), dtype, threads=2)
    finally:
        workload["functional"].get_num_threads = before
