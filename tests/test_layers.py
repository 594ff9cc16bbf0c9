"""Layers and flows: shapes, inverses to the dtype's precision, and what they refuse."""

import doctest
import math

import pytest
import torch

import ebflow
import layers
from ebflow import EBFlow, cnn_flow, fc_flow, toy_flow
from layers import ActNorm, Convolution, FullyConnected, Logit, SmoothLeakyReLU, Squeeze
from train_mnist import track_moments


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


KINDS = {layers.LinearLayer: {"forward", "inverse", "log_abs_det"}, layers.NonlinearLayer: {"forward", "inverse"}}


@pytest.mark.parametrize("kind, missing", [(kind, name) for kind, names in KINDS.items() for name in sorted(names)])
def test_a_layer_that_lacks_a_method_of_its_kind_cannot_be_made(kind, missing):
    methods = {name: lambda self, x: x for name in KINDS[kind]}
    whole = type("Whole", (kind,), methods)()
    assert whole(1) == 1 and whole.output_shape((2,)) == (2,)
    del methods[missing]
    with pytest.raises(TypeError, match=f"abstract class Broken .*{missing}"):
        type("Broken", (kind,), methods)()


def every_class(kind):
    return {kind} | {c for child in kind.__subclasses__() for c in every_class(child)}


def test_every_layer_has_the_methods_of_its_kind_and_only_the_bases_lack_any():
    classes = {c for c in every_class(layers.Layer) if c.__module__ == "layers"}
    assert {c.__name__ for c in classes if c.__abstractmethods__} == {"Layer", "LinearLayer", "NonlinearLayer", "Part"}
    assert len(classes) == 15
    for c in classes:
        assert issubclass(c, (layers.LinearLayer, layers.NonlinearLayer)) != bool(c in (layers.Layer, layers.Part))
        assert not issubclass(c, layers.LinearLayer) or not issubclass(c, layers.NonlinearLayer)


@pytest.mark.parametrize("dim", [2, 3, 4])
def test_the_couplings_of_a_toy_flow_change_their_second_half_and_then_their_first_in_turn(dim):
    flow, x = toy_flow(dim, blocks=4, width=4), torch.randn(5, dim)
    couplings = [layer for layer in flow.layers if isinstance(layer, layers.AffineCoupling)]
    for block, coupling in enumerate(couplings):
        torch.nn.init.normal_(coupling.network[-1].bias)
        moved = (coupling(x)[0] != x).any(0)
        first = torch.arange(dim) < dim - dim // 2
        assert torch.equal(moved, first if block % 2 else ~first)
        other = torch.where(moved, x, x + 1)  # how the one half moves depends on the other
        assert ((coupling(other)[0] - coupling(x)[0])[:, moved] != 0).all()
    assert len(couplings) == 4


def test_no_layer_of_a_glow_moves_with_a_fraction_of_0():
    flow, x = ebflow.glow_flow((1, 8, 8), width=3, depth=2), 3 + 5 * torch.randn(20, 1, 8, 8)
    before = [p.clone() for p in flow.parameters()]
    track_moments(flow, x, fraction=0.0)
    assert all(torch.equal(p, q) for p, q in zip(before, flow.parameters()))
    track_moments(flow, x, fraction=0.5)
    assert not all(torch.equal(p, q) for p, q in zip(before, flow.parameters()))


def test_a_coupling_s_floor_bounds_what_its_inverse_stretches():
    """s = floor + (1 - floor) sigmoid(h + 2) stays between floor and 1, however far h goes."""
    h = torch.tensor([-200.0, -30.0, 0.0, 30.0])
    for floor in (0.0, 0.5):
        coupling = layers.AffineCoupling(lambda x_a: torch.stack([x_a[:, 0], 0 * x_a[:, 0]], 1), floor=floor)  # t = 0
        x = torch.stack([h, torch.ones(4)], 1)
        y, log_abs_det = coupling(x)
        s = floor + (1 - floor) * torch.sigmoid(h.double() + 2)
        assert torch.allclose(log_abs_det.double().exp(), s) and torch.allclose(y[:, 1].double(), s)
        near = h.abs() < 1
        assert torch.allclose(coupling.inverse(y)[near], x[near])
        stretched = coupling.inverse(x)[:, 1]
        assert stretched.max() <= 1 / 0.5 if floor else stretched.max() > 1e12
        assert log_abs_det.isfinite().all()


