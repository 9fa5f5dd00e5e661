"""Masks and sample weights: what is masked does not exist, what has a weight counts by it."""

import numpy as np
import pytest

import bncore

from . import oracle, torch_oracle
from .arrays import bits, in_layout, normal
from .oracle import assert_within, rounding

CASES = [
    ((8, 5), 1, (8, 1)),
    ((8, 5), 1, (1, 1)),
    ((4, 6, 7), 1, (4, 1, 7)),
    ((4, 6, 7), 1, (4, 1, 1)),
    ((4, 6, 7), 1, (7,)),
    ((4, 7, 6), -1, (4, 7, 1)),
    ((3, 4, 5, 6), 1, (3, 1, 5, 6)),
    ((3, 4, 5, 6), (1, 3), (3, 1, 5, 1)),
    ((2, 3, 2, 3, 2), 2, (2, 3, 1, 3, 2)),
]
LAYOUTS = ("C", "channels_last", "reversed")


def arguments(shape, axis, dtype=np.float64, layout="C"):
    channels = [shape[one] for one in oracle.channel_axes(axis, len(shape))]
    x, dy = (in_layout(normal(seed, shape, dtype), layout, axis) for seed in (1, 2))
    return x, dy, normal(3, channels, dtype), normal(4, channels, dtype)


def some_mask(shape):
    """True here and there, at the first position at least."""
    mask = np.random.default_rng(7).random(shape) < 0.6
    mask.flat[0] = True
    return mask


def some_weights(shape):
    """Weights from 0 to 2, some of them 0, the first 1."""
    weight = 2 * np.random.default_rng(8).random(shape)
    weight[weight < 0.4] = 0
    weight.flat[0] = 1
    return weight


def full(positions, x, axis):
    """Positions over all axes but the channels', with 1 for those."""
    axes = oracle.channel_axes(axis, x.ndim)
    return np.broadcast_to(positions, [1 if i in axes else n for i, n in enumerate(x.shape)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "axis", "mask_shape"), CASES)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_masked_is_computed_on_the_valid_positions_alone(
    backend, shape, axis, mask_shape, layout, activation
):
    x, dy, gamma, beta = arguments(shape, axis, layout=layout)
    mask = some_mask(mask_shape)
    everywhere = np.broadcast_to(full(mask, x, axis), x.shape)
    axes = oracle.channel_axes(axis, x.ndim)
    valid = oracle.to_rows(everywhere, axes, bool)[0]
    x_valid, dy_valid = (oracle.to_rows(a, axes, np.float64)[:, valid].T for a in (x, dy))
    parameters = gamma.ravel(), beta.ravel()
    expected = torch_oracle.batch_norm(x_valid, dy_valid, *parameters, activation=activation)
    poisoned = np.where(everywhere, x, np.nan), np.where(everywhere, dy, np.nan)
    x, dy = (in_layout(array, layout, axis) for array in poisoned)

    y, saved = bncore.batch_norm(x, gamma, beta, axis=axis, mask=mask, activation=activation)
    g = bncore.batch_norm_backward(dy, saved)
    for actual, right in ((y, expected.y), (g.dx, expected.dx)):
        rows = oracle.to_rows(actual, axes, np.float64)
        np.testing.assert_allclose(rows[:, valid].T, right, rtol=1e-10, atol=1e-12)
        assert (rows[:, ~valid] == 0).all()
    np.testing.assert_allclose(g.dgamma.ravel(), expected.dgamma, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(g.dbeta.ravel(), expected.dbeta, rtol=1e-10, atol=1e-12)
    assert (saved.count == valid.sum()).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "axis", "weight_shape"), CASES)
