"""Batches per second of every objective, and the time of a step beside that of the matrix products that it must do.

    python -m experiments.speed
    python -m experiments.speed --arch cnn --compile
    python -m experiments.speed --arch toy --compile

A step is everything that training does for one batch: indexing, dequantisation, pre-processing (centred pixels),
objective, gradient, optimiser, moving average. The floor of --arch fc is the number of products of a (batch × D) with a
(D × D) matrix in a step, by torch's own counter of operations, times the time of one product. It leaves out the
determinants and solves that `ml` and `sml` need. It also leaves out the passes over the parameters: the norm of the
gradient, the optimiser and the moving average read or write each of them. The time of these passes is printed.

Ten steps of one kind are timed together. Kinds take turns, so slow moments of the machine hit all of them. The medians
are printed. With --compile there are also compiled steps. With --arch toy, the flow in the plane, there are also plain
steps in float64. The learning rate is so small that the parameters stay what they are. On one core the experiment takes
half a minute, with --arch toy one minute, cnn two, glow five. Compiling an objective takes up to a minute more.
"""

import argparse
import copy
import statistics
import time
from itertools import count

import torch
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import train_mnist
import train_toy
from data import MNIST, TOYS, DataError, load_images
from ebflow import EBFlow, toy_flow
from experiments import at_least
from losses import OBJECTIVES
from support import processes, settings
from support.fast import Graphed, fast_products
from support.optimization import trainable, update_average
from support.run import one_line_errors


class FlopCounter(TorchDispatchMode):
    """Sums torch's own formulas. torch's FlopCounterMode hooks modules, and fails on the ∇_x in a loss."""

    def __init__(self, formulas=flop_registry):
        super().__init__()
        self.flops, self.formulas = 0, formulas

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in self.formulas:
            self.flops += self.formulas[function.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(function, device):
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def training_step(loss, images, batch_size, device, arch="fc", *flags):
    """A step on random images, and its passes over the parameters alone.   -> () -> None, () -> None"""
    s = settings.parse(settings.Mnist, ["--arch", arch, "--loss", loss, "--batch-size", str(batch_size),
                                        *["--model-samples", str(batch_size)] * (loss == "sml"),
                                        "--normalize", "center", "--lr", "1e-8", *flags])
    pre, flow = train_mnist.build(s, images[:2000])
    model = EBFlow([*pre.layers, *flow.layers], pre.shape).to(device)
    averaged = copy.deepcopy(model)
    train_step, optimizer = train_mnist.make_step(s, pre, flow, model, averaged)
    parameters, averages = trainable(model), trainable(averaged)
    train_set, n = images.to(device), count()

    def step():
        index = torch.randint(len(train_set), (batch_size,), device=device)
        train_step(train_set[index], next(n))

    def passes():  # after a step, which leaves a gradient
        get_total_norm([p.grad for p in parameters])
        optimizer.step()
        update_average(averages, parameters, next(n))

    return step, passes


def toy_step(loss, batch_size, device, *flags):
    """A step on fresh points of the swirl.   -> () -> None"""
    s, toy, flow, sigma = toy_problem(loss, device, *flags)
    train_step, _ = train_toy.make_step(s, flow, copy.deepcopy(flow))
    n = count()
    return lambda: train_step(toy.sample(batch_size, device), sigma, next(n))


def plain_toy_step(loss, batch_size, device):
    """A step of the same flow and objective in float64, as torch's tutorials write it.   -> () -> None

    It computes gradients for the noisy points, too, and takes torch's optimiser and moving average as they come.
    """
    s, toy, flow, sigma = toy_problem(loss, device)
    flow.double()
    optimizer = torch.optim.Adam(flow.parameters(), lr=s.lr)
    average = AveragedModel(flow, avg_fn=get_ema_avg_fn(0.999))

    def step():
        optimizer.zero_grad()
        x = toy.sample(batch_size, device).double()
        OBJECTIVES[loss](flow, x, share=processes.share, sigma=sigma, pooled=True, **s.config()).backward()
        get_total_norm([p.grad for p in flow.parameters()])
        optimizer.step()
        average.update_parameters(flow)

    return step


def toy_problem(loss, device, *flags):
    """Settings, the swirl, the flow at its start, and the noise level at the start as a tensor."""
    s = settings.parse(settings.Toy, ["--data", "swirl", "--loss", loss, "--lr", "1e-8", *flags])
    sigma = torch.tensor(s.start_smoothing, dtype=torch.float64, device=device)
    return s, TOYS["swirl"](), toy_flow(blocks=s.blocks, width=s.width).to(device), sigma


def count_products(loss, images, batch_size):
    """Products of a (batch × D) with a (D × D) matrix in a step of the fully-connected flow.

    It counts on a CPU, because products that a GPU replays cannot be counted.
    """
    step, _ = training_step(loss, images, batch_size, torch.device("cpu"))
    step()  # the first of ten moves the actnorm, too
    with FlopCounter() as counter:
        step()
    return counter.flops / (2 * batch_size * images[0].numel() ** 2)


def interleaved(functions, repeats, device, calls=10):
    """Seconds of a call of each function: the median over blocks of so many calls.   {name: ()} -> {name: float}"""
    times = {name: [] for name in functions}
    for function in functions.values():
        function()  # the first call is slower
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(timed(lambda: [function() for _ in range(calls)], device) / calls)
    return {name: statistics.median(t) for name, t in times.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=["fc", "cnn", "glow", "toy"], default="fc")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("C", "H", "W"), help="random images, in place of MNIST")
    parser.add_argument("--batch-size", type=at_least(1), help="by default 100, for the toys 512")
    parser.add_argument("--repeats", type=at_least(1), default=12, help="blocks of ten steps of each kind")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--compile", action="store_true", help="time compiled steps, too, on a CPU")
    a = parser.parse_args(argv)
    with one_line_errors(DataError), processes.joined(a.device) as device:
        experiment(a, device)


