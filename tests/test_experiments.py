"""The experiments: what they compute is right, and each runs from end to end at a small size."""

import json
import math
import shutil
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch.func import jacrev, vmap

import losses
import train_mnist
import train_toy
from data import TOYS, dequantize, load_images
from ebflow import EBFlow, fc_flow, toy_flow
from experiments import (ablation, claim, depth, determinant, energy_weight, generation, gradient_variance, imputation,
                         linear_masks, paper, race, rivals, speed, toys)
from experiments import mnist as mnist_table
from experiments.trained import load_mnist
from layers import ActNorm, FullyConnected
from losses import OBJECTIVES
from support import plots, settings
from support.run import RunError, read_metrics
from test_data import one_pixel_brighter, small_data_set

CPU = torch.device("cpu")
RESULTS = Path(__file__).parent.parent / "results"
TINY = ["--blocks", "2", "--width", "8", "--epochs", "1", "--steps", "5", "--batch-size", "50", "--test-points", "200",
        "--device", "cpu"]  # of train_toy.py


@pytest.fixture(autouse=True)
def no_pictures_of_runs(monkeypatch):
    """They take most of the time of a small training run. The tests of the training scripts look at them."""
    for name in ("curves", "mosaic", "toy"):
        monkeypatch.setattr(plots, name, lambda *_: Figure(figsize=(1, 1)))


def test_the_entropy_of_the_ten_dimensional_density_is_that_of_the_brute_force_jacobian(float64):
    """h(y) = h(n) + E log|det dy/dn|, with the Jacobian by automatic differentiation."""
    noise = torch.randn(5_000, 10).clamp(-3.3, 3.3)  # where 1 - tanh² still has digits
    J = vmap(jacrev(lambda n: linear_masks.data(n[None])[0]))(noise)
    log_det = torch.linalg.slogdet(J).logabsdet
    expected = 5 * math.log(2 * math.pi * math.e) + log_det.mean().item()
    entropy, error = linear_masks.entropy(100_000)
    assert abs(entropy - expected) < 4 * (log_det.std().item() / len(noise) ** 0.5 + error)


@pytest.mark.parametrize("name", linear_masks.LAYERS)
def test_a_masked_flow_has_the_density_of_its_brute_force_jacobian_and_a_step_leaves_the_mask(float64, name):
    flow = linear_masks.masked_flow(linear_masks.LAYERS[name], blocks=2)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x = torch.randn(3, 10)
    J = vmap(jacrev(lambda x: flow(x[None])[0]))(x)
    u = flow(x)
    torch.testing.assert_close(flow.log_prob(x), -0.5 * u.square().sum(1) - 5 * math.log(2 * math.pi)
                               + torch.linalg.slogdet(J).logabsdet)
    lower, upper = J.tril(-1).abs().max().item(), J.triu(1).abs().max().item()
    assert (lower > 0.01, upper > 0.01) == {"full": (True, True), "lower": (True, False), "upper": (False, True),
                                            "upper × lower": (True, True)}[name]


def test_linear_masks_runs_and_writes_its_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(linear_masks, "entropy", partial(linear_masks.entropy, 10_000))
    try:
        linear_masks.main(["--steps", "2", "--seeds", "1", "--batch-size", "32", "--results", str(tmp_path)])
    finally:
        torch.set_default_dtype(torch.float32)
    result = json.loads((tmp_path / "linear-masks.json").read_text())
    assert set(result["nll"]) == set(linear_masks.LAYERS) and (tmp_path / "linear-masks.png").stat().st_size > 1000
    assert all(nll > result["entropy"] for [nll] in result["nll"].values())


