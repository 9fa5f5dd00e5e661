"""Weights of positions, as the kernels take them.

A mask and sample weights become one array: the weight of each position in the statistics, and -1
where it is masked, which has neither y nor gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bncore import _layout

MASKED = -1.0


class Weights(NamedTuple):
    """How much each position counts.

    Attributes
    ----------
    values : (N, S) ndarray of float64
        Weights, scaled by a power of two lest squares times weights overflow; `MASKED` elsewhere.
    total : float
        Their sum.
    first_used : int
        The first position ``n * S + s`` of a weight above 0.
    unit : float
        By what to multiply values and total for those that were given.
    """

    values: np.ndarray
    total: float
    first_used: int
    unit: float

    @property
    def count(self) -> float:
        """Sum of the given weights."""
        return self.total * self.unit


def weights_of(mask, sample_weight, layout: _layout.Layout) -> Weights | None:
    """Checked arguments as `Weights`; None where there are none.

    Parameters
    ----------
    mask : ndarray of bool or None
        True where a position counts; over x's axes, with channel axes of length 1.
    sample_weight : ndarray of float64 or None
        Not negative; the same axes.
    layout : Layout
    """
    if mask is None and sample_weight is None:
        return None
    unit = 1.0
    if sample_weight is None:
        values = np.where(_layout.positions_to_kernel(mask, layout), 1.0, MASKED)
    else:
        values = _layout.positions_to_kernel(sample_weight, layout)
        unit = _power_of_two(values.max(initial=0.0))
        values = values / unit
        if mask is not None:
            values[~_layout.positions_to_kernel(mask, layout)] = MASKED
    used = values > 0
    total = float(values.sum(where=used))
    return Weights(values, total, int(used.argmax()) if total else 0, unit)


def _power_of_two(number: float) -> float:
    """The power of two just above a number; 1 for 0."""
    return float(np.ldexp(1.0, np.frexp(number)[1]))
