"""The paper's claims, checked in float64 against something independent of the code that is checked.

    python -m pytest test_gradients.py -v
"""

import copy
import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, jacrev
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from ebflow import EBFlow, cnn_flow, fc_flow, glow_flow, logit_preprocessing, toy_flow
from layers import (ActNorm, AffineCoupling, Conv1x1, Convolution, FullyConnected, LinearLayer, LinearPart, Logit,
                    NonlinearPart, SmoothLeakyReLU, Squeeze, Standardize)
from losses import OBJECTIVES
from support import settings
from train_mnist import Settings, make_step


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def image_coupling():
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.Softplus(),
                                  torch.nn.Conv2d(4, 4, 3, padding=1))
    return EBFlow([FullyConnected(16), Squeeze(), ActNorm(4), Conv1x1(4), AffineCoupling(network)], (1, 4, 4))


ARCHITECTURES = {
    "fully-connected": lambda: fc_flow(5),
    "convolution": lambda: cnn_flow((1, 4, 4), kernel_size=3, blocks=2),
    "coupling": lambda: toy_flow(dim=3, blocks=2, width=6),
    "image coupling": image_coupling,
    "glow": lambda: glow_flow((1, 4, 4), width=3, depth=2, floor=0.5),
}
PLANES = {  # the same on two-dimensional events, where expectations are integrals in the plane
    "fully-connected": lambda: fc_flow(2),
    "convolution": lambda: cnn_flow((1, 1, 2), kernel_size=3, blocks=1),
    "coupling": lambda: toy_flow(dim=2, blocks=2, width=6),
}
SCORE_MATCHING = {"sm": losses.sm} | {
    name: lambda energy, x, row=OBJECTIVES[name]: row(SimpleNamespace(energy=energy), x, xi=0.3, sigma=0.3)
    for name in ("ssm", "fdssm", "dsm")}  # the rows that the training scripts use
objectives = pytest.mark.parametrize("objective", SCORE_MATCHING)


def perturbed(flow, scale=0.2):
    """The flow with every parameter moved at random: nothing holds only at the identity."""
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(scale * torch.randn_like(p))
    return flow


@pytest.fixture(params=ARCHITECTURES)
def flow(request):
    return perturbed(ARCHITECTURES[request.param]())


@pytest.fixture(params=PLANES)
def plane(request):
    return perturbed(PLANES[request.param]())


def gradients(loss, flow):
    """d loss / d parameter for each; zero where a parameter has no part in the loss."""
    parameters = dict(flow.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), grads)}


def flat(tensors):
    return torch.cat([t.flatten() for t in (tensors.values() if isinstance(tensors, dict) else tensors)])


def distance(a, b):
    """‖a - b‖ / ‖b‖"""
    return ((a - b).norm() / b.norm()).item()


def brute_force_log_abs_det(function, x):
    """log|det| of the Jacobian at each sample, by automatic differentiation of the whole map.   -> (B,)"""
    D = x[0].numel()
    jacobians = [jacrev(function)(sample[None]).view(D, D) for sample in x]
    return torch.stack([torch.linalg.slogdet(J).logabsdet for J in jacobians])


# ---- 1. log p = -E - log Z is the density of the flow ----------------------------------------------------------------

def test_log_prob_is_the_change_of_variables_with_the_brute_force_jacobian(flow):
    x = torch.randn(4, *flow.shape)
    u = flow(x).flatten(1)
    log_normal = -0.5 * u.square().sum(1) - 0.5 * u.shape[1] * math.log(2 * math.pi)
    expected = log_normal + brute_force_log_abs_det(flow, x)
    assert distance(flow.log_prob(x), expected) < 1e-12
    assert distance(-flow.energy(x) - flow.log_z(), expected) < 1e-12


