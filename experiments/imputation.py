"""Langevin dynamics on a trained energy: completes digits with missing pixels, or draws whole ones from noise.

    python train_mnist.py --loss ml
    python -m experiments.imputation --run runs/mnist-fc-ml
    python -m experiments.imputation --run runs/mnist-fc-ml --generate

The lower half is missing, or each pixel with probability ½, or the shape of another digit. Chains start from noise and
run on the logits of the missing pixels, with Metropolis correction. Each of the --draws chains of a digit ends in one
completion. Their mean is the guess with the least expected squared error. For --arch fc it takes three minutes on one
core. Writes results/imputation-ARCH-LOSS.png and .json: the root-mean-square error over the missing pixels, whose
values are in [0, 1], for one draw, for the mean of the draws, and for the mean of the training images.

With --generate, chains run on the pre-processed images, where the objective was applied. Writes
results/generation-ARCH-LOSS.png: each row is one chain, noise, then its state after 10, 100, 1,000 … steps; the last
columns are exact draws x = g⁻¹(u). Prints mean energies.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

import train_mnist
from data import MNIST, DataError, dequantize, load_images
from ebflow import EBFlow
from experiments import at_least, described, folder, record
from sampling import impute, mala, tune
from support import plots
from support.run import RunError, one_line_errors, read_checkpoint


def sheet(images, shape, across=(), down=()):
    """Images in a grid, with words above its columns and beside its rows.   (rows, columns, …) -> figure"""
    rows, columns, (C, H, W) = *images.shape[:2], shape
    figure = Figure(figsize=(0.5 * columns + 1.5 * bool(down), 0.52 * rows + 0.3 * bool(across)), layout="constrained")
    axes = figure.subplots()
    pixels = images.view(rows, columns, C, H, W).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (rows H, …, C)
    axes.imshow(pixels.clamp(0, 256).numpy() / 256, cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([W * (i + 0.5) for i in range(len(across))], across, fontsize="xx-small")
    axes.set_yticks([H * (i + 0.5) for i in range(len(down))], down, fontsize="small")
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    return figure


def masks(images):
    """Three masks, True where a pixel is missing.   uint8 (n, C, H, W) -> {name: bool (n, C, H, W)}"""
    H = images.shape[2]
    return {"lower half": (torch.arange(H) >= H // 2)[:, None].expand_as(images),
            "random pixels": torch.rand(images.shape) < 0.5,
            "another digit's shape": images.roll(1, dims=0) > images.max() // 2}


def rmse(image, truth, mask):
    """Root-mean-square error over the missing pixels, in units of the range of a pixel."""
    return ((image - truth)[..., mask].square().mean().sqrt() / 256).item()


def complete(a, model, config, train_set, test_set):
    pixelwise, model = (EBFlow(layers, model.shape) for layers in (model.layers[:3], model.layers[3:]))
    images, mean = test_set[:a.digits], train_set.double().mean(0).float().view(model.shape)
    x = dequantize(images).view(-1, *model.shape)
    z = pixelwise(x)
    table, rows, repeat = {}, {"truth": x}, lambda t: t.repeat(a.draws, *[1] * len(model.shape))
    for missing, mask in masks(images).items():
        mask = mask.reshape(x.shape)
        many, state = repeat(mask), repeat(z)
        state = torch.where(many, torch.randn_like(state), state)
        state, step_size = tune(model.energy, state, a.steps, step_size=1e-3, where=many)  # burn-in
        state, report = impute(model.energy, state, many, a.steps, step_size.item(), adjusted=True, start=state)
        print(described(report))
        draws = pixelwise.inverse(state).unflatten(0, (a.draws, -1))
        guess = draws.mean(0)
        table[missing] = {"one draw": rmse(draws, x, mask), "mean of draws": rmse(guess, x, mask),
                          "training mean": rmse(mean.expand_as(x), x, mask)}
        rows |= {missing: torch.where(mask, 128.0, x), f"{missing}: one draw": draws[0],  # grey is missing
                 f"{missing}: mean of draws": guess}
    pictures = torch.stack([images[:16] for images in rows.values()])
    plots.save(a.results / f"imputation-{a.name}.png", sheet(pictures, train_set.shape[1:], down=[*rows]))
    record(a.results / f"imputation-{a.name}.json", {
        "loss": config["loss"], "arch": config["arch"], "rmse": table, "digits": a.digits, "draws": a.draws,
        "steps": a.steps, "seed": a.seed, "command": f"python -m experiments.imputation --run {a.run}"})
    print(f"{'missing':24}" + "".join(f"{name:>16}" for name in next(iter(table.values()))))
    for missing, errors in table.items():
        print(f"{missing:24}" + "".join(f"{error:16.4f}" for error in errors.values()))


def generate(a, model, config, train_set, test_set):
    n = 4 if config["normalize"] == "whiten" else 3  # layers of the pre-processing
    pre, flow = (EBFlow(layers, model.shape) for layers in (model.layers[:n], model.layers[n:]))
    x, step_size, done = torch.randn(a.chains, *flow.shape), 1e-3, 0
    columns = {"noise": pre.inverse(x)}
    print(f"step {0:>8}  energy {flow.energy(x).mean():10.1f}")
    for step in [10**k for k in range(1, 9) if 10**k < a.steps - 1] + [a.steps]:  # at least two steps apart
        half = (step - done) // 2  # the first half adapts the step size, the second half keeps it
        x, step_size = tune(flow.energy, x, half, float(step_size))
        x, report = mala(flow.energy, x, step - done - half, step_size.item())
        columns[f"{step:,}"], done = pre.inverse(x), step
        print(f"step {step:8}  energy {flow.energy(x).mean():10.1f}  {described(report)}")
    exact = model.sample(4 * a.chains)
    print(f"draws by g⁻¹   energy {flow.energy(pre(exact.clamp(0, 256))).mean():10.1f}")
    images = dequantize(test_set[:1000]).view(-1, *flow.shape)
    print(f"test images    energy {flow.energy(pre(images)).mean():10.1f}")
    pictures = torch.stack([*columns.values(), *exact.chunk(4)], dim=1)[:16]  # (chains, columns, …)
    plots.save(a.results / f"generation-{a.name}.png",
               sheet(pictures, train_set.shape[1:], across=[*columns, *["g⁻¹(u)"] * 4]))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/mnist-fc-ml"), help="directory of a trained model")
    parser.add_argument("--data", type=Path, default=MNIST)
    parser.add_argument("--generate", action="store_true", help="draw whole images from noise")
    parser.add_argument("--digits", type=at_least(1), default=64, help="test images that the error is measured on")
    parser.add_argument("--draws", type=at_least(1), default=8, help="completions of each")
    parser.add_argument("--chains", type=at_least(1), default=8, help="chains of --generate")
    parser.add_argument("--steps", type=at_least(2), help="Langevin steps of burn-in, and after it, by default 1,000; "
                        "of --generate, by default 10,000 in all")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--results", type=folder, default="results")
    a = parser.parse_args(argv)
    a.steps = a.steps or (10_000 if a.generate else 1000)
    with one_line_errors(DataError):
        model, config = train_mnist.load(a.run), read_checkpoint(a.run / "checkpoint.pt")["config"]
        train_set, _, test_set = load_images(a.data)
        if [*train_set.shape[1:]] != config["images"][1:]:
            raise RunError(f"{a.data} has images of another size than those of {a.run}")
        torch.manual_seed(a.seed)
        a.name = f"{config['arch']}-{config['loss']}"
        (generate if a.generate else complete)(a, model, config, train_set, test_set)


if __name__ == "__main__":
    main()