@pytest.mark.parametrize("arch, loss", [("fc", "ssm"), ("glow", "dsm")])
def test_imputation_and_generation_run_on_a_trained_model(tmp_path, capsys, arch, loss):
    data = tmp_path / "images.npy"  # an image is a shade with noise, and its left half is bright; for glow, in colour
    shade = torch.randint(0, 100, (350, 1, 1, 1)) + torch.randint(0, 16, (350, 4, 4, 1 if arch == "fc" else 3))
    np.save(data, (shade + torch.tensor([130, 130, 0, 0])[:, None]).to(torch.uint8).numpy())
    small = ["--width", "8", "--depth", "1"] if arch == "glow" else []
    train_mnist.main(["--data", str(data), "--out", str(tmp_path / "run"), "--arch", arch, "--loss", loss, *small,
                      "--epochs", "3", "--batch-size", "50", "--device", "cpu", "--lr", "1e-3"])
    results = tmp_path / "a" / "new folder"
    shared = ["--run", str(tmp_path / "run"), "--data", str(data), "--results", str(results)]
    imputation.main([*shared, "--digits", "40", "--draws", "4", "--steps", "50"])
    errors = json.loads((results / f"imputation-{arch}-{loss}.json").read_text())["rmse"]["random pixels"]
    # the pixels of an image share their shade: what is seen tells of what is missing
    assert errors["mean of draws"] < errors["training mean"] and errors["mean of draws"] < errors["one draw"]
    size = ["--chains", "1", "--steps", "11"] if arch == "fc" else ["--chains", "3", "--steps", "60"]
    generation.main([*shared, *size])
    assert (results / f"generation-{arch}-{loss}.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    _, pre, flow, _ = load_mnist(tmp_path / "run", load_images(data)[0])
    energy = flow.energy(pre(dequantize(load_images(data)[2]).view(-1, *flow.shape))).mean().item()
    assert "acceptance" in printed
    assert float(printed.split("test images    energy")[-1]) == pytest.approx(energy, rel=0.1)


@pytest.mark.parametrize("main", [imputation.main, generation.main])
def test_a_run_that_is_not_there_is_one_line(tmp_path, main):
    with pytest.raises(SystemExit) as exit:
        main(["--run", str(tmp_path / "nothing")])
    assert "cannot read" in exit.value.code and "checkpoint.pt" in exit.value.code and "\n" not in exit.value.code


@pytest.mark.parametrize("main, flags, message", [
    (generation.main, ["--chains", "0"], "--chains: must lie between 1 and a billion, not 0"),
    (generation.main, ["--chains=-1"], "--chains: must lie"), (generation.main, ["--steps", "1"], "--steps: must lie"),
    (imputation.main, ["--digits=-1"], "--digits: must lie"), (imputation.main, ["--draws", "0"], "--draws: must lie"),
    (imputation.main, ["--steps", "0"], "--steps: must lie"), (imputation.main, ["--seed=-1"], "--seed: must lie"),
    (imputation.main, ["--seed", str(10**20)], f"--seed: must lie between 0 and a billion, not {10**20}"),
    (imputation.main, ["--steps", "many"], "--steps: invalid int value: 'many'"),
    (linear_masks.main, ["--lr", "nan"], "--lr: must lie between 1e-09 and a billion, not nan"),
    (speed.main, ["--shape", "1", "0", "4"], "--shape: must lie between 1 and"),
    (gradient_variance.main, ["--run", "x", "--xi", "inf"], "--xi: must lie between 0.001 and a billion, not inf"),
    (generation.main, ["--results", "/dev/null/a"], "--results: [Errno 20] Not a directory: '/dev/null/a'")])
def test_what_cannot_be_drawn_or_written_is_one_line_before_the_work(capsys, main, flags, message):
    with pytest.raises(SystemExit):
        main(flags)
    assert f"error: argument {message}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("damaged", ["", "{", "{}", "[]", "null", '{"runs": null}', '{"runs": [1]}',
                                     '{"runs": {"a": 1}}'])
def test_damaged_results_are_one_line(tmp_path, damaged):
    for name in ("race-cpu", "depth", "paper", "runtime-cpu"):
        (tmp_path / f"{name}.json").write_text(damaged)
    data = ["--data", str(small_data_set(tmp_path)), "--device", "cpu"]
    for main, flags in ((race.main, data), (depth.main, ["--add", str(tmp_path)]), (paper.main, []), (claim.main, [])):
        with pytest.raises(SystemExit) as exit:
            main([*flags, "--results", str(tmp_path)])
        assert "json is damaged, or no results of this experiment: move it away" in exit.value.code


def test_the_first_picture_asks_for_three_sizes(tmp_path):
    sizes = json.loads((RESULTS / "runtime-cpu.json").read_text())
    sizes["runs"] = dict([*sizes["runs"].items()][:2])
    (tmp_path / "runtime-cpu.json").write_text(json.dumps(sizes))
    with pytest.raises(SystemExit) as exit:
        claim.main(["--results", str(tmp_path)])
    assert "has fewer than three sizes: run experiments.runtime with its defaults" in exit.value.code


@pytest.mark.parametrize("actnorm", ["none", "moments"])
def test_the_ablation_measures_what_train_mnist_does_and_goes_on_from_what_it_has(tmp_path, capsys, actnorm):
    data = small_data_set(tmp_path)
    shared = ["--data", str(data), "--device", "cpu", "--epochs", "2", "--batch-size", "50", "--actnorm", actnorm,
              "--normalize", "center"]
    ablated = [*shared, "--results", str(tmp_path), "--seeds", "1"]
    ablation.main(ablated)
    first = (tmp_path / "ablation-fc.json").read_text()
    runs = json.loads(first)["runs"]
    for name, column, flags in (("dsm with MaP, seed 0", "EMA", ["--ema", "--map"]),
                                ("dsm with MaP, seed 0", "no EMA", ["--no-ema"]),
                                ("dsm without MaP, seed 0", "no EMA", ["--no-ema", "--no-map"])):
        train_mnist.main([*shared, "--out", str(tmp_path / "run"), "--overwrite", "--loss", "dsm", *flags])
        last = read_metrics(tmp_path / "run")[-1]
        assert last["best_epoch"] == 2  # the ablation takes the last
        assert runs[name][column] == pytest.approx(last["test_nll"])
        norms = torch.tensor(runs[name]["norms"]).view(2, 5).mean(1).tolist()
        assert norms == pytest.approx([row["grad_norm"] for row in read_metrics(tmp_path / "run")[1:]])
    ablation.main(ablated)
    assert (tmp_path / "ablation-fc.json").read_text() == first and (tmp_path / "ablation-fc.png").stat().st_size > 1000
    assert ablation.rows(runs)[1] in capsys.readouterr().out
    other = tmp_path / "other"
    other.mkdir()
    for flags, message in ((["--lr", "1e-3"], "command is"), (["--data", str(one_pixel_brighter(other))], "images is"),
                           (["--seed", "5"], "--seed is set by the experiment"), (["--no-map"], "--map is set by")):
        with pytest.raises(SystemExit) as exit:
            ablation.main([*ablated, *flags])
        assert message in exit.value.code


