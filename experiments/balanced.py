"""Mode weights of energies trained with each sampler: four Gaussians, weights 0.1 to 0.4, in 2 to 64 dimensions.

    python -m experiments.balanced
    python -m experiments.balanced --dims 2 16 --seeds 0 --cells flow tempering    some runs; the table keeps the others

Runs `python train_ebm.py` with the flags of CELLS. "flow alone" is the same flow by maximum likelihood on the data,
with as many updates. results/ebm-weights.png shows the total variation between the true and the learnt mode weights
against training steps, results/ebm-density.png the densities in the plane. Source: Grenioux, Moulines, Gabrié (2023),
the experiments on Gaussian mixtures.

Time: three hours on one core.
"""

import re
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import torch

import train_ebm
from densities import mixture
from experiments import command_line, completed, panels, passed_on, trained
from judge import Truth
from support import plots
from support.run import one_line_errors, read_checkpoint

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
SHOWN = ("flow", "tempering", "langevin", "short")  # in the pictures


def train(dim, cell, seed, s, own, flags):
    """One run of a cell.   -> dict for the table"""
    row = {"dim": dim, "cell": cell, "seed": seed}
    if CELLS[cell] is None:
        return row | flow_alone(s)
    _, metrics = trained(train_ebm, own, s.out, flags)
    if cell in SHOWN:
        row["tv_by_step"] = [[m["step"], round(m["tv"], 5)] for m in metrics if m["tv"] is not None]
    return row | metrics[-1] | {"evaluations": evaluations(s)}


def fit(s, data, updates=0):
    """A flow by maximum likelihood on the data, with so many updates after those that its model begins with."""
    torch.manual_seed(s.seed)
    return train_ebm.fit_flow(replace(s, start_steps=s.start_steps + updates), data, "cpu")


def flow_alone(s):
    """The figures of the flow by maximum likelihood, after as many updates.   -> dict"""
    data = train_ebm.density(s)
    flow = fit(s, data, s.epochs * s.steps)
    model = SimpleNamespace(energy=lambda x: -flow.log_prob(x), flow=None)
    return Truth(data, 5 * s.test_points, s.dim, "cpu").figures(model, flow.sample(s.test_points), "test")


def evaluations(s):
    """How often the energy is evaluated for each draw that enters an update, with or without its gradient."""
    x, rows = train_ebm.density(s).sample(100), []
    model = train_ebm.make_model(s, x)
    model.energy.register_forward_hook(lambda module, inputs, E: rows.append(len(E)))
    T = train_ebm.ladder(s, "cpu")
    train_ebm.move(s, model, x.repeat(len(T), 1, 1), 0.1 * T)
    return sum(rows) / len(x)


def rows(runs):
    """The table of docs/results.md: total variation in each dimension, from the least to the largest of the seeds.

    "elsewhere" stands for seeds in which p_θ has no mass around the true modes.
    """
    dims = sorted({row["dim"] for row in runs.values()})
    for cell in CELLS:
        own, cells = [row for row in runs.values() if row["cell"] == cell], []
        for dim in dims:
            tvs = [row.get("tv") for row in own if row["dim"] == dim]
            known = [f"{tv:.3f}" for tv in sorted(tv for tv in tvs if tv is not None)]
            ends = "–".join(dict.fromkeys([*known[:1], *known[-1:]]))
            cells.append(", ".join([ends] * bool(ends) + ["elsewhere"] * (None in tvs)) or "–")
        if own:
            price = own[0].get("evaluations")
            yield " | ".join([f"| {cell}", *cells, "–" if price is None else f"{price:.0f}"]) + " |"


def curves(runs):
    """The total variation between true and learnt mode weights against training steps: a line for each seed."""
    dims = sorted({row["dim"] for row in runs.values()})
    figure, [row_of_axes] = panels(1, len(dims), 1.6 + 2.8 * len(dims), 3.4, sharex=True, sharey=True)
    for axes, dim in zip(row_of_axes, dims):
        for cell, color in zip(SHOWN, plots.OTHERS):
            axes.plot([], [], color=color, label=cell)
            for row in runs.values():
                if (row["dim"], row["cell"]) == (dim, cell):
                    axes.plot(*zip(*row["tv_by_step"]), color=color, lw=1.2)
        axes.set(xlabel="training steps", title=f"{dim} dimensions", yscale="log", ylim=(5e-4, 1))
    row_of_axes[0].set_ylabel("total variation of mode weights")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure


@torch.no_grad()
def planes(runs, checkpoints):
    """In the plane: the truth, the flow, and the model that each sampler led to.   checkpoints {cell: path}"""
    data = mixture(2)
    x = data.sample(5000)
    log_probs = {"truth": data.log_prob}
    for cell, path in checkpoints.items():
        row, checkpoint = runs[f"2 {cell} 0"], read_checkpoint(path)
        model = train_ebm.make_model(train_ebm.Settings(**checkpoint["config"]), x)
        model.load_state_dict(checkpoint["state"]["averaged"])
        if cell == "flow":
            log_probs["flow: the proposals q_α"] = model.flow.log_prob
        log_probs[f"{cell}: p_θ, TV {row['tv']:.3f}"] = (
            lambda x, energy=model.energy, log_z=row["log_z"]: -energy(x) - log_z)
    figure, axes = panels(2, 3, 8.4, 6)
    for one, (title, log_prob) in zip(axes.flat, log_probs.items()):
        plots.image(one, lambda x: log_prob(x).exp(), x, vmin=0, vmax=data.log_prob(x).max().exp().item())
        one.set_title(title)
    return figure


def main(argv=None):
    parser = command_line(__doc__, "--runs", "--results", passes="train_ebm.py")
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 16, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=[*CELLS])
    a, flags = parser.parse_known_args(argv)
    jobs = {}
    for seed, dim, cell in product(a.seeds, a.dims, a.cells):
        out = a.runs / re.sub(r"\W+", "-", f"balanced d{dim} {cell} seed{seed}")
        own = f"--data mixture --dim {dim} --seed {seed} {CELLS[cell] or ''}".split()
        s = passed_on(train_ebm.Settings, [*own, "--out", str(out)], flags)
        jobs[f"{dim} {cell} {seed}"] = partial(train, dim, cell, seed, s, own, flags)
    with one_line_errors(torch.linalg.LinAlgError):
        runs = completed(a.results / "balanced.json", jobs, command="python -m experiments.balanced", flags=flags)
        plots.save(a.results / "ebm-weights.png", curves(runs))
        shown = {cell: a.runs / f"balanced-d2-{cell}-seed0" / "checkpoint.pt" for cell in SHOWN}
        if all(path.exists() and runs.get(f"2 {cell} 0", {}).get("tv") is not None for cell, path in shown.items()):
            plots.save(a.results / "ebm-density.png", planes(runs, shown))
        print(*rows(runs), sep="\n")


if __name__ == "__main__":
    main()
