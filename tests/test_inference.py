"""Normalization by given statistics, its hard cases."""

import numpy as np
import pytest

import bncore

from . import oracle, torch_oracle
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


@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize(
    ("mean", "x"), [(1e-300, 300), (1e-38, 1e19), (-1e-40, 1e15), (1e-25, -7e17)]
)
def test_a_tiny_mean_and_a_large_x(backend, mean, x, layout):
    """A unit that lifts the mean must not lift x beyond the largest number."""
    values = in_layout(np.full((64, 3, 40), x, np.float32), layout)
    y = bncore.batch_norm_inference(values, np.full(3, mean), np.ones(3))
    np.testing.assert_allclose(y, np.float32(x) / np.sqrt(1 + 1e-5), rtol=1e-6)


@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize("sign", [1, -1])
def test_beyond_the_largest_number_the_sign_is_that_of_the_result(backend, sign, layout):
    """What rounding left of the mean, times the scale, is beyond it too, and of the other sign."""
    x = in_layout(np.full((8, 3, 40), np.nextafter(np.float32(1e9), np.float32(2e9))), layout)
    gamma = np.full(3, sign * 3e38)
    y = bncore.batch_norm_inference(x, np.full(3, 1e9 + 28), np.full(3, 1e-3), gamma)
    assert (y == sign * np.inf).all()


def test_only_the_sum_of_a_means_parts_counts(backend):
    x = (normal(1, (50, 3)) + 1e6).astype(np.float32)
    var = np.ones(3)
    expected = bncore.batch_norm_inference(x, np.full(3, 1000000.25), var)
    y = bncore.batch_norm_inference(x, np.full(3, 999900.0), var, mean_lo=np.full(3, 100.25))
    assert_within(y, expected, rounding(np.abs(expected), np.float32), "y")


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


ACTIVATIONS = [None, "relu", ("leaky_relu", 0.3), ("clip", -0.4, 0.7)]
MASKED = [((8, 5), 1), ((4, 6, 7), 1), ((20, 9, 7, 7), 1), ((3, 4, 5, 6), (1, -1))]


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("layout", ["C", "channels_last", "reversed"])
@pytest.mark.parametrize(("shape", "axis"), MASKED, ids=str)
def test_masked(backend, shape, axis, layout, activation, residual):
    """0 where masked, be it NaN, in y and in every gradient; nothing there has influence."""
    axes = oracle.channel_axes(axis, len(shape))
    channels = [shape[one] for one in axes]
    x, dy, other = (in_layout(normal(i, shape), layout, axis) for i in (1, 2, 3))
    other = other if residual else None
    fixed = (
        normal(4, channels),
        np.exp(normal(5, channels)),
        normal(6, channels),
        normal(7, channels),
    )
    mask = (
        np.random.default_rng(8).random([1 if i in axes else n for i, n in enumerate(shape)]) < 0.6
    )
    valid = np.broadcast_to(mask, shape)
    expected = torch_oracle.batch_norm(
        x, np.where(valid, dy, 0), *fixed[2:], axis=axis, activation=activation, residual=other,
        mean=fixed[0], var=fixed[1],
    )  # fmt: skip
    for array in (x, dy, other):
        if array is not None:
            array[~valid] = np.nan
    keywords = {"axis": axis, "activation": activation, "residual": other, "mask": mask}
    y = bncore.batch_norm_inference(x, *fixed, **keywords)
    np.testing.assert_allclose(y, np.where(valid, expected.y, 0), rtol=1e-11, atol=1e-12)
    every = ("x", "gamma", "beta", "residual", "mean", "var")
    g = bncore.batch_norm_inference_backward(dy, x, *fixed, **keywords, wrt=every)
    named = ("dx", "dgamma", "dbeta", "dresidual")[: 3 + residual]
    for name in named:
        right = getattr(expected, name)
        right = np.where(valid, right, 0) if right.shape == shape else right
        np.testing.assert_allclose(getattr(g, name), right, rtol=1e-11, atol=1e-11, err_msg=name)
    scale = fixed[2] / np.sqrt(fixed[1] + 1e-5)
    np.testing.assert_allclose(g.dmean, -scale * g.dbeta, rtol=1e-12)
    np.testing.assert_allclose(
        g.dvar, -scale * g.dgamma / (2 * np.sqrt(fixed[1] + 1e-5)), rtol=1e-12
    )
    alone = [
        getattr(bncore.batch_norm_inference_backward(dy, x, *fixed, **keywords, wrt=one), "d" + one)
        for one in every
    ]
    assert bits(*alone) == bits(*g)


