"""What `train_toy.py` alone does: its divergences, its noise that falls, and its step."""

import copy
import math

import numpy as np
import pytest
import torch

import losses
import train_toy
from conftest import failing, rows
from data import Points
from densities import TOYS, Toy
from ebflow import EBFlow, toy_flow
from layers import FullyConnected
from losses import OBJECTIVES
from support import plots, settings
from support.optimization import trainable
from train_toy import RECIPES, Settings, build, divergences, main, make_step, noise_level, truth

EPOCHS, STEPS = 2, 5


def arguments(out, *extra):
    return ["--out", str(out), "--epochs", str(EPOCHS), "--steps", str(STEPS), "--batch-size", "32", "--blocks", "1",
            "--width", "8", "--test-points", "100", "--device", "cpu", "--sml-steps", "0", *extra]


def parse(*flags):
    return settings.parse(Settings, flags)


# ---- The figures -----------------------------------------------------------------------------------------------------

def test_the_divergences_are_those_of_a_quadrature():
    """Of a Gaussian that is no good fit, so that neither is small; by the trapezoid rule on a lattice."""
    toy = TOYS["checkerboard"]()
    flow = EBFlow([FullyConnected(2, diagonal=0.4, bias=0.1)], (2,))
    ticks = torch.arange(-13, 13.25, 0.25, dtype=torch.float64)
    x = torch.cartesian_prod(ticks, ticks)
    p, inside = toy.log_prob(x).exp() * 0.25**2, toy.log_prob(x) > -50
    flow = flow.double()
    kl = (p * (toy.log_prob(x) - flow.log_prob(x))).sum().item()
    nll = -(p * flow.log_prob(x)).sum().item()
    fisher = (p * 0.5 * (toy.score(x) - flow.score(x)).square().sum(1))[inside].sum().item()
    row = divergences("test", flow.float(), *truth(toy, 50_000, 0, "cpu"))
    assert abs(row["test_kl"] - kl) < 4 * row["test_kl_se"] and row["test_kl_se"] < 0.02 * kl
    assert abs(row["test_fisher"] - fisher) < 4 * row["test_fisher_se"] and row["test_fisher_se"] < 0.02 * fisher
    assert row["test_nll"] == pytest.approx(nll, rel=0.01)


def test_the_truth_is_the_same_at_every_call_and_the_test_has_other_points_than_the_validation(tmp_path, monkeypatch,
                                                                                               no_pictures):
    toy = TOYS["sine"]()
    first = truth(toy, 50, -1, "cpu")
    torch.rand(1)
    assert all(map(torch.equal, first, truth(toy, 50, -1, "cpu")))
    assert torch.equal(first[1], toy.log_prob(first[0])) and torch.equal(first[2], toy.score(first[0]))
    points = {}
    monkeypatch.setattr(train_toy, "divergences", lambda split, *args: points.setdefault(split, args[1]) is None or (
        divergences(split, *args)))
    main(arguments(tmp_path, "--data", "sine"))
    assert len(points["val"]) == 25 and len(points["test"]) == 100
    assert not torch.equal(points["val"], points["test"][:25])


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_every_objective_learns(tmp_path, no_pictures, loss):
    main(arguments(tmp_path, "--data", "sine", "--loss", loss, "--steps", "60", "--batch-size", "64", "--blocks", "4",
                   "--lr", "2e-2", "--test-points", "400"))
    metrics = rows(tmp_path)
    assert metrics[-1]["val_kl"] < 0.7 * metrics[0]["val_kl"]
    assert metrics[-1]["val_fisher"] < 0.8 * metrics[0]["val_fisher"]


@pytest.mark.parametrize("data", TOYS)
@pytest.mark.parametrize("loss", OBJECTIVES)
def test_every_recipe_is_of_settings_that_its_objective_has(data, loss):
    s = parse("--data", data, "--loss", loss)
    recipe = RECIPES.get(loss, {}) | (dict(start_smoothing=2.0, anneal=0.5) if data == "sine" else {})
    assert RECIPES.keys() <= OBJECTIVES.keys() and recipe.keys() <= s.config().keys()
    assert {name: vars(s)[name] for name in recipe} == recipe


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_points_of_a_file_have_settings_of_their_own(loss):
    s = parse("--data", "points.csv", "--loss", loss)
    matching = loss in ("ssm", "dsm", "fdssm")
    assert (s.sigma, s.floor) == ((0.1, 0.1) if matching else (0.03, 0.0))
    assert s.config()["sigma"] == s.sigma and (not matching or (s.sml_steps, s.sml_sigma) == (500, 0.03))


