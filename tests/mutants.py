"""Changes of the code that a test must see, and a runner that tries each of them. pytest does not collect this file.

    python tests/mutants.py              # all, about a quarter of an hour on two cores
    python tests/mutants.py layers.py    # those whose file, text or tests contain the word

A change is a file, a text that occurs in it once, what replaces it, and the tests that should see it: the name of a
test file, and after it an expression for pytest's -k. Each is made in a copy of the tree. It is seen where the tests
fail. Before, the same tests must pass on the unchanged copy. The exit status is 1 where a change survives, cannot be
tried, or makes its tests take longer than LIMIT.

EQUIVALENT lists changes that no test can see, each with the reason. They are not tried.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a fork keeps no other thread
signal.signal(signal.SIGTERM, signal.default_int_handler)

import matplotlib.figure  # noqa: E402, F401  what the tests import, once for all
import pytest  # noqa: E402
import torch.distributed  # noqa: E402, F401

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600  # seconds for the tests of one change

CHANGES = [
    # ---- layers.py
    ("layers.py", "diagonal * torch.eye(dim))", "torch.eye(dim))", "layers start_at"),
    ("layers.py", "F.linear(x.flatten(1), self.weight, self.bias).view_as(x)",
     "F.linear(x.flatten(1), self.weight).view_as(x)", "gradients undoes"),
    ("layers.py", "y.flatten(1) - self.bias, left=False)", "y.flatten(1), left=False)", "gradients undoes"),
    ("layers.py", "solve(self.weight.T, y", "solve(self.weight, y", "gradients undoes"),
    ("layers.py", "return torch.linalg.slogdet(precise(self.weight)).logabsdet\n\n\nclass Convolution",
     "return torch.linalg.slogdet(self.weight).logabsdet\n\n\nclass Convolution", "layers determinants"),
    ("layers.py", "position[:, None] + offset[:, None, None]", "position[:, None] - offset[:, None, None]",
     "layers product"),
    ("layers.py", '"ocab,aik,bjl->oijckl"', '"ocab,bik,ajl->oijckl"', "layers product"),
    ("layers.py", "self.weight[0, 0, :, None, None]", "self.weight[0, 0].T[:, None, None]", "layers product"),
    ("layers.py", "rows, self.bias.expand(H)", "rows, None", "layers product"),
    ("layers.py", 'self.weight, self.bias, padding="same")', 'self.weight, padding="same")', "layers product"),
    ("layers.py", "(y - along_channels(self.bias, y)).flatten(1)", "y.flatten(1)", "gradients undoes"),
    ("layers.py", "r, dtype = max(self.weight.shape[-1] // 2, 1)", "r, dtype = max(self.weight.shape[-1] // 2 - 1, 1)",
     "layers elimination"),
    ("layers.py", "S = A[:C * W * min(r, H), :C * W * min(r, H)]", "S = A", "layers elimination"),
    ("layers.py", "n = C * W * min(r, H - first)", "n = C * W * r", "layers elimination"),
    ("layers.py", "S = A[:n, :n] - L[:n] @", "S = A[:n, :n] + L[:n] @", "layers elimination"),
    ("layers.py", "torch.linalg.solve_ex(S, U[:, :n]).result", "torch.linalg.pinv(S) @ U[:, :n]", "layers first_rows"),
    ("layers.py", "1), precise(self.weight).dtype", "1), self.weight.dtype", "layers determinants"),
    ("layers.py", "math.prod(shape[1:]) * torch.linalg.slogdet(precise(self.weight))",
     "torch.linalg.slogdet(precise(self.weight))", "gradients constant"),
    ("layers.py", "math.prod(shape[1:]) * torch.linalg.slogdet(precise(self.weight))",
     "math.prod(shape[1:]) * torch.linalg.slogdet(self.weight)", "layers determinants"),
    ("layers.py", "nn.init.orthogonal_(torch.empty(channels, channels))", "torch.randn(channels, channels)",
     "layers glow"),
    ("layers.py", "return torch.linalg.solve(self.weight, y.flatten(2))",
     "return torch.linalg.solve(self.weight.T, y.flatten(2))", "gradients undoes"),
    ("layers.py", "self.log_scale.lerp_(-std.log(), fraction)", "self.log_scale.copy_(-std.log())", "layers actnorm"),
    ("layers.py", "self.bias.lerp_(-mean / std, fraction)", "self.bias.lerp_(-mean, fraction)", "layers actnorm"),
    ("layers.py", "* along_channels((-self.log_scale).exp(), y)", "* along_channels(self.log_scale.exp(), y)",
     "gradients undoes"),
    ("layers.py", "if differentiated else torch.float64", "if True else torch.float64", "layers determinants"),
    ("layers.py", "torch.float32 if differentiated", "torch.float64 if differentiated", "layers determinants"),
    ("layers.py", "torch.is_grad_enabled() and weight.requires_grad", "torch.is_grad_enabled()", "layers determinants"),
    ("layers.py", "math.prod(shape[1:]) * self.log_scale.double()", "self.log_scale.double()", "gradients constant"),
    ("layers.py", "self.log_scale.double().expand(shape[0]).sum()", "self.log_scale.double().sum()",
     "wrong_uses raises_or"),
    ("layers.py", "self.log_scale.double().expand(shape[0]).sum()", "self.log_scale.sum()", "layers sums"),
    ("layers.py", "or shape[1] % 2 or shape[2] % 2", "or shape[1] % 2", "layers refused"),
    ("layers.py", "self.mean.expand(shape), self.std.expand(shape)", "self.std.expand(shape)", "wrong_uses raises_or"),
    ("layers.py", "return (x - self.mean) / self.std", "return x / self.std - self.mean", "gradients nll"),
    ("layers.py", "return y * self.std + self.mean", "return y * self.std", "layers verify"),
    ("layers.py", "-self.std.double().log().expand(shape).sum()", "-self.std.double().log().sum()", "gradients nll"),
    ("layers.py", "if not ((self.std > 0) & (self.std < torch.inf)).all():",
     "if not ((self.std > 0) & (self.std < torch.inf)).any():", "layers refused"),
    ("layers.py", " & (self.std < torch.inf)", "", "layers refused"),
    ("layers.py", "if not 0.01 <= alpha < 1:", "if not alpha < 1:", "layers refused"),
    ("layers.py", "p.expand(x.shape[1]).view(", "p.view(", "wrong_uses raises_or"),
    ("layers.py", "self.slope, self.rise = alpha + residual, 1 - alpha", "self.slope, self.rise = alpha, 1 - alpha",
     "layers papers"),
    ("layers.py", "F.softplus(x + self.shift, threshold=40) - self.offset", "F.softplus(x + self.shift) - self.offset",
     "layers papers"),
    ("layers.py", "F.softplus(x + self.shift, threshold=40) - self.offset", "F.softplus(x + self.shift, threshold=40)",
     "layers papers"),
    ("layers.py", "self.slope + self.rise * torch.sigmoid(x + self.shift))",
     "self.slope + self.rise * torch.sigmoid(x))", "layers papers"),
    ("layers.py", "for _ in range(10):", "for _ in range(5):", "layers inverse"),
    ("layers.py", "return h - self.shift", "return h", "layers inverse"),
    ("layers.py", "return halves[::-1] if self.swap else halves", "return halves", "gradients turn"),
    ("layers.py", "[b, a] if self.swap else [a, b]", "[a, b]", "gradients turn"),
    ("layers.py", ".reshape(len(x_b), 2, *x_b.shape[1:]).unbind(1)", ".tensor_split(2, dim=1)", "wrong_uses raises_or"),
    ("layers.py", "return 2 * torch.tanh(h / 2), t", "return torch.tanh(h), t", "layers coupling"),
    ("layers.py", "return F.logsigmoid(h + 2), t", "return torch.sigmoid(h + 2).log(), t", "layers coupling"),
    ("layers.py", "self.floor + (1 - self.floor) * torch.sigmoid(h + 2)", "self.floor + torch.sigmoid(h + 2)",
     "layers coupling"),
    ("layers.py", "1e-3 <= floor < 1 and not tanh)", "1e-3 <= floor < 1)", "layers refused"),
    ("layers.py", "(y_b - t) * (-log_s).exp()", "y_b * (-log_s).exp() - t", "gradients undoes"),
    ("layers.py", "eps = 1e-6", "eps = 1e-5", "layers logit"),
    ("layers.py", "y = (x.clamp(0, 1) + self.eps)", "y = (x + self.eps)", "layers logit"),
    ("layers.py", "math.log1p(-2 * self.eps) - log_y - log_1my", "math.log1p(-2 * self.eps) - log_y", "gradients nll"),
    ("layers.py", "torch.sigmoid(z) / (1 - 2 * self.eps) - self.eps", "torch.sigmoid(z) / (1 - 2 * self.eps)",
     "layers logit"),
    ("layers.py", "self.layer.initialize(x[:, :self.channels])", "pass", "layers glow"),
    ("layers.py", "return self.layer.log_abs_det((self.channels, *shape[1:]))",
     "return self.layer.log_abs_det((self.channels,))", "layers verify"),
    ("layers.py", "p.add_(0.1 * torch.randn_like(p))", "pass", "layers verify"),
    ("layers.py", "linear, D = copy.deepcopy(layer).double(),", "linear, D = layer.double(),", "layers verify"),
    ("layers.py", "(found - expected).abs().max()) < 1e-6", "(found - expected).max()) < 1e-6", "layers verify"),
    ("layers.py", "if not (size := (found - expected).abs().max()) < 1e-6:",
     "if (size := (found - expected).abs().max()) >= 1e-6:", "layers verify"),
    ("layers.py", "rest of the batch\", y, alone)", "rest of the batch\", y, y)", "layers verify"),
    # ---- ebflow.py
    ("ebflow.py", "0.5 * u.shape[1] * math.log(2 * math.pi)", "0.5 * math.log(2 * math.pi)", "gradients brute_force"),
    ("ebflow.py", "math.log(2 * math.pi) - log_abs_det", "math.log(2 * math.pi)", "gradients brute_force"),
    ("ebflow.py", "if u.shape != (len(x), *self.shapes[-1]):", "if u.numel() != len(x) * math.prod(self.shapes[-1]):",
     "wrong_uses raises_or"),
    ("ebflow.py", "if u.shape != (len(x), *self.shapes[-1]):", "if u.shape[1:] != self.shapes[-1]:",
     "wrong_uses raises_or"),
    ("ebflow.py", "if x.shape[1:] != self.shape:", "if x[0].numel() != math.prod(self.shape):", "wrong_uses raises_or"),
    ("ebflow.py", "torch.stack(log_abs_dets).sum(0)", "sum(log_abs_dets)", "wrong_uses raises_or"),
    ("ebflow.py", "layer.log_abs_det(shape).view(())", "layer.log_abs_det(shape)", "wrong_uses raises_or"),
    ("ebflow.py", "return -self.energy(x) - self.log_z()", "return -self.energy(x) + self.log_z()",
     "gradients integrates"),
    ("ebflow.py", "return -torch.autograd.grad(self.energy(x).sum(), x)[0]",
     "return torch.autograd.grad(self.energy(x).sum(), x)[0]", "gradients score_is"),
    ("ebflow.py", "device=like.device, dtype=like.dtype))", "device=like.device))", "layers samples"),
    ("ebflow.py", "            x = layer(x) if isinstance(layer, LinearLayer) else layer(x)[0]\n", "",
     "layers actnorm"),
    ("ebflow.py", "trained += 0 if fixed else size", "trained += size", "layers printing"),
    ("ebflow.py", "Standardize(std=s, mean=mean)], shape)", "Standardize(std=s)], shape)", "gradients nll"),
    ("ebflow.py", "[FullyConnected(dim, diagonal, bias), ", "[FullyConnected(dim, diagonal), ", "layers start_at"),
    ("ebflow.py", "SmoothLeakyReLU(alpha, residual=True, bend=bend)]", "SmoothLeakyReLU(alpha, bend=bend)]",
     "layers start_at"),
    ("ebflow.py", "std=bias / (kernel_size * channels**0.5)", "std=bias / kernel_size", "layers xavier"),
    ("ebflow.py", "return EBFlow(layers[:-1], shape)", "return EBFlow(layers, shape)", "layers start_at"),
    ("ebflow.py", "swap = block % 2 == 1", "swap = False", "gradients turn"),
    ("ebflow.py", "nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)", "nn.init.zeros_(last.weight)",
     "layers glow"),
    ("ebflow.py", "nn.LeakyReLU(0.1) if tanh else nn.SiLU()", "nn.SiLU()", "layers glow"),
    ("ebflow.py", "floor=floor, tanh=tanh)]", "tanh=tanh)]", "layers glow"),
    ("ebflow.py", "active = channels // 2**block", "active = channels // (2 if block else 1)", "layers glow"),
    ("ebflow.py", "return EBFlow([*layers, ActNorm(channels)], shape)", "return EBFlow(layers, shape)", "layers glow"),
    # ---- losses.py
    ("losses.py", "return -values(log_prob, x).mean()", "return -values(log_prob, x).sum()", "gradients table"),
    ("losses.py", "torch.cat([x, x_model.detach()])[len(x):]", "torch.cat([x, x_model])[len(x):]",
     "gradients exactly_for_a_linear"),
    ("losses.py", "torch.cat([x, x_model.detach()])[len(x):]", "x_model.detach()", "wrong_uses raises_or"),
    ("losses.py", "return (0.5 * _dot(grad, grad) - trace).mean()", "return (_dot(grad, grad) - trace).mean()",
     "gradients half_the_squared"),
    ("losses.py", "(0.5 * _dot(grad, grad) - _dot(v, Hv)).mean()", "(0.5 * _dot(grad, grad) + _dot(v, Hv)).mean()",
     "gradients sign_vectors"),
    ("losses.py", "(E_plus - E_minus).square() / 8)", "(E_plus - E_minus).square() / 4)", "gradients fdssm"),
    ("losses.py", "return D / xi**2 *", "return 1 / xi**2 *", "gradients fdssm"),
    ("losses.py", "(products - 0.5 * _dot(x, x)) / sigma**2", "products / sigma**2", "gradients pooled"),
    ("losses.py", "return 0.5 * (grad - noise / sigma).square()", "return 0.5 * (grad + noise / sigma).square()",
     "gradients explicit"),
    ("losses.py", "return 0.5 * (grad - noise / sigma).square()", "return (grad - noise / sigma).square()",
     "gradients pooled or kinks"),
    ("losses.py", "torch.randint(0, 2, x.shape, device=x.device).to(x.dtype) * 2 - 1", "torch.randn_like(x)",
     "gradients law"),
    ("losses.py", "eps = torch.randn_like(x)\n", "eps = torch.rand_like(x)\n", "gradients law"),
    ("losses.py", "x = x.detach().requires_grad_()\n", "x = x.requires_grad_()\n", "gradients caller"),
    ("losses.py", "model.sample(model_samples))", "model.sample(len(x)))", "gradients table"),
    ("losses.py", "if not xi > torch.finfo(x.dtype).eps ** 0.5:", "if not xi > 0:", "wrong_uses raises_or"),
    ("losses.py", "if y.shape != x.shape[:1] or not y.is_floating_point():", "if y.shape != x.shape[:1]:",
     "wrong_uses energy"),
    ("losses.py", "if y.shape != x.shape[:1] or not y.is_floating_point():", "if not y.is_floating_point():",
     "wrong_uses energy"),
    ("losses.py", "v = rademacher(x) if v is None else v.view_as(x)", "v = rademacher(x) if v is None else v",
     "wrong_uses raises_or"),
    ("losses.py", "else eps.view_as(x)", "else eps", "wrong_uses raises_or"),
    ("losses.py", "else noise.view_as(x)", "else noise", "wrong_uses raises_or"),
    ("losses.py", "sigma = _along_batch(sigma, x) if getattr(sigma, \"ndim\", 0) else sigma\n", "pass\n",
     "wrong_uses raises_or"),
    ("losses.py", ".expand(len(x), *ones)", "", "wrong_uses raises_or"),
    ("losses.py", "return t.view(len(t), *ones)", "return t.view(-1, *ones)", "wrong_uses raises_or"),
    # ---- data.py, densities.py
    ("data.py", 'raw[:3] == b"\\x00\\x00\\x08"', 'raw[:2] == b"\\x00\\x00"', "data bad_file"),
    ("data.py", "if not 0 < axes < 5 or", "if axes == 0 or", "data bad_file"),
    ("data.py", "0 in shape or len(raw) != header + math.prod(shape):", "0 in shape:", "data bad_file"),
    ("data.py", "if 0 in shape or", "if", "data bad_file"),
    ("data.py", "    if not Path(path).is_file():", "    if False:", "data named_pipe"),
    ("data.py", "n = len(images) - len(images) // 7", "n = len(images) - len(images) // 6", "data numpy"),
    ("data.py", "for i in range(1, 6)])", "for i in range(1, 5)])", "data cifar"),
    ("data.py", "or train.dim() != 4", "", "data not_of_images"),
    ("data.py", "or test.numel() == 0", "or len(test) == 0", "data bad_file"),
    ("data.py", "train.shape[1:] != test.shape[1:]:", "train.shape[1] != test.shape[1]:", "data bad_file"),
    ("data.py", "(5 if train.shape[1:] == (3, 32, 32) else 6)", "6", "data cifar"),
    ("data.py", "if n == len(train) or", "if", "data bad_file"),
    ("data.py", "b\"\".join(map(torch.Tensor.numpy, splits))", "splits[0].numpy()", "data three_splits"),
    ("data.py", "if len(raw) == 0 or len(raw) % 3073:", "if len(raw) % 3073:", "data bad_file"),
    ("data.py", "[:, 1:].reshape(-1, 3, 32, 32)", "[:, :-1].reshape(-1, 3, 32, 32)", "data cifar"),
    ("data.py", "if images.dtype != np.uint8:", "if False:", "data bad_file"),
    ("data.py", "images.shape[3] not in (1, 3, 4)", "images.shape[3] > 4", "data bad_file"),
    ("data.py", ".permute(0, 3, 1, 2).contiguous()", ".permute(0, 3, 2, 1).contiguous()", "data numpy"),
    ("data.py", "return images + torch.rand(images.shape, device=images.device)",
     "return images + 0.5 * torch.rand(images.shape, device=images.device)", "data dequantisation"),
    ("densities.py", "std=(Toy.smoothing, math.hypot(1, Toy.smoothing))",
     "std=(Toy.smoothing, math.hypot(1.02, Toy.smoothing))", "toys sine"),
    ("densities.py", "torch.sin(3 * t) + 0.25 * torch.randn(", "torch.sin(3 * t) + 0.255 * torch.randn(", "toys sine"),
    ("densities.py", "torch.rand(n, 2, device=device) / 2", "torch.rand(n, 2, device=device) / 2.2", "toys swirl"),
    ("densities.py", "for t in range(-2, 2) for b in range(2)]", "for t in range(-2, 2) for b in (0.05, 1)]",
     "toys checkerboard"),
    ("densities.py", "torch.special.log_ndtr((end - d) / std)", "torch.special.ndtr((end - d) / std).log()",
     "toys box or far_away"),
    ("densities.py", "x.double().reshape(len(x), 2).split", "x.double().split", "toys far_away"),
    ("densities.py", "x = x.double().reshape(len(x), means.shape[1])", "x = x.double()", "toys far_away"),
    ("densities.py", "means.shape[1] * (std * math.sqrt(2 * math.pi)).log()",
     "(std * math.sqrt(2 * math.pi)).log()", "toys integrates"),
    # ---- sampling.py
    ("sampling.py", "values(energy, x) / temperature", "values(energy, x)", "sampling tempering"),
    ("sampling.py", "_accept(E[t] / T[t] + E[t + 1] / T[t + 1], E[t + 1] / T[t] + E[t] / T[t + 1], 0, 0)",
     "_accept(E[t] + E[t + 1] / T[t + 1], E[t + 1] / T[t] + E[t] / T[t + 1], 0, 0)", "sampling tempering"),
    ("sampling.py", "for state in (x, E):", "for state in (x,):", "sampling takes_its_energy"),
    ("sampling.py", "step_sizes, strict=True)", "step_sizes)", "wrong_uses raises_or"),
    ("sampling.py", "[*range(0, n - 1, 2), *range(1, n - 1, 2)]", "range(0, n - 1, 2)", "sampling takes_its_energy"),
    ("sampling.py", "swapped[t] = accept", "swapped[0] = accept", "sampling takes_its_energy"),
    ("sampling.py", "Report(step_sizes, acceptance,", "Report(step_sizes, steps * acceptance,",
     "sampling leaves_the_density_of"),
    ("sampling.py", "torch.where(_exact(E_new, log_forth), E_new, math.inf)", "E_new", "sampling rounding_leaves"),
    ("sampling.py", "torch.where(_exact(E, log_q), -E - log_q, -math.inf)", "-E - log_q", "sampling rounding_leaves"),
    ("sampling.py", "return math.log(len(x)) - (-log_weights(energy, flow, x)).logsumexp(0)",
     "return log_weights(energy, flow, x).logsumexp(0) - math.log(len(x))", "sampling misses_a_mode"),
    ("sampling.py", "(1 / ess - 1 / n)", "(1 / ess)", "sampling honest or own_samples"),
    ("sampling.py", "ess >= 100)", "ess >= 1)", "sampling honest"),
    ("sampling.py", "n, ess = len(log_w), effective", "ess = effective", "wrong_uses raises_or"),
    ("sampling.py", "(2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0))",
     "(log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0))", "sampling effective"),
    ("sampling.py", "series - series.mean(), n=2 * T", "series - series.mean(0), n=2 * T", "sampling never_leave"),
    ("sampling.py", "series - series.mean(), n=2 * T", "series - series.mean(), n=T", "sampling windowed"),
    ("sampling.py", "window * taus.clamp(min=1)", "window * taus.clamp(max=1)", "sampling autocorrelation"),
    ("sampling.py", ".cumsum(0) - 1 ", ".cumsum(0) ", "sampling autocorrelation"),
    ("sampling.py", ".mean(1).view(T)", ".mean(1)", "wrong_uses raises_or"),
    ("sampling.py", "log_alpha.isfinite(), log_alpha.clamp(max=0).exp(), 0.0)",
     "log_alpha.isfinite(), log_alpha.clamp(max=0).exp(), 1.0)", "sampling overflows or cut_off"),
    ("sampling.py", "(-E_new + log_back) - (-E + log_forth)", "(-E_new + log_forth) - (-E + log_back)",
     "sampling detailed_balance"),
    ("sampling.py", "(x_new - x + a * grad).flatten(1)", "(x_new - x - a * grad).flatten(1)",
     "sampling detailed_balance"),
    ("sampling.py", "sum(1, keepdim=True) / (4 * a)).view(len(x))", "sum(1) / (4 * a))", "wrong_uses raises_or"),
    ("sampling.py", "_log_q(x, x_new, grad_new, step_size)", "_log_q(x, x_new, grad, step_size)", "sampling mala"),
    ("sampling.py", "((x_new, x), (E_new, E), (grad_new, grad))", "((x_new, x), (E_new, E), (grad, grad))",
     "sampling mala"),
    ("sampling.py", "(2 * a) ** 0.5", "a ** 0.5", "sampling langevin"),
    ("sampling.py", "_propose(_lost(x, E), grad, step_size, where)", "_propose(x, grad, step_size, where)",
     "sampling start"),
    ("sampling.py", "x, accepted = _lost(x.detach(), E), torch", "x, accepted = x.detach(), torch", "sampling start"),
    ("sampling.py", "_select(accept, x_new, _lost(x, E)), accept", "_select(accept, x_new, x), accept",
     "sampling start"),
    ("sampling.py", "torch.where(where.expand_as(x), x_new, x)", "torch.where(where, x_new, x)",
     "wrong_uses raises_or"),
    ("sampling.py", "grad if where is None else torch.where(where, grad, 0.0)", "grad", "sampling outside"),
    ("sampling.py", "(t**-0.6 * (alpha.mean() - target))", "(t**-0.6 * (alpha.mean() + target))", "sampling tune"),
    ("sampling.py", "(t**-0.6 * (alpha.mean() - target))", "(0.001 * (alpha.mean() - target))", "sampling tune"),
    ("sampling.py", "return x, Report(step_size, accepted / steps)", "return x, Report(step_size, accepted)",
     "sampling mala_reaches"),
    ("sampling.py", "accepted / rounds if", "accepted if", "sampling reports"),
    ("sampling.py", "jumped / rounds if", "jumped if", "sampling reports"),
    ("sampling.py", "mask = mask.expand_as(x)\n", "pass\n", "wrong_uses raises_or"),
    ("sampling.py", "torch.randn_like(x) if start is None else start.to(x).view_as(x), x)",
     "torch.randn_like(x), x)", "sampling told_to"),
    ("sampling.py", "torch.randn_like(x) if start is None else start.to(x).view_as(x), x)",
     "torch.zeros_like(x) if start is None else start.to(x).view_as(x), x)", "sampling told_to"),
    ("sampling.py", "else start.to(x).view_as(x), x)", "else start, x)", "wrong_uses raises_or"),
    ("sampling.py", "flow.sample(len(x)).to(x).view_as(x)", "flow.sample(len(x)).to(x)", "wrong_uses raises_or"),
    ("sampling.py", "    if y.shape != x.shape[:1]:\n", "    if False:\n", "wrong_uses energy"),
    # ---- mixtures, judge.py, train_ebm.py
    ("densities.py", "(torch.arange(K, dtype=torch.float64) + 0.5)", "torch.arange(K, dtype=torch.float64)",
     "toys equally_far"),
    ("densities.py", "distance / (2 * math.sin(math.pi / K))", "distance / 2", "toys equally_far"),
    ("densities.py", "std=math.log1p(math.e)", "std=1.0", "train_ebm gmm40"),
    ("densities.py", "return self._log_joint(x).softmax(1)", "return self._log_joint(x).softmax(0)",
     "toys equally_far"),
    # ---- judge.py
    ("judge.py", "log_z = (self.w.log() + A - B).logsumexp(0)", "log_z = (self.w.log() + A).logsumexp(0)",
     "train_ebm judged_without"),
    ("judge.py", "weights = self.w * (A - B - log_z).exp()", "weights = (A - log_z).exp()", "train_ebm judged_without"),
    ("judge.py", "weights * (d - (d @ weights)[:, None]).norm(dim=0)", "weights * d.norm(dim=0)", "train_ebm scatter"),
    ("judge.py", "log_z_se, weights_se = (d @ weights).norm()", "log_z_se, weights_se = d.norm()", "train_ebm scatter"),
    ("judge.py", "math.hypot(ratio.std() / len(ratio) ** 0.5, log_z_se)", "log_z_se.item()", "train_ebm scatter"),
    ("judge.py", "ess >= 0.01", "ess >= 0.0", "train_ebm far_from"),
    ("judge.py", 'if s.sampler == "short":', "if False:", "train_ebm short_chains_are"),
    ("judge.py", '(s.sampler != "langevin")', "1", "train_ebm crossings"),
    # ---- train_ebm.py
    ("train_ebm.py", "losses.sml(model.energy, x, chains[0])", "losses.sml(model.energy, x, chains[-1])",
     "train_ebm temperature"),
    ("train_ebm.py", "(report.acceptance.mean(-1) - 0.574)", "(report.acceptance.mean() - 0.574)",
     "train_ebm temperature"),
    ("train_ebm.py", "s.step_size * T}", "s.step_size + 0 * T}", "train_ebm command_line"),
    ("train_ebm.py", 's.start == "equal"}', "True}", "train_ebm command_line"),
    ("train_ebm.py", "mixture(s.dim, s.weights, s.distance)", "mixture(s.dim)", "train_ebm command_line"),
    ("train_ebm.py", "if not all(0 < weight <= 1 for weight in weights):", "if False:", "scripts bad_option"),
    ("train_ebm.py", "n, m=0.99)", "n)", "scripts moving_average"),
    ("train_ebm.py", "s.flow_lr * cosine(n / (s.epochs * s.steps))", "s.lr * cosine(n / (s.epochs * s.steps))",
     "scripts learning_rate"),
    ("train_ebm.py", "truth.figures(averaged, chains[0]) |", "truth.figures(model, chains[0]) |",
     "scripts moving_average"),
    ("train_ebm.py", "torch.manual_seed(1_000_003 * s.seed + epoch)", "torch.manual_seed(epoch)", "scripts seed"),
    ("train_ebm.py", "torch.manual_seed(s.seed)", "torch.manual_seed(0)", "scripts seed"),
    ("train_ebm.py", '{"epoch": epoch, "chains": chains,', '{"epoch": epoch, "chains": chains.clone().zero_(),',
     "scripts killed"),
    # ---- support/run.py
    ("support/run.py", 'fcntl.lockf(os.open(s.out / ".lock", os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX | fcntl.LOCK_NB)',
     "pass", "scripts one_run_at_a_time"),
    ("support/run.py", "checkpoint.exists() and not s.overwrite:", "False:", "scripts without_being_asked"),
    ("support/run.py", 'for name in ("checkpoint.pt", "metrics.jsonl", *PICTURES) if',
     'for name in ("checkpoint.pt", "metrics.jsonl") if', "scripts without_being_asked"),
    ("support/run.py", 'if there.get("schedule") == "steps" else set()', "", "train_mnist taken_further"),
    ("support/run.py", "for k in sorted({*there, *self.config} - free)", "for k in sorted({*self.config} - {*there})",
     "scripts without_being_asked"),
    ("support/run.py", '> (start or math.inf)', '>= (start or math.inf)', "support worse_than"),
    ("train_mnist.py", "[layer.weight for layer in spectral]", "[]", "scripts cnn"),
    ("train_mnist.py", 'if s.actnorm == "moments" and s.batch_size == size:', "if False:", "scripts bad_option"),
    ("support/run.py", "                if different:", "                if False:", "scripts without_being_asked"),
    ("support/run.py", '        sys.stdout.reconfigure(errors="replace")', "        pass",
     "support lacks_characters"),
    ("support/run.py", 'stream or open(os.devnull, "w", errors="replace")', "stream", "support lacks_characters"),
    ("support/run.py", 'if state["epoch"] and hasattr(', "if hasattr(", "scripts killed_after"),
    ("support/run.py", "                    optimizer.step()  # its", "                    pass  # its",
     "scripts damaged"),
    ("support/run.py", "(t.shape, t.dtype, bool", "(t.dtype, bool", "scripts damaged"),
    ("support/run.py", "(t.shape, t.dtype, bool", "(t.shape, bool", "scripts damaged"),
    ("support/run.py", "t.dtype, bool(t.isfinite().all()))", "t.dtype)", "scripts damaged"),
    ("support/run.py", "(type(t), t == t)", "type(t)", "scripts damaged"),
    ("support/run.py", "(type(t), t == t)", "t == t", "scripts damaged"),
    ("support/run.py", "part.load_state_dict(self.state[name])", "self.state[name]", "scripts killed"),
    ("support/run.py", "if step % 50 == 0 or step == len(batches):", "if step == len(batches):", "support waited_for"),
    ("support/run.py", "if step % 50 == 0 or step == len(batches):", "if step % 50 == 0:", "support first_step"),
    ("support/run.py", "torch.stack(self.trace).mean(0).tolist()", "self.trace[-1].tolist()", "support means"),
    ("support/run.py", "recent = torch.stack(self.trace[first:]).cpu()", "recent = torch.stack(self.trace).cpu()",
     "support first_step"),
    ("support/run.py", "len(batches) / (time.perf_counter() - start) if", "None if", "support per_second"),
    ("support/run.py", 'not math.isfinite(row["val_nll"]):', 'math.isnan(row["val_nll"]):', "support validation_nll"),
    ("support/run.py", '+ (self.metrics[-1]["seconds"] if self.metrics else 0.0)', "", "scripts control_c"),
    ("support/run.py", "        self.start = time.perf_counter()\n", "", "support prints_its_settings"),
    ("support/run.py", "            os.fsync(file.fileno())\n", "", "support whole_or_not"),
    ("support/run.py", 'with open(temporary, "wb") as file:', 'with open(path, "wb") as file:', "support whole_or_not"),
    ("support/run.py", "        temporary.unlink(missing_ok=True)", "        pass", "support whole_or_not"),
    ("support/run.py", '        write(self.directory / "checkpoint.pt", buffer.getvalue())\n        write(',
     '        write(self.directory / "metrics.jsonl", ("\\n".join(map(json.dumps, self.metrics)) + "\\n").encode())\n'
     '        write(self.directory / "checkpoint.pt", buffer.getvalue())\n        write(', "scripts killed_leaves"),
    ("support/run.py", "if archive.testzip() is not None:", "if False:", "scripts damaged"),
    ("support/run.py", "weights_only=True)  # data only", "weights_only=False)  # data only", "scripts damaged"),
    ("support/run.py", "    except Exception as error:  # torch raises many kinds", "    except RunError as error:",
     "scripts damaged"),
    ("support/run.py", "        sys.exit(130)", "        sys.exit(1)", "support put_right"),
    ("support/run.py", '"error: " + " ".join(str(error).split())', '"error: " + str(error)', "support put_right"),
    # ---- the rest of support, recipes.py
    ("support/settings.py", "if not (math.isfinite(value) and holds(value, bound)):", "if not holds(value, bound):",
     "support wrong_flag"),
    ("support/settings.py", "parser.set_defaults(**", "dict(**", "support goes_before"),
    ("support/settings.py", "f.name not in config and value", "False and value", "support wrong_flag"),
    ("support/settings.py", "s = kind(**vars(parser.parse_args(argv)))",
     "s = kind(**vars(parser.parse_known_args(argv)[0]))", "support wrong_flag"),
    ("support/settings.py", '("arch", "loss", "schedule", "data", "sampler")', '("arch", "loss", "data", "sampler")',
     "train_mnist recipe"),
    ("support/settings.py", "if s.resume and s.overwrite:", "if False:", "support wrong_flag"),
    ("recipes.py", "dict(decay=0.925, weight_decay=1e-5 * 2)", "dict(decay=0.925, weight_decay=1e-5)",
     "train_mnist published_settings_are"),
    ("recipes.py", 'clip=500.0 * D, normalize="none", actnorm="held"', 'clip=500.0, normalize="none", actnorm="held"',
     "train_mnist published_settings_are"),
    ("recipes.py", "glow | dict(sigma=0.0, energy_weight=0.1 * D)", "glow | dict(sigma=0.0)",
     "train_mnist published_settings_are"),
    ("recipes.py", "fc | dict(sigma=1.0)", "fc | dict(sigma=0.5)", "train_mnist published_settings_are"),
    ("recipes.py", "epochs=1000, s=0.75, bias=0.01)", "epochs=1000, s=0.5, bias=0.01)",
     "train_mnist published_settings_are"),
    ("support/processes.py", "launched, gpu = dist.is_torchelastic_launched(),", "launched, gpu = True,",
     "scripts leaves_its_files"),
    ("support/processes.py", '        dist.broadcast(tensor, 0)\n', '        pass\n', "processes halves"),
    ("support/processes.py", "for t in tensors]) / dist.get_world_size()", "for t in tensors])", "processes halves"),
    ("support/processes.py", "        dist.all_reduce(flat)  # one message\n", "", "processes halves"),
    ("support/processes.py", "redirect_stdout(None if dist.get_rank() else sys.stdout)", "redirect_stdout(sys.stdout)",
     "processes only_the_first"),
    ("support/processes.py", 'name != "cpu" and torch.cuda.is_available()', "torch.cuda.is_available()",
     "processes device"),
    ("support/run.py", "return not dist.is_initialized() or dist.get_rank() == 0", "return True",
     "processes halves or only_the_first or both"),
    ("support/optimization.py", "min(1.0, progress / 0.05)", "min(1.0, progress / 0.1)", "support learning_rate"),
    ("support/optimization.py", "(progress - plateau) / (1 - plateau)", "progress - plateau", "support learning_rate"),
    ("support/optimization.py", "min(m, (1 + n) / (10 + n)) if n else 0.0", "min(m, (1 + n) / (10 + n))",
     "support average"),
    ("support/optimization.py", "min(m, (1 + n) / (10 + n)) if n else 0.0", "m if n else 0.0", "support average"),
    ("support/optimization.py", "for p in model.parameters() if p.requires_grad", "for p in model.parameters()",
     "train_mnist units"),
    ("support/fast.py", 'if s.loss in ("ml", "sml")', 'if s.loss in ("ml",)', "support replayed"),
    ("support/fast.py", '"fallback_random": True', '"fallback_random": False', "support compiled"),
    ("support/fast.py", "except torch._inductor.exc.InductorError as error:", "except KeyError as error:",
     "support no_compiler"),
    ("support/fast.py", 'exact, amx = loss in ("sml", "fdssm")', 'exact, amx = loss == "fdssm"',
     "support fast_products"),
    ("support/fast.py", 'stack.callback(setattr, products, "fp32_precision", products.fp32_precision)', "pass",
     "support fast_products"),
    ("support/fast.py", '"ieee" if exact and amx else "bf16"', '"bf16"', "support fast_products"),
    ("support/plots.py", ".permute(0, 3, 1, 4, 2)", ".permute(1, 3, 0, 4, 2)", "support mosaic"),
    # ---- train_mnist.py
    ("train_mnist.py", "torch.manual_seed(s.seed)", "torch.manual_seed(0)", "scripts seed_decides"),
    ("train_mnist.py", "averaged = copy.deepcopy(model, dict(constants))  ", "averaged = model  ",
     "scripts moving_average"),
    ("train_mnist.py", "1_000_003 * s.seed + epoch + (rank << 24)", "1_000_003 * s.seed + (rank << 40)",
     "train_mnist order_and_noise"),
    ("train_mnist.py", "1_000_003 * s.seed + epoch + (rank << 24)", "epoch + (rank << 40)",
     "train_mnist order_and_noise"),
    ("train_mnist.py", "1_000_003 * s.seed + epoch + (rank << 24)", "1_000_003 * s.seed + epoch", "processes halves"),
    ("train_mnist.py", "processes.agreed(torch.randperm(len(train_set), device=device))",
     "torch.randperm(len(train_set), device=device)", "processes halves"),
    ("train_mnist.py", "processes.agreed(torch.randperm(len(train_set), device=device))",
     "torch.arange(len(train_set), device=device)", "train_mnist order_and_noise"),
    ("train_mnist.py", "[:, rank::size] if epoch", "[:, ::size] if epoch", "processes halves"),
    ("train_mnist.py", "processes.average([*matched.layers[-1].parameters()])", "pass", "processes halves or both"),
    ("train_mnist.py", "processes.average([loss, *(p.grad for p in parameters)])", "pass", "processes halves or both"),
    ("train_mnist.py", "s.batch_size % size", "False", "processes share_alike"),
    ("train_mnist.py", "processes=size)", "more=0)", "processes bit_for_bit"),
    ("train_mnist.py", "(epoch - 1) * steps, {}", "0, {}", "scripts learning_rate"),
    ("train_mnist.py", "s.decay ** min(n // steps, s.decays)", "s.decay ** (n // steps)", "train_mnist published"),
    ("train_mnist.py", "cosine(n / (s.epochs * steps))", "cosine(n / ((s.epochs + 1) * steps))",
     "scripts learning_rate"),
    ("train_mnist.py", "s.epochs + 1 + (s.sml_steps > 0))", "s.epochs + 1)", "scripts steps_of_sml"),
    ("train_mnist.py", 'loss="sml", lr=s.sml_lr', 'lr=s.sml_lr', "scripts steps_of_sml"),
    ("train_mnist.py", "steps, 1)[:s.sml_steps]", "steps, 1)", "scripts steps_of_sml"),
    ("train_mnist.py", "repeat(1 + s.sml_steps // steps, 1)", "repeat(1, 1)", "scripts steps_of_sml"),
    ("train_mnist.py", 'model.load_state_dict(best["model"])\n            before', "before",
     "scripts steps_of_sml"),
    ("train_mnist.py", 'learning_rate(phase, n, steps)', 'learning_rate(s, n, steps)', "scripts steps_of_sml"),
    ("train_mnist.py", 'run.metrics[-1]["step"] if run.metrics else 0', "0", "scripts steps_of_sml"),
    ("train_mnist.py", '    best = run.state["best"]\n', "", "scripts lowest_validation"),
    ("train_mnist.py", "averaged if s.ema else model, dict", "averaged, dict", "scripts lowest_validation"),
    ("train_mnist.py", "track_moments(evaluated, dequantize(train_set[:5000]).view(-1, *model.shape))", "pass",
     "train_mnist clean_images"),
    ("train_mnist.py", 'if epoch and row["val_nll"] < best["val_nll"]:', "if epoch:", "scripts lowest_validation"),
    ("train_mnist.py", 'if epoch and row["val_nll"] < best["val_nll"]:', 'if row["val_nll"] < best["val_nll"]:',
     "scripts lowest_validation"),
    ("train_mnist.py", 'model.load_state_dict(best["model"])\n    test', "test", "scripts lowest_validation"),
    ("train_mnist.py", "matched = flow if s.map else model", "matched = flow", "train_mnist optimisers"),
    ("train_mnist.py", "z = pre(x) if s.map else x ", "z = pre(x) ", "train_mnist optimisers"),
    ("train_mnist.py", "z = z + s.sigma * torch.randn_like(z)\n", "pass\n", "train_mnist optimisers"),
    ("train_mnist.py", "and n % 10 == 0:", "and n % 5 == 0:", "train_mnist one_batch_in_ten"),
    ("train_mnist.py", 'z + s.sigma * noise if s.loss == "dsm" else z, fraction=0.1)', "z, fraction=0.1)",
     "train_mnist follows or batches_pass"),
    ("train_mnist.py", "loss + s.energy_weight * matched.energy", "loss - s.energy_weight * matched.energy",
     "train_mnist optimisers"),
    ("train_mnist.py", "        optimizer.zero_grad()\n", "", "train_mnist optimisers"),
    ("train_mnist.py", "clip_grads_with_norm_(parameters, s.clip, norm)", "pass", "train_mnist optimisers"),
    ("train_mnist.py", "augment(images) if s.augment else images", "augment(images)", "train_mnist augment"),
    ("train_mnist.py", "fourth - S.square().sum()", "fourth", "train_mnist shrunk"),
    ("train_mnist.py", "test[\"test_bpd\"] > 8", "test[\"test_bpd\"] < 8", "train_mnist uniform"),
    ("data.py", "columns.flip(1), columns)", "columns, columns)", "data augment"),
    ("data.py", "self.std <= 1e-4 * self.mean.abs()", "self.std <= 0", "data no_density"),
    ("data.py", ".clamp(0, 255).to(torch.uint8)", ".to(torch.uint8)", "data white"),
    ("data.py", "n - 2 * (n // 10), n // 10, n // 10", "n - 3 * (n // 10), n // 10, 2 * (n // 10)", "data points"),
    ("train_mnist.py", "mean.copy_(s.s * mean.view(pre.shape))", "mean.copy_(mean.view(pre.shape))",
     "train_mnist units"),
    ("train_mnist.py", "for batch in images.split(1000)])", "for batch in images[:1000].split(1000)])",
     "train_mnist units"),
    ("train_mnist.py", "variances.rsqrt()[:, None] * U.T", "variances.rsqrt()[:, None] * U", "train_mnist units"),
    ("train_mnist.py", "FullyConnected(math.prod(shape)).requires_grad_(False)", "FullyConnected(math.prod(shape))",
     "train_mnist units"),
    ("train_mnist.py", "flow.initialize(pre(dequantize(images[:1000].view(-1, *pre.shape))))",
     "flow.initialize(pre(images[:1000].view(-1, *pre.shape).float()))", "train_mnist dequantised"),
    ("train_mnist.py", 'flow.modules() if s.actnorm == "held" else flow.layers[-1:]', "flow.layers[-1:]",
     "train_mnist held"),
    ("train_mnist.py", "energy / len(images) + model.log_z()", "energy / len(images)", "train_mnist brute_force"),
    ("train_mnist.py", "    torch.manual_seed(0)\n    energy = 0.0", "    energy = 0.0", "train_mnist same_noise"),
    ("train_mnist.py", "sha256=digest(splits)", "sha256=digest(splits[:1])", "scripts without_being_asked"),
    ("train_mnist.py", 'best = saved["config"], saved["state"]["best"]',
     'best = saved["config"], {"model": saved["state"]["model"], "epoch": 1}', "scripts loaded or lowest_validation"),
    ("train_mnist.py", 'config["images"][1:]).eval().requires_grad_(False)', 'config["images"][1:])', "scripts loaded"),
    ("train_mnist.py", "buffer.copy_(trained)", "pass", "scripts bit_for_bit"),
    # ---- train_toy.py
    ("train_toy.py", "data.sample(2000, device, s.start_smoothing)", "data.sample(2000, device, 0.0)",
     "train_toy the_flow_starts_at"),
    ("train_toy.py", "cosine(progress, phase.plateau)", "cosine(progress)", "scripts learning_rate"),
    ("train_toy.py", "s.epochs + 1 + (s.sml_steps > 0))", "s.epochs + 1)", "scripts steps_of_sml"),
    ("train_toy.py", 'replace(s, loss="sml", epochs', 'replace(s, epochs', "scripts steps_of_sml"),
    ("train_toy.py", "first, steps = 0, s.sml_steps", "first, steps = 0, s.steps", "scripts steps_of_sml"),
    ("train_toy.py", 'model.load_state_dict(best["model"])\n            before', "before",
     "scripts steps_of_sml"),
    ("train_toy.py", 'divergences("before_sml_test", model, *test)', 'divergences("before_sml_test", averaged, *test)',
     "scripts steps_of_sml"),
    ("train_toy.py", 'run.metrics[-1]["step"] if run.metrics else 0', "0", "scripts steps_of_sml or row_for_each"),
    ("train_toy.py", 'best["epoch"] > s.epochs}', 'True}', "scripts steps_of_sml"),
    ("train_toy.py", "torch.manual_seed(1_000_003 * s.seed + epoch)", "torch.manual_seed(1_000_003 * s.seed)",
     "scripts seed_decides"),
    ("train_toy.py", '0.0 if phase.loss == "dsm" else sigma)', "sigma)", "train_toy dsm_adds"),
    ("train_toy.py", '    best = run.state["best"]\n', "", "scripts lowest_validation"),
    ("train_toy.py", "copy.deepcopy(averaged.state_dict())}", "averaged.state_dict()}", "scripts lowest_validation"),
    ("train_toy.py", 'divergences("val", averaged, *val)', 'divergences("val", flow, *val)', "scripts moving_average"),
    ("train_toy.py", "truth(data, s.test_points, -2, device)", "truth(data, s.test_points, -1, device)",
     "scripts loaded"),
    ("train_toy.py", "max(0.0, 1 - progress / s.anneal)", "max(0.0, 1 - progress)", "train_toy geometrically"),
    ("train_toy.py", '"sigma": sigma, "pooled": True}', '"sigma": sigma}', "train_toy adams"),
    ("train_toy.py", "fisher = 0.5 * (score - model_score)", "fisher = (score - model_score)", "train_toy quadrature"),
    ("train_toy.py", "(values.std() / len(x)**0.5)", "values.std()", "train_toy quadrature"),
    ("train_toy.py", "kl = (log_prob - model_log_prob).double()", "kl = (model_log_prob - log_prob).double()",
     "train_toy quadrature"),
    ("train_toy.py", "        update_average(averages, parameters, n) ", "        pass ", "train_toy adams"),
    ("train_toy.py", "torch.manual_seed(seed)  # none", "pass  # none", "train_toy truth_is_the_same"),
    ("train_toy.py", 'best = saved["config"], saved["state"]["best"]',
     'best = saved["config"], {"model": saved["state"]["model"], "epoch": 1}', "scripts loaded or lowest_validation"),
    ("train_toy.py", "return model.eval().requires_grad_(False)", "return model", "scripts loaded"),
    ("experiments/starts.py", '"model" if name.startswith(held)', '"averaged" if name.startswith(held)',
     "experiments starts_have"),
    ("experiments/starts.py", '"test_nll": metrics[-1]["test_nll"]', '"test_nll": metrics[-1]["val_nll"]',
     "experiments starts_have"),
    ("experiments/bumps.py", "sml(energy, x + SIGMA * torch.randn_like(x), x_model)",
     "sml(energy, x_model, x + SIGMA * torch.randn_like(x))", "experiments two_bumps"),
    ("experiments/tables.py", 'r.get(name, r[name.removeprefix("before_sml_")])', 'r[name.removeprefix("before_sml_")]',
     "experiments table_of_the_toys"),
    ("experiments/tables.py", 'row.get("before_sml") or row["test_nll"]', 'row["test_nll"]', "docs readme_holds"),
    ("experiments/__init__.py", 'if flag.startswith("--") and vars(s)[name] != vars(alone)[name]:', "if False:",
     "experiments passed_on"),
    # ---- experiments
    ("experiments/__init__.py", "if different:", "if False:", "experiments another_run"),
    ("experiments/__init__.py", 'if name not in result["runs"]:', "if True:", "experiments another_run"),
    ("experiments/ablation.py", '("EMA", "averaged"), ("no EMA", "model")', '("EMA", "model"), ("no EMA", "averaged")',
     "experiments ablation"),
    ("experiments/tables.py", "statistics.stdev(values) / math.sqrt(n)", "statistics.stdev(values)",
     "experiments student"),
    ("experiments/tables.py", 'if not config["paper"]:', "if False:", "experiments published"),
    ("experiments/imputation.py", "model.layers[:3], model.layers[3:]))", "model.layers[:4], model.layers[4:]))",
     "experiments imputation"),
    ("experiments/imputation.py", '"flow, mean of draws": draws.mean(0)', '"flow, mean of draws": draws[0]',
     "experiments imputation"),
    ("experiments/imputation.py", " - (W[:, ~missing] @ z[~missing])[:, None]", "", "experiments gaussian_that"),
    ("experiments/colour.py", "if not curve or nll < min(old for _, old in curve):", "if True:",
     "experiments_use lowest_look"),
    ("experiments/runtime.py", "A.numel() // 3 + 2", "A.numel() // 3 + 1",
     "experiments textbook"),
    ("experiments/runtime.py", "slope(line, key)", "slope(line, 'operations')", "experiments picture_of_the_runtime"),
    ("experiments/idea.py", "-1 if linear else 1", "1 if linear else -1", "experiments diagram"),
    ("experiments/idea.py", "linear or i < fixed", "linear", "experiments diagram"),
    ("experiments/runtime.py", "statistics.median(t[1:])", "statistics.median(t)", "experiments time_of_a_step"),
    ("experiments/balanced.py", "return sum(rows) / len(x)", "return sum(rows) / len(x) / len(T)",
     "experiments_rivals balanced_makes"),
    ("experiments/balanced.py", "[*known[:1], *known[-1:]]", "known[:2]", "experiments_rivals table_of_balanced"),
    ("experiments/unbalanced.py", "log_q.nan_to_num(nan=-torch.inf).logsumexp(0) - math.log(len(flows))", "log_q[1]",
     "experiments_rivals first_flow"),
    ("experiments/unbalanced.py", "* len(pixels) ** 0.5 / S", "/ S", "experiments_rivals white"),
    ("experiments/unbalanced.py", 'min(one["ess"]', 'max(one["ess"]', "experiments_rivals few_draws"),
    ("experiments/unbalanced.py", "/ len(measures) ** 0.5", "", "experiments_rivals few_draws"),
    ("experiments/unbalanced.py", "if not torch.stack([*figures.values()]).isfinite().all():", "if False:",
     "experiments_rivals unbalanced_makes"),
    ("experiments/determinant.py", "(2 * eigenvalues - 1)", "(2 * eigenvalues)", "experiments_rivals closed_form"),
    ("experiments/linear_masks.py", "math.log(5) - 2 * log_cosh", "math.log(5)", "experiments_rivals entropy"),
    ("experiments/rivals.py", "delta.T @ (y @ W)", "delta.T @ y", "experiments_rivals relative_gradient"),
]

EQUIVALENT = [
    ("layers.py", ".clamp(low, high)", "", "Newton's iterates stay in the bracket but for the last digit"),
]


def start(tree, name, words):
    """Starts pytest on those tests of a file, in a tree: a fork, since torch is imported.   -> the process's id"""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir(tree)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)
        sys.path[0], sys.argv = str(tree), ["pytest"]
        file = next(file for file in (f"test_{name}.py", f"tests/test_{name}.py") if (tree / file).exists())
        status = 3
        try:
            status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", file, *["-k", words] * bool(words)])
        finally:
            os._exit(status)
    return pid


