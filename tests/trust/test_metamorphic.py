"""Relations between results that hold whatever the data is.

The long run (BNCORE_TEST_LONG=1) tries 20 000 examples of each.
"""

import math

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bncore

pytestmark = pytest.mark.metamorphic

EPS = 1e-5
DTYPES = st.sampled_from(["float32", "float64"])


@st.composite
def batches(draw, min_values=1, magnitude=1e6):
    """(N, C, S) or (N, C) arrays, as rows, columns or slices, with a seed for what else is random.

    Half of them come from hypothesis, value by value; the others are larger and normal.
    """
    n, c = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    s = draw(st.sampled_from([1, 1, 2, 5, 49, 130]))
    if n * s < min_values:
        n = min_values
    dtype = draw(DTYPES)
    seed = draw(st.integers(0, 2**32 - 1))
    if draw(st.booleans()) and n * c * s <= 60:
        elements = st.floats(-magnitude, magnitude, width=32, allow_subnormal=False)
        x = draw(npst.arrays(dtype, (n, c, s), elements=elements))
    else:
        rng = np.random.default_rng(seed)
        spread = 10.0 ** rng.integers(-4, 5, (c, 1))
        x = (rng.standard_normal((n, c, s)) * spread + rng.integers(-3, 4)).astype(dtype)
    kind = draw(st.sampled_from(["rows", "channels last", "sliced"]))
    if kind == "channels last":
        x = np.ascontiguousarray(x.transpose(0, 2, 1)).transpose(0, 2, 1)
    elif kind == "sliced":
        x = np.repeat(x, 2, axis=1)[:, ::2]
    return x, seed


def in_dense_memory(batch):
    """The batch in an order that copies keep: bits are promised for one memory layout."""
    x, seed = batch
    return x.copy(order="K"), seed


def parameters(x, seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, x.shape[1])).astype(x.dtype)


def assert_same_bits(a, b):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}"))


def forward_and_backward(x, gamma, beta, eps=EPS):
    """y, dx, dgamma and dbeta, contiguous."""
    dy = np.cos(np.arange(x.size, dtype=np.float64)).reshape(x.shape).astype(x.dtype)
    y, saved = bncore.batch_norm(x, gamma, beta, eps=eps)
    g = bncore.batch_norm_backward(dy, saved)
    return [np.ascontiguousarray(part) for part in (y, g.dx, g.dgamma, g.dbeta)]


@given(batch=batches(), k=st.integers(-60, 60))
def test_scaling_by_a_power_of_two(backend, batch, k):
    """x 2^k with eps 4^k: y has the same bits, dx is scaled back."""
    x, seed = in_dense_memory(batch)
    gamma, beta = parameters(x, seed)
    y, dx, dgamma, dbeta = forward_and_backward(x, gamma, beta)
    scaled = forward_and_backward(np.ldexp(x, k), gamma, beta, eps=EPS * 4.0**k)
    assert_same_bits(scaled[0], y)
    assert_same_bits(scaled[2], dgamma)
    assert_same_bits(scaled[3], dbeta)
    expected = np.ldexp(dx, -k)
    normal = np.abs(expected) > 2 * np.finfo(x.dtype).tiny
    assert_same_bits(scaled[1][normal], expected[normal])


@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [
        ("float32", [-140, -126, -100, -60, 60, 100, 120]),
        ("float64", [-500, -400, -100, 100, 400, 600, 1000]),
    ],
)
@pytest.mark.parametrize("shape", [(33, 5), (4, 5, 9), (3, 5, 200), (40, 24, 49)])
def test_scaling_to_the_ends_of_the_range(backend, dtype, exponents, shape):
    """Where squares of the data leave the range too: still the same bits."""
    x = np.random.default_rng(0).integers(-50, 51, shape).astype(dtype)
    for k in exponents:
        eps = 1e-300 if k > 0 else 1e-5  # stays in the range with 4^k
        y, _ = bncore.batch_norm(x, eps=eps)
        scaled, _ = bncore.batch_norm(np.ldexp(x, k), eps=math.ldexp(eps, 2 * k))
        assert_same_bits(scaled, y)


