"""How a step is timed: the plain one and ours compute the same gradient; the floor is the products of ours."""

import contextlib

import pytest
import torch

from experiments import speed
from losses import OBJECTIVES

CPU = torch.device("cpu")


@pytest.fixture
def images():
    return torch.randint(0, 256, (500, 1, 8, 8), dtype=torch.uint8)


@pytest.mark.parametrize("loss, count", [("ml", 5), ("sml", 10), ("ssm", 22), ("dsm", 11), ("fdssm", 5)])  # 3B rows
def test_the_floor_repeats_the_products_of_a_step(images, loss, count):
    repeated = []

    class Counted(speed.Products):
        def __call__(self, *_):
            repeated.append(len(self.calls))
            super().__call__()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(speed, "Products", Counted)
        speed.floor(lambda kind, device: speed.step_of_images(kind, "fc", loss, images, 20, device), CPU,
                    contextlib.nullcontext)()
    assert repeated == [count]


def test_recorded_products_are_repeated_on_the_same_arguments():
    W, x = torch.randn(3, 3, requires_grad=True), torch.randn(5, 3)
    with speed.Products() as products:
        y = torch.nn.functional.linear(x, W).tanh() @ W
    seen = []
    products.calls = [(lambda *args, f=f, **named: seen.append(f(*args, **named)), args, named)
                      for f, args, named in products.calls]
    products()
    assert len(seen) == 2 and torch.equal(seen[-1], y.detach()) and not seen[-1].requires_grad


@pytest.mark.parametrize("arch", ["fc", "cnn", "glow", "toy"])
def test_the_plain_step_takes_the_gradient_of_the_step_here(monkeypatch, images, arch):
    """Adam's step hides the scale of a gradient, so its norm is compared, of the same random numbers."""
    monkeypatch.setattr(speed.train_mnist, "track_moments", lambda *args, **named: None)
    norms, total = [], speed.get_total_norm
    for module in (speed, speed.train_mnist, speed.train_toy):
        monkeypatch.setattr(module, "get_total_norm", lambda grads: norms.append(total(grads)) or norms[-1])
    for kind in ("plain", "here"):
        torch.manual_seed(0)
        step = (speed.step_of_toys(kind, "dsm", 16, CPU) if arch == "toy" else
                speed.step_of_images(kind, arch, "dsm", images, 16, CPU))
        step()  # which here draws noise for the last actnorm, too
        torch.manual_seed(1)
        step()
    torch.testing.assert_close(norms[1], norms[3], rtol=1e-3, atol=0)
    assert len(norms) == 4


def test_the_time_of_a_step_is_the_median_over_blocks_of_ten(monkeypatch):
    calls, blocks = [], iter([7.0, 1.0, 3.0])
    monkeypatch.setattr(speed, "timed", lambda function, device: (function(), next(blocks))[1])
    assert speed.interleaved({"step": lambda: calls.append(1)}, 3, CPU) == {"step": 0.3}
    assert len(calls) == 1 + 3 * 10


def test_the_parts_of_a_step_add_up_to_its_time_and_have_their_names():
    A, x = torch.randn(300, 300), torch.randn(300, 300)

    def step():
        x @ A
        torch.linalg.slogdet(A)
        x.clone()
        x.sin()

    ms = speed.profiled(step)
    whole = min(speed.timed(step, torch.device("cpu")) for _ in range(5))
    assert all(t > 0 for t in ms.values()) and 0.3 * whole < sum(ms.values()) / 1000 < 10 * whole
    assert ms["factorisations"] > ms["copies"] and speed.profiled(lambda: x @ A)["factorisations"] == 0


def test_the_table_has_a_row_for_each_objective_and_ratios_of_its_times(capsys, monkeypatch, images):
    monkeypatch.setattr(speed, "load_images", lambda directory: (images, None, None))
    speed.main(["--batch-size", "8", "--repeats", "1", "--kinds", "plain", "here", "--device", "cpu"])
    _, head, *rows = capsys.readouterr().out.splitlines()
    assert head == "| objective | plain | here | plain / here | here / floor |"
    cells = {row.split(" | ")[0].strip("| "): [float(c) for c in row.strip(" |").split(" | ")[1:]] for row in rows}
    assert list(cells) == list(OBJECTIVES)
    for plain, here, ratio, over_floor in cells.values():
        assert ratio == pytest.approx(here / plain, rel=0.05) and over_floor > 1
