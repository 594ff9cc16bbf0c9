"""The directory of a run, its bar, errors of one line, settings, what is done beside the step, and speed."""

import copy
import io

import math
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_ebm
import train_mnist
import train_toy
from conftest import checkpoint, compiler, failing, rows
from ebflow import EBFlow, cnn_flow, fc_flow, glow_flow, toy_flow
from layers import ActNorm
from losses import OBJECTIVES
from support import plots, settings
from support.fast import Graphed, accelerated, fast_products
from support.optimization import cosine, trainable, update_average
from support.run import PICTURES, Run, RunError, one_line_errors, write
from support.settings import parse, setting

ROOT = Path(__file__).parent.parent
SCRIPTS = [train_mnist, train_toy, train_ebm]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@dataclass
class Small(settings.Settings):
    NAME = "small-{loss}"
    loss: str = setting("a", "objective", choices=("a", "b"))
    fraction: float = setting(0.5, "a share", above=0, most=1, of=("b",))
    wide: bool = setting(True, "a switch")
    note: str = setting("", "what decides nothing", decides=False)

    def recipe(self):
        return dict(lr=0.3) if self.loss == "b" else {}


def a_run(directory, **changes):
    return Run(Small(out=directory, **changes), {})


def train(run, losses, epoch=1):
    for loss in run.watch(epoch, losses):
        run.record({"loss": torch.tensor(2.0), "grad_norm": torch.tensor(loss)})


# ---- The steps of an epoch -------------------------------------------------------------------------------------------

def test_an_epoch_has_the_means_over_its_own_steps_and_their_number_per_second(tmp_path):
    one = a_run(tmp_path)
    train(one, [1.0, 2.0, 6.0])
    assert one.means.pop("batches_per_second") > 0 and one.means == {"loss": 2.0, "grad_norm": 3.0}
    for _ in one.watch(2, range(120)):
        time.sleep(0.001)
        one.record({"loss": torch.ones(())})
    assert 100 < one.means.pop("batches_per_second") < 1000 and one.means == {"loss": 1.0}
    train(one, [], epoch=3)
    assert one.means == {"batches_per_second": None}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at, steps", [(1, 3), (3, 3), (50, 120), (51, 120), (77, 120), (120, 120)])
def test_the_first_step_that_is_not_finite_is_named_with_what_it_had(tmp_path, bad, at, steps):
    with pytest.raises(RunError, match=rf"epoch 1, step {at} \(loss 2, grad_norm {bad:g}\)"):
        train(a_run(tmp_path), [1.0] * (at - 1) + [bad] * (steps - at + 1))


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
    assert [reads.count(count) for count in sorted(set(reads))] == [50, 50, 20]


def test_the_bar_is_for_a_terminal_alone(tmp_path, capsys, monkeypatch):
    train(a_run(tmp_path), [1.0] * 60)
    assert capsys.readouterr().err == ""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    train(a_run(tmp_path), [1.0] * 60)
    assert "epoch 1" in terminal.getvalue() and "%|" in terminal.getvalue()


def test_a_run_of_more_than_an_hour_says_so_once_after_twenty_steps(tmp_path, capsys):
    one, said = a_run(tmp_path), []
    capsys.readouterr()
    for epoch, batches in ((1, 60_000), (2, 60_000), (1, 600)):  # of 20 epochs
        if batches < 60_000:
            one = a_run(tmp_path / "short")
            capsys.readouterr()
        for step in one.watch(epoch, range(batches)):
            if step == 30:
                break
            time.sleep(0.01)  # 3.3 hours and 2 minutes
            one.record({"loss": torch.ones(())})
        said += [float(line.split()[-2]) for line in capsys.readouterr().out.splitlines()]
    assert len(said) == 1 and 3 < said[0] < 10


