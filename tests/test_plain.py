"""The short way of plain arguments, one call of a kernel, and the long way: one result, one error.

Each test goes both ways, the second time with kernels whose ``*_plain`` functions decline, as those
of the NumPy reference always do.
"""

import numpy as np
import pytest

import bncore
from bncore import _backend, functional, layers, reference

from .arrays import bits, in_layout, normal

try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = None

COMPILED = [name for name in _backend.available() if name != "numpy"]
ACTIVATIONS = [None, "relu", ("leaky_relu", 0.3), ("clip", -0.4, 0.7)]
SHAPES = [
    ((2, 16, 8, 8), 1), ((1, 3, 7, 7), 1), ((2, 8, 8, 16), -1), ((64, 100), 1), ((5, 1, 9), 1),
    ((3, 4), 0), ((1, 6), 1), ((40, 30, 40), 1),
]  # fmt: skip
"""Shape and channel axis; the last is worth several threads."""

DTYPES = [
    np.float32,
    np.float64,
    np.float16,
    pytest.param(bfloat16, marks=pytest.mark.skipif(bfloat16 is None, reason="needs ml_dtypes")),
]


class Declining:
    """A module of kernels whose shortcuts decline."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return reference.forward_plain if name.endswith("_plain") else getattr(self._module, name)


def both_ways(monkeypatch, run):
    """What a function gives, or its error, the short way and the long way."""
    short = outcome(run)
    with monkeypatch.context() as patch:
        name, *modules = _backend.active
        patch.setattr(_backend, "active", _backend.Backend(name, *map(Declining, modules)))
        return short, outcome(run)


def outcome(run):
    try:
        return bits(*run())
    except (TypeError, ValueError) as error:
        return type(error), str(error)


def layer_for(shape, axis, activation=None, affine=True, dtype=np.float32):
    """A layer in evaluation with parameters and statistics of its own."""
    layer = bncore.BatchNorm(
        shape[axis], axis=axis, activation=activation, affine=affine, dtype=dtype
    ).eval()
    layer.running_mean[...], layer.running_var[...] = normal(1, shape[axis]), normal(2, 1) ** 2
    if affine:
        layer.gamma[...], layer.beta[...] = normal(3, shape[axis]), normal(4, shape[axis])
    return layer


def gradients(layer):
    return layer.grad_gamma, layer.grad_beta, layer.grad_residual


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
class TestBits:
    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize("with_residual", [True, False])
    def test_a_layer_in_evaluation(
        self, backend, monkeypatch, shape, axis, dtype, activation, affine, with_residual
    ):
        x, dy, residual = (normal(seed, shape, dtype) for seed in (5, 6, 7))

        def run():
            layer = layer_for(shape, axis, activation, affine)
            y = layer(x, residual=residual if with_residual else None)
            layer.running_mean += 1  # the gradient belongs to the call before
            return y, layer.backward(dy), *gradients(layer), *layer.state_dict().values()

        short, long = both_ways(monkeypatch, run)
        assert short == long

    @pytest.mark.parametrize("target", ["x", "dy", "apart"])
    def test_a_layer_in_evaluation_with_results_in_given_arrays(
        self, backend, monkeypatch, shape, axis, dtype, activation, target
    ):
        def run():
            layer = layer_for(shape, axis, activation, dtype=np.float64)
            arrays = {name: normal(seed, shape, dtype) for seed, name in enumerate(["x", "dy"])}
            y = np.empty(shape, dtype)
            assert layer(arrays["x"], out=y) is y
            dx = arrays.get(target, np.empty(shape, dtype))
            assert layer.backward(arrays["dy"], out=dx) is dx
            return y, dx, *gradients(layer), *arrays.values()

        short, long = both_ways(monkeypatch, run)
        assert short == long

    @pytest.mark.parametrize(
        "wrt", [None, "x", ("x", "beta"), ("gamma", "x"), "beta", ("x", "var")]
    )
    def test_gradients_by_given_statistics(
        self, backend, monkeypatch, shape, axis, dtype, activation, wrt
    ):
        x, dy = normal(5, shape, dtype), normal(6, shape, dtype)
        mean, var, gamma, beta = (normal(seed, shape[axis]) for seed in (1, 2, 3, 4))

        def run():
            fixed = mean, var**2, gamma.astype(np.float32), beta
            return bncore.batch_norm_inference_backward(
                dy, x, *fixed, axis=axis, activation=activation, wrt=wrt
            )

        short, long = both_ways(monkeypatch, run)
        assert short == long


DENSE = [
    ((2, 16, 8, 8), 1, "channels_last"), ((64, 100), 1, "F"), ((5, 1, 9), 1, "F"),
    ((4, 1, 3, 5), 2, "F"), ((1, 3, 7, 7), 1, "channels_last"), ((3, 4, 5, 6), 2, "channels_last"),
    ((6, 2, 3, 4), 0, "channels_last"), ((40, 30, 40), 1, "channels_last"),
]  # fmt: skip
"""Shape, channel axis and order in memory."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis", "layout"), DENSE, ids=str)
class TestDense:
    """Arrays without gaps, in other orders of memory than that of their axes."""

    def test_training(self, backend, monkeypatch, shape, axis, layout, dtype):
        x, dy, residual = (in_layout(normal(i, shape, dtype), layout, axis) for i in (5, 6, 7))

        def run():
            layer = layer_for(shape, axis, "relu").train()
            y = layer(x, residual=residual)
            dx = layer.backward(dy)
            assert y.strides == dx.strides == layer.grad_residual.strides == x.strides
            return y, dx, *gradients(layer), *layer.state_dict().values()

        short, long = both_ways(monkeypatch, run)
        assert short == long

    def test_given_statistics(self, backend, monkeypatch, shape, axis, layout, dtype):
        x, dy = (in_layout(normal(i, shape, dtype), layout, axis) for i in (5, 6))
        given = normal(1, shape[axis]), normal(2, shape[axis]) ** 2

        def run():
            y = bncore.batch_norm_inference(x, *given, axis=axis)
            g = bncore.batch_norm_inference_backward(dy, x, *given, axis=axis, activation="relu")
            assert y.strides == g.dx.strides == x.strides
            return y, *g

        short, long = both_ways(monkeypatch, run)
        assert short == long

    def test_the_algebra(self, backend, monkeypatch, shape, axis, layout, dtype):
        x, dy = (in_layout(normal(i, shape, dtype), layout, axis) for i in (5, 6))

        def run():
            m = bncore.moments(x, axis=axis)
            given = m.mean, 1 / np.sqrt(m.var() + 1e-5)
            sums = bncore.backward_reduce(dy, x, *given, axis=axis, mean_lo=m.mean_lo)
            dx = bncore.backward_apply(dy, x, *given, m.var(), *sums, m.count, axis=axis)
            assert dx.strides == x.strides
            return m.count, m.mean, m.mean_lo, m.m2, *sums, dx

        short, long = both_ways(monkeypatch, run)
        assert short == long

    def test_what_was_kept_serves_other_strides(
        self, backend, monkeypatch, shape, axis, layout, dtype
    ):
        """A gate's bits are written the short way and read the long way."""
        x, residual, dy = (in_layout(normal(i, shape, dtype), layout, axis) for i in (5, 6, 7))

        def run():
            _, saved = bncore.batch_norm(x, axis=axis, residual=residual, activation="relu")
            return bncore.batch_norm_backward(in_layout(dy, "sliced"), saved)

        short, long = both_ways(monkeypatch, run)
        assert (
            short
            == long
            == outcome(
                lambda: bncore.batch_norm_backward(
                    dy, bncore.batch_norm(x, axis=axis, residual=residual, activation="relu")[1]
                )
            )
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["mask", "sample_weight", "both", "all masked"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_gradients_with_weights(backend, monkeypatch, shape, axis, which, dtype):
    x, dy = normal(5, shape, dtype), normal(6, shape, dtype)
    positions = [1 if i == axis % len(shape) else size for i, size in enumerate(shape)]
    weight = np.maximum(normal(1, positions), 0)
    weights = {"mask": normal(2, positions) < 1, "sample_weight": weight + 0.25 * (weight == 0)}
    if which == "all masked":
        weights["mask"][...] = False
    elif which != "both":
        weights = {which: weights[which]}

    def run():
        _, saved = bncore.batch_norm(x, axis=axis, activation="relu", **weights)
        return bncore.batch_norm_backward(dy, saved)

    short, long = both_ways(monkeypatch, run)
    assert short == long


WRONG_ALGEBRA = {
    "none": {},
    "dy of another shape": {"dy": np.ones((4, 3, 1), np.float32)},
    "dy of another dtype": {"dy": np.ones((4, 3, 5))},
    "dy in another order": {"dy": np.ones((4, 3, 5), np.float32, order="F")},
    "mean None": {"mean": None},
    "mean of float32": {"mean": np.ones(3, np.float32)},
    "inv_std a list": {"inv_std": [1.0, 2.0, 3.0]},
    "inv_std too long": {"inv_std": np.ones(4)},
    "mean_lo given": {"mean_lo": np.full(3, 1e-17)},
    "mean_lo too short": {"mean_lo": np.ones(2)},
    "axis out of range": {"axis": 3},
    "axes": {"axis": (1,)},
}
"""What may be wrong with the arguments of `backward_reduce` and `backward_apply`, or not plain."""

WRONG_APPLY = WRONG_ALGEBRA | {
    "gamma too short": {"gamma": np.ones(2)},
    "gamma of ints": {"gamma": np.ones(3, int)},
    "sum_dy None": {"sum_dy": None},
    "sum_dy_xhat too long": {"sum_dy_xhat": np.ones(4)},
    "count 0": {"count": 0},
    "count negative": {"count": -1.0},
    "count NaN": {"count": np.nan},
    "count infinite": {"count": np.inf},
    "count an int": {"count": 20},
    "count of each channel": {"count": np.full(3, 20.0)},
    "counts that differ": {"count": np.array([20.0, 21.0, 20.0])},
    "counts of two": {"count": np.full(2, 20.0)},
    "count a string": {"count": "20"},
    "count true": {"count": True},
    "count beyond all floats": {"count": 10**400},
    "count an object": {"count": object()},
    "count masked": {"count": np.ma.array(np.full(3, 20.0))},
    "count of float32": {"count": np.full(3, 20, np.float32)},
    "out of another dtype": {"out": np.zeros((4, 3, 5))},
    "out of another shape": {"out": np.zeros((4, 3), np.float32)},
    "out read-only": {"out": np.broadcast_to(np.float32(7), (4, 3, 5))},
}


def algebra(**changes):
    """Arguments of `backward_apply`."""
    given = {name: normal(seed, (4, 3, 5), np.float32) for seed, name in enumerate(["dy", "x"])}
    given |= {name: normal(3, 3) ** 2 for name in ("mean", "inv_std", "gamma")}
    return given | {"sum_dy": normal(4, 3), "sum_dy_xhat": normal(5, 3), "count": 20.0} | changes


@pytest.mark.parametrize("what", WRONG_ALGEBRA)
def test_errors_of_reduce(backend, monkeypatch, what):
    given = algebra(**WRONG_ALGEBRA[what])
    for name in ("gamma", "sum_dy", "sum_dy_xhat", "count"):
        del given[name]
    short, long = both_ways(monkeypatch, lambda: bncore.backward_reduce(**given))
    assert short == long


@pytest.mark.parametrize("what", WRONG_APPLY)
def test_errors_of_apply(backend, monkeypatch, what):
    given = algebra(**WRONG_APPLY[what])
    short, long = both_ways(monkeypatch, lambda: [bncore.backward_apply(**given)])
    assert short == long


@pytest.mark.parametrize("name", ["mean", "inv_std", "gamma", "mean_lo"])
def test_apply_writes_over_nothing_it_reads(backend, monkeypatch, name):
    memory = np.ones(12)
    given = {key: normal(seed, (4, 3)) for seed, key in enumerate(["dy", "x"])}
    given = algebra(**given, out=memory.reshape(4, 3)) | {name: memory[:3]}
    short, long = both_ways(monkeypatch, lambda: [bncore.backward_apply(**given)])
    assert short == long == (ValueError, f"out must not share memory with {name}")
    assert (memory == 1).all()


def attribute(name, value):
    return lambda a: setattr(a.layer, name, value)


def argument(name, change):
    return lambda a: setattr(a, name, change(a))


WRONG = {
    "x of other channels": argument("x", lambda a: a.x[:, :2].copy()),
    "x of ints": argument("x", lambda a: a.x.astype(int)),
    "x masked": argument("x", lambda a: np.ma.array(a.x)),
    "x a scalar": argument("x", lambda a: np.float32(1)),
    "residual of another shape": argument("residual", lambda a: a.x[:1].copy()),
    "residual of another dtype": argument("residual", lambda a: a.x.astype(np.float64)),
    "out read-only": argument("out", lambda a: np.broadcast_to(np.float32(7), a.x.shape)),
    "out of another dtype": argument("out", lambda a: np.full(a.x.shape, 7.0)),
    "out a list": argument("out", lambda a: [7.0]),
    "out overlaps x": argument("out", lambda a: a.memory[3 : 3 + a.x.size].reshape(a.x.shape)),
    "out is running_mean": lambda a: (
        setattr(a, "out", np.full(a.x.shape, 7, np.float32)),
        setattr(a.layer, "running_mean", a.out.ravel()[:3]),
    ),
    "other statistics and parameters": lambda a: (
        argument("x", lambda a: a.x[:, :2].copy())(a),
        *(
            setattr(a.layer, name, np.ones(2, np.float32))
            for name in ("running_mean", "running_var", "gamma", "beta")
        ),
    ),
    "running_mean None": attribute("running_mean", None),
    "running_var a list": attribute("running_var", [1.0, 1.0, 1.0]),
    "running_var too long": attribute("running_var", np.ones(4, np.float32)),
    "running_var negative": attribute("running_var", np.array([1, -1, 1], np.float32)),
    "gamma too short": attribute("gamma", np.ones(2, np.float32)),
    "beta of ints": attribute("beta", np.ones(3, int)),
    "axis out of range": attribute("axis", 7),
    "eps 0": attribute("eps", 0.0),
    "eps a string": attribute("eps", "1e-5"),
    "activation unknown": attribute("activation", "elu"),
    "momentum 2.5": attribute("momentum", 2.5),
    "no policy": attribute("nan_policy", "other"),
    "rank": attribute("_ranks", (4,)),
    "none": lambda a: None,
    "no values": argument("x", lambda a: a.x[:0]),
    "no running statistics": attribute("track_running_stats", False),
    "x with strides": argument("x", lambda a: a.x[::-1]),
    "float16 statistics": attribute("running_mean", np.ones(3, np.float16)),
}
"""What may be wrong with a layer's call in evaluation, or is right but not plain."""


class Arguments:
    def __init__(self):
        self.memory = normal(1, 80, np.float32)
        self.x = self.memory[:60].reshape(4, 3, 5)
        self.residual, self.out = None, None
        self.layer = layer_for((4, 3, 5), 1)


@pytest.mark.parametrize("what", WRONG)
def test_errors_of_a_layer_in_evaluation(backend, monkeypatch, what):
    def run():
        a = Arguments()
        WRONG[what](a)
        before = None if a.out is None else np.array(a.out)
        try:
            y = a.layer(a.x, residual=a.residual, out=a.out)
        except (TypeError, ValueError):
            assert before is None or bits(np.array(a.out)) == bits(before)
            with pytest.raises(ValueError, match="backward needs a call"):
                a.layer.backward(a.x)
            raise
        return y, a.layer.backward(np.ones_like(y)), *gradients(a.layer)

    short, long = both_ways(monkeypatch, run)
    assert short == long


@pytest.mark.parametrize("over", ["x", "residual"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("late", [True, False])
def test_what_a_result_was_written_over(backend, monkeypatch, activation, over, late):
    """By y, or later by dx: a gradient that needs it is refused."""

    def run():
        layer = layer_for((4, 3, 5), 1, activation)
        x, residual, dy = (normal(seed, (4, 3, 5), np.float32) for seed in (5, 6, 7))
        target = {"x": x, "residual": residual}[over]
        with_residual = {"residual": residual} if over == "residual" else {}
        layer(x, **with_residual, out=None if late else target.view())
        if late:
            layer.backward(dy, out=target.view())
        return layer.backward(dy), *gradients(layer)

    short, long = both_ways(monkeypatch, run)
    assert short == long


WRONG_BACKWARD = {
    "dy of another shape": {"dy": np.ones((4, 3, 1), np.float32)},
    "dy of another dtype": {"dy": np.ones((4, 3, 5))},
    "var negative": {"var": np.array([1, -1, 1], np.float32)},
    "mean None": {"mean": None},
    "gamma too short": {"gamma": np.ones(2, np.float32)},
    "axis twice": {"axis": (1, 1)},
    "eps inf": {"eps": np.inf},
    "activation": {"activation": "elu"},
    "wrt": {"wrt": "z"},
    "out without x": {"wrt": "gamma", "out": np.zeros((4, 3, 5), np.float32)},
    "out read-only": {"out": np.broadcast_to(np.float32(7), (4, 3, 5))},
    "mask of ints": {"mask": np.ones((4, 1, 5), int)},
    "residual": {"residual": np.ones((4, 3, 1), np.float32)},
    "none": {},
}


@pytest.mark.parametrize("what", WRONG_BACKWARD)
def test_errors_of_gradients_by_given_statistics(backend, monkeypatch, what):
    given = {name: normal(seed, (4, 3, 5), np.float32) for seed, name in enumerate(["dy", "x"])}
    given |= {name: normal(3, 3, np.float32) ** 2 for name in ("mean", "var", "gamma", "beta")}
    short, long = both_ways(
        monkeypatch, lambda: bncore.batch_norm_inference_backward(**given | WRONG_BACKWARD[what])
    )
    assert short == long


@pytest.mark.parametrize("backend", COMPILED, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["C", "F", "channels_last", "read_only"])
def test_the_short_way_is_taken(backend, monkeypatch, dtype, layout):
    x, dy = (in_layout(normal(seed, (4, 3, 5), dtype), layout) for seed in (1, 2))
    monkeypatch.setattr(functional, "_layout", None)  # what the long way cannot do without
    monkeypatch.setattr(layers.BatchNorm, "_checked", None)
    m = bncore.moments(x)
    sums = bncore.backward_reduce(dy, x, m.mean, m.var())
    bncore.backward_apply(dy, x, m.mean, m.var(), None, *sums, m.count, out=np.empty_like(dy))
    y = bncore.batch_norm_inference(x, m.mean, m.var())
    bncore.batch_norm_inference_backward(dy, x, m.mean, m.var(), out=y)
    for activation in ACTIVATIONS:
        layer = bncore.BatchNorm(3, activation=activation)
        for mode in (layer.train, layer.eval):
            mode()(x)
            layer.backward(dy, out=np.empty_like(dy))
        layer(x, residual=dy, out=np.empty_like(x))