def test_a_training_of_the_ablation_that_breaks_down_is_a_cell_of_the_table(tmp_path):
    splits, runs = load_images(small_data_set(tmp_path)), {}
    for loss in ablation.OBJECTIVES:
        for on in ("--map", "--no-map"):
            lr = "1e30" if (loss, on) == ("dsm", "--map") else "1e-4"
            s = settings.parse(settings.Mnist, ["--loss", loss, on, "--epochs", "1", "--batch-size", "50", "--lr", lr])
            runs[ablation.label(s)] = ablation.train(s, splits, CPU)
    assert runs["dsm with MaP, seed 0"] == {"EMA": None, "no EMA": None, "norms": [],
                                            "broke": "the loss or its gradient is not finite in epoch 1"}
    assert sum(run["broke"] is None for run in runs.values()) == 5
    assert ablation.rows(runs)[1].endswith("| broke down | broke down |") and ablation.picture(runs)


def test_the_interval_is_student_s():
    mean, half = toys.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert toys.interval([1.0]) == (1.0, None)


def test_the_variance_of_the_importance_weights_is_the_closed_form_s():
    """E_q[w] = 1/|det W| and E_q[w²] for w = p_u(Wx)/q(x), by many draws where the variance is small."""
    W = torch.eye(3).double() + 0.1 * torch.randn(3, 3).double()
    for fit in determinant.PROPOSALS.values():
        q = determinant.Gaussian(0.9 * fit(W))  # off its best, so that there is something to see
        x = q.sample(400_000)
        exact = torch.distributions.MultivariateNormal(torch.zeros(3).double(), precision_matrix=q.L.T @ q.L)
        torch.testing.assert_close(q.log_prob(x[:9]), exact.log_prob(x[:9]))
        torch.testing.assert_close(x.T @ x / len(x), exact.covariance_matrix, rtol=0.02, atol=0.01)
        w = (-0.5 * (x @ W.T).square().sum(1) - 1.5 * math.log(2 * math.pi) - q.log_prob(x)).exp()
        assert w.mean().item() == pytest.approx(1 / torch.linalg.det(W).abs().item(), rel=0.01)
        assert (w.var() / w.mean() ** 2).item() == pytest.approx(determinant.relative_variance(W, q.L), rel=0.05)
    assert determinant.relative_variance(W, 2 * W) == math.inf


def test_each_proposal_is_closer_than_the_one_before_and_the_fitted_one_finds_the_factor_of_w():
    W = torch.eye(8).double() + 0.3 / 8**0.5 * torch.randn(8, 8).double()
    isotropic, diagonal, fitted = (fit(W) for fit in determinant.PROPOSALS.values())
    divergence = [0.5 * torch.linalg.solve_triangular(L.T, W.T, upper=True).square().sum() + L.diagonal().log().sum()
                  for L in (isotropic, diagonal, fitted)]
    assert divergence[0] > divergence[1] > divergence[2] + 0.05
    torch.testing.assert_close(fitted.T @ fitted, W.T @ W, rtol=0, atol=0.02)


def test_the_determinant_experiment_runs_and_its_error_is_the_predicted_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(determinant.PROPOSALS, "fitted", partial(determinant.fitted, steps=100))
    determinant.main(["--dims", "2", "--dim", "4", "--samples", "200", "2000", "--c", "0.1",
                      "--results", str(tmp_path)])
    result = json.loads((tmp_path / "determinant.json").read_text())
    assert (tmp_path / "determinant.png").stat().st_size > 1000
    for row in result["by_samples"] + result["by_dimension"]:
        assert 0.6 < row["rmse"] / determinant.predicted(row) < 1.6  # of 20 repeats


def some_flow():
    flow = fc_flow(6, bend=1.0)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return flow


def test_the_relative_gradient_is_that_of_maximum_likelihood_times_w_transposed_w(float64):
    flow, x = some_flow(), torch.randn(9, 6)
    exact = torch.autograd.grad(losses.ml(flow.log_prob, x), [*flow.parameters()])
    same = rivals.Rival(flow, rivals.SharedLayer)
    torch.testing.assert_close(torch.autograd.grad(losses.ml(same.log_prob, x), [*flow.parameters()]), exact)
    rival = rivals.Rival(flow, rivals.RelativeLayer)
    relative = torch.autograd.grad(losses.ml(rival.log_prob, x), [*flow.parameters()])
    for p, e, r in zip(flow.parameters(), exact, relative):
        torch.testing.assert_close(r, e @ p.T @ p if p.dim() == 2 else e)


