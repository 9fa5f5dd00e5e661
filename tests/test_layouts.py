"""The same values in every memory layout, on every way a kernel can take."""

import json
import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import bncore
from bncore import _backend
from bncore.bench import workloads

from . import oracle
from .arrays import LAYOUTS, bits, in_layout, normal
from .oracle import assert_within, rounding, ulp

PATHS = json.loads((Path(__file__).parent / "data" / "kernel_paths.json").read_text())
CHANNELS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 257)
WIDE_SIZE = 50_000
"""Up to this size the oracle computes in extended precision, beyond it in float64."""

WORKLOADS = sorted({w.shape for w in workloads.load() if math.prod(w.shape) <= WIDE_SIZE})
WORKLOADS = [shape for shape in WORKLOADS if math.prod(shape) > shape[1]]
"""The smaller shapes of the benchmark with more than one value per channel."""
MEMORY = ("C", "channels_last")
WRITABLE = [layout for layout in LAYOUTS if layout not in ("broadcast", "read_only")]
SHAPES = [((6, 5), 1), ((3, 4, 5), -2), ((2, 3, 4, 5), (1, 2)), ((2, 3, 2, 3, 4), (-4, 4))]


def arguments(shape, dtype, layout="C", axis=1):
    """x, dy, gamma and beta; the same values in every layout but ``broadcast``."""
    axes = oracle.channel_axes(axis, len(shape))
    channels = [shape[one] for one in axes]
    x, dy = (in_layout(normal(seed, shape, dtype), layout, axis) for seed in (1, 2))
    return x, dy, normal(3, channels, np.float32), normal(4, channels, np.float32)


def run(x, dy, gamma, beta, axis=1, out=None, dx_out=None):
    """Results of training, its gradient and inference."""
    y, saved = bncore.batch_norm(x, gamma, beta, axis=axis, out=out)
    g = bncore.batch_norm_backward(dy, saved, out=dx_out)
    fixed = bncore.batch_norm_inference(x, saved.mean, saved.var, gamma, beta, axis=axis)
    return y, saved, g, fixed


@cache
def exact(shape, dtype):
    x, dy, gamma, beta = arguments(shape, dtype)
    wide = oracle.WIDE if x.size <= WIDE_SIZE else np.float64
    forward = oracle.forward(x, gamma, beta, dtype=wide)
    backward = oracle.backward(dy, x, gamma, beta, dtype=wide)
    tolerances = rounding(forward.scale, dtype), rounding(backward.dx_scale, dtype)
    return forward, backward, *(tolerance.astype(np.float32) for tolerance in tolerances)


def assert_exact(shape, dtype, layout):
    """Everything is as the oracle says, but for rounding."""
    y, saved, g, fixed = run(*arguments(shape, dtype, layout))
    forward, backward, y_tolerance, dx_tolerance = exact(shape, dtype)
    if dtype == np.float32:
        assert_within(saved.mean, forward.mean, ulp(forward.mean, dtype), "mean")
        assert_within(saved.var, forward.var, ulp(forward.var, dtype), "var")
    else:
        assert_within(saved.mean, forward.mean, 1e-15, "mean")
        assert_within(saved.var, forward.var, 1e-14 * forward.var, "var")
    assert_within(y, forward.y, y_tolerance, "y")
    assert_within(fixed, forward.y, y_tolerance, "y of inference")
    assert_within(g.dx, backward.dx, dx_tolerance, "dx")
    for name in ("dgamma", "dbeta"):
        value, size = getattr(backward, name), getattr(backward, f"{name}_scale")
        assert_within(getattr(g, name), value, 2.0**-30 * size + ulp(value, np.float32), name)


@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize("entry", PATHS, ids=lambda entry: entry["path"])
def test_every_path_through_the_kernels(backend, entry, layout):
    assert_exact(tuple(entry["shape"]), np.float32, layout)


@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize(
    "shape",
    [tuple(e["shape"]) for e in PATHS if math.prod(e["shape"]) <= WIDE_SIZE],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_paths_in_float64(backend, shape, layout):
    assert_exact(shape, np.float64, layout)


@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize("shape", WORKLOADS, ids=lambda shape: "x".join(map(str, shape)))
def test_shapes_of_the_benchmark(backend, shape, layout):
    assert_exact(shape, np.float32, layout)


@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize("inner", [(), (5,), (7, 7), (12, 13)], ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
def test_every_number_of_channels(backend, channels, inner, layout):
    assert_exact((3, channels, *inner), np.float32, layout)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "C"])
