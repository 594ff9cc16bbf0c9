"""The experiments: tables hold what the runs measured, operations are counted by formulas, and each script runs."""

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Annotation

import train_mnist
import train_toy
from conftest import checkpoint
from data import dequantize, load_images
from densities import TOYS
from ebflow import EBFlow, logit_preprocessing
from experiments import (ablation, bumps, completed, explain, idea, imputation, mass, passed_on, read_metrics,
                         runtime, sheet, starts, tables)
from layers import FullyConnected, Logit, Standardize
from losses import OBJECTIVES
from support import plots
from support.run import RunError

CPU = torch.device("cpu")
RESULTS = Path(__file__).parent.parent / "results"
SMALL = ["--epochs", "2", "--batch-size", "50", "--normalize", "center", "--sml-steps", "0", "--device", "cpu"]


@pytest.fixture(autouse=True)
def no_pictures_of_runs(monkeypatch):
    for name in ("curves", "mosaic", "toy"):
        monkeypatch.setattr(plots, name, lambda *_, **__: Figure(figsize=(1, 1)))


def refused(main, *flags):
    """Exits with one line, or argparse's status.   -> str"""
    with pytest.raises(SystemExit) as exit:
        main([*flags])
    assert exit.value.code and "\n" not in str(exit.value.code)
    return str(exit.value.code)


def saved(path):
    return json.loads(path.read_text())


def test_a_flag_that_the_experiment_sets_itself_is_refused_and_others_are_passed_on():
    own = ["--loss", "ssm", "--no-map"]
    assert passed_on(train_mnist.Settings, own, ["--lr", "0.5", "--loss", "ssm"]).lr == 0.5
    for flags in (["--map"], ["--loss", "dsm"]):
        with pytest.raises(SystemExit):
            passed_on(train_mnist.Settings, own, flags)
    refused(tables.main, "--results", "/dev/null/a")  # before the work


@pytest.mark.parametrize("name", [path.stem for path in sorted(Path(idea.__file__).parent.glob("[a-z]*.py"))])
def test_every_experiment_has_a_command_which_refuses_an_unknown_flag_by_its_name_before_all_else(tmp_path, capsys,
                                                                                                 monkeypatch, name):
    monkeypatch.setattr(torch.nn.Module, "__init__", None)  # no flow is made
    for results in (tmp_path, RESULTS):  # no file to compare the flags with, and one
        refused(importlib.import_module(f"experiments.{name}").main, "--bogus", "--results", str(results))
        assert "--bogus" in capsys.readouterr().err.splitlines()[-1]


def test_the_list_of_experiments_needs_no_utf_8():
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command, root = [sys.executable, "-m", "experiments"], Path(idea.__file__).parents[1]
    lines = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "idea" in [line.split()[0] for line in lines]


def test_what_is_not_recorded_is_run_and_written_at_once_and_results_of_another_run_are_refused(tmp_path):
    path, done = tmp_path / "results.json", []
    jobs = {"a": lambda: done.append("a") or 1, "b": lambda: done.append("b") or 1 / 0}
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            completed(path, jobs, digits=(1, 2))
    assert done == ["a", "b", "b"] and saved(path)["runs"] == {"a": 1}
    assert completed(path, {"a": None}, digits=(1, 2)) == {"a": 1}
    with pytest.raises(RunError):
        completed(path, jobs, digits=(1, 3))


def test_the_interval_is_student_s():
    assert tables.interval([1.0, 2.0, 3.0]) == (2, pytest.approx(4.303 / 3**0.5, rel=1e-3))
    assert tables.interval([1.0]) == (1.0, None)


