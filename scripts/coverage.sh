#!/bin/sh
# Measure what the tests reach: lines of the kernels by gcov, branches of the Python by coverage.
#
#   scripts/coverage.sh [PYTEST ARGUMENTS]
set -eu
cd "$(dirname "$0")/.."
tier=${TIER:-x86-64-v3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
scripts/build_copy.sh "$work" "$tier" "--coverage -fprofile-update=atomic"
cd "$work"
cat >coverage.ini <<'END'
[run]
branch = true
source_pkgs = bncore
omit = */bncore/bench/*, */bncore/demo/*
parallel = true
patch = subprocess
[paths]
source = bncore, */bncore
END
export COVERAGE_RCFILE="$work/coverage.ini"
python -m coverage run -m pytest -q "$@" || echo "some tests fail: see above"
python -m coverage combine --quiet
python -m coverage report --show-missing
find build -name "*.gcda" -path "*src*" | xargs gcov --stdout --relative-only --json-format \
  | python scripts/gcov_report.py
