"""What a training step costs against D: time and counted operations of every objective.

    python -m experiments.runtime

The flows are fully connected and convolutional. The images are random, with 16 to 64 pixels a side and one or three
channels. A step is objective, gradient and optimiser. Operations are counted on the device `meta`, where nothing is
computed: products and convolutions by torch's own formulas, factorisations and solves by those below. The record is
runtime-DEVICE.json. The picture has the slopes of straight lines fitted to the logarithms. Source: Chao et al. (2023),
the runtime comparison.

Time: three minutes on two cores.
"""

import math
import statistics
import time
from functools import partial
from itertools import groupby, product
from operator import itemgetter

import torch
from matplotlib.ticker import NullLocator
from torch.nn.utils import get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import train_mnist
from ebflow import cnn_flow, fc_flow
from experiments import command_line, completed, machine, panels
from losses import OBJECTIVES
from support import plots, processes
from support.fast import accelerated, fast_products
from support.optimization import trainable
from support.run import one_line_errors

BATCH_SIZE, ROUNDS, SECONDS = 32, 30, 8  # at most for all steps of one size, but at least three rounds
BUILD = {"fc": lambda shape: fc_flow(math.prod(shape)), "cnn": lambda shape: cnn_flow(shape, diagonal=0.6)}
ARCHS = {"fc": "fully connected", "cnn": "convolutional"}
SIZES = [(1, 16), (1, 24), (3, 16), (1, 32), (3, 24), (1, 48), (3, 32), (1, 64)]  # channels and side, by D
aten = torch.ops.aten  # an n × n factorisation has ⅔n³ operations, a solve with it 2n² for each right-hand side
FORMULAS = flop_registry | {
    aten._linalg_slogdet: lambda A, **_: 2 * A.shape[-1] * A.numel() // 3,
    aten._linalg_solve_ex: lambda A, B, **_: 2 * A.shape[-1] * A.numel() // 3 + 2 * A.shape[-1] * B.numel(),
    aten.linalg_lu_solve: lambda LU, pivots, B, **_: 2 * LU.shape[-1] * B.numel(),
    aten.linalg_solve_triangular: lambda A, B, **_: A.shape[-1] * B.numel(),
}


