"""What one does with a trained flow: outliers, points of one's own, and the weights that are shipped."""

import contextlib
import io
import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import train_mnist
import train_toy
from conftest import checkpoint, rows
from data import MNIST, Points, dequantize, load_images
from densities import TOYS
from experiments import colour, epochs, outliers, points, weights
from support import settings

RESULTS = Path(__file__).parent.parent / "results"


@pytest.fixture(autouse=True)
def quiet(no_pictures):
    """Drawing takes longer than these small runs."""


# ---- Colour ----------------------------------------------------------------------------------------------------------

def test_each_cell_of_the_race_has_three_tries_and_the_best_rate_and_the_gaussian_is_that_of_the_logits(tmp_path, npy,
                                                                                                        capsys):
    cells = ["cnn dsm", "fc ml"]
    colour.main(["--data", str(npy), "--results", str(tmp_path), "--minutes", "0.02", "--seeds", "2",
                 "--cells", *cells])
    runs = json.loads((tmp_path / "colour.json").read_text())["runs"]
    assert [*runs] == ["one Gaussian", *cells]
    assert [*colour.rows(runs)] == capsys.readouterr().out.splitlines()[-5:]
    for cell, middle in zip(cells, (5e-4, 1e-4)):
        run = runs[cell]
        assert [float(lr) for lr in run["tries"]] == pytest.approx([middle / 3, middle, 3 * middle], rel=1e-4)
        assert run["lr"] == pytest.approx(float(min(run["tries"], key=run["tries"].get)), rel=1e-4)
        minutes, nll = zip(*run["curve"])
        assert len(nll) == colour.LOOKS + 1 and minutes[0] == 0 and minutes[-1] >= 0.02 and run["steps"] > 15
        assert math.isfinite(run["test_nll"]) and len({*nll}) > 10
        other, = run["others"]
        assert (other["seed"], other["lr"]) == (1, run["lr"]) and other["curve"][-1][1] != nll[-1]
    torch.manual_seed(0)
    splits = load_images(npy)
    z = torch.logit((dequantize(splits[0]).flatten(1) / 256).clamp(1e-6, 1 - 1e-6)).double()
    C = train_mnist.shrunk_covariance(z - z.mean(0))
    x = dequantize(splits[2]).flatten(1)
    y = (x / 256).clamp(1e-6, 1 - 1e-6)
    slopes = -torch.log(y) - torch.log1p(-y) - math.log(256)
    normal = torch.distributions.MultivariateNormal(z.mean(0), C)
    nll = -(normal.log_prob(torch.logit(y).double()) + slopes.sum(1)).mean().item()
    assert runs["one Gaussian"]["test_nll"] == pytest.approx(nll, rel=0.01)


def test_the_race_keeps_the_flow_of_the_lowest_look(monkeypatch, npy):
    seen, nlls = [], iter([3.0, 1.0, 2.0, math.nan])

    def evaluate(split, flow, images):
        seen.append(flow.layers[-1].bias.clone())
        return {"val_nll": next(nlls)}

    monkeypatch.setattr(colour.train_mnist, "evaluate", evaluate)
    splits = load_images(npy)
    s = settings.parse(train_mnist.Settings, [*colour.OWN["fc dsm"].split(), "--data", str(npy)])
    pre, _ = train_mnist.build(s, splits[0])
    run, best = colour.race(s, pre, splits, minutes=0.002)
    assert [nll for _, nll in run["curve"]][:3] == [3.0, 1.0, 2.0] and len(seen) == 4  # nan ends it
    assert torch.equal(best.layers[-1].bias, seen[1]) and not torch.equal(seen[0], seen[1])


