from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from bncore.functional import Activation, Array, Axis

class Layer:
    shape: tuple[int, ...]
    axis: Axis
    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool
    activation: Activation
    ddof: Literal[0, 1]
    single_value: Literal["raise", "zero", "running"]
    nan_policy: Literal["propagate", "skip"]
    update: bool
    # None where the layer was made without it: Any, so that every use need not ask.
    gamma: Array | Any
    beta: Array | Any
    running_mean: Array | Any
    running_var: Array | Any
    num_batches_tracked: int | Any
    grad_gamma: Array | Any
    grad_beta: Array | Any
    grad_residual: Array | Any
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
        ddof: Literal[0, 1] = 1,
        single_value: Literal["raise", "zero", "running"] = "raise",
        nan_policy: Literal["propagate", "skip"] = "propagate",
    ) -> None: ...
    @property
    def num_features(self) -> int | tuple[int, ...]: ...
    def train(self, mode: bool = True) -> Self: ...
    def eval(self) -> Self: ...
    def no_update(self) -> AbstractContextManager[Self]: ...
    def reset_running_stats(self) -> None: ...
    def state_dict(self) -> dict[str, Array]: ...
    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None: ...