def test_the_table_of_mnist_has_what_the_runs_measured_and_trains_nothing_twice(tmp_path, npy, capsys, monkeypatch):
    monkeypatch.setattr(tables, "OBJECTIVES", {loss: OBJECTIVES[loss] for loss in ("ml", "dsm")})
    flags = ["--runs", str(tmp_path), "--results", str(tmp_path / "a" / "results"), *SMALL, "--data", str(npy),
             "--seed", "3"]
    tables.main(flags)
    table = saved(tmp_path / "a" / "results" / "mnist-fc.json")
    assert list(table) == ["ml", "dsm"]
    for loss, row in table.items():
        metrics, config = read_metrics(tmp_path / f"mnist-fc-{loss}"), saved(tmp_path / f"mnist-fc-{loss}/config.json")
        best = min(metrics[1:], key=lambda m: m["val_nll"])
        assert config["loss"] == loss and row["seed"] == config["seed"] == 3 and "--batch-size 50" in row["command"]
        assert (row["start_val_nll"], row["val_nll"], row["best_epoch"], row["test_nll"], row["epochs"]) == (
            metrics[0]["val_nll"], best["val_nll"], best["epoch"], metrics[-1]["test_nll"], 2)
    assert capsys.readouterr().out.splitlines()[-2:] == tables.mnist_rows(table)
    tables.main(flags)
    assert saved(tmp_path / "a" / "results" / "mnist-fc.json") == table


def test_the_table_of_the_toys_has_the_mean_over_seeds_and_the_picture_seed_0(tmp_path, capsys, monkeypatch):
    """Before and after the steps of sml, which `ml` has not, and which are all that the start has."""
    shown, origin, short = [], torch.zeros(1, 2), dict(epochs=1, steps=5)
    monkeypatch.setattr(plots, "image", lambda axes, f, x, **_: shown.append(f(origin).item()))
    monkeypatch.setattr(tables, "TOYS", {"sine": TOYS["sine"]})
    monkeypatch.setattr(tables, "OBJECTIVES", {loss: OBJECTIVES[loss] for loss in ("ml", "dsm")})
    monkeypatch.setattr(train_toy, "RECIPES", {"ml": short, "dsm": short | dict(sml_steps=3)})
    tables.main(["--arch", "toy", "--seeds", "2", "--runs", str(tmp_path), "--results", str(tmp_path), "--blocks", "2",
                 "--width", "8", "--batch-size", "50", "--test-points", "200"])
    rows = saved(tmp_path / "toys.json")["rows"]
    assert [row["cell"] for row in rows] == ["ml", "dsm", "the start"]
    for row, name in product(rows, ("kl", "fisher")):
        runs = [tmp_path / f"toys-{seed}" / f"sine-{row['cell'].removeprefix('the ')}" for seed in (0, 1)]
        metrics = [read_metrics(run) for run in runs]
        for key in (f"test_{name}", f"before_sml_test_{name}"):
            figures = [m[-1][key if row["cell"] != "ml" else f"test_{name}"] for m in metrics]
            assert figures[0] != figures[1] and tuple(row[key]) == tables.interval(figures)
    assert [*tables.toy_rows(rows)] == capsys.readouterr().out.splitlines()[-3:]
    assert "±" not in [*tables.toy_rows([rows[0] | {name: (1.0, None) for name in tables.FIGURES}])][0]
    flows = [train_toy.load(tmp_path / "toys-0" / f"sine-{loss}") for loss in ("ml", "dsm")]
    assert shown == [f.log_prob(origin).exp().item() for f in (TOYS["sine"](), *flows)]
    start = read_metrics(tmp_path / "toys-0" / "sine-start")
    assert start[0]["val_kl"] == start[1]["val_kl"] != start[2]["val_kl"]  # the learning rate of step 0 is 0


def test_the_table_of_the_published_settings_has_what_the_runs_measured_and_keeps_the_others(tmp_path, npy, capsys):
    flags = ["--data", str(npy), *SMALL, "--normalize", "none"]
    for name, more in (("paper", ["--paper", "--epochs", "12"]), ("ours", ["--epochs", "1"])):
        train_mnist.main([*flags, *more, "--out", str(tmp_path / name)])
    for name in ("mnist-fc", "mnist-cnn", "paper"):
        shutil.copy(RESULTS / f"{name}.json", tmp_path)
    tables.main(["--paper", str(tmp_path / "paper"), "--results", str(tmp_path), "--machine", "a test"])
    runs, metrics = saved(tmp_path / "paper.json")["runs"], read_metrics(tmp_path / "paper")
    assert (runs["fc dsm"]["test_nll"], runs["fc dsm"]["machine"]) == (metrics[-1]["test_nll"], "a test")
    kept = sorted({0, 10, 12, metrics[-1]["best_epoch"]})
    assert runs["fc dsm"]["val_nll"] == {str(n): round(metrics[n]["val_nll"], 1) for n in kept}
    assert {**runs, "fc dsm": 0} == {**saved(RESULTS / "paper.json")["runs"], "fc dsm": 0}
    nll, tuned = metrics[-1]["test_nll"], saved(RESULTS / "mnist-fc.json")["dsm"]["before_sml"]
    assert f"| fc | dsm | 1099.2 | 10,000 | {nll:.1f} | 12 | {tuned:.1f} |" in capsys.readouterr().out.splitlines()
    assert "ours" in refused(tables.main, "--paper", str(tmp_path / "ours"), "--results", str(tmp_path))


