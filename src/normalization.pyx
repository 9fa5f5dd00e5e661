# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, freethreading_compatible=True
# distutils: language=c++
"""y from x: by the batch's own statistics, or by given ones.

Batch norm moves memory, so the training pass is arranged by where the data is.  Where a group of
channels fits in a cache, one thread sums it and normalizes it at once, so that memory is read once
and written once; and while it normalizes one group it sums the next, whose rows it keeps, so that
memory is read and written at the same time.  Where it does not fit, and where channels lie side by
side, all threads sum, then all normalize.  Both ways walk one grid with the same arithmetic and
give the same bits.
"""

cimport numpy as cnp
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cython.parallel cimport parallel, prange, threadid
from libc.math cimport sqrt

from arguments cimport (
    FixedStatistics, any_negative, bits_for, bits_of, copy_of, doubles_of, epilogue_of,
    equal_weights, fixed_of, fresh_like, is_small, kind_of, plain_view, plain_view_or_none, pointer,
    read_fixed, read_only, room, shape_of, values_of, view_of, weights_of,
)
from blocks cimport (
    BFloat16, Epilogue, ForwardInput, Grid, Half, Kept, KeptMemory, NormalizeParameters,
    Scratch, Seams, Tickets, Turns, Values, View, Workspace, element, finish_inv_std,
    finish_moments, join_team, map_grid, moments_block, normalize_and_sum_block, normalize_block,
    pilot, sum_grid, workspace_of, workspace_size,
)
from cells cimport sum_cells
from plain cimport (
    FLOAT16, FLOAT32, FLOAT64, Kind, Shape, apart, plain_eps, plain_fixed, plain_input,
    plain_output, plain_parameter, plain_residual,
)
from running cimport movable, move_running
from traffic cimport is_resident, is_streamed, keeps_rows

cnp.import_array()


cdef void find_shift(
    const Grid& grid,
    const ForwardInput[element]& input,     # x: (N, C, S)
    ptrdiff_t group,
    double* shift,                          # (C,)
) noexcept nogil:
    cdef ptrdiff_t c
    for c in range(grid.first_channel(group), grid.last_channel(group)):
        shift[c] = pilot(grid, input.x, input.weights, c)


cdef void finish_group(
    const Grid& grid,
    const ForwardInput[element]& input,     # x: (N, C, S)
    double eps,
    ptrdiff_t group,
    Workspace work,
    double* stats,                          # (4, C): mean, mean_lo, var, inv_std
) noexcept nogil:
    cdef double* mean_lo = stats + grid.channels
    cdef double* var = mean_lo + grid.channels
    finish_moments(
        grid, input.x, input.weights, work.partial, work.shift, group, work.unit, stats, mean_lo,
        var,
    )
    finish_inv_std(grid, input.weights, eps, group, work.unit, var, var + grid.channels)


cdef void sum_group(
    const Grid& grid,
    const ForwardInput[element]& input,     # x: (N, C, S)
    ptrdiff_t group,
    Workspace work,
) noexcept nogil:
    cdef ptrdiff_t block
    find_shift(grid, input, group, work.shift)
    for block in range(grid.blocks):
        moments_block(
            grid, input.x, input.weights, work.shift, group, block, work.partial, input.keep
        )


cdef void normalize_groups(
    const Grid& grid,
    ForwardInput[element] input,            # x, residual: (N, C, S)
    const NormalizeParameters& parameters,
    double eps,
    bint stream,
    double* scratch,                        # of workspace_size
    element* keep,                          # scratch for a group's rows, or NULL
    View[element] y,                        # (N, C, S)
    double* stats,                          # (4, C)
    Tickets* tickets,
) noexcept nogil:
    """One thread's part: sum a group, then normalize it; while the next is summed, if it can be."""
    cdef Turns turns
    cdef Seams[element] seams
    cdef ptrdiff_t block, following, group = turns.take(tickets)
    cdef Workspace work
    input.keep = keep
    if group >= 0:
        work = workspace_of(grid, scratch, group)
        sum_group(grid, input, group, work)
    while group >= 0:
        finish_group(grid, input, eps, group, work, stats)
        following = turns.take(tickets)
        work = workspace_of(grid, scratch, following)
        if keep != NULL and grid.pairs(group, following):
            find_shift(grid, input, following, work.shift)
            for block in range(grid.blocks):
                normalize_and_sum_block(
                    grid, input, y, parameters, stream, group, block, following, work.shift,
                    work.partial, &seams,
                )
        else:
            for block in range(grid.blocks - 1, -1, -1):
                normalize_block(grid, input, y, parameters, stream, group, block, &seams)
            if following >= 0:
                sum_group(grid, input, following, work)
        group = following


