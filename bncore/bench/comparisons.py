"""What bncore's features are compared with: calls on the same arrays, and ratios of their times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

import bncore
from bncore.bench import workloads
from bncore.bench.peers import data, looped
from bncore.bench.peers.bncore import Peer
from bncore.bench.workloads import Case

SETTINGS = (
    ((16, 64, 112, 112), "channels_first"),
    ((32, 256, 56, 56), "channels_first"),
    ((16, 64, 112, 112), "channels_last"),
    ((4096, 1024), "channels_first"),
    ((32, 2048, 7, 7), "channels_first"),
)
DIRECTIONS = ("forward", "backward", "inference")

PLAIN, PASS = "plain", "a pass over its bytes"
RELU, RELU_AFTER = "ReLU", "ReLU afterwards"
ADD_RELU, ADD_RELU_AFTER = "add + ReLU", "add, ReLU afterwards"
HALVES = ("float16", "bfloat16")
MASKED, WEIGHTED = "80 % masked in", "weighted"
IN_PLACE, FRESH = "in place", "fresh array"
PARAMETERS = "parameters alone"
FIXED, FIXED_X = "fixed statistics", "fixed statistics, dx alone"
JVP, DOUBLE = "jvp", "double backward"
FIXED_DOUBLE = "fixed statistics, double backward"
IN_PARTS = "a batch in parts: its reduce and apply"
KEEPS_X, KEEPS_Y = "layer with leaky ReLU", "layer that keeps y"

ACTIVATION_COSTS = 1.05
BYTES_COST = 1.1
HALF_COSTS = 1 / 1.7
"""Aims: the ratio at most. The last two are for tensors larger than the caches."""


class Ratio(NamedTuple):
    """A feature's time by that of what it is compared with, ``scale`` times.

    Attributes
    ----------
    feature, against : str
        Names of calls.
    aim : float or None
        What the ratio should be at most.
    scale : float
    """

    feature: str
    against: str
    aim: float | None = None
    scale: float = 1.0


class Comparison(NamedTuple):
    """Calls to be timed by turns.

    Attributes
    ----------
    case : Case
    calls : dict
        By name, ways to do it, each as `bncore.bench.peers.Task.run`; the fastest one counts.
    ratios : list of Ratio
        Those both of whose calls are there.
    """

    case: Case
    calls: dict[str, tuple[Callable[[int], float], ...]]
    ratios: list[Ratio]


@dataclass
class Arrays:
    """The arrays of a case.

    Each channel of x has mean 0 and variance 1, and gamma is 1: so what is computed in place again
    and again stays as it is, and neither overflows nor vanishes.
    """

    x: np.ndarray
    dy: np.ndarray
    residual: np.ndarray
    out: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    axis: int

    def astype(self, dtype) -> Arrays:
        """The same, the parameters as they are."""
        values = (a.astype(dtype) for a in (self.x, self.dy, self.residual, self.out))
        return Arrays(*values, self.gamma, self.beta, self.axis)

    @property
    def given(self) -> dict:
        """Parameters and axis, as arguments by name."""
        return {"gamma": self.gamma, "beta": self.beta, "axis": self.axis}

    @property
    def statistics(self) -> dict:
        """Those of x, as arguments by name."""
        return {"mean": np.zeros_like(self.gamma), "var": np.ones_like(self.gamma)}

    def positions(self) -> tuple[int, ...]:
        """The shape of a mask: x's, with a channel axis of length 1."""
        shape = list(self.x.shape)
        shape[self.axis] = 1
        return tuple(shape)


def cases(
    settings: Sequence[tuple[tuple[int, ...], str]],
    directions: Sequence[str],
    threads: Sequence[int],
) -> list[Case]:
    """One for each setting, direction and number of threads, in float32.

    Examples
    --------
    >>> from bncore.bench import comparisons
    >>> len(comparisons.cases([((8, 4), "channels_first")], comparisons.DIRECTIONS, [1, 2]))
    6
    """
    return [
        case
        for shape, layout in settings
        for case in workloads.cases(
            [workloads.Workload("features", shape, DIRECTIONS)], threads=threads,
            dtypes=["float32"], outputs=["out"], layouts=[layout], directions=directions,
        )
    ]  # fmt: skip


def prepare(case: Case, machine: dict) -> Comparison:
    """The calls of a case, ready to run; its number of threads is set for the whole process.

    Parameters
    ----------
    case : Case
    machine : dict
        With "own_cache" and "last_cache" in bytes, as of `bncore.bench.outcome.Outcome`.
    """
    peer, arrays = Peer(case.threads), arrays_of(case)
    calls = {name: (looped(call),) for name, call in calls_of(case, arrays).items()}
    calls[PASS] = peer.limits(case, arrays, arrays.out)
    ratios = [
        ratio
        for ratio in _ratios(case, machine)
        if calls.get(ratio.feature) and calls.get(ratio.against)
    ]
    return Comparison(case, calls, ratios)


