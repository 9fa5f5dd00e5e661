"""Checks for programs of your own: are hand-written gradients right?

A gradient is compared with central differences of the function itself, in float64: element by
element, which says where it is wrong, and along random directions, which reach every element of
an array too large for that.
"""

from __future__ import annotations

import inspect
import math
import operator
from typing import NamedTuple

import numpy as np

from bncore import _check


def gradcheck(
    function, inputs, *, step=1e-6, rtol=1e-5, atol=1e-6, elements=100, directions=3, seed=0
):
    """Compare a hand-written backward pass with central differences.

    ::

        <dy, y(x + h v) - y(x - h v)> / 2h    should be    <backward(dy), v>

    for each input x on its own, a random dy, and v each of its elements in turn, then random
    vectors of +1 and -1, each with a dy of its own.

    Parameters
    ----------
    function : callable
        ``function(*inputs)`` returns ``y, backward``: an array or a tuple of arrays, and a
        function that makes of dy, as y an array or a tuple, the gradients, one per input. None
        stands for a gradient that is not to be checked. Nothing needs to be bncore's.
    inputs : sequence of array_like
        Floats of any kind, which are converted to float64; function must compute in it.
        Integers, booleans and None are passed as they are and have no gradient.
    step : float
        How far an element is moved to either side.
    rtol, atol : float
        ``|found - expected| <= atol + rtol |expected|`` passes. Along a direction atol counts
        for each element, times the root of their number.
    elements : int
        Elements of each input that are checked one by one: all of a smaller input, of a larger
        one as many drawn at random.
    directions : int
        Random directions along which each input is checked.
    seed : int
        Of everything random: the same seed checks the same.

    Returns
    -------
    float
        The largest ``|found - expected|``.

    Raises
    ------
    AssertionError
        For a gradient that is wrong: the input's name, the place, what central differences
        expect and what backward gave.
    ValueError, TypeError
        For arguments with which nothing can be checked, naming what was expected and what came.

    Notes
    -----
    An error of the difference is about ``step^2`` times the third derivative, and
    ``1e-16 |y| / step`` from rounding; keep what is checked near 1 in size. At a kink, such as
    relu's at 0, there is no derivative: the message says so where it finds one.

    Examples
    --------
    Two layers with batch normalization between them:

    >>> import bncore, numpy as np
    >>> def network(x, w1, gamma, beta, w2):
    ...     z, saved = bncore.batch_norm(x @ w1, gamma, beta, activation=("leaky_relu", 0.1))
    ...     def backward(dy):
    ...         g = bncore.batch_norm_backward(dy @ w2.T, saved)
    ...         return g.dx @ w1.T, x.T @ g.dx, g.dgamma, g.dbeta, z.T @ dy
    ...     return z @ w2, backward
    >>> shapes = (8, 3), (3, 4), (4,), (4,), (4, 2)
    >>> inputs = [np.random.default_rng(i).normal(size=shape) for i, shape in enumerate(shapes)]
    >>> bncore.testing.gradcheck(network, inputs) < 1e-6
    True

    A gradient that is wrong:

    >>> def cube(x):
    ...     return x**3, lambda dy: 2 * x**2 * dy
    >>> bncore.testing.gradcheck(cube, [np.array([0.0, 1.0])])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    AssertionError: gradient of x: 1 of 2 elements wrong, the worst x[1]: expected ..., found ...
    """
    step = _check.positive(step, "step")
    tolerance = _not_negative(rtol, "rtol"), _not_negative(atol, "atol")
    elements, directions = _count(elements, "elements"), _count(directions, "directions")
    if not elements and not directions:
        raise ValueError("elements or directions must be at least 1, got 0 and 0")
    random = np.random.default_rng(_count(seed, "seed"))
    problem = _Problem(function, inputs, step)
    dy, gradients = problem.differentiate(random)
    if not gradients:
        raise ValueError("backward must return a gradient of at least one input, got none")
    largest = 0.0
    for index, gradient in gradients.items():
        along = _elements(gradient.shape, elements, random)
        slopes = [problem.slope(index, gradient, dy, one) for one in along]
        largest = max(largest, problem.judge(index, slopes, dy, *tolerance))
    for _ in range(directions):
        dy, gradients = problem.differentiate(random)
        for index, gradient in gradients.items():
            signs = random.choice([-1.0, 1.0], gradient.shape)
            slopes = [problem.slope(index, gradient, dy, signs)] if signs.size else []
            largest = max(largest, problem.judge(index, slopes, dy, *tolerance))
    return largest


class _Slope(NamedTuple):
    """How fast <dy, y> rises as an input moves along a direction."""

    direction: np.ndarray
    expected: float
    found: float


