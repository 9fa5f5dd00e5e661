# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, freethreading_compatible=True
# distutils: language=c++
"""The gradient: sum dy and sum dy x' per channel, then dx of every element.

Arranged as the forward pass is (`normalization.pyx`): a group of channels that fits in a cache is
reduced and applied at once, a larger one in two passes of all threads, on one grid with the same
bits.  x' is never stored; the sums are taken of dy (x - mean) and scaled by inv_std at the end.
"""

cimport numpy as cnp
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.long cimport PyLong_AsLongAndOverflow, PyLong_CheckExact
from cython.parallel cimport parallel, prange, threadid
from libc.math cimport INFINITY

from arguments cimport (
    FixedStatistics, any_negative, bits_of, doubles_of, epilogue_of, equal_weights, fill_gradient,
    fixed_of, fresh_like, gradient_like, is_small, kind_of, no_epilogue, plain_view,
    plain_view_or_none, pointer, read_fixed, read_only, room, shape_of, values_of, view_of,
    weights_of,
)
from blocks cimport (
    GATES_AT_ONCE, BackwardInput, BackwardOutput, BFloat16, Epilogue, GradientParameters, Grid,
    Half, Kept, KeptMemory, NormalizeParameters, Scratch, Seams, Tickets, Turns, Values, View,
    element, find_gates, finish_sums, fixed_gradient_block, gate_block, gradient_and_sum_block,
    gradient_block, join_team, map_grid, reduce_block, sum_grid, workspace_of, workspace_size,
)
from plain cimport (
    FLOAT16, FLOAT32, FLOAT64, Kind, Shape, apart, plain_doubles, plain_fixed, plain_input,
    plain_like, plain_output, plain_parameter, same_or_apart,
)
from traffic cimport is_resident, is_streamed, keeps_rows

cnp.import_array()