def experiment(a, device):
    toys = a.arch == "toy"
    batch_size = a.batch_size or (512 if toys else 100)
    variants = {"": [], "compiled": ["--compile"]} if a.compile else {"": []}
    kinds = [(loss, variant) for variant in variants for loss in OBJECTIVES]
    if toys:
        steps = {(loss, variant): toy_step(loss, batch_size, device, *variants[variant]) for loss, variant in kinds}
        steps |= {(loss, "plain"): plain_toy_step(loss, batch_size, device) for loss in OBJECTIVES}
    else:
        images = torch.randint(0, 256, (2000, *a.shape), dtype=torch.uint8) if a.shape else load_images(MNIST)[0]
        pairs = {(loss, variant): training_step(loss, images, batch_size, device, a.arch, *variants[variant])
                 for loss, variant in kinds}
        steps = {kind: step for kind, (step, _) in pairs.items()}
    if a.arch == "fc":
        D = images[0].numel()
        x, W = torch.randn(batch_size, D, device=device), torch.randn(D, D, device=device)
        multiply = Graphed(lambda x: [x @ W for _ in range(10)], [])

        def ten_products():
            with fast_products("dsm"):
                multiply(x)

        steps |= {"ten products": ten_products, "passes": pairs["dsm", ""][1]}  # the passes are the same for all
    median = interleaved(steps, a.repeats, device)

    columns = [*variants, *["plain"] * toys]
    heads = ["batches/s", "step (ms)"]
    figures = {kind: [f"{1 / t:.1f}", f"{1e3 * t:.2f}"] for kind, t in median.items()}
    print(f"{torch.get_num_threads()} threads, batch size {batch_size}")
    if a.arch == "fc":
        product = median["ten products"] / 10
        print(f"one product of {batch_size}×{D} with {D}×{D}: {1e3 * product:.3f} ms; "
              f"gradient norm, optimiser and moving average: {1e3 * median['passes']:.2f} ms")
        heads += ["products", "step / floor"]
        for loss in OBJECTIVES:
            products = count_products(loss, images, batch_size)
            for variant in variants:
                figures[loss, variant] += [f"{products:.0f}", f"{median[loss, variant] / (products * product):.2f}"]
    print(f"{'objective':9}" + "".join(f"{f'{column} {head}'.strip():>22}" for column in columns for head in heads))
    for loss in OBJECTIVES:
        print(f"{loss:9}" + "".join(f"{figure:>22}" for column in columns for figure in figures[loss, column]))


if __name__ == "__main__":
    main()