@pytest.mark.parametrize("activation", [None, ("leaky_relu", 0.1)], ids=str)
def test_weights_are_those_of_the_formula(backend, shape, axis, weight_shape, layout, activation):
    x, dy, gamma, beta = arguments(shape, axis, layout=layout)
    weight, residual = some_weights(weight_shape), normal(5, shape)
    keywords = {"axis": axis, "activation": activation, "residual": residual}
    expected = torch_oracle.batch_norm(x, dy, gamma, beta, weight=full(weight, x, axis), **keywords)
    y, saved = bncore.batch_norm(x, gamma, beta, sample_weight=weight, **keywords)
    g = bncore.batch_norm_backward(dy, saved)
    np.testing.assert_allclose(y, expected.y, rtol=1e-10, atol=1e-12)
    for name in ("dx", "dgamma", "dbeta", "dresidual"):
        actual, right = getattr(g, name), getattr(expected, name)
        np.testing.assert_allclose(actual, right, rtol=1e-10, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(saved.count, full(weight, x, axis).sum(), rtol=1e-14)


WAYS = [
    (64, 7), (6, 9, 40), (20, 9, 7, 7), (2, 3, 60, 60), (700, 24), (300, 600), (2, 3, 9001),
    (33, 130, 40), (40, 3, 1),
]  # fmt: skip
"""Shapes that the kernels treat in different ways: rows, lines, segments, large and small."""


@pytest.mark.parametrize("layout", ["C", "channels_last"])
@pytest.mark.parametrize("shape", WAYS, ids=str)
def test_weighted_float32_is_exact_but_for_rounding(backend, shape, layout):
    x, dy, gamma, beta = arguments(shape, 1, np.float32, layout)
    weight = some_weights((shape[0], 1, *shape[2:])).astype(np.float32)
    exact = oracle.forward(x, gamma, beta, weight=weight)
    gradient = oracle.backward(dy, x, gamma, beta, weight=weight)
    y, saved = bncore.batch_norm(x, gamma, beta, sample_weight=weight)
    g = bncore.batch_norm_backward(dy, saved)
    assert_within(y, exact.y, rounding(exact.scale, np.float32), "y")
    assert_within(g.dx, gradient.dx, rounding(gradient.dx_scale, np.float32), "dx")
    np.testing.assert_allclose(saved.mean, exact.mean.astype(float), rtol=1e-7)
    np.testing.assert_allclose(saved.var, exact.var.astype(float), rtol=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_what_is_masked_has_no_influence_on_any_bit(backend, poison, dtype):
    x, dy, gamma, beta = arguments((4, 6, 7), 1, dtype)
    mask = some_mask((4, 1, 7))
    residual = normal(5, x.shape, dtype)

    def results():
        keywords = {"mask": mask, "residual": residual, "activation": "relu"}
        y, saved = bncore.batch_norm(x, gamma, beta, **keywords)
        m = bncore.moments(x, mask=mask)
        g = bncore.batch_norm_backward(dy, saved)
        return bits(y, saved.mean, saved.var, *g, m.count, m.mean, m.m2)

    clean = results()
    for array in (x, dy, residual):
        array[np.broadcast_to(~mask, x.shape)] = poison
    assert results() == clean


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_all_masked(backend, dtype):
    x, dy, gamma, beta = arguments((4, 6, 7), 1, dtype)
    y, saved = bncore.batch_norm(x * np.nan, gamma, beta, mask=np.zeros((4, 1, 7), bool))
    g = bncore.batch_norm_backward(dy, saved)
    for result in (y, *g[:3]):
        assert (result == 0).all()
    assert (saved.count == 0).all() and np.isfinite(saved.stats).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_position_has_weight(backend, dtype):
    """Mean and variance are 0 then, and constants."""
    x, dy, gamma, beta = arguments((4, 6, 7), 1, dtype)
    y, saved = bncore.batch_norm(x, gamma, beta, sample_weight=np.zeros((4, 1, 7)))
    g = bncore.batch_norm_backward(dy, saved)
    scale = (gamma / np.sqrt(1e-5))[:, None]
    np.testing.assert_allclose(y, x * scale + beta[:, None], rtol=1e-5)
    np.testing.assert_allclose(g.dx, dy * scale, rtol=1e-5)
    assert (saved.count == 0).all() and (saved.mean == 0).all() and (saved.var == 0).all()


def test_a_weight_of_two_is_the_sample_twice(backend):
    x, dy, gamma, beta = arguments((6, 4, 3), 1)
    weight = np.array([2, 1, 1, 3, 0, 1])[:, None, None]
    repeated = np.repeat(x, weight.ravel(), axis=0)
    y, saved = bncore.batch_norm(x, gamma, beta, sample_weight=weight)
    y_repeated, saved_repeated = bncore.batch_norm(repeated, gamma, beta)
    np.testing.assert_allclose(saved.mean, saved_repeated.mean, rtol=1e-13)
    np.testing.assert_allclose(saved.var, saved_repeated.var, rtol=1e-13)
    np.testing.assert_allclose(np.repeat(y, weight.ravel(), axis=0), y_repeated, rtol=1e-12)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32, np.float64])
