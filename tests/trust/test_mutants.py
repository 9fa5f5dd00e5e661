"""The wrong programs of scripts/mutants.py are those of the sources as they are."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIST = ROOT / "scripts" / "mutants.toml"
if not LIST.exists():
    pytest.skip("the scripts are not in a source distribution", allow_module_level=True)
MUTANTS = tomllib.loads(LIST.read_text())["mutant"]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["name"])
def test_a_mutant_s_text_stands_once_in_the_sources(mutant):
    files = [path for path in ROOT.glob(mutant["files"]) if path.is_file()]
    found = [path.name for path in files for _ in range(path.read_text().count(mutant["old"]))]
    assert len(found) == 1, found
    assert (ROOT / mutant["first"]).exists()
    assert mutant["new"] != mutant["old"]


def test_there_are_enough_and_none_twice():
    names = [mutant["name"] for mutant in MUTANTS]
    assert len(names) == len(set(names)) >= 40
