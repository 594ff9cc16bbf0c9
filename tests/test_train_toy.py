"""The command `train_toy.py`: its figures, what it writes, its loop, that it resumes exactly, how it fails."""

import contextlib
import copy
import io
import json
import math
import shutil
from itertools import product

import pytest
import torch
from matplotlib.figure import Figure

from conftest import assert_same_bits, checkpoint, failing, stop_after, timeless, under_torchrun
import losses
import train_toy
from data import TOYS, Toy
from ebflow import EBFlow, toy_flow
from experiments.trained import load_toy
from layers import FullyConnected
from losses import OBJECTIVES
from support import plots, settings
from support.optimization import trainable
from support.run import Run, RunError, read_metrics
from train_toy import divergences, main, make_step, noise_level, truth

FILES = {"checkpoint.pt", "config.json", "curves.png", "metrics.jsonl", "density.png"}
TEST = ("test_nll", "test_kl", "test_kl_se", "test_fisher", "test_fisher_se")
EPOCHS, STEPS = 2, 5


def arguments(out, *extra):
    return ["--out", str(out), "--epochs", str(EPOCHS), "--steps", str(STEPS), "--batch-size", "32", "--blocks", "1",
            "--width", "8", "--test-points", "100", "--device", "cpu", *extra]


fails = failing(main)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Every objective on every toy, the pictures coarse.   -> the folder of the runs, what they printed"""
    out, printed = tmp_path_factory.mktemp("everything"), io.StringIO()
    save, log_prob, known = Figure.savefig, Toy.log_prob, {}

    def once(self, x):  # the pictures of a toy show its density at the same points
        key = (self.center.numpy().tobytes(), x.detach().numpy().tobytes())
        if x.requires_grad or key not in known:
            known[key] = log_prob(self, x)
        return known[key]

    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patched:
        patched.setattr(Toy, "log_prob", once)
        patched.setattr(Figure, "savefig", lambda self, file, format, dpi: save(self, file, format=format, dpi=40))
        for toy, loss in product(TOYS, OBJECTIVES):
            main(arguments(out / f"{toy}-{loss}", "--data", toy, "--loss", loss))
    return out, printed.getvalue()


def watched(monkeypatch):
    """The steps of all runs from now on, as they begin.   -> a list of {"x", "sigma", "n", "lr"}"""
    seen, make = [], train_toy.make_step

    def make_watched(s, flow, averaged):
        step, optimizer = make(s, flow, averaged)

        def watched_step(x, sigma, n):
            seen.append({"x": x, "sigma": sigma.item(), "n": n, "lr": optimizer.param_groups[0]["lr"]})
            return step(x, sigma, n)

        return watched_step, optimizer

    monkeypatch.setattr(train_toy, "make_step", make_watched)
    return seen


@pytest.fixture
def bare(monkeypatch):
    """Runs draw nothing, which would take most of their time."""
    for name in ("curves", "toy"):
        monkeypatch.setattr(plots, name, lambda *args: None)
    monkeypatch.setattr(Run, "picture", lambda *args: None)


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


def test_the_truth_is_the_same_at_every_call_and_other_points_for_validation_and_test():
    toy = TOYS["sine"]()
    first = truth(toy, 50, -1, "cpu")
    torch.rand(1)
    assert all(torch.equal(a, b) for a, b in zip(first, truth(toy, 50, -1, "cpu")))
    assert not torch.equal(first[0], truth(toy, 50, -2, "cpu")[0])
    assert torch.equal(first[1], toy.log_prob(first[0])) and torch.equal(first[2], toy.score(first[0]))


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_every_objective_learns(tmp_path, bare, loss):
    main(arguments(tmp_path, "--data", "sine", "--loss", loss, "--steps", "60", "--batch-size", "64", "--blocks", "4",
                   "--lr", "2e-2", "--test-points", "400"))
    metrics = read_metrics(tmp_path)
    assert metrics[-1]["val_kl"] < 0.7 * metrics[0]["val_kl"]
    assert metrics[-1]["val_fisher"] < 0.8 * metrics[0]["val_fisher"]


# ---- What a run leaves -----------------------------------------------------------------------------------------------

def test_all_objectives_on_all_toys_leave_their_files(everything):
    out, printed = everything
    for toy in TOYS:
        for loss in OBJECTIVES:
            directory = out / f"{toy}-{loss}"
            assert {p.name for p in directory.iterdir()} == FILES
            assert all((directory / name).read_bytes().startswith(b"\x89PNG") for name in FILES if name[-3:] == "png")
            config = json.loads((directory / "config.json").read_text())
            assert (config["data"], config["loss"]) == (toy, loss)
            start, *trained = metrics = read_metrics(directory)
            assert [row["epoch"] for row in metrics] == [0, 1, 2]
            assert [row["step"] for row in metrics] == [0, STEPS, 2 * STEPS]
            assert start["loss"] is start["batches_per_second"] is None
            assert all(row["grad_norm"] > 0 and row["batches_per_second"] > 0 for row in trained)
            assert 0 < start["seconds"] < trained[0]["seconds"] < trained[1]["seconds"]
            assert f"{'written to':24}{directory}" in printed


def test_the_final_figures_are_those_of_the_flow_that_is_loaded_and_are_printed_one_in_each_line(everything):
    out, printed = everything
    lines = printed.splitlines()
    for directory in out.glob("*-*"):
        last = read_metrics(directory)[-1]
        toy = TOYS[directory.name.split("-")[0]]()
        again = divergences("test", load_toy(directory), *truth(toy, 100, -2, "cpu"))
        assert {name: last[name] for name in TEST} == again and last["test_kl"] > 0
        assert all(f"{name:24}{last[name]:.4f}" in lines for name in TEST)
        assert f"{'best_epoch':24}{last['best_epoch']}" in lines


def test_a_finished_run_that_is_resumed_trains_nothing_again(everything, bare):
    out, _ = everything
    runs = [out / f"{toy}-ml" for toy in TOYS]
    before = [[(run / name).read_bytes() for name in ("checkpoint.pt", "metrics.jsonl")] for run in runs]
    for toy, run in zip(TOYS, runs):
        main(arguments(run, "--data", toy, "--loss", "ml", "--resume"))
    assert before == [[(run / name).read_bytes() for name in ("checkpoint.pt", "metrics.jsonl")] for run in runs]


# ---- The loop --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss", ["ml", "dsm"])
def test_the_points_end_with_the_noise_of_the_toy_and_dsm_adds_it_itself(tmp_path, monkeypatch, bare, loss):
    """The minimiser of every objective is p: bare points with σ = 0.375 for dsm, points of p for the others."""
    seen, swirl = watched(monkeypatch), TOYS["swirl"]

    def at_the_origin():  # what is left of a batch is its noise
        toy = swirl()
        toy.points = lambda n, device: torch.zeros(n, 2, device=device)
        return toy

    monkeypatch.setitem(TOYS, "swirl", at_the_origin)
    main(arguments(tmp_path, "--loss", loss, "--batch-size", "2000" if loss == "ml" else "64"))
    sigmas = [step["sigma"] for step in seen]
    annealed = math.ceil((0.5 if loss == "ml" else 0.7) * EPOCHS * STEPS)
    assert sigmas[0] == (2 if loss == "ml" else 6) and sigmas == sorted(sigmas, reverse=True)
    assert len(set(sigmas[:annealed + 1])) == annealed + 1
    assert sigmas[annealed:] == [Toy.smoothing] * (EPOCHS * STEPS - annealed)
    for step in seen:
        assert step["x"].std().item() == pytest.approx(step["sigma"] if loss == "ml" else 0, rel=0.06)


def test_the_noise_falls_geometrically_to_that_of_the_toy():
    s = settings.parse(settings.Toy, ["--start-smoothing", "6", "--anneal", "0.8"])
    assert noise_level(s, 0.0) == 6 and noise_level(s, 0.8) == noise_level(s, 1.0) == Toy.smoothing
    assert noise_level(s, 0.4) == pytest.approx(math.sqrt(6 * Toy.smoothing))


@pytest.mark.parametrize("flags", [["--loss", "ml"], ["--loss", "dsm", "--plateau", "0.4"]])
def test_the_learning_rate_moves_at_every_step_along_the_cosine(tmp_path, monkeypatch, bare, flags):
    seen, plateau = watched(monkeypatch), float(flags[-1]) if "--plateau" in flags else 0.0
    main(arguments(tmp_path, *flags, "--lr", "0.01"))
    assert [step["n"] for step in seen] == list(range(EPOCHS * STEPS))
    for step in seen:
        progress = step["n"] / (EPOCHS * STEPS)
        fall = max(0.0, (progress - plateau) / (1 - plateau))
        expected = 0.01 * min(1.0, progress / 0.05) * (1 + math.cos(math.pi * fall)) / 2
        assert step["lr"] == pytest.approx(expected)
    assert len({step["lr"] for step in seen}) == EPOCHS * STEPS or plateau


@pytest.mark.parametrize("other", [["--seed", "0"], ["--seed", "1"]])
def test_every_epoch_and_every_seed_draws_its_own_points(tmp_path, monkeypatch, bare, other):
    seen = watched(monkeypatch)  # dsm has bare points, whose noise cannot tell the epochs apart
    main(arguments(tmp_path / "a", "--data", "sine", "--loss", "dsm"))
    first = [step["x"] for step in seen]
    assert len({x.sum().item() for x in first}) == len(first) == EPOCHS * STEPS
    seen.clear()
    main(arguments(tmp_path / "b", "--data", "sine", "--loss", "dsm", *other))
    same = other == ["--seed", "0"]
    assert all(torch.equal(x, step["x"]) == same for x, step in zip(first, seen, strict=True))
    start = [read_metrics(tmp_path / name)[0]["val_nll"] for name in "ab"]  # the flow starts by the seed, too
    assert (start[0] == start[1]) == same


EXPECTED = {  # the objectives as losses.py has them, without the table
    "ml":    lambda flow, x, s, sigma: losses.ml(flow.log_prob, x),
    "sml":   lambda flow, x, s, sigma: losses.sml(flow.energy, x, flow.sample(s.model_samples)),
    "ssm":   lambda flow, x, s, sigma: losses.ssm(flow.energy, x),
    "dsm":   lambda flow, x, s, sigma: losses.dsm(flow.energy, x, sigma, pooled=True),
    "fdssm": lambda flow, x, s, sigma: losses.fdssm(flow.energy, x, s.xi),
}


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_a_step_is_adams_down_the_objective_and_the_average_follows(loss):
    """Adam's first step has the length lr in every coordinate. The average is then m θ1 + (1-m) θ2 with m = 2/11."""
    s = settings.parse(settings.Toy, ["--loss", loss, "--lr", "1e-3"])
    flow, x, sigma = toy_flow(blocks=2, width=8), torch.randn(64, 2), torch.tensor(0.7, dtype=torch.float64)
    flow.initialize(x)
    averaged = copy.deepcopy(flow)
    step, _ = make_step(s, flow, averaged)

    parameters = trainable(flow)
    start = [p.detach().clone() for p in parameters]
    torch.manual_seed(5)
    expected = EXPECTED[loss](flow, x, s, sigma)
    gradients = torch.autograd.grad(expected, parameters)
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    torch.manual_seed(5)
    figures = step(x, sigma, 0)
    assert figures.keys() == {"loss", "grad_norm"}
    assert figures["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert figures["grad_norm"].item() == pytest.approx(norm, rel=1e-4)
    for p, p0, g in zip(parameters, start, gradients):
        torch.testing.assert_close(p, p0 - 1e-3 * g / (g.abs() + 1e-8), rtol=1e-4, atol=2e-5)
    assert all(torch.equal(a, p) for a, p in zip(trainable(averaged), parameters))

    first = [p.detach().clone() for p in parameters]
    step(x, sigma, 1)
    for a, p1, p2 in zip(trainable(averaged), first, parameters):
        torch.testing.assert_close(a, 2 / 11 * p1 + 9 / 11 * p2)
    assert not all(torch.equal(a, p) for a, p in zip(trainable(averaged), parameters))


def test_dsm_pools_its_targets():
    s = settings.parse(settings.Toy, ["--loss", "dsm"])
    flow, x = toy_flow(blocks=2, width=8), torch.randn(64, 2)
    step, _ = make_step(s, flow, copy.deepcopy(flow))
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    pooled, own = (losses.dsm(flow.energy, x, 1.0, noise, pooled).item() for pooled in (True, False))
    torch.manual_seed(0)
    value = step(x, torch.tensor(1.0), 0)["loss"].item()
    assert value == pytest.approx(pooled) and value != pytest.approx(own, rel=0.01)


@pytest.mark.parametrize("saves", [None, 2, 3])
def test_the_weights_of_the_best_epoch_are_kept_as_they_were(tmp_path, monkeypatch, bare, saves):
    """Epoch 1 of 3 is made the best one, also in a run that is stopped then or later."""
    weights, real = {"val": [], "test": []}, train_toy.divergences

    def worse_and_worse(split, model, *points):
        weights[split].append(copy.deepcopy(model.state_dict()))
        row = real(split, model, *points)
        return row | ({"val_nll": float(len(weights["val"]))} if split == "val" else {})

    monkeypatch.setattr(train_toy, "divergences", worse_and_worse)
    flags = arguments(tmp_path, "--data", "sine", "--loss", "ml", "--epochs", "3")
    if saves:
        with monkeypatch.context() as patched, pytest.raises(SystemExit):
            stop_after(patched, saves)
            main(flags)
    main([*flags, *(["--resume"] if saves else [])])
    best, [tested] = checkpoint(tmp_path)["state"]["best"], weights["test"]
    assert best["epoch"] == read_metrics(tmp_path)[-1]["best_epoch"] == 1 and best["val_nll"] == 2
    assert len(weights["val"]) == 4
    for name, then in weights["val"][1].items():
        assert torch.equal(best["model"][name], then) and torch.equal(tested[name], then)
        assert torch.equal(load_toy(tmp_path).state_dict()[name], then)
    assert any(not torch.equal(then, weights["val"][3][name]) for name, then in weights["val"][1].items())


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_a_step_runs_on_the_meta_device(monkeypatch, loss):
    """Where there is no memory, a tensor made on another device shows. A fused Adam does not run there."""
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr, fused: torch.optim.SGD(parameters, lr))
    s = settings.parse(settings.Toy, ["--loss", loss])
    flow = toy_flow(blocks=2, width=8).to("meta")
    step, _ = make_step(s, flow, copy.deepcopy(flow))
    sigma = torch.tensor(Toy.smoothing, dtype=torch.float64, device="meta")
    for n in (0, 1):
        figures = step(torch.empty(16, 2, device="meta"), sigma, n)
        assert all(figure.is_meta and figure.shape == () for figure in figures.values())


