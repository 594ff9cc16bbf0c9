"""The objectives: maximum likelihood two ways, score matching four ways, on any energy.

`energy` is a callable (B, …) -> (B,): an EBFlow's method, a plain torch module, or minus the log-density of
somebody else's flow. D is the number of elements of one event, ∇ is ∇_x. Each function returns a scalar, the
mean over the batch of a sum over dimensions. sm, ssm, fdssm and dsm are on one scale.

    objective  needs                            cost of one gradient for L linear layers
    ml         the exact log-density            O(D³L)   determinants
    sml        samples of the model             O(D³L)   the inverse
    sm         the trace of the Hessian         D backward passes
    ssm        one Hessian-vector product       O(D²L)
    fdssm      three energies, no ∇_x at all    O(D²L)
    dsm        one score                        O(D²L)

The last four see the energy through differences and derivatives in x, so an additive constant of it, such as
log Z, has no gradient. Every random tensor can be passed in. Source: Chao et al. (NeurIPS 2023), sections
"Background" and "Training EBFlow", and the papers named below.
"""

import torch


def ml(log_prob, x):
    """Maximum likelihood: E[ -log p(x) ], in nats. `log_prob` is the exact log-density (B, …) -> (B,)."""
    return -log_prob(x).mean()


def sml(energy, x, x_model):
    """Maximum likelihood from samples: E_data[ E(x) ] - E_model[ E(x') ].

    Its gradient is that of `ml`, because ∇_θ log Z = -E_model[ ∇_θ E(x') ]; its value is not a likelihood.
    x_model (B', …) are samples of the model, held constant.
    """
    return energy(x).mean() - energy(x_model.detach()).mean()


@torch.enable_grad()  # ∇E is needed under no_grad, too
def sm(energy, x):
    """Score matching, exact: E[ ½‖∇E‖² - tr ∇²E ]   (Hyvärinen 2005). D backward passes: for small D."""
    x, grad = _grad(energy, x)
    elements = grad.flatten(1).unbind(1)  # D of (B,)
    trace = sum(torch.autograd.grad(g.sum(), x, create_graph=True)[0].flatten(1)[:, i]
                for i, g in enumerate(elements))
    return (0.5 * _dot(grad, grad) - trace).mean()


@torch.enable_grad()
def ssm(energy, x, v=None):
    """Sliced score matching: E[ ½‖∇E‖² - vᵀ∇²E v ], v Rademacher   (Song et al. 2019, variance-reduced form).

    v like x: random signs (any v with E[v vᵀ] = I is right).
    """
    if v is None:
        v = rademacher(x)
    x, grad = _grad(energy, x)
    Hv, = torch.autograd.grad(_dot(grad, v).sum(), x, create_graph=True)
    return (0.5 * _dot(grad, grad) - _dot(v, Hv)).mean()


def fdssm(energy, x, xi, eps=None):
    """Sliced score matching by finite differences, in the limit ξ → 0 `sm` with an error O(ξ²)   (Pang et al. 2020):

        (D/ξ²) · ( E[ 2E(x) - E(x+ε) - E(x-ε) ] + ⅛ E[ (E(x+ε) - E(x-ε))² ] ),   ε uniform on the sphere ‖ε‖ = ξ

    eps like x, of norm ξ for each sample. The three energies are one batch: three forward passes, one backward.
    """
    if eps is None:
        eps = on_sphere(x, xi)
    D = x[0].numel()
    E, E_plus, E_minus = energy(torch.cat([x, x + eps, x - eps])).chunk(3)
    return D / xi**2 * (2 * E - E_plus - E_minus + (E_plus - E_minus).square() / 8).mean()


@torch.enable_grad()
def dsm(energy, x, sigma, noise=None, pooled=False):
    """Denoising score matching: E[ ½‖∇E(x̃) + (x - x̃)/σ²‖² ], x̃ = x + σ·noise   (Vincent 2011).

    noise like x, standard normal. The minimiser is the data density smoothed by N(0, σ²I).

    The same x̃ could have come from other points of the batch. With `pooled`, x is replaced by their mean given x̃,

        Σ_j w_j x_j,      w_j ∝ exp( -‖x̃ - x_j‖² / 2σ² )

    which leaves the expected gradient as it is, since either way the target is the score of the batch smoothed by
    N(0, σ²I), and takes away the target's variance at x̃. Where σ is small beside the distances between points, as
    between images, w is 1 for x itself and nothing changes. Source of the idea: Xu et al. (2023), stable target field.
    """
    if noise is None:
        noise = torch.randn_like(x)
    x_noisy = x + sigma * noise
    if pooled:
        products = x_noisy.flatten(1) @ x.flatten(1).T  # (B, B); ‖x̃‖² is one number in each row, and w does not change with it
        w = torch.softmax((products - 0.5 * _dot(x, x)) / sigma**2, dim=1)
        noise = (x_noisy - (w @ x.flatten(1)).view_as(x)) / sigma
    _, grad = _grad(energy, x_noisy)
    residual = grad - noise / sigma
    return 0.5 * _dot(residual, residual).mean()


def rademacher(x):
    """Random signs.   like x"""
    return torch.randint(0, 2, x.shape, device=x.device).to(x.dtype) * 2 - 1


def on_sphere(x, radius):
    """Uniform on the sphere ‖ε‖ = radius, for each sample.   like x"""
    eps = torch.randn_like(x)
    return eps * (radius / eps.flatten(1).norm(dim=1)).view(-1, *[1] * (x.dim() - 1))


def _grad(energy, x):
    """x as a leaf and ∇E(x) as a function of it and of the parameters."""
    x = x.detach().requires_grad_()
    return x, torch.autograd.grad(energy(x).sum(), x, create_graph=True)[0]


def _dot(a, b):
    """The inner product of each sample.   (B, …), (B, …) -> (B,)"""
    return (a * b).flatten(1).sum(1)
