"""How exact mean, variance and output are, where the data makes it hard; and that bits repeat."""

import numpy as np
import pytest

import bncore
from bncore import _backend

from . import oracle
from .arrays import bits, in_layout, normal
from .oracle import assert_within, rounding, ulp

SHAPES = [(1000, 3), (4, 5, 70), (40, 6, 7, 7), (2, 3, 64, 64)]
MEMORY = ("C", "channels_last")
RATIOS = {np.float32: (0, 1, 1e3, 1e6), np.float64: (0, 1e6, 1e9, 1e12)}
HARD = [(dtype, ratio) for dtype, ratios in RATIOS.items() for ratio in ratios]


def shifted(shape, ratio, dtype, layout="C"):
    """Values whose mean is ``ratio`` standard deviations from zero."""
    return in_layout((normal(5, shape) + ratio).astype(dtype), layout)


@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "ratio"), HARD)
class TestFarFromZero:
    """|mean| / std up to 1e6 in float32, 1e12 in float64."""

    def test_statistics(self, backend, dtype, ratio, shape, layout):
        x = shifted(shape, ratio, dtype, layout)
        exact = oracle.forward(x)
        _, saved = bncore.batch_norm(x)
        if dtype == np.float32:
            assert_within(saved.mean, exact.mean, ulp(exact.mean, dtype), "mean")
            assert_within(saved.var, exact.var, ulp(exact.var, dtype), "var")
        else:
            size = np.maximum(abs(exact.mean), np.sqrt(exact.var))
            assert_within(saved.mean, exact.mean, 4 * ulp(size, dtype), "mean")
            assert_within(saved.var, exact.var, 1e-14 * exact.var, "var")
        exact_inv_std = 1 / np.sqrt(exact.var + oracle.WIDE(1e-5))
        relative = 2.0**-24 if dtype == np.float32 else 2e-14
        assert_within(saved.inv_std, exact_inv_std, relative * exact_inv_std, "inv_std")

    def test_output(self, backend, dtype, ratio, shape, layout):
        x = shifted(shape, ratio, dtype, layout)
        gamma, beta = normal(6, shape[1], dtype), normal(7, shape[1], dtype)
        exact = oracle.forward(x, gamma, beta)
        y, _ = bncore.batch_norm(x, gamma, beta)
        assert_within(y, exact.y, rounding(exact.scale, dtype), "y")

    def test_gradient(self, backend, dtype, ratio, shape, layout):
        x, dy = shifted(shape, ratio, dtype, layout), in_layout(normal(8, shape, dtype), layout)
        gamma = normal(6, shape[1], dtype)
        exact = oracle.backward(dy, x, gamma)
        _, saved = bncore.batch_norm(x, gamma)
        g = bncore.batch_norm_backward(dy, saved)
        assert_within(g.dx, exact.dx, rounding(exact.dx_scale, dtype), "dx")


@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, 1000.1, 1e7 + 3, -1e30, 1e-42])
@pytest.mark.parametrize("shape", [(9, 3), (5, 3, 33), (40, 3, 7, 7)], ids=str)
def test_a_constant_channel_gives_beta_exactly(backend, shape, value, dtype, layout):
    x = in_layout(np.full(shape, value, dtype), layout)
    gamma, beta = normal(1, shape[1], dtype), normal(2, shape[1], dtype)
    y, saved = bncore.batch_norm(x, gamma, beta, eps=1e-12)
    assert (np.moveaxis(y, 1, -1) == beta).all()
    assert (saved.var == 0).all() and (saved.mean == x.flat[0]).all()


@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_value_per_channel_gives_beta_exactly(backend, dtype, layout):
    x, gamma, beta = (normal(seed, 5, dtype) * 100 for seed in range(3))
    x = in_layout(x.reshape(1, 5, 1), layout)
    y, saved = bncore.batch_norm(x, gamma, beta)
    np.testing.assert_array_equal(y.ravel(), beta)
    np.testing.assert_array_equal(saved.mean, x.ravel())
    g = bncore.batch_norm_backward(x, saved)
    assert (g.dx == 0).all() and (g.dgamma == 0).all()
    np.testing.assert_array_equal(g.dbeta, x.ravel())


