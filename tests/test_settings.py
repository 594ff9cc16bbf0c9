"""The command line: every flag explains itself, every recipe is one that can run, and what is wrong is one line.

Also what a run prints, what it takes to add an objective, and how much there is to read before the first step.
"""

import io
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import losses
import train_ebm
import train_mnist
import train_toy
from conftest import checkpoint, failing
from losses import OBJECTIVES
from support.run import read_metrics
from support.settings import PAPER, RECIPES, TOY_RECIPES, Ebm, Mnist, Toy, parse
from test_data import small_data_set

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"mnist": (train_mnist, Mnist), "toy": (train_toy, Toy), "ebm": (train_ebm, Ebm)}
scripts = pytest.mark.parametrize("script, kind", SCRIPTS.values(), ids=SCRIPTS)
fails = failing(lambda flags: parse(Mnist, flags))


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # argparse then breaks no line


def help_of(script, capsys, *flags):
    """{flag: the text that --help prints about it}"""
    with pytest.raises(SystemExit) as exit:
        script.main([*flags, "--help"])
    assert exit.value.code == 0
    options = re.split(r"\n  (?=-)", capsys.readouterr().out)[1:]
    return {re.match(r"(?:-h, )?(--[\w-]+)", option)[1]: " ".join(option.split()) for option in options}


def flag(name):
    return "--" + name.replace("_", "-")


# ---- Every flag explains itself --------------------------------------------------------------------------------------

@scripts
def test_help_names_every_flag_with_what_it_means_and_its_default(capsys, script, kind):
    shown = help_of(script, capsys)
    assert shown.keys() == {flag(f.name) for f in fields(kind)} | {"--help"}
    recipe = kind().recipe()
    for f in fields(kind):
        assert f.metadata["help"] in shown[flag(f.name)]
        assert f"(default: {recipe.get(f.name, f.default)}" in shown[flag(f.name)]
        assert all(name in shown[flag(f.name)] for name in f.metadata["of"])


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("arch, loss", [("cnn", "dsm"), ("glow", "ssm")])
def test_help_shows_the_values_of_the_recipe_that_was_asked_for(capsys, arch, loss, paper):
    shown = help_of(train_mnist, capsys, "--arch", arch, "--loss", loss, *["--paper"] * paper)
    recipe = (PAPER if paper else RECIPES)[f"{arch} {loss}"]
    assert recipe
    for name, value in recipe.items():
        assert f"(default: {value}" in shown[flag(name)]


@scripts
def test_a_setting_belongs_to_what_can_be_chosen(script, kind):
    """A slip of the pen in `of` would take the setting away from everyone."""
    choices = {choice for f in fields(kind) for choice in f.metadata["choices"] or ()}
    assert all(name in choices for f in fields(kind) for name in f.metadata["of"])


# ---- Every recipe is one that can run --------------------------------------------------------------------------------

@pytest.mark.parametrize("arch", ["fc", "cnn", "glow"])
@pytest.mark.parametrize("loss", OBJECTIVES)
@pytest.mark.parametrize("paper", [False, True])
def test_every_architecture_has_a_recipe_for_every_objective_of_settings_that_this_cell_has(arch, loss, paper):
    recipe = (PAPER if paper else RECIPES)[f"{arch} {loss}"]
    s = parse(Mnist, ["--arch", arch, "--loss", loss, *["--paper"] * paper])  # exits where a value is out of its range
    assert recipe.keys() <= s.config().keys()
    assert {name: vars(s)[name] for name in recipe} == recipe
    assert (s.arch, s.loss, s.paper) == (arch, loss, paper)


def test_the_published_settings_are_the_papers():
    """As the authors' configurations have them; ssm and dsm divided by D = 784 there, fdssm by D and sml by 2."""
    D = 784
    for loss in OBJECTIVES:
        fc, cnn, glow = (parse(Mnist, ["--paper", "--arch", arch, "--loss", loss]) for arch in ("fc", "cnn", "glow"))
        assert (fc.epochs, cnn.epochs, glow.epochs) == (10_000, 1_000, 80)
        assert all(s.batch_size == 100 and s.schedule == "steps" and s.normalize == "none" for s in (fc, cnn, glow))
        assert fc.optimizer == cnn.optimizer == "rmsprop" and glow.optimizer == "adam"
        assert (fc.lr, cnn.lr, glow.lr) == (1e-4, 1e-4, 1e-5) and (fc.s, cnn.s, glow.s) == (0.5, 0.75, 1.0)
        assert (fc.decay, cnn.decay, glow.decay) == (0.95, 0.925 if loss in ("ml", "sml") else 0.95, 1.0)
        assert (fc.clip, cnn.clip, glow.clip) == ((5 * D, 5 * D) if loss == "fdssm" else (0, 0)) + (500 * D,)
        assert (fc.diagonal, fc.bias, fc.bend, cnn.diagonal, cnn.bias, cnn.bend) == (-1, 1, None, -1, 0.01, None)
        assert fc.weight_decay == glow.weight_decay == 0
        assert cnn.weight_decay == {"ml": 1e-5, "sml": 2e-5, "dsm": 1e-5 * D}.get(loss, 0)
        assert (glow.width, glow.depth, glow.coupling, glow.actnorm, glow.floor) == (512, 16, "tanh", "held", 0)
        if loss in ("ssm", "dsm", "fdssm"):
            assert fc.energy_weight == cnn.energy_weight == 0 and glow.energy_weight == pytest.approx(0.1 * D)
    assert parse(Mnist, ["--paper", "--loss", "dsm"]).sigma == parse(Mnist, ["--paper", "--loss", "fdssm"]).xi == 1
    for arch in ("cnn", "glow"):
        assert parse(Mnist, ["--paper", "--arch", arch, "--loss", "dsm"]).sigma == 0.1
        assert parse(Mnist, ["--paper", "--arch", arch, "--loss", "fdssm"]).xi == 0.1