def test_the_ablation_measures_what_train_mnist_does(tmp_path, npy, capsys):
    flags = ["--data", str(shutil.copy(npy, tmp_path)), *SMALL, "--actnorm", "moments"]
    own = ["--results", str(tmp_path), "--runs", str(tmp_path), "--seeds", "1"]
    ablation.main([*own, *flags])
    runs = saved(tmp_path / "ablation-fc.json")["runs"]
    assert len(runs) == 6 and [*ablation.rows(runs)] == capsys.readouterr().out.splitlines()[-3:]
    train_mnist.main([*flags, "--out", str(tmp_path / "run"), "--loss", "dsm", "--no-ema"])
    for column, directory in (("EMA", tmp_path / "ablation" / "dsm-map-0"), ("no EMA", tmp_path / "run")):
        metrics = read_metrics(directory)
        assert metrics[-1]["best_epoch"] == 2  # the ablation takes the last
        assert runs["dsm with MaP, seed 0"][column] == pytest.approx(metrics[-1]["test_nll"], rel=1e-6)
    norms = {str(row["step"]): pytest.approx(row["grad_norm"], rel=1e-3) for row in metrics[1:]}
    assert runs["dsm with MaP, seed 0"]["norms"] == norms
    np.save(tmp_path / npy.name, 255 - np.load(npy))
    refused(ablation.main, *own, *flags)


def test_the_table_and_the_picture_of_the_ablation_have_each_run_in_its_place():
    cells = [f"{loss} {prefix} MaP, seed 0" for loss in ablation.OBJECTIVES for prefix in ("without", "with")]
    runs = {cell: {"EMA": i, "no EMA": i + 0.5, "norms": {"5": i, "10": 1}} for i, cell in enumerate(cells)}
    assert [*ablation.rows(runs)][1] == "| dsm | 2.5 | 2.0 | 3.5 | 3.0 |"
    axes = ablation.picture(runs).axes[1]
    lines = {line.get_linestyle(): line.get_xydata().tolist() for line in axes.lines if len(line.get_xydata())}
    assert axes.get_title() == "dsm" and lines == {":": [[5, 2], [10, 1]], "-": [[5, 3], [10, 1]]}


@pytest.mark.parametrize("arch, loss", [("fc", "ssm"), ("glow", "dsm")])
def test_imputation_keeps_and_uses_what_is_seen(tmp_path, monkeypatch, arch, loss):
    shown = []
    monkeypatch.setattr(imputation, "sheet", lambda images, *a, **b: shown.append(images) or sheet(images, *a, **b))
    for name, value in {"IMAGES": 40, "DRAWS": 4, "STEPS": 50}.items():
        monkeypatch.setattr(imputation, name, value)
    data = tmp_path / "images.npy"  # an image is a shade with noise, and its left half is bright; for glow, in colour
    shade = torch.randint(0, 100, (350, 1, 1, 1)) + torch.randint(0, 16, (350, 4, 4, 1 if arch == "fc" else 3))
    np.save(data, (shade + torch.tensor([130, 130, 0, 0])[:, None]).to(torch.uint8).numpy())
    train_mnist.main(["--data", str(data), "--out", str(tmp_path / "run"), "--arch", arch, "--loss", loss,
                      *"--epochs 3 --batch-size 50 --device cpu --lr 1e-3 --sml-steps 0".split(),
                      *["--width", "8", "--depth", "1"] * (arch == "glow")])
    shared = ["--run", str(tmp_path / "run"), "--data", str(data), "--results", str(tmp_path)]
    imputation.main(shared)
    masks = saved(tmp_path / f"imputation-{'colour-' * (arch == 'glow')}{arch}-{loss}.json")["rmse"]
    errors = masks["random pixels"]
    for guess in ("Gaussian", "flow"):  # the pixels of an image share their shade: those seen tell of the others
        assert errors[f"{guess}, mean of draws"] < min(errors["training mean"], errors[f"{guess}, one draw"])
    rows = shown[0].view(3 + 5 * len(masks), 16, -1, 4, 4)  # images, two rows of draws; what is seen, and four guesses
    torch.testing.assert_close(rows[4:8, ..., [0, 3], :], rows[[0] * 4][..., [0, 3], :], rtol=0, atol=0.01)
    if arch == "fc":
        np.save(data, np.zeros((350, 4, 8), np.uint8))  # 16 numbers are half an image
        assert "images.npy" in refused(imputation.main, *shared)


