"""Weights of positions, as the kernels take them.

A mask alone becomes bytes, and sample weights float64 values that are negative where a position is
masked: it has neither y nor gradient then.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bncore import _layout


class Weights(NamedTuple):
    """How much each position counts.

    Attributes
    ----------
    values : (N, S) ndarray of int8 or float64
        A mask: -1 where a position counts, else 0. Or weights, scaled by a power of two lest
        squares times weights overflow, and negative where a position is masked.
    total : float
        Sum of the weights above 0, 1 each for a mask.
    first_used : int
        The first position ``n * S + s`` that counts.
    unit : float
        By what to multiply values and total for the weights that were given.
    """

    values: np.ndarray
    total: float
    first_used: int
    unit: float

    @property
    def given_total(self) -> float:
        """Sum of the weights as they were given."""
        return self.total * self.unit

    def as_floats(self) -> np.ndarray:
        """The scaled weights as (N, S) float64: 1 for a mask, negative where masked."""
        if self.values.dtype == np.float64:
            return self.values
        return np.where(self.values, 1.0, -1.0)


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
    valid = None if mask is None else _layout.positions_to_kernel(mask, layout)
    if sample_weight is None:
        if valid is None:
            return None
        return Weights(-valid.view(np.int8), float(np.count_nonzero(valid)), _first(valid), 1.0)
    values = _layout.positions_to_kernel(sample_weight, layout)
    unit = _power_of_two(values.max(initial=0.0))
    values = values / unit
    if valid is not None:
        values[~valid] = -1.0
    used = values > 0
    # Summed without gaps: NumPy's pairwise sums, and so their accuracy, end at each.
    return Weights(values, float(values[used].sum()), _first(used), unit)


def _first(used: np.ndarray) -> int:
    return int(used.argmax()) if used.size else 0


def _power_of_two(number: float) -> float:
    """The power of two just above a number; 1 for 0."""
    return float(np.ldexp(1.0, np.frexp(number)[1]))
