# An unofficial version of EBFlow (arXiv 2305.15267, 2306.00684). MIT licence, copyright (c) 2026 its contributors.
"""Markov chains on any energy: draws from π(x) = exp(-E(x)) / Z, and how good the draws are.

`energy` is a callable (B, …) -> (B,), as in losses.py. A batch x is B independent chains; the result has its device and
dtype. `where`, boolean, is True at the coordinates that move (None: all) and broadcasts with x.

    kernel         proposes x' from                 leaves π invariant   crosses between distant modes
    langevin       N(x - a∇E(x), 2aI)               up to O(a)           no
    mala           the same, accepts or rejects     exactly              no
    independence   a flow q, accepts or rejects     exactly              yes, more often where q is closer to π
    tempering      swaps with hotter chains         exactly              yes, at the cost of the hotter chains

`alternate` combines two: local steps explore a mode, global steps give the modes their weights. Accepting x' with the
probability α makes a kernel reversible for every proposal q(x'|x) (Metropolis et al. 1953, Hastings 1970):

    α(x → x') = min(1, π(x') q(x|x') / (π(x) q(x'|x)))   gives   π(x) q(x'|x) α(x → x') = π(x') q(x|x') α(x' → x)

Z cancels. π is invariant only for a FIXED energy and flow. Chains that run while these are trained lag behind π. A
chain becomes nan where it diverges, starts at a non-finite energy, or reaches one by unadjusted steps.
"""

import math
from typing import NamedTuple

import torch


class Report(NamedTuple):
    """The step size, and the acceptance rate of each chain. A rate is None if no step of that kind can be rejected."""
    step_size: float | torch.Tensor                # (T,) in tempering
    acceptance: torch.Tensor | None = None         # (B,) of mala; (T, B) in tempering
    global_acceptance: torch.Tensor | None = None  # (B,) of independence; (T - 1, B) of the swaps in tempering


# ---- Local steps: Langevin dynamics ----------------------------------------------------------------------------------

def langevin(energy, x, steps, step_size, where=None):
    """Unadjusted Langevin (ULA): x ← x - a∇E(x) + √(2a) z, z ~ N(0, I), `steps` times.   (B, …) -> (B, …)

    Its invariant distribution is π only up to O(a). For example, π = N(0, s²) becomes N(0, s² / (1 - a/(2s²))).
    """
    x = x.detach()
    for _ in range(steps):
        E, grad = _energy_and_grad(energy, x, where)
        x = _propose(_lost(x, E), grad, step_size, where)
    return x


def mala(energy, x, steps, step_size, where=None, target=None):
    """Metropolis-adjusted Langevin algorithm (MALA; Roberts and Tweedie 1996).   (B, …) -> (B, …), Report

    It leaves π invariant for a fixed energy. It rejects a proposal with a non-finite energy. Each step computes the
    energy and its gradient once. The step size stays as it is without a `target`, for which see `tune`.
    """
    E, grad = _energy_and_grad(energy, x, where)
    x, accepted = _lost(x.detach(), E), torch.zeros(len(x), device=x.device)
    for t in range(1, steps + 1):
        x_new = _propose(x, grad, step_size, where)
        E_new, grad_new = _energy_and_grad(energy, x_new, where)
        accept, alpha = _accept(E, E_new, _log_q(x_new, x, grad, step_size), _log_q(x, x_new, grad_new, step_size))
        x, E, grad = (_select(accept, *pair) for pair in ((x_new, x), (E_new, E), (grad_new, grad)))
        accepted += accept
        if target is not None:
            step_size = step_size * (t**-0.6 * (alpha.mean() - target)).exp()
    return x, Report(step_size, accepted / steps)


def tune(energy, x, steps, step_size, target=0.574, where=None):
    """`mala` while one step size for all chains adapts to the acceptance `target`.   (B, …) -> (B, …), step size ()

        log a ← log a + t^(-0.6) · (mean α - target),   t = 1, 2, …      (Robbins and Monro 1951)

    For burn-in only: the step size depends on the past of the chains, so π is not invariant. Go on with `mala` at the
    step size returned. 0.574 is the most efficient acceptance in high dimensions (Roberts and Rosenthal 1998).
    """
    x, report = mala(energy, x, steps, step_size, where, target)
    return x, report.step_size


def impute(energy, x, mask, steps, step_size, adjusted=False, start=None):
    """Draws the missing coordinates given the observed ones, by Langevin steps.   (B, …) -> (B, …), Report

    mask, boolean, is True where x is MISSING. It has the shape of x, or of one event for all. The values of x there are
    ignored. Chains start at `start`, like x, by default at N(0, I); start=x continues earlier chains. The observed
    values of a chain that is not lost come back bit for bit. The steps are `mala` if `adjusted`, else `langevin`.
    """
    mask = mask.expand_as(x)
    x = torch.where(mask, torch.randn_like(x) if start is None else start.to(x).view_as(x), x)
    if adjusted:
        return mala(energy, x, steps, step_size, where=mask)
    return langevin(energy, x, steps, step_size, where=mask), Report(step_size)


