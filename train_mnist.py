"""Trains an energy-based flow on MNIST, or on any data set in its format.

    python train_mnist.py --loss dsm

One run fills one directory: curves.png, samples.png, metrics.jsonl, config.json, and checkpoint.pt, from which
--resume goes on. NLL is that of images in [0, 256)^D, in nats; bits/dim = NLL / (D ln 2). The validation split
decides which epoch is kept; the test split is read once, at the end.
"""

import argparse
import copy
import hashlib
import math
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import losses
from data import DataError, dequantize, mnist
from ebflow import EBFlow, fc_flow, logit_preprocessing
from layers import FullyConnected
from run import MovingAverage, Run, RunError, curves, fast_matmul, one_line_errors, trainable

# The settings that a flag of the same name changes. `--paper` takes the published ones instead.
COMMON = dict(
    epochs=20,
    batch_size=100,
    optimizer="adam",
    lr=1e-4,             # at its peak
    schedule="cosine",   # rises over the first `warmup` of the run, then falls to 0; or the published "steps"
    warmup=0.05,
    ema_decay=0.999,     # θ̃ ← mθ̃ + (1-m)θ after each step
    clip=0.0,            # largest norm of the gradient; 0: any
    s=1.0,               # the flow's datum is z = logit(x / 256) / s, which is then
    normalize="center",  # left ("none"), centred ("center"), or given covariance I ("whiten", where s drops out)
    diagonal=1.0,        # initial weights: diagonal · I
    bias=0.0,            # initial biases
    bend=1.5,            # where the activation bends (see SmoothLeakyReLU)
)
DEFAULTS = {
    "ml": COMMON | dict(lr=6e-3, batch_size=200, epochs=40, bend=0.0),
    "sml": COMMON | dict(lr=3e-3, batch_size=200, epochs=25, bend=0.0, model_samples=400),
    "ssm": COMMON | dict(epochs=10, normalize="whiten"),
    "dsm": COMMON | dict(sigma=0.4),
    "fdssm": COMMON | dict(batch_size=500, epochs=40, normalize="whiten", xi=1.0),
}
CHOICES = {"optimizer": ["adam", "rmsprop"], "schedule": ["cosine", "steps"], "normalize": ["none", "center", "whiten"]}
PUBLISHED = COMMON | dict(epochs=50, optimizer="rmsprop", lr=1e-4, schedule="steps", s=0.5, normalize="none",
                          diagonal=-1.0, bias=1.0, bend=None)
PAPER = {
    "ml": PUBLISHED,
    "sml": PUBLISHED | dict(model_samples=100),
    "ssm": PUBLISHED,
    "dsm": PUBLISHED | dict(sigma=1.0),
    "fdssm": PUBLISHED | dict(xi=1.0, clip=5.0),
}


@torch.no_grad()
def build(args, images):
    """The pre-processing x -> z, the flow of z, and the flow of x that the two are together.

    Its constants are measured on the training images. Whitening is one more matrix, but not one more layer of
    the model: W₁ times it is another W₁, so that the family of densities is the same with and without it.
    """
    shape = (images[0].numel(),)
    pre = logit_preprocessing(shape, args.s)
    if args.normalize != "none":
        mean, covariance = moments(pre, images)
        pre = logit_preprocessing(shape, args.s, mean=args.s * mean)
    if args.normalize == "whiten":
        variances, U = torch.linalg.eigh(covariance)
        if variances[0] < 1e-10 * variances[-1]:
            raise RunError(f"{len(images)} images have a singular covariance and cannot be whitened: give more "
                           "images, or --normalize center")
        whitening = FullyConnected(*shape).requires_grad_(False)
        whitening.weight.copy_(U @ (variances.rsqrt()[:, None] * U.T))  # symmetric: pixels stay pixels
        pre = EBFlow([*pre.layers, whitening], shape)
    flow = fc_flow(*shape, diagonal=args.diagonal, bias=args.bias, bend=args.bend)
    return pre, flow, EBFlow([*pre.layers, *flow.layers], shape)


def moments(transformation, images):
    """Mean and covariance of the transformed images, in float64.   uint8 (n, …) -> (D,), (D, D)"""
    first, second = 0.0, 0.0
    for batch in images.flatten(1).split(1000):
        z = transformation(dequantize(batch)).double()
        first, second = first + z.sum(0), second + z.T @ z
    mean = first / len(images)
    return mean, second / len(images) - mean.outer(mean)


def objective(args, model, x):
    """The loss of one batch.   (B, *shape) -> ()"""
    if args.loss == "ml":
        return losses.ml(model.log_prob, x)
    if args.loss == "sml":
        return losses.sml(model.energy, x, model.sample(args.model_samples))
    if args.loss == "ssm":
        return losses.ssm(model.energy, x)
    if args.loss == "dsm":
        return losses.dsm(model.energy, x, args.sigma)
    return losses.fdssm(model.energy, x, args.xi)


def make_optimizer(args, parameters):
    if args.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=args.lr)
    return torch.optim.Adam(parameters, lr=args.lr, fused=True)


