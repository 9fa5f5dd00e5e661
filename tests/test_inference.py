"""Normalization by given statistics, its hard cases."""

import numpy as np
import pytest

import bncore

from . import oracle
from .arrays import bits, in_layout, normal
from .oracle import assert_within, rounding

SHAPES = [(50, 7), (3, 5, 33), (20, 9, 7, 7), (2, 3, 40, 40)]
MEMORY = ("C", "channels_last")


@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_large_running_mean_costs_no_accuracy(backend, dtype, shape, layout):
    """(x - mean) is taken first: a x + b would cancel."""
    x = (normal(1, shape) * 0.1 + 1e6).astype(dtype)
    mean, var = np.full(shape[1], 1e6 + 0.01), np.full(shape[1], 0.013)
    gamma, beta = normal(2, shape[1], dtype), normal(3, shape[1], dtype)
    exact = oracle.forward(x, gamma, beta, mean=mean, var=var)
    y = bncore.batch_norm_inference(in_layout(x, layout), mean, var, gamma, beta)
    assert_within(y, exact.y, rounding(exact.scale, dtype), "y")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mean", [0.1, 1000.1, 1e7 + 3])
def test_the_mean_itself_gives_beta_exactly(backend, mean, dtype):
    x, beta = np.full((4, 3, 5), mean, dtype), normal(1, 3, dtype)
    var = np.full(3, 1e-20)
    y = bncore.batch_norm_inference(x, x[0, :, 0], var, beta, beta, eps=1e-30)
    assert (np.moveaxis(y, 1, -1) == beta).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_batchs_own_statistics_give_the_training_result(backend, shape, layout, dtype):
    x = in_layout(normal(4, shape, dtype), layout)
    gamma, beta = normal(5, shape[1], dtype), normal(6, shape[1], dtype)
    y, saved = bncore.batch_norm(x, gamma, beta)
    fixed = bncore.batch_norm_inference(x, saved.mean, saved.var, gamma, beta)
    np.testing.assert_allclose(fixed, y, rtol=0, atol=8 * np.finfo(dtype).eps)


@pytest.mark.parametrize("statistics_dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_statistics_of_any_dtype(backend, dtype, statistics_dtype):
    x, dy = normal(1, (9, 4), dtype), normal(2, (9, 4), dtype)
    mean = normal(3, 4, statistics_dtype)
    var = mean**2
    exact = oracle.forward(x, mean=mean, var=var)
    y = bncore.batch_norm_inference(x, mean, var)
    assert_within(y, exact.y, rounding(exact.scale, dtype), "y")
    gradient = oracle.backward(dy, x, mean=mean, var=var)
    g = bncore.batch_norm_inference_backward(dy, x, mean, var)
    assert_within(g.dx, gradient.dx, rounding(gradient.dx_scale, dtype), "dx")


def test_one_value_needs_no_statistics_of_its_own(backend):
    y = bncore.batch_norm_inference(np.array([[3.0]]), np.ones(1), np.full(1, 3.0), eps=1.0)
    assert y == 1.0


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("layout", MEMORY)
def test_a_bad_statistic_stays_in_its_channel(backend, poison, layout):
    x = in_layout(normal(1, (30, 6, 5), np.float32), layout)
    mean, var = normal(2, 6), normal(3, 6) ** 2
    clean = bncore.batch_norm_inference(x, mean, var)
    mean[2] = poison
    y = bncore.batch_norm_inference(x, mean, var)
    others = [0, 1, 3, 4, 5]
    assert bits(y[:, others]) == bits(clean[:, others])
    assert not np.isfinite(y[:, 2]).any()
