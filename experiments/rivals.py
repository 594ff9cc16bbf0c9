"""Other ways to train the same flow without its determinants, against exact maximum likelihood and score matching.

    python -m experiments.rivals

Each method trains the two-layer flow of `train_mnist.py` for 1,500 steps: once from centred pixels, and once from
whitened ones. Whitening is one more matrix, which W₁ could absorb. Its eigendecomposition counts as training time. Let
x (B, D) be the batch at the input of a layer, and δ (B, D) the gradient of the loss at its output xWᵀ + b:

    ml        exact: the gradient of W is δᵀx - W^{-T}, O(D³)
    relative  that times WᵀW from the right, δᵀ(xWᵀW) - W, all of it O(BD²)   (Gresele et al. 2020)
    self-norm a learnt R ≈ W⁻¹ of each layer stands in for W⁻¹, and W in turn for R⁻¹: W takes ½(δᵀx - Rᵀ), R takes
              ½(Wᵀ - (δW)ᵀ(xWᵀ)), and λ E‖R(Wx) - x‖², with x held constant, ties the two together (Keller et al. 2021)
    ssm, dsm  as in `losses.py`

Every --every steps the exact validation NLL of the averaged parameters is computed, outside the measured time. The
experiment takes 7 minutes on two cores. It writes results/rivals.json after every run, and continues from it; then
results/rivals.png. It prints the table of docs/results.md.
"""

import argparse
import copy
import math
import statistics
import time
from itertools import islice
from pathlib import Path

import torch
import torch.nn as nn
from matplotlib.figure import Figure
from torch.autograd.function import once_differentiable
from torch.nn.utils import get_total_norm
from tqdm import tqdm

import train_mnist
from data import MNIST, DataError, dequantize, digest, load_images
from ebflow import EBFlow
from experiments import at_least, folder, intact, record, recorded
from experiments.speed import synchronize
from layers import FullyConnected, LinearLayer
from losses import OBJECTIVES
from support import processes, settings
from support.fast import Graphed, fast_products
from support.optimization import cosine, trainable, update_average
from support.run import RunError, one_line_errors, save_picture

LEVELS = (1105, 1080, 1060)  # nats of validation NLL; the table has the time to reach each
STARTS = ("center", "whiten")
METHODS = {  # objective, and flags of train_mnist.py for each start: the best of three or four learning rates
    "ml": ("ml", {"center": [], "whiten": ["--lr", "3e-3"]}),
    "relative": ("ml", {"center": ["--lr", "6e-3"], "whiten": ["--lr", "3e-3"]}),
    "self-norm": ("ml", {"center": ["--lr", "6e-3"], "whiten": ["--lr", "3e-3"]}),
    "ssm": ("ssm", {"center": ["--lr", "1e-3"], "whiten": ["--lr", "3e-4"]}),
    "dsm": ("dsm", {"center": ["--lr", "1e-3"], "whiten": ["--lr", "3e-4"]}),
}
FLOW = ["--diagonal", "1", "--bend", "1.5", "--actnorm", "none"]  # of score matching, when the rates were chosen
PLAIN = {"ml": [], "ssm": [*FLOW, "--sigma", "0"], "dsm": [*FLOW, "--sigma", "0.4"]}


# ---- The methods: layers with the gradients that a method gives them -------------------------------------------------

class SharedLayer(FullyConnected):
    """A fully-connected layer with the parameters of another one."""

    def __init__(self, layer):
        super().__init__(len(layer.bias))
        self.weight, self.bias = layer.weight, layer.bias


class RelativeLinear(torch.autograd.Function):
    """x Wᵀ + b. The gradient of W comes out times WᵀW from the right, at two products O(BD²): δᵀx WᵀW = δᵀ(xWᵀW)."""

    @staticmethod
    def forward(ctx, x, W, b):
        y = x @ W.T
        ctx.save_for_backward(y, W)
        return y + b

    @staticmethod
    @once_differentiable
    def backward(ctx, delta):
        y, W = ctx.saved_tensors
        return delta @ W if ctx.needs_input_grad[0] else None, delta.T @ (y @ W), delta.sum(0)


