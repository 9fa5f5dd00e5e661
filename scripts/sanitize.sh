#!/bin/sh
# Run the tests on kernels built with AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   scripts/sanitize.sh [PYTEST ARGUMENTS]
#
# All tests of the kernels, or those that the arguments name. Any report ends the process, so a green run is a run without one. A planted error shows first
# that reports are seen. TIER chooses the tier (x86-64-v3).
set -eu
cd "$(dirname "$0")/.."
tier=${TIER:-x86-64-v3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Optimized, sanitized kernels take the compiler ten minutes; like this they take one and a half.
export OPTIMIZE="-O0 -g1"
flags="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"

scripts/build_copy.sh "$work/clean" "$tier" "$flags"

LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
# Python leaks on purpose; huge requests are for NumPy to refuse.
ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=1
UBSAN_OPTIONS=print_stacktrace=1
PYTHONMALLOC=malloc BNCORE_BACKEND=$tier PYTHONPATH=.
export LD_PRELOAD ASAN_OPTIONS UBSAN_OPTIONS PYTHONMALLOC BNCORE_BACKEND PYTHONPATH

cd "$work/clean"
if python scripts/planted_error.py 2>planted.log; then
  echo "a planted write beyond an array was not reported"; exit 1
fi
grep -q "AddressSanitizer" planted.log
# Limits of address space and failing allocators are not for a process with shadow memory, and what
# no kernel runs in is left out. Without pytest's capture, which a report would be lost in.
for test in threads bench demo docs stubs trust/environment trust/alloc trust/fork; do
  name=tests/$(echo "$test" | sed "s,[a-z]*$,test_&.py,")
  set -- "--ignore=$name" "$@"
done
python -m pytest -q --capture=no "$@"