class _Problem:
    """A function with its inputs, as lists of arrays, and what comes out of it."""

    def __init__(self, function, inputs, step):
        if not callable(function):
            raise TypeError(f"function must be callable, got {type(function).__name__}")
        if not isinstance(inputs, (list, tuple)):
            raise TypeError(f"inputs must be a sequence of arrays, got {type(inputs).__name__}")
        self.function = function
        self.step = step
        self.names = _names(function, len(inputs))
        self.inputs = [_converted(*pair) for pair in zip(inputs, self.names)]
        self.y, _, self.is_tuple = self.call(self.inputs)
        again, _, _ = self.call(self.inputs)
        if not all(np.array_equal(*pair, equal_nan=True) for pair in zip(self.y, again)):
            raise ValueError("function must return the same y for the same inputs, got another")

    def call(self, inputs):
        """y as a list, backward, and whether y was a tuple."""
        copies = [value if value is None else value.copy() for value in inputs]
        result = self.function(*copies)
        if not (isinstance(result, tuple) and len(result) == 2 and callable(result[1])):
            raise TypeError(f"function must return (y, backward), got {_kind(result)}")
        y, backward = result
        outputs = [np.array(one) for one in (y if isinstance(y, tuple) else (y,))]
        for one in outputs:
            if one.dtype != np.float64:
                raise TypeError(f"function must compute in float64, got y of {one.dtype}")
        return outputs, backward, isinstance(y, tuple)

    def differentiate(self, random):
        """A random dy, and its gradients by index, those that are None left out."""
        dy = [random.standard_normal(one.shape) for one in self.y]
        _, backward, _ = self.call(self.inputs)
        copies = tuple([one.copy() for one in dy])
        gradients = backward(copies if self.is_tuple else copies[0])
        if not isinstance(gradients, (tuple, list)):
            gradients = (gradients,)
        if len(gradients) != len(self.inputs):
            expected = f"{len(self.inputs)}, one per input"
            raise ValueError(f"backward must return {expected}, got {len(gradients)} gradients")
        wanted = {}
        for index, (x, gradient) in enumerate(zip(self.inputs, gradients)):
            if gradient is None or x is None or x.dtype != np.float64:
                continue
            gradient = np.asarray(gradient)
            if gradient.shape != x.shape:
                name = self.names[index]
                raise AssertionError(
                    f"gradient of {name}: expected {name}'s shape {x.shape}, found {gradient.shape}"
                )
            wanted[index] = gradient.astype(np.float64)
        return dy, wanted

    def slope(self, index, gradient, dy, direction):
        """<dy, y> along a direction, by a central difference and by the gradient."""
        above, below = (self.moved(index, sign * direction) for sign in (1, -1))
        # What the input really moved by, after rounding.
        moved = above[index] - below[index]
        used = direction != 0
        if not moved[used].all():
            largest = abs(self.inputs[index]).max()
            raise ValueError(
                f"step must move {self.names[index]}, which has values up to {largest:g}, "
                f"got {self.step}"
            )
        scale = float(abs(moved[used]).mean())
        found = float((gradient[used] * moved[used]).sum()) / scale
        return _Slope(direction, self.rise(below, above, dy) / scale, found)

    def moved(self, index, direction):
        """The inputs, one of which is moved by a step along a direction."""
        inputs = list(self.inputs)
        inputs[index] = inputs[index] + self.step * direction
        return inputs

    def rise(self, start, end, dy):
        """<dy, y(end) - y(start)>"""
        pairs = zip(dy, self.call(end)[0], self.call(start)[0])
        return float(sum((one * (to - origin)).sum() for one, to, origin in pairs))

    def judge(self, index, slopes, dy, rtol, atol):
        """The largest error, or an AssertionError that tells of the worst."""
        excess = {}
        for number, (direction, expected, found) in enumerate(slopes):
            allowed = atol * math.sqrt(np.count_nonzero(direction)) + rtol * abs(expected)
            error = abs(found - expected)
            if not error <= allowed:
                excess[number] = math.inf if math.isnan(error) else error
        if excess:
            worst = slopes[max(excess, key=excess.__getitem__)]
            raise AssertionError(self.complaint(index, worst, len(excess), len(slopes), dy))
        return max((abs(slope.found - slope.expected) for slope in slopes), default=0.0)

    def complaint(self, index, worst, wrong, compared, dy):
        """What is wrong, and where."""
        name, direction = self.names[index], worst.direction
        if np.count_nonzero(direction) == 1:
            place = ", ".join(str(axis[0]) for axis in np.nonzero(np.atleast_1d(direction)))
            place = f"{name}[{place}]" if direction.ndim else name
            where = f"{wrong} of {compared} elements wrong, the worst {place}"
        else:
            where = "wrong along a direction of +1 and -1"
        values = f"expected {worst.expected:.9g}, found {worst.found:.9g}"
        text = f"gradient of {name}: {where}: {values}"
        forwards = self.rise(self.inputs, self.moved(index, direction), dy) / self.step
        backwards = self.rise(self.moved(index, -direction), self.inputs, dy) / self.step
        if abs(forwards - backwards) > 1e-2 * max(abs(forwards), abs(backwards), 1e-2):
            text += f" (is there a kink? the slope is {backwards:.4g} before, {forwards:.4g} after)"
        return text


def _elements(shape, most, random):
    """Directions along single elements: all of them, or as many drawn at random."""
    size = math.prod(shape)
    chosen = range(size) if size <= most else np.sort(random.choice(size, most, replace=False))
    for place in chosen:
        direction = np.zeros(shape)
        direction.flat[place] = 1
        yield direction


def _names(function, count):
    """What the inputs are called: the function's parameters, where it has as many."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        parameters = []
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [named[i] if i < len(named) else f"inputs[{i}]" for i in range(count)]


def _converted(value, name):
    """An input as it is passed: floats as float64, integers, booleans and None as they are."""
    if value is None:
        return None
    array = np.asarray(value)
    if array.dtype.kind in "biu":
        return array
    if array.dtype.kind != "f" and array.dtype.name not in _check.FLOAT_NAMES:
        raise TypeError(f"{name} must be an array of real numbers, got {array.dtype}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {array[~np.isfinite(array)].flat[0]}")
    return array


def _not_negative(value, name):
    number = _check.real(value, name)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    return number


def _count(value, name):
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
    if number < 0:
        raise ValueError(f"{name} must not be negative, got {number}")
    return number


def _kind(result):
    parts = result if isinstance(result, tuple) else (result,)
    names = ", ".join(type(part).__name__ for part in parts)
    return f"({names})" if isinstance(result, tuple) else names
