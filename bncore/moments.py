"""The statistics algebra: count, mean and sum of squared deviations, and how they merge.

Two parts of a batch merge by the pairwise formula of Chan, Golub & LeVeque (1979), so that the
statistics of a whole follow from those of its parts, in any grouping, without the data.
"""

from __future__ import annotations

import numpy as np

from bncore import _check


class Moments:
    """Count, mean and sum of squared deviations of each channel.

    ``Moments()`` is the moments of nothing, the identity of ``+``.

    Parameters
    ----------
    count, mean, m2 : array_like, optional
        One value per channel, of one shape; ``m2 = sum (x - mean)**2``.
    mean_lo : array_like, optional
        What float64 leaves of the mean: the mean is ``mean + mean_lo``.

    Attributes
    ----------
    count, mean, m2 : ndarray of float64
        In the shape of the channels.

    References
    ----------
    Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979.

    Examples
    --------
    >>> import bncore, numpy as np
    >>> x = np.arange(12.0).reshape(6, 2)
    >>> whole = bncore.moments(x)
    >>> parts = bncore.moments(x[:1]) + bncore.moments(x[1:])
    >>> parts.mean
    array([5., 6.])
    >>> bool((parts.m2 == whole.m2).all())
    True
    >>> whole.var(ddof=1)
    array([14., 14.])
    """

    __slots__ = ("count", "mean", "m2", "mean_lo")

    def __init__(self, count=0.0, mean=0.0, m2=0.0, mean_lo=0.0):
        given = {"count": count, "mean": mean, "m2": m2, "mean_lo": mean_lo}
        arrays = [
            _check.converted(part, name, "an array of numbers", np.float64)
            for name, part in given.items()
        ]
        try:
            arrays = [np.array(part) for part in np.broadcast_arrays(*arrays)]
        except ValueError:
            shapes = ", ".join(str(part.shape) for part in arrays)
            raise ValueError(f"count, mean and m2 must have one shape, got {shapes}") from None
        self.count, self.mean, self.m2, self.mean_lo = arrays

    def var(self, ddof: float = 0) -> np.ndarray:
        """Variance ``m2 / (count - ddof)``; NaN where count does not exceed ddof.

        Parameters
        ----------
        ddof : float
            0 for the biased variance batch norm uses, 1 for the unbiased one.
        """
        degrees = self.count - _check.real(ddof, "ddof")
        return np.divide(self.m2, degrees, out=np.full_like(self.m2, np.nan), where=degrees > 0)

    def __radd__(self, other):
        """0 + moments, where `sum` begins."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    @np.errstate(all="ignore")
    def __add__(self, other):
        """The moments of both parts together.

        ::

            d = mean_b - mean_a      n = n_a + n_b
            mean = mean_a + d n_b / n
            m2 = m2_a + m2_b + d^2 n_a n_b / n
        """
        if not isinstance(other, Moments):
            return NotImplemented
        if self.count.shape != other.count.shape and self.count.ndim and other.count.ndim:
            raise ValueError(
                f"cannot add moments of channels {self.count.shape} and {other.count.shape}"
            )
        count = self.count + other.count
        distance = (other.mean - self.mean) + (other.mean_lo - self.mean_lo)
        if (self.count * other.count * count).all():
            share, start, start_lo = other.count / count, self.mean, self.mean_lo
        else:
            # Nothing has no mean: its distance must not turn a NaN or Inf elsewhere into one here.
            none, no_other = self.count == 0, other.count == 0
            share = np.divide(other.count, count, out=np.zeros_like(count), where=count != 0)
            distance = np.where(none | no_other, 0.0, distance)
            start = np.where(none, other.mean, self.mean)
            start_lo = np.where(none, other.mean_lo, self.mean_lo)
        mean, mean_lo = _two_sum(start, start_lo + distance * share)
        m2 = self.m2 + other.m2 + distance * distance * (self.count * share)
        make = moments_of if count.ndim else Moments
        return make(count, mean, m2, mean_lo)

    def __repr__(self):
        return f"Moments(count={self.count!r}, mean={self.mean!r}, m2={self.m2!r})"


def moments_of(count, mean, m2, mean_lo):
    """`Moments` of float64 arrays of one shape, which are neither checked nor copied."""
    moments = Moments.__new__(Moments)
    moments.count, moments.mean, moments.m2, moments.mean_lo = count, mean, m2, mean_lo
    return moments


def _two_sum(a, b):
    """``a + b`` as a rounded sum and its error (Knuth)."""
    total = a + b
    taken = total - a
    return total, (a - (total - taken)) + (b - taken)
