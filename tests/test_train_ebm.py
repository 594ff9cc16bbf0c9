"""The command `train_ebm.py`: what it learns, its figures against exact ones, that it resumes exactly, how it fails."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from conftest import failing
import losses
import run
import train_ebm
from data import TOYS, Mixture, mixture
from ebflow import toy_flow
from evaluate_ebm import Exact, mixing, table
from experiments import balanced
from run import RunError
from run import read_metrics as rows
from sampling import Report
from train_ebm import DEFAULTS, Energy, Model, gaussian, main, make_model, parse, train_step
from training import as_vector

FILES = {"checkpoint.pt", "config.json", "metrics.jsonl", "density.png", "weights.png"}


def arguments(out, *extra):
    return ["--out", str(out), "--epochs", "3", "--steps", "4", "--chains", "48", "--batch-size", "64", "--blocks", "2",
            "--width", "8", "--energy-width", "8", "--start-steps", "5", "--test-points", "400", "--mixing-rounds", "3",
            "--local-steps", "3", "--device", "cpu", *extra]


fails = failing(main)


# ---------------------------------------------------------------------------------------------------------
# What it learns
# ---------------------------------------------------------------------------------------------------------


def test_with_the_flow_the_mode_weights_come_out_right_and_with_langevin_alone_they_do_not(tmp_path):
    """A quarter of the default run, from the same start: as many chains in each of four modes of weights 0.1 to 0.4."""
    fast = ["--epochs", "12", "--steps", "25", "--chains", "400", "--batch-size", "400", "--energy-width", "64",
            "--lr", "5e-3", "--blocks", "5", "--width", "32", "--start-steps", "200", "--flow-lr", "4e-3",
            "--test-points", "4000", "--mixing-rounds", "100", "--local-steps", "4"]
    metrics = {}
    for sampler in ("flow", "langevin"):
        main(arguments(tmp_path / sampler, "--sampler", sampler, *fast))
        metrics[sampler] = rows(tmp_path / sampler)
    flow, langevin = metrics["flow"][-1], metrics["langevin"][-1]
    assert flow["tv"] < 0.06 and flow["test_kl"] < 0.25
    assert abs(flow["flow_log_z"] - flow["log_z"]) < 5 * flow["flow_log_z_se"]
    # Without the flow the weights swing to and fro, and may be right for a moment.
    assert sum(row["tv"] for row in metrics["langevin"][6:]) > 5 * sum(row["tv"] for row in metrics["flow"][6:])
    assert flow["crossings"] > 5 * langevin["crossings"]
    assert langevin["autocorrelation_time"] > 3 * flow["autocorrelation_time"]


def test_a_step_moves_theta_by_the_gradient_of_sml_and_alpha_by_that_of_ml_on_the_chains_where_they_went(monkeypatch):
    args = parse(["--no-adjusted", "--clip", "0", "--energy-width", "8", "--blocks", "2", "--width", "8"])
    x, before, after = torch.randn(40, 2), torch.randn(30, 2), 2 + torch.randn(30, 2)
    model = make_model(args, x)
    share = torch.full((30,), 0.5)
    monkeypatch.setattr(train_ebm, "advance", lambda args, model, chains, step_size: (after, Report(0.1, None, share)))
    parts = {"energy": model.energy.f, "flow": model.flow}
    loss = {"energy": losses.sml(model.energy, x, after), "flow": losses.ml(model.flow.log_prob, after)}
    expected = {name: [p - 0.1 * g for p, g in zip(part.parameters(), torch.autograd.grad(loss[name], [*part.parameters()]))]
                for name, part in parts.items()}
    optimizers = [torch.optim.SGD([as_vector(part)], lr=0.1) for part in parts.values()]
    chains, _, trace = train_step(args, model, before, torch.tensor(0.1), x, *optimizers)
    assert chains is after and trace[0] == loss["energy"] and trace[2] == loss["flow"]
    for name, part in parts.items():
        torch.testing.assert_close([*part.parameters()], expected[name])


@pytest.mark.parametrize("other", [["--seed", "0"], ["--seed", "1"]])
def test_every_epoch_and_every_seed_draws_its_own_data(tmp_path, monkeypatch, other):
    seen = []
    sample = Mixture.sample
    monkeypatch.setattr(Mixture, "sample", lambda self, n, *a, **k: seen.append(sample(self, n, *a, **k)) or seen[-1])
    main(arguments(tmp_path / "a"))
    first = [x for x in seen if len(x) == 64]  # of the training steps
    assert len({x.sum().item() for x in first}) == len(first) == 5 + 3 * 4
    seen.clear()
    main(arguments(tmp_path / "b", *other))
    again = [x for x in seen if len(x) == 64]
    assert all(torch.equal(x, y) == (other == ["--seed", "0"]) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("sampler", DEFAULTS)
def test_every_sampler_runs_and_leaves_its_files(tmp_path, capsys, sampler):
    main(arguments(tmp_path, "--sampler", sampler, "--dim", "3"))
    assert {p.name for p in tmp_path.iterdir()} == FILES
    metrics, printed = rows(tmp_path), capsys.readouterr().out
    assert [row["step"] for row in metrics] == [0, 4, 8, 12]
    assert sum(metrics[-1]["weights"]) == pytest.approx(1) and sum(metrics[-1]["chains"]) == pytest.approx(1)
    assert metrics[0]["chains"] == [0.25] * 4
    for line in ("held-out NLL", "log Z", "mode weights, model", "total variation", "crossings", "acceptance"):
        assert line in printed
    assert ("log Z, by the flow" in printed) == ("acceptance, flow" in printed) == (sampler == "flow")


@pytest.mark.parametrize("toy, base", [("sine", "none"), ("checkerboard", "flow"), ("swirl", "gaussian")])
def test_a_toy_has_no_modes_to_weigh_and_every_base_is_learnt_upon(tmp_path, toy, base):
    main(arguments(tmp_path, "--data", toy, "--base", base))
    assert {p.name for p in tmp_path.iterdir()} == FILES - {"weights.png"}
    assert "weights" not in rows(tmp_path)[-1] and rows(tmp_path)[-1]["test_kl"] > 0


def test_a_base_that_is_the_flow_starts_there_and_is_held(tmp_path):
    """E = f - log q up to a constant, and f is small at the start: the flow is accepted nearly always."""
    main(arguments(tmp_path, "--base", "flow", "--sampler", "langevin"))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]["model"]
    args = parse(arguments(tmp_path, "--base", "flow"))
    torch.manual_seed(0)
    model = make_model(args, mixture(2).sample(5000))
    train_ebm.start(args, model, mixture(2), "cpu")
    assert all(not p.requires_grad for p in model.energy.base.parameters())
    base = {k.removeprefix("energy.base."): v for k, v in state.items() if k.startswith("energy.base.")}
    assert base.keys() == model.flow.state_dict().keys()
    for a, b in zip(model.energy.base.state_dict().values(), model.flow.state_dict().values()):
        assert torch.equal(a, b)


def test_short_chains_start_from_noise_each_time_and_the_others_go_on():
    x = mixture(2).sample(2000)
    for sampler in DEFAULTS:
        args = parse(arguments("unused", "--sampler", sampler, "--local-steps", "1"))
        model = make_model(args, x)
        model.flow = None
        chains, _ = train_ebm.advance(args, model, torch.full((500, 2), 3.0), 1e-12)
        if sampler == "short":
            torch.testing.assert_close(chains.T.cov(), x.T.cov(), rtol=0.3, atol=3)
        else:
            torch.testing.assert_close(chains, torch.full((500, 2), 3.0), rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------
# The figures
# ---------------------------------------------------------------------------------------------------------


def other(dim):
    """An unnormalised density whose figures are known: other weights, wider modes, exp(-E) = e^-3 times a mixture."""
    p = mixture(dim)
    q = Mixture([0.4, 0.3, 0.2, 0.1], p.means, 1.1)
    return SimpleNamespace(energy=lambda x: 3 - q.log_prob(x), flow=Mixture([0.25] * 4, p.means, 1.2)), q


@pytest.mark.parametrize("dim", [2, 8, 32])
def test_the_figures_of_a_known_energy_are_the_closed_form_ones(dim):
    model, q = other(dim)
    exact = Exact(mixture(dim), 100_000, dim, "cpu")
    row = exact.figures(model, exact.data.sample(4000, equally=True))
    tolerance = 1e-4 if dim == 2 else 0.02  # quadrature; importance sampling
    assert row["log_z"] == pytest.approx(-3, abs=tolerance)
    assert row["weights"] == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=tolerance) and row["chains"] == [0.25] * 4
    assert row["tv"] == pytest.approx(0.4, abs=tolerance)
    # The modes hardly overlap: each has its own entropy and divergence, and those of the weights are added.
    w, v = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    entropy = -(w * w.log()).sum().item() + dim / 2 * math.log(2 * math.pi * math.e)
    kl = (w * (w / v).log()).sum().item() + dim * (math.log(1.1) + 1 / (2 * 1.1**2) - 0.5)
    assert row["entropy"] == pytest.approx(entropy, abs=1e-4 if dim == 2 else 0.05)
    assert row["val_kl"] == pytest.approx(kl, abs=1e-4 if dim == 2 else 0.02 + 4 * row["val_kl_se"])
    assert row["val_nll"] == pytest.approx(kl + entropy, abs=0.05)
    assert abs(row["flow_log_z"] + 3) < 4.5 * row["flow_log_z_se"] < 0.2
    assert 0 < row["flow_ess"] <= 1


def test_the_divergence_of_a_toy_is_that_of_another_quadrature():
    toy = TOYS["checkerboard"]()
    model = SimpleNamespace(energy=lambda x: x.square().sum(1) / 30, flow=None)
    ticks = torch.arange(-13, 13.25, 0.25, dtype=torch.float64)
    x = torch.cartesian_prod(ticks, ticks)
    p = toy.log_prob(x).exp() * 0.25**2
    kl = (p * (toy.log_prob(x) + x.square().sum(1) / 30 + math.log(30 * math.pi))).sum().item()
    row = Exact(toy, 1000, 2, "cpu").figures(model, None)
    assert row["log_z"] == pytest.approx(math.log(30 * math.pi), abs=2e-3)
    assert row["val_kl"] == pytest.approx(kl, abs=2e-3) and "weights" not in row


def test_crossings_and_autocorrelation_are_those_of_chains_that_draw_a_new_mode_at_every_jump():
    """A flow that is the density is always accepted: of independent draws 0.7 change the mode, and τ is one round."""
    p = mixture(2)
    args = parse(arguments("unused", "--mixing-rounds", "200", "--local-steps", "4"))
    exact = Exact(p, 100, 2, "cpu")
    model = SimpleNamespace(energy=lambda x: -p.log_prob(x), flow=p)
    row = mixing(args, model, p.sample(300), 0.1, exact)
    assert row["crossings"] == pytest.approx(0.7 / 5 * 1000, rel=0.05)
    assert row["autocorrelation_time"] == pytest.approx(5, rel=0.2) and row["followed"] == 1000
    alone = SimpleNamespace(energy=model.energy, flow=None)  # with steps so short that no chain has the luck to cross
    stuck = mixing(args, alone, p.sample(300), 0.001, exact)
    assert stuck["crossings"] == 0 and 50 * stuck["autocorrelation_time"] > stuck["followed"]
    one = mixing(args, alone, p.means[:1].float().expand(8, 2), 0.001, exact)
    assert one["autocorrelation_time"] is None


def test_the_gaussian_base_has_the_mean_and_covariance_of_the_data_and_is_normalised():
    x = mixture(4).sample(3000)
    normal = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov())
    torch.testing.assert_close(gaussian(x).log_prob(x).float(), normal.log_prob(x), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler, stop", [("flow", 1), ("flow", 2), ("short", 2)])
def test_a_run_that_is_stopped_and_resumed_ends_exactly_like_an_undisturbed_one(tmp_path, monkeypatch, sampler, stop):
    main(arguments(tmp_path / "whole", "--sampler", sampler))
    save, saved = run.Run.save, []

    def stop_after(self, state):
        save(self, state)
        saved.append(state)
        if len(saved) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.Run, "save", stop_after)
    with pytest.raises(SystemExit) as exit:
        main(arguments(tmp_path / "stopped", "--sampler", sampler))
    assert exit.value.code == 130 and len(rows(tmp_path / "stopped")) == stop
    main(arguments(tmp_path / "stopped", "--sampler", sampler, "--resume"))
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "stopped"), strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    whole, stopped = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["state"]
                      for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys() and torch.equal(whole["chains"], stopped["chains"])
    for name in ("model", "average", "optimizer"):
        assert all(torch.equal(a, b) for a, b in zip(tensors(whole[name]), tensors(stopped[name]), strict=True))


def tensors(state):
    if isinstance(state, dict):
        return [t for value in state.values() for t in tensors(value)]
    return [state] if isinstance(state, torch.Tensor) else []


# ---------------------------------------------------------------------------------------------------------
# Failing
# ---------------------------------------------------------------------------------------------------------


def test_errors_are_one_line(tmp_path, capsys):
    main(arguments(tmp_path / "run"))
    assert "--resume" in fails(capsys, *arguments(tmp_path / "run"))
    assert "dim is 2 there and 3 here" in fails(capsys, *arguments(tmp_path / "run", "--dim", "3", "--resume"))
    assert "lr is 0.002 there and 0.1 here" in fails(capsys, *arguments(tmp_path / "run", "--lr", "0.1", "--resume"))
    assert "nothing to resume" in fails(capsys, *arguments(tmp_path / "none", "--resume"))
    assert "invalid choice: 'gibbs'" in fails(capsys, "--sampler", "gibbs")
    assert "--dim must be 2" in fails(capsys, "--data", "swirl", "--dim", "3")
    assert "--dim must be 2" in fails(capsys, "--dim", "1")
    assert "--chains must be positive" in fails(capsys, "--chains", "0")


def test_a_flow_and_an_energy_of_different_dimensions_are_an_error_of_one_line():
    energy = Energy(torch.ones(3), torch.zeros(3), 8)
    with pytest.raises(RunError, match=r"the flow takes events of shape \(2,\) and the energy of \(3,\)") as error:
        Model(energy, toy_flow(dim=2, blocks=1, width=4), gaussian(torch.randn(10, 3)))
    assert "\n" not in str(error.value)


def test_chains_that_leave_the_finite_range_name_the_step_and_the_last_checkpoint_is_kept(tmp_path, capsys):
    main(arguments(tmp_path, "--no-adjusted", "--epochs", "2"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"epochs": 3}))
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    checkpoint["config"]["epochs"] = 3
    checkpoint["state"]["step_size"].fill_(1e30)
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    line = fails(capsys, *arguments(tmp_path, "--no-adjusted", "--resume"))
    assert "non-finite" in line and "epoch 3, step 1" in line and "kept" in line
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_an_energy_that_diverges_is_an_error_that_names_the_step(tmp_path, capsys):
    line = fails(capsys, *arguments(tmp_path, "--lr", "1e30", "--warmup", "0"))
    assert "epoch 1" in line and "lower --lr" in line or "epoch 1, step" in line and "not finite" in line


def test_acceptance_that_stays_at_zero_is_a_warning_with_the_likely_cause(tmp_path, capsys, monkeypatch):
    """A flow that proposes where the energy is far too high; Langevin steps that are far too long."""
    monkeypatch.setattr(train_ebm, "start", lambda args, model, data, device: model.flow.layers[1].bias.data.fill_(1e4))
    main(arguments(tmp_path / "flow", "--flow-lr", "1e-9"))
    assert "warning: none of the flow's proposals was accepted in epoch 3" in capsys.readouterr().err
    main(arguments(tmp_path / "langevin", "--sampler", "langevin", "--step-size", "1e6"))
    assert "warning: Langevin accepted nothing in epoch 1: lower --step-size" in capsys.readouterr().err


def test_where_few_draws_carry_the_weight_log_z_is_not_reported(tmp_path, capsys):
    main(arguments(tmp_path))  # 100 draws in each evaluation, 500 at the end, of a flow that has learnt nothing
    assert rows(tmp_path)[0]["flow_log_z"] is None
    p = mixture(2)
    exact = Exact(p, 4000, 2, "cpu")
    model = SimpleNamespace(energy=lambda x: -p.log_prob(x), flow=Mixture([1.0], [[30.0, 0.0]], 5.0))
    row = exact.figures(model, p.sample(8))
    assert row["flow_log_z"] is None and row["flow_log_z_se"] is None
    filled = row | {"test_nll": 0.0, "test_kl": 0.0, "crossings": 0.0, "autocorrelation_time": None, "acceptance": 0.5,
                    "flow_acceptance": 0.0, "seconds": 1.0}
    assert "log Z, by the flow      not reported: the effective sample size is below 100" in table(
        parse([]), exact, filled)


@pytest.mark.parametrize("sampler", DEFAULTS)
def test_a_step_runs_on_the_meta_device(sampler):
    """Where there is no memory, a tensor made on another device shows."""
    args = parse(arguments("unused", "--sampler", sampler))
    model = make_model(args, mixture(3).sample(200)).to("meta")
    optimizers = [torch.optim.SGD([as_vector(part)]) if part else None for part in (model.energy, model.flow)]
    x = torch.empty(16, 3, device="meta")
    chains, step_size, trace = train_step(args, model, x, torch.tensor(0.1, device="meta"), x, *optimizers)
    assert chains.is_meta and step_size.is_meta and trace.is_meta and trace.shape == (6,)


def test_the_experiment_makes_its_table_and_figures_and_trains_nothing_twice(tmp_path, capsys, monkeypatch):
    small = [*arguments("unused")[2:], "--runs", str(tmp_path), "--results", str(tmp_path / "results"), "--seeds", "0"]
    balanced.main(["--dims", "2", *small])
    printed = capsys.readouterr().out
    assert {p.name for p in (tmp_path / "results").iterdir()} == {"balanced.json", "ebm-weights.png", "ebm-density.png"}
    assert [line.split(" | ")[1] for line in printed.splitlines() if line.startswith("| 2 |")] == list(DEFAULTS)
    monkeypatch.setattr(train_ebm, "train", None)
    balanced.main(["--dims", "2", *small])
    monkeypatch.undo()
    balanced.main(["--dims", "3", *small])  # beside what is there
    table = json.loads((tmp_path / "results" / "balanced.json").read_text())["runs"]
    assert [(row["dim"], row["sampler"]) for row in table] == [(dim, sampler) for dim in (2, 3) for sampler in DEFAULTS]


def test_a_run_that_breaks_down_is_a_row_of_the_table_and_not_its_end(tmp_path, capsys):
    small = [*arguments("unused")[2:], "--runs", str(tmp_path), "--results", str(tmp_path / "results"), "--seeds", "0"]
    balanced.main(["--dims", "2", *small, "--lr", "1e30", "--clip", "0", "--warmup", "0"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 2 |")]
    assert len(lines) == len(DEFAULTS) and all("(1 of 1 broke down)" in line for line in lines)
    runs = json.loads((tmp_path / "results" / "balanced.json").read_text())["runs"]
    assert all("at epoch 1" in row["stopped"] for row in runs)


def test_every_schedule_runs(tmp_path):
    main(arguments(tmp_path, "--schedule", "steps", "--decay", "0.5"))
    assert len(rows(tmp_path)) > 1
