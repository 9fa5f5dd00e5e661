"""Presets: twenty steps as the libraries themselves take them, and as their formulas say."""

import importlib.util
import os
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

import bncore

CHANNELS = 5
STEPS = 20


def batches(rows=None):
    """Float32 batches whose size, mean and spread change."""
    for step in range(STEPS):
        rng = np.random.default_rng(step)
        shape = (rows or int(rng.integers(2, 9)), CHANNELS)
        yield (rng.standard_normal(shape) * (1 + step) + step).astype(np.float32)


def formula(keep, eps, factor):
    """A library's layer in NumPy: what it keeps of the running statistics, and of n its factor."""
    layer = SimpleNamespace(mean=np.zeros(CHANNELS), var=np.ones(CHANNELS))

    def train(x):
        x = x.astype(np.float64)
        mean, var = x.mean(0), ((x - x.mean(0)) ** 2).mean(0)
        layer.mean = keep * layer.mean + (1 - keep) * mean
        layer.var = keep * layer.var + (1 - keep) * var * factor(len(x))
        return (x - mean) / np.sqrt(var + eps)

    layer.train = train
    layer.evaluate = lambda x: (x - layer.mean) / np.sqrt(layer.var + eps)
    layer.statistics = lambda: (layer.mean, layer.var)
    return layer


FORMULAS = {
    "pytorch": lambda: formula(0.9, 1e-5, lambda n: n / (n - 1)),
    "keras": lambda: formula(0.99, 1e-3, lambda n: 1),
    "flax": lambda: formula(0.99, 1e-5, lambda n: 1),
    "onnx": lambda: formula(0.9, 1e-5, lambda n: 1),
    "chainer": lambda: formula(0.9, 2e-5, lambda n: n / max(n - 1, 1)),
    "mxnet": lambda: formula(0.9, 1e-3, lambda n: 1),
}


