"""Batches per second of every objective, and how far a step is from the matrix products that it must do.

    python -m experiments.speed
    python -m experiments.speed --arch cnn --compile
    python -m experiments.speed --arch toy --compile

A step is everything that training does for one batch: indexing, dequantisation, pre-processing (each pixel centred), objective,
gradient, optimiser, moving average. The floor of --arch fc is the number of products of a (batch × D) with a (D × D) matrix
in it, as torch's own counter of operations finds them, times the time of one such product in the same run. The
floor leaves out determinants and solves; `ml` and `sml` cannot do without. Nor is the time in it that the norm of the gradient,
the optimiser and the moving average take to read and write every weight, which is printed beside it. Ten steps of one kind in
a row, as in training, are timed at once, the kinds interleaved, so that a slow moment of the machine hits all of them, and the
medians are printed; with --compile also those of compiled steps, and of --arch toy, the flow in the plane, of a plain step
in float64. The learning rate is so small that the weights stay what they are.
"""

import argparse
import statistics
import time

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import train_toy
from data import MNIST, TOYS, mnist
from ebflow import toy_flow
from train_mnist import DEFAULTS, LOSSES, build, minibatch, parse
from training import Graphed, MovingAverage, descend, fast_matmul, gradient_of, make_optimizer, objective, theta_of


class FlopCounter(TorchDispatchMode):
    """Sums torch's own formulas. (Its FlopCounterMode hooks modules, which ∇_x within a loss does not survive.)"""

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
    """A function that does one whole step on random images of the training split, and one that does its passes over the weights."""
    samples = ["--model-samples", str(batch_size)] if loss == "sml" else []
    a = parse(["--arch", arch, "--loss", loss, "--batch-size", str(batch_size), "--normalize", "center", "--lr", "1e-8", *samples, *flags])
    pre, flow, image_model = (part.to(device) for part in build(a, images[:2000]))
    train_set = images.view(len(images), *flow.shape).to(device)
    optimizer = make_optimizer(a, flow)
    average = MovingAverage(image_model, a.ema_decay)
    gradient = gradient_of(a, flow, optimizer)

    def step():
        index = torch.randint(len(train_set), (batch_size,), device=device)
        with fast_matmul(loss):
            descend(a, gradient(minibatch(a, pre, train_set[index])), optimizer)
        average.update()

    def passes():
        theta_of(optimizer).grad.norm()
        optimizer.step()
        average.update()

    return step, passes


def toy_step(loss, batch_size, device, *flags):
    """A function that does one whole step on fresh points of the swirl."""
    a, toy, flow = toy_problem(loss, device, *flags)
    optimizer = make_optimizer(a, flow)
    average = MovingAverage(flow, a.ema_decay)
    gradient = gradient_of(a, flow, optimizer)

    def step():
        descend(a, gradient(toy.sample(batch_size, device).float()), optimizer)
        average.update()

    return step


def plain_toy_step(loss, batch_size, device):
    """The same flow and objective in float64, with gradients for the noisy points, too, and torch's optimiser and average as they come."""
    a, toy, flow = toy_problem(loss, device)
    flow.double()
    optimizer = torch.optim.Adam(flow.parameters(), lr=a.lr)
    average = AveragedModel(flow, avg_fn=get_ema_avg_fn(a.ema_decay))

    def step():
        optimizer.zero_grad()
        objective(a, flow, toy.sample(batch_size, device).double()).backward()
        torch.nn.utils.get_total_norm([p.grad for p in flow.parameters()])
        optimizer.step()
        average.update_parameters(flow)

    return step


def toy_problem(loss, device, *flags):
    (a,), _ = train_toy.parse(["--data", "swirl", "--loss", loss, "--lr", "1e-8", *flags])
    a.sigma = torch.tensor(a.start_smoothing, device=device)
    return a, TOYS["swirl"](), toy_flow().to(device)


def count(loss, images, batch_size):
    """Products of a (batch × D) with a (D × D) matrix in a step of the fully-connected flow, on a CPU: what a GPU replays is not counted."""
    step, _ = training_step(loss, images, batch_size, torch.device("cpu"))
    with FlopCounter() as counter:
        step()
    return counter.flops / (2 * batch_size * images[0].numel() ** 2)


def interleaved(functions, repeats, device, calls=10):
    """The median time of each function in so many calls in a row, in seconds a call.   {name: ()} -> {name: float}"""
    times = {name: [] for name in functions}
    for function in functions.values():
        function()  # the first one is slower
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(timed(lambda: [function() for _ in range(calls)], device) / calls)
    return {name: statistics.median(t) for name, t in times.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=[*DEFAULTS, "toy"], default="fc")
    parser.add_argument("--batch-size", type=int, help="100, of the toys 512")
    parser.add_argument("--repeats", type=int, default=12, help="blocks of ten steps of each kind")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="time compiled steps, too")
    a = parser.parse_args(argv)
    device, toys = torch.device(a.device), a.arch == "toy"
    if a.compile and device.type != "cpu":
        parser.error("--compile is for a CPU: add --device cpu")
    batch_size = a.batch_size or (512 if toys else 100)
    variants = {"": [], "compiled": ["--compile"]} if a.compile else {"": []}
    pairs = [(loss, variant) for variant in variants for loss in LOSSES]
    if toys:
        steps = {(loss, variant): toy_step(loss, batch_size, device, *variants[variant]) for loss, variant in pairs}
        steps |= {(loss, "plain"): plain_toy_step(loss, batch_size, device) for loss in LOSSES}
    else:
        images = mnist(MNIST)[0]
        steps = {(loss, variant): training_step(loss, images, batch_size, device, a.arch, *variants[variant]) for loss, variant in pairs}
        passes = steps["dsm", ""][1]  # the same for all
        steps = {name: step for name, (step, _) in steps.items()}
    if a.arch == "fc":
        D = images[0].numel()
        x, W = torch.randn(batch_size, D, device=device), torch.randn(D, D, device=device)
        ten = Graphed(lambda x: [x @ W for _ in range(10)])

        def ten_products():
            with fast_matmul("dsm"):
                ten(x)

        steps |= {"ten products": ten_products, "passes": passes}
    median = interleaved(steps, a.repeats, device)

    columns = [*variants, *["plain"] * toys]
    print(f"{torch.get_num_threads()} threads, batch size {batch_size}")
    heads, cells = ["batches/s", "step (ms)"], lambda loss, t: [f"{1 / t:.1f}", f"{1e3 * t:.2f}"]
    if a.arch == "fc":
        product, products = median["ten products"] / 10, {loss: count(loss, images, batch_size) for loss in LOSSES}
        print(f"one product of {batch_size}×{D} with {D}×{D}: {1e3 * product:.3f} ms; "
              f"gradient norm, optimiser and moving average: {1e3 * median['passes']:.2f} ms")
        heads += ["products", "step / floor"]
        cells = lambda loss, t: [f"{1 / t:.1f}", f"{1e3 * t:.2f}", f"{products[loss]:.0f}", f"{t / (products[loss] * product):.2f}"]
    print(f"{'objective':9}" + "".join(f"{f'{name} {head}'.strip():>22}" for name in columns for head in heads))
    for loss in LOSSES:
        print(f"{loss:9}" + "".join(f"{figure:>22}" for name in columns for figure in cells(loss, median[loss, name])))


if __name__ == "__main__":
    main()
