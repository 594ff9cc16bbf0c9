"""Is the paper reproduced? Runs with the published settings beside the paper's results and ours.

    python train_mnist.py --paper --arch fc --loss dsm --epochs 546
    python -m experiments.paper runs/mnist-fc-dsm [another run ...]

Trains nothing. Runs may be shorter than published: the schedule does not depend on their number of epochs. Writes
results/paper.json and prints the table of docs/results.md, test NLL in nats. Our tuned runs are those of
results/mnist-ARCH.json. Runs in results/paper.json stay unless they are named again.
"""

import argparse
import json
from pathlib import Path

from experiments import folder, intact, machine, record
from support.run import RunError, one_line_errors, read_metrics
from support.settings import PAPER

PUBLISHED = {"fc": dict(ml=1092.4, sml=1092.3, ssm=1092.8, dsm=1099.2, fdssm=1104.1),
             "cnn": dict(ml=1101.3, sml=1098.3, ssm=1107.5, dsm=1109.5, fdssm=1122.1)}


def read(directory, name):
    """Epochs, NLLs and curve of a finished run with --paper, measured on the machine of this name. Raises RunError."""
    try:
        config, metrics = json.loads((directory / "config.json").read_text()), read_metrics(directory)
        last, command = metrics[-1], f"python train_mnist.py --paper --arch {config['arch']} --loss {config['loss']}"
        if not config["paper"]:
            raise KeyError
        return f"{config['arch']} {config['loss']}", {
            "command": f"{command} --epochs {last['epoch']} --seed {config['seed']}", "machine": name,
            "epochs": last["epoch"], "minutes": last["seconds"] / 60, "best_epoch": last["best_epoch"],
            "test_nll": last["test_nll"], "val_nll": [round(row["val_nll"], 1) for row in metrics]}
    except (OSError, ValueError, LookupError, TypeError):
        raise RunError(f"{directory} is no finished run of train_mnist.py --paper") from None


def rows(runs, tuned):
    """The table of docs/results.md."""
    lines = []
    for cell, run in runs.items():
        arch, loss = cell.split()
        published = PUBLISHED.get(arch, {}).get(loss)
        lines.append(f"| {arch} | {loss} | {published or '–'} | {PAPER[cell]['epochs']:,} | {run['test_nll']:.1f} | "
                     f"{run['epochs']:,} | {tuned[arch][loss]['test_nll']:.1f} |")
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="*", help="directories of runs of train_mnist.py --paper")
    parser.add_argument("--machine", default=machine(), help="what the runs were made on, in words")
    parser.add_argument("--results", type=folder, default="results")
    a = parser.parse_args(argv)
    with one_line_errors(OSError, ValueError):
        path = a.results / "paper.json"
        with intact(path):
            before = json.loads(path.read_text())["runs"] if path.exists() else {}
            [(run["test_nll"], run["epochs"]) for run in before.values()]
        runs = before | dict(read(directory, a.machine) for directory in a.runs)
        runs = {cell: runs[cell] for cell in PAPER if cell in runs}
        record(path, {"command": "python -m experiments.paper", "runs": runs})
        for arch in dict.fromkeys(cell.split()[0] for cell in runs):
            with intact(path := a.results / f"mnist-{arch}.json"):
                own = {cell: run for cell, run in runs.items() if cell.split()[0] == arch}
                print("\n".join(rows(own, {arch: json.loads(path.read_text())})))


if __name__ == "__main__":
    main()
