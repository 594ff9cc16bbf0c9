"""Training: one step of any objective, and the loop of epochs that evaluates, keeps the best and resumes."""

import contextlib
import copy
import math
import time

import torch
from torch.nn.utils import clip_grads_with_norm_, vector_to_parameters
from tqdm import tqdm

import losses
import processes
from run import RunError


def objective(args, model, x):
    """The loss of one batch, or of this process's share of it (see processes.py).   (B, *shape) -> ()"""
    mine = processes.share(len(x))  # of the random numbers, too: all processes draw those of the whole batch
    if args.loss == "ml":
        return losses.ml(model.log_prob, x[mine])
    if args.loss == "sml":
        return losses.sml(model.energy, x[mine], model.sample(args.model_samples)[processes.share(args.model_samples)])
    if args.loss == "ssm":
        return losses.ssm(model.energy, x[mine], losses.rademacher(x)[mine])
    if args.loss == "dsm":
        return losses.dsm(model.energy, x[mine], args.sigma, torch.randn_like(x)[mine], getattr(args, "targets", "own") == "pooled")
    return losses.fdssm(model.energy, x[mine], args.xi, losses.on_sphere(x, args.xi)[mine])


def trainable(model):
    """What is trained, tensors of a multiple of 4 elements first: in one vector they start at multiples of 16 bytes, as a GPU's products like them."""
    return sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: p.numel() % 4 > 0)


def as_vector(model):
    """One vector θ, of which what is trained in the model are views from now on, and its gradient, 0.   -> (n,)

    Optimiser, norm and clipping then pass over one tensor. The toys have 102, and a call for each costs more than its arithmetic.
    A model that is moved to another device or type afterwards is no view any more.
    """
    parameters = trainable(model)
    theta = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    vector_to_parameters(theta.detach(), parameters)
    theta.grad = torch.zeros_like(theta)
    return theta


def make_optimizer(args, model):
    """Of what is trained in the model, from now on one vector (`as_vector`)."""
    theta = as_vector(model)
    if args.optimizer == "rmsprop":
        return torch.optim.RMSprop([theta], lr=args.lr)
    return torch.optim.Adam([theta], lr=args.lr, weight_decay=args.weight_decay, fused=True)


def theta_of(optimizer):
    return optimizer.param_groups[0]["params"][0]


def train_step(args, model, x, optimizer):
    """One update of the parameters.   -> (2,): the loss and the norm of its gradient, still on the device"""
    return torch.stack(update(args, objective(args, model, x), model, optimizer))


def update(args, loss, model, optimizer):
    """One step of the optimizer down the loss, for the model whose θ it has.   -> the loss and the norm of its gradient, () each"""
    return descend(args, backward(loss, trainable(model), theta_of(optimizer)), optimizer)


def backward(loss, parameters, theta):
    """Leaves the gradient of the loss in that of θ, the vector of the parameters.   -> the loss, ()"""
    gradient_vector(loss, parameters, out=theta.grad)
    return loss.detach()


def gradient_vector(loss, parameters, out=None):
    """∇_θ of the loss, 0 for a parameter that it does not depend on.   -> (n,)

    For the parameters alone: the noisy image is a leaf as well, and would be given a gradient that nobody reads.
    """
    parts = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts], out=out)


def descend(args, loss, optimizer):
    """One step of the optimizer down the gradient that its θ holds.   -> loss and norm, as `update`"""
    theta = theta_of(optimizer)
    loss = processes.average(loss, theta.grad)
    norm = theta.grad.norm()
    if args.clip:
        clip_grads_with_norm_(theta, args.clip, norm)
    optimizer.step()
    return loss, norm


class Graphed:
    """A function of a batch whose kernels a GPU records at the first call, as one CUDA graph, and replays from then on.

    A step on a small batch is hundreds of short kernels, and python takes longer to start one than the GPU to run it. What is
    recorded must not wait for the GPU, nor depend on numbers of python that change: a σ that falls is a tensor, and filled.
    Tensors that it reads or writes are changed in place only. Random numbers are drawn anew in every replay. Where x is not on a GPU,
    it is the function itself. Raises ValueError where x has another shape than the first one.
    """

    def __init__(self, function):
        self.function, self.graph = function, None

    def __call__(self, x):
        if not x.is_cuda:
            return self.function(x)
        with torch.cuda.device(x.device):
            if self.graph is None:
                self._record(x)
            if x.shape != self.x.shape:
                raise ValueError(f"recorded for batches of shape {tuple(self.x.shape)}, not {tuple(x.shape)}")
            self.x.copy_(x)
            self.graph.replay()
        return self.value  # the next call writes over it

    def _record(self, x):
        self.x, graph = x.clone(), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.random.fork_rng([x.device]):  # a run that is resumed records at another step, and draws the same numbers
            with torch.cuda.stream(stream):
                for _ in range(3):  # what libraries set up at their first calls is not to be recorded
                    self.function(self.x)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                self.value = self.function(self.x)
        self.graph = graph


