#!/bin/sh
# Run 50 small shapes under valgrind's memcheck; any error in bncore's own modules fails.
#
#   scripts/valgrind.sh
#
# On x86-64-v2, whose instructions valgrind knows best. Python's own allocator is put aside, and
# what Python and NumPy do is not looked at: only errors with a frame of a kernel count.
set -eu
cd "$(dirname "$0")/.."
tier=${TIER:-x86-64-v2}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
scripts/build_copy.sh "$work" "$tier"
cd "$work"
PYTHONPATH=. PYTHONMALLOC=malloc OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 BNCORE_BACKEND=$tier \
  valgrind --quiet --error-limit=no --log-file=valgrind.log \
  python scripts/race_workload.py small
errors=$(grep -c "_kernels\|blocks\.h\|sums\.h\|maps\.h\|simd\.h\|bncore::" valgrind.log || true)
if [ "$errors" -ne 0 ]; then
  cat valgrind.log; exit 1
fi
echo "no error in the kernels"
