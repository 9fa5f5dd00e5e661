"""Batch normalization for NumPy arrays on CPUs: fast, accurate, deterministic."""

from bncore import testing as testing
from bncore._config import backend, get_num_threads, set_num_threads, show_config
from bncore.derivatives import (
    DoubleGradients,
    InferenceDoubleGradients,
    batch_norm_double_backward,
    batch_norm_inference_double_backward,
    batch_norm_inference_jvp,
    batch_norm_jvp,
)
from bncore.functional import (
    Gradients,
    InferenceGradients,
    Reduced,
    Saved,
    backward_apply,
    backward_reduce,
    batch_norm,
    batch_norm_backward,
    batch_norm_inference,
    batch_norm_inference_backward,
    moments,
)
from bncore.inplace import InPlaceBatchNorm
from bncore.layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from bncore.moments import Moments
from bncore.presets import presets

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "DoubleGradients",
    "Gradients",
    "InPlaceBatchNorm",
    "InferenceDoubleGradients",
    "InferenceGradients",
    "Moments",
    "Reduced",
    "Saved",
    "backend",
    "backward_apply",
    "backward_reduce",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_double_backward",
    "batch_norm_inference",
    "batch_norm_inference_backward",
    "batch_norm_inference_double_backward",
    "batch_norm_inference_jvp",
    "batch_norm_jvp",
    "get_num_threads",
    "moments",
    "presets",
    "set_num_threads",
    "show_config",
]
