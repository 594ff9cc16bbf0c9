"""Experiments on rival methods and samplers: what they compute is right, and each runs from end to end, small."""

import json
import math
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch.func import jacrev, vmap

import losses
import train_ebm
import train_mnist
from conftest import failing
from data import load_images
from densities import Mixture
from ebflow import EBFlow, fc_flow
from experiments import balanced, determinant, linear_masks, read_metrics, rivals, unbalanced
from support import plots, settings
from support.run import RunError

RESULTS = Path(__file__).parent.parent / "results"


@pytest.fixture(autouse=True)
def no_pictures_of_runs(monkeypatch):
    for name in ("curves", "mosaic", "ebm", "mode_weights"):
        monkeypatch.setattr(plots, name, lambda *_: Figure(figsize=(1, 1)))


def read(path):
    return json.loads(path.read_text())


def test_the_entropy_of_the_ten_dimensional_density_is_that_of_the_brute_force_jacobian(float64):
    """h(y) = h(n) + E log|det dy/dn|, with the Jacobian by automatic differentiation."""
    noise = torch.randn(2_000, 10).clamp(-3.3, 3.3)  # where 1 - tanh² still has digits
    log_det = torch.linalg.slogdet(vmap(jacrev(lambda n: linear_masks.data(n[None])[0]))(noise)).logabsdet
    entropy, error = linear_masks.entropy(100_000)
    expected = 5 * math.log(2 * math.pi * math.e) + log_det.mean().item()
    assert abs(entropy - expected) < 4 * (log_det.std().item() / len(noise) ** 0.5 + error)


@pytest.mark.parametrize("name", linear_masks.LAYERS)
def test_a_masked_flow_has_the_density_of_its_brute_force_jacobian_and_a_step_leaves_the_mask(float64, name):
    flow = linear_masks.masked_flow(linear_masks.LAYERS[name], blocks=2)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x = torch.randn(3, 10)
    J, u = vmap(jacrev(lambda x: flow(x[None])[0]))(x), flow(x)
    torch.testing.assert_close(flow.log_prob(x), -0.5 * u.square().sum(1) - 5 * math.log(2 * math.pi)
                               + torch.linalg.slogdet(J).logabsdet)
    lower, upper = J.tril(-1).abs().max().item() > 0.01, J.triu(1).abs().max().item() > 0.01
    assert (lower, upper) == (name != "upper", name != "lower")


def test_the_variance_of_the_importance_weights_is_the_closed_form_s_and_each_proposal_is_closer_than_the_last():
    """E_q[w] = 1/|det W| and E_q[w²] for w = p_u(Wx)/q(x), by many draws where the variance is small."""
    W, divergences = torch.eye(3).double() + 0.1 * torch.randn(3, 3).double(), []
    for fit in determinant.PROPOSALS.values():
        L = fit(W)
        ratio = torch.linalg.solve_triangular(L.T, W.T, upper=True)
        divergences.append(0.5 * ratio.square().sum() + L.diagonal().log().sum())
        q = determinant.Gaussian(0.9 * L)  # off its best, so that there is something to see
        x = q.sample(400_000)
        w = (-0.5 * (x @ W.T).square().sum(1) - 1.5 * math.log(2 * math.pi) - q.log_prob(x)).exp()
        assert w.mean().item() == pytest.approx(1 / torch.linalg.det(W).abs().item(), rel=0.01)
        assert (w.var() / w.mean() ** 2).item() == pytest.approx(determinant.relative_variance(W, q.L), rel=0.05)
    assert determinant.relative_variance(W, 2 * W) == math.inf and divergences == sorted(divergences, reverse=True)
    torch.testing.assert_close(L.T @ L, W.T @ W, rtol=0, atol=0.02)  # of the fitted one


