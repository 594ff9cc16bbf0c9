"""The device, and several processes, each with a GPU or a share of the cores, that train as one.

    torchrun --nproc_per_node=2 train_mnist.py --loss dsm

All draw the same random numbers for the whole batch, each takes its share of the rows, and gradients are averaged. The
result is that of one process with the whole batch, up to rounding. Only the first process writes.
"""

import contextlib
import os
import sys

import torch
import torch.distributed as dist

from support.run import RunError


@contextlib.contextmanager
def joined(name, shared=None):
    """Joins the processes that torchrun started, if it did (NCCL on GPUs, Gloo on CPUs).   -> this process's device

    name    "auto" is a GPU if torch sees one
    shared  {flag: number of rows} that the processes share out; None: the script cannot
    """
    launched = dist.is_torchelastic_launched()
    processes, index = [int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_RANK")] if launched else (1, 0)
    gpus = torch.cuda.device_count()
    if processes > 1 and shared is None:
        raise RunError("this script does not share its batches between processes: start it without torchrun")
    for flag, rows in (shared or {}).items():
        if rows % processes:
            raise RunError(f"{processes} processes cannot share {flag} {rows} alike: take a multiple")
    if name == "cuda" and not gpus:
        raise RunError("torch sees no GPU: use --device cpu, or install a CUDA build of torch")
    device = torch.device("cpu" if name == "cpu" or not gpus else f"cuda:{index}")
    if device.type == "cuda" and index >= gpus:
        raise RunError(f"torch sees {gpus} GPUs, none for process {index + 1}: lower --nproc_per_node, or --device cpu")
    if processes == 1:
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null if dist.get_rank() > 0 else sys.stdout):
            yield device
    finally:
        dist.destroy_process_group()


def share(rows):
    """This process's share of the rows of a batch. The number of processes must divide B.   (B, …) -> (B / n, …)"""
    if not dist.is_initialized():
        return rows
    size = len(rows) // dist.get_world_size()
    return rows[dist.get_rank() * size:][:size]


def average(loss, parameters):
    """Means over the processes: of the gradients, in place, and of the loss.   () -> ()"""
    if not dist.is_initialized():
        return loss
    tensors = [loss.view(1), *(p.grad.flatten() for p in parameters)]
    flat = torch.cat(tensors) / dist.get_world_size()
    dist.all_reduce(flat)  # one message
    loss, *gradients = flat.split([len(t) for t in tensors])
    for p, gradient in zip(parameters, gradients):
        p.grad.copy_(gradient.view_as(p))
    return loss[0]
