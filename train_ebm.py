"""Trains an energy network by maximum likelihood, with Markov chains that a flow takes from mode to mode.

    python train_ebm.py
    python train_ebm.py --dim 16 --sampler langevin

An energy may be any network: p_θ(x) = exp(-E_θ(x)) / Z_θ, and nobody knows Z_θ. Maximum likelihood then needs draws
of p_θ, from chains x' that go on while θ changes:

    -∇_θ E_data[ log p_θ(x) ] = E_data[ ∇_θ E_θ(x) ] - E_{x' ~ p_θ}[ ∇_θ E_θ(x') ]                      (losses.sml)

Langevin chains explore the mode that they are in. Where they do not cross, their numbers are not the model's weights,
the gradient is wrong, and θ learns wrong weights. So a flow q_α proposes jumps, and learns from the chains where to:

    repeat    x' ← local steps of Langevin on E_θ, then a jump to a draw of q_α, or not    (sampling.alternate)
              θ follows sml(E_θ; data, x')
              α follows ml(q_α; x') = E_{x'}[ -log q_α(x') ]

The rejection keeps p_θ invariant whatever q_α is; and q_α gives log Z_θ by importance sampling (sampling.log_z). To
compare: --sampler langevin does without the jumps, --sampler short runs a few steps from noise for every update.

Source: Grenioux, Moulines, Gabrié, "Balanced Training of Energy-Based Models with Adaptive Flow Sampling" (2023).
One run fills one directory: density.png, weights.png, metrics.jsonl, config.json, and checkpoint.pt for --resume.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

import losses
from data import TOYS, mixture
from ebflow import EBFlow, toy_flow
from evaluate_ebm import Exact, density, mixing, table, weights
from flags import OPTIMIZATION, add_run_flags, add_settings, configuration, pick_device, with_settings
from layers import FullyConnected, Standardize
from run import Run, RunError, one_line_errors
from sampling import SamplingError, alternate
from training import MovingAverage, learning_rate, make_optimizer, restore, update

# The settings that a flag of the same name changes.
COMMON = OPTIMIZATION | dict(
    epochs=20,
    steps=50,            # of an epoch: updates of θ and of α
    chains=1000,
    batch_size=1000,     # fresh data in every step
    local_steps=5,       # of Langevin before each jump
    step_size=0.3,       # of Langevin at the start; it adapts to accept `target`
    target=0.574,
    lr=2e-3,             # of θ, at its peak
    flow_lr=2e-3,        # of α
    clip=10.0,           # largest norm of either gradient; 0: any
    ema_decay=0.99,      # θ̃ ← mθ̃ + (1-m)θ after each step, and the same for α
    energy_width=128,
    blocks=6,            # of the flow
    width=64,            # of its couplings' networks
    start_steps=300,     # of fitting the flow to data, before the first epoch
    test_points=20_000,  # for the evaluation after each epoch; five times as many at the end
    mixing_rounds=300,   # of the chains at the end, in which crossings are counted
)
DEFAULTS = {"flow": COMMON, "langevin": COMMON, "short": COMMON | dict(local_steps=20)}
KEPT = "the last checkpoint that was written is kept"


# ---------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------


class Energy(nn.Module):
    """E_θ(x) = f_θ(x) - log p_base(x), f_θ a network on standardised x, up to a constant.   (B, D) -> (B,)

    The base, an EBFlow, is held: p_θ ∝ exp(-f_θ) p_base. f_θ grows at most linearly, so that a Gaussian base makes Z_θ
    finite for every θ. Without a base only the chains that stray keep p_θ from spreading.
    """

    def __init__(self, std, mean, width, base=None):
        super().__init__()
        self.f = nn.Sequential(Standardize(std, mean), nn.Linear(len(mean), width), nn.SiLU(),
                               nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                               nn.Linear(width, 1, bias=False))  # a constant would drift: sml does not see it
        self.base = base and base.requires_grad_(False)

    @property
    def shape(self):
        return (self.f[1].in_features,)

    def forward(self, x):
        E = self.f(x).squeeze(1)
        return E if self.base is None else E + self.base.energy(x)


class Model(nn.Module):
    """The energy, the flow that proposes (None: nothing does), and as a flow the noise that short chains start from."""

    def __init__(self, energy, flow, noise):
        super().__init__()
        if flow is not None and flow.shape != energy.shape:
            raise RunError(f"the flow takes events of shape {tuple(flow.shape)} and the energy of {energy.shape}: "
                           "give both the same dimension")
        self.energy, self.flow, self.noise = energy, flow, noise.requires_grad_(False)


def gaussian(x):
    """The Gaussian with the mean and covariance of x (n, D), as a flow: u = L⁻¹(x - mean), L Lᵀ the covariance."""
    layer = FullyConnected(x.shape[1]).to(x)
    W = torch.linalg.inv(torch.linalg.cholesky(x.T.cov()))
    with torch.no_grad():
        layer.weight.copy_(W)
        layer.bias.copy_(-W @ x.mean(0))
    return EBFlow([layer], x.shape[1:])


def make_flow(args, x):
    """A flow that starts at the scale of x (n, D)."""
    std, mean = torch.std_mean(x, dim=0)
    flow = EBFlow([Standardize(std, mean), *toy_flow(x.shape[1], args.blocks, args.width).layers], x.shape[1:]).to(x)
    flow.initialize(x)
    return flow


def make_model(args, x):
    """Everything at the scale of data x (n, D), nothing trained."""
    base = {"none": None, "gaussian": gaussian(x), "flow": make_flow(args, x)}[args.base]
    energy = Energy(*torch.std_mean(x, dim=0), args.energy_width, base).to(x)
    return Model(energy, make_flow(args, x) if args.sampler == "flow" else None, gaussian(x))


# ---------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------


def advance(args, model, chains, step_size):
    """One round of the sampler that was asked for, on E_θ as it is now.   (B, D) -> (B, D), sampling.Report"""
    if args.sampler == "short":
        chains = model.noise.sample(len(chains))
    return alternate(model.energy, model.flow, chains, 1, args.local_steps, step_size, args.adjusted)


def train_step(args, model, chains, step_size, x, optimizer, flow_optimizer):
    """The chains move, θ follows sml, α follows ml.   -> chains (B, D), step size (), the figures of TRACE (6,)"""
    chains, report = advance(args, model, chains, step_size)
    trace = [*update(args, losses.sml(model.energy, x, chains), model.energy, optimizer)]
    none = torch.zeros_like(trace[0])
    trace += update(args, losses.ml(model.flow.log_prob, chains), model.flow, flow_optimizer) if model.flow else [none, none]
    trace += [none if share is None else share.mean() for share in (report.acceptance, report.global_acceptance)]
    if args.adjusted:  # θ changes while the chains run, and the best step size with it; see sampling.tune
        step_size = step_size * (0.05 * (report.acceptance.mean() - args.target)).exp()
    return chains, step_size, torch.stack(trace)


TRACE = ("loss", "grad_norm", "flow_loss", "flow_grad_norm", "acceptance", "flow_acceptance")


def train_epoch(args, epoch, model, average, chains, step_size, data, optimizers, bar):
    """-> chains (B, D), step size (), a dict of the means of TRACE"""
    torch.manual_seed(1_000_003 * args.seed + epoch)  # every epoch its own, so that a resumed run has none to restore
    trace = torch.empty(args.steps, len(TRACE), device=chains.device)  # read once: a GPU need not wait for the host
    for step in range(args.steps):
        rate = learning_rate(args, epoch, (epoch - 1 + step / args.steps) / args.epochs) / args.lr
        for optimizer, lr in zip(optimizers, (args.lr, args.flow_lr)):
            if optimizer:
                optimizer.param_groups[0]["lr"] = rate * lr
        x = data.sample(args.batch_size, chains.device)
        try:
            chains, step_size, trace[step] = train_step(args, model, chains, step_size, x, *optimizers)
        except (SamplingError, torch.linalg.LinAlgError) as error:
            raise RunError(f"{error}; at epoch {epoch}, step {step + 1}; {KEPT}") from None
        average.update()
        bar.update()
    bad = (~trace.isfinite().all(1)).nonzero()
    if len(bad):
        raise RunError(f"a loss or a gradient, of the energy or of the flow, is not finite at epoch {epoch}, "
                       f"step {bad[0].item() + 1}: lower --lr, --flow-lr or --clip; {KEPT}")
    return chains, step_size, dict(zip(TRACE, trace.mean(0).tolist()))


def start(args, model, data, device):
    """Fits a flow to the data by maximum likelihood, so that the first jumps go to every mode.

    The model's flow starts as that one, and with --base flow so does the base, and stays it.
    """
    flow = make_flow(args, data.sample(5000, device))
    optimizer = make_optimizer(args, flow)
    for step in tqdm(range(args.start_steps), desc="the flow, to the data", leave=False, dynamic_ncols=True):
        optimizer.param_groups[0]["lr"] = args.flow_lr * min(1.0, 2 - 2 * step / args.start_steps)
        update(args, losses.ml(flow.log_prob, data.sample(args.batch_size, device)), flow, optimizer)
    for part in (model.flow, model.energy.base if args.base == "flow" else None):
        if part is not None:
            part.load_state_dict(flow.state_dict())


def train(args):
    """-> what judged the model, and the last row of the metrics"""
    device = pick_device(args.device)
    data = mixture(args.dim) if args.data == "mixture" else TOYS[args.data]()
    exact = Exact(data, args.test_points, args.dim, device)
    torch.manual_seed(args.seed)
    model = make_model(args, data.sample(5000, device))
    run = Run(args.out, configuration(args), args.resume, args.overwrite)
    clock = -time.perf_counter()
    if not run.state and "flow" in (args.sampler, args.base):
        start(args, model, data, device)
    average = MovingAverage(model, args.ema_decay)
    optimizers = [make_optimizer(args, part) if part else None for part in (model.energy, model.flow)]
    names = ("model", "average", "optimizer", "flow_optimizer")
    parts = {name: part for name, part in zip(names, (model, average, *optimizers)) if part}
    judged = average.model if args.ema else model
    if run.state:
        restore(parts, run.state)
        chains, step_size = (run.state[name].to(device) for name in ("chains", "step_size"))
        clock += run.metrics[-1]["seconds"]
    else:  # as many chains in each mode, which is wrong: to put it right is the sampler's task
        chains = data.sample(args.chains, device, **({"equally": True} if exact.modes else {}))
        step_size = torch.tensor(args.step_size, device=device)

    def finish(epoch, row):
        """Judges the model after an epoch, and writes everything."""
        row = {"epoch": epoch, "step": epoch * args.steps} | row | exact.figures(judged, chains)
        if not math.isfinite(row["val_nll"]):
            raise RunError(f"the held-out NLL is {row['val_nll']} after epoch {epoch}: lower --lr; {KEPT}")
        run.metrics.append(row | {"step_size": step_size.item(), "seconds": clock + time.perf_counter()})
        run.save({name: part.state_dict() for name, part in parts.items()} | {"chains": chains, "step_size": step_size})

    if not run.state:
        finish(0, dict.fromkeys(TRACE))
    done = run.metrics[-1]["epoch"]
    with tqdm(total=args.epochs * args.steps, initial=done * args.steps, unit=" steps", dynamic_ncols=True) as bar:
        for epoch in range(done + 1, args.epochs + 1):
            chains, step_size, row = train_epoch(args, epoch, model, average, chains, step_size, data, optimizers, bar)
            finish(epoch, row)
            bar.set_postfix_str(progress(args, run.metrics[-1]))
            for cause in stuck(args, run.metrics[-1]):
                bar.write(f"warning: {cause}", file=sys.stderr)

    exact = Exact(data, 5 * args.test_points, args.dim, device)  # also starts the random numbers of what follows
    figures = {name.replace("val_", "test_"): value for name, value in exact.figures(judged, chains).items()}
    run.metrics[-1] |= figures | mixing(args, judged, chains, step_size, exact)
    run.write_metrics()
    run.picture("density.png", density(judged, exact, chains))
    if exact.modes:
        run.picture("weights.png", weights(run.metrics, data))
    return exact, run.metrics[-1]


def progress(args, row):
    """For the bar: both acceptances, the flow's effective sample size, the weights of the modes."""
    shown = {"accepts": row["acceptance"]} if args.adjusted else {}
    if args.sampler == "flow":
        shown |= {"flow accepts": row["flow_acceptance"], "ESS": row["flow_ess"]}
    text = [f"{name} {share:.0%}" for name, share in shown.items()]
    return ", ".join(text + (["weights " + " ".join(f"{w:.2f}" for w in row["weights"])] if "weights" in row else []))


