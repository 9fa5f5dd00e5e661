from numpy.typing import ArrayLike

from bncore.functional import Array
from bncore.state import Layer

class BatchNorm(Layer):
    def __call__(
        self,
        x: ArrayLike,
        *,
        residual: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        out: Array | None = None,
    ) -> Array: ...
    def backward(self, dy: ArrayLike, *, out: Array | None = None) -> Array: ...

class BatchNorm1d(BatchNorm): ...
class BatchNorm2d(BatchNorm): ...
class BatchNorm3d(BatchNorm): ...
