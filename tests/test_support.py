"""The directory of a run, its bar, its errors of one line, and what is done to the parameters beside the step."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import checkpoint
from ebflow import fc_flow
from sampling import SamplingError
from support import STOPPED, plots, run
from support.optimization import trainable, update_average
from support.run import PICTURES, Run, RunError, one_line_errors, read_checkpoint, read_metrics, write

ROOT = Path(__file__).parent.parent


@dataclass
class Settings:
    out: Path
    resume: bool = False
    overwrite: bool = False
    lr: float = 0.1

    def config(self):
        return {"lr": self.lr}


def a_run(directory, remedy="lower --lr", parts=None, **settings):
    """Its directory is open to another run of the same test."""
    one = Run(Settings(directory, **settings), remedy, parts or {})
    one.unlock()
    return one


def train(run, losses, epoch=1):
    for loss in run.watch(epoch, losses):
        run.record({"loss": torch.tensor(loss), "grad_norm": torch.tensor(2 * loss)})


# ---- The steps of an epoch -------------------------------------------------------------------------------------------

def test_an_epoch_has_the_means_over_its_own_steps(tmp_path):
    one = a_run(tmp_path)
    train(one, [1.0, 2.0, 6.0])
    assert one.means.pop("batches_per_second") > 0 and one.means == {"loss": 3.0, "grad_norm": 6.0}
    train(one, [1.0] * 120, epoch=2)
    assert one.means.pop("batches_per_second") > 0 and one.means == {"loss": 1.0, "grad_norm": 2.0}
    train(one, [], epoch=3)
    assert one.means == {"batches_per_second": None}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at, steps", [(1, 3), (3, 3), (50, 120), (51, 120), (77, 120), (120, 120)])
def test_the_first_step_that_is_not_finite_is_named_with_what_it_had(tmp_path, bad, at, steps):
    losses = [1.0] * (at - 1) + [bad] * (steps - at + 1)
    with pytest.raises(RunError) as error:
        train(a_run(tmp_path), losses)
    figures, remedy = f"loss {bad:g}, grad_norm {2 * bad:g}", "lower --lr; the last checkpoint"
    if at == 1:  # no step was taken that a learning rate could have spoilt
        remedy = "no step was taken yet, so a setting of the model or of the objective is too small or too large; the"
    assert str(error.value).startswith(f"not finite at epoch 1, step {at} ({figures}): {remedy}")


class HostReads(TorchDispatchMode):
    """Counts how often a tensor's value becomes a number of Python's, for which a GPU has to be waited for."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_gpu_is_waited_for_every_50_steps_only(tmp_path):
    reads, one = [], a_run(tmp_path)
    with HostReads() as mode:
        for _ in one.watch(1, range(120)):
            reads.append(mode.count)
            one.record({"loss": torch.zeros(())})
    assert sorted(set(reads)) == [reads[0], reads[50], reads[100]]
    assert [reads.count(reads[i]) for i in (0, 50, 100)] == [50, 50, 20]


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError("layer 3 is singular"), SamplingError("chains got lost")])
def test_a_singular_weight_and_lost_chains_are_told_with_the_step_and_what_to_do(tmp_path, error):
    for stop, where in ((0, "at epoch 4, step 1"), (2, "at epoch 4, step 3"), (9, "after epoch 4")):
        with pytest.raises(RunError) as told, a_run(tmp_path, overwrite=True) as one:
            for i in one.watch(4, range(3)):
                if i == stop:
                    raise error
                one.record({"loss": torch.zeros(())})
            raise error
        assert str(told.value).startswith(f"{error}, {where}: lower --lr; the last checkpoint")
    with pytest.raises(RunError, match=f"{error}, at epoch 1, step 1: no step was taken"), a_run(tmp_path / "a") as one:
        for _ in one.watch(1, range(3)):
            raise error
    with pytest.raises(KeyError), a_run(tmp_path / "other"):  # everything else goes through
        raise KeyError


