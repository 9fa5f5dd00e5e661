"""After an error nothing has changed: no input, no output buffer, no statistic, no counter."""

import hashlib
import pickle

import numpy as np
import pytest

import bncore

pytestmark = pytest.mark.atomic

NAN, INF = float("nan"), float("inf")


class Scene:
    """Arguments of every function, all of them good, and whatever a bad call might spoil."""

    def __init__(self):
        rng = np.random.default_rng(5)
        arrays = [rng.standard_normal((6, 3, 5, 1), np.float32) for _ in range(4)]
        self.x, self.dy, self.residual, self.out = arrays
        self.gamma, self.beta, self.mean = rng.standard_normal((3, 3)).astype(np.float32)
        self.var, self.inv_std = rng.uniform(0.5, 2, (2, 3))
        self.mask = rng.random((6, 1, 5, 1)) < 0.7
        self.sample_weight = rng.uniform(0, 1, (6, 1, 5, 1))
        _, self.saved = bncore.batch_norm(self.x, self.gamma, self.beta)
        self.layer = bncore.BatchNorm(3)
        self.layer(self.x)
        self.layer.backward(self.dy)

    def fingerprint(self):
        """A hash of every byte within reach."""
        layer, saved = vars(self.layer), self.saved
        seen = [{k: v for k, v in vars(self).items() if isinstance(v, np.ndarray)}]
        seen.append({k: v for k, v in layer.items() if k != "_forward"})
        seen.append([saved.stats, saved.x, saved.gamma, saved.beta, self.layer._forward.stats])
        return hashlib.sha256(pickle.dumps(seen)).hexdigest()

    def forward(self, **changed):
        arguments = dict(x=self.x, gamma=self.gamma, beta=self.beta, out=self.out)
        return bncore.batch_norm(**arguments | changed)

    def backward(self, **changed):
        return bncore.batch_norm_backward(
            **dict(dy=self.dy, saved=self.saved, out=self.out) | changed
        )

    def inference(self, **changed):
        arguments = dict(
            x=self.x, mean=self.mean, var=self.var, gamma=self.gamma, beta=self.beta, out=self.out
        )
        return bncore.batch_norm_inference(**arguments | changed)

    def inference_backward(self, **changed):
        arguments = dict(
            dy=self.dy, x=self.x, mean=self.mean, var=self.var, gamma=self.gamma, beta=self.beta,
            out=self.out,
        )  # fmt: skip
        return bncore.batch_norm_inference_backward(**arguments | changed)

    def reduce(self, **changed):
        arguments = dict(dy=self.dy, x=self.x, mean=self.mean, inv_std=self.inv_std)
        return bncore.backward_reduce(**arguments | changed)

    def apply(self, **changed):
        arguments = dict(
            dy=self.dy, x=self.x, mean=self.mean, inv_std=self.inv_std, gamma=self.gamma,
            sum_dy=self.var, sum_dy_xhat=self.var, count=30, out=self.out,
        )  # fmt: skip
        return bncore.backward_apply(**arguments | changed)

    def call_layer(self, x, **changed):
        return self.layer(x, **dict(out=self.out[: len(x), :, : x.shape[2]]) | changed)

    def load(self, **changed):
        state = {key: value * 0 + 7 for key, value in self.layer.state_dict().items()}
        self.layer.load_state_dict(state | changed)

    def in_place(self):
        """What is saved of a forward pass over x itself."""
        x = self.x.copy()
        return bncore.batch_norm(x, out=x)[1]


def unaligned(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)
    return memory[1:].view(array.dtype).reshape(array.shape)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


