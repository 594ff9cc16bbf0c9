# An unofficial reimplementation of EBFlow (arXiv 2305.15267). MIT licence, copyright (c) 2026 its contributors.
"""The transformations g_i of a flow, each with its inverse and its log-determinant.

A normalizing flow maps a datum x to u = g_L ∘ … ∘ g_1(x). EBFlow factorises its density by the kind of each layer
(poster, Eq. (8)), and the base class of a layer says which kind it is:

    LinearLayer      i ∈ S_l   affine: log|det J_i| does not depend on x, so it belongs to log Z
    NonlinearLayer   i ∈ S_n   any other: log|det J_i| may depend on x, so it belongs to the energy E

A new layer extends one of these two; making it raises TypeError if it lacks an abstract method, and `verify` checks it.
Determinants of matrices are computed in float64, but in float32 where their gradient is taken: `precise`.

Source: Chao et al., "Training Energy-Based Normalizing Flow with Score-Matching Objectives" (NeurIPS 2023).
"ours:" marks what is not in the paper.
"""

import copy
import math
from abc import ABC, abstractmethod

import torch
import torch.nn as nn
import torch.nn.functional as F


class Layer(nn.Module, ABC):
    """One transformation g_i. `shape` is the shape of one event that enters it, without the batch dimension."""

    cost = "?"  # of the log-determinant; EBFlow prints it

    @abstractmethod
    def forward(self, x):
        """x (B, *shape) -> y (B, *output_shape(shape)); a NonlinearLayer returns y and log|det J(x)| (B,)"""

    @abstractmethod
    def inverse(self, y):
        """The x that forward maps to y.   y (B, *output_shape(shape)) -> x (B, *shape)"""

    def output_shape(self, shape):
        """The shape of one event that leaves the layer. Raises for a `shape` that would broadcast."""
        return shape

    def initialize(self, x):
        """Data-dependent start from the batch x (B, *shape) that reaches the layer. By default, nothing happens."""


class LinearLayer(Layer):
    """An affine transformation, i ∈ S_l: forward(x) -> y."""

    @abstractmethod
    def log_abs_det(self, shape):
        """log|det J|, the same for every x. For an image it depends on the size, so it takes `shape`.   -> ()"""


class NonlinearLayer(Layer):
    """Any other transformation, i ∈ S_n: forward(x) -> (y, log|det J(x)| (B,))."""

    cost = "O(D)"


# ---- Linear layers: log|det J| does not depend on x and belongs to log Z ---------------------------------------------

class FullyConnected(LinearLayer):
    """y = W x + b with an unconstrained D × D matrix. x is an event of any shape with D elements.

    log|det J| = log|det W|, O(D³).   x (B, …) -> y (B, …)

    W starts at diagonal · I, each element of b at `bias`. `inverse` raises torch.linalg.LinAlgError if W is singular.

        >>> layer = FullyConnected(3)
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-6)
        True
    """

    cost = "O(D³)"

    def __init__(self, dim, diagonal=1.0, bias=0.0):
        super().__init__()
        self.weight = nn.Parameter(diagonal * torch.eye(dim))
        self.bias = nn.Parameter(torch.full((dim,), float(bias)))

    def forward(self, x):
        return F.linear(x.flatten(1), self.weight, self.bias).view_as(x)

    def inverse(self, y):
        x = torch.linalg.solve(self.weight.T, y.flatten(1) - self.bias, left=False)  # x Wᵀ = y - b
        return x.view_as(y)

    def log_abs_det(self, shape):
        return torch.linalg.slogdet(precise(self.weight)).logabsdet


