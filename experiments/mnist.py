"""The five objectives on MNIST with their default settings.

    python -m experiments.mnist
    python -m experiments.mnist --arch cnn

Runs `python train_mnist.py --arch ARCH --loss LOSS` for each objective under runs/, and continues runs that were
stopped. On a CPU all five runs take 30 minutes with --arch fc, 40 with cnn, and 70 with glow.

Writes results/mnist-ARCH.json and results/mnist-ARCH.png, NLL against epochs. Prints the table of docs/results.md.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

import train_mnist
from experiments import folder, machine, record
from experiments.paper import PUBLISHED
from losses import OBJECTIVES
from support.run import read_metrics, save_picture

TITLES = {"fc": "exact NLL of the two-layer flow on MNIST", "cnn": "exact NLL of the convolutional flow on MNIST",
          "glow": "exact NLL of a small Glow on MNIST"}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=list(TITLES), default="fc")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=folder, default="results")
    a = parser.parse_args(argv)

    table = {}
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for loss in OBJECTIVES:
        directory = a.runs / f"mnist-{a.arch}-{loss}"
        resume = ["--resume"] if (directory / "config.json").exists() else []  # an error for a run of other settings
        train_mnist.main(["--arch", a.arch, "--loss", loss, "--out", str(directory), *resume])
        metrics = read_metrics(directory)
        last = metrics[-1]
        command = f"python train_mnist.py --loss {loss}" + (f" --arch {a.arch}" if a.arch != "fc" else "")
        table[loss] = {"start_val_nll": metrics[0]["val_nll"], "val_nll": metrics[last["best_epoch"]]["val_nll"],
                       "test_nll": last["test_nll"], "test_bpd": last["test_bpd"], "minutes": last["seconds"] / 60,
                       "epochs": last["epoch"], "best_epoch": last["best_epoch"], "seed": 0,
                       "command": command, "machine": machine()}
        axes.plot([row["epoch"] for row in metrics], [row["val_nll"] for row in metrics], marker=".",
                  label=f"{loss}, {last['test_nll']:.1f} on the test split")
    if a.arch in PUBLISHED:
        nll = PUBLISHED[a.arch]["ml"]
        axes.axhline(nll, color="k", lw=0.8, ls=":", label=f"ml in the paper, {nll} on the test split")
    low, high = min(row["val_nll"] for row in table.values()), max(row["val_nll"] for row in table.values())
    axes.set(xlabel="epochs", ylabel="validation NLL (nats)", xlim=(0, None), title=TITLES[a.arch],
             ylim=(low - 0.1 * (high - low), high + (high - low)))
    axes.legend(fontsize="small", loc="upper right", ncols=2)
    axes.grid(alpha=0.3)
    save_picture(a.results / f"mnist-{a.arch}.png", figure)
    record(a.results / f"mnist-{a.arch}.json", table)
    for loss, row in table.items():
        print(f"| {loss} | {row['start_val_nll']:.1f} | {row['val_nll']:.1f} | **{row['test_nll']:.1f}** | "
              f"{row['test_bpd']:.3f} | {row['epochs']} |")


if __name__ == "__main__":
    main()
