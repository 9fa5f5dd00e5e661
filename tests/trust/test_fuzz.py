"""Random calls of every function: results or a documented error, never a crash.

Whatever once went wrong is in ``fuzz_corpus.json`` and is tried first. The long run is
``scripts/fuzz.py``.
"""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trust_fuzz import check

pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

CORPUS = json.loads((Path(__file__).parent / "fuzz_corpus.json").read_text())


@pytest.mark.parametrize("numbers", CORPUS, ids=lambda numbers: "-".join(map(str, numbers[:6])))
def test_corpus(numbers):
    check(numbers)


@given(st.lists(st.integers(0, 2**16), max_size=40))
def test_random_calls(numbers):
    check(numbers)
