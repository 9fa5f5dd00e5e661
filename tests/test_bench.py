"""The benchmark: its workloads, its processes, what its peers compute, and what it writes."""

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bncore
from bncore import cli
from bncore.bench import (
    comparisons,
    disturbance,
    features,
    goals,
    markdown,
    outcome,
    plot,
    report,
    runner,
    summary,
    workloads,
)
from bncore.bench.peers import EPS, NAMES, channels_second, data
from bncore.bench.workloads import Case

pytest.importorskip("matplotlib", reason="needs bncore[bench]")
pytest.importorskip("psutil", reason="needs bncore[bench]")
pytest.importorskip("rich", reason="needs bncore[bench]")
pytest.importorskip("tqdm", reason="needs bncore[bench]")

SHAPE = (3, 4, 5, 2)
MACHINE = {
    "cpu": "a CPU", "cpus": 2, "own_cache": 1 << 19, "last_cache": 1 << 25, "busy_before": 0.0,
    "busy": 0, "system": "a system", "python": "3",
}  # fmt: skip


def case(shape=SHAPE, **changes):
    plain = dict(
        suite="small", layout="channels_first", direction="forward", dtype="float32",
        output="out", threads=1,
    )  # fmt: skip
    return Case(shape=shape, **{**plain, **changes})


def row(ratios, shape=SHAPE, **changes):
    """A result in which bncore takes a second."""
    seconds = {"bncore": 1.0, **ratios}
    return runner.Result(case(shape, **changes), seconds, dict(ratios))


# -------------------------------------------------------------------------------------- workloads


def test_workloads_cover_the_networks_and_are_distinct():
    found = workloads.load()
    assert len({(w.suite, w.shape) for w in found}) == len(found)
    suites = {w.suite for w in found}
    assert {"resnet50", "googlenet_v2", "densenet121", "mlp", "conv1d", "conv3d"} <= suites
    shapes = {w.shape for w in found}
    assert {(2, 8), (65536, 1024), (2, 16, 8, 8), (64, 100), (50, 64, 112, 112)} <= shapes
    small = [w for w in found if w.shape in goals.SMALL_SHAPES]
    assert small and all("layer" in w.directions and w.quick for w in small)


def test_cases_are_every_combination_once():
    chosen = [workloads.Workload("a", SHAPE), workloads.Workload("b", (6, 4))]
    found = list(workloads.cases(chosen, threads=[1, 2]))
    assert len(set(found)) == len(found) == 2 * 2 * 2 * 3 * (2 + 1)
    assert [c.threads for c in found] == sorted(c.threads for c in found)


@pytest.mark.parametrize(
    ("shape", "layout", "direction", "times"),
    [
        ((8, 4, 16, 16), "channels_first", "forward", 1),  # a channel has 8 KB
        ((8, 4, 16, 16), "channels_last", "forward", 3 / 2),  # all of them 32 KB
        ((8, 4, 16, 16), "channels_last", "backward", 5 / 3),
        ((8, 4, 16, 16), "channels_last", "inference", 1),
        ((2048, 4), "channels_first", "forward", 3 / 2),
    ],
)
def test_bytes_needed_count_again_what_a_cache_does_not_keep(shape, layout, direction, times):
    given = case(shape, layout=layout, direction=direction)
    assert given.bytes_needed(20_000) == given.bytes_moved * times
    assert given.bytes_needed(1 << 30) == given.bytes_moved


# ------------------------------------------------------------------------------------------ peers

RESULTS = """
import json, sys
import numpy as np
sys.path[:] = json.loads(sys.argv[1])
from importlib import import_module
from bncore.bench.peers import Missing, Unsupported
from bncore.bench.workloads import Case
name, path = sys.argv[2], sys.argv[3]
try:
    peer = import_module(f"bncore.bench.peers.{name}").Peer(1)
except (ImportError, Missing) as error:
    sys.exit(f"missing: {error}")
found = {}
for i, values in enumerate(json.loads(sys.argv[4])):
    try:
        task = peer.prepare(Case(**values))
    except Unsupported:
        continue
    assert task.run(2) > 0
    found[str(i)] = task.result()
np.savez(path, **found)
"""


