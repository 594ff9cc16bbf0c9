"""The command `train_ebm.py`: what it learns, its figures against exact ones, that it resumes exactly, how it fails."""

import contextlib
import io
import json
import math
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

import losses
import train_ebm
from conftest import assert_same_bits, checkpoint, failing, stop_after, timeless, under_torchrun
from data import TOYS, Mixture, gmm40, mixture
from experiments import balanced
from sampling import Report
from support import plots, settings
from support.judge import Truth, mixing
from support.optimization import trainable
from support.run import Run, read_metrics
from train_ebm import FIGURES, follow, gaussian, main, make_model, step

FILES = {"checkpoint.pt", "config.json", "metrics.jsonl", "density.png", "mode_weights.png"}
SAMPLERS = ("flow", "langevin", "tempering", "short")
EPOCHS, STEPS, START_STEPS = 3, 4, 5


def arguments(out, *extra):
    return ["--out", str(out), "--epochs", str(EPOCHS), "--steps", str(STEPS), "--chains", "48", "--batch-size", "64",
            "--blocks", "2", "--width", "8", "--energy-width", "8", "--start-steps", str(START_STEPS),
            "--test-points", "400", "--mixing-rounds", "3", "--local-steps", "3", "--device", "cpu", *extra]


def parse(*flags):
    return settings.parse(settings.Ebm, arguments("unused", *flags))


def optimizers(model, *lrs):
    parts = [part for part in (model.energy, model.flow) if part is not None]
    return [torch.optim.SGD(trainable(part), lr) for part, lr in zip(parts, lrs)] + [None] * (2 - len(parts))


fails = failing(main)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run in three dimensions with each sampler.   -> {sampler: (directory, what was printed)}"""
    runs = {}
    for sampler in SAMPLERS:
        out, printed = tmp_path_factory.mktemp(sampler), io.StringIO()
        with contextlib.redirect_stdout(printed):
            main(arguments(out, "--sampler", sampler, "--dim", "3"))
        runs[sampler] = out, printed.getvalue()
    return runs


def without_pictures(monkeypatch):
    """Runs from now on draw nothing, which would take most of their time."""
    for name in ("ebm", "mode_weights"):
        monkeypatch.setattr(plots, name, lambda *args: None)
    monkeypatch.setattr(Run, "picture", lambda *args: None)


@pytest.fixture
def bare(monkeypatch):
    without_pictures(monkeypatch)


# ---- What it learns --------------------------------------------------------------------------------------------------

def test_with_the_flow_the_mode_weights_come_out_right_and_with_langevin_alone_they_do_not(tmp_path, bare):
    """A quarter of the default run, from the same start: as many chains in each of four modes of weights 0.1 to 0.4."""
    fast = ["--epochs", "12", "--steps", "25", "--chains", "250", "--batch-size", "250", "--energy-width", "64",
            "--lr", "5e-3", "--blocks", "3", "--width", "32", "--start-steps", "200", "--flow-lr", "4e-3",
            "--test-points", "800", "--mixing-rounds", "50", "--local-steps", "4"]
    metrics = {}
    for sampler in ("flow", "langevin"):
        main(arguments(tmp_path / sampler, "--sampler", sampler, *fast))
        metrics[sampler] = read_metrics(tmp_path / sampler)
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


def test_the_step_size_of_a_run_adapts_unless_langevin_accepts_everything(finished, tmp_path, bare):
    sizes = [row["step_size"] for row in read_metrics(finished["langevin"][0])]
    assert sizes[0] == pytest.approx(0.3) and len(set(sizes)) == EPOCHS + 1
    assert checkpoint(finished["langevin"][0])["state"]["step_size"].item() == sizes[-1]
    main(arguments(tmp_path, "--sampler", "langevin", "--no-adjusted", "--epochs", "1"))
    assert [row["step_size"] for row in read_metrics(tmp_path)] == pytest.approx([0.3, 0.3])


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run whose learning rates differ.   -> its directory; of each step the rates, and θ and α after it"""
    seen = []

    def watching(s, model, chains, step_size, x, optimizer, flow_optimizer):
        rates = [one.param_groups[0]["lr"] for one in (optimizer, flow_optimizer)]
        own = [{id(p) for group in one.param_groups for p in group["params"]} for one in (optimizer, flow_optimizer)]
        assert own == [{id(p) for p in trainable(part)} for part in (model.energy, model.flow)]
        result = step(s, model, chains, step_size, x, optimizer, flow_optimizer)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        seen.append((rates, {name: model.state_dict()[name].clone() for name in names}))
        return result

    out = tmp_path_factory.mktemp("watched")
    with pytest.MonkeyPatch.context() as patched:
        without_pictures(patched)
        patched.setattr(train_ebm, "step", watching)
        main(arguments(out, "--lr", "0.01", "--flow-lr", "0.003"))
    return out, seen


