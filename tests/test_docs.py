"""Every example in a docstring runs, and everything public has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import bncore

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(bncore.__path__, "bncore.")
    if "._" not in name.replace("bncore._", "bncore.", 1) and not name.endswith("__main__")
]
EXPORTED = [name for name in bncore.__all__ if not inspect.ismodule(getattr(bncore, name))]


@pytest.mark.parametrize("name", ["bncore", *MODULES])
def test_examples_run(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        assert not (error.name or "").startswith("bncore"), error  # of ours nothing may be missing
        pytest.skip(f"needs an extra: {error}")
    failed, _ = doctest.testmod(module)
    assert failed == 0


@pytest.mark.parametrize("name", EXPORTED)
def test_everything_public_is_documented(name):
    documented = inspect.getdoc(getattr(bncore, name))
    assert documented and documented.splitlines()[0].endswith(".")


@pytest.mark.parametrize(
    "name", [name for name in EXPORTED if inspect.isfunction(getattr(bncore, name))]
)
def test_every_function_has_an_example(name):
    function = getattr(bncore, name)
    examples = doctest.DocTestFinder(recurse=False).find(function, name)
    assert any(test.examples for test in examples)


@pytest.mark.parametrize(
    "name", [name for name in EXPORTED if inspect.isfunction(getattr(bncore, name))]
)
def test_every_parameter_is_described(name):
    function = getattr(bncore, name)
    documented = inspect.getdoc(function)
    for parameter in inspect.signature(function).parameters:
        assert parameter in documented.split("Parameters\n----------", 1)[-1]
