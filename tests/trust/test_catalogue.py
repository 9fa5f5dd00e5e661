"""Known failures of other implementations, one test each, by number and where it was reported.

The table of symptoms is in ``docs/testing.md``.
"""

import numpy as np
import pytest
from trust_layouts import LAYOUTS, by_channel

import bncore
from bncore import functional

pytestmark = pytest.mark.catalogue


def normal(seed, shape, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def exact_output(x, eps, axis=1):
    """Normalized in extended precision."""
    wide = np.asarray(x, np.longdouble)
    axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    mean = wide.mean(axis=axes, keepdims=True)
    var = ((wide - mean) ** 2).mean(axis=axes, keepdims=True)
    return (wide - mean) / np.sqrt(var + eps)


def test_01_channels_last_equals_channels_first_pytorch_121651(backend):
    values = normal(1, (19, 6, 5, 7))
    results = {}
    for name, layout in LAYOUTS.items():
        x, axis = layout(values)
        y, saved = bncore.batch_norm(x, axis=axis)
        g = bncore.batch_norm_backward(layout(values**2)[0], saved)
        results[name] = by_channel(y, axis), by_channel(g.dx, axis)
    for y, dx in results.values():
        np.testing.assert_allclose(y, results["nchw"][0], rtol=0, atol=1e-6)
        np.testing.assert_allclose(dx, results["nchw"][1], rtol=0, atol=1e-5)


def test_02_accumulator_saturates(backend):
    """The mean of 2^25 ones was 0.5: here 2^24 + 4 of them, added to themselves as moments."""
    m = bncore.moments(np.ones((2**24 + 4, 1), np.float32))
    assert m.mean == 1
    assert m.m2 == 0
    assert (m + m).count == 2**25 + 8


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [1e7 + 3, 0.1, 1000.1, -3e-20])
def test_03_constant_channel_is_beta_pytorch_5410(backend, value, layout):
    x, axis = LAYOUTS[layout](np.full((5, 9, 1, 1), value, np.float32))
    beta = normal(3, 5)
    y, saved = bncore.batch_norm(x, np.full(5, 7.7, np.float32), beta, axis=axis, eps=1e-12)
    assert (saved.var == 0).all()
    assert (by_channel(y, axis) == beta[:, None]).all()


@pytest.mark.parametrize("ratio", [1e3, 1e6, 1e9, 1e12])
def test_04_no_negative_variance_flax_1491_tensorflow_3290_18334_keras_18795(backend, ratio):
    x = normal(4, (500, 3), "float64") + ratio
    _, saved = bncore.batch_norm(x)
    centred = (x - x[0]).astype(np.longdouble)
    expected = ((centred - centred.mean(axis=0)) ** 2).mean(axis=0)
    np.testing.assert_allclose(saved.var, expected.astype(float), rtol=1e-14)


@pytest.mark.parametrize("exponent", [62, 100, 124])
def test_05_large_float32_pytorch_178123(backend, exponent):
    x = normal(5, (64, 4))
    y, _ = bncore.batch_norm(x, eps=1e-5)
    scaled, saved = bncore.batch_norm(np.ldexp(x, exponent), eps=1e-5 * 4.0**exponent)
    np.testing.assert_array_equal(scaled, y)
    assert np.isfinite(saved.var).all()


@pytest.mark.parametrize("exponent", [-100, -120])
def test_06_tiny_float32_with_a_tiny_eps(backend, exponent):
    x = normal(6, (64, 4))
    tiny = np.ldexp(x, exponent)
    y, saved = bncore.batch_norm(tiny, eps=1e-100)
    assert (saved.var > 0).all()
    np.testing.assert_allclose(y, exact_output(tiny, 1e-100).astype(np.float32), atol=1e-6)
    subnormal, _ = bncore.batch_norm(np.float32([[1e-45], [3e-45]]), eps=1e-100)
    np.testing.assert_allclose(subnormal, [[-1], [1]], rtol=1e-6)


def test_07_folding_in_evaluation_cancels(backend):
    x = 1e6 + np.float32(0.0625) * np.arange(-4, 5, dtype=np.float32)[:, None]
    mean, var = np.float32([1e6]), np.float32([0.013])
    y = bncore.batch_norm_inference(x, mean, var, eps=1e-12)
    expected = (x.astype(float) - 1e6) / np.sqrt(float(var[0]) + 1e-12)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_08_a_bad_value_stays_in_its_channel_pytorch_90342(backend, poison):
    x = normal(8, (33, 5, 7))
    clean, bad = bncore.BatchNorm(5), bncore.BatchNorm(5)
    expected = clean(x)
    x[3, 2, 1] = poison
    y = bad(x)
    others = [0, 1, 3, 4]
    np.testing.assert_array_equal(y[:, others], expected[:, others])
    np.testing.assert_array_equal(bad.running_mean[others], clean.running_mean[others])
    np.testing.assert_array_equal(bad.running_var[others], clean.running_var[others])
    assert not np.isfinite(bad.running_mean[2])


