# cython: language_level=3
"""Where data is: what decides between the ways, cached, kept or streamed, to the same bits."""

from blocks cimport Grid

cdef extern from "simd.h" namespace "bncore" nogil:
    bint is_amd()

cdef enum:
    # A group of rows stays in a second-level cache of 1 to 2 MB; where it is read in long runs, in
    # the cache behind that is good enough.
    KEPT_BYTES = 2 << 20
    RESIDENT_BYTES = 12 << 20
    LONG_RUN = 2048 # elements
    # Where few cores share the cache behind it, more than fits is worth being kept; where many do
    # that cache is far, and the copies are best no more than half of a core's own.
    KEPT_FROM_AFAR_BYTES = 1 << 20
    # Columns side by side by the line: a group in a part of a core's own cache.
    COLUMNS_BYTES = 256 << 10
    # Beyond this a result is not read back from any cache, and storing past it saves a read.
    STREAMED_BYTES = 4 << 20


cdef inline bint is_resident(
    const Grid& grid, ptrdiff_t bytes_per_element, int num_threads
) noexcept nogil:
    """Whether groups are small enough to stay in a cache and enough to occupy the threads.

    bytes_per_element counts every array that is read twice.
    """
    cdef ptrdiff_t bytes = grid.group_size() * bytes_per_element
    if grid.columns:
        return bytes <= COLUMNS_BYTES and grid.groups >= 4 * num_threads
    return (
        bytes <= (RESIDENT_BYTES if grid.width * grid.inner >= LONG_RUN else KEPT_BYTES)
        and (num_threads == 1 or grid.groups >= 4 * num_threads)
    )


cdef inline bint keeps_rows(
    const Grid& grid, ptrdiff_t bytes_per_element, bint streamed
) noexcept nogil:
    """Whether the rows of a group that is_resident are kept where they can be read again.

    Where all is cached anyway it would be a detour.
    """
    cdef ptrdiff_t most = KEPT_BYTES if is_amd() else KEPT_FROM_AFAR_BYTES
    return (
        streamed and not grid.weighted and not grid.columns
        and grid.group_size() * bytes_per_element <= most
    )


cdef inline bint is_streamed(const Grid& grid, ptrdiff_t bytes_per_element) noexcept nogil:
    """Whether a result of this size should go past the caches."""
    return grid.outer * grid.channels * grid.inner * bytes_per_element > STREAMED_BYTES
