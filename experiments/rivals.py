"""Other ways to train the same flow without its determinants, against exact maximum likelihood and score matching.

    python -m experiments.rivals             validation NLL against time
    python -m experiments.rivals --race      time until one level of it, against D

Each method trains the two-layer flow of `train_mnist.py`. Let x (B, D) be the batch that enters a layer, and δ (B, D)
the gradient of the loss at its output xWᵀ + b:

    ml        exact: the gradient of W is δᵀx - W^{-T}, O(D³)
    relative  that times WᵀW from the right, δᵀ(xWᵀW) - W, all of it O(BD²)   (Gresele et al. 2020)
    self-norm a learnt R ≈ W⁻¹ of each layer stands in for W⁻¹, and W in turn for R⁻¹: W takes ½(δᵀx - Rᵀ), R takes
              ½(Wᵀ - (δW)ᵀ(xWᵀ)), and λ E‖R(Wx) - x‖², with x held constant, ties the two together (Keller et al. 2021)
    ssm, dsm  as in `losses.py`

The comparison starts from whitened pixels; the time to whiten counts. A batch has 200 images, for ssm and dsm 100. In
the race an image is n MNIST digits beside each other, drawn at random for every batch, so D = 784 n. Its entropy per
digit is that of a digit alone, so the level is the same for all D. A batch has 500 images for ml and relative, 100 for
ssm and dsm. Each run starts from centred pixels, two matrices I, and a last actnorm. Every tenth step sets its output
to mean 0 and variance 1.

The NLL is exact, that of the averaged parameters, and computed outside the measured time. Writes results/rivals.json or
results/race-DEVICE.json after every run, and continues from it; then rivals.png, or race.png with a panel for each
device. Prints the table of docs/results.md.
"""

import copy
import json
import math
import statistics
import time
from dataclasses import replace
from functools import partial

import torch
import torch.nn as nn
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator
from torch.autograd.function import once_differentiable

import losses
import train_mnist
from data import MNIST, DataError, dequantize, digest, load_images
from ebflow import EBFlow
from experiments import command_line, completed, panels
from layers import FullyConnected
from support import plots, processes, settings
from support.optimization import cosine
from support.run import one_line_errors

STEPS, EVERY = 1500, 50  # of a run of the comparison, and between evaluations
LEVELS = (1105, 1080, 1060)  # nats of validation NLL; the table has the time to reach each
METHODS = {  # objective, and the best of three or four learning rates
    "ml": ("ml", 3e-3), "relative": ("ml", 3e-3), "self-norm": ("ml", 3e-3), "ssm": ("ssm", 3e-4), "dsm": ("dsm", 3e-4)}
FLOW = "--diagonal 1 --ratio 1 --bend 1.5 --actnorm none".split()  # of score matching, when the rates were chosen
PLAIN = {"ml": [], "ssm": [*FLOW, "--sigma", "0"], "dsm": [*FLOW, "--sigma", "0.4"]}

LEVEL, DIGITS, RACE_EVERY = 1105, (1, 2, 4), 20  # of the race
CENTRED = ["--normalize", "center", "--actnorm", "moments"]
# Learning rate, divided by √n for n digits; the steps in which it rises and falls, times n; flags of train_mnist.py.
# They are the fastest found at n = 1; for ml and relative, the fastest that do not break down at n = 2 and 4 either.
RACE = {
    "ml": (4e-3, 120, ["--batch-size", "500"]),
    "relative": (4e-3, 120, ["--batch-size", "500"]),
    "ssm": (1e-3, 200, ["--batch-size", "100", "--sigma", "0.4"]),
    "dsm": (1.5e-3, 160, ["--batch-size", "100", "--sigma", "1"]),
}


# ---- The methods: maximum likelihood with other gradients ------------------------------------------------------------

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


class RelativeLayer(FullyConnected):
    """The relative gradient. Where one is taken, ½‖W‖² stands for log|det W|: its gradient is W = W^{-T} WᵀW."""

    def forward(self, x):
        return RelativeLinear.apply(x, self.weight, self.bias)

    def log_abs_det(self, shape):
        return 0.5 * self.weight.square().sum() if torch.is_grad_enabled() else super().log_abs_det(shape)


class SelfNormalizingLayer(FullyConnected):
    """A learnt R for W⁻¹. Where a gradient is taken, the log-determinant's are ½Rᵀ for W and -½Wᵀ for R."""

    def __init__(self, dim, diagonal=1.0, bias=0.0):
        super().__init__(dim, diagonal, bias)
        self.R = nn.Parameter(torch.linalg.inv(self.weight.detach()))

    def forward(self, x):
        constant = x.detach()  # reconstruction: E‖R(Wx) - x‖²
        self.reconstruction = (constant @ self.weight.T @ self.R.T - constant).square().sum(1).mean()
        return SelfNormalizingLinear.apply(x, self.weight, self.R, self.bias)

    def log_abs_det(self, shape):
        W, R = self.weight, self.R
        surrogate = 0.5 * ((W * R.detach().T).sum() - (R * W.detach().T).sum())
        return surrogate if torch.is_grad_enabled() else super().log_abs_det(shape)


