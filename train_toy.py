"""Trains an energy-based flow on a density in the plane that is known exactly, or on points of your own.

    python train_toy.py --data swirl --loss ssm
    python train_toy.py --data points.csv

A toy is measured against its truth. Both divergences are means over fresh points x of it, so they need no estimate of
a density:

    KL(p‖p_θ) = E_p[ log p(x) - log p_θ(x) ]          Fisher(p‖p_θ) = ½ E_p[ ‖∇log p(x) - ∇log p_θ(x)‖² ]

Points (data.py: Points) are standardised by a linear layer, so NLL is that of the raw columns. A Gaussian's is printed
beside it. One run fills one directory: density.png, metrics.jsonl, config.json, and checkpoint.pt for --resume.
"""

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.utils import get_total_norm

from data import DataError, Points
from densities import TOYS, Toy
from ebflow import EBFlow, toy_flow
from layers import Standardize
from losses import OBJECTIVES
from support import plots, processes, settings
from support.fast import accelerated
from support.optimization import cosine, trainable, update_average
from support.run import Run, RunError, intact, one_line_errors, read_checkpoint
from support.settings import setting

HOT = dict(start_smoothing=6.0, anneal=0.85, sml_steps=100)
RECIPES = {"ssm": HOT, "dsm": HOT | dict(anneal=0.7, plateau=0.5), "fdssm": HOT}
MATCHING = RECIPES.keys()


@dataclass
class Settings(settings.Settings):
    NAME = "toy-{data.stem}-{loss}"
    loss: str = setting("dsm", "objective, see losses.py", choices=OBJECTIVES)
    data: Path = setting(Path("swirl"), f"{', '.join(TOYS)}, or a file of points: .csv, .npy", decides=False)
    steps: int = setting(250, "steps of an epoch", above=0)
    batch_size: int = setting(512, "fresh points in a step", above=0)
    lr: float = setting(3e-3, "highest learning rate", above=0)
    plateau: float = setting(0.0, "fraction of the run at the highest learning rate", least=0, below=1)
    blocks: int = setting(10, "blocks of the flow", above=0)
    width: int = setting(64, "units in the couplings' networks", above=0)
    floor: float = setting(0.0, "ours: smallest scale of a coupling; 0: none", least=0, below=1)
    sigma: float = setting(Toy.smoothing, "noise on the points at the end; the toys' own is 0.375", above=0)
    start_smoothing: float = setting(2.0, "ours: noise on the points at the start, if above σ; it falls to σ", above=0)
    anneal: float = setting(0.5, "ours: fraction of the run in which it falls", above=0, most=1)
    model_samples: int = setting(512, "samples of the model in a step of sml", above=0, of=("sml", *MATCHING))
    sml_steps: int = setting(0, "ours: steps of sml after the epochs; 0: none", least=0, of=MATCHING)
    sml_lr: float = setting(3e-3, "their highest learning rate", above=0, of=MATCHING)
    sml_sigma: float = setting(Toy.smoothing, "noise on the points at their end", above=0, of=MATCHING)
    xi: float = setting(0.2, "length ξ of the finite difference", above=0, of=("fdssm",))
    test_points: int = setting(20_000, "points that the final figures are means over", least=8)
    compile: bool = setting(False, "torch.compile the gradient", decides=False)

    def recipe(self):
        recipe, name = RECIPES.get(self.loss, {}), str(self.data)
        if name in TOYS:
            return recipe | dict(start_smoothing=2.0, anneal=0.5) if name == "sine" else recipe  # no turns to unwind
        if self.loss not in MATCHING:
            return dict(sigma=0.03)
        return recipe | dict(sigma=0.1, floor=0.1, sml_steps=500, sml_lr=1e-3, sml_sigma=0.03)