def test_ones_change_nothing(backend, dtype):
    x, dy, gamma, beta = arguments((5, 4, 3), 1)
    plain, plain_saved = bncore.batch_norm(x, gamma, beta)
    keyword = "mask" if dtype is bool else "sample_weight"
    y, saved = bncore.batch_norm(x, gamma, beta, **{keyword: np.ones((5, 1, 3), dtype)})
    np.testing.assert_allclose(y, plain, rtol=1e-12, atol=1e-14)
    g, plain_g = (bncore.batch_norm_backward(dy, s) for s in (saved, plain_saved))
    np.testing.assert_allclose(g.dx, plain_g.dx, rtol=1e-12, atol=1e-14)


def test_the_weights_unit_does_not_matter(backend):
    x, dy, gamma, beta = arguments((5, 4, 3), 1)
    weight = some_weights((5, 1, 3))
    results = []
    for factor in (1.0, 2.0**40):
        y, saved = bncore.batch_norm(x, gamma, beta, sample_weight=weight * factor)
        results.append(bits(y, saved.mean, saved.var, *bncore.batch_norm_backward(dy, saved)))
    assert results[0] == results[1]


def test_mask_and_weight_together_are_the_weight_where_valid(backend):
    x, dy, gamma, beta = arguments((5, 4, 3), 1)
    mask, weight = some_mask((5, 1, 3)), some_weights((5, 1, 3))
    _, saved = bncore.batch_norm(x, gamma, beta, mask=mask, sample_weight=weight)
    y, together = bncore.batch_norm(x, gamma, beta, sample_weight=np.where(mask, weight, 0))
    np.testing.assert_array_equal(saved.stats, together.stats)


