"""README and docs/ are true: what they name exists, commands parse, excerpts and numbers are the recorded ones."""

import importlib
import json
import re
from pathlib import Path

import pytest

import train_ebm
import train_mnist
import train_toy
from ebflow import cnn_flow
from experiments import (ablation, balanced, bumps, colour, determinant, epochs, mass, outliers, points, rivals,
                         runtime, starts, tables, unbalanced)
from losses import OBJECTIVES
from support.settings import parse

ROOT = Path(__file__).parent.parent
PAGES = {path: (ROOT / path).read_text()
         for path in ("README.md", "docs/results.md", "docs/tour.md", "docs/balanced.md", "docs/use.md")}
README, RESULTS, TOUR, BALANCED, USE = PAGES.values()
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


@pytest.mark.parametrize("page", PAGES)
def test_every_section_that_a_page_links_to_exists(page):
    for link, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", PAGES[page]):
        target = ((ROOT / page).parent / link).resolve().read_text() if link else PAGES[page]
        headings = re.findall(r"^#+ (.*)", re.sub(FENCE, "", target, flags=re.S), re.M)
        assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


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


EXCERPTS = re.findall(r"`([\w/]+\.py): ([\w.]+)`[^`\n]*\n\n?```python\n(.*?)```", TOUR + BALANCED, re.S)


def test_every_block_of_code_in_the_tour_is_an_excerpt():
    assert len(EXCERPTS) == (TOUR + BALANCED).count("```python") > 15


@pytest.mark.parametrize("file, name, excerpt", EXCERPTS, ids=[f"{file}:{name}" for file, name, _ in EXCERPTS])
def test_every_excerpt_of_the_tour_stands_in_the_source_word_for_word(file, name, excerpt):
    source = (ROOT / file).read_text().splitlines()
    lines, indents = [line.strip() for line in source], [line.strip() for line in excerpt.strip().splitlines()]
    assert any(lines[i:i + len(indents)] == indents for i in range(len(lines)))


def test_every_test_that_a_page_names_exists():
    tests = "".join(path.read_text() for path in [ROOT / "test_gradients.py", *(ROOT / "tests").glob("*.py")])
    for page in (TOUR, BALANCED):
        named = set(re.findall(r"`(test_\w+)`", page))
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


MNIST = {arch: result(f"mnist-{arch}.json") for arch in ("fc", "cnn", "glow")}
COLOUR = result("colour.json")["runs"]
BY_DSM = [run["test_nll"] for run in (COLOUR["cnn dsm"], *COLOUR["cnn dsm"]["others"])]


@pytest.mark.parametrize("arch", MNIST)
def test_the_tables_of_mnist_hold_the_recorded_numbers(arch):
    assert all(row in RESULTS for row in tables.mnist_rows(MNIST[arch]))


def readme_rows(starts):
    """The table of README.md: test NLL of a Gaussian, of the paper, before and after training.   -> lines"""
    def row(name, cell):
        return f"| {name} | " + " | ".join(map(cell, OBJECTIVES)) + " |"

    yield row("one Gaussian", lambda _: f"{starts['one Gaussian']['test_nll']:.1f}")
    for arch, name in (("fc", "FC"), ("cnn", "CNN"), ("glow", "small Glow")):
        runs = MNIST[arch]
        if arch in tables.PUBLISHED:
            yield row(f"{name}, paper", lambda loss: f"{tables.PUBLISHED[arch][loss]}")
        yield row(f"{name}, start", lambda loss: f"{runs[loss]['start_val_nll']:.1f}")
        yield row(f"{name}, here", lambda loss: f"{tables.alone(runs[loss]):.1f}")
        yield row(f"{name}, then `sml`",
                  lambda loss: f"{runs[loss]['test_nll']:.1f}" if runs[loss].get("before_sml") else "")


