"""Points from a file: a flow by dsm, the same flow by ml, zuko's spline flow by ml, and one Gaussian.

    pip install -r tests/requirements-other.txt
    python -m experiments.points

Three files are written to runs/points: two moons (4,000 rows of 2 columns), a mixture of six Gaussians with deviation
0.3 (4,000 × 8), and the first eight principal components of MNIST's test images (10,000 × 8). The NLL is that of a
tenth of the rows, which nothing was trained on; before training, of another tenth, which decides the epoch that is
kept. All take 5,000 steps of 512 rows, sml 500 more. results/points.json has the table.

Time: twenty minutes a seed on one core.
"""

import copy
import math
import time

import numpy as np
import torch

import train_toy
from data import MNIST, Points, load_images
from densities import Mixture
from experiments import command_line, completed, passed_on, trained
from support.optimization import cosine
from support.run import one_line_errors


def moons(n=4000, noise=0.1):
    t, upper = torch.rand(n) * math.pi, torch.rand(n) < 0.5
    x = torch.where(upper, t.cos(), 1 - t.cos()), torch.where(upper, t.sin(), 0.5 - t.sin())
    return torch.stack(x, 1) + noise * torch.randn(n, 2)


def mixture(n=4000):
    return Mixture(torch.full((6,), 1 / 6), 3 * torch.randn(6, 8), 0.3).sample(n)


def digits():
    x = load_images(MNIST)[2].flatten(1).float()
    return (x - x.mean(0)) @ torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:8].T


FILES = {"moons": moons, "mixture": mixture, "digits": digits}
WAYS = "one Gaussian", "zuko's NSF by ml", "this flow before training", "by ml", "by dsm", "by dsm, then sml"


def splines(path, seed, epochs=20, steps=250):
    """zuko's neural spline flow, by ml on standardised rows.   -> NLL of the test rows in nats"""
    import zuko
    data, best = Points(path, seed), (math.inf, None)
    train, val, test = ((rows - data.mean.float()) / data.std.float() for rows in (data.train, data.val, data.test))
    torch.manual_seed(seed)
    flow = zuko.flows.NSF(train.shape[1], transforms=3, hidden_features=(64, 64))
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
    for n in range(epochs * steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * cosine(n / (epochs * steps))
        optimizer.zero_grad()
        (-flow().log_prob(train[torch.randint(len(train), (512,))]).mean()).backward()
        optimizer.step()
        if (n + 1) % steps == 0:
            with torch.no_grad():
                nll = -flow().log_prob(val).mean().item()
            if nll < best[0]:
                best = nll, copy.deepcopy(flow.state_dict())
    flow.load_state_dict(best[1])
    with torch.no_grad():
        return -flow().log_prob(test).mean().item() + data.std.log().sum().item()


def measured(name, runs, seed, flags):
    """NLL of the test rows and minutes, by each of WAYS.   -> {way: [nats, minutes]}"""
    path, found = runs / "points" / f"{name}.npy", {}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    np.save(path, FILES[name]().numpy())
    start = time.perf_counter()
    found["zuko's NSF by ml"] = splines(path, seed), (time.perf_counter() - start) / 60
    for loss in ("ml", "dsm"):
        _, metrics = trained(train_toy, ["--data", str(path), "--loss", loss, "--seed", str(seed)],
                             runs / "points" / f"{name}-{loss}-{seed}", flags)
        last = metrics[-1]
        found["one Gaussian"] = last["gaussian_test_nll"], 0.0
        found["this flow before training"] = metrics[0]["val_nll"], 0.0
        found[f"by {loss}" + ", then sml" * (loss == "dsm")] = last["test_nll"], last["seconds"] / 60
    found["by dsm"] = last["before_sml_test_nll"], metrics[-2]["seconds"] / 60
    return found


def main(argv=None):
    a, flags = command_line(__doc__, "--seeds", "--runs", "--results", passes="train_toy.py").parse_known_args(argv)
    with one_line_errors():
        for loss in ("ml", "dsm"):  # before the other flow is trained
            passed_on(train_toy.Settings, ["--data", "points.npy", "--loss", loss], flags)
        jobs = {f"{name}, seed {seed}": lambda name=name, seed=seed: measured(name, a.runs, seed, flags)
                for seed in range(a.seeds) for name in FILES}
        print("\n".join(rows(completed(a.results / "points.json", jobs, flags=flags))))


def rows(runs):
    """The lines of the table: mean NLL and the largest distance from it, over the seeds; minutes of the last file."""
    for way in WAYS:
        cells = [way]
        for name in FILES:
            nlls, minutes = zip(*(run[way] for key, run in runs.items() if key.startswith(name)))
            mean = sum(nlls) / len(nlls)
            cells.append(f"{mean:.2f}" + f" ± {max(abs(nll - mean) for nll in nlls):.2f}" * (len(nlls) > 1))
        yield "| " + " | ".join([*cells, f"{sum(minutes) / len(minutes):.1f}" if minutes[0] else ""]) + " |"


if __name__ == "__main__":
    main()
