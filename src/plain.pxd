# cython: language_level=3, cdivision=True
"""Plain arguments: those that a kernel can read as they lie.

An array over the elements is plain where it is an exact ndarray of a type the kernels know,
aligned, in native byte order, without gaps and with positive strides, its axes in whatever order; a
result lies as x does.  What holds a value per channel is plain where it is C-contiguous float32 or
float64.  Anything else is declined, never refused: the functions in `bncore.functional` then check
and convert it.
"""

cimport numpy as cnp
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.long cimport PyLong_AsLongAndOverflow, PyLong_CheckExact
from libc.math cimport INFINITY
from libc.string cimport strcmp, strrchr

cdef enum Kind:
    FLOAT32
    FLOAT64
    FLOAT16
    BFLOAT16

cdef struct Shape:
    ptrdiff_t outer             # N
    ptrdiff_t channels          # C
    ptrdiff_t inner             # S
    Kind kind                   # of the elements
    int axis


cdef inline bint is_plain(object array) noexcept:
    """Whether array is plain as what holds a value per channel is, of any shape."""
    if not cnp.PyArray_CheckExact(array):
        return False
    cdef int type_number = cnp.PyArray_TYPE(<cnp.ndarray> array)
    return (
        (type_number == cnp.NPY_FLOAT or type_number == cnp.NPY_DOUBLE)
        and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray> array)
    )


cdef inline bint is_bfloat16(cnp.ndarray array) noexcept:
    """Whether the elements are ml_dtypes' bfloat16, which NumPy tells from others by name alone."""
    if not cnp.PyArray_ISUSERDEF(array):
        return False
    cdef const char* name = (<cnp.dtype> cnp.PyArray_DESCR(array)).typeobj.tp_name
    cdef const char* point = strrchr(name, c".")
    return strcmp(name if point == NULL else point + 1, "bfloat16") == 0


cdef inline bint is_behaved(object array, Kind* kind) noexcept:
    """Whether an array's elements, of what kind they are, can be read one by one."""
    if not cnp.PyArray_CheckExact(array) or not cnp.PyArray_ISBEHAVED_RO(<cnp.ndarray> array):
        return False
    cdef int type_number = cnp.PyArray_TYPE(<cnp.ndarray> array)
    if type_number == cnp.NPY_FLOAT:
        kind[0] = FLOAT32
    elif type_number == cnp.NPY_DOUBLE:
        kind[0] = FLOAT64
    elif type_number == cnp.NPY_FLOAT16:
        kind[0] = FLOAT16
    elif is_bfloat16(<cnp.ndarray> array):
        kind[0] = BFLOAT16
    else:
        return False
    return True


cdef inline bint find_shape(cnp.ndarray array, int channel, Shape* shape) noexcept:
    """The sizes of (N, C, S) in the order of memory; whether it has no gaps.

    `bncore._layout.layout_of` gives the same to whatever has none.
    """
    cdef ptrdiff_t stride = cnp.PyArray_ITEMSIZE(array)
    cdef int ndim = cnp.PyArray_NDIM(array), left = 0, axis
    cdef bint inside = True
    shape.outer = shape.inner = 1
    shape.channels = cnp.PyArray_DIM(array, channel)
    for axis in range(ndim):
        left += cnp.PyArray_DIM(array, axis) > 1
    while left:
        axis = ndim - 1
        while axis >= 0 and not (
            cnp.PyArray_STRIDE(array, axis) == stride and cnp.PyArray_DIM(array, axis) > 1
        ):
            axis -= 1
        if axis < 0:
            return False
        if axis == channel:
            inside = False
        elif inside:
            shape.inner *= cnp.PyArray_DIM(array, axis)
        else:
            shape.outer *= cnp.PyArray_DIM(array, axis)
        stride *= cnp.PyArray_DIM(array, axis)
        left -= 1
    return True


