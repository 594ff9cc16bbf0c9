"""Two processes that torchrun starts train as one."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_mnist
from conftest import assert_same_bits, checkpoint, failing, rows, timeless
from data import load_images
from ebflow import EBFlow
from support import processes, settings

ROOT = Path(__file__).parent.parent
DRIVER = """
import json, shutil, sys
import torch, torch.distributed as dist
import train_mnist
from support import processes
from support.run import Run

folder, runs = sys.argv[1], json.loads(sys.argv[2])
join, save, average, averaged, models = dist.init_process_group, Run.save, processes.average, [], []
dist.init_process_group = lambda backend: dist.is_initialized() or join(backend)  # once: it takes longer than to train
dist.destroy_process_group = lambda: None

def recording(tensors):
    average(tensors)
    averaged.append([t.detach().clone() for t in tensors])

def copying(run, row, *rest, **shown):
    save(run, row, *rest, **shown)
    models.append({name: p.clone() for name, p in run.parts["model"].state_dict().items()})
    if row["epoch"] == 1 and dist.get_rank() == 0 and run.directory.name == "dsm":
        shutil.copytree(run.directory, folder + "/stopped")
    dist.barrier()

processes.average, Run.save = recording, copying
for flags in runs:
    averaged.clear(), models.clear()
    if flags == runs[-1]:  # which is refused
        dist.barrier()
        print("refused", file=sys.stderr, flush=True)
    train_mnist.main(flags)
    torch.save([averaged, models], f"{folder}/{flags[flags.index('--out') + 1].split('/')[-1]}-{dist.get_rank()}.pt")
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory, npy):
    """Two processes train by dsm with the last actnorm at its moments and then steps of sml, go on where such a run had
    stopped, train by sml and by ssm, and at last start a run that is already there.

    -> folder, flags of each run, what torchrun said
    """
    folder = tmp_path_factory.mktemp("two")
    shared = ["--data", str(npy), "--epochs", "3", "--batch-size", "50", "--device", "cpu", "--lr", "1e-3"]
    dsm = ["--loss", "dsm", "--sml-steps", "3"]
    runs = {"dsm": dsm, "stopped": [*dsm, "--resume"], "sml": ["--loss", "sml", "--model-samples", "8"],
            "ssm": ["--loss", "ssm", "--actnorm", "none", "--sml-steps", "0"]}
    runs = {name: [*shared, "--out", str(folder / name), *flags] for name, flags in runs.items()}
    (folder / "driver.py").write_text(DRIVER)
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", str(folder / "driver.py"), str(folder),
               json.dumps([*runs.values(), runs["sml"]])]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (folder / "ssm-1.pt").exists(), done.stderr
    return folder, runs, done


def seen_by(folder, name):
    """What both processes saw of a run.   -> two pairs (what `average` gave, models after each epoch)"""
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", ["dsm", "sml", "ssm"])
def test_the_averaged_gradient_is_that_of_the_two_halves_of_the_batch_each_with_its_own_noise(two, npy, monkeypatch,
                                                                                              name):
    """The first step, where the last actnorm goes to its moments before. Each half is computed here, alone."""
    folder, runs, _ = two
    s, images = settings.parse(train_mnist.Settings, runs[name]), load_images(npy)[0]
    (averaged, _), (in_the_other, _) = seen_by(folder, name)
    assert all(map(torch.equal, sum(averaged, []), sum(in_the_other, [])))
    halves, orders = [], []
    for rank in (0, 1):
        torch.manual_seed(0)
        pre, flow = train_mnist.build(s, images)
        model = EBFlow([*pre.layers, *flow.layers], pre.shape)
        step, _ = train_mnist.make_step(s, pre, flow, model, copy.deepcopy(model))
        torch.manual_seed(1 + (rank << 24))
        orders.append(torch.randperm(250))
        seen, found = [], iter(averaged)

        def average(tensors):
            seen.append([t.detach().clone() for t in tensors])
            for tensor, mean in zip(tensors, next(found)):
                tensor.detach().copy_(mean)

        monkeypatch.setattr(processes, "average", average)
        step(images[orders[0][:50][rank::2]], 0)  # both take the order of the first
        halves.append(seen)
    assert len(halves[0]) == (2 if name == "dsm" else 1) and not torch.equal(*orders)  # other random numbers
    for first, second, mean in zip(*halves, averaged):
        torch.testing.assert_close([(a + b) / 2 for a, b in zip(first, second)], mean)
        assert not torch.allclose(first[0], second[0], rtol=1e-3)  # they had other images and other noise


def test_both_processes_have_the_same_weights_after_every_epoch(two):
    for name in ("dsm", "sml", "ssm"):
        (_, first), (_, second) = seen_by(two[0], name)
        assert len(first) == (5 if name == "dsm" else 4)
        for a, b in zip(first, second, strict=True):  # the last actnorm of dsm, too
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        assert not all(torch.equal(first[0][key], first[-1][key]) for key in first[0])


def test_a_run_of_two_that_is_resumed_ends_bit_for_bit_where_an_undisturbed_one_ends(two, capsys):
    folder, runs, _ = two
    assert_same_bits(*(checkpoint(folder / name)["state"] for name in ("dsm", "stopped")))
    assert timeless(rows(folder / "dsm")) == timeless(rows(folder / "stopped"))
    line = failing(train_mnist.main)(capsys, *runs["stopped"])  # one process has other noise
    assert "processes" in line and "2" in line and "1" in line


def test_only_the_first_process_writes_and_prints(two):
    folder, _, done = two
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[1] for line in lines if line[:1] == ["epoch"]] == [*"01234", *"234", *"0123", *"0123"], done.stderr
    assert sum(line[:1] == ["test_nll"] for line in lines) == 4
    files = {".lock", "checkpoint.pt", "config.json", "curves.png", "metrics.jsonl", "samples.png"}
    assert {path.name for path in (folder / "sml").iterdir()} == files


def test_two_processes_do_not_touch_a_run_that_is_there(two):
    folder, _, done = two
    assert done.returncode != 0 and "--overwrite" in done.stderr.split("refused")[-1]
    assert len(rows(folder / "sml")) == 4 and checkpoint(folder / "sml")["state"]["epoch"] == 3


def test_a_batch_that_the_processes_cannot_share_alike_is_an_error(npy, tmp_path):
    s = settings.parse(train_mnist.Settings, ["--data", str(npy), "--batch-size", "50", "--out", str(tmp_path)])
    with pytest.raises(processes.RunError, match="--batch-size 50"):
        train_mnist.train(s, torch.device("cpu"), 0, 3)


def test_the_device_is_the_one_that_was_asked_for(monkeypatch):
    for gpus, name, device in ((False, "cpu", "cpu"), (False, "auto", "cpu"), (True, "cpu", "cpu"),
                               (True, "auto", "cuda:0"), (True, "cuda", "cuda:0")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
        with processes.joined(name) as place:
            assert place == (torch.device(device), 0, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(processes.RunError, match="--device cpu"), processes.joined("cuda"):
        pass
