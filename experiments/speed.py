"""Batches per second of a training step: plain, ours, ours compiled; and the time of its matrix products alone.

    python -m experiments.speed
    python -m experiments.speed --arch cnn
    python -m experiments.speed --profile      what the time of a step here goes to

A step is all that training does for one batch: data, pre-processing, objective, gradient, optimiser, moving average.

    plain      layers.py and losses.py in float32 with F.conv2d, loss.backward(), Adam and AveragedModel as torch gives
               them. It adds no noise for ssm and fdssm, does not clip, and leaves the last actnorm alone
    here       the step of train_mnist.py or train_toy.py
    compiled   the same with --compile; on a CPU alone
    floor      the matrix products and convolutions of the step here, one after another and nothing between them

Kinds take turns, so slow moments of the machine hit all of them. Prints a table of medians over blocks of ten steps.

Time: three minutes on two cores with fc, eight with toy, ten with cnn, most of it to compile.
"""

import copy
import math
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
from data import MNIST, DataError, dequantize, load_images
from densities import TOYS
from ebflow import EBFlow, toy_flow
from experiments import command_line
from layers import Convolution
from losses import OBJECTIVES
from support import processes, settings
from support.fast import Graphed, fast_products
from support.optimization import trainable
from support.run import one_line_errors

KINDS = ["plain", "here", "compiled"]
PARTS = {  # by the beginning of an operation's name
    "products": ("mm", "addmm", "bmm", "mkldnn_", "convolution_"), "copies": ("copy_", "cat", "fill_", "clone"),
    "factorisations": ("linalg_lu", "linalg_solve", "_linalg_"), "the rest": ("",)}


def step_of_images(arch, loss, images, batch_size, kind, device):
    """A step on random batches of the images, which are centred for all objectives.   -> () -> None"""
    s = settings.parse(train_mnist.Settings, [
        "--arch", arch, "--loss", loss, "--normalize", "center", "--lr", "1e-8",  # the parameters stay what they are
        *["--model-samples", str(batch_size)] * (loss == "sml"), *["--compile"] * (kind == "compiled")])
    pre, flow = train_mnist.build(s, images[:2000])
    model, images, n = EBFlow([*pre.layers, *flow.layers], pre.shape).to(device), images.to(device), count()
    batch = lambda: images[torch.randint(len(images), (batch_size,), device=device)]
    if kind == "plain":
        for layer in model.modules():
            if isinstance(layer, Convolution):
                layer.forward = partial(F.conv2d, weight=layer.weight, bias=layer.bias, padding="same")
        return plain(s, flow, lambda: pre(dequantize(batch()).view(-1, *model.shape)))
    step, _ = train_mnist.make_step(s, pre, flow, model, copy.deepcopy(model))
    return lambda: step(batch(), next(n))


def step_of_toys(loss, batch_size, kind, device):
    """A step on fresh points of the swirl, at the noise of the start.   -> () -> None"""
    s = settings.parse(train_toy.Settings, ["--data", "swirl", "--loss", loss, "--lr", "1e-8",
                                            *["--compile"] * (kind == "compiled")])
    toy, flow, n = TOYS["swirl"](), toy_flow(blocks=s.blocks, width=s.width).to(device), count()
    batch, sigma = partial(toy.sample, batch_size, device), torch.tensor(s.start_smoothing, device=device).double()
    if kind == "plain":
        return plain(s, flow, batch, sigma=sigma, pooled=True)
    step, _ = train_toy.make_step(s, flow, copy.deepcopy(flow))
    return lambda: step(batch(), sigma, next(n))


def plain(s, flow, batch, **more):
    """A step as torch's tutorials write it.   -> () -> None"""
    optimizer = torch.optim.Adam(trainable(flow), lr=s.lr)
    average = AveragedModel(flow, avg_fn=get_ema_avg_fn(0.999))
    config = s.config() | more

    def step():
        optimizer.zero_grad()
        OBJECTIVES[s.loss](flow, batch(), **config).backward()
        get_total_norm([p.grad for p in trainable(flow)])
        optimizer.step()
        average.update_parameters(flow)

    return step


