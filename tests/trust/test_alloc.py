"""Every allocation fails once: MemoryError, no leak, no state changed, no output written.

Two kinds are made to fail, each by its number: NumPy's, of array data, through its own interface
for memory handlers (PyDataMem_SetHandler); and Python's, of objects and of the kernels' scratch,
through CPython's own test module.
"""

import ctypes
import gc
import sys
from contextlib import contextmanager

import numpy as np
import pytest

import bncore

_testcapi = pytest.importorskip("_testcapi", reason="this Python comes without its test modules")

pytestmark = pytest.mark.alloc

ENOUGH = 2000
"""More allocations than any call makes."""

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


def set_handler(capsule):
    """PyDataMem_SetHandler: the handler before."""
    from numpy._core._multiarray_umath import _ARRAY_API

    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    table = ctypes.cast(get_pointer(_ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p))
    return ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(table[304])(capsule)


class ArrayMemory:
    """Array data from the C library, counted; allocation number ``fails`` gives nothing."""

    def __init__(self):
        libc = ctypes.CDLL(None)
        for name, arguments in (("malloc", 1), ("calloc", 2), ("realloc", 2)):
            function = getattr(libc, name)
            function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_size_t] * arguments
        libc.realloc.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
        self.asked, self.fails, self.live = 0, None, 0

        def given(pointer):
            self.live += 1
            return pointer

        def free(_, pointer, size):
            self.live -= 1
            libc.free(pointer)

        self.handler = Handler(
            b"failing", 1, None,
            Allocate(lambda _, size: None if self.count() else given(libc.malloc(size))),
            Clear(lambda _, n, size: None if self.count() else given(libc.calloc(n, size))),
            Resize(lambda _, p, size: None if self.count() else libc.realloc(p, size)),
            Free(free),
        )  # fmt: skip
        new_capsule = ctypes.pythonapi.PyCapsule_New
        new_capsule.restype = ctypes.py_object
        new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self.capsule = new_capsule(ctypes.addressof(self.handler), b"mem_handler", None)

    def count(self):
        """Whether the allocation asked for is the one to fail."""
        self.asked += 1
        return self.asked - 1 == self.fails

    @contextmanager
    def failing(self, number):
        before = set_handler(self.capsule)
        self.asked, self.fails = 0, number
        try:
            yield
        finally:
            set_handler(before)


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
    "moments": lambda s: bncore.moments(s.x),
    "reduce": lambda s: bncore.backward_reduce(s.dy, s.x, s.mean, s.var),
    "apply": lambda s: bncore.backward_apply(
        s.dy, s.x, s.mean, s.var, s.gamma, s.var, s.var, 54, out=s.out
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
    memory = ArrayMemory()
    failures = 0
    for number in range(ENOUGH):
        subject = Subject(layout)
        subject.other_state = {k: v * 0 + 5 for k, v in subject.layer.state_dict().items()}
        before = subject.state()
        gc.collect()
        live = memory.live
        try:
            with memory.failing(number):
                CALLS[what](subject)
        except MemoryError:
            failures += 1
            assert subject.state() == before
            assert not subject.written(), f"allocation {number} failed after out was written"
            assert memory.live == live
        else:
            break
    assert number < ENOUGH - 1
    assert memory.asked <= number or memory.fails is None
    if what != "layer, load":
        assert failures > 0


@pytest.mark.parametrize("what", CALLS)
def test_python_allocations(backend, what):
    """Objects and the kernels' scratch. State holds; ``out`` may have been written by then."""
    if backend.name == "numpy" and what != "layer":
        pytest.skip("NumPy's own code is what would be tested")
    failures = 0
    for number in range(ENOUGH):
        subject = Subject("contiguous")
        subject.other_state = {k: v * 0 + 5 for k, v in subject.layer.state_dict().items()}
        before = subject.state()
        call = CALLS[what]
        failed = False
        try:
            _testcapi.set_nomemory(number, number + 1)
            try:
                call(subject)
            finally:
                _testcapi.remove_mem_hooks()
        except MemoryError:
            failed = True
        if not failed:
            break
        failures += 1
        assert subject.state() == before, f"allocation {number}"
    assert 0 < failures == number < ENOUGH - 1


def test_the_count_of_references_stays(backend):
    """Calls that fail leak no reference to their arguments."""
    subject = Subject("contiguous")
    memory = ArrayMemory()
    arrays = (subject.x, subject.gamma, subject.beta, subject.out)
    before = [sys.getrefcount(array) for array in arrays]
    for _ in range(20):
        with pytest.raises(MemoryError), memory.failing(0):
            CALLS["forward"](subject)
    assert [sys.getrefcount(array) for array in arrays] == before
