"""gradcheck: right gradients pass, wrong ones are found and named."""

import itertools
import re

import numpy as np
import pytest

import bncore
from bncore.testing import gradcheck

from .arrays import bits, normal


def linear(x, w):
    """A layer with its gradients."""
    return x @ w, lambda dy: (dy @ w.T, x.T @ dy)


def scaled(x, factor=1.0, at=None):
    """x^3 with its gradient, multiplied by a factor, everywhere or at one place."""

    def backward(dy):
        gradient = np.asarray(3 * x**2 * dy)
        gradient[... if at is None else at] *= factor
        return gradient

    return x**3, backward


class TestRight:
    @pytest.mark.parametrize("activation", [None, "relu", ("leaky_relu", 0.1), ("clip", -1, 1)])
    @pytest.mark.parametrize("extra", ["plain", "mask", "sample_weight"])
    def test_batch_norm(self, backend, activation, extra):
        positions = normal(9, (6, 1, 5)) ** 2
        extras = {"mask": positions < 1, "sample_weight": positions, "plain": None}
        keywords = {} if extra == "plain" else {extra: extras[extra]}

        def function(x, gamma, beta, residual):
            y, saved = bncore.batch_norm(
                x, gamma, beta, residual=residual, activation=activation, **keywords
            )
            return y, lambda dy: bncore.batch_norm_backward(dy, saved)

        inputs = [normal(i, s) for i, s in enumerate([(6, 3, 5), (3,), (3,), (6, 3, 5)])]
        assert gradcheck(function, inputs) < 1e-7

    @pytest.mark.parametrize("activation", [None, ("leaky_relu", 0.1)], ids=str)
    def test_batch_norm_backward(self, backend, activation):
        """Gradients of gradients: the function has several results."""

        def function(dy, x, gamma):
            _, saved = bncore.batch_norm(x, gamma, gamma + 0.5, activation=activation)
            g = bncore.batch_norm_backward(dy, saved)

            def backward(outer):
                ddx, ddgamma, ddbeta = outer
                return bncore.batch_norm_double_backward(
                    ddx, dy, saved, ddgamma=ddgamma, ddbeta=ddbeta
                )

            return g[:3], backward

        assert gradcheck(function, [normal(1, (6, 3)), normal(2, (6, 3)), normal(3, 3)]) < 1e-7

    def test_two_layers(self, backend):
        def network(x, w1, gamma, beta, w2):
            h, back1 = linear(x, w1)
            z, saved = bncore.batch_norm(h, gamma, beta, activation="relu")
            y, back2 = linear(z, w2)

            def backward(dy):
                dz, dw2 = back2(dy)
                g = bncore.batch_norm_backward(dz, saved)
                return *back1(g.dx), g.dgamma, g.dbeta, dw2

            return y, backward

        inputs = [normal(i, s) for i, s in enumerate([(9, 4), (4, 5), (5,), (5,), (5, 2)])]
        assert gradcheck(network, inputs) < 1e-7

    @pytest.mark.parametrize("value", [1.5, np.float32(1.5), [1.5, 2.5], np.ones((0, 3))])
    def test_scalars_lists_and_nothing(self, value):
        assert gradcheck(lambda x: (x**2, lambda dy: 2 * x * dy), [value]) < 1e-8

    def test_integers_and_none_are_passed_as_they_are(self):
        def function(x, index, nothing):
            assert index.dtype == np.int64 and nothing is None

            def backward(dy):
                gradient = np.zeros_like(x)
                np.add.at(gradient, index, dy)
                return gradient, None, None

            return x[index], backward

        assert gradcheck(function, [normal(1, 5), np.array([0, 3, 3]), None]) < 1e-8

    def test_integers_alone_leave_nothing_to_check(self):
        with pytest.raises(ValueError, match="a gradient of at least one input, got none"):
            gradcheck(lambda x: (x * 1.0, lambda dy: dy), [np.ones(3, int)])

    def test_what_has_no_gradient_is_not_checked(self):
        assert gradcheck(lambda x, w: (x * w, lambda dy: (dy * w, None)), [2.0, 3.0]) < 1e-8

    @pytest.mark.parametrize("offset", [1e3, 1e6, 1e8])
    def test_far_from_zero(self, offset):
        """What counts is how far an input really moves, after rounding."""
        assert gradcheck(lambda x: (x - offset, lambda dy: dy), [offset + normal(1, 7)]) < 1e-8

    def test_inputs_are_left_alone(self):
        x = normal(1, (3, 2))
        before = bits(x)

        def careless(x):
            x *= 2

            def backward(dy):
                dy *= 2
                return dy

            return x, backward

        assert gradcheck(careless, [x]) < 1e-8
        assert bits(x) == before

    def test_the_seed_decides(self):
        x = normal(1, (30, 20))
        results = [gradcheck(scaled, [x], seed=seed) for seed in (0, 0, 1)]
        assert results[0] == results[1] != results[2]