class Operations(TorchDispatchMode):
    """Adds up the operations of what FORMULAS know. (torch's FlopCounterMode fails on the ∇_x in a loss.)"""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in FORMULAS:
            self.total += FORMULAS[function.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def make_gradient(arch, loss, flow):
    """The settings, and (B, *shape) -> the loss, (), which leaves the gradient in p.grad."""
    s = train_mnist.Settings(arch=arch, loss=loss, model_samples=BATCH_SIZE)
    parameters, config = trainable(flow), s.config()

    def gradient(x):
        value = OBJECTIVES[loss](flow, x, **config)
        value.backward(inputs=parameters)
        return value.detach()

    return s, gradient


def count_operations(arch, shape, loss):
    """Operations of the objective and its gradient; nothing is computed."""
    with torch.device("meta"):
        flow = BUILD[arch](shape)
    with Operations() as counted:
        make_gradient(arch, loss, flow)[1](torch.randn(BATCH_SIZE, *flow.shape, device="meta"))
    return counted.total


def interleaved(steps, device):
    """Seconds of each step: the median over rounds in which they take turns, so slow moments hit all of them.

    The first round does not count.   {name: () -> None} -> {name: float}
    """
    times, end = {name: [] for name in steps}, None
    for n in range(1 + ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
        end = end or time.perf_counter() + SECONDS
        if n >= 3 and time.perf_counter() > end:
            break
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def measure(arch, shape, device):
    """A row for each objective."""
    flow, steps = BUILD[arch](shape).to(device), {}
    x, parameters = torch.randn(BATCH_SIZE, *flow.shape, device=device), trainable(flow)
    optimizer = torch.optim.Adam(parameters, lr=1e-8, fused=True)  # the parameters stay what they are

    def step(gradient):
        optimizer.zero_grad()
        gradient(x)
        get_total_norm([p.grad for p in parameters])
        optimizer.step()

    for loss in OBJECTIVES:
        s, gradient = make_gradient(arch, loss, flow)
        steps[loss] = fast_products(loss)(partial(step, accelerated(gradient, parameters, s)))
    return [{"arch": arch, "channels": shape[0], "side": shape[1], "D": math.prod(shape), "loss": loss,
             "operations": count_operations(arch, shape, loss), "ms": 1e3 * median}
            for loss, median in interleaved(steps, device).items()]


def slope(rows, key):
    """The exponent of D in `key`, by least squares on the logarithms."""
    return statistics.linear_regression(*zip(*((math.log(row["D"]), math.log(row[key])) for row in rows))).slope


def panel(axes, rows, key):
    """`key` against D on logarithmic axes: a line for each objective, dotted for 3 channels, with the exponent of D."""
    kinds = [(1,), (3,)] if rows[0]["arch"] == "cnn" else [(1, 3)]  # channels whose sizes one line joins
    for loss in dict.fromkeys(row["loss"] for row in rows):
        lines = [sorted((row for row in rows if row["loss"] == loss and row["channels"] in channels),
                        key=itemgetter("D")) for channels in kinds]
        label = ", ".join([loss, *(f"$D^{{{slope(line, key):.2f}}}$" for line in lines)])
        for line, style in zip(lines, ("o-", "s:")):
            axes.loglog([row["D"] for row in line], [row[key] for row in line], style, ms=4, color=plots.COLORS[loss],
                        label=label if style == "o-" else None)
    D = sorted({row["D"] for row in rows})
    axes.set_xticks(D, [f"{size:,}" for size in D], fontsize="small")
    axes.xaxis.set_minor_locator(NullLocator())


def picture(rows, where):
    """Operations and time against D: a row of panels for each architecture. `where` the times were measured."""
    archs = sorted({row["arch"] for row in rows}, reverse=True)
    figure, axes_by_row = panels(len(archs), 2, 10.5, 0.3 + 3.7 * len(archs))
    for axes_row, arch in zip(axes_by_row, archs):
        for axes, key, label in zip(axes_row, ("operations", "ms"), ("operations", "milliseconds")):
            panel(axes, [row for row in rows if row["arch"] == arch], key)
            axes.set(xlabel="D", title=f"{label} for a step, {ARCHS[arch]}")
            title, ncols = ("grow as", 2) if arch == "fc" else ("grow as (1 channel, 3 dotted)", 1)
            axes.legend(title=title, ncols=ncols, fontsize="small", title_fontsize="small", loc="upper left")
    figure.suptitle(where, fontsize="medium", color="0.35")
    return figure


def table(rows):
    """The table of docs/results.md: ms for a step of each objective, and ml's time over dsm's."""
    for (arch, channels, side, D), size in groupby(rows, itemgetter("arch", "channels", "side", "D")):
        ms = {row["loss"]: row["ms"] for row in size}
        times = " | ".join(f"{ms[loss]:,.1f}" for loss in OBJECTIVES)
        yield f"| {arch} | {channels}×{side}×{side} | {D:,} | {times} | {ms['ml'] / ms['dsm']:.1f} |"


def main(argv=None):
    parser = command_line(__doc__, "--device", "--results")
    parser.add_argument("--archs", nargs="+", choices=["fc", "cnn"], default=["fc", "cnn"])
    a = parser.parse_args(argv)
    with one_line_errors(), processes.joined(a.device) as (device, *_):
        jobs = {f"{arch} {c}×{side}×{side}": partial(measure, arch, (c, side, side), device)
                for (c, side), arch in product(SIZES, a.archs)}
        path = a.results / f"runtime-{device.type}.json"
        runs = completed(path, jobs, command="python -m experiments.runtime", batch_size=BATCH_SIZE)
        rows = [row for size in runs.values() for row in size]
        plots.save(path.with_suffix(".png"), picture(rows, machine()))
        print(*table(rows), sep="\n")


if __name__ == "__main__":
    main()
