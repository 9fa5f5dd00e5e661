"""NIST's Statistical Reference Datasets, univariate: nine sets with certified mean and deviation.

Each result is held to the exact statistics of the stored doubles, and to the certified digits as
far as doubles can hold the data.

References
----------
National Institute of Standards and Technology, "Statistical Reference Datasets",
https://www.itl.nist.gov/div898/strd/univ/homepage.html
"""

import math
from pathlib import Path

import mpmath
import numpy as np
import pytest
from trust_exact import exact_moments, high_precision

import bncore

pytestmark = pytest.mark.nist

CERTIFIED = {
    "Lottery": (518.958715596330, 291.699727470969, 15),
    "Lew": (-177.435000000000, 277.332168044316, 15),
    "Mavro": (2.00185600000000, 0.000429123454003053, 13.12),
    "Michelso": (299.852400000000, 0.0790105478190518, 13.84),
    "PiDigits": (4.53480000000000, 2.86733906028871, 15),
    "NumAcc1": (10000002, 1, 15),
    "NumAcc2": (1.2, 0.1, 15),
    "NumAcc3": (1000000.2, 0.1, 9.45),
    "NumAcc4": (10000000.2, 0.1, 8.25),
}
"""Certified mean, standard deviation (ddof 1), and how many of its 15 digits the exact deviation of
the data has, once these are rounded to doubles."""


NUMERICAL = {
    "NumAcc1": (10000001.0, [10000003.0, 10000002.0]),
    "NumAcc2": (1.2, [1.1, 1.3] * 500),
    "NumAcc3": (1000000.2, [1000000.1, 1000000.3] * 500),
    "NumAcc4": (10000000.2, [10000000.1, 10000000.3] * 500),
}


def load(name):
    if name in NUMERICAL:
        first, rest = NUMERICAL[name]
        return np.array([first, *rest])
    if name == "PiDigits":
        digits = [float(digit) for digit in digits_of_pi(5000)]
        digits[956] = 3.0  # so in NIST's file and its certified values, where pi has an 8
        return np.array(digits)
    lines = (Path(__file__).parent / "nist" / f"{name}.txt").read_text().splitlines()
    return np.array([float(number) for line in lines[1:] for number in line.split()])


def digits_of_pi(n):
    with mpmath.workdps(n + 20):
        return mpmath.nstr(mpmath.pi, n + 10, strip_zeros=False).replace(".", "")[:n]


def digits(value, certified):
    """Digits that agree: the logarithm of the relative error."""
    return 16.0 if value == certified else -math.log10(abs(value - certified) / abs(certified))


@pytest.mark.parametrize("name", CERTIFIED)
def test_univariate(backend, name):
    values = load(name)
    mean, m2 = exact_moments(values)
    certified_mean, certified_std, expected_digits = CERTIFIED[name]
    for x, axis in ((values[:, None], 1), (values[None], 0), (np.stack([values] * 3, 1), 1)):
        found = bncore.moments(x, axis=axis)
        assert abs(high_precision(found.m2[0]) - high_precision(m2)) <= 1e-14 * high_precision(m2)
        assert abs(found.mean[0] - float(mean)) <= np.spacing(abs(float(mean)))
        assert digits(found.mean[0], certified_mean) >= 15
        assert digits(math.sqrt(found.var(ddof=1)[0]), certified_std) >= expected_digits
        _, saved = bncore.batch_norm(x, axis=axis)
        exact = high_precision(m2) / len(values)
        assert abs(high_precision(saved.var[0]) - exact) <= 1e-14 * exact
