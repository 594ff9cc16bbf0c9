"""What `train_ebm.py` alone does: its chains, its step, its start; and judge.py against exact figures."""

import contextlib
import io
import math
from types import SimpleNamespace

import pytest
import torch

import losses
import train_ebm
from conftest import checkpoint, rows, without_pictures
from densities import Mixture, gmm40, mixture
from judge import Truth, mixing
from sampling import Report
from support import plots, settings
from support.optimization import trainable
from train_ebm import FIGURES, FINAL, Settings, follow, gaussian, main, make_model, step

SAMPLERS = ("flow", "langevin", "tempering", "short")
EPOCHS, STEPS = 3, 4


def arguments(out, *extra):
    return ["--out", str(out), "--epochs", str(EPOCHS), "--steps", str(STEPS), "--chains", "48", "--batch-size", "64",
            "--blocks", "2", "--width", "8", "--energy-width", "8", "--start-steps", "5", "--test-points", "400",
            "--mixing-rounds", "3", "--local-steps", "3", "--device", "cpu", *extra]


def parse(*flags):
    return settings.parse(Settings, arguments("unused", *flags))


def optimizers(model, *lrs):
    parts = [part for part in (model.energy, model.flow) if part is not None]
    return [torch.optim.SGD(trainable(part), lr) for part, lr in zip(parts, lrs)] + [None] * (2 - len(parts))




def test_with_the_flow_the_mode_weights_come_out_right_and_with_langevin_alone_they_do_not(tmp_path, no_pictures):
    """A quarter of the default run, from the same start: as many chains in each of four modes of weights 0.1 to 0.4."""
    fast = ["--epochs", "12", "--steps", "25", "--chains", "250", "--batch-size", "250", "--energy-width", "64",
            "--lr", "5e-3", "--blocks", "3", "--width", "32", "--start-steps", "200", "--flow-lr", "4e-3",
            "--test-points", "800", "--mixing-rounds", "50", "--local-steps", "4"]
    metrics = {}
    for sampler in ("flow", "langevin"):
        main(arguments(tmp_path / sampler, "--sampler", sampler, *fast))
        metrics[sampler] = rows(tmp_path / sampler)
    flow, langevin = metrics["flow"][-1], metrics["langevin"][-1]
    assert flow["tv"] < 0.06 and flow["test_kl"] < 0.25
    assert abs(flow["flow_log_z"] - flow["log_z"]) < 5 * flow["flow_log_z_se"]
    # Without the flow the weights swing to and fro, and may be right for a moment.
    assert sum(row["tv"] for row in metrics["langevin"][6:]) > 5 * sum(row["tv"] for row in metrics["flow"][6:])
    assert langevin["autocorrelation_time"] > 3 * flow["autocorrelation_time"]


def test_a_step_moves_theta_by_the_gradient_of_sml_and_alpha_by_that_of_ml_on_the_chains_where_they_went(monkeypatch):
    s = parse("--no-adjusted")
    x, before, after = torch.randn(40, 2), torch.randn(30, 2), 2 + torch.randn(30, 2)
    model = make_model(s, x)
    rates, seen, step_size = torch.linspace(0, 1, 30), [], torch.tensor([0.1])
    monkeypatch.setattr(train_ebm, "CLIP", math.inf)
    monkeypatch.setattr(train_ebm, "alternate", lambda *args: seen.append(args) or (after, Report(0.1, None, rates)))
    loss = {"energy": losses.sml(model.energy, x, after), "flow": losses.ml(model.flow.log_prob, after)}
    parts = {"energy": (trainable(model.energy), 0.1), "flow": (trainable(model.flow), 0.03)}
    expected, norms = {}, {}
    for name, (parameters, lr) in parts.items():
        gradients = torch.autograd.grad(loss[name], parameters)
        expected[name] = [p - lr * g for p, g in zip(parameters, gradients)]
        norms[name] = math.sqrt(sum(g.square().sum().item() for g in gradients))
    chains, new_step_size, figures = step(s, model, before[None], step_size, x, *optimizers(model, 0.1, 0.03))
    (energy, flow, start, *numbers), = seen
    assert energy is model.energy and flow is model.flow and torch.equal(start, before)
    assert numbers == [1, 3, step_size[0], False]
    assert torch.equal(chains, after[None]) and new_step_size is step_size  # unadjusted, it stays
    assert figures.keys() == set(FIGURES) - {"acceptance"}  # no step can be rejected
    assert figures["loss"] == loss["energy"] and figures["flow_loss"] == loss["flow"]
    assert figures["grad_norm"].item() == pytest.approx(norms["energy"])
    assert figures["flow_grad_norm"].item() == pytest.approx(norms["flow"])
    assert figures["global_acceptance"].item() == pytest.approx(0.5)
    for name, (parameters, _) in parts.items():
        torch.testing.assert_close(parameters, expected[name])


