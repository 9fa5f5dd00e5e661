"""What moves a layer's running statistics, and how: the policies' names, checks and arithmetic.

Nothing here has state; `bncore.state` asks before it writes.
"""

from __future__ import annotations

import numpy as np

from bncore import _check

SINGLE_VALUE = ("raise", "zero", "running")
"""What a batch of one value per channel does in training."""

NAN_POLICY = ("propagate", "skip")
"""What a batch whose statistics are not finite does."""


def momentum(value) -> float | None:
    """A momentum between 0 and 1, or None for the average of all batches."""
    if value is None:
        return None
    number = value if type(value) is float else _check.real(value, "momentum")
    if not 0 <= number <= 1:
        raise ValueError(f"momentum must be None or between 0 and 1, got {value!r}")
    return number


def check(layer) -> float | None:
    """Refuse policies of a layer that there are none of, as they may be set by hand.

    Returns the momentum.
    """
    ddof, single_value, nan_policy = layer.ddof, layer.single_value, layer.nan_policy
    if type(ddof) is not int or not 0 <= ddof <= 1:
        raise (ValueError if type(ddof) is int else TypeError)(f"ddof must be 0 or 1, got {ddof!r}")
    if type(single_value) is not str or single_value not in SINGLE_VALUE:
        _refuse(single_value, "single_value", SINGLE_VALUE)
    if type(nan_policy) is not str or nan_policy not in NAN_POLICY:
        _refuse(nan_policy, "nan_policy", NAN_POLICY)
    if layer.update is not True and layer.update is not False:
        raise TypeError(f"update must be True or False, got {layer.update!r}")
    if single_value == "running" and not layer.track_running_stats:
        raise ValueError("single_value must not be 'running' where track_running_stats is False")
    return momentum(layer.momentum)


def used_weights(mask, sample_weight, x, axes) -> np.ndarray:
    """The weights above 0 of a batch's positions, one after another.

    Parameters
    ----------
    mask, sample_weight : array_like or None
        As in `bncore.batch_norm`; not both None.
    x : ndarray
    axes : tuple of int
        Sorted, non-negative.
    """
    mask = _check.mask(mask, x, axes)
    weights = _check.sample_weight(sample_weight, x, axes, mask)
    if weights is None:
        return np.ones(np.count_nonzero(mask))
    return weights[weights > 0]


def unbiasing(weights: np.ndarray) -> float:
    """What makes a weighted variance unbiased where weights say how reliable a value is.

    ::

        1 / (1 - sum w^2 / (sum w)^2)

    which is n / (n - 1) for n equal weights, whatever they are.

    Parameters
    ----------
    weights : (n,) array of float64
        At least two, all above 0.

    References
    ----------
    Galassi et al., "GNU Scientific Library", section "Weighted samples".

    Examples
    --------
    >>> import numpy as np
    >>> from bncore.policies import unbiasing
    >>> unbiasing(np.array([3.0, 3.0, 3.0])), unbiasing(np.array([1.0, 3.0]))
    (1.5, 2.6666666666666665)
    """
    # (sum w)^2 - sum w^2 is the sum of w_i (total - w_i): nothing cancels if the largest weight's
    # part is written as the sum of the others.
    weights = weights / weights.max()
    others = np.delete(weights, weights.argmax())
    rest = others.sum()
    total = 1 + rest
    return float(total**2 / ((others * (total - others)).sum() + rest))


@np.errstate(all="ignore")
def is_finite(statistic: np.ndarray, factor: float, dtype: np.dtype) -> bool:
    """Whether a statistic times a factor is finite in every channel, in the running one's type."""
    ends = statistic.min(), statistic.max()  # NaN where there is one; no array is allocated
    return all(bool(np.isfinite(dtype.type(end * factor))) for end in ends)


def _refuse(value, name, names):
    quoted = ", ".join(map(repr, names[:-1])) + f" or {names[-1]!r}"
    kind = ValueError if isinstance(value, str) else TypeError
    raise kind(f"{name} must be {quoted}, got {value!r}")
