"""The toys' grid and table: five objectives on three densities, several seeds, measured against the truth.

    python -m experiments.toys

Trains what is missing under runs/, as `python train_toy.py --data all --loss all --seed SEED` does; a run that was stopped
goes on. Writes results/toys.png (of seed 0) and results/toys.json, and prints the rows of the README: mean and, from two
seeds on, the half-width of the 95 % interval of the mean (Student's t).
"""

import argparse
import math
import shutil
import statistics
from pathlib import Path

import train_toy
from experiments import machine, record
from run import read_metrics

STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # 97.5 % quantile with n - 1 degrees of freedom


def interval(values):
    """Mean, and half-width of its 95 % interval; None for one value.   -> float, float | None"""
    n = len(values)
    return statistics.mean(values), STUDENT[n] * statistics.stdev(values) / math.sqrt(n) if n > 1 else None


def rows(table):
    """The README's table."""
    def cell(row, figure):
        mean, half = row[figure], row[f"{figure}_95"]
        return f"{mean:.4f}" + ("" if half is None else f" ± {half:.4f}")

    return [f"| {row['data']} | {row['loss']} | {row['steps']:,} | {cell(row, 'kl')} | {cell(row, 'fisher')} | {row['minutes']:.1f} |"
            for row in table]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 6))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--compile", action="store_true", help="compile the gradients")
    a = parser.parse_args(argv)
    directories = [a.runs / f"toys-{seed}" for seed in range(a.seeds)]
    for seed, directory in enumerate(directories):
        train_toy.main(["--data", "all", "--loss", "all", "--seed", str(seed), "--out", str(directory), "--resume",
                        *["--compile"] * a.compile])

    table = []
    for toy in train_toy.TOYS:
        for loss in train_toy.DEFAULTS:
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
