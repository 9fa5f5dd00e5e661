"""Statistics and outputs against exact rational arithmetic, over the data that others get wrong.

The figures are those of the promise: float32 statistics within 1 ulp for |mean|/std up to 1e6 and y
within 4 ulp of max(|gamma x'|, |beta|); float64 variances within 1e-14 for |mean|/std up to 1e12
and y within 8 ulp of max(|gamma x'|, |gamma|, |beta|).
"""

from functools import cache
from typing import NamedTuple

import mpmath
import numpy as np
import pytest
from trust_exact import exact_moments, high_precision, ulps

import bncore

pytestmark = pytest.mark.oracle

SIZES = [2, 3, 5, 17, 64, 301]
CHANNELS = 11
EPS = 1e-5

RATIOS = {
    "float32": [0, 1, 10, 1e2, 1e3, 1e4, 1e5, 1e6],
    "float64": [0, 1, 1e2, 1e4, 1e6, 1e8, 1e9, 1e10, 1e11, 1e12],
}


def offset(ratio):
    return lambda rng, shape: rng.standard_normal(shape) + ratio * rng.choice([-1, 1])


def alternating(rng, shape):
    return np.where(np.arange(shape[0])[:, None] % 2, 1.0, 1e8) * rng.standard_normal(shape)


def outlier_first(rng, shape):
    values = rng.standard_normal(shape)
    values[0] = 1e6
    return values


def outlier_last(rng, shape):
    return outlier_first(rng, shape)[::-1]


def scaled(factor):
    return lambda rng, shape: factor * (rng.standard_normal(shape) + rng.choice([0, 30]))


def near_constant(dtype):
    """One value, and its neighbour here and there."""

    def values(rng, shape):
        start = np.full(shape, 1000.1, dtype)
        there = rng.random(shape) < 0.2
        return np.where(there, np.nextafter(start, np.array(np.inf, dtype)), start)

    return values


def families(dtype):
    ranges = {"1e30": 1e30, "1e-30": 1e-30}
    if dtype == "float32":
        ranges["subnormal"] = 1e-41
    return {
        **{f"ratio {ratio:g}": offset(ratio) for ratio in RATIOS[dtype]},
        **{name: scaled(factor) for name, factor in ranges.items()},
        "alternating": alternating,
        "outlier first": outlier_first,
        "outlier last": outlier_last,
        "near constant": near_constant(dtype),
    }


class Case(NamedTuple):
    """Data, and what is exactly true of it."""

    x: np.ndarray
    mean: list
    var: list


@cache
def cases(dtype, family):
    made = []
    for size in SIZES:
        rng = np.random.default_rng([size, len(family)])
        x = families(dtype)[family](rng, (size, CHANNELS)).astype(dtype)
        exact = [exact_moments(column) for column in x.T]
        made.append(Case(x, [mean for mean, _ in exact], [m2 / size for _, m2 in exact]))
    return made


def arrangements(x):
    """As columns, as rows, and as planes."""
    yield x, 1
    yield np.ascontiguousarray(x.T), 0
    yield np.ascontiguousarray(x.T)[None, :, :, None], 1


ALL = [(dtype, family) for dtype in RATIOS for family in families(dtype)]


@pytest.mark.parametrize(("dtype", "family"), ALL)
def test_statistics(backend, dtype, family):
    for case in cases(dtype, family):
        for x, axis in arrangements(case.x):
            _, saved = bncore.batch_norm(x, axis=axis, eps=EPS)
            assert (saved.var >= 0).all()
            for c in range(CHANNELS):
                assert_mean(saved.mean[c], case.mean[c], case.var[c], dtype)
                assert_variance(saved.var[c], case.var[c], dtype)


def assert_mean(mean, exact, var, dtype):
    if dtype == "float32":
        assert ulps(np.float32(mean), exact, np.float32) <= 1
        return
    # A mean that cancels to nearly nothing is held to the deviations' size.
    assert ulps(mean, exact, np.float64, at_least=mpmath.sqrt(high_precision(var))) <= 8


def assert_variance(var, exact, dtype):
    """Within 1e-14, or so close that rounding to float32 leaves it within 1 ulp."""
    limit = 2**-25 if dtype == "float32" else 1e-14
    assert abs(high_precision(var) - high_precision(exact)) <= limit * high_precision(exact)


@pytest.mark.parametrize(("dtype", "family"), ALL)
def test_output(backend, dtype, family):
    rng = np.random.default_rng(7)
    gamma = rng.standard_normal(CHANNELS).astype(dtype)
    beta = rng.standard_normal(CHANNELS).astype(dtype)
    for case in cases(dtype, family):
        y, _ = bncore.batch_norm(case.x, gamma, beta, eps=EPS)
        assert y.dtype == case.x.dtype
        for c in range(CHANNELS):
            for i in sorted({0, len(y) - 1, int(case.x[:, c].argmax()), len(y) // 2}):
                scaled = high_precision(gamma[c]) * normalized(case, i, c)
                exact = scaled + high_precision(beta[c])
                largest = max(abs(scaled), abs(beta[c]))
                if dtype == "float64":
                    assert ulps(y[i, c], exact, dtype, at_least=max(largest, abs(gamma[c]))) <= 8
                else:
                    assert ulps(y[i, c], exact, dtype, at_least=largest) <= 4


def normalized(case, i, c):
    deviation = high_precision(case.x[i, c]) - high_precision(case.mean[c])
    return deviation / mpmath.sqrt(high_precision(case.var[c]) + high_precision(EPS))


@pytest.mark.parametrize("eps", [1e-12, 1e-10, 1e-5, 1.0, 1e3])
@pytest.mark.parametrize("dtype", RATIOS)
def test_inverse_standard_deviation(backend, dtype, eps):
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((33, CHANNELS)) * 10.0 ** np.linspace(-6, 2, CHANNELS)).astype(dtype)
    _, saved = bncore.batch_norm(x, eps=eps)
    for c in range(CHANNELS):
        var = high_precision(exact_moments(x[:, c])[1] / len(x))
        exact = 1 / mpmath.sqrt(var + high_precision(eps))
        assert abs(saved.inv_std[c] - exact) <= 1e-14 * exact


def test_float64_of_small_planes(backend):
    """Many places to a channel, side by side, and a gamma just below a power of two."""
    x = np.random.default_rng(83).standard_normal((128, 64, 49)) + 4.0
    gamma = 1.999
    y, _ = bncore.batch_norm(x, np.full(64, gamma), eps=1e-10)
    for c in (0, 28, 63):
        mean, m2 = exact_moments(x[:, c].ravel())
        scale = gamma / mpmath.sqrt(high_precision(m2 / x[:, c].size) + high_precision(1e-10))
        for n, s in [(50, 16), np.unravel_index(x[:, c].argmax(), (128, 49)), (127, 48)]:
            exact = scale * (high_precision(x[n, c, s]) - high_precision(mean))
            assert ulps(y[n, c, s], exact, np.float64, at_least=gamma) <= 8
