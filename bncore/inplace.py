"""The memory-saving layer: y takes the place of x, and the backward pass works from y.

Rota Bulo, Porzi & Kontschieder (2018) keep of a layer its output alone, which the next layer keeps
anyway, and get the normalized input back from it::

    z = activation^-1(y)        x' = (z - beta) / gamma

y is rounded, and what rounding took from it is divided by gamma: x' comes back to within about
``u (|beta| / |gamma| + |x'|)``, u being the type's unit roundoff. Where that loses more bits than
`_BITS` a call is refused before anything is written.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bncore import _backend, _check
from bncore._layout import layout_of, to_kernel
from bncore.functional import _Target, _threads, batch_norm, batch_norm_inference
from bncore.state import Layer

_BITS = {"float64": 20, "float32": 8, "float16": 3, "bfloat16": 3}
"""How many bits x' may lose beside y: ``|beta| / |gamma| + 1`` is at most 2 to the power of it."""

_TINY = {"float64": 2.0**-500, "float32": 2.0**-126, "float16": 2.0**-14, "bfloat16": 2.0**-126}
"""What y of 1 standard deviation may be at least: the smallest normal number, below which u grows.
In float64 products of gamma and gamma must not vanish either."""

_GRADIENTS = ("x", "gamma", "beta")


