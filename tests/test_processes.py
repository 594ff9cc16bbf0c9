"""Several processes train like one with the joint batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import processes
import train_mnist
from conftest import compiler
from ebflow import fc_flow
from run import read_metrics
from test_data import small_data_set
from training import objective, trainable

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("loss", train_mnist.LOSSES)
def test_the_mean_over_the_shares_is_the_gradient_of_the_joint_batch(loss, monkeypatch):
    args = train_mnist.parse(["--loss", loss])
    flow = fc_flow(5, bend=1.0).double()
    x = torch.randn(12, 5, dtype=torch.float64)

    def gradients():
        torch.manual_seed(1)
        value = objective(args, flow, x)
        return [value.detach(), *torch.autograd.grad(value, trainable(flow), materialize_grads=True)]

    joint = gradients()
    monkeypatch.setattr(processes, "count", lambda: 4)
    shares = []
    for rank in range(4):
        monkeypatch.setattr(processes, "rank", lambda: rank)
        shares.append(gradients())
    torch.testing.assert_close([sum(parts) / 4 for parts in zip(*shares)], joint)
    assert not torch.allclose(shares[0][0], shares[1][0])


def launch(*arguments):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "train_mnist.py"), *arguments],
                          capture_output=True, text=True)


@pytest.mark.parametrize("flags", [["--loss", "dsm"], ["--loss", "sml"], *(pytest.param(["--loss", loss, "--compile"], marks=compiler) for loss in ("dsm", "sml"))], ids=str)
def test_two_processes_under_torchrun_end_where_one_does_and_only_the_first_writes(tmp_path, flags):
    data = small_data_set(tmp_path)
    shared = [*flags, "--data", str(data), "--epochs", "3", "--batch-size", "50", "--device", "cpu"]
    done = launch(*shared, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test NLL") == 1
    train_mnist.main([*shared, "--out", str(tmp_path / "one")])
    for a, b in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        assert a["val_nll"] == pytest.approx(b["val_nll"], rel=1e-5)
        assert (a["loss"] is None and b["loss"] is None) or a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    weights = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["state"]["model"] for name in ("one", "two")]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "two" / "config.json").read_text()) == json.loads((tmp_path / "one" / "config.json").read_text())


def test_two_processes_go_on_from_a_checkpoint_and_two_of_a_script_that_does_not_join_are_refused(tmp_path):
    data = small_data_set(tmp_path)
    shared = ["--loss", "ssm", "--noise", "0.1", "--clip", "1", "--data", str(data), "--epochs", "3", "--batch-size", "50", "--device", "cpu",
              "--out", str(tmp_path / "run")]
    train_mnist.main(shared)
    whole = (tmp_path / "run" / "metrics.jsonl").read_text()
    done = launch(*shared, "--resume")  # nothing is left to do but the end
    assert done.returncode == 0 and done.stdout.count("test NLL") == 1, done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == whole
    failed = launch(*shared)  # only the first process sees that there is a run
    assert failed.returncode != 0 and failed.stderr.count("error: ") == 1 and "already holds a run" in failed.stderr
    failed = subprocess.run([sys.executable, str(ROOT / "train_toy.py")], env=os.environ | {"WORLD_SIZE": "2"}, capture_output=True, text=True)
    assert failed.returncode == 1 and "start it without torchrun" in failed.stderr and "Traceback" not in failed.stderr


def test_a_batch_that_does_not_divide_is_one_line(tmp_path):
    failed = launch("--data", str(small_data_set(tmp_path)), "--batch-size", "51", "--device", "cpu", "--out", str(tmp_path / "run"))
    assert failed.returncode != 0 and "error: 2 processes cannot share --batch-size 51 alike" in failed.stderr
    assert not (tmp_path / "run").exists()