def test_the_readme_holds_the_recorded_numbers():
    runs, mass_runs = result("starts.json")["runs"], result("mass.json")["runs"]
    gaussian, (start, dsm, ml) = runs["one Gaussian"]["test_nll"], (
        mass_runs[f"{cell}, seed 0"]["test_nll"] for cell in ("the start", "dsm alone", "ml"))
    table = [*readme_rows(runs)]
    assert "\n".join(table) in README
    text = " ".join(README.split())
    for claim in (f"ends at a test NLL of {MNIST['fc']['dsm']['test_nll']:.1f} nats",
                  f"`dsm` takes {start - dsm:.0f} nats", f"it reaches {ml:.1f} in the time",
                  f"Without it `dsm` on FC is at {runs['ours']['unrefitted']:,.1f}",
                  f"take the CNN to {COLOUR['cnn ml']['test_nll']:,.0f}",
                  "`dsm` is at {:,.0f} to {:,.0f} within four".format(min(BY_DSM), max(BY_DSM)),
                  f"One Gaussian has {COLOUR['one Gaussian']['test_nll']:,.0f}"):
        assert claim in text
    assert abs(gaussian - start - 40) < 5 and "some 40 nats below it" in text


def steps(device="cpu"):
    """What a step costs: the rows of all sizes."""
    return [row for size in result(f"runtime-{device}.json")["runs"].values() for row in size]


def faster(arch, device="cpu", D=3072):
    """How many times as fast as a step of ml one of dsm is, by default at the size of CIFAR-10."""
    ms = {row["loss"]: row["ms"] for row in steps(device) if (row["arch"], row["D"]) == (arch, D)}
    return ms["ml"] / ms["dsm"]