# ---- What is written -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("nll", [torch.nan, torch.inf, -torch.inf])
def test_a_validation_nll_that_is_not_finite_is_an_error_and_nothing_is_written(tmp_path, nll):
    one = a_run(tmp_path)
    one.save({"epoch": 0, "val_nll": 1.0}, {"epoch": 0})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(RunError, match=f"{nll} after epoch 1: .*--lr"):
        one.save({"epoch": 1, "val_nll": nll}, {"epoch": 1})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_run_prints_its_settings_and_the_figures_of_an_epoch_and_of_the_end(tmp_path, capsys):
    one = a_run(tmp_path)
    first = capsys.readouterr().out
    assert all(len(line) <= 120 for line in first.splitlines())
    assert " ".join(first.split()) == "epochs: 20, batch_size: 100, lr: 0.0001, seed: 0, loss: a, wide: True"
    for epoch, seconds in enumerate((70, 20)):
        one.start -= seconds
        one.save({"epoch": epoch, "val_nll": 1.25, "tv": 0.5, "rate": None}, {}, shown=("tv", "rate", "missing"))
    assert [round(row["seconds"]) for row in rows(tmp_path)] == [70, 90]
    one.finish({"test_nll": 2.0, "weights": [0.25, 0.75]})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["epoch", "0", "val_nll", "1.25", "tv", "0.5"], ["epoch", "1", "val_nll", "1.25", "tv", "0.5"],
                     ["test_nll", "2.0000"], ["weights", "0.2500", "0.7500"], ["minutes", "1.5000"],
                     ["written", "to", str(tmp_path)]]
    assert rows(tmp_path)[-1]["weights"] == [0.25, 0.75] and "weights" not in checkpoint(tmp_path)["metrics"][-1]
    one.finish({"test_nll": 2.0, "ess": 0.5, "tv": 0.25}, {"missing": "no", "tv": "from the truth"})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["tv", "0.2500", "from", "the", "truth"], ["minutes", "1.5000"], ["written", "to", str(tmp_path)]]
    assert rows(tmp_path)[-1]["ess"] == 0.5


@pytest.mark.parametrize("start, end", [(1.0, 2.0), (1.0, 9.6e19), (2.0, 2.0), (None, 9.0), (1.0, None)])
def test_a_run_that_ends_worse_than_it_began_says_so(tmp_path, capsys, start, end):
    one = a_run(tmp_path)
    one.save({"epoch": 0, "val_nll": start}, {"epoch": 0})
    one.save({"epoch": 1, "val_nll": end}, {"epoch": 1})
    one.finish({"test_nll": 5.0})
    printed = capsys.readouterr().err
    assert f"{end:.6g}" in printed and "--lr" in printed if start == 1.0 and end else not printed


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, error):
    def fail(file):
        raise error

    path = tmp_path / "file"
    write(path, b"old")
    with monkeypatch.context() as patch, pytest.raises((OSError, KeyboardInterrupt)):
        patch.setattr(os, "fsync", fail)
        write(path, b"new and longer")
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]
    write(path, b"new")
    assert path.read_bytes() == b"new" and [*tmp_path.iterdir()] == [path]


def test_on_a_full_disk_overwrite_deletes_nothing(tmp_path, monkeypatch):
    a_run(tmp_path).save({"epoch": 0, "val_nll": 1.0}, {"epoch": 0})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(os, "fsync", lambda file: os.write(-1, b""))  # an OSError
    with pytest.raises(OSError):
        a_run(tmp_path, overwrite=True, seed=1)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("error, code", [
    (RunError("a\n  b"), "error: a b"), (OSError(5, "Input/output error"), "error: [Errno 5] Input/output error"),
    (KeyError("known"), "error: 'known'"), (KeyboardInterrupt(), 130)], ids=repr)
def test_what_the_user_can_put_right_is_one_line_and_a_bug_keeps_its_traceback(capsys, error, code):
    with pytest.raises(SystemExit) as exit, one_line_errors(KeyError):
        raise error
    assert exit.value.code == code and ("--resume" in capsys.readouterr().err) == (code == 130)
    with pytest.raises(ValueError, match="a bug"), one_line_errors(KeyError):
        raise ValueError("a bug")


def test_overwrite_knows_all_pictures_that_the_scripts_draw():
    drawn = [re.findall(r'plots.save\(s.out / "([\w.]+)"', Path(script.__file__).read_text()) for script in SCRIPTS]
    assert all(drawn) and {name for names in drawn for name in names} == {*PICTURES}


