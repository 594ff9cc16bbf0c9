"""Trains an energy-based flow on MNIST, or on any data set in its format.

    python train_mnist.py --loss dsm

One run fills one directory: curves.png, samples.png, metrics.jsonl, config.json, and checkpoint.pt, from which
--resume goes on. NLL is that of images in [0, 256)^D, in nats; bits/dim = NLL / (D ln 2). The validation split
decides which epoch is kept; the test split is read once, at the end. Under torchrun several GPUs or processes share
every batch (processes.py).
"""

import argparse
import contextlib
import hashlib
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure

import processes
from data import MNIST, DataError, dequantize, mnist
from ebflow import EBFlow, cnn_flow, fc_flow, glow_flow, logit_preprocessing
from flags import OPTIMIZATION, add_compile_flag, add_run_flags, add_settings, configuration, pick_device, with_settings
from layers import ActNorm, FullyConnected
from run import Run, RunError, curves, one_line_errors, read_checkpoint
from training import MovingAverage, fast_matmul, fit, make_optimizer

# The settings that a flag of the same name changes. `--paper` takes the published ones instead.
COMMON = OPTIMIZATION | dict(
    epochs=20,
    batch_size=100,
    lr=1e-4,             # at its peak
    s=1.0,               # the flow's datum is z = logit(x / 256) / s, which is then
    normalize="center",  # left ("none"), centred on a black pixel ("black") or on each pixel's mean ("center"), and
                         # then given variance 1 ("scale") or covariance I ("whiten")
)
MATRICES = COMMON | dict(
    diagonal=1.0,        # initial weights: diagonal · I
    bias=0.0,            # initial biases
    bend=1.5,            # where the activation bends (see SmoothLeakyReLU)
    actnorm="none",      # or a last layer more, which the one before could take in: an actnorm, "trained" or at its "moments"
)
LOSSES = ["ml", "sml", "ssm", "dsm", "fdssm"]
SLICED = dict(noise=0.0)  # added to what ssm and fdssm see, as σ of dsm is: they then learn the smoothed density, too
DEFAULTS = {
    "fc": {
        "ml": MATRICES | dict(lr=6e-3, batch_size=200, epochs=40, bend=0.0),
        "sml": MATRICES | dict(lr=3e-3, batch_size=200, epochs=25, bend=0.0, model_samples=400),
        "ssm": MATRICES | SLICED | dict(epochs=10, normalize="whiten"),
        "dsm": MATRICES | dict(sigma=0.4),
        "fdssm": MATRICES | SLICED | dict(batch_size=500, epochs=40, normalize="whiten", xi=1.0),
    },
}
CONVOLUTIONS = MATRICES | dict(normalize="whiten")  # needs more images than pixels; without it each ends 30 to 50 nats higher
LIKELY = CONVOLUTIONS | dict(epochs=5, lr=1e-2, diagonal=0.6, bend=1.0)
MATCHED = CONVOLUTIONS | dict(epochs=6, lr=5e-4, diagonal=-0.6, bend=0.0, actnorm="moments")
DEFAULTS["cnn"] = {
    "ml": LIKELY,
    "sml": LIKELY | dict(model_samples=100),
    "ssm": MATCHED | dict(epochs=8, noise=0.4),
    "dsm": MATCHED | dict(sigma=0.4),
    "fdssm": MATCHED | dict(batch_size=1000, epochs=30, lr=1e-3, noise=0.4, xi=0.5),
}
GLOW = COMMON | dict(
    epochs=5, lr=1e-3, clip=500.0,
    width=32,            # channels of the couplings' networks; 512 as published, for a GPU
    depth=4,             # steps of a block; 16 as published
    floor=0.0,           # of the couplings' scales, by which g⁻¹ divides
    actnorm="trained",   # the last one, as the other layers are, or held at the "moments" of what reaches it (see `following`)
)
# Whitened, which takes more images than pixels: from centred pixels, dsm ends 70 nats higher.
GLOW_MATCHED = GLOW | dict(normalize="whiten", floor=0.5, actnorm="moments", clip=0.0)
DEFAULTS["glow"] = {
    "ml": GLOW,
    "sml": GLOW | dict(lr=3e-4, floor=0.5, model_samples=100),
    "ssm": GLOW_MATCHED | dict(clip=100.0, noise=0.4),
    "dsm": GLOW_MATCHED | dict(sigma=0.4),
    "fdssm": GLOW_MATCHED | dict(noise=0.4, xi=1.0),
}
PUBLISHED = MATRICES | dict(epochs=50, optimizer="rmsprop", schedule="steps", normalize="none", diagonal=-1.0, bend=None)
PAPER = {
    "fc": {
        "ml": PUBLISHED | dict(s=0.5, bias=1.0),
        "sml": PUBLISHED | dict(s=0.5, bias=1.0, model_samples=100),
        "ssm": PUBLISHED | SLICED | dict(s=0.5, bias=1.0),
        "dsm": PUBLISHED | dict(s=0.5, bias=1.0, sigma=1.0),
        "fdssm": PUBLISHED | SLICED | dict(s=0.5, bias=1.0, xi=1.0, clip=5.0),
    },
    "cnn": {
        "ml": PUBLISHED | dict(s=0.75, bias=0.01, decay=0.925),
        "sml": PUBLISHED | dict(s=0.75, bias=0.01, decay=0.925, model_samples=100),
        "ssm": PUBLISHED | SLICED | dict(s=0.75, bias=0.01),
        "dsm": PUBLISHED | dict(s=0.75, bias=0.01, sigma=0.1),
        "fdssm": PUBLISHED | SLICED | dict(s=0.75, bias=0.01, xi=0.1, clip=5.0),
    },
}
PUBLISHED_GLOW = GLOW | dict(lr=1e-5, weight_decay=0.1, normalize="none", width=512, depth=16, schedule="steps", decay=1.0)
PAPER["glow"] = {
    "ml": PUBLISHED_GLOW,
    "sml": PUBLISHED_GLOW | dict(model_samples=100),
    "ssm": PUBLISHED_GLOW | SLICED,
    "dsm": PUBLISHED_GLOW | dict(sigma=0.1),
    "fdssm": PUBLISHED_GLOW | SLICED | dict(xi=0.1),
}