def test_self_normalizing_has_half_the_gradient_of_maximum_likelihood_in_w_and_the_other_half_in_its_inverse(float64):
    """Where R = W⁻¹. R gets the gradient of the likelihood as a function of R: ∂W = -W ∂R W, so -WᵀGWᵀ, G that of W."""
    flow, x = some_flow(), torch.randn(9, 6)
    rival = rivals.Rival(flow, rivals.SelfNormalizingLayer)
    for layer, ours in zip(flow.layers, rival.layers):
        if isinstance(layer, FullyConnected):
            G, = torch.autograd.grad(losses.ml(flow.log_prob, x), layer.weight)
            W, R = torch.autograd.grad(losses.ml(rival.log_prob, x), [layer.weight, ours.R])
            torch.testing.assert_close(W, 0.5 * G)
            torch.testing.assert_close(R, -0.5 * layer.weight.T @ G @ layer.weight.T)


def test_the_reconstruction_of_self_normalizing_keeps_w_and_r_inverse_to_each_other(float64):
    """Off the inverse its gradients are those of ‖RWx - x‖² with x constant. Descent on it makes R the inverse."""
    flow, x = some_flow(), torch.randn(500, 6)
    rival = rivals.Rival(flow, rivals.SelfNormalizingLayer)
    layer = rival.layers[0]
    with torch.no_grad():
        layer.R.add_(0.2 * torch.randn(6, 6))
    layer(x)
    W, R = layer.weight, layer.R
    error = x @ W.T @ R.T - x
    expected = 2 * R.T @ error.T @ x / 500, 2 * error.T @ x @ W.T / 500
    torch.testing.assert_close(torch.autograd.grad(layer.reconstruction, [W, R]), expected)
    loss = losses.ml(rival.log_prob, x)
    terms = [ours.reconstruction for ours in rival.layers if isinstance(ours, rivals.SelfNormalizingLayer)]
    determinants = losses.ml(EBFlow(rival.layers, rival.shape).log_prob, x)
    torch.testing.assert_close(loss - determinants, sum(terms))  # λ = 1
    optimizer = torch.optim.Adam([R], lr=0.01)
    for _ in range(500):
        optimizer.zero_grad()
        layer(x)
        layer.reconstruction.backward(inputs=[R])
        optimizer.step()
    torch.testing.assert_close(R @ W, torch.eye(6), atol=1e-3, rtol=0)


def test_the_rivals_run_and_go_on_from_what_they_have(tmp_path, capsys):
    data = small_data_set(tmp_path)
    shared = ["--data", str(data), "--results", str(tmp_path), "--every", "4", "--steps", "10", "--batch-size", "50",
              "--device", "cpu"]
    rivals.main(shared)
    path = tmp_path / "rivals.json"
    first = path.read_text()
    runs = json.loads(first)["runs"]
    assert set(runs) == {f"{name}, {start}" for name in rivals.METHODS for start in ("center", "whiten")}
    for name, run in runs.items():
        assert [step for step, _, _ in run["curve"]] == [0, 4, 8, 12] and run["broke"] is None
        assert run["curve"][-1][2] < run["curve"][0][2] or "whiten" in name  # the NLL
        assert (run["curve"][0][1] > 0) == ("whiten" in name)  # seconds
    rivals.main(shared)
    assert path.read_text() == first and rivals.rows(runs)[2] in capsys.readouterr().out
    assert (tmp_path / "rivals.png").stat().st_size > 1000
    # The first stretch was slow, and another one.
    curve = [(0, 0.5, 9.0), (10, 52.5, 4.0), (20, 54.5, 3.0), (30, 90.5, 3.5), (40, 92.5, 3.5)]
    assert rivals.step_time(curve) == 0.2 and rivals.step_time(curve[:2]) == 5.2 and rivals.reached(curve, 5) == 8
    assert rivals.reached(curve, 10) == 0 and rivals.reached(curve, 2) is None
    assert rivals.rows({"a": {"curve": [(s, t, 1100 * x / 9) for s, t, x in curve], "broke": None}}) == [
        "| a | 1100.0 | 366.7 | 427.8 | 5.0 | 0: 0.5 | 0: 0.6 | 1: 0.6 |"]
    other = tmp_path / "other"
    other.mkdir()
    for flags, message in ((["--seed", "1"], "seed is 0 there and 1 here; move it away"),
                           (["--data", str(one_pixel_brighter(other))], "images is")):
        with pytest.raises(SystemExit) as exit:
            rivals.main([*shared, *flags])
        assert message in exit.value.code


@pytest.mark.parametrize("loss, flags", [("ml", []), ("ssm", ["--sigma", "0.4"]), ("dsm", [])])
def test_the_loop_of_the_rivals_trains_as_train_mnist_does(tmp_path, loss, flags):
    data = small_data_set(tmp_path)  # five batches
    flags = ["--batch-size", "50", "--lr", "1e-3", "--seed", "3", *flags]
    own = rivals.PLAIN[loss]
    train_mnist.main(["--loss", loss, "--normalize", "center", "--epochs", "2", *own, *flags, "--data", str(data),
                      "--device", "cpu", "--out", str(tmp_path / "run")])
    curve = rivals.train(loss, "center", flags, 10, 5, load_images(data), CPU)["curve"]
    assert [step for step, _, _ in curve] == [0, 5, 10]
    expected = [row["val_nll"] for row in read_metrics(tmp_path / "run")]
    assert [nll for _, _, nll in curve] == pytest.approx(expected, rel=1e-6)
    assert curve[2][2] != pytest.approx(curve[0][2], rel=1e-4)