cdef inline bint plain_input(object x, object axis, Shape* shape) noexcept:
    """Whether x is plain with one channel axis and not empty; its shape as (N, C, S)."""
    if not PyLong_CheckExact(axis) or not is_behaved(x, &shape.kind):
        return False
    cdef cnp.ndarray array = <cnp.ndarray> x
    cdef int overflow = 0, ndim = cnp.PyArray_NDIM(array)
    cdef long channel = PyLong_AsLongAndOverflow(axis, &overflow)
    if channel < 0:
        channel += ndim
    if overflow or not 0 <= channel < ndim or cnp.PyArray_SIZE(array) == 0:
        return False
    shape.axis = channel
    return find_shape(array, channel, shape)


cdef inline bint plain_like(object array, cnp.ndarray x) noexcept:
    """Whether array is plain with the shape, dtype and strides of the plain array x."""
    cdef Kind kind
    cdef int axis
    if not (
        is_behaved(array, &kind)
        and cnp.PyArray_TYPE(<cnp.ndarray> array) == cnp.PyArray_TYPE(x)
        and cnp.PyArray_SAMESHAPE(<cnp.ndarray> array, x)
    ):
        return False
    for axis in range(cnp.PyArray_NDIM(x)):
        if (
            cnp.PyArray_STRIDE(<cnp.ndarray> array, axis) != cnp.PyArray_STRIDE(x, axis)
            and cnp.PyArray_DIM(x, axis) > 1
        ):
            return False
    return True


cdef inline bint plain_parameter(object array, ptrdiff_t channels) noexcept:
    """Whether array is None or plain with one value per channel."""
    return array is None or (
        is_plain(array)
        and cnp.PyArray_NDIM(<cnp.ndarray> array) == 1
        and cnp.PyArray_DIM(<cnp.ndarray> array, 0) == channels
    )


cdef inline bint plain_doubles(object array, ptrdiff_t channels) noexcept:
    """Whether array is plain with one float64 value per channel."""
    return (
        array is not None
        and plain_parameter(array, channels)
        and cnp.PyArray_TYPE(<cnp.ndarray> array) == cnp.NPY_DOUBLE
    )


cdef inline bint plain_eps(object eps) noexcept:
    return PyFloat_CheckExact(eps) and 0.0 < PyFloat_AS_DOUBLE(eps) < INFINITY


cdef inline bint apart(object a, object b) noexcept:
    """Whether two plain arrays share no memory; None shares none."""
    if a is None or b is None:
        return True
    cdef char* start_a = <char*> cnp.PyArray_DATA(<cnp.ndarray> a)
    cdef char* start_b = <char*> cnp.PyArray_DATA(<cnp.ndarray> b)
    return (
        start_a + cnp.PyArray_NBYTES(<cnp.ndarray> a) <= start_b
        or start_b + cnp.PyArray_NBYTES(<cnp.ndarray> b) <= start_a
    )


cdef inline bint same_or_apart(object a, object b) noexcept:
    """Whether a result may be written to a while b is read, element by element."""
    return (
        a is None
        or cnp.PyArray_DATA(<cnp.ndarray> a) == cnp.PyArray_DATA(<cnp.ndarray> b)
        or apart(a, b)
    )


cdef inline bint plain_output(object out, cnp.ndarray x) noexcept:
    """Whether out is None or takes a result like x, in place or apart from it."""
    return out is None or (
        plain_like(out, x)
        and cnp.PyArray_ISWRITEABLE(<cnp.ndarray> out)
        and same_or_apart(out, x)
    )


cdef inline bint plain_residual(object residual, cnp.ndarray x, object out) noexcept:
    """Whether residual is None or lies like x, with the result over it or apart from it."""
    return residual is None or (plain_like(residual, x) and same_or_apart(out, residual))


cdef inline bint plain_fixed(
    object x, object mean, object var, object gamma, object beta, object axis, object eps,
    object out, Shape* shape,
) noexcept:
    """Whether x has plain statistics and parameters given for it, and out takes a result."""
    return (
        plain_input(x, axis, shape)
        and mean is not None
        and var is not None
        and plain_parameter(mean, shape.channels)
        and plain_parameter(var, shape.channels)
        and plain_parameter(gamma, shape.channels)
        and plain_parameter(beta, shape.channels)
        and plain_eps(eps)
        and plain_output(out, <cnp.ndarray> x)
        and apart(out, mean)
        and apart(out, var)
        and apart(out, gamma)
        and apart(out, beta)
    )
