"""The tables of train_mnist.py and train_toy.py: five objectives with our recipes, and runs with the published ones.

    python -m experiments.tables                               two fully-connected layers on MNIST
    python -m experiments.tables --arch cnn                    convolutions; glow: a small Glow
    python -m experiments.tables --arch toy --compile          three densities in the plane, three seeds
    python -m experiments.tables --paper runs/mnist-fc-dsm     reads finished runs of train_mnist.py --paper

The record is mnist-ARCH.json, for FC with a picture of NLL against epochs; or toys.json, with the densities of seed 0;
or paper.json, whose other runs stay.

Time: on one core 30 minutes with fc, 40 with cnn, 70 with glow, an hour and a half with toy.
"""

import json
import math
import statistics
from itertools import product
from pathlib import Path

import torch

import train_mnist
import train_toy
from densities import TOYS
from experiments import command_line, machine, panels, read_metrics, record, trained
from losses import OBJECTIVES
from recipes import paper
from support import plots
from support.run import RunError, one_line_errors

PAPER = paper((1, 28, 28))
PUBLISHED = {"fc": dict(ml=1092.4, sml=1092.3, ssm=1092.8, dsm=1099.2, fdssm=1104.1),
             "cnn": dict(ml=1101.3, sml=1098.3, ssm=1107.5, dsm=1109.5, fdssm=1122.1)}
FIGURES = ("before_sml_test_kl", "before_sml_test_fisher", "test_kl", "test_fisher")  # of the toys
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # {n: the 97.5 % quantile with n - 1 degrees of freedom}


def interval(values):
    """Mean, and half-width of its 95 % interval (Student's t); None for one value.   -> float, float | None"""
    n = len(values)
    return statistics.mean(values), STUDENT[n] * statistics.stdev(values) / math.sqrt(n) if n > 1 else None


def mnist(a, flags):
    """Images by our recipes."""
    table, curves = {}, {}
    for loss in OBJECTIVES:
        own = ["--loss", loss, *["--arch", a.arch] * (a.arch != "fc")]
        s, curves[loss] = trained(train_mnist, own, a.runs / f"mnist-{a.arch}-{loss}", flags)
        first, last = curves[loss][0], curves[loss][-1]
        table[loss] = {"start_val_nll": first["val_nll"], "val_nll": last["best_val_nll"], "test_nll": last["test_nll"],
                       "before_sml": last.get("before_sml_test_nll"), "test_bpd": last["test_bpd"], "epochs": s.epochs,
                       "best_epoch": last["best_epoch"], "seed": s.seed, "machine": machine(),
                       "command": " ".join(["python train_mnist.py", *own, *flags])}
    if a.arch == "fc":
        plots.save(a.results / "mnist-fc.png", nll_curves(curves, table))
    record(a.results / f"mnist-{a.arch}.json", table)
    return mnist_rows(table)


def nll_curves(curves, table):
    """Validation NLL of FC against epochs: a line for each objective."""
    figure, [[axes]] = panels(1, 1, 7, 3.6)
    for loss, metrics in curves.items():
        axes.plot([row["epoch"] for row in metrics], [row["val_nll"] for row in metrics], marker=".",
                  color=plots.COLORS.get(loss), label=f"{loss}, {table[loss]['test_nll']:.1f} on the test split")
    nll = PUBLISHED["fc"]["ml"]
    axes.axhline(nll, color=plots.GREY, ls=":", label=f"ml in the paper, {nll} on the test split")
    low, high = min(row["val_nll"] for row in table.values()), max(row["val_nll"] for row in table.values())
    axes.set(xlabel="epochs", ylabel="validation NLL (nats)", title="exact NLL of FC on MNIST",
             xlim=(0, None), ylim=(low - 0.1 * (high - low), high + (high - low)))
    axes.legend(fontsize="small", loc="upper right", ncols=2)
    return figure


def alone(row):
    """The test NLL by the objective alone, before steps of sml."""
    return row.get("before_sml") or row["test_nll"]


def mnist_rows(table):
    """Where steps of sml follow some objective, a column has the NLL before them."""
    two = any(row.get("before_sml") for row in table.values())
    return [f"| {loss} | {row['start_val_nll']:.1f} | {row['val_nll']:.1f} | {f'{alone(row):.1f} | ' * two}"
            f"**{row['test_nll']:.1f}** | {row['test_bpd']:.3f} | {row['epochs']} |" for loss, row in table.items()]


def by_paper(a):
    """Images by the published recipes."""
    path = a.results / "paper.json"
    found = json.loads(path.read_text())["runs"] if path.exists() else {}
    found |= dict(published_run(directory, a.machine) for directory in a.paper)
    runs = {cell: found[cell] for cell in PAPER if cell in found}
    tuned = {arch: json.loads((a.results / f"mnist-{arch}.json").read_text())
             for arch in {cell.split()[0] for cell in runs}}
    record(path, {"command": "python -m experiments.tables --paper", "runs": runs})
    return paper_rows(runs, tuned)


