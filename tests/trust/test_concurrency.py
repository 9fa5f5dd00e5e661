"""Many Python threads at once: shared kernels, and the rule for sharing a layer.

The rule (`bncore.BatchNorm`): threads may share a layer for evaluation; in training a layer belongs
to one thread at a time, which a lock gives.
"""

import sys
import threading

import numpy as np
import pytest
from trust_counts import count

import bncore

pytestmark = pytest.mark.concurrency

THREADS = 16
CALLS = count(8, 1000)


@pytest.fixture(autouse=True)
def frequent_switches():
    """Python threads change places as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(work):
    """Run ``work(number)`` in all threads at once and raise what one of them raised."""
    gate = threading.Barrier(THREADS)
    errors = []

    def run(number):
        try:
            gate.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("shape", [(7, 5, 11), (9, 64, 80)])
def test_functions(backend, shape):
    """Small calls on one thread each, and larger ones that want several."""
    rng = np.random.default_rng(0)
    batches = rng.standard_normal((4, *shape), np.float32)
    gamma, beta = rng.standard_normal((2, shape[1]), np.float32)

    def results(x):
        y, saved = bncore.batch_norm(x, gamma, beta)
        g = bncore.batch_norm_backward(x, saved)
        fixed = bncore.batch_norm_inference(x, saved.mean, saved.var, gamma, beta)
        return [part.tobytes() for part in (y, saved.stats, *g[:3], fixed)]

    expected = [results(x) for x in batches]

    def work(number):
        for call in range(CALLS):
            which = (number + call) % len(batches)
            assert results(batches[which]) == expected[which]

    in_threads(work)


def test_a_layer_shared_for_evaluation(backend):
    rng = np.random.default_rng(1)
    batches = rng.standard_normal((4, 6, 5, 9), np.float32)
    layer = bncore.BatchNorm(5)
    layer(batches[0])
    layer.eval()
    expected = [layer(x).tobytes() for x in batches]
    state = {key: value.tobytes() for key, value in layer.state_dict().items()}

    def work(number):
        for call in range(CALLS):
            which = (number + call) % len(batches)
            assert layer(batches[which]).tobytes() == expected[which]

    in_threads(work)
    assert {key: value.tobytes() for key, value in layer.state_dict().items()} == state


def test_a_layer_shared_for_training_under_a_lock(backend):
    """No update is lost or torn: all batches count, and the average is that of all of them."""
    calls = max(CALLS // 4, 5)
    layer = bncore.BatchNorm(3, momentum=None, dtype=np.float64)
    lock = threading.Lock()
    batches = np.random.default_rng(2).standard_normal((THREADS, 8, 3))

    def work(number):
        for _ in range(calls):
            with lock:
                y = layer(batches[number])
                dx = layer.backward(y)
                grad_beta = layer.grad_beta.copy()
            np.testing.assert_allclose(grad_beta, y.sum(axis=0), atol=1e-13)
            assert np.isfinite(dx).all()

    in_threads(work)
    assert layer.num_batches_tracked == THREADS * calls
    np.testing.assert_allclose(layer.running_mean, batches.mean(axis=(0, 1)), atol=1e-12)
    np.testing.assert_allclose(layer.running_var, batches.var(axis=1, ddof=1).mean(axis=0))


def test_threads_are_set_while_others_compute(backend):
    x = np.random.default_rng(3).standard_normal((20, 32, 80), np.float32)
    expected = bncore.batch_norm(x)[0].tobytes()

    def work(number):
        for call in range(CALLS):
            bncore.set_num_threads(1 + (number + call) % 4)
            assert bncore.batch_norm(x)[0].tobytes() == expected

    in_threads(work)


@pytest.mark.skipif(
    not hasattr(sys, "_is_gil_enabled") or sys._is_gil_enabled(),
    reason="needs a free-threaded Python (3.13t or later)",
)
def test_importing_leaves_the_interpreter_free_threaded():
    assert not sys._is_gil_enabled()
