"""Plain NumPy: the formulas as one writes them, in the dtype of the data."""

from __future__ import annotations

import numpy as np

from bncore.bench.peers import EPS, Task, Unsupported, channels_second, data, looped
from bncore.bench.workloads import Case


class Peer:
    def __init__(self, threads: int):
        self.version = np.__version__

    def prepare(self, case: Case) -> Task:
        if case.direction == "layer":
            raise Unsupported("has no layers")
        arrays = data(case)
        x, dy = arrays.x, arrays.dy
        axes = tuple(i for i in range(x.ndim) if i != case.axis % x.ndim)
        per_channel = [1] * x.ndim
        per_channel[case.axis] = case.channels
        gamma, beta, mean, var = (
            p.reshape(per_channel) for p in (arrays.gamma, arrays.beta, arrays.mean, arrays.var)
        )
        out = np.empty_like(x) if case.output == "out" else None

        def normalize(mean, var):
            y = np.subtract(x, mean, out=out)
            y *= gamma / np.sqrt(var + EPS)
            y += beta
            return y

        def statistics():
            return x.mean(axes, keepdims=True), x.var(axes, keepdims=True)

        if case.direction == "forward":
            call = lambda: normalize(*statistics())  # noqa: E731
        elif case.direction == "inference":
            call = lambda: normalize(mean, var)  # noqa: E731
        else:
            mean, var = statistics()
            inv_std = 1 / np.sqrt(var + EPS)
            xhat = (x - mean) * inv_std

            def call():
                dbeta = dy.mean(axes, keepdims=True)
                dgamma = (dy * xhat).mean(axes, keepdims=True)
                dx = np.multiply(xhat, -dgamma, out=out)
                dx += dy
                dx -= dbeta
                dx *= gamma * inv_std
                return dx

        return Task(run=looped(call), result=lambda: channels_second(call(), case))
