"""What a step costs: operations are counted by the formulas, their exponents are the paper's, the experiment runs."""

import json
import math

import pytest
import torch
from matplotlib.figure import Figure

from experiments import runtime
from experiments.runtime import FlopCounter


def operations(function):
    with FlopCounter() as counter:
        function()
    return counter.flops


def test_determinants_and_solves_are_counted_by_their_textbook_formulas():
    n, k = 30, 7
    A, B = torch.randn(n, n).requires_grad_(), torch.randn(n, k)
    assert operations(lambda: torch.linalg.slogdet(A)) == 2 * n**3 // 3
    assert operations(lambda: torch.linalg.slogdet(A).logabsdet.backward()) == 2 * n**3 // 3 + 2 * n**3  # the inverse
    with torch.no_grad():
        assert operations(lambda: torch.linalg.solve(A, B)) == 2 * n**3 // 3 + 2 * n**2 * k
        assert operations(lambda: torch.linalg.solve(A.T, B.T, left=False)) == 2 * n**3 // 3 + 2 * n**2 * k
        assert operations(lambda: torch.linalg.solve_triangular(A, B, upper=True)) == n**2 * k
        assert operations(lambda: A @ B) == 2 * n**2 * k


@pytest.mark.parametrize("loss, products, cubes", [
    ("ml", 5, 8 / 3), ("sml", 10, 2 / 3), ("ssm", 22, 0), ("dsm", 11, 0), ("fdssm", 15, 0)])
def test_score_matching_counts_products_alone_and_maximum_likelihood_the_cube(loss, products, cubes):
    """Each of the two layers has a factorisation (⅔D³). ml needs the inverse (2D³), too; sml solves for samples."""
    B, D = 8, 64
    expected = 2 * B * D**2 * products + 2 * cubes * D**3 + (4 * B * D**2 if loss == "sml" else 0)
    assert runtime.count_operations("fc", (1, 8, 8), loss, B) == pytest.approx(expected, rel=1e-4)


def test_the_exponents_of_counted_operations_are_the_paper_s():
    """From 16×16 to 48×48×3 at the default batch: D² for score matching, close to D³ for maximum likelihood."""
    shapes = [(1, side, side) for side in (16, 24, 32, 48, 64)] + [(3, side, side) for side in (16, 24, 32, 48)]
    for loss, low, high in (("ml", 2.9, 3), ("ssm", 1.99, 2.05), ("dsm", 1.99, 2.05), ("fdssm", 1.99, 2.05)):
        rows = [{"D": math.prod(shape), "operations": runtime.count_operations("fc", shape, loss, 32)}
                for shape in shapes]
        assert low <= runtime.slope(rows, "operations") <= high


def rows_of(path):
    return [row for size in json.loads(path.read_text())["runs"].values() for row in size]


def test_the_experiment_runs_goes_on_and_skips_what_takes_too_long(tmp_path, capsys, monkeypatch):
    shared = ["--channels", "1", "--batch-size", "4", "--seconds", "0.1", "--results", str(tmp_path), "--device", "cpu"]
    fc, cnn = ["--archs", "fc", "--sides", "4", "8", "12", *shared], ["--archs", "cnn", "--sides", "4", *shared]
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "picture", lambda rows: Figure())
        runtime.main(fc)
    assert "fc ms ∝ D^x, x: ml " in capsys.readouterr().out
    runtime.main(cnn)
    path = tmp_path / "runtime-cpu.json"
    rows = rows_of(path)
    assert len(rows) == (3 + 1) * 5 and all(row["ms"] > 0 and row["operations"] > 0 for row in rows)
    assert (tmp_path / "runtime-cpu.png").stat().st_size > 10_000
    monkeypatch.setattr(runtime, "picture", lambda rows: Figure())
    before = path.read_text()
    runtime.main(fc)
    assert path.read_text() == before and runtime.table(rows)[0] in capsys.readouterr().out
    for flags, message in ((["--batch-size", "5"], "batch_size is 4 there and 5 here"),
                           (["--longest", "1e-9"], "longest is 10.0 there and 1e-09 here")):
        with pytest.raises(SystemExit) as exit:
            runtime.main([*fc, *flags])
        assert message in exit.value.code
    path.unlink()
    runtime.main(["--archs", "fc", "--sides", "16", *shared, "--longest", "1e-9"])
    assert all(row["ms"] is None and row["operations"] > 0 for row in rows_of(path)) and len(rows_of(path)) == 5
    path.write_text("{")
    with pytest.raises(SystemExit) as exit:
        runtime.main(fc)
    assert "is damaged" in exit.value.code
