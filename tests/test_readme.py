"""The README is true: what it names exists, its commands parse, its pictures and numbers are in the repository."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

import train_ebm
import train_mnist
import train_toy
from experiments import ablation, balanced, depth, race, rivals, runtime, toys

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


FENCE = r"```\w*\n(.*?)```"


@pytest.mark.parametrize("file, name", sorted(set(re.findall(r"`(\w+\.py): ([\w.]+)`", README))))
def test_every_function_that_the_readme_maps_exists(file, name):
    thing = importlib.import_module(file.removesuffix(".py"))
    for part in name.split("."):
        thing = getattr(thing, part)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?<=\]\()(?!http)[^)#]+", README)
                                            + re.findall(r"`(\w+\.py)`", README))))
def test_every_file_that_the_readme_names_exists(path):
    assert (ROOT / path).is_file()


def commands(script):
    """The arguments of every command of the README that runs the script, in a block of code or in a sentence."""
    lines = [line for block in re.findall(FENCE, README, re.S) for line in block.splitlines()]
    lines += re.findall(r"`([^`]+)`", re.sub(FENCE, "", README, flags=re.S))
    found = sorted({line.split(script, 1)[1].strip() for line in lines if re.search(rf"python {re.escape(script)}", line)})
    assert found
    return found


@pytest.mark.parametrize("script, arguments", [(script, arguments) for script in (train_mnist, train_toy, train_ebm)
                                               for arguments in commands(f"{script.__name__}.py")])
def test_every_training_command_parses(script, arguments):
    script.parse(arguments.replace("LOSS", "dsm").split())


@pytest.mark.parametrize("command", commands("-m experiments."))
def test_every_experiment_that_the_readme_runs_exists_and_takes_its_arguments(command, capsys):
    name, *arguments = command.split()
    with pytest.raises(SystemExit) as exit:
        importlib.import_module(f"experiments.{name}").main([*arguments, "--help"])
    assert exit.value.code == 0


def test_the_package_installs_every_module():
    listed = re.search(r"py-modules = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    assert set(re.findall(r'"(\w+)"', listed)) == {path.stem for path in ROOT.glob("*.py")} - {"test_gradients"}


def test_nothing_in_the_readme_was_left_to_be_filled_in():
    assert not re.search(r"@[A-Z]|TODO|XXX|[A-Z]NLL", README)


def test_the_readme_has_the_two_commands_that_ci_and_readers_run():
    for name in ("training", "test"):
        assert re.search(rf"<!-- {name} command -->\n```\npython3 -m venv .*?\n```", README, re.S)


def test_every_python_example_in_the_readme_runs():
    examples = re.findall(r"```python\n(.*?)```", README, re.S)
    assert examples
    for example in examples:
        exec(compile(ast.parse(example), "README.md", "exec"), {})


@pytest.mark.parametrize("arch", ["fc", "cnn", "glow"])
def test_the_table_of_results_holds_the_recorded_numbers(arch):
    for loss, row in json.loads((ROOT / "results" / f"mnist-{arch}.json").read_text()).items():
        assert (f"| {loss} | {row['start_val_nll']:.1f} | {row['val_nll']:.1f} | **{row['test_nll']:.1f}** | {row['test_bpd']:.3f} | "
                f"{row['minutes']:.1f} |") in README


def result(name):
    return json.loads((ROOT / "results" / name).read_text())


def test_the_table_of_the_toys_holds_the_recorded_numbers():
    for row in toys.rows(result("toys.json")["rows"]):
        assert row in README


def test_the_table_of_the_deeper_toys_holds_the_recorded_numbers():
    for row in depth.rows(result("depth.json")["runs"]):
        assert row in README


def test_the_variances_of_the_gradients_are_the_recorded_ones():
    for name, row in result("gradient-variance.json")["rows"].items():
        assert f"`{name}` {row['variance']:.0f}" in README
    for name, row in result("gradient-variance-cnn.json")["rows"].items():
        assert f"`{name}` {row['variance']:.1e}" in README


def test_the_table_of_the_rivals_holds_the_recorded_numbers():
    for row in rivals.rows(result("rivals.json")["runs"]):
        assert row in README


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_tables_of_the_race_hold_the_recorded_numbers(device):
    for row in race.rows(result(f"race-{device}.json")["runs"]):
        assert row in README


def test_the_table_of_the_ablation_holds_the_recorded_numbers():
    for row in ablation.rows(result("ablation.json")["runs"]):
        assert row in README


def test_the_table_of_balanced_training_holds_the_recorded_numbers():
    for row in balanced.rows(result("balanced.json")["runs"]):
        assert row in README


@pytest.mark.parametrize("loss", ["ml", "dsm"])
def test_the_table_of_imputation_holds_the_recorded_numbers(loss):
    for name, errors in result(f"imputation-fc-{loss}.json")["rmse"].items():
        line = next(line for line in README.splitlines() if line.startswith(f"| {name} | {loss} |"))
        assert all(f"{error:.3f}" in line for error in errors.values())


def test_the_results_of_the_linear_masks_are_the_recorded_ones():
    for name, nlls in result("linear-masks.json")["nll"].items():
        assert re.search(rf"{sum(nlls) / len(nlls):.1f}", README)


def test_the_table_of_the_determinant_holds_the_recorded_numbers():
    rows = result("determinant.json")["by_dimension"]
    for q in ("isotropic", "diagonal", "fitted"):
        cells = " | ".join(f"{row['rmse']:.4f}" for row in rows if row["q"] == q and row["D"] in (8, 32, 128, 512))
        assert f"| {q} | {cells} |" in README


def test_the_table_of_runtimes_holds_the_recorded_numbers():
    sizes = [row for size in result("runtime-cpu.json")["runs"].values() for row in size]
    for row in runtime.table(sizes):
        assert row in README
    for loss, exponent in (("ml", "2.94"), ("dsm", "2.00")):
        assert f"{runtime.slope([row for row in sizes if (row['arch'], row['loss']) == ('fc', loss)], 'operations'):.2f}" == exponent


def test_what_is_said_of_the_runs_on_a_gpu_is_recorded():
    gpu = result("gpu.json")
    for run in gpu["mnist"]:
        assert f"{run['test_nll']:.1f}" in README
    dsm = gpu["mnist"][0]
    assert f"{dsm['seconds']:.0f} seconds with evaluation, at {dsm['batches_per_second']:.0f} batches/s, and ends at {dsm['test_nll']:.1f}" in README
    for speed in (gpu["speed"], gpu["speed_cnn"]):
        assert ", ".join(f"{loss} {rate:.1f}" for loss, rate in speed["batches_per_second"].items()) in README


def test_what_is_said_of_the_runtime_on_a_gpu_is_recorded():
    rows = [row for size in result("runtime-cuda.json")["runs"].values() for row in size]
    ms = {loss: {row["D"]: row["ms"] for row in rows if row["loss"] == loss} for loss in ("ml", "dsm")}
    low, high = min(ms["ml"]), max(ms["ml"])
    assert f"`ml` grows from {ms['ml'][low]:.1f} to {ms['ml'][high]:.0f} ms" in README
    assert f"{ms['ml'][low] / ms['dsm'][low]:.1f} to {ms['ml'][high] / ms['dsm'][high]:.1f} times `dsm`'s" in README
    assert (low, high) == (256, 4096)