# ---- What is written -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("nll", [torch.nan, torch.inf, -torch.inf])
def test_a_validation_nll_that_is_not_finite_is_an_error_and_nothing_is_written(tmp_path, nll):
    one = a_run(tmp_path)
    one.save({"epoch": 0, "val_nll": 1.0}, {"epoch": 0})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(RunError, match=f"the validation NLL is {nll} after epoch 1: lower --lr"):
        one.save({"epoch": 1, "val_nll": nll}, {"epoch": 1})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_checkpoint_puts_back_parts_state_and_metrics(tmp_path):
    part = torch.nn.Linear(2, 1)
    one = a_run(tmp_path, parts={"part": part})
    assert one.state == {"epoch": -1} and one.metrics == []
    one.save({"epoch": 0, "val_nll": 1.0}, {"epoch": 0, "chains": torch.ones(3)})
    other = torch.nn.Linear(2, 1)
    two = a_run(tmp_path, parts={"part": other}, resume=True)
    assert torch.equal(part.weight, other.weight) and torch.equal(two.state["chains"], torch.ones(3))
    assert two.state["epoch"] == 0 and two.metrics == one.metrics == read_metrics(tmp_path)


def test_the_seconds_of_a_row_are_those_since_the_run_began(tmp_path):
    one = a_run(tmp_path)
    for epoch, more in enumerate((90, 10)):
        one.start -= more
        one.save({"epoch": epoch, "val_nll": 1.0}, {"epoch": epoch})
    assert [round(row["seconds"]) for row in read_metrics(tmp_path)] == [90, 100]


def test_the_figures_of_an_epoch_and_of_the_end_are_printed(tmp_path, capsys):
    one = a_run(tmp_path)
    one.start -= 90
    row = {"epoch": 3, "val_nll": 1.25, "tv": 0.5, "rate": None}
    one.save(row, {}, shown=("tv", "rate", "missing"))
    one.finish({"test_nll": 2.0, "weights": [0.25, 0.75]})
    assert capsys.readouterr().out.splitlines() == [
        "lr: 0.1", "epoch    3  val_nll 1.25  tv 0.5", "test_nll                2.0000",
        "weights                 0.2500 0.7500", "minutes                 1.5000",
        f"written to              {tmp_path}"]
    assert read_metrics(tmp_path)[-1]["weights"] == [0.25, 0.75]


def test_a_directory_that_holds_a_run_is_neither_written_nor_read_without_being_asked_to(tmp_path):
    a_run(tmp_path).save({"epoch": 0, "val_nll": 1.0}, {"epoch": 0})
    for name in PICTURES:
        (tmp_path / name).write_bytes(b"a picture")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="already holds a run: continue it with --resume, replace it with --overwrite"):
        a_run(tmp_path, lr=0.2)
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 0.1}
    with pytest.raises(RunError, match="belongs to other settings: lr is 0.1 there and 0.2 here"):
        a_run(tmp_path, lr=0.2, resume=True)
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 0.1} and checkpoint(tmp_path)
    a_run(tmp_path, lr=0.2, overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "notes.txt"}
    with pytest.raises(RunError, match="nothing to resume: there is no .*checkpoint.pt; start the run without"):
        a_run(tmp_path / "empty", resume=True)
    (tmp_path / "empty" / "metrics.jsonl").write_text("mine")  # without the settings that it belongs to
    with pytest.raises(RunError, match="already holds a run"):
        a_run(tmp_path / "empty")
    assert (tmp_path / "empty" / "metrics.jsonl").read_text() == "mine"


def test_settings_of_a_run_that_has_no_checkpoint_yet_are_not_replaced(tmp_path):
    a_run(tmp_path)
    with pytest.raises(RunError, match="config.json belongs to other settings: lr is 0.1 there and 0.5 here"):
        a_run(tmp_path, lr=0.5, resume=True)
    a_run(tmp_path, resume=True)
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 0.1}
    for damaged in ("{", "3", ""):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(RunError, match="config.json is damaged .*: start anew with --overwrite"):
            a_run(tmp_path, resume=True)


def test_a_directory_has_one_run_at_a_time_and_a_kill_frees_it(tmp_path):
    a_run(tmp_path).save({"epoch": 0, "val_nll": 1.0}, {"epoch": 0})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    hold = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX); print(flush=True); input()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path], **pipes) as other:
        other.stdout.readline()
        for how in ({}, {"resume": True}, {"overwrite": True}, {"overwrite": True, "lr": 0.2}):
            with pytest.raises(RunError, match="another process writes to .*: wait until it has ended, or name"):
                a_run(tmp_path, **how)
        other.kill()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with Run(Settings(tmp_path, resume=True), "", {}):
        with pytest.raises(RunError, match="another process writes"):
            a_run(tmp_path, resume=True)
    with pytest.raises(RunError, match="belongs to other settings"):
        a_run(tmp_path, resume=True, lr=0.2)
    a_run(tmp_path, resume=True)  # the end of a run frees it, an error at its start, too