def test_linear_layers_have_a_constant_log_determinant_and_it_is_the_brute_force_one(flow):
    for layer, shape in zip(flow.layers, flow.shapes):
        x = torch.randn(2, *shape)
        expected = brute_force_log_abs_det(lambda x: layer(x) if isinstance(layer, LinearLayer) else layer(x)[0], x)
        found = layer.log_abs_det(shape).expand(2) if isinstance(layer, LinearLayer) else layer(x)[1]
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_the_score_is_minus_the_gradient_of_the_energy_and_the_gradient_of_log_prob(flow):
    x = torch.randn(4, *flow.shape)
    step = 1e-6 * torch.randn_like(x)
    for log_density in (flow.log_prob, lambda x: -flow.energy(x)):
        difference = log_density(x + step) - log_density(x - step)
        assert distance((2 * flow.score(x) * step).flatten(1).sum(1), difference) < 1e-7


def test_the_density_integrates_to_one(plane):
    with torch.no_grad():
        samples = plane.sample(2000).flatten(1)
        center, half_width = samples.mean(0), 3 * (samples - samples.mean(0)).abs().amax(0)
        t = torch.linspace(-1, 1, 801)
        grid = center + half_width * torch.cartesian_prod(t, t)
        density = plane.log_prob(grid.view(-1, *plane.shape)).exp()
    assert abs(density.sum() * (half_width * (t[1] - t[0])).prod() - 1) < 1e-7


def test_inverse_undoes_forward(flow):
    x = torch.randn(4, *flow.shape)
    assert distance(flow.inverse(flow(x)), x) < 1e-11
    u = torch.randn(4, *flow.shapes[-1])
    assert distance(flow(flow.inverse(u)), u) < 1e-11


# ---- 2. Score matching does not see the linear layers' determinants --------------------------------------------------

@objectives
def test_score_matching_has_the_same_gradient_with_the_energy_as_with_the_exact_log_density(flow, objective):
    x = torch.randn(3, *flow.shape)
    found = []
    for energy in (flow.energy, lambda x: -flow.log_prob(x)):  # they differ by log Z, the linear log-determinants
        torch.manual_seed(1)
        found.append(gradients(SCORE_MATCHING[objective](energy, x), flow))
    for name in found[0]:
        scale = flat(found[1]).norm()
        assert (found[0][name] - found[1][name]).norm() < 1e-10 * scale, name


@pytest.mark.parametrize("architecture", ["fully-connected", "coupling", "image coupling"])
def test_maximum_likelihood_does_see_them_and_the_difference_is_minus_the_inverse_transpose(architecture):
    flow = perturbed(ARCHITECTURES[architecture]())
    x = torch.randn(3, *flow.shape)
    exact = gradients(losses.ml(flow.log_prob, x), flow)
    without = gradients(flow.energy(x).mean(), flow)
    for i, (layer, shape) in enumerate(zip(flow.layers, flow.shapes)):
        pixels = 1 if isinstance(layer, FullyConnected) else math.prod(shape[1:])  # the others act on each pixel
        for name, p in layer.named_parameters():
            if name == "weight" and isinstance(layer, (FullyConnected, Conv1x1)):
                expected = -pixels * torch.from_numpy(np.linalg.inv(p.detach().numpy())).T
            elif name == "log_scale":
                expected = torch.full_like(p, -pixels)
            else:  # biases, and the networks of couplings
                expected = torch.zeros_like(p)
            difference = exact[f"layers.{i}.{name}"] - without[f"layers.{i}.{name}"]
            torch.testing.assert_close(difference, expected, rtol=1e-10, atol=1e-12)


def test_for_a_convolution_the_difference_is_minus_the_inverse_transpose_of_its_matrix():
    flow = perturbed(EBFlow([Convolution(2, 3)], (2, 3, 4)))
    layer, x = flow.layers[0], torch.randn(3, 2, 3, 4)
    difference = (gradients(losses.ml(flow.log_prob, x), flow)["layers.0.weight"]
                  - gradients(flow.energy(x).mean(), flow)["layers.0.weight"])
    inverse = np.linalg.inv(jacrev(layer)(torch.zeros(1, 2, 3, 4)).view(24, 24).detach().numpy())
    expected = torch.empty_like(layer.weight)
    for k in itertools.product(*map(range, layer.weight.shape)):  # d log|det M| / d w_k = tr(M⁻¹ dM/dw_k)
        unit = Convolution(2, 3)
        torch.nn.init.zeros_(unit.weight).data[k] = 1
        expected[k] = -np.trace(inverse @ jacrev(unit)(torch.zeros(1, 2, 3, 4)).view(24, 24).detach().numpy())
    assert distance(difference, expected) < 1e-10


