"""What the experiments share: the machine in words, and a file of results that is written after every run."""

import json
import platform

import torch

from support.run import RunError, write


def machine():
    """What the figures of an experiment were measured on, in words."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()}, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}"


def recorded(path, **identity):
    """The results in the file: a dict of the identity, the machine, and "runs" by name, which is empty without a file.

    Raises RunError where the file is damaged, or where its identity or machine is another one.
    """
    new = json.loads(json.dumps(identity)) | {"machine": machine(), "runs": {}}  # lists for tuples, as in the file
    try:
        result = json.loads(path.read_text()) if path.exists() else new
        different = [f"{key} is {result[key]!r} there and {new[key]!r} here"
                     for key in new if key != "runs" and result[key] != new[key]]
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path} is damaged, or no results of this experiment: move it away") from None
    if different:
        raise RunError(f"{path} is of another run: {', '.join(different)}; move it away, or name another --results")
    return result


def record(path, result):
    """Writes a dict to the file as JSON, whole or not at all."""
    write(path, (json.dumps(result, indent=1) + "\n").encode())


def described(report):
    """A report of sampling.py in words."""
    rates = {"acceptance": report.acceptance, "global acceptance": report.global_acceptance}
    return f"step size {report.step_size:.3g}" + "".join(
        f", {name} {rate.mean():.3f} ({rate.min():.3f} to {rate.max():.3f} by chain)"
        for name, rate in rates.items() if rate is not None)
