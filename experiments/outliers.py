"""How well a flow tells an image from a distorted one: areas under the ROC curve.

    python -m experiments.outliers

Two FC flows, trained by dsm and by ml, give a number to 5,000 test images and to the other 5,000, distorted in eight
ways. The area is the probability that a distorted image has the larger number: ½ is chance, 1 is a perfect detector.

    E(x)         energy of the bytes              |E(x) - mean|  its distance from the mean of training images
    E(z)         energy after the pre-processing  ‖∇E(z)‖        norm of the score there

Time: half an hour on one core.
"""

import torch

import train_mnist
from data import MNIST, DataError, load_images
from ebflow import EBFlow
from experiments import command_line, machine, record, trained
from support.run import one_line_errors

DISTORTIONS = {
    "inverted": lambda x: 255 - x,
    "pixels shuffled": lambda x: x.flatten(1)[:, torch.randperm(x[0].numel())].view_as(x),
    "uniform noise": lambda x: torch.randint_like(x, 256),
    "rotated by 90°": lambda x: x.rot90(1, (2, 3)),
    "rotated by 180°": lambda x: x.rot90(2, (2, 3)),
    "mirrored": lambda x: x.flip(3),
    "shifted by 4 pixels": lambda x: x.roll(4, 3),
    "all black": torch.zeros_like,
}
NUMBERS = "E(x)", "E(z)", "|E(x) - mean|", "‖∇E(z)‖"


def numbers(model, whitened):
    """(bytes) -> the four numbers of each image (4, n), with the mean of E(x) over images that training saw."""
    k = 3 + whitened
    pre, flow = (EBFlow(layers, model.flow.shape) for layers in (model.flow.layers[:k], model.flow.layers[k:]))
    mean = model.energy(load_images(MNIST)[0][:5000]).mean()

    def of(images):
        x = model.x(images)
        z, E_x = pre(x), model.flow.energy(x)
        return torch.stack([E_x, flow.energy(z), (E_x - mean).abs(), flow.score(z).flatten(1).norm(dim=1)])

    return of


def area(normal, distorted):
    """P(a distorted image has the larger number), ties by half.   (n,), (m,) -> float"""
    larger, equal = (compare(distorted[:, None], normal).sum().item() for compare in (torch.gt, torch.eq))
    return (larger + equal / 2) / (len(normal) * len(distorted))


def main(argv=None):
    a, flags = command_line(__doc__, "--runs", "--results", passes="train_mnist.py").parse_known_args(argv)
    with one_line_errors(DataError):
        table, images = {}, load_images(MNIST)[2]
        half = len(images) // 2
        for loss in ("dsm", "ml"):
            s, _ = trained(train_mnist, ["--loss", loss], a.runs / f"mnist-fc-{loss}", flags)
            four = numbers(train_mnist.load(a.runs / f"mnist-fc-{loss}"), s.normalize == "whiten")
            torch.manual_seed(0)
            normal = four(images[:half])
            for name, distort in DISTORTIONS.items():
                areas = map(area, normal, four(distort(images[half:])))
                table.setdefault(name, {})[loss] = dict(zip(NUMBERS, areas))
        record(a.results / "outliers.json", {"runs": table, "machine": machine(), "seed": s.seed})
        print("\n".join(rows(table)))


def rows(table):
    """The lines of the table in docs/use.md."""
    for name, areas in table.items():
        yield f"| {name} | " + " | ".join(f"{v:.2f}" for one in areas.values() for v in one.values()) + " |"


if __name__ == "__main__":
    main()