@torch.no_grad()
def build(args, images):
    """The pre-processing x -> z, the flow of z, and the flow of x that the two are together.

    Its constants are measured on the training images. Whitening is one more linear layer, held constant; with --arch fc
    the family of densities is the same with and without it, since W₁ times it is another W₁.
    """
    shape = (images[0].numel(),) if args.arch == "fc" else tuple(images.shape[1:])
    pre = logit_preprocessing(shape, args.s)
    if args.normalize != "none":
        mean, covariance = moments(pre, images)
        if args.normalize == "black":
            mean = moments(pre, torch.zeros_like(images[:1000]))[0].mean().expand_as(mean)
        std = covariance.diag().sqrt().view(shape) if args.normalize == "scale" else 1.0
        pre = logit_preprocessing(shape, args.s * std, mean=args.s * mean.view(shape))
    if args.normalize == "whiten":
        variances, U = torch.linalg.eigh(covariance)
        if variances[0] < 1e-10 * variances[-1]:
            raise RunError(f"{len(images)} images have a singular covariance and cannot be whitened: give more "
                           "images, or --normalize center")
        whitening = FullyConnected(math.prod(shape)).requires_grad_(False)
        whitening.weight.copy_(U @ (variances.rsqrt()[:, None] * U.T))  # symmetric: pixels stay pixels
        pre = EBFlow([*pre.layers, whitening], shape)
    try:
        if args.arch == "fc":
            flow = fc_flow(*shape, diagonal=args.diagonal, bias=args.bias, bend=args.bend)
        elif args.arch == "cnn":
            flow = cnn_flow(shape, diagonal=args.diagonal, bias=args.bias, bend=args.bend)
        else:
            flow = glow_flow(shape, args.width, args.depth, floor=args.floor)
    except ValueError as error:  # an image that does not squeeze
        raise RunError(f"--arch {args.arch} cannot take images of {images.shape[-2]}×{images.shape[-1]}: {error}") from None
    if args.actnorm != "none":
        if args.arch != "glow":
            flow = EBFlow([*flow.layers, ActNorm(flow.shapes[-1][0])], shape)
        with constant_channels_named():
            flow.initialize(pre(dequantize(images[:1000].view(-1, *shape))))
        flow.layers[-1].requires_grad_(not moments_are_held(args))
    return pre, flow, EBFlow([*pre.layers, *flow.layers], shape)


