"""Children of a parent that has run in parallel finish, with the same bits, however they were made.

The child asks for four threads and gets one; the parent goes on with many. On one CPU no parent
runs in parallel and nothing would be shown.
"""

import os
import sys

import pytest
from trust_counts import count
from trust_process import run

from bncore import _backend

COMPILED = [name for name in _backend.available() if name != "numpy"]
if COMPILED:
    from bncore import _runtime
pytestmark = [
    pytest.mark.fork,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.skipif(
        not COMPILED or _runtime.openmp() is None or _runtime.effective_cpus() < 2,
        reason="needs OpenMP and two CPUs",
    ),
]

TIMES = count(3, 100)

CHILD = """
import time
times = {times}
expected = work()
assert os_threads() >= bncore.get_num_threads() >= 2


def as_child():
    "What a child does and exits with; an alarm ends it if it hangs."
    signal.alarm(60)
    bncore.set_num_threads(4)
    os._exit(0 if work() == expected and bncore.get_num_threads() == 1 else 1)


def wait_for(child):
    start = time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, "the child hangs" if code == -signal.SIGALRM else code
    waits.append(time.monotonic() - start)


def check_parent(before):
    assert work() == expected
    assert bncore.get_num_threads() == before
    # Half of them, lest one pause of a busy machine be taken for a hang.
    assert not waits or sorted(waits)[len(waits) // 2] < 5

waits = []
threads = bncore.get_num_threads()
"""

FORKS = {
    "os.fork": """
for _ in range(times):
    child = os.fork()
    if child == 0:
        as_child()
    wait_for(child)
check_parent(threads)
""",
    "C fork": """
import ctypes
libc = ctypes.PyDLL(None)  # holds the interpreter's lock through the fork, as an extension would
for _ in range(times):
    child = libc.fork()
    if child == 0:
        as_child()
    wait_for(child)
check_parent(threads)
""",
    "pool": """
import multiprocessing


def child_work(_):
    signal.alarm(60)
    bncore.set_num_threads(4)
    return work() == expected and bncore.get_num_threads() == 1


for _ in range(max(times // 2, 1)):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(child_work, range(4)) == [True] * 4
check_parent(threads)
""",
    "another thread": """
def fork_here():
    child = os.fork()
    if child == 0:
        as_child()
    children.append(child)


for _ in range(times):
    children = []
    thread = threading.Thread(target=fork_here)
    thread.start()
    thread.join()
    wait_for(children[0])
check_parent(threads)
""",
    "while threads compute": """
stop = threading.Event()
wrong = []


def compute():
    while not stop.is_set():
        if work() != expected:
            wrong.append(True)


computing = [threading.Thread(target=compute) for _ in range(4)]
for thread in computing:
    thread.start()
for _ in range(times):
    child = os.fork()
    if child == 0:
        as_child()
    wait_for(child)
stop.set()
for thread in computing:
    thread.join()
assert not wrong
check_parent(threads)
""",
    "a child's child": """
for _ in range(times):
    child = os.fork()
    if child == 0:
        grandchild = os.fork()
        if grandchild == 0:
            as_child()
        wait_for(grandchild)
        as_child()
    wait_for(child)
check_parent(threads)
""",
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("how", FORKS)
def test_children_finish(how, name):
    run(CHILD.format(times=TIMES) + FORKS[how], name, timeout=600)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_the_child_starts_no_thread(name):
    code = """
child = os.fork()
if child == 0:
    signal.alarm(60)
    bncore.set_num_threads(4)
    work()
    os._exit(os_threads())
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert code == 1, code
"""
    run("work()\n" + code, name)