class InPlaceBatchNorm(Layer):
    """Batch normalization that overwrites x with y and keeps nothing else of its size.

    `BatchNorm` keeps x for the backward pass beside y, which the next layer keeps. This layer keeps
    y alone and computes what it needs of x from it, so that a network takes about half the memory.

    Parameters
    ----------
    num_features, axis, eps, momentum, affine, track_running_stats, dtype
        As in `BatchNorm`.
    ddof, single_value, nan_policy
        As in `BatchNorm`.
    activation : None or ("leaky_relu", slope)
        Applied to the output; slope must be between 2^-100 and 2^100, so that it can be inverted.

    Attributes
    ----------
    gamma, beta, running_mean, running_var, num_batches_tracked, grad_gamma, grad_beta, training,
    update
        As in `BatchNorm`.

    Notes
    -----
    y is rounded to x's type, so x' comes back from it with an error of about ``u (|beta| / |gamma|
    + |x'|)`` where u is half the spacing of numbers at 1, and dx takes over the relative error. In
    training a channel must have

    - ``|beta| / |gamma| + 1`` of at most 2^20 in float64, 2^8 in float32, 2^3 in float16 and
      bfloat16: x' is then right to 1e-10, 2e-5, 4e-3 and 3e-2, and with an activation to three
      times the first two; and
    - ``|gamma| min(slope, 1)`` of at least the smallest normal number, 2^-14 in float16 and 2^-126
      in float32 and bfloat16; in float64 2^-500, and gamma of at most 2^500.

    Else the call is refused. Values of y beyond the type's range are infinite and do not come back.

    The layer keeps y, not a copy of it: if y is changed before `backward`, the gradient is another.

    The kernels bring z back as they read y: for large arrays the backward pass takes about as long
    as that of `BatchNorm`, for small ones several times as long, as more is checked. An array that
    they can not read as it lies, or a dy that lies otherwise than y, is copied.

    References
    ----------
    Rota Bulo, Porzi & Kontschieder, "In-place activated batchnorm for memory-optimized training of
    DNNs", 2018.

    Examples
    --------
    >>> import bncore, numpy as np
    >>> layer = bncore.InPlaceBatchNorm(1, activation=("leaky_relu", 0.1))
    >>> x = np.array([[0.0], [2.0]], np.float32)
    >>> y = layer(x)
    >>> y is x, y.round(3).ravel()
    (True, array([-0.1,  1. ], dtype=float32))
    >>> dx = layer.backward(np.ones_like(y))
    >>> layer.grad_gamma.round(3), layer.grad_beta.round(3)
    (array([0.9], dtype=float32), array([1.1], dtype=float32))
    """

    def __call__(self, x):
        """Normalize ``x`` and write the result over it.

        Parameters
        ----------
        x : ndarray
            Writeable, in native byte order, no two elements at one place.

        Returns
        -------
        ndarray
            x.

        Raises
        ------
        ValueError, TypeError
            In training where gamma is too small to get x back, and where there is one value per
            channel and ``single_value`` is "raise"; and for an x that can not be written to. x and
            the layer are as they were then.
        """
        values = self._overwritable(x)
        if not (self.training or not self.track_running_stats):
            return self._normalize_fixed(x)
        if self.training and values == 1 and not self._takes_single(x):
            return self._normalize_fixed(x)
        gamma, beta = self._parameters()
        _check_invertible(gamma, beta, self.activation, x.dtype)
        move = self._prepared(values, None, x)
        _, saved = batch_norm(
            x, self.gamma, self.beta, axis=self.axis, eps=self.eps, activation=self.activation,
            out=x,
        )  # fmt: skip
        if move is not None:
            self._move(saved, move)
        self._forward = _Kept(
            x, x.shape, saved.axes, gamma, beta, saved.inv_std, self.activation, True
        )
        return x

    def backward(self, dy, *, wrt=None, out=None):
        """The gradient of the latest call's input; sets ``grad_gamma`` and ``grad_beta``.

        Parameters
        ----------
        dy : array_like
            Gradient of the loss with respect to the output, in x's shape and dtype.
        wrt : str or sequence of str, optional
            Which gradients to compute, of "x", "gamma" and "beta"; all where not given. The others
            are None.
        out : ndarray, optional
            Takes dx; may be dy, or y, after which there is no other backward pass.

        Returns
        -------
        ndarray
            None where wrt leaves out "x".

        Raises
        ------
        ValueError, TypeError
            Before the first call, after a pass over y; after a call in evaluation where gamma is
            too small to get x back; and for a dy or out that does not fit. Nothing has been
            written then.
        """
        kept = self._forward
        if kept is None:
            raise ValueError("backward needs a call of the layer before it, whose y is still there")
        if kept.y.shape != kept.shape:
            raise ValueError(
                f"y must keep its shape {kept.shape} until the backward pass, got {kept.y.shape}"
            )
        dy = _check.same_shape(dy, "dy", kept.y)
        wanted = _check.wanted(wrt, _GRADIENTS, _GRADIENTS, out)
        parameters = {"gamma": self.gamma, "beta": self.beta}
        _check.output(out, kept.y, in_place={"dy": dy, "y": kept.y}, read=parameters)
        _check_invertible(kept.gamma, kept.beta, kept.activation, kept.y.dtype)
        dx = out
        if dx is None and "x" in wanted:
            dx = np.empty_like(kept.y, subok=False)
        sum_dz, sum_dz_xhat = _write_gradient(dy, kept, dx)
        if dx is not None and np.shares_memory(dx, kept.y):
            self._forward = None
        self.grad_beta = _like(self.beta, sum_dz) if "beta" in wanted else None
        self.grad_gamma = _like(self.gamma, sum_dz_xhat) if "gamma" in wanted else None
        return dx

    def _activation(self, activation):
        code, slope, _ = _check.activation(activation)
        if code == 0 or (code == 2 and 2.0**-100 <= slope <= 2.0**100):
            return activation
        raise ValueError(
            "activation must be None or ('leaky_relu', slope) with a slope between 2^-100 and "
            f"2^100, which can be inverted, got {activation!r}"
        )

    def _overwritable(self, x):
        """The number of values per channel of an x that can be written to."""
        if not isinstance(x, np.ndarray):
            raise TypeError(f"x must be an ndarray, which is overwritten, got {type(x).__name__}")
        self._activation(self.activation)
        _check.output(x, self._checked(_check.input_array(x)), in_place={}, read={}, name="x")
        return x.size // self._channels if x.size else 0

    def _normalize_fixed(self, x):
        """The call by the running statistics; gamma is looked at when it comes to the gradient."""
        self._check_given_statistics()
        gamma, beta = self._parameters()
        eps = _check.positive(self.eps, "eps")
        with np.errstate(all="ignore"):
            inv_std = 1 / np.sqrt(np.asarray(self.running_var, np.float64) + eps)
        axes = _check.channel_axes(self.axis, x.ndim)
        kept = _Kept(x, x.shape, axes, gamma, beta, inv_std, self.activation, False)
        batch_norm_inference(
            x, self.running_mean, self.running_var, self.gamma, self.beta, axis=self.axis,
            eps=eps, activation=self.activation, out=x,
        )  # fmt: skip
        self._forward = kept
        return x

    def _parameters(self):
        """gamma and beta as float64 copies, which the backward pass needs as they are now."""
        gamma = _check.per_channel(self.gamma, "gamma", self.shape)
        beta = _check.per_channel(self.beta, "beta", self.shape)
        return (
            np.ones(self.shape) if gamma is None else gamma.astype(np.float64),
            np.zeros(self.shape) if beta is None else beta.astype(np.float64),
        )


