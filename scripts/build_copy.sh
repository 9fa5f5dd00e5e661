#!/bin/sh
# Build one tier of the tracked sources in a directory of its own, lightly optimized.
#
#   scripts/build_copy.sh DIRECTORY TIER [COMPILER FLAGS [LINKER FLAGS]]
#
# The C++ says which line of the .pyx it comes from, as gcov and the sanitizers' reports want it.
set -eu
directory=$1 tier=$2 cflags=${3:-} ldflags=${4:-}
cd "$(dirname "$0")/.."
mkdir -p "$directory"
git ls-files -z | xargs -0 cp --parents -t "$directory"
cd "$directory"
grep -q '"-O3", "-g0"' setup.py  # else the next line would do nothing
sed -i 's/"-O3", "-g0"/"-O1", "-g"/; s/force=self.force,/force=self.force, emit_linenums=True,/' setup.py
BNCORE_TIERS=$tier CFLAGS=$cflags CXXFLAGS=$cflags LDFLAGS=$ldflags \
  python setup.py build_ext --inplace >build.log 2>&1 || { tail -n 40 build.log; exit 1; }
