"""Langevin dynamics on a trained energy: completes digits with missing pixels, or draws whole ones from noise.

    python train_mnist.py --loss ml
    python -m experiments.imputation --run runs/mnist-fc-ml
    python -m experiments.imputation --run runs/mnist-fc-ml --generate

The lower half is missing, or each pixel with probability ½, or the shape of another digit. Chains start from noise and
run on the logits of the missing pixels, with Metropolis correction. Each of the DRAWS chains of a digit ends in one
completion. Their mean is the guess with the least expected squared error. Writes results/imputation-ARCH-LOSS.png and
.json, and prints the root-mean-square error over the missing pixels, whose values are in [0, 1], for one draw, for the
mean of the draws, and for the mean of the training images. For --arch fc it takes three minutes on one core.

With --generate, chains run on the pre-processed images, where the objective was applied. Writes
results/generation-ARCH-LOSS.png: each row is one chain, noise, then its state after 10, 100, 1,000 … steps; the last
columns are exact draws x = g⁻¹(u). Prints mean energies. docs/results.md has the numbers of several runs in one table.
"""

from pathlib import Path

import torch

import train_mnist
from data import MNIST, DataError, dequantize, load_images
from ebflow import EBFlow
from experiments import command_line, record, sheet
from sampling import impute, mala, tune
from support import plots
from support.run import RunError, one_line_errors, read_checkpoint

DIGITS, DRAWS, STEPS = 64, 8, 1000  # test images to complete, completions of each; steps of burn-in, and after it
CHAINS, LOOKS = 8, (10, 100, 1000, 10_000)  # of --generate: the steps at which it shows the chains


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
    images, mean = test_set[:DIGITS], train_set.double().mean(0).float().view(model.shape)
    x = dequantize(images).view(-1, *model.shape)
    z = pixelwise(x)
    table, rows, repeat = {}, {"truth": x}, lambda t: t.repeat(DRAWS, *[1] * len(model.shape))
    for missing, mask in masks(images).items():
        mask = mask.reshape(x.shape)
        many, state = repeat(mask), repeat(z)
        state = torch.where(many, torch.randn_like(state), state)
        state, step_size = tune(model.energy, state, STEPS, step_size=1e-3, where=many)  # burn-in
        state, report = impute(model.energy, state, many, STEPS, step_size.item(), adjusted=True, start=state)
        print(f"step size {report.step_size:.3g}, acceptance {report.acceptance.mean():.3f}")
        draws = pixelwise.inverse(state).unflatten(0, (DRAWS, -1))
        guess = draws.mean(0)
        table[missing] = {"one draw": rmse(draws, x, mask), "mean of draws": rmse(guess, x, mask),
                          "training mean": rmse(mean.expand_as(x), x, mask)}
        rows |= {missing: torch.where(mask, 128.0, x), f"{missing}: one draw": draws[0],  # grey is missing
                 f"{missing}: mean of draws": guess}
    pictures = torch.stack([images[:16] for images in rows.values()])
    plots.save(a.results / f"imputation-{a.name}.png", sheet(pictures, train_set.shape[1:], down=[*rows]))
    record(a.results / f"imputation-{a.name}.json", {
        "loss": config["loss"], "arch": config["arch"], "rmse": table, "digits": DIGITS, "draws": DRAWS,
        "steps": STEPS, "seed": 0, "command": f"python -m experiments.imputation --run {a.run}"})
    for missing, errors in table.items():
        print(f"{missing:24}" + "".join(f"  {name} {error:.4f}" for name, error in errors.items()))


def generate(a, model, config, train_set, test_set):
    n = 4 if config["normalize"] == "whiten" else 3  # layers of the pre-processing
    pre, flow = (EBFlow(layers, model.shape) for layers in (model.layers[:n], model.layers[n:]))
    x, step_size, done = torch.randn(CHAINS, *flow.shape), 1e-3, 0
    columns = {"noise": pre.inverse(x)}
    print(f"step {0:>8}  energy {flow.energy(x).mean():10.1f}")
    for step in LOOKS:
        half = (step - done) // 2  # the first half adapts the step size, the second half keeps it
        x, step_size = tune(flow.energy, x, half, float(step_size))
        x, report = mala(flow.energy, x, step - done - half, step_size.item())
        columns[f"{step:,}"], done = pre.inverse(x), step
        print(f"step {step:8}  energy {flow.energy(x).mean():10.1f}  acceptance {report.acceptance.mean():.3f}")
    exact = model.sample(4 * CHAINS)
    print(f"draws by g⁻¹   energy {flow.energy(pre(exact.clamp(0, 256))).mean():10.1f}")
    images = dequantize(test_set[:1000]).view(-1, *flow.shape)
    print(f"test images    energy {flow.energy(pre(images)).mean():10.1f}")
    pictures = torch.stack([*columns.values(), *exact.chunk(4)], dim=1)  # (chains, columns, …)
    plots.save(a.results / f"generation-{a.name}.png",
               sheet(pictures, train_set.shape[1:], across=[*columns, *["g⁻¹(u)"] * 4]))


def main(argv=None):
    parser = command_line(__doc__, "--results")
    parser.add_argument("--run", type=Path, default=Path("runs/mnist-fc-ml"), help="directory of a trained model")
    parser.add_argument("--data", type=Path, default=MNIST)
    parser.add_argument("--generate", action="store_true", help="draw whole images from noise")
    a = parser.parse_args(argv)
    with one_line_errors(DataError):
        model, config = train_mnist.load(a.run), read_checkpoint(a.run / "checkpoint.pt")["config"]
        train_set, _, test_set = load_images(a.data)
        if [*train_set.shape[1:]] != config["images"][1:]:
            raise RunError(f"{a.data} has images of another size than those of {a.run}")
        torch.manual_seed(0)
        a.name = f"{config['arch']}-{config['loss']}"
        (generate if a.generate else complete)(a, model, config, train_set, test_set)


if __name__ == "__main__":
    main()
