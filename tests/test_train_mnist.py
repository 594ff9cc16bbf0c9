"""The command `train_mnist.py`: what it writes, that a killed run resumes exactly, and how it fails."""

import contextlib
import copy
import functools
import io
import itertools
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import losses
import train_mnist
from conftest import assert_same_bits, checkpoint, failing, stop_after, timeless, under_torchrun
from data import dequantize, load_images
from ebflow import EBFlow, fc_flow, glow_flow, logit_preprocessing
from experiments.trained import load_mnist
from layers import ActNorm, AffineCoupling, LinearLayer
from losses import OBJECTIVES
from support import settings
from support.fast import fast_products
from support.optimization import cosine, trainable, update_average
from support.run import PICTURES, Run, RunError
from support.run import read_metrics as rows
from test_data import one_pixel_brighter, small_data_set, write_idx
from train_mnist import build, evaluate, main, make_step

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data_set(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def images(data):
    return load_images(data)[0]


def arguments(data, out, *extra):
    return ["--data", str(data), "--out", str(out), "--epochs", "2", "--batch-size", "50", "--device", "cpu", *extra]


fails = failing(main)


def parse(*flags):
    return settings.parse(settings.Mnist, flags)


def start(images, *flags):
    """What `train` makes before its first epoch.   -> settings, pre-processing, flow of z, of x, averaged, step, …"""
    s = parse(*flags)
    pre, flow = build(s, images)
    model = EBFlow([*pre.layers, *flow.layers], pre.shape)
    averaged = copy.deepcopy(model)
    return s, pre, flow, model, averaged, *make_step(s, pre, flow, model, averaged)


def spied(monkeypatch, loss):
    """The list of what that objective will see: pairs of its model and its batch."""
    seen, objective = [], OBJECTIVES[loss]

    def watched(model, x, **config):
        seen.append((model, x.detach().clone()))
        return objective(model, x, **config)

    monkeypatch.setitem(OBJECTIVES, loss, watched)
    return seen


# ---- Processes of their own ----------------------------------------------------------------------------------------

KILL = """
import os, signal, sys
import train_mnist
calls = iter(range(1, 10**6))
module, name, moment = {"in the middle of an epoch": (train_mnist, "update_average", 33),
                        "while it writes": (os, "replace", 10)}[sys.argv[1]]
function = getattr(module, name)
def killing(*arguments):
    if next(calls) == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments)
setattr(module, name, killing)
train_mnist.main(sys.argv[2:])
"""
# VmHWM, not ru_maxrss: that one a child takes over from its parent, which holds what the other tests left.
MEMORY = """
import sys, torch, train_mnist
step, calls = torch.optim.Adam.step, []
def stopping(self, *arguments):
    calls.append(1)
    if len(calls) == 2:
        sys.exit(print(open("/proc/self/status").read()))
    return step(self, *arguments)
torch.optim.Adam.step = stopping
train_mnist.main(sys.argv[1:])
"""


@pytest.fixture(scope="module", autouse=True)
def children_first(request):
    """They run beside the other tests, if a test that was selected is about them."""
    if any("children" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("children")


@pytest.fixture(scope="module")
def children(data, tmp_path_factory):
    """The processes that three tests are about.   -> {name: (process, directory of its run)}"""
    started = {}
    for name in ("in the middle of an epoch", "while it writes", "memory"):
        out = tmp_path_factory.mktemp("child")
        command = [KILL, name, *arguments(data, out, "--epochs", "12")]
        if name == "memory":
            command = [MEMORY, "--epochs", "1", "--batch-size", "2500", "--out", str(out), "--device", "cpu"]
        started[name] = subprocess.Popen([sys.executable, "-c", *command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                         stderr=subprocess.PIPE), out
    yield started
    for process, _ in started.values():
        process.kill()
        process.communicate()


# ---- What a run leaves -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A function: objective -> directory of a run of 8 epochs, and what it printed. Each run is made once."""
    @functools.cache
    def run(loss):
        out = tmp_path_factory.mktemp(loss)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            main(arguments(data, out, "--loss", loss, "--epochs", "8", "--normalize", "center"))
        return out, printed.getvalue()
    return run


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_a_run_of_every_objective_leaves_its_files_and_improves(data, finished, loss):
    out, printed = finished(loss)
    assert {p.name for p in out.iterdir()} == {"checkpoint.pt", "config.json", "curves.png", "metrics.jsonl",
                                               "samples.png"}
    metrics = rows(out)
    assert [row["epoch"] for row in metrics] == list(range(9)) and metrics[-1]["step"] == 8 * 5
    assert metrics[-1]["val_nll"] < metrics[0]["val_nll"]
    last = metrics[-1]
    assert last["test_bpd"] == pytest.approx(last["test_nll"] / (16 * math.log(2)))
    best = min(metrics[1:], key=lambda row: row["val_nll"])
    assert last["best_epoch"] == best["epoch"] and last["best_val_nll"] == best["val_nll"]
    figures = dict(line.split(maxsplit=1) for line in printed.splitlines()[-6:])
    assert figures["test_nll"] == f"{last['test_nll']:.4f}" and figures["best_epoch"] == str(best["epoch"])
    splits = load_images(data)
    model = load_mnist(out, splits[0])[-1]  # the test split is read with the weights of the best epoch
    assert evaluate("val", model, splits[1])["val_nll"] == pytest.approx(best["val_nll"])
    assert evaluate("test", model, splits[2])["test_nll"] == pytest.approx(last["test_nll"])
    assert json.loads((out / "config.json").read_text())["loss"] == loss


@pytest.mark.parametrize("loss", OBJECTIVES)
@pytest.mark.parametrize("arch", ["cnn", "glow"])
def test_a_run_of_every_other_architecture_and_objective_leaves_its_files_and_improves(data, tmp_path, request, arch,
                                                                                      loss):
    drawn = loss == "dsm" or request.getfixturevalue("no_pictures")  # pictures take longer than these runs
    small = ["--width", "4", "--depth", "2"] if arch == "glow" else []
    flags = ["--epochs", "4", "--lr", "1e-3", "--normalize", "center", *small]  # whitened, there is little to improve
    main(arguments(data, tmp_path, "--arch", arch, "--loss", loss, *flags))
    metrics = rows(tmp_path)
    assert len(metrics) == 5 and (tmp_path / "samples.png").exists() == bool(drawn)
    assert min(row["val_nll"] for row in metrics[1:]) < metrics[0]["val_nll"]
    splits = load_images(data)
    s, pre, flow, model = load_mnist(tmp_path, splits[0])  # what the experiments start from
    assert (s.arch, s.loss, s.lr) == (arch, loss, 1e-3)
    assert evaluate("test", model, splits[2])["test_nll"] == pytest.approx(metrics[-1]["test_nll"])
    x = torch.full((1, 1, 4, 4), 9.0)
    assert torch.equal(flow(pre(x)), model(x))


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain")
    main(arguments(data, out, "--lr", "1e-3"))
    return rows(out)[-1]["test_nll"]


@pytest.mark.parametrize("flags", [["--no-map"], ["--no-ema"], ["--paper"], ["--normalize", "none"],
                                   ["--normalize", "center"], ["--normalize", "scale"], ["--clip", "1"],
                                   ["--actnorm", "none"], ["--seed", "3"]], ids=str)
def test_every_switch_runs_and_changes_the_result(data, plain, tmp_path, no_pictures, flags):
    main(arguments(data, tmp_path, "--lr", "1e-3", *flags))
    assert rows(tmp_path)[-1]["test_nll"] != plain


@pytest.mark.parametrize("flags, saves", [([], None), (["--no-ema"], None), ([], 2), ([], 3)], ids=str)
def test_the_weights_of_the_best_epoch_are_a_copy_that_later_steps_leave_alone(data, tmp_path, no_pictures, monkeypatch,
                                                                               flags, saves):
    """Epoch 1 of 3 is made the best one, also in a run that is stopped then or later."""
    states = []

    def worse_and_worse(split, model, images):
        states.append(copy.deepcopy(model.state_dict()))
        return {f"{split}_nll": float(len(states)), f"{split}_bpd": 0.0}

    monkeypatch.setattr(train_mnist, "evaluate", worse_and_worse)
    run = arguments(data, tmp_path, "--epochs", "3", "--lr", "1e-2", *flags)
    if saves:
        with monkeypatch.context() as patched, pytest.raises(SystemExit):
            stop_after(patched, saves)
            main(run)
    main([*run, *["--resume"] * bool(saves)])
    assert len(states) == 5 and rows(tmp_path)[-1]["best_epoch"] == 1 and rows(tmp_path)[-1]["test_nll"] == 5.0
    _, first, second, _, tested = states
    assert not torch.equal(first["layers.4.weight"], second["layers.4.weight"])
    assert all(torch.equal(first[name], tested[name]) for name in first)
    state = checkpoint(tmp_path)["state"]
    assert all(torch.equal(first[name], state["best"]["model"][name]) for name in first)
    assert not torch.equal(state["model"]["layers.4.weight"], state["averaged"]["layers.4.weight"])


# ---- Other images ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch", ["fc", "cnn", "glow"])
def test_colour_images_go_through_every_architecture(tmp_path, arch):
    shade = np.random.default_rng(0).integers(0, 200, (420, 1, 1, 3))
    images = shade + np.random.default_rng(1).integers(0, 56, (420, 8, 8, 3))
    np.save(tmp_path / "colour.npy", images.astype(np.uint8))
    small = ["--width", "4", "--depth", "1"] if arch == "glow" else []
    main(arguments(tmp_path / "colour.npy", tmp_path / "run", "--arch", arch, "--loss", "dsm", "--flip", *small))
    start, *_, last = rows(tmp_path / "run")
    assert last["val_nll"] < start["val_nll"]
    assert last["test_bpd"] == pytest.approx(last["test_nll"] / (192 * math.log(2)))
    assert (tmp_path / "run" / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_flip_mirrors_the_images_of_every_other_step(images, monkeypatch):
    seen = []
    monkeypatch.setattr(train_mnist, "dequantize", lambda images: seen.append(images.clone()) or dequantize(images))
    for flip in ("--flip", "--no-flip"):
        step = start(images, *[flip] * (flip == "--flip"), "--arch", "fc")[5]
        seen.clear()
        for n in range(3):
            step(images[:9], n)
        for n, shown in enumerate(seen):
            assert torch.equal(shown, images[:9].flip(3) if n == 1 and flip == "--flip" else images[:9])


# ---- Killed and resumed ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    main(arguments(data, out, "--epochs", "12"))
    return out


@pytest.mark.parametrize("moment, epochs", [("before the first checkpoint", -1), ("after the start", 0),
                                            ("after 1 epoch", 1), ("in the middle of an epoch", 6),
                                            ("while it writes", 3), ("between its checkpoint and its metrics", 4),
                                            ("before the pictures", 12)])
def test_a_run_that_is_killed_and_resumed_ends_exactly_like_an_undisturbed_one(data, undisturbed, tmp_path, children,
                                                                               monkeypatch, request, moment, epochs):
    pictures = {"curves.png", "samples.png"}
    if moment != "before the pictures":
        request.getfixturevalue("no_pictures")
        pictures = set()
    run = arguments(data, tmp_path, "--epochs", "12")
    if moment in ("in the middle of an epoch", "while it writes"):
        process, tmp_path = children[moment]
        run = arguments(data, tmp_path, "--epochs", "12")
        error = process.communicate(timeout=120)[1]
        assert process.returncode == -signal.SIGKILL, error
        assert (tmp_path / ".checkpoint.pt.part").exists() == (moment == "while it writes")
    else:
        with monkeypatch.context() as patched:
            if moment == "before the first checkpoint":
                patched.setattr(train_mnist, "evaluate", interrupted_at(1, evaluate))
            elif moment == "between its checkpoint and its metrics":
                patched.setattr(os, "fsync", interrupted_at(11, os.fsync))
            elif moment == "before the pictures":
                patched.setattr(Run, "finish", interrupted_at(1, Run.finish))
            else:
                stop_after(patched, epochs + 1)
            with pytest.raises(SystemExit):
                main(run)
    assert (tmp_path / "config.json").exists() and (tmp_path / "checkpoint.pt").exists() == (epochs >= 0)
    assert epochs < 0 or checkpoint(tmp_path)["state"]["epoch"] == epochs
    main([*run, "--resume"])
    assert_same_bits(checkpoint(undisturbed)["state"], checkpoint(tmp_path)["state"])
    assert timeless(rows(undisturbed)) == timeless(rows(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "config.json", "metrics.jsonl"} | pictures
    assert all((tmp_path / name).read_bytes() == (undisturbed / name).read_bytes() for name in pictures)


def interrupted_at(call, function):
    """The function, with Ctrl-C in place of that call."""
    calls = itertools.count(1)

    def interrupted(*arguments):
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments)
    return interrupted


def test_the_time_of_a_resumed_run_goes_on_from_its_checkpoint(data, tmp_path, no_pictures, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(SystemExit):
            main(arguments(data, tmp_path))
    seconds = [row["seconds"] for row in rows(tmp_path)]
    assert 0 < seconds[0] < seconds[1] and rows(tmp_path)[1]["batches_per_second"] > 5 / seconds[1]
    stopped = checkpoint(tmp_path)
    stopped["metrics"][-1]["seconds"] = 1000.0
    torch.save(stopped, tmp_path / "checkpoint.pt")
    main(arguments(data, tmp_path, "--resume"))
    assert 1000 < rows(tmp_path)[-1]["seconds"] < 1100


def test_the_batches_per_second_are_those_of_training_alone(data, tmp_path, no_pictures, monkeypatch):
    def slow(split, *rest):
        time.sleep(0.5)
        return {f"{split}_nll": 1.0, f"{split}_bpd": 0.0}

    monkeypatch.setattr(train_mnist, "evaluate", slow)
    main(arguments(data, tmp_path, "--epochs", "1", "--actnorm", "none"))
    start, last = rows(tmp_path)
    assert start["batches_per_second"] is None and last["batches_per_second"] > 5 / 0.5
    assert last["seconds"] > 1  # in which evaluation is


def test_a_glow_with_its_last_actnorm_at_the_moments_resumes_exactly(data, tmp_path, no_pictures, monkeypatch):
    flags = ["--arch", "glow", "--width", "4", "--depth", "2", "--epochs", "4", "--actnorm", "moments"]
    main(arguments(data, tmp_path / "whole", *flags))
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        with pytest.raises(SystemExit):
            main(arguments(data, tmp_path / "stopped", *flags))
    main(arguments(data, tmp_path / "stopped", *flags, "--resume"))
    assert_same_bits(*(checkpoint(tmp_path / name)["state"] for name in ("whole", "stopped")))
    assert timeless(rows(tmp_path / "whole")) == timeless(rows(tmp_path / "stopped"))


@pytest.mark.parametrize("arch", ["fc", "cnn"])
def test_a_run_of_published_settings_can_be_taken_further_and_ends_as_if_asked_at_once(data, tmp_path, no_pictures,
                                                                                      capsys, arch):
    flags = ["--paper", "--arch", arch, "--loss", "dsm", "--clip", "1"]
    main(arguments(data, tmp_path / "whole", *flags, "--epochs", "3"))
    main(arguments(data, tmp_path / "further", *flags, "--epochs", "1"))
    main(arguments(data, tmp_path / "further", *flags, "--epochs", "3", "--resume"))
    assert_same_bits(*(checkpoint(tmp_path / name)["state"] for name in ("whole", "further")))
    assert timeless(rows(tmp_path / "whole")) == timeless(rows(tmp_path / "further"))
    fewer = arguments(data, tmp_path / "further", *flags, "--epochs", "2", "--resume")
    assert "checkpoint.pt is of epoch 3: raise --epochs" in fails(capsys, *fewer)
    main(arguments(data, tmp_path / "cosine", "--arch", arch, "--epochs", "1"))  # which depends on the epochs
    line = fails(capsys, *arguments(data, tmp_path / "cosine", "--arch", arch, "--epochs", "3", "--resume"))
    assert "epochs is 1 there and 3 here" in line


def test_training_never_writes_over_a_run_by_accident(data, tmp_path, no_pictures, capsys):
    main(arguments(data, tmp_path))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert "--resume" in fails(capsys, *arguments(data, tmp_path))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    main(arguments(data, tmp_path, "--overwrite", "--epochs", "1"))
    assert len(rows(tmp_path)) == 2


def test_overwrite_removes_everything_of_the_old_run_before_the_new_one_starts(data, tmp_path, no_pictures, capsys,
                                                                               monkeypatch):
    main(arguments(data, tmp_path))
    for name in PICTURES:
        (tmp_path / name).write_bytes(b"old")
    monkeypatch.setattr(train_mnist, "evaluate", interrupted_at(1, evaluate))
    with pytest.raises(SystemExit):
        main(arguments(data, tmp_path, "--overwrite", "--seed", "1"))
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1


def test_a_checkpoint_of_other_settings_or_other_data_is_refused(data, finished, tmp_path, capsys):
    out, _ = finished("dsm")
    line = fails(capsys, *arguments(data, out, "--epochs", "8", "--normalize", "center", "--resume", "--lr", "0.5"))
    assert "lr is 0.0001 there" in line and "0.5 here" in line
    one_pixel_brighter(tmp_path)
    assert "sha256" in fails(capsys, *arguments(tmp_path, out, "--epochs", "8", "--normalize", "center", "--resume"))


def one_byte_changed(checkpoint):
    """In the middle of its largest tensor: those between the tensors mean nothing."""
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as archive:
        tensors = [record for record in archive.infolist() if "/data/" in record.filename]
        tensor = archive.read(max(tensors, key=lambda record: record.file_size))
    i = checkpoint.index(tensor) + len(tensor) // 2
    return checkpoint[:i] + bytes([checkpoint[i] ^ 255]) + checkpoint[i + 1:]


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b"", lambda b: b"not a checkpoint", one_byte_changed])
def test_a_damaged_checkpoint_is_refused(data, finished, tmp_path, capsys, damage):
    (tmp_path / "checkpoint.pt").write_bytes(damage((finished("dsm")[0] / "checkpoint.pt").read_bytes()))
    assert "checkpoint.pt is damaged" in fails(capsys, *arguments(data, tmp_path, "--resume"))


class Code:
    """An object whose pickle runs a command where it is read."""

    def __init__(self, directory):
        self.directory = directory

    def __reduce__(self):
        return os.mkdir, (str(self.directory),)


def test_a_checkpoint_with_code_is_refused_and_the_code_does_not_run(data, finished, tmp_path, capsys):
    torch.save(checkpoint(finished("dsm")[0]) | {"more": Code(tmp_path / "ran")}, tmp_path / "checkpoint.pt")
    assert "checkpoint.pt is damaged (UnpicklingError)" in fails(capsys, *arguments(data, tmp_path, "--resume"))
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_another_version_is_one_line(data, finished, tmp_path, capsys):
    old = checkpoint(finished("dsm")[0])
    del old["state"]["averaged"]
    torch.save(old, tmp_path / "checkpoint.pt")
    line = fails(capsys, *arguments(data, tmp_path, "--epochs", "8", "--normalize", "center", "--resume"))
    assert "of another version of this code: start anew with --overwrite" in line


def test_lack_of_memory_is_no_other_version(data, finished, capsys, monkeypatch):
    def full(self, state):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(EBFlow, "load_state_dict", full)
    line = fails(capsys, *arguments(data, finished("dsm")[0], "--epochs", "8", "--normalize", "center", "--resume"))
    assert line.startswith("error: not enough memory")


def test_resuming_nothing_is_an_error(data, tmp_path, capsys):
    assert "nothing to resume" in fails(capsys, *arguments(data, tmp_path / "none", "--resume"))


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_whole(data, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(SystemExit):
            main(arguments(data, tmp_path))
    before, limits = (tmp_path / "checkpoint.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        line = fails(capsys, *arguments(data, tmp_path, "--resume"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line.startswith("error: cannot write")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and not (tmp_path / ".checkpoint.pt.part").exists()


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_control_c_and_sigterm_are_one_line_and_the_run_can_go_on(data, tmp_path, no_pictures, monkeypatch, capsys,
                                                                  kind):
    def pressed(averages, parameters, n):
        if n == 7:
            signal.raise_signal(kind)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with monkeypatch.context() as patched, pytest.raises(SystemExit) as exit:
            patched.setattr(train_mnist, "update_average", pressed)
            main(arguments(data, tmp_path))
    finally:
        signal.signal(signal.SIGINT, before)
    assert exit.value.code == 130 and len(rows(tmp_path)) == 2
    line = capsys.readouterr().err.strip()
    assert line == "stopped: what was written is kept; a training run continues with --resume"
    main(arguments(data, tmp_path, "--resume"))
    assert len(rows(tmp_path)) == 3


def test_training_on_mnist_stays_under_one_and_a_half_gibibytes(children):
    """Up to the second step: what follows has the same sizes."""
    process, _ = children["memory"]
    printed, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert int(re.search(r"VmHWM:\s*(\d+) kB", printed).group(1)) < 1.5 * 2**20


# ---- A training step -------------------------------------------------------------------------------------------------

BY_HAND = {
    "ml": lambda flow, z, s: -flow.log_prob(z).mean(),
    "sml": lambda flow, z, s: flow.energy(z).mean() - flow.energy(flow.sample(s.model_samples)).mean(),
    "ssm": lambda flow, z, s: losses.ssm(flow.energy, z),
    "dsm": lambda flow, z, s: losses.dsm(flow.energy, z, s.sigma),
    "fdssm": lambda flow, z, s: losses.fdssm(flow.energy, z, s.xi),
}


@pytest.mark.parametrize("flags", [
    *(["--loss", loss, "--bias", "0.1"] for loss in OBJECTIVES), ["--loss", "ssm", "--sigma", "2"],
    ["--loss", "fdssm", "--sigma", "2"], ["--loss", "dsm", "--clip", "0.1"], ["--loss", "ssm", "--weight-decay", "0.1"],
    ["--loss", "ssm", "--optimizer", "rmsprop"], ["--loss", "ml", "--no-map"], ["--loss", "dsm", "--paper"]], ids=str)
def test_a_step_is_one_of_torch_s_optimisers_down_the_clipped_gradient_and_the_average_follows(float64, images, flags):
    s, pre, flow, model, averaged, step, optimizer = start(images, "--actnorm", "none", *flags, "--lr", "1e-2")
    theirs, average = copy.deepcopy(model), copy.deepcopy(model)
    matched = EBFlow(theirs.layers[len(pre.layers):], pre.shape) if s.map else theirs
    kind = torch.optim.RMSprop if s.optimizer == "rmsprop" else torch.optim.Adam
    expected = kind(trainable(theirs), lr=1e-2, weight_decay=s.weight_decay)
    for n in range(4):
        torch.manual_seed(n)
        figures = step(images[:50], n)

        torch.manual_seed(n)
        z = dequantize(images[:50]).view(50, 16)
        z = pre(z) if s.map else z
        if s.loss in ("ssm", "fdssm"):
            z = z + s.sigma * torch.randn_like(z) if s.sigma else z
        expected.zero_grad()
        loss = BY_HAND[s.loss](matched, z, s)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable(theirs), s.clip or torch.inf)
        assert figures.keys() == {"loss", "grad_norm"}
        torch.testing.assert_close([figures["loss"], figures["grad_norm"]], [loss.detach(), norm])
        if s.clip:
            clipped = torch.cat([p.grad.flatten() for p in trainable(model)]).norm()
            assert clipped.item() == pytest.approx(s.clip, rel=1e-4) and norm > s.clip
        expected.step()
        m = (1 + n) / (10 + n) if n else 0.0
        with torch.no_grad():
            for a, p in zip(trainable(average), trainable(theirs)):
                a.copy_(m * a + (1 - m) * p)
    torch.testing.assert_close(dict(model.named_parameters()), dict(theirs.named_parameters()))
    torch.testing.assert_close(dict(averaged.named_parameters()), dict(average.named_parameters()))


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_every_parameter_that_is_trained_gets_a_gradient_and_no_other_does(images, loss):
    for arch in ("fc", "cnn", "glow"):
        small = ["--width", "4", "--depth", "1"] if arch == "glow" else []
        _, _, flow, model, _, step, _ = start(images, "--arch", arch, "--loss", loss, *small)
        step(images[:20], 0)
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        assert len(trainable(model)) == len(trainable(flow)) > 3


@pytest.mark.parametrize("flag, first, low, high", [("--map", "FullyConnected", -20, 20),
                                                    ("--no-map", "Standardize", 0, 256)])
def test_the_objective_sees_the_flow_of_z_after_pre_processing_and_without_map_that_of_x(
        data, tmp_path, no_pictures, monkeypatch, flag, first, low, high):
    seen = spied(monkeypatch, "dsm")
    main(arguments(data, tmp_path, "--epochs", "1", flag))
    model, x = seen[0]
    assert type(model.layers[0]).__name__ == first and len(model.layers) == (4 if flag == "--map" else 8)
    assert low <= x.min() and x.max() <= high and (x.max() > 100) == (flag == "--no-map")


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    """A data set whose training images are told apart by their shade."""
    directory = tmp_path_factory.mktemp("shades")
    for name, count in (("train", 300), ("t10k", 40)):
        shade = (torch.arange(count) % 256).to(torch.uint8)[:, None, None]
        write_idx(directory / f"{name}-images-idx3-ubyte.gz", shade.expand(count, 4, 4))
    return directory


@pytest.fixture
def batches(shades, tmp_path, no_pictures, monkeypatch):
    """A function: seed -> the batches of a run of two epochs, as the objective sees them."""
    def run(seed):
        with monkeypatch.context() as patched:
            seen = spied(patched, "ssm")
            main(arguments(shades, tmp_path / str(seed), "--loss", "ssm", "--no-map", "--normalize", "none",
                           "--sigma", "0", "--actnorm", "none", "--batch-size", "60", "--seed", str(seed),
                           "--overwrite"))
        return [x for _, x in seen]
    return run


def test_an_epoch_sees_every_image_once_but_those_that_do_not_fill_a_batch(batches):
    seen = [x[:, 0].floor().int() for x in batches(0)]
    assert [len(batch) for batch in seen] == [60] * 8
    for epoch in (seen[:4], seen[4:]):
        assert len(set(torch.cat(epoch).tolist())) == 240 and max(torch.cat(epoch)) < 250
        assert not torch.equal(epoch[0], epoch[0].sort().values)


def test_every_epoch_and_every_seed_has_its_own_order_and_noise_and_the_same_seed_the_same(batches):
    first, again, other = batches(0), batches(0), batches(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for a, b in zip(first, [*first[4:], *other], strict=False):  # its two epochs
        assert not torch.equal(a.floor(), b.floor()) and not torch.equal(a.frac(), b.frac())
    for a, b in zip(first, other, strict=True):
        assert not torch.equal(a.floor(), b.floor()) and not torch.equal(a.frac(), b.frac())


def test_the_seed_decides_the_weights_that_a_glow_starts_with(data, tmp_path, no_pictures, monkeypatch):
    starts = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        with monkeypatch.context() as patched, pytest.raises(SystemExit):
            stop_after(patched, 1)
            main(arguments(data, tmp_path / name, *GLOW, "--seed", seed))
        starts.append(checkpoint(tmp_path / name)["state"]["model"]["layers.6.weight"])  # a 1×1 convolution
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_the_sliced_objectives_see_their_points_under_noise(images, monkeypatch):
    for loss, sigma in itertools.product(("ssm", "fdssm"), (0, 2)):
        with monkeypatch.context() as patched:
            seen = spied(patched, loss)
            _, pre, *_, step, _ = start(images, "--loss", loss, "--normalize", "center", "--sigma", str(sigma))
            step(images, 1)
        z = pre(dequantize(images).flatten(1))
        assert (seen[0][1].var() - z.var() - sigma**2).abs() < 0.3


@pytest.mark.parametrize("loss, amx, inside", [
    ("dsm", True, ["tf32", "tf32", "bf16"]), ("fdssm", True, ["ieee", "ieee", "ieee"]),
    ("fdssm", False, ["ieee", "ieee", "bf16"])])
def test_fast_products_are_for_training_only_and_short_ones_not_for_fdssm(monkeypatch, images, loss, amx, inside):
    """TF32 on a GPU and bfloat16 on a CPU inside; what was there before outside, after an error, too."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    products = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul
    before = [kind.fp32_precision for kind in products]
    with pytest.raises(KeyError), fast_products(loss):
        assert [kind.fp32_precision for kind in products] == inside != before
        raise KeyError
    assert [kind.fp32_precision for kind in products] == before

    def objective(model, x, **config):
        assert [kind.fp32_precision for kind in products] == inside
        return model.energy(x).mean()

    monkeypatch.setitem(OBJECTIVES, loss, objective)
    *_, step, _ = start(images, "--loss", loss)
    step(images[:20], 1)
    assert [kind.fp32_precision for kind in products] == before


def test_the_moving_average_is_the_recursion_of_the_paper_after_its_first_steps():
    model, average = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    expected = None
    for n in range(200):
        with torch.no_grad():
            model.weight.copy_(torch.randn(1, 2))
        update_average(list(average.parameters()), list(model.parameters()), n, m=0.9)
        m = min(0.9, (1 + n) / (10 + n)) if n else 0.0
        expected = model.weight.detach().clone() if n == 0 else m * expected + (1 - m) * model.weight.detach()
    torch.testing.assert_close(average.weight.detach(), expected)
    before = [p.detach().clone() for p in average.parameters()]
    update_average(list(average.parameters()), list(model.parameters()), 10**6)
    for a, b, p in zip(average.parameters(), before, model.parameters()):
        torch.testing.assert_close(a.detach(), 0.999 * b + 0.001 * p.detach())


def test_the_schedules():
    half = lambda t: 0.5 * (1 + math.cos(math.pi * t))  # noqa: E731
    found = [cosine(t) for t in (0, 0.025, 0.05, 0.5, 0.75, 1)]
    assert found == pytest.approx([0, 0.5 * half(0.025), half(0.05), 0.5, half(0.75), 0])
    found = [cosine(t, plateau=0.6) for t in (0.025, 0.05, 0.3, 0.6, 0.8, 1)]
    assert found == pytest.approx([0.5, 1, 1, 1, 0.5, 0])


@pytest.mark.parametrize("flags, epochs, expected", [
    ([], 4, lambda step, epoch: 0.1 * cosine(step / 20)),
    (["--paper"], 55, lambda step, epoch: 0.1 * 0.95 ** min(epoch - 1, 49)),
    (["--paper", "--arch", "cnn", "--loss", "sml"], 3, lambda step, epoch: 0.1 * 0.925 ** (epoch - 1))])
def test_the_learning_rate_moves_at_every_step_and_in_the_paper_after_every_epoch(data, tmp_path, no_pictures,
                                                                                  monkeypatch, flags, epochs, expected):
    rates = []

    def make_step(s, pre, flow, model, averaged):
        optimizer = torch.optim.SGD(model.parameters(), lr=123.0)

        def step(images, n):
            assert n == len(rates)
            rates.append(optimizer.param_groups[0]["lr"])
            return {"loss": torch.zeros(())}
        return step, optimizer

    monkeypatch.setattr(train_mnist, "make_step", make_step)
    monkeypatch.setattr(train_mnist, "evaluate", lambda split, *rest: {f"{split}_nll": 0.0, f"{split}_bpd": 0.0})
    main(arguments(data, tmp_path, "--lr", "0.1", *flags, "--epochs", str(epochs)))
    assert rates == pytest.approx([expected(n, 1 + n // 5) for n in range(5 * epochs)])


# ---- The model -------------------------------------------------------------------------------------------------------

def test_the_nll_is_that_of_the_image_by_the_brute_force_jacobian(float64):
    flow = EBFlow([*logit_preprocessing((4,), 0.5).layers, *fc_flow(4).layers], (4,))
    images = torch.randint(0, 256, (3, 4), dtype=torch.uint8)
    torch.manual_seed(0)
    x = images + torch.rand(3, 4)
    u = flow(x)
    jacobian = torch.stack([torch.func.jacrev(flow)(sample[None]).view(4, 4) for sample in x])
    nll = -(torch.distributions.Normal(0, 1).log_prob(u).sum(1) + torch.linalg.slogdet(jacobian).logabsdet).mean()
    found = evaluate("test", flow, images)
    assert found == {"test_nll": pytest.approx(nll.item(), rel=1e-12),
                     "test_bpd": pytest.approx(nll.item() / (4 * math.log(2)), rel=1e-12)}


def test_the_nll_is_a_mean_over_all_images_with_the_same_noise_at_every_call(images):
    flow = EBFlow([*logit_preprocessing((16,), 0.5).layers, *fc_flow(16).layers], (16,))
    many = torch.cat([images, 255 - images, *9 * [images]])  # 2750: three batches, the last one smaller
    torch.manual_seed(0)
    x = torch.cat([dequantize(batch) for batch in many.split(1000)]).flatten(1)
    torch.manual_seed(7)
    found = evaluate("val", flow, many)["val_nll"]
    assert found == evaluate("val", flow, many)["val_nll"] == pytest.approx(-flow.log_prob(x).mean().item(), rel=1e-5)


@pytest.mark.parametrize("arch", ["fc", "cnn", "glow"])
def test_the_preprocessing_whitens_and_is_no_part_of_what_is_trained(images, arch):
    _, pre, flow, model, *_ = start(images, "--arch", arch, "--loss", "fdssm", "--normalize", "whiten")
    x = dequantize(images).view(len(images), *flow.shape)
    z = pre(x).flatten(1)
    assert z.mean(0).abs().max() < 0.1 and (torch.cov(z.T) - torch.eye(16)).abs().max() < 0.1
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in flow.parameters() if p.requires_grad)
    assert arch != "fc" or trained == 2 * 16 * 17
    torch.testing.assert_close(pre.inverse(pre(x)), x, rtol=1e-3, atol=0.1)


@pytest.mark.parametrize("arch", ["fc", "cnn"])
@pytest.mark.parametrize("s", [0.5, 1.0, 2.0])
def test_the_moments_are_those_of_all_training_images_in_units_of_s(arch, s):
    """Three thousand images, each thousand of another shade; tested with other noise than the moments were measured."""
    thousands = [torch.randint(low, low + 50, (1000, 1, 4, 4)).to(torch.uint8) for low in (1, 100, 200)]
    images = torch.cat(thousands)
    z, shape = {}, (16,) if arch == "fc" else (1, 4, 4)
    for normalize in ("none", "center", "scale", "whiten"):
        pre, _ = build(parse("--arch", arch, "--loss", "ml", "--s", str(s), "--normalize", normalize), images)
        torch.manual_seed(7)
        z[normalize] = pre(dequantize(images).view(3000, *shape)).flatten(1)
    torch.manual_seed(7)
    logits = torch.logit(dequantize(images).flatten(1) / 256)
    torch.testing.assert_close(z["none"], logits / s, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(z["center"], (logits - logits.mean(0)) / s, rtol=1e-3, atol=0.01 / s)
    torch.testing.assert_close(z["scale"], (logits - logits.mean(0)) / logits.std(0), rtol=1e-2, atol=0.01)
    assert z["whiten"].mean(0).abs().max() < 0.05
    assert (torch.cov(z["whiten"].T) - torch.eye(16)).abs().max() < 0.05


def test_centred_pixels_have_mean_0(images):
    pre, _ = build(parse("--loss", "ml"), images)
    assert pre(dequantize(images.flatten(1))).mean(0).abs().max() < 0.05


def test_scaled_pixels_have_mean_0_and_variance_1(images):
    pre, _ = build(parse("--arch", "cnn", "--normalize", "scale"), images)
    z = pre(dequantize(images))
    assert z.mean(0).abs().max() < 0.05 and (z.std(0) - 1).abs().max() < 0.05


def test_a_singular_covariance_is_one_line_with_whitening_and_nothing_without(tmp_path, no_pictures, capsys):
    data = small_data_set(tmp_path, n=18)  # 15 training images of 16 pixels
    flags = arguments(data, tmp_path / "run", "--batch-size", "5", "--epochs", "1")
    line = fails(capsys, *flags, "--normalize", "whiten")
    assert "15 images have a singular covariance and cannot be whitened" in line and "--normalize center" in line
    main([*flags, "--normalize", "scale"])


def test_an_image_that_does_not_squeeze_is_one_line(tmp_path, capsys):
    small_data_set(tmp_path, size=6)
    line = fails(capsys, *arguments(tmp_path, tmp_path / "run", "--arch", "cnn"))
    assert "--arch cnn on images of 6×6: cannot squeeze" in line


def test_images_without_pixels_are_one_line(tmp_path, capsys):
    for name in ("train", "t10k"):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", torch.zeros(30, 0, 4, dtype=torch.uint8))
    line = fails(capsys, *arguments(tmp_path, tmp_path / "run"))
    assert "holds images without pixels: their shape is (1, 0, 4)" in line


# ---- Actnorms --------------------------------------------------------------------------------------------------------

GLOW = ["--arch", "glow", "--width", "4", "--depth", "2"]


def actnorm_outputs(flow, x):
    """What each actnorm makes of a batch.   -> a list of (C, n)"""
    outputs = []
    for layer in flow.layers:
        x = layer(x) if isinstance(layer, LinearLayer) else layer(x)[0]
        if isinstance(layer, ActNorm) or isinstance(getattr(layer, "layer", None), ActNorm):
            outputs.append(x[:, :getattr(layer, "channels", x.shape[1])].detach().transpose(0, 1).flatten(1))
    return outputs


def off(outputs):
    """How far the worst channel is from mean 0 and standard deviation 1."""
    return max(max(y.mean(1).abs().max().item(), (y.std(1) - 1).abs().max().item()) for y in outputs)


def test_a_glow_starts_with_every_actnorm_giving_mean_0_and_variance_1(images):
    pre, flow = build(parse(*GLOW, "--loss", "ml"), images)
    outputs = actnorm_outputs(flow, pre(dequantize(images)))
    assert len(outputs) == 5 and off(outputs) < 0.1


def test_actnorms_start_from_images_with_the_noise_of_dequantisation():
    """Dark images: without the noise every logit is near -14, with it they are spread."""
    images = torch.randint(0, 2, (1000, 1, 4, 4), dtype=torch.uint8)
    pre, flow = build(parse(*GLOW, "--loss", "ml", "--normalize", "none"), images)
    assert off(actnorm_outputs(flow, pre(dequantize(images)))) < 0.2


def test_the_couplings_of_a_glow_have_the_floor_of_its_settings(images):
    for flags, floor in ((["--loss", "ml"], 0.0), (["--loss", "dsm"], 0.5), (["--loss", "ml", "--floor", "0.3"], 0.3)):
        flow = build(parse(*GLOW, *flags), images)[1]
        assert [m.floor for m in flow.modules() if isinstance(m, AffineCoupling)] == 4 * [floor]


@pytest.mark.parametrize("actnorm", ["moments", "trained"])
def test_a_glow_s_last_actnorm_goes_to_the_moments_as_batches_pass_where_it_is_held_and_no_other_does(images, actnorm):
    _, pre, flow, _, _, step, optimizer = start(images, *GLOW, "--loss", "dsm", "--sigma", "2", "--actnorm", actnorm)
    *others, last = (m for m in flow.modules() if isinstance(m, ActNorm))
    assert last.log_scale.requires_grad == last.bias.requires_grad == (actnorm == "trained")
    assert len(others) == 4 and all(p.requires_grad for m in others for p in m.parameters())
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    z = pre(dequantize(images))
    apart = lambda noise: off(actnorm_outputs(flow, z + noise * torch.randn_like(z))[-1:])  # noqa: E731
    before, state = apart(2), copy.deepcopy(others)
    optimizer.param_groups[0]["lr"] = 0.0  # nothing else moves
    for n in range(0, 400, 10):
        step(images[torch.randperm(250)[:50]], n)
    if actnorm == "moments":  # those of the noisy points that dsm sees
        assert apart(2) < 0.3 * before and apart(2) < apart(0)
    else:
        assert apart(2) == pytest.approx(before, rel=0.3)
    assert all(torch.equal(a.log_scale, b.log_scale) and torch.equal(a.bias, b.bias) for a, b in zip(others, state))


def test_actnorms_that_are_held_start_at_the_moments_and_never_move(images):
    _, pre, flow, _, _, step, _ = start(images, *GLOW, "--loss", "ssm", "--actnorm", "held", "--lr", "0.1")
    actnorms = [m for m in flow.modules() if isinstance(m, ActNorm)]
    before = copy.deepcopy(actnorms)
    assert off(actnorm_outputs(flow, pre(dequantize(images)))) < 0.3
    for n in range(11):
        step(images[:50], n)
    assert all(torch.equal(a.log_scale, b.log_scale) and torch.equal(a.bias, b.bias) for a, b in zip(actnorms, before))
    assert {p.requires_grad for m in actnorms for p in m.parameters()} == {False}
    assert sum(p.requires_grad for p in flow.parameters()) == len([*flow.parameters()]) - 2 * len(actnorms)


@pytest.mark.parametrize("arch", ["fc", "cnn"])
def test_a_last_actnorm_follows_the_flow_s_output_and_is_the_only_one(images, arch):
    s, pre, flow, model, _, step, optimizer = start(images, "--arch", arch, "--loss", "dsm", "--actnorm", "moments")
    assert [type(layer) for layer in model.layers].count(ActNorm) == 1 and type(flow.layers[-1]) is ActNorm
    assert not any(p.requires_grad for p in flow.layers[-1].parameters()) and flow.layers[-2].weight.requires_grad
    x = pre(dequantize(images.view(-1, *flow.shape)))
    output = lambda x: flow(x).transpose(0, 1).flatten(1).detach()  # noqa: E731
    apart = lambda: off([output(x + s.sigma * torch.randn_like(x))])  # noqa: E731
    at_the_start = off([output(x)])
    with torch.no_grad():
        flow.layers[-2].weight.mul_(6)
    far = apart()
    optimizer.param_groups[0]["lr"] = 0.0
    for n in range(0, 600, 10):
        step(images, n)
    assert at_the_start < 0.15 and apart() < 0.3 < 1 < far
    without = build(parse("--arch", arch, "--loss", "ml"), images)[1]
    assert not any(isinstance(layer, ActNorm) for layer in without.layers)


def test_one_batch_in_ten_moves_the_last_actnorm(images, monkeypatch):
    *_, flow, _, _, step, _ = start(images, *GLOW, "--loss", "ssm")
    fractions = []
    monkeypatch.setattr(ActNorm, "initialize", lambda layer, x, fraction=1.0: fractions.append((layer, fraction)))
    for n in range(25):
        step(images[:20], n)
    assert fractions == 3 * [(flow.layers[-1], 0.1)]


def test_what_is_evaluated_has_its_last_actnorm_at_the_moments_of_clean_images(data, images, tmp_path, no_pictures):
    worst = {}
    for actnorm, average in (("moments", "--ema"), ("moments", "--no-ema"), ("trained", "--ema")):
        out = tmp_path / f"{actnorm}{average}"
        main(arguments(data, out, *GLOW, "--lr", "1e-2", "--epochs", "8", "--normalize", "center", "--sigma", "2",
                       "--actnorm", actnorm, average))
        _, pre, flow, _ = load_mnist(out, images)
        worst[actnorm, average] = off(actnorm_outputs(flow, pre(dequantize(images)))[-1:])
    assert max(worst["moments", "--ema"], worst["moments", "--no-ema"]) < 0.1 < 0.3 < worst["trained", "--ema"]


def test_a_batch_without_moments_and_a_run_of_other_images_are_one_line(data, tmp_path, no_pictures, capsys):
    small = ["--arch", "glow", "--width", "4", "--depth", "1", "--epochs", "1"]
    assert "constant channel" in fails(capsys, *arguments(data, tmp_path / "one", *small, "--batch-size", "1"))
    main(arguments(data, tmp_path / "run", *small))
    with pytest.raises(RunError, match="images of another size"):
        load_mnist(tmp_path / "run", torch.zeros(10, 1, 8, 8, dtype=torch.uint8))


def test_a_glow_without_actnorms_is_one_line(data, tmp_path, capsys):
    line = fails(capsys, *arguments(data, tmp_path, "--arch", "glow", "--actnorm", "none"))
    assert "--actnorm is trained, moments or held" in line


def test_the_glow_of_the_published_size_takes_a_step():
    s = parse("--arch", "glow", "--paper", "--loss", "ssm")
    with torch.device("meta"):  # shapes alone
        flow = glow_flow((1, 28, 28), s.width, s.depth)
    assert len(flow.layers) == 2 + 2 * 16 * 3 + 1 and sum(p.numel() for p in flow.parameters()) == 9_750_368
    assert flow.shapes[-1] == (16, 7, 7)
    images = torch.randint(0, 256, (20, 1, 28, 28), dtype=torch.uint8)
    *_, flow, _, _, step, _ = start(images, "--arch", "glow", "--paper", "--loss", "ssm", "--width", "8")
    before = [p.clone() for p in flow.parameters()]
    for n in range(2):  # after the first, the couplings' last weights are not zero
        figures = step(images[:2], n)
    assert all(figure.isfinite() for figure in figures.values())
    moved = [not torch.equal(p, q) for p, q in zip(before, flow.parameters())]
    assert moved == [p.requires_grad for p in flow.parameters()]
    assert sum(moved) == len(moved) - 2 * 33  # actnorms are held


@pytest.mark.parametrize("loss", ["ssm", "dsm", "fdssm"])
def test_the_energy_weight_adds_the_gradient_of_the_energy_of_the_data(images, loss, float64):
    """∇_θ (objective + λ E(z)) = ∇_θ objective + λ ∇_θ E(z), with the same noise of the objective."""
    gradients = []
    for weight in ("0", "78.4"):
        torch.manual_seed(0)
        s, pre, flow, model, _, step, _ = start(images, *GLOW, "--loss", loss, "--sigma", "0.1", "--clip", "0",
                                                "--normalize", "none", "--energy-weight", weight, "--lr", "1e-12",
                                                "--actnorm", "trained")
        torch.manual_seed(1)
        figures = step(images[:20], 0)
        gradients.append([p.grad for p in flow.parameters()])
    torch.manual_seed(1)
    z = pre(dequantize(images[:20]))
    z = z if loss == "dsm" else z + 0.1 * torch.randn_like(z)
    for p in flow.parameters():
        p.grad = None
    flow.energy(z).mean().backward()
    for without, with_energy, p in zip(*gradients, flow.parameters()):
        expected = without if p.grad is None else without + 78.4 * p.grad
        torch.testing.assert_close(with_energy, expected, rtol=1e-6, atol=1e-6)
    assert figures["grad_norm"] > 0


# ---- How a run fails -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss", OBJECTIVES)
def test_a_run_that_diverges_names_the_step_and_says_what_to_lower(data, tmp_path, no_pictures, capsys, loss):
    line = fails(capsys, *arguments(data, tmp_path, "--loss", loss, "--lr", "1e30"))
    assert "epoch 1, step" in line and "lower --lr, or set or lower --clip; the last checkpoint" in line
    assert checkpoint(tmp_path)["state"]["epoch"] == 0 and len(rows(tmp_path)) == 1


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(data, tmp_path, capsys,
                                                                                       monkeypatch):
    calls = itertools.count(1)

    def objective(model, x, **config):  # the loss is finite; at step 2 of epoch 2 its gradient is not
        loss = losses.ssm(model.energy, x)
        return loss + (loss * 0).sqrt() if next(calls) == 7 else loss

    monkeypatch.setitem(OBJECTIVES, "ssm", objective)
    line = fails(capsys, *arguments(data, tmp_path, "--loss", "ssm"))
    assert re.search(r"not finite at epoch 2, step 2 \(loss -?\d[^ ]*, grad_norm nan\)", line)
    assert checkpoint(tmp_path)["state"]["epoch"] == 1 and len(rows(tmp_path)) == 2
    assert all(v.isfinite().all() for v in checkpoint(tmp_path)["state"]["model"].values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_validation_nll_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
        data, tmp_path, capsys, monkeypatch, value):
    values = iter([1.0, 2.0, value])
    monkeypatch.setattr(train_mnist, "evaluate", lambda *_: {"val_nll": next(values), "val_bpd": 0.0})
    line = fails(capsys, *arguments(data, tmp_path, "--epochs", "3"))
    assert f"the validation NLL is {value} after epoch 2: lower --lr" in line
    assert checkpoint(tmp_path)["state"]["epoch"] == 1 and len(rows(tmp_path)) == 2


def test_a_weight_that_is_singular_in_the_evaluation_is_one_line(data, tmp_path, capsys, monkeypatch):
    def objective(model, x, **config):
        with torch.no_grad():
            model.layers[0].weight.zero_()
        return 0 * model.energy(x).mean()

    monkeypatch.setitem(OBJECTIVES, "dsm", objective)
    line = fails(capsys, *arguments(data, tmp_path, "--no-ema", "--actnorm", "none"))
    assert "has a singular or non-finite weight" in line and "after epoch 1: lower --lr" in line


@pytest.mark.parametrize("flags, message", [
    (["--loss", "mle"], "invalid choice"), (["--optimizer", "sgd"], "invalid choice"),
    (["--sigma", "1", "--loss", "ml"], "--sigma is not a setting of mnist-fc-ml"),
    (["--decay", "0.9"], "--decay is not a setting of mnist-fc-dsm"),
    (["--sigma", "-1"], "--sigma must be at least 0, not -1.0"), (["--sigma", "0"], "--sigma must be above 0 for dsm"),
    (["--epoch", "1", "--no-such"], "unrecognized arguments: --no-such"),
    (["--lr", "nan"], "--lr must be a finite number"), (["--lr", "0"], "--lr must be above 0"),
    (["--clip", "-1"], "--clip must be at least 0"), (["--clip", "inf"], "--clip must be a finite number"),
    (["--bend", "nan"], "--bend must be a finite number"), (["--epochs", "0"], "--epochs must be above 0"),
    (["--epochs", "1.5"], "invalid int value"), (["--s", "1e-320"], "--s must be at least 0.01, not 1e-320"),
    (["--weight-decay", "1"], "--weight-decay must be below 1"),
    (["--seed", "-1"], "--seed must be at least 0"), (["--seed", str(2**32)], "--seed must be below 4294967296"),
    (["--paper", "--decay", "-1"], "--decay must be above 0, not -1.0"),
    (["--paper", "--decay", "1e308"], "--decay must be at most 1, not 1e+308"),
    (["--arch", "glow", "--floor", "1"], "--floor must be below 1"),
    (["--loss", "fdssm", "--xi", "0"], "--xi must be at least 0.001"),
    (["--loss", "sml", "--model-samples", "0"], "--model-samples must be above 0"),
    (["--resume", "--overwrite"], "exclude each other"), (["--batch-size", "1000"], "do not fill a batch"),
    (["--data", "/nowhere"], "no train-images-idx3-ubyte.gz"), (["--out", "/dev/null/run"], "cannot write to")])
def test_bad_options_are_one_line(data, tmp_path, capsys, flags, message):
    assert message in fails(capsys, *arguments(data, tmp_path), *flags)
    assert not list(tmp_path.iterdir())


def test_joined_processes_must_divide_the_batch_and_the_samples_of_the_model(data, tmp_path, capsys, monkeypatch):
    under_torchrun(monkeypatch, 3)
    line = fails(capsys, *arguments(data, tmp_path))
    assert "3 processes cannot share --batch-size 50 alike" in line
    line = fails(capsys, *arguments(data, tmp_path, "--batch-size", "51", "--loss", "sml", "--model-samples", "50"))
    assert "3 processes cannot share --model-samples 50 alike" in line