class TestWrong:
    @pytest.mark.parametrize("factor", [-1, 0, 2, 1.001, np.nan, np.inf])
    @pytest.mark.parametrize("shape", [(), (1,), (3, 4), (50, 40)], ids=str)
    def test_everywhere(self, shape, factor):
        with pytest.raises(AssertionError, match="^gradient of x: "):
            gradcheck(lambda x: scaled(x, factor), [1 + normal(1, shape) ** 2])

    def test_it_says_where_and_what(self):
        x = 1 + normal(1, (4, 3)) ** 2
        with pytest.raises(AssertionError) as caught:
            gradcheck(lambda x: scaled(x, 2, at=(2, 1)), [x])
        pattern = (
            r"gradient of x: 1 of 12 elements wrong, the worst x\[2, 1\]: "
            r"expected (\S+), found (\S+)$"
        )
        expected, found = (float(v) for v in re.match(pattern, str(caught.value)).groups())
        np.testing.assert_allclose(found, 2 * expected, rtol=1e-6)

    def test_the_worst_of_several(self):
        def function(x):
            return x**2, lambda dy: np.array([2, 1, -5, 2]) * x * dy

        with pytest.raises(AssertionError, match=r"2 of 4 elements wrong, the worst x\[2\]"):
            gradcheck(function, [np.ones(4)])

    @pytest.mark.parametrize("at", [0, 777, 99_999])
    def test_one_of_many_is_found_by_directions(self, at):
        message = "^gradient of x: wrong along a direction of .1 and -1: expected .*, found "
        with pytest.raises(AssertionError, match=message):
            gradcheck(lambda x: scaled(x, 1.5, at=at), [np.ones(100_000)], elements=0)

    def test_elements_alone(self):
        assert gradcheck(scaled, [normal(1, 5)], directions=0) < 1e-6
        with pytest.raises(AssertionError, match="5 of 5 elements wrong"):
            gradcheck(lambda x: scaled(x, 2), [1 + normal(1, 5) ** 2], directions=0)

    def test_a_function_that_hides_its_parameters(self):
        class Hidden:
            __signature__ = "none"

            def __call__(self, x):
                return 2 * x, lambda dy: dy

        with pytest.raises(AssertionError, match=r"inputs\[0\]"):
            bncore.testing.gradcheck(Hidden(), [np.ones(3)])

    def test_the_input_is_named(self):
        def wrong(x, w):
            return x @ w, lambda dy: (dy @ w.T, 2 * x.T @ dy)

        inputs = [normal(1, (3, 2)), normal(2, (2, 4))]
        with pytest.raises(AssertionError, match="^gradient of w: "):
            gradcheck(wrong, inputs)
        with pytest.raises(AssertionError, match=r"^gradient of inputs\[1\]: .* inputs\[1\]\["):
            gradcheck(lambda *inputs: wrong(*inputs), inputs)

    def test_a_backward_pass_that_forgets_the_statistics(self, backend):
        def function(x, gamma):
            y, saved = bncore.batch_norm(x, gamma)
            mean, var = saved.mean, saved.var
            return y, lambda dy: bncore.batch_norm_inference_backward(dy, x, mean, var, gamma)[:2]

        with pytest.raises(AssertionError, match="^gradient of x: "):
            gradcheck(function, [normal(1, (5, 3)), normal(2, 3)])

    def test_right_for_one_dy_only(self):
        """Each direction has a dy of its own, so a gradient that ignores dy is wrong."""
        with pytest.raises(AssertionError, match="^gradient of x: "):
            gradcheck(lambda x: (x * 1.0, lambda dy: np.ones_like(dy)), [normal(1, 3)])

    def test_shape(self):
        def function(x, beta):
            return x + beta, lambda dy: (dy, dy)

        message = r"^gradient of beta: expected beta's shape \(3,\), found \(4, 3\)$"
        with pytest.raises(AssertionError, match=message):
            gradcheck(function, [normal(1, (4, 3)), normal(2, 3)])

    def test_a_kink_is_told(self):
        def relu(x):
            return np.maximum(x, 0), lambda dy: dy * (x > 0)

        with pytest.raises(AssertionError, match=r"x\[1\].*is there a kink\? the slope is"):
            gradcheck(relu, [np.array([1.0, 0.0, -1.0])])

    def test_tolerances(self):
        x = [np.array([1.0])]
        assert 0 < gradcheck(lambda x: scaled(x, 1.001), x, rtol=0.01) < 0.01
        assert 0 < gradcheck(lambda x: scaled(x, 1.001), x, atol=0.01) < 0.01
        with pytest.raises(AssertionError):
            gradcheck(lambda x: scaled(x, 1.001), x)