@pytest.mark.parametrize("channels", [1, 3])
def test_a_mosaic_shows_each_image_upright_in_its_place_row_by_row(channels):
    images = torch.randint(-50, 300, (4, channels, 5, 3)).float()
    shown = plots.mosaic(images).axes[0].images[0].get_array()
    assert shown.shape[:2] == (10, 6)
    for i, image in enumerate(images.clamp(0, 255) / 255):
        top, left = 5 * (i // 2), 3 * (i % 2)
        part = torch.as_tensor(shown[top:top + 5, left:left + 3].data).view(5, 3, channels)
        torch.testing.assert_close(part, image.permute(1, 2, 0))


# ---- Settings --------------------------------------------------------------------------------------------------------

def test_a_flag_goes_before_the_recipe_and_the_recipe_before_the_default():
    assert parse(Small, []).lr == 1e-4 and parse(Small, ["--loss", "b"]).lr == 0.3
    assert parse(Small, ["--loss", "b", "--lr", "0.5"]).lr == 0.5 and not parse(Small, ["--no-wide"]).wide
    assert parse(Small, []).out == Path("runs/small-a") and parse(Small, ["--out", "b"]).out == Path("b")


def test_what_decides_the_result_is_what_a_run_has_of_it():
    shared = {"epochs": 20, "batch_size": 100, "lr": 1e-4, "seed": 0, "loss": "a", "wide": True}
    assert parse(Small, ["--note", "b", "--out", "b"]).config() == shared
    assert parse(Small, ["--loss", "b"]).config() == shared | {"loss": "b", "lr": 0.3, "fraction": 0.5}
    assert "decay" in parse(train_mnist.Settings, ["--schedule", "steps"]).config()
    assert "decay" not in parse(train_mnist.Settings, ["--out", "steps"]).config()


@pytest.mark.parametrize("flags, facts", [
    (["--fraction", "0.2"], ["--fraction", "small-a"]), (["--loss", "c"], ["--loss", "'c'", "'a'", "'b'"]),
    *((["--loss", "b", "--fraction", value], ["--fraction", bound, value]) for value, bound in
      (("0.0", "above 0"), ("1.5", "at most 1"), ("nan", "0"), ("inf", "0"))),
    (["--seed", "-1"], ["--seed", "at least 0"]), (["--seed", str(2**32)], ["--seed", f"below {2**32}"]),
    (["--epochs", "many"], ["--epochs", "many"]), (["--no-such"], ["--no-such"]), (["more"], ["more"]),
    (["--resume", "--overwrite"], ["--resume", "--overwrite"])], ids=str)
def test_a_wrong_flag_is_one_line_with_its_name_after_a_short_one_on_usage(capsys, flags, facts):
    with pytest.raises(SystemExit) as exit:
        parse(Small, flags)
    usage, line = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and usage.startswith("usage: ") and len(usage) < 100
    assert all(fact in line for fact in facts)


@pytest.mark.parametrize("stdout", [None, "ascii", "cp932"])
def test_a_stream_that_is_closed_or_lacks_characters_ends_no_run(tmp_path, monkeypatch, stdout):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", stdout and io.TextIOWrapper(io.BytesIO(), stdout))
    with pytest.raises(SystemExit) as exit:
        parse(train_toy.Settings, ["--help"])
    assert exit.value.code == 0
    train(a_run(tmp_path), [1.0] * 60)  # behind a bar
    print("θ̃ ³", flush=True)
    assert not stdout or b"--xi" in sys.stdout.buffer.getvalue()
    for stream in (sys.stdout, sys.stderr):
        print("θ̃ ³", file=stream)
        stream.close()


@pytest.mark.parametrize("script, flags", [(train_mnist, []), (train_mnist, ["--paper", "--arch", "glow"]),
                                           (train_toy, ["--loss", "dsm"]), (train_ebm, ["--sampler", "short"])])
def test_help_names_every_flag_with_what_it_means_and_the_default_of_its_recipe(capsys, monkeypatch, script, flags):
    monkeypatch.setenv("COLUMNS", "1000")  # argparse then breaks no line
    with pytest.raises(SystemExit) as exit:
        script.main([*flags, "--help"])
    assert exit.value.code == 0
    options = re.split(r"\n  (?=-)", capsys.readouterr().out)[1:]
    shown = {re.match(r"(?:-h, )?--([\w-]+)", option)[1]: " ".join(option.split()) for option in options}
    s, kind = parse(script.Settings, flags), script.Settings
    assert shown.keys() == {f.name.replace("_", "-") for f in fields(kind)} | {"help"} and s.recipe()
    choices = {choice for f in fields(kind) for choice in f.metadata["choices"] or ()}
    for f in fields(kind):
        text = shown[f.name.replace("_", "-")]
        default = f.default if f.name in ("arch", "loss", "paper", "sampler", "out") else vars(s)[f.name]
        assert f.metadata["help"] in text and (f"(default: {default}" in text or flags)
        assert f.name not in s.recipe() or f"(default: {vars(s)[f.name]}" in text
        assert all(name in text and name in choices for name in f.metadata["of"])  # else nobody would have it


# ---- Beside the step -------------------------------------------------------------------------------------------------

def test_the_moving_average_is_the_recursion_of_the_paper_after_its_first_steps_and_no_view():
    average, parameter, expected = torch.zeros(3), torch.ones(3), None
    for n in range(200):
        parameter.copy_(torch.randn(3))
        update_average([average], [parameter], n, m=0.9)
        m = min(0.9, (1 + n) / (10 + n)) if n else 0.0  # the first takes all
        expected = parameter.clone() if n == 0 else m * expected + (1 - m) * parameter
        torch.testing.assert_close(average, expected)
    update_average([average], [parameter], 10**6)
    torch.testing.assert_close(average, 0.999 * expected + 0.001 * parameter)


def test_the_learning_rate_rises_over_five_percent_and_falls_from_its_plateau_on():
    half = lambda t: 0.5 * (1 + math.cos(math.pi * t))  # noqa: E731
    found = [cosine(t) for t in (0, 0.025, 0.05, 0.5, 0.75, 1)]
    assert found == pytest.approx([0, 0.5 * half(0.025), half(0.05), 0.5, half(0.75), 0])
    found = [cosine(t, plateau=0.6) for t in (0.025, 0.05, 0.3, 0.6, 0.8, 1)]
    assert found == pytest.approx([0.5, 1, 1, 1, 0.5, 0])


# ---- Speed -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss, amx, inside", [
    ("dsm", True, ["tf32", "tf32", "bf16"]), ("sml", True, ["ieee", "ieee", "ieee"]),
    ("fdssm", True, ["ieee", "ieee", "ieee"]),
    ("fdssm", False, ["ieee", "ieee", "bf16"])])
