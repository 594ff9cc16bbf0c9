"""Class proportions of real digits: 5,000 zeros and 500 ones of MNIST, learnt by an energy with each sampler.

    python -m experiments.unbalanced

ours. The data are the first 16 whitened principal components of the images. Energy, flow and chains are those of
train_ebm.py: 600 updates at a quarter of its learning rate, 1,000 chains, half of which start in each class.

Three judges measure each model. A judge adapts the flow that was fitted to the data to p_θ, and weights draws. Half of
them are of the adapted flow, half of the first one, since alone the adapted one can miss mass that a base has. A small
network classifies them. The share is the mean over the judges. Its error comes from their spread, since the weights of
one judge do not show what its flows miss. Where one judge has an effective sample size (ESS) below 1 %, no proportions
are given.

Time: 55 minutes a seed on one core.
"""

import copy
import math
import statistics
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

import losses
import train_ebm
from data import MNIST, DataError, read_idx
from experiments import command_line, completed, panels, passed_on
from experiments.balanced import fit
from sampling import alternate, effective_sample_size, log_weights
from support import plots
from support.optimization import cosine, trainable, update_average
from support.run import RunError, one_line_errors

DIGITS, COUNTS, COMPONENTS = (0, 1), (5000, 500), 16
CELLS = {
    "flow": "--sampler flow",
    "tempering": "--sampler tempering",
    "langevin": "--sampler langevin",
    "langevin, started like the data": "--sampler langevin --start data",
    "flow alone": "--base flow",  # a base and no energy
    "flow, which is the base as well": "--sampler flow --base flow",
    "tempering, the flow as base": "--sampler tempering --base flow",
    "langevin, the flow as base": "--sampler langevin --base flow",
    "langevin, started like the data, the flow as base": "--sampler langevin --start data --base flow",
}
JUDGES = 3  # of a model
ROUNDS = 300  # of chains, from which a judge's flow learns
DRAWS = 40_000  # of a judge


