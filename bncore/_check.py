"""Argument checks: each returns the argument in canonical form or raises, naming it.

Nothing here writes to an argument, so an error leaves everything as it was.
"""

from __future__ import annotations

import math
import operator
from functools import lru_cache

import numpy as np

FLOAT_NAMES = ("float16", "bfloat16", "float32", "float64")

_NUMPY_FLOATS = "efd"
"""The codes of those that NumPy has itself: a dtype puts its name together at each question."""


@lru_cache(maxsize=64)
def name_of(dtype: np.dtype) -> str:
    """A dtype's name, which NumPy takes microseconds to make up each time."""
    return dtype.name


def converted(value, name: str, what: str, dtype=None) -> np.ndarray:
    """An ndarray, or an error that names the argument, also where it is another library's."""
    try:
        return np.asarray(value, dtype)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: another library's array
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} must be {what}: {error}") from None


def float_array(value, name: str) -> np.ndarray:
    """A floating-point ndarray; lists are converted, masked and object arrays are refused."""
    if isinstance(value, np.ma.MaskedArray):
        instead = "; pass mask= instead" if name == "x" else ""
        raise TypeError(f"{name} must be a plain array, got a masked array{instead}")
    array = converted(value, name, "an array of floats")
    if array.dtype.char not in _NUMPY_FLOATS and name_of(array.dtype) not in FLOAT_NAMES:
        raise TypeError(f"{name} must have dtype {_list(FLOAT_NAMES)}, got {array.dtype}")
    return array


def input_array(value, name: str = "x") -> np.ndarray:
    """A floating-point array of at least one dimension."""
    array = float_array(value, name)
    if array.ndim == 0:
        raise ValueError(f"{name} must have at least 1 dimension, got a scalar")
    return array


def channel_axes(axis, ndim: int) -> tuple[int, ...]:
    """The channel axes, sorted and non-negative."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    if not axes:
        raise ValueError("axis must name at least one channel axis, got ()")
    normalized = set()
    for one in axes:
        try:
            index = operator.index(one)
        except TypeError:
            raise TypeError(f"axis must be an int or a tuple of ints, got {axis!r}") from None
        if not -ndim <= index < ndim:
            raise ValueError(
                f"axis {index} is out of range for x with {ndim} dimension{'s' * (ndim != 1)}"
            )
        normalized.add(index % ndim)
    if len(normalized) != len(axes):
        raise ValueError(f"axis must not name a channel axis twice, got {axis!r}")
    return tuple(sorted(normalized))


def per_channel(value, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """A float array with one value per channel, or None."""
    if value is None:
        return None
    array = float_array(value, name)
    if array.shape != shape:
        raise ValueError(f"{name} must have the channels' shape {shape}, got {array.shape}")
    return array


def same_shape(value, name: str, like: np.ndarray) -> np.ndarray:
    """A float array with the shape and dtype of ``like``."""
    array = float_array(value, name)
    if array.shape != like.shape:
        raise ValueError(f"{name} must have x's shape {like.shape}, got {array.shape}")
    if array.dtype != like.dtype and name_of(array.dtype) != name_of(like.dtype):
        raise TypeError(f"{name} must have x's dtype {like.dtype.name}, got {array.dtype.name}")
    return array


def positive(value, name: str) -> float:
    """A finite real number above zero."""
    number = real(value, name)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return number


def real(value, name: str) -> float:
    """A real number."""
    if isinstance(value, (str, bytes, bool, np.bool_)):
        raise TypeError(f"{name} must be a real number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a real number, got {value!r}") from None
    except OverflowError:
        raise ValueError(f"{name} must be a number that float64 holds, got {value!r}") from None


def activation(value) -> tuple[int, float, float]:
    """An activation as the kernels take it: ``(code, a, b)``, see `bncore.reference`."""
    if value is None:
        return (0, 0.0, 0.0)
    name, *arguments = value if isinstance(value, tuple) and value else (value,)
    name = name if isinstance(name, str) else None
    if name == "relu" and not arguments:
        return (1, 0.0, math.inf)
    if name == "leaky_relu" and len(arguments) == 1:
        slope = real(arguments[0], "leaky_relu's slope")
        if math.isfinite(slope):
            return (2, slope, 0.0)
    if name == "clip" and len(arguments) == 2:
        low, high = (real(argument, "clip's limits") for argument in arguments)
        if low <= high:
            return (1, low, high)
    raise ValueError(
        "activation must be None, 'relu', ('leaky_relu', slope) with a finite slope or "
        f"('clip', low, high) with low <= high, got {value!r}"
    )


def positions(value, name: str, x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """An array over the non-channel positions, broadcast to x's rank with channel axes of 1."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a plain array, got a masked array")
    shape = tuple([1 if axis in axes else size for axis, size in enumerate(x.shape)])
    array = converted(value, name, "an array")
    if array.shape == shape:
        return array
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"{name} must broadcast to {shape}, x's shape with 1 for channels, got {array.shape}"
        ) from None


