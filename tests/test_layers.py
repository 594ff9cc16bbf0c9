"""Layers and flows: inverses to the dtype's precision, determinants, how they start, and what they print."""

import doctest
import math

import pytest
import torch

import ebflow
import layers
from ebflow import EBFlow, cnn_flow, fc_flow, glow_flow, toy_flow
from layers import ActNorm, AffineCoupling, Conv1x1, Convolution, FullyConnected, Logit, SmoothLeakyReLU, Squeeze
from test_gradients import LAYERS


# ---- Non-linear layers -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, accuracy", [(torch.float32, 1e-6), (torch.float64, 4e-15)])
@pytest.mark.parametrize("alpha", [0.01, 0.3, 0.99])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bend", [None, 0.0, 1.5])
def test_the_inverse_of_the_activation_is_exact_to_the_dtype(dtype, accuracy, alpha, residual, bend):
    activation = SmoothLeakyReLU(alpha, residual, bend)
    x = torch.cat([torch.linspace(-100, 100, 20_001), torch.linspace(-3, 3, 20_001)]).to(dtype)[:, None]
    y = activation(x)[0]
    assert ((activation(activation.inverse(y))[0] - y).abs() / (1 + y.abs())).max() < accuracy
    assert ((activation.inverse(y) - x).abs() / (1 + x.abs())).max() < accuracy / alpha
    assert activation.inverse(y).dtype == dtype