def test_a_gradient_is_clipped_to_a_norm_of_10_and_its_own_norm_is_reported():
    p = torch.nn.Parameter(torch.zeros(2))
    loss, norm = follow((p * torch.tensor([30.0, 40.0])).sum(), torch.optim.SGD([p], lr=1.0))
    assert loss == 0 and norm == 50
    torch.testing.assert_close(p.detach(), torch.tensor([-6.0, -8.0]))


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.574, 1.0])
def test_the_step_size_goes_to_where_langevin_accepts_57_4_percent(monkeypatch, rate):
    s, x = parse(), torch.randn(40, 2)
    model = make_model(s, x)
    monkeypatch.setattr(train_ebm, "alternate",
                        lambda *args: (x, Report(0.1, torch.full((40,), rate), torch.zeros(40))))
    _, step_size, figures = step(s, model, x[None], torch.tensor([0.1]), x, *optimizers(model, 0.1, 0.1))
    assert step_size.item() == pytest.approx(0.1 * math.exp(0.05 * (rate - 0.574)))
    assert figures["acceptance"].item() == pytest.approx(rate)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run in three dimensions with each sampler.   -> {sampler: (directory, its warnings)}"""
    runs = {}
    for sampler in SAMPLERS:
        out = tmp_path_factory.mktemp(sampler)
        with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stderr(io.StringIO()) as said:
            without_pictures(patched)
            main(arguments(out, "--sampler", sampler, "--dim", "3"))
        runs[sampler] = rows(out), said.getvalue()
    return runs


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_row_has_what_the_sampler_measures_and_chains_that_move_have_no_warning(finished, sampler):
    metrics, said = finished[sampler]
    first, last = metrics[0], metrics[-1]
    assert all(first[name] is None for name in FIGURES) and first["chains"] == pytest.approx([0.25] * 4)
    assert all(0 < row["acceptance"] <= 1 for row in metrics[1:])
    for name in ("flow_loss", "flow_grad_norm"):
        assert all((row[name] is not None and row[name] > 0) == (sampler == "flow") for row in metrics[1:])
    assert all((row["global_acceptance"] is not None) == (sampler in ("flow", "tempering")) for row in metrics[1:])
    assert sum(last["draws"]) == pytest.approx(1) and sum(last["chains"]) == pytest.approx(1)
    known = last["ess"] >= 0.01
    assert all((last[name] is not None) == known for name in ("test_nll", "test_kl", "weights", "tv", "log_z", "tv_se"))
    assert last.get("followed") == {"flow": 12, "tempering": 12, "langevin": 9, "short": None}[sampler]
    assert ("flow_log_z" in last) == (sampler == "flow") == (FINAL.keys() <= last.keys())
    sizes = [row["step_size"] for row in metrics]
    assert sizes[0] == pytest.approx(0.3) and len(set(sizes)) == EPOCHS + 1  # it adapts
    assert "acceptance" not in said


def test_with_tempering_theta_follows_the_chains_at_temperature_one_and_each_temperature_has_its_step(monkeypatch):
    """The coldest replica teaches θ. Each step size goes to where Langevin accepts 57.4 % at its temperature."""
    s, x = parse("--sampler", "tempering", "--replicas", "3", "--hottest", "4"), torch.randn(40, 2)
    assert train_ebm.ladder(s, "cpu").tolist() == pytest.approx([1, 2, 4])
    model, seen = make_model(s, x), []
    rates, chains = torch.tensor([0.2, 0.574, 0.9]), torch.randn(3, 40, 2)
    monkeypatch.setattr(train_ebm, "tempering", lambda *args: seen.append(args[2:]) or (
        chains, Report(args[-1], rates[:, None].expand(3, 40), torch.full((2, 40), 0.5))))
    expected = losses.sml(model.energy, x, chains[0])
    moved, step_size, figures = step(s, model, chains, 0.1 * torch.tensor([1.0, 2.0, 4.0]), x, *optimizers(model, 0.1))
    assert moved is chains and figures["loss"] == expected and figures["global_acceptance"] == 0.5
    torch.testing.assert_close(step_size, torch.tensor([0.1, 0.2, 0.4]) * (0.05 * (rates - 0.574)).exp())
    (temperatures, steps, sizes), = seen
    assert temperatures.tolist() == pytest.approx([1, 2, 4]) and steps == 3
    assert sizes.tolist() == pytest.approx([0.1, 0.2, 0.4])


# ---- How it starts ---------------------------------------------------------------------------------------------------

def test_weights_modes_and_distance_are_those_of_the_command_line_and_chains_start_as_asked(tmp_path, no_pictures):
    """Three modes, 1 : 1 : 2, 7 apart. Chains start equally often in each, or like the data, at all temperatures."""
    flags = ["--weights", "1,1,2", "--distance", "7", "--sampler", "tempering", "--chains", "3000", "--epochs", "1"]
    data = train_ebm.density(parse(*flags[:4]))
    assert data.weights.tolist() == [0.25, 0.25, 0.5]
    torch.testing.assert_close(torch.pdist(data.means), torch.full((3,), 7.0, dtype=torch.float64))
    for start, shares in (("equal", [1 / 3] * 3), ("data", [0.25, 0.25, 0.5])):
        main(arguments(tmp_path / start, *flags, "--start", start))
        first, state = rows(tmp_path / start)[0], checkpoint(tmp_path / start)["state"]
        assert first["chains"] == pytest.approx(shares, abs=0.03) and first["step_size"] == pytest.approx(0.3)
        assert state["chains"].shape == (8, 3000, 2) and state["step_size"].shape == (8,)
        assert state["step_size"][-1] > 3 * state["step_size"][0]  # steps at temperature 10 start 10 times as long


def test_gmm40_has_the_means_and_the_width_of_its_source():
    p = gmm40()
    torch.manual_seed(0)
    torch.testing.assert_close(p.means.float(), (torch.rand(40, 2) - 0.5) * 2 * 40)
    assert p.weights.tolist() == pytest.approx([1 / 40] * 40)
    torch.testing.assert_close(p.std, torch.nn.functional.softplus(torch.ones(40, dtype=torch.float64)))
    assert gmm40(5).means.shape == (40, 5)


def test_a_base_that_is_the_flow_starts_there_and_is_held(tmp_path, no_pictures):
    main(arguments(tmp_path, "--base", "flow"))
    s, saved = parse("--base", "flow"), checkpoint(tmp_path)["state"]["model"]
    torch.manual_seed(0)
    model = make_model(s, mixture(2).sample(5000))
    unfitted = {name: tensor.clone() for name, tensor in model.energy.base.state_dict().items()}
    train_ebm.start_from(s, model, train_ebm.fit_flow(s, mixture(2), "cpu"))
    fitted, flow = model.energy.base.state_dict(), model.flow.state_dict()
    assert not trainable(model.energy.base) and all(p.requires_grad for p in model.flow.parameters())
    assert all(torch.equal(tensor, saved[f"energy.base.{name}"]) for name, tensor in fitted.items())
    assert all(torch.equal(tensor, flow[name]) for name, tensor in fitted.items())
    assert any(not torch.equal(tensor, unfitted[name]) for name, tensor in fitted.items())


def test_the_fit_of_the_flow_goes_down_the_nll_of_the_data():
    """The flow starts at the scale of the data and learns their correlation of 0.95, which is worth 1.16 nats."""
    s, factor = parse("--start-steps", "60", "--flow-lr", "3e-2"), torch.tensor([[1.0, 0.95], [0.0, 0.312]])
    data = SimpleNamespace(sample=lambda n, device="cpu": torch.randn(n, 2, device=device) @ factor)
    x = data.sample(2000)
    before = train_ebm.make_flow(s, data.sample(2000)).log_prob(x).mean()
    assert train_ebm.fit_flow(s, data, "cpu").log_prob(x).mean() > before + 0.9


def test_short_chains_start_from_noise_each_time_and_the_others_go_on():
    x = mixture(2).sample(2000)
    for sampler in SAMPLERS:
        s = parse("--sampler", sampler, "--local-steps", "1")
        model = make_model(s, x)
        T = train_ebm.ladder(s, "cpu")
        model.flow, start = None, torch.full((len(T), 500, 2), 3.0)
        chains, _, _ = step(s, model, start, 1e-12 * T, x, *optimizers(model, 1e-3))
        if sampler == "short":
            torch.testing.assert_close(chains[0].T.cov(), x.T.cov(), rtol=0.3, atol=3)
        else:
            torch.testing.assert_close(chains, start, rtol=0, atol=1e-4)


def test_the_gaussian_base_has_the_mean_and_covariance_of_the_data_and_is_normalised():
    x = mixture(4).sample(3000)
    normal = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov())
    torch.testing.assert_close(gaussian(x).log_prob(x).float(), normal.log_prob(x), rtol=1e-4, atol=1e-4)


# ---- The figures -----------------------------------------------------------------------------------------------------

def other(dim):
    """An unnormalised density whose figures are known: other weights, wider modes, exp(-E) = e^-3 times a mixture."""
    p = mixture(dim)
    q = Mixture([0.4, 0.3, 0.2, 0.1], p.means, 1.1)
    return SimpleNamespace(energy=lambda x: 3 - q.log_prob(x), flow=Mixture([0.25] * 4, p.means, 1.2)), q


@pytest.mark.parametrize("dim", [2, 8, 32])
def test_the_figures_of_a_known_energy_are_the_closed_form_ones(dim):
    model, q = other(dim)
    truth = Truth(mixture(dim), 100_000, dim, "cpu")
    row = truth.figures(model, truth.data.sample(4000, equally=True))
    tolerance = 1e-4 if dim == 2 else 0.02  # quadrature; importance sampling
    assert row["log_z"] == pytest.approx(-3, abs=tolerance)
    assert row["weights"] == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=tolerance)
    assert row["chains"] == pytest.approx([0.25] * 4, abs=1e-6)
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


@pytest.mark.parametrize("dim", [2, 8, 64])
def test_the_true_density_itself_is_judged_without_an_error(dim):
    p = mixture(dim)
    model = SimpleNamespace(energy=lambda x: 5 - p.log_prob(x), flow=None)
    row = Truth(p, 2000, dim, "cpu").figures(model, p.sample(8))
    for name in ("tv", "tv_se", "val_kl", "val_kl_se", "log_z_se"):
        assert row[name] == pytest.approx(0, abs=2e-6 * dim), name
    assert row["log_z"] == pytest.approx(-5, abs=1e-5)


def test_the_judge_s_own_errors_are_those_that_its_figures_scatter_with(monkeypatch):
    """Over 60 sets of points: log Z, the weights and KL of a wrong density, against the standard errors given."""
    dim, manual_seed = 8, torch.manual_seed
    model, _ = other(dim)
    model.flow = None
    rows = []
    for seed in range(60):
        monkeypatch.setattr(torch, "manual_seed", lambda _: manual_seed(seed))
        rows.append(Truth(mixture(dim), 4000, dim, "cpu").figures(model, torch.zeros(1, dim)))
    for name in ("log_z", "val_kl"):
        scatter = torch.tensor([row[name] for row in rows]).std().item()
        assert 0.7 < scatter / (sum(row[f"{name}_se"] for row in rows) / 60) < 1.4, name
    off = (torch.tensor([row["weights"] for row in rows]) - torch.tensor([0.4, 0.3, 0.2, 0.1])).abs().sum(1) / 2
    error = sum(row["tv_se"] for row in rows) / 60  # ½ Σ σ_k; of a normal error the mean magnitude is 0.8 σ
    assert 0.7 < off.mean() / error < 0.9


def test_a_density_far_from_the_true_modes_has_no_figures():
    p = mixture(8)
    model = SimpleNamespace(energy=lambda x: 0.5 * (x - 30).square().sum(1), flow=None)
    row = Truth(p, 2000, 8, "cpu").figures(model, p.sample(8))
    assert row["ess"] < 0.01
    assert {name for name, value in row.items() if value is None} == {
        "log_z", "log_z_se", "val_nll", "val_kl", "val_kl_se", "weights", "tv", "tv_se"}


def test_where_few_draws_carry_the_weight_log_z_is_not_reported():
    p = mixture(2)
    model = SimpleNamespace(energy=lambda x: -p.log_prob(x), flow=Mixture([1.0], [[30.0, 0.0]], 5.0))
    row = Truth(p, 4000, 2, "cpu").figures(model, p.sample(8))
    assert row["flow_log_z"] is None and row["flow_log_z_se"] is None and row["flow_ess"] < 0.1


def test_crossings_and_autocorrelation_are_those_of_chains_that_draw_a_new_mode_at_every_jump():
    """A flow that is the density is always accepted: of independent draws 0.7 change the mode, and τ is one round."""
    p = mixture(2)
    s = parse("--mixing-rounds", "200", "--local-steps", "4")
    truth = Truth(p, 100, 2, "cpu")
    model = SimpleNamespace(energy=lambda x: -p.log_prob(x), flow=p)

    def mixed(s, flow, step_size, chains):
        model.flow = flow
        return mixing(s, lambda x: train_ebm.move(s, model, x, torch.tensor([step_size])), chains[None], truth)

    row = mixed(s, p, 0.1, p.sample(300))
    assert row["crossings"] == pytest.approx(0.7 / 5 * 1000, rel=0.05)
    assert row["autocorrelation_time"] == pytest.approx(5, rel=0.2) and row["followed"] == 1000
    assert row["draws"] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.01)  # 40,000 draws
    assert row["draws_tv"] == pytest.approx(sum(abs(d - w) for d, w in zip(row["draws"], [0.1, 0.2, 0.3, 0.4])) / 2)
    s = parse("--mixing-rounds", "200", "--local-steps", "4", "--sampler", "langevin")
    stuck = mixed(s, None, 0.001, p.sample(300, equally=True))  # steps so short that no chain has the luck to cross
    assert stuck["crossings"] == 0 and 50 * stuck["autocorrelation_time"] > stuck["followed"] == 800
    assert stuck["draws_tv"] == pytest.approx(0.2, abs=1e-3)
    one = mixed(s, None, 0.001, p.means[:1].float().expand(8, 2))
    assert one["autocorrelation_time"] is None


def test_short_chains_are_judged_by_the_draws_that_they_make_from_noise_and_have_no_crossings():
    s, p = parse("--sampler", "short", "--mixing-rounds", "50"), mixture(2)
    model = SimpleNamespace(energy=lambda x: -p.log_prob(x), flow=None, start=Mixture([1.0], [p.means[0].tolist()]))
    row = mixing(s, lambda x: train_ebm.move(s, model, x, torch.tensor([0.1])), p.sample(100)[None],
                 Truth(p, 100, 2, "cpu"))
    assert row.keys() == {"draws", "draws_tv"} and row["draws_tv"] == pytest.approx(0.9, abs=0.01)


def test_chains_outside_the_picture_leave_their_panel_empty():
    s = parse("--dim", "3", "--sampler", "langevin")
    data = train_ebm.density(s)
    figure = plots.ebm(make_model(s, data.sample(300)), Truth(data, 400, 3, "cpu"), torch.full((1, 3), 1e3), 0.0)
    assert [one.get_title() for one in figure.axes] == ["truth p", "energy p_θ", "chains"]


# ---- Failing ---------------------------------------------------------------------------------------------------------

def test_acceptance_that_stays_at_zero_is_a_warning_with_the_likely_cause(tmp_path, capsys, monkeypatch, no_pictures):
    """A flow that proposes where the energy is far too high; Langevin steps that are far too long."""
    monkeypatch.setattr(train_ebm, "start_from", lambda s, model, flow: model.flow.layers[1].bias.data.fill_(1e4))
    main(arguments(tmp_path / "flow", "--flow-lr", "1e-9"))
    printed = capsys.readouterr().err
    for epoch in range(1, EPOCHS + 1):
        assert f"global_acceptance 0 in epoch {epoch}" in printed and "--start-steps" in printed
    assert "epoch 0" not in printed and "--step-size" not in printed
    main(arguments(tmp_path / "langevin", "--sampler", "langevin", "--step-size", "1e6"))
    printed = capsys.readouterr().err
    assert " acceptance 0 in epoch 1" in printed and "--step-size" in printed and "global" not in printed
