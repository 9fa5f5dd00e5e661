"""One result to the last bit, whatever the number of threads and from run to run.

`bncore.set_num_threads` never goes beyond the CPUs; here the kernels are told to use as many
threads as a larger machine would, so that all ways through them are taken. Tiers need not agree
to the bit (fused multiply-add, vector length); they agree to the promises' accuracy.
"""

import hashlib

import numpy as np
import pytest
from trust_counts import count

import bncore
from bncore import _backend, functional

pytestmark = pytest.mark.bits

COMPILED = [name for name in _backend.available() if name != "numpy"]
THREADS = count([1, 2, 3, 7, 16], [1, 2, 3, 4, 7, 8, 16, 64])
REPEATS = count(1, 20)

ROWS = [(2, 3, 7001), (1, 65, 1024), (33, 5, 300), (8, 17, 256), (3, 257, 49), (64, 8, 100)]
COLUMNS = [
    (700, 50), (40000, 1), (5000, 7), (300, 129), (17, 2100), (130, 1000), (4, 9001), (60, 5003),
]  # fmt: skip
PLANES = [(33, 24, 49), (50, 65, 9), (16, 300, 16), (100, 31, 25), (20, 1030, 4), (19, 64, 121)]
LARGE = [(16, 64, 800), (900, 1024), (4, 3, 90000), (64, 256, 49), (2000, 513), (12, 40, 3136)]
SHAPES = [
    *[(shape, dtype) for shape in ROWS + COLUMNS + PLANES for dtype in ("float32", "float64")],
    *[(shape, "float16") for shape in ROWS[:3] + COLUMNS[:3] + PLANES[:3]],
    *[(shape, dtype) for shape in LARGE[:3] for dtype in ("float16", "float32", "float64")],
    *[(shape, "float32") for shape in LARGE[3:]],
]
assert len(SHAPES) >= 60


def digest(shape, dtype):
    """A hash of what forward, backward and inference give."""
    rng = np.random.default_rng(len(shape))
    x, dy = rng.standard_normal((2, *shape), np.float32).astype(dtype)
    gamma, beta = rng.standard_normal((2, shape[1]))
    y, saved = bncore.batch_norm(x, gamma, beta)
    g = bncore.batch_norm_backward(dy, saved)
    fixed = bncore.batch_norm_inference(x, saved.mean, saved.var, gamma, beta)
    sums = bncore.backward_reduce(dy, x, saved.mean, saved.inv_std)
    m = bncore.moments(x)
    parts = (y, saved.stats, *g[:3], fixed, *sums, m.mean, m.m2)
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize(("shape", "dtype"), SHAPES)
def test_one_hash_per_shape(monkeypatch, shape, dtype, name):
    seen = set()
    with _backend.use(name):
        for threads in THREADS:
            monkeypatch.setattr(functional, "get_num_threads", lambda n=threads: n)
            for _ in range(REPEATS):
                seen.add(digest(shape, dtype))
    assert len(seen) == 1


@pytest.mark.parametrize("shape", ROWS + COLUMNS + PLANES)
def test_tiers_agree_to_rounding(shape):
    rng = np.random.default_rng(1)
    x, dy = rng.standard_normal((2, *shape), np.float32)
    results = []
    for name in _backend.available():
        with _backend.use(name):
            y, saved = bncore.batch_norm(x)
            results.append((y, saved.stats, bncore.batch_norm_backward(dy, saved).dx))
    for y, stats, dx in results[1:]:
        np.testing.assert_allclose(y, results[0][0], rtol=0, atol=2e-6)
        np.testing.assert_allclose(stats[2:], results[0][1][2:], rtol=1e-13)
        np.testing.assert_allclose(dx, results[0][2], rtol=0, atol=4e-6)
