"""The layer that keeps y instead of x: gradients as autograd's, and no memory for them."""

import copy
import tracemalloc
import weakref

import numpy as np
import pytest

import bncore

from .arrays import bits, in_layout, normal
from .torch_oracle import batch_norm as torch_batch_norm

ACTIVATIONS = [None, ("leaky_relu", 0.01), ("leaky_relu", 0.5), ("leaky_relu", 3.0)]
SHAPES = [(12, 5), (4, 5, 3), (3, 5, 4, 2)]
LAYOUTS = ["C", "F", "channels_last", "sliced", "reversed", "unaligned"]
TOLERANCE = {"float64": 1e-12, "float32": 4e-6, "float16": 4e-3, "bfloat16": 3e-2}
"""Of dx beside the largest of a channel, where beta is no larger than gamma."""


def dtype_of(name):
    return pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else np.dtype(name)


def layer_of(channels=5, **given):
    """A layer with scales of both signs."""
    layer = bncore.InPlaceBatchNorm(channels, **{"dtype": np.float64} | given)
    if layer.affine:
        layer.gamma[...] = np.linspace(0.5, 2, layer.gamma.size).reshape(layer.shape)
        layer.gamma.reshape(-1)[::2] *= -1
        layer.beta[...] = np.linspace(-0.5, 0.5, layer.beta.size).reshape(layer.shape)
    return layer


def check(layer, x, dy, tolerance, **fixed):
    """A call and its gradient against autograd in float64."""
    expected = torch_batch_norm(
        x, dy, layer.gamma, layer.beta, axis=layer.axis, activation=layer.activation, **fixed
    )
    y = layer(x)
    assert y is x
    dx = layer.backward(dy)
    assert dx.dtype == x.dtype and dx.shape == x.shape
    for ours, theirs in (
        (y, expected.y),
        (dx, expected.dx),
        (layer.grad_gamma, expected.dgamma),
        (layer.grad_beta, expected.dbeta),
    ):
        if theirs is not None:
            size = np.abs(theirs).max() + 1
            np.testing.assert_allclose(ours.astype(float), theirs, atol=tolerance * size, rtol=0)


class TestGradients:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
    def test_layouts(self, backend, activation, shape, layout):
        for dtype in ("float64", "float32"):
            x = in_layout(normal(1, shape, dtype) * 2 + 3, layout)
            dy = in_layout(normal(2, shape, dtype), layout)
            check(layer_of(activation=activation), x, dy, TOLERANCE[dtype])

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
    @pytest.mark.parametrize("axis", [1, -1, (0, 2)])
    def test_types_and_axes(self, backend, axis, activation, dtype):
        x, dy = (normal(seed, (5, 6, 5), dtype_of(dtype)) for seed in (1, 2))
        channels = {1: 6, -1: 5, (0, 2): (5, 5)}[axis]
        layer = layer_of(channels, axis=axis, activation=activation)
        check(layer, x, dy, TOLERANCE[dtype])

    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
    @pytest.mark.parametrize("affine", [True, False])
    def test_evaluation(self, backend, activation, affine):
        layer = layer_of(activation=activation, affine=affine)
        for seed in range(3):
            layer(normal(seed, (8, 5, 2)) * 3 + seed)
        before = bits(*layer.state_dict().values())
        fixed = {"mean": layer.running_mean.copy(), "var": layer.running_var.copy()}
        check(layer.eval(), normal(5, (4, 5, 3)), normal(6, (4, 5, 3)), 1e-12, **fixed)
        assert bits(*layer.state_dict().values()) == before

    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
    @pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
    @pytest.mark.parametrize("axis", [1, -1])
    def test_many_values(self, backend, axis, dtype, activation):
        """Enough for several threads, and for results past the cache."""
        shape = (24, 5, 33, 37) if axis == 1 else (24, 33, 37, 5)
        x, dy = (normal(seed, shape, dtype) for seed in (1, 2))
        layer = layer_of(axis=axis, activation=activation)
        layer.beta[...] = 0
        check(layer, x, dy, TOLERANCE[dtype])

    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
    def test_the_number_of_threads_changes_no_bit(self, backend, activation):
        x, dy = (normal(seed, (24, 5, 33, 37), np.float32) for seed in (1, 2))

        def run(threads):
            bncore.set_num_threads(threads)
            layer = layer_of(activation=activation)
            layer(x.copy())
            return bits(layer.backward(dy), layer.grad_gamma, layer.grad_beta)

        before = bncore.get_num_threads()
        try:
            assert run(1) == run(2) == run(3) == run(7)
        finally:
            bncore.set_num_threads(before)

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_a_network_of_two_is_one_of_ordinary_layers(self, backend, dtype):
        given = {"activation": ("leaky_relu", 0.1), "dtype": dtype}
        ours = [bncore.InPlaceBatchNorm(5, **given) for _ in range(2)]
        plain = [bncore.BatchNorm(5, **given) for _ in range(2)]
        x, dy = normal(1, (32, 5), dtype), normal(2, (32, 5), dtype)
        expected = plain[1](np.array(plain[0](x)) * 2)
        y = ours[1](ours[0](x.copy()) * 2)
        assert bits(y) == bits(expected)
        dx = ours[0].backward(ours[1].backward(dy) * 2)
        expected = plain[0].backward(plain[1].backward(dy) * 2)
        np.testing.assert_allclose(
            dx.astype(float), expected.astype(float), atol=10 * TOLERANCE[dtype]
        )

    def test_an_empty_batch(self, backend):
        layer = layer_of(activation=("leaky_relu", 0.1))
        before = bits(*layer.state_dict().values())
        assert layer(np.empty((0, 5, 2))).shape == (0, 5, 2)
        assert layer.backward(np.empty((0, 5, 2))).shape == (0, 5, 2)
        assert bits(*layer.state_dict().values()) == before
        assert not layer.grad_gamma.any() and not layer.grad_beta.any()

    def test_a_bad_value_stays_in_its_channel(self, backend):
        layer, x, dy = (
            layer_of(activation=("leaky_relu", 0.1)),
            normal(1, (8, 5)),
            normal(2, (8, 5)),
        )
        layer(x.copy())
        expected = layer.backward(dy)
        x[3, 2] = np.nan
        layer(x)
        dx = layer.backward(dy)
        others = [0, 1, 3, 4]
        assert bits(dx[:, others]) == bits(expected[:, others]) and np.isnan(dx[:, 2]).all()


