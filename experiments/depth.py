"""Runs of `train_toy.py` with other settings than its own, side by side: what depth, steps and points are worth.

    python train_toy.py --data swirl --loss dsm --blocks 20 --epochs 80
    python -m experiments.depth runs/toy-swirl-dsm [another run ...]
    python -m experiments.depth --add runs/toy-swirl-ssm [another run ...]

Writes results/depth.json, and results/depth.png with a row for each density and a column for each objective: of those runs that
still have their checkpoint the first, in the order that they are given. Prints the rows of the README, one figure for each seed: KL and
Fisher divergence as the run measured them, and how much of KL is in the shares of the mass alone (`kl_of_shares`). With --add the runs that
are in results/depth.json stay, and the picture as it is.
"""

import argparse
import json
from pathlib import Path

import torch

import train_toy
from experiments import record
from run import RunError, one_line_errors, read_metrics, save_picture


def flags(config):
    """The flags that make a run's settings out of the defaults of its density and objective, as they are now."""
    defaults = train_toy.DEFAULTS[config["loss"]] | train_toy.BY_TOY.get(config["data"], {})
    settings = [f"--{name.replace('_', '-')} {config[name]}" for name, value in defaults.items() if config[name] != value]
    return " ".join(settings + ["--double"] * config.get("double", False))


@torch.no_grad()
def kl_of_shares(toy, flow, n=200_000, parts=20):
    """Σ_k p_k log(p_k / q_k) in nats, where p_k is the mass of truth and q_k that of the flow in part k of the figure.

    The parts are the squares, or stretches along the curve (as many nodes of its rule in each), with all points of the plane that
    are nearest to them; their masses are those of n draws. By the data-processing inequality never more than KL(p‖p_θ), but
    for the noise of the draws. inf where the flow has no draw in a part that truth has.
    """
    center = toy.center.float()
    part = torch.arange(len(center)) * parts // len(center)  # of each square, or node of the curve
    torch.manual_seed(0)
    p, q = (part[torch.cdist(x.float(), center).argmin(1)].bincount(minlength=int(part[-1]) + 1).double() / n
            for x in (toy.sample(n), flow.sample(n)))
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum().item()


def read(directory):
    """Settings and last row of a finished run. Raises RunError."""
    try:
        config, last = json.loads((directory / "config.json").read_text()), read_metrics(directory)[-1]
        return {name: config[name] for name in ("data", "loss", "seed")} | {
            "flags": flags(config), "steps": last["step"], "minutes": last["seconds"] / 60,
            **{name: last[f"test_{name}"] for name in ("kl", "kl_se", "fisher", "fisher_se")}}
    except (OSError, ValueError, KeyError, IndexError):
        raise RunError(f"{directory} is no finished run of train_toy.py") from None


def rows(runs):
    """The README's table: runs of several seeds in one row."""
    groups = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        groups.setdefault((run["data"], run["loss"], run["flags"]), []).append(run)
    return [f"| {data} | {loss} | `{options}` | " + " | ".join(
        ", ".join(f"{run[figure]:.4f}" if figure in run else "–" for run in group) for figure in ("kl", "kl_of_shares", "fisher")) + " |"
        for (data, loss, options), group in groups.items()]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="directories of runs of train_toy.py")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--add", action="store_true", help="to the runs of results/depth.json")
    a = parser.parse_args(argv)
    with one_line_errors(OSError, ValueError):
        before = json.loads((a.results / "depth.json").read_text())["runs"] if a.add else []
        runs = [read(directory) for directory in a.runs]
        cells = {}
        for run, directory in zip(runs, a.runs):
            if (directory / "checkpoint.pt").exists():
                flow = train_toy.load(directory)
                run["kl_of_shares"] = kl_of_shares(train_toy.TOYS[run["data"]](), flow)
                cells.setdefault((run["data"], run["loss"]), (flow, {"test_kl": run["kl"]}))
        a.results.mkdir(exist_ok=True)
        by_settings = {tuple(run[name] for name in ("data", "loss", "flags", "seed")): run for run in before + runs}  # the last of equal ones
        runs = sorted(by_settings.values(), key=lambda run: (list(train_toy.TOYS).index(run["data"]), list(train_toy.DEFAULTS).index(run["loss"])))
        record(a.results / "depth.json", {"command": "python -m experiments.depth", "runs": runs})
        if cells and not a.add:
            toys, objectives = ([name for name in names if any(name in key for key in cells)] for names in (train_toy.TOYS, train_toy.DEFAULTS))
            save_picture(a.results / "depth.png", train_toy.grid(cells, toys, objectives))
        print("\n".join(rows(runs)))


if __name__ == "__main__":
    main()
