from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from bncore.functional import Activation, Array, Axis

class BatchNorm:
    shape: tuple[int, ...]
    axis: Axis
    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool
    activation: Activation
    # None where the layer was made without it: Any, so that every use need not ask.
    gamma: Array | Any
    beta: Array | Any
    running_mean: Array | Any
    running_var: Array | Any
    num_batches_tracked: int | Any
    grad_gamma: Array | Any
    grad_beta: Array | Any
    training: bool
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        axis: Axis = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: Activation = None,
        dtype: DTypeLike = np.float32,
    ) -> None: ...
    @property
    def num_features(self) -> int | tuple[int, ...]: ...
    def __call__(self, x: ArrayLike, *, out: Array | None = None) -> Array: ...
    def backward(self, dy: ArrayLike, *, out: Array | None = None) -> Array: ...
    def train(self, mode: bool = True) -> Self: ...
    def eval(self) -> Self: ...
    def reset_running_stats(self) -> None: ...
    def state_dict(self) -> dict[str, Array]: ...
    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None: ...

class BatchNorm1d(BatchNorm): ...
class BatchNorm2d(BatchNorm): ...
class BatchNorm3d(BatchNorm): ...