class TestRounding:
    """At the limit of what is allowed dx is as right as documented."""

    LIMIT = {"float64": 2.0**20, "float32": 2.0**8, "float16": 2.0**3, "bfloat16": 2.0**3}
    ERROR = {"float64": 1e-10, "float32": 2e-5, "float16": 2.0**-9, "bfloat16": 2.0**-6}

    @pytest.mark.parametrize("dtype", LIMIT)
    @pytest.mark.parametrize("activation", [None, ("leaky_relu", 0.1)], ids=str)
    @pytest.mark.parametrize("along_x", [False, True])
    def test_at_the_limit(self, backend, dtype, activation, along_x):
        layer = layer_of(activation=activation)
        layer.beta[...] = 0.999 * (self.LIMIT[dtype] - 1) * np.abs(layer.gamma)
        x = normal(1, (200, 5), dtype_of(dtype))
        dy = x.copy() if along_x else normal(2, (200, 5), dtype_of(dtype))
        wide = x.astype(np.float64), dy.astype(np.float64)
        y, saved = bncore.batch_norm(wide[0], layer.gamma, layer.beta, activation=activation)
        expected = bncore.batch_norm_backward(wide[1], saved)
        layer(x)
        size = np.abs(layer.gamma) * saved.inv_std * np.abs(wide[1]).max(0)
        error = np.abs(layer.backward(dy) - expected.dx) / size
        assert error.max() < self.ERROR[dtype]

    @pytest.mark.parametrize("dtype", LIMIT)
    def test_beyond_the_limit(self, backend, dtype):
        layer, x = layer_of(), normal(1, (8, 5), dtype_of(dtype))
        layer.beta[3] = 1.001 * (self.LIMIT[dtype] - 1) * abs(layer.gamma[3])
        before = bits(x, *layer.state_dict().values())
        with pytest.raises(ValueError, match=rf"gamma must .* in {dtype}; .* in channel 3$"):
            layer(x)
        assert bits(x, *layer.state_dict().values()) == before

    @pytest.mark.parametrize(
        ("dtype", "smallest"),
        [("float16", 2.0**-14), ("float32", 2.0**-126), ("float64", 2.0**-500)],
    )
    @pytest.mark.parametrize("slope", [None, 2.0**-3, 4.0])
    def test_the_smallest_gamma(self, backend, dtype, smallest, slope):
        layer = layer_of(1, activation=None if slope is None else ("leaky_relu", slope))
        layer.beta[...], layer.gamma[...] = 0, smallest / min(slope or 1, 1)
        x, dy = normal(1, (50, 1), dtype), normal(2, (50, 1), dtype)
        y, saved = bncore.batch_norm(
            x.astype(float), layer.gamma, activation=layer.activation, eps=layer.eps
        )
        expected = bncore.batch_norm_backward(dy.astype(float), saved)
        layer(x.copy())
        dx = layer.backward(dy)
        if dtype != "float16":  # dx of this size has few digits of it
            size = np.abs(expected.dx).max()
            np.testing.assert_allclose(dx, expected.dx, atol=TOLERANCE[dtype] * size, rtol=0)
        np.testing.assert_allclose(
            layer.grad_gamma, expected.dgamma, rtol=0, atol=10 * TOLERANCE[dtype]
        )
        layer.gamma *= 0.99
        with pytest.raises(ValueError, match="gamma must be at least"):
            layer(x)

    @pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, 1e200])
    def test_gamma_without_an_inverse(self, backend, bad):
        layer, x = layer_of((2, 9), axis=(0, 1)), normal(1, (2, 9, 4))
        layer.gamma[...] = bad
        with pytest.raises(ValueError, match=r"in channels \(0, 0\), .*\(0, 7\), \.\.\.$"):
            layer(x)
        assert bits(x) == bits(normal(1, (2, 9, 4)))

    def test_evaluation_is_refused_its_gradient_alone(self, backend):
        layer, x, dy = layer_of().eval(), normal(1, (8, 5)), normal(2, (8, 5))
        layer.gamma[2] = 0
        expected = bncore.batch_norm_inference(x, np.zeros(5), np.ones(5), layer.gamma, layer.beta)
        assert bits(layer(x)) == bits(expected)
        before = bits(x, dy)
        with pytest.raises(ValueError, match="gamma must .* in channel 2$"):
            layer.backward(dy, out=dy)
        assert bits(x, dy) == before and layer.grad_gamma is None


