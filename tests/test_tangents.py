"""Tangents and the double backward pass, against PyTorch, differences and 40-digit arithmetic."""

import re
import warnings
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest

import bncore

from . import oracle
from .arrays import LAYOUTS, bits, in_layout, normal
from .torch_oracle import activate, import_torch

SHAPES = [((7, 3), 1), ((4, 5, 6), 1), ((3, 4, 2, 5), -1), ((2, 3, 4, 3), (1, 3)), ((4, 9), 0)]
ACTIVATIONS = [None, "relu", ("leaky_relu", 0.2), ("clip", -0.5, 0.8)]
KINDS = ["plain", "mask", "weight", "both"]


@pytest.fixture(params=["float16", "bfloat16", "float32", "float64"])
def dtype(request):
    if request.param == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(request.param)


def channels_of(shape, axis):
    return [shape[one] for one in oracle.channel_axes(axis, len(shape))]


def case(shape, axis=1, *, activation=None, residual=True, kind="plain", dtype=np.float64,
         parameter_dtype=np.float64, layout="C", eps=1e-5):  # fmt: skip
    """Arguments of a forward pass, and directions of everything that can move."""
    channels = channels_of(shape, axis)
    x, dy, r, tx, tr = (in_layout(normal(i, shape, dtype), layout, axis) for i in range(5))
    gamma, beta, tgamma, tbeta = (normal(i, channels, parameter_dtype) for i in range(5, 9))
    axes = oracle.channel_axes(axis, len(shape))
    positions = [1 if i in axes else n for i, n in enumerate(shape)]
    mask = np.random.default_rng(9).random(positions) < 0.7
    weight = 2 * np.random.default_rng(10).random(positions)
    weight[weight < 0.4] = 0
    mask.flat[:1], weight.flat[:1] = True, 1
    return SimpleNamespace(
        x=x, dy=dy, gamma=gamma, beta=beta, residual=r if residual else None,
        tx=tx, tgamma=tgamma, tbeta=tbeta, tresidual=tr if residual else None,
        mask=mask if kind in ("mask", "both") else None,
        sample_weight=weight if kind in ("weight", "both") else None,
        axis=axis, activation=activation, eps=eps,
    )  # fmt: skip


def saved_by(a):
    keywords = "axis eps activation residual mask sample_weight".split()
    return bncore.batch_norm(a.x, a.gamma, a.beta, **{k: getattr(a, k) for k in keywords})[1]


def tangent_of(a, saved, **keywords):
    return bncore.batch_norm_jvp(
        a.tx, saved, tangent_gamma=a.tgamma, tangent_beta=a.tbeta, tangent_residual=a.tresidual,
        **keywords,
    )  # fmt: skip


def double_of(a, saved):
    return bncore.batch_norm_double_backward(
        a.tx, a.dy, saved, ddgamma=a.tgamma, ddbeta=a.tbeta, ddresidual=a.tresidual
    )


def torch_function(torch, a):
    """y of x, gamma, beta and residual, in primitive operations."""
    axes = oracle.channel_axes(a.axis, a.x.ndim)
    rest = [i for i in range(a.x.ndim) if i not in axes]
    column = [n if i in axes else 1 for i, n in enumerate(a.x.shape)]
    valid = torch.ones(()) if a.mask is None else torch.tensor(a.mask)
    weight = np.ones([1]) if a.sample_weight is None else a.sample_weight
    weight = torch.tensor(np.broadcast_to(weight, [1 if i in axes else n
                          for i, n in enumerate(a.x.shape)]).copy()) * valid  # fmt: skip

    def function(x, gamma, beta, residual):
        total = weight.sum()
        mean = (x * weight).sum(rest, keepdim=True) / total
        var = ((x - mean) ** 2 * weight).sum(rest, keepdim=True) / total
        z = (x - mean) / torch.sqrt(var + a.eps) * gamma.reshape(column) + beta.reshape(column)
        return activate(torch, z if residual is None else z + residual, a.activation) * valid

    return function


def tensors(torch, *arrays):
    return [None if a is None else torch.tensor(a.astype(np.float64)) for a in arrays]


def torch_jvp(torch, function, primals, tangents):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what torch.func itself uses
        _, tangent = torch.func.jvp(function, tuple(primals), tuple(tangents))
    return tangent.numpy()


def torch_tangent(a):
    torch = import_torch()
    given = tensors(torch, a.x, a.gamma, a.beta, a.residual)
    moved = tensors(torch, a.tx, a.tgamma, a.tbeta, a.tresidual)
    count = 4 if a.residual is not None else 3

    def function(*free):
        return torch_function(torch, a)(*free, *given[count:])

    return torch_jvp(torch, function, given[:count], moved[:count])


def torch_double(a):
    """ddy, dx and dgamma by differentiating the gradients."""
    torch = import_torch()
    count = 4 if a.residual is not None else 3
    given = tensors(torch, a.x, a.gamma, a.beta, a.residual)
    moved = tensors(torch, a.tx, a.tgamma, a.tbeta, a.tresidual)
    (dy,) = tensors(torch, a.dy)
    for tensor in (*given[:count], dy):
        tensor.requires_grad_()
    y = torch_function(torch, a)(*given)
    gradients = torch.autograd.grad(y, given[:count], dy, create_graph=True)
    outer = sum((g * m).sum() for g, m in zip(gradients, moved[:count], strict=True))
    results = torch.autograd.grad(outer, (dy, given[0], given[1]))
    return [result.numpy() for result in results]


