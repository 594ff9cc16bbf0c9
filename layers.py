"""The transformations g_i of a flow, each with its inverse and its log-determinant.

A normalizing flow maps a datum x to u = g_L ∘ … ∘ g_1(x). EBFlow sorts the layers into two kinds, and
here the kind is the type:

    LinearLayer      forward(x) -> y                    affine in x, so its Jacobian holds no x;
                     log_abs_det(shape) -> ()           its log-determinant belongs to log Z
    NonlinearLayer   forward(x) -> y, log_abs_det (B,)  its log-determinant belongs to the energy E

Both have inverse(y) -> x. `shape` is the event shape that enters the layer, without the batch dimension:
the determinant of a convolution depends on the size of the image. Determinants of matrices are computed in
float64 whatever the layer's dtype, since the product of many pivots is what float32 is worst at.

Source: Chao et al., "Training Energy-Based Normalizing Flow with Score-Matching Objectives" (NeurIPS 2023),
section "Energy-Based Normalizing Flow".
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class LinearLayer(nn.Module):
    """An affine transformation: i ∈ S_l. A layer's `cost` is what its log-determinant costs."""

    def output_shape(self, shape):
        return shape

    def initialize(self, x):
        """A data-dependent start, from the batch that reaches the layer; most have none."""


class NonlinearLayer(nn.Module):
    """Any other transformation: i ∈ S_n."""

    cost = "O(D)"

    def output_shape(self, shape):
        return shape


# ---------------------------------------------------------------------------------------------------------
# Linear layers: log|det| is a constant and goes to log Z
# ---------------------------------------------------------------------------------------------------------


