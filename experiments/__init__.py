"""What the experiments share: kinds of flags, the machine in words, and files of results, written after every run."""

import argparse
import contextlib
import json
import os
import platform
import sys
from pathlib import Path

import torch

from support import settings
from support.run import RunError, write


def at_least(least, kind=int):
    """The type of a flag: a number from `least` to a billion."""
    def number(text):
        value = kind(text)
        if not least <= value <= 10**9:
            raise argparse.ArgumentTypeError(f"must lie between {least} and a billion, not {value}")
        return value
    number.__name__ = kind.__name__  # argparse names it where the text is no number
    return number


def folder(text):
    """The type of --results. The folder is made before the work, so that nothing is lost after it.   -> Path"""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write to {path}")
    return path


def passed_on(kind, own, flags):
    """The settings of a run by the experiment's own flags and those that the user passes on.   -> settings

    Exits with one line where the user changes one of the experiment's own.
    """
    s, alone = settings.parse(kind, [*own, *flags]), settings.parse(kind, own)
    for flag in own:
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        if flag.startswith("--") and vars(s)[name] != vars(alone)[name]:
            sys.exit(f"error: --{name.replace('_', '-')} is set by the experiment: leave it out")
    return s


def machine():
    """What the figures of an experiment were measured on, in words."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()}, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}"


def read_metrics(directory):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def recorded(path, **identity):
    """The results in the file: a dict of the identity, the machine, and "runs" by name, which is empty without a file.

    Raises RunError where the file is damaged, or where its identity or machine is another one.
    """
    new = json.loads(json.dumps(identity)) | {"machine": machine(), "runs": {}}  # lists for tuples, as in the file
    with intact(path):
        result = json.loads(path.read_text()) if path.exists() else new
        different = [f"{key} is {result[key]!r} there and {new[key]!r} here"
                     for key in new if key != "runs" and result[key] != new[key]]
        if not all(result["runs"].values()):
            raise ValueError
    if different:
        raise RunError(f"{path} is of another run: {', '.join(different)}; move it away, or name another --results")
    return result


@contextlib.contextmanager
def intact(path):
    """Around what reads a file of results. Raises RunError where it does not hold what it should."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError):
        raise RunError(f"{path} is damaged, or no results of this experiment: move it away") from None


def record(path, result):
    """Writes a dict to the file as JSON, whole or not at all."""
    write(path, (json.dumps(result, indent=1) + "\n").encode())


def described(report):
    """A report of sampling.py in words."""
    rates = {"acceptance": report.acceptance, "global acceptance": report.global_acceptance}
    return f"step size {report.step_size:.3g}" + "".join(
        f", {name} {rate.mean():.3f} ({rate.min():.3f} to {rate.max():.3f} by chain)"
        for name, rate in rates.items() if rate is not None)
