"""Trains an energy-based flow on MNIST, or on other images, in colour too.

    python train_mnist.py --loss dsm

One run fills one directory: curves.png, samples.png, metrics.jsonl, config.json, and checkpoint.pt, from which
--resume continues. NLL is that of images in [0, 256)^D, in nats; bits/dim = NLL / (D ln 2). The validation split
decides which epoch is kept, and the test split is read once, at the end. Recipes and settings: support/settings.py.
"""

import copy
import math

import support  # before torch: makes Ctrl-C and SIGTERM one line each
import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from data import DataError, dequantize, digest, load_images
from ebflow import EBFlow, cnn_flow, fc_flow, glow_flow, logit_preprocessing
from layers import ActNorm, ConstantChannel, FullyConnected
from losses import OBJECTIVES
from support import plots, processes, settings
from support.fast import accelerated, fast_products
from support.optimization import cosine, trainable, update_average
from support.run import Run, RunError, one_line_errors


def train(s, device):
    # Data: bytes (n, C, H, W), on the device
    splits = load_images(s.data)
    train_set, val_set, test_set = [split.to(device) for split in splits]
    steps = len(train_set) // s.batch_size
    if steps == 0:
        raise RunError(f"{len(train_set)} training images do not fill a batch of {s.batch_size}: lower --batch-size")

    # Flow: x -> z by the pre-processing, z -> u by what is trained
    torch.manual_seed(s.seed)
    pre, flow = build(s, splits[0])
    model = EBFlow([*pre.layers, *flow.layers], pre.shape).to(device)  # of x; pre and flow are its parts
    averaged = copy.deepcopy(model)                                    # θ̃ of EMA
    step, optimizer = make_step(s, pre, flow, model, averaged)

    parts = {"model": model, "averaged": averaged, "optimizer": optimizer}
    with Run(s, "lower --lr, or set or lower --clip", parts, images=[*splits[0].shape], sha256=digest(splits)) as run:
        print(model, flush=True)
        best = run.state["best"] if run.state["epoch"] >= 0 else {"epoch": 0, "val_nll": math.inf, "model": {}}
        for epoch in range(run.state["epoch"] + 1, s.epochs + 1):      # epoch 0 shows what the start alone is worth
            torch.manual_seed(1_000_003 * s.seed + epoch)              # a resumed run has no generator to restore
            order = torch.randperm(len(train_set), device=device)[:steps * s.batch_size]
            batches = order.split(s.batch_size) if epoch else ()
            for i, index in enumerate(run.watch(epoch, batches)):
                n = (epoch - 1) * steps + i                            # steps before this one
                factor = cosine(n / (s.epochs * steps)) if s.schedule == "cosine" else s.decay ** min(epoch - 1, 49)
                optimizer.param_groups[0]["lr"] = s.lr * factor
                run.record(step(train_set[index], n))

            evaluated = copy.deepcopy(averaged if s.ema else model)
            if s.actnorm == "moments":                                 # ours: clean images; training saw noisy ones
                torch.manual_seed(0)
                track_moments(evaluated, dequantize(train_set[:5000]).view(-1, *model.shape))
            row = {"epoch": epoch, "step": epoch * steps, "loss": None} | run.means
            row |= evaluate("val", evaluated, val_set)                 # exact, with log Z
            if epoch and row["val_nll"] < best["val_nll"]:
                best = {"epoch": epoch, "val_nll": row["val_nll"], "model": evaluated.state_dict()}
            run.save(row, {"epoch": epoch, "best": best}, shown=("loss", "batches_per_second"))

        model.load_state_dict(best["model"])
        test = {"best_epoch": best["epoch"], "best_val_nll": best["val_nll"]} | evaluate("test", model, test_set)
        torch.manual_seed(0)
        samples = model.sample(64).view(64, *splits[0].shape[1:])
        run.finish(test)
        run.picture("curves.png", plots.curves(run.metrics, s.loss))
        run.picture("samples.png", plots.mosaic(samples))


