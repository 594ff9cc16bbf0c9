"""Trains an energy-based flow on a density in the plane that is known exactly, and measures it against the truth.

    python train_toy.py --data swirl --loss ssm

Both divergences are means over fresh points x of the truth p, so they need no estimate of a density:

    KL(p‖p_θ) = E_p[ log p(x) - log p_θ(x) ]          Fisher(p‖p_θ) = ½ E_p[ ‖∇log p(x) - ∇log p_θ(x)‖² ]

One run fills one directory: density.png, curves.png, metrics.jsonl, config.json, and checkpoint.pt for --resume.
"""

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.utils import get_total_norm

from densities import TOYS, Toy
from ebflow import toy_flow
from losses import OBJECTIVES
from support import plots, processes, settings
from support.fast import accelerated
from support.optimization import cosine, trainable, update_average
from support.run import Run, one_line_errors, read_checkpoint
from support.settings import setting

HOT = dict(start_smoothing=6.0, anneal=0.85, sml_steps=100)
RECIPES = {"ssm": HOT, "dsm": HOT | dict(anneal=0.7, plateau=0.5), "fdssm": HOT}
MATCHING = RECIPES.keys()


@dataclass
class Settings(settings.Settings):
    NAME = "toy-{data}-{loss}"
    loss: str = setting("dsm", "objective, see losses.py", choices=OBJECTIVES)
    data: str = setting("swirl", "density, see densities.py", choices=TOYS)
    steps: int = setting(250, "steps of an epoch", above=0)
    batch_size: int = setting(512, "fresh points in a step", above=0)
    lr: float = setting(3e-3, "highest learning rate", above=0)
    plateau: float = setting(0.0, "fraction of the run at the highest learning rate", least=0, below=1)
    blocks: int = setting(10, "blocks of the flow", above=0)
    width: int = setting(64, "units in the couplings' networks", above=0)
    start_smoothing: float = setting(2.0, "ours: noise on the points at the start; it falls to 0.375", least=0.375)
    anneal: float = setting(0.5, "ours: fraction of the run in which it falls", above=0, most=1)
    model_samples: int = setting(512, "samples of the model in a step of sml", above=0, of=("sml", *MATCHING))
    sml_steps: int = setting(0, "ours: steps of sml after the epochs; 0: none", least=0, of=MATCHING)
    xi: float = setting(0.2, "length ξ of the finite difference", above=0, of=("fdssm",))
    test_points: int = setting(20_000, "points that the final figures are means over", least=8)
    compile: bool = setting(False, "torch.compile the gradient", decides=False)

    def recipe(self):
        recipe = RECIPES.get(self.loss, {})
        return recipe | dict(start_smoothing=2.0, anneal=0.5) if self.data == "sine" else recipe  # no turns to unwind


