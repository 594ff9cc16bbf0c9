"""What the λ·E(x) of the paper's Glow is worth, alone and beside the score, on a small one.

    python -m experiments.energy_weight

Four runs of `python train_mnist.py --paper --arch glow` with 32 channels, four steps in a block, and a learning rate of
1e-3: maximum likelihood, denoising score matching alone, with λ·E as published, and λ·E alone. The actnorms are held,
as published. Runs lie under runs/, and those that were stopped are continued. On one core they take 20 minutes.

Writes results/energy-weight.json and prints the table of docs/results.md.
"""

import argparse
from pathlib import Path

import train_mnist
from experiments import folder, machine, passed_on, record
from losses import OBJECTIVES
from support import settings
from support.run import read_metrics
from support.settings import PAPER

FLAGS = ["--paper", "--arch", "glow", "--width", "32", "--depth", "4", "--lr", "1e-3"]
RUNS = {"ml": ["--loss", "ml"], "dsm": ["--loss", "dsm", "--energy-weight", "0"], "dsm + λE": ["--loss", "dsm"],
        "λE": ["--loss", "energy"]}


def rows(runs):
    """The table of docs/results.md: validation NLL after each epoch."""
    return [f"| {name} | " + " | ".join(f"{nll:.1f}" for nll in run["val_nll"]) + f" | {run['test_nll']:.1f} |"
            for name, run in runs.items()]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", default="2")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=folder, default="results")
    a, flags = parser.parse_known_args(argv)
    # λE alone: Adam does not see λ
    OBJECTIVES["energy"] = lambda model, x, share, **_: model.energy(share(x)).mean()
    PAPER["glow energy"] = PAPER["glow ml"]
    runs = {}
    for i, (name, own) in enumerate(RUNS.items()):
        directory = a.runs / f"energy-weight-{i}"
        resume = ["--resume"] if (directory / "config.json").exists() else []
        own = [*FLAGS, *own, "--epochs", a.epochs, "--out", str(directory), *resume]
        passed_on(settings.Mnist, own, flags)
        train_mnist.main([*own, *flags])
        metrics = read_metrics(directory)
        runs[name] = {"val_nll": [row["val_nll"] for row in metrics], "test_nll": metrics[-1]["test_nll"],
                      "best_epoch": metrics[-1]["best_epoch"]}
        record(a.results / "energy-weight.json", {
            "command": "python -m experiments.energy_weight", "seed": 0, "machine": machine(), "runs": runs})
    print("\n".join(rows(runs)))


if __name__ == "__main__":
    main()