def test_a_layout_changes_no_value(backend, layout, shape, axis, dtype):
    x, dy, gamma, beta = arguments(shape, dtype, layout, axis)
    plain = run(x.astype(dtype, order="C"), dy.astype(dtype, order="C"), gamma, beta, axis)
    for ours, theirs in zip(run(x, dy, gamma, beta, axis), plain, strict=True):
        pairs = [(ours, theirs)]
        if not isinstance(ours, np.ndarray):
            names = ("mean", "var") if isinstance(ours, bncore.Saved) else ours._fields[:3]
            pairs = [(getattr(ours, name), getattr(theirs, name)) for name in names]
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=30 * np.finfo(dtype).eps)


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_left_alone(backend, layout, shape, axis):
    x, dy, gamma, beta = arguments(shape, np.float32, layout, axis)
    before = bits(x, dy, gamma, beta)
    run(x, dy, gamma, beta, axis)
    assert bits(x, dy, gamma, beta) == before


@pytest.mark.parametrize("layout", ["C", "F", "channels_last"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_results_have_the_inputs_memory_order(backend, shape, axis, layout):
    x, dy, gamma, beta = arguments(shape, np.float32, layout, axis)
    y, _, g, fixed = run(x, dy, gamma, beta, axis)
    assert y.strides == g.dx.strides == fixed.strides == x.strides


def test_results_of_swapped_bytes_are_native(backend):
    x, dy, gamma, beta = arguments((3, 4), np.float32, "byte_swapped")
    y, _, g, fixed = run(x, dy, gamma.astype(">f4"), beta.astype(">f8"))
    assert y.dtype.isnative and g.dx.dtype.isnative and fixed.dtype.isnative
    assert g.dgamma.dtype == np.float32 and g.dbeta.dtype == np.float64


@pytest.mark.parametrize("layout", ["sliced", "reversed", "unaligned", "byte_swapped", "read_only"])
def test_parameters_in_any_layout(backend, layout):
    x, dy, gamma, beta = arguments((4, 5, 3), np.float32)
    y, _, g, fixed = run(x, dy, gamma, beta)
    other = run(x, dy, in_layout(gamma, layout, 0), in_layout(beta, layout, 0))
    assert bits(y, *g, fixed) == bits(other[0], *other[2], other[3])


@pytest.mark.parametrize("out_layout", WRITABLE[:-1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_of_any_layout_takes_the_fresh_results_bits(backend, layout, out_layout):
    x, dy, gamma, beta = arguments((3, 5, 4), np.float32, layout)
    y, saved, g, fixed = run(x, dy, gamma, beta)
    outs = [in_layout(np.full(x.shape, 7, np.float32), out_layout) for _ in range(3)]
    assert bncore.batch_norm(x, gamma, beta, out=outs[0])[0] is outs[0]
    assert bncore.batch_norm_backward(dy, saved, out=outs[1]).dx is outs[1]
    inference = bncore.batch_norm_inference(x, saved.mean, saved.var, gamma, beta, out=outs[2])
    assert inference is outs[2]
    assert bits(*outs) == bits(y, g.dx, fixed)


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 6), (20, 33, 7, 7), (8, 40, 42, 42)])
@pytest.mark.parametrize("layout", WRITABLE[:-1])
class TestInPlace:
    """``out`` may be an input: the bits are those of a fresh result."""

    def test_forward_over_x(self, backend, layout, shape):
        x, _, gamma, beta = arguments(shape, np.float32, layout)
        y, _ = bncore.batch_norm(x, gamma, beta)
        same, saved = bncore.batch_norm(x, gamma, beta, out=x)
        assert same is x and bits(x) == bits(y)
        with pytest.raises(ValueError, match="saved has no x"):
            bncore.batch_norm_backward(y, saved)

    def test_inference_over_x(self, backend, layout, shape):
        x, _, gamma, beta = arguments(shape, np.float32, layout)
        fixed = beta, gamma**2, gamma, beta
        y = bncore.batch_norm_inference(x, *fixed)
        assert bncore.batch_norm_inference(x, *fixed, out=x) is x
        assert bits(x) == bits(y)

    @pytest.mark.parametrize("over", ["dy", "x"])
    def test_backward(self, backend, layout, shape, over):
        x, dy, gamma, beta = arguments(shape, np.float32, layout)
        _, saved = bncore.batch_norm(x, gamma, beta)
        fresh = bncore.batch_norm_backward(dy, saved)
        out = {"dy": dy, "x": x}[over]
        g = bncore.batch_norm_backward(dy, saved, out=out)
        assert g.dx is out
        assert bits(*g) == bits(*fresh)

    @pytest.mark.parametrize("over", ["dy", "x"])
    def test_inference_backward(self, backend, layout, shape, over):
        x, dy, gamma, beta = arguments(shape, np.float32, layout)
        fixed = beta, gamma**2, gamma, beta
        fresh = bncore.batch_norm_inference_backward(dy, x, *fixed)
        out = {"dy": dy, "x": x}[over]
        g = bncore.batch_norm_inference_backward(dy, x, *fixed, out=out)
        assert g.dx is out
        assert bits(*g) == bits(*fresh)


def test_x_may_be_its_own_gradient(backend):
    """dy and x are one array."""
    x, _, gamma, beta = arguments((8, 5, 6), np.float32)
    _, saved = bncore.batch_norm(x, gamma, beta)
    expected = bncore.batch_norm_backward(x.copy(), saved)
    assert bits(*bncore.batch_norm_backward(x, saved)) == bits(*expected)


@pytest.mark.parametrize("value", [[[1.0, 2.0], [3.0, 5.0]], np.array([[1.0, 2.0], [3.0, 5.0]])])
def test_lists_are_arrays_of_float64(backend, value):
    y, saved = bncore.batch_norm(value, [1.0, 2.0], [0.0, 1.0])
    assert y.dtype == np.float64
    np.testing.assert_array_equal(saved.mean, [2.0, 3.5])
    np.testing.assert_allclose(y, [[-1, -1], [1, 3]], rtol=1e-4)


@pytest.mark.parametrize("view", [lambda x: x[:], lambda x: x.view(), lambda x: x.reshape(x.shape)])
def test_a_pass_over_a_view_of_x_leaves_no_x(backend, view):
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    layer = bncore.BatchNorm(3)
    _, saved = bncore.batch_norm(x, out=view(x))
    layer(x, out=view(x))
    with pytest.raises(ValueError, match="saved has no x"):
        bncore.batch_norm_backward(x, saved)
    with pytest.raises(ValueError, match="no x"):
        layer.backward(x)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_gradient_over_x_leaves_no_x(backend, activation):
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    dy = np.cos(x)
    _, saved = bncore.batch_norm(x, activation=activation)
    bncore.batch_norm_backward(dy, saved, out=dy)
    bncore.batch_norm_backward(dy, saved, out=x[:])
    with pytest.raises(ValueError, match="saved has no x"):
        bncore.batch_norm_backward(dy, saved)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((127, 129, 1), 2), ((40, 1, 130), 1), ((400, 1), 1), ((17, 33, 1, 1), 3), ((1, 50), 0)],
)
def test_one_channel_has_the_same_bits_however_it_is_asked_for(backend, shape, axis, dtype):
    x, dy = (normal(seed, shape, dtype) + 3 for seed in (1, 2))
    gamma, residual = normal(3, 1, dtype), normal(4, shape, dtype)
    results = []
    for spelled in (axis, np.int64(axis), (axis,)):
        y, saved = bncore.batch_norm(x, gamma, axis=spelled, residual=residual, activation="relu")
        for given in (dy, in_layout(dy, "sliced", axis)):
            g = bncore.batch_norm_backward(given, saved)
            results.append(bits(y, saved.stats, *g))
    assert all(result == results[0] for result in results)


