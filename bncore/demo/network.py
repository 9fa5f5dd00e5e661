"""A deep fully connected network in NumPy, with or without batch normalization.

Every layer is one object with the interface of `bncore.BatchNorm1d`::

    y = layer(x)                 dx = layer.backward(dy)

and holds the gradient of each parameter ``p`` in ``grad_p`` afterwards. One hidden layer is::

    x -> Linear -> Sigmoid                    without
    x -> Linear -> BatchNorm1d -> Sigmoid     with batch normalization

In the second there is no bias: the normalization would subtract it, and beta takes its place
(Ioffe & Szegedy 2015, section 3.2).
"""

from __future__ import annotations

from itertools import pairwise
from time import perf_counter

import numpy as np

from bncore import BatchNorm, BatchNorm1d


class Linear:
    """``y = x W + b``.

    Parameters
    ----------
    weight : (inputs, outputs) ndarray
    bias : bool
        Whether there is b, zeros at first.
    """

    def __init__(self, weight, bias=True):
        self.weight = weight
        self.bias = np.zeros(weight.shape[1], weight.dtype) if bias else None

    def __call__(self, x):
        self.x = x
        y = x @ self.weight
        if self.bias is not None:
            y += self.bias
        return y

    def backward(self, dy):
        # dW = x^T dy      db = sum dy      dx = dy W^T
        self.grad_weight = self.x.T @ dy
        if self.bias is not None:
            self.grad_bias = dy.sum(axis=0)
        return dy @ self.weight.T


class Sigmoid:
    """``y = 1 / (1 + exp(-x))``."""

    def __call__(self, x):
        # As 1/2 + 1/2 tanh(x/2), which overflows nowhere.
        self.x = x
        self.y = np.tanh(0.5 * x)
        self.y *= 0.5
        self.y += 0.5
        return self.y

    def backward(self, dy):
        # dx = y (1 - y) dy
        return self.y * (1 - self.y) * dy


class Tanh:
    """``y = tanh(x)``."""

    def __call__(self, x):
        self.x = x
        self.y = np.tanh(x)
        return self.y

    def backward(self, dy):
        # dx = (1 - y^2) dy
        return (1 - self.y * self.y) * dy


ACTIVATIONS = {"sigmoid": Sigmoid, "tanh": Tanh}
GAINS = {"sigmoid": 4.0, "tanh": 1.0}
"""Factors on the hidden layers' initial weights, for the slope at zero: 1/4 and 1."""


class Network:
    """Layers in a row, which also keeps the time that training spends in batch normalization.

    Parameters
    ----------
    layers : list

    Attributes
    ----------
    batch_norm_seconds : float
        In forward and backward passes of training so far.
    """

    def __init__(self, layers):
        self.layers = layers
        self.batch_norm_seconds = 0.0

    def __call__(self, x):
        for layer in self.layers:
            start = perf_counter()
            x = layer(x)
            if isinstance(layer, BatchNorm) and layer.training:
                self.batch_norm_seconds += perf_counter() - start
        return x

    def backward(self, dy):
        for layer in reversed(self.layers):
            start = perf_counter()
            dy = layer.backward(dy)
            if isinstance(layer, BatchNorm):
                self.batch_norm_seconds += perf_counter() - start
        return dy

    def train(self, mode=True):
        """Normalize by the batch (True) or by running statistics (False)."""
        for layer in self.layers:
            if isinstance(layer, BatchNorm):
                layer.train(mode)

    def parameters(self):
        """Every parameter as (layer, name): ``layer.name``, its gradient ``layer.grad_name``."""
        return [
            (layer, name)
            for layer in self.layers
            for name in ("weight", "bias", "gamma", "beta")
            if getattr(layer, name, None) is not None
        ]


def deep_network(sizes, *, activation, batch_norm, seed, dtype=np.float32):
    """A fully connected network with Glorot's initial weights, the same for the same seed.

    Parameters
    ----------
    sizes : sequence of int
        Units of the input, of every hidden layer, and of the output.
    activation : {"sigmoid", "tanh"}
        Of the hidden layers.
    batch_norm : bool
        Whether to normalize what goes into every activation.
    seed : int
    dtype : dtype

    Returns
    -------
    Network

    Notes
    -----
    Hidden layers of sigmoids get four times Glorot's weights, as the authors advise: a sigmoid is
    a tanh at half the input and half the output.

    References
    ----------
    Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural networks",
    2010.

    Examples
    --------
    >>> from bncore.demo.network import deep_network
    >>> network = deep_network([64, 100, 10], activation="tanh", batch_norm=True, seed=0)
    >>> [type(layer).__name__ for layer in network.layers]
    ['Linear', 'BatchNorm1d', 'Tanh', 'Linear']
    """
    rng = np.random.default_rng(seed)
    layers = []
    for inputs, units in pairwise(sizes[:-1]):
        weight = glorot(rng, inputs, units, gain=GAINS[activation]).astype(dtype)
        layers.append(Linear(weight, bias=not batch_norm))
        if batch_norm:
            layers.append(BatchNorm1d(units, dtype=dtype))
        layers.append(ACTIVATIONS[activation]())
    layers.append(Linear(glorot(rng, *sizes[-2:]).astype(dtype)))
    return Network(layers)


def glorot(rng, inputs, outputs, gain=1.0):
    """Initial weights that keep the size of signals and gradients from layer to layer."""
    # W ~ U(-a, a)      a = gain sqrt(6 / (inputs + outputs))
    limit = gain * np.sqrt(6 / (inputs + outputs))
    return rng.uniform(-limit, limit, (inputs, outputs))


def cross_entropy(scores, labels):
    """Mean cross entropy of softmax, and its gradient.

    Parameters
    ----------
    scores : (N, classes) ndarray
    labels : (N,) ndarray of int

    Returns
    -------
    loss : float
    dscores : (N, classes) ndarray
    """
    # p = exp(s) / sum exp(s)      loss = -mean log p[label]      ds = (p - [label]) / N
    rows = np.arange(len(labels))
    shifted = scores - scores.max(axis=1, keepdims=True)
    p = np.exp(shifted)
    total = p.sum(axis=1, keepdims=True)
    loss = float(np.mean(np.log(total[:, 0]) - shifted[rows, labels]))
    p /= total
    p[rows, labels] -= 1
    p /= len(labels)
    return loss, p