def test_the_activation_is_the_papers_and_with_a_bend_the_biases_could_do_the_same():
    x = torch.linspace(-40, 40, 801, dtype=torch.float64)[:, None]
    softplus = torch.logaddexp(x, torch.zeros_like(x))  # exact beyond 20, too
    exact = dict(rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(SmoothLeakyReLU(0.3)(x)[0], 0.3 * x + 0.7 * softplus, **exact)
    torch.testing.assert_close(SmoothLeakyReLU(0.3, residual=True)(x)[0], 1.3 * x + 0.7 * softplus, **exact)
    y, log_slope = SmoothLeakyReLU(0.3, bend=1.5)(x)
    y_paper, log_slope_paper = SmoothLeakyReLU(0.3)(x + 1.5)  # the bias before it
    torch.testing.assert_close(log_slope, log_slope_paper)
    torch.testing.assert_close(y - y_paper, (y - y_paper)[:1].expand_as(y))  # the bias after it
    assert SmoothLeakyReLU(0.3, bend=1.5)(torch.zeros(1, 1))[0].abs() < 1e-7


def test_the_logit_of_the_darkest_and_the_brightest_pixel_is_finite():
    logit = Logit()
    x = torch.tensor([[0.0, 1.0, (255 + 1 - 2**-24) / 256]])
    z, log_slope = logit(x)
    assert z.isfinite().all() and log_slope.isfinite().all()
    assert z[0, 0].item() == pytest.approx(math.log(1e-6), abs=1e-5)  # the paper's ε
    torch.testing.assert_close(logit.inverse(z), x, rtol=0, atol=1e-6)
    torch.testing.assert_close(logit.inverse(logit(x.double())[0]), x.double(), rtol=0, atol=1e-12)
    for noisy, end in ((-0.01, 0.0), (1.01, 1.0)):  # where the noise of dsm puts it without MaP
        for a, b in zip(logit(torch.full((1, 1), noisy)), logit(torch.full((1, 1), end))):
            assert torch.equal(a, b)


@pytest.mark.parametrize("options, scale", [
    (dict(), lambda h: torch.sigmoid(h + 2)), (dict(floor=0.5), lambda h: 0.5 + 0.5 * torch.sigmoid(h + 2)),
    (dict(tanh=True), lambda h: torch.exp(2 * torch.tanh(h / 2)))])
def test_a_coupling_scales_by_its_formula_and_a_floor_bounds_what_its_inverse_stretches(options, scale):
    h = torch.tensor([-200.0, -30.0, -1.0, 0.0, 0.5, 30.0])
    coupling = AffineCoupling(lambda x_a: torch.stack([x_a[:, 0], 0 * x_a[:, 0]], 1), **options)  # t = 0
    x = torch.stack([h, torch.ones(6)], 1)
    y, log_abs_det = coupling(x)
    torch.testing.assert_close(y[:, 1].double(), scale(h.double()))
    torch.testing.assert_close(log_abs_det.double().exp(), scale(h.double()))
    near = h.abs() <= 1
    torch.testing.assert_close(coupling.inverse(y)[near], x[near])
    assert log_abs_det.isfinite().all()
    assert (coupling.inverse(x)[:, 1].max() < 9) == bool(options)  # without one it stretches without bound


# ---- What is refused, and how the architectures start ----------------------------------------------------------------

@pytest.mark.parametrize("make", [
    *(lambda alpha=alpha: SmoothLeakyReLU(alpha) for alpha in (0.0, 0.005, 1.0, math.nan)),
    *(lambda floor=floor: AffineCoupling(None, floor=floor) for floor in (1.0, 1e-9, -0.1, math.nan)),
    lambda: AffineCoupling(None, floor=0.5, tanh=True), lambda: Convolution(1, 4),
    *(lambda std=std: layers.Standardize(std) for std in (0.0, -1.0, math.nan, math.inf, torch.eye(2))),
    *(lambda shape=shape: EBFlow([Squeeze()], shape) for shape in ((1, 4, 3), (1, 3, 4), (4, 4), (1, 1, 4, 4))),
    lambda: cnn_flow((1, 6, 6)), lambda: glow_flow((1, 6, 6), width=2, depth=1)])
def test_a_setting_or_a_shape_that_cannot_be_is_refused_when_the_layer_is_made(make):
    with pytest.raises(ValueError):
        make()


def test_the_biases_of_a_cnn_start_at_random_at_a_fraction_of_xaviers_deviation():
    """Xavier's variance is 2 / (fan in + fan out) = 1 / (49 C) for 7 × 7 kernels."""
    flows = [cnn_flow((4, 8, 8), bias=0.5, blocks=2) for _ in range(40)]
    for i, channels in ((0, 4), (5, 16)):
        biases = torch.cat([flow.layers[i].bias.detach() for flow in flows])
        weight = torch.nn.init.xavier_normal_(torch.empty(channels, channels, 7, 7), gain=0.5)
        assert biases.std().item() == pytest.approx(weight.std().item(), rel=0.15)


def test_the_weights_of_fc_and_cnn_start_at_the_diagonal_and_the_biases_of_fc_at_their_value():
    flow = fc_flow(3, diagonal=-2.0, bias=0.5)
    for layer in flow.layers[::2]:
        assert torch.equal(layer.weight, -2 * torch.eye(3)) and torch.equal(layer.bias, torch.full((3,), 0.5))
    flow, x = cnn_flow((1, 4, 4), kernel_size=3, blocks=2, diagonal=-2.0, bias=0.0), torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(flow.layers[0](x), -2 * x)
    activations = [layer for layer in flow.layers if isinstance(layer, SmoothLeakyReLU)]
    assert [layer.slope for layer in activations] == 3 * [1.3]  # α = 0.3, and x is added


@pytest.mark.parametrize("tanh, floor", [(False, 0.0), (False, 0.5), (True, 0.0)])
def test_a_glow_has_its_couplings_and_passes_half_of_its_channels_to_the_prior_after_each_block(tanh, floor):
    flow = glow_flow((1, 16, 16), width=2, depth=1, blocks=4, tanh=tanh, floor=floor)
    active = [layer.channels if isinstance(layer, layers.Part) else layer.weight.shape[0]
              for layer in flow.layers if isinstance(getattr(layer, "layer", layer), Conv1x1)]
    assert active == [4, 8, 16, 32] and flow.shapes[-1] == (256, 1, 1) and isinstance(flow.layers[-1], ActNorm)
    couplings = [m for m in flow.modules() if isinstance(m, AffineCoupling)]
    assert len(couplings) == 4 and {(m.tanh, m.floor) for m in couplings} == {(tanh, floor)}
    assert all((p == 0).all() for m in couplings for p in m.network[-1].parameters())  # all start at one scale, shift 0
    bends = {type(m) for m in flow.modules() if type(m).__module__.startswith("torch.nn.modules.activation")}
    assert bends == {torch.nn.LeakyReLU if tanh else torch.nn.SiLU}
    for m in flow.modules():
        if isinstance(m, Conv1x1):
            torch.testing.assert_close(m.weight @ m.weight.T, torch.eye(len(m.weight)))
    flow.initialize(3 + torch.randn(20, 1, 16, 16))
    assert all((m.log_scale != 0).all() for m in flow.modules() if isinstance(m, ActNorm))  # in each part, too
    for m in couplings:
        torch.nn.init.constant_(m.network[-1].bias, -30.0)  # what an objective may leave where no datum is
    assert (flow.sample(4).nan_to_num(math.inf).abs().max() < 1e6) == (tanh or floor > 0)


def test_actnorm_starts_from_its_data():
    x = 3 + 5 * torch.randn(64, 4, 6, 6)
    layer, std, mean = ActNorm(4), x.std((0, 2, 3)), x.mean((0, 2, 3))
    layer.initialize(x)
    moments = torch.std_mean(layer(x), dim=(0, 2, 3))
    torch.testing.assert_close(moments, (torch.ones(4), torch.zeros(4)), atol=1e-5, rtol=0)
    layer.initialize(2 * x, fraction=0.25)  # a quarter of the way to those of 2x, whose log s is smaller by log 2
    torch.testing.assert_close(layer.log_scale, -std.log() - 0.25 * math.log(2))
    torch.testing.assert_close(layer.bias, -mean / std)  # the same for 2x
    layer.initialize(2 * x + 8, fraction=0.5)
    torch.testing.assert_close(layer.bias, 0.5 * (-(2 * mean + 8) / (2 * std) - mean / std))
    layer.initialize(torch.zeros(8, 4))  # no scale gives a constant channel variance 1
    assert not layer.log_scale.isfinite().any()
    flow, x = toy_flow(blocks=2, width=4), 3 + 5 * torch.randn(512, 2)
    flow.initialize(x)
    for layer in flow.layers[:6]:  # the second actnorm sees what the first one sends on
        x = layer(x) if isinstance(layer, layers.LinearLayer) else layer(x)[0]
        if isinstance(layer, ActNorm):
            torch.testing.assert_close(torch.std_mean(x, dim=0), (torch.ones(2), torch.zeros(2)), atol=1e-5, rtol=0)


# ---- Draws, determinants, singular weights ---------------------------------------------------------------------------

def test_samples_have_the_shape_the_dtype_and_the_law_of_the_model():
    flow = EBFlow([FullyConnected(3)], (3,)).double()
    with torch.no_grad():
        flow.layers[0].weight.copy_(torch.tensor([[2.0, 0, 0], [1, 1, 0], [0, 0, 0.5]]))
        flow.layers[0].bias.copy_(torch.tensor([1.0, 2, 3]))
        W, b = flow.layers[0].weight, flow.layers[0].bias
        x = flow.sample(200_000)
        assert x.shape == (200_000, 3) and x.dtype == torch.float64
        assert (x.mean(0) + torch.linalg.solve(W, b)).abs().max() < 0.03
        assert (torch.cov(x.T) - torch.linalg.inv(W.T @ W)).abs().max() < 0.05
    x = EBFlow([FullyConnected(3)], (3,)).double().sample(9)
    assert (x != x.float()).any()  # in float64 from the start
    assert cnn_flow((1, 8, 8), kernel_size=3).sample(5).shape == (5, 1, 8, 8)


def test_a_flow_without_parameters_draws_in_the_dtype_of_its_buffers_or_the_default_one(float64):
    assert EBFlow([Squeeze()], (1, 4, 4)).sample(3).dtype == torch.float64
    assert ebflow.logit_preprocessing((3,), s=0.5).float().sample(3).dtype == torch.float32
    assert EBFlow([], (2,)).sample(3).shape == (3, 2)


FLOWS = [lambda: fc_flow(60), lambda: cnn_flow((1, 12, 12), kernel_size=3),
         lambda: glow_flow((1, 8, 8), width=4, depth=2)]


def perturbed(make):
    flow = make()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p) / p[0].numel() ** 0.5)
    return flow


