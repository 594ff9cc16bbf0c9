"""Other ways to train the same flow without its determinants, against exact maximum likelihood and score matching.

    python -m experiments.rivals

All train the two-layer flow of `train_mnist.py` for the same number of steps, from pixels that are centred, and from pixels that are
whitened, too (one more matrix, which W₁ could take in; its eigendecomposition is on the clock). With δ the gradient of the
loss at a layer's output Wx + b, and the rows of a batch as in the code:

    ml        exact: the gradient of W is δᵀx - W^{-T}, O(D³), here in float32 (1.3 times as fast as in float64)
    relative  times WᵀW from the right, δᵀ(xWᵀW) - W, all of it O(BD²)   (Gresele et al. 2020)
    self-norm a learnt R ≈ W⁻¹ for each layer stands in for W⁻¹, and W in turn for R⁻¹: W takes ½(δᵀx - Rᵀ), R takes
              ½(Wᵀ - (δW)ᵀ(xWᵀ)), and λ E‖R(Wx) - x‖², with x held, keeps them together   (Keller et al. 2021)
    ssm, dsm  as in `losses.py`

Validation NLL by the exact density, of the averaged weights, every --every steps while the clock stands still. Writes
results/rivals.json after every run, and goes on from it; results/rivals.png; and prints the rows of the README.
"""

import argparse
import math
import statistics
import time
from itertools import islice
from pathlib import Path

import torch
import torch.nn as nn
from matplotlib.figure import Figure
from torch.autograd.function import once_differentiable
from tqdm import tqdm

import train_mnist
from data import MNIST, DataError, mnist
from ebflow import EBFlow
from experiments import record, recorded
from experiments.speed import timed
from flags import pick_device
from layers import FullyConnected
from run import RunError, one_line_errors, save_picture
from training import MovingAverage, checked, fast_matmul, gradient_of, make_optimizer, train_epoch

LEVELS = (1105, 1080, 1060)  # nats of validation NLL, the time to reach which is in the table
STARTS = ("center", "whiten")
METHODS = {  # the objective, and flags of train_mnist.py: the best of three or four learning rates for each start
    "ml": ("ml", {"center": [], "whiten": ["--lr", "3e-3"]}),
    "relative": ("ml", {"center": ["--lr", "6e-3"], "whiten": ["--lr", "3e-3"]}),
    "self-norm": ("ml", {"center": ["--lr", "6e-3"], "whiten": ["--lr", "3e-3"]}),
    "ssm": ("ssm", {"center": ["--lr", "1e-3"], "whiten": ["--lr", "3e-4"]}),
    "dsm": ("dsm", {"center": ["--lr", "1e-3"], "whiten": ["--lr", "3e-4"]}),
}


class RelativeLinear(torch.autograd.Function):
    """x Wᵀ + b; the gradient of W comes out times WᵀW from the right, at two products O(BD²): δᵀx WᵀW = δᵀ(xWᵀW)."""

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


class SharedLayer(FullyConnected):
    """A fully-connected layer with the weights of another one."""

    def __init__(self, layer):
        super().__init__(len(layer.bias))
        self.weight, self.bias = layer.weight, layer.bias


class ExactLayer(SharedLayer):

    def log_abs_det(self, shape):
        return torch.linalg.slogdet(self.weight).logabsdet


class RelativeLayer(SharedLayer):

    def forward(self, x):
        return RelativeLinear.apply(x, self.weight, self.bias)

    def log_abs_det(self, shape):  # has the gradient W = W^{-T} WᵀW
        return 0.5 * self.weight.square().sum()


class SelfNormalizingLinear(torch.autograd.Function):
    """x Wᵀ + b, of which W takes half of its gradient, ½δᵀx, and R the half that it would have as W's inverse."""

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

    def __init__(self, layer, lam=1.0):
        super().__init__(layer)
        self.lam, self.R = lam, nn.Parameter(torch.linalg.inv(layer.weight.detach()))

    def forward(self, x):
        held = x.detach()
        self.reconstruction = (held @ self.weight.T @ self.R.T - held).square().sum(1).mean()
        return SelfNormalizingLinear.apply(x, self.weight, self.R, self.bias)

    def log_abs_det(self, shape):  # has the gradients ½Rᵀ of W and -½Wᵀ of R
        W, R = self.weight, self.R
        return 0.5 * ((W * R.detach().T).sum() - (R * W.detach().T).sum())


class Rival(EBFlow):
    """The flow with its weights in layers of another kind, whose log-determinants have the gradients that the method gives them."""

    def __init__(self, flow, kind):
        super().__init__([kind(layer) if isinstance(layer, FullyConnected) else layer for layer in flow.layers], flow.shape)

    def energy(self, x):
        energy = super().energy(x)
        return energy + sum(layer.lam * layer.reconstruction for layer in self.layers if isinstance(layer, SelfNormalizingLayer))


