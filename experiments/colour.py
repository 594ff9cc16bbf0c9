"""Where does score matching pay? ml, ssm and dsm for the same time on colour images of 3 × 32 × 32.

    python -m experiments.colour --data cifar-10-batches-bin

Each architecture and objective trains for MINUTES of processor time on one thread. The learning rate follows a cosine
of the time that is over. The clock stands still while 2,000 validation images are evaluated; the flow of the lowest
NLL is kept. Before, each of three learning rates is tried for a fifth of the time, and that of the lowest NLL at the
end is taken: the same effort for all. Seeds after the first train at its rate. Pixels are whitened. The last layer is
an actnorm: trained by ml, at the moments of its input in score matching. No steps of sml follow.

Time: four hours on one core.
"""

import copy
import math
import time
from dataclasses import replace
from pathlib import Path

import torch

import train_mnist
from data import DataError, dequantize, load_images
from ebflow import EBFlow
from experiments import command_line, completed, panels, passed_on
from support import plots, settings
from support.optimization import cosine
from support.run import one_line_errors

MINUTES, TRIES, LOOKS = 10, (1 / 3, 1, 3), 15
FC, CNN = "--arch fc --normalize whiten ", "--arch cnn --normalize whiten --diagonal -0.6 "
NOISY = "--actnorm moments --sml-steps 0 --sigma 0.35 "
OWN = {  # with the learning rate in the middle of its tries
    "fc ml": FC + "--loss ml --actnorm trained --diagonal 0.5 --batch-size 200 --lr 1e-4",
    "fc ssm": FC + "--loss ssm --diagonal 4 --ratio 6 --lr 2e-3 " + NOISY,
    "fc dsm": FC + "--loss dsm --diagonal 4 --ratio 6 --lr 3e-3 " + NOISY,
    "cnn ml": CNN + "--loss ml --actnorm trained --bend 0 --lr 3e-3",
    "cnn ssm": CNN + "--loss ssm --clip 2000 --lr 5e-4 " + NOISY,
    "cnn dsm": CNN + "--loss dsm --clip 2000 --lr 5e-4 " + NOISY,
}


def race(s, pre, splits, minutes):
    """Trains the flow of pre's output for so many minutes, on splits of bytes (n, C, H, W).

    -> {"curve": [[minutes, NLL of 2,000 validation images]], …}, the flow of the lowest
    """
    torch.manual_seed(s.seed)
    flow = train_mnist.architecture(s, splits[0].shape[1:])
    flow.initialize(pre(dequantize(splits[0][:1000].view(-1, *pre.shape))))
    model = EBFlow([*pre.layers, *flow.layers], pre.shape)
    averaged = copy.deepcopy(model)
    step, optimizer = train_mnist.make_step(s, pre, flow, model, averaged)
    curve, spent, n = [], 0.0, 0
    while True:
        if spent >= len(curve) / LOOKS * minutes * 60:
            if s.actnorm == "moments":
                torch.manual_seed(0)
                train_mnist.track_moments(averaged, dequantize(splits[0][:5000]).view(-1, *model.shape))
            nll = train_mnist.evaluate("val", averaged.eval(), splits[1][:2000])["val_nll"]
            if not curve or nll < min(old for _, old in curve):
                best = copy.deepcopy(averaged)
            curve.append([spent / 60, nll])
            print(f"{s.arch} {s.loss} lr {s.lr:g}: {spent / 60:.1f} minutes, {n} steps, {nll:.1f}", flush=True)
            torch.manual_seed(1000 * s.seed + len(curve))
            if len(curve) > LOOKS or not math.isfinite(nll):
                return {"curve": curve, "steps": n, "lr": s.lr, "seed": s.seed}, best
        start = time.process_time()
        optimizer.param_groups[0]["lr"] = s.lr * cosine(min(spent / (60 * minutes), 1.0))
        step(splits[0][torch.randint(len(splits[0]), (s.batch_size,))], n)
        spent, n = spent + time.process_time() - start, n + 1


