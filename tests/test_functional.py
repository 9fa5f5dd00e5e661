"""500 random calls, each in float64 against PyTorch and in float32 against extended precision."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest

import bncore

from . import oracle, torch_oracle
from .arrays import LAYOUTS, in_layout, normal
from .oracle import assert_within, ulp

SEEDS = range(500)


@dataclass(frozen=True)
class Call:
    """Arguments of one call in float64, and the layout they come in."""

    x: np.ndarray
    dy: np.ndarray
    gamma: np.ndarray | None
    beta: np.ndarray | None
    mean: np.ndarray
    var: np.ndarray
    axis: int | tuple[int, ...]
    eps: float
    layout: str

    @property
    def keywords(self):
        return {"axis": self.axis, "eps": self.eps}

    @property
    def fixed(self):
        return {"mean": self.mean, "var": self.var}

    def arguments(self, dtype):
        """x and dy in a dtype and in the layout."""
        arrays = (self.x.astype(dtype), self.dy.astype(dtype))
        return [in_layout(array, self.layout, self.axis) for array in arrays]


def random_axis(rng, ndim):
    """One channel axis, or several, counted from either end; at least one axis is none."""
    count = 1 if rng.random() < 0.7 else rng.integers(1, ndim)
    axes = rng.choice(ndim, size=count, replace=False)
    axes = [int(axis) - ndim * int(rng.integers(2)) for axis in axes]
    return axes[0] if count == 1 and rng.random() < 0.8 else tuple(axes)


@cache
def call(seed):
    """The call of a seed, with two or more different values in every channel."""
    rng = np.random.default_rng(seed)
    ndim = int(rng.integers(2, 7))
    most = {2: 40, 3: 12, 4: 8, 5: 5, 6: 4}[ndim]
    axis = random_axis(rng, ndim)
    axes = oracle.channel_axes(axis, ndim)
    free = [i for i in range(ndim) if i not in axes]
    shape = rng.integers(1, most + 1, ndim)
    shape[free[-1]] = max(shape[free[-1]], 2)
    layout = LAYOUTS[rng.integers(len(LAYOUTS))]
    if layout == "broadcast" and len(free) == 1:
        layout = "sliced"
    channels = [shape[i] for i in axes]
    dtypes = [np.float32, np.float64]
    gamma, beta = (rng.standard_normal(channels).astype(dtypes[rng.integers(2)]) for _ in "ab")
    return Call(
        x=np.array(in_layout(rng.standard_normal(shape) * 2 + 0.5, layout, axis), np.float64),
        dy=np.array(in_layout(rng.standard_normal(shape), layout, axis), np.float64),
        gamma=None if rng.random() < 0.1 else gamma,
        beta=None if rng.random() < 0.1 else beta,
        mean=rng.standard_normal(channels),
        var=rng.random(channels) + 0.01,
        axis=axis,
        eps=float(rng.choice([1e-12, 1e-10, 1e-5, 1e-3, 1.0])),
        layout=layout,
    )


@cache
def torch_results(seed):
    """PyTorch's results of training and of inference, and the sizes of their terms."""
    c = call(seed)
    arguments = c.x, c.dy, c.gamma, c.beta
    return [
        (
            torch_oracle.batch_norm(*arguments, **c.keywords, **fixed),
            oracle.forward(c.x, c.gamma, c.beta, **c.keywords, **fixed),
            oracle.backward(c.dy, c.x, c.gamma, c.beta, **c.keywords, **fixed),
        )
        for fixed in ({}, c.fixed)
    ]


@cache
def exact_results(seed):
    """The oracle's results of training and of inference on x and dy rounded to float32."""
    c = call(seed)
    x, dy = c.x.astype(np.float32), c.dy.astype(np.float32)
    return [
        (
            oracle.forward(x, c.gamma, c.beta, **c.keywords, **fixed),
            oracle.backward(dy, x, c.gamma, c.beta, **c.keywords, **fixed),
        )
        for fixed in ({}, c.fixed)
    ]


