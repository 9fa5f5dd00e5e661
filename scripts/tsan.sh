#!/bin/sh
# Look for data races with ThreadSanitizer, clang, libomp and its Archer tool.
#
#   scripts/tsan.sh
#
# gcc's libgomp is not instrumented and would be reported for every barrier; Archer tells
# ThreadSanitizer what libomp's barriers order. Needs Debian's clang and libomp-dev. A planted race
# (the threads' tickets without atomics) shows first that races are seen.
set -eu
cd "$(dirname "$0")/.."
tier=${TIER:-x86-64-v3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CC=clang CXX=clang++
flags="-fsanitize=thread -shared-libsan -fno-omit-frame-pointer"
runtime=$(clang -print-file-name=libclang_rt.tsan-x86_64.so)
archer=$(find /usr/lib/llvm-*/lib -name "libarcher.so*" | head -n 1)
LD_LIBRARY_PATH=$(dirname "$runtime")
export LD_LIBRARY_PATH

check() {
  (cd "$1" && PYTHONPATH=. LD_PRELOAD=$runtime OMP_TOOL_LIBRARIES=$archer OMP_NUM_THREADS=4 \
    BNCORE_BACKEND=$tier TSAN_OPTIONS="ignore_noninstrumented_modules=1 exitcode=66" \
    python scripts/race_workload.py)
}

scripts/build_copy.sh "$work/clean" "$tier" "$flags"
PLANT_RACE=1 scripts/build_copy.sh "$work/planted" "$tier" "$flags"

if check "$work/planted" 2>"$work/planted.log"; then
  echo "the planted race was not reported"; exit 1
fi
grep -q "ThreadSanitizer: data race" "$work/planted.log"
check "$work/clean" && echo "no data race"
