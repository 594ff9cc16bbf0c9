"""Several processes, each with a GPU or a share of the cores, that train as one.

    torchrun --nproc_per_node=2 train_mnist.py --loss dsm

All draw the same random numbers for the joint batch, and each takes its share of the batch; gradients are averaged. So
the result is, up to rounding, that of one process with the joint batch, whatever their number. Only the first one writes.
"""

import contextlib
import os

import torch
import torch.distributed as dist


def launched():
    """How many processes torchrun started; 1 without it. They need not have joined."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def joined(device):
    """Joins the processes that torchrun started, if it did: by NCCL on GPUs, by Gloo on CPUs."""
    if launched() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def count():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def share(n):
    """This process's part of n samples, which its number must divide.   -> slice"""
    size = n // count()
    return slice(rank() * size, (rank() + 1) * size)


def average(loss, gradient):
    """Means over the processes: of the gradient (n,), in place, and of the loss.   () -> ()"""
    if count() == 1:
        return loss
    flat = torch.cat([loss.view(1), gradient]) / count()
    dist.all_reduce(flat)  # one message
    gradient.copy_(flat[1:])
    return flat[0]
