#!/bin/sh
# Look for data races with ThreadSanitizer, clang, libomp and its Archer tool.
#
#   scripts/tsan.sh
#
# gcc's libgomp is not instrumented and would be reported for every barrier; Archer tells
# ThreadSanitizer what libomp's barriers order. Needs Debian's clang and libomp-dev. A planted race
# (the threads' tickets without atomics) shows first that races are seen.
# ThreadSanitizer's runtime is linked into a Python of its own: preloaded it does not start.
set -eu
cd "$(dirname "$0")/.."
tier=${TIER:-x86-64-v3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CC=clang CXX=clang++
flags="-fsanitize=thread -fno-omit-frame-pointer"
archer=$(find /usr/lib/llvm-*/lib -name "libarcher.so*" | head -n 1)
TSAN_OPTIONS="ignore_noninstrumented_modules=1 exitcode=66"
export TSAN_OPTIONS

config() { python -c "import sysconfig; print(sysconfig.get_$1)"; }
library=$(config "config_var('LIBDIR')") packages=$(config "path('platlib')")
home=$(python -c "import sys; print(sys.base_prefix)")
cat >"$work/main.c" <<'END'
#include <Python.h>
int main(int argc, char **argv) { return Py_BytesMain(argc, argv); }
END
clang -fsanitize=thread -rdynamic "-I$(config "path('include')")" "$work/main.c" \
  -o "$work/python" "-L$library" "-Wl,-rpath,$library" "-lpython$(config "config_var('LDVERSION')")"

check() {
  (cd "$1" && PYTHONHOME=$home PYTHONPATH=.:$packages \
    OMP_TOOL_LIBRARIES=$archer OMP_NUM_THREADS=4 OPENBLAS_NUM_THREADS=1 BNCORE_BACKEND=$tier \
    "$work/python" scripts/race_workload.py)
}

scripts/build_copy.sh "$work/clean" "$tier" "$flags"
PLANT_RACE=1 scripts/build_copy.sh "$work/planted" "$tier" "$flags"

if check "$work/planted" 2>"$work/planted.log"; then
  echo "the planted race was not reported"; exit 1
fi
grep -q "ThreadSanitizer: data race" "$work/planted.log"
check "$work/clean" && echo "no data race"