def stuck(args, row):
    """What stood still in an epoch, and why that may be."""
    if args.adjusted and row["acceptance"] == 0:
        yield f"Langevin accepted nothing in epoch {row['epoch']}: lower --step-size, or --lr if E has become too steep"
    if args.sampler == "flow" and row["flow_acceptance"] == 0:
        yield (f"none of the flow's proposals was accepted in epoch {row['epoch']}, so that no chain changes its mode: "
               "the flow is far from the chains; raise --start-steps, --flow-lr, --blocks or --width, or lower --lr")


# ---------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = argparse.ArgumentParser(description="Train an energy network with an adaptive flow sampler.")
    parser.add_argument("--data", choices=["mixture", *TOYS], default="mixture")
    parser.add_argument("--dim", type=int, default=2, help="of the mixture")
    parser.add_argument("--sampler", choices=list(DEFAULTS), default="flow")
    parser.add_argument("--base", choices=["none", "gaussian", "flow"], default="gaussian",
                        help="the density that exp(-f) tilts: none, or one fitted to the data")
    parser.add_argument("--adjusted", action=argparse.BooleanOptionalAction, default=True,
                        help="accept or reject the Langevin steps (Metropolis)")
    parser.add_argument("--out", type=Path, help="directory of the run (runs/ebm-DATA-dDIM-SAMPLER)")
    add_run_flags(parser)
    add_settings(parser, DEFAULTS.values())
    args = parser.parse_args(argv)
    if args.dim < 2 or args.dim > 2 and args.data != "mixture":
        parser.error(f"--dim must be 2 at least, and 2 for every --data but the mixture, not {args.dim}")
    args.out = args.out or Path("runs") / f"ebm-{args.data}-d{args.dim}-{args.sampler}"
    return with_settings(parser, args, DEFAULTS.values(), DEFAULTS[args.sampler])


def main(argv=None):
    args = parse(argv)
    with one_line_errors(torch.linalg.LinAlgError, SamplingError):
        print(f"{args.data}, {args.sampler}: {args.out}")
        print(table(args, *train(args)))


if __name__ == "__main__":
    main()
