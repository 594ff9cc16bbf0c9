"""What two parts of training are worth: match after pre-processing (MaP) and the moving average of the weights (EMA).

    python -m experiments.ablation --epochs 10
    python -m experiments.ablation --arch cnn --epochs 4

Trains a flow by ssm, dsm and fdssm, with MaP and without it, for three seeds. After the last epoch, the
test NLL of the parameters and that of their moving average are computed. Without MaP the objective sees x in
[0, 256)^D. Then σ and ξ are in grey levels, and the derivative of the first layers, 1/x near 0, is part of the score.
Flags that --help does not list go to `train_mnist.py`. On one core the first command takes 40 minutes, and twice that
without --epochs.

Writes results/ablation-ARCH.json after every training, and continues from it. Then writes results/ablation-ARCH.png,
the norm of the gradient over the first 1,000 steps, and prints the table of docs/results.md.
Source: Chao et al. (2023), the ablation of EMA and MaP.
"""

import argparse
import copy
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import train_mnist
from data import MNIST, DataError, dequantize, digest, load_images
from ebflow import EBFlow
from experiments import folder, passed_on, record, recorded
from experiments.toys import interval
from support import processes, settings
from support.optimization import cosine
from support.run import RunError, one_line_errors, save_picture

OBJECTIVES = ["ssm", "dsm", "fdssm"]
CURVE = 1000  # steps


def train(s, splits, device):
    """One training.   -> {"EMA": test NLL, "no EMA": test NLL, "norms": of first gradients, "broke": why, or None}"""
    train_set, _, test_set = (split.to(device) for split in splits)
    steps = len(train_set) // s.batch_size
    if steps == 0:
        raise RunError(f"{len(train_set)} training images do not fill a batch of {s.batch_size}: lower --batch-size")

    torch.manual_seed(s.seed)
    pre, flow = train_mnist.build(s, splits[0])
    model = EBFlow([*pre.layers, *flow.layers], pre.shape).to(device)
    averaged = copy.deepcopy(model)                                    # θ̃ of EMA
    step, optimizer = train_mnist.make_step(s, pre, flow, model, averaged)

    norms = []
    try:
        for epoch in range(1, s.epochs + 1):
            torch.manual_seed(1_000_003 * s.seed + epoch)
            order = torch.randperm(len(train_set), device=device)[:steps * s.batch_size].split(s.batch_size)
            trace = []                                                 # loss and norm of the gradient, on the device
            bar = tqdm(order, f"{label(s)}, epoch {epoch}", leave=False, dynamic_ncols=True, disable=None)
            for n, index in enumerate(bar, start=(epoch - 1) * steps):
                published = s.decay ** min(epoch - 1, 49)
                factor = cosine(n / (s.epochs * steps)) if s.schedule == "cosine" else published
                optimizer.param_groups[0]["lr"] = s.lr * factor
                trace.append(torch.stack([*step(train_set[index], n).values()]))
            trace = torch.stack(trace)
            if not trace.isfinite().all():
                raise RunError(f"the loss or its gradient is not finite in epoch {epoch}")
            norms += trace[:, 1].tolist()

        for evaluated in (averaged, model) if s.actnorm == "moments" else ():  # of clean images, as train_mnist.py does
            torch.manual_seed(0)
            train_mnist.track_moments(evaluated, dequantize(train_set[:5000]).view(-1, *model.shape))
        nlls = {name: train_mnist.evaluate("test", evaluated, test_set)["test_nll"]
                for name, evaluated in (("EMA", averaged), ("no EMA", model))}
        broke = None
    except (RunError, ValueError, torch.linalg.LinAlgError) as error:  # ValueError: an actnorm's input is constant
        nlls, broke = {"EMA": None, "no EMA": None}, str(error)
    return nlls | {"norms": norms[:CURVE], "broke": broke}


def label(s):
    return f"{s.loss} {'with' if s.map else 'without'} MaP, seed {s.seed}"


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
    """The norm of the gradient over the first steps, with and without MaP: a line for each seed, means of 20 steps."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, loss in zip(figure.subplots(1, len(OBJECTIVES), sharey=True), OBJECTIVES):
        for prefix, color in (("without", "C3"), ("with", "C0")):
            own = [run for name, run in runs.items() if name.startswith(f"{loss} {prefix} ")]
            for i, run in enumerate(own):
                norms = torch.tensor(run["norms"])
                norms = norms[:len(norms) // 20 * 20].view(-1, 20).mean(1)
                axes.semilogy(20 * torch.arange(1, len(norms) + 1), norms, color=color, lw=1,
                              label=None if i else f"{prefix} MaP")
        axes.set(title=loss, xlabel="step")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("norm of the gradient")
    figure.axes[0].legend()
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Other flags go to train_mnist.py.",
                                     allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 6), help="the number of seeds")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--data", type=Path, default=MNIST, help="directory of the IDX files")
    parser.add_argument("--results", type=folder, default="results")
    a, flags = parser.parse_known_args(argv)
    runs = [passed_on(settings.Mnist, ["--loss", loss, "--seed", str(seed), on], flags)
            for seed in range(a.seeds) for loss in OBJECTIVES for on in ("--map", "--no-map")]
    with one_line_errors(DataError, OSError), processes.joined(a.device) as device:
        splits = load_images(a.data)
        path = a.results / f"ablation-{runs[0].arch}.json"
        result = recorded(path, command=" ".join(["python -m experiments.ablation", *flags]), images=digest(splits))
        for s in runs:
            if label(s) not in result["runs"]:
                result["runs"][label(s)] = train(s, splits, device)
                record(path, result)
        save_picture(path.with_suffix(".png"), picture(result["runs"]))
        print("\n".join(rows(result["runs"])))


if __name__ == "__main__":
    main()
