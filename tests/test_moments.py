"""The statistics algebra: parts that add up to the whole, in statistics and in gradients."""

import numpy as np
import pytest

import bncore

from . import oracle, torch_oracle
from .arrays import bits, in_layout, normal
from .oracle import assert_within, ulp

SHAPES = [
    ((60, 5), 1),
    ((9, 4, 33), 1),
    ((20, 9, 7, 7), 1),
    ((6, 7, 5), -1),
    ((4, 3, 2, 5), (1, 3)),
]
SPLITS = [(1,), (30,), (59,), (0, 60), (10, 11, 12), tuple(range(1, 60))]


def total(parts):
    return sum(parts, bncore.Moments())


@pytest.mark.parametrize("layout", ["C", "channels_last", "sliced"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_moments_are_those_of_the_formulas(backend, dtype, shape, axis, layout):
    x = in_layout((normal(1, shape) + 100).astype(dtype), layout, axis)
    exact = oracle.forward(x, axis=axis)
    m = bncore.moments(x, axis=axis)
    count = x.size // exact.mean.size
    assert (m.count == count).all() and m.count.shape == m.mean.shape == exact.mean.shape
    assert m.mean.dtype == m.m2.dtype == m.count.dtype == np.float64
    assert_within(m.mean, exact.mean, ulp(exact.mean, dtype), "mean")
    relative = 2.0**-23 if dtype == np.float32 else 1e-14
    assert_within(m.m2, exact.var * count, relative * exact.var * count, "m2")
    assert_within(m.var(ddof=1), exact.var * count / (count - 1), relative * m.var(1), "var")


def test_moments_are_what_batch_norm_saves(backend):
    x = normal(1, (20, 9, 7, 7), np.float32)
    _, saved = bncore.batch_norm(x)
    m = bncore.moments(x)
    np.testing.assert_array_equal(saved.mean, m.mean)
    np.testing.assert_allclose(saved.var, m.var(), rtol=1e-15)
    np.testing.assert_array_equal(saved.count, m.count)


@pytest.mark.parametrize("ratio", [0, 1e6])
@pytest.mark.parametrize("split", SPLITS, ids=lambda split: f"{len(split) + 1}_parts")
def test_any_split_adds_up_to_the_whole(backend, split, ratio):
    x = normal(2, (60, 4, 3)) + ratio
    exact = oracle.forward(x)
    m = total(bncore.moments(part) for part in np.split(x, split))
    assert (m.count == 180).all()
    size = np.maximum(abs(exact.mean), 1)
    assert_within(m.mean, exact.mean, ulp(size, np.float64), "mean")
    assert_within(m.var(), exact.var, 1e-14 * exact.var, "var")


def test_moments_of_nothing_are_the_identity(backend):
    m = bncore.moments(normal(3, (7, 4)))
    for same in (m + bncore.Moments(), bncore.Moments() + m, m + bncore.moments(np.empty((0, 4)))):
        assert bits(same.count, same.mean, same.m2) == bits(m.count, m.mean, m.m2)
    nothing = bncore.Moments() + bncore.Moments()
    assert nothing.count == nothing.mean == nothing.m2 == 0 and np.isnan(nothing.var())


def test_addition_leaves_its_parts_alone(backend):
    a, b = bncore.moments(normal(1, (7, 4))), bncore.moments(normal(2, (5, 4)))
    before = bits(a.count, a.mean, a.m2, b.count, b.mean, b.m2)
    a + b
    assert bits(a.count, a.mean, a.m2, b.count, b.mean, b.m2) == before


def test_a_bad_value_stays_in_its_channel(backend):
    x = normal(1, (8, 4))
    clean = bncore.moments(x[:3]) + bncore.moments(x[3:])
    x[5, 2] = np.nan
    m = bncore.moments(x[:3]) + bncore.moments(x[3:])
    others = [0, 1, 3]
    assert bits(m.mean[others], m.m2[others]) == bits(clean.mean[others], clean.m2[others])
    assert np.isnan(m.mean[2]) and np.isnan(m.m2[2])


@pytest.mark.parametrize("ddof", [0, 1, 0.5, 180, 200])
def test_var_divides_by_count_minus_ddof(backend, ddof):
    m = bncore.moments(normal(1, (60, 4, 3)))
    expected = m.m2 / (180 - ddof) if ddof < 180 else np.full(4, np.nan)
    np.testing.assert_array_equal(m.var(ddof), expected)


def test_masks_and_weights(backend):
    x = normal(1, (6, 4, 5))
    weight = np.random.default_rng(1).random((6, 1, 5))
    mask = weight > 0.3
    exact = oracle.forward(x, weight=np.where(mask, weight, 0))
    m = bncore.moments(x, mask=mask, sample_weight=weight)
    np.testing.assert_allclose(m.count, weight[mask].sum(), rtol=1e-14)
    np.testing.assert_allclose(m.mean, exact.mean.astype(float), rtol=1e-13)
    np.testing.assert_allclose(m.var(), exact.var.astype(float), rtol=1e-13)


def test_integers_become_float64():
    m = bncore.Moments([2, 2], [1, 3], [4, 5])
    assert m.count.dtype == m.mean.dtype == m.m2.dtype == np.float64
    assert repr(m).startswith("Moments(count=array([2., 2.])")


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
class TestGradientsOfParts:
    def arguments(self, shape, axis, dtype):
        channels = [shape[one] for one in oracle.channel_axes(axis, len(shape))]
        return normal(1, shape, dtype), normal(2, shape, dtype), normal(3, channels, dtype)

    def test_reduce_and_apply_are_the_backward_pass(self, backend, shape, axis, dtype):
        x, dy, gamma = self.arguments(shape, axis, dtype)
        _, saved = bncore.batch_norm(x, gamma, np.zeros_like(gamma), axis=axis)
        g = bncore.batch_norm_backward(dy, saved)
        statistics = saved.mean, saved.inv_std
        r = bncore.backward_reduce(dy, x, *statistics, axis=axis)
        assert r.sum_dy.dtype == r.sum_dy_xhat.dtype == np.float64
        dx = bncore.backward_apply(dy, x, *statistics, gamma, *r, saved.count, axis=axis)
        tolerance = 20 * np.finfo(dtype).eps
        np.testing.assert_allclose(dx, g.dx, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(r.sum_dy, g.dbeta, rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(r.sum_dy_xhat, g.dgamma, rtol=1e-6, atol=1e-5)

    def test_parts_of_a_batch_give_the_whole_ones_gradient(self, backend, shape, axis, dtype):
        """As in data-parallel training, and under gradient accumulation."""
        x, dy, gamma = self.arguments(shape, axis, dtype)
        exact = oracle.backward(dy, x, gamma, axis=axis)
        cuts = [1, shape[0] // 2]
        parts = list(zip(np.split(dy, cuts), np.split(x, cuts), strict=True))
        m = total(bncore.moments(part, axis=axis) for _, part in parts)
        statistics = m.mean, 1 / np.sqrt(m.var() + 1e-5)
        reduced = [bncore.backward_reduce(*part, *statistics, axis=axis) for part in parts]
        sums = [sum(both) for both in zip(*reduced, strict=True)]
        dx = np.concatenate([
            bncore.backward_apply(*part, *statistics, gamma, *sums, m.count, axis=axis)
            for part in parts
        ])  # fmt: skip
        tolerance = 8 * ulp(exact.dx_scale.max(), dtype)
        assert_within(dx, exact.dx, tolerance, "dx")
        assert_within(sums[0], exact.dbeta, 1e-6 * exact.dbeta_scale, "sum_dy")
        assert_within(sums[1], exact.dgamma, 1e-6 * exact.dgamma_scale, "sum_dy_xhat")

    def test_apply_in_place(self, backend, shape, axis, dtype):
        x, dy, gamma = self.arguments(shape, axis, dtype)
        _, saved = bncore.batch_norm(x, axis=axis)
        r = bncore.backward_reduce(dy, x, saved.mean, saved.inv_std, axis=axis)
        rest = saved.mean, saved.inv_std, gamma, *r, saved.count
        dx = bncore.backward_apply(dy, x, *rest, axis=axis)
        for pair in ((dy.copy(), x), (dy, x.copy())):
            out = pair[0] if pair[1] is x else pair[1]
            assert bncore.backward_apply(*pair, *rest, axis=axis, out=out) is out
            assert bits(out) == bits(dx)


def test_the_sum_of_a_list_needs_no_start(backend):
    x = normal(1, (6, 3))
    parts = [bncore.moments(x[:2]), bncore.moments(x[2:])]
    assert_within(sum(parts).m2, bncore.moments(x).m2, 1e-13, "m2")


def test_a_batch_that_is_empty_everywhere_has_an_empty_gradient(backend):
    x, zero = np.zeros((0, 3), np.float32), np.zeros(3)
    m = bncore.moments(x)
    sums = bncore.backward_reduce(x, x, m.mean, zero + 1)
    dx = bncore.backward_apply(x, x, m.mean, zero + 1, None, *sums, m.count)
    assert dx.shape == x.shape
    with pytest.raises(ValueError, match="count"):
        bncore.backward_apply(x + 1, x, m.mean, zero + 1, None, *sums, -m.count - 1)


POSITIONS = ["mask", "weight", "both"]


def positions_of(shape, axis, kind):
    """A mask and weights over the positions, or None."""
    axes = oracle.channel_axes(axis, len(shape))
    sizes = [1 if i in axes else n for i, n in enumerate(shape)]
    random = np.random.default_rng(5)
    mask, weight = random.random(sizes) < 0.6, 2 * random.random(sizes)
    weight[weight < 0.4] = 0
    mask.flat[0], weight.flat[0] = True, 1
    return mask if kind != "weight" else None, weight if kind != "mask" else None


def in_parts(x, dy, gamma, beta, axis, mask, weight, cuts, activation=None, eps=1e-5):
    """y, dx, dgamma and dbeta of a batch that comes in parts along its first axis."""
    parts = []
    for part in np.split(np.arange(len(x)), cuts):
        given = [None if a is None else a[part] for a in (mask, weight)]
        parts.append((x[part], dy[part], *given))
    m = total(
        bncore.moments(x, axis=axis, mask=mask, sample_weight=weight)
        for x, _, mask, weight in parts
    )
    inv_std = 1 / np.sqrt(m.var() + eps)
    lo = {"mean_lo": m.mean_lo, "axis": axis}
    y = [
        bncore.batch_norm_inference(
            x, m.mean, m.var(), gamma, beta, eps=eps, mask=mask, activation=activation, **lo
        )
        for x, _, mask, _ in parts
    ]
    if activation == "relu":
        parts = [(x, dy * (a > 0), *rest) for a, (x, dy, *rest) in zip(y, parts, strict=True)]
    sums = [
        bncore.backward_reduce(dy, x, m.mean, inv_std, mask=mask, **lo) for x, dy, mask, _ in parts
    ]
    sum_dy, sum_dy_xhat = (sum(both) for both in zip(*sums, strict=True))
    dx = [
        bncore.backward_apply(
            dy, x, m.mean, inv_std, gamma, sum_dy, sum_dy_xhat, m.count, mask=mask,
            sample_weight=weight, **lo,
        )
        for x, dy, mask, weight in parts
    ]  # fmt: skip
    return np.concatenate(y), np.concatenate(dx), sum_dy_xhat, sum_dy


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("layout", ["C", "channels_last"])
class TestMaskedParts:
    """Nothing of what a batch has that comes in parts is out of reach."""

    def test_are_torchs_whole(self, backend, layout, shape, axis, activation, kind):
        channels = [shape[one] for one in oracle.channel_axes(axis, len(shape))]
        x, dy = (in_layout(normal(i, shape), layout, axis) for i in (1, 2))
        gamma, beta = normal(3, channels), normal(4, channels)
        mask, weight = positions_of(shape, axis, kind)
        valid = np.broadcast_to(True if mask is None else mask, shape)
        counted = np.where(True if mask is None else mask, 1.0 if weight is None else weight, 0)
        expected = torch_oracle.batch_norm(
            x, np.where(valid, dy, 0), gamma, beta, axis=axis, activation=activation,
            weight=counted,
        )  # fmt: skip
        for array in (x, dy):
            array[~valid] = np.nan
        found = in_parts(x, dy, gamma, beta, axis, mask, weight, [1, len(x) // 2], activation)
        named = ("y", "dx", "dgamma", "dbeta")
        for name, actual in zip(named, found, strict=True):
            right = getattr(expected, name)
            right = np.where(valid, right, 0) if name in ("y", "dx") else right
            np.testing.assert_allclose(actual, right, rtol=1e-10, atol=1e-11, err_msg=name)
            if name in ("y", "dx"):
                assert (actual[~valid] == 0).all()


@pytest.mark.parametrize("kind", [None, "mask", "weight"])
@pytest.mark.parametrize("ratio", [0, 1e6, 1e10])
def test_parts_keep_the_promises(backend, ratio, kind):
    """y and dx far from zero are as near the exact ones as those of the whole batch."""
    shape = (60, 4, 3)
    x, dy, gamma, beta = normal(1, shape) + ratio, normal(2, shape), normal(3, 4), normal(4, 4)
    mask, weight = positions_of(shape, 1, kind) if kind else (None, None)
    counted = mask if weight is None else weight
    counted = None if counted is None else np.broadcast_to(counted, shape).astype(float)
    valid = np.broadcast_to(True if mask is None else mask, shape)
    exact = oracle.forward(x, gamma, beta, weight=counted)
    gradient = oracle.backward(np.where(valid, dy, 0), x, gamma, beta, weight=counted)
    y, dx, dgamma, _ = in_parts(x, dy, gamma, beta, 1, mask, weight, [1, 20, 21])
    scale = np.maximum(exact.scale, 1)
    assert_within(y, np.where(valid, exact.y, 0), 16 * ulp(scale, np.float64), "y")
    limit = 1e-12 * gradient.dx_scale.max()
    assert_within(dx, np.where(valid, gradient.dx, 0), limit, "dx")
    assert_within(dgamma, gradient.dgamma, 1e-12 * gradient.dgamma_scale, "dgamma")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", [None, *POSITIONS])
@pytest.mark.parametrize("shape", [(40, 5), (8, 5, 7, 7)], ids=str)
def test_half_precision_is_rounded_once(backend, shape, kind, dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    x, dy = (normal(i, shape, dtype) for i in (1, 2))
    gamma, beta = normal(3, 5, np.float32), normal(4, 5, np.float32)
    mask, weight = positions_of(shape, 1, kind) if kind else (None, None)
    arguments = gamma, beta, 1, mask, weight, [1, 3]
    found = in_parts(x, dy, *arguments)
    exact = in_parts(x.astype(np.float64), dy.astype(np.float64), *arguments)
    for name, actual, right in zip(("y", "dx"), found, exact, strict=False):
        assert actual.dtype == dtype
        tolerance = ulp(right, dtype) / 2 + 4 * ulp(abs(right).max() + 1, np.float32)
        assert_within(actual.astype(np.float64), right, tolerance, name)


@pytest.mark.parametrize("kind", [None, *POSITIONS])
@pytest.mark.parametrize("layout", ["C", "channels_last", "sliced"])
def test_apply_over_dy_and_over_x(backend, kind, layout):
    shape = (6, 4, 5)
    mask, weight = positions_of(shape, 1, kind) if kind else (None, None)
    dy, x = (in_layout(normal(i, shape, np.float32), layout) for i in (1, 2))
    m = bncore.moments(x, mask=mask, sample_weight=weight)
    rest = m.mean, 1 / np.sqrt(m.var() + 1e-5), None, normal(3, 4), normal(4, 4), m.count
    given = {"mask": mask, "sample_weight": weight}
    dx = bncore.backward_apply(dy, x, *rest, **given)
    for place in (0, 1):
        pair = [in_layout(a, layout) for a in (dy, x)]
        out = pair[place]
        assert bncore.backward_apply(*pair, *rest, **given, out=out) is out
        assert bits(out) == bits(dx)


def test_a_part_without_any_position(backend):
    """Its moments and sums are nothing's, and so is its gradient; alone it is a whole batch."""
    x, zero = np.full((3, 2), np.nan), np.zeros(2)
    mask = np.zeros((3, 1), bool)
    m = bncore.moments(x, mask=mask)
    assert (m.count == 0).all() and (m.m2 == 0).all()
    r = bncore.backward_reduce(x, x, zero, zero + 1, mask=mask)
    assert (r.sum_dy == 0).all() and (r.sum_dy_xhat == 0).all()
    for count in (m.count, 7.0):
        dx = bncore.backward_apply(x, x, zero, zero + 1, None, zero, zero, count, mask=mask)
        assert (dx == 0).all()
    x = normal(1, (3, 2))
    weight = np.zeros((3, 1))
    dx = bncore.backward_apply(
        x, x, zero, zero + 2, None, zero + 5, zero + 5, 0, sample_weight=weight
    )
    np.testing.assert_array_equal(dx, 2 * x)
    with pytest.raises(ValueError, match="count must be one positive number"):
        bncore.backward_apply(x, x, zero, zero + 1, None, zero, zero, 0, sample_weight=weight + 1)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("mask", np.ones((6, 4), bool), "mask must broadcast to \\(6, 1\\)"),
        ("mask", np.ones((6, 1)), "mask must have dtype bool, got float64"),
        ("mean_lo", np.zeros(3), "mean_lo must have the channels' shape \\(4,\\), got \\(3,\\)"),
    ],
)
def test_what_does_not_fit_is_refused(name, value, error):
    x, zero = normal(1, (6, 4)), np.zeros(4)
    given = {name: value}
    for call in (
        lambda: bncore.backward_reduce(x, x, zero, zero + 1, **given),
        lambda: bncore.backward_apply(x, x, zero, zero + 1, None, zero, zero, 6, **given),
        lambda: bncore.batch_norm_inference(x, zero, zero + 1, **given),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            call()


def test_taking_all_of_a_part_away_again():
    m = bncore.moments(normal(1, (10, 3)))
    nothing = m + bncore.Moments(-m.count, m.mean, -m.m2)
    assert (nothing.count == 0).all() and (nothing.m2 == 0).all()
    np.testing.assert_array_equal(nothing.mean, m.mean)
