"""More than 2^31 elements, and strides beyond it: ``BNCORE_TEST_HUGE=1 pytest -m huge``.

Every kernel works in place on one float16 array of 4.3 GB and more, so that 20 GB suffice for
forward and backward. The values are a short pattern repeated, whose statistics are known.
"""

import os

import numpy as np
import pytest

import bncore
from bncore import _backend

COMPILED = [name for name in _backend.available() if name != "numpy"]
pytestmark = [
    pytest.mark.huge,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(os.environ.get("BNCORE_TEST_HUGE") != "1", reason="BNCORE_TEST_HUGE=1"),
]

BEYOND = 2**31 + 2**10
SHAPES = {
    "N": (BEYOND, 1),
    "N x C": (2**26 + 32, 32),
    "S": (1, 1, BEYOND),
    "N x S": (2**11, 2, 2**19 + 256),
    "C x S": (1, 2**12, 2**19 + 256),
}


def pattern(shape):
    """-1 and 1 in turn along an axis of values."""
    x = np.ones(shape, np.float16)
    np.moveaxis(x, 0 if len(shape) == 2 else 2, 0)[::2] = -1
    return x


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("what", SHAPES)
def test_in_place(what, name):
    shape = SHAPES[what]
    assert np.prod(shape, dtype=object) > 2**31
    with _backend.use(name):
        x = pattern(shape)
        y, saved = bncore.batch_norm(x, eps=3.0, out=x)
        assert (saved.mean == 0).all()
        assert (saved.var == 1).all()
        assert (saved.count == x.size / shape[1]).all()
        ends = y.reshape(-1)
        assert set(np.unique(ends[:4096])) | set(np.unique(ends[-4096:])) == {-0.5, 0.5}
        sums = bncore.backward_reduce(y, y, saved.mean, 2 * np.ones(shape[1]))
        assert (sums.sum_dy == 0).all()
        assert (sums.sum_dy_xhat == 0.5 * x.size / shape[1]).all()
        dx = bncore.batch_norm_inference_backward(y, y, saved.mean, saved.var, eps=3.0, out=y).dx
        assert abs(dx.reshape(-1)[-1]) == 0.25