cdef void reduce_cells(
    const Grid& grid,
    const BackwardInput[element]& input,    # dy, x: (N, C, S)
    const GradientParameters& parameters,
    double* partial,                        # (blocks, 4, C), scratch
    Tickets* tickets,
) noexcept nogil:
    """One thread's part of the sums: cell after cell as they lie in memory."""
    cdef Turns turns
    cdef ptrdiff_t cell = turns.take(tickets)
    while cell >= 0:
        reduce_block(grid, input, parameters, cell % grid.groups, cell // grid.groups, partial)
        cell = turns.take(tickets)


cdef void reduce_all(
    const Grid& grid,
    const BackwardInput[element]& input,    # dy, x: (N, C, S)
    const GradientParameters& parameters,
    double* partial,                        # (blocks, 4, C), scratch
    double* sum_dy,                         # (C,)
    double* sum_dy_xhat,                    # (C,)
    int num_threads,
) noexcept nogil:
    """sum dz        sum dz x'        x' = (x - mean) inv_std"""
    cdef ptrdiff_t group
    cdef Tickets tickets
    tickets.hand_out_cells(grid, num_threads, False)
    with parallel(num_threads=num_threads):
        reduce_cells(grid, input, parameters, partial, &tickets)
        join_team()
        for group in prange(grid.groups, schedule="static"):
            finish_sums(grid, partial, parameters.inv_std, group, sum_dy, sum_dy_xhat)


cdef void gradient_cells(
    const Grid& grid,
    const BackwardInput[element]& input,    # dy, x: (N, C, S)
    const GradientParameters& parameters,
    bint stream,
    const BackwardOutput[element]& output,  # dx, dz: (N, C, S)
    Tickets* tickets,
) noexcept nogil:
    """One thread's part of dx: cell after cell as they lie in memory."""
    cdef Turns turns
    cdef Seams[element] seams
    cdef ptrdiff_t cell = turns.take(tickets)
    while cell >= 0:
        gradient_block(
            grid, input, output, parameters, stream, cell % grid.groups, cell // grid.groups,
            &seams,
        )
        cell = turns.take(tickets)


cdef void apply_all(
    const Grid& grid,
    const BackwardInput[element]& input,    # dy, x: (N, C, S)
    const GradientParameters& parameters,
    const BackwardOutput[element]& output,  # dx: (N, C, S)
    int num_threads,
) noexcept nogil:
    """dx = gamma inv_std (dz - (sum_dy + x' sum_dy_xhat) / n)"""
    cdef bint stream = is_streamed(grid, sizeof(element))
    cdef Tickets tickets
    tickets.hand_out_cells(grid, num_threads, False)
    if num_threads == 1: # without OpenMP's microsecond
        gradient_cells(grid, input, parameters, stream, output, &tickets)
        return
    with parallel(num_threads=num_threads):
        gradient_cells(grid, input, parameters, stream, output, &tickets)


cdef void gate_cells(
    const Grid& grid,
    const BackwardInput[element]& input,    # dy, x, residual: (N, C, S)
    const GradientParameters& parameters,
    bint stream,
    View[element] dz,                       # (N, C, S)
    Tickets* tickets,
) noexcept nogil:
    """One thread's part of dz."""
    cdef Turns turns
    cdef Seams[element] seams
    cdef ptrdiff_t cell = turns.take(tickets)
    while cell >= 0:
        gate_block(
            grid, input, dz, parameters, stream, cell % grid.groups, cell // grid.groups, &seams
        )
        cell = turns.take(tickets)


cdef void gate_all(
    const Grid& grid,
    const BackwardInput[element]& input,    # dy, x, residual: (N, C, S)
    const GradientParameters& parameters,
    View[element] dz,                       # (N, C, S)
    int num_threads,
) noexcept nogil:
    """dz = activation'(z) dy"""
    cdef bint stream = is_streamed(grid, sizeof(element))
    cdef Tickets tickets
    tickets.hand_out_cells(grid, num_threads, False)
    with parallel(num_threads=num_threads):
        gate_cells(grid, input, parameters, stream, dz, &tickets)


cdef void fixed_cells(
    const Grid& grid,
    const BackwardInput[element]& input,    # dy, x: (N, C, S)
    const GradientParameters& parameters,
    bint stream,
    double* partial,                        # (blocks, 4, C), scratch; NULL: no sums are taken
    View[element] dx,                       # (N, C, S); NULL: only the sums
    Tickets* tickets,
) noexcept nogil:
    """One thread's part: the sums of a cell, and dx of it while it is cached."""
    cdef Turns turns
    cdef Seams[element] seams
    cdef ptrdiff_t group, block, cell = turns.take(tickets)
    while cell >= 0:
        group, block = cell % grid.groups, cell // grid.groups
        if partial != NULL:
            reduce_block(grid, input, parameters, group, block, partial)
        if dx.data != NULL:
            fixed_gradient_block(
                grid, input, dx, parameters, stream, group, block, &seams
            )
        cell = turns.take(tickets)


cdef void differentiate_fixed(
    const Grid& grid,
    const BackwardInput[element]& input,    # dy, x: (N, C, S)
    const GradientParameters& parameters,
    double* partial,                        # (blocks, 4, C), scratch; NULL: no sums are taken
    View[element] dx,                       # (N, C, S); NULL: only the sums
    double* sum_dy,                         # (C,)
    double* sum_dy_xhat,                    # (C,)
    int num_threads,
) noexcept nogil:
    """dx = gamma inv_std dz, and the sums of the same cell while it is cached"""
    cdef ptrdiff_t group
    cdef bint stream = is_streamed(grid, sizeof(element))
    cdef Tickets tickets
    tickets.hand_out_cells(grid, num_threads, False)
    with parallel(num_threads=num_threads):
        fixed_cells(grid, input, parameters, stream, partial, dx, &tickets)
    if partial != NULL:
        for group in range(grid.groups):
            finish_sums(grid, partial, parameters.inv_std, group, sum_dy, sum_dy_xhat)


cdef void reduce_group(
    const Grid& grid,
    const BackwardInput[element]& input,    # dy, x, residual: (N, C, S)
    const GradientParameters& parameters,
    ptrdiff_t group,
    double* partial,                        # (blocks, 4, C)
) noexcept nogil:
    cdef ptrdiff_t block
    for block in range(grid.blocks):
        reduce_block(grid, input, parameters, group, block, partial)


cdef void reduce_small(
    const Grid& grid,
    const BackwardInput[element]& input,    # dy, x: (N, C, S)
    const GradientParameters& parameters,
    double* partial,                        # (blocks, 4, C), scratch
    double* sum_dy,                         # (C,)
    double* sum_dy_xhat,                    # (C,)
) noexcept nogil:
    """`reduce_all` on one thread."""
    cdef ptrdiff_t group
    for group in range(grid.groups):
        reduce_group(grid, input, parameters, group, partial)
        finish_sums(grid, partial, parameters.inv_std, group, sum_dy, sum_dy_xhat)


cdef void differentiate_groups(
    const Grid& grid,
    BackwardInput[element] input,           # dy, x, residual: (N, C, S)
    const GradientParameters& parameters,
    bint stream,
    double* scratch,                        # of workspace_size
    element* keep,                          # scratch for a group's rows, or NULL
    const BackwardOutput[element]& output,  # dx, dz: (N, C, S)
    double* sum_dy,                         # (C,)
    double* sum_dy_xhat,                    # (C,)
    Tickets* tickets,
) noexcept nogil:
    """One thread's part: reduce a group, then apply it; while the next is reduced, if it can be."""
    cdef Turns turns
    cdef Seams[element] seams
    cdef ptrdiff_t block, following, group = turns.take(tickets)
    cdef double* partial
    input.keep = keep
    if group >= 0:
        partial = workspace_of(grid, scratch, group).partial
        reduce_group(grid, input, parameters, group, partial)
    while group >= 0:
        finish_sums(grid, partial, parameters.inv_std, group, sum_dy, sum_dy_xhat)
        following = turns.take(tickets)
        partial = workspace_of(grid, scratch, following).partial
        if keep != NULL and grid.pairs(group, following):
            for block in range(grid.blocks):
                gradient_and_sum_block(
                    grid, input, output, parameters, stream, group, block, following, partial,
                    &seams,
                )
        else:
            for block in range(grid.blocks - 1, -1, -1):
                gradient_block(grid, input, output, parameters, stream, group, block, &seams)
            if following >= 0:
                reduce_group(grid, input, parameters, following, partial)
        group = following


cdef void differentiate_by_groups(
    const Grid& grid,
    const BackwardInput[element]& input,    # dy, x: (N, C, S)
    const GradientParameters& parameters,
    double* scratch,                        # (num_threads, workspace_size)
    const BackwardOutput[element]& output,  # dx, dz: (N, C, S)
    double* sum_dy,                         # (C,)
    double* sum_dy_xhat,                    # (C,)
    int num_threads,
) noexcept nogil:
    """Both passes, group after group."""
    cdef bint stream = is_streamed(grid, sizeof(element))
    cdef Tickets tickets
    cdef KeptMemory[element] kept
    tickets.hand_out_groups(grid, sizeof(element), num_threads)
    if keeps_rows(grid, 2 * sizeof(element), stream):
        kept.allocate(2 * Kept[element].size(grid), num_threads)
    if num_threads == 1: # without OpenMP's microsecond
        differentiate_groups(
            grid, input, parameters, stream, scratch, kept.of(0), output, sum_dy, sum_dy_xhat,
            &tickets,
        )
        return
    with parallel(num_threads=num_threads):
        differentiate_groups(
            grid, input, parameters, stream, scratch + threadid() * workspace_size(grid),
            kept.of(threadid()), output, sum_dy, sum_dy_xhat, &tickets,
        )


cdef void differentiate(
    const Grid& grid,
    const Grid& cells,                      # the same cut for the second pass
    const BackwardInput[element]& input,    # dy, x: (N, C, S)
    const GradientParameters& parameters,
    double* partial,                        # (blocks, 4, C), scratch
    const BackwardOutput[element]& output,  # dx, dz: (N, C, S)
    double* sum_dy,                         # (C,)
    double* sum_dy_xhat,                    # (C,)
    int num_threads,
) noexcept nogil:
    """The same, all sums first."""
    cdef ptrdiff_t group
    cdef bint stream = is_streamed(grid, sizeof(element))
    cdef Tickets to_sum, to_write
    to_sum.hand_out_cells(grid, num_threads, False)
    to_write.hand_out_cells(cells, num_threads, True)
    with parallel(num_threads=num_threads):
        reduce_cells(grid, input, parameters, partial, &to_sum)
        join_team()
        for group in prange(grid.groups, schedule="static"):
            finish_sums(grid, partial, parameters.inv_std, group, sum_dy, sum_dy_xhat)
        join_team()
        gradient_cells(cells, input, parameters, stream, output, &to_write)


cdef void differentiate_small(
    const Grid& grid,
    const Grid& cells,                      # the same cut for the second pass
    const BackwardInput[element]& input,    # dy, x: (N, C, S)
    const GradientParameters& parameters,
    double* partial,                        # (blocks, 4, C), scratch
    const BackwardOutput[element]& output,  # dx, dz: (N, C, S)
    double* sum_dy,                         # (C,)
    double* sum_dy_xhat,                    # (C,)
) noexcept nogil:
    """`differentiate` where all stays in a cache: one thread, and as few cells as may be."""
    cdef ptrdiff_t cell
    cdef Seams[element] seams
    reduce_small(grid, input, parameters, partial, sum_dy, sum_dy_xhat)
    for cell in range(cells.groups * cells.blocks):
        gradient_block(
            cells, input, output, parameters, False, cell % cells.groups, cell // cells.groups,
            &seams,
        )


cdef void differentiate_fixed_small(
    const Grid& grid,
    const Grid& cells,                      # the same cut for dx
    const BackwardInput[element]& input,    # dy, x: (N, C, S)
    const GradientParameters& parameters,
    double* partial,                        # (blocks, 4, C), scratch; NULL: no sums are taken
    View[element] dx,                       # (N, C, S); NULL: only the sums
    double* sum_dy,                         # (C,)
    double* sum_dy_xhat,                    # (C,)
) noexcept nogil:
    """`differentiate_fixed` where all stays in a cache: one thread, and as few cells as may be."""
    cdef Tickets tickets
    if partial != NULL:
        reduce_small(grid, input, parameters, partial, sum_dy, sum_dy_xhat)
    tickets.hand_out_cells(cells, 1, False)
    fixed_cells(cells, input, parameters, False, NULL, dx, &tickets)


cdef inline BackwardInput[element] plain_input_of(
    View[element] dy, View[element] x, const Shape& shape
) noexcept:
    """dy and x alone."""
    cdef BackwardInput[element] input
    input.dy, input.x = read_only(dy), read_only(x)
    input.residual.data = NULL
    input.epilogue, input.weights = no_epilogue(), equal_weights(shape)
    input.bits = NULL
    input.keep = NULL
    return input


cdef inline BackwardOutput[element] just(View[element] dx) noexcept:
    """dx without dz."""
    cdef BackwardOutput[element] output
    output.dx = dx
    output.dz.data = NULL
    return output


cdef inline Grid sums_of(const BackwardInput[element]& input, const Shape& shape) noexcept nogil:
    return sum_grid(shape.outer, shape.channels, shape.inner, sizeof(element), input.to_sum())


cdef inline Grid cells_of(
    const BackwardInput[element]& input, const BackwardOutput[element]& output, const Shape& shape
) noexcept nogil:
    return map_grid(
        shape.outer, shape.channels, shape.inner, sizeof(element),
        input.to_map(shape.channels, output),
    )


cdef inline double* gates_and_sums(Scratch& scratch, const Grid& grid, int shares) except NULL:
    """Room for the gates, (2, C), and behind them for sums, (shares, workspace_size)."""
    return room(scratch, 2 * grid.channels + shares * workspace_size(grid))


cdef void prepare_gates(
    ptrdiff_t channels,
    const BackwardInput[element]& input,
    double* low,                            # (2, C), scratch
    GradientParameters* parameters,         # its gates are set
    int num_threads,
) noexcept nogil:
    """Where an activation hands its gradient on, found for each channel if it is needed."""
    cdef ptrdiff_t part, parts = (channels + GATES_AT_ONCE - 1) // GATES_AT_ONCE
    parameters.gate_low, parameters.gate_high = low, low + channels
    if input.epilogue.activation == 0 or input.bits != NULL:
        return
    if num_threads == 1 or parts == 1: # without OpenMP's microsecond
        for part in range(parts):
            find_gates(input, parameters[0], channels, part, low, low + channels)
        return
    for part in prange(parts, num_threads=num_threads):
        find_gates(input, parameters[0], channels, part, low, low + channels)


cdef int reduce_with_scratch(
    BackwardInput[element] input, Shape shape, GradientParameters parameters, double* sums,
    int num_threads,
) except -1:
    """Both sums into sums, (2, C)."""
    cdef Grid grid = sums_of(input, shape)
    cdef Scratch scratch
    cdef double* partial = room(scratch, workspace_size(grid))
    cdef double* sum_dy_xhat = sums + shape.channels
    if is_small(shape):
        reduce_small(grid, input, parameters, partial, sums, sum_dy_xhat)
        return 0
    with nogil:
        reduce_all(grid, input, parameters, partial, sums, sum_dy_xhat, num_threads)
    return 0


cdef inline Epilogue undoing(double slope) noexcept:
    """For what a leaky ReLU has made of z; of slope 1 it is z."""
    cdef Epilogue epilogue = no_epilogue()
    if slope != 1:
        epilogue.activation, epilogue.a = 3, slope
    return epilogue


cdef int reduce_as(
    element* like, cnp.ndarray dy, cnp.ndarray x, GradientParameters parameters, double slope,
    double[:, ::1] sums, int num_threads,
) except -1:
    cdef Shape shape = shape_of(x)
    cdef BackwardInput[element] input = plain_input_of(view_of(dy, like), view_of(x, like), shape)
    input.epilogue = undoing(slope)
    return reduce_with_scratch(input, shape, parameters, &sums[0, 0], num_threads)


cdef int reduce_plain_as(
    element* like, cnp.ndarray dy, cnp.ndarray x, Shape shape, GradientParameters parameters,
    double* sums, int num_threads,
) except -1:
    cdef BackwardInput[element] input = plain_input_of(
        plain_view(dy, shape, like), plain_view(x, shape, like), shape
    )
    return reduce_with_scratch(input, shape, parameters, sums, num_threads)


def reduce(
    cnp.ndarray dy not None, cnp.ndarray x not None, const double[::1] mean not None,
    const double[::1] mean_lo, const double[::1] inv_std not None, double slope,
    double[:, ::1] sums not None, int num_threads,
):
    """The two sums a gradient needs; see `bncore.reference.reduce`."""
    if not cnp.PyArray_SIZE(x):
        sums[:, :] = 0
        return
    if mean_lo is None:
        mean_lo = zeros(mean.shape[0])
    cdef GradientParameters parameters = parameters_of(mean, mean_lo, inv_std, None, None)
    cdef Kind kind = kind_of(x)
    if kind == FLOAT32:
        reduce_as(<float*> NULL, dy, x, parameters, slope, sums, num_threads)
    elif kind == FLOAT64:
        reduce_as(<double*> NULL, dy, x, parameters, slope, sums, num_threads)
    elif kind == FLOAT16:
        reduce_as(<Half*> NULL, dy, x, parameters, slope, sums, num_threads)
    else:
        reduce_as(<BFloat16*> NULL, dy, x, parameters, slope, sums, num_threads)


def reduce_plain(dy, x, mean, mean_lo, inv_std, axis, int num_threads):
    """`reduce` for plain arguments, the sums in a (2, C) array; None where it declines them."""
    cdef Shape shape
    if not (
        plain_input(x, axis, &shape)
        and plain_like(dy, <cnp.ndarray> x)
        and plain_doubles(mean, shape.channels)
        and plain_doubles(inv_std, shape.channels)
        and (mean_lo is None or plain_doubles(mean_lo, shape.channels))
    ):
        return None
    low = zeros(shape.channels) if mean_lo is None else mean_lo
    cdef GradientParameters parameters = plain_parameters(mean, low, inv_std)
    cdef cnp.npy_intp sums_shape[2]
    sums_shape[0], sums_shape[1] = 2, shape.channels
    cdef cnp.ndarray sums = cnp.PyArray_EMPTY(2, sums_shape, cnp.NPY_DOUBLE, 0)
    cdef double* totals = <double*> cnp.PyArray_DATA(sums)
    if shape.kind == FLOAT32:
        reduce_plain_as(
            <float*> NULL, <cnp.ndarray> dy, <cnp.ndarray> x, shape, parameters, totals,
            num_threads,
        )
    elif shape.kind == FLOAT64:
        reduce_plain_as(
            <double*> NULL, <cnp.ndarray> dy, <cnp.ndarray> x, shape, parameters, totals,
            num_threads,
        )
    elif shape.kind == FLOAT16:
        reduce_plain_as(
            <Half*> NULL, <cnp.ndarray> dy, <cnp.ndarray> x, shape, parameters, totals,
            num_threads,
        )
    else:
        reduce_plain_as(
            <BFloat16*> NULL, <cnp.ndarray> dy, <cnp.ndarray> x, shape, parameters, totals,
            num_threads,
        )
    return sums


cdef GradientParameters parameters_of(
    const double[::1] mean, const double[::1] mean_lo, const double[::1] inv_std,
    const double[::1] gamma, const double[::1] beta,
) noexcept:
    cdef GradientParameters parameters
    parameters.mean, parameters.mean_lo = pointer(mean), pointer(mean_lo)
    parameters.inv_std = pointer(inv_std)
    parameters.gamma, parameters.beta = doubles_of(gamma), doubles_of(beta)
    parameters.sum_dy = parameters.sum_dy_xhat = NULL
    parameters.gate_low = parameters.gate_high = NULL
    parameters.count = 0
    return parameters


cdef inline GradientParameters plain_parameters(mean, mean_lo, inv_std) noexcept:
    """Statistics that are `plain_doubles`, and nothing else yet."""
    cdef GradientParameters parameters = parameters_of(None, None, None, None, None)
    parameters.mean, parameters.mean_lo = doubles_in(mean), doubles_in(mean_lo)
    parameters.inv_std = doubles_in(inv_std)
    return parameters


cdef inline const double* doubles_in(array) noexcept:
    """The start of what is `plain_doubles`."""
    return <const double*> cnp.PyArray_DATA(<cnp.ndarray> array)


cdef object zeros(ptrdiff_t channels):
    cdef cnp.npy_intp shape = channels
    return cnp.PyArray_ZEROS(1, &shape, cnp.NPY_DOUBLE, 0)


cdef int apply_with_grid(
    BackwardInput[element] input, Shape shape, GradientParameters parameters,
    BackwardOutput[element] output, int num_threads,
) except -1:
    cdef Grid grid = cells_of(input, output, shape)
    if is_small(shape):
        apply_all(grid, input, parameters, output, 1)
        return 0
    with nogil:
        apply_all(grid, input, parameters, output, num_threads)
    return 0


cdef int apply_as(
    element* like, cnp.ndarray dy, cnp.ndarray x, GradientParameters parameters, double slope,
    cnp.ndarray dx, int num_threads,
) except -1:
    cdef Shape shape = shape_of(x)
    cdef BackwardInput[element] input = plain_input_of(view_of(dy, like), view_of(x, like), shape)
    input.epilogue = undoing(slope)
    return apply_with_grid(input, shape, parameters, just(view_of(dx, like)), num_threads)


cdef int apply_plain_as(
    element* like, cnp.ndarray dy, cnp.ndarray x, Shape shape, GradientParameters parameters,
    cnp.ndarray dx, int num_threads,
) except -1:
    cdef BackwardInput[element] input = plain_input_of(
        plain_view(dy, shape, like), plain_view(x, shape, like), shape
    )
    return apply_with_grid(
        input, shape, parameters, just(plain_view(dx, shape, like)), num_threads
    )


def apply(
    cnp.ndarray dy not None, cnp.ndarray x not None, const double[::1] mean not None,
    const double[::1] mean_lo, const double[::1] inv_std not None, const double[::1] gamma,
    double slope, const double[:, ::1] sums not None, double count, cnp.ndarray dx not None,
    int num_threads,
):
    """The gradient of the input from the two sums; see `bncore.reference.apply`."""
    if not cnp.PyArray_SIZE(x):
        return
    cdef GradientParameters parameters = parameters_of(mean, mean_lo, inv_std, gamma, None)
    parameters.sum_dy, parameters.sum_dy_xhat = &sums[0, 0], &sums[1, 0]
    parameters.count = count
    cdef Kind kind = kind_of(x)
    if kind == FLOAT32:
        apply_as(<float*> NULL, dy, x, parameters, slope, dx, num_threads)
    elif kind == FLOAT64:
        apply_as(<double*> NULL, dy, x, parameters, slope, dx, num_threads)
    elif kind == FLOAT16:
        apply_as(<Half*> NULL, dy, x, parameters, slope, dx, num_threads)
    else:
        apply_as(<BFloat16*> NULL, dy, x, parameters, slope, dx, num_threads)


def apply_plain(
    dy, x, mean, mean_lo, inv_std, gamma, sum_dy, sum_dy_xhat, count, axis, out, int num_threads
):
    """`apply` for plain arguments; None where it declines them, else dx."""
    cdef Shape shape
    if not (
        plain_input(x, axis, &shape)
        and plain_like(dy, <cnp.ndarray> x)
        and plain_doubles(mean, shape.channels)
        and plain_doubles(inv_std, shape.channels)
        and (mean_lo is None or plain_doubles(mean_lo, shape.channels))
        and plain_parameter(gamma, shape.channels)
        and plain_doubles(sum_dy, shape.channels)
        and plain_doubles(sum_dy_xhat, shape.channels)
        and plain_output(out, <cnp.ndarray> x)
        and same_or_apart(out, dy)
        and apart(out, mean)
        and apart(out, inv_std)
        and apart(out, mean_lo)
        and apart(out, gamma)
        and apart(out, sum_dy)
        and apart(out, sum_dy_xhat)
    ):
        return None
    low = zeros(shape.channels) if mean_lo is None else mean_lo
    cdef GradientParameters parameters = plain_parameters(mean, low, inv_std)
    parameters.count = plain_count(count, shape.channels)
    if not parameters.count > 0:
        return None
    parameters.gamma = values_of(gamma)
    parameters.sum_dy, parameters.sum_dy_xhat = doubles_in(sum_dy), doubles_in(sum_dy_xhat)
    cdef cnp.ndarray dx = fresh_like(<cnp.ndarray> x) if out is None else <cnp.ndarray> out
    if shape.kind == FLOAT32:
        apply_plain_as(
            <float*> NULL, <cnp.ndarray> dy, <cnp.ndarray> x, shape, parameters, dx, num_threads
        )
    elif shape.kind == FLOAT64:
        apply_plain_as(
            <double*> NULL, <cnp.ndarray> dy, <cnp.ndarray> x, shape, parameters, dx, num_threads
        )
    elif shape.kind == FLOAT16:
        apply_plain_as(
            <Half*> NULL, <cnp.ndarray> dy, <cnp.ndarray> x, shape, parameters, dx, num_threads
        )
    else:
        apply_plain_as(
            <BFloat16*> NULL, <cnp.ndarray> dy, <cnp.ndarray> x, shape, parameters, dx, num_threads
        )
    return dx


cdef inline double plain_count(object count, ptrdiff_t channels) noexcept:
    """A number, or what is the same float64 for each channel; 0 for anything else."""
    cdef const double* counts
    cdef bint differ = False
    cdef int overflow = 0
    cdef long number
    cdef ptrdiff_t c
    if PyFloat_CheckExact(count):
        return PyFloat_AS_DOUBLE(count)
    if PyLong_CheckExact(count):
        number = PyLong_AsLongAndOverflow(count, &overflow)
        return 0 if overflow else <double> number
    if not plain_doubles(count, channels):
        return 0
    counts = doubles_in(count)
    for c in range(channels):
        differ |= counts[c] != counts[0]
    return 0 if differ else counts[0]


cdef int gate_as(
    element* like, cnp.ndarray dy, cnp.ndarray x, weights, GradientParameters parameters,
    cnp.ndarray residual, cnp.ndarray bits, activation, cnp.ndarray dz, int num_threads,
) except -1:
    cdef Shape shape = shape_of(x)
    cdef BackwardInput[element] input = plain_input_of(view_of(dy, like), view_of(x, like), shape)
    input.residual, input.epilogue = read_only(view_of(residual, like)), epilogue_of(activation)
    input.weights, input.bits = weights_of(weights, shape), bits_of(bits)
    cdef View[element] dz_view = view_of(dz, like)
    cdef Grid grid = cells_of(input, just(dz_view), shape)
    cdef Scratch scratch
    cdef double* gates = room(scratch, 2 * shape.channels)
    with nogil:
        prepare_gates(shape.channels, input, gates, &parameters, num_threads)
        gate_all(grid, input, parameters, dz_view, num_threads)
    return 0


def activation_backward(
    cnp.ndarray dy not None, cnp.ndarray x not None, weights, const double[::1] mean not None,
    const double[::1] mean_lo, const double[::1] inv_std not None, const double[::1] gamma,
    const double[::1] beta, cnp.ndarray residual, cnp.ndarray bits, activation,
    cnp.ndarray dz not None, int num_threads,
):
    """The gradient of an activation; see `bncore.reference.activation_backward`."""
    if not cnp.PyArray_SIZE(x):
        return
    cdef GradientParameters parameters = parameters_of(mean, mean_lo, inv_std, gamma, beta)
    cdef Kind kind = kind_of(x)
    if kind == FLOAT32:
        gate_as(
            <float*> NULL, dy, x, weights, parameters, residual, bits, activation, dz, num_threads
        )
    elif kind == FLOAT64:
        gate_as(
            <double*> NULL, dy, x, weights, parameters, residual, bits, activation, dz, num_threads
        )
    elif kind == FLOAT16:
        gate_as(
            <Half*> NULL, dy, x, weights, parameters, residual, bits, activation, dz, num_threads
        )
    else:
        gate_as(
            <BFloat16*> NULL, dy, x, weights, parameters, residual, bits, activation, dz,
            num_threads,
        )


cdef int fixed_with_scratch(
    BackwardInput[element] input, Shape shape, GradientParameters parameters, View[element] dx,
    double* sums, int num_threads,
) except -1:
    """`differentiate_fixed` with its scratch; sums is (2, C), or NULL where none are taken."""
    cdef bint summing = sums != NULL
    cdef Grid cells = cells_of(input, just(dx), shape)
    cdef Grid grid = sums_of(input, shape) if summing else cells
    cdef Scratch scratch
    cdef double* gates = gates_and_sums(scratch, grid, summing)
    cdef double* partial = gates + 2 * shape.channels if summing else NULL
    cdef double* sum_dy_xhat = sums + shape.channels if summing else NULL
    if is_small(shape):
        prepare_gates(shape.channels, input, gates, &parameters, 1)
        differentiate_fixed_small(grid, cells, input, parameters, partial, dx, sums, sum_dy_xhat)
        return 0
    with nogil:
        prepare_gates(shape.channels, input, gates, &parameters, num_threads)
        differentiate_fixed(grid, input, parameters, partial, dx, sums, sum_dy_xhat, num_threads)
    return 0


cdef int fixed_as(
    element* like, cnp.ndarray dy, cnp.ndarray x, GradientParameters parameters, activation,
    cnp.ndarray dx, double[:, ::1] sums, int num_threads,
) except -1:
    cdef Shape shape = shape_of(x)
    cdef BackwardInput[element] input = plain_input_of(view_of(dy, like), view_of(x, like), shape)
    input.epilogue = epilogue_of(activation)
    cdef double* totals = &sums[0, 0] if sums is not None else NULL
    return fixed_with_scratch(input, shape, parameters, view_of(dx, like), totals, num_threads)


def fixed_backward(
    cnp.ndarray dy not None, cnp.ndarray x not None, const double[::1] mean not None,
    const double[::1] inv_std not None, const double[::1] gamma, const double[::1] beta,
    activation, cnp.ndarray dx, double[:, ::1] sums, int num_threads,
):
    """The gradient where the statistics were given; see `bncore.reference.fixed_backward`."""
    if not cnp.PyArray_SIZE(x):
        if sums is not None:
            sums[:, :] = 0
        return
    cdef const double[::1] mean_lo = zeros(mean.shape[0])
    cdef GradientParameters parameters = parameters_of(mean, mean_lo, inv_std, gamma, beta)
    cdef Kind kind = kind_of(x)
    if kind == FLOAT32:
        fixed_as(
            <float*> NULL, dy, x, parameters, activation, dx, sums, num_threads
        )
    elif kind == FLOAT64:
        fixed_as(
            <double*> NULL, dy, x, parameters, activation, dx, sums, num_threads
        )
    elif kind == FLOAT16:
        fixed_as(
            <Half*> NULL, dy, x, parameters, activation, dx, sums, num_threads
        )
    else:
        fixed_as(
            <BFloat16*> NULL, dy, x, parameters, activation, dx, sums, num_threads
        )


def fixed_backward_plain(
    dy, x, mean, var, gamma, beta, tuple activation not None, axis, eps, bint summing, out,
    int num_threads,
):
    """`fixed_backward` for plain arguments; None where it declines them.

    Returns
    -------
    tuple or None
        dx; dgamma and dbeta, None where no sums are to be taken; and whether dx has overwritten x.
    """
    cdef Shape shape
    if not (
        plain_fixed(x, mean, var, gamma, beta, axis, eps, out, &shape)
        and plain_like(dy, <cnp.ndarray> x)
        and same_or_apart(out, dy)
    ):
        return None
    cdef ptrdiff_t channels = shape.channels
    cdef Scratch scratch
    cdef double* read = room(scratch, 5 * channels)
    cdef double* sums = read + 3 * channels
    cdef GradientParameters parameters
    cdef FixedStatistics fixed = fixed_of(mean, var, gamma, beta, PyFloat_AS_DOUBLE(eps))
    if any_negative(fixed.var, channels):
        return None
    parameters = read_fixed_gradient(fixed, channels, read)
    cdef Epilogue epilogue = epilogue_of(activation)
    cdef cnp.ndarray dx = fresh_like(<cnp.ndarray> x) if out is None else <cnp.ndarray> out
    # Whatever can fail comes before the kernel, which may write over x or dy.
    result = (
        dx, gradient_like(gamma) if summing else None, gradient_like(beta) if summing else None,
        cnp.PyArray_DATA(dx) == cnp.PyArray_DATA(<cnp.ndarray> x),
    )
    if shape.kind == FLOAT32:
        fixed_plain_as(
            <float*> NULL, <cnp.ndarray> dy, <cnp.ndarray> x, shape, parameters, epilogue, dx,
            sums if summing else NULL, num_threads,
        )
    elif shape.kind == FLOAT64:
        fixed_plain_as(
            <double*> NULL, <cnp.ndarray> dy, <cnp.ndarray> x, shape, parameters, epilogue, dx,
            sums if summing else NULL, num_threads,
        )
    elif shape.kind == FLOAT16:
        fixed_plain_as(
            <Half*> NULL, <cnp.ndarray> dy, <cnp.ndarray> x, shape, parameters, epilogue, dx,
            sums if summing else NULL, num_threads,
        )
    else:
        fixed_plain_as(
            <BFloat16*> NULL, <cnp.ndarray> dy, <cnp.ndarray> x, shape, parameters, epilogue, dx,
            sums if summing else NULL, num_threads,
        )
    fill_gradient(result[1], sums + channels)
    fill_gradient(result[2], sums)
    return result


cdef inline GradientParameters read_fixed_gradient(
    const FixedStatistics& fixed, ptrdiff_t channels,
    double* read,                           # (3, C), scratch: mean, inv_std, mean_lo
) noexcept:
    """`read_fixed` for a gradient."""
    cdef GradientParameters parameters
    cdef NormalizeParameters given = read_fixed(fixed, 0, channels, read)
    cdef double* mean_lo = read + 2 * channels
    cdef ptrdiff_t c
    for c in range(channels):
        mean_lo[c] = 0
    parameters.mean, parameters.mean_lo, parameters.inv_std = given.mean, mean_lo, given.inv_std
    parameters.gamma, parameters.beta = given.gamma, given.beta
    return parameters


cdef int fixed_plain_as(
    element* like, cnp.ndarray dy, cnp.ndarray x, Shape shape, GradientParameters parameters,
    Epilogue epilogue, cnp.ndarray dx, double* sums, int num_threads,
) except -1:
    cdef BackwardInput[element] input = plain_input_of(
        plain_view(dy, shape, like), plain_view(x, shape, like), shape
    )
    input.epilogue = epilogue
    cdef View[element] dx_view = plain_view(dx, shape, like)
    return fixed_with_scratch(input, shape, parameters, dx_view, sums, num_threads)


cdef int backward_with_scratch(
    BackwardInput[element] input, Shape shape, const double* stats, Values gamma,
    Values beta, double count, BackwardOutput[element] output, double* sums,
    int num_threads,
) except -1:
    """Differentiate one way or the other, by the statistics that a forward pass wrote.

    sums is (2, C), or NULL where neither they nor dx are asked for.
    """
    cdef Grid grid = sums_of(input, shape)
    cdef GradientParameters parameters
    parameters.mean, parameters.mean_lo = stats, stats + shape.channels
    parameters.inv_std = stats + 3 * shape.channels
    parameters.gamma, parameters.beta = gamma, beta
    cdef double* sum_dy = sums
    cdef double* sum_dy_xhat = sums + shape.channels if sums != NULL else NULL
    parameters.sum_dy, parameters.sum_dy_xhat = sum_dy, sum_dy_xhat
    # Where no position counts the statistics are constants: nothing is shared out.
    parameters.count = count if count > 0 else INFINITY
    cdef bint small = is_small(shape)
    cdef bint by_groups = (
        not small and output.dx.data != NULL
        and is_resident(grid, 2 * sizeof(element), num_threads)
    )
    if by_groups:
        grid.room = grid.width
    cdef Grid cells = cells_of(input, output, shape)
    cdef Scratch scratch
    cdef double* gates = gates_and_sums(scratch, grid, num_threads if by_groups else 1)
    cdef double* partial = gates + 2 * shape.channels
    cdef Tickets to_write
    if small:
        prepare_gates(shape.channels, input, gates, &parameters, 1)
        if output.dx.data != NULL:
            differentiate_small(
                grid, cells, input, parameters, partial, output, sum_dy, sum_dy_xhat
            )
            return 0
        if sum_dy != NULL:
            reduce_small(grid, input, parameters, partial, sum_dy, sum_dy_xhat)
        if output.dz.data != NULL:
            to_write.hand_out_cells(cells, 1, False)
            gate_cells(cells, input, parameters, False, output.dz, &to_write)
        return 0
    with nogil:
        prepare_gates(shape.channels, input, gates, &parameters, num_threads)
        if by_groups:
            differentiate_by_groups(
                grid, input, parameters, partial, output, sum_dy, sum_dy_xhat, num_threads
            )
        elif output.dx.data != NULL:
            differentiate(
                grid, cells, input, parameters, partial, output, sum_dy, sum_dy_xhat, num_threads
            )
        else:
            if sum_dy != NULL:
                reduce_all(grid, input, parameters, partial, sum_dy, sum_dy_xhat, num_threads)
            if output.dz.data != NULL:
                gate_all(cells, input, parameters, output.dz, num_threads)
    return 0


cdef int backward_as(
    element* like, cnp.ndarray dy, cnp.ndarray x, weights, const double[:, ::1] stats,
    const double[::1] gamma, const double[::1] beta, cnp.ndarray bits, activation, double count,
    cnp.ndarray dx, cnp.ndarray dz, double[:, ::1] sums, int num_threads,
) except -1:
    cdef Shape shape = shape_of(x)
    cdef BackwardInput[element] input = plain_input_of(view_of(dy, like), view_of(x, like), shape)
    input.epilogue, input.bits = epilogue_of(activation), bits_of(bits)
    input.weights = weights_of(weights, shape)
    cdef BackwardOutput[element] output
    output.dx, output.dz = view_of(dx, like), view_of(dz, like)
    cdef double* totals = &sums[0, 0] if sums is not None else NULL
    return backward_with_scratch(
        input, shape, &stats[0, 0], doubles_of(gamma), doubles_of(beta), count, output, totals,
        num_threads,
    )


def backward(
    cnp.ndarray dy not None, cnp.ndarray x not None, weights, const double[:, ::1] stats not None,
    const double[::1] gamma, const double[::1] beta, cnp.ndarray bits, activation, double count,
    cnp.ndarray dx, cnp.ndarray dz, double[:, ::1] sums, int num_threads,
):
    """The gradient through the statistics; see `bncore.reference.backward`."""
    if not cnp.PyArray_SIZE(x):
        if sums is not None:
            sums[:, :] = 0
        return
    cdef Kind kind = kind_of(x)
    if kind == FLOAT32:
        backward_as(
            <float*> NULL, dy, x, weights, stats, gamma, beta, bits, activation, count, dx, dz,
            sums, num_threads,
        )
    elif kind == FLOAT64:
        backward_as(
            <double*> NULL, dy, x, weights, stats, gamma, beta, bits, activation, count, dx, dz,
            sums, num_threads,
        )
    elif kind == FLOAT16:
        backward_as(
            <Half*> NULL, dy, x, weights, stats, gamma, beta, bits, activation, count, dx, dz,
            sums, num_threads,
        )
    else:
        backward_as(
            <BFloat16*> NULL, dy, x, weights, stats, gamma, beta, bits, activation, count, dx, dz,
            sums, num_threads,
        )


cdef int backward_plain_as(
    element* like, cnp.ndarray dy, cnp.ndarray x, Shape shape, weights, const double* stats,
    Values gamma, Values beta, bits, Epilogue epilogue, dx, dz, double* sums, int num_threads,
) except -1:
    cdef BackwardInput[element] input = plain_input_of(
        plain_view(dy, shape, like), plain_view(x, shape, like), shape
    )
    input.epilogue, input.bits = epilogue, bits_of(bits)
    input.weights = weights_of(weights, shape)
    cdef BackwardOutput[element] output = just(plain_view_or_none(dx, shape, like))
    output.dz = plain_view_or_none(dz, shape, like)
    return backward_with_scratch(
        input, shape, stats, gamma, beta, input.weights.total, output, sums, num_threads
    )


def backward_plain(
    dy, x, tuple record not None, bint with_dx, bint with_sums, bint with_dz, out,
    int num_threads,
):
    """`backward` for plain arguments; None where it declines them.

    Parameters
    ----------
    record : tuple
        Of `bncore.Saved`.
    with_dx, with_sums, with_dz : bool
        What is asked for; the sums come with dx. ``out`` is for dx alone.

    Returns
    -------
    tuple or None
        dx; dgamma and dbeta, from the sums; and dz: each None where it is neither asked for nor
        comes with what is; and whether dx has overwritten x.
    """
    gamma, beta, axes, _, _, stats, _, _, activation, _, bits, weights, _ = record
    cdef Shape shape
    if not (
        len(<tuple?> axes) == 1
        and plain_input(x, (<tuple> axes)[0], &shape)
        and plain_like(dy, <cnp.ndarray> x)
        and plain_parameter(gamma, shape.channels)
        and plain_parameter(beta, shape.channels)
        and plain_output(out, <cnp.ndarray> x)
        and same_or_apart(out, dy)
        and apart(out, gamma)
        and apart(out, beta)
        and apart(out, <cnp.ndarray?> stats)
    ):
        return None
    cdef Epilogue epilogue = epilogue_of(activation)
    cdef bint summing = with_dx or with_sums
    dx = None
    if with_dx:
        dx = fresh_like(<cnp.ndarray> x) if out is None else out
    cdef bint in_place = dx is not None and (
        cnp.PyArray_DATA(<cnp.ndarray> dx) == cnp.PyArray_DATA(<cnp.ndarray> x)
    )
    # Whatever can fail comes before the kernel, which may write over x or dy.
    dz = fresh_like(<cnp.ndarray> x) if with_dz else None
    result = (
        dx, gradient_like(gamma) if summing else None, gradient_like(beta) if summing else None,
        dz, in_place,
    )
    cdef Scratch scratch
    cdef double* sums = room(scratch, 2 * shape.channels)
    cdef const double* statistics = <const double*> cnp.PyArray_DATA(<cnp.ndarray> stats)
    cdef Values gammas = values_of(gamma), betas = values_of(beta)
    if shape.kind == FLOAT32:
        backward_plain_as(
            <float*> NULL, <cnp.ndarray> dy, <cnp.ndarray> x, shape, weights, statistics, gammas,
            betas, bits, epilogue, dx, dz, sums if summing else NULL, num_threads,
        )
    elif shape.kind == FLOAT64:
        backward_plain_as(
            <double*> NULL, <cnp.ndarray> dy, <cnp.ndarray> x, shape, weights, statistics, gammas,
            betas, bits, epilogue, dx, dz, sums if summing else NULL, num_threads,
        )
    elif shape.kind == FLOAT16:
        backward_plain_as(
            <Half*> NULL, <cnp.ndarray> dy, <cnp.ndarray> x, shape, weights, statistics, gammas,
            betas, bits, epilogue, dx, dz, sums if summing else NULL, num_threads,
        )
    else:
        backward_plain_as(
            <BFloat16*> NULL, <cnp.ndarray> dy, <cnp.ndarray> x, shape, weights, statistics, gammas,
            betas, bits, epilogue, dx, dz, sums if summing else NULL, num_threads,
        )
    fill_gradient(result[1], sums + shape.channels)
    fill_gradient(result[2], sums)
    return result