def run(seed, dtype):
    """bncore's results: y, saved and gradients in training; y and gradients in inference."""
    c = call(seed)
    x, dy = c.arguments(dtype)
    y, saved = bncore.batch_norm(x, c.gamma, c.beta, **c.keywords)
    g = bncore.batch_norm_backward(dy, saved)
    fixed = c.mean, c.var, c.gamma, c.beta
    y_fixed = bncore.batch_norm_inference(x, *fixed, **c.keywords)
    g_fixed = bncore.batch_norm_inference_backward(dy, x, *fixed, **c.keywords)
    return saved, [(y, g), (y_fixed, g_fixed)]


def assert_parameter_gradients(g, c, expected, scales, relative):
    """dgamma and dbeta: in the parameters' dtype, None where there was none."""
    for name, parameter in (("dgamma", c.gamma), ("dbeta", c.beta)):
        actual = getattr(g, name)
        if parameter is None:
            assert actual is None
            continue
        assert actual.dtype == parameter.dtype
        exact = getattr(expected, name)
        tolerance = relative * getattr(scales, f"{name}_scale") + ulp(exact, parameter.dtype)
        assert_within(actual, exact, tolerance, name)


@pytest.mark.parametrize("seed", SEEDS)
def test_float64_is_as_torch_says(backend, seed):
    c = call(seed)
    _, results = run(seed, np.float64)
    for (y, g), (expected, forward, backward) in zip(results, torch_results(seed), strict=True):
        assert_within(y, expected.y, 1e-10 * forward.scale, "y")
        assert_within(g.dx, expected.dx, 1e-10 * backward.dx_scale, "dx")
        assert_parameter_gradients(g, c, expected, backward, 1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_float32_is_exact_but_for_rounding(backend, seed):
    c = call(seed)
    saved, results = run(seed, np.float32)
    (exact, _), _ = exact_results(seed)
    assert_within(saved.mean, exact.mean, ulp(exact.mean, np.float32), "mean")
    assert_within(saved.var, exact.var, ulp(exact.var, np.float32), "var")
    for (y, g), (forward, backward) in zip(results, exact_results(seed), strict=True):
        assert y.dtype == g.dx.dtype == np.float32
        assert_within(y, forward.y, 4 * ulp(forward.scale, np.float32), "y")
        assert_within(g.dx, backward.dx, 4 * ulp(backward.dx_scale, np.float32), "dx")
        assert_parameter_gradients(g, c, backward, backward, 2.0**-24)


def test_the_calls_are_as_varied_as_they_should_be():
    calls = [call(seed) for seed in SEEDS]
    assert {c.x.ndim for c in calls} == {2, 3, 4, 5, 6}
    assert {c.layout for c in calls} == set(LAYOUTS)
    assert {c.eps for c in calls} == {1e-12, 1e-10, 1e-5, 1e-3, 1.0}
    assert any(isinstance(c.axis, tuple) and len(c.axis) > 1 for c in calls)
    assert any(np.min(c.axis) < 0 for c in calls)
    assert any(c.gamma is None for c in calls) and any(c.beta is None for c in calls)


def test_what_is_saved(backend):
    """The arguments as they were given, the statistics in the shape of gamma."""
    x, gamma, beta = normal(1, (4, 2, 3, 5)), normal(2, (2, 5)), normal(3, (2, 5))
    _, saved = bncore.batch_norm(x, gamma, beta, axis=(1, -1), eps=1e-3)
    assert saved.x is x and saved.gamma is gamma and saved.beta is beta
    assert saved.axes == (1, 3) and saved.eps == 1e-3 and saved.values == 12
    np.testing.assert_allclose(saved.mean, x.mean((0, 2)), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(saved.inv_std, 1 / np.sqrt(x.var((0, 2)) + 1e-3), rtol=1e-12)
    np.testing.assert_array_equal(saved.count, np.full((2, 5), 12))
    assert saved.stats.shape == (4, 10)