class FullyConnected(LinearLayer):
    """y = W x + b with an unconstrained D × D matrix, started at W = diagonal · I; x is any event of D elements.

    log|det J| = log|det W|, O(D³).   x (B, …) -> y (B, …)

    `inverse` raises torch.linalg.LinAlgError where W is singular.

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

    def output_shape(self, shape):
        if math.prod(shape) != len(self.bias):
            raise ValueError(f"a fully-connected layer of {len(self.bias)} dimensions cannot take events of "
                             f"shape {tuple(shape)}: give the layer their number of elements")
        return shape

    def forward(self, x):
        return F.linear(x.flatten(1), self.weight, self.bias).view_as(x)

    def inverse(self, y):
        x = torch.linalg.solve(self.weight.T, y.flatten(1) - self.bias, left=False)  # x Wᵀ = y - b
        return x.view_as(y)

    def log_abs_det(self, shape):
        return torch.linalg.slogdet(self.weight.double()).logabsdet


class Convolution(LinearLayer):
    """y = w * x + b: a k × k convolution (k odd), zero padding, the image keeps its size.

    A zero-padded convolution is a D × D matrix M with D = C·H·W: log|det J| = log|det M|, and the inverse solves
    with M. Nothing is approximated.   x (B, C, H, W) -> y (B, C, H, W)

    The kernel starts at diagonal · identity. `inverse` raises torch.linalg.LinAlgError where M is singular.

    On a small image `forward` multiplies by M, too: with few channels a step of score matching then takes two thirds of
    the time on a CPU, since the derivatives of a product are products.
    """

    cost = "O(k²CD²)"  # H/r blocks of (rCW)³, r = k/2, H ≈ W
    dense = 1024  # the largest D whose M is multiplied by; beyond it M costs more than it saves
    ranks = (3,)  # of the event

    def __init__(self, channels, kernel_size, diagonal=1.0, bias=0.0):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd to keep the image's size, not {kernel_size}")
        weight = torch.zeros(channels, channels, kernel_size, kernel_size)
        weight[:, :, kernel_size // 2, kernel_size // 2] = diagonal * torch.eye(channels)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.full((channels,), float(bias)))

    def output_shape(self, shape):
        return check_channels(self, shape, len(self.bias))

    def forward(self, x):
        if x[0].numel() > self.dense:
            return F.conv2d(x, self.weight, self.bias, padding="same")
        y = F.linear(x.flatten(1), self.matrix(x.shape[1:], x.dtype)).view_as(x)
        return y + along_channels(self.bias, x)

    def matrix(self, shape, dtype):
        """M of vec(w * x) = M vec(x): M[(o, i, j), (c, i + a, j + b)] = w[o, c, a, b], offsets a, b.   -> (D, D)"""
        weight = self.weight.to(dtype)
        rows, columns = (shifts(n, weight.shape[-1], weight) for n in shape[1:])
        return torch.einsum("ocab,aik,bjl->oijckl", weight, rows, columns).reshape(2 * [math.prod(shape)])

    def inverse(self, y):
        M = self.matrix(y.shape[1:], y.dtype)
        x = torch.linalg.solve(M.T, (y - along_channels(self.bias, y)).flatten(1), left=False)
        return x.view_as(y)

    def log_abs_det(self, shape):
        """O(k²CD²), by elimination of r = ⌊k/2⌋ rows of pixels at a time, which reach no further than the next r rows:

            M = ⎡A U    ⎤     log|det M| = Σ log|det S_i|,   S_1 = A,   S_{i+1} = A - L S_i⁻¹ U
                ⎢L A U  ⎥
                ⎣  L A …⎦     (the last block may have fewer rows)

        Pivots are sought within a block. Should M of the image's first i·r rows alone be singular, the whole M is taken
        (but not by what is compiled: there the result is not finite).
        """
        C, H, W = shape
        r = max(self.weight.shape[-1] // 2, 1)
        M = self.matrix((C, 2 * r, W), torch.float64).view(C, 2, r, W, C, 2, r, W)
        (A, U), (L, _) = M.permute(1, 5, 2, 0, 3, 6, 4, 7).reshape(2, 2, r * C * W, r * C * W)
        S = A[:C * W * min(r, H), :C * W * min(r, H)]
        log_abs_det = torch.linalg.slogdet(S).logabsdet
        for first in range(r, H, r):
            n = C * W * min(r, H - first)
            S = A[:n, :n] - L[:n] @ torch.linalg.solve_ex(S, U[:, :n]).result
            log_abs_det = log_abs_det + torch.linalg.slogdet(S).logabsdet
        if known_not_finite(log_abs_det):
            return torch.linalg.slogdet(self.matrix(shape, torch.float64)).logabsdet
        return log_abs_det


class Conv1x1(LinearLayer):
    """y[:, :, i, j] = W x[:, :, i, j]: one C × C matrix for every pixel, started at a random rotation.

    log|det J| = H·W·log|det W|, O(C³).   x (B, C, H, W) -> y (B, C, H, W)
    Source: Kingma and Dhariwal, "Glow" (2018).
    """

    cost = "O(C³)"
    ranks = (3,)  # of the event

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(channels, channels)))

    def output_shape(self, shape):
        return check_channels(self, shape, len(self.weight))

    def forward(self, x):
        return F.conv2d(x, self.weight[:, :, None, None])

    def inverse(self, y):
        return torch.linalg.solve(self.weight, y.flatten(2)).view_as(y)

    def log_abs_det(self, shape):
        return math.prod(shape[1:]) * torch.linalg.slogdet(self.weight.double()).logabsdet


class ActNorm(LinearLayer):
    """y = exp(s) ⊙ x + b with one scale and one bias per channel (dimension 1 of the batch).

    log|det J| = H·W·Σ s, O(C).   x (B, C, …) -> y (B, C, …)

    `initialize` sets s and b so that a batch comes out with mean 0 and variance 1 (data-dependent start), or takes
    the fraction `momentum` of the way there, to follow the moments through training as batch normalisation does.
    It raises ValueError where a channel of the batch is constant. Source: Kingma and Dhariwal, "Glow" (2018).
    """

    cost = "O(C)"
    ranks = (1, 2, 3)

    def __init__(self, channels):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def output_shape(self, shape):
        return check_channels(self, shape, len(self.bias))

    @torch.no_grad()
    def initialize(self, x, momentum=1.0):
        x = x.transpose(0, 1).flatten(1)  # (C, n)
        if x.shape[1] == 1 or (x == x[:, :1]).all(1).any():
            raise ValueError("actnorm cannot start from a batch with a constant channel: give it more samples")
        std, mean = torch.std_mean(x, dim=1)  # (C,)
        self.log_scale.lerp_(-std.log(), momentum)
        self.bias.lerp_(-mean / std, momentum)

    def forward(self, x):
        return along_channels(self.log_scale.exp(), x) * x + along_channels(self.bias, x)

    def inverse(self, y):
        return (y - along_channels(self.bias, y)) * along_channels((-self.log_scale).exp(), y)

    def log_abs_det(self, shape):
        return math.prod(shape[1:]) * self.log_scale.double().sum()


class Squeeze(LinearLayer):
    """Every 2 × 2 square of pixels becomes four channels: a permutation, log|det J| = 0.

    x (B, C, H, W) -> y (B, 4C, H/2, W/2)
    """

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
    """y = (x - mean) / std with constants, numbers or tensors that broadcast to the event.

    log|det J| = -Σ log std over the D elements of the event.
    """

    cost = "O(D)"

    def __init__(self, std, mean=0.0):
        super().__init__()
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.get_default_dtype()))
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.get_default_dtype()))
        if not (self.std > 0).all():
            raise ValueError("std must be positive")

    def forward(self, x):
        return (x - self.mean) / self.std

    def inverse(self, y):
        return y * self.std + self.mean

    def log_abs_det(self, shape):
        return -self.std.double().log().expand(shape).sum()


# ---------------------------------------------------------------------------------------------------------
# Non-linear layers: log|det| depends on x and goes to the energy E
# ---------------------------------------------------------------------------------------------------------


class SmoothLeakyReLU(NonlinearLayer):
    """y = α x + (1 - α) softplus(x), element by element, the paper's activation; `residual` adds x (its CNN).

    dy/dx = α + (1 - α) sigmoid(x) lies in (α, 1), so the map is invertible.   x (B, …) -> y, (B,)

    With a number for `bend`, the bend moves from 0 to -bend and the curve passes through the origin:
    y = α x + (1 - α) (softplus(x + bend) - softplus(bend)). The biases beside it could do the same; but what
    comes out has a mean near 0, and a step on the next weight does not shift all of its outputs together.
    Raises ValueError unless 0.01 ≤ α < 1.
    """

    def __init__(self, alpha=0.3, residual=False, bend=None):
        super().__init__()
        if not 0.01 <= alpha < 1:
            raise ValueError(f"alpha must lie in [0.01, 1), not {alpha}")
        self.slope, self.rise = alpha + residual, 1 - alpha  # y = slope · x + rise · softplus(x + shift) - offset
        self.shift = 0.0 if bend is None else float(bend)
        self.offset = 0.0 if bend is None else self.rise * float(softplus(torch.tensor(self.shift).double()))

    def forward(self, x):
        y = self.slope * x + self.rise * softplus(x + self.shift) - self.offset
        log_slope = torch.log(self.slope + self.rise * torch.sigmoid(x + self.shift))
        return y, log_slope.flatten(1).sum(1)

    def inverse(self, y):
        """Newton's iteration, to the dtype's precision, from a side where it cannot overshoot.

        f(h) = slope · h + rise · softplus(h), h = x + shift, is convex and increasing, and max(0, h) ≤ softplus(h)
        ≤ max(0, h) + ln 2 brackets its root between the inverses of two piecewise linear bounds. Started at the
        upper one, where f(h) ≥ y, every step of Newton on a convex increasing f ends at or above the root, so
        the iterates descend on it; the clamp keeps them in the bracket under rounding.
        """
        def inverse_bound(y):  # of slope · h + rise · max(0, h)
            return torch.where(y > 0, y / (self.slope + self.rise), y / self.slope)

        y = y + self.offset + self.slope * self.shift
        low, high = inverse_bound(y - self.rise * math.log(2)), inverse_bound(y)
        h = high
        for _ in range(10):  # quadratic: float64 takes 6 at α = 0.3, 10 at 0.01
            f = self.slope * h + self.rise * softplus(h)
            h = (h - (f - y) / (self.slope + self.rise * torch.sigmoid(h))).clamp(low, high)
        return h - self.shift


class AffineCoupling(NonlinearLayer):
    """Half of the channels, x_a, decides how the other half is scaled and shifted.

        h, t = network(x_a)      s = floor + (1 - floor) sigmoid(h + 2)
        y_a = x_a                y_b = s ⊙ x_b + t                log|det J| = Σ log s

    `network` maps (B, C_a, …) to (B, 2 C_b, …), the halves being those of `tensor_split`; `swap` lets the
    second half decide. s < 1 keeps the score from blowing up; a linear layer can undo it. The inverse divides by s, and
    score matching does not see what s is where no data are: a `floor` keeps that division from exploding.
    x (B, C, …) -> y (B, C, …), (B,). Raises ValueError where `floor` is neither 0 nor in [0.001, 1).
    Source: Dinh et al., "RealNVP" (2017); Kingma and Dhariwal (2018); the floor is ours.
    """

    def __init__(self, network, swap=False, floor=0.0):
        super().__init__()
        if not (floor == 0 or 1e-3 <= floor < 1):  # below that, float32 has no second derivative of log s
            raise ValueError(f"the floor must be 0 or lie in [0.001, 1), not {floor}")
        self.network = network
        self.swap = swap
        self.floor = floor

    def output_shape(self, shape):
        if len(shape) == 0 or shape[0] < 2:
            raise ValueError(f"AffineCoupling needs two channels to split, not events of shape {tuple(shape)}")
        return shape

    def _split(self, x):
        halves = x.tensor_split(2, dim=1)
        return halves[::-1] if self.swap else halves

    def _join(self, a, b):
        return torch.cat([b, a] if self.swap else [a, b], dim=1)

    def _log_scale_and_shift(self, x_a):
        h, t = self.network(x_a).chunk(2, dim=1)
        if self.floor == 0:
            return F.logsigmoid(h + 2), t  # where s itself underflows, too
        return torch.log(self.floor + (1 - self.floor) * torch.sigmoid(h + 2)), t

    def forward(self, x):
        x_a, x_b = self._split(x)
        log_s, t = self._log_scale_and_shift(x_a)
        return self._join(x_a, log_s.exp() * x_b + t), log_s.flatten(1).sum(1)

    def inverse(self, y):
        y_a, y_b = self._split(y)
        log_s, t = self._log_scale_and_shift(y_a)
        return self._join(y_a, (y_b - t) * (-log_s).exp())


class Logit(NonlinearLayer):
    """z = logit(y), y = (x + ε)(1 - 2ε), for x in [0, 1]: ε keeps y off the ends, where the slope diverges.

    An x outside, where dsm and fdssm may put it without MaP, counts as the end next to it.

    log|dz/dx| = log(1 - 2ε) - log y - log(1 - y)      x (B, …) -> z (B, …), (B,)
    """

    def __init__(self, eps=1e-6):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        y = (x.clamp(0, 1) + self.eps) * (1 - 2 * self.eps)
        log_y, log_1my = torch.log(y), torch.log1p(-y)
        log_slope = math.log1p(-2 * self.eps) - log_y - log_1my
        return log_y - log_1my, log_slope.flatten(1).sum(1)

    def inverse(self, z):
        return torch.sigmoid(z) / (1 - 2 * self.eps) - self.eps


# ---------------------------------------------------------------------------------------------------------
# Either kind, on some of the channels
# ---------------------------------------------------------------------------------------------------------


class Part:
    """A layer on the first channels; the others pass, split off to the prior (Glow's multi-scale architecture).

    A later squeeze moves both parts, each within itself, so that the first half of the channels stays the first half.
    x (B, C, H, W) -> y (B, C, H, W), and (B,) if the layer is a non-linear one
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


# ---------------------------------------------------------------------------------------------------------


def softplus(x):
    """log(1 + eˣ). torch's default is x itself above 20, which is 2e-9 too little for float64."""
    return F.softplus(x, threshold=40)


def along_channels(p, x):
    """One number per channel, shaped to broadcast over x.   (C,) -> (C, 1, …)"""
    return p.view(-1, *[1] * (x.dim() - 2))


def known_not_finite(number):
    """Whether a number is infinite or nan. On device meta, and while compiled, nobody can look: not known, so False."""
    return not (number.is_meta or torch.compiler.is_compiling() or number.isfinite())


def shifts(n, k, like):
    """One n × n matrix for each offset a of a kernel of size k: its row i reads position i + a.   -> (k, n, n)"""
    position, offset = torch.arange(n, device=like.device), torch.arange(k, device=like.device) - k // 2
    return (position == position[:, None] + offset[:, None, None]).to(like)


def check_channels(layer, shape, channels):
    """The shape itself. Raises ValueError where the layer cannot take it."""
    if len(shape) not in layer.ranks or shape[0] != channels:
        raise ValueError(f"{type(layer).__name__} of {channels} channels cannot take events of shape {tuple(shape)}")
    return shape