def test_09_one_value_per_channel_pytorch_1381(backend):
    x, beta = normal(9, (1, 4)), normal(10, 4)
    y, _ = bncore.batch_norm(x, None, beta)
    np.testing.assert_array_equal(y, beta[None])
    layer = bncore.BatchNorm(4)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(x)
    assert (layer.running_var == 1).all()


def test_10_the_counter_waits_for_success(backend):
    layer = bncore.BatchNorm(4)
    layer(normal(10, (5, 4)))
    before = {key: value.tobytes() for key, value in layer.state_dict().items()}
    for bad in (normal(10, (1, 4)), normal(10, (5, 3)), np.zeros((5, 4), int)):
        with pytest.raises((ValueError, TypeError)):
            layer(bad)
    assert {key: value.tobytes() for key, value in layer.state_dict().items()} == before


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0), (2, 0, 4), (0, 0), (0, 3, 0)])
def test_11_empty_batch_pytorch_29578_120803_95324_40806(backend, shape):
    x = np.empty(shape, np.float32)
    layer = bncore.BatchNorm(shape[1])
    before = {key: value.tobytes() for key, value in layer.state_dict().items()}
    y = layer(x)
    assert y.shape == shape
    assert layer.backward(y).shape == shape
    assert not layer.grad_gamma.any()
    assert layer.eval()(x).shape == shape
    assert {key: value.tobytes() for key, value in layer.state_dict().items()} == before


@pytest.mark.parametrize("affine", [True, False])
def test_12_no_running_statistics_in_evaluation_pytorch_141203(backend, affine):
    x = normal(12, (6, 3, 2))
    layer = bncore.BatchNorm(3, affine=affine, track_running_stats=False).eval()
    np.testing.assert_array_equal(layer(x), bncore.batch_norm(x)[0])
    assert layer.backward(x).shape == x.shape
    with pytest.raises(TypeError, match="mean must be"):
        bncore.batch_norm_inference(x, None, None)


@pytest.mark.parametrize("rank", range(9))
def test_13_every_rank_pytorch_105458(backend, rank):
    shape = (3, 2, 2, 1, 2, 3, 1, 2)[:rank]
    x = normal(13, shape, "float64")
    if rank < 2:
        with pytest.raises(ValueError, match="dimension"):
            bncore.batch_norm(x)
    if rank:
        for axis in range(-rank, rank):
            y, saved = bncore.batch_norm(x, axis=axis)
            np.testing.assert_allclose(y, exact_output(x, 1e-5, axis).astype(float), atol=1e-12)
            assert bncore.batch_norm_backward(x, saved).dx.shape == shape


def test_14_offsets_are_64_bit_mxnet_19065(backend):
    """Rows more than 2^31 elements apart, in memory that is mostly never touched.

    More than 2^31 elements are in test_huge.py.
    """
    memory = np.zeros(2**31 + 2**12, np.float16)
    x = np.lib.stride_tricks.as_strided(memory, (3, 300), (2**31, 2))
    values = normal(14, x.shape, "float16")
    x[...] = values
    y, saved = bncore.batch_norm(x)
    expected, _ = bncore.batch_norm(values)
    np.testing.assert_array_equal(y, expected)
    g = bncore.batch_norm_backward(values, saved, out=x)
    assert g.dx is x
    assert np.isfinite(x).all()


def test_15_float16_at_its_limit_pytorch_147303_126525(backend):
    x = (normal(15, (300, 4)).clip(-1, 1) * 6e4).astype(np.float16)
    y, saved = bncore.batch_norm(x)
    assert (saved.var > 65504).all()
    np.testing.assert_allclose(y.astype(float), exact_output(x, 1e-5).astype(float), rtol=1e-3)
    dx = bncore.batch_norm_backward(np.ones_like(x), saved).dx
    assert np.isfinite(dx).all()


