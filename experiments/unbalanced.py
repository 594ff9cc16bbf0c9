"""Class proportions of real digits: 5,000 zeros and 500 ones of MNIST, learnt by an energy with each sampler.

    python -m experiments.unbalanced

ours. The data are the first 16 whitened principal components of the images. Energy, flow and chains are those of
train_ebm.py: 600 updates at a quarter of its learning rate, 1,000 chains, half of which start in each class.

One judge serves all energies: it adapts the flow that was fitted to the data to p_θ. A small network classifies draws
with importance weights, half of them of the adapted flow, half of the first one, since alone the adapted one can miss
mass that a base has. Where their effective sample size (ESS) is below 1 %, no proportions are given.

A seed takes 51 minutes on one core. Writes results/unbalanced.json after every run, and continues from it; then the
figures results/unbalanced.png and results/unbalanced-draws.png. Prints the table of docs/results.md.
"""

import copy
import math
import time
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import losses
import train_ebm
from data import MNIST, DataError, read_idx
from experiments import command_line, completed, panels, passed_on, sheet
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
LOOKS = 6  # at the proportions while an energy is trained
ROUNDS = 25, 300  # in which the judge adapts to p_θ, for a look and in the end
DRAWS = 40_000


class Digits:
    """Images of the two DIGITS in whitened principal components (n, D).

    train, test, x    lists by class: all images, and the data; `held_out` has test images in the data's proportions
    """

    def __init__(self):
        train, test = self.read("train"), self.read("t10k")
        pixels = torch.cat([images[:n] for images, n in zip(train, COUNTS)])
        self.mean = pixels.mean(0)
        _, S, V = torch.linalg.svd(pixels - self.mean, full_matrices=False)
        self.axes, self.std = V[:COMPONENTS], S[:COMPONENTS] / len(pixels) ** 0.5
        self.train, self.test = ([(images - self.mean) @ self.axes.T / self.std for images in split]
                                 for split in (train, test))
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
            train_ebm.follow(losses.ml(self.flow.log_prob, self.chains), self.optimizer)
        with torch.no_grad():
            x = torch.cat([flow.sample(DRAWS // 2) for flow in (self.first, self.flow)])
            log_w = log_weights(energy, self, x)
            w, second, ess = log_w.softmax(0), (self.network(x) > 0).double(), effective_sample_size(log_w) / DRAWS
            share = w @ second
            known = {"share": share, "share_se": (w * (second - share)).norm(), "tv": (share - self.data.share).abs(),
                     "nll": energy(self.data.held_out).double().mean() + log_w.logsumexp(0) - math.log(DRAWS)}
        row = {"ess": ess.item()} | {key: value.item() if ess >= 0.01 else None for key, value in known.items()}
        return row, x[torch.multinomial(w, 64, replacement=True)]


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
        if not torch.stack([*figures.values()]).isfinite().all():  # a flow that is lost would propose no jumps
            raise RunError("a loss or its gradient is not finite: lower --lr or --flow-lr")
        update_average(trainable(averaged), trainable(model), n, m=0.99)
    return averaged.energy, looks


def run(cell, s, data, network, flows):
    """Trains and judges one model.   flows {seed: the flow that all its models begin with}   -> dict for the table"""
    if s.seed not in flows:
        flows[s.seed] = fit(s, data)
    flow, start = flows[s.seed], time.perf_counter()
    if cell == "flow alone":  # with as many updates as the energies, and judged by its own draws
        flow, looks = fit(s, data, s.steps), []
        row, draws = Judge(s, data, network, flow)(lambda x: -flow.log_prob(x), 0)
    else:
        energy, looks = train(s, data, network, flow)
        row, draws = Judge(s, data, network, flow)(energy, ROUNDS[1])
    print(f"{cell}, seed {s.seed}: share {row['share']}, ESS {row['ess']:.1%}", flush=True)
    draws = None if s.seed else [[round(number, 2) for number in x] for x in draws[:24].tolist()]
    return row | {"looks": looks, "seconds": time.perf_counter() - start, "draws": draws}


def by_cell(runs):
    """-> {cell: its rows, one for each seed}"""
    found = {cell: [row for name, row in runs.items() if name.rsplit(" seed ")[0] == cell] for cell in CELLS}
    return {cell: rows for cell, rows in found.items() if rows}


def rows(runs):
    """The table of docs/results.md: a figure for each seed."""
    for cell, seeds in by_cell(runs).items():
        def each(key, form):
            return ", ".join("–" if row[key] is None else format(row[key], form) for row in seeds)

        error = max((row["share_se"] for row in seeds if row["share_se"] is not None), default=math.nan)
        yield (f"| {cell} | {each('share', '.1%')} | {error:.1%} | {each('tv', '.3f')} | {each('nll', '.2f')} | "
               f"{each('ess', '.0%')} |")


def curves(runs, truth):
    """The share of the second digit against updates: in p_θ, and among the chains (thin)."""
    (figure, [row_of_axes]), cells = panels(1, 2, 9, 3.6, sharey=True), [cell for cell in CELLS if cell != "flow alone"]
    for axes, title, some in zip(row_of_axes, ("Gaussian base", "the flow as base"), (cells[:4], cells[4:])):
        for i, cell in enumerate(some):
            axes.plot([], [], color=f"C{i}", label=cells[i])
            for row in by_cell(runs).get(cell, []):
                for key, style in (("chains", dict(lw=0.7, alpha=0.6)), ("share", dict(marker="."))):
                    known = [(look["update"], look[key]) for look in row["looks"] if look[key] is not None]
                    axes.plot(*zip(*known), color=f"C{i}", **style)
        axes.axhline(truth, color="k", ls=":", label="data")
        axes.set(xlabel="updates", ylim=(0, 1), title=title)
    axes.legend(fontsize="small")
    row_of_axes[0].set_ylabel("share of the second digit")
    return figure


def mosaic(runs, data):
    """A row of images for the data, and one for the draws of each model with seed 0."""
    shown = {"data": data.sample(24)} | {cell: torch.tensor(runs[f"{cell} seed 0"]["draws"])
                                         for cell in CELLS if f"{cell} seed 0" in runs}
    pixels = (torch.stack([*shown.values()]) * data.std) @ data.axes + data.mean  # (rows, 24, 784)
    return sheet(256 * pixels, (1, 28, 28), down=[*shown])


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
        plots.save(a.results / "unbalanced.png", curves(runs, data.share))
        plots.save(a.results / "unbalanced-draws.png", mosaic(runs, data))
        print(*rows(runs), sep="\n")


if __name__ == "__main__":
    main()
