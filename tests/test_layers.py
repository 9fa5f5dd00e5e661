"""The layers: running statistics, modes, state, and PyTorch's conventions."""

import copy
import pickle

import numpy as np
import pytest

import bncore

from .arrays import bits, normal
from .torch_oracle import batch_norm as torch_batch_norm
from .torch_oracle import import_torch

KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def state_bits(layer):
    """Everything a call could change, bit by bit."""
    arrays = [np.asarray(value) for value in layer.state_dict().values()]
    return bits(*arrays), layer.training, bits(layer.grad_gamma, layer.grad_beta)


def batch(seed, dtype=np.float64):
    """Batches whose size, mean and spread change with the seed."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(2, 9)), 5, int(rng.integers(1, 6)))
    return (rng.standard_normal(shape) * (1 + seed) + seed).astype(dtype)


class TestRunningStatistics:
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
    def test_fifty_steps_are_torchs(self, backend, momentum, dtype):
        torch = import_torch()
        layer = bncore.BatchNorm1d(5, momentum=momentum, dtype=dtype)
        peer = torch.nn.BatchNorm1d(5, momentum=momentum, dtype=torch.float64)
        tolerance = {"float32": 2e-6, "float64": 1e-12}[dtype]
        for step in range(50):
            layer(batch(step))
            peer(torch.tensor(batch(step)))
            for ours, theirs in (
                (layer.running_mean, peer.running_mean),
                (layer.running_var, peer.running_var),
            ):
                np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
            assert layer.num_batches_tracked == int(peer.num_batches_tracked) == step + 1
        np.testing.assert_allclose(
            layer.eval()(batch(99)), peer.eval()(torch.tensor(batch(99))).detach(), rtol=1e-4
        )

    def test_two_values_give_the_unbiased_variance(self, backend):
        layer = bncore.BatchNorm(1, momentum=1.0, dtype=np.float64)
        layer(np.array([[1.0], [3.0]]))
        assert layer.running_mean == 2.0 and layer.running_var == 2.0

    def test_the_newest_batch_has_the_weight_momentum(self, backend):
        layer = bncore.BatchNorm(1, momentum=0.25, dtype=np.float64)
        layer(np.array([[8.0], [8.0]]))
        assert layer.running_mean == 2.0 and layer.running_var == 0.75

    @pytest.mark.parametrize("momentum", [0.25, None])
    @pytest.mark.parametrize("activation", [None, "relu"])
    def test_one_call_of_a_kernel_moves_as_the_steps_do(self, backend, momentum, activation):
        at_once, by_steps = (
            bncore.BatchNorm(5, momentum=momentum, activation=activation) for _ in range(2)
        )
        for step in range(3):
            x = batch(step, np.float32)
            swapped = x.astype(x.dtype.newbyteorder())  # goes the long way
            assert bits(at_once(x)) == bits(by_steps(swapped))
            assert bits(at_once.backward(x)) == bits(by_steps.backward(x))
            assert state_bits(at_once) == state_bits(by_steps)

    def test_evaluation_moves_nothing(self, backend):
        layer = bncore.BatchNorm(5).eval()
        before = state_bits(layer)
        layer(batch(1))
        layer.backward(batch(1))
        assert state_bits(layer)[:2] == before[:2]

    def test_an_empty_batch_moves_nothing(self, backend):
        layer = bncore.BatchNorm(5)
        layer(batch(1))
        before = state_bits(layer)
        y = layer(np.empty((0, 5, 3), np.float32))
        assert y.shape == (0, 5, 3) and state_bits(layer) == before
        assert layer.backward(y).shape == (0, 5, 3)

    def test_reset(self, backend):
        layer = bncore.BatchNorm(5)
        fresh = state_bits(layer)
        layer(batch(1))
        assert state_bits(layer) != fresh
        layer.reset_running_stats()
        assert state_bits(layer) == fresh

    def test_float16_running_statistics(self, backend):
        layer = bncore.BatchNorm(5, dtype=np.float16, momentum=1.0)
        x = batch(2)
        layer(x)
        assert layer.running_mean.dtype == np.float16
        expected = x.mean((0, 2)).astype(np.float16)
        np.testing.assert_array_equal(layer.running_mean, expected)

    def test_arrays_stay_the_same_objects(self, backend):
        """An optimizer may hold on to gamma, and whoever watches to the statistics."""
        layer = bncore.BatchNorm(5)
        held = layer.gamma, layer.beta, layer.running_mean, layer.running_var
        layer(batch(1))
        layer.load_state_dict(layer.state_dict())
        layer.reset_running_stats()
        now = layer.gamma, layer.beta, layer.running_mean, layer.running_var
        assert all(a is b for a, b in zip(held, now, strict=True))


class TestModes:
    def test_training_normalizes_by_the_batch(self, backend):
        layer = bncore.BatchNorm(5)
        layer.gamma[...], layer.beta[...] = normal(1, 5), normal(2, 5)
        y, _ = bncore.batch_norm(batch(3), layer.gamma, layer.beta)
        assert layer.training and bits(layer(batch(3))) == bits(y)

    def test_evaluation_normalizes_by_the_running_statistics(self, backend):
        layer = bncore.BatchNorm(5)
        layer(batch(3))
        fixed = layer.running_mean, layer.running_var, layer.gamma, layer.beta
        expected = bncore.batch_norm_inference(batch(4), *fixed)
        assert bits(layer.eval()(batch(4))) == bits(expected)

    def test_train_and_eval_return_the_layer(self):
        layer = bncore.BatchNorm(5)
        assert layer.eval() is layer and not layer.training
        assert layer.train() is layer and layer.training
        assert layer.train(False) is layer and not layer.training

    def test_without_running_statistics_evaluation_uses_the_batchs(self, backend):
        layer = bncore.BatchNorm(5, track_running_stats=False)
        trained = layer(batch(1))
        assert bits(layer.eval()(batch(1))) == bits(trained)
        assert layer.running_mean is layer.running_var is layer.num_batches_tracked is None
        assert list(layer.state_dict()) == ["weight", "bias"]

    def test_without_affine(self, backend):
        layer = bncore.BatchNorm(5, affine=False)
        y, _ = bncore.batch_norm(batch(1))
        assert bits(layer(batch(1))) == bits(y)
        layer.backward(batch(1))
        assert layer.gamma is layer.beta is layer.grad_gamma is layer.grad_beta is None
        assert list(layer.state_dict()) == KEYS[2:]

    @pytest.mark.parametrize("activation", ["relu", ("leaky_relu", 0.1), ("clip", 0, 6)], ids=str)
    def test_activation_in_both_modes(self, backend, activation):
        layer = bncore.BatchNorm(5, activation=activation)
        y, saved = bncore.batch_norm(batch(1), layer.gamma, layer.beta, activation=activation)
        assert bits(layer(batch(1))) == bits(y)
        dx = bncore.batch_norm_backward(batch(1), saved).dx
        assert bits(layer.backward(batch(1))) == bits(dx)
        fixed = layer.running_mean, layer.running_var, layer.gamma, layer.beta
        y = bncore.batch_norm_inference(batch(2), *fixed, activation=activation)
        assert bits(layer.eval()(batch(2))) == bits(y)
        g = bncore.batch_norm_inference_backward(batch(2), batch(2), *fixed, activation=activation)
        assert bits(layer.backward(batch(2)), layer.grad_gamma) == bits(g.dx, g.dgamma)

    def test_backward_belongs_to_the_call_before_whatever_happens_between(self, backend):
        layer = bncore.BatchNorm(5).eval()
        layer(batch(1))
        expected = layer.backward(batch(1))
        layer(batch(1))
        layer.running_mean += 1
        layer.running_var *= 3
        layer.train()
        assert bits(layer.backward(batch(1))) == bits(expected)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("wrt", ["x", "beta", ("gamma", "residual"), ("x", "gamma", "beta")])
    def test_a_choice_of_gradients(self, backend, training, wrt):
        layer = bncore.BatchNorm(4, activation="relu").train(training)
        x, residual, dy = (normal(i, (6, 4, 5), np.float32) for i in range(3))
        layer(x, residual=residual)

        def gradients(**keywords):
            dx = layer.backward(dy, **keywords)
            return dx, layer.grad_gamma, layer.grad_beta, layer.grad_residual

        found = dict(zip(("x", "gamma", "beta", "residual"), gradients(wrt=wrt), strict=True))
        every = dict(zip(found, gradients(), strict=True))
        for name, gradient in found.items():
            if name in np.atleast_1d(wrt):
                np.testing.assert_allclose(gradient, every[name], rtol=1e-6, atol=1e-7)
            else:
                assert gradient is None
        before = bits(layer.grad_gamma)
        for wrong in ("mean", "dx", ()):
            with pytest.raises(ValueError, match="wrt must be of 'x', 'gamma', 'beta', 'residual'"):
                layer.backward(dy, wrt=wrong)
        assert bits(layer.grad_gamma) == before

    def test_gradients_are_replaced_not_added(self, backend):
        layer = bncore.BatchNorm(5)
        layer(batch(1))
        layer.backward(batch(1))
        first = layer.grad_gamma.copy()
        layer.backward(batch(1))
        np.testing.assert_array_equal(layer.grad_gamma, first)

    def test_in_place(self, backend):
        layer, x = bncore.BatchNorm(5), batch(1)
        expected = layer(x)
        for mode in (layer.train, layer.eval):
            mode()
            expected, y = layer(batch(1)), batch(1)
            assert layer(y, out=y) is y and bits(y) == bits(expected)
            with pytest.raises(ValueError, match=r"overwrote it \(out=x\)"):
                layer.backward(y)

    @pytest.mark.parametrize("axis", [1, -1, (1, 2), (-1, 1)])
    def test_any_axis(self, backend, axis):
        x = normal(1, (4, 3, 2, 5))
        sizes = tuple(x.shape[one] for one in sorted(np.atleast_1d(axis) % 4))
        layer = bncore.BatchNorm(sizes[0] if len(sizes) == 1 else sizes, axis=axis)
        y, saved = bncore.batch_norm(x, axis=axis)
        np.testing.assert_array_equal(layer(x), y)
        assert layer.gamma.shape == layer.running_mean.shape == sizes
        np.testing.assert_allclose(layer.running_mean, 0.1 * saved.mean, rtol=1e-6)


class TestOneValuePerChannel:
    @pytest.mark.parametrize("shape", [(1, 5), (1, 5, 1)])
    def test_training_refuses_and_stays_as_it_was(self, backend, shape):
        layer = bncore.BatchNorm1d(5)
        layer(batch(1))
        before = state_bits(layer)
        with pytest.raises(ValueError, match="x must have more than 1 value per channel"):
            layer(np.ones(shape, np.float32))
        assert state_bits(layer) == before

    def test_evaluation_takes_it(self, backend):
        assert bncore.BatchNorm1d(5).eval()(np.ones((1, 5), np.float32)).shape == (1, 5)


ACTIVATIONS = [None, "relu", ("leaky_relu", 0.1), ("clip", -0.5, 1.0)]


def prepared(activation=None, shape=(4, 5, 3)):
    """A layer with parameters and statistics of its own, and x, residual and dy for it."""
    layer = bncore.BatchNorm(5, activation=activation, dtype=np.float64)
    layer(batch(1))
    layer.gamma[...], layer.beta[...] = normal(1, 5), normal(2, 5)
    return layer, *(normal(seed, shape) for seed in (3, 4, 5))


class TestResidual:
    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
    @pytest.mark.parametrize("training", [True, False])
    def test_is_autograds(self, backend, activation, training):
        layer, x, residual, dy = prepared(activation)
        layer.train(training)
        fixed = {} if training else {"mean": layer.running_mean, "var": layer.running_var}
        expected = torch_batch_norm(
            x, dy, layer.gamma, layer.beta, residual=residual, activation=activation, **fixed
        )
        np.testing.assert_allclose(layer(x, residual=residual), expected.y, rtol=1e-10, atol=1e-12)
        dx = layer.backward(dy)
        for ours, theirs in (
            (dx, expected.dx),
            (layer.grad_residual, expected.dresidual),
            (layer.grad_gamma, expected.dgamma),
            (layer.grad_beta, expected.dbeta),
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("training", [True, False])
    def test_belongs_to_the_latest_call(self, backend, training):
        layer, x, residual, dy = prepared()
        layer.train(training)
        layer(x, residual=residual)
        layer.backward(dy)
        assert layer.grad_residual.shape == x.shape
        layer(x)
        layer.backward(dy)
        assert layer.grad_residual is None

    def test_overwritten_is_needed_for_an_activation_only(self, backend):
        layer, x, residual, dy = prepared()
        layer.eval()(x, residual=residual)
        expected = layer.backward(dy)
        layer(x, residual=residual, out=residual)
        assert bits(layer.backward(dy), layer.grad_residual) == bits(expected, dy)
        layer, x, residual, dy = prepared("relu")
        layer.eval()(x, residual=residual, out=residual)
        with pytest.raises(ValueError, match=r"overwrote it \(out=residual\)"):
            layer.backward(dy)

    @pytest.mark.parametrize("training", [True, False])
    def test_that_does_not_fit(self, backend, training):
        layer, x, _, _ = prepared()
        layer.train(training)
        before = state_bits(layer)
        with pytest.raises(ValueError, match="residual must have x's shape"):
            layer(x, residual=x[:1])
        assert state_bits(layer) == before


class TestMasksAndWeights:
    MASK = np.arange(3) < np.array([3, 1, 0, 2])[:, None]
    """(N, L) of `prepared`."""

    def given(self, kind):
        weight = np.random.default_rng(7).gamma(1.0, size=(4, 1, 3))
        mask = self.MASK[:, None]
        extras = {"mask": {"mask": mask}, "weight": {"sample_weight": weight}}
        extras["both"] = extras["mask"] | extras["weight"]
        used = np.where(mask, weight if kind != "mask" else 1.0, 0.0)
        return extras[kind], weight if kind == "weight" else used

    @pytest.mark.parametrize("kind", ["mask", "weight", "both"])
    @pytest.mark.parametrize("ddof", [0, 1])
    def test_running_statistics(self, backend, kind, ddof):
        layer, x, _, _ = prepared()
        layer.ddof, layer.momentum = ddof, 0.25
        mean, var = layer.running_mean.copy(), layer.running_var.copy()
        extras, weight = self.given(kind)
        layer(x, **extras)
        total = weight.sum()
        batch_mean = (x * weight).sum((0, 2)) / total
        batch_var = (weight * (x - batch_mean[:, None]) ** 2).sum((0, 2)) / total
        if ddof:
            batch_var /= 1 - (weight**2).sum() / total**2
        np.testing.assert_allclose(layer.running_mean, 0.75 * mean + 0.25 * batch_mean, rtol=1e-12)
        np.testing.assert_allclose(layer.running_var, 0.75 * var + 0.25 * batch_var, rtol=1e-12)
        assert layer.num_batches_tracked == 2

    def test_a_mask_leaves_what_a_smaller_batch_would_have(self, backend):
        layer, x, _, _ = prepared()
        other, _, _, _ = prepared()
        layer(x, mask=self.MASK[:, None])
        kept = x.transpose(0, 2, 1)[self.MASK]
        other(kept)
        ours, theirs = layer.state_dict(), other.state_dict()
        for key in KEYS:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-12)

    @pytest.mark.parametrize("scale", [2.0**-200, 1.0, 7.0])
    def test_equal_weights_move_as_none(self, backend, scale):
        layer, x, _, _ = prepared()
        other, _, _, _ = prepared()
        layer(x, sample_weight=np.full((4, 1, 1), scale))
        other(x)
        np.testing.assert_allclose(layer.running_var, other.running_var, rtol=1e-14)

    @pytest.mark.parametrize("kind", ["mask", "weight", "both"])
    def test_training_is_the_function(self, backend, kind):
        layer, x, residual, dy = prepared("relu")
        extras, _ = self.given(kind)
        y, saved = bncore.batch_norm(
            x, layer.gamma, layer.beta, residual=residual, activation="relu", **extras
        )
        g = bncore.batch_norm_backward(dy, saved)
        assert bits(layer(x, residual=residual, **extras)) == bits(y)
        assert bits(layer.backward(dy), layer.grad_residual) == bits(g.dx, g.dresidual)
        assert bits(layer.grad_gamma, layer.grad_beta) == bits(g.dgamma, g.dbeta)

    @pytest.mark.parametrize("residual_too", [False, True])
    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
    def test_evaluation(self, backend, activation, residual_too):
        """y and gradients are 0 where masked, and what stands there has no influence."""
        layer, x, residual, dy = prepared(activation)
        layer.eval()
        hidden = np.broadcast_to(~self.MASK[:, None], x.shape)
        extras = {"residual": residual} if residual_too else {}
        y = np.where(hidden, 0, layer(x, **extras))
        dx = layer.backward(np.where(hidden, 0, dy))
        expected = bits(y, np.where(hidden, 0, dx), layer.grad_gamma, layer.grad_beta)
        dresidual = layer.grad_residual
        before = state_bits(layer)[:2]
        for array in (x, residual, dy):
            array[hidden] = np.nan
        weight = np.ones((4, 1, 1))
        found = layer(x, mask=self.MASK[:, None], sample_weight=weight, **extras)
        dx = layer.backward(dy)
        assert bits(found, dx, layer.grad_gamma, layer.grad_beta) == expected
        assert state_bits(layer)[:2] == before
        if residual_too:
            assert bits(layer.grad_residual) == bits(np.where(hidden, 0, dresidual))

    @pytest.mark.parametrize("target", ["dy", "x", "apart"])
    def test_evaluation_writes_gradients_anywhere(self, backend, target):
        layer, x, _, dy = prepared()
        layer.eval()(x, mask=self.MASK[:, None])
        expected = layer.backward(dy)
        out = {"dy": dy, "x": x, "apart": np.empty_like(x)}[target]
        assert layer.backward(dy, out=out) is out and bits(out) == bits(expected)
        if target == "x":
            with pytest.raises(ValueError, match=r"overwrote it \(out=x\)"):
                layer.backward(dy)

    def test_evaluation_keeps_the_mask_it_was_given(self, backend):
        layer, x, _, dy = prepared()
        mask = self.MASK[:, None].copy()
        layer.eval()(x, mask=mask)
        expected = layer.backward(dy)
        mask[...] = True
        assert bits(layer.backward(dy)) == bits(expected)

    @pytest.mark.parametrize(
        "extras",
        [{"mask": np.zeros((4, 1, 1), bool)}, {"sample_weight": np.zeros((4, 1, 3))}],
        ids=["mask", "weight"],
    )
    def test_a_batch_of_nothing_moves_nothing(self, backend, extras):
        layer, x, _, dy = prepared()
        before = state_bits(layer)
        y = layer(x, **extras)
        assert state_bits(layer) == before
        if "mask" in extras:
            assert not y.any() and not layer.backward(dy).any()

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(
        ("extras", "error", "message"),
        [
            ({"mask": np.ones((4, 1, 1))}, TypeError, "mask must have dtype bool"),
            ({"mask": np.ones((4, 5, 1), bool)}, ValueError, "mask must broadcast"),
            ({"sample_weight": np.full((4, 1, 1), -1.0)}, ValueError, "sample_weight must be 0 or"),
            ({"sample_weight": "a"}, TypeError, "sample_weight must be an array"),
        ],
    )
    def test_what_does_not_fit(self, backend, training, extras, error, message):
        layer, x, _, _ = prepared()
        layer.train(training)
        before, out = state_bits(layer), np.full_like(x, 7)
        with pytest.raises(error, match=message):
            layer(x, out=out, **extras)
        assert state_bits(layer) == before and (out == 7).all()

    def test_without_running_statistics(self, backend):
        layer = bncore.BatchNorm(5, track_running_stats=False).eval()
        x, mask = batch(1), np.ones((1,) * 3, bool)
        assert bits(layer(x, mask=mask)) == bits(layer.train()(x, mask=mask))

    @pytest.mark.parametrize("axis", [-1, (1, 2)])
    def test_other_axes(self, backend, axis):
        x = normal(1, (4, 3, 5))
        layer = bncore.BatchNorm(5 if axis == -1 else (3, 5), axis=axis, dtype=np.float64)
        mask = np.array([1, 1, 0, 1], bool)[:, None, None]
        layer(x, mask=mask)
        kept = x[mask.ravel()]
        expected = kept.reshape(-1, 5).mean(0) if axis == -1 else kept.mean(0)
        np.testing.assert_allclose(layer.running_mean, 0.1 * expected, rtol=1e-12)
        assert not layer.eval()(x, mask=mask)[2].any()


class TestState:
    def test_keys_and_dtypes_are_torchs(self):
        torch = import_torch()
        ours, theirs = bncore.BatchNorm(5).state_dict(), torch.nn.BatchNorm1d(5).state_dict()
        assert list(ours) == list(theirs) == KEYS
        for key, array in ours.items():
            np.testing.assert_array_equal(array, theirs[key].numpy())
            assert array.dtype == theirs[key].numpy().dtype

    def test_from_torch_and_back(self, backend):
        torch = import_torch()
        peer = torch.nn.BatchNorm2d(5)
        torch.nn.init.normal_(peer.weight, generator=torch.Generator().manual_seed(1))
        for step in range(3):
            peer(torch.tensor(batch(step, np.float32)[..., None]))
        layer = bncore.BatchNorm2d(5)
        layer.load_state_dict(peer.state_dict())
        copy = torch.nn.BatchNorm2d(5)
        state = {key: torch.from_numpy(array) for key, array in layer.state_dict().items()}
        copy.load_state_dict(state)
        for key, tensor in peer.state_dict().items():
            assert torch.equal(copy.state_dict()[key], tensor)
        x = batch(7, np.float32)[..., None]
        expected = peer.eval()(torch.tensor(x)).detach().numpy()
        np.testing.assert_allclose(layer.eval()(x), expected, rtol=1e-4, atol=1e-5)

    def test_round_trip(self, backend):
        layer, other = bncore.BatchNorm(5), bncore.BatchNorm(5)
        layer(batch(1))
        other.load_state_dict(layer.state_dict())
        assert state_bits(other) == state_bits(layer)
        assert bits(other(batch(2))) == bits(layer(batch(2)))

    @pytest.mark.parametrize("kind", [bncore.BatchNorm, bncore.InPlaceBatchNorm])
    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
        ids=["deepcopy", "pickle"],
    )  # fmt: skip
    def test_a_copy_is_apart_and_goes_on_where_the_layer_was(self, backend, kind, copied):
        layer = kind(4, activation=("leaky_relu", 0.1), ddof=0, nan_policy="skip", momentum=None)
        x, dy = normal(1, (6, 4, 3), np.float32), normal(2, (6, 4, 3), np.float32)
        layer(x.copy())
        other = copied(layer)
        before = bits(layer.gamma, layer.running_mean), layer.num_batches_tracked
        assert bits(other.backward(dy), other.grad_gamma) == bits(
            layer.backward(dy), layer.grad_gamma
        )
        other.gamma += 1
        other(x.copy())
        assert (bits(layer.gamma, layer.running_mean), layer.num_batches_tracked) == before
        assert other.num_batches_tracked == 2 and repr(other) == repr(layer)

    def test_is_a_copy(self, backend):
        layer = bncore.BatchNorm(5)
        state = layer.state_dict()
        layer(batch(1))
        layer.gamma += 1
        assert (state["weight"] == 1).all() and (state["running_mean"] == 0).all()
        assert state["num_batches_tracked"] == 0

    def test_files_without_a_counter_leave_it_as_it_is(self, backend):
        layer = bncore.BatchNorm(5)
        layer(batch(1))
        state = {key: layer.state_dict()[key] for key in KEYS[:4]}
        layer.load_state_dict(state)
        assert layer.num_batches_tracked == 1


class TestRanks:
    @pytest.mark.parametrize(
        ("name", "ranks"), [("BatchNorm1d", (2, 3)), ("BatchNorm2d", (4,)), ("BatchNorm3d", (5,))]
    )
    def test_are_torchs(self, backend, name, ranks):
        torch = import_torch()
        for rank in range(1, 8):
            x = normal(rank, (3,) * rank, np.float32)
            layer, peer = getattr(bncore, name)(3), getattr(torch.nn, name)(3)
            before = state_bits(layer)
            if rank in ranks:
                expected = peer(torch.tensor(x)).detach().numpy()
                np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)
                continue
            with pytest.raises(ValueError, match=r"expected .*D"):
                peer(torch.tensor(x))
            with pytest.raises(ValueError, match=f"x must have .* dimensions, got {rank}"):
                layer(x)
            assert state_bits(layer) == before

    @pytest.mark.parametrize("rank", range(2, 9))
    def test_the_plain_layer_takes_any(self, backend, rank):
        assert bncore.BatchNorm(2)(normal(1, (2,) * rank)).ndim == rank

    def test_defaults_are_torchs(self):
        layer = bncore.BatchNorm2d(3)
        assert (layer.eps, layer.momentum, layer.affine) == (1e-5, 0.1, True)
        assert layer.track_running_stats and layer.training and layer.num_features == 3
        assert layer.gamma.dtype == np.float32

    def test_repr_names_what_it_is(self):
        assert repr(bncore.BatchNorm2d(3)).startswith("BatchNorm2d(3, axis=1, eps=1e-05")


class TestStateGivenByHand:
    def test_a_state_of_the_layer_s_own_arrays_is_taken_as_it_was(self):
        layer = bncore.BatchNorm(2)
        layer.gamma[:], layer.beta[:] = [1, 2], [3, 4]
        layer.load_state_dict({**layer._arrays(), "weight": layer.beta, "bias": layer.gamma})
        assert layer.gamma.tolist() == [3, 4] and layer.beta.tolist() == [1, 2]

    def test_values_beyond_the_layer_s_type_are_infinite_there(self):
        layer = bncore.BatchNorm(2, dtype=np.float16)
        layer.load_state_dict({**layer.state_dict(), "bias": np.array([1e6, 1.0])})
        assert layer.beta.tolist() == [np.inf, 1]

    @pytest.mark.parametrize(
        ("key", "value", "error"),
        [
            ("num_batches_tracked", np.uint64(2**64 - 1), ValueError),
            ("weight", np.ma.ones(2), TypeError),
            ("bias", [[1.0], [1.0, 2.0]], ValueError),
            ("num_batches_tracked", [[1], [1, 2]], ValueError),
        ],
    )
    def test_what_does_not_fit_is_named(self, key, value, error):
        layer = bncore.BatchNorm(2)
        before = bits(*layer.state_dict().values())
        with pytest.raises(error, match=key):
            layer.load_state_dict({**layer.state_dict(), key: value})
        assert bits(*layer.state_dict().values()) == before

    def test_no_mapping(self):
        with pytest.raises(TypeError, match="state must be a mapping, got NoneType"):
            bncore.BatchNorm(2).load_state_dict(None)

    @pytest.mark.parametrize(
        ("attribute", "value", "error"),
        [
            ("momentum", 2.5, ValueError),
            ("momentum", "a", TypeError),
            ("num_batches_tracked", None, TypeError),
            ("num_batches_tracked", -1, ValueError),
            ("num_batches_tracked", 2**63 - 1, ValueError),
            ("running_mean", None, TypeError),
            ("ddof", True, TypeError),
            ("ddof", 1.0, TypeError),
            ("update", 1, TypeError),
        ],
    )
    def test_attributes_are_checked_before_anything_is_written(
        self, backend, attribute, value, error
    ):
        layer, out = bncore.BatchNorm(2), np.full((3, 2), 7, np.float32)
        setattr(layer, attribute, value)
        with pytest.raises(error, match=attribute):
            layer(np.arange(6, dtype=np.float32).reshape(3, 2), out=out)
        assert (out == 7).all()

    @pytest.mark.parametrize("kind", [bncore.BatchNorm, bncore.InPlaceBatchNorm])
    @pytest.mark.parametrize("given", [None, [1.0, 1.0]])
    def test_evaluation_without_running_statistics_names_them(self, kind, given):
        layer = kind(2).eval()
        layer.running_var = given
        x = np.full((3, 2), 7, np.float32)
        with pytest.raises(TypeError, match="running_var"):
            layer(x)
        assert (x == 7).all()

    def test_a_reset_is_all_or_nothing(self):
        layer = bncore.BatchNorm(2)
        layer(np.arange(6, dtype=np.float32).reshape(3, 2))
        before = state_bits(layer)
        layer.running_var.flags.writeable = False
        with pytest.raises(ValueError, match="running_var must be writeable"):
            layer.reset_running_stats()
        assert state_bits(layer) == before

    def test_a_parameter_that_is_no_array_is_named_when_a_state_is_loaded(self):
        layer = bncore.BatchNorm(2)
        state = layer.state_dict()
        layer.gamma = [1.0, 2.0]
        with pytest.raises(TypeError, match="weight must be an ndarray"):
            layer.load_state_dict(state)

    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            ({"dtype": "foo"}, TypeError, "dtype must be a float type, got 'foo'"),
            ({"axis": "a"}, TypeError, "axis must be an int or a tuple of ints, got 'a'"),
            ({"axis": (0, 1)}, ValueError, "axis must name as many axes as num_features has sizes"),
        ],
    )
    def test_arguments_are_checked_when_a_layer_is_made(self, given, error, message):
        with pytest.raises(error, match=message):
            bncore.BatchNorm(2, **given)

    @pytest.mark.parametrize("residual", [None, "residual"])
    def test_a_gradient_in_evaluation_is_that_of_the_call(self, backend, residual):
        x, dy = (batch(seed, np.float32) for seed in (3, 3))
        residual = None if residual is None else x + 1
        layer = bncore.BatchNorm(5, activation="relu").eval()
        layer(x, residual=residual)
        dx, dgamma = layer.backward(dy), layer.grad_gamma
        layer(x, residual=residual)
        layer.eps, layer.activation, layer.gamma, layer.axis = 1.0, None, 2 * layer.gamma, -1
        assert bits(layer.backward(dy), layer.grad_gamma) == bits(dx, dgamma)