cdef void normalize_cells(
    const Grid& grid,
    const ForwardInput[element]& input,     # x, residual: (N, C, S)
    const NormalizeParameters& parameters,
    bint stream,
    View[element] y,                        # (N, C, S)
    Tickets* tickets,
) noexcept nogil:
    """One thread's part: cell after cell as they lie in memory."""
    cdef Turns turns
    cdef Seams[element] seams
    cdef ptrdiff_t cell = turns.take(tickets)
    while cell >= 0:
        normalize_block(
            grid, input, y, parameters, stream, cell % grid.groups, cell // grid.groups, &seams
        )
        cell = turns.take(tickets)


cdef void normalize_by_groups(
    const Grid& grid,
    const ForwardInput[element]& input,     # x, residual: (N, C, S)
    const NormalizeParameters& parameters,
    double eps,
    double* scratch,                        # (num_threads, workspace_size)
    View[element] y,                        # (N, C, S)
    double* stats,                          # (4, C): mean, mean_lo, var, inv_std
    int num_threads,
) noexcept nogil:
    """y = activation(gamma (x - mean) inv_std + beta + residual), group after group"""
    cdef bint stream = is_streamed(grid, sizeof(element))
    cdef Tickets tickets
    cdef KeptMemory[element] kept
    tickets.hand_out_groups(grid, sizeof(element), num_threads)
    if keeps_rows(grid, sizeof(element), stream):
        kept.allocate(Kept[element].size(grid), num_threads)
    if num_threads == 1: # without OpenMP's microsecond
        normalize_groups(
            grid, input, parameters, eps, stream, scratch, kept.of(0), y, stats, &tickets
        )
        return
    with parallel(num_threads=num_threads):
        normalize_groups(
            grid, input, parameters, eps, stream, scratch + threadid() * workspace_size(grid),
            kept.of(threadid()), y, stats, &tickets,
        )


cdef void normalize_batch(
    const Grid& grid,
    const Grid& cells,                      # the same cut for the second pass
    const ForwardInput[element]& input,     # x, residual: (N, C, S)
    const NormalizeParameters& parameters,
    double eps,
    Workspace work,
    View[element] y,                        # (N, C, S)
    double* stats,                          # (4, C): mean, mean_lo, var, inv_std
    int num_threads,
) noexcept nogil:
    """The same, all sums first."""
    cdef ptrdiff_t c, group
    cdef bint stream = is_streamed(grid, sizeof(element))
    cdef Tickets to_sum, to_write
    to_sum.hand_out_cells(grid, num_threads, False)
    to_write.hand_out_cells(cells, num_threads, True)
    with parallel(num_threads=num_threads):
        for c in prange(grid.channels, schedule="static"):
            work.shift[c] = pilot(grid, input.x, input.weights, c)
        join_team()
        sum_cells(grid, input.x, input.weights, work.shift, work.partial, &to_sum)
        join_team()
        for group in prange(grid.groups, schedule="static"):
            finish_group(grid, input, eps, group, work, stats)
        join_team()
        normalize_cells(cells, input, parameters, stream, y, &to_write)


