"""Class proportions of real digits: 5,000 zeros and 500 ones of MNIST, learnt by an energy with each sampler.

    python -m experiments.unbalanced

The data are the first 16 whitened principal components of the images. Energy, flow and chains are those of
train_ebm.py: 600 updates at a quarter of its learning rate, 1,000 chains, half of which start in each class. Chains
that never change their class keep that half. The experiment measures which proportions the energy learns from them.

One judge serves all energies: it adapts the flow that was fitted to the data to p_θ. A small network classifies draws
with importance weights, half of them of the adapted flow, half of the first one, since alone the adapted one can miss
mass that a base has. Their effective sample size (ESS) says how far to trust the proportions; below 1 % none are given.

A seed takes 51 minutes on one core. Writes results/unbalanced.json after every run, and continues from it; then the
figures results/unbalanced.png and results/unbalanced-draws.png. Prints the table of docs/results.md. ours.
"""

import argparse
import copy
import math
import time
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure

import losses
import train_ebm
from data import MNIST, DataError, read_idx
from experiments import at_least, folder, passed_on, record, recorded
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
LOOKS = 6  # at the proportions while an energy is trained
ROUNDS = 25, 300  # in which the judge adapts to p_θ, for a look and in the end
DRAWS = 40_000


class Digits:
    """Images of the two DIGITS in whitened principal components (n, D).

    train, test, x    lists by class: all images, and the data; `held_out` has test images in the data's proportions
    """

    def __init__(self):
        train, test = (self.read(name) for name in ("train", "t10k"))
        pixels = torch.cat([images[:n] for images, n in zip(train, COUNTS)])
        self.mean = pixels.mean(0)
        _, S, V = torch.linalg.svd(pixels - self.mean, full_matrices=False)
        self.axes, self.std = V[:COMPONENTS], S[:COMPONENTS] / len(pixels) ** 0.5
        self.train, self.test = ([(images - self.mean) @ self.axes.T / self.std for images in split]
                                 for split in (train, test))
        self.x = [x[:n] for x, n in zip(self.train, COUNTS)]
        part = min(len(x) / n for x, n in zip(self.test, COUNTS))
        self.held_out = torch.cat([x[:int(part * n)] for x, n in zip(self.test, COUNTS)])
        self.share = COUNTS[1] / sum(COUNTS)

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