class Convolution(LinearLayer):
    """y = w * x + b: a k × k convolution with zero padding. The image keeps its size.

    A convolution is a product with a D × D matrix M, D = C·H·W. So log|det J| = log|det M|, and the inverse solves a
    linear system with M. Both are exact.   x (B, C, H, W) -> y (B, C, H, W)

    ours: with one channel, the rows of the image become the channels of a one-dimensional convolution. This takes H/k
    times as many operations, but a CPU convolves a single channel slowly.

    w starts at diagonal · identity, each element of b at `bias`. Raises ValueError if k is even, and `inverse` raises
    torch.linalg.LinAlgError if M is singular.
    """

    cost = "O(k²CD²)"  # H/r blocks, each (rCW)³, with r = k/2 and H ≈ W

    def __init__(self, channels, kernel_size, diagonal=1.0, bias=0.0):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd to keep the image's size, not {kernel_size}")
        weight = torch.zeros(channels, channels, kernel_size, kernel_size)
        weight[:, :, kernel_size // 2, kernel_size // 2] = diagonal * torch.eye(channels)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.full((channels,), float(bias)))

    def forward(self, x):
        if len(self.bias) > 1:
            return F.conv2d(x, self.weight, self.bias, padding="same")
        H, k = x.shape[2], self.weight.shape[-1]
        rows = (shifts(H, k, self.weight)[..., None] * self.weight[0, 0, :, None, None]).sum(0)  # (H, H, k)
        return F.conv1d(x.squeeze(1), rows, self.bias.expand(H), padding="same")[:, None]

    def matrix(self, shape, dtype):
        """M of vec(w * x) = M vec(x): M[(o, i, j), (c, i + a, j + b)] = w[o, c, a, b], |a|, |b| < k/2.   -> (D, D)"""
        weight, k = self.weight.to(dtype), self.weight.shape[-1]
        rows, columns = shifts(shape[1], k, weight), shifts(shape[2], k, weight)
        return torch.einsum("ocab,aik,bjl->oijckl", weight, rows, columns).reshape(2 * [math.prod(shape)])

    def inverse(self, y):
        M = self.matrix(y.shape[1:], y.dtype)
        x = torch.linalg.solve(M.T, (y - along_channels(self.bias, y)).flatten(1), left=False)
        return x.view_as(y)

    def log_abs_det(self, shape):
        """log|det M| by block elimination, O(k²CD²).   -> ()

        ours: a block is r = ⌊k/2⌋ rows of pixels. The kernel reaches no further than the next block:

            M = ⎡A U    ⎤     log|det M| = Σ log|det S_i|,   S_1 = A,   S_{i+1} = A - L S_i⁻¹ U
                ⎢L A U  ⎥
                ⎣  L A …⎦     (the last block may have fewer rows)

        nan if a block S_i before the last one is singular, which M need not be; -inf if the last one is, as M then is.
        """
        C, H, W = shape
        r, dtype = max(self.weight.shape[-1] // 2, 1), precise(self.weight).dtype
        M = self.matrix((C, 2 * r, W), dtype).view(C, 2, r, W, C, 2, r, W)  # of two blocks
        (A, U), (L, _) = M.permute(1, 5, 2, 0, 3, 6, 4, 7).reshape(2, 2, r * C * W, r * C * W)  # block row, column
        S = A[:C * W * min(r, H), :C * W * min(r, H)]
        log_abs_det = torch.linalg.slogdet(S).logabsdet
        for first in range(r, H, r):
            n = C * W * min(r, H - first)
            S = A[:n, :n] - L[:n] @ torch.linalg.solve_ex(S, U[:, :n]).result
            log_abs_det = log_abs_det + torch.linalg.slogdet(S).logabsdet
        return log_abs_det


class Conv1x1(LinearLayer):
    """y[:, :, i, j] = W x[:, :, i, j]: one C × C matrix for all pixels. W starts as a random orthogonal matrix.

    log|det J| = H·W·log|det W|, O(C³).   x (B, C, H, W) -> y (B, C, H, W)
    `inverse` raises torch.linalg.LinAlgError if W is singular. Source: Kingma and Dhariwal, "Glow" (2018).
    """

    cost = "O(C³)"

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(channels, channels)))

    def forward(self, x):
        return F.conv2d(x, self.weight[:, :, None, None])

    def inverse(self, y):
        return torch.linalg.solve(self.weight, y.flatten(2)).view_as(y)

    def log_abs_det(self, shape):
        return math.prod(shape[1:]) * torch.linalg.slogdet(precise(self.weight)).logabsdet