class Digits:
    """Images of the two DIGITS in whitened principal components (n, D).

    train, test, x    lists by class: all images, and the data; `held_out` has test images in the data's proportions
    """

    def __init__(self):
        train, test = self.read("train"), self.read("t10k")
        pixels = torch.cat([images[:n] for images, n in zip(train, COUNTS)])
        mean = pixels.mean(0)
        _, S, V = torch.linalg.svd(pixels - mean, full_matrices=False)
        whiten = V[:COMPONENTS].T * len(pixels) ** 0.5 / S[:COMPONENTS]  # (784, D)
        self.train, self.test = ([(images - mean) @ whiten for images in split] for split in (train, test))
        self.x, self.share = [x[:n] for x, n in zip(self.train, COUNTS)], COUNTS[1] / sum(COUNTS)
        part = min(len(x) / n for x, n in zip(self.test, COUNTS))
        self.held_out = torch.cat([x[:int(part * n)] for x, n in zip(self.test, COUNTS)])

    @staticmethod
    def read(name):
        """pixels / 256 of a split.   -> list of (n, 784)"""
        images, labels = (read_idx(MNIST / f"{name}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
        return [images[labels == digit].flatten(1) / 256 for digit in DIGITS]

    def sample(self, n, device="cpu", equally=False):
        """n of the images, with replacement, or with `equally` the same number of each class.   -> (n, D)"""
        classes = self.x if equally else [torch.cat(self.x)]
        return torch.cat([x[torch.randint(len(x), (n // len(classes),))] for x in classes]).to(device)


def classifier(data):
    """A network that tells the second class from the first by its sign.   -> module (n, D) -> (n,)"""
    torch.manual_seed(0)
    x = torch.cat(data.train)
    y = torch.arange(2.0).repeat_interleave(torch.tensor([*map(len, data.train)]))
    network = nn.Sequential(nn.Linear(x.shape[1], 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1),
                            nn.Flatten(0))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(1000):
        i = torch.randint(len(x), (500,))
        train_ebm.follow(F.binary_cross_entropy_with_logits(network(x[i]), y[i]), optimizer)
    right = sum(((network(x) > 0) == bool(k)).sum().item() for k, x in enumerate(data.test))
    print(f"the classifier is right on {right} of {sum(map(len, data.test))} test images", flush=True)
    return network.requires_grad_(False)


def adapted(s, data, flow, energy):
    """The flow, adapted to p_θ = exp(-E)/Z by rounds of Langevin steps and jumps.   -> EBFlow"""
    flow = copy.deepcopy(flow)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    chains, step_size = data.sample(s.chains // 2), torch.tensor(s.step_size)
    for _ in range(ROUNDS):
        chains, report = alternate(energy, flow, chains, 1, s.local_steps, step_size)
        step_size = train_ebm.adapted(step_size, report)
        train_ebm.follow(losses.ml(flow.log_prob, chains), optimizer)
    return flow


@torch.no_grad()
def measure(energy, flows, data, network):
    """p_θ by weighted draws, equally many of each flow.   -> dict: share of the second digit, held-out NLL, ESS"""
    x = torch.cat([flow.sample(DRAWS // len(flows)) for flow in flows])

    def log_prob(x):  # a flow that overflows at x has no mass there
        log_q = torch.stack([flow.log_prob(x) for flow in flows]).double()
        return log_q.nan_to_num(nan=-torch.inf).logsumexp(0) - math.log(len(flows))

    log_w = log_weights(energy, SimpleNamespace(log_prob=log_prob), x)
    return {"share": (log_w.softmax(0) @ (network(x) > 0).double()).item(),
            "nll": (energy(data.held_out).double().mean() + log_w.logsumexp(0) - math.log(DRAWS)).item(),
            "ess": effective_sample_size(log_w).item() / DRAWS}


def judged(measures, truth):
    """The mean of several measures of one model; no share and no NLL where one of them has few draws.   -> dict"""
    row = {key: statistics.mean(one[key] for one in measures) for key in measures[0]}
    row |= {"share_se": statistics.stdev(one["share"] for one in measures) / len(measures) ** 0.5,
            "tv": abs(row["share"] - truth)}
    few = min(one["ess"] for one in measures) < 0.01
    return row | dict.fromkeys(("share", "share_se", "tv", "nll") if few else ())


def train(s, data, flow):
    """Trains a model that begins with this flow.   -> its averaged energy, and the chains (n, D)"""
    torch.manual_seed(s.seed)
    model = train_ebm.make_model(s, data.sample(5000))
    train_ebm.start_from(s, model, flow)
    averaged = copy.deepcopy(model)
    optimizer = torch.optim.Adam(trainable(model.energy), fused=True)
    flow_optimizer = torch.optim.Adam(trainable(model.flow), fused=True) if model.flow else None
    T = train_ebm.ladder(s, "cpu")
    chains, step_size = data.sample(s.chains, equally=s.start == "equal").repeat(len(T), 1, 1), s.step_size * T
    for n in range(s.steps):
        optimizer.param_groups[0]["lr"] = s.lr * cosine(n / s.steps)
        if flow_optimizer:
            flow_optimizer.param_groups[0]["lr"] = s.flow_lr * cosine(n / s.steps)
        x = data.sample(s.batch_size)
        chains, step_size, figures = train_ebm.step(s, model, chains, step_size, x, optimizer, flow_optimizer)
        if not torch.stack([*figures.values()]).isfinite().all():  # a flow that is lost would propose no jumps
            raise RunError("a loss or its gradient is not finite: lower --lr or --flow-lr")
        update_average(trainable(averaged), trainable(model), n, m=0.99)
    return averaged.energy, chains[0]


def run(cell, s, data, network, flows):
    """Trains and judges one model.   flows {seed: the flow that all its models begin with}   -> dict for the table"""
    if s.seed not in flows:
        flows[s.seed] = fit(s, data)
    flow, row = flows[s.seed], {}
    if cell == "flow alone":  # with as many updates as the energies, and judged by its own draws
        flow = fit(s, data, s.steps)
        measures = [measure(lambda x: -flow.log_prob(x), [flow], data, network) for _ in range(JUDGES)]
    else:
        energy, chains = train(s, data, flow)
        row["chains"] = (network(chains) > 0).double().mean().item()
        measures = [measure(energy, [flow, adapted(s, data, flow, energy)], data, network) for _ in range(JUDGES)]
    return row | judged(measures, data.share)


def by_cell(runs):
    """-> {cell: its rows, one for each seed}"""
    found = {cell: [row for name, row in runs.items() if name.rsplit(" seed ")[0] == cell] for cell in CELLS}
    return {cell: rows for cell, rows in found.items() if rows}


def rows(runs):
    """The table of docs/balanced.md: a figure for each seed."""
    for cell, seeds in by_cell(runs).items():
        def each(key, form):
            return ", ".join("–" if row[key] is None else format(row[key], form) for row in seeds)

        error = max((row["share_se"] for row in seeds if row["share_se"] is not None), default=math.nan)
        yield (f"| {cell} | {each('share', '.1%')} | {error:.1%} | {each('tv', '.3f')} | {each('nll', '.2f')} | "
               f"{each('ess', '.0%')} |")


def picture(runs, truth):
    """The share of the second digit in p_θ and among the chains: a row for each sampler, a point for each seed."""
    (figure, [[axes]]), found = panels(1, 1, 8.5, 4.2), by_cell(runs)
    for i, seeds in enumerate(found.values()):
        for j, row in enumerate(seeds):
            y = i + 0.2 * (j - (len(seeds) - 1) / 2)
            if row["share"] is not None:
                axes.errorbar(row["share"], y, xerr=row["share_se"], fmt="o", ms=5, color=plots.OTHERS[1])
            if "chains" in row:
                axes.plot(row["chains"], y, "o", ms=5, mfc="none", color=plots.OTHERS[0])
    axes.plot([], [], "o", color=plots.OTHERS[1], label="p_θ")
    axes.plot([], [], "o", mfc="none", color=plots.OTHERS[0], label="the chains")
    axes.axvline(truth, color="k", ls=":", label=f"the data, {truth:.1%}")
    axes.set(xlabel="share of ones", xscale="log", ylim=(len(found) - 0.5, -0.5))
    axes.set_yticks(range(len(found)), [cell.replace(", the flow", ",\nthe flow") for cell in found])
    axes.set_xticks(ticks := [0.003, 0.01, 0.03, 0.1, 0.3, 1], [f"{tick:.1%}" for tick in ticks])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def main(argv=None):
    parser = command_line(__doc__, "--results", passes="train_ebm.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=[*CELLS])
    a, flags = parser.parse_known_args(argv)
    settings = {(cell, seed): passed_on(
        train_ebm.Settings, f"--data mixture --epochs 1 --dim {COMPONENTS} --seed {seed} {CELLS[cell]}".split(),
        [*"--steps 600 --start-steps 600 --lr 5e-4".split(), *flags]) for seed in a.seeds for cell in a.cells}
    with one_line_errors(DataError, torch.linalg.LinAlgError):
        data, flows = Digits(), {}
        network = classifier(data)
        jobs = {f"{at[0]} seed {at[1]}": partial(run, at[0], s, data, network, flows) for at, s in settings.items()}
        runs = completed(a.results / "unbalanced.json", jobs, command="python -m experiments.unbalanced", digits=DIGITS,
                         counts=COUNTS, components=COMPONENTS, flags=flags)
        plots.save(a.results / "unbalanced.png", picture(runs, data.share))
        print(*rows(runs), sep="\n")


if __name__ == "__main__":
    main()
