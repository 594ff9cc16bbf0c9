"""What the pages show of using and copying works: copies in a folder that holds only the files that they need.

Examples with zuko and normflows are skipped where these are not installed: pip install -r tests/requirements-other.txt
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
(USE, *COPIES), (OUTLIERS, *MORE) = (re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
                                     for page in ("README.md", "docs/use.md"))
HERE = f"import sys, torch; sys.path.insert(0, {str(ROOT)!r}); torch.manual_seed(0)\n"
NEEDS = {"losses": [], "sampling": [], "layers": [], "ebflow": ["layers"]}
CHECKS = {"an energy with a condition": "assert net[0].weight.grad.norm() > 0",
          "normflows": "flow = Conv(3, 5)\nflow.weight.data += 0.1 * torch.randn_like(flow.weight)\n"
                       "u, log_det = flow.inverse(x)\nback, minus = flow.forward(u)\n"
                       "torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)\n"
                       "J = torch.func.jacrev(lambda x: flow.inverse(x)[0])(x[:1]).view(192, 192)\n"
                       "torch.testing.assert_close(log_det.float(), torch.linalg.slogdet(J)[1].expand(5), rtol=1e-3, "
                       "atol=1e-3)\ntorch.testing.assert_close(minus, -log_det)",
          "a condition in fdssm": "assert net[0].weight.grad.norm() > 0 and c.shape == (1536, 1)",
          "zuko": "torch.testing.assert_close(EBFlow([Zuko(flow)], (2,)).log_prob(x), flow().log_prob(x))",
          "a layer": "H = Householder(3)(torch.eye(3))\ntorch.testing.assert_close(H @ H, torch.eye(3))\n"
                     "assert abs(torch.linalg.det(H) + 1) < 1e-5"}


def run(code, folder):
    return subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, timeout=300, text=True,
                          capture_output=True).stdout


def test_what_was_trained_is_used_as_the_readme_says_on_the_weights_that_are_shipped(tmp_path):
    check = """
assert model.inverse(u).eq(images).float().mean() > 0.999 and score.shape == images.shape
draws = np.load("draws.npy")
assert draws.dtype == np.uint8 and draws.shape == (16, 28, 28, 1) and 20 < draws.mean() < 50
print(log_p.mean().item(), E.mean().item() + model.flow.log_z().item(), bits.mean().item() * 784 * np.log(2))"""
    os.symlink(ROOT / "results", tmp_path / "results")
    printed = run(HERE + USE + check, tmp_path)
    log_p, *nlls = map(float, printed.split())
    for value in (-log_p, *nlls):  # each with noise of its own
        assert 900 < value < 1100 and value == pytest.approx(nlls[-1], abs=25)


def test_the_example_of_outliers_tells_turned_images_from_others(tmp_path):
    os.symlink(ROOT / "results", tmp_path / "results")
    areas = [*map(float, run(HERE + OUTLIERS, tmp_path).split())]
    assert len(areas) == 2 and 0.5 < min(areas) <= max(areas) < 1 and len(OUTLIERS.splitlines()) <= 15


@pytest.mark.parametrize("example, check", [*zip(COPIES + MORE, CHECKS.values(), strict=True)], ids=CHECKS)
def test_an_example_of_the_pages_runs_in_a_folder_that_holds_only_the_files_it_needs(example, check, tmp_path):
    for name in ("zuko", "normflows"):
        if name in example and importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")
    for name in re.findall(r"^from (\w+) import", example, re.M):
        for file in (name, *NEEDS[name]):
            shutil.copy(ROOT / f"{file}.py", tmp_path)
    here = f"import sys; assert all(sys.modules[n].__file__.startswith({str(tmp_path)!r}) for n in {[*NEEDS]} " \
           "if n in sys.modules)"
    run("\n".join([example, check, here]), tmp_path)


def test_inside_a_package_the_import_of_layers_alone_changes(tmp_path):
    (tmp_path / "package").mkdir()
    changed = []
    for name in NEEDS:
        text = (ROOT / f"{name}.py").read_text()
        changed += [name] * text.count("from layers import")
        (tmp_path / "package" / f"{name}.py").write_text(text.replace("from layers import", "from .layers import"))
    assert changed == ["ebflow"]
    run("from package import ebflow, layers, losses, sampling; import torch\n"
        "losses.dsm(ebflow.fc_flow(3).energy, torch.randn(5, 3), 0.3).backward()", tmp_path)


@pytest.mark.parametrize("name", [*NEEDS, "data", "densities"])
def test_the_first_lines_of_a_file_to_copy_name_its_source_and_its_licence(name):
    header = (ROOT / f"{name}.py").read_text().split('"""')[0]
    assert all(fact in header for fact in ("unofficial", "arXiv 2305.15267", "MIT licence", "contributors"))
