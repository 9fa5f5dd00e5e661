"""The functions: validate the arguments, allocate the results, call the kernels.

Each function first offers its arguments to the kernels' ``*_plain`` shortcut, which takes
contiguous float32 and float64 arrays with contiguous parameters and answers None to the rest.
What it declines goes the long way: every argument is checked before anything is written, arrays
are brought into the kernels' ``(N, C, S)`` form (see `bncore._layout`), and results are written
to the caller's arrays last.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bncore import _backend, _check, _layout
from bncore._config import get_num_threads
from bncore._weights import Weights, weights_of
from bncore.moments import Moments
from bncore.reference import NO_ACTIVATION

_GRADIENTS = ("x", "gamma", "beta", "residual")

_SERIAL_SIZE = 32768
"""Elements up to which starting a second thread costs more than it brings."""


class Gradients(NamedTuple):
    """What a backward pass returns; None stands for what there is not or was not asked for.

    Attributes
    ----------
    dx : ndarray or None
        Gradient of the input, in its shape and dtype.
    dgamma, dbeta : ndarray or None
        Gradients of the parameters, in their shape and dtype.
    dresidual : ndarray or None
        Gradient of the residual, in its shape and dtype.
    """

    dx: np.ndarray | None
    dgamma: np.ndarray | None
    dbeta: np.ndarray | None
    dresidual: np.ndarray | None = None


class InferenceGradients(NamedTuple):
    """What a backward pass with fixed statistics returns; None where `Gradients` has it too.

    Attributes
    ----------
    dx, dgamma, dbeta, dresidual : ndarray or None
        As in `Gradients`.
    dmean, dvar : ndarray or None
        Gradients of the statistics, in their shape and dtype.
    """

    dx: np.ndarray | None
    dgamma: np.ndarray | None
    dbeta: np.ndarray | None
    dresidual: np.ndarray | None
    dmean: np.ndarray | None
    dvar: np.ndarray | None


class Reduced(NamedTuple):
    """The two sums of a backward pass; add them over the parts of a batch.

    Attributes
    ----------
    sum_dy, sum_dy_xhat : ndarray of float64
        ``sum dy`` and ``sum dy x'`` per channel.
    """

    sum_dy: np.ndarray
    sum_dy_xhat: np.ndarray


class Saved:
    """What `batch_norm` keeps for `batch_norm_backward`.

    Attributes
    ----------
    mean, var, inv_std, count : ndarray of float64
        Batch statistics in the shape of gamma: mean, biased variance, ``1 / sqrt(var + eps)`` and
        the number of values per channel.
    x, gamma, beta : ndarray or None
        The arrays of the forward pass, not copied: change them and the gradient changes.
        ``x`` is None after a pass in place, which has overwritten it.
    axes : tuple of int
        Channel axes.
    eps : float
    values : float
        The count as one number; the sum of the weights where there were some.
    stats : (4, C) ndarray of float64
        Rows mean, the mean's rounding error, variance and inv_std.
    extras : Extras
        What else the forward pass was given.
    """

    __slots__ = ("x", "gamma", "beta", "axes", "eps", "values", "stats", "extras", "_shape")

    def __init__(self, x, gamma, beta, axes, eps, values, stats, shape, extras):
        self.x = x
        self.gamma = gamma
        self.beta = beta
        self.axes = axes
        self.eps = eps
        self.values = values
        self.stats = stats
        self.extras = extras
        self._shape = shape

    @property
    def mean(self):
        return self.stats[0].reshape(self._shape)

    @property
    def var(self):
        return self.stats[2].reshape(self._shape)

    @property
    def inv_std(self):
        return self.stats[3].reshape(self._shape)

    @property
    def count(self):
        return np.full(self._shape, self.values)


class Extras(NamedTuple):
    """What a forward pass was given beyond the plain arguments, and what it kept of them.

    Attributes
    ----------
    activation : (int, float, float)
        In the kernels' form.
    had_residual : bool
    bits : ndarray of uint8 or None
        Where there was a residual and an activation: a bit for each element, whether the
        activation hands its gradient on. Without a residual x tells.
    weights : Weights or None
    """

    activation: tuple[int, float, float]
    had_residual: bool
    bits: np.ndarray | None
    weights: Weights | None


NO_EXTRAS = Extras(NO_ACTIVATION, False, None, None)


def batch_norm(
    x, gamma=None, beta=None, *, axis=1, eps=1e-5,
    activation=None, residual=None, mask=None, sample_weight=None, out=None,
):  # fmt: skip
    """Normalize a batch by its own statistics, per channel.

    ::

        mean = sum w x / sum w        var = sum w (x - mean)^2 / sum w
        y = activation(gamma (x - mean) / sqrt(var + eps) + beta + residual)

    with the sums over all axes but the channels', and all weights w 1 where none are given.

    Parameters
    ----------
    x : array_like
        Of float16, bfloat16, float32 or float64, any strides, at least one dimension.
    gamma, beta : array_like, optional
        Scale and offset, one value per channel; 1 and 0 where not given.
    axis : int or tuple of int
        The axis, or axes, that keep statistics of their own, whose sizes in the order of x are the
        shape of everything per channel.
    eps : float
        Added to the variance; any positive value is honoured as it is.
    activation : None, "relu", ("leaky_relu", slope) or ("clip", low, high)
        Applied to the result.
    residual : array_like, optional
        Added before the activation; shape and dtype of x.
    mask : array_like of bool, optional
        True where x counts; broadcastable to x with channel axes of length 1. What stands
        elsewhere, be it NaN, has no influence; y and dx are 0 there.
    sample_weight : array_like, optional
        Weight of each position in the statistics, not negative; broadcastable as mask is.
    out : ndarray, optional
        Takes the result; shape and dtype of x. ``out=x`` normalizes in place, after which there
        is no backward pass.

    Returns
    -------
    y : ndarray
        Shape, dtype and memory order of x. A channel of equal values gives beta exactly.
    saved : Saved
        Statistics, and what `batch_norm_backward` needs.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came. Nothing has been written then.

    References
    ----------
    Ioffe & Szegedy, "Batch normalization: accelerating deep network training by reducing internal
    covariate shift", 2015, algorithm 1.

    Examples
    --------
    >>> import bncore, numpy as np
    >>> x = np.array([[1.0, 10.0], [3.0, 10.0]])
    >>> y, saved = bncore.batch_norm(x, eps=1e-10)
    >>> y.round(6)
    array([[-1.,  0.],
           [ 1.,  0.]])
    >>> saved.mean, saved.var
    (array([ 2., 10.]), array([1., 0.]))

    A residual and an activation in the same pass; statistics of what a mask leaves, or weighted:

    >>> bncore.batch_norm(x, residual=np.ones_like(x), activation="relu", eps=1e-10)[0].round(6)
    array([[0., 1.],
           [2., 1.]])
    >>> padded = np.array([[1.0], [3.0], [np.nan]])
    >>> bncore.batch_norm(padded, mask=~np.isnan(padded), eps=1e-10)[0].round(6).ravel()
    array([-1.,  1.,  0.])
    >>> bncore.batch_norm(x, sample_weight=[[3], [1]])[1].mean
    array([ 1.5, 10. ])

    Half precision has wide statistics too, and results may go to where x is:

    >>> h = np.array([[6e4], [-6e4]], np.float16)
    >>> y, saved = bncore.batch_norm(h, out=h)
    >>> y is h, h.ravel(), saved.var
    (True, array([ 1., -1.], dtype=float16), array([3.6e+09]))
    """
    if mask is None and sample_weight is None:
        epilogue = NO_ACTIVATION if activation is None else _check.activation(activation)
        plain = _backend.active.normalization.forward_plain(
            x, gamma, beta, residual, epilogue, axis, eps, out, get_num_threads()
        )
        if plain is not None:
            y, stats, axis, values, in_place, bits = plain
            kept, extras = None if in_place else x, NO_EXTRAS
            if activation is not None or residual is not None:
                extras = Extras(epilogue, residual is not None, bits, None)
            return y, Saved(kept, gamma, beta, (axis,), eps, values, stats, stats.shape[1:], extras)

    x = _check.input_array(x)
    axes = _check.channel_axes(axis, x.ndim)
    shape = tuple(x.shape[i] for i in axes)
    gamma = _check.per_channel(gamma, "gamma", shape)
    beta = _check.per_channel(beta, "beta", shape)
    eps = _check.positive(eps, "eps")
    activation = _check.activation(activation)
    residual = None if residual is None else _check.same_shape(residual, "residual", x)
    mask = _check.mask(mask, x, axes)
    sample_weight = _check.sample_weight(sample_weight, x, axes)
    _check.output(
        out, x, in_place={"x": x, "residual": residual}, read={"gamma": gamma, "beta": beta}
    )

    layout = _layout.layout_of(x, axes)
    weights = weights_of(mask, sample_weight, layout)
    bits = None
    if residual is not None and activation != NO_ACTIVATION:
        bits = np.empty(_layout.gate_bytes(layout.shape), np.uint8)
    stats = np.empty((4, layout.shape[1]))
    target = _Target(out, x, layout)
    _backend.active.normalization.forward(
        _layout.to_kernel(x, layout), weights, _parameter(gamma), _parameter(beta),
        _optional(residual, layout), activation, eps, target.kernel_array, bits, stats,
        _threads(x),
    )  # fmt: skip
    values = float(layout.shape[0] * layout.shape[2]) if weights is None else weights.given_total
    extras = Extras(activation, residual is not None, bits, weights)
    kept = None if out is not None and _check.coincide(out, x) else x
    return target.finish(), Saved(kept, gamma, beta, axes, eps, values, stats, shape, extras)


def batch_norm_backward(dy, saved, *, wrt=None, out=None):
    """Gradients of `batch_norm`, through the statistics.

    ::

        dz = activation'(z) dy        x' = (x - mean) / sqrt(var + eps)
        dbeta = sum dz        dgamma = sum dz x'        dresidual = dz
        dx = gamma / sqrt(var + eps) (dz - w (dbeta + x' dgamma) / sum w)

    with all weights w 1 where none were given.

    Parameters
    ----------
    dy : array_like
        Gradient of the loss with respect to y, in x's shape and dtype.
    saved : Saved
        From `batch_norm`.
    wrt : str or sequence of str, optional
        Which gradients to compute, of "x", "gamma", "beta" and "residual"; all that there are
        where not given. The others are None, and cost nothing where they alone need it.
    out : ndarray, optional
        Takes dx; may be dy or x themselves.

    Returns
    -------
    Gradients
        dx, dgamma, dbeta, dresidual.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came. Nothing has been written then.

    References
    ----------
    Ioffe & Szegedy, 2015, section 3.

    Examples
    --------
    >>> import bncore, numpy as np
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, saved = bncore.batch_norm(x, np.array([2.0]), np.array([0.0]))
    >>> g = bncore.batch_norm_backward(np.ones_like(x), saved)
    >>> g.dbeta
    array([3.])
    >>> bool(abs(g.dx).max() < 1e-12)
    True

    Only what is needed, or dx in dy's place:

    >>> g = bncore.batch_norm_backward(np.ones_like(x), saved, wrt=("gamma", "beta"))
    >>> g.dx is None, g.dbeta
    (True, array([3.]))
    >>> dy = np.array([[1.0], [0.0], [0.0]])
    >>> bncore.batch_norm_backward(dy, saved, out=dy).dx is dy
    True
    """
    if not isinstance(saved, Saved):
        raise TypeError(f"saved must come from batch_norm, got {type(saved).__name__}")
    if saved.x is None:
        raise ValueError("saved has no x: an earlier pass overwrote it (out=x)")
    wanted = _GRADIENTS if wrt is None else _check.wanted(wrt, _GRADIENTS, _GRADIENTS, out)
    overwrites = isinstance(out, np.ndarray) and np.shares_memory(out, saved.x)
    extras = saved.extras
    if extras.weights is None and "x" in wanted:
        plain = _backend.active.gradient.backward_plain(
            dy, saved.x, saved.stats, saved.gamma, saved.beta, extras.bits, extras.activation,
            saved.axes, extras.had_residual and "residual" in wanted, out, get_num_threads(),
        )  # fmt: skip
        if plain is not None:
            saved.x = None if overwrites else saved.x
            dx, dgamma, dbeta, dresidual = plain
            return Gradients(
                dx, dgamma if "gamma" in wanted else None, dbeta if "beta" in wanted else None,
                dresidual,
            )  # fmt: skip

    x, gamma, beta = saved.x, saved.gamma, saved.beta
    dy = _check.same_shape(dy, "dy", x)
    _check.output(
        out, x, in_place={"dy": dy, "x": x},
        read={"gamma": gamma, "beta": beta, "saved's statistics": saved.stats},
    )  # fmt: skip
    layout = _layout.layout_of(x, saved.axes)
    target = _Target(out, x, layout) if "x" in wanted else None
    residual = _Target(None, x, layout) if extras.had_residual and "residual" in wanted else None
    dgamma = _gradient_like(gamma) if "gamma" in wanted else None
    dbeta = _gradient_like(beta) if "beta" in wanted else None
    summing = target is not None or dgamma is not None or dbeta is not None
    sums = np.empty((2, layout.shape[1])) if summing else None
    _backend.active.gradient.backward(
        _layout.to_kernel(dy, layout), _layout.to_kernel(x, layout), extras.weights, saved.stats,
        _parameter(gamma), _parameter(beta), extras.bits, extras.activation,
        saved.values if extras.weights is None else extras.weights.total,
        _kernel_array(target), _kernel_array(residual), sums, _threads(x),
    )  # fmt: skip
    if summing:
        _fill(dgamma, sums[1])
        _fill(dbeta, sums[0])
    saved.x = None if overwrites else saved.x
    return Gradients(_finished(target), dgamma, dbeta, _finished(residual))


def batch_norm_inference(
    x, mean, var, gamma=None, beta=None, *, axis=1, eps=1e-5,
    activation=None, residual=None, out=None,
):  # fmt: skip
    """Normalize by given statistics.

    ::

        y = activation(gamma (x - mean) / sqrt(var + eps) + beta + residual)

    Parameters
    ----------
    x : array_like
        Of float16, bfloat16, float32 or float64, any strides, at least one dimension.
    mean, var : array_like
        Statistics, one value per channel, of any float dtype; no variance below zero.
    gamma, beta : array_like, optional
        Scale and offset, one value per channel; 1 and 0 where not given.
    axis : int or tuple of int
        The channel axis or axes.
    eps : float
        Added to the variance, positive.
    activation : None, "relu", ("leaky_relu", slope) or ("clip", low, high)
        Applied to the result.
    residual : array_like, optional
        Added before the activation; shape and dtype of x.
    out : ndarray, optional
        Takes the result; shape and dtype of x. ``out=x`` normalizes in place.

    Returns
    -------
    ndarray
        Shape, dtype and memory order of x.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came. Nothing has been written then.

    Examples
    --------
    >>> import bncore, numpy as np
    >>> x = np.array([[1.0, 10.0], [3.0, 10.0]])
    >>> bncore.batch_norm_inference(x, np.array([1.0, 9.0]), np.array([4.0, 1.0]), eps=1e-12)
    array([[0., 1.],
           [1., 1.]])
    """
    epilogue = NO_ACTIVATION if activation is None else _check.activation(activation)
    y = _backend.active.normalization.normalize_plain(
        x, mean, var, gamma, beta, residual, epilogue, axis, eps, out, get_num_threads()
    )
    if y is not None:
        return y

    x = _check.input_array(x)
    axes = _check.channel_axes(axis, x.ndim)
    shape = tuple(x.shape[i] for i in axes)
    mean, var, inv_std, gamma, beta = _fixed_statistics(mean, var, gamma, beta, eps, shape)
    activation = _check.activation(activation)
    residual = None if residual is None else _check.same_shape(residual, "residual", x)
    _check.output(
        out, x, in_place={"x": x, "residual": residual},
        read={"gamma": gamma, "beta": beta, "mean": mean, "var": var},
    )  # fmt: skip
    layout = _layout.layout_of(x, axes)
    target = _Target(out, x, layout)
    _backend.active.normalization.normalize(
        _layout.to_kernel(x, layout), _parameter(mean), None, inv_std, _parameter(gamma),
        _parameter(beta), _optional(residual, layout), activation, target.kernel_array,
        _threads(x),
    )  # fmt: skip
    return target.finish()


def batch_norm_inference_backward(
    dy, x, mean, var, gamma=None, beta=None, *, axis=1, eps=1e-5,
    activation=None, residual=None, wrt=None, out=None,
):  # fmt: skip
    """Gradients of `batch_norm_inference`, the statistics held fixed.

    ::

        dz = activation'(z) dy        x' = (x - mean) / sqrt(var + eps)
        dx = gamma / sqrt(var + eps) dz        dresidual = dz
        dbeta = sum dz        dmean = -gamma / sqrt(var + eps) sum dz
        dgamma = sum dz x'    dvar = -gamma / (2 (var + eps)) sum dz x'

    Parameters
    ----------
    dy : array_like
        Gradient of the loss with respect to y, in x's shape and dtype.
    x, mean, var, gamma, beta, axis, eps, activation, residual
        As in `batch_norm_inference`.
    wrt : str or sequence of str, optional
        Which gradients to compute, of "x", "gamma", "beta", "residual", "mean" and "var"; all that
        there are but the last two where not given. The others are None and cost nothing.
    out : ndarray, optional
        Takes dx; may be dy or x themselves.

    Returns
    -------
    InferenceGradients
        dx, dgamma, dbeta, dresidual, dmean, dvar.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came. Nothing has been written then.

    Examples
    --------
    >>> import bncore, numpy as np
    >>> one = np.ones(1)
    >>> g = bncore.batch_norm_inference_backward(np.ones((3, 1)), np.zeros((3, 1)), 0 * one,
    ...                                          4 * one, one, eps=1e-12, wrt=("x", "mean"))
    >>> g.dx.ravel(), g.dmean
    (array([0.5, 0.5, 0.5]), array([-1.5]))
    """
    x = _check.input_array(x)
    axes = _check.channel_axes(axis, x.ndim)
    shape = tuple(x.shape[i] for i in axes)
    dy = _check.same_shape(dy, "dy", x)
    mean, var, inv_std, gamma, beta = _fixed_statistics(mean, var, gamma, beta, eps, shape)
    activation = _check.activation(activation)
    residual = None if residual is None else _check.same_shape(residual, "residual", x)
    wanted = _check.wanted(wrt, (*_GRADIENTS, "mean", "var"), _GRADIENTS, out)
    _check.output(
        out, x, in_place={"dy": dy, "x": x, "residual": residual},
        read={"gamma": gamma, "beta": beta, "mean": mean, "var": var},
    )  # fmt: skip
    layout = _layout.layout_of(x, axes)
    target = _Target(out, x, layout) if "x" in wanted else None
    per_channel = {"gamma": gamma, "beta": beta, "mean": mean, "var": var}
    gradients = {
        name: _gradient_like(array) if name in wanted else None
        for name, array in per_channel.items()
    }
    summing = any(gradient is not None for gradient in gradients.values())
    sums = np.empty((2, layout.shape[1])) if summing else None
    kernel_x, kernel_dz = _layout.to_kernel(x, layout), _layout.to_kernel(dy, layout)
    given = _parameter(mean), inv_std, _parameter(gamma), _parameter(beta)
    scale = inv_std if gamma is None else given[2] * inv_std
    factors = np.stack([-scale, -0.5 * scale * inv_std])
    dresidual = None
    if residual is not None:
        # What was added shifts the activation's input: its gradient comes first, by itself.
        dz = _Target(None, x, layout)
        _backend.active.gradient.activation_backward(
            kernel_dz, kernel_x, None, given[0], None, *given[1:],
            _layout.to_kernel(residual, layout), None, activation, dz.kernel_array, _threads(x),
        )  # fmt: skip
        kernel_dz, activation = dz.kernel_array, NO_ACTIVATION
        dresidual = dz.finish() if "residual" in wanted else None
    _backend.active.gradient.fixed_backward(
        kernel_dz, kernel_x, *given, activation, _kernel_array(target), sums, _threads(x)
    )
    if summing:
        _fill_fixed(gradients, sums, factors)
    return InferenceGradients(
        _finished(target), gradients["gamma"], gradients["beta"], dresidual, gradients["mean"],
        gradients["var"],
    )  # fmt: skip


def moments(x, *, axis=1, mask=None, sample_weight=None):
    """Count, mean and sum of squared deviations of each channel.

    Parameters
    ----------
    x : array_like
        Of float16, bfloat16, float32 or float64, any strides, at least one dimension.
    axis : int or tuple of int
        The channel axis or axes.
    mask, sample_weight : array_like, optional
        As in `batch_norm`.

    Returns
    -------
    Moments
        Add two with ``+`` for the moments of both parts together.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came.

    Examples
    --------
    >>> import bncore, numpy as np
    >>> m = bncore.moments(np.array([[1.0], [2.0], [6.0]]))
    >>> m.count, m.mean, m.m2
    (array([3.]), array([3.]), array([14.]))
    """
    x = _check.input_array(x)
    axes = _check.channel_axes(axis, x.ndim)
    shape = tuple(x.shape[i] for i in axes)
    mask = _check.mask(mask, x, axes)
    sample_weight = _check.sample_weight(sample_weight, x, axes)
    layout = _layout.layout_of(x, axes)
    weights = weights_of(mask, sample_weight, layout)
    stats = np.empty((3, layout.shape[1]))
    _backend.active.statistics.moments(
        _layout.to_kernel(x, layout), weights, stats, _threads(x)
    )
    mean, mean_lo, m2 = stats.reshape((3, *shape))
    if weights is None:
        return Moments(np.full(shape, layout.shape[0] * layout.shape[2]), mean, m2, mean_lo)
    return Moments(np.full(shape, weights.given_total), mean, m2 * weights.unit, mean_lo)


def backward_reduce(dy, x, mean, inv_std, *, axis=1):
    """The two sums of a backward pass, to be added over the parts of a batch.

    Parameters
    ----------
    dy : array_like
        Gradient of the loss with respect to y, in x's shape and dtype.
    x : array_like
        Input of the forward pass.
    mean, inv_std : array_like
        Statistics of the whole batch, one value per channel.
    axis : int or tuple of int
        The channel axis or axes.

    Returns
    -------
    Reduced
        ``sum dy`` and ``sum dy (x - mean) inv_std``.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came.

    Examples
    --------
    >>> import bncore, numpy as np
    >>> x = np.array([[1.0], [3.0]])
    >>> bncore.backward_reduce(x, x, np.array([2.0]), np.array([1.0]))
    Reduced(sum_dy=array([4.]), sum_dy_xhat=array([2.]))
    """
    x = _check.input_array(x)
    axes = _check.channel_axes(axis, x.ndim)
    shape = tuple(x.shape[i] for i in axes)
    dy = _check.same_shape(dy, "dy", x)
    mean = _required(mean, "mean", shape)
    inv_std = _required(inv_std, "inv_std", shape)
    layout = _layout.layout_of(x, axes)
    sums = np.empty((2, layout.shape[1]))
    _backend.active.gradient.reduce(
        _layout.to_kernel(dy, layout), _layout.to_kernel(x, layout), _parameter(mean), None,
        _parameter(inv_std), sums, _threads(x),
    )  # fmt: skip
    return Reduced(*sums.reshape((2, *shape)))


def backward_apply(dy, x, mean, inv_std, gamma, sum_dy, sum_dy_xhat, count, *, axis=1, out=None):
    """The gradient of the input from the sums over the whole batch.

    ::

        dx = gamma inv_std (dy - (sum_dy + x' sum_dy_xhat) / count)

    Parameters
    ----------
    dy, x : array_like
        This part of the batch.
    mean, inv_std : array_like
        Statistics of the whole batch, one value per channel.
    gamma : array_like or None
    sum_dy, sum_dy_xhat : array_like
        From `backward_reduce`, added over the parts.
    count : float or array_like
        Values per channel in the whole batch.
    axis : int or tuple of int
        The channel axis or axes.
    out : ndarray, optional
        Takes dx; may be dy or x themselves.

    Returns
    -------
    dx : ndarray
        Shape, dtype and memory order of x.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came. Nothing has been written then.

    Examples
    --------
    >>> import bncore, numpy as np
    >>> x = np.array([[1.0], [3.0]])
    >>> bncore.backward_apply(x, x, np.array([2.0]), np.array([1.0]), None, np.array([4.0]),
    ...                       np.array([2.0]), 2)
    array([[0.],
           [0.]])
    """
    x = _check.input_array(x)
    axes = _check.channel_axes(axis, x.ndim)
    shape = tuple(x.shape[i] for i in axes)
    dy = _check.same_shape(dy, "dy", x)
    mean = _required(mean, "mean", shape)
    inv_std = _required(inv_std, "inv_std", shape)
    gamma = _check.per_channel(gamma, "gamma", shape)
    sums = np.stack([
        _parameter(_required(sum_dy, "sum_dy", shape)),
        _parameter(_required(sum_dy_xhat, "sum_dy_xhat", shape)),
    ])  # fmt: skip
    count = _count(count, shape, x.size)
    _check.output(
        out, x, in_place={"dy": dy, "x": x},
        read={"mean": mean, "inv_std": inv_std, "gamma": gamma},
    )  # fmt: skip
    layout = _layout.layout_of(x, axes)
    target = _Target(out, x, layout)
    _backend.active.gradient.apply(
        _layout.to_kernel(dy, layout), _layout.to_kernel(x, layout), _parameter(mean), None,
        _parameter(inv_std), _parameter(gamma), sums, count, target.kernel_array, _threads(x),
    )  # fmt: skip
    return target.finish()


class _Target:
    """Where a kernel writes: the caller's array itself where its layout allows, else a copy."""

    def __init__(self, out, x, layout):
        self._layout = layout
        if out is None:
            out = np.empty_like(x, x.dtype.newbyteorder("="), subok=False)
        self._out = out
        self._direct = _layout.has_view(out, layout)
        self.kernel_array = (
            _layout.to_kernel(out, layout) if self._direct else np.empty(layout.shape, out.dtype)
        )

    def finish(self):
        """The caller's array, filled."""
        if not self._direct:
            self._out[...] = _layout.from_kernel(self.kernel_array, self._layout, self._out.shape)
        return self._out


def _optional(array, layout):
    return None if array is None else _layout.to_kernel(array, layout)


def _kernel_array(target):
    return None if target is None else target.kernel_array


def _finished(target):
    return None if target is None else target.finish()


def _threads(x):
    return 1 if x.size <= _SERIAL_SIZE else get_num_threads()


def _parameter(array):
    """A per-channel array as the kernels take it: float64, contiguous, flat."""
    return None if array is None else _layout.dense(array, np.float64).reshape(-1)


def _gradient_like(parameter):
    """Room for the gradient of a parameter, in its shape and dtype; None where there is none."""
    if parameter is None:
        return None
    return np.empty(parameter.shape, parameter.dtype.newbyteorder("="))


def _fill(gradient, sums):
    if gradient is not None:
        with np.errstate(all="ignore"):  # a sum beyond the parameter's type is infinite there
            gradient[...] = sums.reshape(gradient.shape)


def _fill_fixed(gradients, sums, factors):
    """The gradients per channel where the statistics were given; the sums are used up."""
    _fill(gradients["beta"], sums[0])
    _fill(gradients["gamma"], sums[1])
    sums *= factors
    _fill(gradients["mean"], sums[0])
    _fill(gradients["var"], sums[1])


def _required(value, name, shape):
    if value is None:
        raise TypeError(f"{name} must be an array of shape {shape}, got None")
    return _check.per_channel(value, name, shape)


def _fixed_statistics(mean, var, gamma, beta, eps, shape):
    """Checked mean, var, ``1 / sqrt(var + eps)``, gamma and beta."""
    mean = _required(mean, "mean", shape)
    var = _required(var, "var", shape)
    gamma = _check.per_channel(gamma, "gamma", shape)
    beta = _check.per_channel(beta, "beta", shape)
    eps = _check.positive(eps, "eps")
    if (var < 0).any():
        raise ValueError(f"var must not be negative, got {np.asarray(var, np.float64).min()}")
    return mean, var, 1 / np.sqrt(_parameter(var) + eps), gamma, beta


def _count(count, shape, size) -> float:
    """One number of values for all channels; 0 only where there are none."""
    try:
        counts = np.asarray(count, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"count must be a number or an array of numbers, got {count!r}") from None
    if counts.shape not in ((), shape):
        raise ValueError(f"count must be a number or have shape {shape}, got {counts.shape}")
    if counts.size == 0:
        return 0.0
    if not (counts > 0).all() and (size or counts.any()) or (counts != counts.flat[0]).any():
        raise ValueError(f"count must be one positive number for all channels, got {count!r}")
    return float(counts.flat[0])
