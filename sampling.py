"""Markov chains on any energy: samples of π(x) = exp(-E(x)) / Z, and what they are worth.

`energy` is a callable (B, …) -> (B,), as in losses.py. A batch x is B independent chains; what comes back has its
device and dtype. `where`, boolean, is True at the coordinates that move (None: all) and broadcasts over x.

    kernel         x' is proposed by                   leaves π invariant   crosses between distant modes
    langevin       N(x - a∇E(x), 2aI), always taken    up to O(a)           no
    mala           the same, taken or rejected         exactly              no
    independence   a flow q, taken or rejected         exactly              yes, the more often the closer q is to π

`alternate` has both: local steps explore a mode, global ones give the modes their weights. Rejection makes a kernel
reversible (Metropolis et al. 1953, Hastings 1970), whatever the proposal q(x'|x) is:

    α(x → x') = min(1, π(x') q(x|x') / (π(x) q(x'|x)))   gives   π(x) q(x'|x) α(x → x') = π(x') q(x|x') α(x' → x)

Z cancels. Acceptance is counted on the device: the host looks before and after the steps of a call or round only.
"""

import math
from typing import NamedTuple

import torch


class SamplingError(ValueError):
    """Chains cannot start, or got nowhere, or there is nothing to sample; the message says what to change."""


class Report(NamedTuple):
    """The step size, and the share of accepted proposals of each chain, None where none could be rejected."""
    step_size: float
    acceptance: torch.Tensor | None = None         # (B,) of the Langevin proposals
    global_acceptance: torch.Tensor | None = None  # (B,) of the flow's proposals

    def __str__(self):
        shares = {"acceptance": self.acceptance, "global acceptance": self.global_acceptance}
        return f"step size {self.step_size:.3g}" + "".join(
            f", {name} {share.mean():.3f} ({share.min():.3f} to {share.max():.3f} by chain)"
            for name, share in shares.items() if share is not None)


# ---------------------------------------------------------------------------------------------------------
# Local steps: Langevin
# ---------------------------------------------------------------------------------------------------------


def langevin(energy, x, steps, step_size, where=None):
    """Unadjusted Langevin (ULA): x ← x - a∇E(x) + √(2a) z, z ~ N(0, I), `steps` times.   (B, …) -> (B, …)

    What it leaves invariant differs from π by O(a): of N(0, s²) it draws with the variance s² / (1 - a/(2s²)).
    Raises SamplingError where a chain starts at a non-finite energy or becomes non-finite itself.
    """
    x = x.detach()
    for step in range(steps):
        E, grad = _energy_and_grad(energy, x, where)
        if step == 0:
            _check_start(E, step_size)
        x = _propose(x, grad, step_size, where)
    lost = ~x.flatten(1).isfinite().all(1)  # at the end is soon enough: there is no way back from inf or nan
    if _any(lost):
        raise SamplingError(f"{lost.sum()} of {len(x)} chains became non-finite in {steps} Langevin steps "
                            f"of size {step_size:.3g}: lower step_size")
    return x


def mala(energy, x, steps, step_size, where=None):
    """Metropolis-adjusted Langevin (Roberts and Tweedie 1996); π is invariant.   (B, …) -> (B, …), Report

    A proposal with an energy that is nan or infinite is rejected. Raises SamplingError where a chain starts at such
    an energy, or if all chains rejected everything in 10 steps or more.
    """
    x, accepted, _ = _mala(energy, x, steps, step_size, where)
    _check_accepted(accepted, steps, step_size)
    return x, Report(step_size, accepted / steps)


def tune(energy, x, steps, step_size, target=0.574, where=None):
    """`mala` while the step size, one for all chains, adapts to accept `target`.   (B, …) -> (B, …), step size ()

        log a ← log a + t^(-0.6) · (mean α - target),   t = 1, 2, …      (Robbins and Monro 1951)

    For burn-in only. A step size that depends on the past makes the next state depend on it, so this is no Markov
    chain, and π is not invariant; go on with `mala` at the step size that is returned. 0.574 is the most efficient
    acceptance in high dimensions (Roberts and Rosenthal 1998).
    """
    x, accepted, step_size = _mala(energy, x, steps, step_size, where, target)
    _check_accepted(accepted, steps, step_size)
    return x, step_size


