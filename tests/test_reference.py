"""The NumPy reference on its own: it needs NumPy alone, and keeps the formulas in hard cases."""

import ast
from pathlib import Path

import numpy as np
import pytest

from bncore import _backend, reference
from bncore._weights import Weights

from . import oracle
from .arrays import normal
from .oracle import assert_within, rounding, ulp

COMPILED = [name for name in _backend.available() if name != "numpy"]


def test_it_imports_numpy_alone():
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in ([ast.alias(node.module)] if isinstance(node, ast.ImportFrom) else node.names)
    }
    assert imported == {"__future__", "numpy"}


@pytest.mark.parametrize("tier", COMPILED)
def test_every_tier_has_its_kernels(tier):
    backend = _backend.load(tier)
    kernels = {
        backend.statistics: ("moments", "move_running_plain"),
        backend.normalization: (
            "forward",
            "normalize",
            "forward_plain",
            "normalize_plain",
            "evaluate_plain",
        ),
        backend.gradient: (
            "reduce",
            "apply",
            "activation_backward",
            "backward",
            "backward_plain",
            "fixed_backward",
            "fixed_backward_plain",
        ),
    }
    for module, names in kernels.items():
        for name in names:
            assert callable(getattr(module, name)) and callable(getattr(reference, name))


@pytest.mark.parametrize("shape", [(5, 3, 4), (40, 7, 1), (1, 2, 300)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ratio", [0, 1e6, 1e12])
def test_forward_and_backward(shape, weighted, ratio):
    n, c, s = shape
    x, dy, gamma, beta = normal(1, shape) + ratio, normal(2, shape), normal(3, c), normal(4, c)
    weight = np.random.default_rng(5).random((n, s)) if weighted else None
    wide = None if weight is None else weight[:, None]
    weights = None if weight is None else Weights(weight, False, False, weight.sum(), 0, 1.0)
    exact = oracle.forward(x, gamma, beta, weight=wide)
    gradient = oracle.backward(dy, x, gamma, beta, weight=wide)
    y, dx, stats, sums = np.empty(shape), np.empty(shape), np.empty((4, c)), np.empty((2, c))
    plain, count = reference.NO_ACTIVATION, n * s if weights is None else weights.total
    reference.forward(x, weights, gamma, beta, None, plain, 1e-5, y, None, stats)
    reference.backward(dy, x, weights, stats, gamma, beta, None, plain, count, dx, None, sums)
    assert_within(y, exact.y, rounding(exact.scale, np.float64), "y")
    assert_within(stats[2], exact.var, 1e-14 * exact.var, "var")
    assert_within(dx, gradient.dx, rounding(gradient.dx_scale, np.float64), "dx")
    assert_within(sums[0], gradient.dbeta, 1e-14 * gradient.dbeta_scale, "dbeta")
    assert_within(sums[1], gradient.dgamma, 1e-13 * gradient.dgamma_scale, "dgamma")


@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1e150, 1e200, 1e300])
def test_squares_beyond_the_range_of_float64(scale):
    x, stats, y = normal(1, (9, 3, 4)) * scale, np.empty((4, 3)), np.empty((9, 3, 4))
    reference.forward(x, None, None, None, None, reference.NO_ACTIVATION, 5e-324, y, None, stats)
    exact = oracle.forward(x, eps=5e-324)
    assert_within(stats[0], exact.mean, ulp(abs(x).max(), np.float64), "mean")
    assert_within(y, exact.y, 1e-13, "y")


def test_a_gradient_where_no_value_counts():
    x, dy, dx, ones = normal(1, (2, 3, 4)), normal(2, (2, 3, 4)), np.empty((2, 3, 4)), np.ones(3)
    reference.apply(dy, x, ones, None, 2 * ones, 3 * ones, 1.0, np.zeros((2, 3)), 0.0, dx)
    np.testing.assert_array_equal(dx, 6 * dy)


def test_move_running():
    mean, var = np.array([1.0, 2.0]), np.array([3.0, 4.0])
    stats = np.array([[5.0, 6.0], [0.0, 0.0], [7.0, 8.0], [9.0, 9.0]])
    reference.move_running(mean, var, stats, 0.25, 2.0, np.empty((2, 2, 2)))
    np.testing.assert_array_equal(mean, [2.0, 3.0])
    np.testing.assert_array_equal(var, [5.75, 7.0])


@pytest.mark.parametrize(
    ("activation", "expected"),
    [((0, 0.0, 0.0), [1, 1, 1]), ((1, 0.0, np.inf), [0, 0, 1]), ((1, -2.0, 1.0), [1, 1, 0]),
     ((2, 0.5, 0.0), [0.5, 0.5, 1])],
)  # fmt: skip
def test_activation_backward(activation, expected):
    z, dz = np.array([[[-1.0, 0.0, 3.0]]]), np.empty((1, 1, 3))
    reference.activation_backward(
        np.ones((1, 1, 3)), z, None, np.zeros(1), None, np.ones(1), None, None, None, None,
        activation, dz,
    )  # fmt: skip
    np.testing.assert_array_equal(dz.ravel(), expected)