class TestInPlace:
    @pytest.mark.parametrize("activation", [None, ("leaky_relu", 0.1)], ids=str)
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("dtype", ["float64", "float16"])
    @pytest.mark.parametrize("layout", ["C", "F", "channels_last", "reversed"])
    def test_where_dx_goes(self, backend, activation, training, dtype, layout):
        layer = layer_of(activation=activation).train(training)
        x, dy = (in_layout(normal(seed, (6, 5, 4), dtype), layout) for seed in (1, 2))
        y = layer(x)
        before = bits(dy, y)
        dx = layer.backward(dy)
        assert bits(dy, y) == before and not np.shares_memory(dx, dy)
        out = np.empty_like(x)
        assert layer.backward(dy, out=out) is out and bits(out) == bits(dx)
        over = dy.copy(order="K")
        assert layer.backward(over, out=over) is over and bits(over) == bits(dx)
        assert bits(layer.backward(dy)) == bits(dx)
        assert layer.backward(dy, out=y) is y and bits(y) == bits(dx)
        with pytest.raises(ValueError, match="backward needs a call of the layer before it"):
            layer.backward(dy)

    @pytest.mark.parametrize("wrt", ["x", "gamma", ("beta", "x"), ("gamma", "beta")])
    @pytest.mark.parametrize("training", [True, False])
    def test_a_choice_of_gradients(self, backend, training, wrt):
        layer = layer_of(activation=("leaky_relu", 0.1)).train(training)
        y, dy = layer(normal(1, (6, 5, 4))), normal(2, (6, 5, 4))
        found = layer.backward(dy, wrt=wrt), layer.grad_gamma, layer.grad_beta
        every = layer.backward(dy), layer.grad_gamma, layer.grad_beta
        for name, some, all_ in zip(("x", "gamma", "beta"), found, every, strict=True):
            assert bits(some) == bits(all_ if name in np.atleast_1d(wrt) else None)
        with pytest.raises(ValueError, match="wrt must be of 'x', 'gamma', 'beta', got 'residual'"):
            layer.backward(dy, wrt="residual")
        with pytest.raises(ValueError, match="out takes dx, which wrt does not ask for"):
            layer.backward(dy, wrt="gamma", out=y)

    def test_what_is_kept_is_y(self, backend):
        layer = layer_of(activation=("leaky_relu", 0.1))
        x = normal(1, (64, 5, 50))
        held = weakref.ref(x)
        layer(x)
        kept = [part for part in layer._forward if isinstance(part, np.ndarray)]
        assert sum(part is x for part in kept) == 1
        assert all(part is x or part.size == 5 for part in kept)
        del x, kept
        assert held() is not None
        layer(normal(2, (2, 5)))
        assert held() is None

    @pytest.mark.parametrize("activation", [None, ("leaky_relu", 0.1)], ids=str)
    @pytest.mark.parametrize("layout", ["C", "F", "channels_last"])
    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_no_array_of_x_s_size_is_made(self, backend, activation, layout, dtype):
        if backend.name == "numpy":
            pytest.skip("NumPy computes in float64 arrays of its own")
        layer = layer_of(64, activation=activation)
        x, dy = (in_layout(np.zeros((16, 64, 80, 80), dtype), layout) for _ in range(2))
        x[::2] = 1
        layer(x)
        layer.backward(dy, out=dy)
        tracemalloc.start()
        try:
            layer(x)
            _, forward = tracemalloc.get_traced_memory()
            layer.backward(dy, out=dy)
            _, whole = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert forward < x.nbytes / 50
        assert whole < x.nbytes / 50

    def test_a_changed_y_is_another_gradient(self, backend):
        layer, x, dy = layer_of(), normal(1, (8, 5)), normal(2, (8, 5))
        y = layer(x)
        expected = layer.backward(dy)
        y[...] = 0
        assert bits(layer.backward(dy)) != bits(expected)

    def test_parameters_are_those_of_the_call(self, backend):
        layer, x, dy = (
            layer_of(activation=("leaky_relu", 0.1)),
            normal(1, (8, 5)),
            normal(2, (8, 5)),
        )
        layer(x)
        expected = layer.backward(dy)
        layer.gamma *= 3
        layer.beta += 1
        layer.activation = None
        assert bits(layer.backward(dy)) == bits(expected)

    def test_deep_copies_are_apart(self, backend):
        layer, x = layer_of(), normal(1, (8, 5))
        layer(x)
        other = copy.deepcopy(layer)
        expected = layer.backward(normal(2, (8, 5)))
        x[...] = 0
        assert bits(other.backward(normal(2, (8, 5)))) == bits(expected)


