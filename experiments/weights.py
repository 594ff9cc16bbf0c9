"""The weights that the repository ships, so that a trained flow can be used without training one.

    python -m experiments.weights

results/weights/NAME/checkpoint.pt holds the settings and the best weights of a run, without the state of its optimiser,
and the whitening matrix as float16. results/weights.json says how each was made, and what it is worth as it is shipped.

Time: ten minutes on one core.
"""

import io
import subprocess

import torch

import train_mnist
import train_toy
from data import MNIST, load_images
from densities import TOYS
from experiments import command_line, machine, record, trained
from support.run import one_line_errors, read_checkpoint, write

RUNS = {"mnist-cnn-dsm": (train_mnist, "--arch cnn --loss dsm --seed 0"),
        "toy-swirl-dsm": (train_toy, "--data swirl --loss dsm --seed 0")}


def shipped(saved):
    """Of a checkpoint, what `load` needs."""
    best = saved["state"]["best"]
    weights = {name: w.half() if w.numel() > 100_000 else w for name, w in best["model"].items()}  # the whitening
    return {"config": saved["config"], "state": {"best": best | {"model": weights}}, "metrics": saved["metrics"][-1:]}


def worth(script, directory):
    """Test figures by the weights in this directory; of MNIST, those of the first 1,000 images, too.   -> dict"""
    if script is train_toy:
        points = train_toy.truth(TOYS["swirl"](), 20_000, -2, "cpu")  # those of a run
        return train_toy.divergences("test", train_toy.load(directory), *points)
    flow, images = train_mnist.load(directory).flow, load_images(MNIST)[2]
    return train_mnist.evaluate("test", flow, images) | train_mnist.evaluate("first_1000", flow, images[:1000])


def main(argv=None):
    a, flags = command_line(__doc__, "--runs", "--results", passes="both scripts").parse_known_args(argv)
    found = {}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    with one_line_errors():
        for name, (script, own) in RUNS.items():
            trained(script, own.split(), a.runs / name, flags)
            directory, buffer = a.results / "weights" / name, io.BytesIO()
            directory.mkdir(parents=True, exist_ok=True)
            torch.save(shipped(read_checkpoint(a.runs / name / "checkpoint.pt")), buffer)
            write(directory / "checkpoint.pt", buffer.getvalue())
            found[name] = worth(script, directory) | {
                "command": " ".join([f"python {script.__name__}.py", own, *flags]), "commit": commit}
        record(a.results / "weights.json", {"machine": machine(), "runs": found})


if __name__ == "__main__":
    main()
