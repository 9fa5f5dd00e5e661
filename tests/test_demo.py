"""The demo: its network against central differences, its course and what it reports."""

import argparse

import numpy as np
import pytest

from bncore import demo
from bncore.demo import network

for package in demo.NEEDS:
    pytest.importorskip(package, reason=f"the demo needs {package}")

from bncore.demo import data, figure, table, training  # noqa: E402

QUICK = training.Settings(hidden_layers=8, steps=400, learning_rates=(0.05, 0.1), seeds=(0,))


@pytest.fixture(scope="module")
def digits():
    return data.load_digits()


class Bar:
    """Stands in for tqdm and counts."""

    n = 0

    def set_description(self, text):
        pass

    def update(self, n):
        self.n += n


@pytest.fixture(scope="module")
def swept(digits):
    """The runs without and with batch normalization, and the bars they moved."""
    bars = Bar(), Bar()
    return [
        training.sweep(digits, QUICK, batch_norm=batch_norm, bar=bar)
        for batch_norm, bar in zip((False, True), bars)
    ], bars


@pytest.fixture(scope="module")
def chosen(swept):
    return [runs[training.best(runs)] for runs in swept[0]]


# --- Network ---


@pytest.mark.parametrize("activation", network.ACTIVATIONS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_gradients_are_central_differences(backend, activation, batch_norm):
    rng = np.random.default_rng(0)
    net = network.deep_network(
        [5, 7, 7, 7, 4], activation=activation, batch_norm=batch_norm, seed=1, dtype=np.float64
    )
    for layer, name in net.parameters():
        if name != "weight":
            array = getattr(layer, name)
            array += 0.1 * rng.standard_normal(array.shape)
    x, labels = rng.standard_normal((9, 5)), rng.integers(4, size=9)

    def loss():
        return network.cross_entropy(net(x), labels)[0]

    dx = net.backward(network.cross_entropy(net(x), labels)[1])
    pairs = [(x, dx)]
    pairs += [(getattr(at, name), getattr(at, f"grad_{name}")) for at, name in net.parameters()]
    names = {name for _, name in net.parameters()}
    assert names == ({"weight", "bias", "gamma", "beta"} if batch_norm else {"weight", "bias"})
    for array, gradient in pairs:
        gradient = gradient.copy()
        expected = central_differences(loss, array)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)


def central_differences(function, array, step=1e-5):
    """d function() / d array, element by element."""
    gradient = np.empty_like(array)
    for index in np.ndindex(array.shape):
        value = array[index]
        array[index] = value + step
        above = function()
        array[index] = value - step
        below = function()
        array[index] = value
        gradient[index] = (above - below) / (2 * step)
    return gradient


def test_both_networks_start_from_the_same_weights():
    sizes = [64, 100, 100, 10]
    plain, normalized = (
        [
            getattr(layer, name)
            for layer, name in network.deep_network(
                sizes, activation="sigmoid", batch_norm=batch_norm, seed=3
            ).parameters()
            if name == "weight"
        ]
        for batch_norm in (False, True)
    )
    assert len(plain) == len(normalized) == 3
    for left, right in zip(plain, normalized):
        np.testing.assert_array_equal(left, right)


def test_cross_entropy_of_equal_scores_is_log_of_the_classes():
    loss, dscores = network.cross_entropy(np.full((2, 10), 1e4), np.array([3, 4]))
    assert loss == pytest.approx(np.log(10))
    np.testing.assert_allclose(dscores.sum(axis=1), 0, atol=1e-15)
    assert dscores[0, 3] == pytest.approx(-0.9 / 2)


# --- Data ---


def test_the_parts_share_no_image_and_hold_every_digit(digits):
    assert [len(part.x) for part in digits] == [1200, 297, 300]
    images = [image.tobytes() for part in digits for image in part.x]
    assert len(images) == 1797
    assert len(set(images)) == len(images)
    for part in digits:
        assert part.x.dtype == np.float32
        assert np.bincount(part.labels).min() >= 0.09 * len(part.labels)
    assert digits.training.x.mean() == pytest.approx(0, abs=1e-5)
    assert digits.training.x.std() == pytest.approx(1, abs=1e-5)


def test_minibatches_are_epochs_in_new_orders():
    batches = training.minibatches(10, 3, seed=0)
    first, second = ([next(batches) for _ in range(3)] for _ in range(2))
    assert len(set(np.concatenate(first))) == len(set(np.concatenate(second))) == 9
    assert np.concatenate(first).tolist() != np.concatenate(second).tolist()
    again = training.minibatches(10, 3, seed=0)
    assert all(np.array_equal(batch, next(again)) for batch in first + second)


