"""Every error names the argument, what was expected and what came; and changes nothing."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

import bncore

from .arrays import bits, normal

SHAPE = (4, 3, 5)


def arguments():
    """Arguments of every function that are as they should be."""
    x, dy, out = (normal(seed, SHAPE, np.float32) for seed in (1, 2, 3))
    gamma, beta, mean = (normal(seed, 3, np.float32) for seed in (4, 5, 6))
    return SimpleNamespace(
        x=x, dy=dy, out=out, gamma=gamma, beta=beta, mean=mean, var=mean**2, inv_std=mean**2 + 1,
        residual=out.copy(), sum_dy=mean + 0.0, sum_dy_xhat=mean + 1.0, count=20, axis=1, eps=1e-5,
        activation=None, mask=None, sample_weight=None,
    )  # fmt: skip


FUNCTIONS = {
    "batch_norm": "x gamma beta axis eps activation residual mask sample_weight out",
    "batch_norm_inference": "x mean var gamma beta axis eps activation residual out",
    "batch_norm_inference_backward": "dy x mean var gamma beta axis eps activation residual out",
    "moments": "x axis mask sample_weight",
    "backward_reduce": "dy x mean inv_std axis",
    "backward_apply": "dy x mean inv_std gamma sum_dy sum_dy_xhat count axis out",
}


DERIVATIVES = {
    "backward": bncore.batch_norm_backward,
    "jvp": bncore.batch_norm_jvp,
    "double_backward": lambda dy, saved: bncore.batch_norm_double_backward(dy, dy, saved),
}


def call(function, a):
    """Call a function with those of the arguments it takes, all by name."""
    names = FUNCTIONS[function].split()
    return getattr(bncore, function)(**{name: getattr(a, name) for name in names})


def read_only(a):
    a.out.flags.writeable = False
    return a.out


COMPLEX, INTEGERS = np.ones(SHAPE, complex), np.ones(SHAPE, int)
MASKED = np.ma.masked_array(np.ones(SHAPE, np.float32))
ARRAYS = [
    (COMPLEX, TypeError, "must have dtype .*, got complex128"),
    (INTEGERS, TypeError, "must have dtype .*, got int64"),
    (np.ones(SHAPE, bool), TypeError, "must have dtype .*, got bool"),
    (np.full(SHAPE, "a"), TypeError, "must have dtype .*, got <U1"),
    (np.full(SHAPE, None), TypeError, "must have dtype .*, got object"),
    (MASKED, TypeError, "must be a plain array, got a masked array"),
    ([[1.0], [1.0, 2.0]], ValueError, "must be an array of floats"),
    (None, TypeError, "must "),
]
LIKE_X = [
    (np.ones((4, 3), np.float32), ValueError, r"must have x's shape \(4, 3, 5\), got \(4, 3\)"),
    (np.ones(SHAPE), TypeError, "must have x's dtype float32, got float64"),
]
PER_CHANNEL = [
    (np.ones(5, np.float32), ValueError, r"must have the channels' shape \(3,\), got \(5,\)"),
    (np.float32(1), ValueError, r"must have the channels' shape \(3,\), got \(\)"),
    (np.ones((3, 1)), ValueError, r"must have the channels' shape \(3,\), got \(3, 1\)"),
    (np.ones(3, int), TypeError, "must have dtype .*, got int64"),
    (MASKED[0, :, 0], TypeError, "must be a plain array"),
]
REQUIRED = [(None, TypeError, r"must be an array of shape \(3,\), got None")]
NUMBERS = [
    (value, ValueError, "must be positive and finite") for value in (0, -1e-5, np.nan, np.inf)
] + [(value, TypeError, "must be a real number") for value in ("1e-5", None, True, [1, 2], 1j)]
AXES = [
    (3, ValueError, "3 is out of range for x with 3 dimensions"),
    (-4, ValueError, "-4 is out of range"),
    (2**70, ValueError, "out of range"),
    ((), ValueError, r"must name at least one channel axis, got \(\)"),
    ((1, 1), ValueError, "must not name a channel axis twice"),
    ((1, -2), ValueError, "must not name a channel axis twice"),
    (1.0, TypeError, "must be an int or a tuple of ints, got 1.0"),
    (None, TypeError, "must be an int or a tuple of ints, got None"),
    ([1], TypeError, "must be an int or a tuple of ints"),
]
OUTS = [
    (lambda a: a.out[:2], ValueError, r"must have shape \(4, 3, 5\), got \(2, 3, 5\)"),
    (lambda a: a.out.astype(float), TypeError, "must have dtype float32, got float64"),
    (lambda a: a.out.astype(">f4"), TypeError, "must have dtype float32, got >f4"),
    (lambda a: a.out.tolist(), TypeError, "must be an ndarray, got list"),
    (lambda a: np.ma.masked_array(a.out), TypeError, "must be an ndarray, got MaskedArray"),
    (read_only, ValueError, "must be writeable, got a read-only array"),
    (
        lambda a: np.lib.stride_tricks.as_strided(a.out, SHAPE, (4, 4, 4)),
        ValueError,
        "must not overlap itself, got strides",
    ),
]
ACTIVATIONS = [
    (value, ValueError, "must be None, 'relu', .'leaky_relu', slope")
    for value in ("gelu", "RELU", 3, (), ("relu", 1), ("leaky_relu",), ("leaky_relu", np.nan),
                  ("clip", 1), ("clip", 2, 1), ("clip", np.nan, 1), ["relu"])
] + [(("leaky_relu", "x"), TypeError, "must be a real number")]  # fmt: skip
POSITIONS = [
    (np.ones(SHAPE, bool), ValueError, r"must broadcast to \(4, 1, 5\)"),
    (np.ones((3, 1, 5), bool), ValueError, r"must broadcast to \(4, 1, 5\)"),
]
MASKS = [*POSITIONS, (np.ones((4, 1, 5)), TypeError, "must have dtype bool, got float64")]
WEIGHTS = [
    *POSITIONS,
    (np.full((4, 1, 1), -1.0), ValueError, "must be 0 or between"),
    (np.full((4, 1, 1), np.nan), ValueError, "must be 0 or between"),
    (np.full((4, 1, 1), np.inf), ValueError, "must be 0 or between"),
    (np.full((4, 1, 1), 1j), TypeError, "must be an array of real numbers, got complex128"),
    (np.full((4, 1, 1), "1"), TypeError, "must be an array of real numbers"),
]
VARIANCES = [
    (np.array([1.0, -1e-9, 1.0]), ValueError, "must not be negative, got -1e-09"),
    (np.array([1.0, 1.0, -0.5], np.float32), ValueError, "must not be negative, got -0.5"),
]
COUNTS = [
    (0, ValueError, "must be one positive number for all channels, got 0"),
    (-3, ValueError, "must be one positive number"),
    (np.nan, ValueError, "must be one positive number"),
    (np.array([1.0, 2.0, 3.0]), ValueError, "must be one positive number for all channels"),
    (np.ones(2), ValueError, r"must be a number or have shape \(3,\), got \(2,\)"),
]
BAD = {
    "x": [*ARRAYS, (np.float32(1), ValueError, "must have at least 1 dimension, got a scalar")],
    "dy": ARRAYS + LIKE_X,
    "residual": ARRAYS[:-1] + LIKE_X,
    "gamma": PER_CHANNEL,
    "beta": PER_CHANNEL,
    "mean": PER_CHANNEL + REQUIRED,
    "inv_std": PER_CHANNEL + REQUIRED,
    "var": PER_CHANNEL + REQUIRED + VARIANCES,
    "sum_dy": PER_CHANNEL + REQUIRED,
    "sum_dy_xhat": PER_CHANNEL + REQUIRED,
    "count": COUNTS,
    "axis": AXES,
    "eps": NUMBERS,
    "activation": ACTIVATIONS,
    "mask": MASKS,
    "sample_weight": WEIGHTS,
    "out": OUTS,
}
CASES = [
    pytest.param(function, name, *case, id=f"{function}-{name}-{i}")
    for function, names in FUNCTIONS.items()
    for name in names.split()
    for i, case in enumerate(BAD[name])
]


def held(a):
    """Every array's bits."""
    return bits(*(value for value in vars(a).values() if isinstance(value, np.ndarray)))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_good_arguments_are_good(backend, function):
    call(function, arguments())


