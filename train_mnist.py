"""Trains an energy-based flow on MNIST, or on other images, in colour too.

    python train_mnist.py --loss dsm

One run fills one directory: curves.png, samples.png, metrics.jsonl, config.json, and checkpoint.pt, from which
--resume continues. NLL is that of images in [0, 256)^D, in nats; bits/dim = NLL / (D ln 2). The validation split
decides which epoch is kept. The test split is read at the end, and before steps of sml.
"""

import copy
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm, parametrize
from torch.nn.utils.parametrizations import spectral_norm

from data import MNIST, DataError, ImageModel, augment, dequantize, digest, load_images
from ebflow import EBFlow, cnn_flow, fc_flow, glow_flow, logit_preprocessing
from layers import ActNorm, Convolution, FullyConnected
from losses import OBJECTIVES
from recipes import RECIPES, paper
from support import plots, processes, settings
from support.fast import accelerated, fast_products
from support.optimization import cosine, trainable, update_average
from support.run import Run, RunError, intact, one_line_errors, read_checkpoint
from support.settings import setting

MATCHING = ("ssm", "dsm", "fdssm")


@dataclass
class Settings(settings.Settings):
    """A line has default, meaning, range or choices, and what uses the setting; recipes.py changes the defaults."""
    NAME = "mnist-{arch}-{loss}"
    loss: str = setting("dsm", "objective, see losses.py", choices=OBJECTIVES)
    arch: str = setting("fc", "architecture, see ebflow.py", choices=("fc", "cnn", "glow"))
    paper: bool = setting(False, "the published recipe in place of ours")
    data: Path = setting(MNIST, "directory of MNIST's or CIFAR-10's files, or a .npy file of bytes", decides=False)
    augment: bool = setting(False, "mirror each image or not, shift it by a pixel or not")
    map: bool = setting(True, "MaP: match after pre-processing")
    ema: bool = setting(True, "EMA: evaluate the moving average of the weights")
    optimizer: str = setting("adam", "optimiser", choices=("adam", "rmsprop"))
    weight_decay: float = setting(0.0, "L2 penalty, as the optimiser applies it", least=0)
    schedule: str = setting("cosine", "of the learning rate; steps as published", choices=("cosine", "steps"))
    decay: float = setting(0.95, "factor after each of the first --decays epochs", above=0, most=1, of=("steps",))
    decays: int = setting(49, "epochs after which the learning rate falls", above=0, of=("steps",))
    clip: float = setting(0.0, "largest norm of the gradient; 0: no clipping", least=0)
    s: float = setting(1.0, "scale of the logits: z = logit(x / 256) / s", above=0)
    normalize: str = setting("center", "raw logits as published; ours: mean 0; and covariance I",
                             choices=("none", "center", "whiten"))
    diagonal: float = setting(1.0, "weights start at diagonal · I", of=("fc", "cnn"))
    ratio: float = setting(1.0, "ours: W₂ starts at this multiple of W₁, and so learns more slowly", of=("fc",))
    bias: float = setting(0.0, "biases start at this, a CNN's at random with this times Xavier's std", of=("fc", "cnn"))
    spectral: bool = setting(False, "divide each kernel by its largest singular value", of=("cnn",))
    bend: float = setting(0.0, "ours: the activation bends at -bend and is 0 at 0; None in --paper", of=("fc", "cnn"))
    actnorm: str = setting("none", "last layer: none, or an actnorm, trained, (ours) at the moments of its input, or "
                           "with all others held at the start's", choices=("none", "trained", "moments", "held"))
    width: int = setting(32, "channels of the couplings' networks; 512 as published", above=0, of=("glow",))
    depth: int = setting(4, "steps of a block; 16 as published", above=0, of=("glow",))
    floor: float = setting(0.0, "ours: smallest scale of a coupling; 0: none", least=0, below=1, of=("glow",))
    coupling: str = setting("sigmoid", "its scale; tanh as published", choices=("sigmoid", "tanh"), of=("glow",))
    model_samples: int = setting(100, "samples of the model in a step of sml", above=0, of=("sml", *MATCHING))
    sml_steps: int = setting(0, "ours: steps of sml after the epochs; 0: none", least=0, of=MATCHING)
    sml_lr: float = setting(5e-4, "their learning rate", above=0, of=MATCHING)
    sigma: float = setting(0.4, "dsm's σ; ours: noise for ssm and fdssm, too", least=0, of=MATCHING)
    xi: float = setting(1.0, "length ξ of the finite difference", above=0, of=("fdssm",))
    energy_weight: float = setting(0.0, "λ of an added λ E(z); published for Glow", least=0, of=MATCHING)
    compile: bool = setting(False, "torch.compile the gradient", decides=False)
    evaluate: Path = setting(None, "a finished run to evaluate on --data; nothing is trained", decides=False)

    def recipe(self):
        cell = f"{self.arch} {self.loss}"
        if not self.paper:
            return RECIPES.get(cell, {})
        table = paper(load_images(self.data)[0].shape[1:])
        if cell not in table:
            sys.exit(f"error: recipes.py: paper has no published recipe of {cell} for these images")
        return table[cell]


