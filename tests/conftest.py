"""Fixtures of all tests, and the check that the tests test what they say.

The suite is for the compiled kernels: it refuses to start where they are missing. Two variables
change that:

BNCORE_BACKEND=numpy or BNCORE_TEST_ALLOW_NUMPY=1
    test the NumPy fallback alone;
BNCORE_TEST_INSTALLED=1
    refuse to test the source tree, even if kernels were built in it.
"""

import os
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

NUMPY_IS_MEANT = (
    os.environ.get("BNCORE_BACKEND") == "numpy" or os.environ.get("BNCORE_TEST_ALLOW_NUMPY") == "1"
)

# The source tree without kernels must not hide the installed package.
if not NUMPY_IS_MEANT and not any(ROOT.glob("bncore/_runtime.*.so")):
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # the fallback's; pytest_sessionstart says more
    import bncore
    from bncore import _backend

settings.register_profile(
    "bncore",
    deadline=None,
    print_blob=True,
    # The fixtures here need no renewal between examples.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("bncore")


def pytest_sessionstart(session):
    where = Path(bncore.__file__).parent
    if bncore.backend() == "numpy" and not NUMPY_IS_MEANT:
        reasons = "\n".join(f"  {name}: {_backend.declines(name)}" for name in _backend.NAMES[:-1])
        pytest.exit(f"bncore in {where} has no usable compiled backend:\n{reasons}", returncode=3)
    if os.environ.get("BNCORE_TEST_INSTALLED") == "1" and where == ROOT / "bncore":
        pytest.exit(f"bncore is imported from its source tree, {where}", returncode=3)


def pytest_report_header():
    return (
        f"bncore: {bncore.__version__} from {Path(bncore.__file__).parent}, backend "
        f"{bncore.backend()}, tested: {', '.join(_backend.available())}, "
        f"threads {bncore.get_num_threads()}"
    )


@pytest.fixture(params=_backend.available())
def backend(request):
    """Each usable backend in turn, active during the test."""
    with _backend.use(request.param) as chosen:
        yield chosen


@pytest.fixture(autouse=True)
def default_threads():
    """Whatever a test sets, the next one starts with as many threads as there are CPUs."""
    yield
    bncore.set_num_threads(os.cpu_count())