@pytest.mark.parametrize(("function", "name", "value", "error", "message"), CASES)
def test_a_bad_argument_is_named_and_nothing_written(
    backend, function, name, value, error, message
):
    a = arguments()
    setattr(a, name, value(a) if callable(value) else value)
    before, out = held(a), a.out
    out_bits = out.tobytes() if isinstance(out, np.ndarray) else out
    with pytest.raises(error, match=message) as caught:
        call(function, a)
    named = "leaky_relu" if "real number" in message and name == "activation" else name
    assert re.match(named, str(caught.value)), f"{caught.value} does not begin with {named}"
    assert held(a) == before
    assert (out.tobytes() if isinstance(out, np.ndarray) else out) == out_bits


INPUTS = {"x", "dy", "residual", "gamma", "beta", "mean", "var", "inv_std"}
OVERLAPS = [
    (function, other)
    for function, names in FUNCTIONS.items()
    for other in names.split()
    if "out" in names and other in INPUTS
]


@pytest.mark.parametrize(("function", "other"), OVERLAPS)
def test_an_output_that_overlaps_an_input_in_part_is_refused(backend, function, other):
    a = arguments()
    memory = np.ones(200, np.float32)
    a.out = memory[:60].reshape(SHAPE)
    size = getattr(a, other).size
    setattr(a, other, memory[7 : 7 + size].reshape(getattr(a, other).shape))
    expected = f"out (overlaps {other} in part|must not share memory with {other})"
    with pytest.raises(ValueError, match=expected):
        call(function, a)
    assert (memory == 1).all()


