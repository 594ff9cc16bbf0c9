"""Generates digits by Langevin dynamics on a trained energy, from noise, beside draws by the inverse of the flow.

    python train_mnist.py --loss ml
    python -m experiments.generation --run runs/mnist-fc-ml

The chains run on the pre-processed images, where the objective was applied. They need an energy and no determinant.
Each row is one chain: noise, then its state after 10, 100, 1,000 … Metropolis-adjusted steps. The last columns are
exact draws x = g⁻¹(u). For a run with --arch fc the command takes half a minute on one core.

Writes results/generation-ARCH-LOSS.png. Prints step size, acceptance and energy along the way, and the energies of the
exact draws and of test images.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from data import MNIST, dequantize, load_images
from experiments import at_least, described, folder
from experiments.trained import load_mnist
from sampling import SamplingError, mala, tune
from support.run import one_line_errors, save_picture


def experiment(a):
    train_set, _, test_set = load_images(a.data)
    s, pre, flow, model = load_mnist(a.run, train_set)
    torch.manual_seed(a.seed)
    x = torch.randn(a.chains, *flow.shape)
    moments = [10**k for k in range(1, 9) if 10**k < a.steps - 1] + [a.steps]  # at least two steps apart
    columns, done, step_size = [x], 0, 1e-3
    print(f"step {0:>8}  energy {flow.energy(x).mean():10.1f}")
    for step in moments:
        half = (step - done) // 2  # the first half adapts the step size, the second half keeps it
        x, step_size = tune(flow.energy, x, half, float(step_size))
        x, report = mala(flow.energy, x, step - done - half, step_size.item())
        columns.append(x)
        done = step
        print(f"step {step:8}  energy {flow.energy(x).mean():10.1f}  {described(report)}")
    exact = model.sample(4 * a.chains)
    images = dequantize(test_set[:1000]).view(-1, *flow.shape)
    with torch.no_grad():
        print(f"draws by g⁻¹   energy {flow.energy(pre(exact.clamp(0, 256))).mean():10.1f}")
        print(f"test images    energy {flow.energy(pre(images)).mean():10.1f}")
    pictures = [pre.inverse(z).detach() for z in columns] + list(exact.chunk(4))
    shown = min(a.chains, 16)
    titles = ["noise", *(f"{step:,} steps" for step in moments), *["g⁻¹(u)"] * 4]
    figure = Figure(figsize=(len(titles) * 0.95, shown), layout="constrained")
    grid = figure.subplots(shown, len(titles), squeeze=False)
    for axes_column, title, images in zip(grid.T, titles, pictures):
        for axes, image in zip(axes_column, images):
            pixels = image.view(train_set.shape[1:]).permute(1, 2, 0)  # (H, W, C)
            axes.imshow(pixels.clamp(0, 256).numpy() / 256, cmap="gray", vmin=0, vmax=1)
            axes.axis("off")
        axes_column[0].set_title(title, fontsize="x-small")
    save_picture(a.results / f"generation-{s.arch}-{s.loss}.png", figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/mnist-fc-ml"), help="directory of a trained model")
    parser.add_argument("--data", type=Path, default=MNIST)
    parser.add_argument("--chains", type=at_least(1), default=8)
    parser.add_argument("--steps", type=at_least(2), default=10_000)
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--results", type=folder, default="results")
    a = parser.parse_args(argv)
    with one_line_errors(SamplingError, ValueError):
        experiment(a)


if __name__ == "__main__":
    main()
