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

SLOPE = 2
"""The code of those that multiply."""


@np.errstate(all="ignore")
def moments(x, weights, stats, num_threads=1):
    """Per-channel weighted mean and sum of squared deviations.

    ::

        mean = sum w x / sum w        m2 = sum w (x - mean)^2

    Parameters
    ----------
    x : (N, C, S) array
    weights : bncore._weights.Weights or None
        Weight of each position, None for all ones. What stands at weight 0, or where a position is
        masked, has no influence.
    stats : (3, C) float64 array, written
        Rows mean, mean_lo and m2; zeros where no position has weight.
    num_threads : int
        Ignored here, as in every function of this module.
    """
    stats[0], stats[1], m2, scale = _moments(x, weights)
    stats[2] = np.ldexp(m2, 2 * scale)


@np.errstate(all="ignore")
def forward(x, weights, gamma, beta, residual, activation, eps, y, bits, stats, num_threads=1):
    """Normalize by the batch's own statistics.

    ::

        var = m2 / n        inv_std = 1 / sqrt(var + eps)
        y = activation(gamma (x - mean) inv_std + beta + residual)

    Parameters
    ----------
    x : (N, C, S) array
    weights : bncore._weights.Weights or None
        y is 0 where a position is masked.
    gamma, beta : (C,) float64 array or None
    residual : (N, C, S) array or None
    activation : (int, float, float)
    eps : float
    y : (N, C, S) array, written; may be x or residual
    bits : uint8 array or None, written
        A bit for each element, 1 where the activation hands its gradient on as it is. Their
        meaning and order are the backend's own: another's are not to be read.
    stats : (4, C) float64 array, written
        Rows mean, mean_lo, var (biased) and inv_std.
    """
    mean, mean_lo, m2, scale = _moments(x, weights)
    count = _count(x, weights)
    var = m2 / count if count else m2
    # The scaled eps overflows only where the variance is nothing beside it.
    scaled_eps = np.ldexp(float(eps), -2 * scale)
    scaled = np.ldexp(1 / np.sqrt(var + scaled_eps), -scale)
    inv_std = np.where(np.isinf(scaled_eps), 1 / np.sqrt(eps), scaled)
    stats[:] = mean, mean_lo, np.ldexp(var, 2 * scale), inv_std
    z = _affine(x, stats[0], stats[1], stats[3], gamma, beta, residual)
    if bits is not None:
        packed = np.packbits(_passes(z, activation))
        bits[: packed.size] = packed
    y[...] = _unmasked(_activate(z, activation), weights)


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
def reduce(dy, x, mean, mean_lo, inv_std, slope, sums, num_threads=1):
    """The two sums a gradient needs: ``sum dy`` and ``sum dy x'`` with ``x' = (x - mean) inv_std``.

    Parameters
    ----------
    dy, x : (N, C, S) array
    mean, inv_std : (C,) float64 array
    mean_lo : (C,) float64 array or None
    slope : float
        Where x is what a leaky ReLU has made of z, and dy the gradient of that: z and its gradient
        take their places, and the statistics are of z. 1 where they are x and dy.
    sums : (2, C) float64 array, written
    """
    dy, x = _before(dy, x, slope)
    dy = _by_channel(dy)
    normalized = _by_channel(_normalized(x, mean, mean_lo, inv_std))
    sums[0] = dy.sum(axis=1)
    sums[1] = (dy * normalized).sum(axis=1)


@np.errstate(all="ignore")
def apply(dy, x, mean, mean_lo, inv_std, gamma, slope, sums, count, dx, num_threads=1):
    """The gradient of the input from the two sums.

    ::

        dx = gamma inv_std (dy - (sum_dy + x' sum_dy_xhat) / count)

    Parameters
    ----------
    dy, x : (N, C, S) array
    mean, inv_std : (C,) float64 array
    mean_lo, gamma : (C,) float64 array or None
    slope : float
        As in `reduce`.
    sums : (2, C) float64 array
    count : float
        Values per channel.
    dx : (N, C, S) array, written; may be dy or x
    """
    dy, x = _before(dy, x, slope)
    gradient = dy.astype(np.float64)
    if count:
        normalized = _normalized(x, mean, mean_lo, inv_std)
        gradient -= (_column(sums[0]) + normalized * _column(sums[1])) / count
    scale = inv_std if gamma is None else gamma * inv_std
    dx[...] = _column(scale) * gradient


