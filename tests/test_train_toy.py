"""The command `train_toy.py`: its figures, what it writes, that a stopped run resumes exactly, and how it fails."""

import pytest
import torch

from conftest import compiler, failing
import losses
import run
import training
from data import TOYS, Toy
from ebflow import EBFlow, toy_flow
from layers import FullyConnected
from run import read_metrics as rows
from train_toy import DEFAULTS, divergences, load, main, parse, truth

FILES = {"checkpoint.pt", "config.json", "curves.png", "metrics.jsonl", "density.png"}


def arguments(out, *extra):
    return ["--out", str(out), "--epochs", "3", "--steps", "10", "--batch-size", "64", "--blocks", "2", "--width", "8",
            "--test-points", "400", "--device", "cpu", *extra]


fails = failing(main)


def test_the_divergences_are_those_of_a_quadrature():
    """Of a Gaussian that is no good fit, so that neither is small; by the trapezoid rule on a lattice."""
    toy = TOYS["checkerboard"]()
    flow = EBFlow([FullyConnected(2, diagonal=0.4, bias=0.1)], (2,))
    ticks = torch.arange(-13, 13.25, 0.25, dtype=torch.float64)
    x = torch.cartesian_prod(ticks, ticks)
    p, inside = toy.log_prob(x).exp() * 0.25**2, toy.log_prob(x) > -50
    flow = flow.double()
    kl = (p * (toy.log_prob(x) - flow.log_prob(x))).sum().item()
    fisher = (p * 0.5 * (toy.score(x) - flow.score(x)).square().sum(1))[inside].sum().item()
    row = divergences("test", flow.float(), *truth(toy, 50_000, 0, "cpu"))
    assert abs(row["test_kl"] - kl) < 4 * row["test_kl_se"] and row["test_kl_se"] < 0.02 * kl
    assert abs(row["test_fisher"] - fisher) < 4 * row["test_fisher_se"] and row["test_fisher_se"] < 0.02 * fisher


@pytest.mark.parametrize("loss", DEFAULTS)
def test_every_objective_learns(tmp_path, loss):
    main(arguments(tmp_path, "--data", "sine", "--loss", loss, "--steps", "100", "--blocks", "4", "--lr", "1e-2"))
    metrics = rows(tmp_path)
    assert metrics[-1]["val_kl"] < 0.7 * metrics[0]["val_kl"]
    assert metrics[-1]["val_fisher"] < 0.8 * metrics[0]["val_fisher"]


def test_all_objectives_on_all_toys_leave_their_files_and_make_the_grid(tmp_path, capsys):
    everything = arguments(tmp_path, "--data", "all", "--loss", "all")
    main(everything)
    assert {p.name for p in tmp_path.iterdir()} == {f"{toy}-{loss}" for toy in TOYS for loss in DEFAULTS} | {"grid.png"}
    table = capsys.readouterr().out
    for toy in TOYS:
        for loss in DEFAULTS:
            out = tmp_path / f"{toy}-{loss}"
            assert {p.name for p in out.iterdir()} == FILES
            metrics = rows(out)
            assert [row["step"] for row in metrics] == [0, 10, 20, 30]
            assert metrics[-1]["test_kl"] > 0 and f"{metrics[-1]['test_kl']:.4f} ± " in table
    before = (tmp_path / "checkerboard-ml" / "checkpoint.pt").read_bytes()
    main(arguments(tmp_path, "--data", "checkerboard", "--loss", "all", "--resume"))  # done: nothing is trained again
    assert (tmp_path / "checkerboard-ml" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("flags", [[], pytest.param(["--compile"], marks=compiler)])
def test_a_run_that_is_stopped_and_resumed_ends_exactly_like_an_undisturbed_one(tmp_path, monkeypatch, flags):
    main(arguments(tmp_path / "whole", *flags))
    save, saved = run.Run.save, []

    def stop_after_two(self, state):
        save(self, state)
        saved.append(state)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.Run, "save", stop_after_two)
    with pytest.raises(SystemExit) as exit:
        main(arguments(tmp_path / "stopped", *flags))
    assert exit.value.code == 130 and len(rows(tmp_path / "stopped")) == 3
    main(arguments(tmp_path / "stopped", "--resume", *flags))
    timing = ("seconds", "batches_per_second")
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "stopped"), strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}


