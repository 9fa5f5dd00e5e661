"""The functions: validate the arguments, allocate the results, call the kernels.

Each function first offers its arguments to the kernels' ``*_plain`` shortcut, which takes arrays
without gaps and contiguous parameters, and answers None to the rest.
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
from bncore.moments import moments_of
from bncore.reference import NO_ACTIVATION, SLOPE

GRADIENTS = ("x", "gamma", "beta", "residual")
"""What there are gradients of wherever nothing else is asked for."""

_ALL_GRADIENTS = (*GRADIENTS, "mean", "var")
"""The same with given statistics, where they are asked for."""

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
    record : tuple
        All of these but x as the kernels write and read them: gamma, beta, axes, eps, values,
        stats, the shapes of gamma and x, extras.

    Notes
    -----
    For a small batch the time to make an object counts: hence one tuple in the place of many
    attributes, and no ``__init__``.
    """

    __slots__ = ("x", "record")

    @property
    def gamma(self):
        return self.record[0]

    @property
    def beta(self):
        return self.record[1]

    @property
    def axes(self):
        return self.record[2]

    @property
    def eps(self):
        return self.record[3]

    @property
    def values(self):
        return self.record[4]

    @property
    def stats(self):
        return self.record[5]

    @property
    def extras(self):
        return Extras(*self.record[8:])

    @property
    def mean(self):
        return self._statistic(0)

    @property
    def var(self):
        return self._statistic(2)

    @property
    def inv_std(self):
        return self._statistic(3)

    @property
    def count(self):
        return np.full(self.record[6], self.values)

    def _statistic(self, row):
        return self.stats[row].reshape(self.record[6])


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
    strides : tuple of int or None
        Those of x, where there are bits or weights: they lie as x does.
    """

    activation: tuple[int, float, float]
    had_residual: bool
    bits: np.ndarray | None
    weights: Weights | None
    strides: tuple[int, ...] | None


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
        Weight of each position in the statistics, not negative; broadcastable as mask is. What
        stands where the mask is False is not looked at.
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
    saved = Saved()  # before anything is written, as it may fail
    if mask is None and sample_weight is None:
        epilogue = NO_ACTIVATION if activation is None else _check.activation(activation)
        plain = _backend.active.normalization.forward_plain(
            x, gamma, beta, residual, epilogue, axis, eps, out, None, get_num_threads()
        )
        if plain is not None:
            y, saved.x, saved.record = plain
            return y, saved

    x = _check.input_array(x)
    axes = _check.channel_axes(axis, x.ndim)
    shape = tuple(x.shape[i] for i in axes)
    gamma = _check.per_channel(gamma, "gamma", shape)
    beta = _check.per_channel(beta, "beta", shape)
    eps = _check.positive(eps, "eps")
    activation = _check.activation(activation)
    residual = None if residual is None else _check.same_shape(residual, "residual", x)
    mask = _check.mask(mask, x, axes)
    sample_weight = _check.sample_weight(sample_weight, x, axes, mask)
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
    saved.x = None if out is not None and _check.coincide(out, x) else x
    saved.record = (
        gamma, beta, axes, eps, values, stats, shape, x.shape, activation, residual is not None,
        bits, weights, None if bits is None and weights is None else x.strides,
    )  # fmt: skip
    return target.finish(), saved


def saved_x(saved):
    """The x of a `Saved`, as it was but for its values; what else was kept fits its shape alone."""
    if not isinstance(saved, Saved):
        raise TypeError(f"saved must come from batch_norm, got {type(saved).__name__}")
    x = getattr(saved, "x", None)
    if x is None:
        why = "an earlier pass overwrote it (out=x)" if hasattr(saved, "record") else "it is new"
        raise ValueError(f"saved has no x: {why}")
    _still("x", x, saved.record[7])
    strides = saved.record[12]
    if strides is not None and x.strides != strides:
        raise ValueError(
            f"saved's x must keep its strides {strides} until the backward pass, got {x.strides}"
        )
    return x


def saved_parameters(saved):
    """The gamma and beta of a `Saved`, either of them None where there was none."""
    shape = saved.record[6]
    return _still("gamma", saved.gamma, shape), _still("beta", saved.beta, shape)


def _still(name, array, shape):
    """An array that was kept and still has its shape."""
    if array is not None and array.shape != shape:
        raise ValueError(
            f"saved's {name} must keep its shape {shape} until the backward pass, got {array.shape}"
        )
    return array


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
    x = saved_x(saved)
    wanted = GRADIENTS if wrt is None else _check.wanted(wrt, GRADIENTS, GRADIENTS, out)
    had_residual = saved.record[9]
    plain = _backend.active.gradient.backward_plain(
        dy, x, saved.record, "x" in wanted, "gamma" in wanted or "beta" in wanted,
        had_residual and "residual" in wanted, out, get_num_threads(),
    )  # fmt: skip
    if plain is not None:
        dx, dgamma, dbeta, dresidual, in_place = plain
        if in_place:
            saved.x = None
        return Gradients(
            dx, dgamma if "gamma" in wanted else None, dbeta if "beta" in wanted else None,
            dresidual,
        )  # fmt: skip

    overwrites = isinstance(out, np.ndarray) and np.shares_memory(out, x)
    extras = saved.extras
    gamma, beta = saved_parameters(saved)
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
    activation=None, residual=None, mask=None, mean_lo=None, out=None,
):  # fmt: skip
    """Normalize by given statistics.

    ::

        y = activation(gamma (x - mean) / sqrt(var + eps) + beta + residual)

    where the mean is ``mean + mean_lo``.

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
    mask : array_like of bool, optional
        As in `batch_norm`: y is 0 where it is False.
    mean_lo : array_like, optional
        What float64 leaves of the mean, as `Moments.mean_lo`, one value per channel; matters for
        float64 values far from zero.
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

    Padding, which may hold anything, comes out as 0:

    >>> padded = np.array([[1.0], [3.0], [np.nan]])
    >>> bncore.batch_norm_inference(padded, np.array([1.0]), np.array([4.0]), eps=1e-12,
    ...                             mask=[[True], [True], [False]]).ravel()
    array([0., 1., 0.])
    """
    if mask is None and mean_lo is None:
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
    mask = _check.mask(mask, x, axes)
    mean_lo = _check.per_channel(mean_lo, "mean_lo", shape)
    _check.output(
        out, x, in_place={"x": x, "residual": residual},
        read={"gamma": gamma, "beta": beta, "mean": mean, "var": var, "mean_lo": mean_lo},
    )  # fmt: skip
    hidden = None if mask is None else ~mask
    layout = _layout.layout_of(x, axes)
    target = _Target(out, x, layout)
    _backend.active.normalization.normalize(
        _layout.to_kernel(x, layout), _parameter(mean), _parameter(mean_lo), inv_std,
        _parameter(gamma), _parameter(beta), _optional(residual, layout), activation,
        target.kernel_array, _threads(x),
    )  # fmt: skip
    return _zeroed(target.finish(), hidden)


def batch_norm_inference_backward(
    dy, x, mean, var, gamma=None, beta=None, *, axis=1, eps=1e-5,
    activation=None, residual=None, mask=None, wrt=None, out=None,
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
    x, mean, var, gamma, beta, axis, eps, activation, residual, mask
        As in `batch_norm_inference`; where the mask is False gradients are 0, and nothing there has
        influence.
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
    wanted = GRADIENTS if wrt is None else _check.wanted(wrt, _ALL_GRADIENTS, GRADIENTS, out)
    if mask is None and residual is None:
        plain = fixed_gradients_plain(
            dy, x, mean, var, gamma, beta, axis, eps, activation, wanted, out
        )
        if plain is not None:
            dx, dgamma, dbeta, _ = plain
            return InferenceGradients(dx, dgamma, dbeta, None, None, None)

    x = _check.input_array(x)
    axes = _check.channel_axes(axis, x.ndim)
    shape = tuple(x.shape[i] for i in axes)
    dy = _check.same_shape(dy, "dy", x)
    mean, var, inv_std, gamma, beta = _fixed_statistics(mean, var, gamma, beta, eps, shape)
    activation = _check.activation(activation)
    residual = None if residual is None else _check.same_shape(residual, "residual", x)
    mask = _check.mask(mask, x, axes)
    _check.output(
        out, x, in_place={"dy": dy, "x": x, "residual": residual},
        read={"gamma": gamma, "beta": beta, "mean": mean, "var": var},
    )  # fmt: skip
    hidden = None if mask is None else ~mask
    layout = _layout.layout_of(x, axes)
    weights = weights_of(mask, None, layout)
    target = _Target(out, x, layout) if "x" in wanted else None
    per_channel = {"gamma": gamma, "beta": beta, "mean": mean, "var": var}
    gradients = {
        name: _gradient_like(array) if name in wanted else None
        for name, array in per_channel.items()
    }
    summing = any(gradient is not None for gradient in gradients.values())
    sums = np.empty((2, layout.shape[1])) if summing else None
    kernel_x, kernel_dy = _layout.to_kernel(x, layout), _layout.to_kernel(dy, layout)
    given = _parameter(mean), inv_std, _parameter(gamma), _parameter(beta)
    scale = inv_std if gamma is None else given[2] * inv_std
    factors = np.stack([-scale, -0.5 * scale * inv_std])
    dz = None
    if residual is None and weights is None:
        _backend.active.gradient.fixed_backward(
            kernel_dy, kernel_x, *given, activation, _kernel_array(target), sums, _threads(x)
        )
    else:
        if residual is not None and "residual" in wanted:
            dz = _Target(None, x, layout)
        _fixed_backward_in_steps(
            kernel_dy, kernel_x, weights, *given, _optional(residual, layout), activation,
            _kernel_array(target), _kernel_array(dz), sums, _threads(x),
        )  # fmt: skip
    if summing:
        _fill_fixed(gradients, sums, factors)
    return InferenceGradients(
        _zeroed(_finished(target), hidden), gradients["gamma"], gradients["beta"], _finished(dz),
        gradients["mean"], gradients["var"],
    )  # fmt: skip


def fixed_gradients_plain(dy, x, mean, var, gamma, beta, axis, eps, activation, wanted, out):
    """`batch_norm_inference_backward` as one call of a kernel; None where that can't be.

    Returns
    -------
    tuple or None
        dx, dgamma, dbeta, and whether dx has overwritten x.
    """
    if wanted is not GRADIENTS and ("x" not in wanted or "mean" in wanted or "var" in wanted):
        return None
    wants_gamma = gamma is not None and "gamma" in wanted
    wants_beta = beta is not None and "beta" in wanted
    epilogue = NO_ACTIVATION if activation is None else _check.activation(activation)
    plain = _backend.active.gradient.fixed_backward_plain(
        dy, x, mean, var, gamma, beta, epilogue, axis, eps, wants_gamma or wants_beta, out,
        get_num_threads(),
    )  # fmt: skip
    if plain is None:
        return None
    dx, dgamma, dbeta, in_place = plain
    return dx, dgamma if wants_gamma else None, dbeta if wants_beta else None, in_place


@np.errstate(all="ignore")
def _fixed_backward_in_steps(
    dy, x, weights, mean, inv_std, gamma, beta, residual, activation, dx, dz, sums, threads
):
    """What the kernel ``fixed_backward`` does, with a residual and weights: dz first, by itself.

    Half precision times a slope is float32 in between, so that it is rounded once; what is handed
    on or not is as it was.
    """
    wide = np.promote_types(x.dtype, np.float32) if activation[0] == SLOPE else x.dtype
    dy, x = dy.astype(wide, copy=False), x.astype(wide, copy=False)
    residual = None if residual is None else residual.astype(wide, copy=False)
    room = dz if dz is not None and dz.dtype == wide else np.empty(x.shape, wide)
    _backend.active.gradient.activation_backward(
        dy, x, weights, mean, None, inv_std, gamma, beta, residual, None, activation, room, threads
    )
    if dz is not None and dz is not room:
        dz[...] = room
    if weights is not None and sums is not None:
        _backend.active.gradient.backward(
            room, x, weights, _statistics(mean, None, inv_std), None, None, None, NO_ACTIVATION,
            1.0, None, None, sums, threads,
        )  # fmt: skip
        sums = None
    own = dx if dx is None or dx.dtype == wide else room
    _backend.active.gradient.fixed_backward(
        room, x, mean, inv_std, gamma, None, NO_ACTIVATION, own, sums, threads
    )
    if own is not dx:
        dx[...] = own


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
    if mask is None and sample_weight is None:
        plain = _backend.active.statistics.moments_plain(x, axis, get_num_threads())
        if plain is not None:
            mean, mean_lo, m2, count = plain
            return moments_of(count, mean, m2, mean_lo)

    x = _check.input_array(x)
    axes = _check.channel_axes(axis, x.ndim)
    shape = tuple(x.shape[i] for i in axes)
    mask = _check.mask(mask, x, axes)
    sample_weight = _check.sample_weight(sample_weight, x, axes, mask)
    layout = _layout.layout_of(x, axes)
    weights = weights_of(mask, sample_weight, layout)
    stats = np.empty((3, layout.shape[1]))
    _backend.active.statistics.moments(_layout.to_kernel(x, layout), weights, stats, _threads(x))
    mean, mean_lo, m2 = stats.reshape((3, *shape))
    if weights is None:
        count = float(layout.shape[0] * layout.shape[2])
        return moments_of(np.full(shape, count), mean, m2, mean_lo)
    return moments_of(np.full(shape, weights.given_total), mean, m2 * weights.unit, mean_lo)


def backward_reduce(dy, x, mean, inv_std, *, axis=1, mask=None, mean_lo=None):
    """The two sums of a backward pass, to be added over the parts of a batch.

    They are the gradients of beta and gamma. Where an activation followed, dy is the gradient of
    its input. Sample weights have no part in them: every y depends on beta and gamma alike.

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
    mask : array_like of bool, optional
        As in `batch_norm`: only where it is True dy and x count.
    mean_lo : array_like, optional
        What float64 leaves of the mean, as `Moments.mean_lo`.

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
    if mask is None:
        plain = _backend.active.gradient.reduce_plain(
            dy, x, mean, mean_lo, inv_std, axis, get_num_threads()
        )
        if plain is not None:
            return Reduced(*plain)

    x = _check.input_array(x)
    axes = _check.channel_axes(axis, x.ndim)
    shape = tuple(x.shape[i] for i in axes)
    dy = _check.same_shape(dy, "dy", x)
    mean = _required(mean, "mean", shape)
    inv_std = _required(inv_std, "inv_std", shape)
    mean, mean_lo, inv_std = (
        _parameter(mean), _parameter(_check.per_channel(mean_lo, "mean_lo", shape)),
        _parameter(inv_std),
    )  # fmt: skip
    mask = _check.mask(mask, x, axes)
    layout = _layout.layout_of(x, axes)
    weights = weights_of(mask, None, layout)
    kernel_dy, kernel_x = _layout.to_kernel(dy, layout), _layout.to_kernel(x, layout)
    sums = np.empty((2, layout.shape[1]))
    if weights is None:
        _backend.active.gradient.reduce(
            kernel_dy, kernel_x, mean, mean_lo, inv_std, 1.0, sums, _threads(x)
        )
    else:
        _backend.active.gradient.backward(
            kernel_dy, kernel_x, weights, _statistics(mean, mean_lo, inv_std), None, None, None,
            NO_ACTIVATION, 1.0, None, None, sums, _threads(x),
        )  # fmt: skip
    return Reduced(*sums.reshape((2, *shape)))