def test_fast_products_are_for_training_only_and_short_ones_not_for_fdssm(monkeypatch, loss, amx, inside):
    """TF32 on a GPU and bfloat16 on a CPU inside; what was there before outside, after an error, too."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    products = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul
    before = [kind.fp32_precision for kind in products]
    with pytest.raises(KeyError), fast_products(loss):
        assert [kind.fp32_precision for kind in products] == inside != before
        raise KeyError
    assert [kind.fp32_precision for kind in products] == before


def test_where_there_is_no_compiler_the_error_is_one_line(monkeypatch, tmp_path):
    def compile(function, fullgraph, **rest):
        def failing(*tensors):
            raise torch._inductor.exc.InductorError(RuntimeError("no g++\nat all"), RuntimeError)
        return failing

    import torch._inductor.exc  # torch.compile does
    monkeypatch.setattr(torch, "compile", compile)
    line = failing(train_toy.main)(None, "--compile", "--test-points", "8", "--device", "cpu", "--out", tmp_path)
    assert "C++ compiler" in line and "--compile" in line


def a_gradient(loss, flow):
    """What the training scripts accelerate: leaves the gradient in p.grad.   -> the function, and its objective"""
    def objective(x, sigma):
        return OBJECTIVES[loss](flow, x, sigma=sigma, xi=0.7, model_samples=10)

    def gradient(x, sigma):
        loss = objective(x, sigma)
        loss.backward(inputs=trainable(flow))
        return loss.detach()

    return gradient, objective


def assert_gradient_while_training(gradient, objective, flow):
    """Loss and p.grad are those of the objective with the same random numbers, at each step of an optimiser."""
    parameters = trainable(flow)
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    for sigma in (6.0, 1.0, 0.4):
        sigma = torch.tensor(sigma, dtype=torch.float64, device=parameters[0].device)
        x = torch.randn(10, *flow.shape, device=parameters[0].device)
        optimizer.zero_grad()
        torch.manual_seed(1)
        found = gradient(x, sigma).clone()
        torch.manual_seed(1)
        expected = objective(x, sigma)
        torch.testing.assert_close(found, expected.detach())
        torch.testing.assert_close([p.grad for p in parameters], [*torch.autograd.grad(expected, parameters)])
        optimizer.step()


def test_all_gradients_are_replayed_but_those_that_wait_for_a_gpu_and_on_a_cpu_are_the_function_itself():
    for loss in OBJECTIVES:
        flow, s = fc_flow(4), parse(train_mnist.Settings, ["--loss", loss])
        gradient, objective = a_gradient(loss, flow)
        wrapped = accelerated(gradient, trainable(flow), s)
        assert wrapped is gradient if loss in ("ml", "sml") else isinstance(wrapped, Graphed)
        assert_gradient_while_training(wrapped, objective, flow)


@pytest.mark.parametrize("loss", ["ssm", "dsm", "fdssm"])
def test_nothing_in_a_step_of_score_matching_waits_for_a_gpu_or_is_made_elsewhere(monkeypatch, loss):
    """Python waits where a tensor's value becomes a number. On device "meta" there is no value, and it is an error."""
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, fused, **rest: torch.optim.SGD(parameters, **rest))
    flow = EBFlow([*fc_flow(4).layers, ActNorm(4)], (4,)).to("meta")
    s = parse(train_mnist.Settings, ["--loss", loss, "--clip", "1"])
    step, _ = train_mnist.make_step(s, lambda x: x, flow, flow, copy.deepcopy(flow))
    figures = [step(torch.zeros(10, 1, 2, 2, dtype=torch.uint8, device="meta"), n) for n in (3, 10)]  # it moves
    flow = toy_flow(blocks=2, width=8).to("meta")
    step, _ = train_toy.make_step(parse(train_toy.Settings, ["--loss", loss]), flow, copy.deepcopy(flow))
    figures += [step(torch.empty(16, 2, device="meta"), torch.tensor(0.4, device="meta"), 1)]
    assert all(figure.is_meta and figure.shape == () for row in figures for figure in row.values())


