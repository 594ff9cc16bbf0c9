"""Mode weights of energies trained with each sampler: four Gaussians, weights 0.1 to 0.4, in 2 to 64 dimensions.

    python -m experiments.balanced
    python -m experiments.balanced --dims 2 16 --seeds 0 --cells flow tempering    some runs; the table keeps the others

Runs `python train_ebm.py` with the flags of CELLS under runs/, and continues runs that were stopped. "flow alone" is
the same flow by maximum likelihood on the data, with as many updates. Flags that --help does not list go to every run.

Writes results/balanced.json; results/ebm-weights.png, the total variation between the true and the learnt mode weights
against training steps; results/ebm-density.png, the densities in the plane. Prints the table of docs/results.md.
Source: Grenioux, Moulines, Gabrié (2023), the experiments on Gaussian mixtures.
"""

import argparse
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from matplotlib.figure import Figure

import train_ebm
from data import mixture
from experiments import at_least, folder, intact, machine, passed_on, record
from sampling import SamplingError
from support import plots, settings
from support.judge import Truth, total_variation
from support.run import RunError, one_line_errors, read_checkpoint, read_config, read_metrics, save_picture

CELLS = {
    "flow": "",
    "flow, which is the base as well": "--base flow",
    "flow alone": None,  # no energy
    "tempering": "--sampler tempering",
    "langevin": "--sampler langevin",
    "langevin, started like the data": "--sampler langevin --start data",
    "short": "--sampler short",
    "short, 100 unadjusted steps": "--sampler short --local-steps 100 --no-adjusted",
}
KEPT = ("test_nll", "entropy", "test_kl", "test_kl_se", "weights", "tv", "tv_se", "draws", "draws_tv", "log_z",
        "log_z_se", "ess", "flow_log_z", "flow_log_z_se", "flow_ess", "acceptance", "global_acceptance", "crossings",
        "autocorrelation_time", "followed", "seconds")


def train(s, argv):
    """Trains one energy, unless it is there.   -> rows of the metrics, the error that stopped it or None"""
    config, metrics = s.out / "config.json", s.out / "metrics.jsonl"
    try:
        if not (metrics.exists() and read_config(config) == json.loads(json.dumps(s.config()))
                and "test_nll" in read_metrics(s.out)[-1]):
            train_ebm.main([*argv, *["--resume"] * config.exists()])  # an error for a run of other settings
    except SystemExit as stop:
        if not re.search("(at|after) epoch", str(stop.code)):
            raise
        print(stop.code)  # training broke down, which is a result
        return read_metrics(s.out), stop.code
    return read_metrics(s.out), None


def flow_alone(s):
    """The figures of the flow by maximum likelihood, after as many updates.   -> dict"""
    data = train_ebm.density(s)
    torch.manual_seed(s.seed)
    flow = train_ebm.fit_flow(replace(s, start_steps=s.start_steps + s.epochs * s.steps), data, "cpu")
    truth = Truth(data, 5 * s.test_points, s.dim, "cpu")
    model = SimpleNamespace(energy=lambda x: -flow.log_prob(x), flow=None)
    row = truth.figures(model, flow.sample(s.test_points), "test")
    return row | {"draws": row["chains"], "draws_tv": total_variation(torch.tensor(row["chains"]), data.weights)}


def evaluations(s):
    """How often the energy is evaluated for each draw that enters an update, with or without its gradient."""
    x, rows = train_ebm.density(s).sample(100), []
    model = train_ebm.make_model(s, x)
    model.energy.register_forward_hook(lambda module, inputs, E: rows.append(len(E)))
    T = train_ebm.ladder(s, "cpu")
    train_ebm.move(s, model, x.repeat(len(T), 1, 1), 0.1 * T)
    return sum(rows) / len(x)


def trained(out, dim):
    """The model of a finished run, with its averaged parameters."""
    checkpoint = read_checkpoint(out / "checkpoint.pt")
    model = train_ebm.make_model(settings.Ebm(**checkpoint["config"]), mixture(dim).sample(5000))
    model.load_state_dict(checkpoint["state"]["averaged"])
    return model


def rows(table):
    """The table of docs/results.md: a figure for each seed, "elsewhere" where p_θ has no mass around the true modes."""
    for dim, cell in sorted({(row["dim"], row["cell"]) for row in table},
                            key=lambda at: (at[0], list(CELLS).index(at[1]))):
        seeds = [row for row in table if (row["dim"], row["cell"]) == (dim, cell)]

        def each(key, form, otherwise="elsewhere"):
            return ", ".join("broke down" if "stopped" in row else otherwise if row.get(key) is None else
                             form.format(row[key]) for row in seeds)

        def mean(key, form):
            values = [row[key] for row in seeds if row.get(key) is not None]
            return form.format(sum(values) / len(values)) if values else "–"

        tau = mean("autocorrelation_time", "{:.0f}")
        if any("followed" in row and 50 * (row["autocorrelation_time"] or math.inf) > row["followed"] for row in seeds):
            tau = "too long to see"
        error = max((row["tv_se"] for row in seeds if row.get("tv_se") is not None), default=None)
        yield (f"| {dim} | {cell} | {each('tv', '{:.4f}')} | {'–' if error is None else f'{error:.4f}'} | "
               f"{each('draws_tv', '{:.3f}')} | {each('test_kl', '{:.3f}')} | {mean('test_kl_se', '{:.3f}')} | "
               f"{mean('global_acceptance', '{:.2f}')} | {mean('flow_ess', '{:.0%}')} | {tau} | "
               f"{mean('evaluations', '{:.0f}')} |")