def beside(images, n):
    """Images of n of the images beside each other: n times the D.   uint8 (N, …) -> (N // n, n · D)"""
    return images[:len(images) // n * n].reshape(len(images) // n, n * images[0].numel())


def batches(images, n, size):
    """Without end: batches of images of n, drawn at random, each of the images once in an epoch.   uint8 (N, …) -> (size, n · D)"""
    while True:
        order = torch.randperm(len(images), device=images.device)
        for index in order[:len(images) // n // size * size * n].split(size * n):
            yield beside(images[index], n)


def train(name, normalize, flags, steps, every, splits, device, digits=1, until=-math.inf):
    """One run.   -> {"curve": [(step, seconds, validation NLL)], "broke": why, or None}

    The clock starts with what whitening takes, and stands still while the model is evaluated. It ends early where the
    NLL is `until`. With `digits` an image is that many of them beside each other, and the NLL is that of one.
    """
    loss_name, own = METHODS[name]
    args = train_mnist.parse(["--loss", loss_name, "--normalize", normalize, "--epochs", str(-(-steps // every)),  # of `every` steps
                              *own[normalize], *flags])
    torch.manual_seed(args.seed)
    train_set, val_set = splits[0], beside(splits[1], digits).to(device)
    if len(train_set) // digits < args.batch_size or len(val_set) == 0:
        raise RunError(f"{len(train_set)} training images, {digits} beside each other, do not fill a batch of {args.batch_size}: "
                       "lower --digits or --batch-size")
    start = time.perf_counter()
    pre, flow, image_model = (part.to(device) for part in train_mnist.build(args, beside(train_set, digits)))
    seconds = time.perf_counter() - start if normalize == "whiten" else 0.0
    train_set = train_set.to(device)
    rival = {"ml": ExactLayer, "relative": RelativeLayer, "self-norm": SelfNormalizingLayer}.get(name)
    seen = Rival(flow, rival) if rival else flow
    average = MovingAverage(image_model, args.ema_decay)
    optimizer = make_optimizer(args, seen)
    gradient = gradient_of(args, seen, optimizer)

    def minibatches(epoch):
        images = islice(batches(train_set, digits, args.batch_size), every)
        return train_mnist.following(args, flow, (train_mnist.minibatch(args, pre, x) for x in images), momentum=1.0)

    def validate(model):
        train_mnist.refit(args, model, beside(train_set, digits))
        return {"val_nll": train_mnist.evaluate(model, val_set) / digits}

    curve = []
    with tqdm(total=args.epochs * every, unit=" batches", desc=f"{name}, {normalize}{f', {digits} digits' if digits > 1 else ''}", dynamic_ncols=True) as bar:
        try:
            for epoch in range(args.epochs + 1):
                if epoch:
                    with fast_matmul(args.loss):
                        seconds += timed(lambda: train_epoch(args, epoch, gradient, average, optimizer, minibatches, every, bar), device)
                row = checked(args, epoch, validate, average.model)
                curve.append((epoch * every, seconds, row["val_nll"]))
                bar.set_postfix(val_nll=f"{row['val_nll']:.1f}")
                if row["val_nll"] <= until:
                    break
            broke = None
        except RunError as error:
            broke = str(error).split(": lower")[0]
    return {"curve": curve, "broke": broke}


def step_time(curve):
    """Seconds of a step, the median of the stretches between evaluations: a slow moment of the machine is nobody's fault, nor is the first
    stretch, in which libraries set themselves up and a GPU records its graph."""
    stretches = [(t1 - t0) / (s1 - s0) for (s0, t0, _), (s1, t1, _) in zip(curve, curve[1:])]
    return statistics.median(stretches[1:] or stretches) if stretches else None


def reached(curve, level):
    """Steps after which the validation NLL was first at `level`, on straight lines between the evaluations; None if never."""
    if curve and curve[0][2] <= level:
        return 0
    for (s0, _, before), (s1, _, after) in zip(curve, curve[1:]):
        if after <= level:
            return s0 + (s1 - s0) * (before - level) / (before - after)
    return None


def rows(runs):
    """The README's table: start, best and last validation NLL, batches/s, and to each level the steps and the seconds that they take."""
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
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    lowest = min(nll for run in runs.values() for _, _, nll in run["curve"])
    for axes, label in zip(figure.subplots(1, 2, sharey=True), ("seconds of training", "steps")):
        for i, name in enumerate(METHODS):
            for start, style in zip(STARTS, ("-", "--")):
                curve = runs[f"{name}, {start}"]["curve"]
                if len(curve) < 2:
                    continue  # it broke down before there was a line to draw
                offset, scale = (curve[0][1], step_time(curve)) if label != "steps" else (0, 1)
                axes.plot([offset + scale * step for step, _, _ in curve[1:]], [nll for _, _, nll in curve[1:]], style, color=f"C{i}",
                          label=name if start == "center" else None)
        axes.set(xlabel=label, xscale="log", ylim=(lowest - 10, lowest + 200))
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set(ylabel="validation NLL (nats)", title="centred pixels, and - - whitened ones")
    figure.axes[1].legend(fontsize="small")
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="of every run")
    parser.add_argument("--every", type=int, default=50, help="steps between evaluations")
    parser.add_argument("--batch-size", type=int, help="of every run, instead of its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--data", type=Path, default=MNIST)
    parser.add_argument("--results", type=Path, default=Path("results"))
    a = parser.parse_args(argv)
    if min(a.steps, a.every, a.batch_size or 1) < 1:
        parser.error("--steps, --every and --batch-size must be positive")
    with one_line_errors(DataError, OSError):
        device, splits = pick_device(a.device), mnist(a.data)
        a.results.mkdir(exist_ok=True)
        path = a.results / "rivals.json"
        result = recorded(path, command="python -m experiments.rivals", methods=METHODS, images=list(splits[0].shape),
                          device=str(device), steps=a.steps, every=a.every, batch_size=a.batch_size, seed=a.seed)
        flags = ["--seed", str(a.seed), *(["--batch-size", str(a.batch_size)] if a.batch_size else [])]
        for start in STARTS:
            for name in METHODS:
                if f"{name}, {start}" not in result["runs"]:
                    result["runs"][f"{name}, {start}"] = train(name, start, flags, a.steps, a.every, splits, device)
                    record(path, result)
        save_picture(a.results / "rivals.png", picture(result["runs"]))
        print("\n".join(rows(result["runs"])))


if __name__ == "__main__":
    main()
