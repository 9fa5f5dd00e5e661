from typing import NamedTuple

from numpy.typing import ArrayLike

from bncore.functional import Activation, Array, Axis, Saved

class DoubleGradients(NamedTuple):
    ddy: Array
    dx: Array
    dgamma: Array | None

class InferenceDoubleGradients(NamedTuple):
    ddy: Array
    dx: Array
    dgamma: Array | None
    dmean: Array
    dvar: Array

def batch_norm_jvp(
    tangent: ArrayLike | None,
    saved: Saved,
    *,
    tangent_gamma: ArrayLike | None = None,
    tangent_beta: ArrayLike | None = None,
    tangent_residual: ArrayLike | None = None,
    out: Array | None = None,
) -> Array: ...
def batch_norm_inference_jvp(
    tangent: ArrayLike | None,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    tangent_mean: ArrayLike | None = None,
    tangent_var: ArrayLike | None = None,
    tangent_gamma: ArrayLike | None = None,
    tangent_beta: ArrayLike | None = None,
    tangent_residual: ArrayLike | None = None,
    axis: Axis = 1,
    eps: float = 1e-5,
    activation: Activation = None,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> Array: ...
def batch_norm_double_backward(
    ddx: ArrayLike | None,
    dy: ArrayLike,
    saved: Saved,
    *,
    ddgamma: ArrayLike | None = None,
    ddbeta: ArrayLike | None = None,
    ddresidual: ArrayLike | None = None,
) -> DoubleGradients: ...
def batch_norm_inference_double_backward(
    ddx: ArrayLike | None,
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    ddgamma: ArrayLike | None = None,
    ddbeta: ArrayLike | None = None,
    ddresidual: ArrayLike | None = None,
    ddmean: ArrayLike | None = None,
    ddvar: ArrayLike | None = None,
    axis: Axis = 1,
    eps: float = 1e-5,
    activation: Activation = None,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> InferenceDoubleGradients: ...
