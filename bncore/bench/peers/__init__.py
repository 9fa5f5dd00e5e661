"""The libraries measured: one module each, with a class ``Peer(threads)``.

A peer has a ``version`` and ``prepare(case)``, which gives a `Task` or raises `Unsupported`. Its
module imports the library in ``__init__`` or ``prepare``, in the peer's own process.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bncore.bench.workloads import Case

EPS = 1e-5

NAMES = (
    "bncore", "torch", "onednn", "onednn_blocked", "jax", "onnxruntime", "numpy", "reference",
)  # fmt: skip
"""In the order of the report; bncore first, to which the others are compared."""


class Missing(Exception):
    """The library is not there."""


class Unsupported(Exception):
    """The library does not do this case."""


@dataclass
class Task:
    """A case ready to run.

    Attributes
    ----------
    run : callable
        Makes so many calls and gives the seconds they took.
    result : callable
        Makes a call and gives y or dx as a NumPy array of shape (N, C, ...).
    limits : tuple of callable
        As ``run``: ways to pass over the same memory without computing.
    """

    run: Callable[[int], float]
    result: Callable[[], np.ndarray]
    limits: tuple[Callable[[int], float], ...] = ()


@dataclass
class Data:
    """The arrays of a case, in its layout and dtype; dy where the direction needs it."""

    x: np.ndarray
    dy: np.ndarray | None
    gamma: np.ndarray
    beta: np.ndarray
    mean: np.ndarray
    var: np.ndarray


def data(case: Case) -> Data:
    """The same arrays for every peer.

    Examples
    --------
    >>> from bncore.bench.peers import data
    >>> from bncore.bench.workloads import Case
    >>> data(Case("mlp", (2, 8), "channels_first", "forward", "float32", "out", 1)).x.shape
    (2, 8)
    """
    random = np.random.default_rng(0)

    def array():
        # A block repeated is as good as noise to a clock, and made much faster; the length keeps
        # channels from being alike.
        size = min(math.prod(case.shape), 1_000_003)
        block = random.standard_normal(size, np.float32).astype(case.dtype)
        return np.resize(block, case.array_shape)

    def parameter(low, high):
        return random.uniform(low, high, case.channels).astype(case.dtype)

    return Data(
        x=array(),
        dy=array() if case.direction == "backward" else None,
        gamma=parameter(0.5, 1.5),
        beta=parameter(-1, 1),
        mean=parameter(-0.1, 0.1),
        var=parameter(0.5, 1.5),
    )


def channels_second(array: np.ndarray, case: Case) -> np.ndarray:
    """A view of shape (N, C, ...) of an array in the case's layout."""
    return np.moveaxis(array, case.axis, 1)


def looped(call: Callable[[], object]) -> Callable[[int], float]:
    """Time so many calls.

    Examples
    --------
    >>> from bncore.bench.peers import looped
    >>> looped(dict)(10) > 0
    True
    """

    def run(calls: int) -> float:
        times = itertools.repeat(None, calls)
        start = time.perf_counter()
        for _ in times:
            call()
        return time.perf_counter() - start

    return run