def test_the_gaussian_that_completes_images_has_the_conditional_mean_and_covariance(monkeypatch, float64):
    monkeypatch.setattr(imputation, "DRAWS", 40_000)
    pre, W = logit_preprocessing((4,), 1.0), torch.eye(4) + 0.3 * torch.randn(4, 4)
    whiten = FullyConnected(4).requires_grad_(False)
    whiten.weight.copy_(W)
    x, missing = pre.inverse(torch.randn(2, 4)), torch.tensor([[True, False, True, False], [False, False, False, True]])
    draws = imputation.gaussian(EBFlow([*pre.layers, whiten], (4,)), x, missing)
    covariance = torch.linalg.inv(W.T @ W)
    for z, given, m in zip(pre(draws).view(-1, 2, 4).unbind(1), pre(x), missing):
        torch.testing.assert_close(z[:, ~m], given[~m].expand(len(z), -1))  # what is seen stays
        gain = covariance[m][:, ~m] @ torch.linalg.inv(covariance[~m][:, ~m])
        torch.testing.assert_close(z[:, m].mean(0), gain @ given[~m], rtol=0, atol=0.03)
        torch.testing.assert_close(z[:, m].T.cov().view(m.sum(), -1),
                                   covariance[m][:, m] - gain @ covariance[~m][:, m], rtol=0.03, atol=0.03)


def test_each_mask_hides_what_its_name_says_and_the_error_is_of_hidden_pixels_and_a_sheet_is_a_grid():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images[0, 2, 1, 2], images[1, 0, 3, 3] = 200, 90
    hidden = imputation.masks(images)
    assert hidden["middle third"].all((0, 1, 3)).tolist() == [False, True, True, False]
    assert "another digit's shape" not in hidden  # in colour
    shape = imputation.masks(images.amax(1, keepdim=True))["another digit's shape"]
    assert shape.nonzero().tolist() == [[1, 0, 1, 2]]  # 90 is not bright
    random = hidden["random pixels"]
    assert (random == random[:, :1]).all() and 0 < random.sum() < random.numel()  # all channels of a pixel are hidden
    truth, guess = torch.zeros(2, 3, 4, 4), torch.full((5, 2, 3, 4, 4), 1000.0)
    guess[..., 1:3, :] = 64
    assert imputation.rmse(guess, truth, hidden["middle third"]) == 0.25
    images = 256 * torch.rand(3, 2, 60)
    shown = sheet(images, (3, 4, 5), down=["a", "b", "c"]).axes[0].images[0].get_array()
    np.testing.assert_allclose(shown[8:, 5:], images[2, 1].view(3, 4, 5).permute(1, 2, 0) / 256, atol=1e-6)


def test_determinants_and_solves_are_counted_by_their_textbook_formulas():
    def count(function):
        with runtime.Operations() as counted:
            function()
        return counted.total

    n, k = 30, 7
    A, B = torch.randn(n, n).requires_grad_(), torch.randn(n, k)
    assert count(lambda: torch.linalg.slogdet(A)) == 2 * n**3 // 3
    assert count(lambda: torch.linalg.slogdet(A).logabsdet.backward()) == 2 * n**3 // 3 + 2 * n**3  # the inverse
    with torch.no_grad():
        assert count(lambda: torch.linalg.solve(A, B)) == 2 * n**3 // 3 + 2 * n**2 * k
        assert count(lambda: torch.linalg.solve(A.T, B.T, left=False)) == 2 * n**3 // 3 + 2 * n**2 * k
        assert count(lambda: torch.linalg.solve_triangular(A, B, upper=True)) == n**2 * k
        assert count(lambda: A @ B) == 2 * n**2 * k