def test_where_the_first_process_finds_a_lock_the_others_stop_too(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda said: said.__setitem__(0, True))
    with pytest.raises(RunError, match="another process writes"):
        a_run(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_is_written_before_the_metrics(tmp_path, monkeypatch):
    """A kill between the two leaves no figures without the weights that they are of."""
    names, one = [], a_run(tmp_path)
    monkeypatch.setattr(run, "write", lambda path, data: names.append(path.name))
    one.save({"epoch": 0, "val_nll": 1.0}, {"epoch": 0})
    assert names == ["checkpoint.pt", "metrics.jsonl"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, error):
    def fail(file):
        raise error

    path = tmp_path / "file"
    write(path, b"old")
    with monkeypatch.context() as patch, pytest.raises((RunError, KeyboardInterrupt)):
        patch.setattr(os, "fsync", fail)
        write(path, b"new and longer")
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]
    write(path, b"new")
    assert path.read_bytes() == b"new" and [*tmp_path.iterdir()] == [path]


class Code:
    """Unpickled, it leaves a directory: code has run."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_is_data_and_its_code_is_never_run(tmp_path):
    torch.save({"config": {}, "state": {}, "metrics": Code(tmp_path / "ran")}, tmp_path / "checkpoint.pt")
    with pytest.raises(RunError, match=r"checkpoint.pt is damaged \(UnpicklingError\)"):
        read_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "checkpoint.pt", weights_only=False)  # the test can fail
    assert (tmp_path / "ran").exists()


def test_a_checkpoint_that_is_missing_or_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(RunError, match="cannot read .*checkpoint.pt"):
        read_checkpoint(tmp_path / "checkpoint.pt")
    torch.save({"config": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(RunError, match="is damaged"):
        read_checkpoint(tmp_path / "checkpoint.pt")


def test_a_checkpoint_that_is_a_pipe_is_an_error_and_no_endless_wait(tmp_path):
    def too_long(*_):
        raise AssertionError("it waits")

    os.mkfifo(tmp_path / "checkpoint.pt")
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(5)
    try:
        with pytest.raises(RunError, match="cannot read .*checkpoint.pt"):
            read_checkpoint(tmp_path / "checkpoint.pt")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


BEST = {"epoch": 1, "val_nll": 1.0, "model": {"weight": torch.ones(2)}}
LACKING = {"no epoch": lambda c: c["state"].pop("epoch"), "no best": lambda c: c["state"].pop("best"),
           "no model of the best": lambda c: c["state"]["best"].pop("model"), "no rows": lambda c: c["metrics"].clear(),
           "no NLL of the best": lambda c: c["state"]["best"].pop("val_nll"), "one row": lambda c: c["metrics"].pop(),
           "no seconds": lambda c: c["metrics"][1].pop("seconds"), "no part": lambda c: c["state"].pop("part"),
           "config is None": lambda c: c.update(config=None), "state is None": lambda c: c.update(state=None),
           "metrics are None": lambda c: c.update(metrics=None), "best is None": lambda c: c["state"].update(best=None),
           "epoch is None": lambda c: c["state"].update(epoch=None),
           "seconds are None": lambda c: c["metrics"][1].update(seconds=None),
           "a row is None": lambda c: c["metrics"].__setitem__(0, None)}


@pytest.mark.parametrize("change", LACKING.values(), ids=LACKING)
def test_a_whole_checkpoint_that_lacks_something_is_an_error(tmp_path, change):
    one = a_run(tmp_path, parts={"part": torch.nn.Linear(2, 1)})
    for epoch in (0, 1):
        one.save({"epoch": epoch, "val_nll": 1.0}, {"epoch": epoch, "best": copy.deepcopy(BEST)})
    whole = checkpoint(tmp_path)
    assert a_run(tmp_path, parts={"part": torch.nn.Linear(2, 1)}, resume=True).state["best"]["epoch"] == 1
    change(whole)
    torch.save(whole, tmp_path / "checkpoint.pt")
    with pytest.raises(RunError, match="(of another version of this code|is damaged .*): start anew with --overwrite"):
        a_run(tmp_path, parts={"part": torch.nn.Linear(2, 1)}, resume=True).state["best"]


def test_a_checkpoint_of_another_version_is_an_error_and_lack_of_memory_is_not_taken_for_one(tmp_path):
    a_run(tmp_path, parts={"part": torch.nn.Linear(2, 1)}).save({"epoch": 0, "val_nll": 1.0}, {"epoch": 0})
    for parts in ({"part": torch.nn.Linear(3, 1)}, {"part": torch.nn.Bilinear(2, 2, 1)},
                  {"other": torch.nn.Linear(2, 1)}, {"part": torch.optim.Adam(torch.nn.Linear(2, 1).parameters())}):
        with pytest.raises(RunError, match="of another version of this code: start anew with --overwrite"):
            a_run(tmp_path, parts=parts, resume=True)

    class Full:
        def load_state_dict(self, state):
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        a_run(tmp_path, parts={"part": Full()}, resume=True)


# ---- Errors of one line ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error, code", [
    (RunError("a\n  b"), "error: a b"), (OSError(5, "Input/output error"), "error: [Errno 5]"),
    (KeyError("known"), "error: 'known'"),
    (MemoryError(), "error: not enough memory"), (torch.OutOfMemoryError(), "error: not enough memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "error: not enough memory"),
    (KeyboardInterrupt(), 130)], ids=repr)
def test_what_the_user_can_put_right_is_one_line(capsys, error, code):
    with pytest.raises(SystemExit) as exit, one_line_errors(KeyError):
        raise error
    assert exit.value.code == code if code == 130 else exit.value.code.startswith(code) and "\n" not in exit.value.code
    assert ("--resume" in capsys.readouterr().err) == (code == 130)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_one_line_before_torch_is_there_too(kind):
    """The scripts import support first; balanced training does without."""
    code = f"import signal; signal.signal(2, signal.default_int_handler); import support; signal.raise_signal({kind:d})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode not in (0, 1) and done.stderr == STOPPED + "\n" and done.stdout == ""
    for name in ("train_mnist.py", "train_toy.py", "experiments/__init__.py"):
        text = (ROOT / name).read_text()
        assert text.index("\nimport support") < text.index("\nimport torch")


def test_a_full_standard_output_is_one_line(monkeypatch):
    full = open("/dev/full", "w")
    monkeypatch.setattr(sys, "stdout", full)
    with pytest.raises(SystemExit) as exit, one_line_errors():
        print("a table")
    assert exit.value.code == "error: [Errno 28] No space left on device"
    assert sys.stdout is None  # at the end, Python would try again
    with pytest.raises(OSError):
        full.close()


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug"), KeyError("a bug")], ids=repr)
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error), match="a bug"), one_line_errors():
        raise error


# ---- Parameters ------------------------------------------------------------------------------------------------------

def test_what_is_trained_is_what_requires_a_gradient():
    flow = fc_flow(3)
    flow.layers[0].requires_grad_(False)
    assert [*map(id, trainable(flow))] == [*map(id, flow.layers[2].parameters())]


def test_the_moving_average_is_no_view_of_what_it_follows():
    average, parameter = torch.zeros(3), torch.ones(3)
    update_average([average], [parameter], 0)  # the first takes all
    assert torch.equal(average, torch.ones(3))
    parameter += 1
    assert torch.equal(average, torch.ones(3))
    update_average([average], [parameter], 1)
    torch.testing.assert_close(average, torch.full((3,), 2 / 11 + 2 * 9 / 11))


def test_pictures_are_listed_where_overwrite_looks_for_them():
    """All that the scripts draw into the directory of a run."""
    scripts = [(ROOT / f"train_{name}.py").read_text() for name in ("mnist", "toy", "ebm")]
    assert {name for text in scripts for name in re.findall(r'run.picture\("([\w.]+)"', text)} == {*PICTURES}


@pytest.mark.parametrize("channels", [1, 3])
def test_a_mosaic_shows_each_image_upright_in_its_place_row_by_row(channels):
    images = torch.randint(-50, 300, (4, channels, 5, 3)).float()
    shown = plots.mosaic(images).axes[0].images[0].get_array()
    assert shown.shape[:2] == (10, 6)
    for i, image in enumerate(images.clamp(0, 255) / 255):
        top, left = 5 * (i // 2), 3 * (i % 2)
        part = torch.as_tensor(shown[top:top + 5, left:left + 3].data).view(5, 3, channels)
        torch.testing.assert_close(part, image.permute(1, 2, 0))