def test_no_recipe_is_of_an_objective_or_an_architecture_that_does_not_exist():
    for table in (RECIPES, PAPER):
        assert [*table] == [f"{arch} {loss}" for arch in ("fc", "cnn", "glow") for loss in OBJECTIVES]
    assert TOY_RECIPES.keys() <= OBJECTIVES.keys()


@pytest.mark.parametrize("data", ["sine", "swirl", "checkerboard"])
@pytest.mark.parametrize("loss", OBJECTIVES)
def test_every_recipe_of_the_toys_is_of_settings_that_this_objective_has(data, loss):
    s = parse(Toy, ["--data", data, "--loss", loss])
    recipe = TOY_RECIPES.get(loss, {}) | (dict(start_smoothing=2.0, anneal=0.5) if data == "sine" else {})
    assert recipe.keys() <= s.config().keys() and {name: vars(s)[name] for name in recipe} == recipe


@pytest.mark.parametrize("sampler, steps", [("flow", 5), ("langevin", 5), ("short", 20)])
def test_short_chains_take_more_steps(sampler, steps):
    assert parse(Ebm, ["--sampler", sampler]).local_steps == steps


def test_a_flag_goes_before_the_recipe_and_the_recipe_before_the_default():
    assert parse(Mnist, ["--loss", "ml"]).lr == 6e-3 and parse(Mnist, ["--loss", "dsm"]).lr == 1e-4
    assert parse(Mnist, ["--loss", "ml", "--lr", "0.5"]).lr == 0.5


def test_the_name_of_a_directory_gives_a_run_no_other_settings():
    for out in ("dsm", "steps", "fdssm"):
        assert parse(Mnist, ["--loss", "ml", "--out", out]).config() == parse(Mnist, ["--loss", "ml"]).config()


@pytest.mark.parametrize("sampler", ["flow", "langevin", "short"])
def test_every_recipe_of_the_energies_is_of_settings_that_this_sampler_has(sampler):
    s = parse(Ebm, ["--sampler", sampler])
    recipe = s.recipe()
    assert recipe.keys() <= s.config().keys() and {name: vars(s)[name] for name in recipe} == recipe


# ---- What is wrong is one line ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    (["--loss", "mle"], "argument --loss: invalid choice: 'mle' (choose from"),
    (["--arch", "resnet"], "argument --arch: invalid choice: 'resnet' (choose from"),
    (["--no-such"], "unrecognized arguments: --no-such"),
    (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
    (["--sigma", "1", "--loss", "ml"], "--sigma is not a setting of mnist-fc-ml"),
    (["--width", "8"], "--width is not a setting of mnist-fc-dsm"),
    (["--decay", "0.9"], "--decay is not a setting of mnist-fc-dsm"),
    (["--arch", "glow", "--bend", "1"], "--bend is not a setting of mnist-glow-dsm"),
    (["--sigma", "-1"], "--sigma must be at least 0, not -1.0"), (["--clip", "-1"], "--clip must be at least 0"),
    (["--lr", "nan"], "--lr must be a finite number"), (["--lr", "0"], "--lr must be above 0, not 0.0"),
    (["--clip", "inf"], "--clip must be a finite number"), (["--epochs", "0"], "--epochs must be above 0"),
    (["--seed", "-1"], "--seed must be at least 0"), (["--seed", str(2**32)], f"--seed must be below {2**32}"),
    (["--arch", "glow", "--floor", "1"], "--floor must be below 1"), (["--weight-decay", "1"], "must be below 1"),
    (["--schedule", "steps", "--decay", "-1"], "--decay must be above 0, not -1.0"),
    (["--schedule", "steps", "--decay", "1e308"], "--decay must be at most 1, not 1e+308"),
    (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
    (["--optimizer", "sgd"], "argument --optimizer: invalid choice"),
    (["--out", ""], "--out must be a directory of its own, not the working directory"),
    (["--s", "1e-320"], "--s must be at least 0.01, not 1e-320"), (["--bias", "1e308"], "--bias must be at most 100"),
    (["--diagonal=-1e-30"], "--diagonal must be away from 0 by at least 0.1, not -1e-30"),
    (["--bend=-1e308"], "must be at least -1000"),
    (["--loss", "fdssm", "--xi", "1e-320"], "--xi must be at least 0.001, not 1e-320"),
    (["--loss", "fdssm", "--xi", "1e308"], "--xi must be at most 1000"), (["--sigma", "1e38"], "must be at most 1000"),
    (["--batch-size", str(10**20)], "--batch-size must be at most 1000000,"),
    (["--arch", "glow", "--width", str(10**20)], "--width must be at most 1000000,"),
    (["--arch", "glow", "--depth", "4294967296"], "--depth must be at most 1000, not 4294967296")])
