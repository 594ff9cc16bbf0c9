"""The experiment on zeros and ones: its data, its judge against a known density, its table and figures, its errors."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from conftest import failing
from data import Mixture
from experiments import unbalanced
from experiments.unbalanced import Digits, Judge, classifier
from support import settings
from train_ebm import gaussian

fails = failing(unbalanced.main)


@pytest.fixture(scope="module")
def data():
    return Digits()


def test_the_components_are_white_hold_72_percent_of_the_variance_and_are_decoded(data):
    x = torch.cat(data.x)
    assert list(map(len, data.x)) == [5000, 500] and x.shape == (5500, 16) and data.share == pytest.approx(1 / 11)
    torch.testing.assert_close(x.mean(0), torch.zeros(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(x.T.cov(correction=0), torch.eye(16), rtol=0, atol=1e-3)
    pixels = torch.cat([images[:n] for images, n in zip(Digits.read("train", (0, 1)), (5000, 500))])
    rest = (pixels - data.decode(x)).square().sum() / (pixels - pixels.mean(0)).square().sum()
    assert 1 - rest.item() == pytest.approx(data.explained, abs=1e-4) == pytest.approx(0.72, abs=0.005)
    torch.testing.assert_close(data.encode(data.decode(x)), x, rtol=1e-3, atol=1e-3)


def test_held_out_images_have_the_proportions_of_the_data_and_equal_draws_have_halves(data):
    second = torch.cat([torch.zeros(980), torch.ones(98)]).bool()
    assert len(data.held_out) == 1078
    assert torch.equal(data.held_out[second], data.test[1][:98])
    network, accuracy = classifier(data)
    assert accuracy >= 0.999
    assert (network(data.sample(4000)) > 0).double().mean().item() == pytest.approx(1 / 11, abs=0.02)
    assert (network(data.sample(4000, equally=True)) > 0).double().mean().item() == pytest.approx(0.5, abs=0.005)


def judge_of(flow):
    truth = Mixture([0.8, 0.2], [[-2.0, 0.0], [2.0, 0.0]])
    data = SimpleNamespace(sample=truth.sample, held_out=truth.sample(20_000), share=0.2)
    return Judge(settings.parse(settings.Ebm, ["--chains", "300"]), data, lambda x: x[:, 0], flow), truth


def judged(energy, flow, rounds):
    judge, truth = judge_of(flow)
    return *judge(energy, rounds), truth


def test_the_judge_adapts_its_flow_to_a_density_and_finds_its_proportion_and_its_nll():
    torch.manual_seed(0)
    p = Mixture([0.6, 0.4], [[-2.0, 0.0], [2.0, 0.0]])
    row, draws, truth = judged(lambda x: 7 - p.log_prob(x), gaussian(2 * torch.randn(1000, 2) - 1), 40)
    crosses = torch.special.ndtr(torch.tensor(-2.0)).item()
    assert abs(row["share"] - (0.4 + 0.2 * crosses)) < 4 * row["share_se"] < 0.05
    assert row["tv"] == pytest.approx(abs(row["share"] - 0.2)) and row["ess"] > 0.1
    assert row["nll"] == pytest.approx(-p.log_prob(truth.sample(200_000)).mean().item(), abs=0.05)
    assert (draws[:, 0] > 0).double().mean().item() == pytest.approx(0.4, abs=0.25)  # of 64


def test_the_judge_does_not_lose_the_mass_that_only_the_first_flow_reaches():
    """The other one stands for a flow that adapted to the first mode alone, and overflows in the second one."""
    p = Mixture([0.6, 0.4], [[-2.0, 0.0], [2.0, 0.0]])
    judge, _ = judge_of(gaussian(2 * torch.randn(1000, 2)))
    left = torch.distributions.MultivariateNormal(torch.tensor([-2.0, 0.0]), 0.1 * torch.eye(2))
    judge.flow = SimpleNamespace(sample=lambda n: left.sample((n,)),
                                 log_prob=lambda x: left.log_prob(x).where(x[:, 0] < 0, math.nan))
    row, _ = judge(lambda x: -p.log_prob(x), 0)
    assert abs(row["share"] - (0.4 + 0.2 * torch.special.ndtr(torch.tensor(-2.0)).item())) < 4 * row["share_se"] < 0.03


def test_where_few_draws_carry_the_weight_no_proportion_is_given():
    row, _, _ = judged(lambda x: 50 * (x - 9).square().sum(1), gaussian(torch.randn(1000, 2)), 0)
    assert row["ess"] < 0.01 and row["share"] is row["share_se"] is row["tv"] is row["nll"] is None


def test_the_experiment_makes_its_table_and_figures_and_trains_nothing_twice(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(unbalanced, "ProcessPoolExecutor", lambda n, context, initializer: ThreadPoolExecutor(1))
    fit, fits = unbalanced.fit, []
    monkeypatch.setattr(unbalanced, "fit", lambda *arguments: fits.append(arguments) or fit(*arguments))
    monkeypatch.setattr(unbalanced, "ROUNDS", (1, 3))
    monkeypatch.setattr(unbalanced, "DRAWS", 500)
    small = ["--results", str(tmp_path), "--seeds", "0", "--steps", "6", "--start-steps", "20", "--chains", "40",
             "--batch-size", "64", "--blocks", "2", "--width", "8", "--energy-width", "8", "--replicas", "2"]
    cells = ["flow", "flow alone", "tempering, the flow as base"]
    with torch.random.fork_rng():
        for _ in range(2):
            unbalanced.main([*small[:4], "--cells", *cells, *small[4:-2]])
            monkeypatch.setattr(unbalanced, "run", None)  # the second time nothing is left to run
    assert {path.name for path in tmp_path.iterdir()} == {
        "unbalanced.json", "unbalanced.png", "unbalanced-draws.png"}
    runs = json.loads((tmp_path / "unbalanced.json").read_text())["runs"]
    assert {f"{cell} seed 0" for cell in cells} == runs.keys()
    assert len(fits) == 2  # one flow for all, and the flow alone
    assert [look["update"] for look in runs["flow seed 0"]["looks"]] == [0, 1, 2, 3, 4, 5, 6]
    assert runs["flow seed 0"]["looks"][0]["chains"] == pytest.approx(0.5, abs=0.1)
    assert math.isfinite(runs["flow alone seed 0"]["nll"]) and runs["flow alone seed 0"]["ess"] == pytest.approx(1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in lines] == 2 * [f"| {cell}" for cell in cells]


def test_errors_are_one_line(tmp_path, capsys):
    out = ["--results", str(tmp_path)]
    assert "MNIST has 0 training images of the digit 12: cannot take 500" in fails(capsys, "--digits", "0", "12", *out)
    assert "5923 training images of the digit 0: cannot take 6000" in fails(capsys, "--counts", "6000", "500", *out)
    assert "--digits must be two different ones, not 3 twice" in fails(
        capsys, "--digits", "3", "3", "--components", "800", *out)
    assert "--dim is set by the experiment" in fails(capsys, "--dim", "5", *out)
    assert "--sampler is set by the experiment" in fails(capsys, "--sampler", "short", *out)
    assert "--chains must be at least 4, not 3" in fails(capsys, "--chains", "3", *out)
    assert "--components: must lie between 2" in fails(capsys, "--components", "1", *out)
    assert "cannot take 0" in fails(capsys, "--counts", "0", "500", *out)
    assert "20 images of 784 pixels do not have 20 principal" in fails(
        capsys, "--counts", "10", "10", "--components", "20", *out)
    assert "unrecognized arguments: --stepz" in fails(capsys, "--stepz", "3", *out)
    assert not list(tmp_path.iterdir())
