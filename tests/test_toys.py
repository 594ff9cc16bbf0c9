"""The toys' densities are exact: they integrate to one, and points, log-density and score belong together."""

import math

import numpy as np
import pytest
import torch

from data import TOYS, Toy, log_smoothed_box

toys = pytest.mark.parametrize("toy", [make() for make in TOYS.values()], ids=list(TOYS))


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def lattice(limit=13, h=0.25):
    """A square lattice and the area of its cell: the trapezoid rule is exact to 1e-10 on densities this smooth."""
    ticks = torch.arange(-limit, limit + h, h)
    return torch.cartesian_prod(ticks, ticks), h * h


@toys
def test_a_density_integrates_to_one(toy):
    x, cell = lattice()
    assert (toy.log_prob(x).exp().sum() * cell).item() == pytest.approx(1, abs=1e-9)


@toys
def test_the_score_is_the_gradient_of_the_log_density_by_finite_differences(toy):
    x = torch.cat([toy.sample(50), 20 * torch.rand(20, 2) - 10, torch.zeros(1, 2)])
    h = 1e-5
    for i, unit in enumerate(torch.eye(2)):
        difference = (toy.log_prob(x + h * unit) - toy.log_prob(x - h * unit)) / (2 * h)
        torch.testing.assert_close(toy.score(x)[:, i], difference, atol=2e-7, rtol=2e-7)


@toys
def test_the_density_is_that_of_the_points_plus_noise_by_monte_carlo(toy):
    """p(x) = E[ N(x; point, 0.375² I) ] over the points themselves, of which the density knows nothing."""
    x = toy.sample(20)
    kernels = torch.stack([torch.exp(-(x_i - toy.points(200_000, "cpu")).square().sum(1) / (2 * Toy.smoothing**2))
                           for x_i in x]) / (2 * math.pi * Toy.smoothing**2)
    z = (kernels.mean(1) - toy.log_prob(x).exp()) / (kernels.std(1) / kernels.shape[1] ** 0.5)
    assert z.abs().max() < 4 and z.square().mean() < 2


@toys
def test_a_large_sample_has_the_density_s_mean_covariance_and_entropy(toy):
    grid, cell = lattice()
    p = toy.log_prob(grid).exp() * cell
    x = toy.sample(100_000)
    for function in (lambda x: x[:, 0], lambda x: x[:, 1], lambda x: x[:, 0] ** 2, lambda x: x[:, 1] ** 2,
                     lambda x: x[:, 0] * x[:, 1], toy.log_prob):
        values = function(x[:20_000]) if function == toy.log_prob else function(x)
        assert abs(values.mean() - (p * function(grid)).sum()) < 4 * values.std() / len(values) ** 0.5


@pytest.mark.parametrize("name", ["sine", "swirl"])
def test_the_quadrature_is_exact_to_1e_9(name, monkeypatch):
    x = torch.cat([TOYS[name]().sample(200), 24 * torch.rand(50, 2) - 12])
    coarse = TOYS[name]().log_prob(x)
    rule = np.polynomial.legendre.leggauss
    monkeypatch.setattr(np.polynomial.legendre, "leggauss", lambda n: rule(3 * n))
    torch.testing.assert_close(coarse, TOYS[name]().log_prob(x), atol=1e-9, rtol=1e-9)


def test_a_smoothed_box_is_right_near_and_far_out():
    """Against brute-force quadrature of the uniform density times the Gaussian, down to e^-3000."""
    width, std = 2.0, torch.tensor(0.3)
    d = torch.tensor([-25.0, -3.0, -1.0, -0.2, 0.0, 0.4, 1.1, 2.0, 25.0])
    u = torch.linspace(-width / 2, width / 2, 20_001)
    log_terms = -0.5 * ((d[:, None] - u) / std).square() - math.log(0.3 * math.sqrt(2 * math.pi)) - math.log(width)
    weights = torch.full_like(u, width / 20_000)
    weights[[0, -1]] /= 2
    torch.testing.assert_close(log_smoothed_box(d, width, std), torch.logsumexp(log_terms + weights.log(), 1),
                               atol=1e-5, rtol=1e-6)


@toys
def test_the_log_density_is_finite_far_away_and_keeps_dtype_and_batch(toy):
    x = torch.tensor([[1e3, -1e3], [0.0, 50.0]], dtype=torch.float32)
    assert toy.log_prob(x).isfinite().all() and toy.score(x).isfinite().all()
    assert toy.log_prob(x).dtype == toy.score(x).dtype == torch.float32 and toy.score(x).shape == x.shape


@toys
def test_less_smoothing_leaves_room_for_the_noise_of_denoising_score_matching(toy):
    """Points with variance 0.375² - σ² and then noise of variance σ² are draws of p."""
    sigma = 0.3
    x = toy.sample(100_000, smoothing=math.sqrt(Toy.smoothing**2 - sigma**2))
    y = toy.sample(100_000)
    x = x + sigma * torch.randn_like(x)
    assert ((x.square().mean(0) - y.square().mean(0)).abs() < 4 * math.sqrt(2) * y.square().std(0) / 100_000**0.5).all()
