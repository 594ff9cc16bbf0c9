"""Other ways to train the same flow without its determinants, against exact maximum likelihood and score matching.

    python -m experiments.rivals

All train the two-layer flow of `train_mnist.py` from centred pixels, with its defaults for batch, start and moving average:

    ml        exact: -∂log|det W|/∂W = -W^{-T}, O(D³)
    relative  each W's maximum-likelihood gradient times WᵀW from the right (Gresele et al. 2020). With δ the gradient at
              the layer's output, that is δᵀ(xWᵀW) for the data and -W for the determinant, all of it O(BD²)
    self-norm a learnt R ≈ W⁻¹ for each layer, whose Rᵀ stands in for W^{-T}; λ E‖R(Wx) - x‖², with x held, keeps it there
              (Keller et al. 2021)
    ssm, dsm  as in `losses.py`

Validation NLL by the exact density, of the averaged weights, every --every steps while the clock stands still. Writes
results/rivals.json after every method, and goes on from it; results/rivals.png; and prints the rows of the README.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

import losses
import train_mnist
from data import MNIST, DataError, mnist
from ebflow import EBFlow
from experiments import machine
from experiments.speed import synchronize
from layers import FullyConnected
from run import RunError, one_line_errors, whole
from training import MovingAverage, check_finite, fast_matmul, learning_rate, make_optimizer, pick_device, trainable, update

LEVELS = (1120, 1105, 1100)  # nats of validation NLL, the time to reach which is in the table


class RelativeLinear(torch.autograd.Function):
    """x Wᵀ + b, but the gradient of W comes out times WᵀW from the right: δᵀx WᵀW = δᵀ(xWᵀW), two more O(BD²) products."""

    @staticmethod
    def forward(ctx, x, W, b):
        ctx.save_for_backward(x, W)
        return F.linear(x, W, b)

    @staticmethod
    def backward(ctx, delta):
        x, W = ctx.saved_tensors
        return delta @ W, delta.T @ (F.linear(x, W) @ W), delta.sum(0)


class RelativeFullyConnected(FullyConnected):
    def forward(self, x):
        return RelativeLinear.apply(x, self.weight, self.bias)


class Relative(nn.Module):
    """E(x) - ½ Σ‖W‖², whose gradient is the relative gradient of -log p(x): -W^{-T}WᵀW = -W."""

    def __init__(self, flow):
        super().__init__()
        self.flow = EBFlow([self.share(layer) if isinstance(layer, FullyConnected) else layer for layer in flow.layers], flow.shape)

    @staticmethod
    def share(layer):
        relative = RelativeFullyConnected(len(layer.bias))
        relative.weight, relative.bias = layer.weight, layer.bias
        return relative

    def forward(self, x):
        weights = [layer.weight for layer in self.flow.layers if isinstance(layer, FullyConnected)]
        return self.flow.energy(x).mean() - 0.5 * sum(W.square().sum() for W in weights)


class SelfNormalizing(nn.Module):
    """E(x) - Σ ⟨W, Rᵀ⟩ + λ Σ ‖R(Wx) - x‖², R held in the second term and x, layer by layer, in the third."""

    def __init__(self, flow, lam):
        super().__init__()
        self.flow, self.lam = flow, lam
        self.inverses = nn.ParameterList(torch.linalg.inv(layer.weight.detach()) for layer in flow.layers
                                         if isinstance(layer, FullyConnected))

    def forward(self, x):
        determinants = reconstruction = 0.0
        h, inverses = x, iter(self.inverses)
        for layer in self.flow.layers:
            if not isinstance(layer, FullyConnected):
                h = layer(h)[0].detach()
                continue
            R, y = next(inverses), F.linear(h, layer.weight)
            determinants = determinants + (layer.weight * R.detach().T).sum()
            reconstruction = reconstruction + (F.linear(y, R) - h).square().sum(1).mean()
            h = (y + layer.bias).detach()
        return self.flow.energy(x).mean() - determinants + self.lam * reconstruction


# The settings of each, on top of `train_mnist.py --loss ml` (ssm, dsm: of their own); tuned alike, by the validation NLL.
METHODS = {
    "ml": (["--loss", "ml"], lambda flow, args: lambda x: losses.ml(flow.log_prob, x)),
    "relative": (["--loss", "ml"], lambda flow, args: Relative(flow)),
    "self-norm": (["--loss", "ml"], lambda flow, args: SelfNormalizing(flow, lam=1.0)),
    "ssm": (["--loss", "ssm", "--normalize", "center"], lambda flow, args: lambda x: losses.ssm(flow.energy, x)),
    "dsm": (["--loss", "dsm"], lambda flow, args: lambda x: losses.dsm(flow.energy, x, args.sigma)),
}


def train(name, flags, splits, device, every):
    """One run.   -> {"curve": [(step, seconds, validation NLL)], "rate": batches/s, "broke": why, or None}"""
    chosen, method = METHODS[name]
    args = train_mnist.parse([*chosen, *flags])
    steps = args.epochs * (len(splits[0]) // args.batch_size)
    torch.manual_seed(args.seed)
    pre, flow, image_model = (part.to(device) for part in train_mnist.build(args, splits[0]))
    train_set, val_set = (x.flatten(1).to(device) for x in splits[:2])
    average = MovingAverage(image_model, args.ema_decay)
    loss = method(flow, args)
    extra = [p for p in loss.parameters() if p.requires_grad] if isinstance(loss, nn.Module) else []
    own = {id(p) for p in trainable(flow)}
    optimizer = make_optimizer(args, [*trainable(flow), *(p for p in extra if id(p) not in own)])
    curve, seconds = [(0, 0.0, train_mnist.evaluate(image_model, val_set))], 0.0
    trace, batches = torch.empty(steps, 2, device=device), iter(())
    with tqdm(total=steps, unit=" batches", desc=name, dynamic_ncols=True) as bar:
        for first in range(0, steps, every):
            synchronize(device)
            start = time.perf_counter()
            with fast_matmul():
                for step in range(first, min(first + every, steps)):
                    x = next(batches, None)
                    if x is None:  # the next epoch
                        batches = train_mnist.minibatches(args, pre, train_set)
                        x = next(batches)
                    optimizer.param_groups[0]["lr"] = learning_rate(args, 1, step / steps)
                    trace[step] = torch.stack(update(args, loss(x), optimizer))
                    average.update()
            synchronize(device)
            seconds += time.perf_counter() - start
            bar.update(step + 1 - first)
            try:
                check_finite(args, trace[:step + 1], 1)
                nll = train_mnist.evaluate(average.model, val_set)
            except (RunError, torch.linalg.LinAlgError) as error:
                return {"curve": curve, "rate": step / seconds, "broke": str(error).split(":")[0]}
            curve.append((step + 1, seconds, nll))
            bar.set_postfix(val_nll=f"{nll:.1f}")
    return {"curve": curve, "rate": steps / seconds, "broke": None}


def reached(curve, level):
    """Seconds of training after which the validation NLL was first at `level` or below; None if never."""
    return next((seconds for _, seconds, nll in curve if nll <= level), None)


def rows(runs):
    """The README's table: best and last validation NLL, batches/s, seconds to each level."""
    lines = []
    for name, run in runs.items():
        nlls = [nll for _, _, nll in run["curve"]]
        seconds = [reached(run["curve"], level) for level in LEVELS]
        cells = [f"{min(nlls):.1f}", run["broke"] or f"{nlls[-1]:.1f}", f"{run['rate']:.1f}",
                 *("–" if t is None else f"{t:.0f}" for t in seconds)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def picture(runs):
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    lowest = min(nll for run in runs.values() for _, _, nll in run["curve"])
    for axes, column, label in zip(figure.subplots(1, 2, sharey=True), (1, 0), ("seconds of training", "steps")):
        for i, (name, run) in enumerate(runs.items()):
            axes.plot([point[column] for point in run["curve"][1:]], [nll for _, _, nll in run["curve"][1:]], color=f"C{i}", label=name)
        axes.set(xlabel=label, xscale="log", ylim=(lowest - 10, lowest + 250))
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set(ylabel="validation NLL (nats)")
    figure.axes[1].legend(fontsize="small")
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Other flags go to train_mnist.py.")
    parser.add_argument("--every", type=int, default=50, help="steps between evaluations")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--data", type=Path, default=MNIST)
    parser.add_argument("--results", type=Path, default=Path("results"))
    a, flags = parser.parse_known_args(argv)
    if a.every < 1:
        parser.error("--every must be positive")
    train_mnist.parse(flags)  # an unknown one is an error here
    with one_line_errors(DataError, OSError):
        device, splits = pick_device(a.device), mnist(a.data)
        a.results.mkdir(exist_ok=True)
        path, command = a.results / "rivals.json", " ".join(["python -m experiments.rivals", *flags])
        result = json.loads(path.read_text()) if path.exists() else {"command": command, "machine": machine(), "runs": {}}
        if result["command"] != command:
            raise RunError(f"{path} is of `{result['command']}`: move it away, or name another --results")
        for name in METHODS:
            if name not in result["runs"]:
                result["runs"][name] = train(name, flags, splits, device, a.every)
                with whole(path) as file:
                    file.write((json.dumps(result) + "\n").encode())
        with whole(a.results / "rivals.png") as file:
            picture(result["runs"]).savefig(file, format="png", dpi=150)
        print("\n".join(rows(result["runs"])))


if __name__ == "__main__":
    main()
