"""Data whose sums are exact in any order: statistics equal to the bit.

Values come in pairs that lie as far below the mean as above it. The mean is a power of two and
the deviations have few bits, so that every sum of values or squares is exact in float64.
"""

from functools import cache

import numpy as np
import pytest
from trust_layouts import CONTIGUOUS, LAYOUTS, by_channel

import bncore

pytestmark = pytest.mark.exact

CHANNELS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65]
SIZES = [(1, 1, 2), (2, 3, 3), (16, 5, 5), (40, 1, 1), (2, 33, 37)]
"""N, H and W."""


@cache
def paired_values(channels, size, dtype):
    """(C, N, H, W) values; their means and sums of squared deviations, both exact."""
    rng = np.random.default_rng([channels, *size])
    half = np.prod(size) // 2
    means = np.ldexp(rng.choice([-1.0, 1.0], channels), rng.integers(-3, 4, channels))
    steps = rng.integers(0, 4, (channels, half))
    deviations = np.concatenate([steps, -steps], axis=1)
    values = means[:, None] * (1 + rng.permuted(deviations, axis=1) / 8)
    m2 = means**2 * (deviations**2).sum(axis=1) / 64  # exact: an integer times powers of two
    return values.astype(dtype).reshape(channels, *size), means, m2


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_statistics(backend, dtype, layout, channels):
    for size in SIZES:
        values, means, m2 = paired_values(channels, size, dtype)
        count = int(np.prod(size))
        x, axis = LAYOUTS[layout](values)
        _, saved = bncore.batch_norm(x, axis=axis)
        np.testing.assert_array_equal(saved.mean, means, err_msg=str(size))
        np.testing.assert_array_equal(saved.var, m2 / count, err_msg=str(size))
        moments = bncore.moments(x, axis=axis)
        np.testing.assert_array_equal(moments.mean, means, err_msg=str(size))
        np.testing.assert_array_equal(moments.m2, m2, err_msg=str(size))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("layout", CONTIGUOUS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradient_sums(backend, dtype, layout, channels):
    for size in SIZES:
        values, means, _ = paired_values(channels, size, dtype)
        rng = np.random.default_rng(channels)
        gradients = rng.integers(-8, 9, values.shape).astype(dtype)
        x, axis = LAYOUTS[layout](values)
        dy, _ = LAYOUTS[layout](gradients)
        # With a standard deviation of 1/2 the products stay exact too.
        sums = bncore.backward_reduce(dy, x, means, np.full(channels, 2.0), axis=axis)
        deviations = by_channel(x, axis).astype(np.float64) - means[:, None]
        by_hand = by_channel(dy, axis).astype(np.float64)
        np.testing.assert_array_equal(sums.sum_dy, by_hand.sum(axis=1), err_msg=str(size))
        np.testing.assert_array_equal(sums.sum_dy_xhat, (by_hand * deviations * 2).sum(axis=1))