def learning_rate(args, epoch, progress):
    """The learning rate, by the epoch (from 1) and the fraction of the run: by time alone, nothing to resume."""
    if args.schedule == "steps":  # as published: × 0.95 after each of the first 49 epochs
        return args.lr * 0.95 ** min(epoch - 1, 49)
    rise = min(1.0, progress / args.warmup) if args.warmup else 1.0
    return args.lr * rise * 0.5 * (1 + math.cos(math.pi * progress))


def minibatch(args, pre, images):
    """What the objective sees of some images: x, or with MaP (match after pre-processing) z.   uint8 -> float"""
    with torch.no_grad():
        x = dequantize(images)
        return pre(x) if args.map else x


def train_step(args, model, x, optimizer):
    """One update of the parameters.   -> (2,): the loss and the norm of its gradient, still on the device"""
    parameters = trainable(model)
    loss = objective(args, model, x)
    optimizer.zero_grad()
    # `inputs`: the noisy image is a leaf as well, and would be given a gradient that nobody reads. `backward`, not
    # `autograd.grad`: it lays the gradients out as the weights are, and fused Adam on a CPU takes that for granted.
    loss.backward(inputs=parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip or math.inf)
    optimizer.step()
    return torch.stack([loss.detach(), norm])


@torch.no_grad()
def evaluate(model, images):
    """NLL of the images in nats, with the exact log Z, under the same dequantisation noise at every call."""
    torch.manual_seed(0)
    energy = sum(model.energy(dequantize(batch)).double().sum() for batch in images.split(1000))
    return (energy / len(images) + model.log_z()).item()


def train(args):
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RunError("torch sees no GPU: use --device cpu, or install a CUDA build of torch")
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    splits = mnist(args.data)
    torch.manual_seed(args.seed)
    pre, flow, image_model = (part.to(device) for part in build(args, splits[0]))
    steps = len(splits[0]) // args.batch_size
    if steps == 0:
        raise RunError(f"{len(splits[0])} training images do not fill a batch of {args.batch_size}: lower --batch-size")
    run = Run(args.out, configuration(args, splits), args.resume, args.overwrite)
    train_set, val_set, test_set = (x.view(len(x), *flow.shape).to(device) for x in splits)  # bytes, on the device

    model = flow if args.map else image_model  # whose energy the objective sees
    optimizer = make_optimizer(args, trainable(model))
    average = MovingAverage(image_model, args.ema_decay)
    evaluated = average.model if args.ema else image_model
    parts = {"model": image_model, "average": average, "optimizer": optimizer}
    if run.state:
        for name, part in parts.items():
            part.load_state_dict(run.state[name])
    else:
        print(image_model)
        nll = validate(args, 0, evaluated, val_set)  # what the start alone is worth
        run.metrics.append({"epoch": 0, "step": 0, "loss": None, **likelihood("val", nll, flow.shape),
                            "seconds": 0.0, "batches_per_second": None})

    done = run.state["epoch"] if run.state else 0
    best = run.state["best"] if run.state else {"val_nll": math.inf}
    seconds = run.metrics[-1]["seconds"] if run.metrics else 0.0
    with tqdm(total=args.epochs * steps, initial=done * steps, unit=" batches", dynamic_ncols=True) as bar:
        for epoch in range(done + 1, args.epochs + 1):
            start = time.perf_counter()
            bar.set_postfix(epoch=epoch, best_val_nll=f"{best['val_nll']:.1f}", refresh=False)
            with fast_matmul():
                trace = train_epoch(args, epoch, pre, model, train_set, optimizer, average, bar)
            rate = len(trace) / (time.perf_counter() - start)
            nll = validate(args, epoch, evaluated, val_set)
            seconds += time.perf_counter() - start
            run.metrics.append({"epoch": epoch, "step": epoch * steps, "loss": trace[:, 0].mean().item(),
                                "grad_norm": trace[:, 1].mean().item(), **likelihood("val", nll, flow.shape),
                                "seconds": seconds, "batches_per_second": rate})
            if nll < best["val_nll"]:
                best = {"epoch": epoch, "val_nll": nll, "model": copy.deepcopy(evaluated.state_dict())}
            run.save({name: part.state_dict() for name, part in parts.items()} | {"epoch": epoch, "best": best})

    image_model.load_state_dict(best["model"])
    test = likelihood("test", evaluate(image_model, test_set), flow.shape)
    run.metrics[-1] |= test | {"best_epoch": best["epoch"]}
    run.write_metrics()
    run.picture("curves.png", curves(run.metrics, args.loss))
    run.picture("samples.png", samples(image_model, splits[0].shape[1:]))
    print(summary(run.metrics, best, run.directory))