# --- Training ---


def test_both_networks_learn(chosen):
    for [run] in chosen:
        assert run.test[0] < 0.3
        assert run.test[-1] > 0.5
        assert run.validation[-1] > 0.5


def test_every_rate_is_trained_for_all_steps(swept):
    for runs, bar in zip(*swept):
        assert set(runs) == set(QUICK.learning_rates)
        assert bar.n == QUICK.total_steps()
        for [run] in runs.values():
            assert run.steps[0] == 0
            assert run.steps[-1] == QUICK.steps
            assert len(run.test) == len(run.validation) == len(run.steps)
            assert run.percentiles.shape == (len(run.steps) - 1, 3, QUICK.width)
            assert (np.diff(run.percentiles, axis=1) >= 0).all()


def test_only_the_normalized_network_spends_time_in_batch_norm(chosen):
    [plain], [normalized] = chosen
    assert plain.batch_norm_seconds == 0
    assert 0 < normalized.batch_norm_seconds < normalized.seconds


def test_a_run_can_be_repeated(digits, chosen):
    for [run] in chosen:
        again = training.train(
            digits, QUICK, batch_norm=run.batch_norm, learning_rate=run.learning_rate,
            seed=run.seed, progress=lambda steps: None,
        )  # fmt: skip
        np.testing.assert_array_equal(again.test, run.test)
        np.testing.assert_array_equal(again.percentiles, run.percentiles)


def test_batch_norm_keeps_the_inputs_of_the_activation_in_place(chosen):
    [plain], [normalized] = chosen
    moved = [np.median(np.ptp(run.percentiles[:, 1], axis=0)) for run in (plain, normalized)]
    assert moved[1] < moved[0]


def made_up(test, validation=None, rate=0.1):
    test = np.array(test)
    return training.Run(
        True, rate, 0, np.arange(len(test)) * 10, test if validation is None else
        np.array(validation), test, np.zeros((len(test) - 1, 3, 5)), 2.0, 0.5,
    )  # fmt: skip


def test_the_learning_rate_is_chosen_on_validation():
    runs = {
        0.1: [made_up(test=[0.1, 1.0, 1.0], validation=[0.1, 0.2, 0.3])],
        0.2: [made_up(test=[0.1, 0.1, 0.1], validation=[0.1, 0.3, 0.3])],
    }
    assert training.best(runs) == 0.2


def test_steps_to_an_accuracy():
    run = made_up([0.1, 0.92, 0.89, 0.96])
    assert run.steps_to(0.90) == 10
    assert run.steps_to(0.95) == 30
    assert run.steps_to(0.97) == np.inf


# --- Report ---


def test_the_table_tells_what_was_not_reached():
    cells = table.cells([made_up([0.1, 0.92, 0.94]), made_up([0.1, 0.5, 0.96])])
    assert cells == {
        "learning rate chosen": "0.1",
        "steps to 90 % accuracy": "15 (10 - 20)",
        "steps to 95 % accuracy": "not reached (20 - not reached)",
        "final accuracy": "95.0 % (94.0 % - 96.0 %)",
        "training time": "2.00 s",
        "  in batch norm": "0.50 s, 25.0 %",
    }


def test_the_typical_unit_moves_by_the_median_amount():
    run = made_up([0.1, 0.2, 0.3])
    run.percentiles[1, 1] = [5, 1, 4, 2, 3]
    assert figure.typical_unit(run) == 4


def test_the_picture_tells_what_was_not_reached(tmp_path):
    path = tmp_path / "flat.png"
    runs = [made_up([0.1, 0.1, 0.1])]
    figure.draw(runs, runs, training.Settings(steps=20, seeds=(0,)), path)
    assert path.stat().st_size > 10_000


def test_command_quick(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    path = tmp_path / "picture.png"
    assert demo.main(parser.parse_args(["--quick", "--out", str(path)])) == 0
    out, err = capsys.readouterr()
    for words in ("with batch norm", "learning rate chosen", "steps to 95 %", "final accuracy"):
        assert words in out
    assert str(path) in "".join(out.splitlines())
    assert "100%" in err
    picture = path.read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 30_000
    width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (1800, 750)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "picture.jpg"], "must end in .png"),
        (["--out", "nowhere/picture.png"], "there is no folder 'nowhere'"),
        (["--layers", "0"], "must be a whole number from 1"),
    ],
)
def test_bad_arguments_are_refused_before_training(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