def test_an_epoch_is_so_many_steps_of_the_recipe_and_every_cell_is_in_the_table(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(epochs, "SHAPES", {"MNIST": (5000, (1, 8, 8))})
    clock, kept = iter([10.0, 16.0]), torch.get_num_threads()
    monkeypatch.setattr(epochs.time, "process_time", lambda: next(clock))
    monkeypatch.setattr(epochs.torch, "set_num_threads", lambda n: None)
    found = epochs.measured("MNIST", "fc", "dsm")
    assert found["minutes"] == pytest.approx(2.0 * 50 / 60) and 0.1 < found["GB"] < 50  # 3 steps in 6 s, 50 an epoch
    assert found["batch_size"] == 100 and torch.get_num_threads() == kept
    monkeypatch.setattr(epochs, "cell", lambda *name: {"minutes": len(name[2]), "GB": 0.25})
    epochs.main(["--results", str(tmp_path)])
    line = "| MNIST | glow | 2.0, 0.2 | 3.0, 0.2 | 3.0, 0.2 | 3.0, 0.2 | 5.0, 0.2 |"
    assert capsys.readouterr().out.splitlines()[-1] == line


# ---- Outliers --------------------------------------------------------------------------------------------------------

def test_the_area_under_the_roc_curve_is_the_share_of_pairs_in_order_with_ties_by_half():
    a, b = torch.randint(5, (40,)).double(), torch.randint(3, 8, (30,)).double()
    pairs = [1.0 if y > x else 0.5 if x == y else 0.0 for x in a.tolist() for y in b.tolist()]
    assert outliers.area(a, b) == pytest.approx(np.mean(pairs))
    assert outliers.area(a, a + 9) == 1 and outliers.area(a + 9, a) == 0


def test_the_distortions_do_what_their_names_say():
    x = torch.randint(256, (50, 1, 6, 6), dtype=torch.uint8)
    made = {name: f(x) for name, f in outliers.DISTORTIONS.items()}
    assert all(y.shape == x.shape and y.dtype == torch.uint8 for y in made.values())
    assert (made["inverted"].int() + x == 255).all() and (made["all black"] == 0).all()
    assert torch.equal(made["rotated by 90°"].rot90(1, (2, 3)), made["rotated by 180°"])
    assert torch.equal(made["mirrored"].flip(3), x) and torch.equal(made["shifted by 4 pixels"][..., 4:], x[..., :2])
    assert torch.equal(made["pixels shuffled"].flatten(1).sort(1).values, x.flatten(1).sort(1).values)
    assert not torch.equal(made["pixels shuffled"], x) and 100 < made["uniform noise"].float().mean() < 155


def test_the_table_of_outliers_has_the_areas_of_both_flows(tmp_path, npy, monkeypatch, capsys):
    monkeypatch.setattr(outliers, "load_images", lambda path: load_images(npy))
    small = f"--data {npy} --epochs 2 --batch-size 50 --normalize center --device cpu".split()
    outliers.main(["--runs", str(tmp_path), "--results", str(tmp_path), *small])
    table = json.loads((tmp_path / "outliers.json").read_text())["runs"]
    assert [*table] == [*outliers.DISTORTIONS] and [*outliers.rows(table)] == capsys.readouterr().out.splitlines()[-8:]
    images = load_images(npy)[2]
    for loss in ("dsm", "ml"):
        model = train_mnist.load(tmp_path / f"mnist-fc-{loss}")
        torch.manual_seed(0)
        a = model.energy(images[:25])
        b = model.energy(255 - images[25:])
        assert table["inverted"][loss]["E(x)"] == pytest.approx((b[:, None] > a).double().mean().item())
        row = table["mirrored"][loss]
        assert [*row] == [*outliers.NUMBERS] and all(0 <= value <= 1 for value in row.values())


def test_the_four_numbers_are_those_of_the_flow_in_pixels_and_after_its_pre_processing(npy, tmp_path, monkeypatch):
    splits = load_images(npy)
    monkeypatch.setattr(outliers, "load_images", lambda path: splits)
    flags = f"--data {npy} --epochs 1 --batch-size 50 --sml-steps 0 --device cpu --out {tmp_path}"
    train_mnist.main(flags.split())
    model = train_mnist.load(tmp_path)
    torch.manual_seed(1)
    four = outliers.numbers(model, whitened=True)
    torch.manual_seed(1)
    mean = model.energy(splits[0][:5000]).mean()
    torch.manual_seed(2)
    E_x, E_z, off, norm = four(splits[2])
    torch.manual_seed(2)
    x = model.x(splits[2])
    torch.testing.assert_close(E_x, model.flow.energy(x))
    torch.testing.assert_close(off, (E_x - mean).abs())
    y, log_det = model.flow.layers[1](model.flow.layers[0](x))
    torch.testing.assert_close(E_z, E_x + log_det, rtol=1e-4, atol=1e-2)  # E(x) = E(z) - log|det| of the logit
    z = model.flow.layers[3](model.flow.layers[2](y)).requires_grad_()
    u, log_det = model.flow.layers[5](model.flow.layers[4](z))
    u = model.flow.layers[7](model.flow.layers[6](u))
    grad, = torch.autograd.grad((0.5 * u.square().sum(1) - log_det).sum(), z)
    torch.testing.assert_close(norm, grad.norm(dim=1), rtol=1e-3, atol=1e-3)


# ---- Points ----------------------------------------------------------------------------------------------------------

def test_the_files_are_as_long_and_as_wide_as_is_said():
    assert {name: tuple(make().shape) for name, make in points.FILES.items()} == {
        "moons": (4000, 2), "mixture": (4000, 8), "digits": (10_000, 8)}
    z = points.digits()
    covariance = z.T.cov()
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3 * covariance.max()  # principal components
    assert torch.equal(covariance.diag().sort(descending=True).indices, torch.arange(8))


def test_every_way_is_measured_on_the_same_rows_and_splines_in_raw_units(tmp_path, monkeypatch, capsys):
    pytest.importorskip("zuko")
    x = torch.randn(400, 2)
    x[:, 1] += x[:, 0] ** 2
    monkeypatch.setattr(points, "FILES", {"bent": lambda: x})
    splines = points.splines
    monkeypatch.setattr(points, "splines", lambda path, seed: splines(path, seed, epochs=2, steps=30))
    small = "--epochs 1 --steps 5 --batch-size 32 --blocks 1 --width 8 --device cpu".split()
    points.main(["--runs", str(tmp_path), "--results", str(tmp_path), "--seeds", "1", *small])
    found = json.loads((tmp_path / "points.json").read_text())["runs"]["bent, seed 0"]
    assert {*found} == {*points.WAYS}
    assert found["one Gaussian"][0] == pytest.approx(Points(tmp_path / "points" / "bent.npy", 0).gaussian_nll)
    assert found["zuko's NSF by ml"][0] < found["one Gaussian"][0] < found["this flow before training"][0]
    for loss, way in (("ml", "by ml"), ("dsm", "by dsm, then sml")):
        flow = train_toy.load(tmp_path / "points" / f"bent-{loss}-0")
        held = Points(tmp_path / "points" / "bent.npy", 0)
        assert found[way][0] == pytest.approx(-flow.log_prob(held.test).mean().item(), abs=1e-5)
    assert found["by dsm"][1] < found["by dsm, then sml"][1]
    np.save(tmp_path / "scaled.npy", (x * 10).numpy())
    scaled = splines(tmp_path / "scaled.npy", 0, epochs=2, steps=30)
    assert scaled == pytest.approx(found["zuko's NSF by ml"][0] + 2 * math.log(10), abs=0.01)
    lines = capsys.readouterr().out.splitlines()[-len(points.WAYS):]
    assert lines == [*points.rows({"bent, seed 0": found})] and lines[0].startswith("| one Gaussian | ")


# ---- The weights in results/weights ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", weights.RUNS)
def test_the_weights_that_are_shipped_are_small_and_worth_what_is_recorded(name):
    script, directory = weights.RUNS[name][0], RESULTS / "weights" / name
    recorded = json.loads((RESULTS / "weights.json").read_text())["runs"][name]
    assert (directory / "checkpoint.pt").stat().st_size <= 1.5e6
    if script is train_mnist:
        flow, images = train_mnist.load(directory).flow, load_images(MNIST)[2][:1000]
        found = train_mnist.evaluate("first_1000", flow, images)
        assert found["first_1000_nll"] == pytest.approx(recorded["first_1000_nll"], abs=0.05)
    else:
        fresh = train_toy.truth(TOYS["swirl"](), 4000, -3, "cpu")
        found = train_toy.divergences("test", train_toy.load(directory), *fresh)
        assert found["test_kl"] == pytest.approx(recorded["test_kl"], abs=4 * found["test_kl_se"])


def test_a_shipped_checkpoint_has_the_best_weights_and_nothing_that_only_training_needs(npy, tmp_path, monkeypatch):
    small = f"--data {npy} --arch fc --loss dsm --epochs 1 --batch-size 50 --sml-steps 0 --device cpu"
    monkeypatch.setattr(weights, "RUNS", {"tiny": (train_mnist, small)})
    monkeypatch.setattr(weights, "load_images", lambda path: load_images(npy))
    weights.main(["--runs", str(tmp_path), "--results", str(tmp_path / "results")])
    saved, shipped = checkpoint(tmp_path / "tiny"), checkpoint(tmp_path / "results" / "weights" / "tiny")
    assert shipped["state"]["best"]["model"].keys() == saved["state"]["best"]["model"].keys()
    assert {*shipped["state"]} == {"best"} and len(shipped["metrics"]) == 1
    found = json.loads((tmp_path / "results" / "weights.json").read_text())["runs"]["tiny"]
    assert found["test_nll"] == pytest.approx(rows(tmp_path / "tiny")[-1]["test_nll"], abs=1e-4)
    big = {"state": {"best": {"model": {"W": torch.eye(400)}}}, "config": {}, "metrics": [1, 2]}
    assert weights.shipped(big)["state"]["best"]["model"]["W"].dtype == torch.float16


def test_the_list_of_experiments_has_every_module_and_how_long_it_takes():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_module("experiments")
    lines = out.getvalue().splitlines()
    names = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert len([line for line in lines if line.strip().startswith("Time: ")]) == len(names)
    assert names == sorted(path.stem for path in (RESULTS.parent / "experiments").glob("[a-z]*.py"))
