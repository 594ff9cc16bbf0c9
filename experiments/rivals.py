"""The relative gradient, which needs no determinant, against exact maximum likelihood and score matching.

    python -m experiments.rivals

Each method trains the two-layer flow of `train_mnist.py`. Let x (B, D) be the batch that enters a layer, and δ (B, D)
the gradient of the loss at its output xWᵀ + b:

    ml        exact: the gradient of W is δᵀx - W^{-T}, O(D³)
    relative  that times WᵀW from the right, δᵀ(xWᵀW) - W, all of it O(BD²)   (Gresele et al. 2020)
    ssm, dsm  as in `losses.py`

All start from whitened pixels; the time to whiten counts. A batch has 200 images, for ssm and dsm 100. The NLL is that
of the averaged parameters, computed outside the measured time.

Time: three minutes on two cores, without evaluation.
"""

import copy
import math
import statistics
import time
from functools import partial

import torch
from matplotlib.ticker import LogLocator, NullFormatter
from torch.autograd.function import once_differentiable

import train_mnist
from data import MNIST, DataError, digest, load_images
from ebflow import EBFlow
from experiments import command_line, completed, panels
from layers import FullyConnected
from support import plots, settings
from support.optimization import cosine
from support.run import one_line_errors

STEPS, EVERY = 1500, 50  # of a run of the comparison, and between evaluations
LEVELS = (1105, 1080, 1060)  # nats of validation NLL; the table has the time to reach each
METHODS = {  # objective, and the best of three or four learning rates
    "ml": ("ml", 3e-3), "relative": ("ml", 3e-3), "ssm": ("ssm", 3e-4), "dsm": ("dsm", 3e-4)}
FLOW = "--diagonal 1 --ratio 1 --bend 1.5 --actnorm none".split()  # of score matching, when the rates were chosen
PLAIN = {"ml": [], "ssm": [*FLOW, "--sigma", "0"], "dsm": [*FLOW, "--sigma", "0.4"]}


# ---- Maximum likelihood with the relative gradient -------------------------------------------------------------------

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


class RelativeLayer(FullyConnected):
    """The relative gradient. Where one is taken, ½‖W‖² stands for log|det W|: its gradient is W = W^{-T} WᵀW."""

    def forward(self, x):
        return RelativeLinear.apply(x, self.weight, self.bias)

    def log_abs_det(self, shape):
        return 0.5 * self.weight.square().sum() if torch.is_grad_enabled() else super().log_abs_det(shape)


# ---- Training --------------------------------------------------------------------------------------------------------

def train(name, flags, splits):
    """One run of a method, with these flags of train_mnist.py.   -> {"curve": [(step, seconds, validation NLL)]}"""
    loss, _ = METHODS[name]
    s = settings.parse(train_mnist.Settings, ["--loss", loss, *PLAIN[loss], *flags])
    torch.manual_seed(s.seed)
    start = time.perf_counter()
    pre, flow = train_mnist.build(s, splits[0])
    seconds = time.perf_counter() - start
    if name == "relative":
        flow = EBFlow([RelativeLayer(*flow.shape, s.diagonal, s.bias) if isinstance(layer, FullyConnected) else layer
                       for layer in flow.layers], flow.shape)
    model = EBFlow([*pre.layers, *flow.layers], pre.shape)
    averaged, curve = copy.deepcopy(model), []                         # θ̃ of EMA
    step, optimizer = train_mnist.make_step(s, pre, flow, model, averaged)
    for done in range(0, STEPS + 1, EVERY):
        if done:                                                       # the first point shows what the start is worth
            torch.manual_seed(1_000_003 * s.seed + done // EVERY)
            start = time.perf_counter()
            order = torch.randperm(len(splits[0])).split(s.batch_size)
            for n, index in zip(range(done - EVERY, done), order):
                optimizer.param_groups[0]["lr"] = s.lr * cosine(n / STEPS)
                step(splits[0][index], n)
            seconds += time.perf_counter() - start
        nll = train_mnist.evaluate("val", averaged, splits[1])["val_nll"]
        curve.append((done, round(seconds, 6), round(nll, 3)))
    return {"curve": curve}


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


def picture(runs):
    """Validation NLL against time and against steps: a line for each method."""
    figure, [row_of_axes] = panels(1, 2, 9, 3.9, sharey=True)
    for axes, label in zip(row_of_axes, ("seconds of training", "steps")):
        for name, curve in ((name, run["curve"]) for name, run in runs.items()):
            offset, scale = (curve[0][1], step_time(curve)) if label != "steps" else (0, 1)
            axes.plot([offset + scale * step for step, _, _ in curve[1:]], [nll for _, _, nll in curve[1:]],
                      color=plots.COLORS.get(name, plots.OTHERS[2]), label=name)
        axes.set(xlabel=label, xscale="log")
        axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:,g}",
                       minor_formatter=NullFormatter())
    row_of_axes[0].set_ylabel("validation NLL (nats)")
    row_of_axes[0].legend()
    figure.suptitle("two-layer flow on whitened MNIST; batches of 200, for ssm and dsm of 100")
    return figure


def main(argv=None):
    a = command_line(__doc__, "--results").parse_args(argv)
    with one_line_errors(DataError):
        splits, path = load_images(MNIST), a.results / "rivals.json"
        jobs = {name: partial(train, name, ["--normalize", "whiten", "--lr", str(lr)], splits)
                for name, (_, lr) in METHODS.items()}
        runs = completed(path, jobs, command="python -m experiments.rivals", methods=METHODS, steps=STEPS, every=EVERY,
                         images=digest(splits), seed=0)
        plots.save(path.with_suffix(".png"), picture(runs))
        print(*rows(runs), sep="\n")


if __name__ == "__main__":
    main()