@pytest.mark.parametrize("loss, products, cubes, low, high", [
    ("ml", 5, 8 / 3, 2.9, 3), ("sml", 10, 2 / 3, 2.5, 3), ("ssm", 22, 0, 1.99, 2.05), ("dsm", 11, 0, 1.99, 2.05),
    ("fdssm", 15, 0, 1.99, 2.05)])
def test_score_matching_counts_products_alone_and_maximum_likelihood_the_cube(loss, products, cubes, low, high):
    """Each of the two layers has a factorisation (⅔D³). ml needs the inverse (2D³), too; sml solves for samples."""
    B, D = runtime.BATCH_SIZE, 64
    expected = 2 * B * D**2 * products + 2 * cubes * D**3 + (4 * B * D**2 if loss == "sml" else 0)
    assert runtime.count_operations("fc", (1, 8, 8), loss) == pytest.approx(expected, rel=1e-4)
    rows = [{"D": c * side**2, "operations": runtime.count_operations("fc", (c, side, side), loss)}
            for c, side in runtime.SIZES]
    assert low <= runtime.slope(rows, "operations") <= high


def test_runtime_prints_the_time_of_each_size_and_objective(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runtime, "picture", lambda *_: Figure(figsize=(1, 1)))  # the next test looks at it
    monkeypatch.setattr(runtime, "SIZES", [(1, 4), (3, 4)])
    monkeypatch.setattr(runtime, "BATCH_SIZE", 4)
    monkeypatch.setattr(runtime, "SECONDS", 0)
    runtime.main(["--results", str(tmp_path), "--device", "cpu"])
    sizes = saved(tmp_path / "runtime-cpu.json")["runs"]
    assert [*sizes] == ["fc 1×4×4", "cnn 1×4×4", "fc 3×4×4", "cnn 3×4×4"]
    ms = {row["loss"]: row["ms"] for row in sizes["fc 3×4×4"]}
    cells = " | ".join(f"{t:,.1f}" for t in (*ms.values(), ms["ml"] / ms["dsm"]))
    assert [*ms] == [*OBJECTIVES] and f"| fc | 3×4×4 | 48 | {cells} |" in capsys.readouterr().out.splitlines()


def exponent(rows, key):
    return f"{np.polyfit(*np.log([[row['D'], row[key]] for row in rows]).T, 1)[0]:.2f}"


def test_the_picture_of_the_runtime_has_a_tick_at_each_size_and_an_entry_with_the_exponent_for_each_objective():
    rows = [row for size in saved(RESULTS / "runtime-cpu.json")["runs"].values() for row in size]
    axes_by_cell = dict(zip(product(("fc", "cnn"), ("operations", "ms")), runtime.picture(rows, "a machine").axes))
    for (arch, key), axes in axes_by_cell.items():
        own = [row for row in rows if row["arch"] == arch]
        assert axes.get_xticks().tolist() == sorted({row["D"] for row in own})
        assert len(axes.lines) == len(OBJECTIVES) * (1 if arch == "fc" else 2)
        for entry, loss in zip(axes.get_legend().texts, OBJECTIVES, strict=True):
            assert entry.get_text().startswith(f"{loss},")
            for channels in [(1, 3)] if arch == "fc" else [(1,), (3,)]:
                sizes = [row for row in own if row["loss"] == loss and row["channels"] in channels]
                points = sorted([row["D"], row[key]] for row in sizes)
                assert any(line.get_xydata().tolist() == points for line in axes.lines)
                assert exponent(sizes, key) in entry.get_text()