def self_norm(flow, x, lam=1.0, **_):
    """E[ -log p(x) ] + λ E‖R(Wx) - x‖², summed over the fully-connected layers.   -> ()"""
    loss = losses.ml(flow.log_prob, x)
    return loss + lam * sum(layer.reconstruction for layer in flow.layers if isinstance(layer, SelfNormalizingLayer))


KINDS = {"relative": RelativeLayer, "self-norm": SelfNormalizingLayer}
COLORS = plots.COLORS | dict(zip(KINDS, plots.OTHERS[2:]))


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


def train(name, flags, every, splits, device, steps, digits=1, until=-math.inf):
    """One run of a method.   -> {"curve": [(step, seconds, validation NLL)], "digits"}

    flags   of train_mnist.py: for pixels, flow, batches, noise, learning rate and seed, no others
    every   steps of a stretch, after which the model is evaluated; `steps` is a multiple
    digits  so many images beside each other are one image here; the NLL is that of one of them, the lowest `until`
    """
    loss, _ = METHODS[name]
    s = settings.parse(train_mnist.Settings, ["--loss", loss, *PLAIN[loss], *flags])
    train_set, val_set = (split.to(device) for split in splits[:2])
    torch.manual_seed(s.seed)
    start = time.perf_counter()
    pre, flow = train_mnist.build(s, beside(splits[0], digits))
    seconds = time.perf_counter() - start if s.normalize == "whiten" else 0.0
    if name in KINDS:
        flow = EBFlow([KINDS[name](*flow.shape, s.diagonal, s.bias) if isinstance(layer, FullyConnected) else layer
                       for layer in flow.layers], flow.shape)
    model = EBFlow([*pre.layers, *flow.layers], pre.shape).to(device)
    averaged = copy.deepcopy(model)                                    # θ̃ of EMA
    losses.OBJECTIVES.update({"relative": losses.OBJECTIVES["ml"], "self-norm": self_norm})
    step, optimizer = train_mnist.make_step(replace(s, loss=name, actnorm="none"), pre, flow, model, averaged)

    curve, sigma = [], 0.0 if loss == "ml" else s.sigma
    for stretch in range(steps // every + 1):
        if stretch:                                                    # stretch 0 shows what the start alone is worth
            torch.manual_seed(1_000_003 * s.seed + stretch)
            first, start = (stretch - 1) * every, time.perf_counter()
            for n, images in zip(range(first, first + every), batches(train_set, digits, s.batch_size)):
                optimizer.param_groups[0]["lr"] = s.lr * cosine(n / steps)
                if s.actnorm == "moments" and n % 10 == 0:             # all the way: a run has few steps
                    z = pre(dequantize(images))
                    train_mnist.track_moments(flow, z + sigma * torch.randn_like(z))
                figures = step(images, n)
            figures["loss"].item()                                     # waits for a GPU
            seconds += time.perf_counter() - start
        if s.actnorm == "moments":                                     # averaged parameters have their own moments
            torch.manual_seed(0)
            train_mnist.track_moments(averaged, dequantize(beside(train_set, digits)[:1000]))
        nll = train_mnist.evaluate("val", averaged, beside(val_set, digits))["val_nll"] / digits
        curve.append((stretch * every, round(seconds, 6), round(nll, 3)))
        if nll <= until:
            break
    return {"curve": curve, "digits": digits}


# ---- Tables and figures ----------------------------------------------------------------------------------------------

def step_time(curve):
    """Seconds of a step: the median over the stretches, without the first, in which libraries set themselves up."""
    stretches = [(t1 - t0) / (s1 - s0) for (s0, t0, _), (s1, t1, _) in zip(curve, curve[1:])]
    return statistics.median(stretches[1:] or stretches or [math.nan])


def reached(curve, level):
    """Steps until the validation NLL is at `level`, on straight lines between the evaluations; None if it never is."""
    for (s0, _, before), (s1, _, after) in zip(curve[:1] + curve, curve):
        if after <= level:
            return s0 + (s1 - s0) * (before - level) / (before - after) if s1 else 0


def rows(runs):
    """The comparison: first, lowest and last validation NLL; batches/s; for each level steps: seconds."""
    for name, run in runs.items():
        curve, nlls = run["curve"], [nll for *_, nll in run["curve"]]
        cells = [name, *(f"{x:.1f}" for x in (nlls[0], min(nlls), nlls[-1], 1 / step_time(curve)))]
        for steps in (reached(curve, level) for level in LEVELS):
            cells.append("–" if steps is None else f"{steps:.0f}: {curve[0][1] + steps * step_time(curve):.1f}")
        yield "| " + " | ".join(cells) + " |"


def plain(axis):
    """Ticks of a logarithmic axis at 1, 2, 5, 10 …, in plain numbers."""
    axis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:,g}", minor_formatter=NullFormatter())


