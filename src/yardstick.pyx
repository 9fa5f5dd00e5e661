# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, freethreading_compatible=True
# distutils: language=c++
"""What the benchmark measures batch norm by: a copy and a triad, as fast as memory allows.

``stream`` chooses stores that go past the caches, the faster ones where the arrays are much larger
than these.
"""

from cython.parallel cimport prange

ctypedef fused real:
    float
    double

cdef extern from "yardstick.h" namespace "bncore" nogil:
    void pass_part "bncore::pass"[T](
        const T* x, const T* y, T* out, ptrdiff_t n, bint stream, int part, int parts
    )


def copy(const real[::1] x, real[::1] out, bint stream, int num_threads, int times=1):
    """out = x, so many times.

    Parameters
    ----------
    x, out : ndarray
        Flat, of the same length; float32 or float64.
    stream : bool
    num_threads, times : int
    """
    cdef int part, _
    _expect(x.shape[0] == out.shape[0] > 0)
    with nogil:
        for _ in range(times):
            for part in prange(num_threads, schedule="static", num_threads=num_threads):
                pass_part(&x[0], <const real*> NULL, &out[0], out.shape[0], stream, part,
                          num_threads)


def triad(
    const real[::1] x, const real[::1] y, real[::1] out, bint stream, int num_threads, int times=1
):
    """out = x + y, so many times.

    Parameters
    ----------
    x, y, out : ndarray
        Flat, of the same length; float32 or float64.
    stream : bool
    num_threads, times : int
    """
    cdef int part, _
    _expect(x.shape[0] == y.shape[0] == out.shape[0] > 0)
    with nogil:
        for _ in range(times):
            for part in prange(num_threads, schedule="static", num_threads=num_threads):
                pass_part(&x[0], &y[0], &out[0], out.shape[0], stream, part, num_threads)


cdef int _expect(bint same_length) except -1:
    if not same_length:
        raise ValueError("the arrays must have the same length, at least 1")
    return 0