class ActNorm(LinearLayer):
    """y = exp(s) ⊙ x + b, with one s and one b per channel (dimension 1 of the batch).

    log|det J| = H·W·Σ s, O(C).   x (B, C, …) -> y (B, C, …).   Source: Kingma and Dhariwal, "Glow" (2018).
    """

    cost = "O(C)"

    def __init__(self, channels):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    @torch.no_grad()
    def initialize(self, x, fraction=1.0):
        """Moves s and b this fraction of the way to the values at which the batch x comes out with mean 0, variance 1.

        Glow does this once, with fraction 1. ours: a smaller fraction every few steps tracks the moments of x.
        """
        x = x.transpose(0, 1).flatten(1)  # (C, n)
        std, mean = torch.std_mean(x, dim=1)  # (C,)
        self.log_scale.lerp_(-std.log(), fraction)
        self.bias.lerp_(-mean / std, fraction)

    def forward(self, x):
        return along_channels(self.log_scale.exp(), x) * x + along_channels(self.bias, x)

    def inverse(self, y):
        return (y - along_channels(self.bias, y)) * along_channels((-self.log_scale).exp(), y)

    def log_abs_det(self, shape):
        return math.prod(shape[1:]) * self.log_scale.double().expand(shape[0]).sum()


class Squeeze(LinearLayer):
    """Each 2 × 2 square of pixels becomes four channels; log|det J| = 0.   x (B, C, H, W) -> y (B, 4C, H/2, W/2)"""

    cost = "0"

    def output_shape(self, shape):
        if len(shape) != 3 or shape[1] % 2 or shape[2] % 2:
            raise ValueError(f"cannot squeeze events of shape {tuple(shape)}: it takes (C, H, W) with even H, W")
        return (4 * shape[0], shape[1] // 2, shape[2] // 2)

    def forward(self, x):
        return F.pixel_unshuffle(x, 2)

    def inverse(self, y):
        return F.pixel_shuffle(y, 2)

    def log_abs_det(self, shape):
        return torch.zeros((), dtype=torch.float64)


class Standardize(LinearLayer):
    """y = (x - mean) / std with constants: numbers, or tensors that broadcast to the event.

    log|det J| = -Σ log std over the event, O(D).   x (B, …) -> y (B, …).   Raises ValueError unless 0 < std < ∞.
    """

    cost = "O(D)"

    def __init__(self, std, mean=0.0):
        super().__init__()
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.get_default_dtype()))
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.get_default_dtype()))
        if not ((self.std > 0) & (self.std < torch.inf)).all():
            raise ValueError("std must be positive and finite")

    def output_shape(self, shape):
        self.mean.expand(shape), self.std.expand(shape)  # raises where they would broadcast with the batch
        return shape

    def forward(self, x):
        return (x - self.mean) / self.std

    def inverse(self, y):
        return y * self.std + self.mean

    def log_abs_det(self, shape):
        return -self.std.double().log().expand(shape).sum()


def along_channels(p, x):
    """One number per channel, in a shape that broadcasts with x (B, C, …).   (C,) -> (C, 1, …)"""
    return p.expand(x.shape[1]).view(-1, *[1] * (x.dim() - 2))  # expand refuses another number of channels than C or 1


def shifts(n, k, like):
    """One n × n matrix for each offset a of a kernel of size k, with a 1 at (i, i + a).   -> (k, n, n)"""
    position, offset = torch.arange(n, device=like.device), torch.arange(k, device=like.device) - k // 2
    return (position == position[:, None] + offset[:, None, None]).to(like)


def precise(weight):
    """The weight in float64 to evaluate, in float32 (or its own, longer dtype) where a gradient is taken.

    ours: a step of maximum likelihood is then faster. Its gradient differs by 1e-8 times the weight's condition number.
    """
    differentiated = torch.is_grad_enabled() and weight.requires_grad
    return weight.to(torch.promote_types(weight.dtype, torch.float32 if differentiated else torch.float64))


# ---- Non-linear layers: log|det J| may depend on x and belongs to the energy E ---------------------------------------