def assert_near(actual, expected, relative, what=""):
    """Near, relative to the size of the result."""
    assert actual.shape == expected.shape
    actual = actual.astype(np.float64)
    largest = abs(expected).max(initial=0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * largest, err_msg=what)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
class TestTorch:
    def test_tangent(self, backend, shape, axis, activation, residual, kind):
        a = case(shape, axis, activation=activation, residual=residual, kind=kind)
        assert_near(tangent_of(a, saved_by(a)), torch_tangent(a), 1e-12)

    def test_double_backward(self, backend, shape, axis, activation, residual, kind):
        a = case(shape, axis, activation=activation, residual=residual, kind=kind)
        results = double_of(a, saved_by(a))
        for name, expected in zip(results._fields, torch_double(a), strict=True):
            assert_near(getattr(results, name), expected, 1e-10, name)


@pytest.mark.parametrize("name", ["tangent_mean", "tangent_var"])
def test_one_statistic_alone_moves(backend, name):
    """The tangent is linear: that of both is the sum of those of each."""
    a = case((5, 3, 4), residual=False)
    fixed = a.tx, a.x, a.beta, abs(a.gamma) + 0.1, a.gamma
    moves = {"tangent_mean": a.tgamma, "tangent_var": a.tbeta}
    both = bncore.batch_norm_inference_jvp(*fixed, **moves)
    none, alone, other = (
        bncore.batch_norm_inference_jvp(*fixed, **some)
        for some in ({}, {name: moves[name]}, {k: v for k, v in moves.items() if k != name})
    )
    np.testing.assert_allclose(alone + other - none, both, rtol=1e-12, atol=1e-12)
    assert not np.allclose(alone, none)


def fixed_statistics(a):
    """mean and var, and directions of both."""
    channels = a.gamma.shape
    return (
        normal(20, channels),
        np.exp(normal(21, channels)),
        normal(22, channels),
        normal(23, channels),
    )


def torch_fixed_function(torch, a):
    """y of x, mean, var, gamma, beta and residual, in primitive operations."""
    axes = oracle.channel_axes(a.axis, a.x.ndim)
    column = [n if i in axes else 1 for i, n in enumerate(a.x.shape)]
    valid = torch.ones(()) if a.mask is None else torch.tensor(a.mask)

    def function(x, mean, var, gamma, beta, *residual):
        mean, var, gamma, beta = (p.reshape(column) for p in (mean, var, gamma, beta))
        z = gamma * (x - mean) / torch.sqrt(var + a.eps) + beta + sum(residual)
        return activate(torch, z, a.activation) * valid

    return function


def poisoned(a):
    """NaN wherever masked, in everything of x's shape."""
    if a.mask is None:
        return a
    where = np.broadcast_to(~a.mask, a.x.shape)
    spoiled = {}
    for name in ("x", "dy", "residual", "tx", "tresidual"):
        array = getattr(a, name)
        spoiled[name] = None if array is None else np.where(where, np.nan, array)
    return SimpleNamespace(**(vars(a) | spoiled))


