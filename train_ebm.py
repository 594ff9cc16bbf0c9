"""Trains an energy network by maximum likelihood, with Markov chains that a flow takes from mode to mode.

    python train_ebm.py
    python train_ebm.py --dim 16 --sampler langevin

An energy may be any network: p_θ(x) = exp(-E_θ(x)) / Z_θ with an unknown Z_θ. Maximum likelihood then needs draws x'
of p_θ, from chains that go on while θ changes (losses.sml):

    -∇_θ E_data[ log p_θ(x) ] = E_data[ ∇_θ E_θ(x) ] - E_{x' ~ p_θ}[ ∇_θ E_θ(x') ]

Langevin chains explore the mode that they are in. Where they do not cross, their shares are not the model's mode
weights, the gradient is wrong, and θ learns wrong weights. So a flow q_α proposes jumps, and learns where to:

    repeat    x' ← local steps of Langevin on E_θ, then a jump to a draw of q_α, or not    (sampling.alternate)
              θ follows sml(E_θ; data, x')
              α follows ml(q_α; x') = E_{x'}[ -log q_α(x') ]

Each kernel leaves p_θ invariant for the θ and α of that moment, whatever q_α is. But θ moves, and α learns from the
same chains, so these follow p_θ only approximately. q_α also gives log Z_θ by importance sampling. To compare:

    --sampler langevin    no jumps
    --sampler tempering   swaps with hotter chains in place of jumps: no flow, several times the cost
    --sampler short       a few steps, which restart from noise in every update

Source: Grenioux, Moulines, Gabrié, "Balanced Training of Energy-Based Models with Adaptive Flow Sampling" (2023).
One run fills one directory: density.png, mode_weights.png, metrics.jsonl, config.json, and checkpoint.pt for --resume.
"""

import copy
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import losses
from densities import TOYS, gmm40, mixture
from ebflow import EBFlow, toy_flow
from judge import Truth, mixing
from layers import FullyConnected, Standardize
from sampling import alternate, tempering
from support import plots, processes, settings
from support.optimization import cosine, trainable, update_average
from support.run import Run, RunError, one_line_errors
from support.settings import setting

CLIP = 10.0  # largest norm of either gradient
FIGURES = ("loss", "grad_norm", "flow_loss", "flow_grad_norm", "acceptance", "global_acceptance")  # of a step
FINAL = {  # what is printed at the end, by judge.py; metrics.jsonl has the others, and standard errors "_se"
    "test_nll": "nats; entropy is the least that is possible",
    "entropy": "of the truth, nats",
    "test_kl": "from the truth to the model, nats",
    "log_z": "log Z by points that cover the truth",
    "flow_log_z": "log Z by draws of the flow",
    "flow_ess": "effective sample size of these draws; 1: the flow is the model",
    "weights": "of the modes in the model",
    "tv": "total variation from the true weights",
    "chains": "share of the training chains in each mode",
    "draws": "share of fresh draws in each mode",
    "crossings": "changes of mode in 1,000 steps of a chain",
    "autocorrelation_time": "steps in which a chain forgets its mode",
}


def shares(text):
    """Numbers in proportion to the weights of a mixture, as in 1,2,3,4.   -> tuple that sums to 1"""
    values = [float(value) for value in text.split(",")]
    weights = tuple(value / sum(values) for value in values)
    if not all(0 < weight <= 1 for weight in weights):
        raise ValueError  # argparse tells
    return weights


@dataclass
class Settings(settings.Settings):
    NAME = "ebm-{data}-d{dim}-{sampler}"
    data: str = setting("mixture", "density, see densities.py", choices=("mixture", "gmm40", *TOYS))
    dim: int = setting(2, "dimension of the mixture or of gmm40", least=2)
    weights: shares = setting((0.1, 0.2, 0.3, 0.4), "of the modes, as in 1,2,3,4", of=("mixture",))
    distance: float = setting(10.0, "between neighbouring modes, in standard deviations", above=0, of=("mixture",))
    sampler: str = setting("flow", "chains with jumps by a flow, without, with swaps between temperatures, or short "
                           "ones from noise", choices=("flow", "langevin", "tempering", "short"))
    start: str = setting("equal", "chains in each mode at the start: equally many, or as many as data",
                         choices=("equal", "data"), of=("mixture", "gmm40"))
    replicas: int = setting(8, "temperatures, from 1 to --hottest in equal ratios", least=2, of=("tempering",))
    hottest: float = setting(10.0, "highest temperature", above=1, of=("tempering",))
    base: str = setting("gaussian", "what exp(-f) tilts, fitted to the data", choices=("none", "gaussian", "flow"))
    adjusted: bool = setting(True, "accept or reject Langevin steps (Metropolis)", of=("flow", "langevin", "short"))
    steps: int = setting(50, "updates of θ and of α in an epoch", above=0)
    chains: int = setting(1000, "Markov chains", above=0)
    batch_size: int = setting(1000, "fresh data in a step", above=0)
    local_steps: int = setting(5, "Langevin steps before each jump", above=0)
    step_size: float = setting(0.3, "of Langevin at the start; it adapts to accept 57.4 percent", above=0)
    lr: float = setting(2e-3, "highest learning rate of the energy θ", above=0)
    flow_lr: float = setting(2e-3, "highest learning rate of the flow α", above=0)
    energy_width: int = setting(128, "units of the energy's network", above=0)
    blocks: int = setting(6, "blocks of the flow", above=0)
    width: int = setting(64, "units in the couplings' networks", above=0)
    start_steps: int = setting(300, "steps in which the flow is fitted to the data first", least=0)
    test_points: int = setting(20_000, "points of each evaluation; five times as many at the end", least=8)
    mixing_rounds: int = setting(300, "rounds of the chains at the end, in which crossings are counted", above=0)

    def recipe(self):
        return dict(local_steps=20) if self.sampler == "short" else {}