def test_a_coupling_with_tanh_has_the_scale_of_the_papers_glow():
    """s = exp(2 tanh(h/2)), between e⁻² and e², and without a floor."""
    h = torch.linspace(-9, 9, 7)
    coupling = layers.AffineCoupling(lambda x_a: torch.stack([x_a[:, 0], 0 * x_a[:, 0]], 1), tanh=True)  # t = 0
    x = torch.stack([h, torch.ones(7)], 1)
    y, log_abs_det = coupling(x)
    torch.testing.assert_close(y[:, 1], torch.exp(2 * torch.tanh(h / 2)))
    torch.testing.assert_close(log_abs_det, y[:, 1].log())
    torch.testing.assert_close(coupling.inverse(y), x)
    for tanh in (False, True):
        flow = ebflow.glow_flow((1, 8, 8), width=4, depth=2, tanh=tanh)
        bends = {type(m) for m in flow.modules() if type(m).__module__.startswith("torch.nn.modules.activation")}
        assert bends == {torch.nn.LeakyReLU if tanh else torch.nn.SiLU}
        assert {m.tanh for m in flow.modules() if isinstance(m, layers.AffineCoupling)} == {tanh}


def test_the_biases_of_a_cnn_start_at_random_at_a_fraction_of_xaviers_deviation():
    """Xavier's variance is 2 / (fan in + fan out) = 1 / (49 C) for 7 × 7 kernels."""
    torch.manual_seed(0)
    biases = {}
    for _ in range(40):
        for layer in ebflow.cnn_flow((4, 8, 8), bias=0.5).layers:
            if isinstance(layer, Convolution):
                biases.setdefault(len(layer.bias), []).append(layer.bias.detach())
    for channels, found in biases.items():
        weight = torch.nn.init.xavier_normal_(torch.empty(channels, channels, 7, 7), gain=0.5)
        assert torch.cat(found).std().item() == pytest.approx(weight.std().item(), rel=0.1)
    assert biases.keys() == {4, 16, 64}
    assert all((layer.bias == 0).all() for layer in ebflow.cnn_flow(bias=0.0).layers if isinstance(layer, Convolution))


def test_the_weights_of_fc_and_cnn_start_at_the_diagonal_and_the_biases_of_fc_at_their_value():
    flow = ebflow.fc_flow(3, diagonal=-2.0, bias=0.5)
    for layer in flow.layers[::2]:
        assert torch.equal(layer.weight, -2 * torch.eye(3)) and torch.equal(layer.bias, torch.full((3,), 0.5))
    flow, x = ebflow.cnn_flow((1, 4, 4), kernel_size=3, blocks=2, diagonal=-2.0, bias=0.0), torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(flow.layers[0](x), -2 * x)
    activations = [layer for layer in flow.layers if isinstance(layer, SmoothLeakyReLU)]
    assert [layer.slope for layer in activations] == 3 * [1.3]  # α = 0.3, and x is added


def test_a_glow_has_its_floor_in_every_coupling_and_draws_stay_finite():
    torch.manual_seed(0)
    flows = {floor: ebflow.glow_flow((1, 8, 8), width=4, depth=4, floor=floor) for floor in (0.0, 0.5)}
    for floor, flow in flows.items():
        couplings = [m for m in flow.modules() if isinstance(m, layers.AffineCoupling)]
        assert len(couplings) == 8 and all(m.floor == floor for m in couplings)
        for m in couplings:
            torch.nn.init.constant_(m.network[-1].bias, -30.0)  # what an objective may leave where no datum is
    assert flows[0.5].sample(4).abs().max() < 1e6 < flows[0.0].sample(4).nan_to_num(math.inf).abs().max()


def test_half_of_the_channels_of_a_glow_pass_to_the_prior_after_each_block_but_the_last():
    flow = ebflow.glow_flow((1, 16, 16), width=2, depth=1, blocks=4)
    active = [layer.channels if isinstance(layer, layers.Part) else layer.weight.shape[0]
              for layer in flow.layers if isinstance(getattr(layer, "layer", layer), layers.Conv1x1)]
    assert active == [4, 8, 16, 32] and flow.shapes[-1] == (256, 1, 1)
    couplings = [m for m in flow.modules() if isinstance(m, layers.AffineCoupling)]
    assert all((p == 0).all() for m in couplings for p in m.network[-1].parameters())  # all start at one scale, shift 0
    part = layers.LinearPart(ActNorm(2), 2)
    torch.nn.init.ones_(part.layer.log_scale)
    assert part.log_abs_det((4, 3, 5)) == 2 * 15


