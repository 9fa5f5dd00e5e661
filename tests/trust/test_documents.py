"""The tests that the documents name are there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
CODE = re.compile(r"`([\w/]*?)(test_\w+\.py)?(?:::)?([\w:]*)`")


@cache
def defined(path):
    """Names of a file's tests: functions, classes, and class::method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{part.name}" for part in node.body if hasattr(part, "name")}
    return names


def named_tests(text):
    """The (file, test) pairs that a text names; a test without a file is of the last one named."""
    for line in text.splitlines():
        file = None
        for _, new_file, test in CODE.findall(line):
            file = new_file or file
            if new_file or test.startswith("test_"):
                yield file, test


@pytest.mark.parametrize("document", ["README.md", "docs/testing.md"])
def test_every_test_named_exists(document):
    named = set(named_tests((ROOT / document).read_text()))
    assert len(named) > 10
    for file, test in named:
        [path] = TESTS.rglob(file)
        assert not test or test in defined(path), f"{document} names {file}::{test}"
