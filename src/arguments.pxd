# cython: language_level=3, cdivision=True
"""Arguments of the kernels: arrays read, and made, without a Python object in between."""

cimport numpy as cnp
from libc.math cimport sqrt
from libc.stdint cimport int8_t, uint8_t
from libc.string cimport memcpy

from blocks cimport Epilogue, NormalizeParameters, Scratch, Values, View, Weights, element
from plain cimport BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Kind, Shape

cdef extern from "numpy/arrayobject.h":
    object PyArray_NewLikeArray(cnp.ndarray, cnp.NPY_ORDER, void*, int)


cdef inline bint is_small(const Shape& shape) noexcept nogil:
    """Whether a second thread, or others' turn at Python meanwhile, costs more than it brings."""
    return shape.outer * shape.channels * shape.inner <= 32768


cdef inline double* room(Scratch& scratch, size_t count) except NULL:
    """So many numbers, or a MemoryError."""
    cdef double* start = scratch.take(count)
    if not start:
        raise MemoryError("no memory for the sums of a batch")
    return start


cdef inline cnp.ndarray bits_for(const Shape& shape):
    """Room for a gate's bits, as `bncore._layout.gate_bytes` has it."""
    cdef ptrdiff_t rows = shape.outer, length = shape.channels
    if shape.inner > 1:
        rows, length = shape.outer * shape.channels, shape.inner
    cdef cnp.npy_intp size = rows * ((length + 7) // 8) + 8
    return cnp.PyArray_EMPTY(1, &size, cnp.NPY_UINT8, 0)


cdef inline cnp.ndarray fresh_like(cnp.ndarray x):
    """An uninitialized array with the shape, dtype and strides of the plain array x."""
    if cnp.PyArray_ISUSERDEF(x) or not cnp.PyArray_IS_C_CONTIGUOUS(x):
        return PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    return cnp.PyArray_EMPTY(
        cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), cnp.PyArray_TYPE(x), 0
    )


cdef inline cnp.ndarray copy_of(cnp.ndarray x):
    """A copy of a plain array, which for a few channels takes NumPy itself far longer."""
    cdef cnp.ndarray copy = fresh_like(x)
    memcpy(cnp.PyArray_DATA(copy), cnp.PyArray_DATA(x), cnp.PyArray_NBYTES(x))
    return copy


cdef inline Values values_of(object parameter) noexcept:
    """A plain parameter, or None, without its Python object."""
    cdef Values values
    values.floats = NULL
    values.doubles = NULL
    if parameter is None:
        return values
    cdef cnp.ndarray array = <cnp.ndarray> parameter
    if cnp.PyArray_TYPE(array) == cnp.NPY_DOUBLE:
        values.doubles = <const double*> cnp.PyArray_DATA(array)
    else:
        values.floats = <const float*> cnp.PyArray_DATA(array)
    return values


cdef inline Values doubles_of(const double[::1] parameter) noexcept:
    """A memoryview, or None, likewise."""
    cdef Values values
    values.floats = NULL
    values.doubles = pointer(parameter)
    return values


cdef inline bint any_negative(const Values& values, ptrdiff_t channels) noexcept nogil:
    """Whether a parameter that is not None has a value below 0; a NaN is none."""
    cdef bint negative = False
    cdef ptrdiff_t c
    if values.floats != NULL:
        for c in range(channels):
            negative |= values.floats[c] < 0
    else:
        for c in range(channels):
            negative |= values.doubles[c] < 0
    return negative


cdef struct FixedStatistics:
    # Mean and variance that are given, and the parameters, as the caller has them.
    Values mean, var, gamma, beta
    double eps


cdef inline FixedStatistics fixed_of(
    object mean, object var, object gamma, object beta, double eps
) noexcept:
    """What is `plain_fixed`, without its Python objects."""
    cdef FixedStatistics fixed
    fixed.mean, fixed.var = values_of(mean), values_of(var)
    fixed.gamma, fixed.beta = values_of(gamma), values_of(beta)
    fixed.eps = eps
    return fixed


cdef inline NormalizeParameters read_fixed(
    const FixedStatistics& fixed, ptrdiff_t first, ptrdiff_t last,
    double* read,                           # (2, last - first), scratch: mean, inv_std
) noexcept nogil:
    """The parameters as a map takes them, indexed by channel, the statistics of [first, last)."""
    cdef NormalizeParameters parameters
    cdef ptrdiff_t c, channels = last - first
    cdef double* inv_std = read + channels
    cdef double eps = fixed.eps # which no store below can change
    cdef const double* var = fixed.var.as_doubles(first, channels, 0, inv_std)
    for c in range(channels):
        inv_std[c] = 1 / sqrt(var[c] + eps)
    parameters.mean = fixed.mean.as_doubles(first, channels, 0, read) - first
    parameters.inv_std = inv_std - first
    parameters.mean_lo = NULL
    parameters.gamma, parameters.beta = fixed.gamma, fixed.beta
    return parameters


cdef inline object gradient_like(object parameter):
    """Room for the gradient of a plain parameter, None for None."""
    return None if parameter is None else fresh_like(<cnp.ndarray> parameter)


