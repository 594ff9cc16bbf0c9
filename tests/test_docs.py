"""README and docs/ are true: what they name exists, commands parse, excerpts and numbers are the recorded ones."""

import importlib
import json
import re
from pathlib import Path

import pytest

import train_ebm
import train_mnist
import train_toy
from experiments import ablation, balanced, mass, rivals, runtime, tables, unbalanced
from support.settings import parse

ROOT = Path(__file__).parent.parent
README, RESULTS, TOUR = ((ROOT / path).read_text() for path in ("README.md", "docs/results.md", "docs/tour.md"))
PAGES = {"README.md": README, "docs/results.md": RESULTS, "docs/tour.md": TOUR}
FENCE = r"```(\w*)\n(.*?)```"


def result(name):
    return json.loads((ROOT / "results" / name).read_text())


# ---------------------------------------------------------------------------------------------------------
# What the pages name
# ---------------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len(README.split()) <= 1500 and len(README.splitlines()) <= 200


@pytest.mark.parametrize("file, name", sorted({
    found for page in PAGES.values() for found in re.findall(r"`([\w/]+)\.py: ([\w.]+)`", page)}))
def test_every_function_that_a_page_names_exists(file, name):
    thing = importlib.import_module(file.replace("/", "."))
    for part in name.split("."):
        thing = getattr(thing, part)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page):
    links = re.findall(r"(?<=\]\()(?!http)[^)#]+", PAGES[page])
    assert all(((ROOT / page).parent / link).exists() for link in links), links
    assert all((ROOT / path).is_file() for path in re.findall(r"`([\w/]+\.py)`", PAGES[page]))


def test_every_figure_is_shown():
    shown = {Path(link).name for page in PAGES.values() for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page)}
    assert {path.name for path in (ROOT / "results").glob("*.png")} <= shown


def commands(script):
    """The arguments of every command that runs the script, in a block of code or in a sentence."""
    found = set()
    for page in PAGES.values():
        lines = [line for _, block in re.findall(FENCE, page, re.S) for line in block.splitlines()]
        lines += re.findall(r"`([^`]+)`", re.sub(FENCE, "", page, flags=re.S))
        found |= {line.split(script, 1)[1].strip() for line in lines if re.search(rf"python {re.escape(script)}", line)}
    assert found
    return sorted(found)


@pytest.mark.parametrize("script, arguments", [
    (script, arguments) for script in (train_mnist, train_toy, train_ebm)
    for arguments in commands(f"{script.__name__}.py")])
def test_every_training_command_parses(script, arguments):
    parse(script.Settings, arguments.replace("LOSS", "dsm").replace("ARCH", "fc").replace("EPOCHS", "3").split())


@pytest.mark.parametrize("command", commands("-m experiments."))
def test_every_experiment_that_a_page_runs_exists_and_takes_its_arguments(command, capsys):
    name, *arguments = command.split()
    with pytest.raises(SystemExit) as exit:
        importlib.import_module(f"experiments.{name}").main([*arguments, "--help"])
    assert exit.value.code == 0


def test_nothing_was_left_to_be_filled_in():
    for page in PAGES.values():
        assert not re.search(r"@[A-Z]|TODO|XXX|[A-Z]NLL", page)


def test_the_readme_has_the_two_commands_that_ci_and_readers_run():
    for name in ("training", "test"):
        assert re.search(rf"<!-- {name} command -->\n```\npython3 -m venv .*?\n```", README, re.S)


EXCERPTS = re.findall(r"`([\w/]+\.py): ([\w.]+)`[^`\n]*\n\n?```python\n(.*?)```", TOUR, re.S)


def test_every_block_of_code_in_the_tour_is_an_excerpt():
    assert len(EXCERPTS) == TOUR.count("```python") > 15


@pytest.mark.parametrize("file, name, excerpt", EXCERPTS, ids=[f"{file}:{name}" for file, name, _ in EXCERPTS])
def test_every_excerpt_of_the_tour_stands_in_the_source_word_for_word(file, name, excerpt):
    source = (ROOT / file).read_text().splitlines()
    lines, indents = [line.strip() for line in source], [line.strip() for line in excerpt.strip().splitlines()]
    assert any(lines[i:i + len(indents)] == indents for i in range(len(lines)))


