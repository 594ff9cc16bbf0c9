"""Trains an energy-based flow on a density in the plane that is known exactly, and measures it against the truth.

    python train_toy.py --data swirl --loss ssm

Both divergences are means over fresh points x of the truth p, so they need no estimate of a density:

    KL(p‖p_θ) = E_p[ log p(x) - log p_θ(x) ]          Fisher(p‖p_θ) = ½ E_p[ ‖∇log p(x) - ∇log p_θ(x)‖² ]

One run fills one directory: density.png, curves.png, metrics.jsonl, config.json, and checkpoint.pt, from which
--resume continues. Recipes and settings: support/settings.py.
"""

import copy
import math

import support  # before torch: makes Ctrl-C and SIGTERM one line each
import torch
from torch.nn.utils import get_total_norm

from data import TOYS, Toy
from ebflow import toy_flow
from losses import OBJECTIVES
from support import plots, processes, settings
from support.fast import accelerated
from support.optimization import cosine, trainable, update_average
from support.run import Run, one_line_errors


def train(s, device):
    toy = TOYS[s.data]()
    torch.manual_seed(s.seed)
    flow = toy_flow(blocks=s.blocks, width=s.width).to(device)
    flow.initialize(toy.sample(2000, device, s.start_smoothing))
    averaged = copy.deepcopy(flow)                                     # θ̃ of EMA
    step, optimizer = make_step(s, flow, averaged)
    val, test = truth(toy, s.test_points // 4, -1, device), truth(toy, s.test_points, -2, device)

    parts = {"model": flow, "averaged": averaged, "optimizer": optimizer}
    with Run(s, "lower --lr or raise --start-smoothing", parts) as run:
        best = run.state["best"] if run.state["epoch"] >= 0 else {"epoch": 0, "val_nll": math.inf, "model": {}}
        for epoch in range(run.state["epoch"] + 1, s.epochs + 1):      # epoch 0 shows what the start alone is worth
            torch.manual_seed(1_000_003 * s.seed + epoch)              # a resumed run has no generator to restore
            for i in run.watch(epoch, range(s.steps if epoch else 0)):
                n = (epoch - 1) * s.steps + i
                progress = n / (s.epochs * s.steps)
                optimizer.param_groups[0]["lr"] = s.lr * cosine(progress, s.plateau)
                sigma = noise_level(s, progress)
                x = toy.sample(s.batch_size, device, 0.0 if s.loss == "dsm" else sigma)  # dsm adds it itself
                run.record(step(x, torch.tensor(sigma, dtype=torch.float64, device=device), n))

            row = {"epoch": epoch, "step": epoch * s.steps, "loss": None} | run.means
            row |= divergences("val", averaged, *val)
            if epoch and row["val_nll"] < best["val_nll"]:
                best = {"epoch": epoch, "val_nll": row["val_nll"], "model": copy.deepcopy(averaged.state_dict())}
            run.save(row, {"epoch": epoch, "best": best}, shown=("val_kl", "val_fisher", "batches_per_second"))

        flow.load_state_dict(best["model"])
        run.finish(divergences("test", flow, *test) | {"best_epoch": best["epoch"]})
        run.picture("curves.png", plots.curves(run.metrics, s.loss))
        run.picture("density.png", plots.toy(flow, toy, test[0]))


def make_step(s, flow, averaged):
    """A training step, (x (B, 2), σ (), n) -> {"loss": (), "grad_norm": ()} still on the device, and its optimiser."""
    parameters, averages = trainable(flow), trainable(averaged)
    optimizer = torch.optim.Adam(parameters, lr=s.lr, fused=True)
    objective, config = OBJECTIVES[s.loss], s.config()                 # losses.py: it reads its own settings only

    def gradient(x, sigma):                                            # leaves ∇_θ in p.grad
        loss = objective(flow, x, share=processes.share, sigma=sigma, pooled=True, **config)
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
    model_log_prob = torch.cat([model.log_prob(batch) for batch in x.split(5000)])
    model_score = torch.cat([model.score(batch) for batch in x.split(5000)])
    kl = (log_prob - model_log_prob).double()
    fisher = 0.5 * (score - model_score).double().square().sum(1)
    row = {f"{split}_nll": -model_log_prob.mean().item()}
    for name, values in (("kl", kl), ("fisher", fisher)):
        row |= {f"{split}_{name}": values.mean().item(), f"{split}_{name}_se": (values.std() / len(x) ** 0.5).item()}
    return row


def main(argv=None):
    s = settings.parse(settings.Toy, argv)
    with one_line_errors(torch.linalg.LinAlgError), processes.joined(s.device) as device:
        train(s, device)


if __name__ == "__main__":
    main()