def test_both_experiments_run_and_the_error_of_the_determinant_is_the_predicted_one(tmp_path, monkeypatch, float64):
    small = {linear_masks: dict(entropy=partial(linear_masks.entropy, 10_000), BATCH_SIZE=32, STEPS=100, SEEDS=1),
             determinant: dict(measure=partial(determinant.measure, c=0.1), DIMS=[2, 4])}
    for module, values in small.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
        module.main(["--results", str(tmp_path)])
    result = read(tmp_path / "linear-masks.json")
    assert len(result["curves"]) == 4 and all(run[-1] > result["entropy"] for [run] in result["curves"].values())
    result = read(tmp_path / "determinant.json")
    assert len(result["by_dimension"]) == 6
    for row in result["by_dimension"]:
        assert 0.6 < row["rmse"] / determinant.predicted(row) < 1.6  # of 20 repeats


def test_the_relative_gradient_is_that_of_ml_times_wt_w_and_without_one_the_flow_is_the_same(float64):
    flow, rival = fc_flow(6, bend=1.0), EBFlow(
        [rivals.RelativeLayer(6), fc_flow(6, bend=1.0).layers[1], rivals.RelativeLayer(6)], (6,))
    for layer in flow.layers[::2]:
        layer.weight.data += 0.2 * torch.randn(6, 6)
    rival.load_state_dict(flow.state_dict())
    x = torch.randn(9, 6)
    losses.ml(flow.log_prob, x).backward()
    losses.ml(rival.log_prob, x).backward()
    for layer, ours in zip(flow.layers[::2], rival.layers[::2]):
        W, G = layer.weight, layer.weight.grad
        torch.testing.assert_close(ours.weight.grad, G @ W.T @ W)
        torch.testing.assert_close(ours.bias.grad, layer.bias.grad)
    with torch.no_grad():
        torch.testing.assert_close(rival.log_prob(x), flow.log_prob(x))


@pytest.mark.parametrize("loss, flags", [("ml", []), ("ssm", ["--sigma", "0.4"]), ("dsm", [])])
def test_the_loop_of_the_rivals_trains_as_train_mnist_does(tmp_path, npy, monkeypatch, loss, flags):
    flags = ["--batch-size", "50", "--lr", "1e-3", "--seed", "3", "--normalize", "center", *flags]
    train_mnist.main(["--loss", loss, "--epochs", "2", *rivals.PLAIN[loss], *flags, "--data", str(npy), "--device",
                      "cpu", "--sml-steps", "0", "--out", str(tmp_path / "run")])
    monkeypatch.setattr(rivals, "STEPS", 10)
    monkeypatch.setattr(rivals, "EVERY", 5)
    curve = rivals.train(loss, flags, load_images(npy))["curve"]  # two epochs of five batches
    expected = [row["val_nll"] for row in read_metrics(tmp_path / "run")]
    assert [step for step, _, _ in curve] == [0, 5, 10] and curve[2][2] != pytest.approx(curve[0][2], abs=1e-2)
    assert [nll for _, _, nll in curve] == pytest.approx(expected, abs=1e-3)


def test_the_rivals_run_and_the_time_to_whiten_counts(tmp_path, capsys, monkeypatch, npy):
    for name, value in (("MNIST", shutil.copy(npy, tmp_path)), ("STEPS", 12), ("EVERY", 4)):
        monkeypatch.setattr(rivals, name, value)
    shared = ["--results", str(tmp_path)]
    rivals.main(shared)
    runs = read(tmp_path / "rivals.json")["runs"]
    assert [*runs] == [*rivals.METHODS]
    for run in runs.values():
        assert [step for step, _, _ in run["curve"]] == [0, 4, 8, 12] and run["curve"][0][1] > 0  # seconds
        assert run["curve"][-1][2] < run["curve"][0][2]  # the NLL
    np.save(rivals.MNIST, 255 - np.load(npy))
    assert "images" in failing(rivals.main)(capsys, *shared)


def test_the_table_of_the_rivals_interpolates_and_takes_the_median_time_of_a_step():
    curve = [(0, 0.5, 9.0), (10, 52.5, 4.0), (20, 54.5, 3.0), (30, 90.5, 3.5), (40, 92.5, 3.5)]  # two slow stretches
    assert rivals.step_time(curve) == 0.2 and rivals.step_time(curve[:2]) == 5.2 and rivals.reached(curve, 5) == 8
    assert rivals.reached(curve, 10) == 0 and rivals.reached(curve, 2) is None
    assert [*rivals.rows({"a": {"curve": [(s, t, 1100 * x / 9) for s, t, x in curve]}})] == [
        "| a | 1100.0 | 366.7 | 427.8 | 5.0 | 0: 0.5 | 0: 0.6 | 1: 0.6 |"]