def finished(pid, since):
    """What the tests of a process say; None while they run. A process that takes too long is killed."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    if not ended and time.monotonic() - since > LIMIT:
        os.killpg(pid, signal.SIGKILL)  # what the tests started, too
        os.waitpid(pid, 0)
        return "TOO SLOW"
    status = os.waitstatus_to_exitcode(status)
    return {0: "SURVIVED", 1: "seen"}.get(status, f"NOT TRIED: pytest ends with {status}") if ended else None


def tried(jobs):
    """Runs jobs, (key, tree, name, words), as many at once as there are cores.   -> (key, what the tests say), …"""
    jobs, running = iter(jobs), {}
    try:
        while True:
            while len(running) < os.cpu_count() and (job := next(jobs, None)):
                key, *where = job
                running[start(*where)] = key, time.monotonic()
            if not running:
                return
            for pid, (key, since) in [*running.items()]:
                if said := finished(pid, since):
                    del running[pid]
                    yield key, said
            time.sleep(0.05)
    finally:
        for pid in running:
            os.killpg(pid, signal.SIGKILL)


def changed(tree, directory, changes):
    """The jobs of the changes, each in a copy of the tree, which is made when its turn comes."""
    for i, (file, old, new, tests) in enumerate(changes):
        shutil.copytree(tree, directory / str(i), copy_function=os.link)
        path = directory / str(i) / file
        text = path.read_text()
        if text.count(old) != 1:
            sys.exit(f"{file}: {old!r} occurs {text.count(old)} times")
        path.unlink()
        path.write_text(text.replace(old, new))
        yield i, directory / str(i), *f"{tests} ".split(" ", 1)


def main(words):
    changes = [change for change in CHANGES if not words or any(word in part for word in words for part in change)]
    selected, bad = {}, 0
    for *_, tests in changes:
        name, _, expression = tests.partition(" ")
        selected.setdefault(name, set()).add(f"({expression or 'test'})")
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tree"
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
        for file in listed.stdout.splitlines():
            (tree / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, tree / file)
        for name, said in tried((name, tree, name, " or ".join(sorted(found))) for name, found in selected.items()):
            if said != "SURVIVED":
                sys.exit(f"the tests of {name} do not pass without any change: {said}")
        for i, said in tried(changed(tree, Path(directory), changes)):
            file, old, new, tests = changes[i]
            bad += said != "seen"
            print(f"{said:10} {file}: {old!r} -> {new!r} ({tests})", flush=True)
            shutil.rmtree(Path(directory) / str(i))
    print(f"{len(changes)} changes, {bad} not seen; {len(EQUIVALENT)} more that no test can see")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main(sys.argv[1:])
