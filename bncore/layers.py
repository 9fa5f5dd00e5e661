"""The layers: batch normalization with a state, over the functions.

Each call checks and allocates first, then normalizes, then moves the running statistics; see
`bncore.state`.
"""

from __future__ import annotations

import numpy as np

from bncore import _backend, _check, policies
from bncore._config import get_num_threads
from bncore.functional import (
    GRADIENTS,
    Saved,
    batch_norm,
    batch_norm_backward,
    batch_norm_inference,
    batch_norm_inference_backward,
    fixed_gradients_plain,
)
from bncore.reference import NO_ACTIVATION
from bncore.state import Layer


class BatchNorm(Layer):
    """Batch normalization with learnable scale and offset and running statistics.

    In training, normalizes by the batch's statistics and moves the running ones::

        running <- (1 - momentum) running + momentum batch

    with the unbiased variance n / (n - 1); in evaluation, normalizes by the running ones. Other
    conventions are `bncore.presets`.

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
    ddof : int
        1: the running variance takes the unbiased variance, m2 / (n - 1); 0: the biased one. With
        weights w, unbiased is the variance times ``1 / (1 - sum w^2 / (sum w)^2)``, the factor for
        weights that say how reliable a value is: n / (n - 1) where they are equal, or a mask.
    single_value : "raise", "zero" or "running"
        A training batch of one value (of a weight above 0) per channel is an error; or its variance
        is 0, y is beta and the running statistics move, the variance towards 0; or it is
        normalized as in evaluation and moves nothing.
    nan_policy : "propagate" or "skip"
        Whether a batch whose mean or variance is not finite, in the running statistics' type, in
        any channel moves the running statistics and the counter. y is the same.

    Attributes
    ----------
    gamma, beta : ndarray or None
        Scale (ones at first) and offset (zeros).
    running_mean, running_var : ndarray or None
        Zeros and ones at first.
    num_batches_tracked : int or None
        Batches that moved the running statistics.
    grad_gamma, grad_beta, grad_residual : ndarray or None
        Gradients of the latest `backward`, replaced each time.
    training : bool
    update : bool
        False: calls in training move no running statistic; see `no_update`.

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

    A last batch of one, and a running variance that is biased:

    >>> layer = bncore.BatchNorm(2, single_value="zero", ddof=0)
    >>> layer(np.array([[7.0, 9.0]], np.float32)), layer.running_var
    (array([[0., 0.]], dtype=float32), array([0.9, 0.9], dtype=float32))
    """

    def __call__(self, x, *, residual=None, mask=None, sample_weight=None, out=None):
        """Normalize ``x``; see `batch_norm` and `batch_norm_inference`.

        Parameters
        ----------
        x : array_like
        residual : array_like, optional
            Added before the activation; shape and dtype of x.
        mask : array_like of bool, optional
            True where x counts; broadcastable to x with channel axes of length 1. What stands
            elsewhere, be it NaN, has no influence; y and gradients are 0 there.
        sample_weight : array_like, optional
            Weight of each position in the batch's statistics, not negative; broadcastable as mask
            is. In evaluation, where the statistics are fixed, it is only checked.
        out : ndarray, optional
            Takes the result; ``out=x`` works in place, after which training has no backward pass.

        Returns
        -------
        ndarray
            Shape, dtype and memory order of x.

        Raises
        ------
        ValueError
            In training where there is one value per channel and ``single_value`` is "raise"; and
            for whatever `batch_norm` refuses. The layer is as it was then.

        Examples
        --------
        >>> import bncore, numpy as np
        >>> layer = bncore.BatchNorm(1, momentum=1.0, activation="relu")
        >>> x = np.array([[1.0], [3.0], [np.nan]])
        >>> y = layer(x, mask=~np.isnan(x), residual=np.ones_like(x))
        >>> y.round(3).ravel(), layer.running_mean
        (array([0., 2., 0.]), array([2.], dtype=float32))
        """
        if mask is None and sample_weight is None:
            y = self._plain(x, residual, out)
            if y is not None:
                return y
        x = self._checked(x)
        if self.training or not self.track_running_stats:
            return self._normalize_batch(x, residual, mask, sample_weight, out)
        return self._normalize_fixed(x, residual, mask, sample_weight, out)

    def backward(self, dy, *, wrt=None, out=None):
        """The gradient of the latest call's input; sets ``grad_gamma`` and its like.

        After a call in training the gradient goes through the batch's statistics, after one in
        evaluation the running statistics are constants.

        Parameters
        ----------
        dy : array_like
            Gradient of the loss with respect to the output, in x's shape and dtype.
        wrt : str or sequence of str, optional
            Which gradients to compute, of "x", "gamma", "beta" and "residual"; all that there are
            where not given. The others are None.
        out : ndarray, optional
            Takes dx; may be dy.

        Returns
        -------
        ndarray
            None where wrt leaves out "x", as in a network's first layer.

        Raises
        ------
        ValueError
            Before the first call, after a call in place, and for whatever
            `batch_norm_backward` refuses.

        Examples
        --------
        >>> import bncore, numpy as np
        >>> layer = bncore.BatchNorm(1)
        >>> y = layer(np.array([[1.0], [3.0]]))
        >>> layer.backward(np.ones_like(y), wrt=("gamma", "beta")) is None, layer.grad_beta
        (True, array([2.], dtype=float32))
        """
        if self._forward is None:
            raise ValueError("backward needs a call of the layer before it")
        wrt = None if wrt is None else _check.wanted(wrt, GRADIENTS, GRADIENTS, out)
        if isinstance(self._forward, tuple):
            gradients = self._fixed_backward(dy, self._forward, wrt, out)
        else:
            gradients = batch_norm_backward(dy, self._forward, wrt=wrt, out=out)
        dx, self.grad_gamma, self.grad_beta, self.grad_residual = gradients
        return dx

    def _plain(self, x, residual, out):
        """The call as one call of a kernel; None where the kernel or the policies decline it."""
        self._check_policies()
        ranks = self._ranks
        if ranks is not None and getattr(x, "ndim", None) not in ranks:
            return None
        activation = self.activation
        epilogue = NO_ACTIVATION if activation is None else _check.activation(activation)
        if self.training:
            return self._train_plain(x, residual, epilogue, out)
        if not self.track_running_stats:
            return None
        call = self.gamma, self.beta, self.axis, self.eps, activation
        plain = _backend.active.normalization.evaluate_plain(
            x, self.running_mean, self.running_var, self.gamma, self.beta, residual, epilogue,
            self.axis, self.eps, out, self._channels, get_num_threads(),
        )  # fmt: skip
        if plain is None:
            return None
        y, self._forward = plain
        self._call = call
        return y

    def _train_plain(self, x, residual, epilogue, out):
        """`_plain` in training: the kernel moves the running statistics too."""
        running = self._plain_running()
        if running is None:
            return None
        # Whatever can fail comes before the kernel, which moves the running statistics.
        saved, tracked = Saved(), self.num_batches_tracked + 1
        plain = _backend.active.normalization.forward_plain(
            x, self.gamma, self.beta, residual, epilogue, self.axis, self.eps, out, running,
            get_num_threads(),
        )  # fmt: skip
        if plain is None:
            return None
        y, saved.x, saved.record = plain
        self._forward, self.num_batches_tracked = saved, tracked
        return y

    def _normalize_batch(self, x, residual, mask, sample_weight, out):
        """The call by the batch's statistics, which then move the running ones."""
        values = x.size // self._channels if x.size else 0
        weights = None
        if mask is not None or sample_weight is not None:
            axes = _check.channel_axes(self.axis, x.ndim)
            weights = policies.used_weights(mask, sample_weight, x, axes)
            values = min(values, weights.size)
        if self.training and values == 1 and not self._takes_single(x):
            return self._normalize_fixed(x, residual, mask, sample_weight, out)
        move = self._prepared(values, weights, out)
        y, saved = batch_norm(
            x, self.gamma, self.beta, axis=self.axis, eps=self.eps, activation=self.activation,
            residual=residual, mask=mask, sample_weight=sample_weight, out=out,
        )  # fmt: skip
        if move is not None:
            self._move(saved, move)
        self._forward = saved
        return y

    def _normalize_fixed(self, x, residual, mask, sample_weight, out):
        """The call by the running statistics."""
        self._check_given_statistics()
        if mask is not None or sample_weight is not None:
            axes = _check.channel_axes(self.axis, x.ndim)
            mask = None if mask is None else _check.mask(mask, x, axes).copy()
            _check.sample_weight(sample_weight, x, axes, mask)
        if residual is not None:
            residual = _check.same_shape(residual, "residual", x)
        record = (
            _unless_shared(x, out), _unless_shared(residual, out), residual is not None, mask,
            self.running_mean.copy(), self.running_var.copy(),
        )  # fmt: skip
        call = self.gamma, self.beta, self.axis, self.eps, self.activation
        y = batch_norm_inference(
            x, self.running_mean, self.running_var, self.gamma, self.beta, axis=self.axis,
            eps=self.eps, activation=self.activation, residual=residual, mask=mask, out=out,
        )  # fmt: skip
        self._forward, self._call = record, call
        return y

    def _fixed_backward(self, dy, record, wrt, out):
        """`Gradients` after a call by the running statistics, from the record it kept.

        For a small batch the time to make an object counts: hence a tuple, of x and residual,
        None where a result has overwritten them; whether there was a residual; the mask; and the
        statistics as they were. What else the call was made with is in ``_call``.
        """
        x, residual, had_residual, mask, mean, var = record
        gamma, beta, axis, eps, activation = self._call
        if x is None:
            raise ValueError("backward has no x: an earlier pass overwrote it (out=x)")
        if mask is None and not had_residual:
            plain = fixed_gradients_plain(
                dy, x, mean, var, gamma, beta, axis, eps, activation,
                GRADIENTS if wrt is None else wrt, out,
            )  # fmt: skip
            if plain is not None:
                dx, dgamma, dbeta, in_place = plain
                if in_place:
                    self._forward = (None, *record[1:])
                return dx, dgamma, dbeta, None
        if had_residual and residual is None:
            if activation is not None:
                raise ValueError(
                    "backward has no residual: an earlier pass overwrote it (out=residual)"
                )
            residual = dy  # any values will do: only an activation would look at them
        g = batch_norm_inference_backward(
            dy, x, mean, var, gamma, beta, axis=axis, eps=eps, activation=activation,
            residual=residual, mask=mask, wrt=wrt, out=out,
        )  # fmt: skip
        self._forward = _unless_shared(x, out), _unless_shared(record[1], out), *record[2:]
        return g[:4]


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


def _unless_shared(array, out):
    """An array, or None where a result may have been written over it."""
    if array is None or (isinstance(out, np.ndarray) and np.shares_memory(out, array)):
        return None
    return array