def test_both_learning_rates_move_at_every_step_along_the_cosine_each_from_its_own_peak(watched):
    total = EPOCHS * STEPS
    assert len(watched[1]) == total
    for n, (rates, _) in enumerate(watched[1]):
        fraction = min(1.0, n / total / 0.05) * (1 + math.cos(math.pi * n / total)) / 2
        assert rates == pytest.approx([0.01 * fraction, 0.003 * fraction])


def test_the_average_of_a_run_is_the_recursion_over_its_steps_of_both_networks(watched):
    out, seen = watched
    saved = checkpoint(out)["state"]
    for name, last in seen[-1][1].items():
        average = seen[0][1][name]
        for n, (_, weights) in enumerate(seen[1:], start=1):
            m = (1 + n) / (10 + n)  # less than 0.99 in so short a run
            average = m * average + (1 - m) * weights[name]
        torch.testing.assert_close(saved["averaged"][name], average)
        assert torch.equal(saved["model"][name], last)
        assert not torch.equal(last, seen[0][1][name]), f"{name} is not trained"


def test_the_average_remembers_99_percent_at_a_step_of_a_long_run(tmp_path, bare, monkeypatch):
    seen, update = [], train_ebm.update_average
    monkeypatch.setattr(train_ebm, "update_average",
                        lambda averages, parameters, n, m: (update(averages, parameters, n, m), seen.append((n, m))))
    main(arguments(tmp_path, "--epochs", "1", "--sampler", "langevin"))
    assert seen == [(n, 0.99) for n in range(STEPS)]


def test_the_figures_of_a_run_are_those_of_the_average(watched):
    out, _ = watched
    saved, last = checkpoint(out)["state"], read_metrics(out)[-1]
    model = make_model(parse(), mixture(2).sample(100))
    model.load_state_dict(saved["averaged"])
    figures = Truth(mixture(2), 5 * 400, 2, "cpu").figures(model, saved["chains"][0])
    for name, value in figures.items():
        if value is not None:
            assert last[name.replace("val_", "test_")] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("other", [["--seed", "0"], ["--seed", "1"]])
def test_every_epoch_and_every_seed_draws_its_own_data(tmp_path, monkeypatch, bare, other):
    seen, sample = [], Mixture.sample
    monkeypatch.setattr(Mixture, "sample", lambda self, n, *a, **k: seen.append(sample(self, n, *a, **k)) or seen[-1])
    main(arguments(tmp_path / "a"))
    first = [x for x in seen if len(x) == 64]  # of the training steps
    assert len({x.sum().item() for x in first}) == len(first) == START_STEPS + EPOCHS * STEPS
    seen.clear()
    main(arguments(tmp_path / "b", *other))
    again = [x for x in seen if len(x) == 64]
    assert all(torch.equal(x, y) == (other == ["--seed", "0"]) for x, y in zip(first, again, strict=True))


