"""The command line: what it prints, what it imports, what it says where a package is missing."""

import importlib.util
import subprocess
import sys

import pytest

import bncore
from bncore import cli


def run(*arguments):
    """Run ``python -m bncore`` with the bncore under test."""
    code = f"import sys; sys.path[:] = {sys.path!r}; import runpy; " + (
        "runpy.run_module('bncore', run_name='__main__', alter_sys=True)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )


def test_version():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"bncore {bncore.__version__}\n")


def test_info_is_show_config(capsys):
    bncore.show_config()
    expected = capsys.readouterr().out
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out == expected
    assert bncore.backend() in expected


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_names_every_command(arguments):
    done = run(*arguments)
    assert done.returncode == 0
    for command in ("info", "demo", "bench"):
        assert f"\n    {command} " in done.stdout


@pytest.mark.parametrize("command", ["info", "demo", "bench"])
def test_every_command_has_help(command):
    done = run(command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: bncore {command} ")


def test_an_unknown_command_is_an_error():
    done = run("train")
    assert done.returncode == 2
    assert "invalid choice: 'train'" in done.stderr


def test_info_imports_only_numpy():
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from bncore import cli; cli.main(['info']); "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.splitlines()[-1].split())
    assert "numpy" in imported
    assert imported.isdisjoint({"matplotlib", "rich", "sklearn", "threadpoolctl", "tqdm", "torch"})


@pytest.mark.parametrize("missing", ["matplotlib", "rich", "sklearn", "threadpoolctl", "tqdm"])
def test_a_missing_package_is_named_with_its_extra(missing, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "bncore.demo.find_spec", lambda name: None if name == missing else find_spec(name)
    )
    present = [name for name in ("matplotlib", "rich", "sklearn", "threadpoolctl", "tqdm")
               if name != missing]  # fmt: skip
    if any(find_spec(name) is None for name in present):
        pytest.skip("more than one package of the demo is missing")
    assert cli.main(["demo", "--quick"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f'bncore: bncore demo needs {missing}: pip install "bncore[demo]"\n'


def test_other_import_errors_are_not_hidden(monkeypatch):
    def broken(name):
        raise ImportError("libbroken.so: cannot open shared object file")

    monkeypatch.setattr(cli, "import_module", broken)
    with pytest.raises(ImportError, match="libbroken"):
        cli.main(["demo"])


def test_an_interrupt_ends_a_command_as_in_a_shell(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(bncore, "show_config", interrupted)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr() == ("", "")
