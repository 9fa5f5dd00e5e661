"""The examples run as they stand, on every backend, and say what they are meant to show."""

import runpy
from pathlib import Path

import pytest
from threadpoolctl import threadpool_limits

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name):
    """Run an example as a script in this process."""
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "gradient_accumulation.py",
        "padded_sequences.py",
        "train_digits.py",
    }


def test_gradient_accumulation(backend, capsys):
    run("gradient_accumulation.py")  # which asserts that the pieces give what the whole gives
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["variance", "y", "dx", "dgamma", "dbeta"]
    alone = float(lines[5].split()[-1])
    assert alone > 0.1


def test_padded_sequences(backend, capsys):
    run("padded_sequences.py")  # which asserts that padded and packed sequences give the same
    out = capsys.readouterr().out
    assert "padded: 111 of 250 steps count" in out
    assert "packed: 111 rows" in out


def test_train_digits(capsys):
    pytest.importorskip("sklearn")
    with threadpool_limits(1, "blas"):  # small products: BLAS threads would only spin
        run("train_digits.py")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("epoch 10: test accuracy ")
    assert float(last.split()[-2]) > 95