TABLES = {
    "starts": lambda: starts.rows(result("starts.json")["runs"]),
    "mass": lambda: mass.rows(result("mass.json")["runs"]),
    "bumps": lambda: bumps.rows(result("bumps.json")["masses"]),
    "paper": lambda: tables.paper_rows(result("paper.json")["runs"],
                                       {arch: result(f"mnist-{arch}.json") for arch in ("fc", "cnn", "glow")}),
    "ablation": lambda: ablation.rows(result("ablation-fc.json")["runs"]),
    "toys": lambda: tables.toy_rows(result("toys.json")["rows"]),
    "balanced": lambda: balanced.rows(result("balanced.json")["runs"]),
    "unbalanced": lambda: unbalanced.rows(result("unbalanced.json")["runs"]),
    "runtime": lambda: runtime.table([row for row in steps() if row["D"] in (256, 3072)]),
    "rivals": lambda: rivals.rows(result("rivals.json")["runs"]),
    "colour": lambda: colour.rows(COLOUR),
    "epochs": lambda: epochs.rows(result("epochs.json")["runs"]),
    "outliers": lambda: outliers.rows(result("outliers.json")["runs"]),
    "determinant": lambda: determinant.rows(result("determinant.json")["by_dimension"]),
    "points": lambda: points.rows(result("points.json")["runs"]),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_holds_the_recorded_numbers(name):
    rows = [*TABLES[name]()]
    assert rows and all(row in (RESULTS + USE + BALANCED + TOUR).splitlines() for row in rows)


def test_the_page_of_balanced_training_says_how_many_digits_are_ones():
    assert f"so {100 * unbalanced.COUNTS[1] / sum(unbalanced.COUNTS):.1f} % are ones" in " ".join(BALANCED.split())


def test_the_page_of_use_says_what_the_shipped_weights_are_worth():
    cnn, swirl = result("weights.json")["runs"].values()
    text = " ".join(USE.split())
    assert f"test NLL {cnn['test_nll']:,.1f} nats" in text and f"KL {swirl['test_kl']:.3f} nats" in text


@pytest.mark.parametrize("run, words", [("fc-dsm", "digits, FC"), ("colour-cnn-dsm", "colour, CNN")])
def test_the_table_of_imputation_holds_the_recorded_numbers(run, words):
    for name, errors in result(f"imputation-{run}.json")["rmse"].items():
        assert f"| {name} | {words} | " + " | ".join(f"{error:.3f}" for error in errors.values()) + " |" in RESULTS


def test_the_results_of_the_linear_masks_are_the_recorded_ones():
    for runs in result("linear-masks.json")["curves"].values():
        assert f" | {sum(run[-1] for run in runs) / len(runs):.1f} |" in RESULTS


def test_the_tour_says_of_its_pictures_what_was_recorded():
    found = result("explain.json")
    text = " ".join(TOUR.split())
    start, trained = (found["dsm"][key]["fisher"] for key in ("start", "trained"))
    assert f"falls from {start:.2f} to {trained:.2f}" in text
    assert f"is {found['weights']['kl']:.2f} nats" in text and found["weights"]["fisher"] < 0.001
    ratios = [norms["largest"] / norms["smallest"] for norms in found["map"].values()]
    assert f"{ratios[0]:.1f} times the smallest" in text and f"{round(ratios[1], -3):,.0f} times the smallest" in text


def published(cell):
    """A run with the published settings, and how many nats it ends above the paper.   -> dict, float"""
    run, (arch, loss) = result("paper.json")["runs"][cell], cell.split()
    return run, run["test_nll"] - tables.PUBLISHED[arch][loss]


def exponents(arch):
    """Of D, in the operations of a step of dsm and of ml, on images of one channel or flat ones."""
    return [runtime.slope([row for row in steps() if (row["arch"], row["loss"]) == (arch, loss) and (
        arch == "fc" or row["channels"] == 1)], "operations") for loss in ("dsm", "ml")]


PROSE = " ".join(line for line in RESULTS.splitlines() if not line.startswith("|"))
def lead():
    """The lowest look of dsm, its minute, ml at that minute, and at its end."""
    ml, dsm = (COLOUR[f"cnn {loss}"]["curve"] for loss in ("ml", "dsm"))
    i = min(range(len(dsm)), key=lambda i: dsm[i][1])
    return dsm[i][1], dsm[i][0], ml[i][1], ml[-1][1]


CLAIMS = {  # words of docs/results.md -> the numbers in them
    "the smaller bump, which should be {:g}": lambda: [bumps.TRUTH.weights[1]],
    "the images have {:.2f}": lambda: [result("mass.json")["runs"]["ml, seed 0"]["images_median"]],
    "squeezes have {:.3f} million": lambda: [sum(p.numel() for p in cnn_flow((1, 28, 28)).parameters()) / 1e6],
    "The validation NLL of `dsm` after 240 epochs is {:.1f}": lambda: [published("fc dsm")[0]["val_nll"]["240"]],
    "after {} to {} of its 10,000 epochs": lambda: [published(cell)[0]["epochs"] for cell in ("fc sml", "fc dsm")],
    "lowest at epoch {}, with {:.1f}, and {:.1f} after epoch 61": lambda: (lambda run: [
        run["best_epoch"], run["val_nll"][str(run["best_epoch"])], run["val_nll"]["61"]])(
            published("fc sml")[0]["with TF32"]),
    "in float32 it falls to the end, to {:.1f}": lambda: [published("fc sml")[0]["val_nll"]["61"]],
    "It is {:.0f} nats above, and fell": lambda: [published("fc fdssm")[1]],
    "from {:.1f} at epoch 510 to {:.1f} at epoch 544 of {}": lambda: (lambda run: [
        run["val_nll"]["510"], run["val_nll"]["544"], run["epochs"]])(published("fc fdssm")[0]),
    "`ssm` is {:.0f} nats above the paper, `dsm` {:.0f}": lambda: [
        published(f"cnn {loss}")[1] for loss in ("ssm", "dsm")],
    "the entropy, {:.1f} nats": lambda: [result("linear-masks.json")["entropy"]],
    "Here W = I + {:g} G/√D": lambda: [result("determinant.json")["by_dimension"][0]["c"]],
    "`dsm` grow as D to the {:.2f}, those of `ml` as D to the {:.2f}": lambda: exponents("fc"),
    "the exponents are {:.2f} and {:.2f}": lambda: exponents("cnn"),
    "`dsm` is {:.0f} times as fast as one of `ml` on FC, {:.0f} times with": lambda: [faster("fc"), faster("cnn")],
    "`dsm` is at {:,.0f} after {:.0f} minutes, when `ml` is at {:,.0f}; `ml` reaches {:,.0f} at its end": lead,
    "the flow's errors are between {:.0f} % smaller and {:.0f} % larger": lambda: (
        lambda ratios: [100 - 100 * min(ratios), 100 * max(ratios) - 100])([
            errors[f"flow, {guess}"] / errors[f"Gaussian, {guess}"] for guess in ("one draw", "mean of draws")
            for run in ("fc-dsm", "colour-cnn-dsm") for errors in result(f"imputation-{run}.json")["rmse"].values()]),
    "ends between {:.0f} nats below `ml` and {:.0f} above": lambda: [
        COLOUR["cnn ml"]["test_nll"] - min(BY_DSM), max(BY_DSM) - COLOUR["cnn ml"]["test_nll"]],
    "`dsm` ends {:.0f} nats below `ml`, whose step takes {:.1f} seconds": lambda: [
        COLOUR["fc ml"]["test_nll"] - COLOUR["fc dsm"]["test_nll"], 600 / COLOUR["fc ml"]["steps"]],
    "from {:,.0f} to {:,.0f}, while the validation NLL goes from {:,.0f} to {:,.0f}": lambda: [
        result("colour-turn.json")["metrics"][epoch][key] for key in ("loss", "val_nll") for epoch in (1, -1)],
    "`ml` of the CNN has seen {:,} images": lambda: [100 * COLOUR["cnn ml"]["steps"]],
    "with ten images takes {:.1f} seconds and {:.1f} GB": lambda: [
        result("epochs.json")["runs"]["3×64×64 fc dsm"][key] for key in ("seconds", "GB")],
    "A step of `ml` would take {:.0f} seconds": lambda: [
        64 * result("epochs.json")["runs"]["CIFAR-10 fc ml"]["seconds"]],
    "On an H100 it is {:.0f} times as fast on FC": lambda: [faster("fc", "cuda")],
}


@pytest.mark.parametrize("words", CLAIMS)
def test_a_sentence_holds_the_recorded_numbers(words):
    assert words.format(*CLAIMS[words]()) in PROSE + " ".join(TOUR.split())


def test_every_decimal_number_of_the_prose_stands_in_a_table_or_in_such_a_sentence():
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)", "", PROSE)  # without code and links
    known = [line for line in RESULTS.splitlines() if line.startswith("|")]
    known += [words.format(*numbers()) for words, numbers in CLAIMS.items()]
    assert set(re.findall(r"\d+\.\d+", prose)) <= set(re.findall(r"\d+\.\d+", " ".join(known)))