@compiler
def test_a_compiled_gradient_is_that_of_the_objective_and_draws_its_random_numbers(float64):
    """For one layer of each kind and one objective, since C++ takes long."""
    flow = EBFlow(fc_flow(4, bend=1.0).layers[:2], (4,))
    gradient, objective = a_gradient("dsm", flow)
    s = parse(train_mnist.Settings, ["--compile"])
    assert_gradient_while_training(accelerated(gradient, trainable(flow), s), objective, flow)


@gpu
@pytest.mark.parametrize("loss", ["ssm", "dsm", "fdssm"])
def test_a_replayed_gradient_is_that_of_the_objective(float64, loss):
    for flow in (fc_flow(4, bend=1.0), cnn_flow((1, 2, 2), kernel_size=3, blocks=1, diagonal=0.6),
                 glow_flow((1, 4, 4), width=2, depth=1, floor=0.5), toy_flow(blocks=1, width=8)):
        gradient, objective = a_gradient(loss, flow.cuda())
        assert_gradient_while_training(Graphed(gradient, trainable(flow)), objective, flow)


@gpu
def test_a_replay_draws_anew_and_recording_draws_nothing_that_is_missed():
    noise, values = Graphed(lambda x: (x + torch.randn_like(x)).sum(), []), []
    for _ in range(2):
        torch.manual_seed(0)
        values.append([noise(torch.zeros(5, 4, device="cuda")).item() for _ in range(3)])
    assert len(set(values[0])) == 3 and values[0] == values[1]


# ---- How the code is written -----------------------------------------------------------------------------------------

def test_no_line_of_code_is_longer_than_120_characters():
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout.splitlines()
    files = [ROOT / name for name in listed if (ROOT / name).is_file()]
    assert ROOT / "train_mnist.py" in files and Path(__file__).resolve() in files
    long = [f"{path.relative_to(ROOT)}:{n}" for path in files
            for n, line in enumerate(path.read_text().splitlines(), start=1) if len(line) > 120]
    assert not long, " ".join(long)
