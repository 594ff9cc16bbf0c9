"""Langevin dynamics on a trained energy completes digits with missing pixels.

    python train_mnist.py --loss ml
    python -m experiments.imputation --run runs/mnist-fc-ml

The lower half is missing, or each pixel with probability ½, or the shape of another digit. Chains start from noise and
run on the logits of the missing pixels, with Metropolis correction. Each of the DRAWS chains of a digit ends in one
completion. Their mean is the guess with the least expected squared error. Writes results/imputation-ARCH-LOSS.png and
.json, and prints the root-mean-square error over the missing pixels, whose values are in [0, 1], for one draw, for the
mean of the draws, and for the mean of the training images.

Time: three minutes on one core with FC.
"""

from pathlib import Path

import torch

import train_mnist
from data import MNIST, DataError, dequantize, load_images
from ebflow import EBFlow
from experiments import command_line, machine, record, sheet
from sampling import impute, tune
from support import plots
from support.run import RunError, one_line_errors, read_checkpoint

DIGITS, DRAWS, STEPS = 64, 8, 1000  # test images to complete, completions of each; steps of burn-in, and after it


def masks(images):
    """Three masks, True where a pixel is missing, in all channels.   uint8 (n, C, H, W) -> {name: bool (n, C, H, W)}"""
    H = images.shape[2]
    return {"lower half": (torch.arange(H) >= H // 2)[:, None].expand_as(images),
            "random pixels": (torch.rand(len(images), 1, *images.shape[2:]) < 0.5).expand_as(images),
            "another digit's shape": images.roll(1, 0).gt(images.max() // 2).any(1, keepdim=True).expand_as(images)}


def rmse(image, truth, mask):
    """Root-mean-square error over the missing pixels, in units of the range of a pixel."""
    return ((image - truth)[..., mask].square().mean().sqrt() / 256).item()


def complete(model, images, mean):
    """-> {mask: {guess: error}}, and the rows of the picture: what they show, (n, …)"""
    pixelwise, model = (EBFlow(layers, model.shape) for layers in (model.layers[:3], model.layers[3:]))
    x = dequantize(images).view(-1, *model.shape)
    z = pixelwise(x)
    table, rows, repeat = {}, [("truth", x)], lambda t: t.repeat(DRAWS, *[1] * len(model.shape))
    for missing, mask in masks(images).items():
        mask = mask.reshape(x.shape)
        many, state = repeat(mask), repeat(z)
        state = torch.where(many, torch.randn_like(state), state)
        state, step_size = tune(model.energy, state, STEPS, step_size=1e-3, where=many)  # burn-in
        state, _ = impute(model.energy, state, many, STEPS, step_size.item(), adjusted=True, start=state)
        draws = pixelwise.inverse(state).unflatten(0, (DRAWS, -1))
        guess = draws.mean(0)
        table[missing] = {"one draw": rmse(draws, x, mask), "mean of draws": rmse(guess, x, mask),
                          "training mean": rmse(mean.expand_as(x), x, mask)}
        seen = torch.where(mask, 128.0, x)  # grey is missing
        rows += [(missing, seen), ("one draw", draws[0]), ("mean of draws", guess)]
    return table, rows


def main(argv=None):
    parser = command_line(__doc__, "--results")
    parser.add_argument("--run", type=Path, default=Path("runs/mnist-fc-ml"), help="directory of a trained model")
    parser.add_argument("--data", type=Path, default=MNIST)
    a = parser.parse_args(argv)
    with one_line_errors(DataError):
        model, config = train_mnist.load(a.run).flow, read_checkpoint(a.run / "checkpoint.pt")["config"]
        train_set, _, test_set = load_images(a.data)
        if [*train_set.shape[1:]] != config["images"][1:]:
            raise RunError(f"{a.data} has images of another size than those of {a.run}")
        torch.manual_seed(0)
        table, rows = complete(model, test_set[:DIGITS], train_set.double().mean(0).float().view(model.shape))
        words, pictures = zip(*rows)
        path = a.results / f"imputation-{config['arch']}-{config['loss']}.json"
        plots.save(path.with_suffix(".png"), sheet(torch.stack(pictures)[:, :16], train_set.shape[1:], down=words))
        record(path, {"loss": config["loss"], "arch": config["arch"], "rmse": table, "digits": DIGITS, "draws": DRAWS,
                      "steps": STEPS, "seed": 0, "command": f"python -m experiments.imputation --run {a.run}",
                      "machine": machine()})
        for missing, errors in table.items():
            print(f"{missing:24}" + "".join(f"  {name} {error:.4f}" for name, error in errors.items()))


if __name__ == "__main__":
    main()