class SmoothLeakyReLU(NonlinearLayer):
    """y = α x + (1 - α) softplus(x) for each element, the paper's activation; `residual` adds x, as in its CNN.

    dy/dx = α + (1 - α) sigmoid(x), plus 1 if residual, is positive: the map is invertible.   x (B, …) -> y (B, …), (B,)
    Raises ValueError unless 0.01 ≤ α < 1.

    ours: with a number for `bend`, y = α x + (1 - α) (softplus(x + bend) - softplus(bend)). The curve bends at -bend
    and passes through the origin. Biases before and after it could do the same. But here the mean of y stays near 0,
    so a step on the next weight does not shift all of that layer's outputs together.
    """

    def __init__(self, alpha=0.3, residual=False, bend=None):
        super().__init__()
        if not 0.01 <= alpha < 1:
            raise ValueError(f"alpha must lie in [0.01, 1), not {alpha}")
        self.slope, self.rise = alpha + residual, 1 - alpha  # y = slope · x + rise · softplus(x + shift) - offset
        self.shift, self.offset = 0.0, 0.0
        if bend is not None:
            self.shift = float(bend)
            self.offset = self.rise * F.softplus(torch.tensor(self.shift).double(), threshold=40).item()

    def forward(self, x):  # above its threshold F.softplus(x) returns x; the default of 20 is too low for float64
        y = self.slope * x + self.rise * F.softplus(x + self.shift, threshold=40) - self.offset
        log_slope = torch.log(self.slope + self.rise * torch.sigmoid(x + self.shift))
        return y, log_slope.flatten(1).sum(1)

    def inverse(self, y):
        """Newton's method for slope · h + rise · softplus(h) = y + offset + slope · shift, where h = x + shift.

        The left side is increasing and convex, and max(0, h) ≤ softplus(h) ≤ max(0, h) + ln 2. The roots with these two
        bounds in place of softplus bracket the root. From the upper end of the bracket, Newton's iterates decrease to
        the root, to the precision of the dtype. The clamp keeps rounding errors in the bracket.
        """
        def inverse_bound(y):  # of slope · h + rise · max(0, h)
            return torch.where(y > 0, y / (self.slope + self.rise), y / self.slope)

        y = y + self.offset + self.slope * self.shift
        low, high = inverse_bound(y - self.rise * math.log(2)), inverse_bound(y)
        h = high
        for _ in range(10):  # converges quadratically: in float64 6 steps at α = 0.3, 10 at α = 0.01
            f = self.slope * h + self.rise * F.softplus(h, threshold=40)
            h = (h - (f - y) / (self.slope + self.rise * torch.sigmoid(h))).clamp(low, high)
        return h - self.shift


class AffineCoupling(NonlinearLayer):
    """Scales and shifts one half of the channels, x_b, by a function of the other half, x_a.

        h, t = network(x_a)      s = floor + (1 - floor) sigmoid(h + 2),      with `tanh` s = exp(2 tanh(h / 2))
        y_a = x_a                y_b = s ⊙ x_b + t                            log|det J| = Σ log s

    `network` maps (B, C_a, …) to (B, 2 C_b, …); another output raises. x_a is the first half of torch.tensor_split,
    with `swap` the second. `tanh` is the scale of the paper's Glow.   x (B, C, …) -> y (B, C, …), (B,)

    ours: the sigmoid, since s < 1 keeps the score from blowing up (a linear layer can undo the shrinking), and the
    `floor` under s. The inverse divides by s, but score matching does not constrain s away from the data.

    Raises ValueError unless `floor` is 0, or in [0.001, 1) without `tanh`.
    Source: Dinh et al., "RealNVP" (2017); Glow (2018) for the sigmoid.
    """

    def __init__(self, network, swap=False, floor=0.0, tanh=False):
        super().__init__()
        if not (floor == 0 or 1e-3 <= floor < 1 and not tanh):  # below 0.001, (log s)'' fails in float32
            raise ValueError(f"the floor must be 0, or in [0.001, 1) with sigmoid couplings, not {floor}")
        self.network, self.swap, self.floor, self.tanh = network, swap, floor, tanh

    def _split(self, x):
        halves = x.tensor_split(2, dim=1)
        return halves[::-1] if self.swap else halves

    def _join(self, a, b):
        return torch.cat([b, a] if self.swap else [a, b], dim=1)

    def _log_scale_and_shift(self, x_a, x_b):
        h, t = self.network(x_a).reshape(len(x_b), 2, *x_b.shape[1:]).unbind(1)  # refuses what would broadcast
        if self.tanh:
            return 2 * torch.tanh(h / 2), t
        if self.floor == 0:
            return F.logsigmoid(h + 2), t  # finite even where s underflows
        return torch.log(self.floor + (1 - self.floor) * torch.sigmoid(h + 2)), t

    def forward(self, x):
        x_a, x_b = self._split(x)
        log_s, t = self._log_scale_and_shift(x_a, x_b)
        return self._join(x_a, log_s.exp() * x_b + t), log_s.flatten(1).sum(1)

    def inverse(self, y):
        y_a, y_b = self._split(y)
        log_s, t = self._log_scale_and_shift(y_a, y_b)
        return self._join(y_a, (y_b - t) * (-log_s).exp())