def test_actnorm_starts_from_its_data():
    x = 3 + 5 * torch.randn(64, 4, 6, 6)
    layer = ActNorm(4)
    layer.initialize(x)
    std, mean = torch.std_mean(layer(x), dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones(4), atol=1e-5, rtol=0)
    layer.initialize(2 * x, fraction=0.25)  # a quarter of the way to those of 2x, whose log s is smaller by log 2
    torch.testing.assert_close(layer.log_scale, -torch.std(x, dim=(0, 2, 3)).log() - 0.25 * math.log(2))
    mean = x.mean((0, 2, 3))
    torch.testing.assert_close(layer.bias, -mean / torch.std(x, dim=(0, 2, 3)))  # the same for 2x
    layer.initialize(2 * x + 8, fraction=0.5)
    bias = -(2 * mean + 8) / (2 * torch.std(x, dim=(0, 2, 3)))
    torch.testing.assert_close(layer.bias, 0.5 * (bias - mean / torch.std(x, dim=(0, 2, 3))))
    for x in (torch.zeros(8, 4), torch.randn(1, 4)):
        with pytest.raises(ValueError, match="constant channel"):
            layer.initialize(x)
    flow = toy_flow(blocks=2, width=4)  # the second actnorm sees what the first one sends on
    x = 3 + 5 * torch.randn(512, 2)
    flow.initialize(x)
    for layer in flow.layers[:6]:
        x = layer(x) if isinstance(layer, layers.LinearLayer) else layer(x)[0]
        if isinstance(layer, ActNorm):
            torch.testing.assert_close(torch.std_mean(x, dim=0), (torch.ones(2), torch.zeros(2)), atol=1e-5, rtol=0)


def test_samples_have_the_shape_the_dtype_and_the_law_of_the_model():
    flow = EBFlow([FullyConnected(3)], (3,)).double()
    with torch.no_grad():
        flow.layers[0].weight.copy_(torch.tensor([[2.0, 0, 0], [1, 1, 0], [0, 0, 0.5]]))
        flow.layers[0].bias.copy_(torch.tensor([1.0, 2, 3]))
    x = flow.sample(200_000)
    W = flow.layers[0].weight.detach()
    assert x.shape == (200_000, 3) and x.dtype == torch.float64
    assert (x.mean(0) + torch.linalg.solve(W, flow.layers[0].bias.detach())).abs().max() < 0.03
    assert (torch.cov(x.T) - torch.linalg.inv(W.T @ W)).abs().max() < 0.05
    draws = EBFlow([FullyConnected(3)], (3,)).double().sample(9)  # in float64 from the start
    assert (draws != draws.float()).any()
    assert cnn_flow((1, 8, 8), kernel_size=3).sample(5).shape == (5, 1, 8, 8)


FLOWS = [lambda: fc_flow(60), lambda: cnn_flow((1, 12, 12), kernel_size=3),
         lambda: ebflow.glow_flow((1, 8, 8), width=4, depth=2)]


def perturbed(make):
    flow = make()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p) / p[0].numel() ** 0.5)
    return flow


@pytest.mark.parametrize("make", FLOWS)
def test_determinants_are_computed_in_float64_to_evaluate_whatever_the_dtype(make):
    flow = perturbed(make)
    with torch.no_grad():
        found, rounded = flow.log_z(), [p.double() for p in flow.parameters()]
        exact = perturbed(make).double()
        for p, weight in zip(exact.parameters(), rounded):
            p.copy_(weight)
        assert found.dtype == torch.float64 and abs(found - exact.log_z()) < 1e-10
        assert flow.bfloat16().log_z().dtype == torch.float64
        for layer, shape in ((layers.Conv1x1(3), (3, 2, 2)), (ActNorm(3), (3, 2, 2)), (layers.Standardize(3.0), (3,))):
            found, exact = layer.log_abs_det(shape), layer.double().log_abs_det(shape)
            assert found.dtype == torch.float64 and found.item() == pytest.approx(exact.item(), abs=1e-12)
        flow = fc_flow(300)  # a determinant of 10⁻⁶⁰⁰, outside the range of float64
        flow.layers[0].weight.mul_(0.01)
        torch.testing.assert_close(flow.log_z().item(), -300 * torch.tensor(0.01).double().log().item())