@pytest.mark.parametrize("kind", ["plain", "mask"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
class TestTorchFixed:
    """Where the statistics are given."""

    def test_tangent(self, backend, shape, axis, activation, residual, kind):
        torch = import_torch()
        a = case(shape, axis, activation=activation, residual=residual, kind=kind)
        mean, var, tmean, tvar = fixed_statistics(a)
        count = 5 + residual
        given = tensors(torch, a.x, mean, var, a.gamma, a.beta, a.residual)[:count]
        moved = tensors(torch, a.tx, tmean, tvar, a.tgamma, a.tbeta, a.tresidual)[:count]
        expected = torch_jvp(torch, torch_fixed_function(torch, a), given, moved)
        a = poisoned(a)
        ty = bncore.batch_norm_inference_jvp(
            a.tx, a.x, mean, var, a.gamma, a.beta, tangent_mean=tmean, tangent_var=tvar,
            tangent_gamma=a.tgamma, tangent_beta=a.tbeta, tangent_residual=a.tresidual, axis=axis,
            residual=a.residual, activation=activation, mask=a.mask,
        )  # fmt: skip
        assert_near(ty, expected, 1e-12)

    def test_double_backward(self, backend, shape, axis, activation, residual, kind):
        torch = import_torch()
        a = case(shape, axis, activation=activation, residual=residual, kind=kind)
        mean, var, tmean, tvar = fixed_statistics(a)
        count = 5 + residual
        given = tensors(torch, a.x, mean, var, a.gamma, a.beta, a.residual)[:count]
        moved = tensors(torch, a.tx, tmean, tvar, a.tgamma, a.tbeta, a.tresidual)[:count]
        (dy,) = tensors(torch, a.dy)
        for tensor in (*given, dy):
            tensor.requires_grad_()
        y = torch_fixed_function(torch, a)(*given)
        gradients = torch.autograd.grad(y, given, dy, create_graph=True)
        outer = sum((g * m).sum() for g, m in zip(gradients, moved, strict=True))
        expected = torch.autograd.grad(outer, (dy, given[0], given[3], given[1], given[2]))
        a = poisoned(a)
        results = bncore.batch_norm_inference_double_backward(
            a.tx, a.dy, a.x, mean, var, a.gamma, a.beta, ddgamma=a.tgamma, ddbeta=a.tbeta,
            ddresidual=a.tresidual, ddmean=tmean, ddvar=tvar, axis=axis, residual=a.residual,
            activation=activation, mask=a.mask,
        )  # fmt: skip
        for name, right in zip(results._fields, expected, strict=True):
            assert_near(getattr(results, name), right.numpy(), 1e-12, name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fixed_double_backward_in_every_type_and_layout(backend, layout, dtype):
    """One rounding from the float64 result; without parameters and directions there are zeros."""
    a = case((6, 3, 5), dtype=dtype, layout=layout, activation=("leaky_relu", 0.2), residual=False)
    mean, var, *_ = fixed_statistics(a)
    x, dy, tx = (array.astype(np.float64) for array in (a.x, a.dy, a.tx))
    keywords = {"activation": a.activation}
    right = bncore.batch_norm_inference_double_backward(tx, dy, x, mean, var, **keywords)
    found = bncore.batch_norm_inference_double_backward(a.tx, a.dy, a.x, mean, var, **keywords)
    assert right.dgamma is found.dgamma is None
    assert found.ddy.dtype == found.dx.dtype == a.x.dtype.newbyteorder("=")
    relative = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-6, "float64": 1e-15}[dtype.name]
    assert_near(found.ddy, right.ddy, relative)
    assert (found.dx == 0).all()  # dx is linear in dy alone
    for name in ("dmean", "dvar"):
        assert_near(getattr(found, name), getattr(right, name), max(relative, 1e-13))


def test_fixed_double_backward_names_what_does_not_fit():
    x, one = np.ones((4, 3)), np.ones(3)
    for given, error in (
        ({"ddgamma": one}, "ddgamma must be None: the forward pass had no gamma"),
        ({"ddmean": np.ones(4)}, r"ddmean must have the channels' shape \(3,\), got \(4,\)"),
        ({"ddvar": one.astype(int)}, "ddvar must have dtype float16, .* got int64"),
        ({"ddresidual": x}, "ddresidual must be None: the forward pass had no residual"),
        ({"mask": x > 0}, r"mask must broadcast to \(4, 1\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            bncore.batch_norm_inference_double_backward(x, x, x, one, one, **given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
class TestCentralDifferences:
    """Of bncore's own functions, in every input."""

    STEP = 1e-6

    def moved(self, a, sign, direction):
        names = {"x": "tx", "gamma": "tgamma", "beta": "tbeta", "residual": "tresidual"}
        step = {k: getattr(a, k) + sign * self.STEP * getattr(direction, t)
                for k, t in names.items()}  # fmt: skip
        return SimpleNamespace(**(vars(a) | step))

    def test_tangent(self, backend, activation, kind):
        a = case((4, 3, 5), activation=activation, kind=kind)
        keywords = "axis eps activation residual mask sample_weight".split()
        above, below = (
            bncore.batch_norm(b.x, b.gamma, b.beta, **{k: getattr(b, k) for k in keywords})[0]
            for b in (self.moved(a, sign, a) for sign in (1, -1))
        )
        assert_near(tangent_of(a, saved_by(a)), (above - below) / (2 * self.STEP), 1e-8)

    def test_double_backward(self, backend, activation, kind):
        a = case((4, 3, 5), activation=activation, kind=kind)
        results = double_of(a, saved_by(a))

        def outer(b):
            g = bncore.batch_norm_backward(b.dy, saved_by(b))
            pairs = zip(g, (a.tx, a.tgamma, a.tbeta, a.tresidual), strict=True)
            return sum((gradient * moved).sum() for gradient, moved in pairs)

        zero = SimpleNamespace(tx=0, tgamma=0, tbeta=0, tresidual=0)
        for seed in range(5):
            v = SimpleNamespace(**(vars(zero) | {
                "tx": normal(30 + seed, a.x.shape), "tgamma": normal(40 + seed, 3)}))  # fmt: skip
            vdy = normal(50 + seed, a.x.shape)
            values = []
            for sign in (1, -1):
                b = self.moved(a, sign, v)
                b.dy = a.dy + sign * self.STEP * vdy
                values.append(outer(b))
            expected = (values[0] - values[1]) / (2 * self.STEP)
            terms = (results.ddy * vdy, results.dx * v.tx, results.dgamma * v.tgamma)
            size = sum(abs(term).sum() for term in terms)
            assert abs(sum(term.sum() for term in terms) - expected) < 1e-8 * size


class TestFortyDigits:
    """Channels far from zero, and nearly constant ones, against differences in mpmath."""

    DIGITS = 60
    STEP = mpmath.mpf(10) ** -20

    def forward(self, x, gamma, eps):
        """x' and 1 / sqrt(var + eps) of one channel."""
        mean = mpmath.fsum(x) / len(x)
        var = mpmath.fsum((v - mean) ** 2 for v in x) / len(x)
        s = 1 / mpmath.sqrt(var + eps)
        return [(v - mean) * s for v in x], s

    def gradient(self, dy, x, gamma, eps):
        """dx and dgamma of one channel."""
        normalized, s = self.forward(x, gamma, eps)
        dgamma = mpmath.fsum(d * h for d, h in zip(dy, normalized))
        mean_dy, mean_dgamma = mpmath.fsum(dy) / len(x), dgamma / len(x)
        dx = [gamma * s * (d - mean_dy - h * mean_dgamma) for d, h in zip(dy, normalized)]
        return dx, dgamma

    def along(self, function, values, direction):
        """The derivative of a function that gives a list, by a central difference."""
        up, down = (
            function([v + sign * self.STEP * d for v, d in zip(values, direction)])
            for sign in (1, -1)
        )
        return [(a - b) / (2 * self.STEP) for a, b in zip(up, down)]

    @pytest.mark.parametrize(
        ("mean", "std", "eps"), [(0, 1, 1e-5), (1e6, 1, 1e-5), (-3.3e6, 0.5, 1e-10),
                                 (1e3, 1e-4, 1e-5), (1e-9, 1e-9, 1e-30)],
    )  # fmt: skip
    def test_hard_channels(self, backend, mean, std, eps):
        x = mean + std * normal(1, (12, 1))
        dy, u = normal(2, (12, 1)), normal(3, (12, 1)) * std
        gamma, ddgamma = np.array([1.7]), np.array([0.3])
        saved = bncore.batch_norm(x, gamma, eps=eps)[1]
        tangent = bncore.batch_norm_jvp(u, saved, tangent_gamma=ddgamma)
        gg = bncore.batch_norm_double_backward(u, dy, saved, ddgamma=ddgamma)
        with mpmath.workdps(self.DIGITS):
            mp = [[mpmath.mpf(float(v)) for v in a.ravel()] for a in (x, dy, u, gamma, ddgamma)]
            mx, mdy, mu, [mgamma], [mddgamma] = mp
            # Beyond the differences' step nothing here depends on the data's size.
            meps = mpmath.mpf(eps)

            def y(values):
                *x, gamma = values
                return [gamma * h for h in self.forward(x, gamma, meps)[0]]

            def outer(values):
                *x, gamma = values
                dx, dgamma = self.gradient(mdy, x, gamma, meps)
                return [mpmath.fsum(a * b for a, b in zip(mu, dx)) + mddgamma * dgamma]

            n = len(mx)
            expected = self.along(y, [*mx, mgamma], [*mu, mddgamma])
            unit = [[mpmath.mpf(i == j) for i in range(n + 1)] for j in range(n + 1)]
            by_x = [self.along(outer, [*mx, mgamma], v)[0] for v in unit]
        as_array = np.array([float(v) for v in expected])[:, None]
        assert_near(tangent, as_array, 1e-14 * max(16, abs(mean) / std / 1e4), "tangent")
        assert_near(gg.ddy, as_array, 1e-14 * max(16, abs(mean) / std / 1e4), "ddy")
        right = np.array([float(v) for v in by_x])
        assert_near(gg.dx, right[:n, None], 1e-10, "dx")
        assert_near(gg.dgamma, right[n:], 1e-10, "dgamma")


@pytest.mark.parametrize("kind", ["plain", "both"])
@pytest.mark.parametrize("activation", [None, "relu", ("leaky_relu", 0.3)], ids=str)
@pytest.mark.parametrize("parameter_dtype", [np.float16, np.float32, np.float64])
def test_narrow_types_are_rounded_once(backend, dtype, parameter_dtype, activation, kind):
    a = case((9, 5, 11), dtype=dtype, parameter_dtype=parameter_dtype, activation=activation,
             kind=kind)  # fmt: skip
    saved = saved_by(a)
    ty, double = tangent_of(a, saved), double_of(a, saved)
    expected = [torch_tangent(a), *torch_double(a)]
    assert ty.dtype == double.ddy.dtype == double.dx.dtype == dtype
    assert double.dgamma.dtype == parameter_dtype
    for actual, right in zip((ty, *double), expected, strict=True):
        before = 1e-6 if dtype != np.float64 else 1e-10
        tolerance = oracle.ulp(right, actual.dtype) / 2 + before * abs(right).max()
        oracle.assert_within(actual.astype(np.float64), right, tolerance, str(actual.shape))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["plain", "both"])
@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 4), 1), ((4, 5, 3, 6), 1), ((2, 3, 4, 3), (0, 2))]
)
def test_every_layout(backend, shape, axis, kind, layout, dtype):
    a = case(shape, axis, dtype=dtype, layout=layout, kind=kind, activation="relu")
    plain = SimpleNamespace(**vars(a))
    for name in ("x", "dy", "residual", "tx", "tresidual"):
        array = getattr(a, name)
        native = array.dtype.newbyteorder("=")
        setattr(plain, name, np.ascontiguousarray(array, native))
    saved, plain_saved = saved_by(a), saved_by(plain)
    results = tangent_of(a, saved), *double_of(a, saved)
    expected = tangent_of(plain, plain_saved), *double_of(plain, plain_saved)
    steps = {"float16": 2**-9, "bfloat16": 2**-6, "float32": 1e-5, "float64": 1e-12}
    for actual, right in zip(results, expected, strict=True):
        assert_near(actual, right.astype(np.float64), steps[dtype.name])
    assert results[0].dtype == dtype
    if layout in ("C", "F", "channels_last"):
        assert results[0].strides == results[1].strides == results[2].strides == a.x.strides


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape", [(300, 33), (40, 9, 7, 7), (5, 3, 130), (1, 1, 1), (2, 150, 40, 9)]
)
def test_the_tangent_is_the_transpose_of_the_gradient(backend, shape, kind, activation):
    a = case(shape, activation=activation, kind=kind)
    saved = saved_by(a)
    g = bncore.batch_norm_backward(a.dy, saved)
    products = [(u * v).ravel() for u, v in zip(g, (a.tx, a.tgamma, a.tbeta, a.tresidual))]
    forward = a.dy * tangent_of(a, saved)
    size = sum(abs(p).sum() for p in products)
    assert abs(forward.sum() - sum(p.sum() for p in products)) <= 1e-13 * size


