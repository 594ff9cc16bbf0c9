"""What a training step costs against D: time, memory and counted operations of every objective.

    python -m experiments.runtime

The flows are fully connected and convolutional. The images are random, with 16 to 64 pixels a side and one or three
channels. A step is objective, gradient and optimiser. Steps of different objectives take turns, so slow moments of the
machine hit all of them, and medians are kept. Operations are counted on the device `meta`, where nothing is computed:
products and convolutions by torch's own formulas, factorisations and solves by those below. A step is not timed if its
operations and the speed of a product say that it takes longer than --longest.

The experiment takes 4.5 minutes on two cores; with --archs fc --seconds 1.5 it takes 26 seconds on an H100. It writes
results/runtime-DEVICE.json after every size, and continues from it; then results/runtime-DEVICE.png, with the slopes of
straight lines fitted to the logarithms. It prints the table of docs/results.md.
Source: Chao et al. (2023), the runtime comparison.
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch.nn.utils import get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from ebflow import cnn_flow, fc_flow
from experiments import at_least, folder, record, recorded
from experiments.speed import timed
from losses import OBJECTIVES
from support import processes, settings
from support.fast import accelerated, fast_products
from support.optimization import trainable
from support.run import RunError, one_line_errors, save_picture

# Operations of an n × n factorisation (⅔n³), and of a solve with it (2n² for each right-hand side).
aten = torch.ops.aten
FORMULAS = flop_registry | {
    aten._linalg_slogdet: lambda A, **_: 2 * A.shape[-1] ** 2 * A.numel() // (3 * A.shape[-1]),
    aten._linalg_solve_ex: lambda A, B, **_: (
        2 * A.shape[-1] ** 2 * A.numel() // (3 * A.shape[-1]) + 2 * A.shape[-1] * B.numel()),
    aten.linalg_lu_solve: lambda LU, pivots, B, **_: 2 * LU.shape[-1] * B.numel(),
    aten.linalg_solve_triangular: lambda A, B, **_: A.shape[-1] * B.numel(),
}


class FlopCounter(TorchDispatchMode):
    """Sums the formulas of what runs inside. torch's FlopCounterMode hooks modules, and fails on the ∇_x in a loss."""

    def __init__(self, formulas=FORMULAS):
        super().__init__()
        self.flops, self.formulas = 0, formulas

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in self.formulas:
            self.flops += self.formulas[function.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def build(arch, shape):
    return fc_flow(math.prod(shape)) if arch == "fc" else cnn_flow(shape, diagonal=0.6)


def settings_of(arch, loss, batch_size):
    """The default settings of an objective. The learning rate is so small that the parameters stay what they are."""
    return settings.parse(settings.Mnist, ["--arch", arch, "--loss", loss, "--lr", "1e-8",
                                           *["--model-samples", str(batch_size)] * (loss == "sml")])


def make_gradient(s, flow):
    """(B, *shape) -> the loss, (). It leaves the gradient in p.grad."""
    parameters = trainable(flow)

    def gradient(x):
        loss = OBJECTIVES[s.loss](flow, x, share=processes.share, **s.config())
        loss.backward(inputs=parameters)
        return loss.detach()

    return gradient


def count_operations(arch, shape, loss, batch_size):
    """Operations of the objective and its gradient; nothing is computed."""
    with torch.device("meta"):
        flow = build(arch, shape)
    with FlopCounter() as counter:
        make_gradient(settings_of(arch, loss, batch_size), flow)(torch.randn(batch_size, *flow.shape, device="meta"))
    return counter.flops


def peak_memory(function, device):
    """MiB at the peak of a call: of the device, or of the process on Linux; None elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    except OSError:
        return None
    function()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**10


def measure(arch, shape, batch_size, device, rate, longest, seconds):
    """A row for each objective. `rate`: operations per second, by which a step is too long to be timed, or not."""
    rows = {loss: {"arch": arch, "channels": shape[0], "side": shape[1], "D": math.prod(shape), "loss": loss,
                   "operations": count_operations(arch, shape, loss, batch_size), "ms": None, "peak_mib": None}
            for loss in OBJECTIVES}
    flow = build(arch, shape).to(device)
    x = torch.randn(batch_size, *flow.shape, device=device)
    parameters = trainable(flow)
    optimizer = torch.optim.Adam(parameters, lr=1e-8, fused=True)  # one for all: they are never timed together

    def step(gradient):
        optimizer.zero_grad()
        gradient(x)
        get_total_norm([p.grad for p in parameters])
        optimizer.step()

    timed_losses = [loss for loss in OBJECTIVES if rows[loss]["operations"] < rate * longest]
    gradients = {}
    for loss in timed_losses:
        s = settings_of(arch, loss, batch_size)
        gradient = make_gradient(s, flow)
        rows[loss]["peak_mib"] = peak_memory(lambda: step(gradient), device)  # without graphs, which keep their memory
        gradients[loss] = accelerated(gradient, parameters, s)
    for loss in timed_losses:
        with fast_products(loss):
            step(gradients[loss])  # the first step is slower
    times = {loss: [] for loss in timed_losses}
    start = time.perf_counter()
    while timed_losses and (len(times[loss]) < 3 or len(times[loss]) < 30 and time.perf_counter() - start < seconds):
        for loss in timed_losses:
            with fast_products(loss):
                times[loss].append(timed(lambda: step(gradients[loss]), device))
    for loss in timed_losses:
        rows[loss]["ms"] = 1e3 * statistics.median(times[loss])
    return [*rows.values()]


def slope(rows, key):
    """The exponent of D in `key`, by least squares on the logarithms; None for fewer than three sizes."""
    points = [(math.log(row["D"]), math.log(row[key])) for row in rows if row[key]]
    return statistics.linear_regression(*zip(*points)).slope if len(points) > 2 else None


def series(rows, arch):
    """The sizes that one line joins: for fc all, for cnn those with the same number of channels.

    -> {name: rows}
    """
    own = sorted((row for row in rows if row["arch"] == arch), key=lambda row: row["D"])
    if arch == "fc":
        return {"": own}
    return {f"{c} channel{'s' * (c > 1)}": [row for row in own if row["channels"] == c]
            for c in sorted({row["channels"] for row in own})}


def picture(rows):
    """Operations and time against D: a row of panels for each architecture, lines for each objective."""
    archs = sorted({row["arch"] for row in rows}, reverse=True)
    figure = Figure(figsize=(10, 3.9 * len(archs)), layout="constrained")
    for axes_row, arch in zip(figure.subplots(len(archs), 2, squeeze=False), archs):
        for axes, key, label in zip(axes_row, ("operations", "ms"), ("operations in a step", "ms for a step")):
            for i, loss in enumerate(OBJECTIVES):
                for style, (name, sizes) in zip(("o-", "s:"), series(rows, arch).items()):
                    own = [row for row in sizes if row["loss"] == loss and row[key]]
                    exponent = slope(own, key)
                    power = f"  ∝ D^{exponent:.2f}" if exponent else ""
                    axes.loglog([row["D"] for row in own], [row[key] for row in own], style, ms=4, lw=1, color=f"C{i}",
                                label=" ".join(filter(None, (loss, name))) + power)
            axes.set(xlabel="D", ylabel=label, title={"fc": "fully connected", "cnn": "convolutional"}[arch])
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.3, which="both", axis="x")
            axes.grid(alpha=0.3, axis="y")
            axes.set_ylim(top=axes.get_ylim()[1] * (1 if arch == "fc" else 20))  # room for the longer legend
            axes.legend(fontsize="x-small", ncols=1 if arch == "fc" else 2)
    return figure


def table(rows):
    """The table of docs/results.md: ms for a step of each objective, and ml's time over dsm's."""
    lines = []
    for arch, channels, side in dict.fromkeys((row["arch"], row["channels"], row["side"]) for row in rows):
        ms = {row["loss"]: row["ms"] for row in rows
              if (row["arch"], row["channels"], row["side"]) == (arch, channels, side)}
        ratio = f"{ms['ml'] / ms['dsm']:.1f}" if ms["ml"] and ms["dsm"] else "–"
        lines.append(f"| {arch} | {channels}×{side}×{side} | {channels * side**2:,} | "
                     + " | ".join("–" if ms[loss] is None else f"{ms[loss]:,.1f}" for loss in OBJECTIVES)
                     + f" | {ratio} |")
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", nargs="+", choices=["fc", "cnn"], default=["fc", "cnn"])
    parser.add_argument("--channels", type=int, nargs="+", choices=[1, 3], default=[1, 3])
    parser.add_argument("--sides", type=int, nargs="+", default=[16, 24, 32, 48, 64], help="multiples of 4")
    parser.add_argument("--largest", type=int, default=4100, help="largest D, for lack of memory")
    parser.add_argument("--batch-size", type=at_least(1), default=32)
    parser.add_argument("--longest", type=float, default=10.0, help="seconds of a step that is timed")
    parser.add_argument("--seconds", type=float, default=8.0, help="for all steps of one size")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--results", type=folder, default="results")
    a = parser.parse_args(argv)
    if any(side < 4 or side % 4 for side in a.sides):
        parser.error("--sides must be multiples of 4: the convolutional flow squeezes twice")
    with one_line_errors(OSError), processes.joined(a.device) as device:
        path = a.results / f"runtime-{device.type}.json"
        result = recorded(path, command="python -m experiments.runtime", batch_size=a.batch_size,
                          longest=a.longest)
        x = torch.randn(1024, 1024, device=device)
        timed(lambda: x @ x, device)
        rate = 2 * 1024**3 / min(timed(lambda: x @ x, device) for _ in range(5))
        sizes = sorted(((arch, c, side) for arch in a.archs for c in a.channels for side in a.sides
                        if c * side**2 <= a.largest), key=lambda size: size[1] * size[2] ** 2)
        if not sizes:
            raise RunError(f"no image of --sides has as few as {a.largest} numbers: raise --largest")
        for arch, c, side in tqdm(sizes, dynamic_ncols=True, unit=" sizes"):
            name = f"{arch} {c}×{side}×{side}"
            if name not in result["runs"]:
                result["runs"][name] = measure(arch, (c, side, side), a.batch_size, device, rate, a.longest,
                                               a.seconds)
                record(path, result)
        rows = sorted((row for size in result["runs"].values() for row in size),
                      key=lambda row: (row["arch"] != "fc", row["channels"], row["side"]))
        save_picture(a.results / f"runtime-{device.type}.png", picture(rows))
        print("\n".join(table(rows)))
        for arch in a.archs:
            for name, sizes in series(rows, arch).items():
                for key in ("operations", "ms"):
                    exponents = {loss: slope([row for row in sizes if row["loss"] == loss], key)
                                 for loss in OBJECTIVES}
                    print(" ".join(filter(None, (arch, name, key))) + " ∝ D^x, x: "
                          + ", ".join(f"{loss} {x:.2f}" for loss, x in exponents.items() if x is not None))


if __name__ == "__main__":
    main()