def library(name):
    """A library's own layer with its defaults; the test is skipped where it is absent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LIBRARIES[name]()


def pytorch():
    torch = pytest.importorskip("torch")
    layer = torch.nn.BatchNorm1d(CHANNELS)

    def call(x, training):
        return layer.train(training)(torch.tensor(x)).detach().numpy()

    return peer(call, lambda: (layer.running_mean.numpy(), layer.running_var.numpy()))


def keras():
    # Whatever stands first among those there are; TensorFlow, its own choice, need not be.
    found = [name for name in ("torch", "jax") if importlib.util.find_spec(name)]
    os.environ.setdefault("KERAS_BACKEND", (found or ["numpy"])[0])
    keras = pytest.importorskip("keras")
    layer = keras.layers.BatchNormalization()

    def call(x, training):
        return keras.ops.convert_to_numpy(layer(x, training=training))

    return peer(
        call,
        lambda: tuple(
            keras.ops.convert_to_numpy(v.value) for v in (layer.moving_mean, layer.moving_variance)
        ),
    )


def flax():
    linen = pytest.importorskip("flax.linen")
    module = linen.BatchNorm()
    key = pytest.importorskip("jax").random.key(0)  # of nothing: scale is 1 and bias 0
    x = np.zeros((2, CHANNELS), np.float32)
    kept = dict(module.init(key, x, use_running_average=False))

    def call(x, training):
        if not training:
            return np.asarray(module.apply(kept, x, use_running_average=True))
        y, moved = module.apply(kept, x, use_running_average=False, mutable=["batch_stats"])
        kept["batch_stats"] = moved["batch_stats"]
        return np.asarray(y)

    return peer(call, lambda: (kept["batch_stats"]["mean"], kept["batch_stats"]["var"]))


def onnx():
    helper = pytest.importorskip("onnx.helper")
    from onnx import TensorProto
    from onnx.reference import ReferenceEvaluator

    names = ["x", "scale", "bias", "mean", "var"]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names]

    def session(training):
        outputs = ["y", "new_mean", "new_var"] if training else ["y"]
        node = helper.make_node("BatchNormalization", names, outputs, training_mode=int(training))
        infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
        graph = helper.make_graph([node], "batch_norm", inputs, infos)
        opset = helper.make_opsetid("", 15)
        return ReferenceEvaluator(helper.make_model(graph, opset_imports=[opset]))

    sessions = {training: session(training) for training in (True, False)}
    one = np.ones(CHANNELS, np.float32)
    kept = [0 * one, one]

    def call(x, training):
        given = dict(zip(names, (x, one, 0 * one, *kept), strict=True))
        y, *moved = sessions[training].run(None, given)
        kept[:] = moved or kept
        return y

    return peer(call, lambda: kept)


def quietly_called(function, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a library says of another
        return function(*arguments)


def peer(call, statistics):
    return SimpleNamespace(
        train=lambda x: quietly_called(call, x, True),
        evaluate=lambda x: quietly_called(call, x, False),
        statistics=lambda: quietly_called(statistics),
    )


LIBRARIES = {"pytorch": pytorch, "keras": keras, "flax": flax, "onnx": onnx}
ORACLES = [pytest.param(FORMULAS[name], name, id=f"{name}, formula") for name in FORMULAS]
ORACLES += [
    pytest.param(lambda name=name: library(name), name, id=f"{name}, itself") for name in LIBRARIES
]


@pytest.mark.parametrize(("oracle", "preset"), ORACLES)
def test_twenty_steps(backend, oracle, preset):
    layer, theirs = bncore.BatchNorm(CHANNELS, **bncore.presets[preset]), oracle()
    for x in batches():
        np.testing.assert_allclose(layer(x), theirs.train(x), rtol=2e-3, atol=2e-4)
        mean, var = theirs.statistics()
        np.testing.assert_allclose(layer.running_mean, mean, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(layer.running_var, var, rtol=2e-5)
    layer.eval()
    for x in batches():
        np.testing.assert_allclose(layer(x), theirs.evaluate(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("oracle", "preset"), ORACLES)
def test_one_value_per_channel(backend, oracle, preset):
    layer, theirs = bncore.BatchNorm(CHANNELS, **bncore.presets[preset]), oracle()
    if preset == "pytorch":
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            layer(np.ones((1, CHANNELS), np.float32))
        return
    for x in batches(rows=1):
        np.testing.assert_array_equal(layer(x), 0)
        np.testing.assert_allclose(theirs.train(x), 0, atol=1e-3)
        mean, var = theirs.statistics()
        np.testing.assert_allclose(layer.running_mean, mean, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(layer.running_var, var, rtol=2e-5)
    layer.eval()
    for x in batches():
        np.testing.assert_allclose(layer(x), theirs.evaluate(x), rtol=1e-4, atol=1e-5)


def test_pytorch_refuses_one_value_too():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        library("pytorch").train(np.ones((1, CHANNELS), np.float32))


@pytest.mark.parametrize("preset", bncore.presets)
def test_the_channel_axis_is_theirs(backend, preset):
    last = preset in ("keras", "flax")
    x = np.random.default_rng(1).standard_normal((2, 3, 4, CHANNELS) if last else (2, CHANNELS, 3))
    layer = bncore.BatchNorm(CHANNELS, **bncore.presets[preset])
    others = (0, 1, 2) if last else (0, 2)
    np.testing.assert_allclose(layer(x).mean(others), 0, atol=1e-12)


def test_are_all_there_and_read_only():
    assert set(bncore.presets) == set(FORMULAS)
    with pytest.raises(TypeError):
        bncore.presets["mine"] = {}
    with pytest.raises(TypeError):
        bncore.presets["keras"]["eps"] = 1.0
    with pytest.raises(KeyError, match="there are the presets 'pytorch', .*, not 'keras2'"):
        bncore.presets["keras2"]
    assert repr(bncore.presets).startswith("Presets('pytorch', ")
    assert len(bncore.presets) == 6


def test_pytorch_is_the_default():
    layer, plain = bncore.BatchNorm(5, **bncore.presets["pytorch"]), bncore.BatchNorm(5)
    assert repr(layer) == repr(plain)
