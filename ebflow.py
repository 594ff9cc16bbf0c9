# An unofficial reimplementation of EBFlow (arXiv 2305.15267). MIT licence, copyright (c) 2026 its contributors.
"""EBFlow: a normalizing flow as an energy-based model whose normalising constant is known.

    log p(x; θ) = log p_u(g(x)) + Σ_{i∈S_n} log|det J_i(x_{i-1})| + Σ_{i∈S_l} log|det J_i|     (poster, Eq. (8))
                  └───────────────── -E(x; θ) ──────────────────┘   └──── -log Z(θ) ─────┘     (poster, Eq. (9))

S_l are the affine layers, S_n the others, p_u = N(0, I), x_0 = x, x_i = g_i(x_{i-1}). The affine layers are part of g,
so they enter E; only their log-determinants are confined to Z. Z does not depend on x, so ∇_x log p = -∇_x E. Score
matching trains the flow with `energy` alone, and only the exact likelihood needs `log_z`.

Source: Chao et al., "Training Energy-Based Normalizing Flow with Score-Matching Objectives" (NeurIPS 2023).
"""

import math

import torch
import torch.nn as nn

from layers import (ActNorm, AffineCoupling, Conv1x1, Convolution, FullyConnected, LinearLayer, LinearPart, Logit,
                    NonlinearPart, SmoothLeakyReLU, Squeeze, Standardize)


class EBFlow(nn.Module):
    """The flow g = g_L ∘ … ∘ g_1 of `layers` on events of `shape`, with the prior N(0, I).

        >>> flow = fc_flow(dim=4)
        >>> x = torch.randn(3, 4)
        >>> torch.allclose(flow.log_prob(x), -flow.energy(x) - flow.log_z())
        True
    """

    def __init__(self, layers, shape):
        super().__init__()
        self.layers, self.shape = nn.ModuleList(layers), tuple(shape)
        self.shapes = [self.shape]  # of an event before each layer, and after the last
        for layer in self.layers:
            self.shapes.append(tuple(layer.output_shape(self.shapes[-1])))

    def forward(self, x):
        """u = g(x).   (B, *shape) -> (B, *shapes[-1])"""
        return self._transform(x)[0]

    def inverse(self, u):
        """x = g⁻¹(u).   (B, *shapes[-1]) -> (B, *shape)   Raises torch.linalg.LinAlgError if a weight is singular."""
        if u.shape[1:] != self.shapes[-1]:
            raise ValueError(f"u must have the event shape {self.shapes[-1]}, not {tuple(u.shape[1:])}")
        for layer in reversed(self.layers):
            u = layer.inverse(u)
        return u

    def energy(self, x):
        """E(x) = -log p_u(g(x)) - Σ_{i∈S_n} log|det J_i|, in nats; no linear determinant.   (B, *shape) -> (B,)"""
        u, log_abs_det = self._transform(x)
        if u.shape != (len(x), *self.shapes[-1]):
            raise ValueError(f"the layers make {tuple(u.shape)} of {tuple(x.shape)}, not {(len(x), *self.shapes[-1])}")
        u = u.flatten(1)  # (B, D)
        return 0.5 * u.square().sum(1) + 0.5 * u.shape[1] * math.log(2 * math.pi) - log_abs_det

    def log_z(self):
        """log Z = -Σ_{i∈S_l} log|det J_i|, exact: the O(D³) part (poster, Eq. (9)).   -> ()

        In float64 under torch.no_grad. Where a gradient is taken, in float32 or longer (layers.py: precise).
        ∞ if a weight is singular; for a convolution it can be nan.
        """
        zero = torch.zeros((), dtype=torch.float64)  # a () tensor adds to one on any device
        return -sum((layer.log_abs_det(shape).view(())
                     for layer, shape in zip(self.layers, self.shapes[:-1], strict=True)
                     if isinstance(layer, LinearLayer)), start=zero)

    def log_prob(self, x):
        """log p(x) = -E(x) - log Z, in nats (poster, Eq. (8)).   (B, *shape) -> (B,)"""
        return -self.energy(x) - self.log_z()

    def score(self, x):
        """∇_x log p(x) = -∇_x E(x).   (B, *shape) -> (B, *shape)"""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return -torch.autograd.grad(self.energy(x).sum(), x)[0]

    @torch.no_grad()
    def sample(self, n):
        """n draws x = g⁻¹(u), u ~ N(0, I), on the model's device and in its dtype.   -> (n, *shape)"""
        like = next(self.parameters(), next(self.buffers(), torch.empty(0)))
        return self.inverse(torch.randn(n, *self.shapes[-1], device=like.device, dtype=like.dtype))

    @torch.no_grad()
    def initialize(self, x):
        """Data-dependent start: each layer starts from the batch x as it reaches that layer (see ActNorm)."""
        for layer in self.layers:
            layer.initialize(x)
            x = layer(x) if isinstance(layer, LinearLayer) else layer(x)[0]

    def _transform(self, x):
        """u = g(x) and Σ_{i∈S_n} log|det J_i|.   (B, *shape) -> (B, *shapes[-1]), (B,)"""
        if x.shape[1:] != self.shape:
            raise ValueError(f"the flow takes events of shape {self.shape}, not {tuple(x.shape[1:])}")
        log_abs_dets = [x.new_zeros(len(x))]
        for layer in self.layers:
            if isinstance(layer, LinearLayer):
                x = layer(x)
            else:
                x, log_abs_det = layer(x)
                log_abs_dets.append(log_abs_det)
        return x, torch.stack(log_abs_dets).sum(0)  # stack refuses what + would broadcast

    def __repr__(self):
        line = "{:20} {:12} {:8} {:14} {:13} {}".format
        lines, trained = [line("layer", "event", "linear", "parameters", "log|det| in", "at a cost of")], 0
        for i, (layer, shape) in enumerate(zip(self.layers, self.shapes)):
            linear, size = isinstance(layer, LinearLayer), sum(map(torch.numel, layer.parameters()))
            fixed = size > 0 and not next(layer.parameters()).requires_grad
            trained += 0 if fixed else size
            lines.append(line(f"{i} {type(layer).__name__}", "×".join(map(str, shape)), "yes" if linear else "no",
                              f"{size:,}" + " fixed" * fixed, "Z" if linear else "E", layer.cost))
        return "\n".join([*lines, line("total", "", "", f"{trained:,}", "", "").rstrip()])