def train(s, device):
    data = density(s)
    truth = Truth(data, s.test_points, s.dim, device)
    torch.manual_seed(s.seed)
    model = make_model(s, data.sample(5000, device))
    averaged = copy.deepcopy(model)                                    # θ̃ and α̃ of EMA
    optimizer = torch.optim.Adam(trainable(model.energy), fused=True)  # θ
    flow_optimizer = torch.optim.Adam(trainable(model.flow), fused=True) if model.flow else None  # α

    parts = {"model": model, "averaged": averaged, "optimizer": optimizer, "flow_optimizer": flow_optimizer}
    T = ladder(s, device)
    state = {"chains": torch.zeros(len(T), s.chains, s.dim), "step_size": s.step_size * T}  # (T, B, D), (T,)
    run = Run(s, {name: part for name, part in parts.items() if part}, state)
    chains, step_size = (run.state[name].to(device) for name in state)
    if run.state["epoch"] < 0:
        if "flow" in (s.sampler, s.base):
            start_from(s, model, fit_flow(s, data, device))
        averaged.load_state_dict(model.state_dict())
        # By default equally many chains start in each mode, which is wrong. The sampler has to correct that.
        equally = {"equally": s.start == "equal"} if truth.modes else {}
        chains = data.sample(s.chains, device, **equally).repeat(len(T), 1, 1)

    for epoch in range(run.state["epoch"] + 1, s.epochs + 1):          # epoch 0 shows what the start alone is worth
        if epoch:
            torch.manual_seed(1_000_003 * s.seed + epoch)              # a resumed run has no generator to restore
        for i in run.watch(epoch, range(s.steps if epoch else 0)):
            n = (epoch - 1) * s.steps + i
            optimizer.param_groups[0]["lr"] = s.lr * cosine(n / (s.epochs * s.steps))
            if flow_optimizer:
                flow_optimizer.param_groups[0]["lr"] = s.flow_lr * cosine(n / (s.epochs * s.steps))
            x = data.sample(s.batch_size, device)
            chains, step_size, figures = step(s, model, chains, step_size, x, optimizer, flow_optimizer)
            update_average(trainable(averaged), trainable(model), n, m=0.99)
            run.record(figures)

        row = {"epoch": epoch, "step": epoch * s.steps} | dict.fromkeys(FIGURES) | run.means
        row |= truth.figures(averaged, chains[0]) | {"step_size": step_size[0].item()}
        state = {"epoch": epoch, "chains": chains, "step_size": step_size}
        run.save(row, state, shown=("val_kl", "tv", "ess", "acceptance", "global_acceptance"))
        for kind, flags in (("acceptance", "--step-size"), ("global_acceptance", "--start-steps, --replicas")):
            if row[kind] == 0:
                print(f"warning: {kind} 0 in epoch {epoch}, chains stand still: see {flags}, --lr", file=sys.stderr)

    truth = Truth(data, 5 * s.test_points, s.dim, device)  # also starts the random numbers of what follows
    figures = truth.figures(averaged, chains[0], "test")
    run.finish(figures | mixing(s, lambda x: move(s, averaged, x, step_size), chains, truth), FINAL)
    if figures["test_nll"] is None:
        print("warning: no Z, NLL, KL or weights: p_θ lies elsewhere than the true modes, the ESS of the points around "
              f"them is {figures['ess']:.2%}", file=sys.stderr)
    plots.save(s.out / "density.png", plots.ebm(averaged, truth, chains[0], figures["log_z"]))
    if truth.modes:
        plots.save(s.out / "mode_weights.png", plots.mode_weights(run.metrics, data))


def step(s, model, chains, step_size, x, optimizer, flow_optimizer):
    """The chains move, θ follows sml, α follows ml.   -> chains (T, B, D), step sizes (T,), {name: ()} of FIGURES"""
    chains, report = move(s, model, chains, step_size)
    figures = follow(losses.sml(model.energy, x, chains[0]), optimizer)
    figures += follow(losses.ml(model.flow.log_prob, chains[0]), flow_optimizer) if model.flow else [None, None]
    figures += [None if rate is None else rate.mean() for rate in (report.acceptance, report.global_acceptance)]
    if s.adjusted:  # θ changes while the chains run, and the best step size with it
        step_size = adapted(step_size, report)
    return chains, step_size, {name: figure for name, figure in zip(FIGURES, figures) if figure is not None}