def picture(runs):
    """Validation NLL against time and against steps: a line for each method."""
    figure, [row_of_axes] = panels(1, 2, 9, 3.9, sharey=True)
    for axes, label in zip(row_of_axes, ("seconds of training", "steps")):
        for name, curve in ((name, run["curve"]) for name, run in runs.items()):
            offset, scale = (curve[0][1], step_time(curve)) if label != "steps" else (0, 1)
            axes.plot([offset + scale * step for step, _, _ in curve[1:]], [nll for _, _, nll in curve[1:]],
                      color=COLORS[name], label=name)
        axes.set(xlabel=label, xscale="log")
        plain(axes.xaxis)
    row_of_axes[0].set_ylabel("validation NLL (nats)")
    row_of_axes[0].legend()
    figure.suptitle("two-layer flow on whitened MNIST; batches of 200, for ssm and dsm of 100")
    return figure


def arrivals(runs):
    """By the number of digits and by method: the steps to the level and their seconds, or None.   -> {n: {name: …}}"""
    found = {n: dict.fromkeys(RACE) for n in sorted({run["digits"] for run in runs.values()})}
    for label, run in runs.items():
        if steps := reached(run["curve"], LEVEL):
            found[run["digits"]][label.split(",")[0]] = steps, steps * step_time(run["curve"])
    return found


def race_rows(runs):
    """The race: for each D and method steps × time of a step = seconds; ml's time over dsm's."""
    for n, best in arrivals(runs).items():
        cells = [f"{at[0]:.0f} × {1e3 * at[1] / at[0]:.1f} ms = {at[1]:.2f} s" if at else "–" for at in best.values()]
        ratio = f"{best['ml'][1] / best['dsm'][1]:.1f}" if best["ml"] and best["dsm"] else "–"
        yield f"| {784 * n:,} | " + " | ".join([*cells, ratio]) + " |"


def race_picture(records):
    """Seconds to the level against D: a panel for each record, a line for each method."""
    figure, [row_of_axes] = panels(1, len(records), 4.5 * len(records), 3.9)
    for axes, result in zip(row_of_axes, records):
        found = arrivals(result["runs"])
        ticks = [784 * n for n in found]
        for name in RACE:
            seconds = [best[name][1] if best[name] else math.nan for best in found.values()]
            axes.loglog(ticks, seconds, "o-", ms=4, color=COLORS[name], label=name)
        axes.set(xlabel="D", title=result["machine"].rsplit(", ", 1)[0])
        axes.xaxis.set(major_locator=FixedLocator(ticks), major_formatter="{x:,g}", minor_locator=NullLocator())
        plain(axes.yaxis)
    row_of_axes[0].set_ylabel("seconds of training")
    row_of_axes[0].legend()
    figure.suptitle(f"time to {LEVEL:,} nats per digit; batches of 500 for ml and relative, of 100 for ssm and dsm")
    return figure


def main(argv=None):
    parser = command_line(__doc__, "--device", "--results")
    parser.add_argument("--race", action="store_true", help="the race, in place of the comparison")
    a = parser.parse_args(argv)
    with one_line_errors(DataError), processes.joined(a.device) as (device, *_):
        splits = load_images(MNIST)
        shared = dict(images=digest(splits), seed=0)
        if a.race:
            path, table = a.results / f"race-{device.type}.json", race_rows
            jobs = {f"{name}, {n} digits": partial(
                train, name, [*CENTRED, "--lr", str(lr / n**0.5), *own], RACE_EVERY, splits, device, n * length, n,
                LEVEL) for n in DIGITS for name, (lr, length, own) in RACE.items()}
            runs = completed(path, jobs, command="python -m experiments.rivals --race", methods=RACE, level=LEVEL,
                             every=RACE_EVERY, **shared)
            records = [json.loads(file.read_text()) for file in sorted(a.results.glob("race-*.json"))]
            plots.save(a.results / "race.png", race_picture(records))
        else:
            path, table = a.results / "rivals.json", rows
            jobs = {name: partial(train, name, ["--normalize", "whiten", "--lr", str(lr)], EVERY, splits, device, STEPS)
                    for name, (_, lr) in METHODS.items()}
            runs = completed(path, jobs, command="python -m experiments.rivals", methods=METHODS, device=str(device),
                             steps=STEPS, every=EVERY, **shared)
            plots.save(path.with_suffix(".png"), picture(runs))
        print(*table(runs), sep="\n")


if __name__ == "__main__":
    main()