def test_reproduced_is_said_of_what_ends_within_two_nats_of_the_paper():
    one, two = ({cell for cell in result("paper.json")["runs"] if abs(published(cell)[1]) < nats} for nats in (1, 2))
    assert one == {"fc ml", "fc ssm", "fc dsm"} and two == one | {"fc sml"}
    assert PROSE.count("`ml`, `ssm` and `dsm` are within one nat of the paper, `sml` within two") == 1
    assert [line for line in RESULTS.splitlines() if line.endswith("| reproduced |")] == [
        line for line in RESULTS.splitlines() if "FC, `ml`, `sml`, `ssm`, `dsm` |" in line]


def test_the_table_of_settings_has_all_in_which_the_default_run_and_the_published_one_differ():
    runs = [vars(parse(train_mnist.Settings, flags)) for flags in ([], ["--paper"])]
    shown = {flag: values for flag, *values in re.findall(r"^\|.*\| `(\w+)` \| (.*) \| (.*) \|$", RESULTS, re.M)}
    for flag, values in shown.items():
        assert values == [f"{run[flag]:g}" if isinstance(run[flag], float) else
                          f"{run[flag]:,}" if isinstance(run[flag], int) else str(run[flag]) for run in runs]
    assert {name for name in runs[0] if runs[0][name] != runs[1][name]} <= {"paper", *shown}


def test_the_page_of_results_is_short():
    assert len(RESULTS.split()) <= 5000
