# cython: language_level=3
"""From the cells' sums to a channel's statistics, in a fixed order: what both passes share."""

from libc.math cimport sqrt

from blocks cimport Grid, SumPair, View, add, element, moments_again


cdef inline SumPair merged(const Grid& grid, const SumPair* partial, ptrdiff_t c) noexcept nogil:
    """A channel's sums over all blocks, added in the blocks' order."""
    cdef SumPair total = partial[c]
    cdef ptrdiff_t block
    for block in range(1, grid.blocks):
        add(&total, partial[block * grid.channels + c])
    return total


cdef inline double centred(const SumPair& sums, double count, double* offset) noexcept nogil:
    """Sum of squared deviations from the mean, and the mean, both relative to the sums' shift.

    offset = sum d / n        m2 = sum d^2 - (sum d)^2 / n
    """
    offset[0] = (sums.first.hi + sums.first.lo) / count
    cdef double m2 = (
        (sums.second.hi - sums.first.hi * offset[0]) + (sums.second.lo - sums.first.lo * offset[0])
    )
    # Rounding may leave a constant channel just below zero; a NaN stays one.
    return 0.0 if m2 < 0 else m2


cdef inline void finish_moments(
    const Grid& grid,
    View[const element] x,      # (N, C, S)
    const SumPair* partial,     # (blocks, C)
    const double* shift,        # (C,)
    ptrdiff_t group,
    double* mean,               # (C,)
    double* mean_lo,            # (C,)
    double* m2,                 # (C,)
) noexcept nogil:
    """Mean and sum of squared deviations of a group's channels.

    The subtraction in `centred` loses sum d^2 / m2 in accuracy.  Where that is more than the
    element type can bear, the sums are taken again about the mean just found.
    """
    cdef double limit = 4.0 if sizeof(element) == 8 else 1048576.0
    cdef double count = <double> (grid.outer * grid.inner)
    cdef double start, offset, total
    cdef SumPair sums
    cdef ptrdiff_t c
    for c in range(grid.first_channel(group), grid.last_channel(group)):
        sums = merged(grid, partial, c)
        start = shift[c]
        m2[c] = centred(sums, count, &offset)
        if sums.second.hi > limit * m2[c]:
            start += offset
            sums = moments_again(grid, x, start, c)
            m2[c] = centred(sums, count, &offset)
        # mean + mean_lo = start + offset, exactly
        total = start + offset
        mean_lo[c] = (start - (total - (total - start))) + (offset - (total - start))
        mean[c] = total


cdef inline void finish_inv_std(
    const Grid& grid,
    double eps,
    ptrdiff_t group,
    double* var,                # (C,): m2 before, m2 / n after
    double* inv_std,            # (C,)
) noexcept nogil:
    """inv_std = 1 / sqrt(var + eps)"""
    cdef double count = <double> (grid.outer * grid.inner)
    cdef ptrdiff_t c
    for c in range(grid.first_channel(group), grid.last_channel(group)):
        var[c] = var[c] / count
        inv_std[c] = 1.0 / sqrt(var[c] + eps)
