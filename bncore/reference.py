"""Batch normalization in NumPy, float64 throughout: the oracle of the tests, the fallback backend.

It offers the functions of the compiled kernels with the same arguments.  Arrays come as
``(N, C, S)`` (outer positions, channels, inner positions) and results go into arrays the caller
allocated.  The formulas are those of Ioffe & Szegedy (2015).  A mean is kept as an unevaluated
sum ``mean + mean_lo`` of two float64: one alone does not hold a mean of 1e12 standard deviations
well enough to subtract it.  Infinities and NaN in the data go through the arithmetic without a
warning, as they do in the compiled kernels.
"""

from __future__ import annotations

import numpy as np

NO_ACTIVATION = (0, 0.0, 0.0)
"""Activations are ``(code, a, b)``: 0 none, 1 clip to [a, b], 2 slope a below zero."""


@np.errstate(all="ignore")
def moments(x, weight, stats, num_threads=1):
    """Per-channel weighted mean and sum of squared deviations.

    ::

        mean = sum w x / sum w        m2 = sum w (x - mean)^2

    Parameters
    ----------
    x : (N, C, S) array
    weight : (N, S) float64 array or None
        Weight of each position, None for all ones.  What stands at weight 0 has no influence.
    stats : (3, C) float64 array, written
        Rows mean, mean_lo and m2; zeros where no position has weight.
    num_threads : int
        Ignored here, as in every function of this module.
    """
    stats[0], stats[1], m2, scale = _moments(x, weight)
    stats[2] = np.ldexp(m2, 2 * scale)


@np.errstate(all="ignore")
def forward(x, weight, gamma, beta, residual, activation, eps, y, stats, num_threads=1):
    """Normalize by the batch's own statistics.

    ::

        var = m2 / n        inv_std = 1 / sqrt(var + eps)
        y = activation(gamma (x - mean) inv_std + beta + residual)

    Parameters
    ----------
    x : (N, C, S) array
    weight : (N, S) float64 array or None
    gamma, beta : (C,) float64 array or None
    residual : (N, C, S) array or None
    activation : (int, float, float)
    eps : float
    y : (N, C, S) array, written; may be x
    stats : (4, C) float64 array, written
        Rows mean, mean_lo, var (biased) and inv_std.
    """
    mean, mean_lo, m2, scale = _moments(x, weight)
    count = _count(x, weight)
    var = m2 / count if count else m2
    # The scaled eps overflows only where the variance is nothing beside it.
    scaled_eps = np.ldexp(float(eps), -2 * scale)
    scaled = np.ldexp(1 / np.sqrt(var + scaled_eps), -scale)
    inv_std = np.where(np.isinf(scaled_eps), 1 / np.sqrt(eps), scaled)
    stats[:] = mean, mean_lo, np.ldexp(var, 2 * scale), inv_std
    normalize(x, stats[0], stats[1], stats[3], gamma, beta, residual, activation, y)


@np.errstate(all="ignore")
def normalize(x, mean, mean_lo, inv_std, gamma, beta, residual, activation, y, num_threads=1):
    """Normalize by given statistics.

    ::

        y = activation(gamma (x - mean) inv_std + beta + residual)

    Parameters
    ----------
    x : (N, C, S) array
    mean, inv_std : (C,) float64 array
    mean_lo, gamma, beta : (C,) float64 array or None
    residual : (N, C, S) array or None
    activation : (int, float, float)
    y : (N, C, S) array, written; may be x
    """
    y[...] = _activate(_affine(x, mean, mean_lo, inv_std, gamma, beta, residual), activation)


@np.errstate(all="ignore")
def reduce(dy, x, mean, mean_lo, inv_std, sums, num_threads=1):
    """The two sums a gradient needs: ``sum dy`` and ``sum dy x'`` with ``x' = (x - mean) inv_std``.

    Parameters
    ----------
    dy, x : (N, C, S) array
    mean, inv_std : (C,) float64 array
    mean_lo : (C,) float64 array or None
    sums : (2, C) float64 array, written
    """
    dy, _ = _by_channel(dy, None)
    normalized, _ = _by_channel(_normalized(x, mean, mean_lo, inv_std), None)
    sums[0] = dy.sum(axis=1)
    sums[1] = (dy * normalized).sum(axis=1)