@pytest.mark.parametrize("activation", ["relu", ("leaky_relu", 0.25), ("clip", -0.3, 0.4)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "mask"])
@pytest.mark.parametrize("shape", [(500, 40), (3, 20, 400)])
def test_it_passes_where_the_forward_pass_did(backend, dtype, shape, kind, activation):
    """Whatever the precision: y tells where z lay, for beta moves y there and nowhere else."""
    a = case(shape, dtype=dtype, activation=activation, kind=kind)
    y, saved = bncore.batch_norm(
        a.x, a.gamma, a.beta, residual=a.residual, activation=activation, mask=a.mask
    )
    passed = bncore.batch_norm_jvp(None, saved, tangent_beta=np.ones(shape[1])).astype(float)
    y, valid = y.astype(float), np.broadcast_to(True if a.mask is None else a.mask, shape)
    low, high = (float(np.array(v, dtype)) for v in (-0.3, 0.4))
    inside = (y > low) & (y < high) if activation[0] == "clip" else y > 0
    outside = 0.25 if activation[0] == "leaky_relu" else 0.0
    # Half precision may have rounded y up to a limit.
    near = dtype.itemsize == 2 and activation[0] == "clip"
    clear = valid & ~np.isin(y, [low, high] if near else [])
    assert clear.sum() > 1000
    np.testing.assert_array_equal(passed[clear], np.where(inside, 1.0, outside)[clear])
    assert (passed[~valid] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["C", "channels_last"])