def test_a_wrong_flag_is_one_short_line_on_usage_and_one_on_what_is_wrong(capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        parse(Mnist, flags)
    usage, line = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and usage.startswith("usage: ") and len(usage) < 100
    assert ": error: " in line and message in line


def test_an_objective_without_a_recipe_is_one_line(capsys, monkeypatch):
    monkeypatch.delitem(RECIPES, "fc ml")
    line = fails(capsys, "--loss", "ml")
    assert "there is no recipe for mnist-fc-ml: add a line to support/settings.py" in line
    monkeypatch.undo()
    assert parse(Mnist, ["--loss", "ml"]).lr == RECIPES["fc ml"]["lr"]


@pytest.mark.parametrize("script, flags, message", [
    (train_toy, ["--data", "spiral"], "invalid choice: 'spiral'"),
    (train_toy, ["--xi", "1", "--loss", "ml"], "--xi is not a setting of toy-swirl-ml"),
    (train_toy, ["--xi", "1e-5", "--loss", "fdssm"], "--xi must be at least 0.001, not 1e-05"),
    (train_toy, ["--no-such"], "unrecognized arguments: --no-such"),
    (train_ebm, ["--no-such"], "unrecognized arguments: --no-such"),
    (train_ebm, ["--loss", "dsm"], "unrecognized arguments: --loss"),
    (train_toy, ["--start-smoothing", "0.1"], "--start-smoothing must be at least 0.375"),
    (train_toy, ["--plateau", "1"], "--plateau must be below 1"),
    (train_toy, ["--test-points", "7"], "--test-points must be at least 8, not 7"),
    (train_toy, ["--anneal", "0"], "--anneal must be above 0"),
    (train_ebm, ["--sampler", "gibbs"], "invalid choice: 'gibbs'"),
    (train_ebm, ["--dim", "1"], "--dim must be at least 2"),
    (train_ebm, ["--dim", "100000000"], "--dim must be at most 4096, not 100000000"),
    (train_ebm, ["--test-points", "1"], "--test-points must be at least 8, not 1"),
    (train_toy, ["--blocks", "4294967296"], "--blocks must be at most 1000"),
    (train_ebm, ["--chains", "0"], "--chains must be above 0"),
    (train_ebm, ["--step-size", "-1"], "--step-size must be above 0")])
def test_the_other_scripts_are_as_strict(capsys, script, flags, message):
    with pytest.raises(SystemExit) as exit:
        parse(Toy if script is train_toy else Ebm, flags)
    usage, line = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and usage.startswith("usage: ") and ": error: " in line and message in line


def test_a_density_of_the_plane_in_three_dimensions_is_one_line(tmp_path, capsys):
    line = failing(train_ebm.main)(capsys, "--data", "swirl", "--dim", "3", "--device", "cpu", "--out", str(tmp_path))
    assert "--dim must be 2 for --data swirl, not 3" in line and not list(tmp_path.iterdir())


# ---- What a run prints -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data_set(tmp_path_factory.mktemp("data"))


def train(data, out, *flags):
    train_mnist.main(["--data", str(data), "--out", str(out), "--epochs", "2", "--batch-size", "50", "--device", "cpu",
                      *flags])


def test_a_run_prints_its_resolved_settings_first(data, tmp_path, no_pictures, capsys):
    train(data, tmp_path, "--loss", "fdssm", "--lr", "0.5", "--clip", "1")
    printed, config = capsys.readouterr().out, json.loads((tmp_path / "config.json").read_text())
    first = printed[:printed.index("\nlayer ")]  # the model follows
    assert all(len(line) <= 120 for line in first.splitlines())
    assert " ".join(first.split()) == str(config).strip("{}").replace("'", "")
    assert first.startswith("epochs: 2, batch_size: 50, lr: 0.5, seed: 0, loss: fdssm, arch: fc, paper: False, ")
    assert "clip: 1.0" in first and "normalize: whiten" in first and "xi: 1.0" in first  # flag, recipe, default
    assert "decay: 0.95" not in first and "model_samples" not in first and "device" not in first
    assert parse(Mnist, ["--loss", "fdssm", "--lr", "0.5", "--clip", "1", "--epochs", "2", "--batch-size", "50"]
                 ).config().items() <= config.items()


def test_without_a_terminal_a_run_prints_one_line_for_each_epoch_and_no_bar(data, tmp_path, no_pictures, capsys,
                                                                            monkeypatch):
    train(data, tmp_path / "file")
    printed, error = capsys.readouterr()
    lines = [line.split() for line in printed.splitlines() if line.startswith("epoch ")]
    assert error == "" and [line[1] for line in lines] == ["0", "1", "2"] and "%|" not in printed
    for line, row in zip(lines, read_metrics(tmp_path / "file"), strict=True):
        figures = dict(zip(line[::2], line[1::2]))
        assert figures["val_nll"] == f"{row['val_nll']:.2f}" and ("loss" in figures) == (row["epoch"] > 0)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    train(data, tmp_path / "terminal")
    assert "epoch 1" in terminal.getvalue() and "%|" in terminal.getvalue()


def test_adding_an_objective_is_a_function_a_row_of_the_table_and_a_recipe(data, tmp_path, no_pictures, capsys,
                                                                           monkeypatch):
    def sharp(energy, x):
        """Exact score matching, of D Hessian-vector products."""
        return losses.sm(energy, x)

    monkeypatch.setitem(OBJECTIVES, "sharp", lambda model, x, share, **_: sharp(model.energy, share(x)))
    assert "there is no recipe for mnist-fc-sharp" in fails(capsys, "--loss", "sharp")
    monkeypatch.setitem(RECIPES, "fc sharp", dict(epochs=4, batch_size=50, lr=2e-3))
    shown = help_of(train_mnist, capsys, "--loss", "sharp")
    assert "sharp" in shown["--loss"] and "(default: 0.002)" in shown["--lr"]
    train_mnist.main(["--loss", "sharp", "--data", str(data), "--out", str(tmp_path), "--device", "cpu"])
    metrics = read_metrics(tmp_path)
    assert len(metrics) == 5 and metrics[-1]["val_nll"] < metrics[0]["val_nll"]
    assert checkpoint(tmp_path)["config"]["loss"] == "sharp"


# ---- How much there is to read ---------------------------------------------------------------------------------------

def test_before_its_first_step_train_mnist_enters_few_functions_and_three_frames_lead_to_it(data, tmp_path, capsys,
                                                                                           monkeypatch):
    entered, frames = set(), []

    def of_the_project(code):
        path = Path(code.co_filename)
        return path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / ".venv") and path.parent != ROOT / "tests"

    def profile(frame, event, argument):
        if event == "call" and of_the_project(frame.f_code) and "comp>" not in frame.f_code.co_name:
            entered.add((frame.f_code.co_filename, frame.f_code.co_firstlineno, frame.f_code.co_name))

    def stop(*arguments, **settings):
        sys.setprofile(None)
        frame = sys._getframe(1)
        while frame:
            if of_the_project(frame.f_code):
                frames.append(f"{Path(frame.f_code.co_filename).name}: {frame.f_code.co_name}")
            frame = frame.f_back
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", stop)
    sys.setprofile(profile)
    try:
        with pytest.raises(SystemExit):
            train(data, tmp_path)
    finally:
        sys.setprofile(None)
    assert frames == ["train_mnist.py: step", "train_mnist.py: train", "train_mnist.py: main"]
    assert 20 < len(entered) <= 64, sorted(entered)


def files(*patterns):
    """The files of the repository, those that are not yet committed, too."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / name for name in sorted(set(listed)) if (ROOT / name).is_file()]


def test_no_line_of_code_is_longer_than_120_characters():
    assert ROOT / "train_mnist.py" in files("*.py") and Path(__file__).resolve() in files("*.py")
    long = [f"{path.relative_to(ROOT)}:{n}" for path in files("*.py")
            for n, line in enumerate(path.read_text().splitlines(), start=1) if len(line) > 120]
    assert not long, " ".join(long)


@pytest.mark.parametrize("script, lines", [("train_mnist.py", 300), ("train_toy.py", 200), ("train_ebm.py", 300)])
def test_a_training_script_is_short(script, lines):
    assert len((ROOT / script).read_text().splitlines()) <= lines