def published_run(directory, name):
    """A finished run with --paper, on the machine of this name.   -> its cell of the table, and its figures"""
    config, metrics = json.loads((directory / "config.json").read_text()), read_metrics(directory)
    if not config["paper"]:
        raise RunError(f"{directory} is no run of train_mnist.py --paper")
    arch, loss, last = config["arch"], config["loss"], metrics[-1]
    kept = [row for row in metrics if row["epoch"] % 10 == 0 or row["epoch"] in (last["best_epoch"], last["epoch"])]
    command = f"--arch {arch} --loss {loss} --epochs {last['epoch']} --seed {config['seed']}"
    return f"{arch} {loss}", {
        "command": f"python train_mnist.py --paper {command}", "machine": name, "minutes": last["seconds"] / 60,
        "epochs": last["epoch"], "best_epoch": last["best_epoch"], "test_nll": last["test_nll"],
        "val_nll": {str(row["epoch"]): round(row["val_nll"], 1) for row in kept}}


def paper_rows(runs, tuned):
    """tuned {architecture: results/mnist-ARCH.json}"""
    for cell, run in runs.items():
        arch, loss = cell.split()
        yield (f"| {arch} | {loss} | {PUBLISHED.get(arch, {}).get(loss, '–')} | {PAPER[cell]['epochs']:,} | "
               f"{run['test_nll']:.1f} | {run['epochs']:,} | {alone(tuned[arch][loss]):.1f} |")


def toys(a, flags):
    """Points in the plane by our recipes. The start has the steps of sml alone: the learning rate of step 0 is 0."""
    own = {loss: ["--loss", loss] for loss in OBJECTIVES} | {"the start": ["--epochs", "1", "--steps", "1"]}
    lasts = {(toy, cell): [] for toy, cell in product(TOYS, own)}  # the last row of each seed
    for seed, (toy, cell) in product(range(a.seeds), lasts):
        _, metrics = trained(train_toy, ["--data", toy, "--seed", str(seed), *own[cell]],
                             a.runs / f"toys-{seed}" / f"{toy}-{cell.split()[-1]}", flags)
        lasts[toy, cell].append(metrics[-1])
    table = [{"data": toy, "cell": cell} | {name: interval([r.get(name, r[name.removeprefix("before_sml_")])
                                                            for r in last]) for name in FIGURES}
             for (toy, cell), last in lasts.items()]
    flows = {(toy, loss): train_toy.load(a.runs / "toys-0" / f"{toy}-{loss}") for toy in TOYS for loss in OBJECTIVES}
    plots.save(a.results / "toys.png", grid(flows, {cell: last[0]["test_kl"] for cell, last in lasts.items()}))
    command = ["python -m experiments.tables --arch toy --seeds", str(a.seeds), *flags]
    record(a.results / "toys.json", {"command": " ".join(command), "rows": table, "machine": machine()})
    return toy_rows(table)


def grid(flows, kl):
    """Truth and flows: a row for each toy, a column for each objective. Both arguments are {(toy, objective): …}."""
    figure, axes = panels(len(TOYS), 1 + len(OBJECTIVES), 2.1 * (1 + len(OBJECTIVES)), 2.3 * len(TOYS))
    for axes_row, name in zip(axes, TOYS):
        torch.manual_seed(0)
        truth = TOYS[name]()
        x = truth.sample(2000)
        top = truth.log_prob(x).max().exp().item()
        for one, loss in zip(axes_row, ("truth", *OBJECTIVES)):
            density = truth if loss == "truth" else flows[name, loss]
            plots.image(one, lambda x: density.log_prob(x).exp(), x, vmin=0, vmax=top)
            one.set_title(f"{name}, truth" if loss == "truth" else f"{loss}: KL {kl[name, loss]:.4f}", fontsize="small")
    return figure


def toy_rows(table):
    """Means over the seeds, and from two seeds on the half-width of the interval."""
    for row in table:
        cells = [f"{mean:.4f}" + (f" ± {half:.4f}" if half else "") for mean, half in map(row.get, FIGURES)]
        yield f"| {row['data']} | {row['cell']} | " + " | ".join(cells) + " |"


def main(argv=None):
    parser = command_line(__doc__, "--seeds", "--runs", "--results", passes="train_mnist.py or train_toy.py")
    parser.add_argument("--arch", choices=["fc", "cnn", "glow", "toy"], default="fc")
    parser.add_argument("--paper", type=Path, nargs="*", help="directories of runs of train_mnist.py --paper")
    parser.add_argument("--machine", default=machine(), help="what the runs of --paper were made on, in words")
    a, flags = parser.parse_known_args(argv)
    if a.paper is not None and flags:
        parser.error(f"--paper trains nothing: leave out {' '.join(flags)}")
    with one_line_errors():
        rows = by_paper(a) if a.paper is not None else toys(a, flags) if a.arch == "toy" else mnist(a, flags)
        print(*rows, sep="\n")


if __name__ == "__main__":
    main()