BAD = {
    # x
    "x is an int array": (TypeError, "x must have dtype", lambda s: s.forward(x=s.x.astype(int))),
    "x is complex": (TypeError, "x must have dtype", lambda s: s.forward(x=s.x + 1j)),
    "x is bool": (TypeError, "x must have dtype", lambda s: s.forward(x=s.x > 0)),
    "x is an object array": (TypeError, "x must", lambda s: s.forward(x=s.x.astype(object))),
    "x is a string": (TypeError, "x must", lambda s: s.forward(x="no")),
    "x is None": (TypeError, "x must", lambda s: s.forward(x=None)),
    "x is ragged": (ValueError, "x must", lambda s: s.forward(x=[[1.0], [1.0, 2.0]])),
    "x is longdouble": (TypeError, "x must", lambda s: s.forward(x=s.x.astype(np.longdouble))),
    "x is masked": (TypeError, "masked array", lambda s: s.forward(x=np.ma.array(s.x))),
    "x is a scalar": (ValueError, "x must have at least 1", lambda s: s.forward(x=np.float32(1))),
    "x is structured": (TypeError, "x must", lambda s: s.forward(x=np.zeros(3, "f4,f4"))),
    # axis
    "axis too large": (ValueError, "axis 4 is out", lambda s: s.forward(axis=4)),
    "axis too small": (ValueError, "axis -5 is out", lambda s: s.forward(axis=-5)),
    "axis huge": (ValueError, "axis", lambda s: s.forward(axis=2**70)),
    "axis huge and negative": (ValueError, "axis", lambda s: s.forward(axis=-(2**70))),
    "axis is a float": (TypeError, "axis must be", lambda s: s.forward(axis=1.0)),
    "axis is None": (TypeError, "axis must be", lambda s: s.forward(axis=None)),
    "axis is empty": (ValueError, "axis must name", lambda s: s.forward(axis=())),
    "axis twice": (ValueError, "twice", lambda s: s.forward(axis=(1, 1))),
    "axis twice by sign": (ValueError, "twice", lambda s: s.forward(axis=(1, -3))),
    "axis of a vector": (ValueError, "axis 1 is out", lambda s: s.forward(x=s.gamma, out=None)),
    # eps
    "eps 0": (ValueError, "eps must be positive", lambda s: s.forward(eps=0)),
    "eps 0.0": (ValueError, "eps must be positive", lambda s: s.forward(eps=0.0)),
    "eps negative": (ValueError, "eps must be positive", lambda s: s.forward(eps=-1e-5)),
    "eps NaN": (ValueError, "eps must be positive", lambda s: s.forward(eps=NAN)),
    "eps inf": (ValueError, "eps must be positive", lambda s: s.forward(eps=INF)),
    "eps a string": (TypeError, "eps must be a real", lambda s: s.forward(eps="1e-5")),
    "eps None": (TypeError, "eps must be a real", lambda s: s.forward(eps=None)),
    "eps True": (TypeError, "eps must be a real", lambda s: s.forward(eps=True)),
    "eps complex": (TypeError, "eps must be a real", lambda s: s.forward(eps=1j)),
    "eps an array": (TypeError, "eps must be a real", lambda s: s.forward(eps=np.ones(3))),
    "eps beyond float64": (ValueError, "eps must be a number", lambda s: s.forward(eps=10**400)),
    "eps in inference": (ValueError, "eps must be positive", lambda s: s.inference(eps=0.0)),
    # gamma, beta
    "gamma too short": (ValueError, "gamma must have", lambda s: s.forward(gamma=s.gamma[:2])),
    "gamma too long": (ValueError, "gamma must have", lambda s: s.forward(gamma=np.ones(4))),
    "gamma a scalar": (ValueError, "gamma must have", lambda s: s.forward(gamma=1.0)),
    "gamma 2-D": (ValueError, "gamma must have", lambda s: s.forward(gamma=np.ones((3, 1)))),
    "gamma of ints": (TypeError, "gamma must have", lambda s: s.forward(gamma=np.ones(3, int))),
    "beta too short": (ValueError, "beta must have", lambda s: s.forward(beta=s.beta[:1])),
    "beta of objects": (TypeError, "beta must", lambda s: s.forward(beta=s.beta.astype(object))),
    "beta masked": (TypeError, "masked", lambda s: s.forward(beta=np.ma.array(s.beta))),
    # out
    "out a list": (TypeError, "out must be an ndarray", lambda s: s.forward(out=[1.0])),
    "out masked": (TypeError, "out must be", lambda s: s.forward(out=np.ma.array(s.out))),
    "out of another shape": (ValueError, "out must have sh", lambda s: s.forward(out=s.out[:5])),
    "out of more dimensions": (ValueError, "out must have", lambda s: s.forward(out=s.out[None])),
    "out float64": (TypeError, "out must have dtype", lambda s: s.forward(out=s.out.astype("f8"))),
    "out byte-swapped": (TypeError, "out must have", lambda s: s.forward(out=s.out.astype(">f4"))),
    "out read-only": (ValueError, "writeable", lambda s: s.forward(out=read_only(s.out))),
    "out broadcast": (
        ValueError, "out must",
        lambda s: s.forward(out=np.lib.stride_tricks.as_strided(s.out, s.x.shape, (0, 4, 4, 4))),
    ),
    "out overlaps x": (
        ValueError, "out overlaps x", lambda s: s.forward(x=s.x[1:], out=s.x[:-1]),
    ),
    "out is x reversed": (ValueError, "out overlaps x", lambda s: s.forward(out=s.x[::-1])),
    "out is gamma": (
        ValueError, "gamma", lambda s: s.forward(x=s.mean[None], out=s.gamma[None], beta=None),
    ),
    "out read-only, backward": (ValueError, "write", lambda s: s.backward(out=read_only(s.out))),
    "out overlaps dy": (
        ValueError, "out overlaps dy",
        lambda s: bncore.backward_apply(
            s.dy[1:], s.x[1:], s.mean, s.inv_std, None, s.var, s.var, 5, out=s.dy[:-1]
        ),
    ),
    # activation, residual, mask, sample_weight
    "activation unknown": (ValueError, "activation must be", lambda s: s.forward(activation="elu")),
    "activation a tuple": (ValueError, "activation", lambda s: s.forward(activation=("clip", 1))),
    "activation limits": (ValueError, "activation", lambda s: s.forward(activation=("clip", 1, 0))),
    "activation NaN": (ValueError, "activation", lambda s: s.forward(activation=("clip", NAN, 0))),
    "slope inf": (ValueError, "activation", lambda s: s.forward(activation=("leaky_relu", INF))),
    "residual of another shape": (ValueError, "residual", lambda s: s.forward(residual=s.gamma)),
    "residual float64": (TypeError, "residual", lambda s: s.forward(residual=s.x.astype("f8"))),
    "out overlaps residual": (
        ValueError, "residual",
        lambda s: s.forward(x=s.x[1:], residual=s.residual[1:], out=s.residual[:-1]),
    ),
    "mask with a mask": (
        TypeError, "mask must be a plain", lambda s: s.forward(mask=np.ma.array(s.mask)),
    ),
    "mask ragged": (ValueError, "mask must be an array", lambda s: s.forward(mask=[[1], [1, 0]])),
    "mask of ints": (TypeError, "mask must have", lambda s: s.forward(mask=s.mask.astype(int))),
    "mask of another shape": (ValueError, "mask must", lambda s: s.forward(mask=s.mask[:5])),
    "mask per channel": (ValueError, "mask must", lambda s: s.forward(mask=s.x > 0)),
    "weight negative": (
        ValueError, "sample_weight", lambda s: s.forward(sample_weight=-s.sample_weight),
    ),
    "weight NaN": (
        ValueError, "sample_weight", lambda s: s.forward(sample_weight=s.sample_weight * NAN),
    ),
    "weight complex": (
        TypeError, "sample_weight", lambda s: s.forward(sample_weight=s.sample_weight + 1j),
    ),
    # statistics
    "mean None": (TypeError, "mean must be", lambda s: s.inference(mean=None)),
    "mean too short": (ValueError, "mean must have", lambda s: s.inference(mean=s.mean[:2])),
    "var None": (TypeError, "var must be", lambda s: s.inference(var=None)),
    "var too long": (ValueError, "var must have", lambda s: s.inference(var=np.ones(4))),
    "var negative": (ValueError, "var must not", lambda s: s.inference(var=-s.var)),
    "out is mean": (
        ValueError, "mean",
        lambda s: s.inference(x=s.gamma[None], out=s.mean[None], gamma=None, beta=None),
    ),
    # backward
    "saved is no Saved": (TypeError, "saved must come", lambda s: s.backward(saved=(1, 2))),
    "saved without x": (ValueError, "saved has no x", lambda s: s.backward(saved=s.in_place())),
    "dy of another shape": (ValueError, "dy must have", lambda s: s.backward(dy=s.dy[:5])),
    "dy float64": (TypeError, "dy must have", lambda s: s.backward(dy=s.dy.astype("f8"))),
    "dy None": (TypeError, "dy must", lambda s: s.backward(dy=None)),
    "fixed dy of another shape": (ValueError, "dy", lambda s: s.inference_backward(dy=s.dy[:5])),
    "fixed var negative": (ValueError, "var", lambda s: s.inference_backward(var=-s.var)),
    "inv_std None": (TypeError, "inv_std must", lambda s: s.reduce(inv_std=None)),
    "sums of another shape": (ValueError, "sum_dy", lambda s: s.apply(sum_dy=np.ones(2))),
    "count no number": (TypeError, "count must be", lambda s: s.apply(count="many")),
    "count 0": (ValueError, "count must be", lambda s: s.apply(count=0)),
    "count negative": (ValueError, "count must be", lambda s: s.apply(count=-3)),
    "count NaN": (ValueError, "count must be", lambda s: s.apply(count=NAN)),
    "counts that differ": (ValueError, "count must be", lambda s: s.apply(count=[1, 2, 3])),
    "counts of another shape": (ValueError, "count must be", lambda s: s.apply(count=[30, 30])),
    # layer
    "one value per channel": (ValueError, "more than 1", lambda s: s.call_layer(s.x[:1, :, :1])),
    "layer of other channels": (ValueError, "x must have", lambda s: s.call_layer(s.x[:, :2])),
    "layer, x of ints": (TypeError, "x must", lambda s: s.call_layer(s.x.astype(int))),
    "layer, out read-only": (
        ValueError, "writeable", lambda s: s.call_layer(s.x, out=read_only(s.out)),
    ),
    "layer, dy of another shape": (ValueError, "dy", lambda s: s.layer.backward(s.dy[1:])),
    "momentum 2.5": (ValueError, "momentum", lambda s: bncore.BatchNorm(3, momentum=2.5)),
    "momentum negative": (ValueError, "momentum", lambda s: bncore.BatchNorm(3, momentum=-0.1)),
    "momentum NaN": (ValueError, "momentum", lambda s: bncore.BatchNorm(3, momentum=NAN)),
    "layer eps 0": (ValueError, "eps", lambda s: bncore.BatchNorm(3, eps=0)),
    "layer of -1": (ValueError, "num_features", lambda s: bncore.BatchNorm(-1)),
    "layer of 1.5": (TypeError, "num_features", lambda s: bncore.BatchNorm(1.5)),
    "layer of ints": (TypeError, "dtype", lambda s: bncore.BatchNorm(3, dtype=int)),
    "state incomplete": (ValueError, "missing", lambda s: s.layer.load_state_dict({})),
    "state unknown": (ValueError, "unknown", lambda s: s.load(other=np.ones(3))),
    "state of another shape": (ValueError, "bias", lambda s: s.load(bias=np.ones(2))),
    "state of ints": (TypeError, "weight", lambda s: s.load(weight=np.ones(3, int))),
    "state, var negative": (ValueError, "running_var", lambda s: s.load(running_var=-np.ones(3))),
    "counter negative": (ValueError, "num_batches", lambda s: s.load(num_batches_tracked=-1)),
    "counter a float": (ValueError, "num_batches", lambda s: s.load(num_batches_tracked=0.5)),
}  # fmt: skip
"""What is wrong: the exception, a part of its message, and the call."""


