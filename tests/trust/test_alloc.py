"""Every allocation fails once: MemoryError, no leak, no state changed, no output written.

Two kinds are made to fail, each by its number: NumPy's, of array data, through its own interface
for memory handlers (PyDataMem_SetHandler); and Python's, of objects and of the kernels' scratch,
through CPython's own test module.
"""

import ctypes
import gc
import sys
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest

import bncore

_testcapi = pytest.importorskip("_testcapi", reason="this Python comes without its test modules")

pytestmark = pytest.mark.alloc

ENOUGH = 2000
"""More allocations than any call makes."""

SMALL = 100
"""Bytes below which an array is a scalar or a row of booleans of NumPy's own making, for whose want
NumPy raises SystemError."""

Allocate = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
Clear = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
Resize = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
Free = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Handler(ctypes.Structure):
    """PyDataMem_Handler, NumPy's table of allocation functions (NEP 49)."""

    _fields_ = [
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("context", ctypes.c_void_p),
        ("malloc", Allocate),
        ("calloc", Clear),
        ("realloc", Resize),
        ("free", Free),
    ]


def pointer_in(capsule, name):
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return get_pointer(capsule, name)


def data_memory_function(index, *types):
    """A function of NumPy's C interface: 304 is PyDataMem_SetHandler, 305 PyDataMem_GetHandler."""
    from numpy._core._multiarray_umath import _ARRAY_API

    table = ctypes.cast(pointer_in(_ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p))
    return ctypes.PYFUNCTYPE(*types)(table[index])


class ArrayMemory:
    """NumPy's own allocator, but that large allocation number ``fails`` gives nothing."""

    def __init__(self):
        capsule = data_memory_function(305, ctypes.py_object)()
        default = Handler.from_address(pointer_in(capsule, b"mem_handler"))
        self.asked, self.fails = 0, None

        def malloc(context, size):
            return None if self.count(size) else default.malloc(context, size)

        def calloc(context, n, size):
            return None if self.count(n * size) else default.calloc(context, n, size)

        # NumPy frees while an exception is under way, when no Python code may run: not counted.
        self.handler = Handler(
            b"failing", 1, default.context, Allocate(malloc), Clear(calloc), default.realloc,
            default.free,
        )  # fmt: skip
        new_capsule = ctypes.pythonapi.PyCapsule_New
        new_capsule.restype = ctypes.py_object
        new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self.capsule = new_capsule(ctypes.addressof(self.handler), b"mem_handler", None)

    def count(self, size):
        """Whether the allocation asked for is the one to fail."""
        if size < SMALL:
            return False
        self.asked += 1
        return self.asked - 1 == self.fails

    @contextmanager
    def failing(self, number):
        set_handler = data_memory_function(304, ctypes.py_object, ctypes.py_object)
        before = set_handler(self.capsule)
        self.asked, self.fails = 0, number
        try:
            yield
        finally:
            set_handler(before)


MEMORY = ArrayMemory()
"""One for all tests: arrays call it when they are freed, however late."""


