"""What is measured: shapes from ``workloads.json``, and the cases made of them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

DIRECTIONS = ("forward", "backward", "inference", "layer")
"""Training forward, its backward, inference; and the layer's training forward, which also keeps
running statistics: measured where a call is so short that this shows."""

LAYOUTS = ("channels_first", "channels_last")
DTYPES = ("float32", "float64")
OUTPUTS = ("out", "fresh")
"""Written to an array that is there, or to one that each call allocates."""


@dataclass(frozen=True)
class Workload:
    """One entry of ``workloads.json``.

    Attributes
    ----------
    suite : str
    shape : tuple of int
        (N, C, ...) whatever the layout.
    directions : tuple of str
    quick : bool
        Whether it is among the few of a quick run.
    """

    suite: str
    shape: tuple[int, ...]
    directions: tuple[str, ...] = ("forward", "backward", "inference")
    quick: bool = False


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Examples
    --------
    >>> from bncore.bench.workloads import Case
    >>> case = Case("small", (2, 16, 8, 8), "channels_last", "backward", "float32", "out", 1)
    >>> case.array_shape, case.axis, case.bytes_moved
    ((2, 8, 8, 16), -1, 24576)
    """

    suite: str
    shape: tuple[int, ...]
    layout: str
    direction: str
    dtype: str
    output: str
    threads: int

    def __post_init__(self):  # from JSON it comes as a list
        object.__setattr__(self, "shape", tuple(self.shape))

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def array_shape(self) -> tuple[int, ...]:
        """Shape of the array in memory."""
        if self.layout == "channels_first":
            return self.shape
        return (self.shape[0], *self.shape[2:], self.shape[1])

    @property
    def axis(self) -> int:
        """The channel axis of that array."""
        return 1 if self.layout == "channels_first" else -1

    @property
    def channels_apart(self) -> bool:
        """Whether each channel's values lie together; in (N, C) they never do."""
        return self.layout == "channels_first" and len(self.shape) > 2

    @property
    def tensor_bytes(self) -> int:
        return math.prod(self.shape) * {"float32": 4, "float64": 8}[self.dtype]

    @property
    def bytes_moved(self) -> int:
        """What has to be read and written at least: x and y, in backward dy, x and dx."""
        return self.tensor_bytes * (3 if self.direction == "backward" else 2)

    def bytes_needed(self, cache: int) -> int:
        """The same, where inputs that do not stay in a cache between the two passes count twice.

        Parameters
        ----------
        cache : int
            Bytes of a core's own cache.
        """
        if self.direction == "inference":
            return self.bytes_moved
        if self.channels_apart:
            kept = self.tensor_bytes // self.channels
        else:  # a line of memory holds many channels: they all pass before the first is known
            kept = self.tensor_bytes // self.threads
        inputs = 2 if self.direction == "backward" else 1
        again = inputs * self.tensor_bytes if inputs * kept > cache else 0
        return self.bytes_moved + again


def load() -> list[Workload]:
    """All workloads, in the order of the file.

    Examples
    --------
    >>> from bncore.bench import workloads
    >>> {"resnet50", "densenet121", "mlp"} <= {w.suite for w in workloads.load()}
    True
    """
    text = resources.files("bncore.bench").joinpath("workloads.json").read_text()
    return [
        Workload(**{name: _tuples(value) for name, value in entry.items()})
        for entry in json.loads(text)
    ]


def cases(
    workloads: Sequence[Workload],
    *,
    threads: Sequence[int],
    dtypes: Sequence[str] = DTYPES,
    outputs: Sequence[str] = OUTPUTS,
    layouts: Sequence[str] = LAYOUTS,
    directions: Sequence[str] = DIRECTIONS,
) -> Iterator[Case]:
    """The cases of the workloads, those of a thread count together; (N, C) has one layout.

    Examples
    --------
    >>> from bncore.bench.workloads import Workload, cases
    >>> len(list(cases([Workload("mlp", (64, 100))], threads=[1], dtypes=["float32"])))
    6
    """
    for count, dtype, output in itertools.product(threads, dtypes, outputs):
        for workload in workloads:
            for layout, direction in itertools.product(layouts, directions):
                if layout == "channels_last" and len(workload.shape) == 2:
                    continue
                if direction in workload.directions:
                    yield Case(
                        workload.suite, workload.shape, layout, direction, dtype, output, count
                    )


def _tuples(value):
    return tuple(value) if isinstance(value, list) else value
