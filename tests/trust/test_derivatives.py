"""Gradients against 50-digit arithmetic, central differences, and what must cancel.

The oracle differentiates nothing: it evaluates the loss ``sum dy y`` in 50 digits and takes its
central difference with a step so small that the quotient has 25 digits left.
"""

import mpmath
import numpy as np
import pytest
from trust_counts import count

import bncore

pytestmark = pytest.mark.derivatives

CASES = range(count(305, 1000))
STEP = mpmath.mpf(10) ** -20
MODES = ("training", "fixed", "affine off", "dx only", "in place")


def normalized(x, mean, var, eps):
    scale = 1 / mpmath.sqrt(var + eps)
    return [(v - mean) * scale for v in x]


def batch_statistics(x):
    mean = mpmath.fsum(x) / len(x)
    return mean, mpmath.fsum((v - mean) ** 2 for v in x) / len(x)


class Channel:
    """One channel's data in 50 digits, and its loss ``sum dy (gamma x' + beta)``."""

    def __init__(self, x, dy, gamma, beta, eps, fixed=None):
        self.x, self.dy = ([mpmath.mpf(float(v)) for v in array] for array in (x, dy))
        self.gamma, self.beta, self.eps = (mpmath.mpf(float(v)) for v in (gamma, beta, eps))
        self.fixed = None if fixed is None else [mpmath.mpf(float(v)) for v in fixed]

    def loss(self, x, gamma, beta):
        mean, var = self.fixed or batch_statistics(x)
        pairs = zip(self.dy, normalized(x, mean, var, self.eps), strict=True)
        return mpmath.fsum(g * (gamma * v + beta) for g, v in pairs)

    def gradients(self):
        """dx, dgamma and dbeta."""
        dx = []
        for i in range(len(self.x)):
            moved = [self.x[:i] + [self.x[i] + step] + self.x[i + 1 :] for step in (STEP, -STEP)]
            high, low = (self.loss(x, self.gamma, self.beta) for x in moved)
            dx.append((high - low) / (2 * STEP))
        by_gamma = [self.loss(self.x, self.gamma + step, self.beta) for step in (STEP, -STEP)]
        by_beta = [self.loss(self.x, self.gamma, self.beta + step) for step in (STEP, -STEP)]
        return dx, *((high - low) / (2 * STEP) for high, low in (by_gamma, by_beta))


class Case:
    """A random batch with its exact gradients."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.mode = MODES[seed % len(MODES)]
        n, c = int(rng.integers(2, 13)), int(rng.integers(1, 4))
        self.eps = float(rng.choice([1e-12, 1e-10, 1e-5, 1e-3, 1.0]))
        self.x = rng.standard_normal((n, c)) * 10.0 ** rng.integers(-2, 3) + rng.integers(-3, 4)
        self.dy = rng.standard_normal((n, c))
        self.gamma, self.beta = rng.standard_normal((2, c))
        self.fixed = rng.standard_normal(c), rng.uniform(0.1, 3, c)

    def exact(self):
        """dx, dgamma and dbeta as float64 arrays."""
        plain = self.mode == "affine off"
        with mpmath.workdps(50):
            found = [
                Channel(
                    self.x[:, c], self.dy[:, c], 1 if plain else self.gamma[c],
                    0 if plain else self.beta[c], self.eps,
                    [part[c] for part in self.fixed] if self.mode == "fixed" else None,
                ).gradients()
                for c in range(self.x.shape[1])
            ]  # fmt: skip
            dx = np.array([[float(v) for v in channel[0]] for channel in found]).T
            return dx, *(np.array([float(channel[i]) for channel in found]) for i in (1, 2))

    def computed(self):
        if self.mode == "fixed":
            arguments = (self.dy, self.x, *self.fixed, self.gamma, self.beta)
            return bncore.batch_norm_inference_backward(*arguments, eps=self.eps)
        parameters = (None, None) if self.mode == "affine off" else (self.gamma, self.beta)
        _, saved = bncore.batch_norm(self.x, *parameters, eps=self.eps)
        if self.mode == "in place":
            dy = self.dy.copy()
            return bncore.batch_norm_backward(dy, saved, out=dy)
        if self.mode == "dx only":
            return bncore.batch_norm_backward(self.dy, saved, wrt="x")
        return bncore.batch_norm_backward(self.dy, saved)


EXACT = {}


def exact(seed):
    if seed not in EXACT:
        EXACT[seed] = Case(seed).exact()
    return EXACT[seed]


@pytest.mark.parametrize("seed", CASES)
def test_against_fifty_digits(backend, seed):
    case = Case(seed)
    dx, dgamma, dbeta = exact(seed)
    found = case.computed()
    scale = np.abs(case.dy).max() * gain(case)
    assert np.abs(found.dx - dx).max() <= 1e-12 * scale.max()
    if case.mode in ("affine off", "dx only"):
        assert found.dgamma is None
        assert found.dbeta is None
    else:
        np.testing.assert_allclose(found.dgamma, dgamma, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found.dbeta, dbeta, rtol=1e-12, atol=1e-13)


def gain(case):
    """|gamma| / sigma: what dy is multiplied by."""
    var = case.fixed[1] if case.mode == "fixed" else case.x.var(axis=0)
    gamma = 1 if case.mode == "affine off" else np.abs(case.gamma)
    return gamma / np.sqrt(var + case.eps)


@pytest.mark.parametrize("shape", [(4000, 5), (50, 24, 49), (3, 9, 5000)])
def test_what_must_cancel(backend, shape):
    """dx of a batch sums to nothing, alone and weighted by x'."""
    rng = np.random.default_rng(6)
    x, dy = rng.standard_normal((2, *shape)) * 3 + 100
    _, saved = bncore.batch_norm(x)
    dx = bncore.batch_norm_backward(dy, saved).dx
    axes = tuple(i for i in range(x.ndim) if i != 1)
    column = (slice(None), *[None] * (x.ndim - 2))
    total = np.abs(dx).sum(axis=axes)
    assert (np.abs(dx.sum(axis=axes)) <= 1e-12 * total).all()
    x_hat = (x - saved.mean[column]) * saved.inv_std[column]
    assert (np.abs((dx * x_hat).sum(axis=axes)) <= 1e-4 * total).all()


