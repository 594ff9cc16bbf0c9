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
     "return torch.linalg.slogdet(self.weight).logabsdet\n\n\nclass Convolution", "layers float64"),
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
    ("layers.py", "1), precise(self.weight).dtype", "1), self.weight.dtype", "layers float64"),
    ("layers.py", "return torch.linalg.slogdet(self.matrix(shape, dtype)).logabsdet", "return log_abs_det",
     "layers singular"),
    ("layers.py", "math.prod(shape[1:]) * torch.linalg.slogdet(precise(self.weight))",
     "torch.linalg.slogdet(precise(self.weight))", "gradients constant"),
    ("layers.py", "math.prod(shape[1:]) * torch.linalg.slogdet(precise(self.weight))",
     "math.prod(shape[1:]) * torch.linalg.slogdet(self.weight)", "layers float64"),
    ("layers.py", "nn.init.orthogonal_(torch.empty(channels, channels))", "torch.randn(channels, channels)",
     "layers glow"),
    ("layers.py", "return solve(self.weight, y.flatten(2))", "return solve(self.weight.T, y.flatten(2))",
     "gradients undoes"),
    ("layers.py", "if x.shape[1] == 1 or fraction == 1 and", "if fraction == 1 and", "layers refused"),
    ("layers.py", "self.log_scale.lerp_(-std.log(), fraction)", "self.log_scale.copy_(-std.log())", "layers actnorm"),
    ("layers.py", "self.bias.lerp_(-mean / std, fraction)", "self.bias.lerp_(-mean, fraction)", "layers actnorm"),
    ("layers.py", "* along_channels((-self.log_scale).exp(), y)", "* along_channels(self.log_scale.exp(), y)",
     "gradients undoes"),
    ("layers.py", "if differentiated else torch.float64", "if True else torch.float64", "layers float64"),
    ("layers.py", "torch.float32 if differentiated", "torch.float64 if differentiated", "layers float32"),
    ("layers.py", "torch.is_grad_enabled() and weight.requires_grad", "torch.is_grad_enabled()", "layers float32"),
    ("layers.py", "math.prod(shape[1:]) * self.log_scale.double().sum()", "self.log_scale.double().sum()",
     "gradients constant"),
    ("layers.py", "or shape[1] % 2 or shape[2] % 2", "or shape[1] % 2", "layers refused"),
    ("layers.py", "return (x - self.mean) / self.std", "return x / self.std - self.mean", "train_mnist units"),
    ("layers.py", "return y * self.std + self.mean", "return y * self.std", "train_mnist whitens"),
    ("layers.py", "-self.std.double().log().expand(shape).sum()", "-self.std.double().log().sum()", "gradients nll"),
    ("layers.py", "if not (self.std > 0).all():", "if not (self.std > 0).any():", "layers refused"),
    ("layers.py", "if not 0.01 <= alpha < 1:", "if not alpha < 1:", "layers refused"),
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
    ("layers.py", "return halves[::-1] if self.swap else halves", "return halves", "layers turn"),
    ("layers.py", "[b, a] if self.swap else [a, b]", "[a, b]", "layers turn"),
    ("layers.py", "return 2 * torch.tanh(h / 2), t", "return torch.tanh(h), t", "layers tanh"),
    ("layers.py", "return F.logsigmoid(h + 2), t", "return torch.sigmoid(h + 2).log(), t", "layers floor"),
    ("layers.py", "self.floor + (1 - self.floor) * torch.sigmoid(h + 2)", "self.floor + torch.sigmoid(h + 2)",
     "layers floor"),
    ("layers.py", "(y_b - t) * (-log_s).exp()", "y_b * (-log_s).exp() - t", "gradients undoes"),
    ("layers.py", "eps = 1e-6", "eps = 1e-5", "layers logit"),
    ("layers.py", "y = (x.clamp(0, 1) + self.eps)", "y = (x + self.eps)", "layers logit"),
    ("layers.py", "math.log1p(-2 * self.eps) - log_y - log_1my", "math.log1p(-2 * self.eps) - log_y", "gradients nll"),
    ("layers.py", "torch.sigmoid(z) / (1 - 2 * self.eps) - self.eps", "torch.sigmoid(z) / (1 - 2 * self.eps)",
     "layers logit"),
    ("layers.py", "self.layer.initialize(x[:, :self.channels])", "pass", "train_mnist starts_with"),
    ("layers.py", "return self.layer.log_abs_det((self.channels, *shape[1:]))",
     "return self.layer.log_abs_det(shape[:1])", "layers glow"),
    # ---- ebflow.py
    ("ebflow.py", "0.5 * u.shape[1] * math.log(2 * math.pi)", "0.5 * math.log(2 * math.pi)", "gradients brute_force"),
    ("ebflow.py", "math.log(2 * math.pi) - log_abs_det", "math.log(2 * math.pi)", "gradients brute_force"),
    ("ebflow.py", "raise self._singular(i) from None", "raise", "layers singular"),
    ("ebflow.py", "                    raise self._singular(i)\n                total",
     "                    pass\n                total", "layers singular"),
    ("ebflow.py", "return -self.energy(x) - self.log_z()", "return -self.energy(x) + self.log_z()",
     "gradients integrates"),
    ("ebflow.py", "return -torch.autograd.grad(self.energy(x).sum(), x)[0]",
     "return torch.autograd.grad(self.energy(x).sum(), x)[0]", "gradients score_is"),
    ("ebflow.py", "device=like.device, dtype=like.dtype))", "device=like.device))", "layers samples"),
    ("ebflow.py", "            x = layer(x) if linear else layer(x)[0]\n\n    def _transform",
     "            pass\n\n    def _transform", "layers actnorm"),
    ("ebflow.py", "or x.shape[1:] != shape or", "or", "layers refused"),
    ("ebflow.py", "trained += 0 if fixed else size", "trained += size", "layers printing"),
    ("ebflow.py", "Standardize(std=s, mean=mean)], shape)", "Standardize(std=s)], shape)", "train_mnist centred"),
    ("ebflow.py", "[FullyConnected(dim, diagonal, bias),\n",
     "[FullyConnected(dim, diagonal),\n", "layers start_at"),
    ("ebflow.py", "SmoothLeakyReLU(alpha, residual=True, bend=bend)]", "SmoothLeakyReLU(alpha, bend=bend)]",
     "layers start_at"),
    ("ebflow.py", "std=bias / (kernel_size * channels**0.5)", "std=bias / kernel_size", "layers xavier"),
    ("ebflow.py", "return EBFlow(layers[:-1], shape)", "return EBFlow(layers, shape)", "layers start_at"),
    ("ebflow.py", "swap = block % 2 == 1", "swap = False", "layers turn"),
    ("ebflow.py", "nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)", "nn.init.zeros_(last.weight)",
     "layers glow"),
    ("ebflow.py", "nn.LeakyReLU(0.1) if tanh else nn.SiLU()", "nn.SiLU()", "layers tanh"),
    ("ebflow.py", "active = channels // 2**block", "active = channels // (2 if block else 1)", "layers glow"),
    ("ebflow.py", "return EBFlow([*layers, ActNorm(channels)], shape)", "return EBFlow(layers, shape)",
     "train_mnist starts_with"),
    # ---- losses.py
    ("losses.py", "return -log_prob(x).mean()", "return -log_prob(x).sum()", "gradients table"),
    ("losses.py", "energy(x_model.detach()).mean()", "energy(x_model).mean()", "gradients exactly_for_a_linear"),
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
    ("losses.py", "least < value < torch.inf", "least <= value < torch.inf", "gradients wrong_use"),
    ("losses.py", "share(model.sample(model_samples))", "share(model.sample(len(x)))", "gradients table"),
    ("losses.py", "share(torch.randn_like(x)), pooled)", "torch.randn_like(share(x)), pooled)", "processes shares"),
    # ---- data.py, images
    ("data.py", 'raw[:3] == b"\\x00\\x00\\x08"', 'raw[:2] == b"\\x00\\x00"', "data bad_file"),
    ("data.py", "if len(raw) != header + math.prod(shape):", "if len(raw) < header:", "data bad_file"),
    ("data.py", "n = len(images) - len(images) // 7", "n = len(images) - len(images) // 6", "data numpy"),
    ("data.py", "for i in range(1, 6)])", "for i in range(1, 5)])", "data cifar"),
    ("data.py", "if 0 in train.shape[1:]:", "if False:", "data bad_file"),
    ("data.py", "if train.shape[1:] != test.shape[1:]:", "if train.shape[1] != test.shape[1]:", "data bad_file"),
    ("data.py", "n = len(train) - len(train) // 6", "n = len(train) - len(train) // 5", "data"),
    ("data.py", "if n == len(train) or len(test) == 0:", "if len(test) == 0:", "data few"),
    ("data.py", "b\"\".join(map(torch.Tensor.numpy, splits))", "splits[0].numpy()", "data three_splits"),
    ("data.py", "if len(raw) == 0 or len(raw) % 3073:", "if len(raw) % 3073:", "data bad_batch"),
    ("data.py", "[:, 1:].reshape(-1, 3, 32, 32)", "[:, :-1].reshape(-1, 3, 32, 32)", "data cifar"),
    ("data.py", "if images.dtype != np.uint8:", "if False:", "data bad_numpy"),
    ("data.py", ".permute(0, 3, 1, 2).contiguous()", ".permute(0, 3, 2, 1).contiguous()", "data numpy"),
    ("data.py", "return images + torch.rand(images.shape, device=images.device)",
     "return images + 0.5 * torch.rand(images.shape, device=images.device)", "data dequantisation"),
    ("data.py", "std=(Toy.smoothing, math.hypot(1, Toy.smoothing))",
     "std=(Toy.smoothing, math.hypot(1.02, Toy.smoothing))", "toys sine"),
    ("data.py", "torch.sin(3 * t) + 0.25 * torch.randn(", "torch.sin(3 * t) + 0.255 * torch.randn(", "toys sine"),
    # ---- sampling.py, data.py: mixtures, support/judge.py, train_ebm.py
    ("sampling.py", "(lambda x: energy(x) / T[t], x[t]", "(lambda x: energy(x), x[t]", "sampling tempering"),
    ("sampling.py", "_accept(E[t] / T[t] + E[t + 1] / T[t + 1], E[t + 1] / T[t] + E[t] / T[t + 1], 0, 0)",
     "_accept(E[t] + E[t + 1] / T[t + 1], E[t + 1] / T[t] + E[t] / T[t + 1], 0, 0)", "sampling tempering"),
    ("sampling.py", "for state in (x, E):", "for state in (x,):", "sampling takes_its_energy"),
    ("sampling.py", "if _any(T[:1] != 1) or", "if", "sampling ladder"),
    ("sampling.py", "or _any(T.diff() <= 0)", "or _any(T.diff() < 0)", "sampling ladder"),
    ("sampling.py", "return torch.where(log_w.isfinite(), log_w, -math.inf)", "return log_w", "sampling overflows"),
    ("sampling.py", "return math.log(len(x)) - (-log_weights(energy, flow, x)).logsumexp(0)",
     "return log_weights(energy, flow, x).logsumexp(0) - math.log(len(x))", "sampling misses_a_mode"),
    ("sampling.py", "(1 / ess - 1 / n)", "(1 / ess)", "sampling honest or itself or own_samples"),
    ("sampling.py", "if steps < 1:", "if steps < 0:", "sampling positive"),
    ("sampling.py", "log_alpha.isfinite(), log_alpha.clamp(max=0).exp(), 0.0)",
     "log_alpha.isfinite(), log_alpha.clamp(max=0).exp(), 1.0)", "sampling overflows or start"),
    ("data.py", "(torch.arange(K, dtype=torch.float64) + 0.5)", "torch.arange(K, dtype=torch.float64)",
     "train_ebm polygon"),
    ("data.py", "distance / (2 * math.sin(math.pi / K))", "distance / 2", "train_ebm polygon"),
    ("data.py", "std=math.log1p(math.e)", "std=1.0", "train_ebm gmm40"),
    ("data.py", "return self._log_joint(x).softmax(1)", "return self._log_joint(x).softmax(0)", "train_ebm overlap"),
    ("support/judge.py", "log_z = (self.w.log() + A - B).logsumexp(0)", "log_z = (self.w.log() + A).logsumexp(0)",
     "train_ebm judged_without"),
    ("support/judge.py", "weights = self.w * (A - B - log_z).exp()", "weights = (A - log_z).exp()",
     "train_ebm judged_without"),
    ("support/judge.py", "weights * (d - (d @ weights)[:, None]).norm(dim=0)", "weights * d.norm(dim=0)",
     "train_ebm scatter"),
    ("support/judge.py", "log_z_se, weights_se = (d @ weights).norm()", "log_z_se, weights_se = d.norm()",
     "train_ebm scatter"),
    ("support/judge.py", "math.hypot(ratio.std() / len(ratio) ** 0.5, log_z_se)", "log_z_se.item()",
     "train_ebm scatter"),
    ("support/judge.py", "ess >= 0.01", "ess >= 0.0", "train_ebm far_from"),
    ("support/judge.py", 'if s.sampler == "short":', "if False:", "train_ebm short_chains_are"),
    ("support/judge.py", '(s.sampler != "langevin")', "1", "train_ebm crossings"),
    ("train_ebm.py", "losses.sml(model.energy, x, chains[0])", "losses.sml(model.energy, x, chains[-1])",
     "train_ebm temperature"),
    ("train_ebm.py", "(report.acceptance.mean(-1) - TARGET)", "(report.acceptance.mean() - TARGET)",
     "train_ebm temperature"),
    ("train_ebm.py", "s.step_size * T ", "s.step_size + 0 * T ", "train_ebm command_line"),
    ("train_ebm.py", 's.start == "equal"}', "True}", "train_ebm command_line"),
    ("train_ebm.py", "mixture(s.dim, s.weights, s.distance)", "mixture(s.dim)", "train_ebm command_line"),
    # ---- support/run.py
    ("support/run.py", "taken = [self.first and not lock(s.out, stack)]", "taken = [False]",
     "support one_run_at_a_time"),
    ("support/run.py", "            self.unlock = stack.pop_all().close", "            self.unlock = lambda: None",
     "support one_run_at_a_time"),
    ("support/run.py", "        self.unlock()\n", "", "support one_run_at_a_time"),
    ("support/run.py", "            if dist.is_initialized():\n                dist.broadcast_object_list(taken)\n", "",
     "support others_stop"),
    ("support/run.py", " or metrics.exists()):", "):", "support neither_written"),
    ("support/run.py", "elif not s.overwrite and (config", "elif (config", "support neither_written"),
    ("support/run.py", "self._compare(config, read_config(config))", "pass", "support no_checkpoint_yet"),
    ("support/run.py", 'for name in ("checkpoint.pt", "metrics.jsonl", *PICTURES) if s.overwrite else ():',
     'for name in ("checkpoint.pt", "metrics.jsonl") if s.overwrite else ():', "support neither_written"),
    ("support/run.py", 'free = {"epochs"} if self.config.get("schedule") == "steps" else set()', 'free = {"epochs"}',
     "train_mnist taken_further"),
    ("support/run.py", "for k in sorted({*config, *self.config} - free)", "for k in sorted({*self.config} - {*config})",
     "support neither_written"),
    ("support/run.py", "        self._compare(path, checkpoint[\"config\"])\n", "", "support neither_written"),
    ("support/run.py", "part.load_state_dict(self.state[name])", "self.state[name]", "support puts_back"),
    ("support/run.py", "if None in numbers or len(numbers) != self.state[\"epoch\"] + 3:", "if None in numbers:",
     "support lacks"),
    ("support/run.py", "if at in ('after epoch 0', 'at epoch 1, step 1')", "if False", "support first_step"),
    ("support/run.py", "if step % 50 == 0 or step == steps:", "if step == steps:", "support waited_for"),
    ("support/run.py", "if step % 50 == 0 or step == steps:", "if step % 50 == 0:", "support first_step"),
    ("support/run.py", "torch.stack(self.trace).mean(0).tolist()", "self.trace[-1].tolist()", "support means"),
    ("support/run.py", "recent = torch.stack(self.trace[first:]).cpu()", "recent = torch.stack(self.trace).cpu()",
     "support first_step"),
    ("support/run.py", "not math.isfinite(row[\"val_nll\"]):", "math.isnan(row[\"val_nll\"]):",
     "support validation_nll"),
    ("support/run.py", "            os.fsync(file.fileno())\n", "", "support whole_or_not"),
    ("support/run.py", 'with open(temporary, "wb") as file:', 'with open(path, "wb") as file:', "support whole_or_not"),
    ("support/run.py", "        temporary.unlink(missing_ok=True)", "        pass", "support whole_or_not"),
    ("support/run.py", "if archive.testzip() is not None:", "if False:", "train_mnist damaged_checkpoint"),
    ("support/run.py", "weights_only=True)  # data only", "weights_only=False)  # data only", "support code_is_never"),
    ("support/run.py", "        if not path.is_file():", "        if False:", "support pipe"),
    ("support/run.py", "            sys.stdout = None\n", "            pass\n", "support full_standard"),
    ("support/run.py", "        sys.exit(130)", "        sys.exit(1)", "support put_right"),
    ("support/run.py", '            write(self.directory / "checkpoint.pt", buffer.getvalue())\n            write(',
     '            write(self.directory / "metrics.jsonl", b"")\n'
     '            write(self.directory / "checkpoint.pt", buffer.getvalue())\n            write(',
     "support before_the_metrics"),
    ("support/__init__.py", "signal.signal(signal.SIGTERM, signal.default_int_handler)", "", "support before_torch"),
    ("support/__init__.py", "sys.excepthook = excepthook", "", "support before_torch"),
    # ---- the rest of support
    ("support/settings.py", "if isinstance(value, float) and not math.isfinite(value):", "if False:",
     "settings wrong_flag"),
    ("support/settings.py", "s = kind(**recipe | given)", "s = kind(**given | recipe)", "settings goes_before"),
    ("support/settings.py", "if f.name in given:", "if False:", "settings wrong_flag"),
    ("support/settings.py", "parser.parse_args(argv)  # no flag is unknown", "pass", "settings wrong_flag"),
    ("support/settings.py", '("arch", "loss", "schedule", "data", "sampler")', '("arch", "loss", "data", "sampler")',
     "settings published"),
    ("support/settings.py", 'dict(decay=0.925, weight_decay=1e-5 * 2)', 'dict(decay=0.925, weight_decay=1e-5)',
     "settings published"),
    ("support/settings.py", 'clip=500.0 * 784, normalize="none", actnorm="held"',
     'clip=500.0, normalize="none", actnorm="held"', "settings published"),
    ("support/settings.py", 'PAPER_GLOW | dict(sigma=0.0, energy_weight=0.1 * 784)', 'PAPER_GLOW | dict(sigma=0.0)',
     "settings published"),
    ("support/settings.py", "PAPER_FC | dict(sigma=1.0)", "PAPER_FC | dict(sigma=0.5)", "settings published"),
    ("support/settings.py", "epochs=1000, s=0.75, bias=0.01)", "epochs=1000, s=0.5, bias=0.01)", "settings published"),
    ("support/settings.py", "if s.out is not None and s.out.resolve() == Path.cwd():", "if False:",
     "settings wrong_flag"),
    ("support/settings.py", 'abs(value) if limit == "apart" else value', "value", "settings published"),
    ("support/settings.py", "if not all(0 < weight <= 1 for weight in weights):", "if False:", "train_ebm errors"),
    ("support/settings.py", "apart=0.1,", "apart=1e-40,", "settings wrong_flag"),
    ("support/run.py", 'if self.state["epoch"] > self.config.get("epochs", math.inf):', "if False:",
     "train_mnist taken_further"),
    ("support/processes.py", "launched = dist.is_torchelastic_launched()", "launched = True",
     "processes shared_is_one_line"),
    ("support/processes.py", "    if not dist.is_initialized():\n        return loss\n", "",
     "train_mnist leaves_its_files"),
    ("data.py", "images.shape[3] not in (1, 3, 4)", "images.shape[3] > 4", "data numpy"),
    ("data.py", "if not 0 < axes < 5 or", "if axes == 0 or", "data bad_file"),
    ("experiments/__init__.py", 'if flag.startswith("--") and s[name] != alone[name]:', "if False:",
     "experiments ablation_measures"),
    ("experiments/balanced.py", 'if done["flags"] != flags:', "if False:", "train_ebm refuses"),
    ("experiments/unbalanced.py", "for seed in {seed for _, seed in todo}", "for _, seed in todo",
     "unbalanced trains_nothing_twice"),
    ("experiments/unbalanced.py", "if digits[0] == digits[1]:", "if False:", "unbalanced errors"),
    ("experiments/unbalanced.py", "log_q.nan_to_num(nan=-torch.inf).logsumexp(0) - math.log(2)",
     "log_q[1]", "unbalanced first_flow"),
    ("support/optimization.py", "min(1.0, progress / 0.05)", "min(1.0, progress / 0.1)", "train_mnist schedules"),
    ("support/optimization.py", "(progress - plateau) / (1 - plateau)", "progress - plateau", "train_mnist schedules"),
    ("support/optimization.py", "min(m, (1 + n) / (10 + n)) if n else 0.0", "min(m, (1 + n) / (10 + n))",
     "support average"),
    ("support/optimization.py", "min(m, (1 + n) / (10 + n)) if n else 0.0", "m if n else 0.0", "support average"),
    ("support/optimization.py", "for p in model.parameters() if p.requires_grad", "for p in model.parameters()",
     "support trained"),
    ("support/processes.py", "rows[dist.get_rank() * size:][:size]", "rows[:size]", "processes shares"),
    ("support/processes.py", "torch.cat(tensors) / dist.get_world_size()", "torch.cat(tensors)", "processes average"),
    ("support/processes.py", "if rows % processes:", "if False:", "processes shared"),
    ("support/processes.py", "null if dist.get_rank() > 0 else sys.stdout", "sys.stdout", "processes only_the_first"),
    ("support/processes.py", 'if device.type == "cuda" and index >= gpus:', "if False:", "processes device"),
    ("support/fast.py", 'WAITING = ("ml", "sml")', 'WAITING = ("ml",)', "graphs replays_all"),
    ("support/fast.py", '"fallback_random": True', '"fallback_random": False', "graphs compiled or captured"),
    ("support/fast.py", 'exact, amx = loss == "fdssm"', 'exact, amx = False', "train_mnist fast_products"),
    ("support/fast.py", "stack.callback(setattr, products, \"fp32_precision\", products.fp32_precision)", "pass",
     "train_mnist fast_products"),
    ("support/fast.py", '"ieee" if exact and amx else "bf16"', '"bf16"', "train_mnist fast_products"),
    ("support/plots.py", ".permute(0, 3, 1, 4, 2)", ".permute(1, 3, 0, 4, 2)", "support mosaic"),
    # ---- train_mnist.py
    ("train_mnist.py", "steps = len(train_set) // s.batch_size\n    if steps == 0:",
     "steps = len(train_set) // s.batch_size\n    if False:", "train_mnist bad_options"),
    ("train_mnist.py", "torch.manual_seed(s.seed)", "torch.manual_seed(0)", "train_mnist seed_decides"),
    ("train_mnist.py", "averaged = copy.deepcopy(model)  ", "averaged = model  ", "train_mnist best_epoch"),
    ("train_mnist.py", "torch.manual_seed(1_000_003 * s.seed + epoch)", "torch.manual_seed(1_000_003 * s.seed)",
     "train_mnist order_and_noise"),
    ("train_mnist.py", "torch.manual_seed(1_000_003 * s.seed + epoch)", "torch.manual_seed(epoch)",
     "train_mnist order_and_noise"),
    ("train_mnist.py", "order = torch.randperm(len(train_set), device=device)", "order = torch.arange(len(train_set))",
     "train_mnist every_image_once"),
    ("train_mnist.py", "n = (epoch - 1) * steps + i ", "n = i ", "train_mnist learning_rate"),
    ("train_mnist.py", "else s.decay ** min(epoch - 1, 49)", "else s.decay ** (epoch - 1)",
     "train_mnist learning_rate"),
    ("train_mnist.py", "cosine(n / (s.epochs * steps))", "cosine(n / ((s.epochs + 1) * steps))",
     "train_mnist learning_rate"),
    ("train_mnist.py", 'best = run.state["best"] if run.state["epoch"] >= 0 else', "best =", "train_mnist best_epoch"),
    ("train_mnist.py", "averaged if s.ema else model)", "averaged)", "train_mnist every_switch"),
    ("train_mnist.py", "track_moments(evaluated, dequantize(train_set[:5000]).view(-1, *model.shape))", "pass",
     "train_mnist clean_images"),
    ("train_mnist.py", 'if epoch and row["val_nll"] < best["val_nll"]:', 'if epoch:', "train_mnist best_epoch"),
    ("train_mnist.py", 'if epoch and row["val_nll"] < best["val_nll"]:', 'if row["val_nll"] < best["val_nll"]:',
     "train_mnist best_epoch"),
    ("support/run.py", "+ (self.metrics[-1][\"seconds\"] if self.metrics else 0.0)", "", "train_mnist goes_on_from"),
    ("train_mnist.py", "model.load_state_dict(best[\"model\"])", "pass", "train_mnist best_epoch"),
    ("train_mnist.py", "matched = flow if s.map else model", "matched = flow", "train_mnist optimisers"),
    ("train_mnist.py", "z = pre(x) if s.map else x ", "z = pre(x) ", "train_mnist objective_sees"),
    ("train_mnist.py", "z = z + s.sigma * torch.randn_like(z)\n", "pass\n", "train_mnist under_noise"),
    ("train_mnist.py", "and n % 10 == 0:", "and n % 5 == 0:", "train_mnist one_batch_in_ten"),
    ("train_mnist.py", 'z + s.sigma * noise if s.loss == "dsm" else z, fraction=0.1)', "z, fraction=0.1)",
     "train_mnist follows or passes or batches_pass"),
    ("train_mnist.py", "loss + s.energy_weight * matched.energy", "loss - s.energy_weight * matched.energy",
     "train_mnist energy_weight"),
    ("train_mnist.py", "        optimizer.zero_grad()\n", "", "train_mnist optimisers"),
    ("train_mnist.py", "clip_grads_with_norm_(parameters, s.clip, norm)", "pass", "train_mnist optimisers"),
    ("train_mnist.py", "if s.flip and n % 2 else images", "if s.flip else images", "train_mnist flip"),
    ("train_mnist.py", "images.flip(3)", "images.flip(2)", "train_mnist flip"),
    ("train_mnist.py", "mean = first / len(images)", "mean = first / 50_000", "train_mnist centred"),
    ("train_mnist.py", "logit_preprocessing(shape, s.s * std, mean=s.s * mean.view(shape))",
     "logit_preprocessing(shape, s.s * std, mean=mean.view(shape))", "train_mnist units"),
    ("train_mnist.py", "for batch in images.split(1000):\n            z = pre",
     "for batch in images[:1000].split(1000):\n            z = pre", "train_mnist units"),
    ("train_mnist.py", "variances.rsqrt()[:, None] * U.T", "variances.rsqrt()[:, None] * U", "train_mnist whitens"),
    ("train_mnist.py", "if variances[0] < 1e-10 * variances[-1]:", "if False:", "train_mnist singular_covariance"),
    ("train_mnist.py", "FullyConnected(math.prod(shape)).requires_grad_(False)", "FullyConnected(math.prod(shape))",
     "train_mnist whitens"),
    ("train_mnist.py", "flow.initialize(pre(dequantize(images[:1000].view(-1, *shape))))",
     "flow.initialize(pre(images[:1000].view(-1, *shape).float()))", "train_mnist dequantisation"),
    ("train_mnist.py", "flow.modules() if s.actnorm == \"held\" else flow.layers[-1:]", "flow.layers[-1:]",
     "train_mnist held"),
    ("train_mnist.py", "energy / len(images) + model.log_z()", "energy / len(images)", "train_mnist brute_force"),
    ("train_mnist.py", "    torch.manual_seed(0)\n    energy = 0.0", "    energy = 0.0", "train_mnist same_noise"),
    ("support/run.py", "steps / (time.perf_counter() - start) if", "None if", "train_mnist per_second"),
    ("support/run.py", "        self.start = time.perf_counter()\n", "", "support seconds"),
    ("train_mnist.py", "sha256=digest(splits)", "sha256=digest(splits[:1])", "train_mnist other_data"),
    # ---- train_toy.py
    ("train_toy.py", "cosine(progress, s.plateau)", "cosine(progress)", "train_toy cosine"),
    ("train_toy.py", '0.0 if s.loss == "dsm" else sigma)', "sigma)", "train_toy dsm_adds"),
    ("train_toy.py", 'best = run.state["best"] if run.state["epoch"] >= 0 else', "best =", "train_toy best_epoch"),
    ("train_toy.py", "copy.deepcopy(averaged.state_dict())}", "averaged.state_dict()}", "train_toy best_epoch"),
    ("train_toy.py", 'divergences("val", averaged, *val)', 'divergences("val", flow, *val)', "train_toy best_epoch"),
    ("train_toy.py", "truth(toy, s.test_points, -2, device)", "truth(toy, s.test_points, -1, device)",
     "train_toy loaded"),
    ("train_toy.py", "max(0.0, 1 - progress / s.anneal)", "max(0.0, 1 - progress)", "train_toy geometrically"),
    ("train_toy.py", "sigma=sigma, pooled=True, **config)", "sigma=sigma, **config)", "train_toy pools"),
    ("train_toy.py", "fisher = 0.5 * (score - model_score)", "fisher = (score - model_score)", "train_toy quadrature"),
    ("train_toy.py", "(values.std() / len(x) ** 0.5)", "values.std()", "train_toy quadrature"),
    ("train_toy.py", "kl = (log_prob - model_log_prob).double()", "kl = (model_log_prob - log_prob).double()",
     "train_toy quadrature"),
    ("train_toy.py", "        update_average(averages, parameters, n) ", "        pass ", "train_toy adams"),
    ("train_toy.py", "torch.manual_seed(seed)  # none", "pass  # none", "train_toy truth_is_the_same"),
    # ---- experiments
    ("experiments/ablation.py", ", images=digest(splits))", ")", "experiments ablation"),
    ("experiments/rivals.py", "images=digest(splits)", "images=list(splits[0].shape)", "experiments rivals_run"),
    ("experiments/race.py", "images=digest(splits)", "images=list(splits[0].shape)", "experiments race_stops"),
    ("experiments/generation.py", "squeeze=False", "squeeze=True", "experiments generation"),
    ("experiments/generation.py", "if 10**k < a.steps - 1]", "if 10**k < a.steps]", "experiments generation"),
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
