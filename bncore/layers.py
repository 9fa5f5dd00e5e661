"""The layers: parameters, running statistics and training state over the functions.

A layer changes its state only after everything that can fail has succeeded.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from bncore import _backend, _check, reference
from bncore.functional import (
    batch_norm,
    batch_norm_backward,
    batch_norm_inference,
    batch_norm_inference_backward,
)


class BatchNorm:
    """Batch normalization with learnable scale and offset and running statistics.

    In training, normalizes by the batch's statistics and moves the running ones::

        running <- (1 - momentum) running + momentum batch

    with the unbiased variance n / (n - 1); in evaluation, normalizes by the running ones.

    Parameters
    ----------
    num_features : int or tuple of int
        Size of the channel axis; where ``axis`` is a tuple one size per axis, in x's order of them.
    axis : int or tuple of int
        The channel axis or axes.
    eps : float
        Added to the variance, positive.
    momentum : float or None
        Weight of the newest batch in the running statistics, 0 to 1; None averages all batches.
    affine : bool
        Whether there are gamma and beta.
    track_running_stats : bool
        Whether there are running statistics; without them evaluation uses the batch's too.
    activation : None, "relu", ("leaky_relu", slope) or ("clip", low, high)
        Applied to the output.
    dtype : dtype
        Of parameters and running statistics; the input may have another.

    Attributes
    ----------
    gamma, beta : ndarray or None
        Scale (ones at first) and offset (zeros).
    running_mean, running_var : ndarray or None
        Zeros and ones at first.
    num_batches_tracked : int or None
        Batches that moved the running statistics.
    grad_gamma, grad_beta : ndarray or None
        Gradients of the latest `backward`, replaced each time.
    training : bool

    Notes
    -----
    Threads may share a layer for evaluation. In training a layer belongs to one thread at a time.

    References
    ----------
    Ioffe & Szegedy, 2015, algorithms 1 and 2.

    Examples
    --------
    >>> import bncore, numpy as np
    >>> layer = bncore.BatchNorm(2)
    >>> y = layer(np.array([[0.0, 1.0], [2.0, 5.0]], np.float32))
    >>> y.round(3)
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> layer.running_mean
    array([0.1, 0.3], dtype=float32)
    >>> dx = layer.backward(np.ones_like(y))
    >>> layer.grad_beta
    array([2., 2.], dtype=float32)
    """

    _ranks: tuple[int, ...] | None = None

    def __init__(
        self, num_features, *, axis=1, eps=1e-5, momentum=0.1, affine=True,
        track_running_stats=True, activation=None, dtype=np.float32,
    ):  # fmt: skip
        self.shape = _channel_shape(num_features)
        self._channels = math.prod(self.shape)
        self.axis = axis
        self.eps = _check.positive(eps, "eps")
        self.momentum = _momentum(momentum)
        self.affine = bool(affine)
        self.track_running_stats = bool(track_running_stats)
        _check.activation(activation)
        self.activation = activation
        dtype = np.dtype(dtype)
        if dtype.name not in _check.FLOAT_NAMES:
            raise TypeError(f"dtype must be a float type, got {dtype}")
        self.gamma = np.ones(self.shape, dtype) if affine else None
        self.beta = np.zeros(self.shape, dtype) if affine else None
        self.running_mean = np.zeros(self.shape, dtype) if track_running_stats else None
        self.running_var = np.ones(self.shape, dtype) if track_running_stats else None
        self.num_batches_tracked = 0 if track_running_stats else None
        self.grad_gamma = None
        self.grad_beta = None
        self.training = True
        self._forward = None

    @property
    def num_features(self):
        """Channels: an int, or a tuple where there are several channel axes."""
        return self.shape[0] if len(self.shape) == 1 else self.shape

    def __call__(self, x, *, out=None):
        """Normalize ``x``; see `batch_norm` and `batch_norm_inference`.

        Parameters
        ----------
        x : array_like
        out : ndarray, optional
            Takes the result; ``out=x`` works in place, after which training has no backward pass.

        Returns
        -------
        ndarray
            Shape, dtype and memory order of x.

        Raises
        ------
        ValueError
            In training where there is one value per channel, which has no variance; and for
            whatever `batch_norm` refuses. The layer is as it was then.
        """
        x = self._checked(x)
        if self.training or not self.track_running_stats:
            return self._normalize_batch(x, out)
        if self.running_mean is None or self.running_var is None:
            raise TypeError("running_mean and running_var must be arrays in evaluation, got None")
        overwritten = out is not None and np.may_share_memory(out, x)
        forward = _Fixed(
            None if overwritten else x, self.running_mean.copy(), self.running_var.copy()
        )
        y = batch_norm_inference(
            x, self.running_mean, self.running_var, self.gamma, self.beta,
            axis=self.axis, eps=self.eps, activation=self.activation, out=out,
        )  # fmt: skip
        self._forward = forward
        return y

    def backward(self, dy, *, out=None):
        """The gradient of the latest call's input; sets ``grad_gamma`` and ``grad_beta``.

        After a call in training the gradient goes through the batch's statistics, after one in
        evaluation the running statistics are constants.

        Parameters
        ----------
        dy : array_like
            Gradient of the loss with respect to the output, in x's shape and dtype.
        out : ndarray, optional
            Takes dx; may be dy.

        Returns
        -------
        ndarray

        Raises
        ------
        ValueError
            Before the first call, after a call in place, and for whatever
            `batch_norm_backward` refuses.
        """
        if self._forward is None:
            raise ValueError("backward needs a call of the layer before it")
        if isinstance(self._forward, _Fixed):
            fixed = self._forward
            if fixed.x is None:
                raise ValueError("backward has no x: the latest call overwrote it (out=x)")
            g = batch_norm_inference_backward(
                dy, fixed.x, fixed.mean, fixed.var, self.gamma, self.beta,
                axis=self.axis, eps=self.eps, activation=self.activation, out=out,
            )  # fmt: skip
        else:
            g = batch_norm_backward(dy, self._forward, out=out)
        self.grad_gamma, self.grad_beta = g.dgamma, g.dbeta
        return g.dx

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

    def reset_running_stats(self):
        """Forget all batches: running mean 0, variance 1, counter 0."""
        if self.track_running_stats:
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
        loaded = {key: _loaded(state[key], key, array) for key, array in arrays.items()}
        if "running_var" in loaded and (loaded["running_var"] < 0).any():
            raise ValueError("state's running_var must not be negative")
        tracked = self.num_batches_tracked
        if "num_batches_tracked" in state:
            tracked = _loaded_counter(state["num_batches_tracked"])
        for key, array in arrays.items():
            _check.state(array, key, self.shape)
        for key, array in arrays.items():
            array[...] = loaded[key]
        self.num_batches_tracked = tracked

    def __repr__(self):
        return (
            f"{type(self).__name__}({self.num_features}, axis={self.axis}, eps={self.eps}, "
            f"momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, activation={self.activation!r})"
        )

    def _checked(self, x):
        """``x`` as an array with this layer's channels."""
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

    def _normalize_batch(self, x, out):
        """The call in training: batch statistics, then the running ones."""
        channels = self._channels
        if self.training and channels and x.size == channels:
            raise ValueError(
                f"x must have more than 1 value per channel in training, got shape {x.shape}"
            )
        tracking = self.training and self.track_running_stats and x.size > 0
        spare = self._spare(out) if tracking else None
        y, saved = batch_norm(
            x, self.gamma, self.beta, axis=self.axis, eps=self.eps,
            activation=self.activation, out=out,
        )  # fmt: skip
        if tracking:
            self._track(saved, spare)
        self._forward = saved
        return y

    def _spare(self, out):
        """Room to move the running statistics in, which are checked; None if none is needed."""
        _momentum(self.momentum)
        if type(self.num_batches_tracked) is not int:
            raise TypeError(f"num_batches_tracked must be an int, got {self.num_batches_tracked!r}")
        mean, var = self.running_mean, self.running_var
        if _backend.active.statistics.movable_plain(mean, var, out, self._channels):
            return None
        for array, name in ((mean, "running_mean"), (var, "running_var")):
            _check.state(array, name, self.shape)
            _check.apart(out, array, name)
        return np.empty((2, 2, *self.shape))

    def _track(self, saved, spare):
        """Move the running statistics towards a batch's; see `bncore.reference.move_running`."""
        tracked = self.num_batches_tracked + 1
        momentum = 1 / tracked if self.momentum is None else self.momentum
        arguments = (
            self.running_mean, self.running_var, saved.stats, momentum,
            saved.values / (saved.values - 1),
        )  # fmt: skip
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