@pytest.mark.parametrize("what", BAD)
def test_bad_argument(backend, what):
    error, message, call = BAD[what]
    scene = Scene()
    before = scene.fingerprint()
    with pytest.raises(error, match=message):
        call(scene)
    assert scene.fingerprint() == before


def test_odd_but_good_outputs_are_taken(backend):
    """Unaligned and sliced outputs, and x's neighbours in memory: the same bits arrive there."""
    scene = Scene()
    expected, _ = bncore.batch_norm(scene.x, scene.gamma, scene.beta)
    both = np.repeat(scene.x, 2, axis=3)
    for x, out in [
        (scene.x, unaligned(scene.x)),
        (scene.x, np.zeros((6, 3, 5, 2), np.float32)[..., :1]),
        (both[..., ::2], both[..., 1::2]),
    ]:
        y, _ = scene.forward(x=x, out=out)
        assert y is out
        np.testing.assert_array_equal(y, expected)


def test_an_empty_output_is_taken(backend):
    scene = Scene()
    out = np.zeros((0, 3, 5, 1), np.float32)
    y, _ = scene.forward(x=scene.x[:0], out=out, activation="relu")
    assert y is out


def test_no_channel_needs_no_count(backend):
    x = np.ones((4, 0))
    none = np.ones(0)
    dx = bncore.backward_apply(x, x, none, none, none, none, none, count=none)
    assert dx.shape == x.shape


