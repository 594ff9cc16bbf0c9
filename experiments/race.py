"""How long until one level of likelihood, against D: maximum likelihood, the relative gradient and score matching.

    python -m experiments.race

An image of n MNIST digits beside each other, drawn anew in every epoch, has D = 784 n and is, in nats per digit, no easier to
model than one: so the level to reach is the same for all D. All start from two matrices I on centred pixels with a last actnorm at the
moments of what passes (`--actnorm moments`: W₂ could take it in). Each trains with the settings of METHODS until its validation
NLL is at the level; the fastest counts, and what is slower than the fastest of its method is cut off. The clock stands still while a
model is evaluated. Writes results/race-DEVICE.json after every run, and goes on from it; then results/race-DEVICE.png, and
prints the rows of the README.
"""

import argparse
import json
import math
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from data import MNIST, DataError, mnist
from experiments import record, recorded
from experiments.rivals import reached, step_time, train
from run import one_line_errors, save_picture
from training import pick_device

LEVEL = 1105  # nats of validation NLL for a digit
METHODS = {  # learning rate, which is divided by √n; steps, over which it rises and falls, times n; and the other flags of train_mnist.py
    "ml": [(6e-3, 120, "--batch-size 500"), (6e-3, 150, "--batch-size 200")],
    "relative": [(6e-3, 120, "--batch-size 500"), (6e-3, 150, "--batch-size 200")],
    "ssm": [(1e-3, 200, "--batch-size 100 --noise 0.4")],
    "dsm": [(1.5e-3, 160, "--batch-size 100 --sigma 1")],
}


def arrival(run):
    """Steps to the level, and the seconds that they take at the median time of a step; None if it was never reached."""
    steps = reached(run["curve"], LEVEL)
    return steps and (steps, steps * step_time(run["curve"]))


def fastest(runs, method, n):
    """The run that was the first at the level, of all settings.   -> (steps, seconds, run), or None if none came there"""
    arrivals = [(*arrival(run), run) for run in runs.values() if (run["method"], run["digits"]) == (method, n) and arrival(run)]
    return min(arrivals, key=lambda row: row[1], default=None)


def sizes(runs):
    return sorted({run["digits"] for run in runs.values()})


def rows(runs):
    """The README's table: for each D and method steps, milliseconds of a step and seconds to the level, and ml's seconds over dsm's."""
    lines = []
    for n in sizes(runs):
        best = {method: fastest(runs, method, n) for method in METHODS}
        cells = [f"{row[0]:.0f} × {1e3 * row[1] / row[0]:.1f} ms = {row[1]:.2f} s" if row else "–" for row in best.values()]
        ratio = f"{best['ml'][1] / best['dsm'][1]:.1f}" if best["ml"] and best["dsm"] else "–"
        lines.append(f"| {784 * n:,} | " + " | ".join([*cells, ratio]) + " |")
    return lines


def picture(runs):
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    ticks = [784 * n for n in sizes(runs)]
    for i, method in enumerate(METHODS):
        points = [(784 * n, best[1]) for n in sizes(runs) if (best := fastest(runs, method, n))]
        axes.loglog(*zip(*points) if points else ([], []), "o-", ms=4, color=f"C{i}", label=method)
    axes.set(xlabel="D", ylabel="seconds of training", title=f"to {LEVEL:,} nats per digit on the validation split",
             xticks=ticks, xticklabels=[f"{D:,}" for D in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=int, nargs="+", default=[1, 2, 4], help="of an image: D = 784 n")
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--data", type=Path, default=MNIST)
    parser.add_argument("--results", type=Path, default=Path("results"))
    a = parser.parse_args(argv)
    if min(a.every, *a.digits) < 1:
        parser.error("--every and --digits must be positive")
    with one_line_errors(DataError, OSError):
        device, splits = pick_device(a.device), mnist(a.data)
        a.results.mkdir(exist_ok=True)
        path = a.results / f"race-{device.type}.json"
        result = recorded(path, command="python -m experiments.race", methods=json.loads(json.dumps(METHODS)),
                          images=list(splits[0].shape), every=a.every, seed=a.seed)
        runs = result["runs"]
        for n in a.digits:
            for method, settings in METHODS.items():
                for lr, steps, flags in settings:
                    name = f"{method} {flags}, {n} digits"
                    if name not in runs:
                        best = fastest(runs, method, n)
                        all_flags = ["--lr", str(lr / n**0.5), "--actnorm", "moments", "--seed", str(a.seed), *flags.split()]
                        run = train(method, "center", all_flags, steps * n, a.every, splits, device, digits=n, until=LEVEL,
                                    longest=best[1] if best else math.inf)
                        runs[name] = run | {"method": method, "digits": n}
                        record(path, result)
        save_picture(a.results / f"race-{device.type}.png", picture(runs))
        print("\n".join(rows(runs)))


if __name__ == "__main__":
    main()
