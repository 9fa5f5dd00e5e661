#!/bin/sh
# The tests of the promises at their full counts: 20 000 examples, 1000 repeats, 100 forks.
set -eu
cd "$(dirname "$0")/.."
BNCORE_TEST_LONG=1 exec python -m pytest tests/trust --timeout=0 "$@"
