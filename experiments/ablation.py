"""What two parts of training are worth: match after pre-processing (MaP) and the moving average of the weights (EMA).

    python -m experiments.ablation --epochs 4

Trains FC by ssm, dsm and fdssm, with MaP and without it, for three seeds. After the last epoch it computes the test NLL
of the parameters and that of their moving average. Without MaP the objective sees x in [0, 256)^D. Then σ and ξ are in
grey levels, and the derivative of the first layers, 1/x near 0, is part of the score. The record is ablation-fc.json,
the picture has the norm of the gradient during training. Source: Chao et al. (2023), the ablation of EMA and MaP.

Time: a quarter of an hour on one core.
"""

from functools import partial
from itertools import product

import torch

import train_mnist
from data import DataError, dequantize, digest, load_images
from experiments import command_line, completed, panels, trained
from experiments.tables import interval
from support import plots, settings
from support.run import one_line_errors, read_checkpoint

OBJECTIVES = ["ssm", "dsm", "fdssm"]


def train(own, out, flags, splits):
    """One training.   -> {"EMA": test NLL, "no EMA": test NLL, "norms": {step: mean norm}}"""
    s, metrics = trained(train_mnist, own, out, flags)
    model, state, nlls = train_mnist.load(out).flow, read_checkpoint(out / "checkpoint.pt")["state"], {}
    for name, part in (("EMA", "averaged"), ("no EMA", "model")):
        model.load_state_dict(state[part])                             # after the last epoch
        if s.actnorm == "moments":                                     # of clean images, as train_mnist.py does
            torch.manual_seed(0)
            train_mnist.track_moments(model, dequantize(splits[0][:5000]).view(-1, *model.shape))
        nlls[name] = train_mnist.evaluate("test", model, splits[2])["test_nll"]
    return nlls | {"norms": {str(row["step"]): float(f"{row['grad_norm']:.4g}") for row in metrics[1:]}}


def rows(runs):
    """The table of docs/results.md: test NLL in nats, mean and half-width of the 95 % interval over the seeds."""
    for loss in OBJECTIVES:
        cells = [loss]
        for prefix, column in product(("without", "with"), ("no EMA", "EMA")):
            mean, half = interval([run[column] for name, run in runs.items() if name.startswith(f"{loss} {prefix} ")])
            cells.append(f"{mean:.1f}" + (f" ± {half:.1f}" if half is not None else ""))
        yield "| " + " | ".join(cells) + " |"


def picture(runs):
    """The norm of the gradient against steps, with and without MaP: a line for each seed."""
    figure, [row_of_axes] = panels(1, len(OBJECTIVES), 9, 3, sharey=True)
    for axes, loss in zip(row_of_axes, OBJECTIVES):
        for prefix, style in (("without", ".:"), ("with", ".-")):
            for norms in (run["norms"] for name, run in runs.items() if name.startswith(f"{loss} {prefix} ")):
                axes.semilogy([*map(int, norms)], [*norms.values()], style, color=plots.COLORS[loss])
            axes.plot([], [], f"k{style}", label=f"{prefix} MaP")
        axes.set(title=loss, xlabel="step")
    row_of_axes[0].set_ylabel("norm of the gradient")
    row_of_axes[0].legend()
    return figure


def main(argv=None):
    parser = command_line(__doc__, "--seeds", "--runs", "--results", passes="train_mnist.py")
    a, flags = parser.parse_known_args(argv)
    with one_line_errors(DataError):
        splits = load_images(settings.parse(train_mnist.Settings, ["--loss", "ssm", *flags]).data)
        jobs = {}
        for seed, loss, on in product(range(a.seeds), OBJECTIVES, ("map", "no-map")):
            own = ["--loss", loss, "--seed", str(seed), f"--{on}", "--sml-steps", "0"]
            jobs[f"{loss} {'with' if on == 'map' else 'without'} MaP, seed {seed}"] = partial(
                train, own, a.runs / "ablation" / f"{loss}-{on}-{seed}", flags, splits)
        runs = completed(a.results / "ablation-fc.json", jobs, images=digest(splits),
                         command=" ".join(["python -m experiments.ablation", *flags]))
        plots.save(a.results / "ablation.png", picture(runs))
        print(*rows(runs), sep="\n")


if __name__ == "__main__":
    main()
