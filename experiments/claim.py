"""The picture at the top of the README: what a step of training costs against D, beside what a flow trained so draws.

    python -m experiments.runtime
    python -m experiments.mnist --arch glow
    python -m experiments.claim

Left, the fully-connected flow's times of results/runtime-cpu.json. Right, draws of the small Glow after `dsm`, from
results/samples-glow-dsm.png, which is the samples.png of its run. Writes results/claim.png.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.ticker import NullFormatter

from experiments import intact
from experiments.runtime import slope
from support.run import RunError, one_line_errors, save_picture


def picture(rows, draws):
    """rows of results/runtime-cpu.json, draws (H, W, channels).   -> figure"""
    figure = Figure(figsize=(9.4, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.45, 1])
    for loss, color in (("ml", "C3"), ("ssm", "C0"), ("dsm", "C2"), ("fdssm", "C1")):
        own = [row for row in rows if (row["arch"], row["loss"]) == ("fc", loss) and row["ms"]]
        own.sort(key=lambda row: row["D"])
        left.loglog([row["D"] for row in own], [row["ms"] for row in own], "o-", ms=4, color=color,
                    label=f"{loss}: D to the power of {slope(own, 'operations'):.1f}")
    left.set(xlabel="D, the dimension of the data", ylabel="milliseconds for a training step, two layers",
             title="score matching needs O(D²) operations, likelihood O(D³)")
    left.set_xticks([256, 1024, 4096], ["256", "1,024", "4,096"])
    left.xaxis.set_minor_formatter(NullFormatter())
    left.grid(alpha=0.3)
    left.legend(title="operations grow as", fontsize="small", title_fontsize="small")
    right.imshow(draws[: len(draws) // 2, : draws.shape[1] // 4 * 3])  # 4 × 6 of the 64 draws
    right.set(xticks=[], yticks=[], title="draws of a small Glow trained by dsm")
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    a = parser.parse_args(argv)
    with one_line_errors(OSError, ValueError):
        with intact(path := a.results / "runtime-cpu.json"):
            rows = [row for size in json.loads(path.read_text())["runs"].values() for row in size]
            if not slope([row for row in rows if (row["arch"], row["loss"]) == ("fc", "ml")], "operations"):
                raise RunError(f"{path} has fewer than three sizes: run experiments.runtime with its defaults")
        save_picture(a.results / "claim.png", picture(rows, imread(a.results / "samples-glow-dsm.png")))


if __name__ == "__main__":
    main()