def test_the_diagram_sends_each_log_determinant_to_e_or_to_z_and_dashes_what_training_does_not_compute():
    (model, fixed), axes = idea.default_run(), Figure().subplots()
    assert [type(layer) for layer in model.layers[:fixed]] == [Standardize, Logit, Standardize, FullyConnected]
    idea.diagram(axes, model, fixed)
    arrows = [text for text in axes.texts if isinstance(text, Annotation) and text.xy[1] == text.xyann[1]]
    x = torch.rand(1, 784)
    own = [isinstance(layer(x), tuple) for layer in model.layers] + [True]  # a log-determinant of x, or the prior of u
    assert [arrow.xy[0] > 0 for arrow in arrows] == own and own.count(True) == 3
    assert [arrow.arrow_patch.get_linestyle() in ("-", "solid") for arrow in arrows] == [
        to_e and i >= fixed for i, to_e in enumerate(own)]


def test_the_picture_of_the_readme_shows_recorded_times_and_the_model_before_and_after_training(tmp_path, monkeypatch):
    figures, shown, origin, picture = [], [], torch.zeros(1, 2), idea.picture
    monkeypatch.setattr(idea, "picture", lambda *args: figures.append(picture(*args)) or figures[0])
    monkeypatch.setattr(plots, "image", lambda axes, f, x, **_: shown.append(f(origin).item()) or 1.0)
    shutil.copy(RESULTS / "runtime-cpu.json", tmp_path)
    small = "--blocks 2 --width 8 --epochs 1 --steps 5 --batch-size 50 --test-points 200 --device cpu".split()
    idea.main(["--runs", str(tmp_path), "--results", str(tmp_path), *small])
    s, metrics = train_toy.settings.parse(train_toy.Settings, small), read_metrics(tmp_path / "toys-0" / "swirl-dsm")
    swirl, record = TOYS["swirl"](), saved(tmp_path / "idea.json")
    start = train_toy.build(s, swirl, CPU)[1].requires_grad_(False)
    points = train_toy.truth(swirl, 50, -1, CPU)  # the validation points of the run
    assert train_toy.divergences("val", start, *points)["val_kl"] == pytest.approx(metrics[0]["val_kl"])
    kl = [metrics[0]["val_kl"], metrics[-1]["before_sml_test_kl"], metrics[-1]["test_kl"]]
    assert [record[key] for key in ("start_val_kl", "before_sml_test_kl", "test_kl")] == kl
    titles = " ".join(axes.get_title() for axes in figures[0].axes[2:])
    assert re.findall(r"\d+\.\d+", titles) == [f"{value:.2f}" for value in kl] and len({f"{v:.2f}" for v in kl}) == 3
    flows = [swirl, start, train_toy.load(tmp_path / "toys-0" / "swirl-dsm")]
    assert shown == [flow.log_prob(origin).exp().item() for flow in flows] and len({*shown}) == 3
    measured, times = saved(RESULTS / "runtime-cpu.json"), figures[0].axes[1]
    for line, loss in zip(times.lines, ("ml", "dsm"), strict=True):
        rows = [row for size in measured["runs"].values() for row in size if (row["arch"], row["loss"]) == ("fc", loss)]
        assert line.get_ydata().tolist() == [row["ms"] for row in sorted(rows, key=lambda row: row["D"])]
        assert line.get_label().startswith(loss) and exponent(rows, "ms") in line.get_label()
    assert measured["machine"] in [text.get_text().replace("\n", " ") for text in times.texts]


def test_the_time_of_a_step_is_the_median_over_rounds_without_the_first(monkeypatch):
    calls, clock = [], iter([0, 90, 90, 90, 97, 97, 98, 98, 101, 101])  # a round takes 90, 7, 1, 3 seconds
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(runtime, "ROUNDS", 3)
    assert runtime.interleaved({"step": lambda: calls.append(1)}, CPU) == {"step": 3}
    assert len(calls) == 4


def test_the_spread_of_draws_is_their_median_distance_and_their_widest_direction():
    z = torch.zeros(4, 100)
    z[:, 0] = torch.tensor([3.0, -3.0, 3.0, -3.0])
    z[:, 1] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert mass.spread(z) == pytest.approx((math.sqrt(3**2 + 1) / 10, 3.0))