# ---- Global steps: a flow proposes -----------------------------------------------------------------------------------

@torch.no_grad()
def independence(energy, flow, x):
    """One step of Metropolis-Hastings with proposals x' ~ q independent of x.   (B, …) -> (B, …), accepted (B,) bool

        log α = min(0, [-E(x') - log q(x')] - [-E(x) - log q(x)])

    `flow` is anything with sample(n) -> (n, …) and log_prob(x) -> (n,). For a fixed energy and a fixed flow, π is
    invariant even if q is a poor fit. But the step never reaches a mode that q misses.
    """
    x_new = flow.sample(len(x)).to(x).view_as(x)
    E, E_new = (values(energy, at) for at in (x, x_new))
    log_forth, log_back = (values(flow.log_prob, to) for to in (x_new, x))
    accept, _ = _accept(E, torch.where(_exact(E_new, log_forth), E_new, math.inf), log_forth, log_back)
    return _select(accept, x_new, _lost(x, E)), accept


def alternate(energy, flow, x, rounds, local_steps, step_size, adjusted=True):
    """`rounds` times: `local_steps` Langevin steps, then one global step of the flow.   (B, …) -> (B, …), Report

    The local steps are `mala` if `adjusted`, else `langevin`. flow=None: no global steps. Source: Gabrié, Rotskoff and
    Vanden-Eijnden, "Adaptive Monte Carlo augmented with normalizing flows" (2022).
    """
    accepted, jumped = torch.zeros(2, len(x), device=x.device)
    for _ in range(rounds):
        if adjusted:
            x, report = mala(energy, x, local_steps, step_size)
            accepted += report.acceptance
        else:
            x = langevin(energy, x, local_steps, step_size)
        if flow is not None:
            x, jump = independence(energy, flow, x)
            jumped += jump
    return x, Report(step_size, accepted / rounds if adjusted else None, jumped / rounds if flow is not None else None)


# ---- Global steps: hotter chains -------------------------------------------------------------------------------------

def tempering(energy, x, temperatures, steps, step_sizes):
    """A round of parallel tempering (replica exchange): `steps` of mala at each of n temperatures, then swaps.

        π_t(x) ∝ exp(-E(x) / T_t), 1 = T_1 < … < T_n,      log α = min(0, (1/T_t - 1/T_{t+1}) (E(x_t) - E(x_{t+1})))

    Hot chains cross between modes. A swap of neighbours, accepted with the probability α, hands their states down. The
    product of all π_t is invariant, so x[0] has the distribution π if T_1 is 1. A round evaluates the energy
    `steps` + 2 times for each chain.   x (n, B, …), temperatures and step_sizes (n,) -> x (n, B, …), Report

    Source: Geyer, "Markov chain Monte Carlo maximum likelihood" (1991).
    """
    n, T = len(x), temperatures
    x, acceptance = x.detach().clone(), torch.zeros(x.shape[:2], device=x.device)
    for t, (temperature, step_size) in enumerate(zip(T, step_sizes, strict=True)):
        x[t], (_, acceptance[t], _) = mala(lambda x: values(energy, x) / temperature, x[t], steps, step_size)
    with torch.no_grad():
        E = torch.stack([values(energy, replica) for replica in x])  # (n, B)
    swapped = torch.zeros_like(acceptance[1:])
    for t in [*range(0, n - 1, 2), *range(1, n - 1, 2)]:
        accept, _ = _accept(E[t] / T[t] + E[t + 1] / T[t + 1], E[t + 1] / T[t] + E[t] / T[t + 1], 0, 0)
        swapped[t] = accept
        for state in (x, E):
            state[t], state[t + 1] = _select(accept, state[t + 1], state[t]), _select(accept, state[t], state[t + 1])
    return x, Report(step_sizes, acceptance, swapped)


# ---- How good the draws are ------------------------------------------------------------------------------------------

def log_weights(energy, flow, x):
    """log( exp(-E(x)) / q(x) ) for draws x of the flow q; -inf where it is not _exact.   (n, …) -> (n,)"""
    E, log_q = values(energy, x), values(flow.log_prob, x)
    return torch.where(_exact(E, log_q), -E - log_q, -math.inf)


def effective_sample_size(log_weights):
    """ESS = (Σ w)² / Σ w²: n if all importance weights w are equal, 1 if all but one are 0 (Kong 1992).   (n,) -> ()"""
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp()


class LogZEstimate(NamedTuple):
    """An estimate of log Z in nats, its standard error √(1/ESS - 1/n), and the ESS; 100 of that are `enough`."""
    log_z: torch.Tensor                  # ()
    standard_error: torch.Tensor         # ()
    effective_sample_size: torch.Tensor  # ()
    enough: torch.Tensor                 # () bool


