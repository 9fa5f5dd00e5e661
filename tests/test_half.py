"""float16 and bfloat16: computed in wide types and rounded once."""

import itertools
from functools import cache

import numpy as np
import pytest

import bncore

from . import oracle
from .arrays import bits, in_layout, normal
from .oracle import WIDE, assert_within, ulp

SHAPES = [(64, 7), (33, 130), (3, 5, 33), (20, 9, 7, 7), (2, 3, 40, 41)]
LAYOUTS = ("C", "channels_last", "sliced", "reversed", "unaligned")


@pytest.fixture(params=["float16", "bfloat16"])
def dtype(request):
    if request.param == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(request.param)


def arguments(shape, dtype, layout="C"):
    x, dy = (in_layout(normal(seed, shape, dtype), layout) for seed in (1, 2))
    return x, dy, normal(3, shape[1], np.float32), normal(4, shape[1], np.float32)


@cache
def exact(shape, dtype):
    x, dy, gamma, beta = arguments(shape, dtype)
    wide = WIDE if x.size < 100_000 else np.float64
    forward = oracle.forward(x, gamma, beta, dtype=wide)
    return forward, oracle.backward(dy, x, gamma, beta, dtype=wide)


def rounded_once(value, scale, dtype):
    """Half a unit in the last place, and what float32 may have been off before."""
    return ulp(value, dtype) / 2 + 4 * ulp(scale, np.float32)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        *itertools.product(SHAPES, LAYOUTS),
        *itertools.product([(96, 250, 7, 7)], LAYOUTS[:2]),  # large enough to be streamed
    ],
    ids=str,
)
class TestRoundedOnce:
    def test_training(self, backend, dtype, shape, layout):
        x, _, gamma, beta = arguments(shape, dtype, layout)
        forward, _ = exact(shape, dtype)
        y, saved = bncore.batch_norm(x, gamma, beta)
        assert y.dtype == dtype and saved.mean.dtype == np.float64
        assert_within(
            y.astype(np.float64), forward.y, rounded_once(forward.y, forward.scale, dtype), "y"
        )
        assert_within(saved.mean, forward.mean, ulp(forward.mean, np.float32), "mean")
        assert_within(saved.var, forward.var, ulp(forward.var, np.float32), "var")

    def test_moments(self, backend, dtype, shape, layout):
        x = arguments(shape, dtype, layout)[0]
        forward, _ = exact(shape, dtype)
        m = bncore.moments(x)
        np.testing.assert_allclose(m.mean, forward.mean.astype(np.float64), rtol=0, atol=1e-13)
        np.testing.assert_allclose(m.var(), forward.var.astype(np.float64), rtol=1e-13)

    def test_inference(self, backend, dtype, shape, layout):
        x, _, gamma, beta = arguments(shape, dtype, layout)
        forward, _ = exact(shape, dtype)
        mean, var = forward.mean.astype(np.float64), forward.var.astype(np.float64)
        y = bncore.batch_norm_inference(x, mean, var, gamma, beta)
        assert y.dtype == dtype
        assert_within(
            y.astype(np.float64), forward.y, rounded_once(forward.y, forward.scale, dtype), "y"
        )

    def test_gradient(self, backend, dtype, shape, layout):
        x, dy, gamma, beta = arguments(shape, dtype, layout)
        _, gradient = exact(shape, dtype)
        _, saved = bncore.batch_norm(x, gamma, beta)
        g = bncore.batch_norm_backward(dy, saved)
        assert g.dx.dtype == dtype and g.dgamma.dtype == g.dbeta.dtype == np.float32
        tolerance = rounded_once(gradient.dx, gradient.dx_scale, dtype)
        assert_within(g.dx.astype(np.float64), gradient.dx, tolerance, "dx")
        for name in ("dgamma", "dbeta"):
            value, size = getattr(gradient, name), getattr(gradient, f"{name}_scale")
            tolerance = ulp(value, np.float32) + 2.0**-24 * size
            assert_within(getattr(g, name), value, tolerance, name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float16_of_6e4_does_not_overflow(backend, shape):
    x = (60000 + 4000 * np.sign(normal(1, shape))).astype(np.float16)
    forward = oracle.forward(x)
    y, saved = bncore.batch_norm(x)
    np.testing.assert_allclose(saved.var, forward.var.astype(float), rtol=1e-7)
    tolerance = rounded_once(forward.y, forward.scale, np.float16)
    assert_within(y.astype(np.float64), forward.y, tolerance, "y")


def test_float16_sums_beyond_its_range(backend):
    x = np.full((5000, 3), 60000, np.float16)
    _, saved = bncore.batch_norm(x)
    assert (saved.mean == 60000).all() and (saved.var == 0).all()
    g = bncore.batch_norm_backward(x, saved)
    assert np.isfinite(g.dx.astype(np.float64)).all()
    assert (bncore.moments(x).mean == 60000).all()


@pytest.mark.parametrize("value", [0.1, 1000.1, 6e-8])
def test_a_constant_channel_gives_beta_exactly(backend, dtype, value):
    beta = normal(1, 5, dtype).astype(np.float32)
    y, _ = bncore.batch_norm(np.full((40, 5, 9), value).astype(dtype), None, beta)
    assert (np.moveaxis(y, 1, -1).astype(np.float32) == beta).all()


@pytest.mark.parametrize("activation", ["relu", ("leaky_relu", 0.1), ("clip", -0.5, 0.5)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_and_activation(backend, dtype, shape, activation):
    x, dy, gamma, beta = arguments(shape, dtype)
    keywords = {"activation": activation, "residual": normal(5, shape, dtype)}
    forward = oracle.forward(x, gamma, beta, **keywords)
    y, saved = bncore.batch_norm(x, gamma, beta, **keywords)
    tolerance = rounded_once(forward.y, forward.scale, dtype)
    assert_within(y.astype(np.float64), forward.y, tolerance, "y")
    g = bncore.batch_norm_backward(dy, saved)
    gradient = oracle.backward(dy, x, gamma, beta, **keywords)
    assert g.dx.dtype == g.dresidual.dtype == dtype
    tolerance = rounded_once(gradient.dx, gradient.dx_scale, dtype)
    assert_within(g.dx.astype(np.float64), gradient.dx, tolerance, "dx")


@pytest.mark.parametrize("mask", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ["relu", ("leaky_relu", 0.3)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_with_given_statistics(backend, dtype, shape, activation, residual, mask):
    x, dy, gamma, beta = arguments(shape, dtype)
    mean, var = normal(6, shape[1]), np.exp(normal(7, shape[1]))
    positions = np.random.default_rng(8).random((shape[0], 1, *shape[2:])) < 0.6
    valid = np.broadcast_to(positions | (not mask), shape)
    keywords = {"activation": activation, "residual": normal(5, shape, dtype) if residual else None}
    exact = oracle.backward(
        np.where(valid, dy, dtype.type(0)), x, gamma, beta, mean=mean, var=var, **keywords
    )
    g = bncore.batch_norm_inference_backward(
        dy, x, mean, var, gamma, beta, mask=positions if mask else None, **keywords
    )
    tolerance = rounded_once(exact.dx, exact.dx_scale, dtype)
    assert_within(g.dx.astype(np.float64), exact.dx, tolerance, "dx")
    if residual:
        dz = exact.dresidual
        assert_within(g.dresidual.astype(np.float64), dz, rounded_once(dz, dz, dtype), "dresidual")


def test_masked_positions_have_no_influence(backend, dtype):
    x, dy, gamma, beta = arguments((4, 6, 7), dtype)
    mask = np.random.default_rng(1).random((4, 1, 7)) < 0.6
    results = []
    for poison in (1, np.nan):
        for array in (x, dy):
            array[np.broadcast_to(~mask, x.shape)] = poison
        y, saved = bncore.batch_norm(x, gamma, beta, mask=mask)
        results.append(bits(y, saved.stats, *bncore.batch_norm_backward(dy, saved)))
    assert results[0] == results[1]


def test_in_place(backend, dtype):
    x, dy, gamma, beta = arguments((20, 9, 7, 7), dtype)
    y, saved = bncore.batch_norm(x, gamma, beta)
    g = bncore.batch_norm_backward(dy, saved)
    assert bits(*bncore.batch_norm_backward(dy, saved, out=dy)) == bits(*g)
    assert bncore.batch_norm(x, gamma, beta, out=x)[0] is x and bits(x) == bits(y)


def test_swapped_bytes(backend):
    x, _, gamma, beta = arguments((9, 5), np.dtype("float16"))
    y, _ = bncore.batch_norm(x.astype(">f2"), gamma, beta)
    assert y.dtype.isnative and bits(y) == bits(bncore.batch_norm(x, gamma, beta)[0])


def test_a_layer_with_float32_parameters(backend, dtype):
    layer = bncore.BatchNorm2d(9)
    x, dy, *_ = arguments((20, 9, 7, 7), dtype)
    assert layer(x).dtype == layer.backward(dy).dtype == dtype
    assert layer.grad_gamma.dtype == layer.running_mean.dtype == np.float32
    assert layer.eval()(x).dtype == dtype
    exact_mean = 0.1 * oracle.forward(x).mean
    assert_within(layer.running_mean, exact_mean, 2 * ulp(exact_mean, np.float32), "running_mean")


def test_a_gradient_beyond_its_parameter_s_type_is_infinite(backend):
    x = np.linspace(-1, 1, 400, dtype=np.float32).reshape(400, 1)
    gamma = np.ones(1, np.float16)
    _, saved = bncore.batch_norm(x, gamma, gamma)
    g = bncore.batch_norm_backward(np.full_like(x, 1000), saved)
    assert g.dbeta.dtype == np.float16 and np.isinf(g.dbeta[0])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("place", range(0, 100, 7))
def test_a_nan_stays_one_and_alone(backend, dtype, place, channels_last):
    x = normal(1, (1, 3, 100), dtype)
    x[0, 1, place] = np.nan
    x = in_layout(x, "channels_last" if channels_last else "C")
    y = bncore.batch_norm_inference(x, np.zeros(3), np.ones(3), eps=1e-12)
    assert bits(y) == bits(x)


@pytest.mark.parametrize("pattern", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00001, 0xFFC0FFFF])
@pytest.mark.parametrize(
    ("shape", "channel"), [((2, 3, 40), 1), ((70, 3), 1), *(((9, 64), c) for c in range(2, 64, 7))]
)
def test_a_nan_whose_bits_are_rounded_away_stays_one(backend, dtype, shape, channel, pattern):
    """As a rounded number it would be infinite, or 0 with the other sign."""
    gamma = np.ones(shape[1], np.float32)
    gamma[channel : channel + 1] = np.array([pattern], np.uint32).view(np.float32)
    x = normal(1, shape, dtype)
    given = np.zeros(shape[1]), np.ones(shape[1])
    y = bncore.batch_norm_inference(x, *given, gamma, eps=1e-12)
    assert np.isnan(y[:, channel].astype(np.float32)).all()
    others = np.arange(shape[1]) != channel
    assert bits(y[:, others]) == bits(x[:, others])