# ---- What it writes --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs_and_leaves_its_files(finished, sampler):
    out, printed = finished[sampler]
    assert {p.name for p in out.iterdir()} == FILES
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in FILES if name.endswith("png"))
    assert json.loads((out / "config.json").read_text())["sampler"] == sampler
    metrics, lines = read_metrics(out), printed.splitlines()
    assert [row["step"] for row in metrics] == [0, 4, 8, 12] and [row["epoch"] for row in metrics] == [0, 1, 2, 3]
    assert [line.split()[1] for line in lines if line.startswith("epoch ")] == list("0123")
    assert all(metrics[0][name] is None for name in FIGURES) and metrics[0]["chains"] == pytest.approx([0.25] * 4)
    assert all(row["grad_norm"] > 0 and 0 < row["acceptance"] <= 1 for row in metrics[1:])
    for name in ("flow_loss", "flow_grad_norm"):
        assert all((row[name] is not None and row[name] > 0) == (sampler == "flow") for row in metrics[1:])
    assert all((row["global_acceptance"] is not None) == (sampler in ("flow", "tempering")) for row in metrics[1:])
    seconds, last = [row["seconds"] for row in metrics], metrics[-1]
    assert seconds[0] > 0 and seconds == sorted(seconds)
    assert sum(last["draws"]) == pytest.approx(1) and sum(last["chains"]) == pytest.approx(1)
    known = last["ess"] >= 0.01
    assert all((last[name] is not None) == known for name in ("test_nll", "test_kl", "weights", "tv", "log_z", "tv_se"))
    for name in ("test_nll", "test_kl", "test_kl_se", "entropy", "ess", "tv", "log_z", "draws_tv"):
        assert f"{name:24}" + (f"{last[name]:.4f}" if last[name] is not None else "None") in lines
    assert f"{'draws':24}" + " ".join(f"{weight:.4f}" for weight in last["draws"]) in lines
    rounds = {"flow": 4, "tempering": 4, "langevin": 3}
    assert sampler == "short" or f"{'followed':24}{3 * rounds[sampler]}" in lines
    assert any(line.startswith("flow_log_z ") for line in lines) == ("flow_log_z" in last) == (sampler == "flow")


@pytest.mark.parametrize("toy, base", [("sine", "none"), ("checkerboard", "flow"), ("checkerboard", "gaussian")])
def test_a_toy_has_no_modes_to_weigh_and_every_base_is_learnt_upon(tmp_path, toy, base):
    main(arguments(tmp_path, "--data", toy, "--base", base, "--epochs", "1"))
    assert {p.name for p in tmp_path.iterdir()} == FILES - {"mode_weights.png"}
    last, saved = read_metrics(tmp_path)[-1], checkpoint(tmp_path)["state"]["model"]
    assert last["test_kl"] > 0 and not {"weights", "tv", "chains", "crossings"} & last.keys()
    assert any(name.startswith("energy.base.") for name in saved) == (base != "none")
    assert last["global_acceptance"] > 0.8 or base != "flow"  # E is nearly that of the flow, then


def test_the_swirl_can_be_learnt_too():
    """One step: the swirl's density takes long on the lattice of the figures."""
    choices = {f.name: f.metadata["choices"] for f in fields(settings.Ebm)}
    assert set(choices["data"]) == {"mixture", "gmm40", *TOYS}
    toy, s = TOYS["swirl"](), parse("--data", "swirl")
    model = make_model(s, toy.sample(500))
    train_ebm.start_from(s, model, train_ebm.fit_flow(s, toy, "cpu"))
    chains, _, figures = step(s, model, toy.sample(48)[None], torch.tensor([0.3]), toy.sample(64),
                              *optimizers(model, 1e-3, 1e-3))
    assert chains.shape == (1, 48, 2) and all(figure.isfinite() for figure in figures.values())


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

def test_weights_modes_and_distance_are_those_of_the_command_line_and_chains_start_as_asked(tmp_path, bare):
    """Three modes, 1 : 1 : 2, 7 apart. Chains start equally often in each, or like the data, at all temperatures."""
    flags = ["--weights", "1,1,2", "--distance", "7", "--sampler", "tempering", "--chains", "3000", "--epochs", "1"]
    data = train_ebm.density(parse(*flags[:4]))
    assert data.weights.tolist() == [0.25, 0.25, 0.5]
    torch.testing.assert_close(torch.pdist(data.means), torch.full((3,), 7.0, dtype=torch.float64))
    for start, shares in (("equal", [1 / 3] * 3), ("data", [0.25, 0.25, 0.5])):
        main(arguments(tmp_path / start, *flags, "--start", start))
        first, state = read_metrics(tmp_path / start)[0], checkpoint(tmp_path / start)["state"]
        assert first["chains"] == pytest.approx(shares, abs=0.03) and first["step_size"] == pytest.approx(0.3)
        assert state["chains"].shape == (8, 3000, 2) and state["step_size"].shape == (8,)
        assert state["step_size"][-1] > 3 * state["step_size"][0]  # steps at temperature 10 start 10 times as long


