"""PyTorch: its native CPU kernels, called as its own layers call them.

Its backward pass and its layers have no ``out=`` and always give fresh arrays.
"""

from __future__ import annotations

from bncore.bench.peers import EPS, Data, Task, channels_second, data, looped
from bncore.bench.workloads import Case


class Peer:
    def __init__(self, threads: int):
        import torch

        self.torch = torch
        torch.set_num_threads(threads)
        # No graph is recorded: forward and backward are measured apart.
        torch.inference_mode(True).__enter__()
        self.version = torch.__version__

    def prepare(self, case: Case) -> Task:
        arrays = data(case)
        call = getattr(self, case.direction)(arrays, case)
        return Task(run=looped(call), result=lambda: call().numpy())

    def tensors(self, case: Case, *arrays):
        """Tensors of shape (N, C, ...) over the arrays' memory.

        In the channels_last format where that is the layout; 1-D data become 2-D ones, which have
        such a format.
        """
        tensors = [self.torch.from_numpy(channels_second(array, case)) for array in arrays]
        if case.layout == "channels_last" and len(case.shape) == 3:
            return [tensor.unsqueeze(-1) for tensor in tensors]
        return tensors

    def parameters(self, *arrays):
        return [self.torch.from_numpy(array) for array in arrays]

    def forward(self, arrays: Data, case: Case):
        native = self.torch.native_batch_norm
        [x] = self.tensors(case, arrays.x)
        given = x, *self.parameters(arrays.gamma, arrays.beta), None, None, True, 0.1, EPS
        if case.output == "fresh":
            return lambda: native(*given)[0]
        out = native(*given)
        return lambda: native(*given, out=out)[0]

    def backward(self, arrays: Data, case: Case):
        x, dy = self.tensors(case, arrays.x, arrays.dy)
        gamma, beta = self.parameters(arrays.gamma, arrays.beta)
        _, mean, inv_std = self.torch.native_batch_norm(x, gamma, beta, None, None, True, 0.1, EPS)
        native = self.torch.ops.aten.native_batch_norm_backward.default
        given = dy, x, gamma, None, None, mean, inv_std, True, EPS, [True, True, True]
        return lambda: native(*given)[0]

    def inference(self, arrays: Data, case: Case):
        [x] = self.tensors(case, arrays.x)
        gamma, beta, mean, var = self.parameters(arrays.gamma, arrays.beta, arrays.mean, arrays.var)
        if case.output == "fresh":
            batch_norm = self.torch.nn.functional.batch_norm
            return lambda: batch_norm(x, mean, var, gamma, beta, False, 0.0, EPS)
        native = self.torch.native_batch_norm
        given = x, gamma, beta, mean, var, False, 0.0, EPS
        out = native(*given)
        return lambda: native(*given, out=out)[0]

    def layer(self, arrays: Data, case: Case):
        [x] = self.tensors(case, arrays.x)
        nn = self.torch.nn
        kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
        layer = kind[x.ndim](case.channels, eps=EPS, dtype=x.dtype)
        layer.weight.data, layer.bias.data = self.parameters(arrays.gamma, arrays.beta)
        layer.requires_grad_(False).train()
        return lambda: layer(x)