cdef void normalize_small(
    const Grid& grid,
    const Grid& cells,                      # the same cut for the second pass
    const ForwardInput[element]& input,     # x, residual: (N, C, S)
    const NormalizeParameters& parameters,
    double eps,
    Workspace work,
    View[element] y,                        # (N, C, S)
    double* stats,                          # (4, C): mean, mean_lo, var, inv_std
) noexcept nogil:
    """The same where all stays in a cache: one thread, and as few cells as may be."""
    cdef ptrdiff_t group, cell
    cdef Seams[element] seams
    for group in range(grid.groups):
        sum_group(grid, input, group, work)
        finish_group(grid, input, eps, group, work, stats)
    for cell in range(cells.groups * cells.blocks):
        normalize_block(
            cells, input, y, parameters, False, cell % cells.groups, cell // cells.groups, &seams
        )


cdef void normalize_fixed(
    const Grid& grid,
    const ForwardInput[element]& input,     # x, residual: (N, C, S)
    const NormalizeParameters& parameters,
    View[element] y,                        # (N, C, S)
    int num_threads,
) noexcept nogil:
    """y = activation(gamma (x - mean) inv_std + beta + residual), the statistics given"""
    cdef bint stream = is_streamed(grid, sizeof(element))
    cdef Tickets tickets
    tickets.hand_out_cells(grid, num_threads, False)
    if num_threads == 1 or grid.groups * grid.blocks == 1: # without OpenMP's microsecond
        normalize_cells(grid, input, parameters, stream, y, &tickets)
        return
    with parallel(num_threads=num_threads):
        normalize_cells(grid, input, parameters, stream, y, &tickets)


cdef void normalize_fixed_groups(
    const Grid& grid,
    const ForwardInput[element]& input,     # x, residual: (N, C, S)
    const FixedStatistics& fixed,
    bint stream,
    double* read,                           # (2, width), scratch
    View[element] y,                        # (N, C, S)
    Tickets* tickets,
) noexcept nogil:
    """One thread's part: group after group, whose statistics are read with it."""
    cdef Turns turns
    cdef Seams[element] seams
    cdef NormalizeParameters parameters
    cdef ptrdiff_t group = turns.take(tickets)
    while group >= 0:
        parameters = read_fixed(
            fixed, grid.first_channel(group), grid.last_channel(group), read
        )
        normalize_block(grid, input, y, parameters, stream, group, 0, &seams)
        group = turns.take(tickets)


cdef void normalize_fixed_by_groups(
    const Grid& grid,                       # of one block
    const ForwardInput[element]& input,     # x, residual: (N, C, S)
    const FixedStatistics& fixed,
    double* read,                           # (num_threads, 2, width), scratch
    View[element] y,                        # (N, C, S)
    int num_threads,
) noexcept nogil:
    """`normalize_fixed` where a cell is a whole group: each thread reads the statistics itself."""
    cdef bint stream = is_streamed(grid, sizeof(element))
    cdef Tickets tickets
    tickets.hand_out_cells(grid, num_threads, False)
    if num_threads == 1 or grid.groups == 1: # without OpenMP's microsecond
        normalize_fixed_groups(grid, input, fixed, stream, read, y, &tickets)
        return
    with parallel(num_threads=num_threads):
        normalize_fixed_groups(
            grid, input, fixed, stream, read + threadid() * 2 * grid.width, y, &tickets
        )


cdef void normalize_given(
    const Grid& grid,
    const ForwardInput[element]& input,     # x, residual: (N, C, S)
    const FixedStatistics& fixed,
    double* read,                           # scratch: (2, C); of one block (num_threads, 2, width)
    View[element] y,                        # (N, C, S)
    int num_threads,
) noexcept nogil:
    """y by statistics as the caller has them."""
    if grid.blocks == 1:
        normalize_fixed_by_groups(grid, input, fixed, read, y, num_threads)
    else:
        normalize_fixed(
            grid, input, read_fixed(fixed, 0, grid.channels, read), y, num_threads
        )


