"""Make a kernel write beyond an array, to show that a sanitizer under which this runs sees it."""

import numpy as np

from bncore import _backend

CHANNELS = 64
ARGUMENTS = dict(
    x=np.ones((4, CHANNELS, 1), np.float32),
    weights=None,
    gamma=None,
    beta=None,
    residual=None,
    activation=(0, 0.0, 0.0),
    eps=1e-5,
    y=np.zeros((1, CHANNELS // 2, 1), np.float32),  # too short
    bits=None,
    stats=np.zeros((4, CHANNELS)),
    num_threads=1,
)

if __name__ == "__main__":
    _backend.active.normalization.forward(**ARGUMENTS)