# ---- The paper's architectures ---------------------------------------------------------------------------------------

def logit_preprocessing(shape, s, mean=0.0):
    """The layers g_1 … g_k that pre-process images x in [0, 256)^D: z = (logit(x / 256) - mean) / s. ours: the mean.

    Match after pre-processing (MaP; poster, Eq. (10)) trains the flow of z alone. EBFlow([*pre.layers, *flow.layers],
    shape) is the model of x; its log_prob gives the NLL that is reported.
    """
    return EBFlow([Standardize(std=256.0), Logit(), Standardize(std=s, mean=mean)], shape)


def fc_flow(dim=784, alpha=0.3, diagonal=1.0, bias=0.0, bend=None, ratio=1.0):
    """Two unconstrained dim × dim matrices with a smooth leaky ReLU between them: the paper's FC.

    W₁ starts at diagonal · I, W₂ at ratio times that, both biases at `bias`. The paper has -I, -I and 1. ours: +I, 0,
    `bend`, and `ratio`: where an actnorm takes the scale back, a larger W₂ learns more slowly.
    """
    return EBFlow([FullyConnected(dim, diagonal, bias), SmoothLeakyReLU(alpha, bend=bend),
                   FullyConnected(dim, ratio * diagonal, bias)], (dim,))


def cnn_flow(shape=(1, 28, 28), kernel_size=7, blocks=3, alpha=0.3, diagonal=-1.0, bias=0.01, bend=None):
    """Two unconstrained convolutions in each block, a squeeze between the blocks: the paper's CNN.

    A smooth leaky ReLU follows every convolution but the last. Kernels start at diagonal · identity, biases at random,
    N(0, (bias · Xavier's std)²). Raises ValueError unless 2^(blocks - 1) divides H and W. ours: `bend`.
    """
    layers, channels = [], shape[0]
    for block in range(blocks):
        if block > 0:
            layers.append(Squeeze())
            channels *= 4
        for _ in range(2):
            layers += [Convolution(channels, kernel_size, diagonal), SmoothLeakyReLU(alpha, residual=True, bend=bend)]
            nn.init.normal_(layers[-2].bias, std=bias / (kernel_size * channels**0.5))
    return EBFlow(layers[:-1], shape)


def toy_flow(dim=2, blocks=10, width=64, floor=0.0):
    """Blocks of (fully-connected, affine coupling, actnorm) and a last fully-connected layer: the paper's toys.

    ours: the `floor` under the couplings' scales, without which a few draws fly far away after score matching.
    """
    def network(n, m):  # ours: one network gives scale and shift; the paper has two
        return nn.Sequential(nn.Linear(n, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, m))

    half, rest = dim - dim // 2, dim // 2  # the halves of tensor_split
    layers = []
    for block in range(blocks):
        swap = block % 2 == 1
        net = network(rest, 2 * half) if swap else network(half, 2 * rest)
        layers += [FullyConnected(dim), AffineCoupling(net, swap, floor), ActNorm(dim)]
    return EBFlow([*layers, FullyConnected(dim)], (dim,))


def glow_flow(shape=(1, 28, 28), width=512, depth=16, blocks=2, floor=0.0, tanh=False):
    """Blocks of a squeeze and `depth` × (actnorm, 1×1 convolution, affine coupling): the paper's Glow.

    Half of the channels pass to the prior after each block but the last. The last actnorm stands for a trained mean and
    variance of that prior. The couplings' networks have `width` channels and end in zeros, so all couplings start at
    one scale and at shift 0. With `tanh`, the couplings are the published ones, whose networks have LeakyReLU(0.1).
    ours: sigmoid scales, SiLU, and the `floor` under the scales. The published flow splits channels off by one more
    coupling, which this one lacks. Raises ValueError unless 2^blocks divides H and W.
    """
    def network(n, m):
        last = nn.Conv2d(width, m, 3, padding=1)
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        activation = nn.LeakyReLU(0.1) if tanh else nn.SiLU()
        first, middle = nn.Conv2d(n, width, 3, padding=1), nn.Conv2d(width, width, 1)
        return nn.Sequential(first, activation, middle, activation, last)

    layers, channels = [], shape[0]
    for block in range(blocks):
        layers.append(Squeeze())
        channels *= 4
        active = channels // 2**block  # the first of them; the others have passed to the prior
        half, rest = active - active // 2, active // 2
        for _ in range(depth):
            step = [ActNorm(active), Conv1x1(active), AffineCoupling(network(half, 2 * rest), floor=floor, tanh=tanh)]
            if active < channels:
                step = [LinearPart(step[0], active), LinearPart(step[1], active), NonlinearPart(step[2], active)]
            layers += step
    return EBFlow([*layers, ActNorm(channels)], shape)