cdef void normalize_without_values(
    Shape shape, const ForwardInput[element]& input, Values gamma, Values beta,
    double eps, View[element] y, double* stats, int num_threads,
) noexcept nogil:
    """No position counts: mean and variance are 0."""
    cdef NormalizeParameters parameters
    cdef ptrdiff_t c, channels = shape.channels
    cdef Grid grid = map_grid(
        shape.outer, channels, shape.inner, sizeof(element), input.to_map(channels, y)
    )
    for c in range(channels):
        stats[c] = stats[channels + c] = stats[2 * channels + c] = 0
        stats[3 * channels + c] = 1 / sqrt(eps)
    parameters.mean, parameters.inv_std = stats, stats + 3 * channels
    parameters.mean_lo = NULL
    parameters.gamma, parameters.beta = gamma, beta
    normalize_fixed(grid, input, parameters, y, num_threads)


cdef int batch_with_scratch(
    ForwardInput[element] input, Shape shape, Values gamma, Values beta, double eps,
    View[element] y, double* stats, int num_threads,
) except -1:
    """Normalize one way or the other, with the scratch for it."""
    if not input.weights.total:
        with nogil:
            normalize_without_values(shape, input, gamma, beta, eps, y, stats, num_threads)
        return 0
    cdef Grid grid = sum_grid(
        shape.outer, shape.channels, shape.inner, sizeof(element), input.to_sum()
    )
    cdef NormalizeParameters parameters = fitted(stats, shape.channels, gamma, beta)
    cdef bint small = is_small(shape)
    cdef bint by_groups = not small and is_resident(grid, sizeof(element), num_threads)
    cdef Scratch scratch
    cdef double* data
    if by_groups:
        grid.room = grid.width
        data = room(scratch, num_threads * workspace_size(grid))
        with nogil:
            normalize_by_groups(grid, input, parameters, eps, data, y, stats, num_threads)
        return 0
    cdef Grid cells = map_grid(
        shape.outer, shape.channels, shape.inner, sizeof(element),
        input.to_map(shape.channels, y),
    )
    cdef Workspace work = workspace_of(grid, room(scratch, workspace_size(grid)), 0)
    if small:
        normalize_small(grid, cells, input, parameters, eps, work, y, stats)
        return 0
    with nogil:
        normalize_batch(grid, cells, input, parameters, eps, work, y, stats, num_threads)
    return 0


cdef inline NormalizeParameters fitted(
    const double* stats, ptrdiff_t channels, Values gamma, Values beta
) noexcept nogil:
    """The parameters of a map by the statistics, (4, C), of its own batch."""
    cdef NormalizeParameters parameters
    parameters.mean, parameters.mean_lo = stats, stats + channels
    parameters.inv_std = stats + 3 * channels
    parameters.gamma, parameters.beta = gamma, beta
    return parameters


cdef int forward_as(
    element* like, cnp.ndarray x, weights, const double[::1] gamma, const double[::1] beta,
    cnp.ndarray residual, activation, double eps, cnp.ndarray y, cnp.ndarray bits,
    double[:, ::1] stats, int num_threads,
) except -1:
    cdef Shape shape = shape_of(x)
    cdef ForwardInput[element] input = input_of(
        view_of(x, like), view_of(residual, like), epilogue_of(activation), shape
    )
    input.weights, input.bits = weights_of(weights, shape), bits_of(bits)
    return batch_with_scratch(
        input, shape, doubles_of(gamma), doubles_of(beta), eps, view_of(y, like), &stats[0, 0],
        num_threads,
    )


def forward(
    cnp.ndarray x not None, weights, const double[::1] gamma, const double[::1] beta,
    cnp.ndarray residual, activation, double eps, cnp.ndarray y not None, cnp.ndarray bits,
    double[:, ::1] stats not None, int num_threads,
):
    """Normalize by the batch's own statistics; see `bncore.reference.forward`."""
    if not cnp.PyArray_SIZE(x):
        stats[:3, :] = 0
        stats[3, :] = 1 / sqrt(eps)
        return
    cdef Kind kind = kind_of(x)
    if kind == FLOAT32:
        forward_as(
            <float*> NULL, x, weights, gamma, beta, residual, activation, eps, y, bits, stats,
            num_threads,
        )
    elif kind == FLOAT64:
        forward_as(
            <double*> NULL, x, weights, gamma, beta, residual, activation, eps, y, bits, stats,
            num_threads,
        )
    elif kind == FLOAT16:
        forward_as(
            <Half*> NULL, x, weights, gamma, beta, residual, activation, eps, y, bits, stats,
            num_threads,
        )
    else:
        forward_as(
            <BFloat16*> NULL, x, weights, gamma, beta, residual, activation, eps, y, bits, stats,
            num_threads,
        )


