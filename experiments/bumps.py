"""Shape by score matching, mass by a few samples, where both can be seen: two bumps on a line, with masses 0.9 and 0.1.

    python -m experiments.bumps

An energy on the line (a network of two layers of 64, and x²/50) learns them by 2,000 steps of dsm with σ = 0.3, then by
50 steps of sml. The density is normalised on a grid, from which the samples for sml are drawn, too. ours.

Time: ten seconds.
"""

import torch
from torch import nn

from densities import Mixture
from experiments import command_line, machine, panels, record
from losses import dsm, sml
from support import plots
from support.optimization import cosine
from support.run import one_line_errors

SIGMA, BATCH = 0.3, 500
STEPS = {"dsm": 2000, "sml": 50}
DATA = Mixture([0.9, 0.1], [[-4.0], [4.0]], std=(0.5**2 - SIGMA**2) ** 0.5)  # with dsm's noise, 0.5
TRUTH = Mixture(DATA.weights, DATA.means, std=0.5)
GRID = torch.linspace(-10, 10, 2001)[:, None]


def learn(seed):
    """-> dict: the density on GRID after each objective, and the mass right of 0 after every step"""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    result = {"mass": []}

    def energy(x):
        return network(x)[:, 0] + x.square().sum(1) / 50

    def probabilities():
        with torch.no_grad():
            return (-energy(GRID)).softmax(0)

    for objective, lr in (("dsm", 1e-3), ("sml", 5e-4)):
        optimizer = torch.optim.Adam(network.parameters())
        for n in range(STEPS[objective]):
            x = DATA.sample(BATCH)
            optimizer.param_groups[0]["lr"] = lr * cosine(n / STEPS[objective])
            optimizer.zero_grad()
            if objective == "dsm":
                loss = dsm(energy, x, SIGMA)
            else:
                x_model = GRID[torch.multinomial(probabilities(), BATCH, replacement=True)]
                loss = sml(energy, x + SIGMA * torch.randn_like(x), x_model)
            loss.backward()
            optimizer.step()
            result["mass"].append(probabilities()[GRID[:, 0] > 0].sum().item())
        result[objective] = (probabilities() / (GRID[1] - GRID[0])).tolist()
    return result


def picture(runs):
    """Truth and learnt densities after each objective, and the mass of the right bump at every step."""
    figure, [axes] = panels(1, 3, 10.5, 3)
    for one, objective, title in zip(axes, STEPS, ("after 2,000 steps of dsm", "and 50 steps of sml")):
        one.fill_between(GRID[:, 0], TRUTH.log_prob(GRID).exp(), color="0.85", label="truth")
        for seed, run in enumerate(runs):
            one.plot(GRID[:, 0], run[objective], lw=1, label=f"seed {seed}")
        one.set(title=title, xlabel="x", ylabel="density", xlim=(-7, 7))
    for run in runs:
        axes[2].plot(range(STEPS["sml"] + 1), run["mass"][STEPS["dsm"] - 1:], marker=".")
    axes[2].axhline(0.1, color="k", ls=":", label="truth")
    axes[2].set(title="mass of the right bump", xlabel="steps of sml", ylim=(0, None))
    axes[0].legend(fontsize="small")
    axes[2].legend(fontsize="small")
    return figure


def rows(masses):
    """The table of docs/results.md: the mass of the right bump after dsm, and after sml."""
    return [f"| {seed} | {before:.3f} | {after:.3f} |" for seed, (before, after) in enumerate(masses)]


def main(argv=None):
    a = command_line(__doc__, "--seeds", "--results").parse_args(argv)
    with one_line_errors():
        runs = [learn(seed) for seed in range(a.seeds)]
        table = [[run["mass"][STEPS["dsm"] - 1], run["mass"][-1]] for run in runs]
        plots.save(a.results / "bumps.png", picture(runs))
        record(a.results / "bumps.json", {"command": f"python -m experiments.bumps --seeds {a.seeds}",
                                          "machine": machine(), "masses": table})
        print(*rows(table), sep="\n")


if __name__ == "__main__":
    main()
