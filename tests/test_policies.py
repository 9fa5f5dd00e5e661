"""The layer's state policies: what moves the running statistics, and what does not."""

import numpy as np
import pytest

import bncore
from bncore import policies

from .arrays import bits, normal
from .torch_oracle import import_torch


def layer_of(channels=3, **given):
    return bncore.BatchNorm(channels, dtype=np.float64, **given)


def moved(layer):
    """All that a call may move."""
    return bits(layer.running_mean, layer.running_var), layer.num_batches_tracked


def a_batch(seed, rows=6, channels=3):
    return normal(seed, (rows, channels)) * (seed + 1) + seed


class TestDdof:
    @pytest.mark.parametrize("ddof", [0, 1])
    @pytest.mark.parametrize("momentum", [0.25, None])
    def test_variance(self, backend, ddof, momentum):
        layer = layer_of(ddof=ddof, momentum=momentum)
        mean, var = np.zeros(3), np.ones(3)
        for step in range(5):
            x = a_batch(step)
            layer(x)
            weight = 1 / (step + 1) if momentum is None else momentum
            mean = (1 - weight) * mean + weight * x.mean(0)
            var = (1 - weight) * var + weight * x.var(0, ddof=ddof)
        np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-13)
        np.testing.assert_allclose(layer.running_var, var, rtol=1e-13)

    def test_y_is_the_same(self, backend):
        assert bits(layer_of(ddof=0)(a_batch(1))) == bits(layer_of(ddof=1)(a_batch(1)))


class TestUnbiasing:
    @pytest.mark.parametrize("n", [2, 3, 10, 1000])
    @pytest.mark.parametrize("scale", [1.0, 0.1, 2.0**-300, 2.0**300])
    def test_equal_weights_are_a_count(self, n, scale):
        assert policies.unbiasing(np.full(n, scale)) == n / (n - 1)

    def test_is_the_formula_in_rational_numbers(self):
        from fractions import Fraction

        for seed in range(20):
            weights = np.random.default_rng(seed).gamma(0.3, size=7) + 1e-9
            exact = [Fraction(float(w)) for w in weights]
            factor = 1 / (1 - sum(w * w for w in exact) / sum(exact) ** 2)
            assert policies.unbiasing(weights) == pytest.approx(float(factor), rel=1e-14)

    def test_one_weight_above_all_others_cancels_nothing(self):
        assert policies.unbiasing(np.array([1e-40, 1.0])) == pytest.approx(0.5e40, rel=1e-15)

    def test_makes_the_variance_unbiased(self, backend):
        """Over all samples of two of three values, each with its weight's place."""
        values, weights = np.array([1.0, 2.0, 6.0]), np.array([[[1.0]], [[3.0]]])
        found = []
        for a in values:
            for b in values:
                layer = layer_of(1, momentum=1.0)
                layer(np.array([[[a]], [[b]]]), sample_weight=weights)
                found.append(layer.running_var[0])
        assert np.mean(found) == pytest.approx(values.var(), rel=1e-13)


class TestSingleValue:
    SHAPES = [(1, 3), (1, 3, 1, 1)]

    @pytest.mark.parametrize("shape", SHAPES)
    def test_raise(self, backend, shape):
        layer, out = layer_of(), np.full(shape, 7.0)
        before = moved(layer)
        with pytest.raises(ValueError, match="x must have more than 1 value per channel"):
            layer(normal(1, shape), out=out)
        assert moved(layer) == before and (out == 7).all()

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("ddof", [0, 1])
    def test_zero(self, backend, shape, ddof):
        layer = layer_of(single_value="zero", momentum=0.25, ddof=ddof, activation="relu")
        layer.gamma[:], layer.beta[:] = normal(1, 3), [-1, 0, 2]
        x, residual = normal(2, shape), normal(3, shape)
        y = layer(x, residual=residual)
        beta = layer.beta.reshape((3,) + (1,) * (len(shape) - 2))
        np.testing.assert_array_equal(y, np.maximum(beta + residual, 0))
        np.testing.assert_allclose(layer.running_mean, 0.25 * x.ravel(), rtol=1e-15)
        np.testing.assert_array_equal(layer.running_var, 0.75)
        assert layer.num_batches_tracked == 1
        np.testing.assert_array_equal(layer.backward(np.ones(shape)), 0)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_running(self, backend, shape):
        layer = layer_of(single_value="running")
        layer(a_batch(1))
        layer.gamma[:], layer.beta[:] = normal(1, 3), normal(2, 3)
        x, before = normal(2, shape), moved(layer)
        y, dx = layer(x), layer.backward(normal(4, shape))
        gradients = bits(layer.grad_gamma, layer.grad_beta)
        assert moved(layer) == before and layer.training
        layer.eval()
        assert bits(y) == bits(layer(x)) and bits(dx) == bits(layer.backward(normal(4, shape)))
        assert gradients == bits(layer.grad_gamma, layer.grad_beta)

    @pytest.mark.parametrize("single_value", policies.SINGLE_VALUE)
    def test_is_not_for_larger_or_empty_batches(self, backend, single_value):
        layer, plain = layer_of(single_value=single_value), layer_of()
        for x in (a_batch(1), np.empty((0, 3)), a_batch(2, rows=2)):
            assert bits(layer(x)) == bits(plain(x))
        assert moved(layer) == moved(plain)

    @pytest.mark.parametrize(
        "extras",
        [
            {"mask": np.array([[0], [1], [0]], bool)},
            {"sample_weight": np.array([[0.0], [3.0], [0.0]])},
            {"sample_weight": np.ones((3, 1)), "mask": np.array([[0], [1], [0]], bool)},
        ],
    )
    def test_one_position_with_weight(self, backend, extras):
        x = a_batch(1, rows=3)
        layer = layer_of()
        with pytest.raises(ValueError, match="x must have more than 1 value .* above 0"):
            layer(x, **extras)
        assert moved(layer) == moved(layer_of())
        layer = layer_of(single_value="zero", momentum=1.0)
        np.testing.assert_array_equal(layer(x, **extras)[1], 0)
        np.testing.assert_array_equal(layer.running_mean, x[1])
        np.testing.assert_array_equal(layer.running_var, 0)
        layer = layer_of(single_value="running")
        expected = bncore.batch_norm_inference(x, np.zeros(3), np.ones(3))[1]
        np.testing.assert_array_equal(layer(x, **extras)[1], expected)
        assert moved(layer) == moved(layer_of())

    def test_evaluation_by_the_batch_takes_one(self, backend):
        layer = layer_of(track_running_stats=False).eval()
        np.testing.assert_array_equal(layer(normal(1, (1, 3))), 0)


