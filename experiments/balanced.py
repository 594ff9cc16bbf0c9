"""Mode weights of energies trained with a flow's jumps and without: four modes, weights 0.1 to 0.4, 2 to 64 dimensions.

    python -m experiments.balanced
    python -m experiments.balanced --dims 2 16 --seeds 0        some of the runs; the table keeps the others

Runs `python train_ebm.py --dim D --sampler S --seed N` under runs/, and continues runs that were stopped. All 45 runs
take about an hour on one core. Flags that --help does not list go to every run.

Writes results/balanced.json; results/ebm-weights.png, the total variation between the true and the learnt mode weights
against training steps; results/ebm-density.png, the densities in the plane. Prints the table of docs/results.md.
Source: Grenioux, Moulines, Gabrié (2023), the experiments on Gaussian mixtures.
"""

import argparse
import json
import math
import re
from pathlib import Path

import torch
from matplotlib.figure import Figure

import train_ebm
from data import mixture
from experiments import machine, record
from support import plots, settings
from support.run import read_checkpoint, read_metrics, save_picture

SAMPLERS = ["flow", "langevin", "short"]
KEPT = ("test_nll", "entropy", "test_kl", "test_kl_se", "weights", "chains", "tv", "log_z", "ess", "flow_log_z",
        "flow_log_z_se", "flow_ess", "acceptance", "flow_acceptance", "crossings", "autocorrelation_time", "followed",
        "seconds")


def run(dim, sampler, seed, runs, flags=()):
    """Trains one energy, unless it is there.   -> settings, rows of the metrics, the error that stopped it or None"""
    directory = runs / f"ebm-mixture-d{dim}-{sampler}-seed{seed}"
    argv = ["--dim", str(dim), "--sampler", sampler, "--seed", str(seed), "--out", str(directory), *flags]
    s, config = settings.parse(settings.Ebm, argv), directory / "config.json"

    try:
        if not config.exists():
            train_ebm.main(argv)
        elif json.loads(config.read_text()) != s.config() or "test_nll" not in read_metrics(directory)[-1]:
            train_ebm.main([*argv, "--resume"])  # an error for a run of other settings
    except SystemExit as stop:
        if not re.search("(at|after) epoch", str(stop.code)):
            raise
        print(stop.code)  # training broke down, which is a result
        return s, read_metrics(directory), stop.code
    return s, read_metrics(directory), None


def trained(s):
    """The model of a finished run, with its averaged parameters."""
    model = train_ebm.make_model(s, mixture(s.dim).sample(5000))
    model.load_state_dict(read_checkpoint(s.out / "checkpoint.pt")["state"]["averaged"])
    return model


def rows(table):
    """The table of docs/results.md: means over the seeds, and the largest total variation.

    p_θ lies elsewhere where the effective sample size of the draws around the true modes is below 1 %. There are no
    figures then.
    """
    for dim, sampler in sorted({(row["dim"], row["sampler"]) for row in table},
                               key=lambda cell: (cell[0], SAMPLERS.index(cell[1]))):
        every = [row for row in table if (row["dim"], row["sampler"]) == (dim, sampler)]
        seeds = [row for row in every if "stopped" not in row]
        broke = len(every) - len(seeds)
        name = sampler + (f" ({broke} of {len(every)} broke down)" if broke else "")
        if not seeds:
            yield f"| {dim} | {name} |" + " – |" * 8
            continue

        def mean(key, form):
            values = [row[key] for row in seeds if row.get(key) is not None]
            return form.format(sum(values) / len(values)) if values else "–"

        tau = mean("autocorrelation_time", "{:.0f}")
        if any(50 * (row["autocorrelation_time"] or math.inf) > row["followed"] for row in seeds):
            tau = "too long to see"
        flow = sampler == "flow"
        figures = f"**{mean('tv', '{:.4f}')}** | {max(row['tv'] for row in seeds):.4f} | {mean('test_kl', '{:.3f}')}"
        if min(row.get("ess", 1) for row in seeds) < 0.01:
            figures = "elsewhere | – | –"
        yield (f"| {dim} | {name} | {figures} | {mean('flow_acceptance', '{:.2f}') if flow else '–'} | "
               f"{mean('flow_ess', '{:.0%}') if flow else '–'} | {mean('crossings', '{:.1f}')} | {tau} | "
               f"{sum(row['seconds'] for row in seeds) / len(seeds) / 60:.1f} |")