class RelativeLayer(SharedLayer):
    """The relative gradient. In place of log|det W| stands ½‖W‖², whose gradient is W = W^{-T} WᵀW."""

    def forward(self, x):
        return RelativeLinear.apply(x, self.weight, self.bias)

    def log_abs_det(self, shape):
        return 0.5 * self.weight.square().sum()


class SelfNormalizingLinear(torch.autograd.Function):
    """x Wᵀ + b. W gets half of its gradient, ½δᵀx. R gets the other half, as the gradient that it has as W⁻¹."""

    @staticmethod
    def forward(ctx, x, W, R, b):
        y = x @ W.T
        ctx.save_for_backward(x, y, W)
        return y + b

    @staticmethod
    @once_differentiable
    def backward(ctx, delta):
        x, y, W = ctx.saved_tensors
        delta_x = delta @ W
        return delta_x, 0.5 * delta.T @ x, -0.5 * delta_x.T @ y, delta.sum(0)


class SelfNormalizingLayer(SharedLayer):
    """A learnt R in place of W⁻¹: the log-determinant has the gradients ½Rᵀ for W and -½Wᵀ for R, and no other use.

    `forward` leaves E‖R(Wx) - x‖² in `reconstruction`.
    """

    def __init__(self, layer, lam=1.0):
        super().__init__(layer)
        self.lam, self.R = lam, nn.Parameter(torch.linalg.inv(layer.weight.detach()))

    def forward(self, x):
        constant = x.detach()
        self.reconstruction = (constant @ self.weight.T @ self.R.T - constant).square().sum(1).mean()
        return SelfNormalizingLinear.apply(x, self.weight, self.R, self.bias)

    def log_abs_det(self, shape):
        W, R = self.weight, self.R
        return 0.5 * ((W * R.detach().T).sum() - (R * W.detach().T).sum())


class Rival(EBFlow):
    """The flow with its parameters in layers of another kind."""

    def __init__(self, flow, kind):
        layers = [kind(layer) if isinstance(layer, FullyConnected) else layer for layer in flow.layers]
        super().__init__(layers, flow.shape)

    def energy(self, x):
        energy = super().energy(x)
        return energy + sum(layer.lam * layer.reconstruction for layer in self.layers
                            if isinstance(layer, SelfNormalizingLayer))

    def log_z(self):
        """As EBFlow's, without the check that it is finite, which waits for a GPU."""
        return -sum(layer.log_abs_det(shape) for layer, shape in zip(self.layers, self.shapes)
                    if isinstance(layer, LinearLayer))


# ---- Training --------------------------------------------------------------------------------------------------------