class BatchNorm1d(BatchNorm):
    """`BatchNorm` for (N, C) and (N, C, L) arrays.

    Examples
    --------
    >>> import bncore, numpy as np
    >>> bncore.BatchNorm1d(3)(np.zeros((4, 3), np.float32)).shape
    (4, 3)
    """

    _ranks = (2, 3)


class BatchNorm2d(BatchNorm):
    """`BatchNorm` for (N, C, H, W) arrays.

    Examples
    --------
    >>> import bncore, numpy as np
    >>> bncore.BatchNorm2d(3)(np.zeros((4, 3, 2, 2), np.float32)).shape
    (4, 3, 2, 2)
    """

    _ranks = (4,)


class BatchNorm3d(BatchNorm):
    """`BatchNorm` for (N, C, D, H, W) arrays.

    Examples
    --------
    >>> import bncore, numpy as np
    >>> bncore.BatchNorm3d(3)(np.zeros((4, 3, 2, 2, 2), np.float32)).shape
    (4, 3, 2, 2, 2)
    """

    _ranks = (5,)


class _Fixed(NamedTuple):
    """What a call in evaluation keeps for `BatchNorm.backward`."""

    x: np.ndarray | None
    mean: np.ndarray
    var: np.ndarray


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


def _momentum(momentum):
    if momentum is None:
        return None
    number = momentum if type(momentum) is float else _check.real(momentum, "momentum")
    if not 0 <= number <= 1:
        raise ValueError(f"momentum must be None or between 0 and 1, got {momentum!r}")
    return number


def _loaded(value, key, like):
    """A copy of a state's array, in the dtype of the layer's own."""
    array = _check.float_array(value, f"state's {key}")
    if array.shape != like.shape:
        raise ValueError(f"state's {key} must have shape {like.shape}, got {array.shape}")
    with np.errstate(all="ignore"):
        return array.astype(like.dtype)


def _loaded_counter(value):
    counter = np.asarray(value)
    if counter.shape not in ((), (1,)) or counter.dtype.kind not in "iu":
        raise ValueError(f"state's num_batches_tracked must be a count, got {value!r}")
    count = int(counter.reshape(()))
    if not 0 <= count < 2**63:
        raise ValueError(f"state's num_batches_tracked must be a count, got {value!r}")
    return count