def mask(value, x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray | None:
    """Booleans over the positions, True where x counts, or None."""
    if value is None:
        return None
    array = positions(value, "mask", x, axes)
    if array.dtype != bool:
        raise TypeError(f"mask must have dtype bool, got {array.dtype}")
    return array


def sample_weight(
    value, x: np.ndarray, axes: tuple[int, ...], valid: np.ndarray | None = None
) -> np.ndarray | None:
    """Weights over the positions as float64, none negative, or None.

    Where a checked mask ``valid`` is False they are not looked at, and 0. They may be the caller's
    own array, or broadcast, and so are not to be written to.
    """
    if value is None:
        return None
    array = positions(value, "sample_weight", x, axes)
    if name_of(array.dtype) not in FLOAT_NAMES and array.dtype.kind not in "biu":
        raise TypeError(f"sample_weight must be an array of real numbers, got {array.dtype}")
    given = array
    if 0 in array.strides:  # broadcast
        given = array[tuple([slice(None if stride else 1) for stride in array.strides])]
    weights = given.astype(np.float64, copy=False)
    if valid is not None:
        weights = np.where(valid, weights, 0.0)
    # Sums of weights, and of them times squares, stay far within float64's range.
    if weights.size and not 2.0**-300 <= weights.min() <= weights.max() <= 2.0**300:
        wrong = ~((weights == 0) | ((weights >= 2.0**-300) & (weights <= 2.0**300)))
        if wrong.any():
            raise ValueError(
                f"sample_weight must be 0 or between 2^-300 and 2^300, got {weights[wrong][0]}"
            )
    return weights if weights.shape == array.shape else np.broadcast_to(weights, array.shape)


def wanted(wrt, known: tuple[str, ...], default: tuple[str, ...], out) -> tuple[str, ...]:
    """The names of what is differentiated with respect to."""
    names = default if wrt is None else (wrt,) if isinstance(wrt, str) else wrt
    try:
        names = tuple(names)
    except TypeError:
        raise TypeError(f"wrt must be a name or several, got {wrt!r}") from None
    if not names or not all(isinstance(name, str) and name in known for name in names):
        raise ValueError(f"wrt must be of {', '.join(map(repr, known))}, got {wrt!r}")
    if out is not None and "x" not in names:
        raise ValueError(f"out takes dx, which wrt does not ask for, got wrt={wrt!r}")
    return names


def state(array, name: str, shape: tuple[int, ...]) -> None:
    """Check that an array of a layer's can be written to: it may have been replaced."""
    if type(array) is not np.ndarray:
        raise TypeError(f"{name} must be an ndarray, got {type(array).__name__}")
    if array.dtype.kind != "f" and name_of(array.dtype) not in FLOAT_NAMES:
        raise TypeError(f"{name} must have dtype {_list(FLOAT_NAMES)}, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have the channels' shape {shape}, got {array.shape}")
    if not array.flags.writeable:
        raise ValueError(f"{name} must be writeable, got a read-only array")


def output(out, like: np.ndarray, in_place: dict, read: dict, name: str = "out"):
    """Check an output array.

    Parameters
    ----------
    out : ndarray or None
    like : ndarray
        Shape and dtype that ``out`` must have.
    in_place : dict of str to ndarray or None
        Inputs that ``out`` may coincide with entirely, but not overlap in part.
    read : dict of str to ndarray or None
        Inputs that ``out`` must not share memory with.
    """
    if out is None:
        return None
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"{name} must be an ndarray, got {type(out).__name__}")
    if out.shape != like.shape:
        raise ValueError(f"{name} must have shape {like.shape}, got {out.shape}")
    if out.dtype != like.dtype.newbyteorder("="):
        raise TypeError(f"{name} must have dtype {like.dtype.newbyteorder('=')}, got {out.dtype}")
    if not out.flags.writeable:
        raise ValueError(f"{name} must be writeable, got a read-only array")
    if overlaps_itself(out):
        raise ValueError(f"{name} must not overlap itself, got strides {out.strides}")
    for other, array in in_place.items():
        if array is not None and np.may_share_memory(out, array) and not coincide(out, array):
            if np.shares_memory(out, array):
                raise ValueError(f"{name} overlaps {other} in part: pass {other} itself or apart")
    for other, array in read.items():
        apart(out, array, other, name)
    return out


def apart(out, array, other: str, name: str = "out") -> None:
    """Check that an output shares no memory with another array; None shares none."""
    if out is None or array is None:
        return
    if np.may_share_memory(out, array) and np.shares_memory(out, array):
        raise ValueError(f"{name} must not share memory with {other}")


def coincide(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of one shape are the same elements at the same places."""
    return a is b or (
        np.may_share_memory(a, b)
        and a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
        and a.shape == b.shape
        and a.dtype == b.dtype
        and all(s == t for s, t, n in zip(a.strides, b.strides, a.shape, strict=True) if n > 1)
    )


def overlaps_itself(array: np.ndarray) -> bool:
    """Whether two elements of an array share memory, as in a broadcast one."""
    if array.size < 2 or array.flags.c_contiguous:
        return False
    walked = sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1)
    reach = array.itemsize
    for stride, length in walked:
        if stride < reach:
            return True
        reach = stride * (length - 1) + reach
    return False


def _list(names) -> str:
    return ", ".join(names[:-1]) + " or " + names[-1]