@pytest.mark.parametrize("loss", ["ml", "dsm"])
def test_the_points_end_with_the_noise_of_the_toy_and_dsm_adds_it_itself(tmp_path, monkeypatch, loss):
    """The minimiser of every objective is p: bare points with σ = 0.375 for dsm, points of p for the others."""
    seen = []
    step = training.objective
    monkeypatch.setattr(training, "objective", lambda args, model, x: seen.append((args.sigma.item(), x)) or step(args, model, x))
    monkeypatch.setattr(Toy, "points", lambda self, n, device: torch.zeros(n, 2, device=device), raising=False)
    monkeypatch.setattr(Toy, "__init__", without_points(Toy.__init__))
    main(arguments(tmp_path, "--loss", loss, "--batch-size", "4000"))
    sigmas = [sigma for sigma, _ in seen]
    assert sigmas[0] == (6 if loss == "dsm" else 2)
    assert sigmas == sorted(sigmas, reverse=True) and sigmas[26:] == [Toy.smoothing] * 4
    for sigma, x in seen:
        assert x.std().item() == pytest.approx(0 if loss == "dsm" else sigma, rel=0.05)


def test_dsm_pools_its_targets_unless_each_point_is_to_keep_its_own():
    flow, x = toy_flow(blocks=2, width=8), torch.randn(64, 2)
    for flags, pooled in (([], True), (["--targets", "own"], False)):
        [args], _ = parse(["--loss", "dsm", *flags])
        args.sigma = 1.0
        torch.manual_seed(0)
        loss = training.objective(args, flow, x)
        torch.manual_seed(0)
        assert loss == losses.dsm(flow.energy, x, 1.0, torch.randn_like(x), pooled)


def without_points(init):
    """Toys whose points are all at the origin, so that what is left of a batch is its noise."""
    def patched(self, points, *args, **kwargs):
        init(self, points, *args, **kwargs)
        del self.points
    return patched


def test_errors_are_one_line(tmp_path, capsys):
    main(arguments(tmp_path / "run", "--loss", "dsm"))
    assert "--resume" in fails(capsys, *arguments(tmp_path / "run", "--loss", "dsm"))
    assert "loss is dsm there and ml here" in fails(capsys, *arguments(tmp_path / "run", "--loss", "ml", "--resume"))
    assert "data is swirl there and sine here" in fails(capsys, *arguments(tmp_path / "run", "--data", "sine", "--resume"))
    assert "invalid choice: 'spiral'" in fails(capsys, "--data", "spiral")
    assert "--xi is not a setting of ml" in fails(capsys, "--loss", "ml", "--xi", "0.1")
    assert "--targets is not a setting of ssm" in fails(capsys, "--loss", "ssm", "--targets", "own")
    assert "0.375 at least" in fails(capsys, "--start-smoothing", "0.1")
    assert "nothing to resume" in fails(capsys, *arguments(tmp_path / "none", "--resume"))
    assert "not enough memory" in fails(capsys, *arguments(tmp_path / "large", "--width", "10000000"))
    line = fails(capsys, *arguments(tmp_path / "diverged", "--lr", "1e30", "--warmup", "0"))
    assert "epoch 1, step" in line and "lower --lr" in line
    assert "raise --start-smoothing" in line and "--sigma" not in line  # its own flags only


@pytest.mark.parametrize("loss", DEFAULTS)
def test_a_step_runs_on_the_meta_device(loss):
    """Where there is no memory, a tensor made on another device shows."""
    [args], _ = parse(["--loss", loss])
    args.sigma = Toy.smoothing
    flow = toy_flow(blocks=2, width=8).to("meta")
    loss = training.objective(args, flow, torch.empty(16, 2, device="meta"))
    assert loss.is_meta
    loss.backward(inputs=training.trainable(flow))


def test_a_run_in_double_precision_is_one(tmp_path):
    main(arguments(tmp_path, "--data", "sine", "--loss", "all", "--double"))
    for loss in DEFAULTS:
        state = torch.load(tmp_path / f"sine-{loss}" / "checkpoint.pt", weights_only=True)["state"]
        tensors = [*state["model"].values(), *(t for s in state["optimizer"]["state"].values() for t in s.values() if t.dim())]
        assert {t.dtype for t in tensors} == {torch.float64}
        flow = load(tmp_path / f"sine-{loss}")
        row = divergences("test", flow, *truth(TOYS["sine"](), 400, -2, "cpu", torch.float64))
        assert row["test_kl"] == rows(tmp_path / f"sine-{loss}")[-1]["test_kl"]


def test_every_schedule_runs(tmp_path):
    main(arguments(tmp_path, "--schedule", "steps", "--optimizer", "rmsprop", "--lr", "1e-3"))
    assert len(rows(tmp_path)) == 4


@pytest.mark.parametrize("other", [["--seed", "0"], ["--seed", "1"]])
def test_every_epoch_and_every_seed_draws_its_own_points(tmp_path, monkeypatch, other):
    seen = []
    step = training.objective
    monkeypatch.setattr(training, "objective", lambda args, model, x: seen.append(x) or step(args, model, x))
    main(arguments(tmp_path / "a"))
    first = list(seen)
    assert len({x.sum().item() for x in first}) == len(first) == 30
    seen.clear()
    main(arguments(tmp_path / "b", *other))
    assert all(torch.equal(x, y) == (other == ["--seed", "0"]) for x, y in zip(first, seen, strict=True))