def make_step(s, pre, flow, model, averaged):
    """A training step, (images, n) -> {"loss": (), "grad_norm": ()} still on the device, and its optimiser.

    pre    the pre-processing x -> z
    flow   the flow of z
    model  the flow of x, whose parameters are trained; averaged has their moving averages
    """
    matched = flow if s.map else model                                 # MaP: whose energy the objective sees
    if s.loss == "dsm" and s.sigma == 0:
        raise RunError("--sigma must be above 0 for dsm, which divides by it")
    parameters, averages = trainable(model), trainable(averaged)
    if s.optimizer == "adam":
        optimizer = torch.optim.Adam(parameters, lr=s.lr, weight_decay=s.weight_decay, fused=True)
    else:
        optimizer = torch.optim.RMSprop(parameters, lr=s.lr, weight_decay=s.weight_decay)
    objective, config = OBJECTIVES[s.loss], s.config()                 # losses.py: it reads its own settings only

    def gradient(z):                                                   # leaves ∇_θ in p.grad
        loss = objective(matched, z, share=processes.share, **config)
        if s.energy_weight > 0:                                        # λ·E(z), published for Glow alone
            loss = loss + s.energy_weight * matched.energy(processes.share(z)).mean()
        loss.backward(inputs=parameters)                               # not for z, which is a leaf in ssm and dsm, too
        return loss.detach()

    gradient = accelerated(gradient, parameters, s)                    # support/fast.py

    @fast_products(s.loss)                                             # support/fast.py
    def step(images, n):
        images = images.flip(3) if s.flip and n % 2 else images        # mirrors every second batch
        x = dequantize(images).view(-1, *model.shape)                  # (B, C, H, W) -> (B, *shape)
        z = pre(x) if s.map else x                                     # MaP: match after pre-processing
        if s.loss in ("ssm", "fdssm") and s.sigma > 0:                 # ours: data as smooth as dsm's
            z = z + s.sigma * torch.randn_like(z)
        if s.actnorm == "moments" and n % 10 == 0:                     # ours: see track_moments
            noise = torch.randn_like(z)
            track_moments(matched, z + s.sigma * noise if s.loss == "dsm" else z, fraction=0.1)
        optimizer.zero_grad()
        loss = gradient(z)
        loss = processes.average(loss, parameters)                     # over torchrun's processes
        norm = get_total_norm([p.grad for p in parameters])
        if s.clip:
            clip_grads_with_norm_(parameters, s.clip, norm)
        optimizer.step()
        update_average(averages, parameters, n)                        # EMA
        return {"loss": loss, "grad_norm": norm}

    return step, optimizer


# ---- The model -------------------------------------------------------------------------------------------------------

@torch.no_grad()
def build(s, images):
    """The pre-processing x -> z and the flow of z. Constants are measured on the training images, uint8 (n, C, H, W).

    ours: z is centred or whitened. Whitening is one more linear layer, which is not trained. With --arch fc the family
    of densities is the same with and without it, since W₁ times the whitening matrix is another W₁.
    """
    shape = (images[0].numel(),) if s.arch == "fc" else tuple(images.shape[1:])
    pre = logit_preprocessing(shape, s.s)
    if s.normalize != "none":
        first, second = 0.0, 0.0
        for batch in images.split(1000):
            z = pre(dequantize(batch).view(-1, *shape)).flatten(1).double()  # (B, D)
            first = first + z.sum(0)
            second = second + z.T @ z if s.normalize != "center" else 0.0  # slow, not needed there
        mean = first / len(images)
        covariance = second / len(images) - mean.outer(mean)
        std = covariance.diag().sqrt().view(shape) if s.normalize == "scale" else 1.0
        pre = logit_preprocessing(shape, s.s * std, mean=s.s * mean.view(shape))  # z was divided by s.s already
    if s.normalize == "whiten":
        variances, U = torch.linalg.eigh(covariance)
        if variances[0] < 1e-10 * variances[-1]:
            raise RunError(f"{len(images)} images have a singular covariance and cannot be whitened: give more "
                           "images, or --normalize center")
        whitening = FullyConnected(math.prod(shape)).requires_grad_(False)
        whitening.weight.copy_(U @ (variances.rsqrt()[:, None] * U.T))  # symmetric: pixels stay pixels
        pre = EBFlow([*pre.layers, whitening], shape)
    if s.arch == "glow" and s.actnorm == "none":
        raise RunError("--arch glow has actnorms: --actnorm is trained, moments or held")
    try:
        if s.arch == "fc":
            flow = fc_flow(*shape, diagonal=s.diagonal, bias=s.bias, bend=s.bend)
        elif s.arch == "cnn":
            flow = cnn_flow(shape, diagonal=s.diagonal, bias=s.bias, bend=s.bend)
        else:
            flow = glow_flow(shape, s.width, s.depth, floor=s.floor, tanh=s.coupling == "tanh")
    except ValueError as error:  # an image that does not squeeze, a floor too low
        size = f"{images.shape[-2]}×{images.shape[-1]}"
        raise RunError(f"--arch {s.arch} on images of {size}: {error}") from None
    if s.actnorm != "none":
        if s.arch != "glow":
            flow = EBFlow([*flow.layers, ActNorm(flow.shapes[-1][0])], shape)
        flow.initialize(pre(dequantize(images[:1000].view(-1, *shape))))
        for layer in flow.modules() if s.actnorm == "held" else flow.layers[-1:]:
            if isinstance(layer, ActNorm):
                layer.requires_grad_(s.actnorm == "trained")
    return pre, flow


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


def main(argv=None):
    s = settings.parse(settings.Mnist, argv)
    shared = {"--batch-size": s.batch_size} | ({"--model-samples": s.model_samples} if s.loss == "sml" else {})
    errors = one_line_errors(DataError, ConstantChannel, torch.linalg.LinAlgError)
    with errors, processes.joined(s.device, shared) as device:
        train(s, device)


if __name__ == "__main__":
    main()
