"""The floor of a training step, in products of a (batch × D) with a (D × D) matrix, and how a step is timed."""

import pytest
import torch

from experiments import speed
from losses import OBJECTIVES


@pytest.mark.parametrize("loss, products", [("ml", 5), ("sml", 10), ("ssm", 22), ("dsm", 11), ("fdssm", 15)])
def test_a_step_does_as_many_products_as_the_results_say(loss, products):
    images = torch.randint(0, 256, (500, 1, 6, 6), dtype=torch.uint8)
    assert speed.count_products(loss, images, 20) == products


def test_the_time_of_a_step_is_the_median_over_blocks_of_ten(monkeypatch):
    calls, blocks = [], iter([7.0, 1.0, 3.0])
    monkeypatch.setattr(speed, "timed", lambda function, device: (function(), next(blocks))[1])
    assert speed.interleaved({"step": lambda: calls.append(1)}, 3, torch.device("cpu")) == {"step": 0.3}
    assert len(calls) == 1 + 3 * 10


def test_the_plain_step_of_the_toys_is_in_float64(monkeypatch):
    seen = []
    monkeypatch.setitem(OBJECTIVES, "dsm", lambda flow, x, **_: (seen.append(x.dtype), flow.energy(x).mean())[1])
    speed.plain_toy_step("dsm", 8, torch.device("cpu"))()
    assert seen == [torch.float64]


def test_the_table_of_the_toys_has_a_row_for_each_objective(capsys):
    speed.main(["--arch", "toy", "--batch-size", "8", "--repeats", "1", "--device", "cpu"])
    head, *rows = capsys.readouterr().out.splitlines()[1:]
    assert head.split() == ["objective", "batches/s", "step", "(ms)", "plain", "batches/s", "plain", "step", "(ms)"]
    assert [row.split()[0] for row in rows] == list(OBJECTIVES)
    assert all(float(figure) > 0 for row in rows for figure in row.split()[1:])


def test_the_table_of_images_has_the_floor_of_each_step(capsys, monkeypatch):
    images = torch.randint(0, 256, (500, 1, 6, 6), dtype=torch.uint8)
    monkeypatch.setattr(speed, "load_images", lambda directory: (images, None, None))
    speed.main(["--batch-size", "8", "--repeats", "1", "--device", "cpu"])
    _, product, head, *rows = capsys.readouterr().out.splitlines()
    assert product.startswith("one product of 8×36 with 36×36")
    assert head.split() == ["objective", "batches/s", "step", "(ms)", "products", "step", "/", "floor"]
    cells = {row.split()[0]: [float(cell) for cell in row.split()[1:]] for row in rows}
    assert {loss: row[2] for loss, row in cells.items()} == {"ml": 5, "sml": 10, "ssm": 22, "dsm": 11, "fdssm": 15}
    assert all(ratio > 1 for *_, ratio in cells.values())
