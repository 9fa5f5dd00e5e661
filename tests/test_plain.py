"""The short way of plain arguments, one call of a kernel, and the long way: one result, one error.

Each test goes both ways, the second time with kernels whose ``*_plain`` functions decline, as those
of the NumPy reference always do.
"""

import numpy as np
import pytest

import bncore
from bncore import _backend, functional, layers, reference

from .arrays import bits, normal

COMPILED = [name for name in _backend.available() if name != "numpy"]
ACTIVATIONS = [None, "relu", ("leaky_relu", 0.3), ("clip", -0.4, 0.7)]
SHAPES = [
    ((2, 16, 8, 8), 1), ((1, 3, 7, 7), 1), ((2, 8, 8, 16), -1), ((64, 100), 1), ((5, 1, 9), 1),
    ((3, 4), 0), ((1, 6), 1), ((40, 30, 40), 1),
]  # fmt: skip
"""Shape and channel axis; the last is worth several threads."""


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
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
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
def test_the_short_way_is_taken(backend, monkeypatch):
    x, dy = normal(1, (4, 3, 5), np.float32), normal(2, (4, 3, 5), np.float32)
    monkeypatch.setattr(functional, "_layout", None)  # what the long way cannot do without
    monkeypatch.setattr(layers.BatchNorm, "_checked", None)
    for activation in ACTIVATIONS:
        layer = bncore.BatchNorm(3, activation=activation)
        for mode in (layer.train, layer.eval):
            mode()(x)
            layer.backward(dy, out=np.empty_like(dy))
        layer(x, residual=dy, out=x.copy())
