"""Other programs at work while the libraries are measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep so many processes busy, each on whatever CPU it gets, until the block ends.

    Examples
    --------
    >>> from bncore.bench.disturbance import busy
    >>> with busy(0):
    ...     pass
    """
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()