class Judge:
    """Measures p_θ = exp(-E)/Z: a flow adapts to it in rounds of Langevin steps and jumps, then draws are weighted."""

    def __init__(self, s, data, network, flow):
        self.s, self.data, self.network, self.first, self.flow = s, data, network, flow, copy.deepcopy(flow)
        self.optimizer = torch.optim.Adam(self.flow.parameters(), lr=1e-3)
        self.chains, self.step_size = data.sample(s.chains // 2), torch.tensor(s.step_size)

    def log_prob(self, x):
        """Of draws, half of which come from either flow. A flow that overflows at x has no mass there.   -> (n,)"""
        log_q = torch.stack([flow.log_prob(x) for flow in (self.first, self.flow)]).double()
        return log_q.nan_to_num(nan=-torch.inf).logsumexp(0) - math.log(2)

    def __call__(self, energy, rounds):
        """-> dict: the share of the second digit and its error, held-out NLL, ESS; draws of p_θ (64, D)"""
        for _ in range(rounds):
            self.chains, report = alternate(energy, self.flow, self.chains, 1, self.s.local_steps, self.step_size)
            self.step_size = train_ebm.adapted(self.step_size, report)
            finite(train_ebm.follow(losses.ml(self.flow.log_prob, self.chains), self.optimizer))
        with torch.no_grad():
            x = torch.cat([flow.sample(DRAWS // 2) for flow in (self.first, self.flow)])
            log_w = log_weights(energy, self, x)
            w, second = log_w.softmax(0), self.network(x) > 0
            ess = (effective_sample_size(log_w) / DRAWS).item()
            share = (w @ second.double()).item()
            error = (w * (second.double() - share)).norm().item()  # of a weighted mean
            nll = (energy(self.data.held_out).double().mean() + log_w.logsumexp(0) - math.log(DRAWS)).item()
        known = {"share": share, "share_se": error, "tv": abs(share - self.data.share), "nll": nll}
        row = {"ess": ess} | (known if ess >= 0.01 else dict.fromkeys(known))
        return row, x[torch.multinomial(w, 64, replacement=True)]


def finite(figures):
    if not torch.stack(figures).isfinite().all():
        raise RunError("a loss or its gradient is not finite: lower --lr, or take settings nearer to the defaults")


def fit(s, data):
    """The flow by maximum likelihood on the data.   -> EBFlow"""
    torch.manual_seed(s.seed)
    return train_ebm.fit_flow(s, data, "cpu")


def train(s, data, network, flow):
    """Trains a model that begins with this flow.   -> its averaged energy, the looks at it"""
    torch.manual_seed(s.seed)
    model = train_ebm.make_model(s, data.sample(5000))
    train_ebm.start_from(s, model, flow)
    averaged, judge, looks = copy.deepcopy(model), Judge(s, data, network, flow), []
    optimizer = torch.optim.Adam(trainable(model.energy), fused=True)
    flow_optimizer = torch.optim.Adam(trainable(model.flow), fused=True) if model.flow else None
    T = train_ebm.ladder(s, "cpu")
    chains, step_size = data.sample(s.chains, equally=s.start == "equal").repeat(len(T), 1, 1), s.step_size * T
    for n in range(s.steps + 1):
        if n % max(1, s.steps // LOOKS) == 0:
            looks.append({"update": n, "share": judge(averaged.energy, ROUNDS[0])[0]["share"],
                          "chains": (network(chains[0]) > 0).double().mean().item()})
        optimizer.param_groups[0]["lr"] = s.lr * cosine(n / s.steps)
        if flow_optimizer:
            flow_optimizer.param_groups[0]["lr"] = s.flow_lr * cosine(n / s.steps)
        x = data.sample(s.batch_size)
        chains, step_size, figures = train_ebm.step(s, model, chains, step_size, x, optimizer, flow_optimizer)
        finite([*figures.values()])
        update_average(trainable(averaged), trainable(model), n, m=0.99)
    return averaged.energy, looks


def run(cell, s, data, network, flow):
    """Trains and judges one model. All models of a seed begin with the same flow.   -> dict for the table"""
    start = time.perf_counter()
    if cell == "flow alone":  # with as many updates as the energies, and judged by its own draws
        flow, looks = fit(replace(s, start_steps=s.start_steps + s.steps), data), []
        row, draws = Judge(s, data, network, flow)(lambda x: -flow.log_prob(x), 0)
    else:
        energy, looks = train(s, data, network, flow)
        row, draws = Judge(s, data, network, flow)(energy, ROUNDS[1])
    draws = None if s.seed else [[round(number, 2) for number in x] for x in draws[:24].tolist()]
    return row | {"looks": looks, "seconds": time.perf_counter() - start, "draws": draws}


# ---- Table and figures -----------------------------------------------------------------------------------------------

def of_cell(cell, runs):
    return [row for name, row in runs.items() if name.rsplit(" seed ")[0] == cell]


def rows(runs):
    """The table of docs/results.md: a figure for each seed."""
    for cell in filter(lambda cell: of_cell(cell, runs), CELLS):
        def each(key, form):
            return ", ".join("–" if row[key] is None else format(row[key], form) for row in of_cell(cell, runs))

        error = max((row["share_se"] for row in of_cell(cell, runs) if row["share_se"] is not None), default=math.nan)
        yield (f"| {cell} | {each('share', '.1%')} | {error:.1%} | {each('tv', '.3f')} | {each('nll', '.2f')} | "
               f"{each('ess', '.0%')} |")


def curves(runs, truth):
    """The share of the second digit against updates: in p_θ, and among the chains (thin)."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    cells = [cell for cell in CELLS if cell != "flow alone"]
    for axes, title, some in zip(figure.subplots(1, 2, sharey=True), ("Gaussian base", "the flow as base"),
                                 (cells[:4], cells[4:])):
        for i, cell in enumerate(some):
            axes.plot([], [], color=f"C{i}", label=cells[i])
            for row in of_cell(cell, runs):
                for key, style in (("chains", dict(lw=0.7, alpha=0.6)), ("share", dict(marker="."))):
                    known = [(look["update"], look[key]) for look in row["looks"] if look[key] is not None]
                    axes.plot(*zip(*known), color=f"C{i}", **style)
        axes.axhline(truth, color="k", ls=":", label="data")
        axes.set(xlabel="updates", ylim=(0, 1), title=title)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.axes[0].set_ylabel("share of the second digit")
    return figure


def mosaic(runs, data):
    """A row of images for the data, and one for the draws of each model with seed 0."""
    shown = {"data": data.sample(24)} | {cell: torch.tensor(runs[f"{cell} seed 0"]["draws"])
                                         for cell in CELLS if f"{cell} seed 0" in runs}
    figure = Figure(figsize=(13, 0.42 * len(shown)), layout="constrained")
    for axes, (name, x) in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown.items()):
        pixels = (x * data.std) @ data.axes + data.mean
        axes.imshow(pixels.view(-1, 28, 28).transpose(0, 1).flatten(1).numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small")
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Other flags go to train_ebm.py.")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0])
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=[*CELLS])
    parser.add_argument("--results", type=folder, default="results")
    a, flags = parser.parse_known_args(argv)
    jobs = {(seed, cell): passed_on(
        train_ebm.Settings, f"--data mixture --epochs 1 --dim {COMPONENTS} --seed {seed} {CELLS[cell]}".split(),
        ["--steps", "600", "--start-steps", "600", "--lr", "5e-4", *flags]) for seed in a.seeds for cell in a.cells}
    with one_line_errors(DataError, torch.linalg.LinAlgError):
        path = a.results / "unbalanced.json"
        result = recorded(path, command="python -m experiments.unbalanced", digits=DIGITS, counts=COUNTS,
                          components=COMPONENTS, flags=flags)
        data, flows = Digits(), {}
        network = classifier(data)
        for (seed, cell), s in jobs.items():
            if f"{cell} seed {seed}" not in result["runs"]:
                flows[seed] = flows.get(seed) or fit(s, data)
                row = result["runs"][f"{cell} seed {seed}"] = run(cell, s, data, network, flows[seed])
                record(path, result)
                print(f"{cell}, seed {seed}: share {row['share']}, ESS {row['ess']:.1%}", flush=True)
        plots.save(a.results / "unbalanced.png", curves(result["runs"], data.share))
        plots.save(a.results / "unbalanced-draws.png", mosaic(result["runs"], data))
        print(*rows(result["runs"]), sep="\n")


if __name__ == "__main__":
    main()
