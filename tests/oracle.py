"""What the results should be: the article's formulas in extended precision, and how near is near.

Nothing here shares a line with bncore. Arrays are brought to rows ``(C, n)``, one per channel, and
computed with in ``np.longdouble`` by the textbook's two passes.
"""

from dataclasses import dataclass

import numpy as np

WIDE = np.longdouble


@dataclass(frozen=True)
class Forward:
    """y and the statistics; ``scale`` is ``max(|gamma x'|, |beta|) + |residual|`` per element."""

    y: np.ndarray
    scale: np.ndarray
    mean: np.ndarray
    var: np.ndarray


@dataclass(frozen=True)
class Backward:
    """Gradients; each ``scale`` is the size of the terms that were added up."""

    dx: np.ndarray
    dx_scale: np.ndarray
    dgamma: np.ndarray
    dgamma_scale: np.ndarray
    dbeta: np.ndarray
    dbeta_scale: np.ndarray
    dresidual: np.ndarray


def channel_axes(axis, ndim):
    """Channel axes, sorted and non-negative."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    return tuple(sorted(one % ndim for one in axes))


def to_rows(array, axes, dtype=WIDE):
    """``array`` as (C, n)."""
    moved = np.moveaxis(np.asarray(array), axes, range(len(axes)))
    channels = int(np.prod(moved.shape[: len(axes)], dtype=int))
    values = moved.size // channels if channels else 0
    return moved.astype(dtype).reshape(channels, values)


def from_rows(rows, shape, axes):
    """The inverse of `to_rows`."""
    rest = [size for axis, size in enumerate(shape) if axis not in axes]
    moved = rows.reshape([shape[axis] for axis in axes] + rest)
    return np.moveaxis(moved, range(len(axes)), axes)


def centred(rows, weight=1):
    """Each row minus its weighted mean, the mean, and the biased variance."""
    weight = np.broadcast_to(np.asarray(weight, rows.dtype), rows.shape)
    total = weight.sum(1, keepdims=True)
    # A mean of 1e12 standard deviations leaves even extended precision few digits: it goes first.
    deviation = rows - rows[:, :1]
    mean = rows[:, :1]
    for _ in range(2):
        part = (weight * deviation).sum(1, keepdims=True) / total
        deviation = deviation - part
        mean = mean + part
    return deviation, mean, (weight * deviation**2).sum(1, keepdims=True) / total


def activate(z, activation):
    name, *arguments = activation if isinstance(activation, tuple) else (activation,)
    if name == "relu":
        return np.maximum(z, 0)
    if name == "leaky_relu":
        return np.where(z > 0, z, arguments[0] * z)
    if name == "clip":
        return np.clip(z, *arguments)
    return z


def passes(z, activation):
    """The derivative of `activate`."""
    name, *arguments = activation if isinstance(activation, tuple) else (activation,)
    if name == "relu":
        return (z > 0).astype(z.dtype)
    if name == "leaky_relu":
        return np.where(z > 0, np.ones_like(z), z.dtype.type(arguments[0]))
    if name == "clip":
        return ((z > arguments[0]) & (z < arguments[1])).astype(z.dtype)
    return np.ones_like(z)


def column(parameter, default, dtype):
    """A parameter as (C, 1), or its default."""
    if parameter is None:
        return dtype(default)
    return np.asarray(parameter).astype(dtype).reshape(-1, 1)


def forward(
    x, gamma=None, beta=None, *, axis=1, eps=1e-5, activation=None, residual=None,
    weight=None, mean=None, var=None, dtype=WIDE,
):  # fmt: skip
    """Batch norm by the batch's statistics, or by ``mean`` and ``var`` where given."""
    axes = channel_axes(axis, x.ndim)
    rows = to_rows(x, axes, dtype)
    if mean is None:
        weight = 1 if weight is None else to_rows(weight, axes, dtype)
        deviation, mean, var = centred(rows, weight)
    else:
        mean, var = column(mean, 0, dtype), column(var, 0, dtype)
        deviation = rows - mean
    gamma, beta = column(gamma, 1, dtype), column(beta, 0, dtype)
    scaled = gamma * deviation / np.sqrt(var + dtype(eps))
    shift = dtype(0) if residual is None else to_rows(residual, axes, dtype)
    y = activate(scaled + beta + shift, activation)
    scale = np.maximum(abs(scaled), abs(beta)) + abs(shift)
    channels = [x.shape[one] for one in axes]
    return Forward(
        from_rows(y, x.shape, axes), from_rows(scale, x.shape, axes),
        mean.reshape(channels), var.reshape(channels),
    )  # fmt: skip