@pytest.mark.parametrize("dtype_name", ["float32", "float64"])
def test_the_same_bits_on_any_number_of_threads(backend, dtype_name, layout, kind):
    a = case((16, 24, 15, 15), dtype=np.dtype(dtype_name), layout=layout, kind=kind,
             activation="relu")  # fmt: skip
    results = []
    for threads in (1, 2, 3, 1):
        bncore.set_num_threads(threads)
        saved = saved_by(a)
        results.append(bits(tangent_of(a, saved), *double_of(a, saved)))
    assert results[0] == results[1] == results[2] == results[3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS[:3] + ("sliced", "reversed"))
def test_in_place(backend, dtype, layout, kind):
    a = case((4, 6, 7), dtype=dtype, layout=layout, kind=kind, activation="relu")
    saved = saved_by(a)
    expected = tangent_of(a, saved)
    assert tangent_of(a, saved, out=a.tx) is a.tx
    assert bits(a.tx) == bits(expected)
    fixed = a.x, a.beta, np.abs(a.gamma), a.gamma, a.beta
    keywords = {"tangent_mean": a.beta, "tangent_gamma": a.gamma, "activation": "relu"}
    expected = bncore.batch_norm_inference_jvp(a.dy, *fixed, **keywords)
    assert bncore.batch_norm_inference_jvp(a.dy, *fixed, **keywords, out=a.dy) is a.dy
    assert bits(a.dy) == bits(expected)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("kind", ["mask", "both"])
def test_what_is_masked_has_no_influence_on_any_bit(backend, dtype, kind, activation):
    a = case((4, 6, 7), dtype=dtype, kind=kind, activation=activation)
    results = []
    for poison in (0, np.nan, np.inf):
        for name in ("x", "dy", "residual", "tx", "tresidual"):
            getattr(a, name)[np.broadcast_to(~a.mask, a.x.shape)] = poison
        saved = saved_by(a)
        results.append([tangent_of(a, saved), *double_of(a, saved)])
    for ty, ddy, dx, _ in results:
        for array in (ty, ddy, dx):
            assert (array[np.broadcast_to(~a.mask, array.shape)] == 0).all()
    assert bits(*results[0]) == bits(*results[1]) == bits(*results[2])


def test_what_has_no_weight_moves_no_statistic(backend):
    a = case((8, 3), kind="weight", residual=False)
    unused = np.broadcast_to(a.sample_weight == 0, a.x.shape)
    clean = tangent_of(a, saved_by(a))
    for name in ("x", "tx"):
        getattr(a, name)[unused] = np.nan
    poisoned = tangent_of(a, saved_by(a))
    assert unused.any() and np.isnan(poisoned[unused]).all()
    np.testing.assert_array_equal(poisoned[~unused], clean[~unused])


