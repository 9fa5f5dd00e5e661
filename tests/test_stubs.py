"""The stubs of the compiled modules: the same functions with the same arguments."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import bncore
from bncore import _backend, reference

PACKAGE = Path(bncore.__file__).parent
COMPILED = [name for name in _backend.available() if name != "numpy"]


def functions(body):
    """Names of a stub's functions and of their arguments."""
    return {
        node.name: [a.arg for a in node.args.posonlyargs + node.args.args if a.arg != "self"]
        for node in body
        if isinstance(node, ast.FunctionDef)
    }


def arguments(function):
    return list(inspect.signature(function).parameters)


def tree(stub):
    return ast.parse((PACKAGE / stub).read_text(encoding="utf-8")).body


PROTOCOLS = {
    node.name.lower(): functions(node.body)
    for node in tree("_kernels/_interface.pyi")
    if isinstance(node, ast.ClassDef)
}


@pytest.mark.parametrize("tier", COMPILED)
@pytest.mark.parametrize("module", PROTOCOLS)
def test_kernels(tier, module):
    compiled = importlib.import_module(f"bncore._kernels.{tier.replace('-', '_')}.{module}")
    public = {
        name: arguments(function)
        for name, function in vars(compiled).items()
        if callable(function) and not name.startswith("_")
    }
    assert public == PROTOCOLS[module]


@pytest.mark.parametrize("module", ["statistics", "normalization", "gradient"])
def test_reference(module):
    for name, expected in PROTOCOLS[module].items():
        function = getattr(reference, name)
        assert arguments(function) == (["arguments"] if name.endswith("_plain") else expected)


@pytest.mark.skipif(not COMPILED, reason="no compiled backend")
def test_runtime():
    from bncore import _runtime

    for name, expected in functions(tree("_runtime.pyi")).items():
        assert arguments(getattr(_runtime, name)) == expected
