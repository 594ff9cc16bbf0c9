"""Batches per second of a training step: plain, ours, ours compiled; and the time of its matrix products alone.

    python -m experiments.speed
    python -m experiments.speed --arch cnn
    python -m experiments.speed --profile      what the time of a step here goes to

A step is all that training does for one batch: data, pre-processing, objective, gradient, optimiser, moving average.

    plain      a competent first version: layers.py and losses.py in float32 with F.conv2d, loss.backward(), and Adam
               and AveragedModel as torch gives them. It adds no noise for ssm and fdssm, does not clip, and leaves the
               last actnorm alone
    here       the step of train_mnist.py or train_toy.py
    compiled   the same with --compile; on a CPU alone
    floor      the matrix products and convolutions of the step here, one after another and nothing between them. It
               leaves out determinants and solves, element-wise work and all passes over the parameters

Ten steps of one kind are timed together. Kinds take turns, so slow moments of the machine hit all of them. The medians
are printed, and their ratios. The learning rate is so small that the parameters stay what they are. On two cores --arch
fc takes three minutes, toy eight and cnn ten, most of it to compile.
"""

import argparse
import contextlib
import copy
import statistics
import time
from functools import partial
from itertools import count

import torch
import torch.nn.functional as F
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

import train_mnist
import train_toy
from data import MNIST, TOYS, DataError, dequantize, load_images
from ebflow import EBFlow, toy_flow
from experiments import at_least
from layers import ConstantChannel, Convolution
from losses import OBJECTIVES
from support import processes, settings
from support.fast import Graphed, fast_products
from support.optimization import trainable
from support.run import one_line_errors


KINDS = ["plain", "here", "compiled"]
PARTS = {  # by the beginning of an operation's name
    "products": ("mm", "addmm", "bmm", "mkldnn_", "convolution_"), "copies": ("copy_", "cat", "fill_", "clone"),
    "factorisations": ("linalg_lu", "linalg_solve", "_linalg_"), "the rest": ("",)}


class Products(TorchDispatchMode):
    """Records the matrix products and convolutions of what runs inside. A call repeats them on the same arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in flop_registry:
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))

    def to(self, device):
        self.calls = tree_map_only(torch.Tensor, lambda t: t.detach().to(device), self.calls)
        return self

    @torch.no_grad()
    def __call__(self, *_):
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)


def step_of_images(kind, arch, loss, images, batch_size, device):
    """A step on random batches of the images, which are centred for all objectives.   -> () -> None"""
    s = settings.parse(settings.Mnist, ["--arch", arch, "--loss", loss, "--batch-size", str(batch_size),
                                        *["--model-samples", str(batch_size)] * (loss == "sml"),
                                        "--normalize", "center", "--lr", "1e-8", *["--compile"] * (kind == "compiled")])
    pre, flow = train_mnist.build(s, images[:2000])
    model = EBFlow([*pre.layers, *flow.layers], pre.shape).to(device)
    train_set, n = images.to(device), count()

    def batch():
        return train_set[torch.randint(len(train_set), (batch_size,), device=device)]

    if kind == "plain":
        for layer in model.modules():
            if isinstance(layer, Convolution):
                layer.forward = partial(F.conv2d, weight=layer.weight, bias=layer.bias, padding="same")
        return plain(s, flow, lambda: pre(dequantize(batch()).view(-1, *model.shape)))
    step, _ = train_mnist.make_step(s, pre, flow, model, copy.deepcopy(model))
    return lambda: step(batch(), next(n))


def step_of_toys(kind, loss, batch_size, device):
    """A step on fresh points of the swirl, at the noise of the start.   -> () -> None"""
    s = settings.parse(settings.Toy, ["--data", "swirl", "--loss", loss, "--lr", "1e-8",
                                      *["--compile"] * (kind == "compiled")])
    toy, flow, n = TOYS["swirl"](), toy_flow(blocks=s.blocks, width=s.width).to(device), count()
    sigma = torch.tensor(s.start_smoothing, dtype=torch.float64, device=device)
    if kind == "plain":
        return plain(s, flow, lambda: toy.sample(batch_size, device), sigma=sigma, pooled=True)
    step, _ = train_toy.make_step(s, flow, copy.deepcopy(flow))
    return lambda: step(toy.sample(batch_size, device), sigma, next(n))


def plain(s, flow, batch, **more):
    """A step as torch's tutorials write it.   -> () -> None"""
    optimizer = torch.optim.Adam(trainable(flow), lr=s.lr)
    average = AveragedModel(flow, avg_fn=get_ema_avg_fn(0.999))
    config = s.config() | more

    def step():
        optimizer.zero_grad()
        OBJECTIVES[s.loss](flow, batch(), share=processes.share, **config).backward()
        get_total_norm([p.grad for p in trainable(flow)])
        optimizer.step()
        average.update_parameters(flow)

    return step


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(function, device):
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(functions, repeats, device, calls=10):
    """Seconds of a call of each function: the median over blocks of so many calls.   {name: ()} -> {name: float}"""
    times = {name: [] for name in functions}
    for function in functions.values():
        function()  # the first call is slower
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(timed(lambda: [function() for _ in range(calls)], device) / calls)
    return {name: statistics.median(t) for name, t in times.items()}


