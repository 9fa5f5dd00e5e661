"""Every way through the kernels on several threads: what race and memory checkers run.

``python scripts/race_workload.py small`` takes 50 small shapes instead, for slow checkers.
"""

import itertools
import sys

import numpy as np

import bncore
from bncore import functional

LARGE = [
    (3, 257, 49), (8, 64, 700), (64, 8, 900), (2000, 50), (40000, 3), (33, 24, 49), (130, 1000),
    (2, 3, 70001), (50, 65, 36), (9, 40, 3137), (900, 1300), (33, 701, 49),
]  # fmt: skip
SMALL = [
    *itertools.product([1, 2, 9], [1, 3, 16, 17], [1, 7, 33]),
    *itertools.product([1, 5, 40, 300], [1, 8, 65]),
    (17, 3, 25),
    (16, 70, 9),
]


def run(shape, dtype, threads):
    """Everything of a shape: plain, with each epilogue, mask and weights, fixed, and in place."""
    functional.get_num_threads = lambda: threads
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, *shape), np.float32).astype(dtype)
    gamma, beta = rng.standard_normal((2, shape[1]))
    positions = (shape[0], 1, *shape[2:])
    mask, weights = rng.random(positions) < 0.8, rng.uniform(0, 2, positions)
    for fused in (
        {},
        {"activation": "relu", "residual": dy},
        {"activation": ("leaky_relu", 0.1)},
        {"mask": mask, "activation": ("clip", -1, 1)},
        {"sample_weight": weights},
    ):
        _, saved = bncore.batch_norm(x, gamma, beta, **fused)
        bncore.batch_norm_backward(dy, saved)
        bncore.batch_norm_backward(dy, saved, wrt="gamma")
    for activation in (None, "relu"):
        fixed = x, saved.mean, saved.var, gamma, beta
        bncore.batch_norm_inference(*fixed, activation=activation, residual=dy)
        bncore.batch_norm_inference_backward(dy, *fixed, activation=activation)
    bncore.moments(x[::-1])
    bncore.moments(x, mask=mask, sample_weight=weights)
    sums = bncore.backward_reduce(dy, x, saved.mean, saved.inv_std)
    bncore.backward_apply(dy, x, saved.mean, saved.inv_std, gamma, *sums, len(x), out=dy)
    layer = bncore.BatchNorm(shape[1], dtype=dtype)
    if x.size > x.shape[1]:
        layer.backward(layer(x))
    bncore.batch_norm(x, gamma, beta, out=x)


if __name__ == "__main__":
    small = sys.argv[1:] == ["small"]
    assert len(SMALL) >= 50 or not small
    dtypes = ("float32", "float64", "float16")
    for shape, dtype in itertools.product(SMALL if small else LARGE, dtypes):
        run(shape, dtype, threads=1 if small else 4)
    print("done")