@pytest.mark.parametrize("shape", [(400, 7), (3, 5, 200), (33, 24, 49)])
def test_a_gradient_far_from_zero(backend, shape):
    """The mean of a float32 dy is subtracted in full, not rounded to float32 first."""
    rng = np.random.default_rng(9)
    x, dy = rng.standard_normal((2, *shape), np.float32)
    dy += 1000
    _, saved = bncore.batch_norm(x)
    dx = bncore.batch_norm_backward(dy, saved).dx
    axes = tuple(i for i in range(x.ndim) if i != 1)
    column = (slice(None), *[None] * (x.ndim - 2))
    x_hat = (x - saved.mean[column]) * saved.inv_std[column]
    centred = dy - dy.mean(axis=axes, keepdims=True, dtype=np.float64)
    slope = (centred * x_hat).mean(axis=axes, keepdims=True)
    exact = saved.inv_std[column] * (centred - slope * x_hat)
    assert np.abs(dx - exact).max() <= 1e-6 * np.abs(exact).max()


@pytest.mark.parametrize("activation", [None, "relu", ("leaky_relu", 0.1), ("clip", -0.5, 0.8)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_central_differences(backend, activation, with_residual):
    """Of the whole function, epilogue and all, in every argument."""
    rng = np.random.default_rng(12)
    given = {
        "x": rng.standard_normal((5, 3, 4)) * 2,
        "gamma": rng.standard_normal(3),
        "beta": rng.standard_normal(3),
        "residual": rng.standard_normal((5, 3, 4)) if with_residual else None,
    }
    dy = rng.standard_normal((5, 3, 4))

    def loss(**changed):
        y, _ = bncore.batch_norm(**given | changed, activation=activation, eps=1e-3)
        return (y * dy).sum()

    _, saved = bncore.batch_norm(**given, activation=activation, eps=1e-3)
    g = bncore.batch_norm_backward(dy, saved)
    found = {"x": g.dx, "gamma": g.dgamma, "beta": g.dbeta, "residual": g.dresidual}
    for name, value in given.items():
        if value is None:
            assert found[name] is None
            continue
        numerical = np.empty_like(value)
        for index in np.ndindex(value.shape):
            step = np.zeros_like(value)
            step[index] = 1e-6
            high, low = loss(**{name: value + step}), loss(**{name: value - step})
            numerical[index] = (high - low) / 2e-6
        np.testing.assert_allclose(found[name], numerical, rtol=1e-5, atol=1e-7, err_msg=name)