@given(batch=batches())
def test_permuting_channels(backend, batch):
    x, seed = in_dense_memory(batch)
    gamma, beta = parameters(x, seed)
    order = np.random.default_rng(seed).permutation(x.shape[1])
    permuted = np.empty_like(x)
    permuted[...] = x[:, order]
    straight, saved = bncore.batch_norm(x, gamma, beta)
    shuffled, shuffled_saved = bncore.batch_norm(permuted, gamma[order], beta[order])
    assert_same_bits(np.ascontiguousarray(shuffled), np.ascontiguousarray(straight[:, order]))
    np.testing.assert_array_equal(shuffled_saved.stats, saved.stats[:, order])


@given(
    shape=st.tuples(st.integers(1, 50), st.integers(1, 20), st.integers(1, 50)),
    value=st.floats(-(2.0**100), 2.0**100, width=32),
    dtype=DTYPES,
    eps=st.sampled_from([1e-300, 1e-12, 1e-5, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_constant_channel_is_beta(backend, shape, value, dtype, eps, seed):
    x = np.full(shape, value, dtype)
    gamma, beta = parameters(x, seed)
    y, saved = bncore.batch_norm(x, gamma, beta, eps=eps)
    assert (saved.var == 0).all()
    np.testing.assert_array_equal(y, np.broadcast_to(beta[:, None], shape))


@given(batch=batches(), poison=st.sampled_from([np.nan, np.inf, -np.inf]), data=st.data())
def test_a_poisoned_channel_leaves_the_others_alone(backend, batch, poison, data):
    x, seed = in_dense_memory(batch)
    gamma, beta = parameters(x, seed)
    channel = data.draw(st.integers(0, x.shape[1] - 1))
    clean = forward_and_backward(x, gamma, beta)
    x = x.copy(order="K")
    x[data.draw(st.integers(0, len(x) - 1)), channel, -1] = poison
    poisoned = forward_and_backward(x, gamma, beta)
    others = np.arange(x.shape[1]) != channel
    for before, after in zip(clean[:2], poisoned[:2], strict=True):
        assert_same_bits(after[:, others], before[:, others])
    for before, after in zip(clean[2:], poisoned[2:], strict=True):
        assert_same_bits(after[others], before[others])
    assert np.isnan(poisoned[0][:, channel]).any()


@given(batch=batches(min_values=2), data=st.data())
def test_merging_the_moments_of_parts(backend, batch, data):
    x, _ = batch
    cuts = sorted(data.draw(st.lists(st.integers(0, len(x)), max_size=4)))
    whole, merged = bncore.moments(x), bncore.Moments()
    for part in np.split(x, cuts):
        merged = merged + bncore.moments(part)
    values = x.astype(np.float64)
    deviations = values - values.mean(axis=(0, 2), keepdims=True)
    size = np.sqrt((deviations**2).mean(axis=(0, 2)))
    np.testing.assert_array_equal(merged.count, whole.count)
    slack = 1e-14 * (size + np.abs(whole.mean))
    assert (np.abs(merged.mean - whole.mean) <= slack).all()
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-13, atol=0)


@given(batch=batches(min_values=2), data=st.data())
def test_adding_the_sums_of_parts(backend, batch, data):
    """The gradient from the sums of two parts is that of the whole batch."""
    x, seed = batch
    gamma, beta = parameters(x, seed)
    cut = data.draw(st.integers(0, len(x)))
    dy = np.random.default_rng(seed).standard_normal(x.shape).astype(x.dtype)
    _, saved = bncore.batch_norm(x, gamma, beta, eps=0.1)
    whole = bncore.batch_norm_backward(dy, saved)
    parts = [(dy[:cut], x[:cut]), (dy[cut:], x[cut:])]
    sums = [bncore.backward_reduce(*part, saved.mean, saved.inv_std) for part in parts]
    sum_dy, sum_dy_xhat = (sum(column) for column in zip(*sums, strict=True))
    total = float(len(x) * x.shape[2])
    dx = np.concatenate([
        bncore.backward_apply(
            *part, saved.mean, saved.inv_std, gamma, sum_dy, sum_dy_xhat, total
        )
        for part in parts
    ])  # fmt: skip
    scale = np.abs(gamma * saved.inv_std)[:, None] * np.abs(dy).max(initial=1) * 10
    tolerance = 1e-13 if x.dtype == np.float64 else 1e-6
    assert (np.abs(dx.astype(np.float64) - whole.dx) <= tolerance * scale).all()
