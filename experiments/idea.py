"""The picture of the README: where each log-determinant goes, what a training step costs, and what dsm learns.

    python -m experiments.idea --compile

The layers are those of the default run of train_mnist.py. The times are those of results/runtime-cpu.json, and the
exponents are fitted to them. The density is the swirl of train_toy.py: the run of seed 0 of `python -m
experiments.tables --arch toy`. The record has its divergences before training, after dsm and after the steps of sml.

Time: three minutes on one core.
"""

import json
import textwrap

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

import train_mnist
import train_toy
from densities import TOYS
from ebflow import EBFlow
from experiments import command_line, machine, record, runtime, trained
from layers import LinearLayer
from support import plots, settings
from support.run import one_line_errors


def default_run():
    """The flow of images that `python train_mnist.py` trains, and how many of its layers are pre-processing."""
    s = settings.parse(train_mnist.Settings, [])
    pre, flow = (make(s, (1, 28, 28)) for make in (train_mnist.preprocessing, train_mnist.architecture))
    return EBFlow([*pre.layers, *flow.layers], pre.shape), len(pre.layers)


def diagram(axes, model, fixed):
    """A column of layers. From each log-determinant an arrow goes to Z on the left, or to E on the right.

    Arrows of what only evaluation computes are dashed: those to Z, and with MaP those of the first `fixed` layers.
    """
    orange, pale, grey, n = plots.COLORS["dsm"], "#FBE0D0", "0.45", len(model.layers)

    def box(x, y, width, height, color, text, **style):
        axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, color=color, lw=0,
                                      boxstyle="round,pad=0,rounding_size=0.12"))
        axes.text(x, y, text, ha="center", va="center", **style)

    def arrow(i, side, text, dashed):
        color = orange if side > 0 else grey
        axes.annotate("", (4.4 * side, -i - 0.1), (1.8 * side, -i - 0.1),
                      arrowprops=dict(arrowstyle="-|>", color=color, lw=1.5, ls="--" if dashed else "-"))
        axes.text(3.1 * side, -i - 0.03, text, ha="center", va="bottom", color=color, fontsize=8.5)

    box(-4.8, -n / 2, 0.8, n + 0.7, "0.9", "log Z: not computed in training, exact at evaluation", rotation=90, c=grey)
    box(4.8, -n / 2, 0.8, n + 0.7, orange, "energy E: all that score matching needs", rotation=90, c="w")
    for i, (layer, shape) in enumerate(zip(model.layers, model.shapes)):
        linear, cost = isinstance(layer, LinearLayer), layer.cost if len(shape) > 1 else layer.cost.replace("C", "D")
        box(0, -i, 3.5, 0.6, "0.9" if linear else pale, type(layer).__name__, fontsize=9.5)
        arrow(i, -1 if linear else 1, rf"$\log|\det J_{{{i + 1}}}|$  {cost}", linear or i < fixed)
    for i in range(n + 1):  # the data's way
        axes.annotate("", (0, 0.3 - i), (0, 0.7 - i), arrowprops=dict(arrowstyle="->", shrinkA=0, shrinkB=0))
    box(0, -n, 3.5, 0.6, pale, "prior $p_u$", fontsize=9.5)
    arrow(n, 1, r"$\log p_u(u)$  O(D)", False)
    axes.plot([-4.3, 4.3], [0.5 - fixed] * 2, ":", color="k", lw=0.8)
    for x, y, text in ((0.2, 0.75, "x"), (0.2, 0.66 - fixed, "pre-processing x → z"), (0.2, 0.35 - fixed,
                       "training sees z (MaP)"), (0.2, 0.5 - n, "u"), (-1.95, -n - 0.65, "dashed: only at evaluation")):
        axes.text(x, y, text, va="center", fontsize=8.5)
    axes.set(xlim=(-5.2, 5.2), ylim=(-n - 0.9, 0.9), title="the layers of train_mnist.py's default run")
    axes.axis("off")


def times(axes, measured):
    """Time of a step of ml and of dsm against D, from the record of experiments/runtime.py."""
    rows = [row for size in measured["runs"].values() for row in size
            if row["arch"] == "fc" and row["loss"] in ("ml", "dsm")]
    runtime.panel(axes, rows, "ms")
    D = max(row["D"] for row in rows)
    ms = {row["loss"]: row["ms"] for row in rows if row["D"] == D}
    axes.annotate("", (D, ms["ml"]), (D, ms["dsm"]), arrowprops=dict(arrowstyle="<->", shrinkA=4, shrinkB=4))
    axes.text(0.95 * D, 1.5 * ms["dsm"], f"{ms['ml'] / ms['dsm']:.0f} times", ha="right")
    axes.set(xlabel="D", ylabel="milliseconds",
             title=f"a training step, two D × D matrices, batch {measured['batch_size']}")
    axes.legend(title="measured time grows as", loc="upper left")
    axes.text(0.98, 0.04, textwrap.fill(measured["machine"], 45), transform=axes.transAxes, ha="right", va="bottom",
              fontsize="small", color="0.35")
    axes.grid(alpha=0.3)


def picture(measured, densities):
    """The three panels. densities: {title: a density in the plane}, the truth first"""
    figure = Figure(figsize=(10.5, 6.3), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.45])
    diagram(left.subplots(), *default_run())
    top, bottom = right.subfigures(2, 1, height_ratios=[1, 0.9])
    times(top.subplots(), measured)
    torch.manual_seed(0)
    truth, *_ = densities.values()
    x = truth.sample(2000)
    peak = truth.log_prob(x).max().exp().item()
    for axes, (title, density) in zip(bottom.subplots(1, len(densities)), densities.items()):
        limit = plots.image(axes, lambda x: density.log_prob(x).exp(), x, vmin=0, vmax=peak, cmap="Greys")
        plots.scores(axes, density, 16, limit, x, color=plots.COLORS["dsm"], width=0.006)
        axes.set_title(title, fontsize="medium")
    return figure


def main(argv=None):
    a, flags = command_line(__doc__, "--runs", "--results", passes="train_toy.py").parse_known_args(argv)
    own, out = "--data swirl --loss dsm --seed 0 --sml-steps 100".split(), a.runs / "toys-0" / "swirl-dsm"
    with one_line_errors():
        s, metrics = trained(train_toy, own, out, flags)
        measured = json.loads((a.results / "runtime-cpu.json").read_text())
        kl = {"start_val_kl": metrics[0]["val_kl"]} | {k: metrics[-1][k] for k in ("before_sml_test_kl", "test_kl")}
        before, dsm, sml = kl.values()
        titles = ("truth p\nand its score ∇log p", f"model before training\nKL {before:.2f} nats",
                  f"{s.epochs * s.steps:,} steps of dsm: KL {dsm:.2f}\nthen {s.sml_steps} of sml: KL {sml:.2f}")
        truth = TOYS[str(s.data)]()
        start = train_toy.build(s, truth, "cpu")[1].requires_grad_(False)
        densities = dict(zip(titles, (truth, start, train_toy.load(out))))
        plots.save(a.results / "idea.png", picture(measured, densities))
        record(a.results / "idea.json", {"command": " ".join(["python -m experiments.idea", *flags]),
                                         "seed": s.seed, "machine": machine()} | kl)


if __name__ == "__main__":
    main()
