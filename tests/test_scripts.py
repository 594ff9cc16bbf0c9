"""What the three training scripts have in common. Each cell of the table is trained once, and watched."""

import contextlib
import copy
import functools
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import losses
import train_ebm
import train_mnist
import train_toy
from conftest import assert_same_bits, checkpoint, failing, rows, stop_after, timeless, without_pictures
from data import Points, dequantize, load_images
from densities import TOYS
from losses import OBJECTIVES
from support.run import Run, RunError

EPOCHS = 3
SMALL = {
    train_mnist: "--epochs 3 --batch-size 50 --lr 1e-3 --sml-steps 0",
    train_toy: "--epochs 3 --steps 5 --batch-size 32 --blocks 1 --width 8 --test-points 100 --sml-steps 0",
    train_ebm: "--epochs 3 --steps 4 --batch-size 64 --blocks 2 --width 8 --test-points 400 --dim 3 --chains 48 "
               "--energy-width 8 --start-steps 5 --mixing-rounds 3 --local-steps 3 --flow-lr 1e-3"}
CELLS = {f"{arch} {loss}": (train_mnist, f"--arch {arch} --loss {loss}" + " --width 4 --depth 1" * (arch == "glow"))
         for arch in ("fc", "cnn", "glow") for loss in OBJECTIVES}
CELLS["cnn sml"] = train_mnist, "--arch cnn --loss sml --spectral"
CELLS["cnn ssm"] = train_mnist, "--arch cnn --loss ssm --spectral --augment"
CELLS |= {f"{toy} {loss}": (train_toy, f"--data {toy} --loss {loss}")
          for toy, loss in zip(("sine", "sine", "swirl", "swirl", "checkerboard"), OBJECTIVES)}
CELLS["points dsm"] = train_toy, "--loss dsm"
CELLS |= {sampler: (train_ebm, f"--sampler {sampler}") for sampler in ("flow", "langevin", "tempering", "short")}
CELLS |= {f"{base} base": (train_ebm, f"--data sine --dim 2 --base {base}") for base in ("none", "flow")}
DRAWN = {"fc dsm": {"curves.png", "samples.png"}, "sine ml": {"density.png"},
         "points dsm": {"density.png"}, "flow": {"density.png", "mode_weights.png"}}  # their pictures are drawn
FILES = {".lock", "checkpoint.pt", "config.json", "metrics.jsonl"}
STEPS = {train_mnist: 5, train_toy: 5, train_ebm: 4}
scripts = pytest.mark.parametrize("cell", DRAWN)


@pytest.fixture(scope="module")
def start(npy, csv):
    """A function: cell, directory, more flags -> runs its script."""
    def main(cell, out, *extra):
        script, flags = CELLS[cell]
        data = ["--data", str(npy)] if script is train_mnist else ["--data", str(csv)] * (cell == "points dsm")
        script.main([*SMALL[script].split(), *flags.split(), *data, "--device", "cpu", "--out", str(out), *extra])
    return main


@pytest.fixture
def fails(start, capsys):
    """A function: cell, directory, more flags -> the one line with which its script exits."""
    return functools.partial(failing(lambda args: start(*args)), capsys)


