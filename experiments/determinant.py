"""log|det W| without a determinant: the normalising constant of a linear layer by importance sampling.

    python -m experiments.determinant

E(x) = -log p_u(Wx) is an energy with Z = 1/|det W| = E_q[ p_u(Wx) / q(x) ] for any density q. So Z is a mean
(`sampling.py: estimate_log_z`), at a cost of O(D²) for each draw. Here W = I + c G / √D with standard normal G, and q =
N(0, (LᵀL)⁻¹) with a lower-triangular L, so q costs O(D²), too:

    isotropic    L = √a I; a = ‖W‖²/D makes KL(q‖p) least
    diagonal     L² = diag(WᵀW) makes KL(q‖p) least
    fitted       any L, by stochastic gradient descent on KL(q‖p) = E_q[ ½‖Wx‖² ] + Σ log L_ii + const

The error is known in closed form. Let λ_i be the eigenvalues of L⁻ᵀWᵀWL⁻¹, the precision of p relative to that of q.
The relative variance of the importance weights w = p_u(Wx) / q(x) grows exponentially with D unless the λ_i tend to 1:

    Var[w] / E[w]² = Π λ_i / √(2λ_i - 1) - 1,      infinite as soon as one λ_i ≤ ½

Source: Chao et al. (2023), the estimate of Z by importance sampling; the variance is a Gaussian integral.

Time: 90 seconds on one core.
"""

import math

import torch

from ebflow import EBFlow
from experiments import command_line, machine, panels, record
from layers import FullyConnected
from sampling import estimate_log_z
from support import plots
from support.run import one_line_errors


class Gaussian:
    """q = N(0, (LᵀL)⁻¹), L lower triangular with a positive diagonal. It has what sampling.py needs of a flow."""

    def __init__(self, L):
        self.L = L

    def sample(self, n):
        u = torch.randn(n, len(self.L), dtype=self.L.dtype)
        return torch.linalg.solve_triangular(self.L.T, u, upper=True, left=False)  # x Lᵀ = u

    def log_prob(self, x):
        D = len(self.L)
        return -0.5 * (x @ self.L.T).square().sum(1) + self.L.diagonal().log().sum() - D / 2 * math.log(2 * math.pi)


def fitted(W, steps=1500, batch_size=256, lr=0.02):
    """L by Adam on KL(q‖p), which starts from the diagonal L. A draw costs O(D²)."""
    log_diagonal, below = W.norm(dim=0).log().requires_grad_(), torch.zeros_like(W).requires_grad_()
    optimizer = torch.optim.Adam([log_diagonal, below])
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr / math.sqrt(len(W)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        L = below.tril(-1) + log_diagonal.exp().diag()
        kl = 0.5 * (Gaussian(L).sample(batch_size) @ W.T).square().sum(1).mean() + log_diagonal.sum()
        optimizer.zero_grad()
        kl.backward()
        optimizer.step()
    return L.detach()


DIMS, SHOWN = [2, 4, 8, 16, 32, 64, 128, 256, 512], (8, 32, 128, 512)  # in the picture, and in the table
DRAWS, REPEATS = 10_000, 20
PROPOSALS = {"isotropic": lambda W: W.norm() * len(W)**-0.5 * torch.eye(len(W)).to(W),
             "diagonal": lambda W: W.norm(dim=0).diag(), "fitted": fitted}


def relative_variance(W, L):
    """Var[w] / E[w]² of the importance weights in closed form, ∞ where one of the λ_i is ½ or less."""
    ratio = torch.linalg.solve_triangular(L.T, W.T, upper=True)  # L⁻ᵀWᵀ, whose squared singular values are the λ_i
    eigenvalues = torch.linalg.svdvals(ratio).square()
    log_second_moment = (eigenvalues.log() - 0.5 * (2 * eigenvalues - 1).log()).sum()
    return log_second_moment.expm1().item() if eigenvalues.min() > 0.5 else math.inf


def measure(D, name, c=0.3):
    """The error of log|det W| over REPEATS estimates.   -> dict"""
    torch.manual_seed(0)
    layer = FullyConnected(D).double().requires_grad_(False)
    layer.weight += c / math.sqrt(D) * torch.randn(D, D, dtype=torch.float64)
    q = Gaussian(PROPOSALS[name](layer.weight))
    energy, exact = EBFlow([layer], (D,)).energy, layer.log_abs_det((D,)).item()
    errors = torch.tensor([-estimate_log_z(energy, q, DRAWS).log_z - exact for _ in range(REPEATS)])
    variance = relative_variance(layer.weight, q.L)
    return {"D": D, "c": c, "q": name, "samples": DRAWS, "rmse": errors.square().mean().sqrt().item(),
            "relative_variance": variance if variance < math.inf else None}


def predicted(row):
    """The standard error by the closed form and the delta method: right where it is small, NaN where infinite."""
    return math.nan if row["relative_variance"] is None else math.sqrt(row["relative_variance"] / row["samples"])


def rows(measured):
    """The table of docs/tour.md."""
    for name in PROPOSALS:
        errors = [row["rmse"] for row in measured if row["q"] == name and row["D"] in SHOWN]
        yield f"| {name} | " + " | ".join(f"{error:.4f}" for error in errors) + " |"


def picture(measured):
    """The error against D, a line for each q."""
    figure, [[axes]] = panels(1, 1, 6, 3.6)
    for name, color, style in zip(PROPOSALS, plots.OTHERS, ("o-", "s--", "o-")):
        own = [row for row in measured if row["q"] == name]
        D = [row["D"] for row in own]
        axes.loglog(D, [row["rmse"] for row in own], style, color=color, ms=4, label=name)
        axes.loglog(D, [predicted(row) for row in own], "k:", zorder=3)
    axes.loglog([], [], "k:", label="closed form")
    axes.set(xlabel="D", ylabel="error of log|det W| (nats)",
             title=f"{measured[0]['samples']:,} draws, W = I + {measured[0]['c']:g} G/√D")
    axes.legend()
    return figure


def main(argv=None):
    a = command_line(__doc__, "--results").parse_args(argv)
    with one_line_errors():
        measured = [measure(D, name) for name in PROPOSALS for D in DIMS]
        plots.save(a.results / "determinant.png", picture(measured))
        record(a.results / "determinant.json", {"command": "python -m experiments.determinant", "machine": machine(),
                                                "repeats": REPEATS, "by_dimension": measured})
        print(*rows(measured), sep="\n")


if __name__ == "__main__":
    main()