@pytest.mark.parametrize("make", FLOWS)
def test_the_gradient_of_log_z_in_float32_differs_by_less_than_a_millionth(make):
    flow = perturbed(make)
    weights = [p for p in flow.parameters()]
    found = torch.autograd.grad(flow.log_z(), weights, allow_unused=True)
    flow.double()
    exact = torch.autograd.grad(flow.log_z(), [*flow.parameters()], allow_unused=True)
    error, norm = (math.sqrt(sum(t.square().sum() for t in tensors if t is not None)) for tensors in (
        [f.double() - e for f, e in zip(found, exact) if e is not None], exact))
    assert 0 < error < 1e-6 * norm


def test_a_gradient_is_not_taken_in_float64_for_a_model_in_float32(monkeypatch):
    dtypes, slogdet = [], torch.linalg.slogdet
    monkeypatch.setattr(torch.linalg, "slogdet", lambda A: dtypes.append(A.dtype) or slogdet(A))
    for flow in (fc_flow(4), cnn_flow((1, 4, 4), kernel_size=3), ebflow.glow_flow((1, 4, 4), width=4, depth=1)):
        flow.log_z()
        assert set(dtypes) == {torch.float32}
        dtypes.clear()
        flow.requires_grad_(False).log_z()  # a fixed layer has no gradient
        flow.requires_grad_().double().log_z()
        assert set(dtypes) == {torch.float64}
        dtypes.clear()


def test_a_singular_weight_is_an_error_that_names_the_layer():
    for flow in (fc_flow(4), cnn_flow((1, 4, 4), kernel_size=3, blocks=1)):
        with torch.no_grad():
            flow.layers[2].weight.zero_()
        name = type(flow.layers[2]).__name__
        for use in (flow.log_z, lambda: flow.log_prob(torch.zeros(1, *flow.shape)), lambda: flow.sample(2)):
            with pytest.raises(torch.linalg.LinAlgError, match=rf"layer 2 \({name}\)"):
                use()
        assert flow.energy(torch.zeros(1, *flow.shape)).isfinite().all()  # the energy does not need it