@np.errstate(all="ignore")
def apply(dy, x, mean, mean_lo, inv_std, gamma, sums, count, dx, num_threads=1):
    """The gradient of the input from the two sums.

    ::

        dx = gamma inv_std (dy - (sum_dy + x' sum_dy_xhat) / count)

    Parameters
    ----------
    dy, x : (N, C, S) array
    mean, inv_std : (C,) float64 array
    mean_lo, gamma : (C,) float64 array or None
    sums : (2, C) float64 array or None
        None where the statistics were fixed: ``dx = gamma inv_std dy``.
    count : float
        Values per channel.
    dx : (N, C, S) array, written; may be dy or x
    """
    gradient = dy.astype(np.float64)
    if sums is not None and count:
        normalized = _normalized(x, mean, mean_lo, inv_std)
        gradient -= (_column(sums[0]) + normalized * _column(sums[1])) / count
    scale = inv_std if gamma is None else gamma * inv_std
    dx[...] = _column(scale) * gradient


def backward(
    dy, x, stats, gamma, beta, residual, activation, count, dx, sums, num_threads=1
):
    """`reduce`, then `apply`, with the statistics that `forward` wrote.

    Parameters
    ----------
    dy, x : (N, C, S) array
    stats : (4, C) float64 array
    gamma, beta : (C,) float64 array or None
    residual : (N, C, S) array or None
    activation : (int, float, float)
        The sums and dx are those of dz, the gradient of what the activation was applied to.
    count : float
    dx : (N, C, S) array, written; may be dy or x
    sums : (2, C) float64 array, written
    """
    mean, mean_lo, _, inv_std = stats
    dz = dy.astype(np.float64)
    activation_backward(
        dz, x, mean, mean_lo, inv_std, gamma, beta, residual, activation, dz
    )
    reduce(dz, x, mean, mean_lo, inv_std, sums)
    apply(dz, x, mean, mean_lo, inv_std, gamma, sums, count, dx)


@np.errstate(all="ignore")
def move_running(running_mean, running_var, stats, momentum, unbias, spare):
    """Move running statistics towards a batch's: ``r <- (1 - momentum) r + momentum s``.

    Nothing is allocated here, so that nothing fails after y has been written.

    Parameters
    ----------
    running_mean, running_var : array of any float dtype, written
    stats : (4, C) float64 array
    momentum : float
    unbias : float
        Factor of the biased variance: n / (n - 1).
    spare : (2, 2, *channels) float64 array, written
    """
    batches = (running_mean, stats[0], 1.0), (running_var, stats[2], unbias)
    for (batch, kept), (running, statistic, factor) in zip(spare, batches, strict=True):
        np.multiply(statistic.reshape(running.shape), factor, out=batch)
        batch *= momentum
        np.copyto(kept, running)
        kept *= 1 - momentum
        batch += kept
    running_mean[...], running_var[...] = spare[:, 0]


@np.errstate(all="ignore")
def weighted_backward(dy, x, weight, stats, gamma, dx, sums):
    """`backward` where the statistics were weighted.

    ::

        dx_i = gamma inv_std (dy_i - w_i (sum dy + x'_i sum dy x') / sum w)

    Parameters
    ----------
    dy, x : (N, C, S) array
    weight : (N, S) float64 array
    stats : (4, C) float64 array
    gamma : (C,) float64 array or None
    dx : (N, C, S) array, written; may be dy or x
    sums : (2, C) float64 array, written
        Sums of all dy and dy x', unweighted: every y depends on beta and gamma alike.
    """
    mean, mean_lo, _, inv_std = stats
    reduce(dy, x, mean, mean_lo, inv_std, sums)
    gradient = dy.astype(np.float64)
    total = weight.sum()
    if total:
        share = weight[:, None] / total
        normalized = _normalized(x, mean, mean_lo, inv_std)
        gradient -= share * (_column(sums[0]) + normalized * _column(sums[1]))
    dx[...] = _column(inv_std if gamma is None else gamma * inv_std) * gradient


