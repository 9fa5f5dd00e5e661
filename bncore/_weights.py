"""Weights of positions, as the kernels take them.

A mask alone becomes bytes, and sample weights float64 values that are negative where a position is
masked: it has neither y nor gradient then.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from bncore import _layout

RUN = 1024
"""Elements in a run of lines, on average, from which on these are taken run by run."""


class Weights(NamedTuple):
    """How much each position counts.

    Attributes
    ----------
    values : (N, S) ndarray of int8 or float64
        A mask: -1 where a position counts, else 0. Or weights, scaled by a power of two lest
        squares times weights overflow, and negative where a position is masked. Broadcast over S
        where all positions of one n are alike; not to be written to.
    masking : bool
        Whether any position is masked.
    in_runs : bool
        Whether whole n are, of which so many follow one another that it is worth to take them
        together.
    total : float
        Sum of the weights above 0, 1 each for a mask.
    first_used : int
        The first position ``n * S + s`` that counts.
    unit : float
        By what to multiply values and total for the weights that were given.
    """

    values: np.ndarray
    masking: bool
    in_runs: bool
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
    """Checked arguments as `Weights`; None where all positions count, and count 1.

    Parameters
    ----------
    mask : ndarray of bool or None
        True where a position counts; over x's axes, with channel axes of length 1.
    sample_weight : ndarray of float64 or None
        Not negative; the same axes.
    layout : Layout
    """
    valid = None if mask is None else _layout.positions_to_kernel(mask, layout)
    if valid is not None and valid.all():
        valid = None
    if sample_weight is not None:
        weights = _layout.positions_to_kernel(sample_weight, layout)
        unit = _power_of_two(weights.max(initial=0.0))
        values = weights / unit if valid is None else np.where(valid, weights / unit, -1.0)
        used = values > 0
        # Summed without gaps: NumPy's pairwise sums, and so their accuracy, end at each.
        total = float((values if used.all() else values[used]).sum())
    elif valid is not None:
        values, used, unit = -valid.view(np.int8), valid, 1.0
        total = float(np.count_nonzero(valid))
    else:
        return None
    n, _, s = layout.shape
    in_runs = valid is not None and _in_runs(valid, layout)
    first_used = int(used.argmax()) if used.size else 0
    if values.shape != (n, s):  # one for each n
        values, total, first_used = np.broadcast_to(values, (n, s)), total * s, first_used * s
    return Weights(values, valid is not None, in_runs, total, first_used, unit)


def _in_runs(valid, layout) -> bool:
    """See `Weights`; of a mask (N, S) or (N, 1)."""
    elements = math.prod(layout.shape)
    if valid.shape[1] != 1 or elements < RUN:
        return False
    runs = 1 + int(np.count_nonzero(valid[1:] != valid[:-1]))
    return runs * RUN <= elements


def _power_of_two(number: float) -> float:
    """The power of two just above a number; 1 for 0."""
    return float(np.ldexp(1.0, np.frexp(number)[1]))