def forward_plain(
    x, gamma, beta, residual, tuple activation not None, axis, eps, out, tuple running,
    int num_threads,
):
    """`forward` for plain arguments; None where it declines them.

    Parameters
    ----------
    running : tuple or None
        Running mean and variance, momentum, ddof and the number of channels: they are moved in the
        end, as `bncore.reference.move_running` has it. A single value per channel is declined.

    Returns
    -------
    tuple or None
        y; x, or None where y has overwritten it; and the record of `bncore.Saved`.
    """
    cdef Shape shape
    if not (
        plain_input(x, axis, &shape)
        and plain_parameter(gamma, shape.channels)
        and plain_parameter(beta, shape.channels)
        and plain_eps(eps)
        and plain_output(out, <cnp.ndarray> x)
        and plain_residual(residual, <cnp.ndarray> x, out)
        and apart(out, gamma)
        and apart(out, beta)
        and (running is None or plain_running(running, out, shape))
    ):
        return None
    cdef Epilogue epilogue = epilogue_of(activation)
    cdef double values = <double> (shape.outer * shape.inner)
    cdef cnp.ndarray y = fresh_like(<cnp.ndarray> x) if out is None else <cnp.ndarray> out
    cdef cnp.npy_intp stats_shape[2]
    stats_shape[0], stats_shape[1] = 4, shape.channels
    cdef cnp.ndarray stats = cnp.PyArray_EMPTY(2, stats_shape, cnp.NPY_DOUBLE, 0)
    bits = bits_for(shape) if residual is not None and epilogue.activation else None
    cdef bint in_place = cnp.PyArray_DATA(y) == cnp.PyArray_DATA(<cnp.ndarray> x)
    # Whatever can fail comes before the kernel, which may write over x.
    result = y, None if in_place else x, (
        gamma, beta, (shape.axis,), eps, values, stats, (shape.channels,), x.shape, activation,
        residual is not None, bits, None, None if bits is None else x.strides,
    )
    cdef Values gammas = values_of(gamma), betas = values_of(beta)
    cdef double* results = <double*> cnp.PyArray_DATA(stats)
    if shape.kind == FLOAT32:
        forward_plain_as(
            <float*> NULL, <cnp.ndarray> x, shape, gammas, betas, residual, epilogue,
            PyFloat_AS_DOUBLE(eps), y, bits, results, num_threads,
        )
    elif shape.kind == FLOAT64:
        forward_plain_as(
            <double*> NULL, <cnp.ndarray> x, shape, gammas, betas, residual, epilogue,
            PyFloat_AS_DOUBLE(eps), y, bits, results, num_threads,
        )
    elif shape.kind == FLOAT16:
        forward_plain_as(
            <Half*> NULL, <cnp.ndarray> x, shape, gammas, betas, residual, epilogue,
            PyFloat_AS_DOUBLE(eps), y, bits, results, num_threads,
        )
    else:
        forward_plain_as(
            <BFloat16*> NULL, <cnp.ndarray> x, shape, gammas, betas, residual, epilogue,
            PyFloat_AS_DOUBLE(eps), y, bits, results, num_threads,
        )
    if running is not None:
        move_running(
            <cnp.ndarray> running[0], <cnp.ndarray> running[1], results,
            PyFloat_AS_DOUBLE(running[2]), values / (values - 1) if running[3] else 1.0,
        )
    return result


