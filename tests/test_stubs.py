"""The stubs: the same functions with the same arguments as the modules, and of use to a caller."""

import ast
import importlib
import inspect
import sys
from pathlib import Path

import numpy as np
import pytest

import bncore
from bncore import _backend, reference

PACKAGE = Path(bncore.__file__).parent
COMPILED = [name for name in _backend.available() if name != "numpy"]


def tree(stub):
    return ast.parse((PACKAGE / stub).read_text(encoding="utf-8")).body


def functions(body):
    """A stub's functions by name."""
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def classes(body):
    """The functions of a stub's classes, by the name of the class."""
    return {node.name: functions(node.body) for node in body if isinstance(node, ast.ClassDef)}


def declared(node):
    """Names of a function's arguments in a stub, without self."""
    arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    return [a.arg for a in arguments if a.arg != "self"]


def accepted(function):
    """Names of a function's arguments, without self."""
    return [name for name in inspect.signature(function).parameters if name != "self"]


def defaults(node):
    """What a stub says arguments are where they are not given, as source."""
    return [ast.unparse(d) for d in (*node.args.defaults, *node.args.kw_defaults) if d]


PROTOCOLS = {
    name.lower(): methods for name, methods in classes(tree("_kernels/_interface.pyi")).items()
}


@pytest.mark.parametrize("tier", COMPILED)
@pytest.mark.parametrize("module", PROTOCOLS)
def test_kernels(tier, module):
    compiled = importlib.import_module(f"bncore._kernels.{tier.replace('-', '_')}.{module}")
    public = {
        name: accepted(function)
        for name, function in vars(compiled).items()
        if callable(function) and not name.startswith("_")
    }
    assert public == {name: declared(node) for name, node in PROTOCOLS[module].items()}


@pytest.mark.parametrize("module", ["statistics", "normalization", "gradient"])
def test_reference(module):
    for name, node in PROTOCOLS[module].items():
        expected = ["arguments"] if name.endswith("_plain") else declared(node)
        assert accepted(getattr(reference, name)) == expected


@pytest.mark.skipif(not COMPILED, reason="no compiled backend")
def test_runtime():
    from bncore import _runtime

    for name, node in functions(tree("_runtime.pyi")).items():
        assert accepted(getattr(_runtime, name)) == declared(node)


def pairs(module, body):
    """Each function of a module and its classes, beside the stub's."""
    found = [(getattr(module, name), node) for name, node in functions(body).items()]
    for name, methods in classes(body).items():
        found += [(getattr(getattr(module, name), key), node) for key, node in methods.items()]
    return found


@pytest.mark.parametrize(
    "name", ["derivatives", "functional", "inplace", "layers", "moments", "state", "testing"]
)
def test_public_modules(name):
    module = importlib.import_module(f"bncore.{name}")
    for function, node in pairs(module, tree(f"{name}.pyi")):
        if isinstance(function, property):
            assert [decorator.id for decorator in node.decorator_list] == ["property"]
            continue
        parameters = inspect.signature(function).parameters.values()
        given = [p.default for p in parameters if p.default is not p.empty]
        assert accepted(function) == declared(node)
        assert [eval(text, {"np": np}) for text in defaults(node)] == given


def test_public_names_are_typed():
    typed = {
        node.name
        for stub in (
            "derivatives.pyi",
            "functional.pyi",
            "inplace.pyi",
            "layers.pyi",
            "moments.pyi",
        )
        for node in tree(stub)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    annotated = {"backend", "get_num_threads", "set_num_threads", "show_config"}
    assert typed | annotated | {"presets"} == set(bncore.__all__)
    for name in annotated - {"get_num_threads"}:
        assert "return" in getattr(bncore, name).__annotations__


RIGHT = """
import bncore
import numpy as np

x = np.ones((4, 3), np.float32)
y, saved = bncore.batch_norm(x, activation=("clip", 0.0, 6.0), mask=np.ones((4, 1), bool))
g = bncore.batch_norm_backward(y, saved, out=y)
g.dx.sum(), saved.mean.sum()
m = bncore.moments(x, axis=(1,)) + bncore.Moments()
r = bncore.backward_reduce(y, x, m.mean, 1 / np.sqrt(m.var() + 1e-5))
bncore.backward_apply(y, x, m.mean, m.mean, None, *r, m.count).sum()
layer = bncore.BatchNorm1d(3, momentum=None).eval()
layer.gamma -= 0.1 * layer.backward(layer(x)).sum(axis=0)
layer.load_state_dict(layer.state_dict())
bncore.set_num_threads(bncore.get_num_threads())
"""
WRONG = """
bncore.batch_norm(x, activation="gelu")
bncore.batch_norm_backward(x, x)
bncore.BatchNorm("3")
bncore.set_num_threads("2")
bncore.moments(x).variance
"""


@pytest.mark.slow
def test_a_type_checker_tells_right_from_wrong(tmp_path, monkeypatch, pytestconfig):
    api = pytest.importorskip("mypy.api")
    cache = pytestconfig.cache.mkdir("mypy")  # of numpy's stubs, most of the time
    program = tmp_path / "program.py"
    program.write_text(RIGHT + WRONG, encoding="utf-8")
    monkeypatch.setenv("MYPYPATH", str(PACKAGE.parent) if (PACKAGE.parent / "src").exists() else "")
    out, err, _ = api.run(
        ["--strict", "--follow-imports=silent", f"--cache-dir={cache}", "--config-file=",
         f"--python-executable={sys.executable}", str(program)]
    )  # fmt: skip
    assert err == ""
    found = [int(line.split(":")[1]) for line in out.splitlines() if ": error: " in line]
    first = RIGHT.count("\n") + 2
    assert found == list(range(first, first + 5)), out