@pytest.mark.parametrize("make, message", [
    (lambda: cnn_flow((1, 6, 6)), "cannot squeeze"),
    (lambda: EBFlow([FullyConnected(4)], (5,)), "4 dimensions"),
    (lambda: EBFlow([Convolution(2, 3)], (3, 4, 4)), "2 channels"),
    (lambda: EBFlow([Convolution(2, 3)], (2,)), "2 channels"),
    (lambda: EBFlow([layers.Conv1x1(2)], ()), "2 channels"),
    (lambda: EBFlow([layers.AffineCoupling(None)], (1,)), "two channels"),
    (lambda: layers.AffineCoupling(None, floor=1.0), "floor"),
    (lambda: layers.AffineCoupling(None, floor=1e-9), "floor"),
    (lambda: EBFlow([torch.nn.Linear(3, 3)], (3,)), "layer 0 must be an instance of LinearLayer .*, not of Linear; of"),
    (lambda: EBFlow([fc_flow(3)], (3,)), "layer 0 must be .*, not of EBFlow; of another flow give the layers"),
    (lambda: EBFlow([Squeeze], (1, 4, 4)), "layer 0 must be an instance"),
    (lambda: EBFlow([FullyConnected(3)], 3), r"shape must be that of one event, such as \(3,\), not 3"),
    (lambda: cnn_flow((1, 8, 8)).log_prob(torch.zeros(2, 1, 12, 12)), r"\(B, \*\(1, 8, 8\)\), not .* \(2, 1, 12, 12"),
    (lambda: cnn_flow((1, 8, 8)).inverse(torch.zeros(2, 16, 4, 4)), r"\(B, \*\(16, 2, 2\)\), not .* \(2, 16, 4, 4"),
    (lambda: fc_flow(4)(torch.zeros(4)), r"batch of events, torch.float32 \(B, \*\(4,\)\), not torch.float32 \(4,\)"),
    (lambda: fc_flow(4).energy(torch.zeros(2, 4, dtype=torch.int64)), r"torch.float32 .*, not torch.int64 \(2, 4\)"),
    (lambda: fc_flow(4).score(torch.zeros(2, 4, dtype=torch.float64)), r"torch.float32 .*, not torch.float64 \(2, 4\)"),
    (lambda: EBFlow([Logit()], (4,))(torch.zeros(2, 4).byte()), r"floating point \(B, .*, not torch.uint8 \(2, 4\)"),
    (lambda: fc_flow(4).log_prob([0.0]), "not a list"),
    (lambda: toy_flow().initialize(torch.zeros(5, 3)), r"\(B, \*\(2,\)\), not torch.float32 \(5, 3\)"),
    (lambda: fc_flow(4).sample((3,)), r"a number of draws, as in sample\(10\), not \(3,\)"),
    (lambda: fc_flow(4).sample(3.0), "a number of draws, .* not 3.0"),
    (lambda: fc_flow(4).sample(0), "a number of draws, .* not 0"),
    (lambda: fc_flow(4).log_prob(torch.zeros(0, 4)), r"a batch of events, .* not torch.float32 \(0, 4\)"),
    (lambda: cnn_flow((1, 4, 4), 3, 2).score(torch.zeros(0, 1, 4, 4)), r"not torch.float32 \(0, 1, 4, 4\)"),
    (lambda: EBFlow([layers.AffineCoupling(torch.nn.Linear(2, 2))], (4,))(torch.zeros(5, 4)),
     r"network of a coupling must map \(5, 2\) to \(5, 4\), not to \(5, 2\)"),
    (lambda: layers.AffineCoupling(None, floor=0.5, tanh=True), "floor must be 0, or .* with sigmoid"),
    (lambda: Squeeze().output_shape((2, 4)), "even H, W"), (lambda: Squeeze().output_shape((1, 4, 3)), "even H, W"),
    (lambda: Convolution(1, 4), "odd"),
    (lambda: SmoothLeakyReLU(alpha=0.0), "alpha must lie in"),
    (lambda: layers.Standardize(std=0.0), "positive"), (lambda: layers.Standardize(torch.eye(2)), "positive"),
    (lambda: ActNorm(4).initialize(torch.randn(1, 4), fraction=0.5), "constant channel"),
])
def test_a_shape_or_setting_that_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind, forward, message", [
    (layers.NonlinearLayer, lambda x: (x, x.sum()), r"shapes \(5, 3\), \(5,\), not \(5, 3\), \(\)$"),
    (layers.NonlinearLayer, lambda x: (x, x[:, :1]), r"not \(5, 3\), \(5, 1\)$"),
    (layers.NonlinearLayer, lambda x: (x, x), r"not \(5, 3\), \(5, 3\)$"),
    (layers.NonlinearLayer, lambda x: (x, 0.0), r"not \(5, 3\), a float$"),
    (layers.NonlinearLayer, lambda x: x, r"not \(5, 3\)$"),
    (layers.NonlinearLayer, lambda x: (x[:, :2], x.sum(1)), r"not \(5, 2\), \(5,\)$"),
    (layers.LinearLayer, lambda x: x[:, :2], r"shapes \(5, 3\), not \(5, 2\)$"),
    (layers.LinearLayer, lambda x: (x, x.sum(1)), r"not \(5, 3\), \(5,\)$")])
def test_a_layer_that_returns_other_shapes_is_refused_before_they_broadcast(kind, forward, message):
    methods = {"forward": lambda self, x: forward(x), "inverse": lambda self, y: y[:1], "log_abs_det": lambda *_: 0}
    flow = EBFlow([type("Mine", (kind,), methods)()], (3,))
    for use, message in ((flow.energy, message), (flow.inverse, r"shapes \(5, 3\), not \(1, 3\)$")):
        with pytest.raises(ValueError, match=r"^Mine must return tensors of the .*" + message):
            use(torch.zeros(5, 3))
    if kind == layers.LinearLayer:
        with pytest.raises(ValueError, match=r"^Mine must return tensors of the shapes \(\), not a int$"):
            flow.log_z()


@pytest.mark.parametrize("make", [lambda: fc_flow(4), lambda: cnn_flow((1, 8, 8)), lambda: toy_flow(3, blocks=2),
                                  lambda: ebflow.glow_flow((1, 8, 8), width=4, depth=1)])