def train_epoch(args, epoch, pre, model, train_set, optimizer, average, bar):
    """One pass over the images in a random order.   -> (steps, 2): loss and gradient norm of every step

    Every epoch starts its own random numbers, so that a resumed run has no generator to restore. The trace stays
    on the device and is read every 50 steps: a GPU need not wait for the bar.
    """
    torch.manual_seed(1_000_003 * args.seed + epoch)
    order = torch.randperm(len(train_set), device=train_set.device)
    batches = [index for index in order.split(args.batch_size) if len(index) == args.batch_size]
    trace = torch.empty(len(batches), 2, device=train_set.device)
    for step, index in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, epoch, (epoch - 1 + step / len(batches)) / args.epochs)
        try:
            trace[step] = train_step(args, model, minibatch(args, pre, train_set[index]), optimizer)
        except torch.linalg.LinAlgError as error:  # of ml's determinants and sml's inverse
            raise RunError(f"{error}, at epoch {epoch}, step {step + 1}: {remedy(args)}") from None
        average.update()
        if (step + 1) % 50 == 0 or step + 1 == len(batches):
            check_finite(args, trace[:step + 1], epoch)
            bar.update((epoch - 1) * len(batches) + step + 1 - bar.n)
    return trace


def check_finite(args, trace, epoch):
    """Raises RunError at the first step of the epoch whose loss or gradient is not finite."""
    bad = (~trace.isfinite().all(1)).nonzero()
    if len(bad):
        step = bad[0].item()
        loss, norm = trace[step].tolist()
        raise RunError(f"the loss is {loss:g} and the norm of its gradient {norm:g} at epoch {epoch}, step {step + 1}: "
                       + remedy(args))


def validate(args, epoch, model, images):
    """`evaluate`, but an NLL that is not finite, or a singular weight, is a RunError that names the epoch."""
    try:
        nll = evaluate(model, images)
    except torch.linalg.LinAlgError as error:
        raise RunError(f"{error}, after epoch {epoch}: {remedy(args)}") from None
    if not math.isfinite(nll):
        raise RunError(f"the validation NLL is {nll} after epoch {epoch}: {remedy(args)}")
    return nll


def remedy(args):
    knob = {"dsm": ", raise --sigma", "fdssm": ", raise --xi"}.get(args.loss, "")
    clip = f"lower --clip (it is {args.clip:g})" if args.clip else "set --clip"
    return f"lower --lr (it is {args.lr:g}), {clip}{knob}; the last checkpoint that was written is kept"


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


def configuration(args, splits):
    """What decides the result: the settings and the data, but not the folder or the device."""
    config = {k: v for k, v in vars(args).items() if k not in ("out", "data", "device", "resume", "overwrite")}
    digest = hashlib.sha256()
    for split in splits:
        digest.update(split.numpy())
    return config | {"images": list(splits[0].shape), "sha256": digest.hexdigest()}


def parse(argv=None):
    parser = argparse.ArgumentParser(description="Train an energy-based flow on images in MNIST's format.")
    on_off = argparse.BooleanOptionalAction
    parser.add_argument("--loss", choices=DEFAULTS, default="dsm")
    parser.add_argument("--arch", choices=["fc"], default="fc")
    parser.add_argument("--paper", action="store_true", help="the published settings instead of the tuned ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--map", action=on_off, default=True, help="match after pre-processing")
    parser.add_argument("--ema", action=on_off, default=True, help="evaluate the moving average of the weights")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--data", default=Path(__file__).parent / "mnist", type=Path, help="directory of the IDX files")
    parser.add_argument("--out", type=Path, help="directory of the run (runs/mnist-ARCH-LOSS)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    existing.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    settings = {name: value for defaults in DEFAULTS.values() for name, value in defaults.items()}
    group = parser.add_argument_group("settings, by default those at the top of train_mnist.py")
    for name, value in settings.items():
        kind = {"action": on_off} if isinstance(value, bool) else {"type": type(value)}
        kind |= {"choices": CHOICES[name]} if name in CHOICES else {}
        group.add_argument("--" + name.replace("_", "-"), default=None, **kind)
    args = parser.parse_args(argv)

    defaults = (PAPER if args.paper else DEFAULTS)[args.loss]
    for name in settings:
        if name not in defaults:
            if getattr(args, name) is not None:
                parser.error(f"--{name.replace('_', '-')} is not a setting of {args.loss}")
            delattr(args, name)
        elif getattr(args, name) is None:
            setattr(args, name, defaults[name])
    check_range(parser, args)
    if args.out is None:
        args.out = Path("runs") / f"mnist-{args.arch}-{args.loss}"
    return args


def check_range(parser, args):
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"{flag} must be a finite number, not {value}")
        if name in ("epochs", "batch_size", "lr", "s", "sigma", "xi", "model_samples") and not value > 0:
            parser.error(f"{flag} must be positive, not {value}")
        if name in ("warmup", "ema_decay") and not 0 <= value < 1:
            parser.error(f"{flag} must lie in [0, 1), not {value}")
        if name in ("clip", "seed") and not 0 <= value < 2**32:
            parser.error(f"{flag} must lie in [0, 2³²), not {value}")


def main(argv=None):
    args = parse(argv)
    with one_line_errors(DataError, torch.linalg.LinAlgError):
        train(args)


if __name__ == "__main__":
    main()
