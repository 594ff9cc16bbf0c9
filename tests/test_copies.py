"""The concept files work outside the house: what the README says of copying them is done in an empty folder.

The example with zuko is skipped where it is not installed: pip install -r tests/requirements-zuko.txt
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
NEEDS = {"losses": [], "sampling": [], "layers": [], "ebflow": ["layers"]}
CHECKS = {"an energy network": "assert energy[0].weight.grad.norm() > 0",
          "zuko": "torch.testing.assert_close(EBFlow([Zuko(flow)], (2,)).log_prob(x), flow().log_prob(x))",
          "a layer": "assert (Reverse()(torch.eye(3)) == torch.eye(3).flip(1)).all()"}


def run(code, folder):
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, timeout=300)


@pytest.mark.parametrize("example, check", [*zip(EXAMPLES, CHECKS.values(), strict=True)], ids=CHECKS)
def test_an_example_of_the_readme_runs_in_a_folder_that_holds_only_the_files_it_needs(example, check, tmp_path):
    if "zuko" in example and importlib.util.find_spec("zuko") is None:
        pytest.skip("needs zuko")
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