def curves(table):
    """The total variation between true and learnt mode weights against training steps: a panel for each dimension."""
    dims = sorted({row["dim"] for row in table})
    figure = Figure(figsize=(1.2 + 2.4 * len(dims), 3.2), layout="constrained")
    panels = figure.subplots(1, len(dims), sharey=True, squeeze=False)[0]
    for axes, dim in zip(panels, dims):
        for i, sampler in enumerate(SAMPLERS):
            axes.plot([], [], color=f"C{i}", label=sampler)
            for row in table:
                if (row["dim"], row["sampler"]) == (dim, sampler):
                    axes.plot(*zip(*row["tv_by_step"]), color=f"C{i}", lw=1.2, alpha=0.8)
        axes.set(xlabel="training steps", title=f"{dim} dimensions", yscale="log", ylim=(5e-4, 1))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("total variation of mode weights")
    panels[0].legend(fontsize="small")
    return figure


@torch.no_grad()
def planes(models, table):
    """In the plane: the truth, the flow, and the model that each sampler led to.   models: {sampler: Model}"""
    data = mixture(2)
    x = data.sample(5000)
    top = data.log_prob(x).max().exp().item()
    flow = models["flow"].flow
    log_probs = {"truth": data.log_prob, "flow: the proposals q_α": flow.log_prob}
    for sampler, row in table.items():
        log_probs[f"{sampler}: p_θ, total variation {row['tv']:.3f}"] = (
            lambda x, energy=models[sampler].energy, log_z=row["log_z"]: -energy(x) - log_z)
    figure = Figure(figsize=(3.2 * len(log_probs), 3.5), layout="constrained")
    for axes, (title, log_prob) in zip(figure.subplots(1, len(log_probs)), log_probs.items()):
        plots.image(axes, lambda x: log_prob(x).exp(), x, vmin=0, vmax=top)
        axes.set_title(title, fontsize="medium")
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Other flags go to train_ebm.py.")
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 8, 16, 32, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    a, flags = parser.parse_known_args(argv)

    path = a.results / "balanced.json"
    done = json.loads(path.read_text())["runs"] if path.exists() else []
    table = {(row["dim"], row["sampler"], row["seed"]): row for row in done}
    a.results.mkdir(exist_ok=True)
    for seed in a.seeds:  # all dimensions of one seed first
        models = {}
        for dim in a.dims:
            for sampler in SAMPLERS:
                s, metrics, stopped = run(dim, sampler, seed, a.runs, flags)
                cell = {"dim": dim, "sampler": sampler, "seed": seed} | ({"stopped": stopped} if stopped else {})
                table[dim, sampler, seed] = (cell | {k: metrics[-1][k] for k in KEPT if k in metrics[-1]}
                                             | {"tv_by_step": [[row["step"], row["tv"]] for row in metrics]})
                if dim == 2 and not stopped:
                    models[sampler] = trained(s)
        if len(models) == len(SAMPLERS) and seed == min(a.seeds):
            picture = planes(models, {sampler: table[2, sampler, seed] for sampler in models})
            save_picture(a.results / "ebm-density.png", picture)
    table = [table[cell] for cell in sorted(table)]
    save_picture(a.results / "ebm-weights.png", curves(table))
    record(path, {"command": "python -m experiments.balanced", "flags": flags, "machine": machine(), "runs": table})
    print("\n".join(rows(table)))


if __name__ == "__main__":
    main()