@pytest.mark.parametrize("K, dim", [(2, 2), (4, 16), (5, 3)])
def test_the_modes_are_the_corners_of_a_regular_polygon_with_sides_of_the_distance(K, dim):
    means = mixture(dim, [1 / K] * K, 6.0).means
    sides = (means - means.roll(1, 0)).norm(dim=1)
    torch.testing.assert_close(sides, torch.full((K,), 6.0, dtype=torch.float64))
    torch.testing.assert_close(means.norm(dim=1), means[0].norm().expand(K))
    if K == 4:  # sides along the two axes of the plane
        torch.testing.assert_close(means[:, 0].abs(), means[0, 0].abs().expand(4))


def test_gmm40_has_the_means_and_the_width_of_its_source():
    p = gmm40()
    torch.manual_seed(0)
    torch.testing.assert_close(p.means.float(), (torch.rand(40, 2) - 0.5) * 2 * 40)
    assert p.weights.tolist() == pytest.approx([1 / 40] * 40)
    torch.testing.assert_close(p.std, torch.nn.functional.softplus(torch.ones(40, dtype=torch.float64)))
    assert gmm40(5).means.shape == (40, 5)


def test_a_base_that_is_the_flow_starts_there_and_is_held(tmp_path, bare):
    main(arguments(tmp_path, "--base", "flow", "--sampler", "langevin"))
    s = parse("--base", "flow", "--sampler", "langevin")
    torch.manual_seed(0)
    model = make_model(s, mixture(2).sample(5000))
    unfitted = {name: tensor.clone() for name, tensor in model.energy.base.state_dict().items()}
    train_ebm.start_from(s, model, train_ebm.fit_flow(s, mixture(2), "cpu"))
    fitted, base = model.energy.base.state_dict(), checkpoint(tmp_path)["state"]["model"]
    assert not any(p.requires_grad for p in model.energy.base.parameters())
    assert all(torch.equal(tensor, base[f"energy.base.{name}"]) for name, tensor in fitted.items())
    assert any(not torch.equal(tensor, unfitted[name]) for name, tensor in fitted.items())

    s = parse("--base", "flow")
    model = make_model(s, mixture(2).sample(500))
    train_ebm.start_from(s, model, train_ebm.fit_flow(s, mixture(2), "cpu"))
    assert all(p.requires_grad for p in model.flow.parameters())
    for a, b in zip(model.energy.base.state_dict().values(), model.flow.state_dict().values(), strict=True):
        assert torch.equal(a, b)


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


def test_where_modes_overlap_a_point_counts_for_each_by_the_probability_that_it_came_from_there():
    p = Mixture([0.2, 0.8], [[0.0] * 3, [1.0] * 3])
    assert p.responsibilities(p.sample(200_000)).mean(0).tolist() == pytest.approx([0.2, 0.8], abs=0.003)
    x = torch.tensor([[0.3, -0.4, 1.0]])
    joint = [w * math.exp(-0.5 * (x - m).square().sum()) for w, m in ((0.2, 0.0), (0.8, 1.0))]
    torch.testing.assert_close(p.responsibilities(x)[0].tolist(), [j / sum(joint) for j in joint], rtol=1e-5, atol=0)


def test_a_density_far_from_the_true_modes_has_no_figures():
    p = mixture(8)
    model = SimpleNamespace(energy=lambda x: 0.5 * (x - 30).square().sum(1), flow=None)
    row = Truth(p, 2000, 8, "cpu").figures(model, p.sample(8))
    assert row["ess"] < 0.01
    assert {name for name, value in row.items() if value is None} == {
        "log_z", "log_z_se", "val_nll", "val_kl", "val_kl_se", "weights", "tv", "tv_se"}


