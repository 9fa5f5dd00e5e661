"""Statistics in exact rational arithmetic, and distances in units of the last place."""

import math
from fractions import Fraction

import mpmath
import numpy as np

mpmath.mp.prec = 200


def exact_moments(values):
    """Mean and sum of squared deviations of floats, as fractions."""
    integers, exponent = as_integers(values)
    n, total = len(integers), sum(integers)
    squares = sum(v * v for v in integers)
    unit = Fraction(2) ** exponent
    return Fraction(total, n) * unit, Fraction(n * squares - total * total, n) * unit**2


def as_integers(values):
    """Floats as integers times one power of two."""
    pairs = [math.frexp(float(v)) for v in values]
    lowest = min(e for m, e in pairs if m) - 53 if any(m for m, _ in pairs) else 0
    return [int(m * 2**53) << max(e - 53 - lowest, 0) for m, e in pairs], lowest


def high_precision(value):
    """A fraction or a float as an mpmath number, in the precision of the context."""
    if isinstance(value, Fraction):
        return mpmath.mpf(value.numerator) / value.denominator
    return mpmath.mpf(float(value))


def ulps(value, exact, dtype, at_least=0):
    """Distance of a value from an exact one in units of the last place of ``dtype``.

    The unit is that of the larger of ``exact`` and ``at_least``.
    """
    size = max(abs(high_precision(exact)), abs(high_precision(at_least)))
    distance = abs(high_precision(value) - high_precision(exact))
    return float(distance / high_precision(unit_of_last_place(size, dtype)))


def unit_of_last_place(size, dtype):
    """The distance of neighbouring numbers of a dtype at a positive size, as a fraction."""
    info = np.finfo(dtype)
    smallest = Fraction(float(info.smallest_subnormal))
    if not size:
        return smallest
    exponent = int(mpmath.floor(mpmath.log(size, 2)))
    if mpmath.mpf(2) ** (exponent + 1) <= size:
        exponent += 1
    return max(Fraction(2) ** (exponent - info.nmant), smallest)
