"""bncore itself, and in its process the memory's limit: copy and triad over the same arrays."""

from __future__ import annotations

import importlib
import time

import numpy as np

from bncore.bench.peers import EPS, Data, Task, channels_second, data, looped
from bncore.bench.workloads import Case

SMALL_BYTES = 1 << 20
"""Below this one thread may pass over an array faster than a team."""


class Peer:
    def __init__(self, threads: int):
        import bncore

        self.bncore = bncore
        self.threads = threads
        bncore.set_num_threads(threads)
        self.version = f"{bncore.__version__} ({bncore.backend()})"

    def prepare(self, case: Case) -> Task:
        arrays = data(case)
        out = np.empty_like(arrays.x)
        call = getattr(self, case.direction)(arrays, case.axis, out, case.output == "out")
        return Task(
            run=looped(call),
            result=lambda: channels_second(call(), case),
            limits=self.limits(case, arrays, out),
        )

    def forward(self, arrays: Data, axis: int, out, into: bool):
        batch_norm, x, gamma, beta = self.bncore.batch_norm, arrays.x, arrays.gamma, arrays.beta
        if into:
            return lambda: batch_norm(x, gamma, beta, axis=axis, eps=EPS, out=out)[0]
        return lambda: batch_norm(x, gamma, beta, axis=axis, eps=EPS)[0]

    def backward(self, arrays: Data, axis: int, out, into: bool):
        _, saved = self.bncore.batch_norm(
            arrays.x, arrays.gamma, arrays.beta, axis=axis, eps=EPS, out=out
        )
        backward, dy = self.bncore.batch_norm_backward, arrays.dy
        if into:
            return lambda: backward(dy, saved, out=out).dx
        return lambda: backward(dy, saved).dx

    def inference(self, arrays: Data, axis: int, out, into: bool):
        inference = self.bncore.batch_norm_inference
        given = arrays.x, arrays.mean, arrays.var, arrays.gamma, arrays.beta
        if into:
            return lambda: inference(*given, axis=axis, eps=EPS, out=out)
        return lambda: inference(*given, axis=axis, eps=EPS)

    def layer(self, arrays: Data, axis: int, out, into: bool):
        layer = self.bncore.BatchNorm(len(arrays.gamma), axis=axis, eps=EPS, dtype=arrays.x.dtype)
        layer.gamma[:], layer.beta[:] = arrays.gamma, arrays.beta
        x = arrays.x
        if into:
            return lambda: layer(x, out=out)
        return lambda: layer(x)

    def limits(self, case: Case, arrays: Data, out):
        """With stores past the caches and plain ones; small arrays also by one thread."""
        tier = self.bncore.backend().replace("-", "_")
        try:
            yardstick = importlib.import_module(f"bncore._kernels.{tier}.yardstick")
        except ImportError:
            return ()
        if case.direction == "backward":
            measure, inputs = yardstick.triad, (arrays.dy, arrays.x)
        else:
            measure, inputs = yardstick.copy, (arrays.x,)
        flat = [array.reshape(-1) for array in (*inputs, out)]
        teams = {1, self.threads} if case.tensor_bytes < SMALL_BYTES else {self.threads}

        def limit(stream, threads):
            def run(calls):
                start = time.perf_counter()
                measure(*flat, stream, threads, calls)
                return time.perf_counter() - start

            return run

        return tuple(limit(stream, team) for stream in (True, False) for team in teams)
