from collections.abc import Sequence

from numpy.typing import ArrayLike

from bncore.functional import Array
from bncore.state import Layer

class InPlaceBatchNorm(Layer):
    def __call__(self, x: Array) -> Array: ...
    # None only where wrt leaves x out
    def backward(
        self,
        dy: ArrayLike,
        *,
        wrt: str | Sequence[str] | None = None,
        out: Array | None = None,
    ) -> Array: ...
