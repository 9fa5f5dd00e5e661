from collections.abc import Sequence

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
    # None only where wrt leaves x out
    def backward(
        self,
        dy: ArrayLike,
        *,
        wrt: str | Sequence[str] | None = None,
        out: Array | None = None,
    ) -> Array: ...

class BatchNorm1d(BatchNorm): ...
class BatchNorm2d(BatchNorm): ...
class BatchNorm3d(BatchNorm): ...
