# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, freethreading_compatible=True
# distutils: language=c++
"""Per-channel moments.

Deviations from a value near the mean are summed in float64 with their squares, cell by cell of a
grid that depends on the shape alone; the cells' sums are merged in order, in twofold arithmetic.
One reading of the data suffices, except where that value was no good guess (`finish_moments`).
"""

cimport numpy as cnp
from cython.parallel cimport parallel, prange

from arguments cimport (
    equal_weights, is_small, kind_of, plain_view, read_only, room, shape_of, view_of, weights_of,
)
from blocks cimport (
    BFloat16, Grid, Half, Purpose, Scratch, Tickets, View, Weights, Workspace, element,
    finish_moments, join_team, moments_block, pilot, sum_grid, workspace_of, workspace_size,
)
from cells cimport sum_cells
from plain cimport FLOAT16, FLOAT32, FLOAT64, Kind, Shape, apart, is_plain, plain_input
from running cimport movable, move_running

cnp.import_array()

cdef void finish_group(
    const Grid& grid,
    View[const element] x,      # (N, C, S)
    const Weights& weights,     # (N, S)
    ptrdiff_t group,
    Workspace work,
    double* stats,              # (3, C): mean, mean_lo, m2
) noexcept nogil:
    cdef double* mean_lo = stats + grid.channels
    cdef double* m2 = mean_lo + grid.channels
    cdef ptrdiff_t c
    finish_moments(
        grid, x, weights, work.partial, work.shift, group, work.unit, stats, mean_lo, m2
    )
    for c in range(grid.first_channel(group), grid.last_channel(group)):
        m2[c] = m2[c] / work.unit[c] / work.unit[c]


cdef void compute_moments(
    const Grid& grid,
    View[const element] x,      # (N, C, S)
    const Weights& weights,     # (N, S)
    Workspace work,
    double* stats,              # (3, C): mean, mean_lo, m2
    int num_threads,
) noexcept nogil:
    """mean = sum w x / sum w        m2 = sum w (x - mean)^2"""
    cdef ptrdiff_t group, c
    cdef Tickets tickets
    tickets.hand_out_cells(grid, num_threads, False)
    with nogil, parallel(num_threads=num_threads):
        for c in prange(grid.channels, schedule="static"):
            work.shift[c] = pilot(grid, x, weights, c)
        join_team()
        sum_cells(grid, x, weights, work.shift, work.partial, &tickets)
        join_team()
        for group in prange(grid.groups, schedule="static"):
            finish_group(grid, x, weights, group, work, stats)


cdef void compute_small(
    const Grid& grid,
    View[const element] x,      # (N, C, S)
    const Weights& weights,     # (N, S)
    Workspace work,
    double* stats,              # (3, C): mean, mean_lo, m2
) noexcept nogil:
    """The same where all stays in a cache, by one thread."""
    cdef ptrdiff_t group, block, c
    for c in range(grid.channels):
        work.shift[c] = pilot(grid, x, weights, c)
    for group in range(grid.groups):
        for block in range(grid.blocks):
            moments_block(
                grid, x, weights, work.shift, group, block, work.partial, <element*> NULL
            )
        finish_group(grid, x, weights, group, work, stats)


cdef int moments_with_scratch(
    View[element] x, Shape shape, const Weights& weights, double* stats, int num_threads
) except -1:
    cdef Purpose purpose = Purpose(weights.any(), False, False, 1)
    cdef Grid grid = sum_grid(
        shape.outer, shape.channels, shape.inner, sizeof(element), purpose
    )
    cdef Scratch scratch
    cdef Workspace work = workspace_of(grid, room(scratch, workspace_size(grid)), 0)
    if is_small(shape):
        compute_small(grid, read_only(x), weights, work, stats)
        return 0
    with nogil:
        compute_moments(grid, read_only(x), weights, work, stats, num_threads)
    return 0


cdef int moments_as(
    element* like, cnp.ndarray x, given_weights, double[:, ::1] stats, int num_threads
) except -1:
    cdef Shape shape = shape_of(x)
    cdef Weights weights = weights_of(given_weights, shape)
    return moments_with_scratch(view_of(x, like), shape, weights, &stats[0, 0], num_threads)


cdef int moments_plain_as(
    element* like, cnp.ndarray x, Shape shape, double* stats, int num_threads
) except -1:
    return moments_with_scratch(
        plain_view(x, shape, like), shape, equal_weights(shape), stats, num_threads
    )


def moments(cnp.ndarray x not None, weights, double[:, ::1] stats not None, int num_threads):
    """Per-channel mean and sum of squared deviations; see `bncore.reference.moments`."""
    if not cnp.PyArray_SIZE(x) or (weights is not None and not weights.total):
        stats[:, :] = 0
        return
    cdef Kind kind = kind_of(x)
    if kind == FLOAT32:
        moments_as(<float*> NULL, x, weights, stats, num_threads)
    elif kind == FLOAT64:
        moments_as(<double*> NULL, x, weights, stats, num_threads)
    elif kind == FLOAT16:
        moments_as(<Half*> NULL, x, weights, stats, num_threads)
    else:
        moments_as(<BFloat16*> NULL, x, weights, stats, num_threads)


def moments_plain(x, axis, int num_threads):
    """`moments` for a plain array; None where it declines it.

    Returns
    -------
    (4, C) array or None
        Rows mean, mean_lo, m2, and the number of values.
    """
    cdef Shape shape
    if not plain_input(x, axis, &shape):
        return None
    cdef cnp.npy_intp stats_shape[2]
    stats_shape[0], stats_shape[1] = 4, shape.channels
    cdef cnp.ndarray stats = cnp.PyArray_EMPTY(2, stats_shape, cnp.NPY_DOUBLE, 0)
    cdef double* results = <double*> cnp.PyArray_DATA(stats)
    if shape.kind == FLOAT32:
        moments_plain_as(<float*> NULL, <cnp.ndarray> x, shape, results, num_threads)
    elif shape.kind == FLOAT64:
        moments_plain_as(<double*> NULL, <cnp.ndarray> x, shape, results, num_threads)
    elif shape.kind == FLOAT16:
        moments_plain_as(<Half*> NULL, <cnp.ndarray> x, shape, results, num_threads)
    else:
        moments_plain_as(<BFloat16*> NULL, <cnp.ndarray> x, shape, results, num_threads)
    cdef ptrdiff_t c
    for c in range(3 * shape.channels, 4 * shape.channels):
        results[c] = <double> (shape.outer * shape.inner)
    return stats


def movable_plain(running_mean, running_var, out, ptrdiff_t channels):
    """Whether `move_running_plain` may move these; `out` is what else is written before."""
    return (
        movable(running_mean, running_var, channels)
        and (out is None or is_plain(out))
        and apart(out, running_mean)
        and apart(out, running_var)
    )


def move_running_plain(
    cnp.ndarray running_mean not None, cnp.ndarray running_var not None,
    cnp.ndarray stats not None, double momentum, double unbias,
):
    """`bncore.reference.move_running` for arrays that are `movable_plain`."""
    move_running(
        running_mean, running_var, <const double*> cnp.PyArray_DATA(stats), momentum, unbias
    )