class Recorder(TorchDispatchMode):
    """The names of all operations that torch carries out."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))

    @property
    def factorizations(self):
        pattern = r"det$|_lu|lu_|solve|_inv|inverse|cholesky|linalg_(qr|svd|eig)"
        return {name for name in self.names if re.search(pattern, name) and "relu" not in name and "silu" not in name}


def one_training_step(flow, loss):
    """A step of train_mnist.py whose pre-processing leaves bytes as they are, with a last actnorm as by default."""
    like = next(flow.parameters())
    flow = EBFlow([*flow.layers, ActNorm(flow.shapes[-1][0]).to(like)], flow.shape)
    step, _ = make_step(settings.parse(Settings, ["--loss", loss]), lambda x: x, flow, flow, copy.deepcopy(flow))
    return step(torch.randint(0, 4, (4, *flow.shape), device=like.device), n=0)


@pytest.mark.parametrize("loss", [loss for loss in OBJECTIVES if loss not in ("ml", "sml")])
def test_a_training_step_of_score_matching_factorizes_nothing(flow, loss, monkeypatch):
    for layer in flow.layers:
        if isinstance(layer, LinearLayer):
            monkeypatch.setattr(layer, "log_abs_det", lambda shape: pytest.fail("asked for a linear determinant"))
    with Recorder() as recorder:
        one_training_step(flow, loss)
    assert {"mm", "addmm", "convolution"} & recorder.names  # it did record
    assert recorder.factorizations == set()


def test_a_training_step_of_maximum_likelihood_factorizes_what_log_z_and_the_inverse_do(flow):
    """Of a full matrix both do. A layer of one's own may have a cheap determinant, and a cheap inverse."""
    full = any(isinstance(layer, (FullyConnected, Convolution)) for layer in flow.layers)
    for loss, part in (("ml", flow.log_z), ("sml", lambda: flow.sample(2))):
        with Recorder() as alone:
            part()
        with Recorder() as recorder:
            one_training_step(flow, loss)
        assert alone.factorizations <= recorder.factorizations and (alone.factorizations or not full)


# ---- 3. The objectives are what they claim to be ---------------------------------------------------------------------

def test_ssm_averaged_over_all_sign_vectors_is_sm(flow):
    x = torch.randn(1, *flow.shape)
    signs = [torch.ones(1), *[torch.tensor([-1.0, 1.0])] * (x.numel() - 1)]  # the value at -v is that at v
    v = torch.cartesian_prod(*signs).view(-1, *flow.shape)  # 2^(D-1) of them
    with torch.no_grad():
        average = losses.ssm(flow.energy, x.expand_as(v), v)
        torch.testing.assert_close(average, losses.sm(flow.energy, x), rtol=1e-11, atol=1e-11)


def test_sm_is_half_the_squared_gradient_minus_the_trace_of_the_hessian():
    flow = perturbed(fc_flow(4))
    x = torch.randn(3, 4)
    expected = []
    for sample in x:
        energy = lambda s: flow.energy(s[None])[0]  # noqa: E731
        hessian = torch.autograd.functional.hessian(energy, sample)
        expected.append(0.5 * flow.score(sample[None]).square().sum() - hessian.trace())
    torch.testing.assert_close(losses.sm(flow.energy, x), torch.stack(expected).mean(), rtol=1e-12, atol=1e-12)


def test_fdssm_along_the_axes_tends_to_sm_with_an_error_of_second_order(flow):
    x = torch.randn(2, *flow.shape)
    exact = losses.sm(flow.energy, x).item()
    axes = torch.eye(x[0].numel()).view(-1, *flow.shape)
    xis = [0.08, 0.04, 0.02]
    averages = [sum(losses.fdssm(flow.energy, x, xi, eps=(xi * e).expand_as(x)).item() for e in axes) / len(axes)
                for xi in xis]
    errors = [abs(average - exact) for average in averages]
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(abs(slope - 2) < 0.05 for slope in slopes), slopes