def arrays_of(case: Case) -> Arrays:
    """The arrays of a case.

    Examples
    --------
    >>> from bncore.bench import comparisons
    >>> [case] = comparisons.cases([((8, 4), "channels_first")], ["forward"], [1])
    >>> comparisons.arrays_of(case).x.shape
    (8, 4)
    """
    raw = data(Case(**{**vars(case), "direction": "backward"}))
    x, _ = bncore.batch_norm(raw.x, axis=case.axis, out=raw.x)
    ones = np.ones(case.channels, np.float32)
    residual = np.roll(raw.dy, 1, axis=0)
    return Arrays(x, raw.dy, residual, np.ones_like(x), ones, np.zeros_like(ones), case.axis)


def calls_of(case: Case, arrays: Arrays) -> dict[str, Callable[[], object]]:
    """What there is to be timed, by name. Where not "fresh" or "in place" says otherwise y or dx is
    written to ``arrays.out``.

    Examples
    --------
    >>> from bncore.bench import comparisons
    >>> [case] = comparisons.cases([((8, 4), "channels_first")], ["forward"], [1])
    >>> calls = comparisons.calls_of(case, comparisons.arrays_of(case))
    >>> float(calls["ReLU"]()[0].min())
    0.0
    """
    make = {"forward": _forward, "backward": _backward, "inference": _inference}
    return make[case.direction](arrays)


def _halves(arrays: Arrays) -> dict[str, Arrays]:
    """In the half formats that there are."""
    found = {"float16": arrays.astype(np.float16)}
    try:
        import ml_dtypes
    except ImportError:
        return found
    return {**found, "bfloat16": arrays.astype(ml_dtypes.bfloat16)}


def _forward(arrays: Arrays) -> dict[str, Callable[[], object]]:
    calls = _epilogues(partial(bncore.batch_norm, arrays.x, **arrays.given), arrays)
    random = np.random.default_rng(0)
    mask = random.random(arrays.positions()) < 0.8
    weight = random.uniform(0.5, 1.5, arrays.positions())
    own = arrays.x.copy()
    into = partial(bncore.batch_norm, arrays.x, **arrays.given, out=arrays.out)
    calls[MASKED] = partial(into, mask=mask)
    calls[WEIGHTED] = partial(into, sample_weight=weight)
    calls[IN_PLACE] = partial(bncore.batch_norm, own, **arrays.given, out=own)
    for name, half in _halves(arrays).items():
        calls[name] = partial(bncore.batch_norm, half.x, **half.given, out=half.out)
    return calls


def _inference(arrays: Arrays) -> dict[str, Callable[[], object]]:
    def normalize(arrays):
        given = {**arrays.given, **arrays.statistics}
        return partial(bncore.batch_norm_inference, arrays.x, **given)

    calls = _epilogues(normalize(arrays), arrays)
    own = arrays.x.copy()
    calls[IN_PLACE] = partial(
        bncore.batch_norm_inference, own, **arrays.given, **arrays.statistics, out=own
    )
    for name, half in _halves(arrays).items():
        calls[name] = partial(normalize(half), out=half.out)
    return calls


def _epilogues(normalize: Callable, arrays: Arrays) -> dict[str, Callable[[], object]]:
    """With activation and residual, fused and one after another; and into a fresh array."""
    out, residual = arrays.out, arrays.residual

    def relu_after():
        normalize(out=out)
        np.maximum(out, 0, out=out)

    def add_relu_after():
        normalize(out=out)
        np.add(out, residual, out=out)
        np.maximum(out, 0, out=out)

    return {
        PLAIN: partial(normalize, out=out),
        FRESH: normalize,
        RELU: partial(normalize, activation="relu", out=out),
        RELU_AFTER: relu_after,
        ADD_RELU: partial(normalize, residual=residual, activation="relu", out=out),
        ADD_RELU_AFTER: add_relu_after,
    }