def test_a_rival_that_breaks_down_is_a_row(tmp_path):
    splits = load_images(small_data_set(tmp_path))
    run = rivals.train("ml", "center", ["--batch-size", "50", "--lr", "1e30"], 10, 5, splits, CPU)
    assert run["broke"] == "not finite at step 3" and len(run["curve"]) == 1  # the learning rate of the first is 0
    finished = {"curve": [(0, 0.0, 9.0), (5, 1.0, 8.0)], "broke": None}
    runs = {f"{name}, {start}": finished for name in rivals.METHODS for start in rivals.STARTS}
    assert sum(len(axes.lines) for axes in rivals.picture(runs).axes) == 20
    runs |= {"ml, center": run, "ml, whiten": {"curve": [], "broke": "a weight"}}
    assert sum(len(axes.lines) for axes in rivals.picture(runs).axes) == 16
    assert "at step 3" in rivals.rows({"ml": run})[0]
    assert "weight" in rivals.rows({"ml": {"curve": [], "broke": "a weight"}})[0]


def test_digits_beside_each_other_are_as_likely_each_as_alone(tmp_path):
    splits = load_images(small_data_set(tmp_path))
    flags = ["--batch-size", "50", "--lr", "1e-12"]  # the start, where the weights are I
    one, two = (rivals.train("ml", "center", flags, 2, 2, splits, CPU, digits=n)["curve"] for n in (1, 2))
    assert one[0][2] == pytest.approx(two[0][2], rel=5e-3)
    with pytest.raises(RunError, match="lower --digits"):
        rivals.train("ml", "center", flags, 2, 2, splits, CPU, digits=1000)


@pytest.mark.parametrize("n", [1, 3])
def test_an_epoch_of_the_race_has_every_image_once(n):
    images = torch.arange(10 * 4 * n).to(torch.uint8).view(-1, 1, 2, 2)
    for epoch in range(2):
        seen = torch.cat(list(islice(rivals.batches(images, n, 5), 2)))
        assert seen.shape == (10, 4 * n) and seen.flatten().sort().values.equal(images.flatten())
    assert not torch.equal(seen, rivals.beside(images, n))


def test_the_race_stops_at_the_level(tmp_path, capsys, monkeypatch):
    data = small_data_set(tmp_path)
    monkeypatch.setattr(race, "METHODS", {name: (1e-2, 40, ["--batch-size", "50"]) for name in race.METHODS})
    flags = ["--batch-size", "50", "--actnorm", "moments"]
    start = rivals.train("ml", "center", flags, 1, 1, load_images(data), CPU)["curve"][0][2]
    monkeypatch.setattr(race, "LEVEL", start - 1)
    shared = ["--data", str(data), "--results", str(tmp_path), "--every", "4", "--digits", "1", "2", "--device", "cpu"]
    race.main(shared)
    path = tmp_path / "race-cpu.json"
    first = path.read_text()
    runs = json.loads(first)["runs"]
    assert len(runs) == 8 and race.sizes(runs) == [1, 2]
    for n in (1, 2):
        steps, seconds = race.arrivals(runs, n)["ml"]
        curve = runs[f"ml, {n} digits"]["curve"]
        assert 0 < steps <= curve[-1][0] and curve[-1][2] <= start - 1 < curve[-2][2]
        assert seconds == steps * rivals.step_time(curve)
    race.main(shared)
    assert path.read_text() == first and race.rows(runs)[1] in capsys.readouterr().out
    assert (tmp_path / "race-cpu.png").stat().st_size > 1000
    nowhere = {name: run | {"curve": run["curve"][:1]} for name, run in runs.items()}
    assert race.rows(nowhere)[0] == "| 784 | – | – | – | – | – |" and race.picture(nowhere)
    at_once = {name: run | {"curve": [[0, 0.0, 0.0], [4, 1.0, 0.0]]} for name, run in runs.items()}
    assert race.rows(at_once)[0] == "| 784 | – | – | – | – | – |" and race.picture(at_once)
    with pytest.raises(SystemExit) as exit:
        race.main([*shared, "--data", str(one_pixel_brighter(tmp_path))])
    assert "images is" in exit.value.code
    monkeypatch.setattr(race, "LEVEL", start)
    with pytest.raises(SystemExit) as exit:
        race.main(shared)
    assert "level is" in exit.value.code


def test_the_race_has_the_settings_of_its_table_for_each_number_of_digits(tmp_path, monkeypatch):
    calls = {}

    def train(method, normalize, flags, steps, every, splits, device, digits, until):
        s = settings.parse(settings.Mnist, ["--loss", rivals.METHODS[method][0], *flags])
        sigma = s.config().get("sigma")
        calls[method, digits] = normalize, steps, every, until, s.lr, s.actnorm, s.seed, s.batch_size, sigma
        return {"curve": [(0, 0.0, 2000.0), (20, 1.0, 1000.0)], "broke": None}

    monkeypatch.setattr(race, "train", train)
    race.main(["--data", str(small_data_set(tmp_path)), "--results", str(tmp_path), "--digits", "1", "4", "--seed", "5",
               "--device", "cpu"])
    for n in (1, 4):
        for method, lr, steps, batch_size, sigma in (("ml", 4e-3, 120, 500, None), ("relative", 4e-3, 120, 500, None),
                                                     ("ssm", 1e-3, 200, 100, 0.4), ("dsm", 1.5e-3, 160, 100, 1.0)):
            expected = "center", steps * n, 20, race.LEVEL, lr / n**0.5, "moments", 5, batch_size, sigma
            assert calls[method, n] == expected


