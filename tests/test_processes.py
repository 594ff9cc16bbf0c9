"""Several processes train like one with the joint batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train_mnist
from ebflow import fc_flow
from losses import OBJECTIVES
from support import processes
from support.run import read_metrics
from test_data import small_data_set

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_the_mean_over_the_shares_is_the_gradient_of_the_joint_batch(loss, monkeypatch):
    flow = fc_flow(5, bend=1.0).double()
    x = torch.randn(12, 5, dtype=torch.float64)

    def gradients():
        torch.manual_seed(1)
        value = OBJECTIVES[loss](flow, x, processes.share, sigma=0.4, xi=1.0, model_samples=8)
        return [value.detach(), *torch.autograd.grad(value, [*flow.parameters()], materialize_grads=True)]

    joint = gradients()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    shares = []
    for rank in range(4):
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        shares.append(gradients())
    torch.testing.assert_close([sum(parts) / 4 for parts in zip(*shares)], joint)
    assert not torch.allclose(shares[0][0], shares[1][0])


def test_the_average_is_that_of_loss_and_gradients(monkeypatch):
    """all_reduce sums over the processes: here over this one and one whose loss and gradients are all 3."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda flat: flat.add_(3 / 2))
    parameters = [torch.zeros(2, 3, requires_grad=True), torch.zeros(4, requires_grad=True)]
    for i, p in enumerate(parameters):
        p.grad = torch.full_like(p, float(i))
    assert processes.average(torch.tensor(5.0), parameters) == 4
    assert (parameters[0].grad == 1.5).all() and (parameters[1].grad == 2).all()


def launch(*arguments):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                           str(ROOT / "train_mnist.py"), *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("loss", ["dsm", "sml"])
def test_two_processes_under_torchrun_end_where_one_does_and_only_the_first_writes(tmp_path, loss):
    data = small_data_set(tmp_path)
    shared = ["--loss", loss, "--data", str(data), "--epochs", "3", "--batch-size", "50", "--device", "cpu"]
    done = launch(*shared, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test_nll") == 1 and done.stdout.count("epoch    3") == 1
    train_mnist.main([*shared, "--out", str(tmp_path / "one")])
    for a, b in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        assert a["val_nll"] == pytest.approx(b["val_nll"], rel=1e-5)
        assert (a["loss"] is None and b["loss"] is None) or a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["state"] for name in ("one", "two"))
    torch.testing.assert_close(one["model"], two["model"], rtol=1e-4, atol=1e-5)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two")]
    assert configs[0] == configs[1]
    if loss == "dsm":  # a run that is there: one line, and nothing of it is touched
        before = (tmp_path / "two" / "checkpoint.pt").read_bytes()
        failed = launch(*shared, "--out", str(tmp_path / "two"))
        assert failed.returncode != 0 and "already holds a run" in failed.stderr
        assert not [line for line in failed.stderr.splitlines() if line.startswith("RuntimeError")]
        assert (tmp_path / "two" / "checkpoint.pt").read_bytes() == before


def test_two_processes_go_on_from_a_checkpoint_of_one(tmp_path):
    shared = ["--loss", "ssm", "--sigma", "0.1", "--clip", "1", "--data", str(small_data_set(tmp_path)), "--epochs", "3",
              "--batch-size", "50", "--device", "cpu", "--out", str(tmp_path / "run")]
    train_mnist.main(shared)
    whole = (tmp_path / "run" / "metrics.jsonl").read_text()
    done = launch(*shared, "--resume")  # nothing is left to do but the end
    assert done.returncode == 0 and done.stdout.count("test_nll") == 1, done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == whole


def test_what_cannot_be_shared_is_one_line(monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    for shared, message in ((None, "start it without torchrun"),
                            ({"--batch-size": 51}, "2 processes cannot share --batch-size 51 alike")):
        with pytest.raises(processes.RunError, match=message), processes.joined("cpu", shared):
            pass


def test_the_device_is_the_one_that_was_asked_for(monkeypatch):
    with processes.joined("cpu") as device:
        assert device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with processes.joined("auto") as device:
        assert device.type == "cpu"
    with pytest.raises(processes.RunError, match="torch sees no GPU"), processes.joined("cuda"):
        pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with processes.joined("auto") as device:
        assert device == torch.device("cuda:0")
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "1")
    with pytest.raises(processes.RunError, match="none for process 2"), processes.joined("auto"):
        pass