def watch(monkeypatch, script):
    """What runs of the script do from now on.

    -> copies: {epoch: the directory after its checkpoint}, rates: {optimiser: its learning rate at each step},
    averages, weights: the parameters after each step, arguments of the average, evaluated: [state of a model]
    """
    seen = SimpleNamespace(copies={}, rates={}, averages=None, weights=[], arguments=[], evaluated=[])
    save, step, update = Run.save, torch.optim.Adam.step, script.update_average
    owner, name = {train_mnist: (train_mnist, "evaluate"), train_toy: (train_toy, "divergences"),
                   train_ebm: (train_ebm.Truth, "figures")}[script]
    evaluate = getattr(owner, name)

    def copying(run, row, *rest, **shown):
        save(run, row, *rest, **shown)
        copied = run.directory.with_name(f"{run.directory.name}-{row['epoch']}")
        seen.copies[row["epoch"]] = shutil.copytree(run.directory, copied)

    def stepping(optimizer, *rest):
        seen.rates.setdefault(optimizer, []).append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *rest)

    def updating(averages, parameters, n, **m):
        update(averages, parameters, n, **m)
        seen.averages, seen.arguments = averages, [*seen.arguments, (n, m)]
        seen.weights.append([p.detach().clone() for p in parameters])

    def evaluating(*args):
        model = next(a for a in args if isinstance(a, torch.nn.Module))
        seen.evaluated.append(copy.deepcopy(model.state_dict()))
        return evaluate(*args)

    monkeypatch.setattr(Run, "save", copying)
    monkeypatch.setattr(torch.optim.Adam, "step", stepping)
    monkeypatch.setattr(script, "update_average", updating)
    monkeypatch.setattr(owner, name, evaluating)
    return seen


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory):
    """A function: cell -> what was seen in its undisturbed run, its directory and what it printed."""
    @functools.cache
    def run(cell):
        out = tmp_path_factory.mktemp("trained") / "run"
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
            if cell not in DRAWN:
                without_pictures(patch)
            seen = watch(patch, CELLS[cell][0])
            start(cell, out)
        seen.out, seen.printed = out, printed.getvalue()
        return seen
    return run


# ---- What a run leaves -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cell", CELLS)
def test_a_run_leaves_its_files_its_settings_and_a_row_for_each_epoch(trained, cell):
    run, (script, flags) = trained(cell), CELLS[cell]
    assert {path.name for path in run.out.iterdir()} == FILES | DRAWN.get(cell, set())
    assert all((run.out / name).read_bytes().startswith(b"\x89PNG") for name in DRAWN.get(cell, ()))
    metrics, config = rows(run.out), json.loads((run.out / "config.json").read_text())
    assert [(row["epoch"], row["step"]) for row in metrics] == [(epoch, epoch * STEPS[script]) for epoch in range(4)]
    assert metrics[0]["loss"] is metrics[0]["batches_per_second"] is None
    assert all(math.isfinite(row["loss"]) and row["batches_per_second"] > 0 < row["grad_norm"] for row in metrics[1:])
    seconds = [row["seconds"] for row in metrics]
    assert 0 < seconds[0] and seconds == sorted(seconds)
    assert all(str(config[flag]) == value for flag, value in re.findall(r"--(\w+) (\w+)", flags))
    assert json.loads(json.dumps(checkpoint(run.out)["config"])) == config
    lines = [line.split() for line in run.printed.splitlines()]
    assert [line[1] for line in lines if line[:1] == ["epoch"]] == [*"0123"]
    for name, value in {k: v for k, v in metrics[-1].items() if k.startswith("test_") and v is not None}.items():
        shown = CELLS[cell][0] is not train_ebm or name in train_ebm.FINAL
        assert ([name, f"{value:.4f}"] in [line[:2] for line in lines]) == shown


# ---- Killed and resumed ----------------------------------------------------------------------------------------------

MOMENTS = [(cell, i % EPOCHS) for i, cell in enumerate(CELLS)]
MOMENTS += sorted({(cell, epoch) for cell in DRAWN for epoch in range(-1, EPOCHS + 1)} - {*MOMENTS})


@pytest.mark.parametrize("cell, epoch", MOMENTS)
def test_killed_after_a_checkpoint_and_resumed_it_ends_bit_for_bit_where_an_undisturbed_run_ends(
        start, trained, tmp_path, request, cell, epoch):
    """Epoch -1: killed before the first checkpoint, and started again. Epoch 3: killed before the pictures."""
    whole, out = trained(cell), tmp_path / "run"
    if epoch < 0:
        out.mkdir()
        (out / "config.json").write_text("{")
    else:
        shutil.copytree(whole.copies[epoch], out)
        assert checkpoint(out)["state"]["epoch"] == epoch
    pictures = DRAWN.get(cell, set()) if epoch == EPOCHS else request.getfixturevalue("no_pictures") or set()
    start(cell, out, *["--resume"] * (epoch >= 0))
    assert_same_bits(checkpoint(whole.out)["state"], checkpoint(out)["state"])
    assert timeless(rows(whole.out)) == timeless(rows(out))
    assert {path.name for path in out.iterdir()} == FILES | pictures
    assert all((out / name).read_bytes() == (whole.out / name).read_bytes() for name in pictures)


