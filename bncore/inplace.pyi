from numpy.typing import ArrayLike

from bncore.functional import Array
from bncore.state import Layer

class InPlaceBatchNorm(Layer):
    def __call__(self, x: Array) -> Array: ...
    def backward(self, dy: ArrayLike, *, out: Array | None = None) -> Array: ...