def test_sml_gives_two_bumps_their_masses_after_dsm_gave_them_their_shapes(tmp_path, capsys, monkeypatch):
    runs, picture = [], bumps.picture
    monkeypatch.setattr(bumps, "STEPS", {"dsm": 400, "sml": 50})
    monkeypatch.setattr(bumps, "picture", lambda found: runs.extend(found) or picture(found))
    bumps.main(["--seeds", "1", "--results", str(tmp_path)])
    (before, after), = masses = saved(tmp_path / "bumps.json")["masses"]
    assert abs(before - 0.1) > 0.5 and abs(after - 0.1) < 0.08
    assert capsys.readouterr().out.splitlines() == bumps.rows(masses)
    run, = runs
    assert len(run["mass"]) == 450 and [run["mass"][399], run["mass"][-1]] == [before, after]
    truth, x = bumps.TRUTH.log_prob(bumps.GRID).exp(), bumps.GRID[:, 0]
    for objective, mass_right in (("dsm", before), ("sml", after)):
        p = torch.tensor(run[objective])
        assert (0.01 * p.sum()).item() == pytest.approx(1, abs=1e-4)
        assert (0.01 * p[x > 0].sum()).item() == pytest.approx(mass_right, abs=1e-4)
        left = p[x < 0] / (1 - mass_right) - truth[x < 0] / 0.9  # the shape of the larger bump
        assert left.abs().max() < 0.25 * truth.max()


def test_the_pictures_of_the_tour_show_what_it_says_of_them(tmp_path, monkeypatch):
    images = load_images(explain.MNIST)[0][:2000]
    monkeypatch.setattr(explain, "load_images", lambda _: [images])
    monkeypatch.setattr(plots, "save", lambda *_: None)
    for name, value in {"STEPS": 100, "IMAGES": 20}.items():
        monkeypatch.setattr(explain, name, value)
    explain.main(["--results", str(tmp_path)])
    found = saved(tmp_path / "explain.json")
    assert found["dsm"]["trained"]["fisher"] < 0.6 * found["dsm"]["start"]["fisher"]
    # half of the mass is in each mode, and both models have its shape: KL = ½ ln(0.5 / 0.9) + ½ ln(0.5 / 0.1)
    assert found["weights"]["kl"] == pytest.approx(0.5 * math.log(0.25 / 0.09), abs=0.01)
    assert 0 < found["weights"]["fisher"] < 1e-3
    np.testing.assert_allclose(found["langevin"]["chains"], found["langevin"]["weights"], atol=0.06)
    with_map, without = found["map"].values()
    assert with_map["largest"] < 5 * with_map["smallest"] < with_map["median"] * 5 < without["smallest"]
    assert without["largest"] > 100 * without["smallest"]


def test_the_starts_have_the_nll_before_training_after_it_and_without_the_refit(tmp_path, npy, monkeypatch, capsys):
    own = ["--normalize", "center", "--diagonal", "1", "--ratio", "1"]
    monkeypatch.setattr(starts, "CELLS", {"one Gaussian": [*own, "--epochs", "1", "--lr", "1e-9"], "ours": own})
    monkeypatch.setattr(starts, "load_images", lambda path: load_images(npy))
    starts.main(["--data", str(npy), "--batch-size", "50", "--device", "cpu", "--runs", str(tmp_path), "--results",
                 str(tmp_path)])
    table = saved(tmp_path / "starts.json")["runs"]
    assert starts.rows(table) == capsys.readouterr().out.splitlines()[-2:]
    for cell, row in table.items():
        metrics = read_metrics(tmp_path / "starts" / cell.replace(" ", "-"))
        assert row["nll"] == [one["val_nll"] for one in metrics] and row["test_nll"] == metrics[-1]["test_nll"]
    gaussian, ours = table.values()
    assert gaussian["nll"] == pytest.approx(gaussian["nll"][::-1]) and len(ours["nll"]) == 9
    flow = train_mnist.load(tmp_path / "starts" / "ours").flow
    state = checkpoint(tmp_path / "starts" / "ours")["state"]
    last = [name for name in state["model"] if name.startswith("layers.6.")]  # the actnorm
    assert len(last) == 2 and len(flow.layers) == 7
    flow.load_state_dict(state["averaged"] | {name: state["model"][name] for name in last})
    torch.manual_seed(0)
    x = dequantize(load_images(npy)[2]).view(-1, *flow.shape)
    assert ours["unrefitted"] == pytest.approx(-flow.log_prob(x).mean().item(), rel=1e-5) != ours["test_nll"]