def test_padded_sequences_are_the_packed_ones(backend):
    lengths = np.array([5, 2, 7, 1])
    mask = (np.arange(7) < lengths[:, None])[:, None, :]
    x, dy, gamma, beta = arguments((4, 6, 7), 1)
    packed_x, packed_dy = (np.moveaxis(a, 1, 2)[mask[:, 0]] for a in (x, dy))
    y, saved = bncore.batch_norm(x, gamma, beta, mask=mask)
    packed_y, packed_saved = bncore.batch_norm(packed_x, gamma, beta)
    np.testing.assert_allclose(np.moveaxis(y, 1, 2)[mask[:, 0]], packed_y, rtol=1e-11, atol=1e-13)
    g = bncore.batch_norm_backward(dy, saved)
    packed = bncore.batch_norm_backward(packed_dy, packed_saved)
    np.testing.assert_allclose(g.dgamma, packed.dgamma, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("layout", ["C", "channels_last", "sliced"])
def test_in_place_gives_the_same_bits(backend, layout):
    x, dy, gamma, beta = arguments((4, 6, 7), 1, np.float32, layout)
    keywords = {"mask": some_mask((4, 1, 7)), "sample_weight": some_weights((4, 1, 7))}
    y, saved = bncore.batch_norm(x, gamma, beta, **keywords)
    g = bncore.batch_norm_backward(dy, saved)
    over_dy = bncore.batch_norm_backward(dy, saved, out=dy)
    assert over_dy.dx is dy and bits(*over_dy) == bits(*g)
    assert bncore.batch_norm(x, gamma, beta, **keywords, out=x)[0] is x
    assert bits(x) == bits(y)


@pytest.mark.parametrize("layout", ["C", "channels_last"])
@pytest.mark.parametrize("shape", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_way_through_the_kernels(backend, shape, layout, dtype):
    """With a mask, weights, a residual and an activation, NaN where masked."""
    x, dy, gamma, beta = arguments(shape, 1, dtype, layout)
    positions = (shape[0], 1, *shape[2:])
    mask, weight, residual = some_mask(positions), some_weights(positions), normal(5, shape, dtype)
    keywords = {"activation": ("leaky_relu", 0.1), "residual": residual}
    where = np.broadcast_to(mask, shape)
    exact = torch_oracle.batch_norm(
        x, np.where(where, dy, 0), gamma, beta, weight=np.where(mask, weight, 0), **keywords
    )
    for array in (x, dy, residual):
        array[~where] = np.nan
    y, saved = bncore.batch_norm(x, gamma, beta, mask=mask, sample_weight=weight, **keywords)
    g = bncore.batch_norm_backward(dy, saved)
    near = {np.float16: 1e-3, np.float32: 2e-6, np.float64: 1e-12}[dtype]
    for name, actual in (("y", y), ("dx", g.dx), ("dresidual", g.dresidual)):
        right = np.where(where, getattr(exact, name), 0)
        # Where z is near 0 rounding may take the gradient to the other side.
        gated = np.abs(exact.y) < 20 * near if name != "y" else np.zeros(shape, bool)
        np.testing.assert_allclose(
            np.where(gated, 0, actual.astype(float)), np.where(gated, 0, right), err_msg=name,
            rtol=near, atol=near * abs(right).max(),
        )  # fmt: skip
        assert (actual[~where] == 0).all()


WHOLE = {
    "in runs": lambda n: np.arange(n) % 37 < 28,
    "the first": lambda n: np.arange(n) >= n // 3,
    "the last": lambda n: np.arange(n) <= n - n // 3,
    "every other": lambda n: np.arange(n) % 2 == 0,
}
"""Masks of whole samples or lines: which of n count."""


@pytest.mark.parametrize("masked", WHOLE)
@pytest.mark.parametrize(
    ("activation", "added"), [(None, False), ("relu", False), ("relu", True)], ids=str
)
@pytest.mark.parametrize("layout", ["C", "channels_last"])
@pytest.mark.parametrize("shape", [*WAYS, (3000, 40), (9000, 150)], ids=str)
def test_whole_samples_or_lines_masked(backend, shape, layout, activation, added, masked):
    """Of rows samples are masked, of columns lines; on any number of threads to the same bits."""
    x, dy, gamma, beta = arguments(shape, 1, np.float32, layout)
    positions = (shape[0], *shape[2:]) if layout == "channels_last" else shape[:1]
    mask = WHOLE[masked](np.prod(positions)).reshape(positions)
    mask = np.expand_dims(mask, 1) if mask.ndim > 1 else mask.reshape(-1, *[1] * (len(shape) - 1))
    where = np.broadcast_to(mask, shape)
    # Beside a residual the activation's gates are kept as bits, else they are intervals of x.
    residual = in_layout(normal(5, shape, x.dtype), layout) if added else None
    keywords = {"residual": residual, "activation": activation}
    exact = torch_oracle.batch_norm(
        x, np.where(where, dy, 0), gamma, beta, weight=full(mask, x, 1).astype(float), **keywords
    )
    for array in (x, dy) if residual is None else (x, dy, residual):
        array[~where] = np.nan
    results = []
    for number in (1, 2, 3):
        bncore.set_num_threads(number)
        y, saved = bncore.batch_norm(x, gamma, beta, mask=mask, **keywords)
        g = bncore.batch_norm_backward(dy, saved)
        results.append(bits(y, saved.stats, *[a for a in g if a is not None]))
    assert results[0] == results[1] == results[2]
    for name, actual in (("y", y), ("dx", g.dx)):
        right = np.where(where, getattr(exact, name), 0)
        # Where z is near 0 rounding may take the gradient to the other side.
        gated = (activation is not None) & (name == "dx") & (np.abs(exact.y) < 4e-5)
        np.testing.assert_allclose(
            np.where(gated, 0, actual), np.where(gated, 0, right), err_msg=name,
            rtol=2e-6, atol=2e-6 * abs(right).max(),
        )  # fmt: skip
        assert (actual[~where] == 0).all()
    rest = tuple(axis for axis in range(x.ndim) if axis != 1)
    mean = x.astype(float).mean(rest, where=where)
    np.testing.assert_allclose(saved.mean, mean, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", WAYS, ids=str)
def test_a_weight_for_each_sample_is_that_of_all_its_positions(backend, shape, dtype):
    x, dy, gamma, beta = arguments(shape, 1, dtype)
    weight = some_weights(shape[:1]).reshape(-1, *[1] * (len(shape) - 1))
    every = np.ascontiguousarray(np.broadcast_to(weight, (shape[0], 1, *shape[2:])))
    mask = weight > 0.5
    results = []
    for given in (weight, every):
        y, saved = bncore.batch_norm(x, gamma, beta, sample_weight=given)
        masked, _ = bncore.batch_norm(x, gamma, beta, mask=given > 0.5)
        both, _ = bncore.batch_norm(x, gamma, beta, sample_weight=given, mask=mask)
        m = bncore.moments(x, sample_weight=given)
        g = bncore.batch_norm_backward(dy, saved)
        results.append((y, masked, both, m.count, m.mean, m.m2, g.dx, g.dgamma, g.dbeta))
    near = 100 * np.finfo(dtype).eps
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=near, atol=near * abs(other).max())


@pytest.mark.parametrize("shape", WAYS, ids=str)
def test_the_number_of_threads_changes_no_bit(backend, shape):
    x, dy, gamma, beta = arguments(shape, 1, np.float32)
    weight = some_weights((shape[0], 1, *shape[2:]))
    results = []
    for number in (1, 2):
        bncore.set_num_threads(number)
        y, saved = bncore.batch_norm(
            x, gamma, beta, sample_weight=weight, residual=dy, activation="relu"
        )
        results.append(bits(y, saved.stats, *bncore.batch_norm_backward(dy, saved)))
    assert results[0] == results[1]


@pytest.mark.parametrize("weight", [2.0**-300, 2.0**300])
@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_extreme_weights_are_weights(backend, weight, scale):
    x, dy, gamma, beta = arguments((50, 3), 1)
    plain, equal = bncore.batch_norm(x, gamma, beta)
    y, saved = bncore.batch_norm(
        x * scale, gamma, beta, eps=1e-5 * scale**2, sample_weight=np.full((50, 1), weight)
    )
    np.testing.assert_allclose(y, plain, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(saved.count, 50 * weight)
    m = bncore.moments(x, sample_weight=np.full((50, 1), weight))
    np.testing.assert_allclose(m.m2 / m.count, equal.var, rtol=1e-13)


def test_many_weights_are_totalled_accurately(backend):
    """NumPy's sums over a mask with gaps are not pairwise."""
    weight = np.tile([0.1, 0.0], 200_000)[:, None]
    x = normal(1, (400_000, 1))
    m = bncore.moments(x, sample_weight=weight)
    np.testing.assert_allclose(m.count, 20_000, rtol=1e-14)
    plain = bncore.moments(np.ascontiguousarray(x[::2]))
    np.testing.assert_allclose(m.m2 / m.count, plain.m2 / plain.count, rtol=1e-13)


@pytest.mark.parametrize("nonsense", [np.nan, -1.0, np.inf, 2.0**300])
def test_weights_where_masked_are_not_looked_at(backend, nonsense):
    x, dy, gamma, beta = arguments((4, 6, 7), 1)
    mask, weight = some_mask((4, 1, 7)), some_weights((4, 1, 7))

    def results():
        keywords = {"mask": mask, "sample_weight": weight}
        y, saved = bncore.batch_norm(x, gamma, beta, **keywords)
        m = bncore.moments(x, **keywords)
        layer = bncore.BatchNorm(6)
        layer(x, **keywords)
        layer.eval()(x, **keywords)
        g = bncore.batch_norm_backward(dy, saved)
        return bits(y, *g, m.count, m.mean, m.m2, layer.running_mean, layer.running_var)

    clean = results()
    weight[~mask] = nonsense
    assert results() == clean
