"""Densities are exact: they integrate to one, and points, log-density and score belong together."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from densities import TOYS, Mixture, Toy, log_smoothed_box, mixture

pytestmark = pytest.mark.usefixtures("float64")
TOY = {name: make() for name, make in TOYS.items()}
MIXTURES = {"odd": Mixture([0.2, 0.5, 0.3], [[0.0, 0.0], [3.0, 1.0], [-2.0, 4.0]], [0.5, 1.0, 1.5]),
            "two": mixture(2), "five": mixture(5)}  # the data of train_ebm.py in two dimensions and more
toys = pytest.mark.parametrize("p", TOY.values(), ids=TOY)
mixtures = pytest.mark.parametrize("p", MIXTURES.values(), ids=MIXTURES)
densities = pytest.mark.parametrize("p", (TOY | MIXTURES).values(), ids=TOY | MIXTURES)


def lattice(limit=13.0, h=0.25):
    """A square lattice and the area of its cell: the trapezoid rule is exact to 1e-10 on densities this smooth."""
    ticks = torch.arange(-limit, limit + h, h, dtype=torch.float64)
    return torch.cartesian_prod(ticks, ticks), h * h


@pytest.mark.parametrize("name", [*TOY, "odd", "two"])
def test_a_density_integrates_to_one(name):
    x, cell = lattice()
    assert ((TOY | MIXTURES)[name].log_prob(x).exp().sum() * cell).item() == pytest.approx(1, abs=1e-9)


@densities
def test_the_score_is_the_gradient_of_the_log_density_by_finite_differences(p):
    x = p.sample(50)
    x, h = torch.cat([x, 20 * torch.rand(20, x.shape[1]) - 10, torch.zeros(1, x.shape[1])]), 1e-5
    for i, unit in enumerate(torch.eye(x.shape[1])):
        difference = (p.log_prob(x + h * unit) - p.log_prob(x - h * unit)) / (2 * h)
        torch.testing.assert_close(p.score(x)[:, i], difference, atol=1e-6, rtol=1e-6)


@densities
def test_a_density_is_finite_far_away_and_keeps_dtype_and_batch(p):
    x = torch.full((3, p.sample(1).shape[1]), 1e3, dtype=torch.float32)
    assert p.log_prob(x).isfinite().all() and p.score(x).isfinite().all() and p.score(x).shape == x.shape
    assert p.log_prob(x).shape == (3,) and p.log_prob(x).dtype == p.score(x).dtype == torch.float32
    torch.set_default_dtype(torch.float32)
    assert p.sample(2).dtype == torch.float32
    with pytest.raises(RuntimeError):
        p.log_prob(x[:, :1])


@pytest.mark.parametrize("p", [TOY["sine"], TOY["checkerboard"], MIXTURES["two"]])
def test_a_log_density_in_float32_is_that_of_float64_rounded_once(p):
    x = 3 * torch.randn(500, 2, dtype=torch.float32)
    assert torch.equal(p.log_prob(x), p.log_prob(x.double()).float())


# ---- The toys --------------------------------------------------------------------------------------------------------

@toys
def test_the_density_is_that_of_the_points_plus_noise_by_monte_carlo(p):
    """p(x) = E[ N(x; point, 0.375² I) ] over the points themselves, of which the density knows nothing."""
    x = p.sample(20)
    kernels = torch.stack([torch.exp(-(x_i - p.points(100_000, "cpu")).square().sum(1) / (2 * Toy.smoothing**2))
                           for x_i in x]) / (2 * math.pi * Toy.smoothing**2)
    z = (kernels.mean(1) - p.log_prob(x).exp()) / (kernels.std(1) / kernels.shape[1] ** 0.5)
    assert z.abs().max() < 4 and z.square().mean() < 2


@toys
@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_a_large_sample_has_the_density_s_moments_and_entropy_with_less_smoothing_and_later_noise_too(p, sigma):
    """Points with variance 0.375² - σ² and then noise of variance σ², that of denoising score matching."""
    grid, cell = lattice()
    weights = p.log_prob(grid).exp() * cell
    x = p.sample(100_000, smoothing=math.sqrt(Toy.smoothing**2 - sigma**2))
    x = x + sigma * torch.randn_like(x)
    for function in (lambda x: x[:, 0], lambda x: x[:, 1], lambda x: x[:, 0] ** 2, lambda x: x[:, 1] ** 2,
                     lambda x: x[:, 0] * x[:, 1], p.log_prob):
        values = function(x[:4_000]) if function == p.log_prob else function(x)
        assert abs(values.mean() - (weights * function(grid)).sum()) < 4 * values.std() / len(values) ** 0.5


def test_the_moments_of_the_sine_are_those_of_its_formula():
    """4 (t, sin 3t + n/4), t uniform on [-2, 2]: E[sin² 3t] = ½ - sin 12 / 24, E[t sin 3t] by parts."""
    (x, cell), sine = lattice(), TOY["sine"]
    p, noise = sine.log_prob(x).exp() * cell, Toy.smoothing**2
    for function, exact in ((x[:, 0] ** 2, 16 * 4 / 3 + noise),
                            (x[:, 0] * x[:, 1], 16 * (-2 * math.cos(6) / 3 + math.sin(6) / 9) / 2),
                            (x[:, 1] ** 2, 16 * (0.5 - math.sin(12) / 24) + 1 + noise)):
        assert (p * function).sum().item() == pytest.approx(exact, rel=1e-7)
    t, s = sine.points(100_000, "cpu").T / 4
    residual = 4 * (s - torch.sin(3 * t))
    assert abs(residual.var() - 1) < 0.02 and abs(t.var() - 4 / 3) < 0.02 and t.abs().max() <= 2


@pytest.mark.parametrize("name", ["sine", "swirl"])
def test_the_quadrature_is_exact_to_1e_9(name, monkeypatch):
    x = torch.cat([TOY[name].sample(200), 24 * torch.rand(50, 2) - 12])
    rule = np.polynomial.legendre.leggauss
    monkeypatch.setattr(np.polynomial.legendre, "leggauss", lambda n: rule(3 * n))
    torch.testing.assert_close(TOY[name].log_prob(x), TOYS[name]().log_prob(x), atol=1e-9, rtol=1e-9)


def test_a_smoothed_box_is_right_near_and_far_out():
    """Against brute-force quadrature of the uniform density times the Gaussian, down to e^-3000."""
    d = torch.tensor([-25.0, -3.0, -1.0, -0.2, 0.0, 0.4, 1.1, 2.0, 25.0])
    u, weights = torch.linspace(-1, 1, 20_001), torch.full((20_001,), 2 / 20_000)
    weights[[0, -1]] /= 2
    log_terms = -0.5 * ((d[:, None] - u) / 0.3).square() - math.log(0.3 * math.sqrt(2 * math.pi)) - math.log(2)
    torch.testing.assert_close(log_smoothed_box(d, 2.0, torch.tensor(0.3)),
                               torch.logsumexp(log_terms + weights.log(), 1), atol=1e-5, rtol=1e-6)


# ---- Mixtures --------------------------------------------------------------------------------------------------------

@mixtures
def test_draws_of_a_mixture_have_its_mean_and_second_moments_and_its_log_density_is_torch_s(p):
    x = p.sample(100_000)
    second = torch.einsum("k,ki,kj->ij", p.weights, p.means, p.means) + (p.weights @ p.std**2) * torch.eye(x.shape[1])
    for draws, exact in ((x, p.weights @ p.means), (x[:, :, None] * x[:, None], second)):
        assert ((draws.mean(0) - exact).abs() < 4.5 * draws.std(0) / len(x) ** 0.5).all()
    normals = Independent(Normal(p.means, p.std[:, None]), 1)
    torch.testing.assert_close(p.log_prob(x), MixtureSameFamily(Categorical(p.weights), normals).log_prob(x))


@pytest.mark.parametrize("dim", [2, 8, 64])
def test_the_modes_of_the_mixture_are_equally_far_apart_in_any_dimension_and_no_axis_alone_tells_them(dim):
    p = mixture(dim)
    distances = torch.pdist(p.means)
    assert distances.min().item() == pytest.approx(10) and distances.max().item() == pytest.approx(10 * math.sqrt(2))
    assert p.means.abs().max() <= 5 / math.sqrt(dim // 2) + 1e-9
    torch.testing.assert_close(p.weights, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert p.mode(p.sample(400, equally=True)).tolist() == [0, 1, 2, 3] * 100
    assert torch.equal(p.mode(x := p.sample(400)), p.responsibilities(x).argmax(1))
    torch.testing.assert_close(p.responsibilities(x).sum(1), torch.ones(400))