class TestState:
    def test_moves_as_the_ordinary_layer_s(self, backend):
        for given in ({}, {"ddof": 0, "momentum": None}, bncore.presets["keras"]):
            ours = bncore.InPlaceBatchNorm(5, **given)
            plain = bncore.BatchNorm(5, **given)
            for seed in range(5):
                x = normal(seed, (6, 5), np.float32)
                expected = plain(x)
                assert bits(ours(x)) == bits(expected)
            for key, value in plain.state_dict().items():
                assert bits(ours.state_dict()[key]) == bits(value)

    def test_policies(self, backend):
        layer = layer_of(single_value="zero", nan_policy="skip")
        x = normal(1, (1, 5))
        np.testing.assert_array_equal(layer(x)[0], layer.beta)
        assert not layer.backward(np.ones((1, 5))).any()
        assert layer.num_batches_tracked == 1
        layer(np.full((3, 5), np.nan))
        with layer.no_update():
            layer(normal(2, (3, 5)))
        assert layer.num_batches_tracked == 1
        layer.single_value = "running"
        x = normal(3, (1, 5))
        fixed = layer.running_mean, layer.running_var, layer.gamma, layer.beta
        expected = bncore.batch_norm_inference(x, *fixed)
        assert bits(layer(x)) == bits(expected) and layer.num_batches_tracked == 1
        layer.single_value = "raise"
        with pytest.raises(ValueError, match="x must have more than 1 value per channel"):
            layer(x)
        assert bits(x) == bits(expected)

    def test_without_running_statistics(self, backend):
        layer, x = layer_of(track_running_stats=False).eval(), normal(1, (8, 5))
        expected, _ = bncore.batch_norm(x, layer.gamma, layer.beta)
        assert bits(layer(x)) == bits(expected)

    def test_repr(self):
        assert repr(bncore.InPlaceBatchNorm(3)).startswith("InPlaceBatchNorm(3, axis=1, eps=1e-05")