def test_the_recorded_methods_are_those_of_today_and_the_figures_can_be_drawn_again():
    result = read(RESULTS / "rivals.json")
    assert result["methods"] == json.loads(json.dumps(rivals.METHODS))
    assert len(rivals.picture(result["runs"]).axes[0].lines) == len(rivals.METHODS)


SMALL = "--steps 6 --start-steps 5 --chains 40 --batch-size 64 --blocks 2 --width 8 --energy-width 8".split()


def test_balanced_makes_its_table_and_figures_and_keeps_other_runs(tmp_path, capsys):
    cells, results = ["flow", "flow alone", "tempering", "langevin", "short"], tmp_path / "results"
    flags = ["--seeds", "0", "--runs", str(tmp_path), "--results", str(results), *SMALL, "--epochs", "2",
             *"--test-points 400 --mixing-rounds 3 --local-steps 3 --device cpu --dims 2 --cells".split()]
    balanced.main([*flags, *cells])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    # gradients of a round and the energies of its jump, or of the swaps of eight temperatures
    assert {line[0]: line[-1] for line in lines} == dict(zip(cells, ("6", "–", "40", "4", "4")))
    assert (results / "ebm-density.png").exists()
    runs, metrics = read(results / "balanced.json")["runs"], read_metrics(tmp_path / "balanced-d2-flow-seed0")
    assert runs["2 flow 0"]["tv"] == metrics[-1]["tv"]
    assert runs["2 flow 0"]["tv_by_step"] == [[row["step"], pytest.approx(row["tv"], abs=1e-5)] for row in metrics]
    balanced.main([*flags, "flow alone", "--dims", "3"])  # beside what is there
    assert {*read(results / "balanced.json")["runs"]} == {*runs, "3 flow alone 0"}
    assert "flags is" in failing(balanced.main)(capsys, *flags, "flow", "--lr", "1")


def test_the_table_of_balanced_has_the_least_and_the_largest_of_the_seeds_in_the_column_of_their_dimension():
    tvs = {2: [0.3, 0.1, 0.2], 8: [0.5, None], 16: [0.00401, 0.00399], 32: [None]}
    runs = {f"{dim} {i}": {"dim": dim, "cell": "short", "tv": tv, "evaluations": 21.0}
            for dim, seeds in tvs.items() for i, tv in enumerate(seeds)}
    runs["other"] = {"dim": 2, "cell": "flow alone", "tv": 0.1}
    assert [*balanced.rows(runs)] == ["| flow alone | 0.100 | – | – | – | – |",
                                      "| short | 0.100–0.300 | 0.500, elsewhere | 0.004 | elsewhere | 21 |"]


@pytest.fixture(scope="module")
def digits():
    return unbalanced.Digits()