@pytest.mark.parametrize("cell, place, name, call, epoch", [
    ("fc dsm", train_mnist, "update_average", 8, 1), ("sine ml", os, "replace", 4, 0), ("flow", os, "replace", 5, 1)],
    ids=["in the middle of an epoch", "while it writes its checkpoint", "between its checkpoint and its metrics"])
def test_a_process_that_is_killed_leaves_what_a_run_resumes_from(start, trained, tmp_path, no_pictures, cell, place,
                                                                 name, call, epoch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of threads in a fork
        child = os.fork()
    if child == 0:
        try:
            function, calls = getattr(place, name), iter(range(1, 1000))
            setattr(place, name, lambda *args: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == call
                    else function(*args))
            start(cell, tmp_path)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert (tmp_path / ".checkpoint.pt.part").exists() == (call == 4)
    assert checkpoint(tmp_path)["state"]["epoch"] == epoch
    assert len(rows(tmp_path)) <= epoch + 1  # no figures without the weights that they are of
    start(cell, tmp_path, "--resume")
    whole = trained(cell).out
    assert_same_bits(checkpoint(whole)["state"], checkpoint(tmp_path)["state"])
    assert timeless(rows(whole)) == timeless(rows(tmp_path)) and {path.name for path in tmp_path.iterdir()} == FILES


@scripts
def test_control_c_is_one_line_and_the_run_can_go_on(start, tmp_path, no_pictures, monkeypatch, capsys, cell):
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as exit:
        stop_after(patched, 2)
        start(cell, tmp_path)
    assert exit.value.code == 130 and len(rows(tmp_path)) == 2
    line, = capsys.readouterr().err.strip().splitlines()
    assert "--resume" in line
    saved = checkpoint(tmp_path)
    saved["metrics"][-1]["seconds"] = 1000.0
    torch.save(saved, tmp_path / "checkpoint.pt")
    start(cell, tmp_path, "--resume")
    assert 1000 < rows(tmp_path)[-1]["seconds"] < 1060  # its time goes on, too


# ---- Seeds, schedule, average, best epoch ----------------------------------------------------------------------------

@pytest.mark.parametrize("cell", ["fc dsm", "swirl dsm", "flow"])
def test_the_seed_decides_everything_and_every_epoch_and_another_seed_draw_anew(start, tmp_path, monkeypatch,
                                                                                no_pictures, cell):
    seen, name = [], "sml" if cell == "flow" else "dsm"
    objective = getattr(losses, name)
    monkeypatch.setattr(losses, name, lambda f, x, *args, **kw: seen.append(x.clone()) or objective(f, x, *args, **kw))
    runs = {}
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        start(cell, tmp_path / out, "--seed", seed)
        runs[out], seen[:] = [*seen], []
    a, b, c = runs.values()
    assert len({x.sum().item() for x in a}) == len(a) == EPOCHS * STEPS[CELLS[cell][0]]
    assert all(map(torch.equal, a, b)) and not any(map(torch.equal, a, c))
    first, again, other = (timeless(rows(tmp_path / out)) for out in "abc")
    assert first == again and first[0] != other[0] and first[-1] != other[-1]


@pytest.mark.parametrize("cell, peaks, plateau", [("fc ml", [1e-3], 0.0), ("swirl ssm", [3e-3], 0.0),
                                                  ("swirl dsm", [3e-3], 0.5), ("flow", [2e-3, 1e-3], 0.0)])
def test_the_learning_rate_follows_its_schedule_at_every_step(trained, cell, peaks, plateau):
    """The energy and its flow have a rate each. Before, the flow is fitted to the data, at a rate that falls late."""
    steps, found = EPOCHS * STEPS[CELLS[cell][0]], [*trained(cell).rates.values()]
    if cell == "flow":
        assert found.pop(0) == pytest.approx([1e-3 * min(1, 2 - 2 * i / 5) for i in range(5)])
    for peak, rates in zip(peaks, found, strict=True):
        expected = [peak * min(1, t / 0.05) * (1 + math.cos(math.pi * max(0, (t - plateau) / (1 - plateau)))) / 2
                    for t in (n / steps for n in range(steps))]
        assert rates == pytest.approx(expected)


@pytest.mark.parametrize("cell", ["fc ml", "swirl dsm", "flow", "langevin"])
def test_the_moving_average_of_all_steps_is_what_is_evaluated(trained, cell):
    run, script = trained(cell), CELLS[cell][0]
    m = {"m": 0.99} if script is train_ebm else {}  # support/optimization.py has 0.999
    assert run.arguments == [(n, m) for n in range(EPOCHS * STEPS[script])]
    expected = run.weights[0]
    for n, weights in enumerate(run.weights[1:], start=1):
        m = (1 + n) / (10 + n)  # less than 0.99 in so short a run
        expected = [m * a + (1 - m) * p for a, p in zip(expected, weights)]
    torch.testing.assert_close(run.averages, expected)
    states = [checkpoint(run.copies[epoch])["state"] for epoch in range(EPOCHS + 1)]
    model, average = states[-1]["model"], states[-1]["averaged"]
    names = [name for name in model if not torch.equal(model[name], average[name])]  # of what is trained
    for state, tensors in ((model, run.weights[-1]), (average, run.averages)):
        assert all(torch.equal(state[name], tensor) for name, tensor in zip(names, tensors, strict=True))
    for state, evaluated in zip(states, run.evaluated):
        assert_equal(evaluated, state["averaged"])
    if script is train_ebm:  # which has no best epoch
        assert_equal(run.evaluated[-1], average)


def assert_equal(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def loaded(script, directory):
    """The EBFlow of a finished run."""
    return script.load(directory).flow if script is train_mnist else script.load(directory)


@pytest.mark.parametrize("cell, extra", [("fc dsm", ()), ("fc ml", ["--no-ema"]), ("sine ml", ())])
def test_the_epoch_of_the_lowest_validation_nll_is_tested_and_its_weights_are_kept(start, tmp_path, monkeypatch,
                                                                                   no_pictures, cell, extra):
    """Epoch 1 is made the best. The start, which is better still, does not count. Resumed later, it is the same."""
    script = CELLS[cell][0]
    name = "evaluate" if script is train_mnist else "divergences"
    evaluate, values = getattr(script, name), iter([1.0, 5.0, 6.0, 7.0, 9.0, 6.0, 7.0, 9.0, 7.0, 9.0])
    monkeypatch.setattr(script, name, lambda split, *args: evaluate(split, *args) | {f"{split}_nll": next(values)})
    seen = watch(monkeypatch, script)
    start(cell, tmp_path / "run", *extra)
    for copied in ("run-1", "run-2"):
        shutil.copytree(tmp_path / copied, tmp_path / f"from-{copied}")
        start(cell, tmp_path / f"from-{copied}", *extra, "--resume")
    _, first, _, third, *_ = seen.evaluated
    tested = [seen.evaluated[i] for i in (4, 7, 9)]
    for out, model in zip((tmp_path / name for name in ("run", "from-run-1", "from-run-2")), tested):
        last, best = rows(out)[-1], checkpoint(out)["state"]["best"]
        assert (last["best_epoch"], last["test_nll"], best["epoch"], best["val_nll"]) == (1, 9.0, 1, 5.0)
        assert_equal(model, first)
        assert_equal(best["model"], first)
        assert_equal(loaded(script, out).state_dict(), first)
    state = checkpoint(tmp_path / "run")["state"]
    assert not all(torch.equal(first[name], third[name]) for name in first)
    trains = [name for name, p in state["averaged"].items() if not torch.equal(p, state["model"][name])
              and not (cell == "fc dsm" and name.startswith("layers.7"))]  # which goes to the moments to be evaluated
    assert trains and all(torch.equal(third[name], state["model" if extra else "averaged"][name]) for name in trains)


# ---- Steps of sml after the epochs of score matching -----------------------------------------------------------------

@pytest.fixture(scope="module", params=["fc dsm", "swirl dsm"])
def with_sml(request, start, tmp_path_factory):
    """A cell, its flags, and the directories of its run with three steps of sml at its end, and of one without."""
    out, flags = tmp_path_factory.mktemp("sml"), ["--sml-lr", "1e-3"] * (request.param == "fc dsm")
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        for name, steps in (("with", "3"), ("without", "0")):
            start(request.param, out / name, *flags, "--sml-steps", steps)
    return request.param, [*flags, "--sml-steps", "3"], out / "with", out / "without"


def test_steps_of_sml_begin_after_the_last_epoch_at_the_best_weights_and_leave_the_epochs_as_they_are(with_sml):
    cell, _, *runs = with_sml
    (*before, last), without = (timeless(rows(out)) for out in runs)
    figures = [{k: v for k, v in row.items() if not k.startswith(("best", "test"))} for row in without]
    assert before == figures  # score matching alone
    assert (last["epoch"], last["step"], last["sml_steps"]) == (EPOCHS + 1, before[-1]["step"] + 3, 3)
    for name, value in without[-1].items():
        assert not name.startswith("test") or last[f"before_sml_{name}"] == value
    assert last["val_nll"] != before[-1]["val_nll"]
    assert cell != "fc dsm" or 0 < rows(runs[0])[-1]["sml_share_of_time"] < 1


@pytest.mark.parametrize("cell", ["fc dsm", "swirl dsm"])
def test_the_nll_before_steps_of_sml_is_that_of_the_best_epoch(start, tmp_path, monkeypatch, no_pictures, cell):
    """Epoch 1 is made the best of three, then the epoch of the steps of sml."""
    script = CELLS[cell][0]
    name = "evaluate" if script is train_mnist else "divergences"
    evaluate, values = getattr(script, name), iter([1.0, 5.0, 6.0, 7.0, 9.0, 4.0, 8.0])
    monkeypatch.setattr(script, name, lambda split, *args: evaluate(split, *args) | {f"{split}_nll": next(values)})
    seen = watch(monkeypatch, script)
    start(cell, tmp_path / "run", "--sml-steps", "2")
    assert_equal(seen.evaluated[4], seen.evaluated[1])
    assert_equal(seen.evaluated[6], seen.evaluated[5])
    last = rows(tmp_path / "run")[-1]
    assert (last["before_sml_test_nll"], last["test_nll"], last["best_epoch"]) == (9.0, 8.0, 4)


def test_a_run_killed_before_its_steps_of_sml_ends_where_an_undisturbed_one_ends(with_sml, start, tmp_path, monkeypatch,
                                                                                no_pictures):
    cell, flags, whole, _ = with_sml
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, EPOCHS + 1)  # checkpoints, of epochs 0 to 3
        start(cell, tmp_path / "run", *flags)
    for _ in range(2):  # the second time it has nothing left to do
        start(cell, tmp_path / "run", *flags, "--resume")
        assert_same_bits(checkpoint(whole)["state"], checkpoint(tmp_path / "run")["state"])
        assert timeless(rows(whole))[:-1] == timeless(rows(tmp_path / "run"))[:-1]


@pytest.mark.parametrize("cell", ["fc dsm", "swirl dsm"])
def test_where_steps_of_sml_raise_the_nll_or_fail_the_flow_before_them_is_kept(start, fails, tmp_path, monkeypatch,
                                                                               no_pictures, cell):
    """Each step has its rows of the data and so many samples of the model, at its own learning rate. An epoch has 5."""
    seen, batch = [], 50 if cell == "fc dsm" else 32
    flags = ["--epochs", "1", "--sml-steps", "7", "--model-samples", "30"]

    def worse(model, x, **config):
        seen.append((len(x), config["model_samples"]))
        return -OBJECTIVES["ml"](model, x)

    with monkeypatch.context() as patch:
        patch.setitem(OBJECTIVES, "sml", worse)
        rates = watch(patch, CELLS[cell][0]).rates
        start(cell, tmp_path / "worse", *flags, "--sml-lr", "0.1")
    last, (_, own) = rows(tmp_path / "worse")[-1], rates.values()
    assert seen == [(batch, 30)] * 7 and len(own) == 7 and max(own) == pytest.approx(0.1, rel=0.1)
    assert last["best_epoch"] == 1 and last["test_nll"] == last["before_sml_test_nll"] and last["sml_kept"] is False
    monkeypatch.setitem(OBJECTIVES, "sml", lambda model, x, **_: math.nan * OBJECTIVES["ml"](model, x))
    line = fails(cell, tmp_path / "lost", *flags)
    assert "epoch 2, step 1" in line and checkpoint(tmp_path / "lost")["state"]["best"]["epoch"] == 1


# ---- Loaded ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cell", ["fc ml", "fc dsm", "cnn ssm", "cnn ml", "glow ml", "glow dsm", "sine sml",
                                  "swirl dsm", "points dsm"])
