"""Random calls: arguments of every kind, good and bad, drawn from a stream of numbers.

A call either gives finite-shaped results like the reference's, or raises ValueError or TypeError.
The stream is a list of integers, so that whatever once went wrong can be kept as such a list.
"""

import math

import numpy as np

import bncore
from bncore import _backend

DTYPES = ["float32", "float64", "float16", ">f4", "<f8", "int32", "bool", "complex64", "object"]
SIZES = [0, 1, 2, 3, 5, 7, 8, 9, 16, 17, 33, 64, 65, 130, 300]
VALUES = [0.0, 1.0, -1.0, 1e-45, 1e38, 1e-300, 1e300, math.nan, math.inf, -math.inf]
EPS = [1e-5, 1e-12, 1.0, 1e-300, 0.0, -1.0, math.nan, math.inf, "x", None]
ACTIVATIONS = [None, "relu", ("leaky_relu", 0.1), ("clip", -1, 1), ("clip", 1, -1), "swish", 3]
WRT = [None, "x", "gamma", ("beta", "mean", "var"), ("x", "gamma"), (), "nothing", 3]
MOST = 40_000
"""Elements of an array."""


class Stream:
    """Choices from a list of integers; zeros once it is used up."""

    def __init__(self, numbers):
        self.numbers = list(numbers)

    def choose(self, options, *, mostly_first=0):
        """One of the options; the first ``mostly_first`` times as often as all others together."""
        number = self.numbers.pop(0) if self.numbers else 0
        if mostly_first and number % (mostly_first + 1):
            return options[0]
        return options[number // (mostly_first + 1) % len(options)]

    def chance(self, one_in):
        return self.choose(range(one_in)) == one_in - 1


def draw_array(stream, shape, dtype):
    """An array of any memory order, with special values here and there."""
    seed = stream.choose(range(1000))
    values = np.random.default_rng(seed).normal(0, stream.choose([1, 1e-3, 1e4]), shape)
    values = np.asarray(values)
    if stream.chance(6) and values.size:
        values.flat[seed % values.size] = stream.choose(VALUES)
    array = np.asarray(values, dtype)
    for _ in range(stream.choose([0, 1, 2])):
        array = distort(stream, array)
    return array


def distort(stream, array):
    """The same values (but where broadcast) in other strides."""
    how = stream.choose(["F", "sliced", "reversed", "broadcast", "unaligned", "read-only"])
    if how == "F":
        return np.asfortranarray(array)
    if how == "sliced":
        return np.repeat(array, 2, axis=-1)[..., ::2] if array.ndim else array
    if how == "reversed":
        return array[(slice(None, None, -1),) * array.ndim] if array.ndim else array
    if how == "broadcast" and array.ndim and array.shape[0]:
        return np.broadcast_to(array[:1], array.shape)
    if how == "unaligned" and array.dtype != object:
        memory = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
        memory[...] = array
        return memory
    array = np.array(array)
    array.flags.writeable = how != "read-only"
    return array


def draw_shape(stream):
    return bounded([stream.choose(SIZES) for _ in range(stream.choose([2, 3, 4, 1, 5, 0]))])


def bounded(shape):
    """The shape, its longest axes halved until it has at most MOST elements."""
    shape = list(shape)
    while math.prod(shape) > MOST:
        shape[shape.index(max(shape))] //= 2
    return tuple(shape)


def draw_call(stream):
    """A function and its arguments."""
    shape, dtype = draw_shape(stream), stream.choose(DTYPES, mostly_first=2)
    x, dy = draw_array(stream, shape, dtype), draw_array(stream, shape, dtype)
    axis = stream.choose([1, 0, -1, 2, (0, 1), (), 7, None], mostly_first=1)
    channels = channels_of(shape, axis)
    if stream.chance(12):
        channels = (*channels, 2)

    def parameter(optional=True):
        if optional and stream.chance(3):
            return None
        return draw_array(stream, channels, stream.choose(["float32", "float64"]))

    keywords = {"axis": axis, "eps": stream.choose(EPS, mostly_first=2)}
    out = stream.choose([None, x, dy, x[::-1] if x.ndim else x, np.zeros(shape, x.dtype)])
    which = stream.choose(["forward", "inference", "fixed", "moments", "layer"])
    if which == "forward":
        keywords |= {"activation": stream.choose(ACTIVATIONS, mostly_first=1), "out": out}
        if stream.chance(3):
            keywords["residual"] = dy
        arguments = x, dy, parameter(), parameter()
        return forward_and_backward, arguments, keywords | draw_weights(stream, shape, axis)
    if which == "inference":
        statistics = parameter(False), np.abs(parameter(False))
        keywords |= {"activation": stream.choose(ACTIVATIONS, mostly_first=1), "out": out}
        return bncore.batch_norm_inference, (x, *statistics, parameter(), parameter()), keywords
    if which == "fixed":
        statistics = parameter(False), np.abs(parameter(False))
        arguments = (dy, x, *statistics, parameter(), parameter())
        keywords |= {"out": out, "activation": stream.choose(ACTIVATIONS, mostly_first=1)}
        keywords["wrt"] = stream.choose(WRT, mostly_first=1)
        return bncore.batch_norm_inference_backward, arguments, keywords
    if which == "moments":
        return bncore.moments, (x,), {"axis": axis} | draw_weights(stream, shape, axis)
    return run_layer, (x, dy), keywords


def draw_weights(stream, shape, axis):
    """A mask, weights, both or neither, over the positions or one axis of them."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    channels = {i % len(shape) for i in axes if isinstance(i, int) and shape}
    positions = [1 if i in channels else size for i, size in enumerate(shape)]
    if stream.chance(9) and positions:
        positions[stream.choose(range(len(positions)))] = stream.choose([1, 2])
    positions = bounded(positions)
    drawn = {}
    if stream.chance(2):
        drawn["mask"] = draw_array(stream, positions, "float32") > stream.choose([0, 1, 10])
    if stream.chance(2):
        drawn["sample_weight"] = np.abs(draw_array(stream, positions, "float64"))
    return drawn


def channels_of(shape, axis):
    axes = axis if isinstance(axis, tuple) else (axis,)
    return tuple(shape[i] for i in axes if isinstance(i, int) and -len(shape) <= i < len(shape))


def forward_and_backward(x, dy, gamma, beta, **keywords):
    y, saved = bncore.batch_norm(x, gamma, beta, **keywords)
    if saved.x is None or keywords.get("out") is keywords.get("residual") is not None:
        return y, saved.mean, saved.var
    return y, saved.mean, saved.var, *bncore.batch_norm_backward(dy, saved)


def run_layer(x, dy, axis, eps):
    axes = axis if isinstance(axis, tuple) else (axis,)
    sizes = tuple(x.shape[i] if -x.ndim <= i < x.ndim else 1 for i in axes if isinstance(i, int))
    layer = bncore.BatchNorm(sizes or 1, axis=axis, eps=eps)
    y = layer(x)
    return y, layer.backward(dy), layer.grad_gamma, layer.eval()(x), layer.backward(dy)


def outcome(numbers, name):
    """What a backend makes of a call: the kind of error, or results as float64 arrays."""
    with _backend.use(name), np.errstate(all="ignore"):
        function, arguments, keywords = draw_call(Stream(numbers))
        try:
            results = function(*arguments, **keywords)
        except (ValueError, TypeError) as error:
            return type(error)
    if isinstance(results, bncore.Moments):
        results = (results.count, results.mean, results.m2)
    if isinstance(results, np.ndarray):
        results = (results,)
    with np.errstate(all="ignore"):
        return [None if part is None else np.asarray(part).astype(float) for part in results]


def check(numbers):
    """All backends agree: in the kind of error, or in shapes and in where values are finite."""
    names = _backend.available()
    expected = outcome(numbers, names[-1])
    for name in names[:-1]:
        found = outcome(numbers, name)
        assert isinstance(found, list) == isinstance(expected, list), (name, found, expected)
        if not isinstance(found, list):
            assert found is expected, (name, found, expected)
            continue
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == (other is None), name
            assert one is None or one.shape == other.shape, name
