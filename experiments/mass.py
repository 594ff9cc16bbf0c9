"""Shape by score matching, mass by a few samples: what the steps of sml at the end of train_mnist.py are worth.

    python -m experiments.mass

Trains FC by dsm with its steps of sml, without them, by these steps alone, and not at all; and by ml for seven epochs,
which take as long. NLL hardly sees how much mass lies elsewhere. So draws of each flow are compared with test images,
in coordinates in which the training images have mean 0 and covariance I:

    median   of the distance to the mean, divided by √D, over 2,000 draws
    widest   the largest root mean square in one direction, divided by that of 2,000 images

The picture has draws of each flow from the same noise. ours.

Time: ten minutes a seed on two cores.
"""

from functools import partial
from itertools import product

import torch

import train_mnist
from data import MNIST, DataError, dequantize, load_images
from ebflow import EBFlow
from experiments import command_line, completed, sheet, trained
from support import plots
from support.run import one_line_errors

UNTRAINED = ["--epochs", "1", "--lr", "1e-12"]
CELLS = {"the start": [*UNTRAINED, "--sml-steps", "0"], "sml alone": UNTRAINED, "dsm alone": ["--sml-steps", "0"],
         "dsm, then sml": [], "ml": ["--loss", "ml", "--epochs", "7"]}
SHOWN = 20  # draws in the picture


def spread(z):
    """Median distance to the mean, over √D; the largest root mean square in one direction.   (n, D) -> float, float"""
    return (z.norm(dim=1).median() / z.shape[1] ** 0.5).item(), (torch.linalg.matrix_norm(z, 2) / len(z) ** 0.5).item()


def measure(own, out, whitened, images):
    """Trains a flow.   -> dict: NLLs, median and widest of its draws and of the images, draws as bytes in hex

    whitened  a run whose pre-processing whitens; the flow by ml has the first three of these layers, and no whitening
    """
    _, metrics = trained(train_mnist, own, out, [])
    flow, pre = train_mnist.load(out).flow, train_mnist.load(whitened).flow.layers[:4]
    k = 4 if "ml" not in own else 3
    torch.manual_seed(0)
    z = EBFlow(flow.layers[k:], flow.shape).sample(2000)  # all layers are frozen
    x = EBFlow(pre[:k], flow.shape).inverse(z[:SHOWN])
    (median, widest), (own_median, own_widest) = spread(z if k == 4 else pre[3](z)), spread(
        EBFlow(pre, flow.shape)(dequantize(images[:2000]).flatten(1)))
    return {"val_nll": metrics[-1]["best_val_nll"], "test_nll": metrics[-1]["test_nll"], "median": median,
            "images_median": own_median, "widest": widest / own_widest,
            "draws": bytes(x.clamp(0, 255).byte().flatten().tolist()).hex()}


def rows(runs):
    """The table of docs/results.md: a figure for each seed."""
    for cell in CELLS:
        seeds = [run for name, run in runs.items() if name.rsplit(", seed ")[0] == cell]
        cells = [", ".join(f"{run[key]:{form}}" for run in seeds) for key, form in (
            ("val_nll", ".1f"), ("test_nll", ".1f"), ("median", ".2f"), ("widest", ".1f"))]
        yield f"| {cell} | " + " | ".join(cells) + " |"


def main(argv=None):
    a = command_line(__doc__, "--seeds", "--runs", "--results").parse_args(argv)
    with one_line_errors(DataError):
        images, jobs = load_images(MNIST)[2], {}
        for seed, cell in product(range(a.seeds), CELLS):
            runs = a.runs / f"mass-{seed}"
            jobs[f"{cell}, seed {seed}"] = partial(measure, [*CELLS[cell], "--seed", str(seed)],
                                                   runs / cell.replace(", ", "-").replace(" ", "-"),
                                                   runs / "the-start", images)
        path = a.results / "mass.json"
        runs = completed(path, jobs, command="python -m experiments.mass")
        draws = torch.tensor([[*bytes.fromhex(runs[f"{cell}, seed 0"]["draws"])] for cell in CELLS])
        plots.save(path.with_suffix(".png"), sheet(draws.view(len(CELLS), SHOWN, -1), images.shape[1:], down=CELLS))
        print(*rows(runs), sep="\n")


if __name__ == "__main__":
    main()
