"""Test data: one set of values in every layout that memory can have."""

import numpy as np

DENSE = ("C", "F", "channels_last", "read_only")
AWKWARD = ("sliced", "reversed", "unaligned", "byte_swapped", "broadcast")
LAYOUTS = DENSE + AWKWARD


def normal(seed, shape, dtype=np.float64):
    """Standard normal values; the same for each seed in every dtype but for rounding."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def in_layout(values, layout, axis=1):
    """The values in another layout; ``broadcast`` repeats the first of an axis without channels."""
    if layout == "F":
        return np.asfortranarray(values)
    if layout == "channels_last":
        axes = np.atleast_1d(axis)
        last = range(-len(axes), 0)
        return np.moveaxis(np.moveaxis(values, axes, last).copy(order="C"), last, axes)
    if layout == "sliced":
        wide = np.zeros([2 * size + 1 for size in values.shape], values.dtype)
        view = wide[(slice(1, None, 2),) * values.ndim]
        view[...] = values
        return view
    if layout == "reversed":
        backwards = (slice(None, None, -1),) * values.ndim
        return values[backwards].copy(order="C")[backwards]
    if layout == "unaligned":
        memory = np.empty(values.nbytes + 1, np.uint8)
        view = memory[1:].view(values.dtype).reshape(values.shape)
        view[...] = values
        return view
    if layout == "byte_swapped":
        return values.astype(values.dtype.newbyteorder())
    if layout == "broadcast":
        channels = {one % values.ndim for one in np.atleast_1d(axis)}
        free = [i for i in range(values.ndim) if i not in channels]
        first = np.take(values, [0], axis=free[0])
        return np.broadcast_to(first, values.shape)
    copy = values.copy(order="C")
    copy.flags.writeable = layout != "read_only"
    return copy


def bits(*arrays):
    """The arrays' bytes, for comparison bit by bit; None is nothing."""
    return [None if a is None else (a.shape, a.dtype.str, a.tobytes()) for a in arrays]