@np.errstate(all="ignore")
def activation_backward(
    dy, x, mean, mean_lo, inv_std, gamma, beta, residual, activation, dz, num_threads=1
):
    """The gradient of ``activation(z)``: dz = dy where z passes, else 0 or slope dy.

    ::

        z = gamma (x - mean) inv_std + beta + residual

    Parameters
    ----------
    dy, x : (N, C, S) array
    mean, inv_std : (C,) float64 array
    mean_lo, gamma, beta : (C,) float64 array or None
    residual : (N, C, S) array or None
    activation : (int, float, float)
    dz : (N, C, S) array, written; may be dy
    """
    code, a, b = activation
    z = _affine(x, mean, mean_lo, inv_std, gamma, beta, residual)
    if code == 1:
        dz[...] = np.where((z <= a) | (z >= b), 0, dy)
    elif code == 2:
        dz[...] = np.where(z <= 0, a * dy, dy)
    else:
        dz[...] = dy


def forward_plain(*arguments):
    """Decline: the shortcut for plain arguments is the compiled kernels' own."""
    return None


normalize_plain = backward_plain = movable_plain = move_running_plain = forward_plain


def _moments(x, weight):
    """mean, mean_lo, m2 and scale per channel; the true m2 is ``m2 * 4**scale``."""
    values, w = _by_channel(x, weight)
    zeros = np.zeros(x.shape[1])
    count = _count(x, weight)
    if not count or not x.shape[1]:
        return zeros, zeros, zeros, zeros.astype(int)
    shift = values[:, :1]
    deviation = values - shift
    # Squares of deviations beyond 2^+-400 would overflow or vanish: those are scaled.
    exponent = np.frexp(np.abs(deviation).max(axis=1, keepdims=True))[1]
    scale = np.where(np.abs(exponent) > 400, exponent, 0)
    deviation = np.ldexp(deviation, -scale)
    centre = _total(deviation, w) / count
    centred = deviation - centre
    rest = _total(centred, w)
    m2 = _total(centred**2, w) - rest**2 / count
    offset = np.ldexp(centre + rest / count, scale)
    mean = shift + offset
    taken = mean - shift
    mean_lo = (shift - (mean - taken)) + (offset - taken)
    return mean[:, 0], mean_lo[:, 0], m2[:, 0], scale[:, 0]


def _by_channel(x, weight):
    """x as contiguous (C, N*S) float64, and the weights, without the positions of weight 0."""
    # Contiguous, as NumPy sums pairwise, and so accurately, only along contiguous memory.
    by_channel = np.ascontiguousarray(x.transpose(1, 0, 2), np.float64)
    values = by_channel.reshape(x.shape[1], x.shape[0] * x.shape[2])
    if weight is None:
        return values, None
    used = weight.ravel() != 0
    return values[:, used], weight.ravel()[used]


def _count(x, weight):
    return float(x.shape[0] * x.shape[2]) if weight is None else float(weight.sum())


def _total(values, w):
    return (values if w is None else values * w).sum(axis=1, keepdims=True)


def _column(per_channel):
    return per_channel[:, None]


def _normalized(x, mean, mean_lo, inv_std):
    centred = x - _column(mean)
    if mean_lo is not None:
        centred -= _column(mean_lo)
    return centred * _column(inv_std)


def _affine(x, mean, mean_lo, inv_std, gamma, beta, residual):
    z = _normalized(x, mean, mean_lo, inv_std)
    if gamma is not None:
        z *= _column(gamma)
    if beta is not None:
        z += _column(beta)
    if residual is not None:
        z += residual
    return z


def _activate(z, activation):
    code, a, b = activation
    if code == 1:
        return np.clip(z, a, b)
    if code == 2:
        return np.where(z < 0, a * z, z)
    return z