class TestLayerArrays:
    """State that a user has replaced by something that does not fit is refused before any work."""

    SPOILT = {
        "too short": lambda array: array[:1].copy(),
        "too long": lambda array: np.concatenate([array, array]),
        "2-D": lambda array: array[:, None].copy(),
        "read-only": read_only,
        "ints": lambda array: array.astype(int),
        "a list": list,
        "None": lambda array: None,
    }

    @pytest.mark.parametrize("name", ["running_mean", "running_var"])
    @pytest.mark.parametrize("what", SPOILT)
    def test_running_statistics(self, backend, what, name):
        scene = Scene()
        setattr(scene.layer, name, self.SPOILT[what](getattr(scene.layer, name)))
        before = scene.fingerprint()
        with pytest.raises((ValueError, TypeError), match=name):
            scene.call_layer(scene.x)
        assert scene.fingerprint() == before

    @pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var"])
    def test_loading_into_read_only_arrays(self, backend, name):
        scene = Scene()
        getattr(scene.layer, name).flags.writeable = False
        before = scene.fingerprint()
        with pytest.raises(ValueError, match="read-only|writeable"):
            scene.load()
        assert scene.fingerprint() == before

    def test_without_statistics_there_is_nothing_to_forget(self, backend):
        layer = bncore.BatchNorm(3, track_running_stats=False)
        before = {key: array.tobytes() for key, array in layer.state_dict().items()}
        layer.reset_running_stats()
        assert {key: array.tobytes() for key, array in layer.state_dict().items()} == before
