from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bncore.moments import Moments

Array: TypeAlias = NDArray[Any]
Doubles: TypeAlias = NDArray[np.float64]
Axis: TypeAlias = int | tuple[int, ...]
Activation: TypeAlias = (
    Literal["relu"]
    | tuple[Literal["leaky_relu"], float]
    | tuple[Literal["clip"], float, float]
    | None
)

class Gradients(NamedTuple):
    dx: Array  # None only where wrt leaves it out
    dgamma: Array | None
    dbeta: Array | None
    dresidual: Array | None = None

class InferenceGradients(NamedTuple):
    dx: Array  # None only where wrt leaves it out
    dgamma: Array | None
    dbeta: Array | None
    dresidual: Array | None
    dmean: Array | None
    dvar: Array | None

class Reduced(NamedTuple):
    sum_dy: Doubles
    sum_dy_xhat: Doubles

class Saved:
    x: Array | None
    gamma: Array | None
    beta: Array | None
    axes: tuple[int, ...]
    eps: float
    @property
    def mean(self) -> Doubles: ...
    @property
    def var(self) -> Doubles: ...
    @property
    def inv_std(self) -> Doubles: ...
    @property
    def count(self) -> Doubles: ...

def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: Axis = 1,
    eps: float = 1e-5,
    activation: Activation = None,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]: ...
def batch_norm_backward(
    dy: ArrayLike,
    saved: Saved,
    *,
    wrt: str | Sequence[str] | None = None,
    out: Array | None = None,
) -> Gradients: ...
def batch_norm_inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: Axis = 1,
    eps: float = 1e-5,
    activation: Activation = None,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    mean_lo: ArrayLike | None = None,
    out: Array | None = None,
) -> Array: ...
def batch_norm_inference_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: Axis = 1,
    eps: float = 1e-5,
    activation: Activation = None,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    wrt: str | Sequence[str] | None = None,
    out: Array | None = None,
) -> InferenceGradients: ...
def moments(
    x: ArrayLike,
    *,
    axis: Axis = 1,
    mask: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
) -> Moments: ...
def backward_reduce(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    inv_std: ArrayLike,
    *,
    axis: Axis = 1,
    mask: ArrayLike | None = None,
    mean_lo: ArrayLike | None = None,
) -> Reduced: ...
def backward_apply(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    inv_std: ArrayLike,
    gamma: ArrayLike | None,
    sum_dy: ArrayLike,
    sum_dy_xhat: ArrayLike,
    count: ArrayLike,
    *,
    axis: Axis = 1,
    mask: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    mean_lo: ArrayLike | None = None,
    out: Array | None = None,
) -> Array: ...
