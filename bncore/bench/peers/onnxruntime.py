"""ONNX Runtime: a model of one BatchNormalization node, its arrays bound before the run."""

from __future__ import annotations

import numpy as np

from bncore.bench.peers import EPS, Task, Unsupported, channels_second, data, looped
from bncore.bench.workloads import Case


class Peer:
    def __init__(self, threads: int):
        import onnx
        import onnxruntime

        self.onnx, self.runtime, self.threads = onnx, onnxruntime, threads
        self.version = onnxruntime.__version__

    def prepare(self, case: Case) -> Task:
        if case.direction != "inference":
            raise Unsupported("is for inference")
        arrays = data(case)
        # The operator has its channels second: channels-last data are (N H W, C) to it.
        shape = (-1, case.channels) if case.layout == "channels_last" else case.shape
        x = arrays.x.reshape(shape)
        session = self.session(arrays, x)
        binding = session.io_binding()
        value = self.runtime.OrtValue.ortvalue_from_numpy
        binding.bind_ortvalue_input("x", value(x))
        run = session.run_with_iobinding
        if case.output == "out":
            binding.bind_ortvalue_output("y", value(np.empty_like(x)))
            call = lambda: run(binding)  # noqa: E731
        else:

            def call():
                binding.bind_output("y")
                run(binding)

        def result():
            call()
            y = binding.copy_outputs_to_cpu()[0].reshape(case.array_shape)
            return channels_second(y, case)

        return Task(run=looped(call), result=result)

    def session(self, arrays, x):
        helper, to_array = self.onnx.helper, self.onnx.numpy_helper.from_array
        names = ("gamma", "beta", "mean", "var")
        element = helper.np_dtype_to_tensor_dtype(x.dtype)
        graph = helper.make_graph(
            [helper.make_node("BatchNormalization", ["x", *names], ["y"], epsilon=EPS)],
            "batch_norm",
            [helper.make_tensor_value_info("x", element, x.shape)],
            [helper.make_tensor_value_info("y", element, x.shape)],
            [to_array(getattr(arrays, name), name) for name in names],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=10)
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        return self.runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
