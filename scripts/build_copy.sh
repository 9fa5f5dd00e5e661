#!/bin/sh
# Build one tier of the tracked sources in a directory of its own, lightly optimized.
#
#   scripts/build_copy.sh DIRECTORY TIER [FLAGS OF COMPILER AND LINKER]
#
# The C++ says which line of the .pyx it comes from, as gcov and the sanitizers' reports want it.
# OPTIMIZE are other flags for -O1 -g1. PLANT_RACE=1 plants a data race.
set -eu
directory=$1 tier=$2 flags=${3:-}
cd "$(dirname "$0")/.."
mkdir -p "$directory"
git ls-files -z | xargs -0 cp --parents -t "$directory"
cd "$directory"
grep -q '"-O3", "-g0", ' setup.py  # else the next line would do nothing
optimize=$(printf '"%s", ' ${OPTIMIZE:--O1 -g1})
sed -i "s/\"-O3\", \"-g0\", /$optimize/; s/include_path=.*,/& emit_linenums=True,/" setup.py
if [ -n "${PLANT_RACE:-}" ]; then
  load='ptrdiff_t load(std::memory_order) { return value; }'
  store='void store(ptrdiff_t to, std::memory_order) { value = to; }'
  exchange='bool compare_exchange_weak(ptrdiff_t\& old, ptrdiff_t next, std::memory_order) {'
  exchange="$exchange if (value != old) { old = value; return false; } value = next; return true; }"
  sed -i "s/std::atomic<ptrdiff_t> taken;/struct { ptrdiff_t value; $load $store $exchange } taken;/" \
    src/tickets.h
  grep -q "ptrdiff_t value;" src/tickets.h
fi
# clang before 16 does not know the names of levels.
case ${CC:-} in clang*) sed -i 's/__builtin_cpu_supports("x86-64-v[234]")/1/' src/runtime.h ;; esac
# Flags are part of the compiler's name, so that the build's probe for OpenMP links with them too.
CC="${CC:-gcc} $flags" CXX="${CXX:-g++} $flags"
export CC CXX LDSHARED="$CC -shared" LDCXXSHARED="$CXX -shared"
BNCORE_REQUIRE_OPENMP=1 BNCORE_TIERS=$tier \
  python setup.py build_ext --inplace >build.log 2>&1 || { tail -n 40 build.log; exit 1; }
