"""What runs and on how many threads: the backend in use, the thread count, the configuration."""

from __future__ import annotations

import operator
import platform

import numpy as np

from bncore import _backend

try:
    from bncore import _runtime
    from bncore._runtime import get_num_threads
except ImportError:
    _runtime = None  # type: ignore[assignment]

    def get_num_threads() -> int:
        """Number of threads that the next call may use: 1, as there are no compiled kernels.

        Examples
        --------
        >>> import bncore
        >>> bncore.get_num_threads() >= 1
        True
        """
        return 1


def backend() -> str:
    """Name of the backend in use.

    Returns
    -------
    str
        "x86-64-v4", "x86-64-v3", "x86-64-v2", "generic" or "numpy".

    Examples
    --------
    >>> import bncore
    >>> bncore.backend() in ("x86-64-v4", "x86-64-v3", "x86-64-v2", "generic", "numpy")
    True
    """
    return _backend.active.name


def set_num_threads(n: int) -> None:
    """Set the number of threads that the compiled kernels use, in the whole process.

    A number above what the process can have is no error, and `get_num_threads` tells what it came
    to. The results do not depend on it, to the last bit.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    TypeError
        If ``n`` is not an integer.
    ValueError
        If ``n`` is less than 1.

    Examples
    --------
    >>> import bncore
    >>> bncore.set_num_threads(1)
    >>> bncore.get_num_threads()
    1
    """
    if isinstance(n, (bool, np.bool_)):
        raise TypeError(f"n must be an integer, got {n!r}")
    try:
        threads = operator.index(n)
    except TypeError:
        raise TypeError(f"n must be an integer, got {n!r}") from None
    if threads < 1:
        raise ValueError(f"n must be at least 1, got {threads}")
    if _runtime is not None:
        _runtime.set_num_threads(min(threads, _MOST_THREADS))


_MOST_THREADS = 2**31 - 1
"""What a C int holds: more than anybody has."""


def show_config(mode: str = "stdout") -> dict | None:
    """Show versions, instruction-set tiers, OpenMP and threads.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Print, or return a dict, as `numpy.show_config` does.

    Returns
    -------
    dict or None
        None where it printed.

    Raises
    ------
    ValueError
        For another mode.

    Examples
    --------
    >>> import bncore
    >>> sorted(bncore.show_config(mode="dicts"))
    ['backend', 'openmp', 'threads', 'versions']
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode must be 'stdout' or 'dicts', got {mode!r}")
    config = _configuration()
    if mode == "dicts":
        return config
    print(_formatted(config))
    return None


def _configuration() -> dict:
    from bncore import __version__

    built = [name for name in _backend.NAMES if _backend.is_built(name)]
    reasons = {name: _backend.declines(name) for name in _backend.NAMES}
    return {
        "versions": {
            "bncore": __version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "backend": {
            "in use": backend(),
            "cpu level": _runtime.cpu_level() if _runtime else None,
            "built": built,
            "usable": [name for name in built if reasons[name] is None],
            "declined": {name: reason for name, reason in reasons.items() if reason},
        },
        "openmp": _runtime.openmp() if _runtime else None,
        "threads": {
            "in use": get_num_threads(),
            "cpus": _runtime.effective_cpus() if _runtime else None,
        },
    }


def _formatted(config: dict) -> str:
    versions, kernels, threads = config["versions"], config["backend"], config["threads"]
    openmp = config["openmp"]
    rows = [
        *versions.items(),
        ("backend", kernels["in use"]),
        ("  built", ", ".join(kernels["built"])),
        ("  usable", ", ".join(kernels["usable"])),
        ("  cpu level", kernels["cpu level"] or "unknown"),
        ("openmp", f"{openmp['date']}, {openmp['library']}" if openmp else "none: one thread"),
        ("threads", f"{threads['in use']} of {threads['cpus'] or 'unknown'} usable CPUs"),
    ]
    return "\n".join(f"{label:<12}{value}" for label, value in rows)