def test_a_finished_run_is_loaded_without_its_data_and_has_its_test_nll(trained, npy, csv, monkeypatch, cell):
    run, script = trained(cell), CELLS[cell][0]
    monkeypatch.setattr(train_mnist, "load_images", None)
    for directory in (run.out, str(run.out)):
        flow = loaded(script, directory)
        if script is train_mnist:
            torch.manual_seed(0)
            x = dequantize(load_images(npy)[2]).view(-1, *flow.shape)
        elif cell == "points dsm":
            x = Points(csv, 0).test
        else:
            x, _, _ = train_toy.truth(TOYS[cell.split()[0]](), 100, -2, "cpu")
        assert -flow.log_prob(x).mean().item() == pytest.approx(rows(run.out)[-1]["test_nll"], rel=1e-4)
        assert not any(m.training for m in flow.modules()) and not any(p.requires_grad for p in flow.parameters())
        assert {p.device.type for p in flow.parameters()} == {"cpu"}
        assert flow.sample(3).shape == flow.score(x[:3]).shape == (3, *flow.shape)


@pytest.mark.parametrize("script", [train_mnist, train_toy])
@pytest.mark.parametrize("content", [None, b"", b"no checkpoint", b"PK\x03\x04"], ids=repr)
def test_a_directory_without_a_whole_run_is_one_error_that_names_it(tmp_path, script, content):
    if content is not None:
        (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(RunError) as error:
        script.load(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


# ---- Divergence ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cell, flags", [
    *((cell, ["--lr", "1e30"]) for cell in ("fc ml", "fc dsm", "cnn ssm", "glow sml", "sine ml", "swirl ssm", "flow",
                                            "langevin", "tempering", "short")), ("flow", ["--flow-lr", "1e30"])],
    ids=str)