# ---- The noise on the points -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss", ["ml", "dsm"])
def test_the_points_end_with_the_noise_of_the_toy_and_dsm_adds_it_itself(tmp_path, monkeypatch, no_pictures, loss):
    """The minimiser of every objective is p: bare points with σ = 0.375 for dsm, points of p for the others."""
    seen, swirl, make = [], TOYS["swirl"], train_toy.make_step

    def at_the_origin():  # what is left of a batch is its noise
        toy = swirl()
        toy.points = lambda n, device: torch.zeros(n, 2, device=device)
        return toy

    def watched(*args):
        step, optimizer = make(*args)
        return lambda x, sigma, n: seen.append((x, sigma.item())) or step(x, sigma, n), optimizer

    monkeypatch.setitem(TOYS, "swirl", at_the_origin)
    monkeypatch.setattr(train_toy, "make_step", watched)
    main(arguments(tmp_path, "--loss", loss, "--batch-size", "2000" if loss == "ml" else "64"))
    sigmas = [sigma for _, sigma in seen]
    annealed = math.ceil((0.5 if loss == "ml" else 0.7) * EPOCHS * STEPS)
    assert sigmas[0] == (2 if loss == "ml" else 6) and sigmas == sorted(sigmas, reverse=True)
    assert len(set(sigmas[:annealed + 1])) == annealed + 1
    assert sigmas[annealed:] == [Toy.smoothing] * (EPOCHS * STEPS - annealed)
    for x, sigma in seen:
        assert x.std().item() == pytest.approx(sigma if loss == "ml" else 0, rel=0.06)


def test_the_noise_falls_geometrically_to_that_of_the_toy():
    s = parse("--start-smoothing", "6", "--anneal", "0.8")
    assert noise_level(s, 0.0) == 6 and noise_level(s, 0.8) == noise_level(s, 1.0) == Toy.smoothing
    assert noise_level(s, 0.4) == pytest.approx(math.sqrt(6 * Toy.smoothing))
    assert noise_level(parse("--start-smoothing", "0.1", "--sigma", "0.2"), 0.0) == 0.2  # and never rises


def test_the_flow_starts_at_the_moments_of_points_under_the_noise_of_the_start():
    s, toy = parse("--start-smoothing", "6", "--blocks", "2", "--width", "8", "--seed", "3"), TOYS["swirl"]()
    _, flow = build(s, toy, "cpu")
    u = flow(toy.sample(20_000, "cpu", 6.0)).detach()
    torch.testing.assert_close(u.mean(0), torch.zeros(2), rtol=0, atol=0.1)
    torch.testing.assert_close(u.std(0), torch.ones(2), rtol=0, atol=0.1)
    assert all(map(torch.equal, flow.parameters(), build(s, toy, "cpu")[1].parameters()))


# ---- A training step -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss", OBJECTIVES)
def test_a_step_is_adams_down_the_objective_and_the_average_follows(loss):
    """dsm pools its targets. The average takes all of the first step, then it is m θ1 + (1-m) θ2 with m = 2/11."""
    s = parse("--loss", loss, "--lr", "1e-3")
    flow, x, sigma = toy_flow(blocks=2, width=8), torch.randn(64, 2), torch.tensor(0.7, dtype=torch.float64)
    flow.initialize(x)
    averaged, theirs = copy.deepcopy(flow), copy.deepcopy(flow)
    step, _ = make_step(s, flow, averaged)
    optimizer, weights = torch.optim.Adam(trainable(theirs), lr=1e-3), []
    for n in range(2):
        torch.manual_seed(n)
        expected = {"ml": lambda: losses.ml(theirs.log_prob, x), "ssm": lambda: losses.ssm(theirs.energy, x),
                    "sml": lambda: losses.sml(theirs.energy, x, theirs.sample(512)),
                    "dsm": lambda: losses.dsm(theirs.energy, x, sigma, pooled=True),
                    "fdssm": lambda: losses.fdssm(theirs.energy, x, 0.2)}[loss]()
        optimizer.zero_grad()
        expected.backward()
        norm = torch.cat([p.grad.flatten() for p in trainable(theirs)]).norm()
        optimizer.step()
        torch.manual_seed(n)
        figures = step(x, sigma, n)
        torch.testing.assert_close(figures, {"loss": expected.detach(), "grad_norm": norm}, rtol=1e-4, atol=1e-4)
        weights.append([p.detach().clone() for p in trainable(flow)])
    torch.testing.assert_close(dict(flow.named_parameters()), dict(theirs.named_parameters()), rtol=1e-3, atol=1e-4)
    for a, first, second in zip(trainable(averaged), *weights):
        torch.testing.assert_close(a.detach(), 2 / 11 * first + 9 / 11 * second)


