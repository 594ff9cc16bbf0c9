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
from conftest import checkpoint, stop_after, under_torchrun
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
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda flat: flat.add_(3 / 2))
    parameters = [torch.zeros(2, 3, requires_grad=True), torch.zeros(4, requires_grad=True)]
    for i, p in enumerate(parameters):
        p.grad = torch.full_like(p, float(i))
    assert processes.average(torch.tensor(5.0), parameters) == 4
    assert (parameters[0].grad == 1.5).all() and (parameters[1].grad == 2).all()


DRIVER = """
import json, sys
import torch.distributed as dist
import train_mnist
join = dist.init_process_group  # once for all runs: to join takes longer than to train
dist.init_process_group = lambda *arguments: dist.is_initialized() or join(*arguments)
dist.destroy_process_group = lambda: None
for arguments in json.loads(sys.argv[1]):
    train_mnist.main(arguments)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two processes that torchrun starts: they train with dsm and with sml, go on where one process had stopped, and at
    last start a run that is already there.   -> the folder of the runs, what the launch printed and its exit status"""
    folder = tmp_path_factory.mktemp("two")
    shared = ["--data", str(small_data_set(folder)), "--epochs", "3", "--batch-size", "50", "--device", "cpu"]
    runs = {name: [*shared, "--out", str(folder / name), "--loss", *flags] for name, flags in {
        "dsm": ["dsm"], "sml": ["sml"], "ssm": ["ssm", "--sigma", "0.1", "--clip", "1"]}.items()}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 2)
        train_mnist.main(runs["ssm"])
    (folder / "driver.py").write_text(DRIVER)
    arguments = [runs["dsm"], runs["sml"], [*runs["ssm"], "--resume"], runs["dsm"]]
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", str(folder / "driver.py"), json.dumps(arguments)]
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    for name, flags in runs.items():  # in the meantime
        train_mnist.main([*flags, "--out", str(folder / f"{name} by one")])
    printed, errors = process.communicate(timeout=180)
    return folder, subprocess.CompletedProcess(command, process.returncode, printed, errors)


@pytest.mark.parametrize("name", ["dsm", "sml", "ssm"])
def test_two_processes_under_torchrun_end_where_one_does(two, name):
    """Also those that go on from a checkpoint that one had written."""
    folder, done = two
    one, both = folder / f"{name} by one", folder / name
    for a, b in zip(read_metrics(one), read_metrics(both), strict=True):
        assert a["val_nll"] == pytest.approx(b["val_nll"], rel=1e-5)
        assert (a["loss"] is None and b["loss"] is None) or a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    states = [checkpoint(directory)["state"] for directory in (one, both)]
    torch.testing.assert_close(states[0]["model"], states[1]["model"], rtol=1e-4, atol=1e-5)
    assert (one / "config.json").read_bytes() == (both / "config.json").read_bytes()


def test_of_two_processes_only_the_first_one_writes_and_prints(two):
    folder, done = two
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("epoch ")] == [*"0123", *"0123", *"23"], done.stderr
    assert sum(line.startswith("test_nll") for line in lines) == 3
    assert {p.name for p in (folder / "sml").iterdir()} == {p.name for p in (folder / "sml by one").iterdir()}


def test_two_processes_do_not_touch_a_run_that_is_there_and_each_says_so_in_one_line(two):
    folder, done = two
    error, = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    assert done.returncode != 0 and "already holds a run" in error and "RuntimeError" not in done.stderr
    assert len(read_metrics(folder / "dsm")) == 4 and checkpoint(folder / "dsm")["state"]["epoch"] == 3


def test_what_cannot_be_shared_is_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "many")
    with processes.joined("cpu", None):  # without torchrun it says nothing
        pass
    under_torchrun(monkeypatch, 2)
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
    under_torchrun(monkeypatch, 1, index=1)
    with pytest.raises(processes.RunError, match="none for process 2"), processes.joined("auto"):
        pass
