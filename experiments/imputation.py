"""Fills in what is missing of MNIST's digits with a trained energy, by Langevin dynamics on the missing pixels.

    python train_mnist.py --loss ml
    python -m experiments.imputation --run runs/mnist-fc-ml

The lower half is missing, or each pixel with probability ½, or the shape of another digit. The chains start from noise
and run on the logits of the pixels, with Metropolis correction. An observed pixel is an observed logit. Each of the
--draws chains of a digit ends in one completion. Their mean is the guess with the least expected squared error. For a
run with --arch fc the command takes three minutes on one core.

Writes results/imputation-ARCH-LOSS.png and .json: the root-mean-square error over the missing pixels, whose values are
in [0, 1], for one draw, for the mean of the draws, and for the mean of the training images.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from data import MNIST, dequantize, load_images
from ebflow import EBFlow
from experiments import at_least, described, folder, record
from experiments.trained import load_mnist
from sampling import SamplingError, impute, tune
from support.run import one_line_errors, save_picture


def masks(images):
    """Three masks, True where a pixel is missing.   uint8 (n, …) -> {name: bool (n, …)}"""
    D = images[0].numel()
    return {"lower half": (torch.arange(D) >= D // 2).view(images.shape[1:]).expand_as(images),
            "random pixels": torch.rand(images.shape) < 0.5,
            "another digit's shape": images.roll(1, dims=0) > images.max() // 2}


def complete(model, z, mask, draws, steps):
    """Draws of the missing coordinates given the others.   (n, …), (n, …) -> (draws · n, …)

    Burn-in adapts the step size. The steps after it keep it.
    """
    z, mask = (t.repeat(draws, *[1] * (t.dim() - 1)) for t in (z, mask))
    start = torch.where(mask, torch.randn_like(z), z)
    z, step_size = tune(model.energy, start, steps, step_size=1e-3, where=mask)
    z, report = impute(model.energy, z, mask, steps, step_size.item(), adjusted=True, start=z)
    print(described(report))
    return z


def rmse(image, truth, mask):
    """Root-mean-square error over the missing pixels, in units of the range of a pixel."""
    return ((image - truth)[..., mask].square().mean().sqrt() / 256).item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/mnist-fc-ml"), help="directory of a trained model")
    parser.add_argument("--data", type=Path, default=MNIST)
    parser.add_argument("--digits", type=at_least(1), default=64, help="test images that the error is measured on")
    parser.add_argument("--draws", type=at_least(1), default=8)
    parser.add_argument("--steps", type=at_least(1), default=1000, help="Langevin steps of burn-in, and after it")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--results", type=folder, default="results")
    a = parser.parse_args(argv)
    with one_line_errors(SamplingError, ValueError):
        experiment(a)


def experiment(a):
    train_set, _, test_set = load_images(a.data)
    s, pre, flow, _ = load_mnist(a.run, train_set)
    # The first three layers act on each pixel alone. Whitening, if any, does not, so it belongs to the model here.
    pixelwise, model = EBFlow(pre.layers[:3], pre.shape), EBFlow([*pre.layers[3:], *flow.layers], pre.shape)
    torch.manual_seed(a.seed)
    images = test_set[:a.digits].view(-1, *pre.shape)
    mean = train_set.double().mean(0).float().view(pre.shape)
    with torch.no_grad():
        x = dequantize(images)
        z = pixelwise(x)
    table, rows = {}, []
    for name, mask in masks(images).items():
        draws = pixelwise.inverse(complete(model, z, mask, a.draws, a.steps)).detach().unflatten(0, (a.draws, -1))
        guess = draws.mean(0)
        table[name] = {"one draw": rmse(draws, x, mask), "mean of draws": rmse(guess, x, mask),
                       "training mean": rmse(mean.expand_as(x), x, mask)}
        seen = torch.where(mask, 128.0, x)  # grey is missing
        rows += [("truth", x), (name, seen), ("one draw", draws[0]), ("mean of draws", guess)]
    figure = Figure(figsize=(8, 6.6), layout="constrained")
    for axes, (name, pictures) in zip(figure.subplots(len(rows), 1), rows):
        strip = pictures[:16].view(-1, *train_set.shape[1:]).permute(2, 0, 3, 1).flatten(1, 2)  # (H, 16 W, C)
        axes.imshow(strip.clamp(0, 256).numpy() / 256, cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small")
    save_picture(a.results / f"imputation-{s.arch}-{s.loss}.png", figure)
    result = {"loss": s.loss, "arch": s.arch, "rmse": table, "digits": a.digits, "draws": a.draws, "steps": a.steps,
              "seed": a.seed, "command": f"python -m experiments.imputation --run {a.run}"}
    record(a.results / f"imputation-{s.arch}-{s.loss}.json", result)
    print(f"{'missing':24}" + "".join(f"{name:>16}" for name in next(iter(table.values()))))
    for name, errors in table.items():
        print(f"{name:24}" + "".join(f"{error:16.4f}" for error in errors.values()))


if __name__ == "__main__":
    main()