@torch.no_grad()
def estimate_log_z(energy, flow, n):
    """log Z = log E_q[ exp(-E(x)) / q(x) ], by importance sampling with n draws of the flow q.   -> LogZEstimate

    Error and ESS come from the same draws, so they miss a mode that q never visits. `reverse_log_z` shows it.
    """
    log_w = log_weights(energy, flow, flow.sample(n))
    n, ess = len(log_w), effective_sample_size(log_w)
    error = (1 / ess - 1 / n).clamp(min=0).sqrt()
    return LogZEstimate(log_w.logsumexp(0) - math.log(n), error, ess, ess >= 100)


@torch.no_grad()
def reverse_log_z(energy, flow, x):
    """log Z = -log E_p[ q(x) exp(E(x)) ] by draws x of p = exp(-E)/Z, such as the states of chains.   (n, …) -> ()

    Where q misses a mode, `estimate_log_z` leaves out its mass, and this estimate does not: they disagree. Where the
    chains miss it as well, both do.
    """
    return math.log(len(x)) - (-log_weights(energy, flow, x)).logsumexp(0)


def autocorrelation_time(series, window=5):
    """τ = 1 + 2 Σ_{t=1…M} ρ_t with the smallest M ≥ window · max(τ(M), 1)   (Sokal 1997).   (T, B) -> ()

    The mean of the series is as accurate as that of T·B/τ independent draws. τ is reliable if T ≥ 50 τ. ρ is averaged
    over the chains, and taken around their common mean: chains that never leave their modes have τ ~ T.
    """
    T = len(series)
    spectrum = torch.fft.rfft(series - series.mean(), n=2 * T, dim=0)  # twice the length: lags do not wrap around
    covariance = torch.fft.irfft(spectrum.abs().square(), n=2 * T, dim=0)[:T].mean(1).view(T)  # by lag
    taus = 2 * (covariance / covariance[0]).cumsum(0) - 1  # τ(M) by M
    enough = torch.arange(T, device=series.device) >= window * taus.clamp(min=1)
    enough[-1] = True
    return taus.take(enough.int().argmax())  # the first such M


# ---- One step --------------------------------------------------------------------------------------------------------

def values(f, x):
    """f(x), one number for each sample, as in losses.py. A mean, or (B, 1), would broadcast.   (B, …) -> (B,)"""
    y = f(x)
    if y.shape != x.shape[:1]:
        raise ValueError(f"an energy or a log-density maps (B, …) to (B,), ({len(x)},), not to {tuple(y.shape)}")
    return y


def _lost(x, E):
    """x, with nan for chains at a non-finite energy. They accept no proposal, and would stay there unnoticed."""
    return _select(E.isfinite(), x, torch.full_like(x, torch.nan))


def _propose(x, grad, a, where):
    """x' = x - a∇E(x) + √(2a) z"""
    x_new = x - a * grad + (2 * a) ** 0.5 * torch.randn_like(x)
    return x_new if where is None else torch.where(where.expand_as(x), x_new, x)


def _log_q(x_new, x, grad, a):
    """log q(x'|x) = -‖x' - x + a∇E(x)‖² / (4a) + constant.   -> (B,)"""
    return (-(x_new - x + a * grad).flatten(1).square().sum(1, keepdim=True) / (4 * a)).view(len(x))


def _exact(E, log_q):
    """Whether rounding leaves a digit of E(x) + log q(x) at a draw x of a flow.   (B,), (B,) -> (B,) bool

    A flow that divides by small scales makes a few draws far away. There g(g⁻¹(u)) loses all digits of u. Then log q(x)
    may come out as -10²³, and the draw would be accepted, or take all of the weight.
    """
    return torch.maximum(E.abs(), log_q.abs()) * torch.finfo(log_q.dtype).eps < 1


def _accept(E, E_new, log_forth, log_back):
    """log α = min(0, [-E(x') + log q(x|x')] - [-E(x) + log q(x'|x)]).   (B,) each -> accepted (B,), α (B,)

    log_forth is log q(x'|x), log_back is log q(x|x'). If log α is nan or ±inf, x' is rejected.
    """
    log_alpha = (-E_new + log_back) - (-E + log_forth)
    alpha = torch.where(log_alpha.isfinite(), log_alpha.clamp(max=0).exp(), 0.0)
    return torch.rand_like(alpha) < alpha, alpha


def _select(accept, new, old):
    """new where `accept`, else old.   (B,), (B, …), (B, …) -> (B, …)"""
    return torch.where(accept.view(-1, *[1] * (old.dim() - 1)), new, old)


@torch.enable_grad()
def _energy_and_grad(energy, x, where=None):
    """E(x) and ∇E(x), which is set to 0 at the coordinates that do not move.   (B, …) -> (B,), (B, …)"""
    x = x.detach().requires_grad_()
    E = values(energy, x)
    grad, = torch.autograd.grad(E.sum(), x)
    return E.detach(), grad if where is None else torch.where(where, grad, 0.0)