def profiled(function, steps=10):
    """Milliseconds of a step by PARTS, on the CPU.   -> {part: float}"""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            function()
    ms = dict.fromkeys(PARTS, 0.0)
    for event in profile.key_averages():
        name = event.key.removeprefix("aten::")
        part = next(part for part, names in PARTS.items() if name.startswith(names))
        ms[part] += event.self_cpu_time_total / 1000 / steps
    return ms


def floor(make, device, precision):
    """Repeats the matrix products of one step here, under the context precision().   -> () -> None

    They are recorded on a CPU, because a CUDA graph hides them.
    """
    step, products = make("here", torch.device("cpu")), Products()
    step()  # the first of ten moves the actnorm, too
    with products:
        step()
    replay, x = Graphed(products.to(device), []), torch.zeros((), device=device)

    def call():
        with precision():
            replay(x)

    return call


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=["fc", "cnn", "glow", "toy"], default="fc")
    parser.add_argument("--losses", nargs="+", choices=OBJECTIVES, default=[*OBJECTIVES])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--shape", type=at_least(1), nargs=3, metavar=("C", "H", "W"),
                        help="random images, in place of MNIST")
    parser.add_argument("--batch-size", type=at_least(1), help="by default 100, for the toys 512")
    parser.add_argument("--profile", action="store_true", help="time the parts of the step here, on a CPU")
    parser.add_argument("--repeats", type=at_least(1), default=12, help="blocks of ten steps of each kind")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    a = parser.parse_args(argv)
    with one_line_errors(DataError, ConstantChannel), processes.joined(a.device) as device:
        experiment(a, device)


def experiment(a, device):
    batch_size = a.batch_size or (512 if a.arch == "toy" else 100)
    if a.arch != "toy":
        images = torch.randint(0, 256, (2000, *a.shape), dtype=torch.uint8) if a.shape else load_images(MNIST)[0]

    def make(loss, kind, device):
        if a.arch == "toy":
            return step_of_toys(kind, loss, batch_size, device)
        return step_of_images(kind, a.arch, loss, images, batch_size, device)

    if a.profile:
        print(f"milliseconds of a step\n| flow | objective | step | {' | '.join(PARTS)} |")
        for loss in a.losses:
            ms = profiled(make(loss, "here", torch.device("cpu")))
            cells = [f"{t:.1f}" for t in (sum(ms.values()), *ms.values())]
            print(f"| {a.arch} | {loss} | " + " | ".join(cells) + " |")
        return

    kinds = [kind for kind in a.kinds if kind != "compiled" or device.type == "cpu"]
    functions = {}
    for loss in a.losses:
        precision = contextlib.nullcontext if a.arch == "toy" else partial(fast_products, loss)
        functions |= {(loss, kind): make(loss, kind, device) for kind in kinds}
        functions[loss, "floor"] = floor(partial(make, loss), device, precision)
    median = interleaved(functions, a.repeats, device)

    ratios = [(a, b) for a, b in (("plain", "here"), ("plain", "compiled"), ("here", "floor"), ("compiled", "floor"))
              if {a, b} <= {*kinds, "floor"}]
    print(f"{torch.get_num_threads()} threads, batch size {batch_size}; batches per second, and ratios of times")
    print("| objective | " + " | ".join([*kinds, *(f"{a} / {b}" for a, b in ratios)]) + " |")
    for loss in a.losses:
        cells = [f"{1 / median[loss, kind]:.1f}" for kind in kinds]
        cells += [f"{median[loss, a] / median[loss, b]:.2f}" for a, b in ratios]
        print(f"| {loss} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
