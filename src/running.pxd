# cython: language_level=3
"""How running statistics move towards a batch's, where they are plain arrays."""

cimport numpy as cnp

from plain cimport is_plain, plain_like, plain_parameter

ctypedef fused real:
    float
    double


cdef inline bint movable(running_mean, running_var, ptrdiff_t channels) noexcept:
    """Whether `move_running` may move these."""
    return (
        is_plain(running_mean)
        and is_plain(running_var)
        and plain_parameter(running_mean, channels)
        and plain_like(running_var, <cnp.ndarray> running_mean)
        and cnp.PyArray_ISWRITEABLE(<cnp.ndarray> running_mean)
        and cnp.PyArray_ISWRITEABLE(<cnp.ndarray> running_var)
    )


cdef inline void move(
    real* running,          # (C,)
    const double* batch,    # (C,)
    double momentum,
    double factor,
    ptrdiff_t channels,
) noexcept nogil:
    """r <- (1 - momentum) r + momentum factor s"""
    cdef ptrdiff_t c
    for c in range(channels):
        running[c] = <real> ((1 - momentum) * running[c] + momentum * (batch[c] * factor))


cdef inline void move_running(
    cnp.ndarray running_mean,
    cnp.ndarray running_var,
    const double* stats,    # (4, C): mean, mean_lo, var, inv_std
    double momentum,
    double unbias,
) noexcept:
    """`bncore.reference.move_running` for arrays that are `movable`."""
    cdef ptrdiff_t channels = cnp.PyArray_DIM(running_mean, 0)
    cdef const double* var = stats + 2 * channels
    if cnp.PyArray_TYPE(running_mean) == cnp.NPY_FLOAT:
        move(<float*> cnp.PyArray_DATA(running_mean), stats, momentum, 1.0, channels)
        move(<float*> cnp.PyArray_DATA(running_var), var, momentum, unbias, channels)
    else:
        move(<double*> cnp.PyArray_DATA(running_mean), stats, momentum, 1.0, channels)
        move(<double*> cnp.PyArray_DATA(running_var), var, momentum, unbias, channels)