class TestNanPolicy:
    BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}

    @pytest.mark.parametrize("bad", BAD)
    def test_skip(self, backend, bad):
        layer, plain = layer_of(nan_policy="skip"), layer_of()
        layer(a_batch(1))
        before = moved(layer)
        x = a_batch(2)
        x[3, 1] = self.BAD[bad]
        assert bits(layer(x)) == bits(plain(x))
        assert moved(layer) == before
        assert not np.isfinite(layer.backward(x)).all(0)[1]
        layer(a_batch(3))
        assert layer.num_batches_tracked == 2 and np.isfinite(layer.running_var).all()

    @pytest.mark.parametrize("bad", BAD)
    def test_propagate(self, backend, bad):
        layer, x = layer_of(), a_batch(2)
        x[3, 1] = self.BAD[bad]
        layer(x)
        assert layer.num_batches_tracked == 1
        np.testing.assert_array_equal(np.isfinite(layer.running_var), [True, False, True])

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_what_the_running_statistics_cannot_hold_is_skipped(self, backend, dtype):
        largest = float(np.finfo(dtype).max)
        x = np.array([[0.0], [1.9 * largest**0.5]])  # its variance fits biased, not unbiased
        for ddof in (0, 1):
            layer = bncore.BatchNorm(1, dtype=dtype, nan_policy="skip", ddof=ddof)
            layer(x)
            assert layer.num_batches_tracked == 1 - ddof
            assert np.isfinite(layer.running_var).all() and np.isfinite(layer.running_mean).all()

    def test_bfloat16(self, backend):
        ml_dtypes = pytest.importorskip("ml_dtypes")
        layer = bncore.BatchNorm(1, dtype=ml_dtypes.bfloat16, nan_policy="skip")
        layer(np.array([[0.0], [1e300]]))
        assert layer.num_batches_tracked == 0
        layer(np.array([[0.0], [1.0]]))
        assert layer.num_batches_tracked == 1

    def test_what_is_masked_is_not_looked_at(self, backend):
        layer, x = layer_of(nan_policy="skip"), a_batch(2)
        x[3] = np.nan
        layer(x, mask=(np.arange(6) != 3)[:, None])
        assert layer.num_batches_tracked == 1 and np.isfinite(layer.running_var).all()


