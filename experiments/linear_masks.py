"""Why unconstrained linear layers matter: the same flow with full and with triangular matrices.

    python -m experiments.linear_masks

The data have ten dimensions, and each of them depends on the one before:

    y_1 = n_1,      y_i = tanh(5 n_i) (y_{i-1} + 2·2^i)  for i = 2 … 10,      n standard normal

Maximum likelihood fits flows of 10 blocks to fresh draws. The linear layers of a block are one full matrix, one lower
or upper triangular one, or the product of an upper and a lower one. A triangular determinant costs O(D). But triangular
layers of one kind with element-wise layers between them are a triangular map however many they are. Source: Chao et al.
(2023), constrained linear layers.

Time: ten minutes on one core.
"""

import math

import torch
import torch.nn as nn
from torch.nn.utils import parametrize

import losses
from ebflow import EBFlow
from experiments import command_line, machine, panels, record
from layers import ActNorm, FullyConnected, SmoothLeakyReLU
from support import plots
from support.run import one_line_errors

DIM, BATCH_SIZE, LR, STEPS, SEEDS = 10, 512, 2e-3, 4000, 3
LAYERS = {"full": [None], "lower": [torch.tril], "upper": [torch.triu], "upper × lower": [torch.tril, torch.triu]}


def data(noise):
    """Maps standard normal draws n to draws y of the density.   (B, 10) -> (B, 10)"""
    y = [noise[:, 0]]
    for i in range(2, DIM + 1):
        y.append(torch.tanh(5 * noise[:, i - 1]) * (y[-1] + 2 * 2**i))
    return torch.stack(y, dim=1)


def entropy(n=1_000_000):
    """The entropy in nats, and the standard error of the estimate.   -> float, float

    The map n -> y is triangular with the diagonal 5 sech²(5 n_i) (y_{i-1} + 2·2^i), so h(y) = h(n) + E Σ log|diagonal|.
    """
    noise = torch.randn(n, DIM)
    t, scales = 5 * noise[:, 1:], data(noise)[:, :-1] + 2 * 2.0 ** torch.arange(2, DIM + 1)
    log_cosh = torch.logaddexp(t, -t) - math.log(2)
    logs = (math.log(5) - 2 * log_cosh + scales.abs().log()).sum(1)  # (n,)
    return DIM / 2 * math.log(2 * math.pi * math.e) + logs.mean().item(), (logs.std() / n**0.5).item()


def masked_flow(masks, blocks=10):
    """Blocks of a fully-connected layer for each mask and an activation. The start is near the identity."""
    def linear():
        for mask in masks:
            layer, masked = FullyConnected(DIM), nn.Module()
            masked.forward = mask  # W ↦ mask(W): elements that it zeroes are neither used nor trained
            yield parametrize.register_parametrization(layer, "weight", masked) if mask else layer

    hidden = [layer for _ in range(blocks) for layer in (*linear(), SmoothLeakyReLU(bend=0.0))]
    return EBFlow([ActNorm(DIM), *hidden, *linear()], (DIM,))


def train(name, seed):
    """Maximum likelihood.   -> NLL of fresh draws at the start, and after every hundredth of the steps"""
    torch.manual_seed(seed)
    flow = masked_flow(LAYERS[name])
    test = data(torch.randn(20_000, DIM))
    flow.initialize(test)
    optimizer, nlls = torch.optim.Adam(flow.parameters()), []
    for step in range(STEPS + 1):
        if step % (STEPS // 100) == 0:
            with torch.no_grad():
                nlls.append(round(losses.ml(flow.log_prob, test).item(), 3))
        optimizer.param_groups[0]["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.zero_grad()
        losses.ml(flow.log_prob, data(torch.randn(BATCH_SIZE, DIM))).backward()
        optimizer.step()
    print(f"{name:16} seed {seed}: NLL {nlls[-1]:.3f}", flush=True)
    return nlls


def picture(curves, entropy):
    """NLL against steps: a line for each seed, with the mean of the last NLLs."""
    figure, [[axes]] = panels(1, 1, 7, 3.8)
    for (name, runs), color in zip(curves.items(), plots.OTHERS):
        for run in runs:
            axes.plot(range(0, STEPS + 1, STEPS // 100), run, color=color, lw=1)
        axes.plot([], [], color=color, label=f"{name}, {sum(run[-1] for run in runs) / len(runs):.2f}")
    early, last = ([run[k] for runs in curves.values() for run in runs] for k in (5, -1))
    axes.set(xlabel="steps", ylabel="NLL (nats)", ylim=(min(last) - 0.5, max(early)),
             title=f"four kinds of linear layers; the entropy of the data is {entropy:.1f} nats")
    axes.legend()
    return figure


def main(argv=None):
    a = command_line(__doc__, "--results").parse_args(argv)
    torch.set_default_dtype(torch.float64)  # in float32 tanh is exactly ±1 for 7 % of the draws
    torch.manual_seed(0)
    floor, error = entropy()
    print(f"entropy {floor:.3f} ± {error:.3f}", flush=True)
    with one_line_errors():
        curves = {name: [train(name, seed) for seed in range(SEEDS)] for name in LAYERS}
        record(a.results / "linear-masks.json", {
            "entropy": floor, "entropy_se": error, "curves": curves, "command": "python -m experiments.linear_masks",
            "machine": machine(), "steps": STEPS, "batch_size": BATCH_SIZE, "lr": LR})
        plots.save(a.results / "linear-masks.png", picture(curves, floor))


if __name__ == "__main__":
    main()