@pytest.fixture(autouse=True)
def only_young_objects():
    """Collections pass over what was there before: a suite's thousands of tests take seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


def array_bytes():
    """Bytes of array data that are allocated now."""
    gc.collect()
    arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([arrays]).traces)


class Subject:
    """Arrays and a layer, small enough for one thread, and what a call may not change."""

    def __init__(self, layout):
        rng = np.random.default_rng(8)
        shape = (6, 40, 9)
        self.x, self.dy = rng.standard_normal((2, *shape), np.float32)
        if layout == "sliced":
            self.x, self.dy = (np.repeat(a, 2, axis=2)[:, :, ::2] for a in (self.x, self.dy))
        self.out = np.full(shape, 3, np.float32)
        self.gamma, self.beta, self.mean = rng.standard_normal((3, 40), np.float32)
        self.var = rng.uniform(1, 2, 40)
        self.mask = rng.random((6, 1, 9)) < 0.8
        _, self.saved = bncore.batch_norm(self.x, self.gamma, self.beta)
        self.layer = bncore.BatchNorm(40)
        self.layer(self.x)
        self.layer.backward(self.dy)
        self.other_state = {k: v * 0 + 5 for k, v in self.layer.state_dict().items()}

    def state(self):
        layer = self.layer
        arrays = (
            self.x, self.dy, self.gamma, self.beta, self.mean, self.var, self.saved.stats,
            layer.gamma, layer.beta, layer.running_mean, layer.running_var, layer.grad_gamma,
            layer.grad_beta,
        )  # fmt: skip
        return [array.tobytes() for array in arrays], layer.num_batches_tracked

    def written(self):
        return not (self.out == 3).all()


CALLS = {
    "forward": lambda s: bncore.batch_norm(s.x, s.gamma, s.beta, out=s.out),
    "forward, relu": lambda s: bncore.batch_norm(s.x, s.gamma, activation="relu", out=s.out),
    "forward, mask": lambda s: bncore.batch_norm(s.x, s.gamma, mask=s.mask, out=s.out),
    "backward": lambda s: bncore.batch_norm_backward(s.dy, s.saved, out=s.out),
    "inference": lambda s: bncore.batch_norm_inference(s.x, s.mean, s.var, s.gamma, out=s.out),
    "inference backward": lambda s: bncore.batch_norm_inference_backward(
        s.dy, s.x, s.mean, s.var, s.gamma, s.beta, out=s.out
    ),
    "inference, mask": lambda s: bncore.batch_norm_inference(
        s.x, s.mean, s.var, mask=s.mask, out=s.out
    ),
    "inference backward, mask": lambda s: bncore.batch_norm_inference_backward(
        s.dy, s.x, s.mean, s.var, s.gamma, s.beta, mask=s.mask, residual=s.x, out=s.out
    ),
    "moments": lambda s: bncore.moments(s.x),
    "reduce": lambda s: bncore.backward_reduce(s.dy, s.x, s.mean, s.var),
    "apply": lambda s: bncore.backward_apply(
        s.dy, s.x, s.mean, s.var, s.gamma, s.var, s.var, 54, out=s.out
    ),
    "apply, mask": lambda s: bncore.backward_apply(
        s.dy, s.x, s.mean, s.var, s.gamma, s.var, s.var, 54, mask=s.mask, out=s.out
    ),
    "apply, weights": lambda s: bncore.backward_apply(
        s.dy, s.x, s.mean, s.var, s.gamma, s.var, s.var, 54, sample_weight=s.mask, out=s.out
    ),
    "layer": lambda s: s.layer(s.x),
    "layer, out": lambda s: s.layer(s.x, out=s.out),
    "layer, backward": lambda s: s.layer.backward(s.dy, out=s.out),
    "layer, evaluation": lambda s: s.layer.eval()(s.x, out=s.out),
    "layer, load": lambda s: s.layer.load_state_dict(s.other_state),
}


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("what", CALLS)
def test_array_allocations(backend, what, layout):
    for number in range(ENOUGH):
        subject = Subject(layout)
        before = subject.state()
        if not fails_at(number, what, subject):
            break
        assert subject.state() == before, f"allocation {number} leaves another state"
        assert not subject.written(), f"allocation {number} fails after out was written"
    assert number < ENOUGH - 1


@pytest.mark.parametrize("what", CALLS)
def test_failures_leak_nothing(backend, what):
    subject = Subject("sliced")

    def fail_everywhere():
        number = 0
        while fails_at(number, what, subject):
            number += 1

    tracemalloc.start()
    try:
        fail_everywhere()
        before = array_bytes()
        for _ in range(3):
            fail_everywhere()
        assert array_bytes() <= before
    finally:
        tracemalloc.stop()


def fails_at(number, what, subject):
    """Whether a call ends in MemoryError when an allocation fails."""
    try:
        with MEMORY.failing(number):
            CALLS[what](subject)
    except MemoryError:
        return True
    return False


untraced = pytest.mark.skipif(
    sys.gettrace() is not None, reason="a tracer's allocations would fail as well"
)

PLAIN = ("forward", "backward", "inference", "layer", "layer, backward", "layer, evaluation")
"""Calls that stay in bncore's own code: elsewhere NumPy itself does not survive this."""


@untraced
@pytest.mark.parametrize("what", PLAIN)
def test_python_allocations(backend, what):
    """Objects and the kernels' scratch. State holds; ``out`` may have been written by then."""
    if backend.name == "numpy":
        pytest.skip("NumPy's own code is what would be tested")
    for number in range(ENOUGH):
        subject = Subject("contiguous")
        before = subject.state()
        if not object_fails_at(number, what, subject):
            break
        assert subject.state() == before, f"allocation {number}"
    assert 0 < number < ENOUGH - 1


def object_fails_at(number, what, subject):
    """Whether a call ends in MemoryError when an allocation of Python's fails."""
    call = CALLS[what]
    try:
        _testcapi.set_nomemory(number, number + 1)
        try:
            call(subject)
        finally:
            _testcapi.remove_mem_hooks()
    except MemoryError:
        return True
    return False


ROUNDS = 40


@untraced
@pytest.mark.parametrize("what", PLAIN)
def test_failures_leak_no_object(backend, what):
    """An object lost in one place only would be lost once a round."""
    if backend.name == "numpy":
        pytest.skip("NumPy's own code is what would be tested")
    subject = Subject("contiguous")

    def fail_everywhere():
        number = 0
        while object_fails_at(number, what, subject):
            number += 1

    def growth():
        gc.collect()
        before = sys.getallocatedblocks()
        for _ in range(ROUNDS):
            fail_everywhere()
        gc.collect()
        return sys.getallocatedblocks() - before

    # The interpreter's own caches grow at first.
    assert any(growth() < ROUNDS // 2 for _ in range(6))


def test_the_count_of_references_stays(backend):
    """Calls that fail leak no reference to their arguments."""
    subject = Subject("contiguous")
    arrays = (subject.x, subject.gamma, subject.beta, subject.out)
    before = [sys.getrefcount(array) for array in arrays]
    for _ in range(20):
        with pytest.raises(MemoryError), MEMORY.failing(0):
            CALLS["forward"](subject)
    assert [sys.getrefcount(array) for array in arrays] == before
