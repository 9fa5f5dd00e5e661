"""The README and docs/: blocks run and print what they say, lines are CI's, links lead somewhere.

A block of Python may be followed by a block of text, which is what it prints. The README's are
one session.
"""

import contextlib
import inspect
import io
import re
from pathlib import Path

import pytest

import bncore

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

SESSION = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", README, re.S | re.M)
SHELL = re.findall(r"^```sh\n(.*?)^```\n", README, re.S | re.M)

DEMO = 'python -m venv .venv && . .venv/bin/activate && pip install ".[demo]" && bncore demo'
TESTS = 'python -m venv .venv && . .venv/bin/activate && pip install ".[test]" && pytest'


def test_every_block_runs_and_prints_what_it_says(backend):
    assert len(SESSION) > 10
    session = {}
    for code, expected in SESSION:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), session)
        assert printed.getvalue() == expected, code


def test_no_block_is_left_out():
    fences = re.findall(r"^```(\w*)$", README, re.M)
    opened = [language for language in fences if language]
    assert opened.count("python") == len(SESSION)
    assert opened.count("text") == sum(bool(expected) for _, expected in SESSION)
    assert set(opened) == {"python", "text", "sh"}


def test_one_line_runs_the_demo_and_one_the_tests():
    assert SHELL[:2] == [DEMO + "\n", TESTS + "\n"]


def test_ci_runs_both_lines():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for last in ("bncore demo", "pytest"):
        [ending] = re.findall(rf'readme_line "({last})"', ci)
        assert sum(line.rstrip().endswith(f"&& {ending}") for line in SHELL) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [link.partition("#")[0] for link in links if "://" not in link]
    missing = [link for link in local if link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page):
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", page.read_text(encoding="utf-8"))
    if page.name == "README.md":
        assert named
    for file, name in named:
        [path] = ROOT.glob(f"tests/**/{file}")
        if name:
            assert re.search(rf"^\s*(def|class) {name}\b", path.read_text(encoding="utf-8"), re.M)


def signature(name):
    """A public name with its arguments as the reference page shows them."""
    arguments = inspect.signature(getattr(bncore, name))
    bare = arguments.replace(
        parameters=[p.replace(annotation=p.empty) for p in arguments.parameters.values()],
        return_annotation=arguments.empty,
    )
    return name + str(bare).replace("<class 'numpy.float32'>", "np.float32")


def test_the_reference_lists_everything_as_it_is():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = {}
    for heading in re.findall(r"^### (.*)$", page, re.M):
        for entry in re.findall(r"`([^`]+)`", heading):
            listed[entry.partition("(")[0]] = entry
    assert sorted(listed) == sorted(bncore.__all__)
    for name, entry in listed.items():
        assert entry == name or entry == signature(name)
    assert sum("(" in entry for entry in listed.values()) >= len(listed) - 5
