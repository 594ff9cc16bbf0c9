# From EBFlow, the code beside arXiv 2305.15267. MIT licence, copyright (c) 2026 The EBFlow authors.
"""The objectives: maximum likelihood in two ways, score matching in four, on any energy.

`energy` is a callable (B, …) -> (B,): an EBFlow's method, a torch module, or minus the log-density of any other flow.
D is the number of elements of one event and ∇ is ∇_x. Each function returns a scalar: the mean over the batch of a sum
over dimensions. `ssm` and `fdssm` estimate `sm`; `dsm` is `sm` at the noisy points, plus the constant D/2σ².

    objective  needs                            cost of one gradient for L linear layers
    ml         the exact log-density            O(D³L)   determinants
    sml        samples of the model             O(D³L)   the inverse
    sm         the trace of the Hessian         D backward passes
    ssm        one Hessian-vector product       O(D²L)
    fdssm      three energies and no ∇_x        O(D²L)
    dsm        one score                        O(D²L)

The last four see only differences and derivatives of the energy in x. An additive constant such as log Z changes
neither, so it gets no gradient. Every random tensor can be passed in. Arguments that do not fit raise ValueError.

`sm` and `ssm` need a continuous ∇E. The Hessian of a network with ReLU is 0 almost everywhere, so a constant energy is
their minimum. Take SiLU, tanh or softplus, or `dsm`, which works with ReLU, too. The sign of an energy is easily wrong:
it is minus a log-density. `dsm` of E = 0 is D/2σ² on average; a trained energy is below that.

Source: Chao et al. (NeurIPS 2023); poster, Eqs. (2) to (7).
"""

import functools
import inspect

import torch


def ml(log_prob, x):
    """Maximum likelihood: E[ -log p(x) ], in nats. `log_prob` is the exact log-density.   Poster, Eq. (2)."""
    return -log_prob(x).mean()


def sml(energy, x, x_model):
    """Maximum likelihood from samples: E_data[ E(x) ] - E_model[ E(x') ].   Poster, Eq. (4).

    Its gradient is that of `ml`, because ∇_θ log Z = -E_model[ ∇_θ E(x') ]. x_model (B', …) are samples of the model.
    """
    return energy(x).mean() - energy(x_model.detach()).mean()


@torch.enable_grad()  # ∇E is needed under no_grad, too
def sm(energy, x):
    """Exact score matching: E[ ½‖∇E‖² - tr ∇²E ]   (Hyvärinen 2005). It takes D backward passes, so D must be small."""
    x, grad = _grad(energy, x)
    trace = sum(torch.autograd.grad(g.sum(), x, create_graph=True)[0].flatten(1)[:, i]
                for i, g in enumerate(grad.flatten(1).unbind(1)))  # D of (B,)
    return (0.5 * _dot(grad, grad) - trace).mean()


@torch.enable_grad()
def ssm(energy, x, v=None):
    """Sliced score matching: E[ ½‖∇E‖² - vᵀ∇²E v ]   (Song et al. 2019, variance-reduced form; poster, Eq. (5)).

    v like x: random signs (Rademacher); any v with E[v vᵀ] = I is right.
    """
    v = rademacher(x) if v is None else v
    x, grad = _grad(energy, x)
    Hv, = torch.autograd.grad(_dot(grad, v).sum(), x, create_graph=True)
    return (0.5 * _dot(grad, grad) - _dot(v, Hv)).mean()


def fdssm(energy, x, xi, eps=None):
    """Sliced score matching by finite differences; it tends to `sm` as ξ → 0, with an error O(ξ²)   (Pang et al. 2020):

        (D/ξ²) · ( E[ 2E(x) - E(x+ε) - E(x-ε) ] + ⅛ E[ (E(x+ε) - E(x-ε))² ] ),   ε uniform on the sphere ‖ε‖ = ξ

    eps like x, with norm ξ for each sample. The energy is called once, on 3B rows. If it takes a condition c, pass
    c.repeat(3, 1). The rounding error of the value is about the machine epsilon times D·E/ξ². With E ≈ 1000, as on
    MNIST, float32 loses its digits below ξ ≈ 0.01. Poster, Eq. (6).
    """
    eps = on_sphere(x, xi) if eps is None else eps
    D = x[0].numel()
    E, E_plus, E_minus = energy(torch.cat([x, x + eps, x - eps])).chunk(3)
    return D / xi**2 * (2 * E - E_plus - E_minus + (E_plus - E_minus).square() / 8).mean()


