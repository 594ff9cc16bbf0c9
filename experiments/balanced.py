"""Mode weights of energies trained with a flow's jumps and without: four modes, weights 0.1 to 0.4, 2 to 64 dimensions.

    python -m experiments.balanced
    python -m experiments.balanced --dims 2 16 --seeds 0        a part of it; the table keeps the rest

Trains what is missing under runs/, each as `python train_ebm.py --dim D --sampler S --seed N` does; a run that was
stopped goes on. Writes results/balanced.json, results/ebm-weights.png (the total variation between the true and the
learnt mode weights, by training step), results/ebm-density.png, and prints the rows of the README.
Source: Grenioux, Moulines, Gabrié (2023), the experiments on Gaussian mixtures.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure

import train_ebm
from data import mixture
from experiments import machine, record
from flags import configuration
from run import image, read_checkpoint, read_metrics, save_picture

SAMPLERS = list(train_ebm.DEFAULTS)
KEPT = ("test_nll", "entropy", "test_kl", "test_kl_se", "weights", "chains", "tv", "log_z", "ess", "flow_log_z",
        "flow_log_z_se", "flow_ess", "acceptance", "flow_acceptance", "crossings", "autocorrelation_time", "followed",
        "seconds")


def run(dim, sampler, seed, runs, flags=()):
    """Trains one energy, unless it is there.   -> its arguments, the rows of its metrics, and the error that stopped it"""
    directory = runs / f"ebm-mixture-d{dim}-{sampler}-seed{seed}"
    argv = ["--dim", str(dim), "--sampler", sampler, "--seed", str(seed), "--out", str(directory), *flags]
    args, config = train_ebm.parse(argv), directory / "config.json"

    try:
        if not config.exists():
            train_ebm.main(argv)
        elif json.loads(config.read_text()) != configuration(args) or "test_nll" not in read_metrics(directory)[-1]:
            train_ebm.main([*argv, "--resume"])  # it refuses a run of other settings
    except SystemExit as stop:
        if "at epoch" not in str(stop.code):
            raise
        print(stop.code)  # training broke down, which is a result
        return args, read_metrics(directory), stop.code
    return args, read_metrics(directory), None


def trained(args):
    """The model of a run that is over."""
    model = train_ebm.make_model(args, mixture(args.dim).sample(5000))
    state = read_checkpoint(args.out / "checkpoint.pt")["state"]
    model.load_state_dict(state["average"]["model"] if args.ema else state["model"])
    return model


def rows(table):
    """The rows of the README: the mean over the seeds, for the total variation also the largest of them.

    Where fewer than 1 % of the draws around the true modes carry the weight, p_θ lies elsewhere: no figures then.
    """
    for dim, sampler in sorted({(row["dim"], row["sampler"]) for row in table},
                               key=lambda cell: (cell[0], SAMPLERS.index(cell[1]))):
        every = [row for row in table if (row["dim"], row["sampler"]) == (dim, sampler)]
        seeds = [row for row in every if "stopped" not in row]
        name = sampler if len(seeds) == len(every) else f"{sampler} ({len(every) - len(seeds)} of {len(every)} broke down)"
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
def densities(models, table):
    """In the plane: the truth, what each sampler led to, and the flow.   models: sampler -> Model"""
    data = mixture(2)
    x = data.sample(5000)
    top = data.log_prob(x).max().exp().item()
    flow = models["flow"].flow
    titles = {"truth": data.log_prob, "flow: the proposals q_α": flow.log_prob}
    for sampler, row in table.items():
        titles[f"{sampler}: p_θ, total variation {row['tv']:.3f}"] = (
            lambda x, energy=models[sampler].energy, log_z=row["log_z"]: -energy(x) - log_z)
    figure = Figure(figsize=(3.2 * len(titles), 3.5), layout="constrained")
    for axes, (title, log_prob) in zip(figure.subplots(1, len(titles)), titles.items()):
        image(axes, lambda x: log_prob(x).exp(), x, vmin=0, vmax=top)
        axes.set_title(title, fontsize="medium")
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Other flags go to every run.")
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
                args, metrics, stopped = run(dim, sampler, seed, a.runs, flags)
                cell = {"dim": dim, "sampler": sampler, "seed": seed} | ({"stopped": stopped} if stopped else {})
                table[dim, sampler, seed] = (cell | {k: metrics[-1][k] for k in KEPT if k in metrics[-1]}
                                             | {"tv_by_step": [[row["step"], row["tv"]] for row in metrics]})
                if dim == 2 and not stopped:
                    models[sampler] = trained(args)
        if len(models) == len(SAMPLERS) and seed == min(a.seeds):
            save_picture(a.results / "ebm-density.png", densities(models, {s: table[2, s, seed] for s in models}))
    table = [table[cell] for cell in sorted(table)]
    save_picture(a.results / "ebm-weights.png", curves(table))
    record(path, {"command": "python -m experiments.balanced", "flags": flags, "machine": machine(), "runs": table})
    print("\n".join(rows(table)))


if __name__ == "__main__":
    main()