def gauss_hermite(n, shape):
    """Nodes and weights of the expectation under N(0, I) in the plane.   -> (n², *shape), (n²,)"""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    nodes, weights = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    return torch.cartesian_prod(nodes, nodes).view(-1, *shape), torch.cartesian_prod(weights, weights).prod(1)


def expectation(loss, points, weights):
    """Σ weight · loss(point), each point a batch of its own."""
    return sum(w * loss(point[None]) for point, w in zip(points, weights) if w > 1e-8)


def test_dsm_has_the_gradient_of_explicit_score_matching_to_the_smoothed_data(plane):
    data, sigma = torch.randn(2, *plane.shape), 0.3
    noise, weights = gauss_hermite(32, plane.shape)

    denoising = sum(expectation(lambda n: losses.dsm(plane.energy, x[None], sigma, n), noise, weights) for x in data)
    # E over the smoothed density p_σ, the mixture of normals on the data, of ½‖∇E + ∇log p_σ‖²
    y = (data[:, None] + sigma * noise).flatten(0, 1).requires_grad_()
    gradient, = torch.autograd.grad(plane.energy(y).sum(), y, create_graph=True)
    log_p = torch.logsumexp(-0.5 * ((y[:, None] - data) / sigma).square().flatten(2).sum(2), dim=1)
    score, = torch.autograd.grad(log_p.sum(), y)
    explicit = (weights.repeat(2) * 0.5 * (gradient + score).square().flatten(1).sum(1)).sum()

    assert distance(flat(gradients(denoising, plane)), flat(gradients(explicit, plane))) < 1e-5


def test_dsm_with_pooled_targets_has_the_same_expected_gradient(plane):
    """Two points so close that x̃ could have come from either. The loss is a sum over points, each with its own
    noise, so that one noise for both has the same expectation."""
    data, sigma = 0.3 * torch.randn(2, *plane.shape), 0.5
    noise, weights = gauss_hermite(32, plane.shape)
    own, pooled = (
        flat(gradients(expectation(lambda n: losses.dsm(plane.energy, data, sigma, n.expand_as(data), p),
                                   noise, weights), plane))
        for p in (False, True))
    assert distance(pooled, own) < 1e-5


@pytest.mark.parametrize("shape", [(2,), (1, 3, 3)])
def test_a_pooled_target_is_the_score_of_the_smoothed_batch(shape):
    """So the energy of that density has no loss left at all, where a point's own target leaves its variance."""
    data, sigma = 0.3 * torch.randn(20, *shape), 0.5

    def energy(y):
        return -torch.logsumexp(-0.5 * ((y[:, None] - data) / sigma).square().flatten(2).sum(2), dim=1)

    assert losses.dsm(energy, data, sigma, pooled=True) < 1e-20
    assert losses.dsm(energy, data, sigma) > 0.1


def test_sml_has_the_gradient_of_ml_exactly_for_a_linear_flow():
    """∇_θ E is a quadratic form in u for a linear flow: the 2D points ±√D e_i have its expectation."""
    flow = perturbed(EBFlow([FullyConnected(4), FullyConnected(4)], (4,)))
    x = torch.randn(3, 4)
    u = math.sqrt(4) * torch.cat([torch.eye(4), -torch.eye(4)])
    sml = gradients(losses.sml(flow.energy, x, flow.inverse(u)), flow)
    ml = gradients(losses.ml(flow.log_prob, x), flow)
    assert distance(flat(sml), flat(ml)) < 1e-12


def test_sml_has_the_gradient_of_ml_for_a_nonlinear_flow_by_quadrature(plane):
    x = torch.randn(3, *plane.shape)
    rule = gauss_hermite(32, plane.shapes[-1])
    sml = expectation(lambda u: losses.sml(plane.energy, x, plane.inverse(u)), *rule)
    assert distance(flat(gradients(sml, plane)), flat(gradients(losses.ml(plane.log_prob, x), plane))) < 1e-5