def test_a_rival_has_the_loss_of_maximum_likelihood_with_an_actnorm_at_its_moments(tmp_path):
    images = load_images(small_data_set(tmp_path))[0]
    pre, flow = train_mnist.build(settings.parse(settings.Mnist, ["--loss", "ml", "--actnorm", "moments"]), images)
    x = pre(dequantize(images[:20].flatten(1)))
    rival = rivals.Rival(flow, rivals.SharedLayer)
    torch.testing.assert_close(losses.ml(rival.log_prob, x), losses.ml(flow.log_prob, x), check_dtype=False)


def test_the_moments_of_a_gradient_are_those_of_known_noise():
    w = torch.zeros(3, requires_grad=True)
    loss = lambda: (w * (torch.tensor([3.0, 4.0, 0.0]) + 2 * torch.randn(3))).sum()
    means, variances = zip(*(gradient_variance.moments(loss, [w], 4) for _ in range(1000)))
    assert sum(means) / 1000 == pytest.approx(25, rel=0.05)  # with the bias of four draws it would be 28
    assert sum(variances) / 1000 == pytest.approx(12, rel=0.05)


def test_all_four_score_matching_objectives_have_one_mean_gradient():
    flow, toy = toy_flow(blocks=2, width=8), TOYS["sine"]()
    means, errors = {}, {}
    for name, loss in gradient_variance.OBJECTIVES.items():
        gradients = []
        for _ in range(100):
            value = loss(flow.energy, toy.points(500, "cpu"), 2.0, 0.05)
            gradient = torch.autograd.grad(value, [*flow.parameters()], materialize_grads=True)
            gradients.append(torch.cat([g.flatten() for g in gradient]))
        gradients = torch.stack(gradients)
        means[name], errors[name] = gradients.mean(0), gradients.std(0) / 10
    for name in means:  # in every element
        assert ((means[name] - means["sm"]).abs() < 5 * (errors[name] + errors["sm"]) + 1e-3).all()
    assert means["sm"].abs().max() > 20 * errors["sm"].max()  # there is something to see


def test_the_variances_of_the_gradients_are_measured_on_runs_of_both_scripts(tmp_path, capsys):
    train_toy.main(["--data", "sine", "--loss", "dsm", *TINY, "--steps", "20", "--out", str(tmp_path / "run")])
    shared = ["--run", str(tmp_path / "run"), "--results", str(tmp_path)]
    gradient_variance.main([*shared, "--batches", "30", "--batch-size", "64", "--xi", "0.05"])
    rows = json.loads((tmp_path / "gradient-variance.json").read_text())["rows"]
    assert rows["ssm"]["variance"] > rows["sm"]["variance"]
    assert rows["dsm, pooled"]["variance"] < 0.5 * rows["dsm"]["variance"]
    data = small_data_set(tmp_path)
    for loss in ("ssm", "ml"):
        train_mnist.main(["--arch", "cnn", "--loss", loss, "--epochs", "1", "--batch-size", "100", "--data", str(data),
                          "--device", "cpu", "--out", str(tmp_path / loss)])
    images = ["--run", str(tmp_path / "ssm"), "--data", str(data)]
    gradient_variance.main([*shared, *images, "--batches", "10", "--batch-size", "50"])
    rows = json.loads((tmp_path / "gradient-variance-cnn.json").read_text())["rows"]
    assert list(rows) == ["dsm", "ssm", "fdssm"]
    assert rows["fdssm"]["variance"] > rows["ssm"]["variance"]  # ssm has ½‖∇E‖² exactly
    for flags, message in ((["--xi", "0"], "--xi: must lie"), (["--run", str(tmp_path)], "cannot read"),
                           (["--run", str(tmp_path / "ml")], "nor one of train_mnist.py by score matching with noise")):
        with pytest.raises(SystemExit) as exit:
            gradient_variance.main([*shared, *flags])
        assert message in str(exit.value.code) + capsys.readouterr().err


def test_the_actnorm_of_the_race_goes_all_the_way_to_the_moments(tmp_path, monkeypatch):
    fractions, spreads, initialize = [], [], ActNorm.initialize
    monkeypatch.setattr(ActNorm, "initialize", lambda layer, x, fraction=1.0: (
        fractions.append(fraction), spreads.append(x.std().item()), initialize(layer, x, fraction)))
    flags = ["--batch-size", "50", "--actnorm", "moments", "--sigma", "100"]
    rivals.train("dsm", "center", flags, 20, 20, load_images(small_data_set(tmp_path)), CPU)
    assert fractions == [1.0] * 5  # at the start, at an evaluation, twice in 20 steps, at an evaluation
    assert min(spreads[2:4]) > 10 * max(*spreads[:2], spreads[4])  # the steps see the noise of dsm


