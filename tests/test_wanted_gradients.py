"""The choice of gradients, and those with respect to given statistics."""

from itertools import combinations

import numpy as np
import pytest

import bncore

from . import torch_oracle
from .arrays import bits, in_layout, normal

NAMES = ("x", "gamma", "beta", "residual")
CHOICES = [choice for size in (1, 2, 3, 4) for choice in combinations(NAMES, size)]
SHAPES = [(6, 5), (3, 4, 7), (20, 9, 7, 7), (300, 70)]


def arguments(shape, dtype=np.float64, layout="C"):
    x, dy, residual = (in_layout(normal(seed, shape, dtype), layout) for seed in (1, 2, 3))
    return x, dy, residual, normal(4, shape[1], dtype), normal(5, shape[1], dtype)


def chosen(g, names):
    return [getattr(g, "d" + name) for name in names]


@pytest.mark.parametrize("layout", ["C", "channels_last", "reversed"])
@pytest.mark.parametrize("wrt", CHOICES, ids=str)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("shape", [(20, 9, 7, 7), (3, 70, 13, 13)], ids=str)
def test_a_choice_has_the_bits_of_all(backend, shape, wrt, extras, layout):
    x, dy, residual, gamma, beta = arguments(shape, np.float32, layout)
    keywords = {"residual": residual, "activation": "relu"} if extras else {}
    _, saved = bncore.batch_norm(x, gamma, beta, **keywords)
    g, few = (bncore.batch_norm_backward(dy, saved, wrt=some) for some in (None, wrt))
    assert bits(*chosen(few, wrt)) == bits(*chosen(g, wrt))
    assert all(d is None for d in chosen(few, set(NAMES) - set(wrt)))


@pytest.mark.parametrize("wrt", CHOICES, ids=str)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "relu"])
def test_a_choice_with_fixed_statistics(backend, wrt, extras):
    x, dy, residual, gamma, beta = arguments((20, 9, 7, 7), np.float32)
    keywords = {"residual": residual, "activation": "relu"} if extras else {"activation": "relu"}
    fixed = dy, x, beta, gamma**2, gamma, beta
    g, few = (
        bncore.batch_norm_inference_backward(*fixed, wrt=some, **keywords) for some in (None, wrt)
    )
    # The grid of dx alone is another one, and so may be the last bit.
    for a, b in zip(chosen(few, wrt), chosen(g, wrt), strict=True):
        assert (a is None) == (b is None) and (a is None or np.allclose(a, b, rtol=1e-6))
    assert all(d is None for d in chosen(few, {*NAMES, "mean", "var"} - set(wrt)))


@pytest.mark.parametrize("activation", [None, "relu", ("leaky_relu", 0.2)], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_gamma", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_given_statistics(backend, shape, with_gamma, with_residual, activation):
    torch = torch_oracle.import_torch()
    x, dy, residual, gamma, beta = arguments(shape)
    mean, var = normal(6, shape[1]), normal(7, shape[1]) ** 2 + 0.1
    gamma = gamma if with_gamma else None
    column = (-1,) + (1,) * (x.ndim - 2)
    mean_t, var_t = (torch.tensor(a, requires_grad=True) for a in (mean, var))
    z = (torch.tensor(x) - mean_t.reshape(column)) / torch.sqrt(var_t.reshape(column) + 1e-3)
    z = z if gamma is None else z * torch.tensor(gamma).reshape(column)
    z = z + torch.tensor(beta).reshape(column)
    z = z + torch.tensor(residual) if with_residual else z
    torch_oracle.activate(torch, z, activation).backward(torch.tensor(dy))
    g = bncore.batch_norm_inference_backward(
        dy, x, mean, var, gamma, beta, eps=1e-3, activation=activation, wrt=("mean", "var"),
        residual=residual if with_residual else None,
    )  # fmt: skip
    np.testing.assert_allclose(g.dmean, mean_t.grad.numpy(), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(g.dvar, var_t.grad.numpy(), rtol=1e-11, atol=1e-12)
    assert g.dx is g.dgamma is g.dbeta is g.dresidual is None


def test_given_statistics_keep_their_type(backend):
    x, dy, _, gamma, beta = arguments((6, 5), np.float32)
    mean, var = beta.astype(np.float64), (gamma**2).astype(np.float16)
    g = bncore.batch_norm_inference_backward(dy, x, mean, var, gamma, beta, wrt=("mean", "var"))
    assert (g.dmean.dtype, g.dvar.dtype) == (np.float64, np.float16)
    assert g.dmean.shape == g.dvar.shape == (5,)
