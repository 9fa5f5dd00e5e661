"""What the benchmark needs beyond NumPy, imported where it is used."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(name: str) -> ModuleType:
    """Import a module, or say what to install.

    Examples
    --------
    >>> from bncore.bench.extras import require
    >>> require("json").dumps([1])
    '[1]'
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f'bncore bench needs {package}: pip install "bncore[bench]"') from error