def moments(transformation, images):
    """Mean and covariance of the transformed images, in float64.   uint8 (n, …) -> (D,), (D, D)"""
    first, second = 0.0, 0.0
    for batch in images.split(1000):
        z = transformation(dequantize(batch).view(-1, *transformation.shape)).flatten(1).double()
        first, second = first + z.sum(0), second + z.T @ z
    mean = first / len(images)
    return mean, second / len(images) - mean.outer(mean)


def minibatch(args, pre, images):
    """What the objective sees of some images: x, or with MaP (match after pre-processing) z.   uint8 -> float"""
    with torch.no_grad():
        x = dequantize(images)
        x = pre(x) if args.map else x
        noise = getattr(args, "noise", 0.0)
        return x + noise * torch.randn_like(x) if noise else x


def minibatches(args, pre, images):
    """An epoch of the images in random order, without the last batch if it is not whole."""
    for index in torch.randperm(len(images), device=images.device).split(args.batch_size):
        if len(index) == args.batch_size:
            yield minibatch(args, pre, images[index])


def following(args, model, batches, momentum=0.1):
    """The batches. On every tenth, with the noise that dsm adds, a last actnorm that is held at the moments goes a tenth of the way
    to them, or the fraction `momentum`.

    The score hardly shows the mean and the scale of the flow's output, and where it alone trains them they drift. Before the
    prior N(0, I) the moments are the maximum-likelihood values of the two.
    """
    for step, x in enumerate(batches):
        if moments_are_held(args) and step % 10 == 0:
            hold(model, x + getattr(args, "sigma", 0.0) * torch.randn_like(x), momentum)
        yield x


def moments_are_held(args):
    return args.actnorm == "moments"


@torch.no_grad()
def hold(model, x, momentum=1.0):
    """The last layer, an actnorm, goes to the moments of what reaches it, or the fraction `momentum` of the way."""
    with constant_channels_named():
        model.layers[-1].initialize(EBFlow(model.layers[:-1], model.shape)(x), momentum)


@contextlib.contextmanager
def constant_channels_named():
    try:
        yield
    except ValueError as error:
        raise RunError(f"{error}, or take another --actnorm") from None


def refit(args, model, images):
    """Averaged weights have moments of their own: a held actnorm takes those of 1,000 training images."""
    if moments_are_held(args):
        torch.manual_seed(0)
        hold(model, dequantize(images[:1000]))


@torch.no_grad()
def evaluate(model, images):
    """NLL of the images in nats, with the exact log Z, under the same dequantisation noise at every call."""
    torch.manual_seed(0)
    energy = sum(model.energy(dequantize(batch)).double().sum() for batch in images.split(1000))
    return (energy / len(images) + model.log_z()).item()


def train(args, device):
    splits = mnist(args.data)
    torch.manual_seed(args.seed)
    pre, flow, image_model = (part.to(device) for part in build(args, splits[0]))
    steps = len(splits[0]) // args.batch_size
    if steps == 0:
        raise RunError(f"{len(splits[0])} training images do not fill a batch of {args.batch_size}: lower --batch-size")
    sizes = {"--batch-size": args.batch_size, "--model-samples": getattr(args, "model_samples", 0)}
    for flag, size in sizes.items():
        if size % processes.count():
            raise RunError(f"{processes.count()} processes cannot share {flag} {size} alike: take a multiple")
    run = Run(args.out, identity(args, splits), args.resume, args.overwrite)
    if run.state is None and processes.rank() == 0:
        print(image_model)
    train_set, val_set, test_set = (x.view(len(x), *flow.shape).to(device) for x in splits)  # bytes, on the device

    seen = flow if args.map else image_model  # whose energy the objective sees

    def validate(model):
        if args.ema:
            refit(args, model, train_set)
        return likelihood("val", evaluate(model, val_set), flow.shape)

    best = fit(args, run, image_model, MovingAverage(image_model, args.ema_decay),
               make_optimizer(args, image_model),
               seen=seen, minibatches=lambda epoch: following(args, seen, minibatches(args, pre, train_set)), steps=steps,
               context=lambda: fast_matmul(args.loss), evaluate=validate)

    image_model.load_state_dict(best["model"])
    test = likelihood("test", evaluate(image_model, test_set), flow.shape)
    run.metrics[-1] |= test | {"best_epoch": best["epoch"]}
    run.write_metrics()
    run.picture("curves.png", curves(run.metrics, args.loss))
    run.picture("samples.png", samples(image_model, splits[0].shape[1:]))
    if processes.rank() == 0:
        print(summary(run.metrics, best, run.directory))


