# An unofficial reimplementation of EBFlow (arXiv 2305.15267). MIT licence, copyright (c) 2026 its contributors.
"""Densities that are known exactly, with their scores: three toys in the plane, and Gaussian mixtures."""

import math

import numpy as np
import torch


class Density:
    """The score of a density, from the exact log_prob (B, D) -> (B,) that a subclass defines."""

    def score(self, x):
        """∇_x log p(x).   (B, D) -> (B, D)"""
        scores = []
        for batch in x.detach().split(2000):
            with torch.enable_grad():
                batch = batch.requires_grad_()
                scores.append(torch.autograd.grad(self.log_prob(batch).sum(), batch)[0])
        return torch.cat(scores)


class Toy(Density):
    """A figure in the plane, smoothed by noise N(0, 0.375² I), with the exact density:

        p(x) = Σ_k p_k p(x_1 | k) p(x_2 | k),      x_i | k ~ center_ki + U[-width/2, width/2] + N(0, std_i²)

    points         (n, device) -> (n, 2), draws of the figure before smoothing
    probabilities  p_k (K,), center (K, 2), width a number, std (2,)

    ours: the density. k runs over the squares of the checkerboard. For sine and swirl, k runs over the nodes of a
    Gauss-Legendre rule along the curve, and the error is below 1e-9. Source of the figures: the code of Chao et al.
    """

    smoothing = 0.375

    def __init__(self, points, probabilities, center, width=0.0, std=(smoothing, smoothing)):
        self.points, self.log_p_k, self.center = points, probabilities.log(), center
        self.width, self.std = width, torch.tensor(std, dtype=torch.float64)

    def sample(self, n, device="cpu", smoothing=smoothing):
        """n draws of p in torch's default dtype. With less smoothing they come from a sharper density.   -> (n, 2)"""
        return self.points(n, device) + smoothing * torch.randn(n, 2, device=device)

    def log_prob(self, x):
        """log p(x) in nats, computed in float64.   (B, 2) -> (B,)"""
        log_p_k, center, std = (t.to(x.device) for t in (self.log_p_k, self.center, self.std))
        log_p = []
        for batch in x.double().reshape(len(x), 2).split(2000):  # (2000, K, 2) at a time
            log_p_given_k = log_smoothed_box(batch[:, None] - center, self.width, std).sum(2)
            log_p.append(torch.logsumexp(log_p_k + log_p_given_k, dim=1))
        return torch.cat(log_p).to(x.dtype)


def log_smoothed_box(d, width, std):
    """The log-density at d of a uniform plus a normal variable, U[-width/2, width/2] + N(0, std²).   (…) -> (…)

        log( (Φ((width/2 - d)/std) - Φ((-width/2 - d)/std)) / width ),      for width = 0 that of N(0, std²)

    It is computed from log Φ, because far from the box both Φ are below the smallest float.
    """
    if width == 0:
        return -0.5 * (d / std).square() - (std * math.sqrt(2 * math.pi)).log()
    d = d.abs()  # the density is even in d; for d < 0 both Φ can be near 1, and their difference loses its digits
    log_upper, log_lower = (torch.special.log_ndtr((end - d) / std) for end in (width / 2, -width / 2))
    return log_upper + torch.log(-torch.expm1(log_lower - log_upper)) - math.log(width)


def sine():
    """4 · (t, sin 3t + n/4), t uniform on [-2, 2], n standard normal."""
    def points(n, device):
        t = 4 * torch.rand(n, device=device) - 2
        return 4 * torch.stack([t, torch.sin(3 * t) + 0.25 * torch.randn(n, device=device)], dim=1)

    t, dt = gauss_legendre(200, -2, 2)
    return Toy(points, dt / 4, 4 * torch.stack([t, torch.sin(3 * t)], dim=1),
               std=(Toy.smoothing, math.hypot(1, Toy.smoothing)))


def swirl():
    """5/6 · (t cos t + 1 - u₁/2, -t sin t + 2 - u₂/2), t = 3π √u₃, u uniform on [0, 1]. t has the density 2t/(3π)²."""
    def spiral(t):
        return torch.stack([t * t.cos() + 1, -t * t.sin() + 2], dim=1)

    def points(n, device):
        t = 3 * math.pi * torch.rand(n, device=device).sqrt()
        return 5 / 6 * (spiral(t) - torch.rand(n, 2, device=device) / 2)

    t, dt = gauss_legendre(320, 0, 3 * math.pi)
    return Toy(points, dt * 2 * t / (3 * math.pi) ** 2, 5 / 6 * (spiral(t) - 1 / 4), width=5 / 12)