@pytest.mark.parametrize("plane", [(1, 1), (7, 7), (13, 5), (56, 56)])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_16_17_any_number_of_channels_apex_1768_mxnet_20907(backend, layout, plane):
    for channels in range(1, 68, 3 if plane == (56, 56) else 1):
        values = normal(channels, (channels, 3, *plane))
        x, axis = LAYOUTS[layout](values)
        dy = x[::-1].copy(order="K")
        y, saved = bncore.batch_norm(x, axis=axis)
        wide, wide_saved = functional.batch_norm(x.astype(float), axis=axis)
        np.testing.assert_allclose(y, wide, atol=2e-6, err_msg=str(channels))
        dx = bncore.batch_norm_backward(dy, saved).dx
        wide_dx = bncore.batch_norm_backward(dy.astype(float), wide_saved).dx
        np.testing.assert_allclose(dx, wide_dx, atol=1e-5, err_msg=str(channels))
        flat = values.reshape(channels, -1).astype(np.longdouble)
        expected = (flat - flat.mean(axis=1, keepdims=True)) * np.float64(1)
        expected /= np.sqrt((expected**2).mean(axis=1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(by_channel(y, axis), expected.astype(float), atol=2e-6)


def test_18_gradients_do_not_accumulate_mxnet_16297_18475_18499(backend):
    layer = bncore.BatchNorm(3)
    x, dy = normal(18, (9, 3, 4)), normal(19, (9, 3, 4))
    layer(x)
    first = layer.backward(dy).tobytes(), layer.grad_gamma.tobytes(), layer.grad_beta.tobytes()
    buffer = np.full_like(dy, 1e9)
    layer.backward(dy, out=buffer)
    again = buffer.tobytes(), layer.grad_gamma.tobytes(), layer.grad_beta.tobytes()
    assert again == first


@pytest.mark.parametrize("training", [True, False])
def test_19_gradient_follows_the_mode_xla_913_3361_pytorch_586(backend, training):
    layer = bncore.BatchNorm(2, dtype=np.float64).train(training)
    layer.running_mean[:], layer.running_var[:] = [0.3, -1], [2, 0.5]
    layer.gamma[:] = [1.5, -0.7]
    x, dy = normal(19, (2, 5, 2), "float64")

    def loss(x):
        copy = bncore.BatchNorm(2, dtype=np.float64)
        copy.load_state_dict(layer.state_dict())
        return (copy.train(training)(x) * dy).sum()

    numerical = np.empty_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = 1e-6
        numerical[index] = (loss(x + step) - loss(x - step)) / 2e-6
    layer(x)
    np.testing.assert_allclose(layer.backward(dy), numerical, atol=1e-8)


@pytest.mark.parametrize("eps", [1e-12, 1e-8, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_20_eps_is_not_clamped_tensorflow_37768_8090(backend, dtype, eps):
    x = (normal(20, (50, 3)) * 1e-5).astype(dtype)
    y, saved = bncore.batch_norm(x, eps=eps)
    np.testing.assert_allclose(saved.inv_std, 1 / np.sqrt(saved.var + eps), rtol=1e-15)
    np.testing.assert_allclose(y, exact_output(x, eps).astype(float), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_21_unbiased_on_every_path_tensorflow_55545_keras_8982(backend, layout):
    x, axis = LAYOUTS[layout](np.array([[1.0, 4.0], [2.0, 8.0]])[:, :, None, None])
    layer = bncore.BatchNorm(2, axis=axis, momentum=1.0, dtype=np.float64)
    _, saved = bncore.batch_norm(x, axis=axis)
    layer(x)
    np.testing.assert_array_equal(saved.var, [2.25, 9.0])
    np.testing.assert_array_equal(layer.running_var, [4.5, 18.0])


def test_22_aliased_parameters_onnxruntime_29790_29878(backend):
    one = normal(22, 6, "float64") ** 2 + 0.5
    x = normal(23, (4, 6), "float64")
    expected = bncore.batch_norm_inference(x, *(one.copy() for _ in range(4)))
    np.testing.assert_array_equal(bncore.batch_norm_inference(x, one, one, one, one), expected)
    with pytest.raises(ValueError, match="share memory"):
        bncore.batch_norm_inference(one[None], one, one, out=one[None])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_23_backward_over_what_it_reads_ggml_1519_paddle_21065(backend, layout):
    values = normal(24, (5, 6, 3, 11))
    x, axis = LAYOUTS[layout](values)
    dy, _ = LAYOUTS[layout](values[::-1] ** 2)
    _, saved = bncore.batch_norm(x, axis=axis)
    expected = bncore.batch_norm_backward(dy, saved)
    if not dy.dtype.isnative:
        return
    for over in (dy, x):
        got = bncore.batch_norm_backward(dy, saved, out=over)
        np.testing.assert_array_equal(got.dx, expected.dx)
        x[...], dy[...] = LAYOUTS[layout](values)[0], LAYOUTS[layout](values[::-1] ** 2)[0]
    with pytest.raises(ValueError, match="overlaps"):
        bncore.batch_norm(x[1:], axis=axis, out=x[:-1])


RANKS = [[30, 10], [1, 39], [0, 40], [17, 0, 1, 22]]


@pytest.mark.parametrize("rows", RANKS)
def test_24_25_uneven_and_empty_ranks_pytorch_22192_36530_apex_262_paddle_32464(backend, rows):
    x, dy = normal(25, (2, 40, 3, 5), "float64")
    gamma = np.array([1.0, -2.0, 0.5])
    y, saved = bncore.batch_norm(x, gamma)
    whole = bncore.batch_norm_backward(dy, saved)
    cuts = np.cumsum(rows)[:-1]
    parts, gradients = np.split(x, cuts), np.split(dy, cuts)
    merged = sum((bncore.moments(part) for part in parts), bncore.Moments())
    np.testing.assert_allclose(merged.var(), saved.var, rtol=1e-13)
    inv_std = 1 / np.sqrt(merged.var() + 1e-5)
    pieces = zip(gradients, parts, strict=True)
    sums = [bncore.backward_reduce(*piece, merged.mean, inv_std) for piece in pieces]
    total = [sum(column) for column in zip(*sums, strict=True)]
    dx = [
        bncore.backward_apply(*piece, merged.mean, inv_std, gamma, *total, merged.count)
        for piece in zip(gradients, parts, strict=True)
    ]
    np.testing.assert_allclose(np.concatenate(dx), whole.dx, rtol=0, atol=1e-13)
    outputs = [bncore.batch_norm_inference(p, merged.mean, merged.var(), gamma) for p in parts]
    np.testing.assert_allclose(np.concatenate(outputs), y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("momentum", [0, 0.25, 1, None])
def test_26_momentum_weighs_the_newest_batch_pytorch_15298_oneflow_6055(backend, momentum):
    layer = bncore.BatchNorm(2, momentum=momentum, dtype=np.float64)
    batches = normal(26, (3, 10, 2), "float64")
    mean, var = np.zeros(2), np.ones(2)
    for number, x in enumerate(batches, 1):
        layer(x)
        weight = 1 / number if momentum is None else momentum
        mean = (1 - weight) * mean + weight * x.mean(axis=0)
        var = (1 - weight) * var + weight * x.var(axis=0, ddof=1)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-13)


def test_27_the_counter_survives_loading_pytorch_110850(backend):
    layer, fresh, old = bncore.BatchNorm(2), bncore.BatchNorm(2), bncore.BatchNorm(2)
    for _ in range(3):
        layer(normal(27, (4, 2)))
    state = layer.state_dict()
    fresh.load_state_dict(state)
    assert fresh.num_batches_tracked == 3
    assert {k: v.tobytes() for k, v in fresh.state_dict().items()} == {
        k: v.tobytes() for k, v in state.items()
    }
    del state["num_batches_tracked"]
    old.load_state_dict(state)
    assert old.num_batches_tracked == 0
    np.testing.assert_array_equal(old.running_var, layer.running_var)


def test_28_bad_arguments_are_refused():
    x = np.zeros((4, 2), np.float32)
    with pytest.raises(ValueError, match="eps must be positive"):
        bncore.batch_norm(x, eps=float("nan"))
    with pytest.raises(ValueError, match="momentum must be"):
        bncore.BatchNorm(2, momentum=2.5)
    with pytest.raises(ValueError, match="var must not be negative"):
        bncore.batch_norm_inference(x, np.zeros(2), np.array([1.0, -1.0]))
    state = bncore.BatchNorm(2).state_dict() | {"running_var": np.array([1.0, -1.0])}
    with pytest.raises(ValueError, match="running_var must not be negative"):
        bncore.BatchNorm(2).load_state_dict(state)


def test_29_no_race_onednn_284_280(backend, monkeypatch):
    """The same bits from 1000 runs on more threads than there are CPUs."""
    x, dy = normal(29, (2, 16, 24, 100))
    threads = iter([1, 2, 3, 5] * 250)
    monkeypatch.setattr(functional, "get_num_threads", lambda: 3)
    seen = set()
    for n in threads:
        monkeypatch.setattr(functional, "get_num_threads", lambda n=n: n)
        y, saved = bncore.batch_norm(x)
        seen.add(hash((y.tobytes(), bncore.batch_norm_backward(dy, saved).dx.tobytes())))
        if backend.name == "numpy" and len(seen) == 1 and n == 5:
            break
    assert len(seen) == 1


def test_30_zero_variance_and_a_tiny_eps_cve_2021_29548(backend):
    x = np.full((6, 3), 5, np.float32)
    zero = np.zeros(3, np.float32)
    y = bncore.batch_norm_inference(x, zero + 5, zero, beta=zero + 2, eps=5e-324)
    np.testing.assert_array_equal(y, np.full_like(x, 2))
    y, saved = bncore.batch_norm(x, eps=5e-324)
    assert (y == 0).all()
    g = bncore.batch_norm_backward(np.ones_like(x), saved)
    assert not np.isnan(g.dx).any()
