"""Trains an energy-based flow on a density in the plane that is known exactly, and measures it against the truth.

    python train_toy.py --data swirl --loss ssm
    python train_toy.py --data all --loss all

Both divergences are means over fresh points x of the truth p, so they need no estimate of a density:

    KL(p‖p_θ) = E_p[ log p(x) - log p_θ(x) ]          Fisher(p‖p_θ) = ½ E_p[ ‖∇log p(x) - ∇log p_θ(x)‖² ]

One run fills one directory: density.png, curves.png, metrics.jsonl, config.json, and checkpoint.pt, from which
--resume goes on. "all" makes one of them for each combination, and the grid of all in grid.png.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from data import TOYS, Toy
from ebflow import toy_flow
from flags import OPTIMIZATION, add_compile_flag, add_run_flags, add_settings, configuration, pick_device, with_settings
from run import Run, RunError, curves, image, lattice, one_line_errors, read_checkpoint, save_picture
from training import MovingAverage, fit, make_optimizer

# The settings that a flag of the same name changes.
COMMON = OPTIMIZATION | dict(
    epochs=20,
    steps=250,           # of an epoch
    batch_size=512,      # fresh points in every step
    lr=3e-3,             # at its peak
    blocks=10,           # of the flow
    width=64,            # of the couplings' networks
    start_smoothing=2.0,  # the points are smoothed by so much at first, and by the toy's own 0.375 when
    anneal=0.5,          # this fraction of the run is over (see `smoothing`)
    test_points=20_000,
)
SCORE_MATCHING = COMMON | dict(start_smoothing=6.0, anneal=0.85)
DEFAULTS = {
    "ml": COMMON,
    "sml": COMMON | dict(model_samples=512),
    "ssm": SCORE_MATCHING,
    "dsm": SCORE_MATCHING | dict(targets="pooled",   # or each point its "own" (see `losses.dsm`)
                                 anneal=0.7, hold=0.5),
    "fdssm": SCORE_MATCHING | dict(xi=0.2),
}
BY_TOY = {"sine": dict(start_smoothing=2.0, anneal=0.5)}  # it does not wind, and can follow a faster fall


def train(args):
    """One objective on one toy.   -> the flow of the best epoch, and its row of the table"""
    device, dtype = pick_device(args.device, compiling=args.compile), torch.float64 if args.double else torch.get_default_dtype()
    toy = TOYS[args.data]()
    torch.manual_seed(args.seed)
    flow = toy_flow(blocks=args.blocks, width=args.width).to(device, dtype)
    flow.initialize(toy.sample(2000, device, args.start_smoothing).to(dtype))
    run = Run(args.out, configuration(args), args.resume, args.overwrite)
    val, test = (truth(toy, n, seed, device, dtype) for n, seed in ((args.test_points // 4, -1), (args.test_points, -2)))

    args.sigma = torch.empty((), dtype=torch.float64, device=device)  # a tensor, which a CUDA graph reads anew

    def minibatches(epoch):
        for step in range(args.steps):
            std = smoothing(args, (epoch - 1 + step / args.steps) / args.epochs)
            args.sigma.fill_(std)  # dsm sees the bare points and adds the noise itself: its minimiser is p, too
            yield toy.sample(args.batch_size, device, 0.0 if args.loss == "dsm" else std).to(dtype)

    best = fit(args, run, flow, MovingAverage(flow, args.ema_decay), make_optimizer(args, flow), seen=flow,
               minibatches=minibatches, steps=args.steps, evaluate=lambda model: divergences("val", model, *val))

    flow.load_state_dict(best["model"])
    run.metrics[-1] |= divergences("test", flow, *test) | {"best_epoch": best["epoch"]}
    run.write_metrics()
    run.picture("curves.png", curves(run.metrics, args.loss))
    run.picture("density.png", density(flow, toy, test[0]))
    return flow, run.metrics[-1]


def load(directory):
    """The flow of a run, with the weights that were kept. Raises RunError where there is no whole checkpoint, or one that does not fit."""
    checkpoint = read_checkpoint(Path(directory) / "checkpoint.pt")
    config = checkpoint["config"]
    try:
        flow = toy_flow(blocks=config["blocks"], width=config["width"])
        flow = flow.double() if config.get("double") else flow
        flow.load_state_dict(checkpoint["state"]["best"]["model"])
    except (KeyError, RuntimeError):
        raise RunError(f"{directory} is no run of train_toy.py, or one of another version of this code") from None
    return flow


def smoothing(args, progress):
    """The standard deviation of the noise on the points, by the fraction of the run: falls geometrically to the toy's.

    Score matching compares scores where the points are, and elsewhere sees nothing: a model may have nearly all of its
    mass out there and a small Fisher divergence. So it starts where it cannot be wrong, from points under so much
    noise that they are nearly Gaussian, as the flow is at its start, and follows them as the noise falls. Maximum
    likelihood does better on the swirl with some of it, too.
    """
    return Toy.smoothing * (args.start_smoothing / Toy.smoothing) ** max(0.0, 1 - progress / args.anneal)


def truth(toy, n, seed, device, dtype=torch.float32):
    """Fresh points of the toy with log p and its score, the same at every call.   -> (n, 2), (n,), (n, 2)"""
    torch.manual_seed(seed)  # none that training uses
    x = toy.sample(n, device).to(dtype)
    return x, toy.log_prob(x), toy.score(x)


@torch.no_grad()
def divergences(split, model, x, log_prob, score):
    """NLL, KL and Fisher divergence in nats, each of the last two with its standard error."""
    model_log_prob, model_score = (torch.cat([f(batch) for batch in x.split(5000)]) for f in (model.log_prob, model.score))
    kl = (log_prob - model_log_prob).double()
    fisher = 0.5 * (score - model_score).double().square().sum(1)
    row = {f"{split}_nll": -model_log_prob.mean().item()}
    for name, values in (("kl", kl), ("fisher", fisher)):
        row |= {f"{split}_{name}": values.mean().item(), f"{split}_{name}_se": (values.std() / len(x) ** 0.5).item()}
    return row


# ---------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------


def density(flow, toy, x):
    """Truth beside model, and the energy with the score as arrows: they point to where the density grows."""
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    top = toy.log_prob(x).max().exp().item()
    image(left, lambda x: toy.log_prob(x).exp(), x, vmin=0, vmax=top)
    image(middle, lambda x: flow.log_prob(x).exp(), x, vmin=0, vmax=top)
    energy = flow.energy(x).detach()
    limit = image(right, flow.energy, x, vmin=energy.min().item(), vmax=energy.max().item(), cmap="viridis_r")
    points = lattice(0.95 * limit, 24, x).flatten(0, 1)
    score = flow.score(points)
    norm = score.norm(dim=1, keepdim=True)
    arrows = score / norm * norm.log1p()  # the far ones would cover the rest
    right.quiver(*points.T.cpu().numpy(), *arrows.T.cpu().numpy(), color="w", width=0.004)
    for axes, title in ((left, "truth p"), (middle, "model p_θ"), (right, "energy E, and the score -∇E")):
        axes.set_title(title)
    return figure


def grid(cells, toys, objectives):
    """Truth and models: a row for each toy, a column for each objective. cells: (toy, objective) -> (flow, row)"""
    figure = Figure(figsize=(2.1 * (1 + len(objectives)), 2.3 * len(toys)), layout="constrained")
    for axes_row, name in zip(figure.subplots(len(toys), 1 + len(objectives), squeeze=False), toys):
        toy = TOYS[name]()
        torch.manual_seed(0)
        x = toy.sample(2000)
        top = toy.log_prob(x).max().exp().item()
        image(axes_row[0], lambda x: toy.log_prob(x).exp(), x, vmin=0, vmax=top)
        axes_row[0].set_title(f"{name}, truth", fontsize="small")
        for axes, loss in zip(axes_row[1:], objectives):
            if (name, loss) not in cells:
                axes.axis("off")
                continue
            flow, row = cells[name, loss]
            image(axes, lambda x: flow.log_prob(x).exp(), x.to(next(flow.parameters())), vmin=0, vmax=top)
            axes.set_title(f"{loss}: KL {row['test_kl']:.4f}", fontsize="small")
    return figure


def table(cells):
    lines = [f"{'data':14}{'loss':7}{'KL (nats)':20}{'Fisher divergence':20}{'minutes':>8}{'batches/s':>11}"]
    for (toy, loss), (_, row) in cells.items():
        kl, fisher = (f"{row[f'test_{name}']:.4f} ± {row[f'test_{name}_se']:.4f}" for name in ("kl", "fisher"))
        lines.append(f"{toy:14}{loss:7}{kl:20}{fisher:20}{row['seconds'] / 60:8.1f}{row['batches_per_second']:11.1f}")
    return "\n".join(lines) + "\n(± one standard error over the test points)"


# ---------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------


def parse(argv=None):
    """-> the arguments of each run that was asked for, and the folder of them all"""
    parser = argparse.ArgumentParser(description="Train an energy-based flow on a density in the plane.")
    parser.add_argument("--data", choices=[*TOYS, "all"], default="swirl")
    parser.add_argument("--loss", choices=[*DEFAULTS, "all"], default="dsm")
    parser.add_argument("--out", type=Path, help="directory of the run (runs/toy-DATA-LOSS); of several, DIR/DATA-LOSS")
    add_run_flags(parser)
    add_compile_flag(parser)
    parser.add_argument("--double", action="store_true", help="compute in float64")
    add_settings(parser, DEFAULTS.values())
    args = parser.parse_args(argv)
    toys = list(TOYS) if args.data == "all" else [args.data]
    objectives = list(DEFAULTS) if args.loss == "all" else [args.loss]
    several = len(toys) * len(objectives) > 1
    out = args.out or Path("runs") / f"toy-{args.data}-{args.loss}"
    runs = []
    for toy in toys:
        for loss in objectives:
            args.data, args.loss = toy, loss
            cell = with_settings(parser, args, DEFAULTS.values(), DEFAULTS[loss] | BY_TOY.get(toy, {}), strict=not several)
            cell.out = out / f"{toy}-{loss}" if several else out
            if cell.start_smoothing < Toy.smoothing:
                parser.error(f"--start-smoothing must be {Toy.smoothing} at least, the smoothing of the toys")
            if several and args.resume:  # what was not started yet starts
                cell.resume = (cell.out / "config.json").exists()
            runs.append(cell)
    return runs, out


def main(argv=None):
    runs, out = parse(argv)
    with one_line_errors(torch.linalg.LinAlgError):
        cells = {}
        for args in runs:
            print(f"{args.data}, {args.loss}: {args.out}")
            cells[args.data, args.loss] = train(args)
        print(table(cells))
        if len(runs) > 1:
            toys, objectives = (list(dict.fromkeys(keys)) for keys in zip(*cells))
            save_picture(out / "grid.png", grid(cells, toys, objectives))


if __name__ == "__main__":
    main()
