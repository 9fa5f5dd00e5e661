"""Gradients against central differences, and what else holds of them."""

import pickle

import numpy as np
import pytest

import bncore

from . import torch_oracle
from .arrays import bits, in_layout, normal

SHAPES = [((7, 3), 1), ((2, 4, 3), 1), ((3, 2, 2, 4), -1), ((2, 3, 2, 3), (1, 2))]
ACTIVATIONS = [None, "relu", ("leaky_relu", 0.2), ("clip", -0.5, 0.8)]


def arguments(shape, axis):
    """x, dy, gamma, beta and fixed mean and var in float64."""
    channels = [shape[one] for one in np.sort(np.atleast_1d(axis) % len(shape))]
    x, dy = normal(11, shape), normal(12, shape)
    gamma, beta, mean = (normal(seed, channels) for seed in (13, 14, 15))
    return x, dy, gamma, beta, mean, np.exp(normal(16, channels))


def differences(loss, array, step=1e-6):
    """The gradient of ``loss()`` by ``array``, changed one element at a time."""
    gradient = np.empty_like(array)
    for place in np.ndindex(array.shape):
        kept = array[place]
        array[place] = kept + step
        above = loss()
        array[place] = kept - step
        gradient[place] = (above - loss()) / (2 * step)
        array[place] = kept
    return gradient


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
class TestCentralDifferences:
    def test_training(self, backend, shape, axis, activation):
        x, dy, gamma, beta, *_ = arguments(shape, axis)
        residual = normal(17, shape)
        keywords = {"axis": axis, "activation": activation, "residual": residual}

        def loss():
            return float((bncore.batch_norm(x, gamma, beta, **keywords)[0] * dy).sum())

        _, saved = bncore.batch_norm(x, gamma, beta, **keywords)
        g = bncore.batch_norm_backward(dy, saved)
        for gradient, array in zip(g, (x, gamma, beta, residual), strict=True):
            np.testing.assert_allclose(gradient, differences(loss, array), rtol=1e-6, atol=1e-7)

    def test_inference(self, backend, shape, axis, activation):
        x, dy, gamma, beta, mean, var = arguments(shape, axis)
        fixed = mean, var, gamma, beta
        keywords = {"axis": axis, "activation": activation}

        def loss():
            return float((bncore.batch_norm_inference(x, *fixed, **keywords) * dy).sum())

        g = bncore.batch_norm_inference_backward(dy, x, *fixed, **keywords)
        for gradient, array in zip(g[:3], (x, gamma, beta), strict=True):
            np.testing.assert_allclose(gradient, differences(loss, array), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_training_gradient_is_orthogonal_to_ones_and_to_x(backend, dtype):
    """A shift or a scaling of the batch changes nothing, so dx has no part along them."""
    x, dy = normal(1, (400, 6), dtype), normal(2, (400, 6), dtype)
    _, saved = bncore.batch_norm(x, eps=1e-12)
    dx = bncore.batch_norm_backward(dy, saved).dx.astype(np.float64)
    tolerance = 400 * (np.finfo(dtype).eps + 1e-12)
    np.testing.assert_allclose(dx.sum(0), 0, atol=tolerance)
    np.testing.assert_allclose((dx * x).sum(0), 0, atol=tolerance)


def test_backward_twice_gives_the_same_bits(backend):
    x, dy, gamma, beta, *_ = arguments((6, 5, 7), 1)
    _, saved = bncore.batch_norm(x, gamma, beta)
    first = bncore.batch_norm_backward(dy, saved)
    reused = bncore.batch_norm_backward(dy, saved, out=first.dx.copy())
    assert bits(*first) == bits(*reused)


@pytest.mark.parametrize("given", ["gamma", "beta", "both", "neither"])
def test_absent_parameters_count_as_one_and_zero_and_have_no_gradient(backend, given):
    x, dy, gamma, beta, mean, var = arguments((5, 4, 3), 1)
    gamma = gamma if given in ("gamma", "both") else None
    beta = beta if given in ("beta", "both") else None
    ones = np.ones(4) if gamma is None else gamma
    zeros = np.zeros(4) if beta is None else beta
    y, saved = bncore.batch_norm(x, gamma, beta)
    full_y, full_saved = bncore.batch_norm(x, ones, zeros)
    g, full = (bncore.batch_norm_backward(dy, s) for s in (saved, full_saved))
    np.testing.assert_array_equal(y, full_y)
    np.testing.assert_array_equal(g.dx, full.dx)
    fixed = bncore.batch_norm_inference_backward(dy, x, mean, var, gamma, beta)
    for result in (g, fixed):
        assert (result.dgamma is None) == (gamma is None)
        assert (result.dbeta is None) == (beta is None)
        assert result.dresidual is None


@pytest.mark.parametrize("x_dtype", [np.float32, np.float64])
@pytest.mark.parametrize("parameter_dtype", [np.float16, np.float32, np.float64])
def test_gradients_have_their_arguments_dtypes(backend, x_dtype, parameter_dtype):
    x, dy = normal(1, (5, 3), x_dtype), normal(2, (5, 3), x_dtype)
    gamma, beta = normal(3, 3, parameter_dtype), normal(4, 3, np.float32)
    _, saved = bncore.batch_norm(x, gamma, beta)
    fixed = bncore.batch_norm_inference_backward(dy, x, beta, beta**2, gamma, beta)
    for g in (bncore.batch_norm_backward(dy, saved), fixed):
        assert g.dx.dtype == x_dtype
        assert g.dgamma.dtype == parameter_dtype
        assert g.dbeta.dtype == np.float32


@pytest.mark.parametrize("layout", ["C", "channels_last", "sliced"])
def test_eval_mode_gradient_is_torchs(backend, layout):
    torch = torch_oracle.import_torch()
    x, dy, gamma, beta, mean, var = arguments((4, 5, 3, 2), 1)
    peer = torch.nn.BatchNorm2d(5, dtype=torch.float64).eval()
    layer = bncore.BatchNorm2d(5, dtype=np.float64).eval()
    state = {"weight": gamma, "bias": beta, "running_mean": mean, "running_var": var}
    layer.load_state_dict(state)
    peer.load_state_dict({key: torch.tensor(value) for key, value in state.items()}, strict=False)
    x_t = torch.tensor(x, requires_grad=True)
    peer(x_t).backward(torch.tensor(dy))
    layer(in_layout(x, layout))
    dx = layer.backward(in_layout(dy, layout))
    np.testing.assert_allclose(dx, x_t.grad, rtol=1e-10)
    np.testing.assert_allclose(layer.grad_gamma, peer.weight.grad, rtol=1e-10)
    np.testing.assert_allclose(layer.grad_beta, peer.bias.grad, rtol=1e-10)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_saved_can_be_sent(backend, residual, masked):
    """By pickle, to another process; and so can moments."""
    x, dy = normal(1, (6, 4, 3), np.float32), normal(2, (6, 4, 3), np.float32)
    mask = np.arange(6).reshape(6, 1, 1) < 4
    _, saved = bncore.batch_norm(
        x, residual=dy if residual else None, activation="relu", mask=mask if masked else None
    )
    sent = pickle.loads(pickle.dumps(saved))
    expected = bncore.batch_norm_backward(dy, saved)
    assert bits(*bncore.batch_norm_backward(dy, sent)) == bits(*expected)
    m = bncore.moments(x)
    sent = pickle.loads(pickle.dumps(m))
    assert bits(sent.count, sent.mean, sent.m2, sent.mean_lo) == bits(
        m.count, m.mean, m.m2, m.mean_lo
    )
