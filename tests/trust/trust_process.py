"""Code run in interpreters of its own, where it can hang or die without harm."""

import os
import subprocess
import sys
from pathlib import Path

import bncore

HERE = Path(bncore.__file__).parent.parent
"""Where a fresh interpreter imports the bncore under test."""

WORK = """
import os, signal, sys, threading
import numpy as np
import bncore

x = np.random.default_rng(0).standard_normal((64, 32, 28, 28), np.float32)


def work():
    y, saved = bncore.batch_norm(x)
    return y.tobytes() + bncore.batch_norm_backward(x, saved).dx.tobytes()


def os_threads():
    return len(os.listdir("/proc/self/task"))

"""
"""Something worth several threads, and what it gives."""


def run(code, backend=None, *, before="", timeout=120, preexec=None, **variables):
    """Run code after WORK in a fresh interpreter; what it printed."""
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("BNCORE_", "OMP_", "PYTHON"))
    }
    if backend is not None:
        environment["BNCORE_BACKEND"] = backend
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", before + WORK + code],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=HERE,
        env=environment | variables,
        preexec_fn=preexec,
    )
    assert done.returncode == 0, f"returned {done.returncode}: {done.stderr}"
    return done.stdout
