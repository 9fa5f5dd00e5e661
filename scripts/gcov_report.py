"""Lines of src/ that ran, of gcov's JSON on the standard input: a table by file.

A line counts as run if it ran in any instance of a template, and only lines of the sources count,
not those of the C++ that Cython writes: its own functions do not bear this package's name.
"""

import json
import re
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

SOURCE = re.compile(r"(?:^|/)(src/\w+\.(?:h|pyx|pxd))$")
"""Cython copies headers to where it builds."""


@cache
def length(name):
    return len(Path(name).read_text().splitlines())


def is_ours(line, name):
    """Whether a line is one of the sources', not of what Cython adds under the same name."""
    ours = "bncore" in line.get("function_name", "bncore") or name.endswith(".h")
    return ours and line["line_number"] <= length(name)


def main():
    runs = defaultdict(lambda: defaultdict(int))
    for text in sys.stdin:
        if not text.startswith("{"):
            continue
        for file in json.loads(text)["files"]:
            source = SOURCE.search(file["file"])
            for line in file["lines"] if source else ():
                if is_ours(line, source[1]):
                    runs[source[1]][line["line_number"]] += line["count"]
    total = reached = 0
    for name, lines in sorted(runs.items()):
        missed = [number for number, count in sorted(lines.items()) if not count]
        total, reached = total + len(lines), reached + len(lines) - len(missed)
        print(f"{name:28} {100 * (1 - len(missed) / len(lines)):6.1f} %  missed: {missed}")
    print(f"{'kernels':28} {100 * reached / max(total, 1):6.1f} % of {total} lines")
    return 0 if total else "gcov has said nothing about src/"


if __name__ == "__main__":
    sys.exit(main())
