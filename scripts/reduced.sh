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

have() {
  command -v "$1" >/dev/null && return
  { apt-get update -qq && apt-get install -y -qq $2; } >"$work/apt.log" 2>&1 && return
  echo "NOTE: no $1 here: its check is left out"
  return 1
}

scripts/build_copy.sh "$work/copy" "$tier"
(cd "$work/copy" && run python scripts/fuzz.py --minutes 1)
rm -r "$work/copy"
run python scripts/mutants.py --tier "$tier" --jobs 2 --sample 6
TIER=$tier run scripts/sanitize.sh tests/test_layouts.py tests/trust/test_exact.py \
  tests/trust/test_fuzz.py tests/trust/test_alias.py
if have valgrind valgrind; then run scripts/valgrind.sh; fi
if have clang "clang libomp-dev"; then run scripts/tsan.sh; fi
