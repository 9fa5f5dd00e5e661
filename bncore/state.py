"""What every layer has: parameters, running statistics, their policies, and the state to keep.

A layer changes its state only after everything that can fail has succeeded: what it takes to move
the running statistics is checked and allocated before a batch is normalized.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from contextlib import contextmanager

import numpy as np

from bncore import _backend, _check, policies, reference

_POLICIES = {"ddof": 1, "single_value": "raise", "nan_policy": "propagate", "update": True}
"""The policies' defaults, which `Layer.__repr__` leaves out."""


class Layer:
    """Parameters, running statistics and policies; `bncore.BatchNorm` documents them."""

    _ranks: tuple[int, ...] | None = None

    def __init__(
        self, num_features, *, axis=1, eps=1e-5, momentum=0.1, affine=True,
        track_running_stats=True, activation=None, dtype=np.float32, ddof=1,
        single_value="raise", nan_policy="propagate",
    ):  # fmt: skip
        self.shape = _channel_shape(num_features)
        self._channels = math.prod(self.shape)
        self.axis = _axis(axis, len(self.shape))
        self.eps = _check.positive(eps, "eps")
        self.momentum = momentum
        self.affine = bool(affine)
        self.track_running_stats = bool(track_running_stats)
        self.activation = self._activation(activation)
        self.ddof = ddof
        self.single_value = single_value
        self.nan_policy = nan_policy
        self.update = True
        self._known = None
        self._check_policies()
        self.momentum = self._momentum
        dtype = _float_dtype(dtype)
        self.gamma = np.ones(self.shape, dtype) if affine else None
        self.beta = np.zeros(self.shape, dtype) if affine else None
        self.running_mean = np.zeros(self.shape, dtype) if track_running_stats else None
        self.running_var = np.ones(self.shape, dtype) if track_running_stats else None
        self.num_batches_tracked = 0 if track_running_stats else None
        self.grad_gamma = None
        self.grad_beta = None
        self.grad_residual = None
        self.training = True
        self._forward = None
        self._call = None

    @property
    def num_features(self):
        """Channels: an int, or a tuple where there are several channel axes."""
        return self.shape[0] if len(self.shape) == 1 else self.shape

    def train(self, mode=True):
        """Normalize by batch statistics from now on; returns the layer.

        Parameters
        ----------
        mode : bool
            False is `eval`.
        """
        self.training = bool(mode)
        return self

    def eval(self):
        """Normalize by running statistics from now on; returns the layer."""
        return self.train(False)

    @contextmanager
    def no_update(self):
        """Training calls inside normalize by the batch, but move no running statistic.

        For a batch that goes through the layer twice, as where activations are computed again for
        the backward pass. May be nested; ``update`` is afterwards what it was before, also after
        an exception.

        Examples
        --------
        >>> import bncore, numpy as np
        >>> layer, x = bncore.BatchNorm(1), np.array([[1.0], [3.0]], np.float32)
        >>> with layer.no_update():
        ...     y = layer(x)
        >>> layer.num_batches_tracked, layer.update
        (0, True)
        """
        before = self.update
        self.update = False
        try:
            yield self
        finally:
            self.update = before

    def reset_running_stats(self):
        """Forget all batches: running mean 0, variance 1, counter 0."""
        if self.track_running_stats:
            for name in ("running_mean", "running_var"):
                _check.state(getattr(self, name), name, self.shape)
            self.running_mean[...] = 0
            self.running_var[...] = 1
            self.num_batches_tracked = 0

    def state_dict(self):
        """The state under PyTorch's keys, as copies.

        Returns
        -------
        dict of str to ndarray
            weight, bias, running_mean, running_var, num_batches_tracked; those that exist.
        """
        state = {key: np.copy(array) for key, array in self._arrays().items()}
        if self.track_running_stats:
            state["num_batches_tracked"] = np.asarray(self.num_batches_tracked, np.int64)
        return state

    def load_state_dict(self, state):
        """Take over a state; the inverse of `state_dict`.

        Parameters
        ----------
        state : mapping of str to array_like
            As `state_dict` gives it. ``num_batches_tracked`` may be missing, as in files written
            before PyTorch 0.4.1; it is then left as it is.

        Raises
        ------
        ValueError, TypeError
            Where a key is missing or unknown, or an array does not fit; nothing is loaded then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping, got {type(state).__name__}")
        arrays = self._arrays()
        known = set(arrays) | ({"num_batches_tracked"} if self.track_running_stats else set())
        missing = sorted(set(arrays) - set(state))
        unknown = sorted(set(state) - known, key=str)
        if missing or unknown:
            raise ValueError(f"state has missing keys {missing} and unknown keys {unknown}")
        for key, array in arrays.items():
            _check.state(array, key, self.shape)
        loaded = {key: _loaded(state[key], key, array) for key, array in arrays.items()}
        if "running_var" in loaded and (loaded["running_var"] < 0).any():
            raise ValueError("state's running_var must not be negative")
        tracked = self.num_batches_tracked
        if "num_batches_tracked" in state:
            tracked = _loaded_counter(state["num_batches_tracked"])
        for key, array in arrays.items():
            array[...] = loaded[key]
        self.num_batches_tracked = tracked

    def __repr__(self):
        given = {
            "axis": self.axis,
            "eps": self.eps,
            "momentum": self.momentum,
            "affine": self.affine,
            "track_running_stats": self.track_running_stats,
            "activation": self.activation,
        }
        given |= {
            name: getattr(self, name)
            for name, default in _POLICIES.items()
            if getattr(self, name) != default
        }
        arguments = ", ".join(f"{name}={value!r}" for name, value in given.items())
        return f"{type(self).__name__}({self.num_features}, {arguments})"

    def _activation(self, activation):
        """An activation that this layer has, or an error."""
        _check.activation(activation)
        return activation

    def _checked(self, x):
        """``x`` as an array with this layer's channels."""
        self._check_policies()
        x = x if type(x) is np.ndarray else _check.input_array(x)
        if self._ranks is not None and x.ndim not in self._ranks:
            ranks = " or ".join(map(str, self._ranks))
            raise ValueError(f"x must have {ranks} dimensions, got {x.ndim}")
        axis = self.axis
        if type(axis) is int and -x.ndim <= axis < x.ndim and (x.shape[axis],) == self.shape:
            return x
        axes = _check.channel_axes(axis, x.ndim)
        shape = tuple([x.shape[axis] for axis in axes])
        if shape != self.shape:
            raise ValueError(f"x must have channels {self.shape} on axis {axis}, got {shape}")
        return x

    def _check_policies(self):
        """Refuse policies there are none of: they may have been set by hand since last time."""
        known = self._known
        if not (
            known is not None
            and self.momentum is known[0]
            and self.ddof is known[1]
            and self.single_value is known[2]
            and self.nan_policy is known[3]
            and self.update is known[4]
        ):
            self._momentum = policies.check(self)
            self._known = (
                self.momentum, self.ddof, self.single_value, self.nan_policy, self.update
            )  # fmt: skip

    def _check_given_statistics(self):
        """Refuse running statistics by which nothing can be normalized."""
        for array, name in ((self.running_mean, "running_mean"), (self.running_var, "running_var")):
            if type(array) is not np.ndarray:
                raise TypeError(f"{name} must be an ndarray in evaluation, got {array!r}")
            _check.per_channel(array, name, self.shape)

    def _takes_single(self, x):
        """Whether a training batch of one value per channel is normalized by itself, or an error.

        False leaves it to the running statistics.
        """
        if self.single_value == "raise":
            got = f"shape {x.shape}" if x.size == self._channels else "one of a weight above 0"
            raise ValueError(f"x must have more than 1 value per channel in training, got {got}")
        return self.single_value == "zero"

    def _plain_running(self):
        """What a kernel needs to move the running statistics itself; None where it may not."""
        tracked = self.num_batches_tracked
        if not (
            self.update
            and self.track_running_stats
            and self.nan_policy == "propagate"
            and type(tracked) is int
            and 0 <= tracked < 2**63 - 1
        ):
            return None
        momentum = 1 / (tracked + 1) if self._momentum is None else self._momentum
        return self.running_mean, self.running_var, momentum, self.ddof, self._channels

    def _prepared(self, values, weights, out):
        """What it takes to move the running statistics, checked and allocated; None if they stay.

        Parameters
        ----------
        values : int
            Of the batch, per channel, with a weight above 0.
        weights : (values,) array of float64, or None
            None where all are alike.
        out : ndarray or None
            What is written before.
        """
        if not (values and self.training and self.update and self.track_running_stats):
            return None
        if type(self.num_batches_tracked) is not int:
            raise TypeError(f"num_batches_tracked must be an int, got {self.num_batches_tracked!r}")
        if not 0 <= self.num_batches_tracked < 2**63 - 1:
            raise ValueError(f"num_batches_tracked must be a count, got {self.num_batches_tracked}")
        tracked = self.num_batches_tracked + 1
        momentum = 1 / tracked if self._momentum is None else self._momentum
        unbias = 1.0
        if self.ddof and values > 1:
            unbias = values / (values - 1) if weights is None else policies.unbiasing(weights)
        mean, var = self.running_mean, self.running_var
        if _backend.active.statistics.movable_plain(mean, var, out, self._channels):
            return momentum, unbias, tracked, None
        for array, name in ((mean, "running_mean"), (var, "running_var")):
            _check.state(array, name, self.shape)
            _check.apart(out, array, name)
        return momentum, unbias, tracked, np.empty((2, 2, *self.shape))

    def _move(self, saved, prepared):
        """Move the running statistics towards a batch's; see `bncore.reference.move_running`."""
        momentum, unbias, tracked, spare = prepared
        if self.nan_policy == "skip" and not (
            policies.is_finite(saved.stats[0], 1.0, self.running_mean.dtype)
            and policies.is_finite(saved.stats[2], unbias, self.running_var.dtype)
        ):
            return
        arguments = self.running_mean, self.running_var, saved.stats, momentum, unbias
        if spare is None:
            _backend.active.statistics.move_running_plain(*arguments)
        else:
            reference.move_running(*arguments, spare)
        self.num_batches_tracked = tracked

    def _arrays(self):
        """The state's arrays under PyTorch's keys."""
        arrays = {
            "weight": self.gamma,
            "bias": self.beta,
            "running_mean": self.running_mean,
            "running_var": self.running_var,
        }
        return {key: array for key, array in arrays.items() if array is not None}


