"""Speed. Every line that uses this file can be deleted: everything still runs, slower."""

import contextlib

import torch

from support.run import RunError


def accelerated(gradient, parameters, s):
    """With --compile the compiled function, on a GPU a CUDA graph, on a CPU or for ml and sml the function itself."""
    if s.compile:
        return compiled(gradient)
    return gradient if s.loss in ("ml", "sml") else Graphed(gradient, parameters)


class Graphed:
    """A gradient whose kernels a GPU records as one CUDA graph at the first call, and replays from then on.

    A step on a small batch is hundreds of short kernels, and python takes longer to start one than the GPU to run it.
    Parameters must change in place. Every replay draws new random numbers. Elsewhere it is the function itself.
    """

    def __init__(self, function, parameters):
        self.function, self.parameters, self.graph = function, parameters, None

    def __call__(self, *tensors):
        if not tensors[0].is_cuda:
            return self.function(*tensors)
        if self.graph is None:
            self._record(tensors)
        for recorded, tensor in zip(self.tensors, tensors, strict=True):
            recorded.copy_(tensor.view_as(recorded))
        self.graph.replay()
        for p, gradient in zip(self.parameters, self.gradients):
            p.grad = gradient
        return self.loss  # the next call overwrites it

    def _record(self, tensors):
        self.tensors, graph = [t.clone() for t in tensors], torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.random.fork_rng([tensors[0].device]):  # a resumed run warms up at another step, so leave no trace
            with torch.cuda.stream(stream):
                for _ in range(3):  # libraries set themselves up in their first calls; that is not to be recorded
                    self.function(*self.tensors)
                    for p in self.parameters:
                        p.grad = None
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                self.loss = self.function(*self.tensors)
        self.graph, self.gradients = graph, [p.grad for p in self.parameters]


def compiled(function):
    """The function by torch.compile, ∇_x inside included. Random numbers stay the same, rounding differs."""
    torch._dynamo.config.trace_autograd_ops = True  # a score takes ∇_x inside
    function = torch.compile(function, fullgraph=True, dynamic=False, isolate_recompiles=True,
                             options={"fallback_random": True})

    def call(*tensors):
        try:
            return function(*tensors)
        except torch._inductor.exc.InductorError as error:
            raise RunError(f"torch.compile needs a C++ compiler ({str(error).splitlines()[0]}): run without --compile")

    return call


@contextlib.contextmanager
def fast_products(loss):
    """Matrix products of a training step: TF32 on a GPU; on a CPU bfloat16 if it has AMX, else float32 by oneDNN.

    Not for `fdssm`, which divides small differences of energies by ξ²: the error of TF32 in the gradient of the CNN is
    0.8 of the batch's standard error. For ssm it is 0.03, for dsm 0.04. Not for `sml`, whose samples come from a linear
    solve: with TF32 the published recipe ends 20 nats higher. Evaluation stays outside.
    """
    exact, amx = loss in ("sml", "fdssm"), torch.cpu.get_capabilities().get("amx_bf16", False)
    on_gpu = "ieee" if exact else "tf32"
    wanted = ((torch.backends.cuda.matmul, on_gpu), (torch.backends.cudnn.conv, on_gpu),
              (torch.backends.mkldnn.matmul, "ieee" if exact and amx else "bf16"))  # without AMX: oneDNN, in float32
    with contextlib.ExitStack() as stack:  # puts back what was there
        for products, precision in wanted:
            stack.callback(setattr, products, "fp32_precision", products.fp32_precision)
            products.fp32_precision = precision
        yield