def test_a_run_that_diverges_names_epoch_and_step_and_keeps_the_last_good_checkpoint(start, tmp_path, no_pictures,
                                                                                     fails, cell, flags):
    line = fails(cell, tmp_path, *flags)
    assert "epoch 1, step " in line and "--lr" in line
    assert checkpoint(tmp_path)["state"]["epoch"] == 0 and len(rows(tmp_path)) == 1


# ---- Bad options -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cell, flags, facts", [
    *((cell, ["--no-such", "1"], ["--no-such"]) for cell in DRAWN),
    *((cell, ["--resume", "--overwrite"], ["--resume", "--overwrite"]) for cell in DRAWN),
    *((cell, ["--out", "/dev/null/run"], ["/dev/null"]) for cell in DRAWN),
    *((cell, ["--lr", "0"], ["--lr"]) for cell in DRAWN),
    ("fc ml", ["--sigma", "1"], ["--sigma", "mnist-fc-ml"]), ("fc dsm", ["--width", "8"], ["--width"]),
    ("fc dsm", ["--decay", "0.9"], ["--decay"]), ("fc dsm", ["--loss", "mle"], ["--loss", "mle", "dsm"]),
    ("fc dsm", ["--sigma", "-1"], ["--sigma"]), ("fc dsm", ["--bend", "nan", "--arch", "glow"], ["--bend", "glow"]),
    ("fc dsm", ["--paper", "--decay", "1.5"], ["--decay", "1"]), ("glow ml", ["--floor", "1"], ["--floor"]),
    ("fc fdssm", ["--xi", "0"], ["--xi"]), ("fc sml", ["--model-samples", "0"], ["--model-samples"]),
    ("fc dsm", ["--batch-size", "1"], ["--batch-size", "--actnorm"]),
    ("fc dsm", ["--batch-size", "1000"], ["--batch-size", "1000", "250"]),
    ("fc dsm", ["--data", "/nowhere"], ["/nowhere"]), ("fc dsm", ["--data", __file__], [__file__]),
    ("sine ml", ["--xi", "1"], ["--xi", "toy-sine-ml"]), ("sine ml", ["--data", "spiral"], ["--data", "swirl"]),
    ("sine ml", ["--start-smoothing", "0"], ["--start-smoothing"]), ("sine ml", ["--plateau", "1"], ["--plateau"]),
    ("flow", ["--sampler", "gibbs"], ["--sampler", "gibbs"]), ("flow", ["--dim", "1"], ["--dim", "2"]),
    ("flow", ["--data", "swirl"], ["--dim", "2", "swirl"]), ("flow", ["--replicas", "3"], ["--replicas"]),
    ("flow", ["--data", "gmm40", "--weights", "1,2"], ["--weights"]), ("flow", ["--step-size", "-1"], ["--step-size"]),
    *(("flow", ["--weights", text], ["--weights", text]) for text in ("1,-2", "1,x", "1e308,1e308", "1e-200,1e200")),
    ("tempering", ["--hottest", "1"], ["--hottest", "1"])], ids=str)