def same(x):
    return x, lambda dy: dy


NUMBERS = itertools.count()


class TestErrors:
    @pytest.mark.parametrize(
        ("function", "error", "message"),
        [
            (3, TypeError, "function must be callable, got int"),
            (lambda x: x, TypeError, r"function must return \(y, backward\), got ndarray"),
            (lambda x: (x, x), TypeError, r"must return .*, got \(ndarray, ndarray\)"),
            (lambda x: (x.astype("f4"), None.__init__), TypeError, "float64, got y of float32"),
            (lambda x: (x, lambda dy: None), ValueError, "a gradient of at least one input"),
            (lambda x: (x, lambda dy: (dy, dy)), ValueError, "must return 1, .*, got 2 gradients"),
            (lambda x: (x + next(NUMBERS), None.__init__), ValueError, "the same y"),
        ],
    )
    def test_function(self, function, error, message):
        with pytest.raises(error, match=message):
            gradcheck(function, [normal(1, 3)])

    @pytest.mark.parametrize(
        ("inputs", "error", "message"),
        [
            (np.ones(3), TypeError, "inputs must be a sequence of arrays, got ndarray"),
            ([np.ones(3, complex)], TypeError, "x must be an array of real numbers, got complex"),
            (["one"], TypeError, "x must be an array of real numbers, got <U3"),
            ([np.array([1, np.nan])], ValueError, "x must be finite, got nan"),
            ([np.array([1e12])], ValueError, r"step must move x, .* up to 1e\+12, got 1e-06"),
        ],
    )
    def test_inputs(self, inputs, error, message):
        with pytest.raises(error, match=message):
            gradcheck(same, inputs)

    @pytest.mark.parametrize(
        ("keywords", "error", "message"),
        [
            ({"step": 0}, ValueError, "step must be positive and finite, got 0"),
            ({"step": "1"}, TypeError, "step must be a real number, got '1'"),
            ({"rtol": -1}, ValueError, "rtol must be finite and not negative, got -1"),
            ({"atol": np.inf}, ValueError, "atol must be finite and not negative, got inf"),
            ({"elements": 1.5}, TypeError, "elements must be an int, got 1.5"),
            ({"directions": -1}, ValueError, "directions must not be negative, got -1"),
            ({"seed": None}, TypeError, "seed must be an int, got None"),
            ({"elements": 0, "directions": 0}, ValueError, "elements or directions must be at"),
        ],
    )
    def test_options(self, keywords, error, message):
        with pytest.raises(error, match="^" + message):
            gradcheck(same, [np.ones(3)], **keywords)
