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
CC=clang CXX=clang++ LDSHARED="clang -shared" LDCXXSHARED="clang++ -shared"
export CC CXX LDSHARED LDCXXSHARED
flags="-fsanitize=thread -fno-omit-frame-pointer"
# -lomp comes after clang's own -fopenmp and is the same library.
linker="-fsanitize=thread -shared-libsan"

check() {
  runtime=$(clang -print-file-name=libclang_rt.tsan-x86_64.so)
  archer=$(find /usr/lib/llvm-*/lib -name libarcher.so | head -n 1)
  (cd "$work/$1" && PYTHONPATH=. LD_PRELOAD=$runtime OMP_TOOL_LIBRARIES=$archer OMP_NUM_THREADS=4 \
    BNCORE_BACKEND=$tier TSAN_OPTIONS="ignore_noninstrumented_modules=1 exitcode=66" \
    python scripts/race_workload.py)
}

scripts/build_copy.sh "$work/clean" "$tier" "$flags" "$linker"
cp -r "$work/clean" "$work/planted"
sed -i 's/std::atomic<ptrdiff_t> taken{0};/ptrdiff_t taken = 0;/
        s/tickets->taken.fetch_add(tickets->batch, std::memory_order_relaxed)/(tickets->taken += tickets->batch) - tickets->batch/' \
  "$work/planted/src/blocks.h"
! cmp -s "$work/planted/src/blocks.h" "$work/clean/src/blocks.h"
(cd "$work/planted" && BNCORE_TIERS=$tier CFLAGS=$flags CXXFLAGS=$flags LDFLAGS=$linker \
  python setup.py -q build_ext --inplace)

if check planted 2>"$work/planted.log"; then
  echo "the planted race was not reported"; exit 1
fi
grep -q "ThreadSanitizer: data race" "$work/planted.log"
check clean && echo "no data race"