def impute(energy, x, mask, steps, step_size, adjusted=False, start=None):
    """Draws what is missing given what is observed: Langevin on the missing coordinates.   (B, …) -> (B, …), Report

    mask, boolean, is True where x is MISSING; of x's shape, or of one event's for the whole batch. What x holds there,
    zeros or nan, is not looked at: the chains start at `start`, like x, or else at N(0, I). To go on with chains, pass
    start=x. What is observed comes back bit for bit. `adjusted` takes `mala` instead of `langevin`.
    """
    mask = _check_mask(mask, x)
    x = torch.where(mask, torch.randn_like(x) if start is None else start.to(x), x)
    if adjusted:
        return mala(energy, x, steps, step_size, where=mask)
    return langevin(energy, x, steps, step_size, where=mask), Report(step_size)


# ---------------------------------------------------------------------------------------------------------
# Global steps: a flow proposes
# ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def independence(energy, flow, x):
    """One step of independence Metropolis-Hastings: x' ~ q, wherever x is.   (B, …) -> (B, …), accepted (B,)

        log α = min(0, [-E(x') - log q(x')] - [-E(x) - log q(x)])

    `flow` is anything with sample(n) -> (n, …) and log_prob(x) -> (n,). It may be wrong, but no mode may be missing.
    """
    x_new = flow.sample(len(x)).to(x)
    E = _energy(energy, x)
    _check_start(E)
    accept, _ = _accept(E, _energy(energy, x_new), log_forth=flow.log_prob(x_new), log_back=flow.log_prob(x))
    return _select(accept, x_new, x), accept


def alternate(energy, flow, x, rounds, local_steps, step_size, adjusted=True):
    """Rounds of `local_steps` Langevin steps, then one global step of the flow.   (B, …) -> (B, …), Report

    `adjusted` takes `mala`, else `langevin`; with flow=None the steps are local only. Source: Gabrié, Rotskoff and
    Vanden-Eijnden, "Adaptive Monte Carlo augmented with normalizing flows" (2022).
    """
    accepted, jumped = torch.zeros(2, len(x), device=x.device)
    for _ in range(rounds):
        if adjusted:
            x, accept, _ = _mala(energy, x, local_steps, step_size)
            accepted += accept
        else:
            x = langevin(energy, x, local_steps, step_size)
        if flow is not None:
            x, jump = independence(energy, flow, x)
            jumped += jump
    if adjusted:
        _check_accepted(accepted, rounds * local_steps, step_size)
    return x, Report(step_size, accepted / (rounds * local_steps) if adjusted else None,
                     jumped / rounds if flow is not None else None)


# ---------------------------------------------------------------------------------------------------------
# What the draws are worth
# ---------------------------------------------------------------------------------------------------------


def effective_sample_size(log_weights):
    """(Σ w)² / Σ w²: n where the weights are equal, 1 where one has it all.   (n,) -> ()"""
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp()


class LogZ(NamedTuple):
    """log Z in nats, its standard error √(1/ESS - 1/n), the ESS; `reliable` where ESS ≥ 100: an error below 0.1."""
    log_z: torch.Tensor                  # ()
    standard_error: torch.Tensor         # ()
    effective_sample_size: torch.Tensor  # ()
    reliable: torch.Tensor               # () bool


@torch.no_grad()
def log_z(energy, flow, n):
    """log Z = log E_q[ exp(-E(x)) / q(x) ] from n draws of the flow q: importance sampling.   -> LogZ

    Error and ESS come from the same draws: neither knows of a mode that q never visits.
    """
    x = flow.sample(n)
    log_weights = -_energy(energy, x) - flow.log_prob(x)
    ess = effective_sample_size(log_weights)
    return LogZ(log_weights.logsumexp(0) - math.log(n), (1 / ess - 1 / n).clamp(min=0).sqrt(), ess, ess >= 100)


def autocorrelation_time(series, window=5):
    """τ = 1 + 2 Σ_{t=1…M} ρ_t with the least M ≥ window · max(τ(M), 1)   (Sokal 1997).   (T, B) -> ()

    The mean of the series is worth that of T·B/τ independent draws. Believe it where T ≥ 50 τ. ρ is averaged over the
    chains, around the mean of them all and not each one's own: chains which never leave their modes have τ ~ T.
    """
    T = len(series)
    spectrum = torch.fft.rfft(series - series.mean(), n=2 * T, dim=0)  # twice the length: lags do not wrap around
    covariance = torch.fft.irfft(spectrum.abs().square(), n=2 * T, dim=0)[:T].mean(1)  # (T,) by lag
    taus = 2 * (covariance / covariance[0]).cumsum(0) - 1  # τ(M) by M
    enough = torch.arange(T, device=series.device) >= window * taus.clamp(min=1)
    enough[-1] = True
    return taus.take(enough.int().argmax())  # the first


# ---------------------------------------------------------------------------------------------------------
# The steps themselves
# ---------------------------------------------------------------------------------------------------------