# ---- Points of one's own ---------------------------------------------------------------------------------------------

def test_the_nll_of_points_is_that_of_the_raw_columns(tmp_path, no_pictures):
    """In other units, the same run ends at an NLL that is larger by the logarithm of the scales."""
    x, found = np.random.default_rng(0).normal(size=(400, 3)), []
    x[:, 1] += x[:, 0] ** 2
    for name, scale in (("a", [1, 1, 1]), ("b", [100, 1, 0.01 * math.e])):
        np.save(tmp_path / f"{name}.npy", x * scale + np.array(scale) * 3)
        main(arguments(tmp_path / name, "--data", str(tmp_path / f"{name}.npy"), "--steps", "30"))
        last = rows(tmp_path / name)[-1]
        flow, test = train_toy.load(tmp_path / name), Points(tmp_path / f"{name}.npy", 0).test
        assert last["test_nll"] == pytest.approx(-flow.log_prob(test).mean().item(), abs=1e-5)
        found.append((last["test_nll"], last["gaussian_test_nll"]))
    (nll, gaussian), (other, other_gaussian) = found
    assert other - nll == pytest.approx(1, abs=1e-3) and other_gaussian - gaussian == pytest.approx(1, abs=1e-3)


def test_a_file_of_other_points_or_no_file_is_one_line(tmp_path, csv, capsys, no_pictures):
    main(arguments(tmp_path / "run", "--data", str(csv)))
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(300, 3)))
    fails = failing(main)
    line = fails(capsys, *arguments(tmp_path / "run", "--data", str(tmp_path / "points.npy"), "--resume"))
    assert "sha256" in line
    for path in (tmp_path / "none.csv", tmp_path, "spiral"):
        line = fails(capsys, *arguments(tmp_path / "other", "--data", str(path)))
        assert str(path) in line and "swirl" in line


@pytest.mark.parametrize("dim, panels", [(2, 6), (3, 5), (5, 8)])
def test_the_picture_of_points_shows_pairs_of_the_first_four_columns(tmp_path, monkeypatch, dim, panels):
    figures = []
    monkeypatch.setattr(plots, "save", lambda path, figure: figures.append(figure))
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(200, dim)))
    main(arguments(tmp_path / "run", "--data", str(tmp_path / "a.npy")))
    axes = [one for one in figures[0].axes if one.axison]
    assert len(axes) == panels
    if dim > 2:
        assert [one.get_xlabel() for one in axes[:3]] == [f"column {i}" for i in ([1, 1, 2] if dim == 3 else [1, 1, 1])]
    nll, gaussian = axes[-1].lines
    metrics = rows(tmp_path / "run")
    assert [*nll.get_ydata()] == [row["val_nll"] for row in metrics]
    assert gaussian.get_ydata()[0] == metrics[-1]["gaussian_test_nll"]


def test_the_picture_of_a_toy_shows_loss_and_divergences_against_steps(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda path, figure: figures.append(figure))
    main(arguments(tmp_path, "--data", "sine", "--loss", "ssm"))
    metrics, (*_, draws, loss, goal) = rows(tmp_path), figures[0].axes
    assert [one.get_title() for one in figures[0].axes[:4]] == [
        "truth p", "model p_θ", "energy E, and the score -∇E", "draws of the model"]
    kl, fisher = goal.lines
    for line, key, first in ((loss.lines[0], "loss", 1), (kl, "val_kl", 0), (fisher, "val_fisher", 0)):
        assert [*line.get_xdata()] == [row["step"] for row in metrics[first:]]
        assert [*line.get_ydata()] == [row[key] for row in metrics[first:]]
    assert len(draws.lines[0].get_xdata()) == 100


def test_a_run_by_an_objective_of_ones_own_ends_with_its_picture(tmp_path, monkeypatch, csv):
    monkeypatch.setitem(OBJECTIVES, "sharp", lambda model, x, **_: losses.sm(model.energy, x))
    main(arguments(tmp_path, "--data", str(csv), "--loss", "sharp"))
    assert (tmp_path / "density.png").exists()