def test_score_matching_does_not_see_the_weight_of_a_far_mode_and_sml_does():
    """E(x) = -log((1 - w) N(x; 0, 1) + w N(x; m, 1)), data with as much in either mode. As the modes part, the gradient
    in w of each score-matching objective vanishes; that of sml stays w - ½."""
    z = torch.from_numpy(np.polynomial.hermite_e.hermegauss(24)[0])[8:16, None]  # symmetric about 0, as the normal is
    logit = torch.tensor(math.log(0.9 / 0.1), requires_grad=True)
    for m, most in ((8, 1e-3), (20, 1e-12)):
        def energy(x):
            near, far = F.logsigmoid(-logit) - 0.5 * x.square(), F.logsigmoid(logit) - 0.5 * (x - m).square()
            return -torch.logaddexp(near, far).sum(1)

        x, x_model = torch.cat([z, z + m]), torch.cat([z, *[z + m] * 9])
        for name, objective in SCORE_MATCHING.items():
            gradient, = torch.autograd.grad(objective(energy, x), logit)
            assert gradient.abs() < most, name
        gradient, = torch.autograd.grad(losses.sml(energy, x, x_model), logit)
        torch.testing.assert_close(gradient, torch.tensor(0.9 - 0.5), rtol=0, atol=1e-3)


def test_the_draws_that_the_objectives_make_have_the_right_law():
    """An energy that records what it is given: signs ±1, a sphere of radius ξ, a normal of deviation σ."""
    seen = []

    def energy(x):
        seen.append(x.detach())
        return 0.5 * x.square().flatten(1).sum(1)

    x = torch.zeros(20_000, 1, 2, 2)
    losses.dsm(energy, x, sigma=0.7)
    assert abs(seen[0].std() - 0.7) < 0.01 and abs(seen[0].mean()) < 0.01
    losses.fdssm(energy, x, xi=0.7)
    _, plus, minus = seen[1].flatten(1).chunk(3)
    assert torch.equal(plus, -minus)
    torch.testing.assert_close(plus.norm(dim=1), torch.full((20_000,), 0.7))
    assert (plus.T @ plus / 20_000 - 0.7**2 / 4 * torch.eye(4)).abs().max() < 0.01
    a = torch.randn(4)  # for E = ½ Σ aᵢxᵢ² the value is ½‖a x‖² - Σ aᵢvᵢ²: for signs, and only for them, it is exact
    x = torch.randn(20_000, 4)
    torch.testing.assert_close(losses.ssm(lambda x: 0.5 * (a * x.square()).sum(1), x),
                               0.5 * (a * x).square().sum(1).mean() - a.sum())


@objectives
def test_an_energy_may_be_any_callable(objective):
    """½‖x‖², a torch module: sm = ½‖x‖² - D, whatever the event's shape."""
    class Quadratic(torch.nn.Module):
        def forward(self, x):
            return 0.5 * x.square().flatten(1).sum(1)

    for shape in [(6,), (1, 2, 3)]:
        x = torch.randn(2, *shape)
        with torch.no_grad():
            value = SCORE_MATCHING[objective](Quadratic(), x)
        if objective in ("sm", "ssm"):
            torch.testing.assert_close(value, (0.5 * x.square().flatten(1).sum(1) - 6).mean())
        assert value.shape == () and value.isfinite()