def beside(images, n):
    """Puts n images beside each other: an image of n times the D.   uint8 (N, …) -> (N // n, n · D)"""
    return images[:len(images) // n * n].reshape(len(images) // n, n * images[0].numel())


def batches(images, n, size):
    """Endless batches of `beside`, drawn at random, each image once in an epoch.   uint8 (N, …) -> (size, n · D)"""
    while True:
        order = torch.randperm(len(images), device=images.device)
        for index in order[:len(images) // n // size * size * n].split(size * n):
            yield beside(images[index], n)


def train(name, normalize, flags, steps, every, splits, device, digits=1, until=-math.inf):
    """One run of a method.   -> {"curve": [(step, seconds, validation NLL)], "broke": why, or None}

    flags   of train_mnist.py: for the flow, the batches, the noise, the learning rate and the seed, no others
    every   steps of a stretch, after which the model is evaluated; `steps` is rounded up to whole stretches
    digits  so many images of the data beside each other are one image here; the NLL is that of one of them
    until   the run ends where the NLL is as low as this

    The seconds are those of the steps, and those of whitening.
    """
    loss, own = METHODS[name]
    s = settings.parse(settings.Mnist, ["--loss", loss, "--normalize", normalize, *PLAIN[loss], *own[normalize],
                                        *flags])
    train_set, val_set = splits[0], beside(splits[1], digits).to(device)
    if len(train_set) // digits < s.batch_size or len(val_set) == 0:
        raise RunError(f"{len(train_set)} training images, {digits} beside each other, do not fill a batch of "
                       f"{s.batch_size}: lower --digits or --batch-size")

    torch.manual_seed(s.seed)
    start = time.perf_counter()
    pre, flow = train_mnist.build(s, beside(train_set, digits))
    model = EBFlow([*pre.layers, *flow.layers], pre.shape).to(device)
    seconds = time.perf_counter() - start if normalize == "whiten" else 0.0
    train_set = train_set.to(device)
    averaged = copy.deepcopy(model)                                    # θ̃ of EMA
    kind = {"ml": SharedLayer, "relative": RelativeLayer, "self-norm": SelfNormalizingLayer}.get(name)
    matched = Rival(flow, kind) if kind else flow                      # the model's parameters; self-norm also has R
    parameters, averages, trained = trainable(matched), trainable(averaged), trainable(model)
    optimizer = torch.optim.Adam(parameters, lr=s.lr, fused=True)

    def gradient(z):                                                   # leaves ∇_θ in p.grad
        loss = OBJECTIVES[s.loss](matched, z, share=processes.share, **s.config())
        loss.backward(inputs=parameters)
        return loss.detach()

    if name != "ml":                                                   # its determinants wait for a GPU
        gradient = Graphed(gradient, parameters)

    curve, broke, stretches = [], None, -(-steps // every)
    label = f"{name}, {normalize}" + (f", {digits} digits" if digits > 1 else "")
    bar = tqdm(total=stretches * every, unit=" batches", desc=label, dynamic_ncols=True, disable=None)
    try:
        for stretch in range(stretches + 1):                           # stretch 0 shows what the start alone is worth
            if stretch:
                torch.manual_seed(1_000_003 * s.seed + stretch)
                trace = []
                synchronize(device)
                start = time.perf_counter()
                for i, images in enumerate(islice(batches(train_set, digits, s.batch_size), every)):
                    n = (stretch - 1) * every + i
                    optimizer.param_groups[0]["lr"] = s.lr * cosine(n / (stretches * every))
                    with fast_products(s.loss):
                        z = pre(dequantize(images))
                        if s.loss == "ssm" and s.sigma > 0:
                            z = z + s.sigma * torch.randn_like(z)
                        if s.actnorm == "moments" and n % 10 == 0:
                            noise = torch.randn_like(z)
                            train_mnist.track_moments(flow, z + s.sigma * noise if s.loss == "dsm" else z)
                        optimizer.zero_grad()
                        loss = gradient(z)
                        norm = get_total_norm([p.grad for p in parameters])
                        optimizer.step()
                    update_average(averages, trained, n)
                    trace.append(torch.stack([loss, norm]))
                    bar.update()
                synchronize(device)
                seconds += time.perf_counter() - start
                bad = (~torch.stack(trace).isfinite().all(1)).nonzero()
                if len(bad):
                    raise RunError(f"not finite at step {(stretch - 1) * every + bad[0].item() + 1}")
            if s.actnorm == "moments":                                 # averaged parameters have their own moments
                torch.manual_seed(0)
                train_mnist.track_moments(averaged, dequantize(beside(train_set, digits)[:1000]))
            nll = train_mnist.evaluate("val", averaged, val_set)["val_nll"] / digits
            if not math.isfinite(nll):
                raise RunError(f"the validation NLL is {nll} after step {stretch * every}")
            curve.append((stretch * every, seconds, nll))
            bar.set_postfix(val_nll=f"{nll:.1f}")
            if nll <= until:
                break
    except (RunError, ValueError, torch.linalg.LinAlgError) as error:  # ValueError: an actnorm's input is constant
        broke = str(error)
    bar.close()
    return {"curve": curve, "broke": broke}


# ---- Table and figure ------------------------------------------------------------------------------------------------

def step_time(curve):
    """Seconds of a step: the median over the stretches between evaluations, without the first one.

    In the first stretch libraries set themselves up, and a GPU records its graph. The median leaves out slow moments of
    the machine.
    """
    stretches = [(t1 - t0) / (s1 - s0) for (s0, t0, _), (s1, t1, _) in zip(curve, curve[1:])]
    return statistics.median(stretches[1:] or stretches) if stretches else None


def reached(curve, level):
    """Steps until the validation NLL is at `level`, on straight lines between the evaluations; None if it never is."""
    if curve and curve[0][2] <= level:
        return 0
    for (s0, _, before), (s1, _, after) in zip(curve, curve[1:]):
        if after <= level:
            return s0 + (s1 - s0) * (before - level) / (before - after)
    return None


def rows(runs):
    """The table of docs/results.md: first, best and last validation NLL; batches/s; for each level steps: seconds."""
    lines = []
    for name, run in runs.items():
        curve, cells = run["curve"], []
        nlls, time_of_step = [nll for _, _, nll in curve], step_time(curve)
        if nlls:
            cells = [f"{nlls[0]:.1f}", f"{min(nlls):.1f}", run["broke"] or f"{nlls[-1]:.1f}"]
        if time_of_step:
            cells.append(f"{1 / time_of_step:.1f}")
            for steps in (reached(curve, level) for level in LEVELS):
                cells.append("–" if steps is None else f"{steps:.0f}: {curve[0][1] + steps * time_of_step:.1f}")
        else:
            cells.append(run["broke"])
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def picture(runs):
    """Validation NLL against time and against steps, a line for each method and start."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    lowest = min(nll for run in runs.values() for _, _, nll in run["curve"])
    for axes, label in zip(figure.subplots(1, 2, sharey=True), ("seconds of training", "steps")):
        for i, name in enumerate(METHODS):
            for start, style in zip(STARTS, ("-", "--")):
                curve = runs[f"{name}, {start}"]["curve"]
                if len(curve) < 2:
                    continue  # it broke down before there was a line to draw
                offset, scale = (curve[0][1], step_time(curve)) if label != "steps" else (0, 1)
                axes.plot([offset + scale * step for step, _, _ in curve[1:]], [nll for _, _, nll in curve[1:]],
                          style, color=f"C{i}", label=name if start == "center" else None)
        axes.set(xlabel=label, xscale="log", ylim=(lowest - 10, lowest + 200))
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set(ylabel="validation NLL (nats)", title="centred pixels, and - - whitened ones")
    figure.axes[1].legend(fontsize="small")
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=at_least(1), default=1500, help="of every run")
    parser.add_argument("--every", type=at_least(1), default=50, help="steps between evaluations")
    parser.add_argument("--batch-size", type=at_least(1), help="of every run, instead of its own")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--data", type=Path, default=MNIST, help="directory of the IDX files")
    parser.add_argument("--results", type=folder, default="results")
    a = parser.parse_args(argv)
    with one_line_errors(DataError, OSError), processes.joined(a.device) as device:
        splits = load_images(a.data)
        path = a.results / "rivals.json"
        result = recorded(path, command="python -m experiments.rivals", methods=METHODS, images=digest(splits),
                          device=str(device), steps=a.steps, every=a.every, batch_size=a.batch_size, seed=a.seed)
        flags = ["--seed", str(a.seed), *(["--batch-size", str(a.batch_size)] if a.batch_size else [])]
        for start in STARTS:
            for name in METHODS:
                if f"{name}, {start}" not in result["runs"]:
                    result["runs"][f"{name}, {start}"] = train(name, start, flags, a.steps, a.every, splits, device)
                    record(path, result)
        with intact(path):
            figure, table = picture(result["runs"]), rows(result["runs"])
        save_picture(a.results / "rivals.png", figure)
        print("\n".join(table))


if __name__ == "__main__":
    main()