@pytest.mark.parametrize("make", FLOWS)
def test_determinants_are_in_float64_to_evaluate_and_in_the_dtype_of_the_model_for_a_gradient(make, monkeypatch):
    flow, dtypes, slogdet = perturbed(make), [], torch.linalg.slogdet
    monkeypatch.setattr(torch.linalg, "slogdet", lambda A: dtypes.append(A.dtype) or slogdet(A))
    with torch.no_grad():
        found = flow.log_z()
    assert found.dtype == torch.float64 and set(dtypes) == {torch.float64}
    dtypes.clear(), flow.requires_grad_().log_z()
    assert set(dtypes) == {torch.float32}
    dtypes.clear(), flow.requires_grad_(False).log_z()  # a fixed layer has no gradient
    assert set(dtypes) == {torch.float64}
    torch.testing.assert_close(found, flow.double().log_z(), rtol=0, atol=1e-10)  # exact, of the rounded weights
    dtypes.clear(), flow.requires_grad_().log_z()
    assert set(dtypes) == {torch.float64}
    with torch.no_grad():
        assert flow.bfloat16().log_z().dtype == torch.float64


def test_log_determinants_without_a_matrix_are_sums_in_float64_and_none_underflows():
    for layer in (ActNorm(3), layers.Standardize([0.1, 2.0, 3.0])):
        for p in layer.parameters():
            torch.nn.init.normal_(p)
        found = layer.log_abs_det((3,))
        torch.testing.assert_close(found, layer.double().log_abs_det((3,)), rtol=0, atol=1e-12)
    with torch.no_grad():  # each determinant is 10⁻⁶⁰⁰, outside the range of float64
        found = fc_flow(300, diagonal=0.01).log_z().item()
        assert found == pytest.approx(-600 * torch.tensor(0.01).double().log().item())


