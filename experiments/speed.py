"""Batches per second of every objective, and how far a step is from the matrix products that it must do.

    python -m experiments.speed
    python -m experiments.speed --arch cnn

A step is everything that training does for one batch: indexing, dequantisation, pre-processing, objective,
gradient, optimiser, moving average. The floor of --arch fc is the number of products of a (batch × D) with a (D × D) matrix
in it, as torch's own counter of operations finds them, times the time of one such product in the same run. The
floor leaves out determinants and solves; `ml` and `sml` cannot do without. Nor is the time in it that the norm of the gradient,
the optimiser and the moving average take to read and write every weight, which is printed beside it. The steps are
interleaved, so that a slow moment of the machine hits all of them, and the medians are printed.
"""

import argparse
import statistics
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from data import MNIST, mnist
from train_mnist import DEFAULTS, LOSSES, build, minibatch, parse
from training import Graphed, MovingAverage, descend, fast_matmul, gradient_of, make_optimizer, trainable


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


def training_step(loss, images, batch_size, device, arch="fc"):
    """A function that does one whole step on random images of the training split, and one that does its passes over the weights."""
    samples = ["--model-samples", str(batch_size)] if loss == "sml" else []
    a = parse(["--arch", arch, "--loss", loss, "--batch-size", str(batch_size), "--normalize", "center", *samples])
    pre, flow, image_model = (part.to(device) for part in build(a, images[:2000]))
    train_set = images.view(len(images), *flow.shape).to(device)
    optimizer = make_optimizer(a, trainable(flow))
    average = MovingAverage(image_model, a.ema_decay)
    gradient = gradient_of(a, flow, optimizer)

    def step():
        index = torch.randint(len(train_set), (batch_size,), device=device)
        with fast_matmul(loss):
            descend(a, gradient(minibatch(a, pre, train_set[index])), optimizer)
        average.update()

    def passes():
        torch.nn.utils.get_total_norm([p.grad for p in average.parameters])
        optimizer.step()
        average.update()

    return step, passes


def count(loss, images, batch_size):
    """Products of a (batch × D) with a (D × D) matrix in a step of the fully-connected flow, on a CPU: what a GPU replays is not counted."""
    step, _ = training_step(loss, images, batch_size, torch.device("cpu"))
    with FlopCounter() as counter:
        step()
    return counter.flops / (2 * batch_size * images[0].numel() ** 2)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=list(DEFAULTS), default="fc")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args(argv)
    device = torch.device(a.device)
    images = mnist(MNIST)[0]
    D = images[0].numel()
    x, W = torch.randn(a.batch_size, D, device=device), torch.randn(D, D, device=device)
    steps = {loss: training_step(loss, images, a.batch_size, device, a.arch) for loss in LOSSES}
    passes = steps["dsm"][1]  # the same for all
    steps = {loss: step for loss, (step, _) in steps.items()}
    products = {loss: count(loss, images, a.batch_size) for loss in LOSSES} if a.arch == "fc" else {}
    ten = Graphed(lambda x: [x @ W for _ in range(10)])
    times = {name: [] for name in ("product", "passes", *steps)}
    for step in steps.values():
        step()  # the first one is slower
    with fast_matmul("dsm"):
        ten(x)
    for _ in range(a.repeats):
        with fast_matmul("dsm"):
            times["product"].append(timed(lambda: ten(x), device) / 10)
        for loss, step in steps.items():
            times[loss].append(timed(step, device))
        times["passes"].append(timed(passes, device))
    median = {name: statistics.median(t) for name, t in times.items()}
    if a.arch != "fc":
        print("objective  batches/s  step (ms)")
        for loss in steps:
            print(f"{loss:9}  {1 / median[loss]:9.1f}  {1e3 * median[loss]:9.2f}")
        return
    print(f"one product of {a.batch_size}×{D} with {D}×{D}: {1e3 * median['product']:.3f} ms, {torch.get_num_threads()} threads; "
          f"gradient norm, optimiser and moving average: {1e3 * median['passes']:.2f} ms")
    print("objective  batches/s  step (ms)  products  floor (ms)  step / floor")
    for loss in steps:
        floor = products[loss] * median["product"]
        print(f"{loss:9}  {1 / median[loss]:9.1f}  {1e3 * median[loss]:9.2f}  {products[loss]:8.1f}  {1e3 * floor:10.2f}"
              f"  {median[loss] / floor:12.2f}")


if __name__ == "__main__":
    main()