def compiled(function):
    """The function as torch.compile makes it: its element-wise operations are fused, and python is not asked between them.

    It may take gradients, of any order. Random numbers are those of the function itself. Each new shape is compiled anew.
    For a CPU; raises RunError at the first call where there is no compiler.
    """
    torch._dynamo.config.trace_autograd_ops = True  # the ∇_x of the score is taken inside
    function = torch.compile(function, fullgraph=True, dynamic=False, isolate_recompiles=True, options={"fallback_random": True})

    def call(*tensors):
        try:
            return function(*tensors)
        except torch._inductor.exc.InductorError as error:
            raise RunError(f"torch.compile failed ({str(error).splitlines()[0]}): install a C++ compiler and python's headers, or "
                           "go on without --compile and with --resume") from None

    return call


def gradient_of(args, model, optimizer, graphed=None):
    """(B, …) -> (): the objective of a batch, whose gradient is left in that of the optimizer's θ.

    With --compile, for a CPU, it is `compiled`. `graphed`, by default on a GPU, it is recorded (`Graphed`) as far as it does
    not wait for the GPU, as log Z does, which looks whether its determinants are finite: score matching as a whole, of `ml`
    the energy, to whose gradient that of log Z is added, `sml` not at all. Raises ValueError where θ is not the model's.
    """
    parameters, theta = trainable(model), theta_of(optimizer)
    sizes = [p.numel() for p in parameters]
    if sum(sizes) != len(theta) or any(p.data_ptr() != part.data_ptr() for p, part in zip(parameters, theta.split(sizes))):
        raise ValueError("the optimizer is of another model, or the model was moved since it was made")
    if graphed is None:
        graphed = theta.is_cuda

    def whole(x):
        return backward(objective(args, model, x), parameters, theta)

    if args.compile:
        return compiled(whole)
    if not graphed or args.loss == "sml":
        return whole
    if args.loss != "ml":
        return Graphed(whole)
    energy = Graphed(lambda x: backward(model.energy(x[processes.share(len(x))]).mean(), parameters, theta))

    def in_two_parts(x):
        loss, log_z = energy(x), model.log_z()
        theta.grad += gradient_vector(log_z, parameters)
        return loss + log_z.detach().to(loss)

    return in_two_parts


class MovingAverage:
    """θ̃ ← mθ̃ + (1-m)θ after each step (the paper's EMA), over the parameters that are trained.

    In the first steps m is (1+n)/(10+n), so that θ̃ soon forgets where it started. The count is kept on the host:
    torch's AveragedModel keeps it on the device, and a GPU would have to be waited for at every step.
    """

    def __init__(self, model, m):
        self.model = copy.deepcopy(model)
        self.m, self.n = m, 0
        self.averages, self.parameters = trainable(self.model), trainable(model)

    @torch.no_grad()
    def update(self):
        m = min(self.m, (1 + self.n) / (10 + self.n)) if self.n else 0.0
        torch._foreach_lerp_(self.averages, self.parameters, 1 - m)
        self.n += 1

    def state_dict(self):
        return {"model": self.model.state_dict(), "n": self.n}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.n = state["n"]


@contextlib.contextmanager
def fast_matmul(loss):
    """Lets a GPU multiply in TF32, and a CPU in bfloat16 where it has units for that (AMX). On a CPU that has none
    the products stay float32, but come from oneDNN instead of MKL, which is slow on AMD processors. For training only.

    Not for fdssm: it divides small differences of energies by ξ². In TF32 their rounding adds to the gradient of the convolutional
    flow a noise four fifths as large as that of a batch (of the other two 3 % and 4 %).
    """
    exact, amx = loss == "fdssm", torch.cpu.get_capabilities().get("amx_bf16", False)
    on_gpu = "ieee" if exact else "tf32"
    precisions = ((torch.backends.cuda.matmul, on_gpu), (torch.backends.cudnn.conv, on_gpu),
                  (torch.backends.mkldnn.matmul, "ieee" if exact and amx else "bf16"))
    before = [products.fp32_precision for products, _ in precisions]
    for products, precision in precisions:
        products.fp32_precision = precision
    try:
        yield
    finally:
        for (products, _), precision in zip(precisions, before):
            products.fp32_precision = precision


# ---------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------


