# An unofficial reimplementation of EBFlow (arXiv 2305.15267). MIT licence, copyright (c) 2026 its contributors.
"""The objectives: maximum likelihood in two ways, score matching in four, on any energy.

`energy` is a callable (B, …) -> (B,): an EBFlow's method, a torch module, or minus the log-density of any other flow.
D is the number of elements of one event and ∇ is ∇_x. Each function returns a scalar: the mean over the batch of a sum
over dimensions. `ssm` and `fdssm` estimate `sm`; `dsm` is `sm` at the noisy points, plus the constant D/2σ².

    objective  needs                            cost of one gradient for L linear layers and a batch of B
    ml         the exact log-density            O(BD²L + D³L)   determinants
    sml        samples of the model             O(BD²L + D³L)   the inverse
    sm         the trace of the Hessian         D backward passes
    ssm        one Hessian-vector product       O(BD²L)
    fdssm      three energies and no ∇_x        O(BD²L)
    dsm        one score                        O(BD²L)

The last four see only differences and derivatives of the energy in x. An additive constant such as log Z changes
neither, so it gets no gradient. Every random tensor can be passed in. `sm` and `ssm` need a continuous ∇E: for a
network with ReLU their minimum is any constant energy, so take SiLU, tanh or softplus, or `dsm`. The sign of an energy
is easily wrong: it is minus a log-density. `dsm` of E = 0 is D/2σ² on average; a trained energy is below that.

Source: Chao et al. (NeurIPS 2023); poster, Eqs. (2) to (7).
"""

import torch


def ml(log_prob, x):
    """Maximum likelihood: E[ -log p(x) ], in nats. `log_prob` is the exact log-density.   Poster, Eq. (2)."""
    return -values(log_prob, x).mean()


def sml(energy, x, x_model):
    """Maximum likelihood from samples: E_data[ E(x) ] - E_model[ E(x') ].   Poster, Eq. (4).

    It has the gradient of `ml`, because ∇_θ log Z = -E_model[ ∇_θ E(x') ], but its value is not a likelihood.
    x_model (B', …) are samples of the model.
    """
    x_model = torch.cat([x, x_model.detach()])[len(x):]  # refuses samples of another event shape
    return values(energy, x).mean() - values(energy, x_model).mean()


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
    v = rademacher(x) if v is None else v.view_as(x)
    x, grad = _grad(energy, x)
    Hv, = torch.autograd.grad(_dot(grad, v).sum(), x, create_graph=True)
    return (0.5 * _dot(grad, grad) - _dot(v, Hv)).mean()


def fdssm(energy, x, xi, eps=None):
    """Sliced score matching by finite differences; it tends to `sm` as ξ → 0, with an error O(ξ²)   (Pang et al. 2020):

        (D/ξ²) · ( E[ 2E(x) - E(x+ε) - E(x-ε) ] + ⅛ E[ (E(x+ε) - E(x-ε))² ] ),   ε uniform on the sphere ‖ε‖ = ξ

    eps like x, with norm ξ for each sample. The energy is called once, on 3B rows. If it takes a condition c, pass
    c.repeat(3, 1). The rounding error of the value is about the machine epsilon times D·E/ξ². With E ≈ 1000, as on
    MNIST, it exceeds 1 in float32 below ξ ≈ 0.1. Poster, Eq. (6).
    """
    if not xi > torch.finfo(x.dtype).eps ** 0.5:
        raise ValueError(f"at ξ = {xi} no digit of E(x ± ε) - E(x) is left in {x.dtype}")
    eps = on_sphere(x, xi) if eps is None else eps.view_as(x)
    D = x[0].numel()
    E, E_plus, E_minus = values(energy, torch.cat([x, x + eps, x - eps])).chunk(3)
    return D / xi**2 * (2 * E - E_plus - E_minus + (E_plus - E_minus).square() / 8).mean()


@torch.enable_grad()
def dsm(energy, x, sigma, noise=None, pooled=False):
    """Denoising score matching: E[ ½‖∇E(x̃) + (x - x̃)/σ²‖² ], x̃ = x + σ·noise   (Vincent 2011; poster, Eq. (7)).

    noise like x, standard normal; sigma is a number, or one for each sample. The minimiser is the data density smoothed
    by N(0, σ²I). ours: with `pooled`, the target x is replaced by the mean of the batch given x̃, Σ_j w_j x_j with
    w_j ∝ exp( -‖x̃ - x_j‖² / 2σ² ). The expected gradient is the same, because x̃ came from x_j with probability w_j.
    The variance is smaller where points lie closer than σ. Source of the idea: Xu et al. (2023), stable target field.
    """
    noise = torch.randn_like(x) if noise is None else noise.view_as(x)
    sigma = _along_batch(sigma, x) if getattr(sigma, "ndim", 0) else sigma
    x_noisy = x + sigma * noise
    if pooled:
        products = x_noisy.flatten(1) @ x.flatten(1).T  # (B, B); ‖x̃‖² is constant in each row and cancels
        w = torch.softmax((products - 0.5 * _dot(x, x)) / sigma**2, dim=1)
        noise = (x_noisy - (w @ x.flatten(1)).view_as(x)) / sigma
    _, grad = _grad(energy, x_noisy)  # ∇E(x̃)
    return 0.5 * (grad - noise / sigma).square().flatten(1).sum(1).mean()


def rademacher(x):
    """Random signs.   like x"""
    return torch.randint(0, 2, x.shape, device=x.device).to(x.dtype) * 2 - 1


def on_sphere(x, radius):
    """Uniform on the sphere ‖ε‖ = radius, for each sample.   like x"""
    eps = torch.randn_like(x)
    return eps * _along_batch(radius / eps.flatten(1).norm(dim=1), x)


def values(f, x):
    """f(x), one number for each sample, of that sample alone. The gradient of a mean would pass for ∇E.   -> (B,)"""
    y = f(x)
    if y.shape != x.shape[:1] or not y.is_floating_point():
        raise ValueError(f"energies of {tuple(x.shape)} are floats ({len(x)},), not {y.dtype} {tuple(y.shape)}: pass "
                         "flow.energy or lambda x: -flow().log_prob(x), flatten (B, 1)")
    return y


def _grad(energy, x):
    """Detaches x, enables its gradient, and returns x and ∇E(x).   -> like x, like x"""
    x = x.detach().requires_grad_()
    return x, torch.autograd.grad(values(energy, x).sum(), x, create_graph=True)[0]


def _along_batch(t, x):
    """One number for each sample, in a shape that broadcasts with x (B, …).   (B,) -> (B, 1, …)"""
    ones = [1] * (x.dim() - 1)
    return t.view(len(t), *ones).expand(len(x), *ones)  # refuses one per element, and another batch


def _dot(a, b):
    """The inner product of each sample.   (B, …), (B, …) -> (B,)"""
    return (a * b).flatten(1).sum(1)


# --loss NAME minimises (model, x, **settings) -> ()
OBJECTIVES = {
    "ml": lambda model, x, **_: ml(model.log_prob, x),
    "sml": lambda model, x, model_samples, **_: sml(model.energy, x, model.sample(model_samples)),
    "ssm": lambda model, x, **_: ssm(model.energy, x),
    "dsm": lambda model, x, sigma, pooled=False, **_: dsm(model.energy, x, sigma, pooled=pooled),
    "fdssm": lambda model, x, xi, **_: fdssm(model.energy, x, xi),
}