def _backward(arrays: Arrays) -> dict[str, Callable[[], object]]:
    x, dy, out = arrays.x, arrays.dy, arrays.out
    random = np.random.default_rng(0)
    mask = random.random(arrays.positions()) < 0.8
    weight = random.uniform(0.5, 1.5, arrays.positions())
    forward = partial(bncore.batch_norm, x, **arrays.given)
    backward = bncore.batch_norm_backward
    saved, own = forward()[1], dy.copy()
    fixed = partial(
        bncore.batch_norm_inference_backward, dy, x, **arrays.statistics, **arrays.given, out=out
    )
    calls = {
        PLAIN: partial(backward, dy, saved, out=out),
        FRESH: partial(backward, dy, saved),
        IN_PLACE: partial(backward, own, saved, out=own),
        MASKED: partial(backward, dy, forward(mask=mask)[1], out=out),
        WEIGHTED: partial(backward, dy, forward(sample_weight=weight)[1], out=out),
        PARAMETERS: partial(backward, dy, saved, wrt=("gamma", "beta")),
        FIXED: fixed,
        FIXED_X: partial(fixed, wrt="x"),
        JVP: partial(bncore.batch_norm_jvp, dy, saved, out=out),
        DOUBLE: partial(bncore.batch_norm_double_backward, arrays.residual, dy, saved),
        FIXED_DOUBLE: partial(
            bncore.batch_norm_inference_double_backward, arrays.residual, dy, x,
            **arrays.statistics, **arrays.given,
        ),
        IN_PARTS: partial(_in_parts, arrays, saved),
        **_layers(arrays),
        **_gates(arrays, saved),
    }  # fmt: skip
    for name, half in _halves(arrays).items():
        half_saved = bncore.batch_norm(half.x, **half.given)[1]
        calls[name] = partial(backward, half.dy, half_saved, out=half.out)
    return calls


def _in_parts(arrays: Arrays, saved):
    """The backward pass of a part, whose sums are those of the whole here."""
    given = arrays.dy, arrays.x, saved.mean, saved.inv_std
    sums = bncore.backward_reduce(*given, axis=arrays.axis)
    return bncore.backward_apply(
        *given, arrays.gamma, *sums, saved.count, axis=arrays.axis, out=arrays.out
    )


def _layers(arrays: Arrays) -> dict[str, Callable[[], object]]:
    """Backward through the layer that keeps x, and the one that keeps y in its place."""
    calls = {}
    for name, kind in ((KEEPS_X, bncore.BatchNorm), (KEEPS_Y, bncore.InPlaceBatchNorm)):
        layer = kind(arrays.gamma.size, axis=arrays.axis, activation=("leaky_relu", 0.01))
        layer(arrays.x.copy(order="K"))
        calls[name] = partial(layer.backward, arrays.dy, out=arrays.out)
    return calls


def _gates(arrays: Arrays, saved) -> dict[str, Callable[[], object]]:
    """Backward through an activation, fused and one after another.

    With a residual both hand out its gradient in a fresh array.
    """
    dy, out, dz = arrays.dy, arrays.out, np.empty_like(arrays.dy)
    forward = partial(bncore.batch_norm, arrays.x, **arrays.given, activation="relu")
    backward = bncore.batch_norm_backward
    y, with_relu = forward()
    y_added, with_both = forward(residual=arrays.residual)

    def relu_before():
        np.multiply(dy, y > 0, out=dz)
        return backward(dz, saved, out=out)

    def add_relu_before():
        dresidual = np.multiply(dy, y_added > 0)
        return backward(dresidual, saved, out=out)

    return {
        RELU: partial(backward, dy, with_relu, out=out),
        RELU_AFTER: relu_before,
        ADD_RELU: partial(backward, dy, with_both, out=out),
        ADD_RELU_AFTER: add_relu_before,
    }


def _ratios(case: Case, machine: dict) -> Iterator[Ratio]:
    large = case.bytes_moved > machine["last_cache"]
    needed = case.bytes_needed(machine["own_cache"])
    yield Ratio(PLAIN, PASS, scale=needed / case.bytes_moved)
    yield Ratio(RELU, PLAIN, ACTIVATION_COSTS)
    yield Ratio(RELU, RELU_AFTER)
    if case.direction != "backward":  # which writes a fresh array besides
        added = (needed + case.tensor_bytes) / case.bytes_moved  # a residual is read besides
        yield Ratio(ADD_RELU, PASS, BYTES_COST if large else None, added)
    yield Ratio(ADD_RELU, ADD_RELU_AFTER)
    for half in HALVES:
        yield Ratio(half, PLAIN, HALF_COSTS if large else None)
    yield Ratio(MASKED, PLAIN)
    yield Ratio(WEIGHTED, PLAIN)
    yield Ratio(IN_PLACE, FRESH)
    yield Ratio(PLAIN, FRESH)
    yield Ratio(PARAMETERS, PLAIN)
    yield Ratio(FIXED, PLAIN)
    yield Ratio(FIXED_X, FIXED)
    yield Ratio(JVP, PLAIN)
    yield Ratio(DOUBLE, PLAIN)
    yield Ratio(FIXED_DOUBLE, FIXED)
    yield Ratio(IN_PARTS, PLAIN)
    yield Ratio(KEEPS_Y, KEEPS_X)