def fit(args, run, model, average, optimizer, seen, minibatches, steps, evaluate, context=contextlib.nullcontext):
    """Trains to the last epoch, from the run's checkpoint on if it has one.   -> the state of the best epoch

    seen         the model whose energy the objective sees: `model`, or the part of it after pre-processing
    minibatches  (epoch) -> an iterator over the batches of an epoch, `steps` of them
    evaluate     (model) -> a row of figures, among them "val_nll", which decides which epoch is kept
    context      () -> the context in which the steps are done, but not the evaluation

    Leaves in run.metrics a row for the start (epoch 0) and one for each epoch. Raises RunError where a loss, a
    gradient or a figure is not finite, or a weight singular; it names the step.
    """
    evaluated = average.model if args.ema else model
    gradient = gradient_of(args, seen, optimizer)
    parts = {"model": model, "average": average, "optimizer": optimizer}
    if run.state:
        restore(parts, run.state)
        done, best, seconds = run.state["epoch"], run.state["best"], run.metrics[-1]["seconds"]
    else:
        done, best, seconds = 0, {"val_nll": math.inf}, 0.0
        run.metrics.append({"epoch": 0, "step": 0, "loss": None, **checked(args, 0, evaluate, evaluated),
                            "seconds": 0.0, "batches_per_second": None})  # what the start alone is worth
    with tqdm(total=args.epochs * steps, initial=done * steps, unit=" batches", dynamic_ncols=True,
              disable=processes.rank() > 0) as bar:
        for epoch in range(done + 1, args.epochs + 1):
            start = time.perf_counter()
            bar.set_postfix(epoch=epoch, best_val_nll=f"{best['val_nll']:.4g}", refresh=False)
            with context():
                trace = train_epoch(args, epoch, gradient, average, optimizer, minibatches, steps, bar)
            rate = steps / (time.perf_counter() - start)
            row = checked(args, epoch, evaluate, evaluated)
            seconds += time.perf_counter() - start
            run.metrics.append({"epoch": epoch, "step": epoch * steps, "loss": trace[:, 0].mean().item(),
                                "grad_norm": trace[:, 1].mean().item(), **row,
                                "seconds": seconds, "batches_per_second": rate})
            if row["val_nll"] < best["val_nll"]:
                best = {"epoch": epoch, "val_nll": row["val_nll"], "model": copy.deepcopy(evaluated.state_dict())}
            run.save({name: part.state_dict() for name, part in parts.items()} | {"epoch": epoch, "best": best})
    return best


def restore(parts, state):
    """Puts back what a checkpoint holds of each part. Raises RunError where it does not fit."""
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except torch.OutOfMemoryError:
        raise
    except (KeyError, ValueError, RuntimeError):  # of torch, when names or shapes differ
        raise RunError("the checkpoint was written by another version of this code: start anew with --overwrite") from None


def train_epoch(args, epoch, gradient, average, optimizer, minibatches, steps, bar):
    """`steps` updates down a gradient (see `gradient_of`).   -> (steps, 2): loss and gradient norm of each

    Every epoch starts its own random numbers, so that a resumed run has no generator to restore. The trace stays
    on the device and is read every 50 steps: a GPU need not wait for the bar.
    """
    torch.manual_seed(1_000_003 * args.seed + epoch)
    trace = torch.empty(steps, 2, device=theta_of(optimizer).device)
    for step, x in enumerate(minibatches(epoch)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, epoch, (epoch - 1 + step / steps) / args.epochs)
        try:
            trace[step] = torch.stack(descend(args, gradient(x), optimizer))
        except torch.linalg.LinAlgError as error:  # of ml's determinants and sml's inverse
            raise RunError(f"{error}, at epoch {epoch}, step {step + 1}: {remedy(args)}") from None
        average.update()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            check_finite(args, trace[:step + 1], epoch)
            bar.update((epoch - 1) * steps + step + 1 - bar.n)
    return trace


def learning_rate(args, epoch, progress):
    """The learning rate, by the epoch (from 1) and the fraction of the run: by time alone, nothing to resume."""
    if args.schedule == "steps":  # as published
        return args.lr * args.decay ** min(epoch - 1, 49)
    rise = min(1.0, progress / args.warmup) if args.warmup else 1.0
    fall = max(0.0, (progress - args.hold) / (1 - args.hold))
    return args.lr * rise * 0.5 * (1 + math.cos(math.pi * fall))


def check_finite(args, trace, epoch):
    """Raises RunError at the first step of the epoch whose loss or gradient is not finite."""
    bad = (~trace.isfinite().all(1)).nonzero()
    if len(bad):
        step = bad[0].item()
        loss, norm = trace[step].tolist()
        raise RunError(f"the loss is {loss:g} and the norm of its gradient {norm:g} at epoch {epoch}, step {step + 1}: "
                       + remedy(args))


def checked(args, epoch, evaluate, model):
    """`evaluate`, but a figure that is not finite, or a singular weight, is a RunError that names the epoch."""
    try:
        row = evaluate(model)
    except torch.linalg.LinAlgError as error:
        raise RunError(f"{error}, after epoch {epoch}: {remedy(args)}") from None
    if not math.isfinite(row["val_nll"]):
        raise RunError(f"the validation NLL is {row['val_nll']} after epoch {epoch}: {remedy(args)}")
    return row


def remedy(args):
    knobs = [name for name in ("start_smoothing", "sigma", "xi") if hasattr(args, name)]
    knob = f", raise --{knobs[0].replace('_', '-')}" if knobs else ""
    clip = f"lower --clip (it is {args.clip:g})" if args.clip else "set --clip"
    return f"lower --lr (it is {args.lr:g}), {clip}{knob}; the last checkpoint that was written is kept"