def test_the_divergence_of_a_toy_is_that_of_another_quadrature():
    toy = TOYS["checkerboard"]()
    model = SimpleNamespace(energy=lambda x: x.square().sum(1) / 30, flow=None)
    ticks = torch.arange(-13, 13.25, 0.25, dtype=torch.float64)
    x = torch.cartesian_prod(ticks, ticks)
    p = toy.log_prob(x).exp() * 0.25**2
    kl = (p * (toy.log_prob(x) + x.square().sum(1) / 30 + math.log(30 * math.pi))).sum().item()
    row = Truth(toy, 1000, 2, "cpu").figures(model, None)
    assert row["log_z"] == pytest.approx(math.log(30 * math.pi), abs=2e-3)
    assert row["val_kl"] == pytest.approx(kl, abs=2e-3) and "weights" not in row


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


def test_the_gaussian_base_has_the_mean_and_covariance_of_the_data_and_is_normalised():
    x = mixture(4).sample(3000)
    normal = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov())
    torch.testing.assert_close(gaussian(x).log_prob(x).float(), normal.log_prob(x), rtol=1e-4, atol=1e-4)


def test_where_few_draws_carry_the_weight_log_z_is_not_reported(watched):
    assert read_metrics(watched[0])[0]["flow_log_z"] is None  # 100 draws in each evaluation
    p = mixture(2)
    model = SimpleNamespace(energy=lambda x: -p.log_prob(x), flow=Mixture([1.0], [[30.0, 0.0]], 5.0))
    row = Truth(p, 4000, 2, "cpu").figures(model, p.sample(8))
    assert row["flow_log_z"] is None and row["flow_log_z_se"] is None and row["flow_ess"] < 0.1


# ---- Resuming --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sampler, stop", [("flow", 1), ("flow", 3), ("langevin", 2), ("short", 2)])
def test_a_run_that_is_stopped_and_resumed_ends_exactly_like_an_undisturbed_one(
        finished, tmp_path, monkeypatch, bare, sampler, stop):
    flags, whole = arguments(tmp_path, "--sampler", sampler, "--dim", "3"), finished[sampler][0]
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as exit:
        stop_after(patched, stop)  # the first checkpoint is of epoch 0
        main(flags)
    assert exit.value.code == 130 and len(read_metrics(tmp_path)) == stop
    main([*flags, "--resume"])
    assert timeless(read_metrics(whole)) == timeless(read_metrics(tmp_path))
    states = [checkpoint(directory)["state"] for directory in (whole, tmp_path)]
    assert_same_bits(*states)
    assert {"model", "averaged", "optimizer", "chains", "step_size", "epoch"} <= states[1].keys()
    assert ("flow_optimizer" in states[1]) == (sampler == "flow")


def test_a_resumed_run_goes_on_counting_its_time(tmp_path, monkeypatch, bare):
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        stop_after(patched, 2)
        main(arguments(tmp_path))
    saved = checkpoint(tmp_path)
    saved["metrics"][-1]["seconds"] = 1000.0
    torch.save(saved, tmp_path / "checkpoint.pt")
    main(arguments(tmp_path, "--resume"))
    assert 1000 < read_metrics(tmp_path)[-2]["seconds"] < read_metrics(tmp_path)[-1]["seconds"] < 1060


# ---- Failing ---------------------------------------------------------------------------------------------------------

