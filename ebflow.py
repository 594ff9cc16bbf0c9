"""EBFlow: a normalizing flow read as an energy-based model whose normalising constant is known.

    log p(x; θ) = log p_u(g(x)) + Σ_{i∈S_n} log|det J_i(x_{i-1})| + Σ_{i∈S_l} log|det J_i|
                  └───────────────── -E(x; θ) ──────────────────┘   └──── -log Z(θ) ─────┘

S_l are the affine layers, S_n the others, p_u = N(0, I), x_0 = x, x_i = g_i(x_{i-1}). There is no x in Z, so
∇_x log p = -∇_x E: an objective that sees the density through its score trains the flow without a single
determinant of a linear layer. `energy` is what is trained, `log_z` what is added to evaluate.

Source: Chao et al., "Training Energy-Based Normalizing Flow with Score-Matching Objectives" (NeurIPS 2023).
"""

import math

import torch
import torch.nn as nn

from layers import (ActNorm, AffineCoupling, Conv1x1, Convolution, FullyConnected, LinearLayer, LinearPart, Logit,
                    NonlinearPart, SmoothLeakyReLU, Squeeze, Standardize, known_not_finite)


class EBFlow(nn.Module):
    """The flow of `layers` on events of `shape`, with the prior N(0, I).

    Raises ValueError where a layer cannot take the shape that reaches it.

        >>> flow = fc_flow(dim=4)
        >>> x = torch.randn(3, 4)
        >>> torch.allclose(flow.log_prob(x), -flow.energy(x) - flow.log_z())
        True
    """

    def __init__(self, layers, shape):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.shapes = [tuple(shape)]  # the event's shape before each layer, and after the last
        for layer in self.layers:
            self.shapes.append(tuple(layer.output_shape(self.shapes[-1])))

    @property
    def shape(self):
        return self.shapes[0]

    def forward(self, x):
        """u = g(x).   (B, *shape) -> (B, *shapes[-1])"""
        return self._transform(x)[0]

    def inverse(self, u):
        """x = g⁻¹(u). Raises torch.linalg.LinAlgError, with the layer's name (but not where it is compiled), where a weight is singular."""
        for i, layer in reversed(list(enumerate(self.layers))):
            try:
                u = layer.inverse(u)
            except torch.linalg.LinAlgError:
                raise self._singular(i) from None
        return u

    def energy(self, x):
        """E(x) = -log p_u(g(x)) - Σ_{i∈S_n} log|det J_i|, in nats.   (B, *shape) -> (B,)

        Never touches the determinant of a linear layer.
        """
        u, log_abs_det = self._transform(x)
        u = u.flatten(1)
        return 0.5 * u.square().sum(1) + 0.5 * u.shape[1] * math.log(2 * math.pi) - log_abs_det

    def log_z(self):
        """log Z = -Σ_{i∈S_l} log|det J_i|, exact, in float64: the O(D³) part.   -> ()

        Raises torch.linalg.LinAlgError, with the layer's name, where a weight is singular or not finite. (What is compiled
        cannot look: it goes on with infinity or nan.)
        """
        log_abs_dets = {i: layer.log_abs_det(shape)
                        for i, (layer, shape) in enumerate(zip(self.layers, self.shapes))
                        if isinstance(layer, LinearLayer)}
        for i, log_abs_det in log_abs_dets.items():
            if known_not_finite(log_abs_det):
                raise self._singular(i)
        return -sum(log_abs_dets.values(), start=torch.zeros((), dtype=torch.float64))  # () goes with any device

    def log_prob(self, x):
        """log p(x) = -E(x) - log Z, in nats.   (B, *shape) -> (B,)"""
        return -self.energy(x) - self.log_z()

    def score(self, x):
        """∇_x log p(x) = -∇_x E(x).   (B, *shape) -> (B, *shape)"""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return -torch.autograd.grad(self.energy(x).sum(), x)[0]

    @torch.no_grad()
    def sample(self, n):
        """n draws x = g⁻¹(u), u ~ N(0, I), on the model's device and in its dtype.   -> (n, *shape)"""
        like = next(self.parameters())
        return self.inverse(torch.randn(n, *self.shapes[-1], device=like.device, dtype=like.dtype))

    @torch.no_grad()
    def initialize(self, x):
        """Data-dependent start: hands each linear layer the batch that reaches it (see ActNorm)."""
        for layer in self.layers:
            if isinstance(layer, LinearLayer):
                layer.initialize(x)
                x = layer(x)
            else:
                x = layer(x)[0]

    def _transform(self, x):
        """u = g(x) and Σ_{i∈S_n} log|det J_i|.   (B, *shape) -> (B, *shapes[-1]), (B,)"""
        log_abs_det = x.new_zeros(len(x))
        for layer in self.layers:
            if isinstance(layer, LinearLayer):
                x = layer(x)
            else:
                x, layer_log_abs_det = layer(x)
                log_abs_det = log_abs_det + layer_log_abs_det
        return x, log_abs_det

    def _singular(self, i):
        name = type(self.layers[i]).__name__
        return torch.linalg.LinAlgError(f"layer {i} ({name}) has a singular or non-finite weight: "
                                        "its determinant is needed here, and there is none")

    def __repr__(self):
        rows = [("layer", "event", "linear", "parameters", "log|det| in", "at a cost of")]
        for i, (layer, shape) in enumerate(zip(self.layers, self.shapes)):
            linear = isinstance(layer, LinearLayer)
            rows.append((f"{i} {type(layer).__name__}", "×".join(map(str, shape)), "yes" if linear else "no",
                         count(layer), "Z" if linear else "E", layer.cost))
        rows.append(("total", "", "", count(self), "", ""))
        widths = [max(len(row[c]) for row in rows) for c in range(6)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def count(module):
    """The number of trained parameters in words, or, where none is trained, of fixed ones."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    fixed = sum(p.numel() for p in module.parameters()) - trained
    return f"{fixed:,} fixed" if fixed and not trained else f"{trained:,}"


# ---------------------------------------------------------------------------------------------------------
# The paper's architectures
# ---------------------------------------------------------------------------------------------------------


def logit_preprocessing(shape, s, mean=0.0):
    """Images in [0, 256)^D to z = (logit(x / 256) - mean) / s: the layers g_1 … g_k of the paper's MaP.

    `match after pre-processing` trains the model of z alone; EBFlow([*pre.layers, *flow.layers], shape) is
    the model of the image, whose log_prob is the NLL that is reported.
    """
    return EBFlow([Standardize(std=256.0), Logit(), Standardize(std=s, mean=mean)], shape)


def fc_flow(dim=784, alpha=0.3, diagonal=1.0, bias=0.0, bend=None):
    """Two unconstrained dim × dim matrices with a smooth leaky ReLU between: the paper's FC.

    Both matrices start at diagonal · I and both biases at `bias`; the paper has -I and 1.
    """
    return EBFlow([FullyConnected(dim, diagonal, bias),
                   SmoothLeakyReLU(alpha, bend=bend),
                   FullyConnected(dim, diagonal, bias)], (dim,))


def cnn_flow(shape=(1, 28, 28), kernel_size=7, blocks=3, alpha=0.3, diagonal=-1.0, bias=0.01, bend=None):
    """Two unconstrained convolutions in each block, a squeeze between the blocks: the paper's CNN.

    A smooth leaky ReLU follows every convolution but the last. H and W must divide by 2^(blocks - 1).
    """
    layers, channels = [], shape[0]
    for block in range(blocks):
        if block > 0:
            layers.append(Squeeze())
            channels *= 4
        for _ in range(2):
            layers += [Convolution(channels, kernel_size, diagonal, bias),
                       SmoothLeakyReLU(alpha, residual=True, bend=bend)]
    return EBFlow(layers[:-1], shape)


def toy_flow(dim=2, blocks=10, width=64):
    """Blocks of (fully-connected, affine coupling, actnorm) and a last fully-connected: the paper's toys."""
    def network(n_in, n_out):
        return nn.Sequential(nn.Linear(n_in, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                             nn.Linear(width, n_out))

    half, rest = dim - dim // 2, dim // 2  # the halves of tensor_split
    layers = []
    for block in range(blocks):
        swap = block % 2 == 1
        net = network(rest, 2 * half) if swap else network(half, 2 * rest)
        layers += [FullyConnected(dim), AffineCoupling(net, swap), ActNorm(dim)]
    return EBFlow([*layers, FullyConnected(dim)], (dim,))


def glow_flow(shape=(1, 28, 28), width=512, depth=16, blocks=2, floor=0.0):
    """Blocks of a squeeze and `depth` × (actnorm, 1×1 convolution, affine coupling): the paper's Glow.

    Half of a block's channels go on to the next, the others are done. A last actnorm is the mean and variance of
    Glow's prior. H and W must divide by 2^blocks. The couplings' networks have `width` channels and end in zeros: they
    start at one scale for all and no shift. No scale of theirs is below `floor`.
    """
    def network(n_in, n_out):
        last = nn.Conv2d(width, n_out, 3, padding=1)
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        return nn.Sequential(nn.Conv2d(n_in, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 1), nn.SiLU(), last)

    layers, channels = [], shape[0]
    for block in range(blocks):
        layers.append(Squeeze())
        channels *= 4
        active = channels // 2**block  # the first of them
        half, rest = active - active // 2, active // 2
        for _ in range(depth):
            step = [ActNorm(active), Conv1x1(active), AffineCoupling(network(half, 2 * rest), floor=floor)]
            if active < channels:
                step = [LinearPart(step[0], active), LinearPart(step[1], active), NonlinearPart(step[2], active)]
            layers += step
    return EBFlow([*layers, ActNorm(channels)], shape)
