"""Each way through a tensor, from any place in a cache line; most of all those past the caches.

Results are compared with the NumPy reference's, and with one another, to the bit, from whatever
place arrays begin and whatever they are written over.
"""

import numpy as np
import pytest

import bncore
from bncore import _backend

from .arrays import bits, normal

MEGABYTE = 1 << 20
STREAMED = 4 * MEGABYTE

# Rows that are kept, in groups of one channel and of several; rows too many to keep; columns of one
# group and of several; columns and small planes done group by group; small planes that are not;
# columns beyond any cache.
SHAPES = [
    ((9, 40, 55, 55), 1), ((30, 61, 25, 25), 1), ((60, 4, 97, 97), 1), ((300, 70, 61), -1),
    ((700, 1700), -1), ((17, 65701), -1), ((33, 701, 7, 7), 1), ((601, 37, 7, 7), 1),
    ((5800, 1100), -1),
]  # fmt: skip
# The same of a tensor that stays in the cache, for columns: tiles of which the last is short, or
# shorter than a cache line; lines that are whole lines of the cache, and lines that are not.
CACHED = [((97, 3), -1), ((345, 17), -1), ((130, 128), -1), ((77, 520), -1), ((40, 700), -1)]
PLACES = [0, 1, 7]
"""Elements before a result, from a line's beginning on."""

EXTRAS = [
    {}, {"activation": "relu"}, {"activation": "relu", "gamma": abs}, {"mask": True},
    {"activation": ("leaky_relu", 0.3)}, {"residual": True},
    {"activation": "relu", "residual": True}, {"activation": ("clip", 0, 1), "residual": True},
]  # fmt: skip


def placed(values, place):
    """A copy of the values that begins so many elements after a cache line does."""
    memory = np.empty(values.size + place + 64, values.dtype)
    start = -memory.ctypes.data % 64 // values.itemsize + place
    copy = memory[start : start + values.size].reshape(values.shape)
    copy[...] = values
    return copy


def step(x, dy, gamma, beta, axis, extras, place):
    """y, the statistics and all gradients."""
    extras = dict(extras)
    gamma = extras.pop("gamma", np.copy)(gamma)
    if extras.get("residual"):
        extras["residual"] = normal(3, x.shape, x.dtype)
    if extras.get("mask"):
        positions = [1 if i == axis % x.ndim else n for i, n in enumerate(x.shape)]
        extras["mask"] = normal(6, positions) > -1
    out, dx = placed(np.zeros_like(x), place), placed(np.zeros_like(x), place)
    y, saved = bncore.batch_norm(x, gamma, beta, axis=axis, out=out, **extras)
    g = bncore.batch_norm_backward(dy, saved, out=dx)
    return y, saved.mean, saved.var, *g


@pytest.mark.parametrize("extras", EXTRAS, ids=str)
@pytest.mark.parametrize(("shape", "axis"), CACHED + SHAPES)
def test_as_the_reference(backend, shape, axis, extras):
    if backend.name == "numpy":
        pytest.skip("it is the reference")
    x, dy = normal(1, shape, np.float32) + 3, normal(2, shape, np.float32)
    assert (x.nbytes > STREAMED) == ((shape, axis) in SHAPES)
    gamma, beta = normal(4, shape[axis]), normal(5, shape[axis])
    got = step(placed(x, 4), placed(dy, 4), gamma, beta, axis, extras, 4)
    with _backend.use("numpy"):
        expected = step(x, dy, gamma, beta, axis, extras, 0)
    for mine, its in zip(got, expected, strict=True):
        if its is not None:
            np.testing.assert_allclose(mine, its, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), CACHED + SHAPES)
def test_places_and_overwriting_change_no_bit(backend, shape, axis, dtype):
    if backend.name == "numpy":
        pytest.skip("NumPy has one way")
    x, dy = normal(1, shape, dtype), normal(2, shape, dtype)
    gamma, beta = normal(4, shape[axis]), normal(5, shape[axis])
    expected = bits(*step(x, dy, gamma, beta, axis, {"activation": "relu"}, 0))
    for place in PLACES:
        at = placed(x, place), placed(dy, place)
        assert bits(*step(*at, gamma, beta, axis, {"activation": "relu"}, place)) == expected
    over = placed(x, 5)
    y, saved = bncore.batch_norm(over, gamma, beta, axis=axis, activation="relu", out=over)
    assert bits(y) == expected[:1]
    y, saved = bncore.batch_norm(x, gamma, beta, axis=axis, activation="relu")
    over = placed(dy, 3)
    assert bits(bncore.batch_norm_backward(over, saved, out=over).dx) == expected[3:4]
    fixed = bncore.batch_norm_inference(x, saved.mean, saved.var, gamma, beta, axis=axis)
    over = placed(x, 6)
    given = saved.mean, saved.var, gamma, beta
    assert bits(bncore.batch_norm_inference(over, *given, axis=axis, out=over)) == bits(fixed)
