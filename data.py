"""Data: images in MNIST's format, and densities in the plane that are known exactly."""

import gzip
import hashlib
import math
import zlib
from pathlib import Path

import numpy as np
import torch


MNIST = Path(__file__).parent / "mnist"


class DataError(ValueError):
    """A data file is missing or not what it should be; the message names it and says what was expected."""


def read_idx(path):
    """The array of bytes in an IDX file, gzipped or not.   -> uint8 (n, …)

    Format: two zero bytes, 0x08 for unsigned bytes, the number of axes, each axis as a big-endian 32-bit
    integer, then the bytes. Source: the home page of MNIST (LeCun, Cortes, Burges).
    """
    try:
        raw = Path(path).read_bytes()
        if str(path).endswith(".gz"):
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:  # a damaged gzip raises any of the three
        raise DataError(f"cannot read {path}: {error}") from None
    axes = raw[3] if raw[:3] == b"\x00\x00\x08" and len(raw) > 3 else 0
    header = 4 + 4 * axes
    shape = np.frombuffer(raw[4:header], ">u4").tolist() if len(raw) >= header else []
    if axes == 0 or len(shape) != axes:
        raise DataError(f"{path} is not an IDX file of unsigned bytes")
    if len(raw) != header + math.prod(shape):
        raise DataError(f"{path} holds {len(raw) - header} bytes of data, its header promises {math.prod(shape)}")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy())


def mnist(directory):
    """Images of a data set in MNIST's format: to train, to validate, to test; 50,000, 10,000, 10,000 for MNIST.

    -> three uint8 tensors (n, 1, H, W). The last sixth of the training file is the validation split.

    Each file may be gzipped. If the directory holds a file SHA256SUMS (as `sha256sum` prints), each file that
    it lists must match. Fashion-MNIST and KMNIST come in the same files. Raises DataError.
    """
    train, test = (_images(Path(directory), name) for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"))
    if train.shape[1:] != test.shape[1:]:
        raise DataError(f"training images are {tuple(train.shape[1:])}, test images {tuple(test.shape[1:])}")
    n = len(train) - len(train) // 6
    if n == len(train) or len(test) == 0:
        raise DataError(f"{len(train)} training and {len(test)} test images in {directory} are too few")
    return train[:n], train[n:], test


def _images(directory, name):
    path = next((p for p in (directory / f"{name}.gz", directory / name) if p.is_file()), None)
    if path is None:
        raise DataError(f"no {name}.gz (nor {name}) in {directory}: --data takes a directory with the "
                        "files of a data set in MNIST's format")
    check_sha256(path)
    images = read_idx(path)
    if images.dim() != 3:
        raise DataError(f"{path} holds an array of {images.dim()} axes, not (images, rows, columns)")
    return images[:, None]


def check_sha256(path):
    """Raises DataError if SHA256SUMS beside the file lists it with another sum. Lines are those of `sha256sum`."""
    sums = path.with_name("SHA256SUMS")
    if not sums.is_file():
        return
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        lines = [line.replace(" *", "  ") for line in sums.read_text().splitlines() if line.strip()]
        expected = dict(reversed(line.split(maxsplit=1)) for line in lines)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot check {path} against {sums}: {error}") from None
    if expected.get(path.name, found) != found:
        raise DataError(f"{path} is damaged or altered: its SHA-256 is {found}, {sums} says {expected[path.name]}")


def dequantize(images):
    """x = image + u, u uniform on [0, 1): bytes to a datum in [0, 256] of torch's default dtype.   (B, …) -> (B, …)

    The density of x integrates over each unit cube to the probability of an image, so that -E[log p(x)] bounds
    the discrete negative log-likelihood from above. Source: Uria et al., "RNADE" (2013).
    """
    return images + torch.rand(images.shape, device=images.device)


# ---------------------------------------------------------------------------------------------------------
# Densities in the plane: points on a figure, smoothed, whose log-density and score are exact
# ---------------------------------------------------------------------------------------------------------


class Density:
    """A density whose log_prob is exact, and so its score."""

    def score(self, x):
        """∇_x log p(x).   (B, D) -> (B, D)"""
        scores = []
        for batch in x.detach().split(2000):
            with torch.enable_grad():
                batch = batch.requires_grad_()
                scores.append(torch.autograd.grad(self.log_prob(batch).sum(), batch)[0])
        return torch.cat(scores)


class Toy(Density):
    """Points of a figure in the plane, each with noise N(0, 0.375² I), and the exact density of the sum:

        p(x) = Σ_k w_k p_1(x_1 | k) p_2(x_2 | k),      x_i | k ~ center_ki + U[-width/2, width/2] + N(0, std_i²)

    points   (n, device) -> (n, 2), before smoothing
    weights  (K,), center (K, 2), width a number, std (2,)

    For the checkerboard k are its squares. For the other two k are the nodes of a Gauss-Legendre rule along the curve,
    so close beside `std` that the sum is exact to 1e-9. Source of the figures: the code of Chao et al. (2023).
    """

    smoothing = 0.375

    def __init__(self, points, weights, center, width=0.0, std=(smoothing, smoothing)):
        self.points = points
        self.log_weights, self.center = weights.log(), center
        self.width, self.std = width, torch.tensor(std, dtype=torch.float64)

    def sample(self, n, device="cpu", smoothing=smoothing):
        """n draws of p in torch's default dtype; with less smoothing, draws of a sharper density.   -> (n, 2)"""
        return self.points(n, device) + smoothing * torch.randn(n, 2, device=device)

    def log_prob(self, x):
        """log p(x) in nats, computed in float64.   (B, 2) -> (B,)"""
        log_weights, center, std = (t.to(x.device) for t in (self.log_weights, self.center, self.std))
        return torch.cat([
            torch.logsumexp(log_weights + log_smoothed_box(batch[:, None] - center, self.width, std).sum(2), dim=1)
            for batch in x.double().split(2000)]).to(x.dtype)  # (2000, K, 2) at a time


def log_smoothed_box(d, width, std):
    """The log-density of U[-width/2, width/2] + N(0, std²) at d, element by element.

    log( (Φ((width/2 - d)/std) - Φ((-width/2 - d)/std)) / width ), from the logarithms of both, since a few widths
    away the two are below the smallest float. width = 0 is N(0, std²).
    """
    if width == 0:
        return -0.5 * (d / std).square() - (std * math.sqrt(2 * math.pi)).log()
    d = d.abs()  # it is even in d, and now the second Φ is the smaller one by far
    log_upper, log_lower = (torch.special.log_ndtr((end - d) / std) for end in (width / 2, -width / 2))
    return log_upper + torch.log(-torch.expm1(log_lower - log_upper)) - math.log(width)


def sine():
    """4 · (t, sin 3t + n/4), t uniform on [-2, 2], n standard normal."""
    def points(n, device):
        t = 4 * torch.rand(n, device=device) - 2
        return 4 * torch.stack([t, torch.sin(3 * t) + 0.25 * torch.randn(n, device=device)], dim=1)

    t, weights = gauss_legendre(200, -2, 2)
    return Toy(points, weights / 4, 4 * torch.stack([t, torch.sin(3 * t)], dim=1),
               std=(Toy.smoothing, math.hypot(1, Toy.smoothing)))


def swirl():
    """5/6 · (t cos t + 1 - u₁/2, -t sin t + 2 - u₂/2), t = 3π √u₃, u uniform on [0, 1]: t has the density 2t/(3π)²."""
    def spiral(t):
        return torch.stack([t * t.cos() + 1, -t * t.sin() + 2], dim=1)

    def points(n, device):
        t = 3 * math.pi * torch.rand(n, device=device).sqrt()
        return 5 / 6 * (spiral(t) - torch.rand(n, 2, device=device) / 2)

    t, weights = gauss_legendre(320, 0, 3 * math.pi)
    return Toy(points, weights * 2 * t / (3 * math.pi) ** 2, 5 / 6 * (spiral(t) - 1 / 4), width=5 / 12)


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
    """Nodes and weights of Σ w f(t) ≈ ∫_a^b f dt, in float64.   -> (n,), (n,)"""
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(n))
    return (a + b) / 2 + (b - a) / 2 * nodes, (b - a) / 2 * weights


