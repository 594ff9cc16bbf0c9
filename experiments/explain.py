"""Four ideas of docs/tour.md as pictures: dsm, why a score does not show mass, Langevin dynamics, and MaP.

    python -m experiments.explain

Writes results/explain-*.png, and results/explain.json with the numbers beside the pictures.

Time: half a minute on one core.
"""

import math

import torch
from torch.nn.utils import get_total_norm

import train_toy
from data import MNIST, dequantize, load_images
from densities import Mixture, mixture
from ebflow import EBFlow, toy_flow
from experiments import command_line, machine, panels, record
from layers import Logit
from losses import dsm
from sampling import langevin
from support import plots, settings
from support.optimization import cosine, trainable
from support.run import one_line_errors
from train_mnist import Settings, build

SIGMA, STEPS, CHAINS, IMAGES = 0.4, 600, 1000, 300
T = torch.linspace(-1, 1, 100)
DATA = Mixture(torch.full((100,), 1 / 100), torch.stack([3 * T, 2 * torch.sin(4 * T)], dim=1), std=0.15)
SMOOTHED = Mixture(DATA.weights, DATA.means, std=math.hypot(0.15, SIGMA))


def divergences(p, q, x):
    """KL and Fisher divergence of q from p, by draws x of p.   -> dict"""
    row = train_toy.divergences("test", q, x, p.log_prob(x), p.score(x))
    return {name: row[f"test_{name}"] for name in ("kl", "fisher")}


def frame(axes, limit, *titles):
    """Titles, and the square of the plane that is shown."""
    for one, title in zip(axes, titles, strict=True):
        one.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")


def denoising():
    """Noisy points and their targets, a flow before and after dsm, and the smoothed data, which dsm aims at."""
    figure, [axes] = panels(1, 4, 13, 3.6)
    x, color, limit = DATA.sample(60), plots.COLORS["dsm"], 4.0
    x_noisy = x + SIGMA * torch.randn_like(x)
    axes[0].plot(*x.T, "k.", label="x")
    axes[0].plot(*x_noisy.T, ".", color=color, label="x̃")
    axes[0].quiver(*x_noisy.T, *(x - x_noisy).T, color=color, angles="xy", scale_units="xy", scale=1, width=0.005)
    axes[0].legend(loc="upper left")

    flow, test, found = toy_flow(blocks=4), SMOOTHED.sample(5000), []

    def show(axes, density):
        plots.image(axes, lambda x: density.log_prob(x).exp(), torch.tensor([[limit]]), vmin=0, vmax=0.12)
        plots.scores(axes, density, 20, limit, x, color="w")
        found.append(divergences(SMOOTHED, density, test))

    show(axes[1], flow)
    optimizer = torch.optim.Adam(flow.parameters())
    for n in range(STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * cosine(n / STEPS)
        optimizer.zero_grad()
        dsm(flow.energy, DATA.sample(500), SIGMA).backward()
        optimizer.step()
    show(axes[2], flow)
    show(axes[3], SMOOTHED)
    frame(axes, limit, "σ² · target, an arrow from x̃ to x", "density and score: at the start",
          f"after {STEPS} steps of dsm", "of the smoothed data")
    return figure, {"start": found[0], "trained": found[1]}


def weights():
    """Two mixtures that differ in the weights of their modes: densities above, scores below."""
    figure, [[above], [below]] = panels(2, 1, 6.5, 4.2, sharex=True)
    x, densities = torch.linspace(-8, 8, 1601)[:, None], [Mixture([w, 1 - w], [[-4.0], [4.0]]) for w in (0.5, 0.9)]
    for p, color, style in zip(densities, plots.OTHERS, ("-", "--")):
        above.plot(x, p.log_prob(x).exp(), style, color=color, label="weights {:.1f} and {:.1f}".format(*p.weights))
        below.plot(x, p.score(x), style, color=color)
    above.set(ylabel="density p")
    below.set(ylabel="score ∇ log p", xlabel="x")
    above.legend()
    return figure, divergences(*densities, densities[0].sample(200_000))


def chains():
    """An energy with its score, one Langevin chain from a corner, and where many such chains are at the end."""
    figure, [axes] = panels(1, 3, 10.5, 3.8)
    density, limit = mixture(weights=(0.2, 0.3, 0.5), distance=3.5), 5.0
    x, path = torch.full((CHAINS, 2), -4.5), []
    for _ in range(500):
        path.append(x[0])
        x = langevin(lambda x: -density.log_prob(x), x, 1, 0.03)
    for one in axes:
        plots.image(one, lambda x: -density.log_prob(x), torch.tensor([[limit]]), cmap="viridis_r", vmax=14)
    plots.scores(axes[0], density, 20, limit, x, color="k")
    axes[1].plot(*torch.stack(path).T, color="k", lw=0.7)
    axes[1].plot(*path[0], "wo")
    axes[2].plot(*x.T, "k.", ms=1.5)
    frame(axes, limit, "energy E, and the score -∇E", f"one chain, {len(path)} steps", f"{CHAINS:,} chains, at the end")
    return figure, {"weights": density.weights.tolist(), "chains": density.responsibilities(x).mean(0).tolist()}


def pixels():
    """The slope of the logit against the pixel; the gradient of dsm in θ at the default start, image by image."""
    figure, [[left, right]] = panels(1, 2, 9, 3.4)
    pixel, s = torch.linspace(0, 256, 20_001)[:, None], settings.parse(Settings, [])
    left.semilogy(pixel, Logit()(pixel / 256)[1].exp() / 256, color="k")
    left.set(xlabel="pixel x", ylabel="slope of logit(x / 256)", xticks=range(0, 257, 64))
    images, found = load_images(MNIST)[0], {}
    pre, flow = build(s, images)
    x, model = dequantize(images[:IMAGES]).view(-1, *pre.shape), EBFlow([*pre.layers, *flow.layers], pre.shape)
    for name, energy, batch, color in (("with MaP, on z", flow.energy, pre(x), plots.COLORS["dsm"]),
                                       ("without, on x", model.energy, x, plots.GREY)):
        norms = torch.stack([get_total_norm(torch.autograd.grad(dsm(energy, one, s.sigma), trainable(flow)))
                             for one in batch.split(1)])
        right.hist(norms, bins=torch.logspace(3, 9, 61).tolist(), color=color, label=name)
        found[name] = {"smallest": norms.min().item(), "median": norms.median().item(), "largest": norms.max().item()}
    right.set(xscale="log", xlabel=f"norm of the gradient in θ, dsm, σ = {s.sigma}", ylabel="images")
    right.legend()
    return figure, found


def main(argv=None):
    a = command_line(__doc__, "--results").parse_args(argv)
    with one_line_errors():
        result = {"command": "python -m experiments.explain", "seed": 0, "machine": machine()}
        for name, draw in (("dsm", denoising), ("weights", weights), ("langevin", chains), ("map", pixels)):
            torch.manual_seed(0)
            figure, result[name] = draw()
            plots.save(a.results / f"explain-{name}.png", figure)
            print(name, result[name], flush=True)
        record(a.results / "explain.json", result)


if __name__ == "__main__":
    main()
