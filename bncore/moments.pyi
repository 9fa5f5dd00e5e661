import numpy as np
from numpy.typing import ArrayLike, NDArray

class Moments:
    count: NDArray[np.float64]
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]
    mean_lo: NDArray[np.float64]
    def __init__(
        self,
        count: ArrayLike = 0.0,
        mean: ArrayLike = 0.0,
        m2: ArrayLike = 0.0,
        mean_lo: ArrayLike = 0.0,
    ) -> None: ...
    def var(self, ddof: float = 0) -> NDArray[np.float64]: ...
    def __add__(self, other: Moments) -> Moments: ...