@torch.enable_grad()
def dsm(energy, x, sigma, noise=None, pooled=False):
    """Denoising score matching: E[ ½‖∇E(x̃) + (x - x̃)/σ²‖² ], x̃ = x + σ·noise   (Vincent 2011; poster, Eq. (7)).

    noise like x, standard normal. The minimiser is the data density smoothed by N(0, σ²I).
    ours: with `pooled`, the target x is replaced by the mean of the batch given x̃, Σ_j w_j x_j with
    w_j ∝ exp( -‖x̃ - x_j‖² / 2σ² ). The expected gradient is the same, because x̃ came from x_j with probability w_j.
    The variance is smaller where points lie closer than σ. Source of the idea: Xu et al. (2023), stable target field.
    """
    noise = torch.randn_like(x) if noise is None else noise
    x_noisy = x + sigma * noise
    if pooled:
        products = x_noisy.flatten(1) @ x.flatten(1).T  # (B, B); ‖x̃‖² is constant in each row and cancels
        w = torch.softmax((products - 0.5 * _dot(x, x)) / sigma**2, dim=1)
        noise = (x_noisy - (w @ x.flatten(1)).view_as(x)) / sigma
    x_noisy = x_noisy.detach().requires_grad_()
    grad, = torch.autograd.grad(energy(x_noisy).sum(), x_noisy, create_graph=True)  # ∇E(x̃)
    return 0.5 * (grad - noise / sigma).square().flatten(1).sum(1).mean()


def rademacher(x):
    """Random signs.   like x"""
    return torch.randint(0, 2, x.shape, device=x.device).to(x.dtype) * 2 - 1


def on_sphere(x, radius):
    """Uniform on the sphere ‖ε‖ = radius, for each sample.   like x"""
    eps = torch.randn_like(x)
    return eps * (radius / eps.flatten(1).norm(dim=1)).view(-1, *[1] * (x.dim() - 1))


def _grad(energy, x):
    """x as a leaf, and ∇E there as a function of it and of the parameters.   -> like x, like x"""
    x = x.detach().requires_grad_()
    return x, torch.autograd.grad(energy(x).sum(), x, create_graph=True)[0]


def _dot(a, b):
    """The inner product of each sample.   (B, …), (B, …) -> (B,)"""
    return (a * b).flatten(1).sum(1)


def validated(objective):
    """The objective, which raises ValueError where an argument does not fit, before anything broadcasts silently."""
    signature = inspect.signature(objective)

    def described(value):
        return f"{value.dtype} {tuple(value.shape)}" if torch.is_tensor(value) else f"a {type(value).__name__}"

    @functools.wraps(objective)
    def call(*args, **named):
        if torch.compiler.is_compiling():
            return objective(*args, **named)
        bound = signature.bind(*args, **named)
        (argument, energy), (_, x), *rest = bound.arguments.items()
        if not torch.is_tensor(x) or x.dim() < 2 or x.numel() == 0 or not x.is_floating_point():
            raise ValueError(f"x must be a batch of events in floating point, (B, …), not {described(x)}")
        if torch.is_inference_mode_enabled() or x.is_inference():
            raise ValueError("objectives differentiate the energy, which torch.inference_mode forbids: use no_grad")
        for name, value in rest:
            if name in ("xi", "sigma"):
                number = getattr(value, "ndim", 0 if isinstance(value, (int, float)) else 1) == 0
                least = torch.finfo(x.dtype).eps ** 0.5 if name == "xi" else 0  # below, E(x ± ε) - E(x) has no digits
                elsewhere = torch.is_tensor(value) and not value.is_cpu  # a GPU would have to be waited for
                if not (number and (elsewhere or least < value < torch.inf)):
                    raise ValueError(f"{name} must be one finite number above {least:.1g}, "
                                     f"not {value if number else described(value)}")
            elif name == "x_model" or name in ("v", "eps", "noise") and value is not None:
                if not (torch.is_tensor(value) and value.dtype == x.dtype and value.shape[1:] == x.shape[1:]
                        and (len(value) == len(x) or name == "x_model" and len(value) > 0)):
                    raise ValueError(f"{name} must be like x, {described(x)}, not {described(value)}")

        def values(x):
            E = energy(x) if callable(energy) else energy
            if not torch.is_tensor(E) or E.shape != x.shape[:1] or not E.is_floating_point():
                example = "flow.log_prob" if argument == "log_prob" else "flow.energy, lambda x: -flow().log_prob(x)"
                raise ValueError(f"{argument} must map {tuple(x.shape)} to one number for each sample, ({len(x)},), "
                                 f"not to {described(E)}: pass {example}, or flatten (B, 1)")
            return E

        bound.arguments[argument] = values
        try:
            return objective(*bound.args, **bound.kwargs)
        except RuntimeError as error:
            if "does not require grad" in str(error) or "not have been used in the graph" in str(error):
                raise ValueError(f"{objective.__name__} cannot differentiate the {argument} in x: write it without "
                                 "detach and no_grad, and not linear in x") from error
            raise

    return call


ml, sml, sm, ssm, fdssm, dsm = map(validated, (ml, sml, sm, ssm, fdssm, dsm))

# --loss NAME minimises (model, x, share, **settings) -> (). share(x) is this process's rows (support/processes.py).
OBJECTIVES = {
    "ml": lambda model, x, share, **_: ml(model.log_prob, share(x)),
    "sml": lambda model, x, share, model_samples, **_: sml(model.energy, share(x), share(model.sample(model_samples))),
    "ssm": lambda model, x, share, **_: ssm(model.energy, share(x), share(rademacher(x))),
    "dsm": lambda model, x, share, sigma, pooled=False, **_: dsm(
        model.energy, share(x), sigma, share(torch.randn_like(x)), pooled),
    "fdssm": lambda model, x, share, xi, **_: fdssm(model.energy, share(x), xi, share(on_sphere(x, xi))),
}
