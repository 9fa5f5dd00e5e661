"""The number of threads: what sets and limits it, and what must never hang or end a process."""

import os
import sys
import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import bncore
from bncore import _backend

from .trust.trust_process import run

COMPILED = [name for name in _backend.available() if name != "numpy"]
pytestmark = pytest.mark.skipif(not COMPILED, reason="no compiled backend")
if COMPILED:
    from bncore import _runtime

needs_two_cpus = pytest.mark.skipif(
    not COMPILED or _runtime.openmp() is None or _runtime.effective_cpus() < 2,
    reason="needs OpenMP and two CPUs",
)


class TestSetNumThreads:
    def test_it_is_what_the_next_call_uses(self):
        bncore.set_num_threads(1)
        assert bncore.get_num_threads() == 1

    @pytest.mark.parametrize("n", [np.int64(1), np.uint8(1)])
    def test_numpy_integers(self, n):
        bncore.set_num_threads(n)
        assert bncore.get_num_threads() == 1

    @pytest.mark.parametrize("n", [10**6, 2**31, 2**64])
    def test_never_more_than_the_cpus(self, n):
        bncore.set_num_threads(n)
        assert 1 <= bncore.get_num_threads() <= _runtime.effective_cpus()

    @pytest.mark.parametrize("n", [0, -1, -(2**40), np.int64(0)])
    def test_less_than_one(self, n):
        before = bncore.get_num_threads()
        with pytest.raises(ValueError, match=f"n must be at least 1, got {n}"):
            bncore.set_num_threads(n)
        assert bncore.get_num_threads() == before

    @pytest.mark.parametrize("n", [1.0, "2", None, True, np.True_, [1], np.ones(2, int)])
    def test_no_integer(self, n):
        before = bncore.get_num_threads()
        with pytest.raises(TypeError, match="n must be an integer, got "):
            bncore.set_num_threads(n)
        assert bncore.get_num_threads() == before

    def test_holds_in_other_threads(self):
        bncore.set_num_threads(1)
        seen = []
        thread = threading.Thread(target=lambda: seen.append(bncore.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [1]


@needs_two_cpus
class TestLimits:
    def test_default_is_every_cpu(self):
        printed = run("print(bncore.get_num_threads())")
        assert int(printed) == _runtime.effective_cpus()

    def test_omp_num_threads(self):
        code = "bncore.set_num_threads(8); print(bncore.get_num_threads())"
        assert int(run(code, OMP_NUM_THREADS="1")) == 1

    def test_omp_thread_limit(self):
        assert int(run("print(bncore.get_num_threads())", OMP_THREAD_LIMIT="1")) == 1

    def test_threadpoolctl(self):
        before = bncore.get_num_threads()
        with threadpool_limits(1, user_api="openmp"):
            assert bncore.get_num_threads() == 1
        assert bncore.get_num_threads() == before

    def test_affinity_at_import(self):
        pin = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        code = "bncore.set_num_threads(8); print(bncore.get_num_threads())"
        assert int(run(code, before=pin)) == 1

    def test_affinity_is_read_again_when_threads_are_set(self):
        code = (
            "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
            "bncore.set_num_threads(8); print(bncore.get_num_threads())"
        )
        assert int(run(code)) == 1

    @pytest.mark.parametrize("backend", COMPILED)
    def test_kernels_use_no_more_than_asked(self, backend):
        code = (
            "bncore.set_num_threads(1); before = os_threads(); work(); alone = os_threads()\n"
            "bncore.set_num_threads(2); work(); print(alone - before, os_threads() - before)"
        )
        assert run(code, backend) == "0 1\n"


class TestCgroupQuota:
    """A file tree like the kernel's, with quotas in it."""

    @staticmethod
    def tree(root, files):
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        return _runtime.cgroup_quota(str(root))

    @pytest.mark.parametrize(
        ("limit", "cpus"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", None)]
    )
    def test_v2(self, tmp_path, limit, cpus):
        files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{limit}\n"}
        assert self.tree(tmp_path, files) == cpus

    def test_v2_takes_the_least_of_the_ancestors(self, tmp_path):
        files = {
            "proc/self/cgroup": "0::/pod/box\n",
            "sys/fs/cgroup/pod/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
        }
        assert self.tree(tmp_path, files) == 3

    def test_v2_path_seen_from_outside_a_container(self, tmp_path):
        files = {
            "proc/self/cgroup": "0::/host/only\n",
            "sys/fs/cgroup/cpu.max": "400000 100000\n",
        }
        assert self.tree(tmp_path, files) == 4

    @pytest.mark.parametrize(("quota", "cpus"), [(250000, 3), (-1, None), (0, None)])
    @pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
    def test_v1(self, tmp_path, quota, cpus, mount):
        files = {
            "proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/box\n0::/\n",
            f"sys/fs/cgroup/{mount}/box/cpu.cfs_quota_us": f"{quota}\n",
            f"sys/fs/cgroup/{mount}/box/cpu.cfs_period_us": "100000\n",
        }
        assert self.tree(tmp_path, files) == cpus

    @pytest.mark.parametrize("text", ["100000\n", "a b\n", "1 0\n"])
    def test_what_is_no_quota_is_none(self, tmp_path, text):
        files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": text}
        assert self.tree(tmp_path, files) is None

    def test_a_path_of_any_bytes(self, tmp_path):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_bytes(b"0::/\xff\xfe\n")
        files = {"sys/fs/cgroup/cpu.max": "200000 100000\n"}
        assert self.tree(tmp_path, files) == 2

    def test_no_cgroups(self, tmp_path):
        assert _runtime.cgroup_quota(str(tmp_path)) is None


FORK = """
expected = work()
assert os_threads() > 1, "the parent has run nothing in parallel"
child = os.fork()
if child == 0:
    {prepare}
    signal.alarm(5)  # ends a child that hangs
    os._exit(0 if work() == expected and bncore.get_num_threads() == 1 else 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
sys.exit("the child hangs" if status == -signal.SIGALRM else status)
"""


@needs_two_cpus
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("backend", COMPILED)
class TestFork:
    @pytest.mark.parametrize(
        "prepare",
        [
            "pass",
            "bncore.set_num_threads(2)",
            "pid = os.fork(); pid and os._exit(os.waitstatus_to_exitcode(os.wait()[1]))",
        ],
        ids=["child", "child that sets threads", "grandchild"],
    )
    def test_child_of_a_parallel_parent(self, backend, prepare):
        run(FORK.format(prepare=prepare), backend)

    def test_parent_goes_on_in_parallel(self, backend):
        code = (
            "expected = work(); child = os.fork()\n"
            "if child == 0: os._exit(0)\n"
            "os.waitpid(child, 0)\n"
            "print(bncore.get_num_threads() > 1, work() == expected)"
        )
        assert run(code, backend) == "True True\n"


@needs_two_cpus
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS")
@pytest.mark.parametrize("backend", COMPILED)
def test_no_memory_for_threads_means_one_thread(backend):
    code = """
import resource
bncore.set_num_threads(1)
expected = work()
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
y = np.empty_like(x)
resource.setrlimit(resource.RLIMIT_AS, (used + (48 << 20), resource.RLIM_INFINITY))
bncore.set_num_threads(2)
print(bncore.get_num_threads(), work() == expected)
"""
    assert run(code, backend, OMP_STACKSIZE="256M") == "1 True\n"


@needs_two_cpus
def test_threads_that_could_be_had_again_are_used_again():
    code = """
import resource
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
_, most = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (48 << 20), most))
low = bncore.get_num_threads()
resource.setrlimit(resource.RLIMIT_AS, (most, most))
still = bncore.get_num_threads()
bncore.set_num_threads(2)
print(low, still, bncore.get_num_threads())
"""
    assert run(code, OMP_STACKSIZE="256M") == "1 1 2\n"


LAYER = """
import numpy as np, bncore
x = np.random.default_rng(0).standard_normal((16, 64, 30, 30))
bncore.batch_norm_backward(x, bncore.batch_norm(x, activation="relu")[1])
x = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
bncore.batch_norm_backward(x, bncore.batch_norm(x, axis=-1)[1])
print("done")
"""


@pytest.mark.parametrize("stack", ["16k", "64k", "128k", "300k", "20000000000G"])
def test_small_stacks_of_threads_end_nothing(stack):
    assert run(LAYER, OMP_STACKSIZE=stack) == "done\n"
    in_a_thread = (
        "threading.stack_size(131072)\n"
        f"thread = threading.Thread(target=exec, args=({LAYER!r}, {{}}))\n"
        "thread.start(); thread.join()\n"
    )
    assert run(in_a_thread, OMP_STACKSIZE=stack) == "done\n"