def train(s, device, rank=0, size=1):
    """Trains, evaluates after each epoch, and keeps the best. Under torchrun this is process `rank` of `size`."""
    splits = load_images(s.data)                                       # bytes (n, C, H, W)
    train_set, val_set, test_set = [split.to(device) for split in splits]
    steps = len(train_set) // s.batch_size
    if steps == 0 or s.batch_size % size:
        raise RunError(f"{size} processes cannot share --batch-size {s.batch_size} of {len(train_set)} training images")
    if s.actnorm == "moments" and s.batch_size == size:
        raise RunError("--actnorm moments takes the variance of a batch: it needs a larger --batch-size")

    torch.manual_seed(s.seed)
    pre, flow = build(s, splits[0])                                    # x -> z by the pre-processing, z -> u
    model = EBFlow([*pre.layers, *flow.layers], pre.shape).to(device)  # of x; pre and flow are its parts
    constants = {id(t): t for t in pre.state_dict(keep_vars=True).values()}  # shared: a checkpoint has them once
    averaged = copy.deepcopy(model, dict(constants))                   # θ̃ of EMA
    step, optimizer = make_step(s, pre, flow, model, averaged)
    parts = {"model": model, "averaged": averaged, "optimizer": optimizer}
    best = {"epoch": 0, "val_nll": math.inf, "model": averaged.state_dict()}
    run = Run(s, parts, {"best": best}, images=[*splits[0].shape], sha256=digest(splits), processes=size)
    print(model, flush=True)
    best = run.state["best"]
    for epoch in range(run.state["epoch"] + 1, s.epochs + 1 + (s.sml_steps > 0)):  # 0 shows what the start is worth
        torch.manual_seed(1_000_003 * s.seed + epoch + (rank << 24))   # a resumed run has no generator to restore
        order = processes.agreed(torch.randperm(len(train_set), device=device))
        batches = order[:steps * s.batch_size].view(steps, s.batch_size)[:, rank::size] if epoch else ()
        phase, first, before = s, (epoch - 1) * steps, {}              # first: the steps before this epoch
        if epoch > s.epochs:  # ours: score matching does not see how much mass lies elsewhere, samples of the model do
            model.load_state_dict(best["model"])
            before = evaluate("before_sml_test", model.eval(), test_set)
            model.train()
            phase = replace(s, loss="sml", lr=s.sml_lr, schedule="steps", decay=1.0, energy_weight=0.0,
                            compile=False)
            first, batches = 0, batches.repeat(1 + s.sml_steps // steps, 1)[:s.sml_steps]
            step, optimizer = make_step(phase, pre, flow, model, averaged)
        for n, index in enumerate(run.watch(epoch, batches), first):
            optimizer.param_groups[0]["lr"] = learning_rate(phase, n, steps)
            run.record(step(train_set[index], n))

        evaluated = copy.deepcopy(averaged if s.ema else model, dict(constants)).eval()
        for buffer, trained in zip(evaluated.buffers(), model.buffers()):  # singular vectors have no average
            buffer.copy_(trained)
        if s.actnorm == "moments":                                     # ours: clean images; training saw noisy ones
            torch.manual_seed(0)
            track_moments(evaluated, dequantize(train_set[:5000]).view(-1, *model.shape))
        done = run.metrics[-1]["step"] if run.metrics else 0
        row = {"epoch": epoch, "step": done + len(batches), "loss": None} | run.means | before
        row |= evaluate("val", evaluated, val_set)                     # exact, with log Z
        if epoch and row["val_nll"] < best["val_nll"]:
            best = {"epoch": epoch, "val_nll": row["val_nll"], "model": evaluated.state_dict()}
        run.save(row, {"epoch": epoch, "best": best}, shown=("loss", "batches_per_second"))

    model.eval().load_state_dict(best["model"])
    test = {"best_epoch": best["epoch"], "best_val_nll": best["val_nll"]} | evaluate("test", model, test_set)
    torch.manual_seed(0)
    samples = model.sample(64).view(64, *splits[0].shape[1:])
    if s.sml_steps:
        seconds = [row["seconds"] for row in run.metrics[-2:]]
        test |= {"sml_steps": s.sml_steps, "sml_share_of_time": 1 - seconds[0] / seconds[1],
                 "sml_kept": best["epoch"] > s.epochs}                 # if the validation NLL fell
    run.finish(test)
    if test["test_bpd"] > 8:
        print("warning: worse than the uniform density, 8 bits/dim: give more images, or see --lr", file=sys.stderr)
    plots.save(s.out / "curves.png", plots.curves(run.metrics, s.loss))
    plots.save(s.out / "samples.png", plots.mosaic(samples))


def learning_rate(s, n, steps):
    """The learning rate of step n = 0, 1, …, of which an epoch has `steps`."""
    return s.lr * (cosine(n / (s.epochs * steps)) if s.schedule == "cosine" else s.decay ** min(n // steps, s.decays))


def make_step(s, pre, flow, model, averaged):
    """A training step, (images, n) -> {"loss": (), "grad_norm": ()} still on the device, and its optimiser.

    pre    the pre-processing x -> z
    flow   the flow of z
    model  the flow of x, whose parameters are trained; averaged has their moving averages
    """
    matched = flow if s.map else model                                 # MaP: whose energy the objective sees
    parameters, averages = trainable(model), trainable(averaged)
    if s.optimizer == "adam":
        optimizer = torch.optim.Adam(parameters, lr=s.lr, weight_decay=s.weight_decay, fused=True)
    else:
        optimizer = torch.optim.RMSprop(parameters, lr=s.lr, weight_decay=s.weight_decay)
    objective, config = OBJECTIVES[s.loss], s.config()                 # losses.py: it reads its own settings only
    spectral = [layer for layer in matched.layers if parametrize.is_parametrized(layer)]

    def gradient(z):                                                   # leaves ∇_θ in p.grad
        # A GPU records this once: only z and θ change from step to step, and nothing may wait for the GPU.
        with parametrize.cached():                                     # with --spectral, one kernel for E and log Z
            [layer.weight for layer in spectral]                       # now, with its gradient: sml samples first
            loss = objective(matched, z, **config)
            if s.energy_weight > 0:                                    # λ·E(z), published for Glow and CIFAR-10
                loss = loss + s.energy_weight * matched.energy(z).mean()
        loss.backward(inputs=parameters)                               # not for z, which is a leaf in ssm and dsm, too
        return loss.detach()

    gradient = accelerated(gradient, parameters, s)                    # support/fast.py

    @fast_products(s.loss)                                             # support/fast.py
    def step(images, n):
        images = augment(images) if s.augment else images
        x = dequantize(images).view(-1, *model.shape)                  # (B, C, H, W) -> (B, *shape)
        z = pre(x) if s.map else x                                     # MaP: match after pre-processing
        if s.loss in ("ssm", "fdssm") and s.sigma > 0:                 # ours: data as smooth as dsm's
            z = z + s.sigma * torch.randn_like(z)
        if s.actnorm == "moments" and n % 10 == 0:                     # ours: see track_moments
            noise = torch.randn_like(z)
            track_moments(matched, z + s.sigma * noise if s.loss == "dsm" else z, fraction=0.1)
            processes.average([*matched.layers[-1].parameters()])
        optimizer.zero_grad()
        loss = gradient(z)
        processes.average([loss, *(p.grad for p in parameters)])       # over torchrun's processes
        norm = get_total_norm([p.grad for p in parameters])
        if s.clip:
            clip_grads_with_norm_(parameters, s.clip, norm)
        optimizer.step()
        update_average(averages, parameters, n)                        # EMA
        return {"loss": loss, "grad_norm": norm}

    return step, optimizer


# ---- The model -------------------------------------------------------------------------------------------------------

def build(s, images):
    """The pre-processing x -> z and the flow of z, set by what is measured on training images (n, C, H, W).

    Their layers follow from the shape (C, H, W) of an image alone.
    """
    pre = preprocessing(s, images.shape[1:])
    if s.normalize != "none":
        measure(s, pre, images)
    flow = architecture(s, images.shape[1:])
    if s.actnorm != "none":
        flow.initialize(pre(dequantize(images[:1000].view(-1, *pre.shape))))
    return pre, flow


def preprocessing(s, image):
    shape = (math.prod(image),) if s.arch == "fc" else tuple(image)
    pre = logit_preprocessing(shape, torch.full(shape, s.s), mean=torch.zeros(shape))
    if s.normalize == "whiten":
        pre = EBFlow([*pre.layers, FullyConnected(math.prod(shape)).requires_grad_(False)], shape)
    return pre


def architecture(s, image):
    if s.arch == "fc":
        flow = fc_flow(math.prod(image), diagonal=s.diagonal, ratio=s.ratio, bias=s.bias, bend=s.bend)
    elif s.arch == "cnn":
        flow = cnn_flow(image, diagonal=s.diagonal, bias=s.bias, bend=s.bend)
    else:
        flow = glow_flow(image, s.width, s.depth, floor=s.floor, tanh=s.coupling == "tanh")
    if s.actnorm != "none" and s.arch != "glow":
        flow = EBFlow([*flow.layers, ActNorm(flow.shapes[-1][0])], flow.shape)
    for layer in flow.layers if s.spectral and s.arch == "cnn" else ():
        if isinstance(layer, Convolution):
            spectral_norm(layer, eps=1e-12)                            # of the (out, in·k·k) matrix
    for layer in flow.modules() if s.actnorm == "held" else flow.layers[-1:]:
        if isinstance(layer, ActNorm):
            layer.requires_grad_(s.actnorm == "trained")
    return flow


@torch.no_grad()
def measure(s, pre, images):
    """Sets the constants of the pre-processing so that z of these images is centred or whitened.

    ours: both. Whitening is one more linear layer, which is not trained. With --arch fc the family of densities is
    the same with and without it, since W₁ times the whitening matrix is another W₁.
    """
    logits = EBFlow(pre.layers[:3], pre.shape)
    z = torch.cat([logits(dequantize(batch).view(-1, *pre.shape)).flatten(1) for batch in images.split(1000)])  # (n, D)
    mean = z.mean(0, dtype=torch.float64)
    pre.layers[2].mean.copy_(s.s * mean.view(pre.shape))
    if s.normalize == "whiten":
        variances, U = torch.linalg.eigh(shrunk_covariance(z - mean))
        pre.layers[3].weight.copy_(U @ (variances.rsqrt()[:, None] * U.T))  # symmetric: pixels stay pixels


def shrunk_covariance(z):
    """(1 - ρ) S + ρ μ I, where S is the covariance of centred z (n, D) and μ its mean variance.   -> (D, D) float64

        ρ = min(1, (Σ_k ‖z_k‖⁴ / n - ‖S‖²) / (n ‖S - μI‖²))

    Few images leave directions of nearly no variance, which whitening would blow up. This ρ has the least expected
    error of all, as far as the data tell. Source: Ledoit and Wolf (2004).
    """
    n, S, fourth = len(z), 0.0, 0.0
    for batch in z.split(5000):
        batch = batch.double()
        S, fourth = S + batch.T @ batch / n, fourth + batch.square().sum(1).square().sum() / n
    target = S.diag().mean() * torch.eye(len(S), device=S.device, dtype=S.dtype)
    rho = ((fourth - S.square().sum()) / (n * (S - target).square().sum())).clamp(max=1)
    return S.lerp(target, rho)


def load(directory):
    """The flow of a finished run, with its best weights, in eval mode, frozen, on the CPU.

    -> data.py: ImageModel, which takes and gives bytes; its `flow` is the EBFlow of x in [0, 256)^D
    """
    path = Path(directory) / "checkpoint.pt"
    saved = read_checkpoint(path)
    with intact(path):
        config, best = saved["config"], saved["state"]["best"]
        s = Settings(**{name: value for name, value in config.items() if hasattr(Settings, name)})
        pre, flow = (make(s, config["images"][1:]) for make in (preprocessing, architecture))
        model = EBFlow([*pre.layers, *flow.layers], pre.shape)
        model.load_state_dict(best["model"])
        if best["epoch"] == 0:
            raise RunError(f"{path} is of a run that has not ended an epoch")
    return ImageModel(model, config["images"][1:]).eval().requires_grad_(False)


@torch.no_grad()
def track_moments(flow, x, fraction=1.0):
    """ours: moves the last layer, an actnorm, this fraction of the way towards mean 0 and variance 1 of its output.

    Score matching barely constrains the mean and scale of the flow's output. Likelihood does: under the prior N(0, I),
    mean 0 and variance 1 maximise it.
    """
    flow.layers[-1].initialize(EBFlow(flow.layers[:-1], flow.shape)(x), fraction)


# ---- Evaluation ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(split, model, images):
    """NLL of images in nats and bits/dim, with the exact log Z and the same dequantisation noise at every call."""
    torch.manual_seed(0)
    energy = 0.0
    for batch in images.split(1000):
        energy += model.energy(dequantize(batch).view(-1, *model.shape)).double().sum()
    nll = (energy / len(images) + model.log_z()).item()
    return {f"{split}_nll": nll, f"{split}_bpd": nll / (math.prod(model.shape) * math.log(2))}


def evaluate_run(s, device, rank=0, size=1):
    """Prints NLL and bits/dim of the validation and test images of --data by the finished run --evaluate."""
    if s.config() != settings.parse(Settings, []).config():
        raise RunError("--evaluate takes its settings from the run: leave out all flags but --data and --device")
    model, splits = load(s.evaluate).to(device), load_images(s.data)
    if splits[0].shape[1:] != model.image:
        raise RunError(f"{s.evaluate} is of images {model.image}, not {tuple(splits[0].shape[1:])} as in {s.data}")
    for name, images in zip(("val", "test"), splits[1:]):
        figures = evaluate(name, model.flow, images.to(device))
        print("  ".join(f"{key} {value:.4f}" for key, value in figures.items()), f" of {len(images):,} images")
    print("nothing was trained or refitted", flush=True)


def main(argv=None):
    with one_line_errors(DataError, ValueError, torch.linalg.LinAlgError):
        s = settings.parse(Settings, argv)
        with processes.joined(s.device) as place:
            evaluate_run(s, *place) if s.evaluate else train(s, *place)


if __name__ == "__main__":
    main()
