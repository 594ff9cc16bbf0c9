"""The five objectives on the three densities in the plane, several seeds, measured against the truth.

    python -m experiments.toys --compile

Runs `python train_toy.py --data DATA --loss LOSS --seed SEED` for three seeds under runs/, and continues runs that were
stopped. All runs take about an hour on one core, and longer without --compile.

Writes results/toys.png, the densities of seed 0, and results/toys.json. Prints the table of docs/results.md: means over
the seeds, and from two seeds on the half-width of the 95 % interval of the mean (Student's t).
"""

import argparse
import math
import statistics
from itertools import product
from pathlib import Path

import torch
from matplotlib.figure import Figure

import train_toy
from data import TOYS
from experiments import folder, machine, record
from experiments.trained import load_toy
from losses import OBJECTIVES
from support import plots
from support.run import read_metrics, save_picture

STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # {n: the 97.5 % quantile with n - 1 degrees of freedom}


def interval(values):
    """Mean, and half-width of its 95 % interval; None for one value.   -> float, float | None"""
    n = len(values)
    return statistics.mean(values), STUDENT[n] * statistics.stdev(values) / math.sqrt(n) if n > 1 else None


def rows(table):
    """The table of docs/results.md."""
    def cell(row, figure):
        mean, half = row[figure], row[f"{figure}_95"]
        return f"{mean:.4f}" + ("" if half is None else f" ± {half:.4f}")

    return [f"| {row['data']} | {row['loss']} | {row['steps']:,} | {cell(row, 'kl')} | {cell(row, 'fisher')} | "
            f"{row['minutes']:.1f} |" for row in table]


def grid(cells, truths, objectives):
    """Truth and models: a row for each toy, a column for each objective.   cells {(toy, objective): (flow, metrics)}"""
    figure = Figure(figsize=(2.1 * (1 + len(objectives)), 2.3 * len(truths)), layout="constrained")
    rows = figure.subplots(len(truths), 1 + len(objectives), squeeze=False)
    for axes_row, (name, truth) in zip(rows, truths.items()):
        torch.manual_seed(0)
        x = truth.sample(2000)
        top = truth.log_prob(x).max().exp().item()
        plots.image(axes_row[0], lambda x: truth.log_prob(x).exp(), x, vmin=0, vmax=top)
        axes_row[0].set_title(f"{name}, truth", fontsize="small")
        for axes, loss in zip(axes_row[1:], objectives):
            if (name, loss) not in cells:
                axes.axis("off")
                continue
            flow, row = cells[name, loss]
            plots.image(axes, lambda x: flow.log_prob(x).exp(), x.to(next(flow.parameters())), vmin=0, vmax=top)
            axes.set_title(f"{loss}: KL {row['test_kl']:.4f}", fontsize="small")
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 6), help="the number of seeds")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=folder, default="results")
    parser.add_argument("--compile", action="store_true", help="torch.compile the gradients, on a CPU")
    a = parser.parse_args(argv)
    figures, cells = {}, {}
    for seed, toy, loss in product(range(a.seeds), TOYS, OBJECTIVES):
        directory = a.runs / f"toys-{seed}" / f"{toy}-{loss}"
        resume = ["--resume"] if (directory / "config.json").exists() else []  # an error for a run of other settings
        train_toy.main(["--data", toy, "--loss", loss, "--seed", str(seed), "--out", str(directory), *resume,
                        *["--compile"] * a.compile])
        figures[seed, toy, loss] = read_metrics(directory)[-1]
        if seed == 0:
            cells[toy, loss] = load_toy(directory), figures[seed, toy, loss]

    table = []
    for toy, loss in product(TOYS, OBJECTIVES):
        last = [figures[seed, toy, loss] for seed in range(a.seeds)]
        row = {"data": toy, "loss": loss, "steps": last[0]["step"], "seeds": a.seeds,
               "minutes": statistics.mean(r["seconds"] for r in last) / 60}
        for figure in ("kl", "fisher"):
            row[figure], row[f"{figure}_95"] = interval([r[f"test_{figure}"] for r in last])
        table.append(row)
    save_picture(a.results / "toys.png", grid(cells, {name: toy() for name, toy in TOYS.items()}, [*OBJECTIVES]))
    result = {"command": f"python -m experiments.toys --seeds {a.seeds}" + " --compile" * a.compile, "rows": table,
              "machine": machine()}
    record(a.results / "toys.json", result)
    print("\n".join(rows(table)))


if __name__ == "__main__":
    main()