SHOWN = ("flow", "tempering", "langevin", "short")  # in the pictures


def curves(table):
    """The total variation between true and learnt mode weights against training steps: a panel for each dimension."""
    dims = sorted({row["dim"] for row in table})
    figure = Figure(figsize=(1.2 + 2.4 * len(dims), 3.2), layout="constrained")
    panels = figure.subplots(1, len(dims), sharey=True, squeeze=False)[0]
    for axes, dim in zip(panels, dims):
        for i, cell in enumerate(SHOWN):
            axes.plot([], [], color=f"C{i}", label=cell)
            for row in table:
                if (row["dim"], row["cell"]) == (dim, cell):
                    known = [point for point in row["tv_by_step"] if point[1] is not None]
                    axes.plot(*zip(*known), color=f"C{i}", lw=1.2, alpha=0.8)
        axes.set(xlabel="training steps", title=f"{dim} dimensions", yscale="log", ylim=(5e-4, 1))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("total variation of mode weights")
    panels[0].legend(fontsize="small")
    return figure


@torch.no_grad()
def planes(models, table):
    """In the plane: the truth, the flow, and the model that each sampler led to.   models: {cell: Model}"""
    data = mixture(2)
    x = data.sample(5000)
    top = data.log_prob(x).max().exp().item()
    flow = models["flow"].flow
    log_probs = {"truth": data.log_prob, "flow: the proposals q_α": flow.log_prob}
    for cell, row in table.items():
        log_probs[f"{cell}: p_θ, total variation {row['tv']:.3f}"] = (
            lambda x, energy=models[cell].energy, log_z=row["log_z"]: -energy(x) - log_z)
    figure = Figure(figsize=(3.2 * len(log_probs), 3.5), layout="constrained")
    for axes, (title, log_prob) in zip(figure.subplots(1, len(log_probs)), log_probs.items()):
        plots.image(axes, lambda x: log_prob(x).exp(), x, vmin=0, vmax=top)
        axes.set_title(title, fontsize="medium")
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Other flags go to train_ebm.py.")
    parser.add_argument("--dims", type=at_least(2), nargs="+", default=[2, 8, 16, 32, 64])
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=[*CELLS])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=folder, default="results")
    a, flags = parser.parse_known_args(argv)

    path = a.results / "balanced.json"
    with one_line_errors(torch.linalg.LinAlgError, SamplingError):
        experiment(a, path, flags)


def experiment(a, path, flags):
    with intact(path):
        done = json.loads(path.read_text()) if path.exists() else {"flags": flags, "runs": []}
        table = {(row["dim"], row["cell"], row["seed"]): row for row in done["runs"]}
        [*rows(done["runs"])]
    if done["flags"] != flags:
        raise RunError(f"{path} is of runs with other flags, {done['flags']}: move it away, or name another --results")
    for seed in a.seeds:  # all dimensions of one seed first
        for dim in a.dims:
            for cell in a.cells:
                name = re.sub(r"\W+", "-", cell)
                out = a.runs / f"balanced-d{dim}-{name}-seed{seed}"
                own = [*f"--data mixture --dim {dim} --seed {seed} {CELLS[cell] or ''}".split(), "--out", str(out)]
                s, row = passed_on(settings.Ebm, own, flags), {"dim": dim, "cell": cell, "seed": seed}
                if CELLS[cell] is None:
                    if (dim, cell, seed) not in table:
                        table[dim, cell, seed] = row | {k: v for k, v in flow_alone(s).items() if k in KEPT}
                else:
                    metrics, stopped = train(s, [*own, *flags])
                    table[dim, cell, seed] = (row | ({"stopped": stopped} if stopped else {})
                                              | {k: metrics[-1][k] for k in KEPT if k in metrics[-1]}
                                              | {"evaluations": evaluations(s)}
                                              | {"tv_by_step": [[row["step"], row["tv"]] for row in metrics]})
                runs = [table[key] for key in sorted(table)]
                record(path, {"command": "python -m experiments.balanced", "flags": flags, "machine": machine(),
                              "runs": runs})
    save_picture(a.results / "ebm-weights.png", curves(runs))
    outs = {cell: a.runs / f"balanced-d2-{cell}-seed0" for cell in SHOWN}
    drawn = [cell for cell in SHOWN if table.get((2, cell, 0), {}).get("tv") is not None]
    if len(drawn) == len(SHOWN) and all((out / "checkpoint.pt").exists() for out in outs.values()):
        models = {cell: trained(out, 2) for cell, out in outs.items()}
        save_picture(a.results / "ebm-density.png", planes(models, {cell: table[2, cell, 0] for cell in SHOWN}))
    print("\n".join(rows(runs)))


if __name__ == "__main__":
    main()
