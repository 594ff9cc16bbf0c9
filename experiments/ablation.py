"""What two parts of training are worth: match after pre-processing (MaP) and the moving average of the weights (EMA).

    python -m experiments.ablation --epochs 10
    python -m experiments.ablation --arch cnn --epochs 4

Trains a flow by ssm, dsm and fdssm, with MaP and without it, for three seeds. After the last epoch it computes the test
NLL of the parameters and that of their moving average. Without MaP the objective sees x in [0, 256)^D. Then σ and ξ are
in grey levels, and the derivative of the first layers, 1/x near 0, is part of the score. Flags that --help does not
list go to train_mnist.py. On one core the first command takes 40 minutes. A command that was stopped continues.

Writes results/ablation-ARCH.json and .png, the norm of the gradient during training, and prints the table of
docs/results.md. Source: Chao et al. (2023), the ablation of EMA and MaP.
"""

import argparse
from itertools import product
from pathlib import Path

import torch
from matplotlib.figure import Figure

import train_mnist
from data import DataError, dequantize, digest, load_images
from experiments import folder, record, recorded
from experiments.tables import interval, trained
from support import plots, settings
from support.run import REMEDY, one_line_errors, read_checkpoint

OBJECTIVES = ["ssm", "dsm", "fdssm"]


def train(own, out, flags, splits):
    """One training.   -> {"EMA": test NLL, "no EMA": test NLL, "norms": {step: mean norm}, "broke": why}"""
    try:
        s, metrics = trained(train_mnist, own, out, flags)
    except SystemExit as stop:
        if REMEDY not in str(stop.code):                               # not about a figure that is not finite
            raise
        return {"EMA": None, "no EMA": None, "norms": {}, "broke": stop.code}
    model, state, nlls = train_mnist.load(out), read_checkpoint(out / "checkpoint.pt")["state"], {}
    for name, part in (("EMA", "averaged"), ("no EMA", "model")):
        model.load_state_dict(state[part])                             # after the last epoch
        if s.actnorm == "moments":                                     # of clean images, as train_mnist.py does
            torch.manual_seed(0)
            train_mnist.track_moments(model, dequantize(splits[0][:5000]).view(-1, *model.shape))
        nlls[name] = train_mnist.evaluate("test", model, splits[2])["test_nll"]
    norms = {str(row["step"]): float(f"{row['grad_norm']:.4g}") for row in metrics[1:]}
    return nlls | {"norms": norms, "broke": None}


def rows(runs):
    """The table of docs/results.md: test NLL in nats, mean and half-width of the 95 % interval over the seeds."""
    def cell(loss, prefix, column):
        values = [run[column] for name, run in runs.items() if name.startswith(f"{loss} {prefix} ")]
        if None in values:
            return "broke down"
        mean, half = interval(values)
        return f"{mean:.1f}" + (f" ± {half:.1f}" if half is not None else "")

    return [f"| {loss} | " + " | ".join(cell(loss, prefix, column) for prefix in ("without", "with")
                                        for column in ("no EMA", "EMA")) + " |" for loss in OBJECTIVES]


def picture(runs):
    """The norm of the gradient against steps, with and without MaP: a line for each seed."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, loss in zip(figure.subplots(1, len(OBJECTIVES), sharey=True), OBJECTIVES):
        for prefix, color in (("without", "C3"), ("with", "C0")):
            own = [run["norms"] for name, run in runs.items() if name.startswith(f"{loss} {prefix} ")]
            for i, norms in enumerate(own):
                axes.semilogy([*map(int, norms)], [*norms.values()], color=color, lw=1,
                              marker="." if len(norms) < 10 else None, label=None if i else f"{prefix} MaP")
        axes.set(title=loss, xlabel="step")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("norm of the gradient")
    figure.axes[0].legend()
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Other flags go to train_mnist.py.",
                                     allow_abbrev=False)
    parser.add_argument("--arch", choices=["fc", "cnn", "glow"], default="fc")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 6), help="the number of seeds")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=folder, default="results")
    a, flags = parser.parse_known_args(argv)
    with one_line_errors(DataError):
        splits = load_images(settings.parse(train_mnist.Settings, ["--arch", a.arch, "--loss", "ssm", *flags]).data)
        command, path = ["--arch", a.arch] * (a.arch != "fc") + flags, a.results / f"ablation-{a.arch}.json"
        result = recorded(path, command=" ".join(["python -m experiments.ablation", *command]), images=digest(splits))
        for seed, loss, on in product(range(a.seeds), OBJECTIVES, ("map", "no-map")):
            name = f"{loss} {'with' if on == 'map' else 'without'} MaP, seed {seed}"
            if name not in result["runs"]:
                own = ["--arch", a.arch, "--loss", loss, "--seed", str(seed), f"--{on}"]
                out = a.runs / f"ablation-{a.arch}" / f"{loss}-{on}-{seed}"
                result["runs"][name] = train(own, out, flags, splits)
                record(path, result)
        plots.save(path.with_suffix(".png"), picture(result["runs"]))
        print("\n".join(rows(result["runs"])))


if __name__ == "__main__":
    main()