@pytest.mark.parametrize("kind", ["mask", "weight"])
def test_without_any_weight_the_statistics_stand_still(backend, kind):
    a = case((4, 3, 5), kind=kind, residual=False)
    nothing = np.zeros((4, 1, 5), bool if kind == "mask" else float)
    a.mask, a.sample_weight = (nothing, None) if kind == "mask" else (None, nothing)
    saved = saved_by(a)
    s, gamma = 1 / np.sqrt(a.eps), a.gamma[:, None]
    if kind == "mask":
        expected = [0 * a.x, 0 * a.x, 0 * a.x, 0 * a.gamma]
    else:
        xhat, u, d = a.x * s, a.tx, a.dy
        ty = gamma * s * u + a.tgamma[:, None] * xhat + a.tbeta[:, None]
        expected = [ty, ty, a.tgamma[:, None] * s * d, s * (u * d).sum((0, 2))]
    for actual, right in zip((tangent_of(a, saved), *double_of(a, saved)), expected):
        assert_near(actual, right, 1e-13)


@pytest.mark.parametrize("shape", [(0, 4, 3), (5, 0, 3), (5, 4, 0), (0, 0)])
@pytest.mark.parametrize("kind", ["plain", "mask"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_empty(backend, shape, kind, activation, dtype):
    a = case(shape, dtype=dtype, activation=activation)
    a.mask = np.ones([n if i != 1 else 1 for i, n in enumerate(shape)], bool)
    a.mask = a.mask if kind == "mask" else None
    saved = saved_by(a)
    ty, (ddy, dx, dgamma) = tangent_of(a, saved), double_of(a, saved)
    assert ty.shape == ddy.shape == dx.shape == shape and ty.dtype == dx.dtype == dtype
    assert dgamma.shape == shape[1:2] and (dgamma == 0).all()


def test_one_value_per_channel(backend):
    """y is beta and stays there, whatever x does; so no gradient depends on x."""
    a = case((1, 3), residual=False)
    saved = saved_by(a)
    assert_near(tangent_of(a, saved), np.broadcast_to(a.tbeta, (1, 3)), 1e-15)
    ddy, dx, dgamma = double_of(a, saved)
    assert_near(ddy, np.broadcast_to(a.tbeta, (1, 3)), 1e-15)
    assert (dx == 0).all() and (dgamma == 0).all()


@pytest.mark.parametrize("missing", ["tx", "tgamma", "tbeta", "tresidual"])
@pytest.mark.parametrize("kind", ["plain", "both"])
def test_none_is_zero(backend, missing, kind, dtype):
    a = case((4, 3, 5), dtype=dtype, kind=kind, activation="relu")
    saved = saved_by(a)
    setattr(a, missing, np.zeros_like(getattr(a, missing)))
    expected = bits(tangent_of(a, saved) + 0, *(g + 0 for g in double_of(a, saved)))
    setattr(a, missing, None)
    assert bits(tangent_of(a, saved) + 0, *(g + 0 for g in double_of(a, saved))) == expected


@pytest.mark.parametrize("activation", [None, ("leaky_relu", 0.1)], ids=str)
def test_absent_parameters_count_as_one_and_zero(backend, activation):
    a = case((4, 3, 5), activation=activation, residual=False)
    a.gamma, a.beta, a.tgamma, a.tbeta = np.ones(3), np.zeros(3), None, None
    saved = saved_by(a)
    expected = tangent_of(a, saved), *double_of(a, saved)[:2]
    a.gamma = a.beta = None
    saved = saved_by(a)
    double = double_of(a, saved)
    assert double.dgamma is None
    assert bits(tangent_of(a, saved), *double[:2]) == bits(*expected)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_residual_that_was_overwritten_is_not_needed(backend, activation):
    a = case((4, 3, 5), activation=activation)
    expected = bits(tangent_of(a, saved_by(a)), *double_of(a, saved_by(a)))
    _, saved = bncore.batch_norm(
        a.x, a.gamma, a.beta, residual=a.residual, activation=activation, out=a.residual
    )
    assert bits(tangent_of(a, saved), *double_of(a, saved)) == expected


@pytest.mark.parametrize("kind", ["plain", "weight"])
def test_a_bad_channel_stays_alone(backend, kind):
    a = case((6, 4, 5), dtype=np.float32, kind=kind)
    clean = [tangent_of(a, saved_by(a)), *double_of(a, saved_by(a))]
    a.x[2, 1, 3], a.tx[0, 1, 0] = np.nan, np.inf
    poisoned = [tangent_of(a, saved_by(a)), *double_of(a, saved_by(a))]
    others = [0, 2, 3]
    for one, other in zip(clean, poisoned, strict=True):
        index = others if one.ndim == 1 else (slice(None), others)
        assert bits(one[index]) == bits(other[index])
    assert np.isnan(poisoned[0][:, 1]).all()


def test_large_numbers_in_half_precision(backend):
    """60000 neither overflows nor loses what float32 would keep."""
    a = case((64, 3), dtype=np.float16, residual=False)
    a.x = (a.x.astype(np.float32) * 1000 + 50000).astype(np.float16)
    a.tx = (a.tx.astype(np.float32) * 1000 + 50000).astype(np.float16)
    ty = tangent_of(a, saved_by(a))
    right = torch_tangent(a)
    oracle.assert_within(
        ty.astype(float), right, oracle.ulp(right, np.float16) / 2 + 1e-6 * abs(right).max(), "ty"
    )


WRONG = [
    (np.ones((4, 3)), ValueError, r"must have x's shape \(4, 3, 5\), got \(4, 3\)"),
    (np.ones((4, 3, 5)), TypeError, "must have x's dtype float32, got float64"),
    (np.ones((4, 3, 5), int), TypeError, "must have dtype .*, got int64"),
    (np.ma.ones((4, 3, 5)), TypeError, "must be a plain array, got a masked array"),
]
WRONG_PER_CHANNEL = [
    (np.ones(5), ValueError, r"must have the channels' shape \(3,\), got \(5,\)"),
    (np.ones(3, int), TypeError, "must have dtype .*, got int64"),
]
WRONG_DIRECTIONS = [
    *(("tangent", *wrong) for wrong in WRONG),
    *(("tangent_residual", *wrong) for wrong in WRONG),
    *(("tangent_gamma", *wrong) for wrong in WRONG_PER_CHANNEL),
    *(("tangent_beta", *wrong) for wrong in WRONG_PER_CHANNEL),
]


@pytest.mark.parametrize("kind", ["plain", "both"])
@pytest.mark.parametrize("power", [20, 30, 36])
def test_far_from_zero(backend, kind, power):
    """A mean of 2^36 standard deviations, which one float64 alone does not hold well enough."""
    a = case((30, 4, 5), residual=False, kind=kind, activation=("leaky_relu", 0.2))
    a.x = np.round(a.x * 2.0**14) / 2.0**14
    right = tangent_of(a, saved_by(a)), *double_of(a, saved_by(a))
    a.x = a.x + 2.0**power
    for actual, expected in zip((tangent_of(a, saved_by(a)), *double_of(a, saved_by(a))), right):
        assert_near(actual, expected, 1e-13)


@pytest.mark.parametrize("kind", ["plain", "mask", "weight"])
@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_the_activation_passes_where_it_does_for_the_gradient(backend, name, kind):
    """Even where z lies on the limit as rounding has it."""
    a = case((40, 6, 9), dtype=np.dtype(name), kind=kind)
    keywords = {"mask": a.mask, "sample_weight": a.sample_weight, "residual": a.residual}
    y, _ = bncore.batch_norm(a.x, a.gamma, a.beta, **keywords)
    for limit in np.unique(y[y > 0])[:: y.size // 40]:
        activation = ("clip", float(limit), np.inf)
        _, saved = bncore.batch_norm(a.x, a.gamma, a.beta, **keywords, activation=activation)
        g = bncore.batch_norm_backward(np.ones_like(a.x), saved)
        passed = bncore.batch_norm_jvp(None, saved, tangent_beta=np.ones(6))
        np.testing.assert_array_equal(passed.astype(float), g.dresidual.astype(float))


@pytest.mark.parametrize("power", [-80, -40, 40, 80])
@pytest.mark.parametrize("dtype_name", ["float32", "float64"])
def test_the_unit_of_x_does_not_matter(backend, dtype_name, power):
    """x in another unit: dx and ddx too, and eps; then ddy and dgamma are as they were."""
    a = case((30, 4), dtype=np.dtype(dtype_name), residual=False, activation="relu")
    before = tangent_of(a, saved_by(a)), *double_of(a, saved_by(a))
    unit = 2.0**power
    a.x, a.tx, a.eps = a.x * a.x.dtype.type(unit), a.tx * a.x.dtype.type(unit), a.eps * unit**2
    after = [tangent_of(a, saved_by(a)), *double_of(a, saved_by(a))]
    after[2] = after[2].astype(np.float64) * unit
    for actual, right in zip(after, before, strict=True):
        assert_near(actual, right.astype(np.float64), 1e-6 if dtype_name == "float32" else 1e-13)


class TestErrors:
    def arguments(self):
        a = case((4, 3, 5), dtype=np.float32)
        directions = {"tangent": a.tx, "tangent_gamma": a.tgamma, "tangent_beta": a.tbeta,
                      "tangent_residual": a.tresidual}  # fmt: skip
        return a, saved_by(a), directions

    @pytest.mark.parametrize(("name", "value", "error", "message"), WRONG_DIRECTIONS)
    def test_tangents(self, backend, name, value, error, message):
        a, saved, directions = self.arguments()
        out = np.full_like(a.x, 7)
        with pytest.raises(error, match=f"^{name} {message}"):
            bncore.batch_norm_jvp(**(directions | {name: value}), saved=saved, out=out)
        fixed = {"x": a.x, "mean": a.beta, "var": abs(a.gamma), "gamma": a.gamma, "beta": a.beta,
                 "residual": a.residual}  # fmt: skip
        with pytest.raises(error, match=f"^{name} {message}"):
            bncore.batch_norm_inference_jvp(**(fixed | directions | {name: value}), out=out)
        assert (out == 7).all()

    @pytest.mark.parametrize(("name", "value", "error", "message"), WRONG_DIRECTIONS)
    def test_double_backward(self, backend, name, value, error, message):
        a, saved, directions = self.arguments()
        renamed = {k.replace("tangent_", "dd").replace("tangent", "ddx"): v
                   for k, v in (directions | {name: value}).items()}  # fmt: skip
        name = name.replace("tangent_", "dd").replace("tangent", "ddx")
        with pytest.raises(error, match=f"^{name} {message}"):
            bncore.batch_norm_double_backward(dy=a.dy, saved=saved, **renamed)

    @pytest.mark.parametrize(("value", "error", "message"), [
        *WRONG, (None, TypeError, "must have dtype")])  # fmt: skip
    def test_dy(self, backend, value, error, message):
        a, saved, _ = self.arguments()
        with pytest.raises(error, match=f"^dy {message}"):
            bncore.batch_norm_double_backward(a.tx, value, saved)

    @pytest.mark.parametrize("name", ["tangent_mean", "tangent_var"])
    @pytest.mark.parametrize(("value", "error", "message"), WRONG_PER_CHANNEL)
    def test_statistics(self, backend, name, value, error, message):
        a, _, _ = self.arguments()
        with pytest.raises(error, match=f"^{name} {message}"):
            bncore.batch_norm_inference_jvp(a.tx, a.x, a.beta, abs(a.gamma), **{name: value})

    @pytest.mark.parametrize(("keywords", "error", "message"), [
        ({"var": -np.ones(3)}, ValueError, "var must not be negative"),
        ({"mean": None}, TypeError, "mean must be an array"),
        ({"axis": 3}, ValueError, "axis 3 is out of range"),
        ({"eps": 0}, ValueError, "eps must be positive"),
        ({"activation": "gelu"}, ValueError, "activation must be None"),
        ({"residual": np.ones(3)}, ValueError, "residual must have x's shape"),
        ({"x": np.float32(1)}, ValueError, "x must have at least 1 dimension"),
        ({"out": np.ones(3)}, ValueError, "out must have shape"),
    ])  # fmt: skip
    def test_inference(self, backend, keywords, error, message):
        a, _, _ = self.arguments()
        right = {"tangent": a.tx, "x": a.x, "mean": a.beta, "var": abs(a.gamma)}
        with pytest.raises(error, match=f"^{message}"):
            bncore.batch_norm_inference_jvp(**(right | keywords))

    @pytest.mark.parametrize("name", ["gamma", "beta", "residual"])
    def test_a_direction_of_what_is_not_there(self, backend, name):
        a, _, directions = self.arguments()
        setattr(a, name, None)
        saved, value = saved_by(a), directions["tangent_" + name]
        expected = f"^{{}} must be None: the forward pass had no {name}"
        with pytest.raises(ValueError, match=expected.format(f"tangent_{name}")):
            bncore.batch_norm_jvp(a.tx, saved, **{f"tangent_{name}": value})
        with pytest.raises(ValueError, match=expected.format(f"dd{name}")):
            bncore.batch_norm_double_backward(a.tx, a.dy, saved, **{f"dd{name}": value})

    @pytest.mark.parametrize("value", [None, 1, (1, 2)])
    def test_saved(self, backend, value):
        a, _, _ = self.arguments()
        with pytest.raises(TypeError, match="saved must come from batch_norm, got "):
            bncore.batch_norm_jvp(a.tx, value)
        with pytest.raises(TypeError, match="saved must come from batch_norm, got "):
            bncore.batch_norm_double_backward(a.tx, a.dy, value)

    def test_what_was_overwritten(self, backend):
        a, _, _ = self.arguments()
        _, saved = bncore.batch_norm(
            a.x, a.gamma, a.beta, residual=a.residual, activation="relu", out=a.x
        )
        message = r"saved has no x: .* overwrote it \(out=x\)"
        with pytest.raises(ValueError, match=message):
            bncore.batch_norm_jvp(a.tx, saved)
        with pytest.raises(ValueError, match=message):
            bncore.batch_norm_double_backward(a.tx, a.dy, saved)

    @pytest.mark.parametrize("other", ["x", "tresidual", "gamma", "tgamma", "tbeta"])
    def test_out_must_not_be_what_is_read(self, backend, other):
        a = case((4, 3, 5), dtype=np.float32, parameter_dtype=np.float32)
        memory = np.ones(200, np.float32)
        out = memory[:60].reshape(a.x.shape)
        size = getattr(a, other).size
        setattr(a, other, memory[:size].reshape(getattr(a, other).shape))
        saved, before = saved_by(a), memory.copy()
        name = re.sub("^t", "tangent_", other)
        with pytest.raises(ValueError, match=f"^out must not share memory with {name}"):
            tangent_of(a, saved, out=out)
        assert (memory == before).all()

    def test_out_must_not_overlap_the_tangent_in_part(self, backend):
        a, saved, _ = self.arguments()
        memory = np.ones(100, np.float32)
        a.tx = memory[7:67].reshape(a.x.shape)
        with pytest.raises(ValueError, match="^out overlaps tangent in part"):
            tangent_of(a, saved, out=memory[:60].reshape(a.x.shape))
        assert (memory == 1).all()