def test_every_proof_that_the_tour_names_exists():
    named = set(re.findall(r"`(test_\w+)`", TOUR))
    tests = "".join(path.read_text() for path in [ROOT / "test_gradients.py", *(ROOT / "tests").glob("*.py")])
    assert len(named) > 10 and all(f"def {name}(" in tests for name in named)


def test_uv_and_pip_install_the_same_versions_and_no_module_of_ours():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = project["project"]["dependencies"] + project["dependency-groups"]["dev"]
    required = (ROOT / "requirements.txt").read_text().splitlines()
    assert {line.replace("'", '"') for line in listed} == set(required)
    assert project["tool"]["setuptools"]["py-modules"] == [] and project["tool"]["uv"]["package"] is False


# ---------------------------------------------------------------------------------------------------------
# The numbers
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch, name", [("fc", "FC"), ("cnn", "CNN"), ("glow", "small Glow")])
def test_the_tables_of_mnist_hold_the_recorded_numbers(arch, name):
    rows = result(f"mnist-{arch}.json")
    assert all(row in RESULTS for row in tables.mnist_rows(rows))
    nlls = [f"{tables.alone(rows[loss]):.1f}" for loss in ("ml", "sml", "ssm", "dsm", "fdssm")]
    assert f"| {name}, here | " + " | ".join(nlls) in README


@pytest.mark.parametrize("rows", [
    lambda: tables.toy_rows(result("toys.json")["rows"]), lambda: rivals.rows(result("rivals.json")["runs"]),
    lambda: rivals.race_rows(result("race-cpu.json")["runs"]),
    lambda: rivals.race_rows(result("race-cuda.json")["runs"]),
    lambda: ablation.rows(result("ablation-fc.json")["runs"]),
    lambda: ablation.rows(result("ablation-cnn.json")["runs"]),
    lambda: tables.paper_rows(result("paper.json")["runs"],
                              {arch: result(f"mnist-{arch}.json") for arch in ("fc", "cnn", "glow")}),
    lambda: mass.rows(result("mass.json")["runs"]),
    lambda: balanced.rows(result("balanced.json")["runs"]), lambda: unbalanced.rows(result("unbalanced.json")["runs"]),
    lambda: runtime.table([row for size in result("runtime-cpu.json")["runs"].values() for row in size]),
], ids=["toys", "rivals", "race on a CPU", "race on a GPU", "ablation of FC", "of the CNN", "paper", "mass", "balanced",
        "unbalanced", "runtime"])
def test_a_table_holds_the_recorded_numbers(rows):
    for row in rows():
        assert row in RESULTS


@pytest.mark.parametrize("loss", ["ml", "dsm"])
def test_the_table_of_imputation_holds_the_recorded_numbers(loss):
    for name, errors in result(f"imputation-fc-{loss}.json")["rmse"].items():
        line = next(line for line in RESULTS.splitlines() if line.startswith(f"| {name} | {loss} |"))
        assert all(f"{error:.3f}" in line for error in errors.values())


def test_the_results_of_the_linear_masks_are_the_recorded_ones():
    for nlls in result("linear-masks.json")["nll"].values():
        assert f"{sum(nlls) / len(nlls):.1f}" in RESULTS


def test_the_table_of_the_determinant_holds_the_recorded_numbers():
    rows = result("determinant.json")["by_dimension"]
    for q in ("isotropic", "diagonal", "fitted"):
        cells = " | ".join(f"{row['rmse']:.4f}" for row in rows if row["q"] == q and row["D"] in (8, 32, 128, 512))
        assert f"| {q} | {cells} |" in RESULTS


def test_the_exponents_of_the_operations_are_the_recorded_ones():
    sizes = [row for size in result("runtime-cpu.json")["runs"].values() for row in size]
    for loss, exponent in (("ml", "2.94"), ("dsm", "2.00")):
        found = runtime.slope([row for row in sizes if (row["arch"], row["loss"]) == ("fc", loss)], "operations")
        assert f"{found:.2f}" == exponent and exponent in RESULTS