class TestUpdate:
    def test_off_normalizes_by_the_batch_and_moves_nothing(self, backend):
        layer, plain = layer_of(), layer_of()
        layer.update = False
        assert bits(layer(a_batch(1)), layer.backward(a_batch(2))) == bits(
            plain(a_batch(1)), plain.backward(a_batch(2))
        )
        assert moved(layer) == moved(layer_of())
        assert bits(layer.grad_gamma, layer.grad_beta) == bits(plain.grad_gamma, plain.grad_beta)

    def test_off_needs_no_running_statistics_to_write_to(self, backend):
        layer = layer_of()
        layer.running_mean.flags.writeable = False
        with layer.no_update():
            layer(a_batch(1))
        with pytest.raises(ValueError, match="running_mean must be writeable"):
            layer(a_batch(1))

    def test_nests_and_comes_back(self):
        layer = layer_of()
        with layer.no_update() as inside:
            assert inside is layer and not layer.update
            with layer.no_update():
                assert not layer.update
            assert not layer.update
        assert layer.update
        layer.update = False
        with layer.no_update():
            pass
        assert not layer.update

    def test_comes_back_after_an_exception(self):
        layer = layer_of()
        with pytest.raises(ValueError, match="x must have channels"), layer.no_update():
            layer(np.zeros((4, 7)))
        assert layer.update

    def test_recomputation_under_checkpointing(self, backend):
        """A block's forward pass runs again before its backward pass, and counts once."""
        torch = import_torch()
        layers = [layer_of(4, activation="relu"), layer_of(4)]
        peers = [torch.nn.BatchNorm1d(4, dtype=torch.float64) for _ in layers]
        for step in range(3):
            x, other, dy = (a_batch(seed, channels=4) for seed in (step, step + 7, step + 20))
            y = layers[1](layers[0](x))
            with layers[0].no_update(), layers[1].no_update():
                layers[1](layers[0](other))  # something else: what was kept for x is gone
                again = layers[1](layers[0](x))
            dx = layers[0].backward(layers[1].backward(dy))
            x_t = torch.tensor(x, requires_grad=True)
            y_t = peers[1](torch.relu(peers[0](x_t)))
            y_t.backward(torch.tensor(dy))
            assert bits(again) == bits(y)
            np.testing.assert_allclose(y, y_t.detach(), rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(dx, x_t.grad, rtol=1e-9, atol=1e-12)
        for layer, peer in zip(layers, peers, strict=True):
            assert layer.num_batches_tracked == int(peer.num_batches_tracked) == 3
            np.testing.assert_allclose(layer.running_mean, peer.running_mean, rtol=1e-12)
            np.testing.assert_allclose(layer.running_var, peer.running_var, rtol=1e-12)


def test_repr_names_what_is_not_the_default():
    layer = layer_of(ddof=0, single_value="zero")
    assert repr(layer).endswith("activation=None, ddof=0, single_value='zero')")
    with layer.no_update():
        assert repr(layer).endswith("single_value='zero', update=False)")
    assert repr(layer_of()).endswith("activation=None)")
    assert "nan_policy='skip'" in repr(layer_of(nan_policy="skip"))


NONSENSE = [
    ("ddof", 2, ValueError),
    ("ddof", -1, ValueError),
    ("ddof", 0.5, TypeError),
    ("ddof", None, TypeError),
    ("ddof", np.ones(3), TypeError),
    ("single_value", "beta", ValueError),
    ("single_value", None, TypeError),
    ("single_value", ["zero"], TypeError),
    ("nan_policy", "ignore", ValueError),
    ("nan_policy", np.array(["skip", "skip"]), TypeError),
]


class TestNonsense:
    @pytest.mark.parametrize(("name", "value", "error"), NONSENSE)
    def test_given(self, name, value, error):
        with pytest.raises(error, match=f"{name} must be .*, got"):
            bncore.BatchNorm(3, **{name: value})

    @pytest.mark.parametrize(
        ("name", "value", "error"),
        [*NONSENSE, ("update", 2, TypeError), ("update", None, TypeError)],
    )
    def test_set_by_hand(self, backend, name, value, error):
        layer, out = layer_of(), np.full((6, 3), 7.0)
        layer(a_batch(1))
        before = moved(layer)
        setattr(layer, name, value)
        for _ in range(2):
            with pytest.raises(error, match=f"{name} must be .*, got"):
                layer(a_batch(2), out=out)
        assert moved(layer) == before and (out == 7).all()

    def test_running_needs_running_statistics(self):
        with pytest.raises(ValueError, match="single_value must not be 'running'"):
            layer_of(single_value="running", track_running_stats=False)
        layer = layer_of(track_running_stats=False)
        layer.single_value = "running"
        with pytest.raises(ValueError, match="single_value must not be 'running'"):
            layer(a_batch(1))

    def test_policies_may_be_set_by_hand(self, backend):
        layer = layer_of(1, momentum=1.0)
        layer.ddof, layer.single_value, layer.nan_policy = 0, "zero", "skip"
        layer(np.array([[1.0], [3.0]]))
        assert layer.running_var == 1.0
        layer(np.array([[np.nan]]))
        assert layer.running_var == 1.0
        layer(np.array([[5.0]]))
        assert layer.running_mean == 5.0 and layer.running_var == 0.0
        layer.momentum = 0.5
        layer(np.array([[1.0]]))
        assert layer.running_mean == 3.0

    def test_the_state_has_torchs_keys_whatever_the_policies(self):
        layer = layer_of(ddof=0, single_value="running", nan_policy="skip")
        keys = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
        assert list(layer.state_dict()) == keys