@pytest.mark.parametrize("make", FLOWS)
def test_the_gradient_of_log_z_in_float32_differs_by_less_than_a_millionth(make):
    flow = perturbed(make)
    found = torch.autograd.grad(flow.log_z(), [*flow.parameters()], allow_unused=True)
    exact = torch.autograd.grad(flow.double().log_z(), [*flow.parameters()], allow_unused=True)
    error, norm = (math.sqrt(sum(t.square().sum() for t in tensors if t is not None)) for tensors in (
        [f.double() - e for f, e in zip(found, exact) if e is not None], exact))
    assert 0 < error < 1e-6 * norm


@pytest.mark.parametrize("channels, kernel_size, H, W",
                         [(1, 7, 9, 5), (2, 3, 4, 3), (3, 5, 4, 6), (2, 1, 3, 2), (4, 7, 2, 2), (1, 7, 10, 4)])
def test_a_convolution_is_a_product_with_its_matrix_and_the_elimination_by_rows_gives_its_determinant(
        channels, kernel_size, H, W):
    """Where ⌊k/2⌋ does not divide H, as at 28 × 28 with k = 7, the last block of rows is smaller."""
    layer = Convolution(channels, kernel_size, diagonal=1.5, bias=0.2).double()
    torch.nn.init.normal_(layer.weight, std=0.3)
    x = torch.randn(4, channels, H, W, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding="same"))
    product = x.flatten(1) @ layer.matrix((channels, H, W), torch.float64).T
    torch.testing.assert_close(layer(x), product.view_as(x) + layer.bias[:, None, None])
    torch.testing.assert_close(layer.log_abs_det((channels, H, W)),
                               torch.linalg.slogdet(layer.matrix((channels, H, W), torch.float64)).logabsdet)


def vertical(*weights):
    """A 3 × 3 convolution of one channel with these weights above, at and below a pixel."""
    layer = Convolution(1, 3)
    layer.weight.data[0, 0] = torch.tensor(weights)[:, None] * torch.tensor([0.0, 1.0, 0.0])
    return layer


@pytest.mark.parametrize("layer, shape", [
    (FullyConnected(3, diagonal=0.0), (3,)), (FullyConnected(4, diagonal=0.0), (1, 2, 2)), (Conv1x1(2), (2, 2, 2)),
    (Convolution(2, 3, diagonal=0.0), (2, 1, 3)), (vertical(1.0, 1.0, 0.5), (1, 3, 2))])  # pivots 1, ½, 0
def test_a_singular_weight_makes_log_z_infinite_and_has_no_inverse_but_has_an_energy(layer, shape):
    flow = EBFlow([layer, SmoothLeakyReLU()], shape)
    if isinstance(layer, Conv1x1):
        torch.nn.init.ones_(layer.weight)
    with torch.no_grad():
        assert flow.log_z() == math.inf and (flow.log_prob(torch.zeros(2, *shape)) == -math.inf).all()
    assert flow.log_z() == math.inf and flow.energy(torch.zeros(2, *shape)).isfinite().all()
    with pytest.raises(torch.linalg.LinAlgError):
        flow.sample(2)


