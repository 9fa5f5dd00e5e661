"""PyTorch in float64, as a second opinion; tests that ask for it are skipped where it is absent."""

from types import SimpleNamespace

import numpy as np
import pytest

from .oracle import channel_axes, from_rows, to_rows


def import_torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


def activate(torch, z, activation):
    name, *arguments = activation if isinstance(activation, tuple) else (activation,)
    if name == "relu":
        return torch.relu(z)
    if name == "leaky_relu":
        return torch.nn.functional.leaky_relu(z, *arguments)
    if name == "clip":
        return torch.clamp(z, *arguments)
    return z


def batch_norm(
    x, dy, gamma=None, beta=None, *, axis=1, eps=1e-5, activation=None, residual=None,
    weight=None, mean=None, var=None,
):  # fmt: skip
    """y and all gradients by autograd, in the arrays' shapes; fixed statistics where given."""
    torch = import_torch()
    axes = channel_axes(axis, x.ndim)

    def leaf(array, shape):
        if array is None:
            return None
        return torch.tensor(np.asarray(array, np.float64).reshape(shape), requires_grad=True)

    def rows(array):
        return None if array is None else leaf(to_rows(array, axes, np.float64)[None], (1, c, n))

    c, n = to_rows(x, axes).shape
    x_t, residual_t, gamma_t, beta_t = rows(x), rows(residual), leaf(gamma, c), leaf(beta, c)
    if weight is None:
        given = {} if mean is None else {"running_mean": mean, "running_var": var}
        given = {k: torch.tensor(np.asarray(v, np.float64).reshape(-1)) for k, v in given.items()}
        arguments = {"running_mean": None, "running_var": None} | given
        z = torch.nn.functional.batch_norm(
            x_t, **arguments, weight=gamma_t, bias=beta_t, training=mean is None, eps=eps
        )
    else:
        weight_t = torch.tensor(to_rows(weight, axes, np.float64))
        z = weighted(torch, x_t, weight_t, gamma_t, beta_t, eps)
    if residual is not None:
        z = z + residual_t
    y = activate(torch, z, activation)
    y.backward(torch.tensor(to_rows(dy, axes, np.float64)[None]))

    def back(tensor):
        return None if tensor is None else from_rows(tensor.detach().numpy(), x.shape, axes)

    def gradient(parameter, like):
        return None if parameter is None else parameter.grad.numpy().reshape(np.shape(like))

    return SimpleNamespace(
        y=back(y),
        dx=back(x_t.grad),
        dgamma=gradient(gamma_t, gamma),
        dbeta=gradient(beta_t, beta),
        dresidual=None if residual is None else back(residual_t.grad),
    )


def weighted(torch, x, weight, gamma, beta, eps):
    """Batch norm of x (1, C, n) with the statistics of weighted values, for autograd."""
    total = weight.sum()
    mean = (x * weight).sum(2, keepdim=True) / total
    var = ((x - mean) ** 2 * weight).sum(2, keepdim=True) / total
    z = (x - mean) / torch.sqrt(var + eps)
    if gamma is not None:
        z = z * gamma[:, None]
    return z if beta is None else z + beta[:, None]
