"""The command line of the training scripts: a flag for every setting in their tables, checked before anything runs."""

import argparse
import copy
import math
import os

import torch

import processes
from run import RunError

# The settings that every script has: its own table starts from these, and a flag of the same name changes them.
OPTIMIZATION = dict(
    optimizer="adam",
    weight_decay=0.0,    # of Adam
    schedule="cosine",   # rises over the first `warmup` of the run, and from `hold` on falls to 0; or the published "steps",
    warmup=0.05,
    hold=0.0,
    decay=0.95,          # × this after each of the first 49 epochs
    clip=0.0,            # largest norm of the gradient; 0: any
    ema_decay=0.999,     # θ̃ ← mθ̃ + (1-m)θ after each step
)

CHOICES = {"optimizer": ["adam", "rmsprop"], "schedule": ["cosine", "steps"], "normalize": ["none", "black", "center", "scale", "whiten"],
           "actnorm": ["none", "trained", "moments"], "targets": ["own", "pooled"]}


def pick_device(name, joint=False, compiling=False):
    """"auto" is a GPU if torch sees one; under torchrun, which takes a script that is `joint`, this process's own.

    Raises RunError where the GPU that was asked for is not there, or where one would be asked to compile.
    """
    if processes.launched() > 1 and not joint:
        raise RunError("this script does not share its batches between processes: start it without torchrun")
    gpus, index = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if name == "cuda" and not gpus:
        raise RunError("torch sees no GPU: use --device cpu, or install a CUDA build of torch")
    if name == "cpu" or not gpus:
        return torch.device("cpu")
    if index >= gpus:
        raise RunError(f"there is no GPU for process {index + 1}, torch sees {gpus}: lower --nproc_per_node, or use --device cpu")
    if compiling:
        raise RunError("--compile is for a CPU: leave it out, a GPU replays the gradient as a graph, or use --device cpu")
    return torch.device("cuda", index)


def add_run_flags(parser):
    """The flags of every training script."""
    on_off = argparse.BooleanOptionalAction
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ema", action=on_off, default=True, help="evaluate the moving average of the weights")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    existing.add_argument("--overwrite", action="store_true", help="replace the run in --out")


def add_compile_flag(parser):
    """Of the scripts whose steps are those of `training.py: gradient_of`."""
    parser.add_argument("--compile", action="store_true", help="on a CPU: compile the gradient (torch.compile); worth it in long runs")


def configuration(args):
    """What decides the result: the settings, but not the folder, the device, or whether the gradient is compiled."""
    return {k: v for k, v in vars(args).items() if k not in ("out", "device", "compile", "resume", "overwrite")}


def add_settings(parser, tables):
    """A flag for every setting that stands in one of the tables, without a default."""
    group = parser.add_argument_group("settings, by default those at the top of the script")
    for name, value in {name: value for table in tables for name, value in table.items()}.items():
        group.add_argument("--" + name.replace("_", "-"), type=type(value), choices=CHOICES.get(name))


def with_settings(parser, args, tables, defaults, strict=True):
    """The arguments with `defaults` where no flag was given.

    A flag that is not in them is an error of the parser; without `strict` it is for another objective, and dropped.
    """
    args = copy.copy(args)
    for name in {name for table in tables for name in table}:
        if name not in defaults:
            if strict and getattr(args, name) is not None:
                parser.error(f"--{name.replace('_', '-')} is not a setting of " + " ".join(
                    getattr(args, kind) for kind in ("arch", "sampler", "loss") if hasattr(args, kind)))
            delattr(args, name)
        elif getattr(args, name) is None:
            setattr(args, name, defaults[name])
    check_range(parser, args)
    return args


def check_range(parser, args):
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"{flag} must be a finite number, not {value}")
        if name in ("epochs", "steps", "batch_size", "lr", "s", "sigma", "xi", "model_samples", "blocks",
                    "width", "depth", "anneal", "test_points", "chains", "local_steps", "step_size", "flow_lr", "energy_width",
                    "mixing_rounds") and not value > 0:
            parser.error(f"{flag} must be positive, not {value}")
        if name in ("warmup", "hold", "ema_decay", "target") and not 0 <= value < 1:
            parser.error(f"{flag} must lie in [0, 1), not {value}")
        if name == "floor" and not (value == 0 or 1e-3 <= value < 1):
            parser.error(f"{flag} must be 0 or lie in [0.001, 1), not {value}")
        if name in ("clip", "seed", "start_steps", "weight_decay", "noise") and not 0 <= value < 2**32:
            parser.error(f"{flag} must lie in [0, 2³²), not {value}")
