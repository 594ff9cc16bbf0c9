"""Pictures: each function returns a matplotlib figure, or draws on the axes that it is given. `save` writes it."""

import io
import itertools

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from support.run import write

COLORS = {"ml": "#0072B2", "sml": "#66CCEE", "ssm": "#009E73", "dsm": "#D55E00", "fdssm": "#882255"}  # for any eyes
GREY = "0.55"  # what no objective has trained: the start, a Gaussian, the published figures; the truth is black
OTHERS = "#E69F00", "#332288", "#CC79A7", "#999933"  # lines that are told apart by something else


def save(path, figure):
    """Writes a figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write(path, buffer.getvalue())


def curves(metrics, loss):
    """Validation NLL and training objective against epochs."""
    figure, last = Figure(figsize=(9, 3.2), layout="constrained"), metrics[-1]
    left, right = figure.subplots(1, 2)
    for axes, key, ylabel, title in ((left, "val_nll", "NLL (nats)", "exact negative log-likelihood"),
                                     (right, "loss", "loss", f"training objective: {loss}")):
        shown = [row for row in metrics if row[key] is not None and (axes is left or "before_sml_test_nll" not in row)]
        epochs, values = [row["epoch"] for row in shown], [row[key] for row in shown]
        axes.plot(epochs, values, marker=".", color=COLORS.get(loss, "k"), label="validation")
        axes.set(xlabel="epoch", ylabel=ylabel, title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.set_ylim(*zoom(values))
    if "sml_steps" in last:
        left.axvspan(last["epoch"] - 1, last["epoch"], color=COLORS["sml"], alpha=0.4,
                     label=f"{last['sml_steps']} steps of sml")
    left.plot(last["best_epoch"], last["test_nll"], "k*", label=f"test, {last['test_nll']:.1f} nats")
    left.legend()
    return figure


def zoom(values):
    """Limits of an axis that leave out a start far away, which would flatten the rest; None, None if there is none."""
    low, late = min(values), max(values[len(values) // 3:])
    return (low - 0.5 * (late - low), low + 4 * (late - low)) if max(values) > low + 20 * (late - low) > low else (
        None, None)


def mosaic(images):
    """A square of images, grey or in colour, with values in [0, 255].   (n², C, H, W)"""
    n = int(len(images) ** 0.5)
    figure = Figure(figsize=(5, 5))
    axes = figure.add_axes((0, 0, 1, 1))
    rows = images.clamp(0, 255).unflatten(0, (n, n)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (nH, nW, C)
    axes.imshow(rows.cpu().numpy() / 255, cmap="gray", vmin=0, vmax=1)
    axes.axis("off")
    return figure


# ---- Functions of the plane ------------------------------------------------------------------------------------------

def lattice(limit, n, like):
    """The points of an n × n grid on [-limit, limit]², first row at the bottom.   -> (n, n, 2)"""
    ticks = torch.linspace(-limit, limit, n, device=like.device, dtype=like.dtype)
    return torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), dim=-1)


@torch.no_grad()
def image(axes, function, x, **style):
    """Shows a function (B, 2) -> (B,) on the square that holds the points x.   -> half a side"""
    limit = 1.02 * x.abs().max().item()
    points = lattice(limit, 128, x).flatten(0, 1)
    values = torch.cat([function(batch) for batch in points.split(5000)]).view(128, 128)
    axes.imshow(values.cpu().numpy(), origin="lower", extent=(-limit, limit, -limit, limit), **style)
    axes.set(xticks=[], yticks=[])
    return limit


def scores(axes, model, n, limit, like, **style):
    """The score as arrows on an n × n lattice. They point to where the density grows."""
    points = lattice(0.95 * limit, n, like).flatten(0, 1)
    score = model.score(points)
    norm = score.norm(dim=1, keepdim=True)
    arrows = score / norm * norm.log1p()  # the far ones would cover the rest
    axes.quiver(*points.T.cpu().numpy(), *arrows.T.cpu().numpy(), **style)


@torch.no_grad()
def toy(flow, x, metrics, loss, truth=None):
    """What a run of train_toy.py found: the held-out points x (n, D) or their true density, the flow's density, its
    energy with the score as arrows, and its draws; in more than two dimensions, pairs of columns. Then the loss and,
    against it, what it is for: KL and Fisher divergence from the truth, or the NLL beside a Gaussian's."""
    pairs, x, last = [*itertools.combinations(range(min(x.shape[1], 4)), 2)], x[:2000], metrics[-1]
    draws, n = flow.sample(len(x)).cpu(), max(len(pairs), 4) + 2
    figure = Figure(figsize=(3.6 * ((n + 1) // 2), 7.2), layout="constrained")
    axes = [*figure.subplots(2, (n + 1) // 2).flat]
    if len(pairs) == 1:
        top = (truth or flow).log_prob(x).max().exp().item()
        if truth:
            image(axes[0], lambda x: truth.log_prob(x).exp(), x, vmin=0, vmax=top)
        limit = image(axes[1], lambda x: flow.log_prob(x).exp(), x, vmin=0, vmax=top)
        energy = flow.energy(x)
        image(axes[2], flow.energy, x, vmin=energy.min().item(), vmax=energy.max().item(), cmap="viridis_r")
        scores(axes[2], flow, 24, limit, x, color="w", width=0.004)
        for one, points in ((axes[3], draws), *([] if truth else [(axes[0], x.cpu())])):
            one.plot(*points.T.numpy(), "k.", ms=1.5, alpha=0.6)
            one.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
        for one, title in zip(axes, ("truth p" if truth else "held-out points", "model p_θ",
                                     "energy E, and the score -∇E", "draws of the model")):
            one.set_title(title)
    else:
        for one, (i, j) in zip(axes, pairs):
            for points, color, label in ((x.cpu(), "k", "held-out points"), (draws, COLORS.get(loss, GREY), "draws")):
                one.plot(*points[:, [i, j]].T.numpy(), ".", color=color, ms=2, alpha=0.5, label=label)
            xlim, ylim = ((p.min().item() - 0.5, p.max().item() + 0.5) for p in (x[:, i], x[:, j]))
            one.set(xlim=xlim, ylim=ylim, xlabel=f"column {i + 1}", ylabel=f"column {j + 1}")
        axes[0].legend(markerscale=4)
    for one in axes[len(pairs) if len(pairs) > 1 else 4:-2]:
        one.axis("off")
    objective, goal = axes[-2:]
    history(objective, metrics, "loss", loss, color=COLORS.get(loss, GREY))
    if truth:
        history(goal, metrics, "val_kl", "KL(p‖p_θ)", color="k")
        history(goal, metrics, "val_fisher", "Fisher(p‖p_θ)", color=OTHERS[1])
        goal.set_yscale("log")
    else:
        history(goal, metrics, "val_nll", "NLL of held-out points", color="k")
        goal.axhline(last["gaussian_test_nll"], color=GREY, ls="--", label="one Gaussian")
        goal.set_ylim(*zoom([row["val_nll"] for row in metrics] + [last["gaussian_test_nll"]]))
    for one in (objective, goal):
        if "sml_steps" in last:
            one.axvspan(metrics[-2]["step"], last["step"], color=COLORS["sml"], alpha=0.4, label="sml")
        one.set(xlabel="step")
        one.grid(alpha=0.3)
        one.legend()
    return figure


def history(axes, metrics, key, label, **style):
    """A figure of the metrics against training steps, where it is known. The loss of steps of sml is another's."""
    rows = [row for row in metrics if row[key] is not None and (key != "loss" or "before_sml_test_nll" not in row)]
    axes.plot([row["step"] for row in rows], [row[key] for row in rows], marker=".", label=label, **style)


# ---- Energies with a flow as their sampler ---------------------------------------------------------------------------

@torch.no_grad()
def ebm(model, truth, chains, log_z):
    """Truth (judge.py), model, flow and chains; in more than two dimensions, histograms in the plane of the means."""
    x, flow, n = truth.test[:5000], model.flow, 20_000
    titles = ["truth p", "energy p_θ", *(["flow q_α"] if flow else []), "chains"]
    figure = Figure(figsize=(3.5 * len(titles), 3.9), layout="constrained")
    axes = dict(zip(titles, figure.subplots(1, len(titles))))
    points = {"chains": (chains, None)}  # with importance weights
    if truth.lattice:
        functions = {"truth p": truth.data.log_prob, "energy p_θ": lambda x: -model.energy(x) - log_z,
                     "flow q_α": flow and flow.log_prob}
        top = truth.data.log_prob(x).max().exp().item()
        for title in titles[:-1]:
            limit = image(axes[title], lambda x: functions[title](x).exp(), x, vmin=0, vmax=top)
        plane = torch.eye(2, dtype=x.dtype, device=x.device)
    else:
        log_w = truth.log_v - torch.cat([model.energy(batch) for batch in truth.x.split(8192)])
        points |= {"truth p": (truth.test[:n], None), "energy p_θ": (truth.x, log_w.softmax(0)),
                   **({"flow q_α": (flow.sample(n), None)} if flow else {})}
        means = truth.data.means.to(x)
        plane = torch.linalg.svd(means - means.mean(0)).Vh[:2].T  # (D, 2), where the means differ most
        limit = 1.02 * (x @ plane).abs().max().item()
    for title, (draws, w) in points.items():
        axes[title].hist2d(*(draws @ plane).T.cpu().numpy(), bins=100, range=[(-limit, limit)] * 2,
                           weights=None if w is None else w.cpu().numpy())
    for title, one in axes.items():
        one.set(title=title, xticks=[], yticks=[], aspect="equal")
    return figure


def mode_weights(metrics, data):
    """The model's mode weights against training steps, the shares of the chains, and the truth, by mode."""
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("chains", "share of the chains", dict(lw=0.8, alpha=0.6)),
                              ("weights", "p_θ", dict(marker="."))):
        known = [row for row in metrics if row[key] is not None]
        for k in range(len(data.weights)):
            axes.plot([row["step"] for row in known], [row[key][k] for row in known], color=OTHERS[k % 4], **style)
        axes.plot([], [], "k", label=label, **style)
    for k, true in enumerate(data.weights.tolist()):
        axes.axhline(true, color=OTHERS[k % 4], ls=":")
    axes.plot([], [], "k:", label="truth")
    axes.set(xlabel="training steps", ylabel="weight of a mode", ylim=(0, 1.15 * axes.get_ylim()[1]))
    axes.legend(fontsize="small", ncols=3, loc="upper right")
    axes.grid(alpha=0.3)
    return figure