def checkerboard():
    """3 · (t, u - 2b + (⌊t⌋ mod 2)), t uniform on [-2, 2], u on [0, 1], b a fair bit: eight squares of side 3."""
    def points(n, device):
        t, u = 4 * torch.rand(n, device=device) - 2, torch.rand(n, device=device)
        b = torch.randint(2, (n,), device=device)
        return 3 * torch.stack([t, u - 2 * b + t.floor() % 2], dim=1)

    squares = [(t, t % 2 - 2 * b) for t in range(-2, 2) for b in range(2)]  # lower left corners
    center = 3 * (torch.tensor(squares, dtype=torch.float64) + 0.5)
    return Toy(points, torch.full((8,), 1 / 8, dtype=torch.float64), center, width=3.0)


TOYS = {"sine": sine, "swirl": swirl, "checkerboard": checkerboard}


def gauss_legendre(n, a, b):
    """Nodes t_k and coefficients dt_k of Σ_k dt_k f(t_k) ≈ ∫_a^b f dt, in float64.   -> (n,), (n,)"""
    t, dt = map(torch.from_numpy, np.polynomial.legendre.leggauss(n))  # on [-1, 1]
    return (a + b) / 2 + (b - a) / 2 * t, (b - a) / 2 * dt


# ---- Gaussian mixtures in any dimension, with modes of unequal weights -----------------------------------------------

class Mixture(Density):
    """p(x) = Σ_k w_k N(x; m_k, s_k² I): weights w (K,) that sum to 1, means m (K, D), std s a number or (K,)"""

    def __init__(self, weights, means, std=1.0):
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.std = torch.as_tensor(std, dtype=torch.float64).expand(len(self.means))

    def sample(self, n, device="cpu", equally=False):
        """n draws of p in torch's default dtype, or with `equally` the same number from each mode.   -> (n, D)"""
        k = (torch.arange(n, device=device) % len(self.means) if equally
             else torch.multinomial(self.weights.to(device), n, replacement=True))
        means, std = (t.to(device, torch.get_default_dtype()) for t in (self.means, self.std))
        return means[k] + std[k, None] * torch.randn(n, means.shape[1], device=device)

    def log_prob(self, x):
        """log p(x) in nats, computed in float64.   (B, D) -> (B,)"""
        return self._log_joint(x).logsumexp(1).to(x.dtype)

    def responsibilities(self, x):
        """P(k | x), the probability that x comes from mode k. Its mean over draws of p is w_k.   (B, D) -> (B, K)"""
        return self._log_joint(x).softmax(1)

    def mode(self, x):
        """The index of the mode whose mean is nearest to x.   (B, D) -> (B,)"""
        return torch.cdist(x, self.means.to(x)).argmin(1)

    def _log_joint(self, x):
        """log( w_k N(x; m_k, s_k² I) ) in float64.   (B, D) -> (B, K)"""
        means, std = self.means.to(x.device), self.std.to(x.device)
        log_constant = self.weights.log().to(x.device) - means.shape[1] * (std * math.sqrt(2 * math.pi)).log()  # (K,)
        x = x.double().reshape(len(x), means.shape[1])  # (B, 1) would broadcast
        squares = torch.stack([(x - m).square().sum(1) for m in means], dim=1)  # (B, K)
        return log_constant - squares / (2 * std.square())


def mixture(dim=2, weights=(0.1, 0.2, 0.3, 0.4), distance=10.0):
    """Unit Gaussians at the corners of a regular polygon with sides of length `distance`, in `dim` dimensions.

    One axis of its plane is parallel to the diagonal of the even coordinates, the other to that of the odd ones. So in
    high dimensions, no single coordinate separates the modes.
    """
    K = len(weights)
    axes = torch.zeros(2, dim, dtype=torch.float64)
    axes[0, ::2], axes[1, 1::2] = 1, 1
    axes = axes / axes.norm(dim=1, keepdim=True)
    angle = 2 * math.pi / K * (torch.arange(K, dtype=torch.float64) + 0.5)
    radius = distance / (2 * math.sin(math.pi / K)) if K > 1 else 0.0
    return Mixture(weights, radius * torch.stack([angle.cos(), angle.sin()], dim=1) @ axes)


def gmm40(dim=2):
    """40 Gaussians of equal weights, their means uniform on [-40, 40]^D: the target of Midgley et al. (2023)."""
    means = 40 * (2 * torch.rand(40, dim, generator=torch.Generator().manual_seed(0)) - 1)
    return Mixture(torch.full((40,), 1 / 40), means, std=math.log1p(math.e))  # softplus(1) = 1.31
