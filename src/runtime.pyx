# cython: language_level=3, freethreading_compatible=True
"""What the machine gives: instruction-set level, CPUs, OpenMP; and the number of threads to use.

Built once, for the baseline of its architecture, as ``bncore._runtime``. Kernels take their number
of threads as an argument; `get_num_threads` is where it comes from, and three promises live here:

- after a fork the child runs on one thread, whatever was set, since libgomp would wait for ever
  for threads that stayed behind in the parent;
- no more threads than CPUs (affinity and cgroup quota counted), and none that cannot be created,
  since libgomp ends the process over one it cannot create;
- OpenMP's own limits are honoured: ``OMP_NUM_THREADS``, ``OMP_THREAD_LIMIT``, threadpoolctl.
"""

import os
import re

cdef extern from "runtime.h" nogil:
    int forked
    int x86_64_level()
    int openmp_date()
    int openmp_max_threads()
    int openmp_processors()
    const char* openmp_library()
    int guard_forks()
    int possible_threads(int wanted, size_t stack_size)
    void forget_thread_limit()

cdef enum:
    LEAST_STACK = 256 << 10     # bytes that a kernel's thread needs, and some more

cdef int chosen_threads = 0     # 0: as many as there are CPUs
cdef int usable_cpus = 1
cdef size_t stack_size = 0      # of an OpenMP thread; 0: the system's default


def cpu_level():
    """The highest instruction-set tier that this CPU and operating system can run.

    Returns
    -------
    str
        "x86-64-v4", "x86-64-v3", "x86-64-v2", or "x86-64" for a CPU below all tiers; "generic"
        on other architectures.

    Examples
    --------
    >>> from bncore import _runtime
    >>> _runtime.cpu_level() in ("x86-64-v4", "x86-64-v3", "x86-64-v2", "x86-64", "generic")
    True
    """
    return ("generic", "x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4")[x86_64_level()]


def openmp():
    """The OpenMP runtime.

    Returns
    -------
    dict or None
        ``date`` of the specification (int, yyyymm) and ``library``, the path of the runtime (str
        or None where unknown). None where the kernels were built serial.

    Examples
    --------
    >>> from bncore import _runtime
    >>> found = _runtime.openmp()
    >>> found is None or found["date"] >= 201107
    True
    """
    if not openmp_date():
        return None
    cdef const char* path = openmp_library()
    return {"date": openmp_date(), "library": os.fsdecode(path) if path != NULL else None}


def effective_cpus():
    """CPUs this process may use: those of its affinity mask, no more than its cgroup's quota.

    Returns
    -------
    int
        At least 1.

    Examples
    --------
    >>> from bncore import _runtime
    >>> import os
    >>> 1 <= _runtime.effective_cpus() <= os.cpu_count()
    True
    """
    # OpenMP may have bound this thread to one place (OMP_PROC_BIND), but knows the mask before.
    cdef int cpus = openmp_processors()
    if not cpus:
        cpus = os.cpu_count() or 1
    quota = cgroup_quota()
    return cpus if quota is None else max(1, min(cpus, quota))


def cgroup_quota(root="/"):
    """CPUs' worth of time per period that the cgroups of this process grant it, rounded up.

    Parameters
    ----------
    root : str
        Where ``proc`` and ``sys`` are mounted.

    Returns
    -------
    int or None
        None without a quota.

    References
    ----------
    Linux kernel documentation: cgroup-v2 (``cpu.max``), sched-bwc (``cpu.cfs_quota_us``).

    Examples
    --------
    >>> from bncore import _runtime
    >>> _runtime.cgroup_quota("/nowhere")
    """
    try:
        return min(_quotas(root), default=None)
    except (ValueError, ZeroDivisionError):  # not in the form that the kernel documents
        return None


def _quotas(root):
    for mounts, path, read in _cpu_cgroups(root):
        for mount in mounts:
            # A quota anywhere up to the mount's root holds for everything below.
            steps = path.strip("/").split("/")
            for depth in range(len(steps), -1, -1):
                quota = read(os.path.join(root, "sys/fs/cgroup", mount, *steps[:depth]))
                if quota is not None:
                    yield quota


def _cpu_cgroups(root):
    """The cgroups with a CPU quota: (mounts below /sys/fs/cgroup, path, reader of a directory)."""
    for line in _lines(os.path.join(root, "proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield ("", "unified"), path, _quota_v2
        elif "cpu" in controllers.split(","):
            yield ("cpu", controllers), path, _quota_v1


def _quota_v2(directory):
    for line in _lines(os.path.join(directory, "cpu.max")):
        quota, period = line.split()
        return None if quota == "max" else -(-int(quota) // int(period))


def _quota_v1(directory):
    numbers = [
        int(line)
        for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        for line in _lines(os.path.join(directory, name))
    ]
    if len(numbers) != 2 or numbers[0] <= 0:
        return None
    return -(-numbers[0] // numbers[1])


def _lines(path):
    try:
        with open(path, errors="surrogateescape") as file:
            return file.read().splitlines()
    except OSError:
        return []


def set_num_threads(int n):
    """Set the number of threads; see `bncore.set_num_threads`, which checks it."""
    global chosen_threads, usable_cpus
    usable_cpus = effective_cpus()
    chosen_threads = n
    forget_thread_limit()


def get_num_threads():
    """Number of threads that the next call of a compiled kernel may use.

    It is the number given to `set_num_threads`, or else the number of CPUs; but never more than
    the CPUs this process might use when it was set, or at import (affinity and cgroup quota
    counted), than OpenMP's own limit (``OMP_NUM_THREADS``, threadpoolctl), or than can be created.
    In a forked child it is 1.

    Returns
    -------
    int

    Examples
    --------
    >>> import bncore
    >>> bncore.set_num_threads(1)
    >>> bncore.get_num_threads()
    1
    """
    if forked:
        return 1
    cdef int threads = openmp_max_threads()
    if threads > usable_cpus:
        threads = usable_cpus
    if 0 < chosen_threads < threads:
        threads = chosen_threads
    if threads < 2 or 0 < stack_size < LEAST_STACK:
        return 1
    return possible_threads(threads, stack_size)


def _openmp_stack_size():
    """Bytes of stack that OMP_STACKSIZE asks for; 0 where it asks for nothing sensible."""
    setting = os.environ.get("OMP_STACKSIZE") or os.environ.get("GOMP_STACKSIZE") or ""
    found = re.fullmatch(r"\s*(\d+)\s*([BKMG]?)\s*", setting.upper())
    if not found:
        return 0
    size = int(found[1]) << {"B": 0, "K": 10, "": 10, "M": 20, "G": 30}[found[2]]
    return size if size < 2**62 else 0


usable_cpus = effective_cpus()
stack_size = _openmp_stack_size()
if guard_forks():
    raise MemoryError("no room for bncore's fork handler")