def test_a_bad_option_is_one_line_that_names_it_and_nothing_is_written(start, tmp_path, fails, cell, flags, facts):
    line = fails(cell, tmp_path / "run", *flags)
    assert all(fact in line for fact in facts), line
    assert not any(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("cell, flags, fact", [
    ("fc fdssm", ["--xi", "1e-9"], "1e-09"), ("checkerboard fdssm", ["--xi", "1e-9"], "1e-09"),
    ("cnn ml", ["--data", "6x6"], "3, 3")], ids=str)
def test_what_the_model_or_its_objective_cannot_do_is_one_line(start, tmp_path, fails, cell, flags, fact):
    np.save(tmp_path / "6x6.npy", np.zeros((350, 6, 6), np.uint8))
    flags = [str(tmp_path / "6x6.npy") if flag == "6x6" else flag for flag in flags]
    assert fact in fails(cell, tmp_path, *flags, *["--batch-size", "5"])


@scripts
def test_a_directory_that_holds_a_run_is_not_touched_without_being_asked_to_and_then_only_what_is_of_a_run(
        start, trained, tmp_path, npy, fails, monkeypatch, cell):
    out = shutil.copytree(trained(cell).out, tmp_path / "run")
    (out / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    line = fails(cell, out)
    assert str(out) in line and "--resume" in line and "--overwrite" in line
    line = fails(cell, out, "--resume", "--lr", "0.5", "--seed", "7")
    assert "checkpoint.pt" in line and "lr" in line and "0.5" in line and "seed" in line and "epochs" not in line
    if cell == "fc dsm":
        images = np.load(npy)
        images[-1, -1, -1] += 1
        np.save(tmp_path / "other.npy", images)
        assert "sha256" in fails(cell, out, "--resume", "--data", tmp_path / "other.npy")
    assert str(tmp_path / "empty") in fails(cell, tmp_path / "empty", "--resume")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    monkeypatch.setattr(Run, "watch", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit):  # before the new run begins
        start(cell, out, "--overwrite", "--seed", "1")
    assert {path.name for path in out.iterdir()} == {".lock", "config.json", "notes.txt"}
    assert json.loads((out / "config.json").read_text())["seed"] == 1


class Code:
    """An object whose pickle makes a directory where it is read: code has run."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def one_byte_changed(content):
    """In the middle of the largest tensor, which only a checksum sees."""
    tensor = max(torch.load(io.BytesIO(content))["state"]["model"].values(), key=torch.numel).numpy().tobytes()
    at = content.index(tensor) + len(tensor) // 2
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1:]


def resaved(change):
    def changed(content):
        saved, buffer = torch.load(io.BytesIO(content)), io.BytesIO()
        change(saved)
        torch.save(saved, buffer)
        return buffer.getvalue()
    return changed


DAMAGES = {"cut": lambda content: content[:-100], "empty": lambda _: b"", "text": lambda _: b"no checkpoint",
           "byte": one_byte_changed, "code": resaved(lambda saved: saved.update(more=Code())),
           **{name: resaved(change) for name, change in {
               "part missing": lambda saved: saved["state"].pop("averaged"),
               "other part": lambda saved: saved["state"]["averaged"].update(more=torch.ones(1)),
               "short moments": lambda saved: saved["state"]["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
               "no moments": lambda saved: saved["state"]["optimizer"].update(state={}),
               "moments of float64": lambda saved: [m.update(exp_avg_sq=m["exp_avg_sq"].double())
                                                    for m in saved["state"]["optimizer"]["state"].values()],
               "nan": lambda saved: next(iter(saved["state"]["model"].values())).fill_(math.nan),
               "best alone": lambda saved: saved["state"].update(best=saved["state"]["best"]["model"]),
               "best nan": lambda saved: saved["state"]["best"].update(val_nll=math.nan),
               "epoch 1.0": lambda saved: saved["state"].update(epoch=1.0),
               "a row too few": lambda saved: saved["metrics"].pop(),
               "seconds in words": lambda saved: saved["metrics"][-1].update(seconds="a minute"),
               "no val_nll": lambda saved: saved["metrics"][1].pop("val_nll"),
               "chains in a list": lambda saved: saved["state"].update(chains=saved["state"]["chains"].tolist()),
               "half of the chains": lambda saved: saved["state"].update(chains=saved["state"]["chains"][:, ::2]),
           }.items()}}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_line_and_its_code_is_never_run(trained, tmp_path, monkeypatch, fails, damage):
    cell = "flow" if "chains" in damage else "fc dsm"
    whole = (trained(cell).copies[1] / "checkpoint.pt").read_bytes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Run, "watch", None)  # training does not begin
    (tmp_path / "checkpoint.pt").write_bytes(DAMAGES[damage](whole))
    line = fails(cell, tmp_path, "--resume")
    assert str(tmp_path / "checkpoint.pt") in line and "--overwrite" in line and not (tmp_path / "ran").exists()


def test_a_directory_has_one_run_at_a_time_and_a_kill_frees_it(start, trained, tmp_path, fails, no_pictures):
    out = shutil.copytree(trained("sine ml").copies[1], tmp_path / "run")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold, out / ".lock"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        for flag in ("--resume", "--overwrite"):
            assert str(out) in fails("sine ml", out, flag)
        other.kill()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    start("sine ml", out, "--resume")
