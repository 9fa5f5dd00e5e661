"""The memory layout of an array as the kernels see it.

A kernel works on three dimensions ``(N, C, S)``: outer positions, channels, contiguous inner
positions.  Every dense array has such a view, whatever its axis order: sort the axes by stride,
and the channel axes split the rest into outer and inner.  NCHW gives ``(N, C, H*W)``, NHWC
gives ``(N*H*W, C, 1)``, Fortran-ordered NC gives ``(1, C, N)``; none of them is copied.  Arrays
without such a view (reversed, broadcast, unaligned, byte-swapped ones) are copied once.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

PACKED = 128
"""Rows (of inner positions, or of channels where there are none) shorter than this lie side by
side: the kernels take several of them at a time."""


class Layout(NamedTuple):
    """How an array's axes map to ``(N, C, S)``."""

    order: tuple[int, ...]
    """The axes, outermost first, the channel axes side by side."""
    shape: tuple[int, int, int]
    """The sizes N, C and S."""
    split: tuple[int, int]
    """Where in ``order`` the channel axes begin and end."""


def layout_of(x: np.ndarray, channel_axes: tuple[int, ...]) -> Layout:
    """The layout in which ``x`` needs no copy if there is one, else the axes' own order.

    Parameters
    ----------
    x : ndarray
    channel_axes : tuple of int
        Sorted, non-negative.
    """
    return _layout_of(x.shape, x.strides, _size_of_native(x), channel_axes)


def has_view(array: np.ndarray, layout: Layout) -> bool:
    """Whether ``array`` can be seen in ``layout`` without a copy, by the kernels' rules."""
    return _has_view(array.shape, array.strides, _size_of_native(array), layout)


def to_kernel(array: np.ndarray, layout: Layout) -> np.ndarray:
    """``array`` as ``(N, C, S)``: a view where ``has_view`` says so, else a copy."""
    if has_view(array, layout):
        return array.transpose(layout.order).reshape(layout.shape)
    native = array.dtype.newbyteorder("=")
    return dense(array.transpose(layout.order), native).reshape(layout.shape)


def dense(array: np.ndarray, dtype: np.typing.DTypeLike) -> np.ndarray:
    """``array`` as kernels read it: C-contiguous, of a native dtype, and aligned; else a copy."""
    array = np.ascontiguousarray(array, dtype)
    return array if array.flags.aligned else array.copy()


def from_kernel(kernel_array: np.ndarray, layout: Layout, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `to_kernel`: a view of ``(N, C, S)`` with the axes of ``shape``."""
    ordered = kernel_array.reshape([shape[axis] for axis in layout.order])
    return ordered.transpose(np.argsort(layout.order))


def positions_to_kernel(positions: np.ndarray, layout: Layout) -> np.ndarray:
    """An array over x's axes with channel axes of length 1, as contiguous ``(N, S)``.

    It is ``(N, 1)`` where the array was broadcast over all inner axes.
    """
    ordered = positions.transpose(layout.order)
    n, _, s = layout.shape
    begin = layout.split[1]
    if s > 1 and not any(ordered.strides[begin:]):
        ordered = ordered[(..., *[slice(1)] * (ordered.ndim - begin))]
        s = 1
    return dense(ordered, positions.dtype).reshape(n, s)


def gate_bytes(shape: tuple[int, int, int]) -> int:
    """Bytes for a bit per element: a row's begin with a byte, and some are read beyond the last."""
    n, c, s = shape
    rows, length = (n * c, s) if s > 1 else (n, c)
    return rows * ((length + 7) // 8) + 8


def _size_of_native(array: np.ndarray) -> int:
    """Bytes of an element, 0 where the kernels can't read it as it lies."""
    return array.itemsize if array.flags.aligned and array.dtype.isnative else 0


# Both are remembered: a training loop asks them of the same shapes and strides again and again.


@lru_cache(maxsize=256)
def _layout_of(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, channel_axes: tuple[int, ...]
) -> Layout:
    by_stride = sorted(
        range(len(shape)),
        # An axis of length 1 has no stride to speak of: it stays beside its neighbour.
        key=lambda axis: (-abs(_effective_stride(shape, strides, axis)), axis),
    )
    logical = _logical_order(len(shape), channel_axes)
    if all(shape[axis] == 1 for axis in channel_axes):
        # One channel: every other axis is within its one row.
        orders = [
            channel_axes + tuple(axis for axis in order if axis not in channel_axes)
            for order in (by_stride, logical)
        ]
    else:
        orders = [tuple(by_stride), logical]
    for order in orders:
        if _side_by_side(order, channel_axes):
            layout = _split(shape, order, channel_axes)
            if _has_view(shape, strides, itemsize, layout):
                return layout
    return _split(shape, orders[1], channel_axes)


@lru_cache(maxsize=256)
def _has_view(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, layout: Layout
) -> bool:
    if itemsize == 0:  # see _size_of_native
        return False
    if 0 in shape:
        return True
    begin, end = layout.split
    merged = []
    for axes in (layout.order[:begin], layout.order[begin:end], layout.order[end:]):
        stride = _merged_stride(shape, strides, axes)
        if stride is None or stride % itemsize:
            return False
        merged.append(stride // itemsize)
    n, c, s = layout.shape
    outer, channel, inner = merged
    if s > 1:
        return inner == 1 and (s >= PACKED or c == 1 or channel == s)
    return (c == 1 or channel == 1) and (c >= PACKED or n == 1 or outer == c)


def _effective_stride(shape, strides, axis: int) -> int:
    if shape[axis] != 1:
        return strides[axis]
    following = [i for i in range(axis + 1, len(shape)) if shape[i] != 1]
    return strides[following[0]] * shape[following[0]] if following else 0


def _logical_order(ndim: int, channel_axes: tuple[int, ...]) -> tuple[int, ...]:
    outer = tuple(range(channel_axes[0]))
    inner = tuple(i for i in range(channel_axes[0], ndim) if i not in channel_axes)
    return outer + channel_axes + inner


def _side_by_side(order, channel_axes) -> bool:
    begin = min(order.index(axis) for axis in channel_axes)
    return order[begin : begin + len(channel_axes)] == channel_axes


def _split(shape, order, channel_axes) -> Layout:
    begin = order.index(channel_axes[0])
    end = begin + len(channel_axes)
    sizes = [shape[axis] for axis in order]
    parts = sizes[:begin], sizes[begin:end], sizes[end:]
    n, c, s = (math.prod(part) for part in parts)
    return Layout(order, (n, c, s), (begin, end))


def _merged_stride(shape, strides, axes: tuple[int, ...]) -> int | None:
    """The one byte stride that walks ``axes`` in order, or None; 0 where nothing is walked."""
    long_axes = [axis for axis in axes if shape[axis] != 1]
    if not long_axes:
        return 0
    for outer, inner in zip(long_axes, long_axes[1:], strict=False):
        if strides[outer] != strides[inner] * shape[inner]:
            return None
    return strides[long_axes[-1]]
