"""The functions of the compiled kernel modules, the same in every tier, as types.

Each tier's ``statistics`` is a `Statistics`, and so on; so is `bncore.reference`, which says what
the functions do, and declines every ``*_plain``. Values are ``(N, C, S)`` arrays, weights
``(N, S)``, everything per channel float64.
"""

from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bncore._weights import Weights

Values: TypeAlias = NDArray[Any]
Doubles: TypeAlias = NDArray[np.float64]
Parameter: TypeAlias = NDArray[Any]
Bits: TypeAlias = NDArray[np.uint8]
Activation: TypeAlias = tuple[int, float, float]
Running: TypeAlias = tuple[Parameter, Parameter, float, int, int]
Record: TypeAlias = tuple[Any, ...]

class Statistics(Protocol):
    def moments(
        self, x: Values, weights: Weights | None, stats: Doubles, num_threads: int
    ) -> None: ...
    def moments_plain(
        self, x: ArrayLike, axis: int | tuple[int, ...], num_threads: int
    ) -> Doubles | None: ...
    def movable_plain(
        self, running_mean: Any, running_var: Any, out: Any, channels: int
    ) -> bool | None: ...
    def move_running_plain(
        self,
        running_mean: Parameter,
        running_var: Parameter,
        stats: Doubles,
        momentum: float,
        unbias: float,
    ) -> None: ...

class Normalization(Protocol):
    def forward(
        self,
        x: Values,
        weights: Weights | None,
        gamma: Doubles | None,
        beta: Doubles | None,
        residual: Values | None,
        activation: Activation,
        eps: float,
        y: Values,
        bits: Bits | None,
        stats: Doubles,
        num_threads: int,
    ) -> None: ...
    def forward_plain(
        self,
        x: ArrayLike,
        gamma: ArrayLike | None,
        beta: ArrayLike | None,
        residual: ArrayLike | None,
        activation: Activation,
        axis: int | tuple[int, ...],
        eps: float,
        out: Values | None,
        running: Running | None,
        num_threads: int,
    ) -> tuple[Values, Values | None, Record] | None: ...
    def normalize(
        self,
        x: Values,
        mean: Doubles,
        mean_lo: Doubles | None,
        inv_std: Doubles,
        gamma: Doubles | None,
        beta: Doubles | None,
        residual: Values | None,
        activation: Activation,
        y: Values,
        num_threads: int,
    ) -> None: ...
    def normalize_plain(
        self,
        x: ArrayLike,
        mean: ArrayLike,
        var: ArrayLike,
        gamma: ArrayLike | None,
        beta: ArrayLike | None,
        residual: ArrayLike | None,
        activation: Activation,
        axis: int | tuple[int, ...],
        eps: float,
        out: Values | None,
        num_threads: int,
    ) -> Values | None: ...
    def evaluate_plain(
        self,
        x: ArrayLike,
        mean: ArrayLike,
        var: ArrayLike,
        gamma: ArrayLike | None,
        beta: ArrayLike | None,
        residual: ArrayLike | None,
        activation: Activation,
        axis: int | tuple[int, ...],
        eps: float,
        out: Values | None,
        channels: int,
        num_threads: int,
    ) -> tuple[Values, Record] | None: ...

class Gradient(Protocol):
    def activation_backward(
        self,
        dy: Values,
        x: Values,
        weights: Weights | None,
        mean: Doubles,
        mean_lo: Doubles | None,
        inv_std: Doubles,
        gamma: Doubles | None,
        beta: Doubles | None,
        residual: Values | None,
        bits: Bits | None,
        activation: Activation,
        dz: Values,
        num_threads: int,
    ) -> None: ...
    def reduce(
        self,
        dy: Values,
        x: Values,
        mean: Doubles,
        mean_lo: Doubles | None,
        inv_std: Doubles,
        slope: float,
        sums: Doubles,
        num_threads: int,
    ) -> None: ...
    def reduce_plain(
        self,
        dy: ArrayLike,
        x: ArrayLike,
        mean: ArrayLike,
        mean_lo: ArrayLike | None,
        inv_std: ArrayLike,
        axis: int | tuple[int, ...],
        num_threads: int,
    ) -> Doubles | None: ...
    def apply(
        self,
        dy: Values,
        x: Values,
        mean: Doubles,
        mean_lo: Doubles | None,
        inv_std: Doubles,
        gamma: Doubles | None,
        slope: float,
        sums: Doubles,
        count: float,
        dx: Values,
        num_threads: int,
    ) -> None: ...
    def apply_plain(
        self,
        dy: ArrayLike,
        x: ArrayLike,
        mean: ArrayLike,
        mean_lo: ArrayLike | None,
        inv_std: ArrayLike,
        gamma: ArrayLike | None,
        sum_dy: ArrayLike,
        sum_dy_xhat: ArrayLike,
        count: ArrayLike,
        axis: int | tuple[int, ...],
        out: Values | None,
        num_threads: int,
    ) -> Values | None: ...
    def fixed_backward(
        self,
        dy: Values,
        x: Values,
        mean: Doubles,
        inv_std: Doubles,
        gamma: Doubles | None,
        beta: Doubles | None,
        activation: Activation,
        dx: Values | None,
        sums: Doubles | None,
        num_threads: int,
    ) -> None: ...
    def fixed_backward_plain(
        self,
        dy: ArrayLike,
        x: ArrayLike,
        mean: ArrayLike,
        var: ArrayLike,
        gamma: ArrayLike | None,
        beta: ArrayLike | None,
        activation: Activation,
        axis: int | tuple[int, ...],
        eps: float,
        summing: bool,
        out: Values | None,
        num_threads: int,
    ) -> tuple[Values, Parameter | None, Parameter | None, bool] | None: ...
    def backward(
        self,
        dy: Values,
        x: Values,
        weights: Weights | None,
        stats: Doubles,
        gamma: Doubles | None,
        beta: Doubles | None,
        bits: Bits | None,
        activation: Activation,
        count: float,
        dx: Values | None,
        dz: Values | None,
        sums: Doubles,
        num_threads: int,
    ) -> None: ...
    def backward_plain(
        self,
        dy: ArrayLike,
        x: Values,
        record: Record,
        with_dx: bool,
        with_sums: bool,
        with_dz: bool,
        out: Values | None,
        num_threads: int,
    ) -> tuple[Values | None, Parameter | None, Parameter | None, Values | None, bool] | None: ...

class Yardstick(Protocol):
    def copy(
        self, x: Values, out: Values, stream: bool, num_threads: int, times: int = 1
    ) -> None: ...
    def triad(
        self, x: Values, y: Values, out: Values, stream: bool, num_threads: int, times: int = 1
    ) -> None: ...
