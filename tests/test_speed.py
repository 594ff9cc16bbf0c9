"""The floor of a training step, in products of a (batch × D) with a (D × D) matrix."""

import pytest
import torch

from experiments.speed import count


@pytest.mark.parametrize("loss, products", [("ml", 5), ("sml", 10), ("ssm", 22), ("dsm", 11), ("fdssm", 15)])
def test_a_step_does_as_many_products_as_the_readme_says(loss, products):
    images, B = torch.randint(0, 256, (500, 1, 6, 6), dtype=torch.uint8), 20
    assert count(loss, images, B) == products