def backward_apply(
    dy, x, mean, inv_std, gamma, sum_dy, sum_dy_xhat, count, *, axis=1,
    mask=None, sample_weight=None, mean_lo=None, out=None,
):  # fmt: skip
    """The gradient of the input from the sums over the whole batch.

    ::

        dx = gamma inv_std (dy - w (sum_dy + x' sum_dy_xhat) / count)

    with all weights w 1 where none are given.

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
        Values per channel in the whole batch, the sum of the weights where there are some:
        `Moments.count`.
    axis : int or tuple of int
        The channel axis or axes.
    mask, sample_weight : array_like, optional
        Those that this part's `moments` were given; dx is 0 where masked.
    mean_lo : array_like, optional
        What float64 leaves of the mean, as `Moments.mean_lo`.
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
    if mask is None and sample_weight is None:
        dx = _backend.active.gradient.apply_plain(
            dy, x, mean, mean_lo, inv_std, gamma, sum_dy, sum_dy_xhat, count, axis, out,
            get_num_threads(),
        )  # fmt: skip
        if dx is not None:
            return dx

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
    mask = _check.mask(mask, x, axes)
    sample_weight = _check.sample_weight(sample_weight, x, axes, mask)
    mean_lo = _check.per_channel(mean_lo, "mean_lo", shape)
    layout = _layout.layout_of(x, axes)
    weights = weights_of(mask, sample_weight, layout)
    count = _count(count, shape, x.size if weights is None else weights.total)
    _check.output(
        out, x, in_place={"dy": dy, "x": x},
        read={"mean": mean, "inv_std": inv_std, "gamma": gamma, "mean_lo": mean_lo},
    )  # fmt: skip
    hidden = None if mask is None else ~mask
    target = _Target(out, x, layout)
    arrays = _layout.to_kernel(dy, layout), _layout.to_kernel(x, layout)
    statistics = _parameter(mean), _parameter(mean_lo), _parameter(inv_std), _parameter(gamma)
    if sample_weight is None:
        # Where nothing counts all is masked.
        _backend.active.gradient.apply(
            *arrays, *statistics, 1.0, sums, count or 1.0, target.kernel_array, _threads(x)
        )
    else:
        _apply_weighted(*arrays, weights, *statistics, sums, count, target, _threads(x))
    return _zeroed(target.finish(), hidden)


@np.errstate(all="ignore")
def _apply_weighted(dy, x, weights, mean, mean_lo, inv_std, gamma, sums, count, target, threads):
    """What the kernel ``apply`` does, with weights, which it does not take: two maps make it.

    Half precision is float32 in between, so that it is rounded once.
    """
    wide = np.promote_types(x.dtype, np.float32)
    dy, x = dy.astype(wide, copy=False), x.astype(wide, copy=False)
    scale = inv_std if gamma is None else gamma * inv_std
    slope, offset = -scale * sums[1], -scale * sums[0]
    share = weights.as_floats()[:, None] * (weights.unit / count if count else 0.0)
    room = np.empty(x.shape, wide)
    normalize = _backend.active.normalization.normalize
    normalize(x, mean, mean_lo, inv_std, slope, offset, None, NO_ACTIVATION, room, threads)
    room *= share
    zero, one = np.zeros_like(mean), np.ones_like(mean)
    normalize(dy, zero, None, one, scale, None, room, NO_ACTIVATION, room, threads)
    target.kernel_array[...] = room


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


def _statistics(mean, mean_lo, inv_std):
    """Given statistics as the kernels' forward pass writes them, but for the variance."""
    zero = np.zeros_like(mean)
    return np.stack([mean, zero if mean_lo is None else mean_lo, zero, inv_std])


def _zeroed(array, hidden):
    """An array, 0 where hidden; either may be None."""
    if array is not None and hidden is not None:
        np.copyto(array, 0, where=hidden, casting="unsafe")
    return array


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
        counts = np.asarray(count)
        if counts.dtype.kind not in "iufO" or isinstance(count, np.ma.MaskedArray):
            raise TypeError
        counts = counts.astype(np.float64)
    except OverflowError:
        raise ValueError("count must be a number that float64 holds") from None
    except (TypeError, ValueError):
        raise TypeError(f"count must be a number or an array of numbers, got {count!r}") from None
    if counts.shape not in ((), shape):
        raise ValueError(f"count must be a number or have shape {shape}, got {counts.shape}")
    if counts.size == 0:
        return 0.0
    if not (counts > 0).all() and (size or counts.any()) or (counts != counts.flat[0]).any():
        raise ValueError(f"count must be one positive number for all channels, got {count!r}")
    return float(counts.flat[0])
