# cython: language_level=3, cdivision=True
"""One thread's part of a sum that all threads take together."""

from blocks cimport Grid, Tickets, Turns, View, Weights, element, moments_block


cdef inline void sum_cells(
    const Grid& grid,
    View[const element] x,      # (N, C, S)
    const Weights& weights,     # (N, S)
    const double* shift,        # (C,)
    double* partial,            # (blocks, 4, C)
    Tickets* tickets,
) noexcept nogil:
    """Deviations and their squares: cell after cell as they lie in memory."""
    cdef Turns turns
    cdef ptrdiff_t cell = turns.take(tickets)
    while cell >= 0:
        moments_block(
            grid, x, weights, shift, cell % grid.groups, cell // grid.groups, partial,
            <element*> NULL,
        )
        cell = turns.take(tickets)