cdef inline void fill_gradient(object gradient, const double* values) noexcept:
    """Write values into what `gradient_like` gave."""
    if gradient is None:
        return
    cdef cnp.ndarray array = <cnp.ndarray> gradient
    cdef float* floats = <float*> cnp.PyArray_DATA(array)
    cdef double* doubles = <double*> cnp.PyArray_DATA(array)
    cdef ptrdiff_t i
    if cnp.PyArray_TYPE(array) == cnp.NPY_DOUBLE:
        for i in range(cnp.PyArray_SIZE(array)):
            doubles[i] = values[i]
    else:
        for i in range(cnp.PyArray_SIZE(array)):
            floats[i] = <float> values[i]


cdef inline Kind kind_of(cnp.ndarray x) noexcept:
    """The element type of an array that the callers have checked to be of a supported one."""
    cdef int type_number = cnp.PyArray_TYPE(x)
    if type_number == cnp.NPY_FLOAT:
        return FLOAT32
    if type_number == cnp.NPY_DOUBLE:
        return FLOAT64
    return FLOAT16 if type_number == cnp.NPY_FLOAT16 else BFLOAT16


cdef inline View[element] view_of(cnp.ndarray x, element* like) noexcept:
    """An (N, C, S) array as the kernels see it, None as NULL; `like` tells the element type."""
    cdef View[element] view
    view.data = NULL
    if x is None:
        return view
    view.data = <element*> cnp.PyArray_DATA(x)
    view.n_stride = cnp.PyArray_STRIDE(x, 0) // <ptrdiff_t> sizeof(element)
    view.c_stride = cnp.PyArray_STRIDE(x, 1) // <ptrdiff_t> sizeof(element)
    return view


cdef inline View[element] plain_view(cnp.ndarray x, const Shape& shape, element* like) noexcept:
    """A plain array as the kernels see it."""
    cdef View[element] view
    view.data = <element*> cnp.PyArray_DATA(x)
    view.n_stride = shape.channels * shape.inner
    view.c_stride = shape.inner
    return view


cdef inline View[element] plain_view_or_none(
    object x, const Shape& shape, element* like
) noexcept:
    """The same of None as NULL."""
    cdef View[element] view
    if x is not None:
        return plain_view(<cnp.ndarray> x, shape, like)
    view.data = NULL
    return view


cdef inline View[const element] read_only(View[element] view) noexcept nogil:
    cdef View[const element] same
    same.data, same.n_stride, same.c_stride = view.data, view.n_stride, view.c_stride
    return same


cdef inline Shape shape_of(cnp.ndarray x) noexcept:
    cdef Shape shape
    shape.outer = cnp.PyArray_DIM(x, 0)
    shape.channels = cnp.PyArray_DIM(x, 1)
    shape.inner = cnp.PyArray_DIM(x, 2)
    return shape


cdef inline const double* pointer(const double[::1] values) noexcept:
    """The start of a per-channel array, NULL for None."""
    if values is None or values.shape[0] == 0:
        return NULL
    return &values[0]


cdef inline Epilogue epilogue_of(tuple activation):
    """``(code, a, b)`` as a struct."""
    cdef Epilogue epilogue
    epilogue.activation, epilogue.a, epilogue.b = activation
    return epilogue


cdef inline Epilogue no_epilogue() noexcept nogil:
    cdef Epilogue epilogue
    epilogue.activation, epilogue.a, epilogue.b = 0, 0.0, 0.0
    return epilogue


cdef inline Weights equal_weights(const Shape& shape) noexcept nogil:
    """Every position counts 1."""
    cdef Weights weights
    weights.values = NULL
    weights.mask = NULL
    weights.n_stride = weights.s_stride = weights.first_used = 0
    weights.masking = weights.in_runs = False
    weights.total = <double> (shape.outer * shape.inner)
    return weights


cdef inline Weights weights_of(object given, const Shape& shape) except *:
    """A `bncore._weights.Weights` as a struct, None as equal weights."""
    cdef Weights weights = equal_weights(shape)
    if given is None:
        return weights
    values, weights.masking, weights.in_runs, weights.total, weights.first_used, _ = given
    cdef cnp.ndarray array = <cnp.ndarray?> values
    if cnp.PyArray_TYPE(array) == cnp.NPY_DOUBLE:
        weights.values = <const double*> cnp.PyArray_DATA(array)
    else:
        weights.mask = <const int8_t*> cnp.PyArray_DATA(array)
    cdef ptrdiff_t size = cnp.PyArray_ITEMSIZE(array)
    weights.n_stride = cnp.PyArray_STRIDE(array, 0) // size
    weights.s_stride = cnp.PyArray_STRIDE(array, 1) // size if shape.inner > 1 else 0
    return weights


cdef inline uint8_t* bits_of(cnp.ndarray bits) noexcept:
    """The start of an array of bits, NULL for None."""
    if bits is None:
        return NULL
    return <uint8_t*> cnp.PyArray_DATA(bits)
