"""Several processes that train as one: torchrun --nproc_per_node=2 train_mnist.py --loss dsm

Each takes its rows of every batch and draws its own noise. Gradients are averaged. Only the first process writes.
"""

import contextlib
import os
import sys

import torch
import torch.distributed as dist

from support.run import RunError


@contextlib.contextmanager
def joined(name):
    """Joins the processes that torchrun started, if it did.   -> this one's device, its rank, the number of them"""
    launched, gpu = dist.is_torchelastic_launched(), name != "cpu" and torch.cuda.is_available()
    if name == "cuda" and not gpu:
        raise RunError("torch sees no GPU: use --device cpu, or install a CUDA build of torch")
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK'] if launched else 0}" if gpu else "cpu")
    if not launched:
        yield device, 0, 1
        return
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        with contextlib.redirect_stdout(None if dist.get_rank() else sys.stdout):
            yield device, dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def agreed(tensor):
    """The first process's tensor, in place of each other's."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor


def average(tensors):
    """Replaces each tensor by its mean over the processes, in place."""
    if dist.is_initialized():
        flat = torch.cat([t.flatten() for t in tensors]) / dist.get_world_size()
        dist.all_reduce(flat)  # one message
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
            tensor.copy_(mean.view_as(tensor))