@pytest.mark.parametrize(
    "shape", [(0, 3), (0, 3, 4), (2, 3, 0), (2, 0, 3), (0,), (0, 0, 0)], ids=str
)
def test_nothing_to_normalize(backend, shape):
    axis = min(1, len(shape) - 1)
    x = np.empty(shape, np.float32)
    parameter = np.ones(shape[axis], np.float32)
    y, saved = bncore.batch_norm(x, parameter, parameter, axis=axis)
    g = bncore.batch_norm_backward(x, saved)
    fixed = parameter, parameter, parameter, parameter
    assert y.shape == g.dx.shape == shape
    assert bncore.batch_norm_inference(x, *fixed, axis=axis).shape == shape
    frozen = bncore.batch_norm_inference_backward(x, x, *fixed, axis=axis)
    for gradients in (g, frozen):
        assert (gradients.dgamma == 0).all() and gradients.dgamma.shape == parameter.shape
        assert (gradients.dbeta == 0).all() and gradients.dbeta.shape == parameter.shape
    moments = bncore.moments(x, axis=axis)
    assert (moments.count == x.size // max(parameter.size, 1)).all()
    for statistic in (saved.mean, saved.var, saved.inv_std, saved.count):
        assert np.isfinite(statistic).all() and statistic.shape == parameter.shape


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("power", [-20, 10, 25])
def test_scaling_by_a_power_of_two_changes_no_bit(backend, power, dtype, shape):
    x, factor = normal(9, shape, dtype), dtype(2.0**power)
    y, saved = bncore.batch_norm(x, eps=1e-3)
    scaled, scaled_saved = bncore.batch_norm(x * factor, eps=1e-3 * 4.0**power)
    assert bits(scaled) == bits(y)
    np.testing.assert_array_equal(scaled_saved.mean, saved.mean * 2.0**power)
    np.testing.assert_array_equal(scaled_saved.var, saved.var * 4.0**power)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("eps", [1e-300, 1e-12, 1e-10, 1e-5, 1.0, 1e30])
def test_eps_is_honoured_as_it_is(backend, eps, dtype):
    x = (normal(3, (50, 4)) * 1e-6).astype(dtype)
    exact = oracle.forward(x, eps=eps)
    y, _ = bncore.batch_norm(x, eps=eps)
    assert_within(y, exact.y, rounding(exact.scale, dtype), "y")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_bad_value_stays_in_its_channel(backend, poison, layout, shape):
    x, dy = normal(1, shape, np.float32), normal(2, shape, np.float32)
    clean, saved = bncore.batch_norm(in_layout(x, layout))
    clean_g = bncore.batch_norm_backward(in_layout(dy, layout), saved)
    x[(shape[0] // 2, 1) + (0,) * (len(shape) - 2)] = poison
    y, saved = bncore.batch_norm(in_layout(x, layout))
    g = bncore.batch_norm_backward(in_layout(dy, layout), saved)
    others = np.delete(np.arange(shape[1]), 1)
    assert bits(y[:, others], g.dx[:, others]) == bits(clean[:, others], clean_g.dx[:, others])
    assert np.isnan(y[:, 1]).any() and not np.isfinite(saved.var[1])


@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize(
    "shape",
    [(3000, 40), (70001, 3), (64, 48, 7, 7), (16, 24, 28, 28), (2, 3, 513, 512)],
    ids=str,
)
def test_the_number_of_threads_changes_no_bit(backend, shape, layout):
    x, dy = (in_layout(normal(seed, shape, np.float32), layout) for seed in (1, 2))
    gamma, beta = normal(3, shape[1], np.float32), normal(4, shape[1], np.float32)

    def results():
        y, saved = bncore.batch_norm(x, gamma, beta)
        g = bncore.batch_norm_backward(dy, saved)
        fixed = bncore.batch_norm_inference(x, saved.mean, saved.var, gamma, beta)
        return [hash(part) for part in bits(y, saved.stats, *g[:3], fixed)]

    seen = []
    for threads in (1, 2, 3, 7, 2) if _backend.active.name != "numpy" else (1, 1):
        bncore.set_num_threads(threads)
        seen.append(results())
    assert all(one == seen[0] for one in seen)