@pytest.mark.parametrize("shape", [(4,), (1, 2, 2)])
def test_a_gaussian_pins_the_sign_and_the_scale_of_every_objective(shape):
    """x ~ N(0, s²I): E = ½‖x‖²/s² + const, ∇E = x/s², ∇²E = I/s². With -E in place of E every value is another one."""
    x, x_model, D, s, sigma, xi = torch.randn(5, *shape), torch.randn(7, *shape), 4, 0.8, 0.6, 0.5
    square, square_model = (t.square().flatten(1).sum(1).mean() for t in (x, x_model))
    energy = lambda x: 0.5 * x.square().flatten(1).sum(1) / s**2  # noqa: E731
    axes = torch.cat([torch.eye(D), -torch.eye(D)]).view(-1, 1, *shape).expand(-1, *x.shape)  # √D of them: E[nnᵀ] = I

    def average(objective):
        return sum(map(objective, axes)) / len(axes)

    sm = 0.5 * square / s**4 - D / s**2
    found = {
        "ml": (losses.ml(lambda x: -energy(x) - D * math.log(s * math.sqrt(2 * math.pi)), x),
               0.5 * square / s**2 + D * math.log(s * math.sqrt(2 * math.pi))),
        "sml": (losses.sml(energy, x, x_model), 0.5 * (square - square_model) / s**2),
        "sm": (losses.sm(energy, x), sm),
        "ssm": (losses.ssm(energy, x), sm),
        "fdssm": (average(lambda e: losses.fdssm(energy, x, xi, xi * e)), sm),
        "dsm": (average(lambda e: losses.dsm(energy, x, sigma, math.sqrt(D) * e)),
                sm + D * sigma**2 / (2 * s**4) + D / (2 * sigma**2))}
    assert found.keys() == OBJECTIVES.keys() | {"sm"}
    for name, (value, expected) in found.items():
        torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-13, msg=name)


def test_a_conditional_energy_of_fdssm_repeats_its_condition():
    x, c = torch.randn(5, 3), torch.randn(5, 2)
    eps, conditional = losses.on_sphere(x, 0.3), lambda x, c: x.square().sum(1) * (1 + c.square().sum(1))
    found = losses.fdssm(lambda x: conditional(x, c.repeat(3, 1)), x, 0.3, eps)
    each = [losses.fdssm(lambda x: conditional(x, c[i].expand(3, 2)), x[i:i + 1], 0.3, eps[i:i + 1]) for i in range(5)]
    torch.testing.assert_close(found, sum(each) / 5)


def test_sliced_score_matching_does_not_see_the_kinks_of_a_network_with_relu_and_dsm_does():
    """Its Hessian is 0 almost everywhere, so ssm is ½E‖∇E‖², whose minimum is any constant energy."""
    def network(bend):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 50), bend, torch.nn.Linear(50, 1), torch.nn.Flatten(0))

    x = torch.randn(500, 3)
    for bend in (torch.nn.ReLU(), torch.nn.SiLU()):
        energy = network(bend)
        leaf = x.clone().requires_grad_()
        gradient, = torch.autograd.grad(energy(leaf).sum(), leaf)
        half_square = 0.5 * gradient.square().sum(1).mean()
        kinks_are_seen = abs(losses.ssm(energy, x) - half_square) > 1e-3
        assert kinks_are_seen == isinstance(bend, torch.nn.SiLU)
    torch.manual_seed(1)
    value = losses.dsm(lambda x: 0 * x.sum(1), x, sigma=0.5)  # E = 0: D/2σ² on average
    assert value.item() == pytest.approx(3 / (2 * 0.5**2), rel=0.1)


# ---- 4. Match after pre-processing -----------------------------------------------------------------------------------

def test_nll_is_the_same_with_the_preprocessing_inside_the_flow_or_outside():
    mean = torch.randn(6)
    pre, flow = logit_preprocessing((6,), s=0.5, mean=mean), perturbed(fc_flow(6))
    x = 256 * torch.rand(4, 6)
    assert distance(pre(x), (torch.logit((x / 256 + 1e-6) * (1 - 2e-6)) - mean) / 0.5) < 1e-12
    inside = EBFlow([*pre.layers, *flow.layers], (6,)).log_prob(x)
    outside = flow.log_prob(pre(x)) + brute_force_log_abs_det(pre, x)
    assert distance(inside, outside) < 1e-11


# ---- 5. Every layer's derivatives, and other devices -----------------------------------------------------------------

