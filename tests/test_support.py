"""The directory of a run, its bar, its errors of one line, and what is done to the parameters beside the step."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import checkpoint
from ebflow import fc_flow
from sampling import SamplingError
from support import plots, run
from support.optimization import trainable, update_average
from support.run import PICTURES, Run, RunError, one_line_errors, read_checkpoint, read_metrics, write


@dataclass
class Settings:
    out: Path
    resume: bool = False
    overwrite: bool = False
    lr: float = 0.1

    def config(self):
        return {"lr": self.lr}


def a_run(directory, remedy="lower --lr", parts=None, **settings):
    return Run(Settings(directory, **settings), remedy, parts or {})


def train(run, losses, epoch=1):
    for loss in run.watch(epoch, losses):
        run.record({"loss": torch.tensor(loss), "grad_norm": torch.tensor(2 * loss)})


# ---- The steps of an epoch -------------------------------------------------------------------------------------------

def test_an_epoch_has_the_means_over_its_own_steps(tmp_path):
    one = a_run(tmp_path)
    train(one, [1.0, 2.0, 6.0])
    assert one.means == {"loss": 3.0, "grad_norm": 6.0}
    train(one, [1.0] * 120, epoch=2)
    assert one.means == {"loss": 1.0, "grad_norm": 2.0}
    train(one, [], epoch=3)
    assert one.means == {}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at, steps", [(1, 3), (3, 3), (50, 120), (51, 120), (77, 120), (120, 120)])
def test_the_first_step_that_is_not_finite_is_named_with_what_it_had(tmp_path, bad, at, steps):
    losses = [1.0] * (at - 1) + [bad] * (steps - at + 1)
    with pytest.raises(RunError) as error:
        train(a_run(tmp_path), losses)
    figures = f"loss {bad:g}, grad_norm {2 * bad:g}"
    assert str(error.value).startswith(f"not finite at epoch 1, step {at} ({figures}): lower --lr; the last checkpoint")


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


def test_the_figures_of_an_epoch_and_of_the_end_are_printed(tmp_path, capsys):
    one = a_run(tmp_path)
    row = {"epoch": 3, "val_nll": 1.25, "tv": 0.5, "rate": None, "seconds": 90.0}
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
    (RunError("a\n  b"), "error: a b"), (KeyError("known"), "error: 'known'"),
    (MemoryError(), "error: not enough memory"), (torch.OutOfMemoryError(), "error: not enough memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "error: not enough memory"),
    (KeyboardInterrupt(), 130)], ids=repr)
def test_what_the_user_can_put_right_is_one_line(capsys, error, code):
    with pytest.raises(SystemExit) as exit, one_line_errors(KeyError):
        raise error
    assert exit.value.code == code if code == 130 else exit.value.code.startswith(code) and "\n" not in exit.value.code
    assert ("--resume" in capsys.readouterr().err) == (code == 130)


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
    scripts = [(Path(run.__file__).parent.parent / f"train_{name}.py").read_text() for name in ("mnist", "toy", "ebm")]
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