class TestBackward:
    def saved(self, **keywords):
        a = arguments()
        return a, bncore.batch_norm(a.x, a.gamma, a.beta, **keywords)[1]

    @pytest.mark.parametrize(("value", "error", "message"), ARRAYS + LIKE_X)
    def test_bad_dy(self, backend, value, error, message):
        a, saved = self.saved()
        before = bits(a.x, a.out, saved.stats)
        with pytest.raises(error, match="^dy " + message):
            bncore.batch_norm_backward(value, saved, out=a.out)
        assert bits(a.x, a.out, saved.stats) == before

    @pytest.mark.parametrize(("value", "error", "message"), OUTS)
    def test_bad_out(self, backend, value, error, message):
        a, saved = self.saved()
        out, before = value(a), bits(a.x, a.dy, a.out)
        with pytest.raises(error, match="^out " + message):
            bncore.batch_norm_backward(a.dy, saved, out=out)
        assert bits(a.x, a.dy, a.out) == before

    @pytest.mark.parametrize("value", [None, 1, (1, 2)])
    def test_saved_must_be_saved(self, backend, value):
        with pytest.raises(TypeError, match="saved must come from batch_norm, got "):
            bncore.batch_norm_backward(arguments().dy, value)

    @pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
    @pytest.mark.parametrize(
        "keywords", [{}, {"activation": "relu", "residual": True}, {"mask": True}]
    )
    def test_what_is_kept_keeps_its_shape(self, backend, derivative, keywords):
        a = arguments()
        keywords = {
            name: {"residual": a.residual, "mask": np.ones((4, 1, 5), bool)}.get(name, value)
            for name, value in keywords.items()
        }
        _, saved = bncore.batch_norm(a.x, a.gamma, a.beta, **keywords)
        a.x.resize((4, 5, 3), refcheck=False)
        with pytest.raises(ValueError, match=r"^saved's x must keep its shape \(4, 3, 5\)"):
            derivative(np.ones_like(a.x), saved)
        a.x.resize(SHAPE, refcheck=False)
        a.beta.resize(1, refcheck=False)
        with pytest.raises(ValueError, match=r"^saved's beta must keep its shape \(3,\)"):
            derivative(a.dy, saved)

    @pytest.mark.filterwarnings("ignore:Setting the strides:DeprecationWarning")
    @pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
    @pytest.mark.parametrize("kept", ["bits", "weights"])
    @pytest.mark.parametrize("shape", [(9, 3, 5), (8, 3, 8)], ids=str)
    @pytest.mark.parametrize("order", [(0, 2, 1), (2, 1, 0)], ids=str)
    def test_what_is_kept_keeps_its_strides(self, backend, derivative, kept, shape, order):
        """Bits of gates, and weights, lie as x does."""
        x = normal(1, shape, np.float32)
        if kept == "bits":
            keywords = {"residual": x.copy(), "activation": "relu"}
        else:
            mask = np.arange(shape[0] * shape[2]) > 0
            keywords = {"mask": mask.reshape(shape[0], 1, shape[2])}
        _, saved = bncore.batch_norm(x, **keywords)
        before, after = x.strides, x.transpose(order).copy().transpose(np.argsort(order)).strides
        x.strides = after
        with pytest.raises(ValueError, match="^saved's x must keep its strides"):
            derivative(normal(2, shape, np.float32), saved)
        x.strides = before
        derivative(normal(2, shape, np.float32), saved)

    @pytest.mark.parametrize("error", [TypeError, ValueError, RuntimeError])
    @pytest.mark.parametrize("name", ["mask", "sample_weight", "mean"])
    def test_what_another_library_does_not_hand_over_is_named(self, backend, name, error):
        class Array:
            def __array__(self, dtype=None, copy=None):
                raise error("no")

        expected = TypeError if error is TypeError else ValueError
        with pytest.raises(expected, match=f"^{name} must be an array"):
            if name == "mean":
                bncore.Moments(1.0, Array(), 1.0)
            else:
                bncore.batch_norm(arguments().x, **{name: Array()})

    def test_nothing_saved(self, backend):
        with pytest.raises(ValueError, match="^saved has no x"):
            bncore.batch_norm_backward(arguments().dy, bncore.Saved())

    @pytest.mark.parametrize(
        ("wrt", "error", "message"),
        [
            ("y", ValueError, "wrt must be of 'x', 'gamma', 'beta', 'residual', got 'y'"),
            (("x", "mean"), ValueError, "wrt must be of .*, got "),
            ((), ValueError, "wrt must be of "),
            ((1,), ValueError, "wrt must be of "),
            (1, TypeError, "wrt must be a name or several, got 1"),
            ("gamma", ValueError, "out takes dx, which wrt does not ask for, got wrt='gamma'"),
        ],
    )
    def test_wrt(self, backend, wrt, error, message):
        a, saved = self.saved()
        before = bits(a.x, a.dy, a.out)
        with pytest.raises(error, match="^" + message):
            bncore.batch_norm_backward(a.dy, saved, wrt=wrt, out=a.out)
        assert bits(a.x, a.dy, a.out) == before


