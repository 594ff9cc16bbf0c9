"""Class proportions of real digits: 5,000 zeros and 500 ones of MNIST, learnt by an energy with each sampler.

    python -m experiments.unbalanced

The data are the first 16 whitened principal components of the images. Energy, flow and chains are those of
train_ebm.py: 600 updates, 1,000 chains, half of which start in each class. Chains that never change their class keep
that half. The experiment measures which proportions the energy itself learns from them. Its learning rate is a quarter
of the usual one: at 2e-3 the proportions swing faster than the chains follow.

One judge serves all energies. It freezes θ, takes the flow that was fitted to the data, and adapts it to p_θ by 300
rounds of Langevin steps and jumps. Then a small network classifies 40,000 draws with importance weights: half of them
of the adapted flow, half of the first one, since alone the adapted one can miss mass that a base has. Their effective
sample size (ESS) says how far to trust the proportions; below 1 % none are given.

On two cores a seed takes 26 minutes, three fifths of them for tempering. Writes results/unbalanced.json;
results/unbalanced.png, the share of ones against updates; results/unbalanced-draws.png, decoded draws of each model.
Prints the table of docs/results.md. ours, not the paper's.
"""

import argparse
import copy
import math
import multiprocessing
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

import losses
import train_ebm
from data import MNIST, DataError, read_idx
from experiments import at_least, folder, passed_on, record, recorded
from sampling import SamplingError, alternate, effective_sample_size, log_weights
from support import settings
from support.optimization import cosine, trainable, update_average
from support.run import RunError, one_line_errors, save_picture

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
    """Images of two digits in whitened principal components x, most of them of the first.

    digits, counts    the two digits, and how many of their training images are data
    dim               the number D of components
    x, test           lists of (n, D) by class: the data, and all test images; a held-out set in the data's proportions
    everything        as x, of all training images, for the classifier

    Raises RunError where a digit or so many of its images are not there, or their number does not exceed `dim`.
    """

    def __init__(self, digits=(0, 1), counts=(5000, 500), dim=16):
        train, test = (self.read(name, digits) for name in ("train", "t10k"))
        if digits[0] == digits[1]:
            raise RunError(f"--digits must be two different ones, not {digits[0]} twice")
        for digit, n, images in zip(digits, counts, train):
            if not 0 < n <= len(images):
                raise RunError(f"MNIST has {len(images)} training images of the digit {digit}: cannot take {n}")
        if not 0 < dim < min(sum(counts), 784):
            raise RunError(f"{sum(counts)} images of 784 pixels do not have {dim} principal components")
        pixels = torch.cat([images[:n] for images, n in zip(train, counts)])
        self.mean = pixels.mean(0)
        _, S, V = torch.linalg.svd(pixels - self.mean, full_matrices=False)
        self.axes, self.explained = V[:dim], (S[:dim].square().sum() / S.square().sum()).item()
        self.std = S[:dim] / len(pixels) ** 0.5
        self.everything, self.test = ([self.encode(images) for images in split] for split in (train, test))
        self.x = [x[:n] for x, n in zip(self.everything, counts)]
        share = min(len(x) / n for x, n in zip(self.test, counts))
        self.held_out = torch.cat([x[:int(share * n)] for x, n in zip(self.test, counts)])
        self.share = counts[1] / sum(counts)

    @staticmethod
    def read(name, digits):
        """pixels / 256 of a split.   -> list of (n, 784)"""
        images, labels = (read_idx(MNIST / f"{name}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
        return [images[labels == digit].flatten(1) / 256 for digit in digits]

    def encode(self, pixels):
        return (pixels - self.mean) @ self.axes.T / self.std

    def decode(self, x):
        return (x * self.std) @ self.axes + self.mean

    def sample(self, n, device="cpu", equally=False):
        """n of the images, with replacement, or with `equally` the same number of each class.   -> (n, D)"""
        classes = self.x if equally else [torch.cat(self.x)]
        return torch.cat([x[torch.randint(len(x), (n // len(classes),))] for x in classes]).to(device)


def classifier(data):
    """A network that tells the second class from the first by its sign.   -> module (n, D) -> (n,), test accuracy"""
    torch.manual_seed(0)
    x = torch.cat(data.everything)
    y = torch.arange(2.0).repeat_interleave(torch.tensor([*map(len, data.everything)]))
    network = nn.Sequential(nn.Linear(x.shape[1], 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1),
                            nn.Flatten(0))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(1000):
        i = torch.randint(len(x), (500,))
        train_ebm.follow(F.binary_cross_entropy_with_logits(network(x[i]), y[i]), optimizer)
    right = sum(((network(x) > 0) == bool(k)).sum().item() for k, x in enumerate(data.test))
    return network.requires_grad_(False), right / sum(map(len, data.test))


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
            w, second = log_w.softmax(0), self.network(x) > 0
            ess = (effective_sample_size(log_w) / DRAWS).item()
            share = (w @ second.double()).item()
            error = (w * (second.double() - share)).norm().item()  # of a weighted mean
            log_z = log_w.logsumexp(0) - math.log(DRAWS)
            nll = (energy(self.data.held_out).double().mean() + log_z).item()
        known = {"share": share, "share_se": error, "tv": abs(share - self.data.share), "nll": nll}
        row = {"ess": ess} | (known if ess >= 0.01 else dict.fromkeys(known))
        return row, x[torch.multinomial(w, 64, replacement=True)]


def settings_of(cell, seed, dim, flags):
    own = f"--data mixture --epochs 1 --dim {dim} --seed {seed} {CELLS[cell]}".split()
    return passed_on(settings.Ebm, own, [*"--steps 600 --start-steps 600 --lr 5e-4".split(), *flags])


def fit(seed, data, flags, steps=0):
    """The flow of a seed, by maximum likelihood on the data.   -> EBFlow"""
    torch.set_num_threads(1)
    s = settings_of("flow", seed, len(data.std), flags)
    torch.manual_seed(seed)
    return train_ebm.fit_flow(replace(s, start_steps=s.start_steps + steps), data, "cpu")


def run(cell, seed, data, flags, network, flow):
    """Trains and judges one model. All models of a seed begin with the same flow.

    -> dict for the table, 64 draws (64, D)
    """
    torch.set_num_threads(1)
    start = time.perf_counter()
    s = settings_of(cell, seed, len(data.std), flags)
    if cell == "flow alone":  # with as many updates as the energies, and judged by its own draws
        flow = fit(seed, data, flags, s.steps)
        row, draws = Judge(s, data, network, flow)(lambda x: -flow.log_prob(x), 0)
        return row | {"looks": [], "seconds": time.perf_counter() - start}, draws

    torch.manual_seed(seed)
    model = train_ebm.make_model(s, data.sample(5000))
    train_ebm.start_from(s, model, flow)
    averaged, judge = copy.deepcopy(model), Judge(s, data, network, flow)
    optimizer = torch.optim.Adam(trainable(model.energy), fused=True)
    flow_optimizer = torch.optim.Adam(trainable(model.flow), fused=True) if model.flow else None
    T, looks = train_ebm.ladder(s, "cpu"), []
    chains, step_size = data.sample(s.chains, equally=s.start == "equal").repeat(len(T), 1, 1), s.step_size * T
    for n in range(s.steps + 1):
        if n % max(1, s.steps // LOOKS) == 0:
            row, _ = judge(averaged.energy, ROUNDS[0])
            of_chains = (network(chains[0]) > 0).double().mean().item()
            looks.append({"update": n, "share": row["share"], "chains": of_chains})
        optimizer.param_groups[0]["lr"] = s.lr * cosine(n / s.steps)
        if flow_optimizer:
            flow_optimizer.param_groups[0]["lr"] = s.flow_lr * cosine(n / s.steps)
        x = data.sample(s.batch_size)
        chains, step_size, _ = train_ebm.step(s, model, chains, step_size, x, optimizer, flow_optimizer)
        update_average(trainable(averaged), trainable(model), n, m=0.99)
    row, draws = Judge(s, data, network, flow)(averaged.energy, ROUNDS[1])
    return row | {"looks": looks, "seconds": time.perf_counter() - start}, draws


def silently_stopped():
    """In a worker: SIGTERM ends it, prints nothing and leaves no lock of a progress bar behind."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    tqdm.set_lock(threading.RLock())


def rows(runs):
    """The table of docs/results.md: a figure for each seed."""
    for cell in CELLS:
        seeds = [row for name, row in runs.items() if name.rsplit(" seed ")[0] == cell]

        def each(key, form):
            return ", ".join("–" if row[key] is None else form.format(row[key]) for row in seeds)

        if seeds:
            error = max((row["share_se"] for row in seeds if row["share_se"] is not None), default=math.nan)
            yield (f"| {cell} | {each('share', '{:.1%}')} | {error:.1%} | {each('tv', '{:.3f}')} | "
                   f"{each('nll', '{:.2f}')} | {each('ess', '{:.0%}')} |")


def curves(runs, truth):
    """The share of the second digit against updates: in p_θ, and among the chains (thin)."""
    cells = [cell for cell in CELLS if cell != "flow alone"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    bases = {"Gaussian base": cells[:4], "the flow as base": cells[4:]}
    for axes, (title, some) in zip(figure.subplots(1, 2, sharey=True), bases.items()):
        for i, (cell, name) in enumerate(zip(some, cells[:4])):
            axes.plot([], [], color=f"C{i}", label=name)
            for row in (row for label, row in runs.items() if label.rsplit(" seed ")[0] == cell):
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
    """A row of images for the data, and one for the draws of each model."""
    shown = {"data": data.sample(24)} | {cell: torch.tensor(runs[f"{cell} seed 0"]["draws"])
                                         for cell in CELLS if runs.get(f"{cell} seed 0", {}).get("draws")}
    figure = Figure(figsize=(13, 0.42 * len(shown)), layout="constrained")
    for axes, (name, x) in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown.items()):
        axes.imshow(data.decode(x).view(-1, 28, 28).transpose(0, 1).flatten(1).numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small")
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Other flags go to train_ebm.py.")
    parser.add_argument("--digits", type=int, nargs=2, default=[0, 1])
    parser.add_argument("--counts", type=int, nargs=2, default=[5000, 500], help="images of each digit")
    parser.add_argument("--components", type=at_least(2), default=16, help="dimensions of the data")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0])
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=[*CELLS])
    parser.add_argument("--results", type=folder, default="results")
    a, flags = parser.parse_known_args(argv)
    for s in (settings_of(cell, 0, a.components, flags) for cell in a.cells):
        if s.chains < 4:
            parser.error(f"--chains must be at least 4, not {s.chains}: half start in each class, and half judge")

    with one_line_errors(DataError, SamplingError, torch.linalg.LinAlgError):
        data = Digits(a.digits, a.counts, a.components)
        path = a.results / "unbalanced.json"
        result = recorded(path, command="python -m experiments.unbalanced", digits=a.digits, counts=a.counts,
                          components=a.components, flags=flags)
        todo = [(cell, seed) for seed in a.seeds for cell in a.cells if f"{cell} seed {seed}" not in result["runs"]]
        todo.sort(key=lambda job: "tempering" not in job[0])  # the slowest first
        if todo:
            network, accuracy = classifier(data)
            print(f"the classifier is right on {accuracy:.2%} of the test images", flush=True)
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), silently_stopped) as pool:
            try:
                flows = {seed: pool.submit(fit, seed, data, flags) for seed in {seed for _, seed in todo}}
                running = {pool.submit(run, *job, data, flags, network, flows[job[1]].result()): job for job in todo}
                for done in as_completed(running):
                    cell, seed = running[done]
                    row, draws = done.result()
                    row["draws"] = None if seed else [[round(number, 2) for number in x] for x in draws[:24].tolist()]
                    result["runs"][f"{cell} seed {seed}"] = row
                    record(path, result)
                    print(f"{cell}, seed {seed}: share {row['share']}, ESS {row['ess']:.1%}", flush=True)
            except BaseException:  # an error or Ctrl-C: do not wait for the others
                for worker in multiprocessing.active_children():
                    worker.terminate()
                raise
        save_picture(a.results / "unbalanced.png", curves(result["runs"], data.share))
        save_picture(a.results / "unbalanced-draws.png", mosaic(result["runs"], data))
        print("\n".join(rows(result["runs"])))


if __name__ == "__main__":
    main()
