"""The same values in every memory layout: ``(C, N, H, W)`` arrays as NC, NCHW, NHWC and so on."""

import numpy as np


def nc(values):
    return np.ascontiguousarray(values.reshape(len(values), -1).T), 1


def nc_fortran(values):
    return np.ascontiguousarray(values.reshape(len(values), -1)).T, 1


def ncl(values):
    c, n = values.shape[:2]
    return np.ascontiguousarray(values.reshape(c, n, -1).transpose(1, 0, 2)), 1


def nlc(values):
    c, n = values.shape[:2]
    return np.ascontiguousarray(values.reshape(c, n, -1).transpose(1, 2, 0)), -1


def nchw(values):
    return np.ascontiguousarray(values.transpose(1, 0, 2, 3)), 1


def nhwc(values):
    return np.ascontiguousarray(values.transpose(1, 2, 3, 0)), 3


def ncdhw(values):
    x, axis = nchw(values)
    return x[:, :, None], axis


def channels_first(values):
    return np.ascontiguousarray(values), 0


def reversed_nchw(values):
    x, axis = nchw(values)
    return np.ascontiguousarray(x[::-1, :, ::-1])[::-1, :, ::-1], axis


def sliced_nhwc(values):
    x, axis = nhwc(values)
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1] + 3), x.dtype)
    wide[..., 1 : 1 + x.shape[-1]] = x
    return wide[..., 1 : 1 + x.shape[-1]], axis


def unaligned_nchw(values):
    x, axis = nchw(values)
    memory = np.zeros(x.nbytes + 1, np.uint8)
    shifted = memory[1:].view(x.dtype).reshape(x.shape)
    shifted[...] = x
    return shifted, axis


def swapped_nchw(values):
    x, axis = nchw(values)
    return x.astype(x.dtype.newbyteorder()), axis


LAYOUTS = {
    function.__name__: function
    for function in (
        nc, nc_fortran, ncl, nlc, nchw, nhwc, ncdhw, channels_first, reversed_nchw, sliced_nhwc,
        unaligned_nchw, swapped_nchw,
    )
}  # fmt: skip
"""Functions from (C, N, H, W) values to (x, axis)."""

CONTIGUOUS = (
    "nc", "nc_fortran", "ncl", "nlc", "nchw", "nhwc", "ncdhw", "channels_first",
)  # fmt: skip
"""Those that the kernels take without a copy."""


def by_channel(x, axis):
    """x as (C, values)."""
    return np.moveaxis(np.asarray(x), axis, 0).reshape(x.shape[axis], -1)
