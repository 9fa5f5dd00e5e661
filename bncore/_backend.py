"""The kernels to choose from, best first, and the choice.

Each candidate says why it declines; the first that does not is taken at import. ``BNCORE_BACKEND``
forces one by name, and raises where that one declines. `active` is what `bncore.functional` calls:
it reads the attribute on every call, so that tests can switch it with `use`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bncore import reference

if TYPE_CHECKING:
    from bncore._kernels._interface import Gradient, Normalization, Statistics

try:
    from bncore import _runtime
except ImportError as error:
    _runtime = None  # type: ignore[assignment]
    _runtime_error = error

NAMES = ("x86-64-v4", "x86-64-v3", "x86-64-v2", "generic", "numpy")
"""All backends there can be, in the order of preference."""

_X86_LEVELS = ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4")
_MODULES = ("statistics", "normalization", "gradient")


class Backend(NamedTuple):
    """The kernels of one tier, or their reference in NumPy: modules with the same functions.

    Attributes
    ----------
    name : str
        One of `NAMES`.
    statistics, normalization, gradient : module
    """

    name: str
    statistics: Statistics
    normalization: Normalization
    gradient: Gradient


def declines(name: str) -> str | None:
    """Why a backend can't be used here, or None if it can.

    Parameters
    ----------
    name : str
        One of `NAMES`.

    Examples
    --------
    >>> from bncore import _backend
    >>> _backend.declines("numpy") is None
    True
    """
    if name == "numpy":
        return None
    if _runtime is None:
        return _why_no_runtime()
    if name in _X86_LEVELS:
        level = _runtime.cpu_level()
        if level not in _X86_LEVELS or _X86_LEVELS.index(level) < _X86_LEVELS.index(name):
            return f"this CPU's level is {level}"
    if not is_built(name):
        return "it is not part of this build"
    try:
        _import_tier(name)
    except ImportError as error:
        return f"its modules can't be loaded: {error}"
    return None


def is_built(name: str) -> bool:
    """Whether this installation contains a backend's modules, whatever the CPU can run."""
    if name == "numpy":
        return True
    package = _package(name)
    return all(_exists(f"{package}.{module}") for module in _MODULES)


def available() -> list[str]:
    """Names of the backends that can be used here, best first.

    Examples
    --------
    >>> from bncore import _backend
    >>> _backend.available()[-1]
    'numpy'
    """
    return [name for name in NAMES if declines(name) is None]


def load(name: str) -> Backend:
    """A backend by name.

    Parameters
    ----------
    name : str
        One of `NAMES`.

    Raises
    ------
    ValueError
        For a name that is none.
    ImportError
        Where the backend can't be used; the message says why.

    Examples
    --------
    >>> from bncore import _backend
    >>> _backend.load("numpy").name
    'numpy'
    """
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    reason = declines(name)
    if reason is not None:
        raise ImportError(f"the backend {name} can't be used: {reason}")
    if name == "numpy":
        return Backend(name, reference, reference, reference)
    return Backend(name, *_import_tier(name))


@contextmanager
def use(name: str) -> Iterator[Backend]:
    """Make a backend the active one for a while, in all threads: for tests and comparisons.

    Parameters
    ----------
    name : str
        One of `NAMES`.

    Examples
    --------
    >>> import bncore
    >>> from bncore import _backend
    >>> with _backend.use("numpy"):
    ...     bncore.backend()
    'numpy'
    """
    global active
    before = active
    active = load(name)
    try:
        yield active
    finally:
        active = before


def _choose() -> Backend:
    """The backend that BNCORE_BACKEND names, else the first that doesn't decline."""
    forced = os.environ.get("BNCORE_BACKEND")
    if forced:
        if forced not in NAMES:
            raise ValueError(f"BNCORE_BACKEND must be one of {', '.join(NAMES)}, got {forced!r}")
        return load(forced)
    reasons: dict[str, str | None] = {}
    name = next(name for name in NAMES if reasons.setdefault(name, declines(name)) is None)
    if name == "numpy":
        # Up to the line that says `import bncore`: here, this module, _config, bncore, that line.
        warnings.warn(_fallback_message(reasons), RuntimeWarning, stacklevel=5)
    return load(name)


def _fallback_message(reasons: dict[str, str | None]) -> str:
    if _runtime is None:
        why = _why_no_runtime()
    else:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    return (
        f"bncore runs on NumPy alone, which is slow, for lack of compiled kernels ({why}). "
        "BNCORE_BACKEND=numpy says that this is meant."
    )


def _why_no_runtime() -> str:
    package = Path(__file__).parent
    is_source = (package.parent / "src" / "runtime.pyx").exists()
    if is_source and not any(package.glob("_runtime.*.so")):
        return (
            f"bncore was imported from its source tree {package.parent}, where nothing is "
            "compiled; `pip install .` and run from another directory, or use the `bncore` command"
        )
    return f"the compiled modules can't be loaded: {_runtime_error}"


def _package(name: str) -> str:
    return "bncore._kernels." + name.replace("-", "_")


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _import_tier(name: str) -> list[Any]:
    return [importlib.import_module(f"{_package(name)}.{module}") for module in _MODULES]


active: Backend = _choose()
