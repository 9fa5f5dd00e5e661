#!/bin/sh
# The tests beyond 2^31 elements; needs 20 GB of memory.
set -eu
cd "$(dirname "$0")/.."
BNCORE_TEST_HUGE=1 exec python -m pytest tests/trust/test_huge.py "$@"