def test_errors_are_one_line(finished, tmp_path, capsys, monkeypatch):
    directory, _ = finished["flow"]
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    run = [*arguments(directory), "--dim", "3"]
    assert "--resume" in fails(capsys, *run)
    assert "dim is 3 there and 4 here" in fails(capsys, *run, "--dim", "4", "--resume")
    assert "lr is 0.002 there and 0.1 here" in fails(capsys, *run, "--lr", "0.1", "--resume")
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before
    assert "nothing to resume" in fails(capsys, *arguments(tmp_path / "none", "--resume"))
    assert "invalid choice: 'gibbs'" in fails(capsys, "--sampler", "gibbs")
    assert "--dim must be 2 for --data swirl" in fails(capsys, "--data", "swirl", "--dim", "3")
    assert "--weights is not a setting of" in fails(capsys, "--data", "gmm40", "--weights", "1,2")
    for weights in ("1,-2", "1e308,1e308", "1e-200,1e200"):
        assert f"invalid shares value: '{weights}'" in fails(capsys, "--weights", weights)
    assert "--distance must be at most 100" in fails(capsys, "--distance", "1000")
    assert "--hottest must be above 1" in fails(capsys, "--sampler", "tempering", "--hottest", "1")
    assert "is not a setting of" in fails(capsys, "--replicas", "3")
    assert "--dim must be at least 2" in fails(capsys, "--dim", "1")
    assert "--chains must be above 0" in fails(capsys, "--chains", "0")
    under_torchrun(monkeypatch, 2)
    assert "start it without torchrun" in fails(capsys, *arguments(tmp_path / "two"))


