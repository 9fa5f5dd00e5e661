"""More values than a float32 accumulator can count: beyond 2^24 it stops at adding ones."""

import numpy as np
import pytest

import bncore

pytestmark = pytest.mark.saturation

ROWS = 2**25


@pytest.mark.parametrize("shape", [(ROWS, 1), (1, 1, ROWS), (ROWS // 4, 4)])
def test_ones(backend, shape):
    if backend.name == "numpy" and shape[-1] != 1:
        pytest.skip("one layout suffices for the reference, which copies to float64")
    x = np.ones(shape, np.float32)
    beta = np.full(shape[1], 0.3, np.float32)
    _, saved = bncore.batch_norm(x, np.ones_like(beta), beta, out=x)
    assert (saved.mean == 1).all()
    assert (saved.var == 0).all()
    assert (x == beta[0]).all()


def test_gradient_of_ones(backend):
    if backend.name == "numpy":
        pytest.skip("the reference needs several GB for its float64 copies")
    x = np.zeros((ROWS, 1), np.float32)
    x[::2] = 2
    dy = np.broadcast_to(np.float32(1), x.shape)
    sums = bncore.backward_reduce(np.ones_like(x), x, np.ones(1), np.ones(1))
    assert sums.sum_dy == ROWS
    assert sums.sum_dy_xhat == 0
    g = bncore.batch_norm_inference_backward(dy, x, np.ones(1), np.ones(1), beta=np.zeros(1))
    assert g.dbeta == ROWS
