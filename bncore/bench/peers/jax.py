"""JAX: batch norm as its textbooks write it, compiled by ``jax.jit``."""

from __future__ import annotations

from bncore.bench.peers import EPS, Task, Unsupported, channels_second, data, looped
from bncore.bench.workloads import Case


class Peer:
    def __init__(self, threads: int):
        # XLA starts as many threads as the process has CPUs.
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_x64", True)
        self.jax = jax
        self.version = jax.__version__

    def prepare(self, case: Case) -> Task:
        if case.direction == "layer":
            raise Unsupported("has no layers")
        jax, arrays = self.jax, data(case)
        x, dy, *parameters = (jax.device_put(array) for array in vars(arrays).values())
        gamma, beta, mean, var = parameters
        axes = tuple(i for i in range(x.ndim) if i != case.axis % x.ndim)
        per_channel = [1] * x.ndim
        per_channel[case.axis] = case.channels

        def normalize(x, mean, var, gamma, beta):
            mean, var, gamma, beta = (p.reshape(per_channel) for p in (mean, var, gamma, beta))
            return (x - mean) * jax.lax.rsqrt(var + EPS) * gamma + beta

        def batch_norm(x, gamma, beta):
            return normalize(x, x.mean(axes), x.var(axes), gamma, beta)

        def training(x, gamma, beta):
            mean, var = x.mean(axes), x.var(axes)
            return normalize(x, mean, var, gamma, beta), mean, var

        if case.direction == "forward":
            function, given = training, (x, gamma, beta)
        elif case.direction == "inference":
            function, given = normalize, (x, mean, var, gamma, beta)
        else:
            _, pullback = jax.jit(lambda *given: jax.vjp(batch_norm, *given))(x, gamma, beta)
            function, given = lambda pullback, dy: pullback(dy), (pullback, dy)
        call = self.into if case.output == "out" else self.fresh
        call = call(function, given, x)
        return Task(
            run=looped(call),
            result=lambda: channels_second(self.as_array(call()), case),
        )

    def fresh(self, function, given, x):
        jax = self.jax
        compiled = jax.jit(function).lower(*given).compile()
        return lambda: jax.block_until_ready(compiled(*given))

    def into(self, function, given, x):
        """JAX's out=: a donated array, whose memory the result of the same shape takes over."""
        jax = self.jax
        compiled = (
            jax.jit(lambda out, *given: function(*given), donate_argnums=0, keep_unused=True)
            .lower(x, *given)
            .compile()
        )
        out = jax.numpy.zeros_like(x)

        def call():
            nonlocal out
            result = jax.block_until_ready(compiled(out, *given))
            out = result[0] if isinstance(result, (tuple, list)) else result
            return result

        return call

    def as_array(self, result):
        import numpy as np

        return np.asarray(result[0] if isinstance(result, (tuple, list)) else result)
