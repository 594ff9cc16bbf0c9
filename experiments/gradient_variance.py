"""Why the objectives need different numbers of points: the noise of their gradients, at the same parameters.

    python -m experiments.gradient_variance --run runs/toys-0/swirl-dsm
    python -m experiments.gradient_variance --run runs/mnist-cnn-ssm --batch-size 100 --batches 100 --xi 0.5

The expectations of dsm, pooled dsm, sm, ssm and fdssm over points differ by a constant (fdssm's by O(ξ²) more). So they
have the same expected gradient, but different variances. The parameters are those of a finished run of `train_toy.py`
or `train_mnist.py`. From --batches batches come the squared norm of the mean gradient, and the sum of the variances of
its elements. For images there is no sm and no pooled dsm. Each command above takes about a minute on one core.

Writes results/gradient-variance.json for a toy, results/gradient-variance-ARCH.json for images.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import losses
from data import MNIST, TOYS, DataError, Toy, dequantize, load_images
from experiments import at_least, folder, machine, record
from experiments.trained import load_mnist, load_toy
from support.optimization import trainable
from support.run import RunError, one_line_errors, read_checkpoint

OBJECTIVES = {  # (energy, points x without noise, σ of the noise, ξ) -> ()
    "dsm": lambda energy, x, sigma, xi: losses.dsm(energy, x, sigma),
    "sm": lambda energy, x, sigma, xi: losses.sm(energy, x + sigma * torch.randn_like(x)),
    "ssm": lambda energy, x, sigma, xi: losses.ssm(energy, x + sigma * torch.randn_like(x)),
    "fdssm": lambda energy, x, sigma, xi: losses.fdssm(energy, x + sigma * torch.randn_like(x), xi),
    "dsm, pooled": lambda energy, x, sigma, xi: losses.dsm(energy, x, sigma, pooled=True),
}
IN_THE_PLANE = ("sm", "dsm, pooled")  # sm takes D backward passes; pooling takes points closer than σ


def moments(loss, parameters, batches):
    """‖E ∇loss‖², without the bias that noise gives it, and Σ Var ∇loss.   -> float, float"""
    gradients = []
    for _ in range(batches):
        gradient = torch.autograd.grad(loss(), parameters, materialize_grads=True)
        gradients.append(torch.cat([g.flatten() for g in gradient]))
    gradients = torch.stack(gradients).double()
    variance = gradients.var(0).sum()
    return (gradients.mean(0).square().sum() - variance / batches).item(), variance.item()


def finished(directory, data):
    """A finished run.   -> flow; (n) -> n points without noise; σ of the noise; architecture, None for a toy"""
    config = read_checkpoint(directory / "checkpoint.pt")["config"]
    if config.get("data") in TOYS and "blocks" in config:
        toy = TOYS[config["data"]]()
        return load_toy(directory), lambda n: toy.points(n, "cpu"), Toy.smoothing, None
    if "arch" not in config or not (config.get("map") and config.get("sigma")):
        raise RunError(f"{directory} is no run of train_toy.py, nor one of train_mnist.py by score matching with noise")
    images = load_images(data)[0]
    s, pre, flow, _ = load_mnist(directory, images)

    def draw(n):
        return pre(dequantize(images[torch.randint(len(images), (n,))]).view(n, *pre.shape))

    return flow, draw, s.sigma, s.arch


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="directory of a run of train_toy.py or train_mnist.py")
    parser.add_argument("--batch-size", type=at_least(1), default=512)
    parser.add_argument("--batches", type=at_least(2), default=200)
    parser.add_argument("--xi", type=at_least(1e-3, float), default=0.2)
    parser.add_argument("--data", type=Path, default=MNIST, help="the images of a run of train_mnist.py")
    parser.add_argument("--results", type=folder, default="results")
    a = parser.parse_args(argv)
    with one_line_errors(DataError, OSError):
        flow, draw, sigma, arch = finished(a.run, a.data)
        rows = {}
        torch.manual_seed(0)
        for name, loss in tqdm(OBJECTIVES.items(), dynamic_ncols=True):
            if name in IN_THE_PLANE and arch:
                continue
            mean, variance = moments(lambda: loss(flow.energy, draw(a.batch_size), sigma, a.xi), trainable(flow),
                                     a.batches)
            rows[name] = {"mean": mean, "variance": variance}
        flags = " ".join(sys.argv[1:] if argv is None else argv)
        result = {"command": f"python -m experiments.gradient_variance {flags}", "machine": machine(),
                  "batch_size": a.batch_size, "batches": a.batches, "xi": a.xi, "rows": rows}
        record(a.results / f"gradient-variance{'-' + arch if arch else ''}.json", result)
        for name, row in rows.items():
            print(f"{name:12} mean² {row['mean']:10.4g}   variance {row['variance']:10.4g}   "
                  f"divided by dsm's {row['variance'] / rows['dsm']['variance']:.1f}")


if __name__ == "__main__":
    main()