def test_a_flow_works_in_float16(make):
    flow = make()
    x, u = torch.randn(3, *flow.shape), torch.randn(3, *flow.shapes[-1])
    expected = flow.log_prob(x), flow.inverse(u)
    flow = flow.half()
    torch.testing.assert_close(flow.log_prob(x.half()).double(), expected[0].double(), rtol=0.02, atol=0)
    torch.testing.assert_close(flow.inverse(u.half()).float(), expected[1], rtol=0.02, atol=0.02)


def test_a_flow_without_parameters_draws_in_the_dtype_of_its_buffers_or_the_default_one(float64):
    assert EBFlow([Squeeze()], (1, 4, 4)).sample(3).dtype == torch.float64
    assert ebflow.logit_preprocessing((3,), s=0.5).float().sample(3).dtype == torch.float32
    assert EBFlow([], (2,)).sample(3).shape == (3, 2)


def test_the_score_is_the_same_under_inference_mode():
    flow, x = fc_flow(3), torch.randn(5, 3)
    with torch.inference_mode():
        torch.testing.assert_close(flow.score(x + 0), flow.score(x), rtol=0, atol=0)
        found = flow.score(x)
    torch.testing.assert_close(found, flow.score(x), rtol=0, atol=0)


@pytest.mark.parametrize("make", [lambda: fc_flow(4), lambda: cnn_flow((1, 4, 4), 3, blocks=2), lambda: toy_flow(3, 2)])
def test_vmap_gives_the_log_density_and_its_gradient_for_an_ensemble_of_flows(make):
    class Nll(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = make().double()

        def forward(self, x):
            return -self.flow.log_prob(x).mean()

    ensemble = [Nll() for _ in range(3)]
    for p in (p for member in ensemble for p in member.parameters()):
        p.data += 0.1 * torch.randn_like(p)
    x = torch.randn(5, *ensemble[0].flow.shape, dtype=torch.float64)
    gradients, nlls = torch.func.vmap(torch.func.grad_and_value(
        lambda parameters: torch.func.functional_call(ensemble[0], parameters, (x,))))(
            torch.func.stack_module_state(ensemble)[0])
    for i, member in enumerate(ensemble):
        nll = member(x)
        torch.testing.assert_close(nlls[i], nll)
        for (name, p), expected in zip(member.named_parameters(), torch.autograd.grad(nll, member.parameters())):
            torch.testing.assert_close(gradients[name][i], expected)


def test_fc_and_cnn_flows_take_another_activation():
    for flow, n in ((fc_flow(4, activation=Logit), 1), (cnn_flow((1, 4, 4), 3, 2, activation=Logit), 3)):
        activations = [layer for layer in flow.layers if isinstance(layer, layers.NonlinearLayer)]
        assert [type(layer) for layer in activations] == [Logit] * n and len(set(activations)) == n


def test_printing_a_flow_tells_fixed_weights_from_trained_ones():
    flow = EBFlow([FullyConnected(3).requires_grad_(False), FullyConnected(3)], (3,))
    assert "12 fixed" in repr(flow).splitlines()[1] and repr(flow).splitlines()[-1].split() == ["total", "12"]


def test_printing_a_flow_says_where_each_log_determinant_goes():
    lines = repr(cnn_flow((1, 28, 28))).splitlines()
    assert lines[1].split() == ["0", "Convolution", "1×28×28", "yes", "50", "Z", "O(k²CD²)"]
    assert lines[2].split() == ["1", "SmoothLeakyReLU", "1×28×28", "no", "0", "E", "O(D)"]
    assert lines[-1].split() == ["total", "26,796"]  # the paper: 0.027 M
    assert repr(fc_flow(784)).splitlines()[-1].split() == ["total", "1,230,880"]  # the paper: 1.230 M


@pytest.mark.parametrize("module", [layers, ebflow])
def test_the_examples_in_the_docstrings_run(module):
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted > 0 and result.failed == 0


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


def test_a_convolution_whose_first_rows_alone_are_singular_still_has_its_determinant():
    """y_i = x_{i-1} + x_{i+1}: of one row alone nothing is left, of an even number of rows all is."""
    layer = Convolution(1, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 1, 0], [0, 0, 0], [0, 1, 0]]))
    assert layer.log_abs_det((1, 4, 2)).item() == pytest.approx(0)
    assert layer.log_abs_det((1, 3, 2)).item() == -torch.inf
