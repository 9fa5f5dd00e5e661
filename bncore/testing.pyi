from collections.abc import Callable, Sequence
from typing import Any

def gradcheck(
    function: Callable[..., tuple[Any, Callable[[Any], Any]]],
    inputs: Sequence[Any],
    *,
    step: float = 1e-6,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    elements: int = 100,
    directions: int = 3,
    seed: int = 0,
) -> float: ...