class _Kept(NamedTuple):
    """What a call keeps for `InPlaceBatchNorm.backward`."""

    y: np.ndarray
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    gamma: np.ndarray
    beta: np.ndarray
    inv_std: np.ndarray
    activation: tuple | None
    by_batch: bool
    """Whether the statistics were the batch's, so that the gradient goes through them."""


def _check_invertible(gamma, beta, activation, dtype):
    """Refuse channels whose x' does not come back from y; see `InPlaceBatchNorm`."""
    largest_ratio = 2.0 ** _BITS[dtype.name] - 1
    smallest = _TINY[dtype.name] / (1 if activation is None else min(1, activation[1]))
    size = np.abs(gamma)
    with np.errstate(invalid="ignore"):
        back = (np.abs(beta) <= largest_ratio * size) & (size >= smallest) & (size <= 2.0**500)
    if not back.all():
        bad = [
            str(*index) if len(index) == 1 else str(tuple(index))
            for index in np.argwhere(~back).tolist()
        ]
        raise ValueError(
            f"gamma must be at least |beta| / {largest_ratio:.0f} and {smallest:.3g} in size "
            f"to get x back from y in {dtype.name}; got {gamma[~back][0]:.3g} with a beta of "
            f"{beta[~back][0]:.3g} in channel{'s' * (len(bad) > 1)} "
            + ", ".join(bad[:8] + ["..."] * (len(bad) > 8))
        )


def _write_gradient(dy, kept, dx):
    """Write dx, where there is one; returns the gradients of beta and gamma.

    ::

        dx = gamma inv_std (dz - (sum dz + x' sum dz x') / n)        x' = (z - beta) / gamma

    The statistics of z stand for those of x: mean beta, 1 / |gamma| for inv_std. That is x' but for
    gamma's sign, which x' times a sum of x' does not show. The kernels get z back from y.
    """
    y = kept.y
    slope = 1.0 if kept.activation is None else float(kept.activation[1])
    size = np.abs(kept.gamma)
    beta, inv_std, scale = (
        array.reshape(-1) for array in (kept.beta, 1 / size, kept.gamma * size * kept.inv_std)
    )
    layout = layout_of(y, kept.axes)
    arrays = to_kernel(dy, layout), to_kernel(y, layout)
    sums = np.empty((2, size.size))
    gradient, threads = _backend.active.gradient, _threads(y)
    gradient.reduce(*arrays, beta, None, inv_std, slope, sums, threads)
    if dx is not None and y.size:
        through = sums if kept.by_batch else np.zeros_like(sums)
        target = _Target(dx, y, layout)
        gradient.apply(
            *arrays, beta, None, inv_std, scale, slope, through, y.size / size.size,
            target.kernel_array, threads,
        )  # fmt: skip
        target.finish()
    sum_dz, sum_dz_xhat = sums.reshape((2, *size.shape))
    return sum_dz, np.sign(kept.gamma) * sum_dz_xhat


def _like(parameter, gradient):
    """A gradient in its parameter's type; None where there is none."""
    if parameter is None:
        return None
    with np.errstate(all="ignore"):
        return gradient.astype(np.asarray(parameter).dtype.newbyteorder("="))
