"""How good an energy is where the truth is known: Z, KL divergence, the weights of its modes, and how its chains mix.

`model` has .energy, a callable (B, D) -> (B,), and .flow, which is None or has sample(n) and log_prob(x). The density
p_θ = exp(-E_θ)/Z_θ itself is measured: chains that never change their modes say nothing about the weights that it has.
"""

import math

import torch

from data import Mixture
from sampling import alternate, autocorrelation_time, effective_sample_size, estimate_log_z
from support.plots import lattice


class Truth:
    """The true density p, test draws that nothing was trained on, and points for integrals: ∫ f dx ≈ Σ_i v_i f(x_i).

        D = 2   a lattice; v_i is the area of a cell. The error is below 0.001 for modes as wide as these.
        D > 2   n draws x_i ~ r, v_i = 1/(n r(x_i)): importance sampling. r has the true modes, equally often, with 1,
                1.15 and 1.5 times their width.

    The points come neither from the chains nor from the flow, and are the same for every sampler. For D > 2 they miss
    mass far from all true modes: Z is then too small, and the KL divergence negative.
    """

    def __init__(self, data, n, dim, device):
        torch.manual_seed(-1)  # none that training uses
        self.data, self.modes = data, isinstance(data, Mixture)
        self.test = data.sample(n, device)
        if dim == 2:
            limit, side = 6 * self.test.std().item(), 192
            self.x = lattice(limit, side, self.test).flatten(0, 1)
            self.log_v = torch.full_like(self.x[:, 0], 2 * math.log(2 * limit / (side - 1))).double()
            self.log_p = self.log_v + self.data.log_prob(self.x)  # exp of it sums to 1
        else:
            K, widths = len(data.means), torch.tensor([1, 1.15, 1.5]).repeat_interleave(len(data.means))
            r = Mixture(torch.full((3 * K,), 1 / (3 * K)), data.means.repeat(3, 1), data.std.repeat(3) * widths)
            self.x = r.sample(n, device)
            self.log_v, self.log_p = -r.log_prob(self.x).double() - math.log(n), None

    @torch.no_grad()
    def figures(self, model, chains):
        """log Z, held-out NLL and KL in nats, mode weights; log Z estimated by the flow, with its ESS for a draw."""
        log_test, log_w = (-energies(model, x).double() for x in (self.test, self.x))
        log_w = log_w + self.log_v  # log v_i exp(-E(x_i))
        log_model, log_test = log_w - log_w.logsumexp(0), log_test - log_w.logsumexp(0)
        ratio = self.data.log_prob(self.test).double() - log_test  # log p/p_θ at draws of p
        row = {"log_z": log_w.logsumexp(0).item(), "val_nll": -log_test.mean().item()}
        if self.log_p is not None:
            row |= {"val_kl": torch.sum(self.log_p.exp() * (self.log_p - log_model)).item(),
                    "entropy": -torch.sum(self.log_p.exp() * (self.log_p - self.log_v)).item()}
        else:
            row |= {"val_kl": ratio.mean().item(), "val_kl_se": (ratio.std() / len(ratio) ** 0.5).item(),
                    "entropy": -self.data.log_prob(self.test).mean().item(),
                    "ess": (effective_sample_size(log_w) / len(log_w)).item()}
        if self.modes:
            true = self.data.weights.to(log_model)
            weights = torch.zeros_like(true).index_add(0, self.data.mode(self.x), log_model.exp())
            row |= {"weights": weights.tolist(), "tv": 0.5 * (weights - true).abs().sum().item(),
                    "chains": (self.data.mode(chains).bincount(minlength=len(true)) / len(chains)).tolist()}
        if model.flow is not None:
            z = estimate_log_z(model.energy, model.flow, len(self.test) // 4)
            row |= {"flow_log_z": z.log_z.item() if z.reliable else None,
                    "flow_log_z_se": z.standard_error.item() if z.reliable else None,
                    "flow_ess": 4 * z.effective_sample_size.item() / len(self.test)}
        return row


def energies(model, x):
    return torch.cat([model.energy(batch) for batch in x.split(8192)])


def mixing(s, model, chains, step_size, truth):
    """Changes of mode in 1,000 steps of a chain, and τ, the steps in which it forgets its mode. A jump is one step.

    τ is the largest over the modes k of the autocorrelation times of [the chain is in mode k], None if no chain leaves
    one. It is reliable where the chains were followed for 50 τ. Short chains are continued here like the others.
    """
    if not truth.modes:
        return {}
    modes = [truth.data.mode(chains[:200])]
    for _ in range(s.mixing_rounds):
        chains, _ = alternate(model.energy, model.flow, chains[:200], 1, s.local_steps, step_size, s.adjusted)
        modes.append(truth.data.mode(chains))
    modes = torch.stack(modes)  # (rounds + 1, 200)
    steps = s.local_steps + (model.flow is not None)  # of a round
    visited = modes.unique()
    taus = [autocorrelation_time((modes == k).double()).item() for k in visited if len(visited) > 1]
    return {"crossings": (modes[1:] != modes[:-1]).double().mean().item() / steps * 1000,
            "autocorrelation_time": steps * max(taus) if taus else None, "followed": steps * s.mixing_rounds}