def _mala(energy, x, steps, a, where=None, target=None):
    """-> x (B, …), the number of accepted steps (B,), the step size. One energy and gradient for each step."""
    x = x.detach()
    E, grad = _energy_and_grad(energy, x, where)
    _check_start(E, a)
    accepted = torch.zeros(len(x), device=x.device)
    for t in range(1, steps + 1):
        x_new = _propose(x, grad, a, where)
        E_new, grad_new = _energy_and_grad(energy, x_new, where)
        accept, alpha = _accept(E, E_new, _log_q(x_new, x, grad, a), _log_q(x, x_new, grad_new, a))
        x, E, grad = (_select(accept, *pair) for pair in ((x_new, x), (E_new, E), (grad_new, grad)))
        accepted += accept
        if target is not None:
            a = a * (t**-0.6 * (alpha.mean() - target)).exp()
    return x, accepted, a


def _propose(x, grad, a, where):
    """x' = x - a∇E(x) + √(2a) z"""
    x_new = x - a * grad + (2 * a) ** 0.5 * torch.randn_like(x)
    return x_new if where is None else torch.where(where, x_new, x)


def _log_q(x_new, x, grad, a):
    """log q(x'|x) = -‖x' - x + a∇E(x)‖² / (4a) + constant.   -> (B,)"""
    return -(x_new - x + a * grad).flatten(1).square().sum(1) / (4 * a)


def _accept(E, E_new, log_forth, log_back):
    """log α = min(0, [-E(x') + log q(x|x')] - [-E(x) + log q(x'|x)]).   (B,) each -> accepted (B,), α (B,)

    log_forth is log q(x'|x), log_back is log q(x|x'). What is nan or infinite, with either sign, is rejected.
    """
    log_alpha = (-E_new + log_back) - (-E + log_forth)
    alpha = torch.where(log_alpha.isfinite(), log_alpha.clamp(max=0).exp(), 0.0)
    return torch.rand_like(alpha) < alpha, alpha


def _select(accept, new, old):
    """new where accepted, else old.   (B,), (B, …), (B, …) -> (B, …)"""
    return torch.where(accept.view(-1, *[1] * (old.dim() - 1)), new, old)


def _energy(energy, x):
    E = energy(x)
    if E.shape != x.shape[:1]:  # (B, 1) would broadcast to (B, B)
        raise SamplingError(f"the energy must be one number for each sample, of shape ({len(x)},), "
                            f"not {tuple(E.shape)}")
    return E


@torch.enable_grad()
def _energy_and_grad(energy, x, where=None):
    """E(x), and ∇E(x) with 0 at the coordinates that do not move.   (B, …) -> (B,), (B, …)"""
    x = x.detach().requires_grad_()
    E = _energy(energy, x)
    grad, = torch.autograd.grad(E.sum(), x)
    return E.detach(), grad if where is None else torch.where(where, grad, 0.0)


# ---------------------------------------------------------------------------------------------------------
# The checks
# ---------------------------------------------------------------------------------------------------------


def _any(bad):
    return not bad.is_meta and bool(bad.any())


def _check_start(E, step_size=1.0):
    if isinstance(step_size, (int, float)) and not step_size > 0:
        raise SamplingError(f"step_size must be positive, not {step_size}")
    bad = ~E.isfinite()
    if _any(bad):
        raise SamplingError(f"the energy is not finite where {bad.sum()} of {len(E)} chains start: start them "
                            "elsewhere, or lower the step_size that led there")


def _check_accepted(accepted, steps, step_size):
    if steps >= 10 and _any((accepted == 0).all()):
        raise SamplingError(f"all {steps} proposals of all {len(accepted)} chains were rejected at step size "
                            f"{step_size:.3g}: lower step_size")


def _check_mask(mask, x):
    """The mask in x's shape."""
    if mask.dtype != torch.bool:
        raise SamplingError(f"the mask must be boolean, True where x is missing, not {mask.dtype}")
    if mask.shape not in (x.shape, x.shape[1:]):
        raise SamplingError(f"the mask must have the shape of x, {tuple(x.shape)}, or of one event, "
                            f"{tuple(x.shape[1:])}, not {tuple(mask.shape)}")
    mask = mask.expand_as(x)
    for missing, bad in (("nothing", ~mask.flatten(1).any(1)), ("everything", mask.flatten(1).all(1))):
        if _any(bad):
            raise SamplingError(f"{missing} is missing in {bad.sum()} of {len(x)} samples, the first of them "
                                f"{bad.int().argmax()}: impute needs something observed and something missing in each")
    return mask