def read_only(x):
    x.flags.writeable = False
    return x


class TestErrors:
    @pytest.mark.parametrize(
        "activation", ["relu", ("clip", 0, 6), ("leaky_relu", 0.0), ("leaky_relu", -0.1)]
    )
    def test_what_has_no_inverse(self, backend, activation):
        with pytest.raises(ValueError, match="activation must be None or .* slope between"):
            bncore.InPlaceBatchNorm(5, activation=activation)
        layer, x = layer_of(), normal(1, (8, 5))
        layer.activation = activation
        with pytest.raises(ValueError, match="activation must be None or .* slope between"):
            layer(x)
        assert bits(x) == bits(normal(1, (8, 5)))

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (lambda x: x.tolist(), TypeError, "x must be an ndarray"),
            (lambda x: np.ma.array(x), TypeError, "x must be a plain array"),
            (read_only, ValueError, "x must be writeable"),
            (lambda x: np.lib.stride_tricks.as_strided(x, x.shape, (0, 8)), ValueError, "itself"),
            (lambda x: x.astype(">f8"), TypeError, "x must have dtype float64, got >f8"),
            (lambda x: x.astype(int), TypeError, "x must have dtype"),
            (lambda x: x[:, :4], ValueError, r"x must have channels \(5,\)"),
        ],
    )
    @pytest.mark.parametrize("training", [True, False])
    def test_x_that_cannot_be_overwritten(self, backend, training, change, error, message):
        layer, x = layer_of().train(training), change(normal(1, (8, 5)))
        before = bits(*layer.state_dict().values()), np.asarray(x).tobytes()
        with pytest.raises(error, match=message):
            layer(x)
        assert (bits(*layer.state_dict().values()), np.asarray(x).tobytes()) == before

    @pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var"])
    def test_x_that_holds_a_parameter(self, backend, name):
        layer, x = layer_of(), np.abs(normal(1, (8, 5))) + 1
        setattr(layer, name, x[0])
        before = bits(x)
        with pytest.raises(ValueError, match=f"share memory with {name}"):
            layer(x)
        assert bits(x) == before

    def test_dy_and_out_that_do_not_fit(self, backend):
        layer, x, dy = layer_of(), normal(1, (8, 5)), normal(2, (8, 5))
        with pytest.raises(ValueError, match="backward needs a call"):
            layer.backward(dy)
        layer(x)
        with pytest.raises(ValueError, match="dy must have x's shape"):
            layer.backward(dy[:3])
        with pytest.raises(TypeError, match="dy must have x's dtype"):
            layer.backward(dy.astype(np.float32))
        with pytest.raises(ValueError, match="out must have shape"):
            layer.backward(dy, out=np.empty((5, 8)))
        wide = np.zeros((9, 5))
        wide[:8] = dy
        with pytest.raises(ValueError, match="out overlaps dy in part"):
            layer.backward(wide[:8], out=wide[1:])
        assert layer.grad_gamma is None

    @pytest.mark.parametrize("training", [True, False])
    def test_y_keeps_its_shape_and_the_axis_is_the_call_s(self, backend, training):
        layer, x, dy = layer_of().train(training), normal(1, (8, 5)), normal(2, (8, 5))
        layer(x)
        expected = bits(layer.backward(dy), layer.grad_gamma)
        layer.axis = 0
        assert bits(layer.backward(dy), layer.grad_gamma) == expected
        x.resize((5, 8), refcheck=False)
        with pytest.raises(ValueError, match=r"^y must keep its shape \(8, 5\) until"):
            layer.backward(normal(2, (5, 8)))

    @pytest.mark.parametrize("name", ["gamma", "beta"])
    def test_dx_over_a_parameter(self, backend, name):
        layer, x = layer_of(1), normal(1, (8, 1))
        memory = np.ones(8)
        setattr(layer, name, memory[:1])
        layer(x)
        with pytest.raises(ValueError, match=f"out must not share memory with {name}"):
            layer.backward(normal(2, (8, 1)), out=memory.reshape(8, 1))
        assert (memory == 1).all()

    def test_evaluation_needs_running_statistics(self):
        layer = layer_of().eval()
        layer.running_mean = None
        with pytest.raises(TypeError, match="running_mean"):
            layer(normal(1, (8, 5)))