@pytest.mark.parametrize("target", ["dy", "x", "residual"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_masked_over_an_argument(backend, target, activation):
    shape = (4, 6, 7)
    arrays = {name: normal(i, shape, np.float32) for i, name in enumerate(("dy", "x", "residual"))}
    mask = np.random.default_rng(8).random((4, 1, 7)) < 0.6
    fixed = normal(4, 6), np.exp(normal(5, 6)), normal(6, 6), normal(7, 6)
    keywords = {"activation": activation, "mask": mask}

    def gradients(**out):
        dy, *rest = arrays.values()
        return bncore.batch_norm_inference_backward(
            dy, rest[0], *fixed, residual=rest[1], **keywords, **out
        )

    expected = gradients()
    y = bncore.batch_norm_inference(arrays["x"], *fixed, residual=arrays["residual"], **keywords)
    kept = {name: array.copy() for name, array in arrays.items()}
    g = gradients(out=arrays[target])
    assert g.dx is arrays[target] and bits(*g) == bits(*expected)
    if target != "dy":
        over = bncore.batch_norm_inference(
            kept["x"], *fixed, residual=kept["residual"], **keywords, out=kept[target]
        )
        assert over is kept[target] and bits(over) == bits(y)


def test_an_all_masked_or_empty_batch(backend):
    one = np.ones(3)
    for shape in ((4, 3), (0, 3), (4, 3, 0)):
        x = np.full(shape, np.nan, np.float32)
        mask = np.zeros((shape[0], 1, *shape[2:]), bool)
        y = bncore.batch_norm_inference(x, one, one, one, one, mask=mask)
        g = bncore.batch_norm_inference_backward(x, x, one, one, one, one, mask=mask)
        assert y.shape == g.dx.shape == shape and (y == 0).all() and (g.dx == 0).all()
        assert (g.dgamma == 0).all() and (g.dbeta == 0).all()


@pytest.mark.parametrize("ratio", [0, 1e8, 1e12])
def test_what_float64_leaves_of_the_mean(backend, ratio):
    x, gamma, beta = normal(1, (60, 4)) + ratio, normal(2, 4), normal(3, 4)
    whole, saved = bncore.batch_norm(x, gamma, beta)
    m = bncore.moments(x)
    y = bncore.batch_norm_inference(x, m.mean, m.var(), gamma, beta, mean_lo=m.mean_lo)
    np.testing.assert_allclose(y, whole, rtol=1e-13, atol=1e-13)


# Many channels of few values: groups of them, each with its own statistics read for it.
MANY = [(3, 5000), (1, 3000, 5), (17, 2100), (700, 2100)]
KINDS = [("f4", "f8", "f4", "f8"), ("f8", "f4", "f8", "f4")]


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
@pytest.mark.parametrize("shape", MANY, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_many_channels_by_statistics_of_either_dtype(backend, dtype, shape, kinds):
    channels = shape[1]
    x = normal(1, shape, dtype)
    mean, gamma, beta = (normal(2 + i, channels, kinds[i]) for i in range(3))
    var = normal(5, channels, kinds[3]) ** 2
    exact = oracle.forward(x, gamma, beta, mean=mean, var=var)
    y = bncore.batch_norm_inference(x, mean, var, gamma, beta)
    assert_within(y, exact.y, rounding(exact.scale, dtype), "y")
    plain = bncore.batch_norm_inference(x, mean, var)
    exact = oracle.forward(x, mean=mean, var=var)
    assert_within(plain, exact.y, rounding(exact.scale, dtype), "y without parameters")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", MANY, ids=str)
def test_the_last_of_many_variances_is_refused_before_anything_is_written(backend, shape, dtype):
    x, out = normal(1, shape, dtype), np.full(shape, 7, dtype)
    var = np.ones(shape[1], dtype)
    var[-1] = -0.25
    with pytest.raises(ValueError, match="var must not be negative, got -0.25"):
        bncore.batch_norm_inference(x, np.zeros(shape[1], dtype), var, out=out)
    assert (out == 7).all()