def move(s, model, chains, step_size):
    """A round of the sampler. chains[0] is at temperature 1; only tempering has more.   -> chains (T, B, D), Report"""
    if s.sampler == "tempering":
        return tempering(model.energy, chains, ladder(s, chains.device), s.local_steps, step_size)
    x = model.start.sample(len(chains[0])) if s.sampler == "short" else chains[0]
    x, report = alternate(model.energy, model.flow, x, 1, s.local_steps, step_size[0], s.adjusted)
    return x[None], report


def adapted(step_size, report):
    """The step size after a round, a little closer to an acceptance of 0.574, see sampling.tune.   (T,) -> (T,)"""
    return step_size * (0.05 * (report.acceptance.mean(-1) - 0.574)).exp()


def ladder(s, device):
    """The temperatures, from 1 to the hottest in equal ratios.   -> (T,)"""
    return s.hottest ** torch.linspace(0, 1, s.replicas if s.sampler == "tempering" else 1, device=device)


def follow(loss, optimizer):
    """One step of the optimiser down the loss.   -> the loss and the norm of its gradient"""
    parameters = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    loss.backward(inputs=parameters)
    norm = clip_grad_norm_(parameters, CLIP)
    optimizer.step()
    return [loss.detach(), norm]


def fit_flow(s, data, device):
    """A flow fitted to the data by maximum likelihood, so that the first jumps go to every mode.   -> EBFlow"""
    flow = make_flow(s, data.sample(5000, device))
    optimizer = torch.optim.Adam(flow.parameters(), fused=True)
    for i in tqdm(range(s.start_steps), desc="the flow, to the data", leave=False, dynamic_ncols=True, disable=None):
        optimizer.param_groups[0]["lr"] = s.flow_lr * min(1.0, 2 - 2 * i / s.start_steps)
        follow(losses.ml(flow.log_prob, data.sample(s.batch_size, device)), optimizer)
    return flow


def start_from(s, model, flow):
    """The model's flow starts as this one. With --base flow so does the base, which then stays as it is."""
    for part in (model.flow, model.energy.base if s.base == "flow" else None):
        if part is not None:
            part.load_state_dict(flow.state_dict())


def density(s):
    """The density of the data, see densities.py."""
    if s.data == "mixture":
        return mixture(s.dim, s.weights, s.distance)
    return gmm40(s.dim) if s.data == "gmm40" else TOYS[s.data]()


# ---- The model -------------------------------------------------------------------------------------------------------

class Energy(nn.Module):
    """E_θ(x) = f_θ(x) - log p_base(x), f_θ a network on standardised x, up to a constant.   (B, D) -> (B,)

    The base, an EBFlow, is frozen: p_θ ∝ exp(-f_θ) p_base. f_θ grows at most linearly, so a Gaussian base makes Z_θ
    finite for every θ. Without a base only the chains that stray keep p_θ from spreading.
    """

    def __init__(self, std, mean, width, base=None):
        super().__init__()
        self.f = nn.Sequential(Standardize(std, mean), nn.Linear(len(mean), width), nn.SiLU(),
                               nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                               nn.Linear(width, 1, bias=False))  # a constant would drift: sml does not see it
        self.base = base and base.requires_grad_(False)

    def forward(self, x):
        E = self.f(x).squeeze(1)
        return E if self.base is None else E + self.base.energy(x)


class Model(nn.Module):
    """The energy; the flow that proposes jumps, or None; the Gaussian that short chains start from, as a flow."""

    def __init__(self, energy, flow, start):
        super().__init__()
        self.energy, self.flow, self.start = energy, flow, start.requires_grad_(False)


def make_model(s, x):
    """Everything at the scale of data x (n, D), nothing trained."""
    base = {"none": None, "gaussian": gaussian(x), "flow": make_flow(s, x)}[s.base]
    energy = Energy(*torch.std_mean(x, dim=0), s.energy_width, base).to(x)
    return Model(energy, make_flow(s, x) if s.sampler == "flow" else None, gaussian(x))


def gaussian(x):
    """The Gaussian with the mean and covariance of x (n, D), as a flow: u = L⁻¹(x - mean), L Lᵀ the covariance."""
    layer = FullyConnected(x.shape[1]).to(x)
    W = torch.linalg.inv(torch.linalg.cholesky(x.T.cov()))
    with torch.no_grad():
        layer.weight.copy_(W)
        layer.bias.copy_(-W @ x.mean(0))
    return EBFlow([layer], x.shape[1:])


def make_flow(s, x):
    """A flow that starts at the scale of x (n, D)."""
    std, mean = torch.std_mean(x, dim=0)
    flow = EBFlow([Standardize(std, mean), *toy_flow(x.shape[1], s.blocks, s.width).layers], x.shape[1:]).to(x)
    flow.initialize(x)
    return flow


def main(argv=None):
    s = settings.parse(Settings, argv)
    with one_line_errors(torch.linalg.LinAlgError), processes.joined(s.device) as (device, *_):
        if s.dim > 2 and s.data in TOYS:
            raise RunError(f"--dim must be 2 for --data {s.data}, not {s.dim}")
        train(s, device)


if __name__ == "__main__":
    main()