# ---- Resuming --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss, saves", [*((loss, 2) for loss in OBJECTIVES), ("dsm", 1), ("dsm", 3)])
def test_a_run_that_is_stopped_and_resumed_ends_exactly_like_an_undisturbed_one(
        everything, tmp_path, monkeypatch, bare, loss, saves):
    flags, whole = arguments(tmp_path, "--data", "sine", "--loss", loss), everything[0] / f"sine-{loss}"
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as exit:
        stop_after(patched, saves)  # the first checkpoint is of epoch 0
        main(flags)
    assert exit.value.code == 130 and len(read_metrics(tmp_path)) == saves
    main([*flags, "--resume"])
    assert timeless(read_metrics(whole)) == timeless(read_metrics(tmp_path))
    assert_same_bits(checkpoint(whole)["state"], checkpoint(tmp_path)["state"])


def test_a_resumed_run_goes_on_counting_its_time(tmp_path, monkeypatch, bare):
    flags = arguments(tmp_path, "--data", "sine", "--epochs", "3")
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        stop_after(patched, 2)
        main(flags)
    saved = checkpoint(tmp_path)
    saved["metrics"][-1]["seconds"] = 1000.0
    torch.save(saved, tmp_path / "checkpoint.pt")
    main([*flags, "--resume"])
    assert 1000 < read_metrics(tmp_path)[-2]["seconds"] < read_metrics(tmp_path)[-1]["seconds"] < 1060


