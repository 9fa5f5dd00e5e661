"""The choice of kernels: what is offered, what is forced, what is said when there are none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import bncore
from bncore import _backend

COMPILED = [name for name in _backend.available() if name != "numpy"]


def run(code, *, cwd=None, blocked=(), **variables):
    """Run code in a fresh interpreter, in which the ``blocked`` modules can't be imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("BNCORE_", "PYTHON"))}
    block = f"import sys; sys.modules.update(dict.fromkeys({list(blocked)!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", block + code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd or Path(bncore.__file__).parent.parent,  # so that it is the one under test
        env=environment | variables,
    )


def test_active_backend_is_the_best_available():
    forced = os.environ.get("BNCORE_BACKEND")
    assert bncore.backend() == _backend.active.name == (forced or _backend.available()[0])


def test_numpy_is_always_available_and_last():
    assert _backend.available()[-1] == "numpy"
    numpy = _backend.load("numpy")
    assert numpy.statistics is numpy.normalization is numpy.gradient is bncore.reference


def test_every_backend_normalizes(backend):
    assert bncore.backend() == backend.name
    y, saved = bncore.batch_norm(np.array([[1.0], [3.0]]), eps=1e-10)
    np.testing.assert_allclose(y, [[-1.0], [1.0]], rtol=1e-9)
    assert saved.mean == 2.0


def test_use_restores_the_backend_after_an_error():
    before = _backend.active
    with pytest.raises(ZeroDivisionError), _backend.use("numpy"):
        assert bncore.backend() == "numpy"
        raise ZeroDivisionError
    assert _backend.active is before


@pytest.mark.parametrize("name", ["avx2", "", "NUMPY", None])
def test_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match="backend must be one of x86-64-v4"):
        _backend.load(name)


@pytest.mark.parametrize("level", ["x86-64", "x86-64-v2", "x86-64-v3", "generic"])
def test_cpu_below_a_tier_declines_it(monkeypatch, level):
    monkeypatch.setattr(_backend, "_runtime", SimpleNamespace(cpu_level=lambda: level))
    assert _backend.declines("x86-64-v4") == f"this CPU's level is {level}"
    with pytest.raises(ImportError, match=f"x86-64-v4 can't be used: this CPU's level is {level}"):
        _backend.load("x86-64-v4")


def test_tier_that_cannot_be_loaded_is_declined(monkeypatch):
    def broken(name):
        raise ImportError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(_backend, "_runtime", SimpleNamespace(cpu_level=lambda: "x86-64-v4"))
    monkeypatch.setattr(_backend, "is_built", lambda name: True)
    monkeypatch.setattr(_backend, "_import_tier", broken)
    assert "libgomp.so.1" in _backend.declines("x86-64-v3")


@pytest.mark.parametrize("name", _backend.available())
def test_forced_backend_is_taken(name):
    done = run("import bncore; print(bncore.backend())", BNCORE_BACKEND=name)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{name}\n", "")


@pytest.mark.parametrize("name", sorted(set(_backend.NAMES) - set(_backend.available())))
def test_forced_backend_that_is_not_there_raises(name):
    done = run("import bncore", BNCORE_BACKEND=name)
    assert done.returncode == 1
    assert f"ImportError: the backend {name} can't be used: " in done.stderr


def test_forced_backend_of_no_such_name_raises():
    done = run("import bncore", BNCORE_BACKEND="sse9")
    assert done.returncode == 1
    assert "ValueError: BNCORE_BACKEND must be one of x86-64-v4," in done.stderr
    assert "got 'sse9'" in done.stderr


def test_fallback_warns_and_works():
    code = (
        "import bncore, numpy as np\n"
        "y, _ = bncore.batch_norm(np.eye(2))\n"
        "bncore.set_num_threads(4)\n"
        "print(bncore.backend(), y.shape, bncore.get_num_threads())\n"
        "bncore.show_config()\n"
    )
    done = run(code, blocked=["bncore._runtime"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("numpy (2, 2) 1\n")
    assert "<string>:2: RuntimeWarning: bncore runs on NumPy alone" in done.stderr


@pytest.mark.skipif(not COMPILED, reason="no compiled backend")
def test_fallback_names_why_each_tier_declines(monkeypatch):
    monkeypatch.delenv("BNCORE_BACKEND", raising=False)
    monkeypatch.setattr(_backend, "declines", lambda n: None if n == "numpy" else "of old age")
    with pytest.warns(RuntimeWarning, match=f"{COMPILED[0]}: of old age"):
        assert _backend._choose().name == "numpy"


def test_fallback_that_is_meant_does_not_warn():
    done = run("import bncore", blocked=["bncore._runtime"], BNCORE_BACKEND="numpy")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not COMPILED, reason="no compiled backend")
def test_forced_backend_without_compiled_modules_raises():
    done = run("import bncore", blocked=["bncore._runtime"], BNCORE_BACKEND=COMPILED[0])
    assert done.returncode == 1
    assert f"ImportError: the backend {COMPILED[0]} can't be used: " in done.stderr


def test_source_tree_is_named_where_nothing_is_compiled(tmp_path):
    installed = Path(bncore.__file__).parent
    shutil.copytree(installed, tmp_path / "bncore", ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "runtime.pyx").touch()
    # An editable install would still find the compiled modules it knows of.
    forget = "sys.meta_path = [f for f in sys.meta_path if '__editable__' not in str(f)]\n"
    done = run(forget + "import bncore", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"bncore was imported from its source tree {tmp_path}" in done.stderr
    assert "pip install ." in done.stderr


@pytest.mark.parametrize("name", COMPILED)
def test_a_tier_loads_no_module_of_another(name):
    code = "import sys, bncore; print(*(m for m in sys.modules if '_kernels.' in m))"
    done = run(code, BNCORE_BACKEND=name)
    loaded = {module.split(".")[2] for module in done.stdout.split()}
    assert loaded == {name.replace("-", "_")}


@pytest.mark.parametrize("name", COMPILED)
def test_import_brings_numpy_alone(name):
    code = (
        "import numpy, sys; before = set(sys.modules); import bncore\n"
        "imported = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "print(*(imported - sys.stdlib_module_names - {'bncore', 'numpy'}))"
    )
    done = run(code, BNCORE_BACKEND=name)
    # Cython registers modules of its own for what its modules share.
    assert [m for m in done.stdout.split() if not m.lstrip("_").startswith("cython_")] == []


@pytest.mark.parametrize("name", COMPILED)
def test_import_leaves_subnormals_alone(name):
    code = "import bncore, numpy as np; print(np.array([1e-310]) * np.array([0.5]))"
    assert run(code, BNCORE_BACKEND=name).stdout == "[5.e-311]\n"


def test_show_config_as_a_dict(backend):
    config = bncore.show_config(mode="dicts")
    assert config["versions"]["bncore"] == bncore.__version__
    assert config["versions"]["numpy"] == np.__version__
    kernels = config["backend"]
    assert kernels["in use"] == backend.name
    assert kernels["usable"] == _backend.available()
    assert set(kernels["usable"]) <= set(kernels["built"])
    assert set(kernels["declined"]) | set(kernels["usable"]) == set(_backend.NAMES)
    assert config["threads"]["in use"] == bncore.get_num_threads()


def test_show_config_prints(capsys, backend):
    assert bncore.show_config() is None
    printed = capsys.readouterr().out
    for expected in (bncore.__version__, np.__version__, backend.name, "openmp", "threads"):
        assert expected in printed


def test_show_config_mode_is_checked():
    with pytest.raises(ValueError, match="mode must be 'stdout' or 'dicts', got 'yaml'"):
        bncore.show_config("yaml")