cdef inline bint plain_running(tuple running, out, const Shape& shape) except -1:
    """Whether a batch of this shape may move the running statistics."""
    cdef ptrdiff_t channels = running[4]
    return (
        channels == shape.channels
        and shape.outer * shape.inner > 1
        and PyFloat_CheckExact(running[2])
        and movable(running[0], running[1], channels)
        and apart(out, running[0])
        and apart(out, running[1])
    )


cdef inline ForwardInput[element] input_of(
    View[element] x, View[element] residual, Epilogue epilogue, Shape shape
) noexcept:
    """Without weights and bits."""
    cdef ForwardInput[element] input
    input.x, input.residual, input.epilogue = read_only(x), read_only(residual), epilogue
    input.weights = equal_weights(shape)
    input.bits = NULL
    input.keep = NULL
    return input


cdef int forward_plain_as(
    element* like, cnp.ndarray x, Shape shape, Values gamma, Values beta, residual,
    Epilogue epilogue, double eps, cnp.ndarray y, bits, double* stats, int num_threads,
) except -1:
    cdef ForwardInput[element] input = input_of(
        plain_view(x, shape, like), plain_view_or_none(residual, shape, like), epilogue, shape
    )
    input.bits = bits_of(bits)
    return batch_with_scratch(
        input, shape, gamma, beta, eps, plain_view(y, shape, like), stats, num_threads
    )


cdef int normalize_as(
    element* like, cnp.ndarray x, NormalizeParameters parameters, cnp.ndarray residual,
    activation, cnp.ndarray y, int num_threads,
) except -1:
    cdef Shape shape = shape_of(x)
    cdef ForwardInput[element] input = input_of(
        view_of(x, like), view_of(residual, like), epilogue_of(activation), shape
    )
    cdef View[element] y_view = view_of(y, like)
    cdef Grid grid = map_grid(
        shape.outer, shape.channels, shape.inner, sizeof(element),
        input.to_map(shape.channels, y_view),
    )
    with nogil:
        normalize_fixed(grid, input, parameters, y_view, num_threads)
    return 0


cdef NormalizeParameters parameters_of(
    const double[::1] mean, const double[::1] mean_lo, const double[::1] inv_std,
    const double[::1] gamma, const double[::1] beta,
) noexcept:
    cdef NormalizeParameters parameters
    parameters.mean, parameters.mean_lo = pointer(mean), pointer(mean_lo)
    parameters.inv_std = pointer(inv_std)
    parameters.gamma, parameters.beta = doubles_of(gamma), doubles_of(beta)
    return parameters


def normalize(
    cnp.ndarray x not None, const double[::1] mean not None, const double[::1] mean_lo,
    const double[::1] inv_std not None, const double[::1] gamma, const double[::1] beta,
    cnp.ndarray residual, activation, cnp.ndarray y not None, int num_threads,
):
    """Normalize by given statistics; see `bncore.reference.normalize`."""
    if not cnp.PyArray_SIZE(x):
        return
    cdef NormalizeParameters parameters = parameters_of(mean, mean_lo, inv_std, gamma, beta)
    cdef Kind kind = kind_of(x)
    if kind == FLOAT32:
        normalize_as(<float*> NULL, x, parameters, residual, activation, y, num_threads)
    elif kind == FLOAT64:
        normalize_as(<double*> NULL, x, parameters, residual, activation, y, num_threads)
    elif kind == FLOAT16:
        normalize_as(<Half*> NULL, x, parameters, residual, activation, y, num_threads)
    else:
        normalize_as(<BFloat16*> NULL, x, parameters, residual, activation, y, num_threads)


def normalize_plain(
    x, mean, var, gamma, beta, residual, tuple activation not None, axis, eps, out,
    int num_threads,
):
    """`normalize` for plain arguments; None where it declines them, else y."""
    cdef Shape shape
    if not (
        plain_fixed(x, mean, var, gamma, beta, axis, eps, out, &shape)
        and plain_residual(residual, <cnp.ndarray> x, out)
    ):
        return None
    cdef cnp.ndarray y = fresh_like(<cnp.ndarray> x) if out is None else <cnp.ndarray> out
    cdef bint written = normalize_plain_to(
        y, <cnp.ndarray> x, shape, mean, var, gamma, beta, residual, epilogue_of(activation),
        PyFloat_AS_DOUBLE(eps), num_threads,
    )
    return y if written else None


