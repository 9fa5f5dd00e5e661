"""Derivatives beyond the gradients: tangents (forward mode) and the double backward pass.

Both are sums over a channel and a map over its elements, as the gradients are, so the kernels of
the gradients and of normalization compute them. Half precision is computed in float32 and rounded
once, and what has weights, or extreme variances, is computed in float64, by the same kernels.

With s = 1 / sqrt(var + eps) and the shares p = w / sum w, the differential of x' = (x - mean) s is

    dx' = s (dx - sum p dx - x' sum p x' dx)

from dmean = sum p dx and dvar = 2 sum p (x - mean) dx, hence ds = -s^2 sum p x' dx. All else here
follows from it. Activations are piecewise linear: their own second derivative is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bncore import _backend, _check, _layout
from bncore._weights import Weights, weights_of
from bncore.functional import (
    _fill,
    _fixed_statistics,
    _gradient_like,
    _parameter,
    _Target,
    _threads,
    saved_parameters,
    saved_x,
)
from bncore.reference import NO_ACTIVATION


class DoubleGradients(NamedTuple):
    """What a double backward pass returns.

    Attributes
    ----------
    ddy, dx : ndarray
        Gradients of dy and of the input, in x's shape and dtype.
    dgamma : ndarray or None
        Gradient of gamma, in its shape and dtype; None where there was none.
    """

    ddy: np.ndarray
    dx: np.ndarray
    dgamma: np.ndarray | None


class InferenceDoubleGradients(NamedTuple):
    """What a double backward pass with fixed statistics returns.

    Attributes
    ----------
    ddy, dx, dgamma
        As in `DoubleGradients`.
    dmean, dvar : ndarray
        Gradients of the statistics, in their shape and dtype.
    """

    ddy: np.ndarray
    dx: np.ndarray
    dgamma: np.ndarray | None
    dmean: np.ndarray
    dvar: np.ndarray


@np.errstate(all="ignore")
def batch_norm_jvp(
    tangent, saved, *, tangent_gamma=None, tangent_beta=None, tangent_residual=None, out=None
):
    """Directional derivative of `batch_norm` (Jacobian-vector product, forward mode).

    ::

        tz = gamma s (t - sum p t - x' sum p x' t) + tgamma x' + tbeta + tresidual
        ty = activation'(z) tz        s = 1 / sqrt(var + eps)    x' = (x - mean) s

    where p = w / sum w, 1 / n without weights, and y = activation(z). This is the differential of
    ``z = gamma x' + beta + residual`` with ``dmean = sum p t`` and ``dvar = 2 sum p (x - mean) t``.

    Parameters
    ----------
    tangent : array_like or None
        Direction in which x moves, in its shape and dtype; None where it does not.
    saved : Saved
        From `batch_norm`.
    tangent_gamma, tangent_beta : array_like, optional
        Directions of the parameters, one value per channel; only where there are parameters.
    tangent_residual : array_like, optional
        Direction of the residual, in its shape and dtype; only where there was one.
    out : ndarray, optional
        Takes the result; shape and dtype of x. It may be the tangent itself.

    Returns
    -------
    ndarray
        Tangent of y, in x's shape, dtype and memory order; 0 where masked.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came. Nothing has been written then.

    See Also
    --------
    batch_norm_backward : The transpose of this map.

    Examples
    --------
    Normalizing undoes a shift and a scaling of the batch, so y does not move with them:

    >>> import bncore, numpy as np
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, saved = bncore.batch_norm(x, np.array([2.0]), eps=1e-12)
    >>> bool(abs(bncore.batch_norm_jvp(3 * x + 1, saved)).max() < 1e-9)
    True
    >>> bncore.batch_norm_jvp(None, saved, tangent_gamma=np.array([1.0])).round(3).ravel()
    array([-0.926, -0.463,  1.389])
    """
    given = _arguments_of(saved)
    tangent = _direction(tangent, "tangent", given.x)
    others = _directions("tangent_", tangent_gamma, tangent_beta, tangent_residual, given)
    _check.output(
        out, given.x, in_place={"tangent": tangent},
        read=_read(given, others) | {"saved's statistics": given.stats},
    )  # fmt: skip
    point = _Point(given)
    target = _Target(out, given.x, point.layout)
    room = point.room_in(target)
    tangent, others = point.load(tangent), point.load_directions(others)
    point.project(tangent, room)
    return point.finish_tangent(room, others, target)


@np.errstate(all="ignore")
def batch_norm_inference_jvp(
    tangent, x, mean, var, gamma=None, beta=None, *, tangent_mean=None, tangent_var=None,
    tangent_gamma=None, tangent_beta=None, tangent_residual=None, axis=1, eps=1e-5,
    activation=None, residual=None, mask=None, out=None,
):  # fmt: skip
    """Directional derivative of `batch_norm_inference`, in the statistics too.

    ::

        tz = gamma s (t - tmean - x' s tvar / 2) + tgamma x' + tbeta + tresidual
        ty = activation'(z) tz        s = 1 / sqrt(var + eps)    x' = (x - mean) s

    the differential of ``z = gamma (x - mean) s + beta + residual``, as ``ds = -s^3 dvar / 2``.

    Parameters
    ----------
    tangent : array_like or None
        Direction in which x moves, in its shape and dtype; None where it does not.
    x, mean, var, gamma, beta, axis, eps, activation, residual, mask
        As in `batch_norm_inference`.
    tangent_mean, tangent_var, tangent_gamma, tangent_beta : array_like, optional
        Directions of the statistics and of those parameters that are given, one value per channel.
    tangent_residual : array_like, optional
        Direction of the residual, in its shape and dtype; only where there is one.
    out : ndarray, optional
        Takes the result; shape and dtype of x. It may be the tangent itself.

    Returns
    -------
    ndarray
        Tangent of y, in x's shape, dtype and memory order; 0 where masked.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came. Nothing has been written then.

    Examples
    --------
    >>> import bncore, numpy as np
    >>> x, one = np.array([[1.0], [3.0]]), np.ones(1)
    >>> bncore.batch_norm_inference_jvp(x, x, one, 4 * one, tangent_mean=one, eps=1e-12)
    array([[0.],
           [1.]])
    """
    given, mean, var = _arguments_of_fixed(
        x, mean, var, gamma, beta, axis, eps, activation, residual, mask
    )
    tangent = _direction(tangent, "tangent", given.x)
    tangent_mean = _check.per_channel(tangent_mean, "tangent_mean", mean.shape)
    tangent_var = _check.per_channel(tangent_var, "tangent_var", mean.shape)
    others = _directions("tangent_", tangent_gamma, tangent_beta, tangent_residual, given)
    _check.output(
        out, given.x, in_place={"tangent": tangent},
        read=_read(given, others) | {
            "mean": mean, "var": var, "tangent_mean": tangent_mean, "tangent_var": tangent_var
        },
    )  # fmt: skip
    point = _Point(given)
    return _fixed_tangent(
        point, point.load(tangent), _or_zero(tangent_mean, mean), _or_zero(tangent_var, var),
        point.load_directions(others), _Target(out, given.x, point.layout),
    )  # fmt: skip


def _fixed_tangent(point, tangent, tangent_mean, tangent_var, others, target):
    """The map of `batch_norm_inference_jvp`."""
    room = point.room_in(target)
    moved = np.stack([tangent_mean, point.inv_std * tangent_var / 2])
    point.apply(tangent, point.gamma, moved, 1.0, room)
    return point.finish_tangent(room, others, target)


@np.errstate(all="ignore")
def batch_norm_double_backward(ddx, dy, saved, *, ddgamma=None, ddbeta=None, ddresidual=None):
    """Gradients of the gradients of `batch_norm`.

    For losses that contain gradients, such as penalties on them. The gradients, by dy, x and
    gamma, of

    ::

        F = <ddx, dx> + <ddgamma, dgamma> + <ddbeta, dbeta> + <ddresidual, dresidual>

    where dx, dgamma, dbeta and dresidual are what `batch_norm_backward` makes of dy. With u = ddx,
    d = activation'(z) dy, s = 1 / sqrt(var + eps), x' = (x - mean) s, and p = w / sum w,
    which is 1 / n without weights:

    ::

        A = sum p u     P = sum p u x'     q = u - A - x' P
        B = sum d       Q = sum d x'       e = d - p (B + x' Q)     K = sum d q = sum u e

        ddy    = activation'(z) (gamma s q + ddgamma x' + ddbeta + ddresidual)
        dgamma = s K
        dx     = ddgamma s e - gamma s^2 (p (K x' + Q q) + P e)

    Beta and the residual have no gradient: they only choose where the activation passes.

    Parameters
    ----------
    ddx : array_like or None
        Gradient of the outer loss with respect to dx, in x's shape and dtype; None for zero.
    dy : array_like
        What `batch_norm_backward` was given.
    saved : Saved
        From `batch_norm`.
    ddgamma, ddbeta : array_like, optional
        Gradients with respect to dgamma and dbeta, one value per channel; only where there are
        parameters.
    ddresidual : array_like, optional
        Gradient with respect to dresidual, in x's shape and dtype; only where there was a residual.

    Returns
    -------
    DoubleGradients
        ddy, dx, dgamma; ddy and dx are 0 where masked.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came.

    Notes
    -----
    dx is the transpose of the tangent map, so F = <d, t> with t the tangent that `batch_norm_jvp`
    gives without an activation for the directions ddx, ddgamma, ddbeta and ddresidual. Hence ddy.
    As a function of x and gamma,

    ::

        F = gamma s K + ddgamma Q + ...        K = sum u d - A B - P Q

    where A and B do not depend on x. With v any vector, the differentials of s and of x' (see
    `batch_norm_jvp`) give the gradients

    ::

        of s             -s^2 p x'
        of sum v x'      s (v - p sum v - p x' sum v x')

    the second of which is s p q for P (v = p u) and s e for Q (v = d). The product rule does the
    rest.

    Examples
    --------
    A step along the gradient of ``|dx|^2 / 2`` makes dx smaller:

    >>> import bncore, numpy as np
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> dy, gamma = np.array([[1.0], [0.0], [0.0]]), np.array([2.0])
    >>> def norm(x):
    ...     dx = bncore.batch_norm_backward(dy, bncore.batch_norm(x, gamma)[1]).dx
    ...     return dx, (dx**2).sum() / 2
    >>> dx, before = norm(x)
    >>> gg = bncore.batch_norm_double_backward(dx, dy, bncore.batch_norm(x, gamma)[1])
    >>> _, after = norm(x - 1e-3 * gg.dx)
    >>> expected = -1e-3 * (gg.dx**2).sum()
    >>> bool(abs((after - before) / expected - 1) < 1e-3)
    True
    """
    given = _arguments_of(saved)
    dy = _check.same_shape(dy, "dy", given.x)
    ddx = _direction(ddx, "ddx", given.x)
    others = _directions("dd", ddgamma, ddbeta, ddresidual, given)
    point = _Point(given)
    u, d = point.load(ddx), point.load_gated(dy)
    others = point.load_directions(others)

    target = _Target(None, given.x, point.layout)
    room = point.room_in(target)
    means = point.project(u, room)
    ddy = point.finish_tangent(room, others, target)

    target = _Target(None, given.x, point.layout)
    room = point.room_in(target)
    k = _second_gradient(point, u, d, means, others.gamma, room)
    dgamma = _gradient_like(given.gamma)
    _fill(dgamma, point.inv_std * k)
    return DoubleGradients(ddy, point.finish(target, room), dgamma)


def _second_gradient(point, u, d, means, ddgamma, room):
    """dx of `batch_norm_double_backward` into room, from ``means = A, P``; returns K.

    ::

        b  = s (ddgamma - gamma s P)
        dx = b d + p (-gamma s^2 Q q - (gamma s^2 K + b Q) x' - b B)
    """
    sum_d, sum_d_xhat = point.sums(d)
    # sum d (u - A) is sum u d - A B without the cancellation.
    k = point.centred_product(d, u, means[0]) - means[1] * sum_d_xhat
    scale = point.inv_std if point.gamma is None else point.gamma * point.inv_std
    b = point.inv_std * ((0.0 if ddgamma is None else ddgamma) - scale * means[1])
    factor = -scale * sum_d_xhat
    slope = -(scale * point.inv_std * k + b * sum_d_xhat)
    if point.share is None:
        point.apply(u, factor / point.count, means, 1.0, room)
        point.add_normalized(slope / point.count, None, room)
        point.add_scaled(d, sum_d / point.count, b, room)
    else:
        point.apply(u, factor, means, 1.0, room)
        point.add_normalized(slope, -b * sum_d, room)
        room *= point.share
        point.add_scaled(d, np.zeros_like(b), b, room)
    return k


@np.errstate(all="ignore")
def batch_norm_inference_double_backward(
    ddx, dy, x, mean, var, gamma=None, beta=None, *, ddgamma=None, ddbeta=None, ddresidual=None,
    ddmean=None, ddvar=None, axis=1, eps=1e-5, activation=None, residual=None, mask=None,
):  # fmt: skip
    """Gradients of the gradients of `batch_norm_inference`, in the statistics too.

    The gradients, by dy, x, gamma, mean and var, of

    ::

        F = <ddx, dx> + <ddgamma, dgamma> + <ddbeta, dbeta> + <ddresidual, dresidual>
            + <ddmean, dmean> + <ddvar, dvar>

    where dx, dgamma and so on are what `batch_norm_inference_backward` makes of dy. With
    d = activation'(z) dy, s = 1 / sqrt(var + eps) and x' = (x - mean) s:

    ::

        B = sum d      Q = sum d x'      K = sum d (ddx - ddmean)
        b = s (ddgamma - gamma s^2 ddvar / 2)

        ddy    = activation'(z) (gamma s (ddx - ddmean - x' s ddvar / 2)
                                 + ddgamma x' + ddbeta + ddresidual)
        dx     = b d
        dgamma = s (K - s ddvar Q / 2)
        dmean  = -b B
        dvar   = -s^2 / 2 (gamma s K + ddgamma Q - 3/2 gamma s^2 ddvar Q)

    Parameters
    ----------
    ddx : array_like or None
        Gradient of the outer loss with respect to dx, in x's shape and dtype; None for zero.
    dy : array_like
        What `batch_norm_inference_backward` was given.
    x, mean, var, gamma, beta, axis, eps, activation, residual, mask
        As in `batch_norm_inference`.
    ddgamma, ddbeta, ddmean, ddvar : array_like, optional
        Gradients with respect to dgamma, dbeta, dmean and dvar, one value per channel; the first
        two only where there are parameters.
    ddresidual : array_like, optional
        Gradient with respect to dresidual, in x's shape and dtype; only where there is a residual.

    Returns
    -------
    InferenceDoubleGradients
        ddy, dx, dgamma, dmean, dvar; ddy and dx are 0 where masked.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came.

    Notes
    -----
    As for `batch_norm_double_backward`, F = <d, t> with t the tangent that
    `batch_norm_inference_jvp` gives without an activation for the directions ddx, ddgamma and so
    on. Hence ddy; the rest are the derivatives of t, with ``ds = -s^3 dvar / 2``.

    Examples
    --------
    The slope of y is gamma / sqrt(var + eps), whatever x is:

    >>> import bncore, numpy as np
    >>> x, one = np.array([[1.0], [3.0]]), np.ones(1)
    >>> gg = bncore.batch_norm_inference_double_backward(x, x, x, one, 4 * one, one, eps=1e-12)
    >>> gg.ddy.ravel(), gg.dx.ravel(), gg.dgamma
    (array([0.5, 1.5]), array([0., 0.]), array([5.]))
    """
    given, mean, var = _arguments_of_fixed(
        x, mean, var, gamma, beta, axis, eps, activation, residual, mask
    )
    dy = _check.same_shape(dy, "dy", given.x)
    ddx = _direction(ddx, "ddx", given.x)
    ddmean = _or_zero(_check.per_channel(ddmean, "ddmean", mean.shape), mean)
    ddvar = _or_zero(_check.per_channel(ddvar, "ddvar", mean.shape), var)
    others = _directions("dd", ddgamma, ddbeta, ddresidual, given)
    point = _Point(given)
    u, d = point.load(ddx), point.load_gated(dy)
    others = point.load_directions(others)
    ddy = _fixed_tangent(point, u, ddmean, ddvar, others, _Target(None, given.x, point.layout))

    s, gamma = point.inv_std, 1.0 if point.gamma is None else point.gamma
    ddgamma = 0.0 if others.gamma is None else others.gamma
    sum_d, sum_d_xhat = point.sums(d)
    k = point.centred_product(d, u, ddmean)
    b = s * (ddgamma - gamma * s**2 * ddvar / 2)
    target = _Target(None, given.x, point.layout)
    room = np.zeros(point.layout.shape, point.wide)
    point.add_scaled(d, np.zeros_like(b), b, room)
    dgamma, dmean, dvar = (_gradient_like(array) for array in (given.gamma, mean, var))
    _fill(dgamma, s * (k - s * ddvar * sum_d_xhat / 2))
    _fill(dmean, -b * sum_d)
    through_var = gamma * s * k + (ddgamma - 1.5 * gamma * s**2 * ddvar) * sum_d_xhat
    _fill(dvar, -0.5 * s**2 * through_var)
    return InferenceDoubleGradients(ddy, point.finish(target, room), dgamma, dmean, dvar)


class _Given(NamedTuple):
    """A forward pass: its arguments, checked, and its statistics."""

    x: np.ndarray
    axes: tuple[int, ...]
    stats: np.ndarray
    """(4, C): mean, the mean's rounding error, variance, inv_std."""
    gamma: np.ndarray | None
    beta: np.ndarray | None
    residual: np.ndarray | None
    """Where the pass was of given statistics: of others `bits` tells enough."""
    had_residual: bool
    bits: np.ndarray | None
    """Gates of the activation, see `bncore.functional.Extras`."""
    activation: tuple[int, float, float]
    count: float
    weights: Weights | None


class _Directions(NamedTuple):
    """Directions of the arguments other than x."""

    gamma: np.ndarray | None
    beta: np.ndarray | None
    residual: np.ndarray | None


class _Point:
    """Where a derivative is taken, in the kernels' form, and the maps that it is made of.

    Elements are (N, C, S) in ``wide``, the type of the arithmetic: float64 with weights or where
    float32 might not hold 1 / var, else x's own or float32. Everything per channel is float64.
    Masked positions are 0 throughout, and so take no part in a sum: a mask alone changes nothing
    but the count.
    """

    def __init__(self, given):
        self.layout = _layout.layout_of(given.x, given.axes)
        self.weights = given.weights
        weight = None if given.weights is None else given.weights.as_floats()[:, None]
        self.valid = None if weight is None else weight >= 0
        # z is computed in the forward pass's type, so that the activation passes where it did.
        self.narrow = np.dtype(np.float64 if given.x.dtype.itemsize == 8 else np.float32)
        self.stats = given.stats
        self.mean, self.mean_lo, _, self.inv_std = given.stats
        extreme = (self.inv_std > 2.0**50) | (self.inv_std < 2.0**-50)
        weighted = weight is not None and given.weights.values.dtype == np.float64
        is_wide = weighted or extreme.any()
        self.wide = np.dtype(np.float64) if is_wide else self.narrow
        self.gamma, self.beta = _parameter(given.gamma), _parameter(given.beta)
        self.activation = given.activation
        self.count = given.count or 1.0  # where there is nothing, the sums are 0
        self.share = np.maximum(weight, 0) / self.count if weighted else None
        self.threads = _threads(given.x)
        self.narrow_x = self._load(given.x)
        self.x = self._widened(self.narrow_x)
        self.residual = None if given.residual is None else self._load(given.residual)
        self.bits = given.bits

    def load(self, array):
        """An array of x's shape."""
        return self._widened(self._load(array))

    def load_gated(self, array):
        """``activation'(z)`` times an array of x's shape."""
        values = self._load(array)
        if self.activation != NO_ACTIVATION:
            values = self._gate(values, np.empty(values.shape, values.dtype))
        return self._widened(values)

    def load_directions(self, others):
        """Directions as the kernels take them; gamma's is there where beta's is."""
        gamma, beta = _parameter(others.gamma), _parameter(others.beta)
        if gamma is None and beta is not None:
            gamma = np.zeros_like(beta)
        return _Directions(
            gamma, beta, None if others.residual is None else self.load(others.residual)
        )

    def sums(self, v):
        """``sum v`` and ``sum v x'``."""
        return self._reduce(v, self.x, self.mean, self.mean_lo, self.inv_std)

    def centred_product(self, v, u, centre):
        """``sum v (u - centre)``"""
        return self._reduce(v, u, centre, None, np.ones_like(centre))[1]

    def project(self, t, out):
        """``gamma s (t - a - x' b)`` into out; returns ``a = sum p t`` and ``b = sum p t x'``."""
        if self.share is None:
            sums = np.empty((2, self.layout.shape[1]))
            _backend.active.gradient.backward(
                t, self.x, None, self.stats, self.gamma, None, None, NO_ACTIVATION, self.count,
                out, None, sums, self.threads,
            )  # fmt: skip
            return sums / self.count
        counts = self.share > 0  # what stands at weight 0 has no influence on a sum, be it NaN
        used_t, used_x = _zero_unless(counts, t), _zero_unless(counts, self.x)
        used_t *= self.share
        means = self._reduce(used_t, used_x, self.mean, self.mean_lo, self.inv_std)
        self.apply(t, self.gamma, means, 1.0, out)
        return means

    def apply(self, t, factor, sums, count, out):
        """``factor s (t - (sums[0] + x' sums[1]) / count)`` into out."""
        _backend.active.gradient.apply(
            t, self.x, self.mean, self.mean_lo, self.inv_std, factor, 1.0, sums, count, out,
            self.threads,
        )  # fmt: skip

    def add_normalized(self, slope, offset, out):
        """Add ``slope x' + offset`` to out."""
        _backend.active.normalization.normalize(
            self.x, self.mean, self.mean_lo, self.inv_std, slope, offset, out, NO_ACTIVATION, out,
            self.threads,
        )  # fmt: skip

    def add_scaled(self, v, centre, factor, out):
        """Add ``factor (v - centre)`` to out."""
        _backend.active.normalization.normalize(
            v, centre, None, np.ones_like(centre), factor, None, out, NO_ACTIVATION, out,
            self.threads,
        )  # fmt: skip

    def room_in(self, target):
        """Room for elements: the target's own where its type is that of the arithmetic."""
        if target.kernel_array.dtype == self.wide:
            return target.kernel_array
        return np.empty(self.layout.shape, self.wide)

    def finish_tangent(self, room, others, target):
        """``activation'(z) (room + tgamma x' + tbeta + tresidual)`` as the caller's array."""
        if others.residual is not None:
            room += others.residual
        if others.gamma is not None:
            self.add_normalized(others.gamma, others.beta, room)
        if self.activation != NO_ACTIVATION:
            values = room.astype(self.narrow, copy=False)
            room = self._gate(values, values)
        return self.finish(target, room)

    def finish(self, target, values):
        """The caller's array, filled with values, 0 where masked."""
        array = target.kernel_array
        if values is not array:
            array[...] = values
        if self.valid is not None:
            np.copyto(array, 0, where=~self.valid, casting="unsafe")
        return target.finish()

    def _load(self, array):
        values = _layout.to_kernel(array, self.layout)
        if values.dtype != self.narrow:
            values = values.astype(self.narrow, order="C")
        return values if self.valid is None else _zero_unless(self.valid, values)

    def _widened(self, values):
        return values if values.dtype == self.wide else values.astype(self.wide, order="C")

    def _gate(self, values, out):
        _backend.active.gradient.activation_backward(
            values, self.narrow_x, self.weights, self.mean, self.mean_lo, self.inv_std,
            self.gamma, self.beta, self.residual, self.bits, self.activation, out, self.threads,
        )  # fmt: skip
        return out

    def _reduce(self, v, x, mean, mean_lo, inv_std):
        sums = np.empty((2, self.layout.shape[1]))
        _backend.active.gradient.reduce(v, x, mean, mean_lo, inv_std, 1.0, sums, self.threads)
        return sums


def _arguments_of(saved):
    """What `batch_norm` was given and found."""
    x, extras = saved_x(saved), saved.extras
    gamma, beta = saved_parameters(saved)
    count = saved.values if extras.weights is None else extras.weights.total
    return _Given(
        x, saved.axes, saved.stats, gamma, beta, None, extras.had_residual,
        extras.bits, extras.activation, count, extras.weights,
    )  # fmt: skip


def _arguments_of_fixed(x, mean, var, gamma, beta, axis, eps, activation, residual, mask):
    """What `batch_norm_inference` is given, checked, with mean and var in their own types."""
    x = _check.input_array(x)
    axes = _check.channel_axes(axis, x.ndim)
    shape = tuple(x.shape[i] for i in axes)
    mean, var, inv_std, gamma, beta = _fixed_statistics(mean, var, gamma, beta, eps, shape)
    activation = _check.activation(activation)
    residual = None if residual is None else _check.same_shape(residual, "residual", x)
    weights = weights_of(_check.mask(mask, x, axes), None, _layout.layout_of(x, axes))
    stats = np.stack([_parameter(mean), np.zeros(inv_std.shape), _parameter(var), inv_std])
    given = _Given(
        x, axes, stats, gamma, beta, residual, residual is not None, None, activation, 1.0, weights
    )
    return given, mean, var


def _or_zero(value, like):
    """A direction per channel as the kernels take it; None is none."""
    return np.zeros(like.size) if value is None else _parameter(value)


def _zero_unless(positions, values):
    """A copy of values (N, C, S), contiguous, with 0 where positions (N, 1, S) are False."""
    copy = np.array(values, order="C")
    np.copyto(copy, 0, where=~positions)
    return copy


def _direction(value, name, x):
    """A direction of x's; None is none."""
    if value is None:
        return np.zeros_like(x, x.dtype.newbyteorder("="), subok=False)
    return _check.same_shape(value, name, x)


def _directions(prefix, gamma, beta, residual, given):
    """Checked directions of what the forward pass was given."""
    shape = tuple([given.x.shape[axis] for axis in given.axes])
    gamma = _check.per_channel(gamma, prefix + "gamma", shape)
    beta = _check.per_channel(beta, prefix + "beta", shape)
    if residual is not None:
        residual = _check.same_shape(residual, prefix + "residual", given.x)
    for name, value, absent in (
        ("gamma", gamma, given.gamma is None),
        ("beta", beta, given.beta is None),
        ("residual", residual, not given.had_residual),
    ):
        if value is not None and absent:
            raise ValueError(f"{prefix}{name} must be None: the forward pass had no {name}")
    return _Directions(gamma, beta, residual)


def _read(given, others):
    """The arrays that an output must not share memory with, by name."""
    directions = {"tangent_" + name: value for name, value in others._asdict().items()}
    names = "x", "gamma", "beta", "residual"
    return {name: getattr(given, name) for name in names} | directions