class TestLayer:
    @pytest.mark.parametrize(
        ("keywords", "error", "message"),
        [
            ({"num_features": -1}, ValueError, "num_features must not be negative"),
            ({"num_features": ()}, ValueError, "num_features must not be negative or empty"),
            ({"num_features": 2.0}, TypeError, "num_features must be an int or a tuple of ints"),
            ({"num_features": "3"}, TypeError, "num_features must be an int or a tuple of ints"),
            ({"eps": 0}, ValueError, "eps must be positive"),
            ({"eps": np.nan}, ValueError, "eps must be positive"),
            ({"momentum": 2.5}, ValueError, "momentum must be None or between 0 and 1, got 2.5"),
            ({"momentum": -0.1}, ValueError, "momentum must be None or between 0 and 1"),
            ({"momentum": np.nan}, ValueError, "momentum must be None or between 0 and 1"),
            ({"momentum": "0.1"}, TypeError, "momentum must be a real number"),
            ({"dtype": int}, TypeError, "dtype must be a float type, got int64"),
            ({"activation": "gelu"}, ValueError, "activation must be None, 'relu'"),
        ],
    )
    def test_bad_construction(self, keywords, error, message):
        with pytest.raises(error, match="^" + message):
            bncore.BatchNorm(**({"num_features": 3} | keywords))

    @pytest.mark.parametrize("mode", ["train", "eval"])
    @pytest.mark.parametrize(
        ("value", "error"),
        [(np.ones((4, 2)), ValueError), (np.ones(3), ValueError), (INTEGERS, TypeError),
         (MASKED, TypeError), (np.float32(1), ValueError), (None, TypeError)],
    )  # fmt: skip
    def test_a_bad_x_leaves_the_state_alone(self, backend, value, error, mode):
        layer = bncore.BatchNorm(3)
        layer(arguments().x)
        getattr(layer, mode)()
        before = bits(*layer.state_dict().values())
        with pytest.raises(error, match="x|axis"):
            layer(value)
        assert bits(*layer.state_dict().values()) == before

    def test_a_bad_out_leaves_the_state_alone(self, backend):
        layer, a = bncore.BatchNorm(3), arguments()
        before = bits(*layer.state_dict().values())
        with pytest.raises(ValueError, match="out must have shape"):
            layer(a.x, out=a.out[:2])
        assert bits(*layer.state_dict().values()) == before

    def test_backward_needs_a_call(self, backend):
        with pytest.raises(ValueError, match="backward needs a call"):
            bncore.BatchNorm(3).backward(arguments().dy)

    def test_a_bad_dy_leaves_the_gradients_alone(self, backend):
        layer, a = bncore.BatchNorm(3), arguments()
        layer(a.x)
        layer.backward(a.dy)
        before = bits(layer.grad_gamma, layer.grad_beta)
        with pytest.raises(ValueError, match="dy must have x's shape"):
            layer.backward(a.dy[:2])
        assert bits(layer.grad_gamma, layer.grad_beta) == before

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"weight": None}, TypeError, "state's weight must have dtype"),
            ({"weight": np.ones(3, int)}, TypeError, "state's weight must have dtype"),
            ({"bias": np.ones(4)}, ValueError, r"state's bias must have shape \(3,\), got \(4,\)"),
            ({"running_var": -np.ones(3)}, ValueError, "running_var must not be negative"),
            ({"num_batches_tracked": -1}, ValueError, "num_batches_tracked must be a count"),
            ({"num_batches_tracked": 1.5}, ValueError, "num_batches_tracked must be a count"),
            ({"num_batches_tracked": [1, 2]}, ValueError, "num_batches_tracked must be a count"),
            ({"extra": np.ones(3)}, ValueError, "unknown keys .'extra'."),
        ],
    )
    def test_a_bad_state_is_not_loaded_in_part(self, backend, change, error, message):
        layer, other = bncore.BatchNorm(3), bncore.BatchNorm(3)
        other(arguments().x)
        before = bits(*layer.state_dict().values())
        with pytest.raises(error, match=message):
            layer.load_state_dict(other.state_dict() | change)
        assert bits(*layer.state_dict().values()) == before

    def test_a_missing_key(self):
        layer = bncore.BatchNorm(3)
        state = layer.state_dict()
        del state["bias"]
        with pytest.raises(ValueError, match="missing keys .'bias'."):
            layer.load_state_dict(state)


class TestMoments:
    def test_parts_of_other_shapes(self):
        with pytest.raises(ValueError, match="count, mean and m2 must have one shape"):
            bncore.Moments(np.ones(2), np.ones(3), np.ones(3))

    def test_sum_of_other_channels(self):
        one, other = bncore.moments(np.ones((4, 2))), bncore.moments(np.ones((4, 3)))
        with pytest.raises(ValueError, match="cannot add moments of channels"):
            one + other

    def test_sum_with_something_else(self):
        with pytest.raises(TypeError, match="unsupported operand"):
            bncore.moments(np.ones((4, 2))) + 1