def _channel_shape(num_features):
    sizes = num_features if isinstance(num_features, tuple) else (num_features,)
    try:
        shape = tuple(operator.index(size) for size in sizes)
    except TypeError:
        raise TypeError(
            f"num_features must be an int or a tuple of ints, got {num_features!r}"
        ) from None
    if not shape or min(shape) < 0:
        raise ValueError(f"num_features must not be negative or empty, got {num_features!r}")
    return shape


def _axis(axis, number):
    """An axis, or so many; whether x has them is found out when it comes."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    try:
        indices = [operator.index(one) for one in axes]
    except TypeError:
        raise TypeError(f"axis must be an int or a tuple of ints, got {axis!r}") from None
    if len(indices) != number:
        raise ValueError(
            f"axis must name as many axes as num_features has sizes, {number}, got {axis!r}"
        )
    return axis


def _float_dtype(dtype):
    try:
        dtype = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype must be a float type, got {dtype!r}") from None
    if dtype.name not in _check.FLOAT_NAMES:
        raise TypeError(f"dtype must be a float type, got {dtype}")
    return dtype


def _loaded(value, key, like):
    """A copy of a state's array, in the dtype of the layer's own."""
    array = _check.float_array(value, f"state's {key}")
    if array.shape != like.shape:
        raise ValueError(f"state's {key} must have shape {like.shape}, got {array.shape}")
    with np.errstate(all="ignore"):
        return array.astype(like.dtype)


def _loaded_counter(value):
    try:
        counter = np.asarray(value)
    except ValueError:  # ragged
        counter = np.empty((), object)
    if counter.shape not in ((), (1,)) or counter.dtype.kind not in "iu":
        raise ValueError(f"state's num_batches_tracked must be a count, got {value!r}")
    count = int(counter.reshape(()))
    if not 0 <= count < 2**63:
        raise ValueError(f"state's num_batches_tracked must be a count, got {value!r}")
    return count