def evaluate_plain(
    x, mean, var, gamma, beta, residual, tuple activation not None, axis, eps, out,
    ptrdiff_t channels, int num_threads,
):
    """`normalize_plain` for a layer, and what its backward pass needs; None where it declines.

    Parameters
    ----------
    channels : int
        The layer's.

    Returns
    -------
    tuple or None
        y; and the record that `bncore.layers.BatchNorm` keeps.
    """
    cdef Shape shape
    if not (
        plain_fixed(x, mean, var, gamma, beta, axis, eps, out, &shape)
        and plain_residual(residual, <cnp.ndarray> x, out)
        and shape.channels == channels
    ):
        return None
    cdef cnp.ndarray y = fresh_like(<cnp.ndarray> x) if out is None else <cnp.ndarray> out
    # Whatever can fail comes before the kernel, which may write over x.
    result = y, (
        unless_at(x, y), unless_at(residual, y), residual is not None, None,
        copy_of(<cnp.ndarray> mean), copy_of(<cnp.ndarray> var),
    )
    cdef bint written = normalize_plain_to(
        y, <cnp.ndarray> x, shape, mean, var, gamma, beta, residual, epilogue_of(activation),
        PyFloat_AS_DOUBLE(eps), num_threads,
    )
    return result if written else None


cdef inline object unless_at(object array, cnp.ndarray y):
    """A plain array, or None where y lies in its place."""
    if array is None or cnp.PyArray_DATA(<cnp.ndarray> array) == cnp.PyArray_DATA(y):
        return None
    return array


cdef int normalize_plain_to(
    cnp.ndarray y, cnp.ndarray x, Shape shape, mean, var, gamma, beta, residual,
    Epilogue epilogue, double eps, int num_threads,
) except -1:
    """Write y; False for a negative variance, and nothing is written."""
    cdef FixedStatistics fixed = fixed_of(mean, var, gamma, beta, eps)
    if any_negative(fixed.var, shape.channels):
        return False
    if shape.kind == FLOAT32:
        normalize_plain_as(<float*> NULL, x, shape, fixed, residual, epilogue, y, num_threads)
    elif shape.kind == FLOAT64:
        normalize_plain_as(<double*> NULL, x, shape, fixed, residual, epilogue, y, num_threads)
    elif shape.kind == FLOAT16:
        normalize_plain_as(<Half*> NULL, x, shape, fixed, residual, epilogue, y, num_threads)
    else:
        normalize_plain_as(<BFloat16*> NULL, x, shape, fixed, residual, epilogue, y, num_threads)
    return True


cdef int normalize_plain_as(
    element* like, cnp.ndarray x, Shape shape, const FixedStatistics& fixed, residual,
    Epilogue epilogue, cnp.ndarray y, int num_threads,
) except -1:
    cdef ForwardInput[element] input = input_of(
        plain_view(x, shape, like), plain_view_or_none(residual, shape, like), epilogue, shape
    )
    cdef View[element] y_view = plain_view(y, shape, like)
    cdef Grid grid = map_grid(
        shape.outer, shape.channels, shape.inner, sizeof(element),
        input.to_map(shape.channels, y_view),
    )
    cdef Scratch scratch
    cdef bint small = is_small(shape)
    cdef int threads = 1 if small else num_threads
    cdef ptrdiff_t places = shape.channels if grid.blocks > 1 else threads * grid.width
    cdef double* read = room(scratch, 2 * places)
    if small:
        normalize_given(grid, input, fixed, read, y_view, threads)
        return 0
    with nogil:
        normalize_given(grid, input, fixed, read, y_view, threads)
    return 0
