"""The five objectives on the three densities in the plane, several seeds, measured against the truth.

    python -m experiments.toys --compile

Runs `python train_toy.py --data all --loss all --seed SEED` for three seeds under runs/, and continues runs that were
stopped. All runs take about an hour on one core, and longer without --compile.

Writes results/toys.png, the densities of seed 0, and results/toys.json. Prints the table of docs/results.md: means over
the seeds, and from two seeds on the half-width of the 95 % interval of the mean (Student's t).
"""

import argparse
import math
import shutil
import statistics
from pathlib import Path

import train_toy
from data import TOYS
from experiments import machine, record
from losses import OBJECTIVES
from support.run import read_metrics

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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 6), help="the number of seeds")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--compile", action="store_true", help="torch.compile the gradients, on a CPU")
    a = parser.parse_args(argv)
    directories = [a.runs / f"toys-{seed}" for seed in range(a.seeds)]
    for seed, directory in enumerate(directories):
        train_toy.main(["--data", "all", "--loss", "all", "--seed", str(seed), "--out", str(directory), "--resume",
                        *["--compile"] * a.compile])

    table = []
    for toy in TOYS:
        for loss in OBJECTIVES:
            last = [read_metrics(d / f"{toy}-{loss}")[-1] for d in directories]
            row = {"data": toy, "loss": loss, "steps": last[0]["step"], "seeds": a.seeds,
                   "minutes": statistics.mean(r["seconds"] for r in last) / 60}
            for figure in ("kl", "fisher"):
                row[figure], row[f"{figure}_95"] = interval([r[f"test_{figure}"] for r in last])
            table.append(row)
    a.results.mkdir(exist_ok=True)
    shutil.copy(directories[0] / "grid.png", a.results / "toys.png")
    result = {"command": f"python -m experiments.toys --seeds {a.seeds}" + " --compile" * a.compile, "rows": table,
              "machine": machine()}
    record(a.results / "toys.json", result)
    print("\n".join(rows(table)))


if __name__ == "__main__":
    main()
