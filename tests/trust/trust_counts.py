"""How often the tests of the promises repeat: often in the long run, else as often as is quick."""

import os

LONG = os.environ.get("BNCORE_TEST_LONG") == "1"


def count(short, long):
    """``long`` where BNCORE_TEST_LONG=1, else ``short``."""
    return long if LONG else short