def expected(given):
    """In float64, by the formulas."""
    arrays = data(given)
    x = channels_second(arrays.x, given).astype(np.float64)
    axes = tuple(i for i in range(x.ndim) if i != 1)

    def column(parameter):
        return np.asarray(parameter, np.float64).reshape(-1, *[1] * (x.ndim - 2))

    mean, var = (x.mean(axes), x.var(axes))
    if given.direction == "inference":
        mean, var = arrays.mean, arrays.var
    scale = 1 / np.sqrt(column(var) + EPS)
    xhat = (x - column(mean)) * scale
    if given.direction != "backward":
        return xhat * column(arrays.gamma) + column(arrays.beta)
    dy = channels_second(arrays.dy, given).astype(np.float64)
    centred = dy - column(dy.mean(axes)) - xhat * column((dy * xhat).mean(axes))
    return centred * column(arrays.gamma) * scale


@pytest.mark.parametrize("name", NAMES)
def test_peers_compute_batch_norm(name, tmp_path):
    """Every one, in every case that it takes."""
    chosen = [workloads.Workload("a", s, workloads.DIRECTIONS) for s in (SHAPE, (9, 4), (3, 4, 5))]
    cases = list(workloads.cases(chosen, threads=[1]))
    path = tmp_path / "results.npz"
    given = [vars(c) for c in cases]
    done = subprocess.run(
        [sys.executable, "-c", RESULTS, json.dumps(sys.path), name, path, json.dumps(given)],
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    if done.stderr.startswith("missing: "):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    with np.load(path) as results:
        assert len(results.files) >= 3
        for i in results.files:
            one = cases[int(i)]
            tolerance = {"float32": 2e-5, "float64": 1e-12}[one.dtype]
            wanted = expected(one)
            found = results[i].reshape(wanted.shape)
            np.testing.assert_allclose(found, wanted, atol=tolerance, err_msg=str(one))


# ----------------------------------------------------------------------------------------- runner


@pytest.fixture(scope="module")
def measured():
    """bncore, NumPy and the reference on a tiny shape."""
    cases = list(workloads.cases([workloads.Workload("small", SHAPE)], threads=[1]))
    found = outcome.Outcome(dict(MACHINE))
    for event in runner.run(cases, ["bncore", "numpy", "reference"], rounds=2, seconds=1e-4):
        if isinstance(event, runner.Result):
            found.results.append(event)
        else:
            found.meet(event)
    return found


def test_every_contender_is_measured_in_every_case(measured):
    assert set(measured.versions) == {"bncore", "numpy", "reference"}
    assert "(numpy)" in measured.versions["reference"]
    assert len(measured.results) == 2 * 2 * 2 * 3
    for result in measured.results:
        assert result.skipped == {}
        assert result.ratios.keys() >= {"numpy", "reference"}
        assert all(math.isfinite(t) and t > 0 for t in result.seconds.values())


def test_compiled_bncore_is_measured_beside_the_limit(measured, backend):
    if "(numpy)" in measured.versions["bncore"]:
        pytest.skip("the fallback has no yardstick")
    assert all(runner.LIMIT in result.ratios for result in measured.results)


@pytest.fixture
def no_jax(tmp_path, monkeypatch):
    """Child processes find no JAX."""
    tmp_path.joinpath("jax.py").write_text("raise ImportError('no jax here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_missing_peer_is_named_and_skipped(no_jax, capsys):
    found = outcome.Outcome(dict(MACHINE))
    for event in runner.run([case()], ["bncore", "jax"], rounds=1, seconds=1e-4):
        if isinstance(event, runner.Result):
            found.results.append(event)
        else:
            found.meet(event)
    assert found.missing == {"jax": "no jax here"}
    assert "jax" not in found.results[0].seconds
    report.show(found)
    assert "JAX is left out: no jax here" in capsys.readouterr().out


def test_a_peer_that_dies_is_missing_with_its_last_words(monkeypatch):
    monkeypatch.setattr(runner, "_START", "import sys; sys.exit('out of order')")
    worker = runner.Worker("numpy", 1)
    try:
        worker.wait()
    finally:
        worker.close()
    assert "out of order" in worker.missing


# --------------------------------------------------------------------------------- what is written


def test_the_report_has_a_row_for_every_case(measured, capsys):
    report.show(measured)
    shown = capsys.readouterr().out
    assert report.rows(measured.results, measured, "all").row_count == len(measured.results)
    assert shown.count("into a fresh array") == shown.count("into a given array") - 1 == 2
    assert "3x4x5x2" in shown


def test_saved_outcomes_load_together(measured, tmp_path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    outcome.save(measured, one)
    assert outcome.load([one]) == measured
    again = outcome.Outcome(dict(MACHINE), results=[row({"numpy": 3.0}), row({}, (7, 7))])
    outcome.save(again, two)
    both = outcome.load([one, two])
    assert len(both.results) == len(measured.results) + 1
    [replaced] = [r for r in both.results if r.case == case()]
    assert replaced.ratios == {"numpy": 3.0}


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot_is_drawn(measured, tmp_path, suffix):
    larger = [
        row({"limit": 0.5, "numpy": 4.0}, (4, c, 16, 16), direction=d, layout=layout)
        for c, d, layout in itertools.product((16, 64), markdown.DIRECTIONS, workloads.LAYOUTS)
    ]
    path = tmp_path / f"bandwidth.{suffix}"
    plot.plot(outcome.Outcome(dict(MACHINE), results=larger), path)
    head = path.read_bytes()[:200]
    assert head.startswith(b"\x89PNG") if suffix == "png" else b"<?xml" in head


def test_the_short_table_has_a_line_per_shape_and_layout(measured):
    found = list(markdown.lines(measured))
    assert found[0].startswith("| shape | layout | ")
    assert [line.split(" | ")[:2] for line in found[2:4]] == [
        ["| 3×4×5×2", "channels first"],
        ["| 3×4×5×2", "channels last"],
    ]
    assert {line.count("|") for line in found[:4]} == {found[0].count("|")}


def test_the_command_measures_reports_and_writes(tmp_path, capsys):
    paths = {kind: tmp_path / kind for kind in ("json", "plot.png", "markdown")}
    arguments = ["--shape", "3,4,5,2", "--threads", "1", "--dtype", "float32", "--output", "out"]
    arguments += ["--layout", "channels_first", "--peers", "numpy", "--rounds", "1"]
    for kind, path in paths.items():
        arguments += [f"--{kind.partition('.')[0]}", str(path)]
    assert cli.main(["bench", *arguments, "--turn", "0.0001"]) == 0
    assert "NumPy" in capsys.readouterr().out
    assert all(path.stat().st_size > 100 for path in paths.values())
    assert cli.main(["bench", "--load", str(paths["json"])]) == 0
    assert "3x4x5x2" in capsys.readouterr().out


def test_the_command_stops_when_its_time_is_up(capsys):
    arguments = ["--shape", "3,4,5,2", "--threads", "1", "--peers", "numpy", "--rounds", "1"]
    assert cli.main(["bench", *arguments, "--turn", "0.0001", "--stop-after", "1e-9"]) == 0
    assert "1 of 24 cases were measured." in capsys.readouterr().out


def test_other_processes_are_kept_busy_until_the_end(monkeypatch):
    started = []

    class Started(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Started)
    with pytest.raises(ZeroDivisionError), disturbance.busy(2):
        assert [process.poll() for process in started] == [None, None]
        raise ZeroDivisionError
    assert all(process.returncode is not None for process in started)


@pytest.mark.parametrize("arguments", [["--shape", "7"], ["--peers", "keras"], ["--rounds", "0"]])
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", *arguments])
    assert arguments[1] in capsys.readouterr().err


# ------------------------------------------------------------------------------- summary and goals


def test_losses_are_the_rows_with_a_faster_peer_in_the_same_layout():
    rows = [
        row({"torch": 2.0, "onednn": 0.5, "limit": 0.3}),
        row({"torch": 0.25, "onednn": 0.75}, direction="backward"),
        row({"torch": 2.0, "onednn_blocked": 0.1}, direction="inference"),
    ]
    found = summary.losses(outcome.Outcome(dict(MACHINE), results=rows))
    assert [(loss.ratio, loss.peer, loss.result) for loss in found] == [
        (0.25, "torch", rows[1]),
        (0.5, "onednn", rows[0]),
    ]


def test_best_onednn_is_the_fastest_of_all_layouts():
    rows = [
        row({"onednn": 4.0, "onednn_blocked": 3.0}),
        row({"onednn": 2.0}, layout="channels_last"),
        row({"onednn": 5.0}, direction="backward"),
    ]
    assert summary.best_onednn(rows) == [2.0, 2.0, 5.0]


def of(goal, results):
    """The check whose goal begins so."""
    found = goals.checks(outcome.Outcome(dict(MACHINE), results=results))
    [check] = [c for c in itertools.chain(*found.values()) if c.goal.startswith(goal)]
    return check


def test_the_limit_is_scaled_where_data_are_read_twice():
    shape = (20, 64, 64, 64)  # 21 MB, 328 KB a channel
    rows = [row({"limit": 0.95}, shape), row({"limit": 0.62}, shape, layout="channels_last")]
    once, twice = of("larger than the cache, read once", rows), of("larger than", rows[1:])
    assert (once.reached, once.holds) == (0.95, True)
    assert twice.reached == pytest.approx(0.93)


def test_goals_name_their_worst_row():
    rows = [row({"torch": 5.0}), row({"torch": 0.9}, direction="backward")]
    check = of("ahead of every peer", rows)
    assert (check.reached, check.rows, check.met) == (0.9, 2, 1)
    assert check.worst is rows[1] and not check.holds
    assert of("geometric mean over PyTorch", rows).reached == pytest.approx(math.sqrt(4.5))


def test_a_lead_is_told_beside_what_the_limit_would_give():
    large = (20, 64, 64, 64)
    rows = [row({"torch": 2.0, "limit": 0.5}, large), row({"torch": 9.0}, large)]
    check = of("tensors from 4 MB on, geometric mean over PyTorch", rows)
    assert check.reached == pytest.approx(math.sqrt(18)) and check.at_limit == pytest.approx(4.0)
    small = [row({"torch": 2.0}, (8, 8))]
    assert of("geometric mean over PyTorch", small).at_limit is None


def test_small_shapes_have_goals_of_their_own():
    rows = [
        row({"torch": 1.9, "onednn": 1.2}, (64, 100), direction="layer"),
        row({"torch": 0.1}, (64, 100), direction="backward"),
    ]
    assert not of("small shapes, inference and layer, by PyTorch", rows).holds
    assert of("small shapes, inference and layer, by oneDNN", rows).holds


def test_irregular_shapes_are_compared_with_the_nearest_regular_one():
    regular = row({}, (8, 64, 28, 28))
    slow = runner.Result(case((8, 63, 28, 28)), {"bncore": 2.0})
    check = of("speed of irregular shapes", [regular, slow])
    assert check.worst is slow
    assert check.reached == pytest.approx(1.5 * (63 / 64) / 2)


def test_threads_are_compared_with_one():
    shape = (64, 16, 32, 32)  # 4 MB
    alone = runner.Result(case(shape), {"bncore": 1.9})
    check = of("by one thread, geometric mean", [alone, row({}, shape, threads=2)])
    assert check.reached == pytest.approx(1.9) and check.holds


# --------------------------------------------------------------------------------------- features

CACHES = {"own_cache": 1 << 19, "last_cache": 1 << 25}
SETTINGS = [(SHAPE, "channels_first"), (SHAPE, "channels_last"), ((9, 4), "channels_first")]
FEATURES = comparisons.cases(SETTINGS, comparisons.DIRECTIONS, [1])


def result_of(call, out):
    """What a call leaves in the array given, or else returns."""
    out[...] = np.nan
    returned = call()
    if not np.isnan(out).all():
        return out.astype(np.float64)
    return (returned if isinstance(returned, np.ndarray) else returned[0]).astype(np.float64)


@pytest.mark.parametrize("given", FEATURES, ids=str)
def test_what_is_compared_computes_the_same(given, backend):
    arrays = comparisons.arrays_of(given)
    calls = comparisons.calls_of(given, arrays)
    pairs = [
        (comparisons.RELU, comparisons.RELU_AFTER, 1e-6),
        (comparisons.ADD_RELU, comparisons.ADD_RELU_AFTER, 1e-6),
        (comparisons.FRESH, comparisons.PLAIN, 1e-6),
        (comparisons.IN_PLACE, comparisons.PLAIN, 1e-4),
        (comparisons.FIXED_X, comparisons.FIXED, 1e-6),
        (comparisons.IN_PARTS, comparisons.PLAIN, 1e-5),
        (comparisons.KEEPS_Y, comparisons.KEEPS_X, 1e-4),
    ]
    for feature, against, tolerance in pairs:
        if feature in calls:
            one, other = (
                result_of(calls[feature], arrays.out),
                result_of(calls[against], arrays.out),
            )
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)
    plain = result_of(calls[comparisons.PLAIN], arrays.out)
    assert not np.allclose(plain, result_of(calls[comparisons.RELU], arrays.out))
    for half in set(comparisons.HALVES) & set(calls):
        returned = calls[half]()
        y = returned if isinstance(returned, np.ndarray) else returned[0]
        assert y.dtype.itemsize == 2
        np.testing.assert_allclose(y.astype(np.float64), plain, rtol=0.1, atol=0.1)


def test_gradients_not_chosen_are_not_computed(backend):
    [given] = comparisons.cases([(SHAPE, "channels_first")], ["backward"], [1])
    calls = comparisons.calls_of(given, comparisons.arrays_of(given))
    alone, whole = calls[comparisons.PARAMETERS](), calls[comparisons.PLAIN]()
    assert alone.dx is None
    np.testing.assert_array_equal(alone.dgamma, whole.dgamma)
    fixed = calls[comparisons.FIXED_X]()
    assert fixed.dgamma is fixed.dbeta is None and calls[comparisons.FIXED]().dgamma is not None


def test_in_place_again_and_again_neither_overflows_nor_vanishes():
    for given in FEATURES:
        arrays = comparisons.arrays_of(given)
        again = comparisons.calls_of(given, arrays)[comparisons.IN_PLACE]
        first = result_of(again, arrays.out)
        for _ in range(3000):
            last = again()
        last = last if isinstance(last, np.ndarray) else last[0]
        np.testing.assert_allclose(np.abs(last).max() / np.abs(first).max(), 1, atol=0.1)


@pytest.mark.parametrize("given", FEATURES, ids=str)
def test_every_ratio_of_features_is_measured(given):
    comparison = comparisons.prepare(given, CACHES)
    found = features.measure(comparison, rounds=1, seconds=1e-4)
    assert [(c.feature, c.against) for c in found] == [r[:2] for r in comparison.ratios]
    assert len(found) >= 7
    assert all(math.isfinite(c.ratio) and c.ratio > 0 for c in found)


def test_ratios_are_of_times_and_scaled():
    calls = {"slow": (lambda n: 3.0 * n, lambda n: 2.0 * n), "fast": (lambda n: 1.0 * n,)}
    ratios = [comparisons.Ratio("slow", "fast", 1.1, 4.0), comparisons.Ratio("slow", "fast", 1.1)]
    half, double = features.measure(
        comparisons.Comparison(case(), calls, ratios), rounds=3, seconds=0.1
    )
    assert (half.seconds, half.base, half.ratio, half.missed) == (2.0, 4.0, 0.5, False)
    assert (double.ratio, double.missed) == (2.0, True)


@pytest.mark.parametrize(
    ("own_cache", "direction", "bytes_per_element"),
    [(1 << 30, "forward", 12), (1, "forward", 16), (1, "inference", 12)],
)
def test_what_a_residual_costs_is_counted_in_bytes(
    own_cache, direction, bytes_per_element, backend
):
    given = case((8, 4, 16, 16), direction=direction)
    comparison = comparisons.prepare(given, {"own_cache": own_cache, "last_cache": 1})
    scales = [r.scale for r in comparison.ratios if r.against == comparisons.PASS]
    both = [(bytes_per_element - 4) / 8, bytes_per_element / 8]  # plain, with a residual
    assert scales == ([] if bncore.backend() == "numpy" else both)


def test_the_command_measures_features_and_writes(tmp_path, capsys):
    arguments = ["--shape", "3,4,5,2", "--layout", "channels_last", "--threads", "1"]
    arguments += ["--rounds", "1", "--turn", "0.0001"]
    paths = {kind: tmp_path / kind for kind in ("json", "markdown")}
    for kind, path in paths.items():
        arguments += [f"--{kind}", str(path)]
    team = bncore.get_num_threads()
    assert cli.main(["bench", "--features", *arguments]) == 0
    assert bncore.get_num_threads() == team
    shown = capsys.readouterr().out
    assert "3x4x5x2 last" in shown and "double backward" in shown
    costs = json.loads(paths["json"].read_text())["costs"]
    lines = paths["markdown"].read_text().splitlines()
    assert len(lines) - 2 == len(costs) > 20
    assert len({line.count("|") for line in lines}) == 1


def test_features_stop_when_their_time_is_up(capsys):
    arguments = ["--features", "--shape", "3,4,5,2", "--rounds", "1", "--turn", "0.0001"]
    assert cli.main(["bench", *arguments, "--stop-after", "1e-9"]) == 0
    shown = capsys.readouterr().out
    assert "forward" in shown and "inference" not in shown


def test_features_take_no_peers():
    with pytest.raises(SystemExit, match="--features takes no --peers"):
        cli.main(["bench", "--features", "--peers", "numpy"])


# ----------------------------------------------------------------------------------------- memory


@pytest.fixture(scope="module")
def memory():
    """The script as a module."""
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("memory", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_candidate_takes_the_same_step(memory, backend):
    x, dy = memory.data((4, 3, 5, 7))
    wide = bncore.batch_norm(x.astype(np.float64), activation=memory.ACTIVATION)
    expected = wide[0], bncore.batch_norm_backward(dy.astype(np.float64), wide[1]).dx
    for name, make in memory.CANDIDATES.items():
        if "PyTorch" not in name:
            for got, right in zip(make(3)(x.copy(), dy.copy()), expected):
                np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-4, err_msg=name)


def test_a_candidate_writes_only_over_what_it_says(memory):
    x, dy = memory.data((4, 3, 5, 7))
    for name, make in memory.CANDIDATES.items():
        if "PyTorch" not in name:
            given = x.copy(), dy.copy()
            make(3)(*given)
            assert np.array_equal(given[0], x) == ("InPlace" not in name), name
            assert np.array_equal(given[1], dy) == ("over dy" not in name), name


def test_memory_is_measured_in_processes_of_their_own(memory, monkeypatch, tmp_path, capsys):
    few = {name: memory.CANDIDATES[name] for name in list(memory.CANDIDATES)[-2:]}
    monkeypatch.setattr(memory, "CANDIDATES", few)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    path = tmp_path / "memory.md"
    monkeypatch.setattr(sys, "argv", ["memory.py", "--shape", "8,4,64,64", "--markdown", str(path)])
    memory.main()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == list(few)
    assert all(float(line.split(" | ")[1]) >= 0 for line in lines[2:])
    assert "8x4x64x64" in capsys.readouterr().out
    assert memory.markdown({"a": None, "b": 6 << 20}, (1, 1, 1024, 1024)).splitlines()[2:] == [
        "| a | – | – |",
        "| b | 6 | 1.50 |",
    ]