def load(directory, images):
    """A finished run on these training images.   -> its settings, and pre-processing, flow and flow of images with the weights that were kept

    Raises RunError where there is no whole checkpoint, or one that does not fit.
    """
    checkpoint = read_checkpoint(Path(directory) / "checkpoint.pt")
    args = argparse.Namespace(**checkpoint["config"])
    try:
        if args.images[1:] != list(images.shape[1:]):
            raise RuntimeError  # as `load_state_dict` would
        parts = build(args, images)
        parts[-1].load_state_dict(checkpoint["state"]["best"]["model"])  # of which the other two are parts
    except (AttributeError, KeyError, RuntimeError):
        raise RunError(f"{directory} is a run on images of another size, or of another version of this code") from None
    return args, *parts


def likelihood(split, nll, shape):
    return {f"{split}_nll": nll, f"{split}_bpd": nll / (math.prod(shape) * math.log(2))}


def samples(model, image_shape, rows=8):
    """A square of draws from the model by the inverse of the flow."""
    torch.manual_seed(0)
    images = model.sample(rows * rows).clamp(0, 255).view(rows, rows, *image_shape[-2:])
    figure = Figure(figsize=(5, 5))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(images.permute(0, 2, 1, 3).flatten(2).flatten(0, 1).cpu().numpy(), cmap="gray", vmin=0, vmax=255)
    axes.axis("off")
    return figure


def summary(metrics, best, directory):
    last = metrics[-1]
    rows = [("at the start", f"{metrics[0]['val_nll']:.2f} nats on the validation split"),
            ("validation NLL", f"{best['val_nll']:.2f} nats, epoch {best['epoch']}"),
            ("test NLL", f"{last['test_nll']:.2f} nats, {last['test_bpd']:.4f} bits/dim"),
            ("training", f"{last['seconds'] / 60:.1f} min with evaluation, {last['batches_per_second']:.1f} batches/s"),
            ("written to", str(directory))]
    return "\n".join(f"{name:16}{value}" for name, value in rows)


def identity(args, splits):
    """What decides the result: the settings, and the images themselves instead of their folder."""
    digest = hashlib.sha256()
    for split in splits:
        digest.update(split.numpy())
    config = configuration(args) | {"images": list(splits[0].shape), "sha256": digest.hexdigest()}
    del config["data"]
    return config


def parse(argv=None):
    parser = argparse.ArgumentParser(description="Train an energy-based flow on images in MNIST's format.")
    on_off = argparse.BooleanOptionalAction
    parser.add_argument("--loss", choices=LOSSES, default="dsm")
    parser.add_argument("--arch", choices=list(DEFAULTS), default="fc")
    parser.add_argument("--paper", action="store_true", help="the published settings instead of the tuned ones")
    parser.add_argument("--map", action=on_off, default=True, help="match after pre-processing")
    parser.add_argument("--data", default=MNIST, type=Path, help="directory of the IDX files")
    parser.add_argument("--out", type=Path, help="directory of the run (runs/mnist-ARCH-LOSS)")
    add_run_flags(parser)
    add_compile_flag(parser)
    tables = [settings for by_loss in DEFAULTS.values() for settings in by_loss.values()]
    add_settings(parser, tables)
    args = parser.parse_args(argv)
    args = with_settings(parser, args, tables, (PAPER if args.paper else DEFAULTS)[args.arch][args.loss])
    if args.arch == "glow" and args.actnorm == "none":
        parser.error("--arch glow has actnorms: --actnorm is trained or moments")
    if args.out is None:
        args.out = Path("runs") / f"mnist-{args.arch}-{args.loss}"
    return args


def main(argv=None):
    args = parse(argv)
    with one_line_errors(DataError, torch.linalg.LinAlgError):
        device = pick_device(args.device, joint=True, compiling=args.compile)
        with processes.joined(device):
            train(args, device)


if __name__ == "__main__":
    main()