@pytest.mark.parametrize("H", [3, 4])
def test_a_convolution_whose_first_rows_alone_are_singular_has_a_log_determinant_of_nan_and_never_a_number(H):
    """y_i = x_{i-1} + x_{i+1}: of one row alone nothing is left, and of an even number of rows all is."""
    layer = vertical(1.0, 0.0, 1.0)
    assert layer.log_abs_det((1, H, 2)).isnan()
    assert torch.linalg.slogdet(layer.matrix((1, H, 2), torch.float64)).logabsdet == (0.0 if H == 4 else -math.inf)


# ---- verify, repr, examples ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", LAYERS)
def test_verify_passes_every_layer(name):
    make, shape = LAYERS[name]
    layers.verify(make(), shape, torch.rand(3, *shape))  # in the domain of the logit, too


def wrong(layer, **methods):
    """The layer with another method or two, each a function of what the right one returns."""
    right = {name: getattr(type(layer), name) for name in methods}
    changed = {name: lambda self, x, name=name: methods[name](right[name](self, x)) for name in methods}
    layer.__class__ = type("Wrong", (type(layer),), changed)
    return layer


@pytest.mark.parametrize("layer, shape, message", [
    (wrong(FullyConnected(3), log_abs_det=lambda d: d + 0.25), (3,), r"Wrong: .*det.* 0.25$"),
    (wrong(SmoothLeakyReLU(), forward=lambda r: (r[0], r[1] - 0.5)), (3,), r"Wrong: .*det.* 0.5$"),
    (wrong(ActNorm(2), log_abs_det=lambda d: d / 4), (2, 2, 2), "Wrong: .*det.* 0"),  # forgets the pixels
    (wrong(Conv1x1(2), log_abs_det=lambda d: d * math.nan), (2, 2, 2), "Wrong: .*det.* nan$"),
    (wrong(FullyConnected(3), inverse=lambda x: x - 0.25), (3,), r"Wrong: .*inverse .* 0.25$"),
    (wrong(SmoothLeakyReLU(), inverse=lambda x: x * math.nan), (3,), r"Wrong: .*inverse .* nan$"),
    (wrong(Squeeze(), inverse=lambda x: x.flip(2)), (1, 2, 2), "Wrong: .*inverse"),
    (wrong(Squeeze(), inverse=lambda x: x.flip(2), log_abs_det=lambda d: d + 1), (1, 2, 2), r"Wrong: .*det.* 1$"),
    (wrong(FullyConnected(3), forward=lambda y: y.roll(1, 0), inverse=lambda x: x.roll(-1, 0)), (3,),
     "rest of the batch")])
def test_verify_names_a_wrong_log_determinant_a_wrong_inverse_or_a_mixed_batch_and_by_how_much(layer, shape, message):
    before = [p.clone() for p in layer.parameters()]
    with pytest.raises(ValueError, match=message):
        layers.verify(layer, shape)
    assert all(torch.equal(p, q) for p, q in zip(before, layer.parameters()))  # a copy was tried


def test_printing_a_flow_says_where_each_log_determinant_goes():
    lines = repr(cnn_flow((1, 28, 28))).splitlines()
    assert lines[1].split() == ["0", "Convolution", "1×28×28", "yes", "50", "Z", "O(k²CD²)"]
    assert lines[2].split() == ["1", "SmoothLeakyReLU", "1×28×28", "no", "0", "E", "O(D)"]
    assert lines[-1].split() == ["total", "26,796"]  # the paper: 0.027 M
    assert repr(fc_flow(784)).splitlines()[-1].split() == ["total", "1,230,880"]  # the paper: 1.230 M
    lines = repr(EBFlow([FullyConnected(3).requires_grad_(False), FullyConnected(3)], (3,))).splitlines()
    assert "12 fixed" in lines[1] and lines[-1].split() == ["total", "12"]


@pytest.mark.parametrize("module", [layers, ebflow])
def test_the_examples_in_the_docstrings_run(module):
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted > 0 and result.failed == 0