def test_kernels_are_given_aligned_arrays(backend, monkeypatch):
    """Unaligned arguments of every kind are copied, contiguous ones too."""
    received = []

    def spy(module):
        functions = {}
        for name in ("forward", "backward", "inference", "inference_backward", "moments"):
            if hasattr(module, name):
                functions[name] = watched(getattr(module, name))
        return SimpleNamespace(**{**vars(module), **functions})

    def watched(function):
        def call(*arguments, **keywords):
            received.extend([*arguments, *keywords.values()])
            return function(*arguments, **keywords)

        return call

    active = backend._replace(
        **{name: spy(getattr(backend, name)) for name in backend._fields if name != "name"}
    )
    monkeypatch.setattr(_backend, "active", active)
    for dtype in (np.float16, np.float32, np.float64):
        x, dy = (in_layout(normal(seed, (6, 5, 4), dtype), "unaligned") for seed in (1, 2))
        gamma, beta, var = (in_layout(normal(seed, 5) ** 2, "unaligned") for seed in (3, 4, 5))
        weights = in_layout(normal(6, (6, 1, 4)) ** 2, "unaligned")
        for fused in ({}, {"sample_weight": weights}, {"residual": dy, "activation": "relu"}):
            _, saved = bncore.batch_norm(x, gamma, beta, out=np.empty_like(x), **fused)
            bncore.batch_norm_backward(dy, saved, out=in_layout(dy, "unaligned"))
        bncore.batch_norm_inference(x, beta, var, gamma, beta)
        bncore.batch_norm_inference_backward(dy, x, beta, var, gamma, beta)
        bncore.moments(x, sample_weight=weights)
        sums = bncore.backward_reduce(dy, x, beta, var)
        bncore.backward_apply(dy, x, beta, var, gamma, *sums, 24)
    arrays = [part for part in received if isinstance(part, np.ndarray)]
    assert len(arrays) > 100
    assert all(array.flags.aligned for array in arrays)