class Logit(NonlinearLayer):
    """z = logit(y), y = (x + ε)(1 - 2ε), for x in [0, 1]. ε keeps y away from 0 and 1, where the slope diverges.

    log|dz/dx| = log(1 - 2ε) - log y - log(1 - y)      x (B, …) -> z (B, …), (B,)

    ours: x is clamped to [0, 1]. Without MaP, the noise of ssm and dsm, and the ε of fdssm, can move it outside.
    """

    eps = 1e-6

    def forward(self, x):
        y = (x.clamp(0, 1) + self.eps) * (1 - 2 * self.eps)
        log_y, log_1my = torch.log(y), torch.log1p(-y)
        log_slope = math.log1p(-2 * self.eps) - log_y - log_1my
        return log_y - log_1my, log_slope.flatten(1).sum(1)

    def inverse(self, z):
        return torch.sigmoid(z) / (1 - 2 * self.eps) - self.eps


# ---- A layer of either kind on the first channels only ---------------------------------------------------------------

class Part(Layer):
    """`layer` on the first channels. The others pass to the prior: Glow's multi-scale architecture.

    x (B, C, H, W) -> y (B, C, H, W), and log|det J| (B,) if `layer` is non-linear. A later squeeze keeps the first
    channels first: channel c becomes the channels 4c … 4c + 3.
    """

    def __init__(self, layer, channels):
        super().__init__()
        self.layer, self.channels, self.cost = layer, channels, layer.cost

    def output_shape(self, shape):
        self.layer.output_shape((self.channels, *shape[1:]))
        return shape

    def inverse(self, y):
        return torch.cat([self.layer.inverse(y[:, :self.channels]), y[:, self.channels:]], dim=1)


class LinearPart(Part, LinearLayer):
    def initialize(self, x):
        self.layer.initialize(x[:, :self.channels])

    def forward(self, x):
        return torch.cat([self.layer(x[:, :self.channels]), x[:, self.channels:]], dim=1)

    def log_abs_det(self, shape):
        return self.layer.log_abs_det((self.channels, *shape[1:]))


class NonlinearPart(Part, NonlinearLayer):
    def forward(self, x):
        y, log_abs_det = self.layer(x[:, :self.channels])
        return torch.cat([y, x[:, self.channels:]], dim=1), log_abs_det


# ---- For a layer of one's own ----------------------------------------------------------------------------------------

def verify(layer, shape, x=None):
    """Checks that a layer's log-determinant is that of its Jacobian, and that its inverse undoes it, in float64.

    A copy is tried, with all parameters moved at random, at events x (n, *shape) inside its domain, by default three
    normal ones. Raises ValueError, which names what failed and by how much.
    """
    layer, linear, D = copy.deepcopy(layer).double(), isinstance(layer, LinearLayer), math.prod(shape)
    output = layer if linear else lambda x: layer(x)[0]
    x = torch.randn(3, *shape, dtype=torch.float64) if x is None else x.double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
        y, found = (layer(x), layer.log_abs_det(shape)) if linear else layer(x)
        alone = torch.cat([output(event[None]) for event in x])
        J = torch.stack([torch.func.jacrev(output)(event[None]).reshape(D, D) for event in x])
        for what, found, expected in (
                ("log|det J| differs from that of the Jacobian", found.view(() if linear else len(x)),
                 torch.linalg.slogdet(J).logabsdet),
                ("the output depends on the rest of the batch", y, alone), ("inverse misses x", layer.inverse(y), x)):
            if not (size := (found - expected).abs().max()) < 1e-6:
                raise ValueError(f"{type(layer).__name__}: {what} by up to {size:.3g}")
