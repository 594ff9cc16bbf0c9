"""What two parts of the training are worth: match after pre-processing (MaP) and the moving average of the weights (EMA).

    python -m experiments.ablation

For each of ssm, dsm and fdssm the default run of `train_mnist.py`, with and without --map. The weights and their moving
average are both evaluated, so that one training serves both columns: the test NLL after the last epoch, whichever was
the best. Without MaP the objective sees x in [0, 256)^D, σ and ξ are in grey levels, and the first layers'
derivative, 1/x near 0, is part of the score.

Writes results/ablation.json after every run, and goes on from it; then results/ablation.png, the norm of the gradient
over the first 1,000 steps, and prints the rows of the README. Source: Chao et al. (2023), the ablation of EMA and MaP.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import train_mnist
from data import MNIST, DataError, mnist
from experiments import record, recorded
from experiments.toys import interval
from flags import pick_device
from run import RunError, one_line_errors, save_picture
from training import MovingAverage, fast_matmul, gradient_of, make_optimizer, train_epoch

OBJECTIVES = ["ssm", "dsm", "fdssm"]
CURVE = 1000  # steps


def train(args, splits, device):
    """One training.   -> {"EMA": …, "no EMA": …, "norms": of the gradients of the first steps, "broke": why, or None}"""
    torch.manual_seed(args.seed)
    pre, flow, image_model = (part.to(device) for part in train_mnist.build(args, splits[0]))
    train_set, _, test_set = (x.view(len(x), *flow.shape).to(device) for x in splits)
    average = MovingAverage(image_model, args.ema_decay)
    optimizer = make_optimizer(args, image_model)
    steps = len(train_set) // args.batch_size
    seen = flow if args.map else image_model
    gradient = gradient_of(args, seen, optimizer)
    norms = []
    with tqdm(total=args.epochs * steps, unit=" batches", desc=label(args), dynamic_ncols=True) as bar:
        try:
            for epoch in range(1, args.epochs + 1):
                with fast_matmul(args.loss):
                    trace = train_epoch(args, epoch, gradient, average, optimizer,
                                        lambda epoch: train_mnist.following(args, seen, train_mnist.minibatches(args, pre, train_set)), steps, bar)
                norms += trace[:, 1].tolist()
            train_mnist.refit(args, average.model, train_set)
            nll = {name: train_mnist.evaluate(model, test_set) for name, model in (("EMA", average.model), ("no EMA", image_model))}
        except (RunError, torch.linalg.LinAlgError) as error:
            return {"EMA": None, "no EMA": None, "norms": norms[:CURVE], "broke": str(error).split(": lower")[0]}
    return nll | {"norms": norms[:CURVE], "broke": None}


def label(args):
    return f"{args.loss} {'with' if args.map else 'without'} MaP, seed {args.seed}"


def rows(runs):
    """The README's table: mean and half-width of the 95 % interval of the test NLL in nats."""
    def cell(loss, prefix, column):
        values = [run[column] for name, run in runs.items() if name.startswith(f"{loss} {prefix} ")]
        if None in values:
            return "broke down"
        mean, half = interval(values)
        return f"{mean:.1f}" + (f" ± {half:.1f}" if half is not None else "")

    return [f"| {loss} | " + " | ".join(cell(loss, prefix, column) for prefix in ("without", "with")
                                        for column in ("no EMA", "EMA")) + " |" for loss in OBJECTIVES]


def picture(runs):
    """The norm of the gradient over the first steps, with and without MaP; a line for each seed, mean of 20 steps."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, loss in zip(figure.subplots(1, len(OBJECTIVES), sharey=True), OBJECTIVES):
        for prefix, color in (("without", "C3"), ("with", "C0")):
            for i, run in enumerate(run for name, run in runs.items() if name.startswith(f"{loss} {prefix} ")):
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
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 6))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--data", type=Path, default=MNIST)
    parser.add_argument("--results", type=Path, default=Path("results"))
    a, flags = parser.parse_known_args(argv)
    runs_args = [train_mnist.parse(["--loss", loss, "--seed", str(seed), on, *flags])
                 for seed in range(a.seeds) for loss in OBJECTIVES for on in ("--map", "--no-map")]
    with one_line_errors(DataError, OSError):
        device, splits = pick_device(a.device), mnist(a.data)
        a.results.mkdir(exist_ok=True)
        path = a.results / "ablation.json"
        result = recorded(path, command=" ".join(["python -m experiments.ablation", *flags]))
        runs = result["runs"]
        for args in runs_args:
            if label(args) not in runs:
                runs[label(args)] = train(args, splits, device)
                record(path, result)
        save_picture(a.results / "ablation.png", picture(runs))
        print("\n".join(rows(runs)))


if __name__ == "__main__":
    main()
