"""Lines of src/ that ran, of gcov's JSON on the standard input: a table by file.

A line counts as run if it ran in any instance of a template, and only lines of the sources count,
not those of the C++ that Cython writes.
"""

import json
import sys
from collections import defaultdict


def main():
    runs = defaultdict(lambda: defaultdict(int))
    for text in sys.stdin:
        if not text.startswith("{"):
            continue
        for file in json.loads(text)["files"]:
            if file["file"].startswith("src/") and file["file"].endswith((".h", ".pyx", ".pxd")):
                for line in file["lines"]:
                    runs[file["file"]][line["line_number"]] += line["count"]
    total = reached = 0
    for name, lines in sorted(runs.items()):
        missed = [number for number, count in sorted(lines.items()) if not count]
        total, reached = total + len(lines), reached + len(lines) - len(missed)
        print(f"{name:28} {100 * (1 - len(missed) / len(lines)):6.1f} %  missed: {missed}")
    print(f"{'kernels':28} {100 * reached / max(total, 1):6.1f} % of {total} lines")
    return 0 if total else "gcov has said nothing about src/"


if __name__ == "__main__":
    sys.exit(main())