def test_chains_that_leave_the_finite_range_name_the_step_and_the_last_checkpoint_is_kept(
        tmp_path, capsys, monkeypatch, bare):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 3)
        main(arguments(tmp_path, "--no-adjusted"))
    saved = checkpoint(tmp_path)
    saved["state"]["step_size"].fill_(1e30)
    torch.save(saved, tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    line = fails(capsys, *arguments(tmp_path, "--no-adjusted", "--resume"))
    assert "non-finite" in line and "at epoch 3, step 1: lower --lr or --flow-lr; the last checkpoint" in line
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_energy_that_diverges_is_an_error_that_names_the_step(tmp_path, capsys, sampler):
    line = fails(capsys, *arguments(tmp_path, "--sampler", sampler, "--lr", "1e30"))
    assert "epoch 1, step " in line and "finite" in line and "lower --lr or --flow-lr; the last checkpoint" in line
    assert checkpoint(tmp_path)["state"]["epoch"] == 0


def test_a_flow_that_diverges_is_an_error_that_names_the_step(tmp_path, capsys):
    line = fails(capsys, *arguments(tmp_path, "--flow-lr", "1e30", "--start-steps", "0"))
    assert "epoch 1, step " in line and "lower --lr or --flow-lr" in line


def test_acceptance_that_stays_at_zero_is_a_warning_with_the_likely_cause(tmp_path, capsys, monkeypatch, bare):
    """A flow that proposes where the energy is far too high; Langevin steps that are far too long."""
    monkeypatch.setattr(train_ebm, "start_from", lambda s, model, flow: model.flow.layers[1].bias.data.fill_(1e4))
    main(arguments(tmp_path / "flow", "--flow-lr", "1e-9"))
    printed = capsys.readouterr().err
    for epoch in range(1, EPOCHS + 1):
        assert f"warning: none of the flow's proposals was accepted in epoch {epoch}" in printed
    assert "in epoch 0" not in printed and "Langevin" not in printed
    main(arguments(tmp_path / "langevin", "--sampler", "langevin", "--step-size", "1e6"))
    printed = capsys.readouterr().err
    assert "warning: Langevin accepted nothing in epoch 1: lower --step-size" in printed and "flow's" not in printed


def test_a_run_whose_chains_move_has_no_warning(tmp_path, capsys, bare):
    for sampler in SAMPLERS:
        main(arguments(tmp_path / sampler, "--sampler", sampler, "--epochs", "1"))
    main(arguments(tmp_path / "unadjusted", "--no-adjusted", "--epochs", "1"))
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("sampler, adjusted", [
    *((sampler, "--adjusted") for sampler in ("flow", "langevin", "short")), ("flow", "--no-adjusted"),
    ("tempering", "--replicas=3")])
def test_a_step_runs_on_the_meta_device(sampler, adjusted):
    """Where there is no memory, a tensor made on another device shows."""
    s = parse("--sampler", sampler, adjusted)
    model = make_model(s, mixture(3).sample(200)).to("meta")
    x = torch.empty(16, 3, device="meta")
    T = train_ebm.ladder(s, "meta")
    chains, step_size, figures = step(s, model, x.repeat(len(T), 1, 1), 0.1 * T, x, *optimizers(model, 0.1, 0.1))
    absent = {"acceptance"} if adjusted == "--no-adjusted" else set()
    absent |= set() if sampler == "flow" else {"flow_loss", "flow_grad_norm"}
    absent |= set() if sampler in ("flow", "tempering") else {"global_acceptance"}
    assert chains.is_meta and step_size.is_meta and figures.keys() == set(FIGURES) - absent
    assert all(figure.is_meta and figure.shape == () for figure in figures.values())


# ---- The experiment of docs/results.md -------------------------------------------------------------------------------

def test_the_experiment_makes_its_table_and_figures_and_trains_nothing_twice(tmp_path, capsys, monkeypatch, bare):
    small = [*arguments("unused")[2:], "--runs", str(tmp_path), "--results", str(tmp_path / "results"), "--seeds", "0"]
    cells = [cell for cell in balanced.CELLS if "100" not in cell]  # which has --local-steps of its own
    balanced.main(["--dims", "2", "--cells", *cells, *small])
    printed = capsys.readouterr().out
    assert {p.name for p in (tmp_path / "results").iterdir()} == {"balanced.json", "ebm-weights.png", "ebm-density.png"}
    lines = [line.split(" | ") for line in printed.splitlines() if line.startswith("| 2 |")]
    assert [line[1] for line in lines] == cells
    # gradients of a round and the energies of its jump, or of the swaps of eight temperatures; --local-steps is 3
    assert {line[1]: line[-1].split()[0] for line in lines if "short" not in line[1]} == {
        "flow": "6", "flow, which is the base as well": "6", "flow alone": "–", "tempering": "40", "langevin": "4",
        "langevin, started like the data": "4"}
    with monkeypatch.context() as patched:
        patched.setattr(train_ebm, "train", None)
        patched.setattr(train_ebm, "fit_flow", None)
        balanced.main(["--dims", "2", "--cells", *cells, *small])
    balanced.main(["--dims", "3", "--cells", "flow", "flow alone", *small])  # beside what is there
    balanced.main(["--dims", "2", "--cells", "flow", *small, "--results", str(tmp_path / "elsewhere"), "--seeds", "1"])
    table = json.loads((tmp_path / "results" / "balanced.json").read_text())["runs"]
    assert {(row["dim"], row["cell"]) for row in table} == {
        *((2, cell) for cell in cells), (3, "flow"), (3, "flow alone")}


def test_the_experiment_refuses_what_it_would_not_do_in_one_line(tmp_path, capsys):
    small = [*arguments("unused")[2:], "--runs", str(tmp_path), "--results", str(tmp_path), "--dims", "2"]
    stopped = failing(balanced.main)
    assert "--sampler is set by the experiment" in stopped(capsys, *small, "--cells", "langevin", "--sampler", "short")
    assert "--data is set by the experiment" in stopped(capsys, *small, "--data", "swirl")
    path, run = tmp_path / "balanced.json", tmp_path / "balanced-d2-langevin-seed0"
    path.write_text('{"flags": ["--lr", "1"], "runs": []}')
    assert "is of runs with other flags, ['--lr', '1']" in stopped(capsys, *small)
    path.unlink()
    run.mkdir()
    (run / "config.json").write_text("{")
    (run / "metrics.jsonl").write_text("{}\n")
    assert "config.json is damaged" in stopped(capsys, *small, "--cells", "langevin", "--seeds", "0")


def test_a_run_that_breaks_down_is_an_entry_of_the_table_and_not_its_end(tmp_path, capsys):
    small = [*arguments("unused")[2:], "--runs", str(tmp_path), "--results", str(tmp_path / "results"), "--seeds", "0"]
    balanced.main(["--dims", "2", "--cells", "flow", "short", *small, "--lr", "1e30"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 2 |")]
    assert len(lines) == 2 and all("| broke down |" in line for line in lines)
    runs = json.loads((tmp_path / "results" / "balanced.json").read_text())["runs"]
    assert all("at epoch 1" in row["stopped"] for row in runs)
