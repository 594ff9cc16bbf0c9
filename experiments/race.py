"""The time until one level of likelihood, against D: maximum likelihood, the relative gradient and score matching.

    python -m experiments.race

An image is n MNIST digits beside each other, drawn at random for every batch, so D = 784 n. Its entropy per digit is
that of a digit alone, so the level is the same for all D. Each run starts from two matrices I on centred pixels. The
last layer is an actnorm, which W₂ could absorb. Every tenth step it is set so that its output has mean 0 and variance
1 (--actnorm moments). A run ends where the validation NLL is at the level. Evaluation is outside the measured time.

The experiment takes 15 minutes on two cores, 40 seconds on an H100. It writes results/race-DEVICE.json after every run,
and continues from it; then results/race-DEVICE.png. It prints the table of docs/results.md.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from data import MNIST, DataError, digest, load_images
from experiments import at_least, folder, record, recorded
from experiments.rivals import reached, step_time, train
from support import processes
from support.run import one_line_errors, save_picture

LEVEL = 1105  # nats of validation NLL for a digit
# Learning rate, divided by √n for n digits; the steps in which it rises and falls, times n; flags of train_mnist.py.
# They are the fastest found at n = 1; for ml and relative, the fastest that do not break down at n = 2 and 4 either.
METHODS = {
    "ml": (4e-3, 120, ["--batch-size", "500"]),
    "relative": (4e-3, 120, ["--batch-size", "500"]),
    "ssm": (1e-3, 200, ["--batch-size", "100", "--sigma", "0.4"]),
    "dsm": (1.5e-3, 160, ["--batch-size", "100", "--sigma", "1"]),
}


def arrival(run):
    """Steps to the level, and the seconds that they take at the median time of a step; None if it was never reached."""
    steps = reached(run["curve"], LEVEL)
    return None if steps is None else (steps, steps * (step_time(run["curve"]) or 0.0))


def arrivals(runs, n):
    return {method: arrival(runs[f"{method}, {n} digits"]) for method in METHODS}


def sizes(runs):
    return sorted({run["digits"] for run in runs.values()})


def rows(runs):
    """The table of docs/results.md: for each D and method steps × time of a step = seconds; ml's time over dsm's."""
    lines = []
    for n in sizes(runs):
        best = arrivals(runs, n)
        cells = [f"{row[0]:.0f} × {1e3 * row[1] / row[0]:.1f} ms = {row[1]:.2f} s" if row and row[0] else "–"
                 for row in best.values()]
        ratio = f"{best['ml'][1] / best['dsm'][1]:.1f}" if best["ml"] and best["dsm"] and best["dsm"][1] else "–"
        lines.append(f"| {784 * n:,} | " + " | ".join([*cells, ratio]) + " |")
    return lines


def picture(runs):
    """Seconds to the level against D, a line for each method."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    ticks = [784 * n for n in sizes(runs)]
    for i, method in enumerate(METHODS):
        points = [(784 * n, best[1]) for n in sizes(runs) if (best := arrivals(runs, n)[method]) and best[1]]
        axes.loglog(*zip(*points) if points else ([], []), "o-", ms=4, color=f"C{i}", label=method)
    axes.set(xlabel="D", ylabel="seconds of training", title=f"to {LEVEL:,} nats per digit on the validation split",
             xticks=ticks, xticklabels=[f"{D:,}" for D in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=at_least(1), nargs="+", default=[1, 2, 4], help="n of an image: D = 784 n")
    parser.add_argument("--every", type=at_least(1), default=20, help="steps between evaluations")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--data", type=Path, default=MNIST, help="directory of the IDX files")
    parser.add_argument("--results", type=folder, default="results")
    a = parser.parse_args(argv)
    if a.every > (shortest := min(steps for _, steps, _ in METHODS.values())):
        parser.error(f"--every {a.every} is more than the {shortest} steps of the shortest run")
    with one_line_errors(DataError, OSError), processes.joined(a.device) as device:
        splits = load_images(a.data)
        path = a.results / f"race-{device.type}.json"
        result = recorded(path, command="python -m experiments.race", methods=METHODS, level=LEVEL,
                          images=digest(splits), every=a.every, seed=a.seed)
        runs = result["runs"]
        for n in a.digits:
            for method, (lr, steps, flags) in METHODS.items():
                if f"{method}, {n} digits" not in runs:
                    flags = ["--lr", str(lr / n**0.5), "--actnorm", "moments", "--seed", str(a.seed), *flags]
                    run = train(method, "center", flags, steps * n, a.every, splits, device, digits=n, until=LEVEL)
                    runs[f"{method}, {n} digits"] = run | {"digits": n}
                    record(path, result)
        save_picture(a.results / f"race-{device.type}.png", picture(runs))
        print("\n".join(rows(runs)))


if __name__ == "__main__":
    main()
