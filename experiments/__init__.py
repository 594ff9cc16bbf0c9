"""What experiments share: the machine in words, and a file of results that is written after every run and gone on from."""

import json
import platform

import torch

from run import RunError, whole


def machine():
    """What the figures of an experiment were measured on, in words."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()}, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}"


def recorded(path, **identity):
    """The results in the file, or none yet: a dict of the identity, the machine and "runs", by name.

    Raises RunError where the file is damaged, or of another identity or machine.
    """
    new = json.loads(json.dumps(identity)) | {"machine": machine(), "runs": {}}  # as the file has it: lists for tuples
    try:
        result = json.loads(path.read_text()) if path.exists() else new
        different = [f"{key} is {result[key]!r} there and {new[key]!r} here" for key in new if key != "runs" and result[key] != new[key]]
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path} is damaged, or no results of this experiment: move it away") from None
    if different:
        raise RunError(f"{path} is of another run: {', '.join(different)}; move it away, or name another --results")
    return result


def record(path, result):
    with whole(path) as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())
