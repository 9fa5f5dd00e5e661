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
    FLOAT16, FLOAT32, FLOAT64, Kind, Shape, kind_of, read_only, room, shape_of, view_of, weights_of,
)
from blocks cimport (
    BFloat16, Grid, Half, Purpose, Scratch, Tickets, View, Weights, Workspace, element,
    finish_moments, join_team, pilot, sum_grid, workspace_of, workspace_size,
)
from cells cimport sum_cells
from running cimport movable, move_running

cnp.import_array()

cdef void compute_moments(
    const Grid& grid,
    View[const element] x,      # (N, C, S)
    const Weights& weights,     # (N, S)
    Workspace work,
    double* mean,               # (C,)
    double* mean_lo,            # (C,)
    double* m2,                 # (C,)
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
            finish_moments(
                grid, x, weights, work.partial, work.shift, group, work.unit, mean, mean_lo, m2
            )
            for c in range(grid.first_channel(group), grid.last_channel(group)):
                m2[c] = m2[c] / work.unit[c] / work.unit[c]


cdef int moments_as(
    element* like, cnp.ndarray x, given_weights, double[:, ::1] stats, int num_threads
) except -1:
    cdef View[element] view = view_of(x, like)
    cdef Shape shape = shape_of(x)
    cdef Weights weights = weights_of(given_weights, shape)
    cdef Purpose purpose = Purpose(weights.any(), False, False, 1)
    cdef Grid grid = sum_grid(
        shape.outer, shape.channels, shape.inner, sizeof(element), purpose
    )
    cdef Scratch scratch
    cdef Workspace work = workspace_of(grid, room(scratch, workspace_size(grid)), 0)
    with nogil:
        compute_moments(
            grid, read_only(view), weights, work, &stats[0, 0], &stats[1, 0], &stats[2, 0],
            num_threads,
        )
    return 0


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


def movable_plain(running_mean, running_var, out, ptrdiff_t channels):
    """Whether `move_running_plain` may move these; `out` is what else is written before."""
    return movable(running_mean, running_var, out, channels)


def move_running_plain(
    cnp.ndarray running_mean not None, cnp.ndarray running_var not None,
    cnp.ndarray stats not None, double momentum, double unbias,
):
    """`bncore.reference.move_running` for arrays that are `movable_plain`."""
    move_running(
        running_mean, running_var, <const double*> cnp.PyArray_DATA(stats), momentum, unbias
    )