def test_runs_of_several_settings_stand_side_by_side(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(depth, "kl_of_shares", partial(depth.kl_of_shares, n=5_000))
    for name, flags in (("a", ["--seed", "0"]), ("b", ["--seed", "1"]), ("c", ["--lr", "0.01", "--plateau", "0.5"])):
        train_toy.main(["--data", "sine", "--loss", "fdssm", *TINY, *flags, "--out", str(tmp_path / name)])
    (tmp_path / "a" / "checkpoint.pt").unlink()  # its figures count, the picture is another's
    train_toy.main(["--data", "swirl", "--loss", "ml", *TINY, "--out", str(tmp_path / "d")])
    directories = [str(tmp_path / name) for name in "abcd"]
    capsys.readouterr()
    depth.main([*directories, "--results", str(tmp_path)])
    kl = [read_metrics(tmp_path / name)[-1]["test_kl"] for name in "abcd"]
    options = "--epochs 1 --steps 5 --batch-size 50 --blocks 2 --width 8 --test-points 200"
    first, second, third = capsys.readouterr().out.splitlines()
    runs = json.loads((tmp_path / "depth.json").read_text())["runs"]
    shares = [f"{run['kl_of_shares']:.4f}" for run in runs[1:]]
    assert set(first.split("`")[1].split()) == set(options.split())
    assert f"| {kl[0]:.4f}, {kl[1]:.4f} | –, {shares[0]} |" in first and "kl_of_shares" not in runs[0]
    assert set(second.split("`")[1].split()) == set(f"{options} --lr 0.01 --plateau 0.5".split())
    assert f"| {kl[2]:.4f} |" in second and f"| {shares[1]} |" in second and f"| {shares[2]} |" in third
    assert third.startswith("| swirl | ml | ")  # and the picture has no sine by ml, and no swirl by fdssm
    assert [run["kl"] for run in runs] == kl
    assert (tmp_path / "depth.png").stat().st_size > 1000

    config = json.loads((tmp_path / "c" / "config.json").read_text())
    parsed = settings.parse(settings.Toy, ["--data", "sine", "--loss", "fdssm", *second.split("`")[1].split()])
    assert parsed.config() == config

    # --add keeps the other runs, and replaces one with the same settings, whatever the order of its flags.
    picture = (tmp_path / "depth.png").read_bytes()
    record = json.loads((tmp_path / "depth.json").read_text())
    record["runs"][2] |= {"flags": f"--plateau 0.5 --lr 0.01 {options}", "kl": 9.0}
    (tmp_path / "depth.json").write_text(json.dumps(record))
    depth.main(["--add", *directories[1:3], "--results", str(tmp_path)])
    assert [run["kl"] for run in json.loads((tmp_path / "depth.json").read_text())["runs"]] == kl
    assert (tmp_path / "depth.png").read_bytes() == picture

    with pytest.raises(SystemExit) as exit:
        depth.main([str(tmp_path), "--results", str(tmp_path)])
    assert "is no finished run of train_toy.py" in exit.value.code
    checkpoint = torch.load(tmp_path / "c" / "checkpoint.pt", weights_only=True)
    checkpoint["config"]["blocks"] = 3
    torch.save(checkpoint, tmp_path / "c" / "checkpoint.pt")
    with pytest.raises(SystemExit) as exit:
        depth.main([*directories, "--results", str(tmp_path)])
    assert "another version of this code" in exit.value.code


def test_the_table_of_the_toys_is_the_mean_over_seeds_and_trains_nothing_twice(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(toys, "TOYS", {"sine": TOYS["sine"]})
    monkeypatch.setattr(toys, "OBJECTIVES", {loss: OBJECTIVES[loss] for loss in ("ml", "dsm")})
    main = train_toy.main
    monkeypatch.setattr(train_toy, "main", lambda argv: main([*argv, *TINY]))
    flags = ["--seeds", "2", "--runs", str(tmp_path), "--results", str(tmp_path / "results")]
    toys.main(flags)
    rows = json.loads((tmp_path / "results" / "toys.json").read_text())["rows"]
    assert [(row["data"], row["loss"], row["steps"], row["seeds"]) for row in rows] == [
        ("sine", "ml", 5, 2), ("sine", "dsm", 5, 2)]
    kl = [read_metrics(tmp_path / f"toys-{seed}" / "sine-dsm")[-1]["test_kl"] for seed in (0, 1)]
    assert kl[0] != kl[1] and (rows[1]["kl"], rows[1]["kl_95"]) == toys.interval(kl)
    assert toys.rows(rows)[1] in capsys.readouterr().out
    assert (tmp_path / "results" / "toys.png").read_bytes().startswith(b"\x89PNG")
    toys.main(flags)
    assert json.loads((tmp_path / "results" / "toys.json").read_text())["rows"] == rows  # the minutes, too


def test_the_table_of_mnist_has_what_the_runs_measured(tmp_path, capsys, monkeypatch):
    data, main = small_data_set(tmp_path), train_mnist.main
    monkeypatch.setattr(mnist_table, "OBJECTIVES", {loss: OBJECTIVES[loss] for loss in ("ml", "dsm")})
    monkeypatch.setattr(train_mnist, "main", lambda argv: main([
        *argv, "--data", str(data), "--epochs", "2", "--batch-size", "50", "--device", "cpu"]))
    flags = ["--runs", str(tmp_path), "--results", str(tmp_path / "results")]
    mnist_table.main(flags)
    table = json.loads((tmp_path / "results" / "mnist-fc.json").read_text())
    assert list(table) == ["ml", "dsm"] and (tmp_path / "results" / "mnist-fc.png").stat().st_size > 1000
    for loss, row in table.items():
        metrics = read_metrics(tmp_path / f"mnist-fc-{loss}")
        assert (row["start_val_nll"], row["test_nll"]) == (metrics[0]["val_nll"], metrics[-1]["test_nll"])
        assert row["val_nll"] == min(m["val_nll"] for m in metrics[1:]) and row["epochs"] == 2


def test_the_kl_of_shares_is_that_of_the_masses_of_the_parts(monkeypatch):
    """Squares of 1/8 each against 1/6 in the left half and 1/12 in the right: ½ log 9/8.

    The swirl against one that is uniform in t: ∫₀¹ 2s log 2s ds.
    """
    board, swirl = TOYS["checkerboard"](), TOYS["swirl"]()
    monkeypatch.setattr(board, "sample", lambda n: board.points(n, "cpu"))

    def lighter_on_the_right(n):
        x = board.points(4 * n, "cpu")
        return x[(x[:, 0] < 0) | (torch.rand(len(x)) < 0.5)][:n]

    def uniform(n):
        t = 3 * math.pi * torch.rand(n)
        return 5 / 6 * (torch.stack([t * t.cos() + 1, -t * t.sin() + 2], 1) - 0.25) + 0.3 * torch.randn(n, 2)

    shares = lambda toy, sample: depth.kl_of_shares(toy, SimpleNamespace(sample=sample))
    assert shares(board, lighter_on_the_right) == pytest.approx(math.log(9 / 8) / 2, abs=2e-3)
    assert shares(swirl, uniform) == pytest.approx(math.log(2) - 0.5, abs=0.01)
    assert abs(shares(swirl, swirl.sample)) < 5e-4
    assert shares(board, lambda n: 0.1 * torch.randn(n, 2)) == math.inf  # six squares without a draw


def test_the_recorded_flags_are_flags_of_today():
    runs = json.loads((RESULTS / "depth.json").read_text())["runs"]
    assert len(runs) == 49
    for run in runs:
        s = settings.parse(settings.Toy, ["--data", run["data"], "--loss", run["loss"], *run["flags"].split()])
        assert depth.same_settings(run | {"flags": depth.flags(s.config())}) == depth.same_settings(run)
    for file, methods in (("rivals", rivals.METHODS), ("race-cpu", race.METHODS), ("race-cuda", race.METHODS)):
        assert json.loads((RESULTS / f"{file}.json").read_text())["methods"] == json.loads(json.dumps(methods))


def test_the_table_of_the_published_settings_has_what_the_runs_measured(tmp_path, capsys):
    data = small_data_set(tmp_path)
    flags = ["--data", str(data), "--batch-size", "50", "--device", "cpu"]
    train_mnist.main(["--paper", "--loss", "dsm", "--epochs", "2", "--out", str(tmp_path / "run"), *flags])
    for arch in ("fc", "cnn"):
        shutil.copy(RESULTS / f"mnist-{arch}.json", tmp_path)
    shutil.copy(RESULTS / "paper.json", tmp_path)
    capsys.readouterr()
    paper.main([str(tmp_path / "run"), "--results", str(tmp_path), "--machine", "a test"])
    runs, last = json.loads((tmp_path / "paper.json").read_text())["runs"], read_metrics(tmp_path / "run")[-1]
    assert runs["fc dsm"]["test_nll"] == last["test_nll"] and runs["fc dsm"]["machine"] == "a test"
    assert runs["cnn ssm"] == json.loads((RESULTS / "paper.json").read_text())["runs"]["cnn ssm"]
    assert f"| fc | dsm | 1099.2 | 10,000 | {last['test_nll']:.1f} | 2 |" in capsys.readouterr().out
    train_mnist.main(["--loss", "dsm", "--epochs", "1", "--out", str(tmp_path / "ours"), *flags])
    with pytest.raises(SystemExit) as exit:
        paper.main([str(tmp_path / "ours"), "--results", str(tmp_path)])
    assert "is no finished run of train_mnist.py --paper" in exit.value.code


def test_the_energy_alone_is_an_objective_for_the_table_of_the_energy_weight(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(energy_weight, "FLAGS", [*energy_weight.FLAGS[:3], "--width", "2", "--depth", "1"])
    monkeypatch.setitem(OBJECTIVES, "energy", None)  # what the experiment adds is taken away again
    monkeypatch.setitem(settings.PAPER, "glow energy", None)
    data = small_data_set(tmp_path)
    energy_weight.main(["--epochs", "2", "--runs", str(tmp_path), "--results", str(tmp_path), "--data", str(data),
                        "--batch-size", "50", "--device", "cpu"])
    runs = json.loads((tmp_path / "energy-weight.json").read_text())["runs"]
    assert [*runs] == ["ml", "dsm", "dsm + λE", "λE"] and all(len(run["val_nll"]) == 3 for run in runs.values())
    configs = [json.loads((tmp_path / f"energy-weight-{i}" / "config.json").read_text()) for i in range(4)]
    assert [c.get("energy_weight") for c in configs] == [None, 0.0, 78.4, None] and configs[3]["loss"] == "energy"
    assert all(row in capsys.readouterr().out for row in energy_weight.rows(runs)[:1])