def train(s, device):
    toy, identity = TOYS.get(str(s.data)), {"data": s.data.stem}
    if toy:
        data = toy()
        val, test = truth(data, s.test_points // 4, -1, device), truth(data, s.test_points, -2, device)
    elif s.data.is_file():
        data = Points(s.data, s.seed)
        val, test = (data.val.to(device),), (data.test.to(device),)
        identity |= data.identity
    else:
        raise RunError(f"--data {s.data} is neither {', '.join(TOYS)} nor a file of points")
    pre, flow = build(s, data, device)                                 # x -> z, standardised points, and z -> u
    model = EBFlow([*pre.layers, *flow.layers], flow.shape)            # of x; pre and flow are its parts
    averaged = copy.deepcopy(model)                                    # θ̃ of EMA
    step, optimizer = make_step(s, flow, averaged)
    best = {"epoch": 0, "val_nll": math.inf, "model": averaged.state_dict()}
    run = Run(s, {"model": model, "averaged": averaged, "optimizer": optimizer}, {"best": best}, **identity)
    best = run.state["best"]
    for epoch in range(run.state["epoch"] + 1, s.epochs + 1 + (s.sml_steps > 0)):  # 0 shows what the start is worth
        torch.manual_seed(1_000_003 * s.seed + epoch)                  # a resumed run has no generator to restore
        phase, before = s, {}
        first, steps = (epoch - 1) * s.steps, s.steps if epoch else 0  # first: the steps before this epoch
        if epoch > s.epochs:  # ours: score matching does not see how much mass lies elsewhere, samples of the model do
            model.load_state_dict(best["model"])
            before = divergences("before_sml_test", model, *test)
            phase = replace(s, loss="sml", epochs=1, steps=s.sml_steps, lr=s.sml_lr, sigma=s.sml_sigma,
                            start_smoothing=0.0, compile=False)
            step, optimizer = make_step(phase, flow, averaged)
            first, steps = 0, s.sml_steps
        for n in run.watch(epoch, range(first, first + steps)):
            progress = n / (phase.epochs * phase.steps)
            optimizer.param_groups[0]["lr"] = phase.lr * cosine(progress, phase.plateau)
            sigma = noise_level(phase, progress)
            x = data.sample(s.batch_size, device, 0.0 if phase.loss == "dsm" else sigma)  # dsm adds it itself
            run.record(step(pre(x), torch.tensor(sigma, dtype=torch.float64, device=device), n))

        done = run.metrics[-1]["step"] if run.metrics else 0
        row = {"epoch": epoch, "step": done + steps, "loss": None} | run.means | before
        row |= divergences("val", averaged, *val)
        if epoch and row["val_nll"] < best["val_nll"]:
            best = {"epoch": epoch, "val_nll": row["val_nll"], "model": copy.deepcopy(averaged.state_dict())}
        run.save(row, {"epoch": epoch, "best": best}, shown=("val_kl", "val_fisher", "batches_per_second"))

    model.load_state_dict(best["model"])
    final = divergences("test", model, *test) | {"best_epoch": best["epoch"]}
    if s.sml_steps:
        final |= {"sml_steps": s.sml_steps, "sml_kept": best["epoch"] > s.epochs}
    run.finish(final if toy else final | {"gaussian_test_nll": data.gaussian_nll})
    torch.manual_seed(0)                                               # of the draws in the picture
    plots.save(s.out / "density.png", plots.toy(flow, pre(test[0]), run.metrics, s.loss, truth=data if toy else None))


def build(s, data, device):
    """The pre-processing x -> z, and the flow of z before training; of a toy, z is x.

    The actnorms start at the moments of the points, under the noise of the start.
    """
    torch.manual_seed(s.seed)
    layers = [Standardize(data.std, data.mean)] if isinstance(data, Points) else []
    dim = data.train.shape[1] if layers else 2
    pre, flow = EBFlow(layers, (dim,)).to(device), toy_flow(dim, s.blocks, s.width, s.floor).to(device)
    flow.initialize(pre(data.sample(2000, device, s.start_smoothing)))
    return pre, flow


def make_step(s, flow, averaged):
    """A training step, (z (B, D), σ (), n) -> {"loss": (), "grad_norm": ()} still on the device, and its optimiser."""
    parameters, averages = trainable(flow), trainable(averaged)
    optimizer = torch.optim.Adam(parameters, lr=s.lr, fused=True)
    objective, config = OBJECTIVES[s.loss], s.config()                 # losses.py: it reads its own settings only

    def gradient(z, sigma):                                            # leaves ∇_θ in p.grad; see train_mnist.py
        loss = objective(flow, z, **config | {"sigma": sigma, "pooled": True})
        loss.backward(inputs=parameters)                               # not for z, which is a leaf in ssm and dsm, too
        return loss.detach()

    gradient = accelerated(gradient, parameters, s)                    # support/fast.py

    def step(z, sigma, n):
        optimizer.zero_grad()
        loss = gradient(z, sigma)
        norm = get_total_norm([p.grad for p in parameters])
        optimizer.step()
        update_average(averages, parameters, n)                        # EMA
        return {"loss": loss, "grad_norm": norm}

    return step, optimizer


def noise_level(s, progress):
    """ours: the noise on the points, by the fraction of the run that is over. It falls geometrically to σ.

    Score matching compares scores only where points are. A model with nearly all of its mass elsewhere can have a small
    Fisher divergence. So training starts under strong noise, where points and flow are both nearly Gaussian. The flow
    follows the points as the noise falls. Maximum likelihood ends lower on the swirl with some noise, too.
    """
    return s.sigma * max(1.0, s.start_smoothing / s.sigma) ** max(0.0, 1 - progress / s.anneal)


def truth(toy, n, seed, device):
    """Fresh points of the toy with log p and its score, the same at every call.   -> (n, 2), (n,), (n, 2)"""
    torch.manual_seed(seed)  # none that training uses
    x = toy.sample(n, device)
    return x, toy.log_prob(x), toy.score(x)


@torch.no_grad()
def divergences(split, model, x, log_prob=None, score=None):
    """NLL and, where the truth is known, KL in nats and the Fisher divergence, with their standard errors."""
    model_log_prob = torch.cat([model.log_prob(batch) for batch in x.split(5000)])
    row = {f"{split}_nll": -model_log_prob.mean().item()}
    if log_prob is not None:
        model_score = torch.cat([model.score(batch) for batch in x.split(5000)])
        kl = (log_prob - model_log_prob).double()
        fisher = 0.5 * (score - model_score).double().square().sum(1)
        for name, values in (("kl", kl), ("fisher", fisher)):
            row |= {f"{split}_{name}": values.mean().item(), f"{split}_{name}_se": (values.std() / len(x)**0.5).item()}
    return row


def load(directory):
    """The flow of x of a finished run, with its best weights, in eval mode, frozen, on the CPU.   -> EBFlow"""
    path = Path(directory) / "checkpoint.pt"
    saved = read_checkpoint(path)
    with intact(path):
        config, best = saved["config"], saved["state"]["best"]
        _, dim = config.get("points", (0, 2))
        layers = [Standardize(torch.ones(dim), torch.zeros(dim))] if "points" in config else []
        flow = toy_flow(dim, config["blocks"], config["width"], config.get("floor", 0.0))
        model = EBFlow([*layers, *flow.layers], (dim,))
        model.load_state_dict(best["model"])
        if best["epoch"] == 0:
            raise RunError(f"{path} is of a run that has not ended an epoch")
    return model.eval().requires_grad_(False)


def main(argv=None):
    s = settings.parse(Settings, argv)
    with one_line_errors(DataError, ValueError, torch.linalg.LinAlgError), processes.joined(s.device) as (device, *_):
        train(s, device)


if __name__ == "__main__":
    main()