class Operations(TorchDispatchMode):
    """Records what has a formula for its number of operations. (torch's FlopCounterMode fails on the ∇_x in a loss.)"""

    def __init__(self, formulas=flop_registry):
        super().__init__()
        self.formulas, self.calls, self.total = formulas, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in self.formulas:
            self.calls.append((function, args, kwargs or {}))
            self.total += self.formulas[function.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def floor(make, device, loss=None):
    """Repeats the matrix products of one step, with a loss in the precision of train_mnist.py.   -> () -> None"""
    step = make("here", torch.device("cpu"))  # on a GPU, a CUDA graph would hide them
    step()  # the first of ten moves the actnorm, too
    with Operations() as products:
        step()
    calls = tree_map_only(torch.Tensor, lambda t: t.detach().to(device), products.calls)

    @torch.no_grad()
    def repeat(_):
        for function, args, kwargs in calls:
            function(*args, **kwargs)

    replay = partial(Graphed(repeat, []), torch.zeros((), device=device))
    return replay if loss is None else fast_products(loss)(replay)


def timed(function, device):
    """Seconds of a call. The device has nothing else to do at its start."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(functions, repeats, device, calls=10, seconds=math.inf):
    """Seconds of a call: the median over blocks of so many, of which at least three.   {name: ()} -> {name: float}"""
    times = {name: [timed(function, device)] for name, function in functions.items()}  # the first call is slower
    start = time.perf_counter()
    for block in range(repeats):
        if block < 3 or time.perf_counter() - start < seconds:
            for name, function in functions.items():
                times[name].append(timed(lambda: [function() for _ in range(calls)], device) / calls)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


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


def main(argv=None):
    parser = command_line(__doc__, "--device")
    parser.add_argument("--arch", choices=["fc", "cnn", "glow", "toy"], default="fc")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--shape", type=int, nargs=3, help="C H W of random images, in place of MNIST")
    parser.add_argument("--batch-size", type=int, help="by default 100, for the toys 512")
    parser.add_argument("--profile", action="store_true", help="time the parts of the step here, on a CPU")
    parser.add_argument("--repeats", type=int, default=12, help="blocks of ten steps of each kind")
    a = parser.parse_args(argv)
    with one_line_errors(DataError), processes.joined(a.device) as (device, *_):
        batch_size = a.batch_size or (512 if a.arch == "toy" else 100)
        if a.arch == "toy":
            makers = {loss: partial(step_of_toys, loss, batch_size) for loss in OBJECTIVES}
        else:
            images = torch.randint(0, 256, (2000, *a.shape), dtype=torch.uint8) if a.shape else load_images(MNIST)[0]
            makers = {loss: partial(step_of_images, a.arch, loss, images, batch_size) for loss in OBJECTIVES}
        print(f"{torch.get_num_threads()} threads, batch size {batch_size}")
        if a.profile:
            print("| flow | objective | step | " + " | ".join(PARTS) + " |")
            for loss, make in makers.items():
                ms = profiled(make("here", torch.device("cpu")))
                print(f"| {a.arch} | {loss} |", " | ".join(f"{t:.1f}" for t in (sum(ms.values()), *ms.values())), "|")
        else:
            kinds = [kind for kind in a.kinds if kind != "compiled" or device.type == "cpu"]
            functions = {(loss, kind): make(kind, device) for loss, make in makers.items() for kind in kinds}
            for loss, make in makers.items():
                functions[loss, "floor"] = floor(make, device, None if a.arch == "toy" else loss)
            print(*rows(interleaved(functions, a.repeats, device), kinds), sep="\n")


def rows(seconds, kinds):
    """Batches per second, and ratios of times.   {(objective, kind): seconds} -> lines of a table"""
    ratios = [(a, b) for a, b in (("plain", "here"), ("plain", "compiled"), ("here", "floor"), ("compiled", "floor"))
              if {a, b} <= {*kinds, "floor"}]
    yield "| objective | " + " | ".join([*kinds, *(f"{a} / {b}" for a, b in ratios)]) + " |"
    for loss in OBJECTIVES:
        cells = [f"{1 / seconds[loss, kind]:.1f}" for kind in kinds]
        cells += [f"{seconds[loss, a] / seconds[loss, b]:.2f}" for a, b in ratios]
        yield f"| {loss} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
