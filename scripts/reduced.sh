#!/bin/sh
# The long runs at a reduced count, some ten minutes on two cores: that each of them still works,
# and a sample of what it looks for. Continuous integration runs it.
#
#   scripts/reduced.sh
#
# Needs what builds and tests bncore, and installs Debian's valgrind, clang and libomp-dev where it
# may; a checker that is not to be had is left out, which is said.
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tier=$(cd "$work" && python -c "from bncore import _backend; print(_backend.available()[0])")

run() {
  echo "--- $*"
  "$@"
}

# The packages, installed where they may be; says so where they are not to be had.
have() {
  dpkg -s "$@" >/dev/null 2>&1 && return
  { apt-get update -qq && apt-get install -y -qq "$@"; } >"$work/apt.log" 2>&1 && return
  echo "NOTE: no $* here: a check is left out"
  return 1
}

shared_python() {
  python -c 'import sys, sysconfig; sys.exit(not sysconfig.get_config_var("Py_ENABLE_SHARED"))' &&
    return
  echo "NOTE: no libpython to link with here: no look for races"
  return 1
}

scripts/build_copy.sh "$work/copy" "$tier"
(cd "$work/copy" && run python scripts/fuzz.py --minutes 1)
rm -r "$work/copy"
run python scripts/mutants.py --tier "$tier" --jobs 2 --sample 6
TIER=$tier run scripts/sanitize.sh tests/test_layouts.py tests/trust/test_exact.py \
  tests/trust/test_fuzz.py tests/trust/test_alias.py \
  tests/test_large.py::test_places_and_overwriting_change_no_bit
if have valgrind; then run scripts/valgrind.sh; fi
if shared_python && have clang libomp-dev; then run scripts/tsan.sh; fi
