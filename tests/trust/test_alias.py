"""Arguments that share memory: the bits of arguments that don't, or a ValueError.

Every pair of arguments of every function is laid over one another in every way that their shapes
allow: the same memory, shifted, reversed, a row, a column.
"""

import itertools

import numpy as np
import pytest

import bncore

pytestmark = pytest.mark.alias

MATRICES = ("x", "dy", "residual", "out")
SHAPES = [(5, 5), (70, 600)]
"""The second is worth several threads."""


def forward(x, gamma, beta, residual, out):
    y, saved = bncore.batch_norm(x, gamma, beta, residual=residual, out=out)
    return y, saved.stats


def forward_plain(x, gamma, beta, out):
    y, saved = bncore.batch_norm(x, gamma, beta, out=out)
    return y, saved.stats


def backward(x, dy, gamma, beta, out):
    _, saved = bncore.batch_norm(x, gamma, beta)
    return bncore.batch_norm_backward(dy, saved, out=out)[:3]


def backward_relu(x, dy, gamma, beta, out):
    _, saved = bncore.batch_norm(x, gamma, beta, activation="relu")
    return bncore.batch_norm_backward(dy, saved, out=out)[:3]


def inference(x, mean, var, gamma, beta, out):
    return (bncore.batch_norm_inference(x, mean, var, gamma, beta, out=out),)


def inference_residual(x, mean, var, gamma, beta, residual, out):
    call = dict(residual=residual, activation="relu", out=out)
    return (bncore.batch_norm_inference(x, mean, var, gamma, beta, **call),)


def inference_backward(dy, x, mean, var, gamma, beta, out):
    return bncore.batch_norm_inference_backward(dy, x, mean, var, gamma, beta, out=out)[:3]


def apply(dy, x, mean, inv_std, gamma, sum_dy, sum_dy_xhat, out):
    parts = (dy, x, mean, inv_std, gamma, sum_dy, sum_dy_xhat, 7)
    return (bncore.backward_apply(*parts, out=out),)


def layer_in_training(x, gamma, beta, running_mean, running_var, out):
    return run_layer(True, x, gamma, beta, running_mean, running_var, out)


def layer_in_evaluation(x, gamma, beta, running_mean, running_var, out):
    return run_layer(False, x, gamma, beta, running_mean, running_var, out)


def run_layer(training, x, gamma, beta, running_mean, running_var, out):
    layer = bncore.BatchNorm(x.shape[1], dtype=np.float64).train(training)
    layer.gamma, layer.beta = gamma, beta
    layer.running_mean, layer.running_var = running_mean, running_var
    return layer(x, out=out), layer.running_mean, layer.running_var


FUNCTIONS = {
    function: function.__code__.co_varnames[: function.__code__.co_argcount]
    for function in (
        forward, forward_plain, backward, backward_relu, inference, inference_residual,
        inference_backward, apply,
    )
}  # fmt: skip
LAYERS = {
    layer_in_training: ("x", "gamma", "beta", "running_mean", "running_var", "out"),
    layer_in_evaluation: ("x", "gamma", "beta", "running_mean", "running_var", "out"),
}


def overlays(first, second, shape):
    """Pairs of arrays that share memory, for two arguments' shapes."""
    n, c = shape
    memory = np.random.default_rng(9).uniform(0.5, 2, (n + 2, c + 2))
    whole = memory[:n, :c].copy()
    if first in MATRICES and second in MATRICES:
        yield "same", whole, whole
        longer = np.concatenate([whole, whole[:1]])
        yield "shifted", longer[:-1], longer[1:]
        yield "reversed", whole, whole[::-1]
        yield "columns reversed", whole, whole[:, ::-1]
        if n == c:
            yield "transposed", whole, whole.T
    elif first not in MATRICES and second not in MATRICES:
        longer = memory[0]
        yield "same", longer[:c], longer[:c]
        yield "shifted", longer[:c], longer[1 : c + 1]
        yield "reversed", longer[:c], longer[:c][::-1]
    else:
        yield "first row", *ordered(first, whole, whole[0])
        yield "last row", *ordered(first, whole, whole[-1])
        if n >= c:
            yield "column", *ordered(first, whole, whole[:c, 1])


def ordered(first, matrix, vector):
    return (matrix, vector) if first in MATRICES else (vector, matrix)


def arguments(names, shape):
    rng = np.random.default_rng(4)
    shapes = {name: shape if name in MATRICES else shape[1:] for name in names}
    return {name: rng.uniform(0.5, 2, size) for name, size in shapes.items()}


def outcome(function, given):
    """Results as bytes, or None where the call was refused and nothing was written."""
    before = {name: array.tobytes() for name, array in given.items()}
    try:
        return [np.asarray(part).tobytes() for part in function(**given)]
    except ValueError as error:
        assert "share memory" in str(error) or "overlap" in str(error)
        assert {name: array.tobytes() for name, array in given.items()} == before
        return None


def check_pair(function, names, first, second, shape):
    for how, one, two in overlays(first, second, shape):
        given = arguments(names, shape) | {first: one, second: two}
        apart = {name: array.copy(order="K") for name, array in given.items()}
        expected = outcome(function, apart)
        assert expected is not None
        found = outcome(function, given)
        assert found is None or found == expected, how
        if "out" not in (first, second):
            assert found == expected, f"{how}: inputs may share memory"


PAIRS = [
    pytest.param(function, names, *pair, id=f"{function.__name__}-{pair[0]}-{pair[1]}")
    for function, names in (FUNCTIONS | LAYERS).items()
    for pair in itertools.combinations(names, 2)
    if not (function is layer_in_training and {*pair} & {"running_mean", "running_var"})
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("function", "names", "first", "second"), PAIRS)
def test_pair(backend, function, names, first, second, shape):
    check_pair(function, names, first, second, shape)


@pytest.mark.parametrize("shape", [(4, 5), (4, 9000)])
def test_gradient_over_the_saved_statistics(backend, shape):
    x, dy = np.random.default_rng(2).standard_normal((2, *shape))
    _, saved = bncore.batch_norm(x)
    expected = bncore.batch_norm_backward(dy, saved).dx
    try:
        found = bncore.batch_norm_backward(dy, saved, out=saved.stats).dx
    except ValueError as error:
        assert "share memory" in str(error)
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_training_output_over_the_running_statistics(backend, name):
    """The statistics move after y is written: y must not be where they are."""
    x = np.random.default_rng(2).standard_normal((4, 5))
    layer = bncore.BatchNorm(5, dtype=np.float64)
    out = np.ones((4, 5))
    setattr(layer, name, out[2])
    before = out.copy()
    with pytest.raises(ValueError, match="share memory"):
        layer(x, out=out)
    np.testing.assert_array_equal(out, before)
    assert layer.num_batches_tracked == 0
