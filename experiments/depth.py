"""Runs of `train_toy.py` with other settings than its own, side by side: what depth, steps and points are worth.

    python train_toy.py --data swirl --loss dsm --blocks 20 --epochs 80 --out runs/deep
    python -m experiments.depth runs/deep [another run ...]
    python -m experiments.depth --add runs/deeper [another run ...]

Trains nothing. Writes results/depth.json, and results/depth.png with a row for each density and a column for each
objective. Each picture is that of the first run named that still has its checkpoint. With --add the runs that are in
results/depth.json stay, and results/depth.png is not written.

Prints the table of docs/results.md, one value per seed: KL and Fisher divergence as the run measured them, and
`kl_of_shares`, the part of KL that is due to how the mass is shared out.
"""

import argparse
import json
import re
from pathlib import Path

import torch

from data import TOYS
from experiments import folder, intact, record
from experiments.toys import grid
from experiments.trained import load_toy
from losses import OBJECTIVES
from support import settings
from support.run import RunError, one_line_errors, read_metrics, save_picture


def flags(config):
    """The flags that turn the present defaults of a density and an objective into the settings of a run."""
    defaults = settings.parse(settings.Toy, ["--data", config["data"], "--loss", config["loss"]]).config()
    return " ".join(f"--{name.replace('_', '-')} {config[name]}" for name, value in defaults.items()
                    if config[name] != value and name != "seed")


def same_settings(run):
    """What runs have in common that differ only in their seed, whatever the order of their flags.   -> hashable"""
    return run["data"], run["loss"], frozenset(re.findall(r"--(\S+) (\S+)", run["flags"]))


@torch.no_grad()
def kl_of_shares(toy, flow, n=200_000, parts=20):
    """Σ_k p_k log(p_k / q_k) in nats: the KL divergence between the masses that truth (p) and flow (q) give to parts.

    The parts are the squares of the checkerboard, or stretches along a curve with the same number of nodes each. Each
    part has the points of the plane that are nearest to it. The masses are those of n draws. By the data-processing
    inequality the value is at most KL(p‖p_θ), up to the noise of the draws. It is inf where the flow leaves out a part.
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
    except (OSError, ValueError, LookupError, TypeError):
        raise RunError(f"{directory} is no finished run of train_toy.py") from None


def rows(runs):
    """The table of docs/results.md: runs with the same settings are one row, one value per seed."""
    groups = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        groups.setdefault(same_settings(run), []).append(run)
    lines = []
    for group in groups.values():
        cells = [", ".join(f"{run[figure]:.4f}" if figure in run else "–" for run in group)
                 for figure in ("kl", "kl_of_shares", "fisher")]
        lines.append(f"| {group[0]['data']} | {group[0]['loss']} | `{group[0]['flags']}` | " + " | ".join(cells) + " |")
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="directories of runs of train_toy.py")
    parser.add_argument("--results", type=folder, default="results")
    parser.add_argument("--add", action="store_true", help="keep the runs of results/depth.json")
    a = parser.parse_args(argv)
    with one_line_errors(OSError, ValueError):
        path = a.results / "depth.json"
        with intact(path):
            before = json.loads(path.read_text())["runs"] if a.add else []
            rows(before)
        runs = [read(directory) for directory in a.runs]
        cells = {}
        for run, directory in zip(runs, a.runs):
            if (directory / "checkpoint.pt").exists():
                flow = load_toy(directory)
                run["kl_of_shares"] = kl_of_shares(TOYS[run["data"]](), flow)
                cells.setdefault((run["data"], run["loss"]), (flow, {"test_kl": run["kl"]}))
        unique = {(same_settings(run), run["seed"]): run for run in before + runs}  # the last of equal ones
        runs = sorted(unique.values(), key=lambda run: ([*TOYS].index(run["data"]), [*OBJECTIVES].index(run["loss"])))
        record(path, {"command": "python -m experiments.depth", "runs": runs})
        if cells and not a.add:
            truths = {name: toy() for name, toy in TOYS.items() if any(name in cell for cell in cells)}
            objectives = [loss for loss in OBJECTIVES if any(loss in cell for cell in cells)]
            save_picture(a.results / "depth.png", grid(cells, truths, objectives))
        print("\n".join(rows(runs)))


if __name__ == "__main__":
    main()