# ---------------------------------------------------------------------------------------------------------
# Densities of any dimension with modes of unequal weights
# ---------------------------------------------------------------------------------------------------------


class Mixture(Density):
    """p(x) = Σ_k w_k N(x; m_k, s_k² I), exact in any dimension.

    weights (K,), summing to 1; means (K, D); std a number or (K,)
    """

    def __init__(self, weights, means, std=1.0):
        self.weights, self.means = (torch.as_tensor(t, dtype=torch.float64) for t in (weights, means))
        self.std = torch.as_tensor(std, dtype=torch.float64).expand(len(self.means))

    def sample(self, n, device="cpu", equally=False):
        """n draws in torch's default dtype, of p or with the same number from each component.   -> (n, D)"""
        if equally:
            k = torch.arange(n, device=device) % len(self.means)
        else:
            k = torch.multinomial(self.weights.to(device), n, replacement=True)
        means, std = (t.to(device, torch.get_default_dtype()) for t in (self.means, self.std))
        return means[k] + std[k, None] * torch.randn(n, means.shape[1], device=device)

    def log_prob(self, x):
        """log p(x) in nats, computed in float64.   (B, D) -> (B,)"""
        log_weights, means, std = (t.to(x.device) for t in (self.weights.log(), self.means, self.std))
        log_constant = log_weights - means.shape[1] * (std * math.sqrt(2 * math.pi)).log()  # (K,)
        squares = torch.stack([(x.double() - m).square().sum(1) for m in means], dim=1)  # (B, K)
        return torch.logsumexp(log_constant - squares / (2 * std.square()), dim=1).to(x.dtype)

    def mode(self, x):
        """The nearest mean: to which mode x belongs, whatever weights a model gives them.   (B, D) -> (B,)"""
        return torch.cdist(x, self.means.to(x)).argmin(1)


def mixture(dim=2, weights=(0.1, 0.2, 0.3, 0.4), distance=10.0):
    """Four unit Gaussians at the corners of a square, neighbours `distance` standard deviations apart.

    One side of the square lies along all even axes together, the other along all odd ones, so that no coordinate
    alone tells the modes apart where dim is large.
    """
    axes = torch.zeros(2, dim, dtype=torch.float64)
    axes[0, ::2], axes[1, 1::2] = 1, 1
    axes = axes / axes.norm(dim=1, keepdim=True)
    corners = distance / 2 * torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    return Mixture(weights, corners @ axes)