def test_the_components_are_white_and_held_out_images_have_the_proportions_of_the_data(digits, capsys):
    x, held_out = torch.cat(digits.x), digits.held_out
    assert [*map(len, digits.x)] == [5000, 500] and x.shape == (5500, 16) and digits.share == pytest.approx(1 / 11)
    torch.testing.assert_close(x.mean(0), torch.zeros(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(x.T.cov(correction=0), torch.eye(16), rtol=0, atol=1e-3)
    assert torch.equal(held_out, torch.cat([digits.test[0], digits.test[1][:98]]))
    network = unbalanced.classifier(digits)
    assert "right on 2113 of 2115" in capsys.readouterr().out
    shares = [(network(digits.sample(4000, equally=equally)) > 0).double().mean().item() for equally in (False, True)]
    assert shares == [pytest.approx(1 / 11, abs=0.02), pytest.approx(0.5, abs=0.005)]


MODES = [[-2.0, 0.0], [2.0, 0.0]]
P = Mixture([0.6, 0.4], MODES)  # the model
RIGHT = 0.4 + 0.2 * torch.special.ndtr(torch.tensor(-2.0)).item()  # its share of x_1 > 0


def points():
    truth = Mixture([0.8, 0.2], MODES)
    return SimpleNamespace(sample=truth.sample, held_out=truth.sample(20_000))


def energy(x):
    return 7 - P.log_prob(x)


def sign(x):
    return x[:, 0]


def test_a_judge_finds_the_proportion_and_the_nll_of_a_density_with_a_flow_that_adapts_to_it(monkeypatch):
    monkeypatch.setattr(unbalanced, "ROUNDS", 60)
    first, data = train_ebm.gaussian(2 * torch.randn(1000, 2) - 1), points()
    adapted = unbalanced.adapted(train_ebm.Settings(chains=300), data, first, energy)
    before, after = (unbalanced.measure(energy, [flow], data, sign)["ess"] for flow in (first, adapted))
    row = unbalanced.measure(energy, [first, adapted], data, sign)
    assert abs(row["share"] - RIGHT) < 0.03 and 0.1 < before < after
    assert row["nll"] == pytest.approx(-P.log_prob(data.held_out).mean().item(), abs=0.05)


def test_the_error_of_a_share_is_from_the_spread_of_the_judges_and_nothing_is_said_where_one_has_few_draws():
    measures = [{"share": share, "nll": 2.0, "ess": 0.5} for share in (0.1, 0.2, 0.3)]
    row = unbalanced.judged(measures, 0.25)
    assert row == {key: pytest.approx(value) for key, value in
                   dict(share=0.2, nll=2.0, ess=0.5, share_se=0.1 / 3**0.5, tv=0.05).items()}
    narrow = unbalanced.measure(lambda x: 50 * (x - 9).square().sum(1), [train_ebm.gaussian(torch.randn(1000, 2))],
                                points(), sign)
    row = unbalanced.judged([*measures, narrow], 0.25)
    assert narrow["ess"] < 0.01 and row["share"] is row["share_se"] is row["tv"] is row["nll"] is None


def test_a_judge_does_not_lose_the_mass_that_only_the_first_flow_reaches():
    first = train_ebm.gaussian(2 * torch.randn(1000, 2))  # the other one has one mode alone, and overflows in the other
    left = torch.distributions.MultivariateNormal(torch.tensor([-2.0, 0.0]), 0.1 * torch.eye(2))
    other = SimpleNamespace(sample=lambda n: left.sample((n,)),
                            log_prob=lambda x: left.log_prob(x).where(x[:, 0] < 0, math.nan))
    assert unbalanced.measure(energy, [first, other], points(), sign)["share"] == pytest.approx(RIGHT, abs=0.03)


def test_unbalanced_makes_its_runs_and_refuses_a_flow_that_is_lost(tmp_path, monkeypatch, digits):
    fit, fits = unbalanced.fit, []
    for name, value in (("fit", lambda *arguments: fits.append(1) or fit(*arguments)), ("ROUNDS", 2), ("DRAWS", 500),
                        ("Digits", lambda: digits), ("classifier", lambda data: sign)):
        monkeypatch.setattr(unbalanced, name, value)
    cells = ["flow", "flow alone", "tempering, the flow as base"]
    unbalanced.main(["--results", str(tmp_path), *SMALL, "--cells", *cells])
    runs = read(tmp_path / "unbalanced.json")["runs"]
    assert len(fits) == 2 and (tmp_path / "unbalanced.png").exists()  # one flow for all, and the flow alone
    assert 0 < runs["flow seed 0"]["chains"] < 1 and runs["flow alone seed 0"]["ess"] == pytest.approx(1)
    assert math.isfinite(runs["flow alone seed 0"]["nll"]) and runs["flow alone seed 0"]["share_se"] > 0
    s = settings.parse(train_ebm.Settings, ["--dim", "16", "--flow-lr", "1e30", *SMALL])  # the energy stays finite
    with pytest.raises(RunError, match="not finite"):
        unbalanced.train(s, digits, train_ebm.make_flow(s, digits.sample(500)))