LAYERS = {
    "FullyConnected": (lambda: FullyConnected(3), (3,)),
    "FullyConnected on an image": (lambda: FullyConnected(4), (1, 2, 2)),
    "Convolution": (lambda: Convolution(2, 3), (2, 2, 3)),
    "Conv1x1": (lambda: Conv1x1(2), (2, 2, 2)),
    "ActNorm": (lambda: ActNorm(2), (2, 2, 2)),
    "Squeeze": (lambda: Squeeze(), (1, 2, 4)),
    "Standardize": (lambda: Standardize(std=2.0, mean=torch.randn(3)), (3,)),
    "SmoothLeakyReLU": (lambda: SmoothLeakyReLU(), (3,)),
    "SmoothLeakyReLU residual": (lambda: SmoothLeakyReLU(residual=True), (3,)),
    "SmoothLeakyReLU bend": (lambda: SmoothLeakyReLU(bend=1.5), (3,)),
    "AffineCoupling": (lambda: AffineCoupling(torch.nn.Linear(2, 2)), (3,)),
    "AffineCoupling with a floor": (lambda: AffineCoupling(torch.nn.Linear(2, 2), floor=0.5), (3,)),
    "AffineCoupling with tanh": (lambda: AffineCoupling(torch.nn.Linear(2, 2), tanh=True), (3,)),
    "AffineCoupling swapped": (lambda: AffineCoupling(torch.nn.Linear(1, 4), swap=True), (3,)),
    "Logit": (lambda: Logit(), (3,)),
    "LinearPart": (lambda: LinearPart(ActNorm(2), 2), (3, 2, 2)),
    "NonlinearPart": (lambda: NonlinearPart(AffineCoupling(torch.nn.Conv2d(1, 2, 1)), 2), (3, 1, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_first_and_second_derivatives_of_every_layer_agree_with_finite_differences(name):
    make, shape = LAYERS[name]
    layer = perturbed(make())
    x = torch.rand(2, *shape) * 0.8 + 0.1  # inside the domain of every layer
    names, parameters = zip(*layer.named_parameters()) if list(layer.parameters()) else ((), ())
    inputs = [t.detach().clone().requires_grad_() for t in (x, *parameters)]

    def function(x, *parameters):
        return functional_call(layer, dict(zip(names, parameters)), (x,))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_a_training_step_runs_on_the_meta_device(flow, loss, monkeypatch):
    """No number is computed there, but a tensor created on another device is an error."""
    adam = torch.optim.Adam  # the fused one does not know the device
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, fused, **rest: adam(parameters, **rest))
    figures = one_training_step(flow.to("meta"), loss)
    assert figures["loss"].is_meta and figures["grad_norm"].is_meta


def test_the_objectives_mark_nothing_of_the_caller():
    """They differentiate in x, but not in the tensor that they are given."""
    flow, x = perturbed(fc_flow(4)), torch.randn(3, 4)
    for objective in SCORE_MATCHING.values():
        objective(flow.energy, x)
        assert not x.requires_grad and x.grad is None


def test_each_objective_of_the_table_is_that_loss_of_the_model():
    """With the same random numbers, whatever else is among the settings."""
    flow, x = perturbed(fc_flow(3, bend=1.0)), torch.randn(50, 3)
    expected = {"ml": lambda: -flow.log_prob(x).mean(),
                "sml": lambda: flow.energy(x).mean() - flow.energy(flow.sample(20)).mean(),
                "ssm": lambda: losses.ssm(flow.energy, x), "dsm": lambda: losses.dsm(flow.energy, x, 0.4),
                "fdssm": lambda: losses.fdssm(flow.energy, x, 0.7)}
    assert expected.keys() == OBJECTIVES.keys()
    for name, row in OBJECTIVES.items():
        torch.manual_seed(0)
        found = row(flow, x, model_samples=20, sigma=0.4, xi=0.7, epochs=3)
        torch.manual_seed(0)
        torch.testing.assert_close(found, expected[name]())


def test_couplings_of_the_toy_flow_swap_their_halves_in_turn():
    """So every coordinate is transformed given the other one."""
    flow = perturbed(toy_flow(dim=2, blocks=2, width=6))
    couplings = [layer for layer in flow.layers if isinstance(layer, AffineCoupling)]
    x = torch.randn(1, 2)
    for coupling, changed in zip(couplings, (1, 0)):
        J = jacrev(lambda x: coupling(x)[0])(x).view(2, 2)
        assert J[1 - changed, 1 - changed] == 1 and J[1 - changed, changed] == 0  # this half passes
        assert J[changed, changed] not in (0, 1) and J[changed, 1 - changed] != 0