def train(s, device):
    toy = TOYS[s.data]()
    flow = build(s, toy, device)
    averaged = copy.deepcopy(flow)                                     # θ̃ of EMA
    step, optimizer = make_step(s, flow, averaged)
    val, test = truth(toy, s.test_points // 4, -1, device), truth(toy, s.test_points, -2, device)

    run = Run(s, {"model": flow, "averaged": averaged, "optimizer": optimizer})
    best = run.state.get("best", {"epoch": 0, "val_nll": math.inf, "model": {}})
    for epoch in range(run.state["epoch"] + 1, s.epochs + 1 + (s.sml_steps > 0)):  # 0 shows what the start is worth
        torch.manual_seed(1_000_003 * s.seed + epoch)                  # a resumed run has no generator to restore
        phase, before = s, {}
        first, steps = (epoch - 1) * s.steps, s.steps if epoch else 0  # first: the steps before this epoch
        if epoch > s.epochs:  # ours: score matching does not see how much mass lies elsewhere, samples of the model do
            flow.load_state_dict(best["model"])
            before = divergences("before_sml_test", flow, *test)
            phase = replace(s, loss="sml", epochs=1, steps=s.sml_steps, start_smoothing=Toy.smoothing, compile=False)
            step, optimizer = make_step(phase, flow, averaged)
            first, steps = 0, s.sml_steps
        for n in run.watch(epoch, range(first, first + steps)):
            progress = n / (phase.epochs * phase.steps)
            optimizer.param_groups[0]["lr"] = phase.lr * cosine(progress, phase.plateau)
            sigma = noise_level(phase, progress)
            x = toy.sample(s.batch_size, device, 0.0 if phase.loss == "dsm" else sigma)  # dsm adds it itself
            run.record(step(x, torch.tensor(sigma, dtype=torch.float64, device=device), n))

        done = run.metrics[-1]["step"] if run.metrics else 0
        row = {"epoch": epoch, "step": done + steps, "loss": None} | run.means | before
        row |= divergences("val", averaged, *val)
        if epoch and row["val_nll"] < best["val_nll"]:
            best = {"epoch": epoch, "val_nll": row["val_nll"], "model": copy.deepcopy(averaged.state_dict())}
        run.save(row, {"epoch": epoch, "best": best}, shown=("val_kl", "val_fisher", "batches_per_second"))

    flow.load_state_dict(best["model"])
    kept = {"sml_steps": s.sml_steps, "sml_kept": best["epoch"] > s.epochs} if s.sml_steps else {}
    run.finish(divergences("test", flow, *test) | {"best_epoch": best["epoch"]} | kept)
    plots.save(s.out / "curves.png", plots.curves(run.metrics, s.loss))
    plots.save(s.out / "density.png", plots.toy(flow, toy, test[0]))


def build(s, toy, device):
    """The flow before training. Its actnorms start at the moments of the points, under the noise of the start."""
    torch.manual_seed(s.seed)
    flow = toy_flow(blocks=s.blocks, width=s.width).to(device)
    flow.initialize(toy.sample(2000, device, s.start_smoothing))
    return flow


def make_step(s, flow, averaged):
    """A training step, (x (B, 2), σ (), n) -> {"loss": (), "grad_norm": ()} still on the device, and its optimiser."""
    parameters, averages = trainable(flow), trainable(averaged)
    optimizer = torch.optim.Adam(parameters, lr=s.lr, fused=True)
    objective, config = OBJECTIVES[s.loss], s.config()                 # losses.py: it reads its own settings only

    def gradient(x, sigma):                                            # leaves ∇_θ in p.grad; see train_mnist.py
        loss = objective(flow, x, sigma=sigma, pooled=True, **config)
        loss.backward(inputs=parameters)                               # not for x, which is a leaf in ssm and dsm, too
        return loss.detach()

    gradient = accelerated(gradient, parameters, s)                    # support/fast.py

    def step(x, sigma, n):
        optimizer.zero_grad()
        loss = gradient(x, sigma)
        norm = get_total_norm([p.grad for p in parameters])
        optimizer.step()
        update_average(averages, parameters, n)                        # EMA
        return {"loss": loss, "grad_norm": norm}

    return step, optimizer


def noise_level(s, progress):
    """ours: σ of the noise on the points, by the fraction of the run that is over. It falls geometrically to the toy's.

    Score matching compares scores only where points are. A model with nearly all of its mass elsewhere can have a small
    Fisher divergence. So training starts under strong noise, where points and flow are both nearly Gaussian. The flow
    follows the points as the noise falls. Maximum likelihood ends lower on the swirl with some noise, too.
    """
    return Toy.smoothing * (s.start_smoothing / Toy.smoothing) ** max(0.0, 1 - progress / s.anneal)


def truth(toy, n, seed, device):
    """Fresh points of the toy with log p and its score, the same at every call.   -> (n, 2), (n,), (n, 2)"""
    torch.manual_seed(seed)  # none that training uses
    x = toy.sample(n, device)
    return x, toy.log_prob(x), toy.score(x)


@torch.no_grad()
def divergences(split, model, x, log_prob, score):
    """NLL and KL in nats, and the Fisher divergence. The last two have standard errors."""
    model_log_prob, model_score = (torch.cat([f(b) for b in x.split(5000)]) for f in (model.log_prob, model.score))
    kl = (log_prob - model_log_prob).double()
    fisher = 0.5 * (score - model_score).double().square().sum(1)
    row = {f"{split}_nll": -model_log_prob.mean().item()}
    for name, values in (("kl", kl), ("fisher", fisher)):
        row |= {f"{split}_{name}": values.mean().item(), f"{split}_{name}_se": (values.std() / len(x) ** 0.5).item()}
    return row


def load(directory):
    """The flow of a finished run, with its best weights, in eval mode, frozen, on the CPU.   -> EBFlow"""
    saved = read_checkpoint(Path(directory) / "checkpoint.pt")
    flow = toy_flow(blocks=saved["config"]["blocks"], width=saved["config"]["width"])
    flow.load_state_dict(saved["state"]["best"]["model"])
    return flow.eval().requires_grad_(False)


def main(argv=None):
    s = settings.parse(Settings, argv)
    with one_line_errors(ValueError, torch.linalg.LinAlgError), processes.joined(s.device) as (device, *_):
        train(s, device)


if __name__ == "__main__":
    main()
