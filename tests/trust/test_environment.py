"""What the process and the machine allow: floating-point state, memory, CPUs, limits of others."""

import os
import resource
import shutil
import subprocess
import sys

import pytest
from trust_process import HERE, WORK, run

from bncore import _backend

COMPILED = [name for name in _backend.available() if name != "numpy"]
if COMPILED:
    from bncore import _runtime
pytestmark = [
    pytest.mark.environment,
    pytest.mark.skipif(not COMPILED, reason="no compiled backend"),
    pytest.mark.skipif(sys.platform != "linux", reason="Linux's interfaces"),
]

FLOATING_POINT = """
import ctypes
libm = ctypes.CDLL("libm.so.6")


def floating_point():
    "Control words of both units: rounding, exceptions, flush-to-zero; not the exceptions seen."
    state = (ctypes.c_ubyte * 64)()
    assert libm.fegetenv(state) == 0
    state = bytes(state)
    status = int.from_bytes(state[28:32], "little") & ~0x3F
    return int.from_bytes(state[:2], "little"), status

before = floating_point()
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64's control words")
@pytest.mark.parametrize("name", COMPILED)
def test_floating_point_state_is_left_alone(name):
    code = """
assert floating_point() == before, "import"
work()
assert floating_point() == before, "work"
others = []
thread = threading.Thread(target=lambda: others.append((work(), floating_point())[1]))
thread.start(); thread.join()
assert others == [before], "another thread"
tiny = np.array([2.0**-1074, 2.0**-1073]) * np.array([1.0, 0.5])
assert (tiny == 2.0**-1074).all()
"""
    run(code, name, before=FLOATING_POINT)


@pytest.mark.parametrize("name", COMPILED)
def test_one_cpu_gives_one_thread(name):
    if shutil.which("taskset") is None:
        pytest.skip("no taskset")
    cpu = min(os.sched_getaffinity(0))
    code = WORK + "work(); print(bncore.get_num_threads(), os_threads())"
    done = subprocess.run(
        ["taskset", "-c", str(cpu), sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=HERE,
        env=os.environ | {"BNCORE_BACKEND": name, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.stdout == "1 1\n", done.stderr


@pytest.mark.parametrize("wanted", ["1", "2", "3,2"])
def test_omp_num_threads_is_honoured(wanted):
    first = int(wanted.split(",")[0])
    printed = run("work(); print(bncore.get_num_threads())", OMP_NUM_THREADS=wanted)
    assert int(printed) == min(first, _runtime.effective_cpus())


@pytest.mark.parametrize("spare", [8, 24, 64, 200])
@pytest.mark.parametrize("name", COMPILED)
def test_little_address_space_ends_in_no_exit(name, spare):
    """With so many MB to spare: results, or MemoryError, but the process lives."""
    code = f"""
import resource
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + ({spare} << 20), resource.RLIM_INFINITY))
try:
    y, saved = bncore.batch_norm(x)
    bncore.batch_norm_backward(x, saved, out=y)
    print("done")
except MemoryError:
    print("no memory")
"""
    assert run(code, name) in ("done\n", "no memory\n")


@pytest.mark.parametrize("megabytes", [600, 1000, 2000])
def test_low_limit_from_the_start(megabytes):
    """As under ``ulimit -v``, with the default number of threads."""

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))

    code = """
try:
    bncore.batch_norm(x)
except MemoryError:
    pass
print("alive")
"""
    printed = run(code, preexec=limit, OPENBLAS_NUM_THREADS="1")
    assert printed == "alive\n"


@pytest.mark.parametrize("name", COMPILED)
def test_no_process_may_be_made(name):
    """Where the number of processes is used up a team is not to be had: one thread, same bits."""
    code = """
import resource
bncore.set_num_threads(1)
expected = work()
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
if os.getuid() == 0:
    # Root is exempt unless it gives up its capabilities: become nobody.
    os.setgid(65534); os.setuid(65534)
bncore.set_num_threads(2)
print(bncore.get_num_threads(), work() == expected)
"""
    assert run(code, name) == "1 True\n"


@pytest.mark.parametrize("name", COMPILED)
def test_threadpoolctl_limits_the_work(name):
    code = """
from threadpoolctl import threadpool_info, threadpool_limits
assert any(pool["user_api"] == "openmp" for pool in threadpool_info())
before = os_threads()
with threadpool_limits(1, user_api="openmp"):
    work()
    assert os_threads() == before
    assert bncore.get_num_threads() == 1
work()
assert os_threads() >= bncore.get_num_threads()
"""
    run(code, name)


QUOTAS = {
    "v1": ("/sys/fs/cgroup/cpu", {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "100000"}),
    "v2": ("/sys/fs/cgroup", {"cpu.max": "100000 100000"}),
}
"""Where each version of cgroups is mounted, and the files that set a quota of one CPU."""


@pytest.fixture(params=QUOTAS)
def group(request):
    """The directory of a cgroup with a quota of one CPU, where this process may make one."""
    mount, settings = QUOTAS[request.param]
    if not os.path.exists(f"{mount}/cgroup.procs"):
        pytest.skip(f"no cgroups of {request.param} here")
    directory = f"{mount}/bncore_test_{os.getpid()}"
    try:
        os.mkdir(directory)
    except OSError:
        pytest.skip("may not make cgroups here")
    try:
        for name, value in settings.items():
            with open(f"{directory}/{name}", "w") as file:
                file.write(value)
        yield directory
    except OSError:
        pytest.skip("may not set quotas here")
    finally:
        os.rmdir(directory)


def test_a_cgroup_quota_is_respected(group):
    def join():
        with open(f"{group}/cgroup.procs", "w") as file:
            file.write(str(os.getpid()))

    code = """
from bncore import _runtime
print(_runtime.cgroup_quota(), bncore.get_num_threads(), (work(), os_threads())[1])
"""
    assert run(code, preexec=join, OPENBLAS_NUM_THREADS="1") == "1 1 1\n"


def test_address_of_the_runtime_is_one():
    """All modules of all tiers share one OpenMP runtime: two would fight over the CPUs."""
    code = """
from bncore import _backend
for name in _backend.available():
    _backend.load(name)
with open("/proc/self/maps") as file:
    loaded = {line.split()[-1] for line in file if "omp" in line.split()[-1].rsplit("/")[-1]}
print(len([path for path in loaded if ".so" in path]))
"""
    assert int(run(code)) <= 1
