"""What the tests of the promises share: their helper modules, and how much they do.

``BNCORE_TEST_LONG=1`` turns the reduced counts of the default suite into the full ones.
"""

import sys
from pathlib import Path

from hypothesis import settings

# Test files are imported one by one (importmode importlib): the helpers need a path of their own.
sys.path.append(str(Path(__file__).parent))

from trust_counts import LONG  # noqa: E402

settings.register_profile("short", settings(max_examples=60))
settings.register_profile("long", settings(max_examples=20_000))
settings.load_profile("long" if LONG else "short")