def test_a_compiled_run_that_is_stopped_and_resumed_ends_exactly_like_an_undisturbed_one(
        tmp_path, monkeypatch, bare, captured):
    """The run that goes on from a copy of the first checkpoints stands for one that stopped."""
    flags, save = ["--data", "sine", "--loss", "dsm", "--compile", "--steps", "2"], Run.save

    def copying(self, row, state, shown=()):
        save(self, row, state, shown)
        if row["epoch"] == 1:
            shutil.copytree(tmp_path / "whole", tmp_path / "stopped")

    with monkeypatch.context() as patched:
        patched.setattr(Run, "save", copying)
        main(arguments(tmp_path / "whole", *flags))
    assert len(read_metrics(tmp_path / "stopped")) == 2
    main(arguments(tmp_path / "stopped", *flags, "--resume"))
    whole, stopped = (checkpoint(tmp_path / name)["state"] for name in ("whole", "stopped"))
    assert_same_bits(whole, stopped)
    assert not torch.equal(whole["model"]["layers.0.weight"], whole["averaged"]["layers.0.weight"])
    assert timeless(read_metrics(tmp_path / "whole")) == timeless(read_metrics(tmp_path / "stopped"))


# ---- Failing ---------------------------------------------------------------------------------------------------------

def test_errors_are_one_line(everything, tmp_path, capsys, monkeypatch):
    run = everything[0] / "swirl-dsm"
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    assert "--resume" in fails(capsys, *arguments(run, "--loss", "dsm"))
    assert "loss is dsm there and ml here" in fails(capsys, *arguments(run, "--loss", "ml", "--resume"))
    assert "data is swirl there and sine here" in fails(capsys, *arguments(run, "--data", "sine", "--resume"))
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    assert "invalid choice: 'spiral'" in fails(capsys, "--data", "spiral")
    assert "--xi is not a setting of toy-swirl-ml" in fails(capsys, "--loss", "ml", "--xi", "0.1")
    assert "--start-smoothing must be at least 0.375" in fails(capsys, "--start-smoothing", "0.1")
    assert "--lr must be above 0" in fails(capsys, "--lr", "0")
    assert "nothing to resume" in fails(capsys, *arguments(tmp_path / "none", "--resume"))
    assert "not enough memory" in fails(capsys, *arguments(tmp_path / "large", "--width", "1000000"))
    under_torchrun(monkeypatch, 2)
    assert "start it without torchrun" in fails(capsys, *arguments(tmp_path / "two"))


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_a_run_that_diverges_names_the_step_and_its_own_flags(tmp_path, capsys, loss):
    line = fails(capsys, *arguments(tmp_path, "--data", "sine", "--loss", loss, "--lr", "1e30"))
    assert "at epoch 1, step " in line and "lower --lr or raise --start-smoothing" in line and "is kept" in line
    assert "--sigma" not in line
    assert checkpoint(tmp_path)["state"]["epoch"] == 0 and len(read_metrics(tmp_path)) == 1


def test_what_is_no_run_of_a_toy_is_an_error_of_one_line(everything, tmp_path):
    with pytest.raises(RunError, match="cannot read"):
        load_toy(tmp_path)
    saved = checkpoint(everything[0] / "sine-ml")
    for change in ({"config": {"loss": "ml"}}, {"config": saved["config"] | {"width": 9}}, {"state": {}}):
        torch.save(saved | change, tmp_path / "checkpoint.pt")
        with pytest.raises(RunError, match="is no run of train_toy.py") as error:
            load_toy(tmp_path)
        assert "\n" not in str(error.value)