def cell(name, data, splits, minutes, seeds, flags):
    """Tries three learning rates, and trains by the best, from each seed.   -> dict of seed 0, with the others in it"""
    s = settings.parse(train_mnist.Settings, [*OWN[name].split(), "--data", str(data), *flags])
    torch.manual_seed(0)
    pre, _ = train_mnist.build(s, splits[0])
    tries = [race(replace(s, lr=s.lr * factor), pre, splits, minutes / 5)[0] for factor in TRIES]
    best = min(tries, key=lambda one: one["curve"][-1][1] if math.isfinite(one["curve"][-1][1]) else math.inf)
    found = []
    for seed in range(seeds):
        one, flow = race(replace(s, lr=best["lr"], seed=s.seed + seed), pre, splits, minutes)
        found.append(one | train_mnist.evaluate("test", flow, splits[2]))
    return found[0] | {"tries": {f"{one['lr']:g}": one["curve"][-1][1] for one in tries}, "flags": OWN[name],
                       "others": found[1:]}


def gaussian(splits):
    """One Gaussian of the logits, with the shrunk covariance.   -> {"val_nll", "test_nll", …}"""
    s = settings.parse(train_mnist.Settings, ["--normalize", "whiten"])
    pre, _ = train_mnist.build(s, splits[0])
    return train_mnist.evaluate("val", pre, splits[1][:2000]) | train_mnist.evaluate("test", pre, splits[2])


def picture(runs):
    """Validation NLL against minutes, cut 900 nats above one Gaussian's."""
    figure, [axes] = panels(1, 2, 9, 3.6, sharey=True)
    for one, arch in zip(axes, ("fc", "cnn")):
        for loss in ("ml", "ssm", "dsm"):
            if f"{arch} {loss}" in runs:
                run = runs[f"{arch} {loss}"]
                one.plot(*zip(*run["curve"]), marker=".", color=plots.COLORS[loss], label=loss)
                for other in run["others"]:
                    one.plot(*zip(*other["curve"]), color=plots.COLORS[loss], lw=0.8, alpha=0.7)
        one.axhline(runs["one Gaussian"]["val_nll"], color=plots.GREY, ls="--", label="one Gaussian")
        one.set(xlabel="minutes on one thread", title=arch.upper())
    low = min(nll for run in runs.values() for _, nll in run.get("curve", ()))
    axes[0].set(ylabel="validation NLL (nats)",
                ylim=(low - 100, runs["one Gaussian"]["val_nll"] + 900))
    axes[1].legend()
    return figure


def rows(runs):
    """The table of docs/results.md."""
    gauss = runs["one Gaussian"]
    yield f"| one Gaussian |  |  | {gauss['val_nll']:,.0f} |  | {gauss['test_nll']:,.0f} | {gauss['test_bpd']:.3f} |"
    for name in [name for name in OWN if name in runs]:
        for run in (runs[name], *runs[name]["others"]):
            nll = [nll for _, nll in run["curve"]]
            seed = f", seed {run['seed']}" if run is not runs[name] else ""
            yield (f"| {name}{seed} | {run['steps']:,} | {nll[0]:,.0f} | {min(nll):,.0f} | {nll[-1]:,.0f} | "
                   f"{run['test_nll']:,.0f} | {run['test_bpd']:.3f} |")


def main(argv=None):
    parser = command_line(__doc__, "--results", "--seeds", passes="train_mnist.py")
    parser.add_argument("--data", type=Path, default=Path("cifar-10-batches-bin"),
                        help="directory of CIFAR-10's binary version")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time of training of a cell")
    parser.add_argument("--cells", nargs="+", choices=OWN, default=[*OWN])
    a, flags = parser.parse_known_args(argv)
    for name in a.cells:  # before a file is looked at
        passed_on(train_mnist.Settings, OWN[name].split(), flags)
    with one_line_errors(DataError, torch.linalg.LinAlgError):
        torch.set_num_threads(1)
        splits = load_images(a.data)
        jobs = {"one Gaussian": lambda: gaussian(splits)} | {
            name: lambda name=name: cell(name, a.data, splits, a.minutes, a.seeds, flags) for name in a.cells}
        runs = completed(a.results / "colour.json", jobs, minutes=a.minutes, flags=flags)
        plots.save(a.results / "colour.png", picture(runs))
        print(*rows(runs), sep="\n")


if __name__ == "__main__":
    main()
