"""Why the objectives need different numbers of points: the noise of their gradients, at the same weights of the toys' flow.

    python -m experiments.gradient_variance --run runs/toys-0/swirl-dsm

dsm, sm, ssm and fdssm differ by a constant in their expectation over points (fdssm by O(ξ²) more), and so have one gradient,
but not one variance. At the weights that a run of `train_toy.py` has kept, each is estimated from many batches: the squared
norm of the mean gradient, and the sum of the variances of its elements, both from --batches batches.
Writes results/gradient-variance.json.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

import losses
from data import TOYS, Toy
from ebflow import toy_flow
from experiments import machine, record
from run import RunError, one_line_errors, read_checkpoint
from training import trainable

OBJECTIVES = {
    "dsm": lambda flow, toy, n, xi: losses.dsm(flow.energy, toy.sample(n, "cpu", 0.0), Toy.smoothing),
    "sm": lambda flow, toy, n, xi: losses.sm(flow.energy, toy.sample(n)),
    "ssm": lambda flow, toy, n, xi: losses.ssm(flow.energy, toy.sample(n)),
    "fdssm": lambda flow, toy, n, xi: losses.fdssm(flow.energy, toy.sample(n), xi),
}


def moments(loss, parameters, batches):
    """-> ‖E ∇loss‖² without the bias of the noise, and Σ Var ∇loss"""
    gradients = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(loss(), parameters, materialize_grads=True)])
                             for _ in range(batches)]).double()
    variance = gradients.var(0).sum()
    return (gradients.mean(0).square().sum() - variance / batches).item(), variance.item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="directory of a run of train_toy.py")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--xi", type=float, default=0.2)
    parser.add_argument("--results", type=Path, default=Path("results"))
    a = parser.parse_args(argv)
    if a.batch_size < 1 or a.batches < 2 or not a.xi > 0:
        parser.error("it takes two batches, one point and a positive --xi")
    with one_line_errors(OSError):
        checkpoint = read_checkpoint(a.run / "checkpoint.pt")
        config = checkpoint["config"]
        if config.get("data") not in TOYS or "blocks" not in config:
            raise RunError(f"{a.run} is no run of train_toy.py")
        flow = toy_flow(blocks=config["blocks"], width=config["width"])
        flow.load_state_dict(checkpoint["state"]["best"]["model"])
        toy, rows = TOYS[config["data"]](), {}
        torch.manual_seed(0)
        for name, loss in tqdm(OBJECTIVES.items(), dynamic_ncols=True):
            mean, variance = moments(lambda: loss(flow, toy, a.batch_size, a.xi), trainable(flow), a.batches)
            rows[name] = {"mean": mean, "variance": variance}
        a.results.mkdir(exist_ok=True)
        result = {"command": f"python -m experiments.gradient_variance --run {a.run}", "machine": machine(), "batch_size": a.batch_size,
                  "batches": a.batches, "xi": a.xi, "rows": rows}
        record(a.results / "gradient-variance.json", result)
        for name, row in rows.items():
            print(f"{name:6} mean² {row['mean']:8.1f}   variance {row['variance']:8.1f}   of dsm's {row['variance'] / rows['dsm']['variance']:.1f}")


if __name__ == "__main__":
    main()
