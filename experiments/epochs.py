"""How long an epoch takes and how much memory, by architecture and objective, at the sizes of MNIST and CIFAR-10.

    python -m experiments.epochs

Each cell is a process of its own with one thread. It takes steps of its recipe on random images, and tells the time of
a step, by the clock of its processor, and the most memory that it held, without a data set. An epoch has 50,000 images
of 28 × 28 or 40,000 of 3 × 32 × 32. One more cell is FC by dsm on 3 × 64 × 64, batch 10, as for the paper's Figure 5.

Time: ten minutes on one core.
"""

import copy
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch

import train_mnist
from ebflow import EBFlow
from experiments import command_line, completed
from losses import OBJECTIVES
from support import settings
from support.run import one_line_errors

SHAPES = {"MNIST": (50_000, (1, 28, 28)), "CIFAR-10": (40_000, (3, 32, 32))}
LARGE = "3×64×64", "fc", "dsm", "--normalize", "center", "--batch-size", "10"
STEPS = 4  # of a cell, of which the first does not count


def measured(data, arch, loss, *flags):
    """-> dict: seconds of a step, minutes of an epoch, GB, and the batch"""
    torch.set_num_threads(1)
    n, image = SHAPES.get(data, (0, (3, 64, 64)))
    s = settings.parse(train_mnist.Settings, ["--arch", arch, "--loss", loss, *flags])
    images = torch.randint(256, (1000 if n else 20, *image), dtype=torch.uint8)
    pre, flow = train_mnist.build(s, images)
    model = EBFlow([*pre.layers, *flow.layers], pre.shape)
    step, _ = train_mnist.make_step(s, pre, flow, model, copy.deepcopy(model))
    for at in range(STEPS):
        step(images[:s.batch_size], at + 1)  # step 0 sets the last actnorm, too
        start = time.process_time() if at == 0 else start
    seconds = (time.process_time() - start) / (STEPS - 1)
    return {"seconds": seconds, "minutes": seconds * (n // s.batch_size) / 60, "batch_size": s.batch_size,
            "GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}  # from kB on Linux


def cell(*cell):
    """What is `measured` in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measured, *cell).result()


def rows(runs):
    """The table of docs/results.md: minutes of an epoch and GB, a row for data and architecture."""
    for data in SHAPES:
        for arch in ("fc", "cnn", "glow"):
            cells = [runs[f"{data} {arch} {loss}"] for loss in OBJECTIVES]
            yield f"| {data} | {arch} | " + " | ".join(f"{c['minutes']:.1f}, {c['GB']:.1f}" for c in cells) + " |"


def main(argv=None):
    a = command_line(__doc__, "--results").parse_args(argv)
    with one_line_errors():
        jobs = {f"{data} {arch} {loss}": partial(cell, data, arch, loss)
                for data in SHAPES for arch in ("fc", "cnn", "glow") for loss in OBJECTIVES}
        jobs[" ".join(LARGE[:3])] = partial(cell, *LARGE)
        print(*rows(completed(a.results / "epochs.json", jobs)), sep="\n")


if __name__ == "__main__":
    main()