@np.errstate(all="ignore")
def backward(
    dy, x, weights, stats, gamma, beta, bits, activation, count, dx, dz, sums, num_threads=1
):
    """The gradient through the statistics that `forward` wrote.

    ::

        dz_i = activation'(z_i) dy_i
        dx_i = gamma inv_std (dz_i - w_i (sum dz + x'_i sum dz x') / sum w)

    Parameters
    ----------
    dy, x : (N, C, S) array
    weights : bncore._weights.Weights or None
        dx and dz are 0 where a position is masked, and nothing there has influence.
    stats : (4, C) float64 array
    gamma, beta : (C,) float64 array or None
    bits : uint8 array or None
        From `forward`; where None, the activation's input is computed again from x.
    activation : (int, float, float)
    count : float
        Sum of the weights.
    dx : (N, C, S) array or None, written; may be dy or x
    dz : (N, C, S) array or None, written
        The gradient of a residual.
    sums : (2, C) float64 array or None, written; not None where dx is not
        Sums of all dz and dz x', unweighted: every y depends on beta and gamma alike.
    """
    mean, mean_lo, _, inv_std = stats
    gradient = dy.astype(np.float64)
    through = mean, mean_lo, inv_std, gamma, beta, None, bits, activation
    activation_backward(gradient, x, weights, *through, gradient)
    if dz is not None:
        dz[...] = gradient
    if sums is None:
        return
    normalized = _unmasked(_normalized(x, mean, mean_lo, inv_std), weights)
    sums[0] = _by_channel(gradient).sum(axis=1)
    sums[1] = (_by_channel(gradient) * _by_channel(normalized)).sum(axis=1)
    if dx is None:
        return
    if count:
        share = 1 / count if weights is None else weights.as_floats()[:, None] / count
        gradient -= share * (_column(sums[0]) + normalized * _column(sums[1]))
    dx[...] = _unmasked(_column(inv_std if gamma is None else gamma * inv_std) * gradient, weights)


@np.errstate(all="ignore")
def fixed_backward(dy, x, mean, inv_std, gamma, beta, activation, dx, sums, num_threads=1):
    """The gradient where the statistics were given: ``dx = gamma inv_std dz``.

    Parameters
    ----------
    dy, x : (N, C, S) array
    mean, inv_std : (C,) float64 array
    gamma, beta : (C,) float64 array or None
    activation : (int, float, float)
    dx : (N, C, S) array or None, written; may be dy or x
    sums : (2, C) float64 array or None, written
        As in `backward`.
    """
    dz = dy.astype(np.float64)
    activation_backward(dz, x, None, mean, None, inv_std, gamma, beta, None, None, activation, dz)
    if sums is not None:
        reduce(dz, x, mean, None, inv_std, 1.0, sums)
    if dx is not None:
        dx[...] = _column(inv_std if gamma is None else gamma * inv_std) * dz


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
def activation_backward(
    dy, x, weights, mean, mean_lo, inv_std, gamma, beta, residual, bits, activation, dz,
    num_threads=1,
):  # fmt: skip
    """The gradient of ``activation(z)``: dz = dy where z passes, else 0 or slope dy.

    ::

        z = gamma (x - mean) inv_std + beta + residual

    Parameters
    ----------
    dy, x : (N, C, S) array
    weights : bncore._weights.Weights or None
        dz is 0 where a position is masked.
    mean, inv_std : (C,) float64 array
    mean_lo, gamma, beta : (C,) float64 array or None
    residual : (N, C, S) array or None
    bits : uint8 array or None
        Instead of z, where `forward` kept them.
    activation : (int, float, float)
    dz : (N, C, S) array, written; may be dy
    """
    code, slope, _ = activation
    if code == 0:
        dz[...] = _unmasked(dy, weights)
        return
    if bits is None:
        passes = _passes(_affine(x, mean, mean_lo, inv_std, gamma, beta, residual), activation)
    else:
        passes = np.unpackbits(bits, count=dy.size).reshape(dy.shape) == 1
    dy = dy.astype(np.float64)
    dz[...] = _unmasked(np.where(passes, dy, slope * dy if code == 2 and slope else 0), weights)


def forward_plain(*arguments):
    """Decline: the shortcut for plain arguments is the compiled kernels' own."""
    return None


normalize_plain = evaluate_plain = backward_plain = fixed_backward_plain = forward_plain
moments_plain = reduce_plain = apply_plain = movable_plain = move_running_plain = forward_plain


def _moments(x, weights):
    """mean, mean_lo, m2 and scale per channel; the true m2 is ``m2 * 4**scale``."""
    values, w = _by_channel(x), None
    if weights is not None:
        w = weights.as_floats().ravel()
        values, w = values[:, w > 0], w[w > 0]
    zeros = np.zeros(x.shape[1])
    count = _count(x, weights)
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


def _by_channel(x):
    """x as contiguous (C, N*S) float64."""
    # Contiguous, as NumPy sums pairwise, and so accurately, only along contiguous memory.
    by_channel = np.ascontiguousarray(x.transpose(1, 0, 2), np.float64)
    return by_channel.reshape(x.shape[1], x.shape[0] * x.shape[2])


def _count(x, weights):
    return float(x.shape[0] * x.shape[2]) if weights is None else weights.total


def _total(values, w):
    return (values if w is None else values * w).sum(axis=1, keepdims=True)


def _unmasked(values, weights):
    """Values of (N, C, S), 0 where a position is masked."""
    return values if weights is None else np.where(weights.as_floats()[:, None] < 0, 0.0, values)


def _before(dy, y, slope):
    """dz and z of a leaky ReLU from dy and y."""
    if slope == 1:
        return dy, y
    dy, y = dy.astype(np.float64), y.astype(np.float64)
    return np.where(y <= 0, slope * dy, dy), np.where(y < 0, y * (1 / slope), y)


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


def _passes(z, activation):
    """Where an activation hands its gradient on as it is."""
    code, a, b = activation
    return ~((z <= a) | (z >= b)) if code == 1 else ~(z <= 0)


def _activate(z, activation):
    code, a, b = activation
    if code == 1:
        return np.clip(z, a, b)
    if code == 2:
        return np.where(z < 0, a * z, z)
    return z