def backward(
    dy, x, gamma=None, beta=None, *, axis=1, eps=1e-5, activation=None, residual=None,
    weight=None, mean=None, var=None, dtype=WIDE,
):  # fmt: skip
    """Gradients of `forward`; through the statistics unless those are given."""
    axes = channel_axes(axis, x.ndim)
    rows, dy_rows = to_rows(x, axes, dtype), to_rows(dy, axes, dtype)
    fixed = mean is not None
    weight = dtype(1) if weight is None else to_rows(weight, axes, dtype)
    share = np.broadcast_to(weight, rows.shape)
    share = share / share.sum(1, keepdims=True)
    if fixed:
        deviation, var = rows - column(mean, 0, dtype), column(var, 0, dtype)
    else:
        deviation, _, var = centred(rows, weight)
    gamma, beta = column(gamma, 1, dtype), column(beta, 0, dtype)
    inv_std = 1 / np.sqrt(var + dtype(eps))
    normalized = deviation * inv_std
    z = gamma * normalized + beta
    if residual is not None:
        z = z + to_rows(residual, axes, dtype)
    dz = dy_rows * passes(z, activation)
    dbeta, dgamma = dz.sum(1, keepdims=True), (dz * normalized).sum(1, keepdims=True)
    through = 0 if fixed else share * (dbeta + normalized * dgamma)
    through_size = 0 if fixed else share * (abs(dbeta) + abs(normalized * dgamma))
    dx = gamma * inv_std * (dz - through)
    dx_scale = abs(gamma * inv_std) * (abs(dz) + through_size)
    channels = [x.shape[one] for one in axes]
    return Backward(
        from_rows(dx, x.shape, axes),
        from_rows(dx_scale, x.shape, axes),
        dgamma.reshape(channels),
        abs(dz * normalized).sum(1).reshape(channels),
        dbeta.reshape(channels),
        abs(dz).sum(1).reshape(channels),
        from_rows(dz, x.shape, axes),
    )


def ulp(value, dtype):
    """The distance between neighbours of ``dtype`` at a size."""
    bits, lowest = {
        "float16": (10, -24), "bfloat16": (7, -133), "float32": (23, -149), "float64": (52, -1074),
    }[np.dtype(dtype).name]  # fmt: skip
    _, exponent = np.frexp(np.abs(np.asarray(value, WIDE)))
    return np.ldexp(WIDE(1), np.maximum(exponent - 1 - bits, lowest))


def rounding(scale, dtype):
    """How far a result may be off whose terms have the sizes ``scale``.

    4 ulp; in float64, whose statistics have no wider type to come from, also 1e-14 of the largest.
    """
    allowed = 4 * ulp(scale, dtype)
    return allowed + 1e-14 * scale.max(initial=0) if dtype == np.float64 else allowed


def assert_within(actual, expected, tolerance, what):
    """``|actual - expected| <= tolerance`` everywhere, NaN nowhere."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    error = abs(np.asarray(actual, WIDE) - expected)
    tolerance = np.broadcast_to(tolerance, error.shape)
    if (error <= tolerance).all():
        return
    wrong = ~(error <= tolerance)
    place = tuple(index[0] for index in np.nonzero(wrong))
    raise AssertionError(
        f"{what}: {wrong.sum()} of {wrong.size} values are off, the first at {place}: "
        f"{actual[place]} instead of {expected[place]}, tolerance {tolerance[place]}"
    )
