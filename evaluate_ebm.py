"""How good an energy is where the truth is known: its Z, its divergence, the weights of its modes, how its chains mix.

`model` has .energy, a callable (B, D) -> (B,), and .flow, None or with sample(n) and log_prob(x). What is judged is the
density p_θ = exp(-E_θ)/Z_θ itself: chains that never change their modes say nothing about the weights that it has.
"""

import math

import torch
from matplotlib.figure import Figure

from data import Mixture
from run import image, lattice
from sampling import alternate, autocorrelation_time, effective_sample_size, log_z


class Exact:
    """The true density, draws of it that nothing was trained on, and points to integrate with: ∫ f dx ≈ Σ_i v_i f(x_i).

        D = 2   a lattice, v_i the area of its cell; the error is far below 0.001 for modes as wide as these
        D > 2   n draws x_i ~ r, v_i = 1/(n r(x_i)): importance sampling. r has the true modes, equally often, at once,
                1.15 and 1.5 times their width

    The points come neither from the chains nor from the flow and are the same for every sampler: none judges itself.
    For D > 2 mass far from all true modes would go unseen: Z is then too small, and the KL divergence negative.
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
        """log Z, held-out NLL and KL in nats, the weights of the modes; log Z by the flow, and its ESS by draw."""
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
            z = log_z(model.energy, model.flow, len(self.test) // 4)
            row |= {"flow_log_z": z.log_z.item() if z.reliable else None,
                    "flow_log_z_se": z.standard_error.item() if z.reliable else None,
                    "flow_ess": 4 * z.effective_sample_size.item() / len(self.test)}
        return row


def energies(model, x):
    return torch.cat([model.energy(batch) for batch in x.split(8192)])


def mixing(args, model, chains, step_size, exact):
    """How often a chain changes its mode, and how soon it forgets it, in steps: a Langevin step or a jump is one.

    τ is the largest over the modes k of the autocorrelation times of [the chain is in mode k], None if no chain leaves
    one; believe it where the chains were followed for 50 τ. Short chains go on here, as for --sampler langevin.
    """
    if not exact.modes:
        return {}
    modes = [exact.data.mode(chains[:200])]
    for _ in range(args.mixing_rounds):
        chains, _ = alternate(model.energy, model.flow, chains[:200], 1, args.local_steps, step_size, args.adjusted)
        modes.append(exact.data.mode(chains))
    modes = torch.stack(modes)  # (rounds + 1, 200)
    steps = args.local_steps + (model.flow is not None)  # of a round
    visited = modes.unique()
    taus = [autocorrelation_time((modes == k).double()).item() for k in visited if len(visited) > 1]
    return {"crossings": (modes[1:] != modes[:-1]).double().mean().item() / steps * 1000,
            "autocorrelation_time": steps * max(taus) if taus else None, "followed": steps * args.mixing_rounds}


def table(args, exact, row):
    by = f"importance sampling around the true modes (ESS {row['ess']:.0%})" if "ess" in row else "quadrature"
    lines = {"held-out NLL": f"{row['test_nll']:.4f}, the entropy of the truth is {row['entropy']:.4f}",
             "KL(p‖p_θ)": f"{row['test_kl']:.4f}" + (f" ± {row['test_kl_se']:.4f}" if "test_kl_se" in row else ""),
             "log Z": f"{row['log_z']:.4f} by {by}"}
    if args.sampler == "flow":
        lines["log Z, by the flow"] = (
            f"not reported: the effective sample size is below 100, {row['flow_ess']:.2%} of the draws"
            if row["flow_log_z"] is None else
            f"{row['flow_log_z']:.4f} ± {row['flow_log_z_se']:.4f} (ESS {row['flow_ess']:.0%})")
    if exact.modes:
        shares = {"truth": exact.data.weights.tolist(), "model": row["weights"], "chains": row["chains"]}
        lines |= {f"mode weights, {name}": " ".join(f"{w:.4f}" for w in share) for name, share in shares.items()}
        tau = row["autocorrelation_time"]
        lines |= {"total variation": f"{row['tv']:.4f}",
                  "crossings": f"{row['crossings']:.2f} in 1,000 steps of a chain",
                  "autocorrelation time": "none: all chains are in one mode" if tau is None else f"{tau:.0f} steps" + (
                      "" if 50 * tau <= row["followed"] else f", or more: {row['followed']} steps are too few")}
    accepted = ({"Langevin": row["acceptance"]} if args.adjusted else {}) | (
        {"flow": row["flow_acceptance"]} if args.sampler == "flow" else {})
    lines |= {f"acceptance, {name}": f"{share:.3f}" for name, share in accepted.items()}
    return "\n".join(f"{name:24}{value}" for name, value in (lines | {"minutes": f"{row['seconds'] / 60:.1f}"}).items())


# ---------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def density(model, exact, chains):
    """Truth, model, flow and chains; of more than two dimensions, the histograms in the plane of three means."""
    x, flow, n = exact.test[:5000], model.flow, 20_000
    titles = ["truth p", "energy p_θ", *(["flow q_α"] if flow else []), "chains"]
    figure = Figure(figsize=(3.5 * len(titles), 3.9), layout="constrained")
    axes = dict(zip(titles, figure.subplots(1, len(titles))))
    points = {"chains": (chains, None)}  # with weights
    if exact.log_p is not None:
        log_z = exact.figures(model, chains)["log_z"]
        functions = {"truth p": exact.data.log_prob, "energy p_θ": lambda x: -model.energy(x) - log_z,
                     "flow q_α": flow and flow.log_prob}
        top = exact.data.log_prob(x).max().exp().item()
        for title in titles[:-1]:
            limit = image(axes[title], lambda x: functions[title](x).exp(), x, vmin=0, vmax=top)
        plane = torch.eye(2, dtype=x.dtype, device=x.device)
    else:
        log_w = exact.log_v - energies(model, exact.x)
        points |= {"truth p": (exact.test[:n], None), "energy p_θ": (exact.x, log_w.softmax(0)),
                   **({"flow q_α": (flow.sample(n), None)} if flow else {})}
        means = exact.data.means.to(x)
        plane, sides = torch.linalg.qr((means[[2, 1]] - means[0]).T)  # (D, 2), (2, 2)
        plane = plane * sides.diagonal().sign()  # the other two means to the right of the first, and above it
        limit = 1.02 * (x @ plane).abs().max().item()
    for title, (draws, weights) in points.items():
        axes[title].hist2d(*(draws @ plane).T.cpu().numpy(), bins=100, range=[(-limit, limit)] * 2, density=True,
                           weights=None if weights is None else weights.cpu().numpy())
    for title, one in axes.items():
        one.set(title=title, xticks=[], yticks=[], aspect="equal")
    return figure


def weights(metrics, data):
    """The model's mode weights against training steps, the shares of the chains, and the truth."""
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in metrics]
    for k, true in enumerate(data.weights.tolist()):
        axes.axhline(true, color=f"C{k}", ls=":", label="truth" if k == 0 else None)
        axes.plot(steps, [row["chains"][k] for row in metrics], color=f"C{k}", lw=0.8, alpha=0.6,
                  label="share of the chains" if k == 0 else None)
        axes.plot(steps, [row["weights"][k] for row in metrics], color=f"C{k}", marker=".",
                  label="p_θ" if k == 0 else None)
    axes.set(xlabel="training steps", ylabel="weight of a mode", ylim=(0, 1.15 * axes.get_ylim()[1]))
    axes.legend(fontsize="small", ncols=3, loc="upper right")
    axes.grid(alpha=0.3)
    return figure
