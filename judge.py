"""How good an energy is where the truth is known: Z, KL divergence, the weights of its modes, and how its chains mix.

`model` has .energy, a callable (B, D) -> (B,), and .flow, which is None or has sample(n) and log_prob(x). The density
p_θ = exp(-E_θ)/Z_θ itself is measured: chains that never change their modes say nothing about the weights that it has.
"""

import math

import torch

from densities import Mixture
from sampling import autocorrelation_time, effective_sample_size, estimate_log_z, reverse_log_z
from support.plots import lattice


class Truth:
    """The true density p, test draws that nothing was trained on, and points for integrals: ∫ f dx ≈ Σ_i v_i f(x_i).

        D = 2   a lattice; v_i is the area of a cell. The error is below 0.001 for modes as wide as these.
        D > 2   n draws x_i ~ r, v_i = 1/(n r(x_i)). r has the true modes equally often, 1, 1.15 and 1.5 times as wide.

    The points come neither from the chains nor from the flow, and are the same for every sampler. For D > 2 they miss
    mass far from all true modes: Z is then too small, and the KL divergence negative.
    """

    def __init__(self, data, n, dim, device):
        torch.manual_seed(-1)  # none that training uses
        self.data, self.modes, self.lattice = data, isinstance(data, Mixture), dim == 2
        self.test = data.sample(n, device)
        if self.lattice:
            limit, side = 2 * self.test.abs().max().item(), 192
            self.x = lattice(limit, side, self.test).flatten(0, 1)
            self.log_v = torch.full_like(self.x[:, 0], 2 * math.log(2 * limit / (side - 1))).double()
        else:
            K, widths = len(data.means), torch.tensor([1, 1.15, 1.5]).repeat_interleave(len(data.means))
            r = Mixture(torch.full((3 * K,), 1 / (3 * K)), data.means.repeat(3, 1), data.std.repeat(3) * widths)
            self.x = r.sample(n, device)
            self.log_v = -r.log_prob(self.x).double() - math.log(n)
        self.log_p = self.log_v + data.log_prob(self.x).double()  # log v_i p(x_i)
        self.w = data.weights.to(self.log_p) if self.modes else self.log_p.new_ones(1)  # (K,)
        self.in_mode = data.responsibilities(self.x).log() if self.modes else torch.zeros_like(self.log_p)[:, None]
        self.entropy = -(torch.sum(self.log_p.exp() * (self.log_p - self.log_v)) if self.lattice
                         else data.log_prob(self.test).double().mean()).item()

    @torch.no_grad()
    def figures(self, model, chains, split="val"):
        """log Z, held-out NLL and KL in nats, mode weights, their errors; log Z by the flow, from both sides.   -> dict

        Every integral is divided by the same integral of the truth, whose value is known. P(k | x) is the truth's:

            Z_k = w_k · Σ_i v_i P(k | x_i) exp(-E(x_i)) / Σ_i v_i P(k | x_i) p(x_i),     Z = Σ_k Z_k

        The weight of mode k is Z_k / Z. So the true density is judged without an error. Standard errors ("se") come
        from the delta method; that of the total variation "tv" is an upper bound. Where the effective sample size
        "ess" is below 1 % of the points, p_θ lies elsewhere: then Z, NLL, KL and weights are None.
        """
        log_test, log_q = (-torch.cat([model.energy(batch) for batch in x.split(8192)]).double()
                           for x in (self.test, self.x))
        log_q, log_p, in_mode = log_q + self.log_v, self.log_p, self.in_mode  # (n,), (n,), log P(k | x_i) (n, K)
        A, B = ((in_mode + log[:, None]).logsumexp(0) for log in (log_q, log_p))  # (K,)
        log_z = (self.w.log() + A - B).logsumexp(0)
        weights = self.w * (A - B - log_z).exp()
        d = (in_mode + log_q[:, None] - A).exp() - (in_mode + log_p[:, None] - B).exp()  # ∂ log Z_k of point i, (n, K)
        d = d * (not self.lattice)  # whose points are not random
        log_z_se, weights_se = (d @ weights).norm(), weights * (d - (d @ weights)[:, None]).norm(dim=0)
        row = {"log_z": log_z.item(), "log_z_se": log_z_se.item(), f"{split}_nll": (log_z - log_test.mean()).item()}
        if self.lattice:
            p = log_p.exp()  # sums to 1
            row |= {f"{split}_kl": torch.sum(p * (log_p - log_q + log_z)).item(), f"{split}_kl_se": 0.0}
        else:
            ratio = self.data.log_prob(self.test).double() - log_test + log_z  # log p/p_θ at draws of p
            row |= {f"{split}_kl": ratio.mean().item(),
                    f"{split}_kl_se": math.hypot(ratio.std() / len(ratio) ** 0.5, log_z_se)}
        if self.modes:
            row |= {"weights": weights.tolist(), "tv": total_variation(weights, self.w),
                    "tv_se": weights_se.sum().item() / 2}
        ess = effective_sample_size(log_q).item() / len(log_q)
        if not (self.lattice or ess >= 0.01):
            row = dict.fromkeys(row)
        row |= {"ess": None if self.lattice else ess, "entropy": self.entropy}
        if self.modes:
            row["chains"] = self.data.responsibilities(chains).mean(0).tolist()
        if model.flow is not None:
            z = estimate_log_z(model.energy, model.flow, len(self.test) // 4)
            row |= {"flow_log_z": z.log_z.item() if z.enough else None,
                    "flow_log_z_se": z.standard_error.item() if z.enough else None,
                    "reverse_log_z": reverse_log_z(model.energy, model.flow, chains).item(),
                    "flow_ess": 4 * z.effective_sample_size.item() / len(self.test)}
        return row


def total_variation(p, q):
    """½ Σ_k |p_k - q_k|.   (K,), (K,) -> float"""
    return (p - q).abs().sum().item() / 2


def mixing(s, move, chains, truth):
    """What the sampler draws from the model: the weights of the modes among its draws, and how its chains mix.

    move    one round of the sampler: chains (T, B, D) -> chains, Report
    Crossings are changes of mode in 1,000 steps of a chain. τ, the autocorrelation time, is the steps in which a chain
    forgets its mode: the largest over k of that of [the chain is in mode k], None if no chain leaves one. It is
    reliable where the chains were followed for 50 τ. A jump or a swap is one step. Short chains have neither.
    """
    if not truth.modes:
        return {}
    chains, draws = chains[:, :200], 0
    modes = [truth.data.mode(chains[0])]
    for _ in range(s.mixing_rounds):
        chains, _ = move(chains)
        modes.append(truth.data.mode(chains[0]))
        draws = draws + truth.data.responsibilities(chains[0]).mean(0) / s.mixing_rounds
    row = {"draws": draws.tolist(), "draws_tv": total_variation(draws, truth.w)}
    if s.sampler == "short":
        return row
    modes = torch.stack(modes)  # (rounds + 1, 200)
    steps = s.local_steps + (s.sampler != "langevin")  # of a round
    visited = modes.unique()
    taus = [autocorrelation_time((modes == k).double()).item() for k in visited if len(visited) > 1]
    return row | {"crossings": (modes[1:] != modes[:-1]).double().mean().item() / steps * 1000,
                  "autocorrelation_time": steps * max(taus) if taus else None, "followed": steps * s.mixing_rounds}
