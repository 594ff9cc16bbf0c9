"""The floor of a training step, in products of a (batch × D) with a (D × D) matrix."""

import pytest
import torch

from experiments import speed
from experiments.speed import count


@pytest.mark.parametrize("loss, products", [("ml", 5), ("sml", 10), ("ssm", 22), ("dsm", 11), ("fdssm", 15)])
def test_a_step_does_as_many_products_as_the_readme_says(loss, products):
    images, B = torch.randint(0, 256, (500, 1, 6, 6), dtype=torch.uint8), 20
    assert count(loss, images, B) == products


def test_the_table_of_the_toys_has_a_row_for_each_objective(capsys):
    speed.main(["--arch", "toy", "--batch-size", "8", "--repeats", "1", "--device", "cpu"])
    head, *rows = capsys.readouterr().out.splitlines()[1:]
    assert head.split() == ["objective", "batches/s", "step", "(ms)", "plain", "batches/s", "plain", "step", "(ms)"]
    assert [row.split()[0] for row in rows] == speed.LOSSES and all(float(figure) > 0 for row in rows for figure in row.split()[1:])
