"""What `train_mnist.py` alone does: its pre-processing, steps, actnorms, evaluation and recipes."""

import copy
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import losses
import train_mnist
from conftest import assert_same_bits, checkpoint, failing, rows, stop_after, timeless
from data import augment, dequantize, load_images
from ebflow import EBFlow, fc_flow, glow_flow, logit_preprocessing
from layers import ActNorm, AffineCoupling, LinearLayer
from losses import OBJECTIVES
from recipes import RECIPES, paper
from support import settings
from support.optimization import trainable
from train_mnist import Settings, build, evaluate, main, make_step

ROOT = Path(__file__).parent.parent
GLOW = ["--arch", "glow", "--width", "4", "--depth", "2"]
fails = failing(main)


@pytest.fixture(scope="module")
def images(npy):
    return load_images(npy)[0]


def arguments(data, out, *extra):
    return ["--data", str(data), "--out", str(out), "--epochs", "2", "--batch-size", "50", "--device", "cpu",
            "--sml-steps", "0", *extra]


def parse(*flags):
    return settings.parse(Settings, flags)


def start(images, *flags):
    """What `train` makes before its first epoch.   -> settings, pre-processing, flow of z, of x, averaged, step, …"""
    s = parse(*flags)
    pre, flow = build(s, images)
    model = EBFlow([*pre.layers, *flow.layers], pre.shape)
    averaged = copy.deepcopy(model)
    return s, pre, flow, model, averaged, *make_step(s, pre, flow, model, averaged)


def spied(monkeypatch, loss):
    """The list of what that objective will see: pairs of its model and its batch."""
    seen, objective = [], OBJECTIVES[loss]

    def watched(model, x, **config):
        seen.append((model, x.detach().clone()))
        return objective(model, x, **config)

    monkeypatch.setitem(OBJECTIVES, loss, watched)
    return seen


# ---- A training step -------------------------------------------------------------------------------------------------

BY_HAND = {
    "ml": lambda flow, z, s: -flow.log_prob(z).mean(),
    "sml": lambda flow, z, s: flow.energy(z).mean() - flow.energy(flow.sample(s.model_samples)).mean(),
    "ssm": lambda flow, z, s: losses.ssm(flow.energy, z),
    "dsm": lambda flow, z, s: losses.dsm(flow.energy, z, s.sigma),
    "fdssm": lambda flow, z, s: losses.fdssm(flow.energy, z, s.xi),
}


@pytest.mark.parametrize("flags", [
    *(["--loss", loss, "--bias", "0.1"] for loss in OBJECTIVES), ["--loss", "ssm", "--sigma", "2"],
    ["--loss", "fdssm", "--sigma", "2"], ["--loss", "dsm", "--clip", "0.1"], ["--loss", "ssm", "--weight-decay", "0.1"],
    ["--loss", "ssm", "--optimizer", "rmsprop"], ["--loss", "ml", "--no-map"], ["--loss", "dsm", "--paper"],
    *(["--loss", loss, "--energy-weight", "78.4"] for loss in ("ssm", "dsm", "fdssm"))], ids=str)
def test_a_step_is_one_of_torch_s_optimisers_down_the_clipped_gradient_and_the_average_follows(float64, images, flags):
    s, pre, flow, model, averaged, step, optimizer = start(images, "--actnorm", "none", *flags, "--lr", "1e-2")
    theirs, average = copy.deepcopy(model), copy.deepcopy(model)
    matched = EBFlow(theirs.layers[len(pre.layers):], pre.shape) if s.map else theirs
    kind = torch.optim.RMSprop if s.optimizer == "rmsprop" else torch.optim.Adam
    expected = kind(trainable(theirs), lr=1e-2, weight_decay=s.weight_decay)
    for n in range(4):
        torch.manual_seed(n)
        figures = step(images[:50], n)

        torch.manual_seed(n)
        z = dequantize(images[:50]).view(50, 16)
        z = pre(z) if s.map else z
        if s.loss in ("ssm", "fdssm"):
            z = z + s.sigma * torch.randn_like(z) if s.sigma else z
        expected.zero_grad()
        loss = BY_HAND[s.loss](matched, z, s) + s.energy_weight * matched.energy(z).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable(theirs), s.clip or torch.inf)
        assert figures.keys() == {"loss", "grad_norm"}
        torch.testing.assert_close([figures["loss"], figures["grad_norm"]], [loss.detach(), norm])
        if s.clip:
            clipped = torch.cat([p.grad.flatten() for p in trainable(model)]).norm()
            assert clipped.item() == pytest.approx(s.clip, rel=1e-4) and norm > s.clip
        expected.step()
        m = (1 + n) / (10 + n) if n else 0.0
        with torch.no_grad():
            for a, p in zip(trainable(average), trainable(theirs)):
                a.copy_(m * a + (1 - m) * p)
    torch.testing.assert_close(dict(model.named_parameters()), dict(theirs.named_parameters()))
    torch.testing.assert_close(dict(averaged.named_parameters()), dict(average.named_parameters()))


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_every_parameter_that_is_trained_gets_a_gradient_and_no_other_does(images, loss):
    for arch in ("fc", "cnn", "glow"):
        small = ["--width", "4", "--depth", "1"] if arch == "glow" else []
        _, _, flow, model, _, step, _ = start(images, "--arch", arch, "--loss", loss, *small)
        step(images[:20], 0)
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        assert len(trainable(model)) == len(trainable(flow)) > 3


@pytest.fixture
def batches(tmp_path, no_pictures, monkeypatch):
    """A function: seed -> the batches of two epochs as the objective sees them: images told apart by their shade."""
    shades = np.concatenate([np.arange(300) % 256, np.arange(50)]).astype(np.uint8)[:, None, None]
    np.save(tmp_path / "shades.npy", np.broadcast_to(shades, (350, 4, 4)))

    def run(seed):
        with monkeypatch.context() as patched:
            seen = spied(patched, "ssm")
            main(arguments(tmp_path / "shades.npy", tmp_path / seed, "--loss", "ssm", "--no-map", "--normalize", "none",
                           "--sigma", "0", "--actnorm", "none", "--batch-size", "60", "--seed", seed))
        return [x for _, x in seen]
    return run


def test_an_epoch_sees_each_image_once_and_every_epoch_and_every_seed_has_its_own_order_and_noise(batches):
    first, other = batches("0"), batches("1")
    shades = [x[:, 0].floor().int() for x in first]
    assert [len(batch) for batch in shades] == [60] * 8
    for epoch in (shades[:4], shades[4:]):  # but those that do not fill a batch
        assert len(set(torch.cat(epoch).tolist())) == 240 and max(torch.cat(epoch)) < 250
        assert not torch.equal(epoch[0], epoch[0].sort().values)
    for a, b in [*zip(first[:4], first[4:]), *zip(first, other, strict=True)]:
        assert not torch.equal(a.floor(), b.floor()) and not torch.equal(a.frac(), b.frac())


@pytest.mark.parametrize("flags, epochs, decay", [(["--paper"], 55, 0.95),
                                                  (["--paper", "--arch", "cnn", "--loss", "sml"], 3, 0.925)])
def test_the_published_learning_rate_falls_after_each_of_the_first_49_epochs(npy, tmp_path, no_pictures, monkeypatch,
                                                                             flags, epochs, decay):
    rates = []

    def make_step(s, pre, flow, model, averaged):
        optimizer = torch.optim.SGD(model.parameters(), lr=123.0)

        def step(images, n):
            assert n == len(rates)
            rates.append(optimizer.param_groups[0]["lr"])
            return {"loss": torch.zeros(())}
        return step, optimizer

    monkeypatch.setattr(train_mnist, "make_step", make_step)
    monkeypatch.setattr(train_mnist, "evaluate", lambda split, *rest: {f"{split}_nll": 0.0, f"{split}_bpd": 0.0})
    main(arguments(npy, tmp_path, "--lr", "0.1", *flags, "--epochs", str(epochs)))
    assert rates == pytest.approx([0.1 * decay ** min(n // 5, 49) for n in range(5 * epochs)])


def test_a_run_of_published_settings_can_be_taken_further_and_ends_as_if_asked_at_once(npy, tmp_path, no_pictures,
                                                                                      capsys):
    flags = ["--paper", "--loss", "dsm", "--clip", "1"]
    main(arguments(npy, tmp_path / "whole", *flags, "--epochs", "3"))
    main(arguments(npy, tmp_path / "further", *flags, "--epochs", "1"))
    main(arguments(npy, tmp_path / "further", *flags, "--epochs", "3", "--resume"))
    assert_same_bits(*(checkpoint(tmp_path / name)["state"] for name in ("whole", "further")))
    assert timeless(rows(tmp_path / "whole")) == timeless(rows(tmp_path / "further"))
    main(arguments(npy, tmp_path / "cosine", "--epochs", "1"))  # which depends on the epochs
    line = fails(capsys, *arguments(npy, tmp_path / "cosine", "--epochs", "3", "--resume"))
    assert "epochs" in line and "1" in line and "3" in line


def test_a_weight_that_is_singular_ends_the_run_after_its_epoch(npy, tmp_path, capsys, monkeypatch):
    def objective(model, x, **config):
        with torch.no_grad():
            model.layers[0].weight.zero_()
        return 0 * model.energy(x).mean()

    monkeypatch.setitem(OBJECTIVES, "dsm", objective)
    line = fails(capsys, *arguments(npy, tmp_path, "--no-ema", "--actnorm", "none"))
    assert "epoch 1" in line and "inf" in line and "--lr" in line and checkpoint(tmp_path)["state"]["epoch"] == 0


def test_adding_an_objective_is_a_function_and_a_row_of_the_table(npy, tmp_path, no_pictures, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "sharp", lambda model, x, **_: losses.sm(model.energy, x))
    main(arguments(npy, tmp_path, "--loss", "sharp", "--lr", "2e-3", "--epochs", "4"))
    metrics = rows(tmp_path)
    assert len(metrics) == 5 and metrics[-1]["val_nll"] < metrics[0]["val_nll"]
    assert checkpoint(tmp_path)["config"]["loss"] == "sharp"


# ---- Images ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch", ["fc", "cnn", "glow"])
def test_colour_images_go_through_every_architecture(tmp_path, arch):
    shade = np.random.default_rng(0).integers(0, 200, (420, 1, 1, 3))
    images = shade + np.random.default_rng(1).integers(0, 56, (420, 8, 8, 3))
    np.save(tmp_path / "colour.npy", images.astype(np.uint8))
    small = ["--width", "4", "--depth", "1"] if arch == "glow" else []
    main(arguments(tmp_path / "colour.npy", tmp_path / "run", "--arch", arch, "--loss", "dsm", "--augment", *small))
    first, *_, last = rows(tmp_path / "run")
    assert last["val_nll"] < first["val_nll"]
    assert last["test_bpd"] == pytest.approx(last["test_nll"] / (192 * math.log(2)))
    assert (tmp_path / "run" / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert train_mnist.load(tmp_path / "run").sample(2).shape == (2, 3, 8, 8)


def test_with_augment_a_step_sees_images_that_are_mirrored_and_shifted_and_without_it_the_images(images, monkeypatch):
    seen = []
    monkeypatch.setattr(train_mnist, "dequantize", lambda images: seen.append(images.clone()) or dequantize(images))
    for flags in (["--augment"], []):
        step = start(images, *flags)[5]
        seen.clear()
        torch.manual_seed(5)
        step(images[:9], 0)
        torch.manual_seed(5)
        assert torch.equal(seen[0], augment(images[:9]) if flags else images[:9])


def test_a_run_that_ends_above_the_uniform_density_says_so(npy, tmp_path, capsys, no_pictures):
    """Which has log 256 nats for each of the 16 pixels."""
    for name, lr, worse in (("bad", "1e-9", True), ("good", "1e-2", False)):
        main(arguments(npy, tmp_path / name, "--loss", "ml", "--normalize", "center", "--lr", lr, "--epochs", "20",
                       "--diagonal", "9" if worse else "1"))
        nll = rows(tmp_path / name)[-1]["test_nll"]
        assert (nll > 16 * math.log(256)) == worse == ("uniform" in capsys.readouterr().err)


def test_a_checkpoint_has_the_constants_of_the_pre_processing_once(npy, tmp_path, no_pictures):
    main(arguments(npy, tmp_path))
    state = checkpoint(tmp_path)["state"]
    models = [state["model"], state["averaged"], state["best"]["model"]]
    for name in models[0]:
        places = {model[name].data_ptr() for model in models}
        constant = int(name.split(".")[1]) < 4
        assert len(places) == (1 if constant else 3), name


def test_the_shrunk_covariance_is_ledoit_and_wolfs_by_their_definition_and_nearer_to_the_truth():
    """(b²/d²) μI + (1 - b²/d²) S with d² = ‖S - μI‖² and b² the mean of ‖z_k z_kᵀ - S‖², over n, all divided by D."""
    scale = torch.linspace(0.1, 3, 20, dtype=torch.float64)
    for n in (15, 30, 4000):
        z = scale * torch.randn(n, 20, dtype=torch.float64)
        z = z - z.mean(0)
        S, I = z.T @ z / n, torch.eye(20, dtype=torch.float64)
        mu = S.trace() / 20
        d = (S - mu * I).square().sum()
        b = min(d, torch.stack([(row.outer(row) - S).square().sum() for row in z]).sum() / n**2)
        found = train_mnist.shrunk_covariance(z.float())
        torch.testing.assert_close(found, b / d * mu * I + (1 - b / d) * S, rtol=1e-5, atol=1e-5)
        truth = scale.square().diag()
        assert (found - truth).norm() < (S - truth).norm()
        assert torch.linalg.eigvalsh(found)[0] > (0.1 if n < 20 else 0)  # S of 15 points is singular


@pytest.mark.parametrize("arch, s", [("fc", 0.5), ("fc", 1.0), ("cnn", 2.0), ("glow", 1.0)])
def test_the_moments_are_those_of_all_training_images_in_units_of_s(arch, s):
    """Three thousand images, each thousand of another shade; tested with other noise than the moments were measured."""
    thousands = [torch.randint(low, low + 50, (1000, 1, 4, 4)).to(torch.uint8) for low in (1, 100, 200)]
    images = torch.cat(thousands)
    z, shape = {}, (16,) if arch == "fc" else (1, 4, 4)
    for normalize in ("none", "center", "whiten"):
        pre, _ = build(parse("--arch", arch, "--loss", "ml", "--s", str(s), "--normalize", normalize), images)
        torch.manual_seed(7)
        x = dequantize(images).view(3000, *shape)
        z[normalize] = pre(x).flatten(1)
        torch.testing.assert_close(pre.inverse(pre(x)), x, rtol=1e-3, atol=0.1)
        assert not trainable(pre)  # it is no part of what is trained
    torch.manual_seed(7)
    logits = torch.logit(dequantize(images).flatten(1) / 256)
    torch.testing.assert_close(z["none"], logits / s, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(z["center"], (logits - logits.mean(0)) / s, rtol=1e-3, atol=0.01 / s)
    assert z["whiten"].mean(0).abs().max() < 0.05
    assert (torch.cov(z["whiten"].T) - torch.eye(16)).abs().max() < 0.05


# ---- Actnorms --------------------------------------------------------------------------------------------------------

def actnorm_outputs(flow, x):
    """What each actnorm makes of a batch.   -> a list of (C, n)"""
    outputs = []
    for layer in flow.layers:
        x = layer(x) if isinstance(layer, LinearLayer) else layer(x)[0]
        if isinstance(layer, ActNorm) or isinstance(getattr(layer, "layer", None), ActNorm):
            outputs.append(x[:, :getattr(layer, "channels", x.shape[1])].detach().transpose(0, 1).flatten(1))
    return outputs


def off(outputs):
    """How far the worst channel is from mean 0 and standard deviation 1."""
    return max(max(y.mean(1).abs().max().item(), (y.std(1) - 1).abs().max().item()) for y in outputs)


def test_a_glow_starts_with_every_actnorm_giving_mean_0_and_variance_1_with_dequantised_images(images):
    """In dark images every logit is near -14 without the noise, and with it they are spread."""
    for flags, images in (([], images), (["--normalize", "none"], torch.randint(0, 2, (1000, 1, 4, 4)).byte())):
        pre, flow = build(parse(*GLOW, "--loss", "ml", *flags), images)
        outputs = actnorm_outputs(flow, pre(dequantize(images)))
        assert len(outputs) == 5 and off(outputs) < 0.2


def test_the_couplings_of_a_glow_have_the_floor_of_its_settings(images):
    for flags, floor in ((["--loss", "ml"], 0.0), (["--loss", "dsm"], 0.5), (["--loss", "ml", "--floor", "0.3"], 0.3)):
        flow = build(parse(*GLOW, *flags), images)[1]
        assert [m.floor for m in flow.modules() if isinstance(m, AffineCoupling)] == 4 * [floor]


@pytest.mark.parametrize("actnorm", ["moments", "trained", "held"])
def test_a_glow_s_last_actnorm_goes_to_the_moments_as_batches_pass_where_it_is_held_no_actnorm_moves(images, actnorm):
    _, pre, flow, _, _, step, optimizer = start(images, *GLOW, "--loss", "dsm", "--sigma", "2", "--actnorm", actnorm)
    *others, last = (m for m in flow.modules() if isinstance(m, ActNorm))
    assert last.log_scale.requires_grad == last.bias.requires_grad == (actnorm == "trained")
    assert len(others) == 4 and {p.requires_grad for m in others for p in m.parameters()} == {actnorm != "held"}
    assert sum(not p.requires_grad for p in flow.parameters()) == {"trained": 0, "moments": 2, "held": 10}[actnorm]
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    z = pre(dequantize(images))
    apart = lambda noise: off(actnorm_outputs(flow, z + noise * torch.randn_like(z))[-1:])  # noqa: E731
    before, state = apart(2), copy.deepcopy(others)
    optimizer.param_groups[0]["lr"] = 0.0  # nothing else moves
    for n in range(0, 400, 10):
        step(images[torch.randperm(250)[:50]], n)
    if actnorm == "moments":  # those of the noisy points that dsm sees
        assert apart(2) < 0.3 * before and apart(2) < apart(0)
    else:
        assert apart(2) == pytest.approx(before, rel=0.3)
    assert all(torch.equal(a.log_scale, b.log_scale) and torch.equal(a.bias, b.bias) for a, b in zip(others, state))


@pytest.mark.parametrize("arch", ["fc", "cnn"])
def test_a_last_actnorm_follows_the_flow_s_output_and_is_the_only_one(images, arch):
    s, pre, flow, model, _, step, optimizer = start(images, "--arch", arch, "--loss", "dsm", "--actnorm", "moments")
    assert [type(layer) for layer in model.layers].count(ActNorm) == 1 and type(flow.layers[-1]) is ActNorm
    assert not trainable(flow.layers[-1]) and flow.layers[-2].weight.requires_grad
    x = pre(dequantize(images.view(-1, *flow.shape)))
    noisy = lambda: x + s.sigma * torch.randn_like(x)  # noqa: E731
    assert off(actnorm_outputs(flow, x)) < 0.15
    with torch.no_grad():
        flow.layers[-2].weight.mul_(6)
    assert off(actnorm_outputs(flow, noisy())) > 1
    optimizer.param_groups[0]["lr"] = 0.0
    for n in range(0, 400, 10):
        step(images, n)
    assert off(actnorm_outputs(flow, noisy())) < 0.3


def test_one_batch_in_ten_moves_the_last_actnorm(images, monkeypatch):
    *_, flow, _, _, step, _ = start(images, *GLOW, "--loss", "ssm")
    fractions = []
    monkeypatch.setattr(ActNorm, "initialize", lambda layer, x, fraction=1.0: fractions.append((layer, fraction)))
    for n in range(25):
        step(images[:20], n)
    assert fractions == 3 * [(flow.layers[-1], 0.1)]


def test_what_is_evaluated_has_its_last_actnorm_at_the_moments_of_clean_images(npy, images, tmp_path, no_pictures):
    worst = {}
    for actnorm, average in (("moments", "--ema"), ("moments", "--no-ema"), ("trained", "--ema")):
        out = tmp_path / f"{actnorm}{average}"
        main(arguments(npy, out, *GLOW, "--depth", "1", "--lr", "2e-2", "--epochs", "5", "--normalize", "center",
                       "--sigma", "2", "--actnorm", actnorm, average))
        worst[actnorm, average] = off(actnorm_outputs(train_mnist.load(out).flow, dequantize(images))[-1:])
    assert max(worst["moments", "--ema"], worst["moments", "--no-ema"]) < 0.1 < 0.3 < worst["trained", "--ema"]


def test_the_glow_of_the_published_size_has_its_layers_and_parameters():
    s = parse("--arch", "glow", "--paper", "--loss", "ssm")
    with torch.device("meta"):  # shapes alone
        flow = glow_flow((1, 28, 28), s.width, s.depth)
    assert len(flow.layers) == 2 + 2 * 16 * 3 + 1 and sum(p.numel() for p in flow.parameters()) == 9_750_368
    assert flow.shapes[-1] == (16, 7, 7)


# ---- Evaluation ------------------------------------------------------------------------------------------------------

def test_the_nll_is_that_of_the_image_by_the_brute_force_jacobian(float64):
    flow = EBFlow([*logit_preprocessing((4,), 0.5).layers, *fc_flow(4).layers], (4,))
    images = torch.randint(0, 256, (3, 4), dtype=torch.uint8)
    torch.manual_seed(0)
    x = images + torch.rand(3, 4)
    u = flow(x)
    jacobian = torch.stack([torch.func.jacrev(flow)(sample[None]).view(4, 4) for sample in x])
    nll = -(torch.distributions.Normal(0, 1).log_prob(u).sum(1) + torch.linalg.slogdet(jacobian).logabsdet).mean()
    found = evaluate("test", flow, images)
    assert found == {"test_nll": pytest.approx(nll.item(), rel=1e-12),
                     "test_bpd": pytest.approx(nll.item() / (4 * math.log(2)), rel=1e-12)}


def test_the_nll_is_a_mean_over_all_images_with_the_same_noise_at_every_call(images):
    flow = EBFlow([*logit_preprocessing((16,), 0.5).layers, *fc_flow(16).layers], (16,))
    many = torch.cat([images, 255 - images, *9 * [images]])  # 2750: three batches, the last one smaller
    torch.manual_seed(0)
    x = torch.cat([dequantize(batch) for batch in many.split(1000)]).flatten(1)
    torch.manual_seed(7)
    found = evaluate("val", flow, many)["val_nll"]
    assert found == evaluate("val", flow, many)["val_nll"] == pytest.approx(-flow.log_prob(x).mean().item(), rel=1e-5)


# ---- Recipes ---------------------------------------------------------------------------------------------------------

def published(monkeypatch, image):
    """--paper for images of this shape (C, H, W): a function (*flags) -> settings."""
    monkeypatch.setattr(train_mnist, "load_images", lambda path: [torch.zeros(1, *image)])
    return lambda *flags: parse("--paper", *flags)


@pytest.mark.parametrize("image", [None, (1, 28, 28), (3, 32, 32)], ids=["ours", "MNIST", "CIFAR-10"])
def test_every_cell_has_a_recipe_of_settings_that_it_has(monkeypatch, image):
    table, flags = (paper(image), ["--paper"]) if image else (RECIPES, [])
    monkeypatch.setattr(train_mnist, "load_images", lambda path: [torch.zeros(1, *image)])
    archs = ("fc", "cnn", "glow") if image != (3, 32, 32) else ("fc", "cnn")
    cells = {f"{arch} {loss}" for arch in archs for loss in ("ml", "sml", "ssm", "dsm", "fdssm")}
    assert cells <= table.keys()  # a user may add rows
    for cell, recipe in table.items():
        arch, loss = cell.split()
        s = parse("--arch", arch, "--loss", loss, *flags)  # exits where a value is out of its range
        assert recipe.keys() <= s.config().keys() and {name: vars(s)[name] for name in recipe} == recipe
        assert (s.arch, s.loss, s.paper) == (arch, loss, bool(flags))


def test_an_objective_without_a_published_recipe_is_refused_by_the_name_of_the_table(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "sharp", lambda model, x, **_: losses.sm(model.energy, x))
    monkeypatch.setitem(RECIPES, "fc sharp", dict(lr=0.123))
    assert parse("--loss", "sharp").lr == 0.123
    for image, flags in (((1, 28, 28), ["--loss", "sharp"]), ((3, 32, 32), ["--arch", "glow"])):
        with pytest.raises(SystemExit, match="recipes.py: paper .*(fc sharp|glow dsm)"):
            published(monkeypatch, image)(*flags)


@pytest.mark.parametrize("image", [(1, 28, 28), (1, 16, 16)])
def test_the_published_settings_are_the_papers(monkeypatch, image):
    """As the authors' configurations have them; ssm and dsm divided by D there, fdssm by D and sml by 2."""
    D, by_paper = math.prod(image), published(monkeypatch, image)
    for loss in OBJECTIVES:
        fc, cnn, glow = (by_paper("--arch", arch, "--loss", loss) for arch in ("fc", "cnn", "glow"))
        assert all((s.decays, s.augment, s.spectral) == (49, False, False) for s in (fc, cnn, glow))
        assert (fc.epochs, cnn.epochs, glow.epochs) == (10_000, 1_000, 80)
        assert all(s.batch_size == 100 and s.schedule == "steps" and s.normalize == "none" for s in (fc, cnn, glow))
        assert fc.optimizer == cnn.optimizer == "rmsprop" and glow.optimizer == "adam"
        assert (fc.lr, cnn.lr, glow.lr) == (1e-4, 1e-4, 1e-5) and (fc.s, cnn.s, glow.s) == (0.5, 0.75, 1.0)
        assert (fc.decay, cnn.decay, glow.decay) == (0.95, 0.925 if loss in ("ml", "sml") else 0.95, 1.0)
        assert (fc.clip, cnn.clip, glow.clip) == ((5 * D, 5 * D) if loss == "fdssm" else (0, 0)) + (500 * D,)
        assert (fc.diagonal, fc.bias, fc.bend, cnn.diagonal, cnn.bias, cnn.bend) == (-1, 1, None, -1, 0.01, None)
        assert fc.weight_decay == glow.weight_decay == 0
        assert cnn.weight_decay == {"ml": 1e-5, "sml": 2e-5, "dsm": 1e-5 * D}.get(loss, 0)
        assert (glow.width, glow.depth, glow.coupling, glow.actnorm, glow.floor) == (512, 16, "tanh", "held", 0)
        if loss in ("ssm", "dsm", "fdssm"):
            assert fc.energy_weight == cnn.energy_weight == 0 and glow.energy_weight == pytest.approx(0.1 * D)
            assert (fc.sigma, cnn.sigma, glow.sigma) == ((1, 0.1, 0.1) if loss == "dsm" else (0, 0, 0))
        if loss == "fdssm":
            assert (fc.xi, cnn.xi, glow.xi) == (1, 0.1, 0.1)


@pytest.mark.parametrize("loss, fc_decay, cnn_decay, spectral, weight", [
    ("ml", (0.7, 19), (0.8, 19), True, 0), ("sml", (0.7, 19), (0.8, 19), False, 0),
    ("ssm", (0.85, 29), (0.9, 19), True, 0.001 * 32 * 32), ("dsm", (0.85, 29), (0.8, 19), True, 0.001 * 32 * 32),
    ("fdssm", (0.7, 19), (0.85, 49), False, 0.001 * 3072 / 0.1**2)])
def test_the_published_settings_of_cifar_10_are_the_papers(monkeypatch, loss, fc_decay, cnn_decay, spectral, weight):
    """λ·E was added to each of the H·W values that remain after a sum over channels; fdssm's sum is divided by ξ²."""
    fc, cnn = (published(monkeypatch, (3, 32, 32))("--arch", arch, "--loss", loss) for arch in ("fc", "cnn"))
    for s in (fc, cnn):
        assert (s.epochs, s.batch_size, s.optimizer, s.lr, s.schedule) == (10_000, 100, "rmsprop", 1e-4, "steps")
        assert s.augment and (s.weight_decay, s.clip, s.diagonal, s.normalize) == (0, 0, -1, "none")
        if weight:
            assert s.energy_weight == pytest.approx(weight) and s.sigma == (0.1 if loss == "dsm" else 0)
            assert loss != "fdssm" or s.xi == 0.1
    assert ((fc.decay, fc.decays), (cnn.decay, cnn.decays)) == (fc_decay, cnn_decay)
    assert (fc.s, cnn.s, fc.bias, cnn.bias, cnn.spectral) == (0.5, 0.75, 1, 0.01, spectral)


def test_the_learning_rate_of_the_published_schedule_falls_after_each_of_its_first_epochs():
    s = parse("--schedule", "steps", "--decay", "0.5", "--decays", "3", "--lr", "1.6")
    assert [train_mnist.learning_rate(s, n, 10) for n in (0, 9, 10, 29, 30, 45, 900)] == [
        1.6, 1.6, 0.8, 0.4, 0.2, 0.2, 0.2]


def test_a_published_step_of_colour_images_is_by_the_formulas(monkeypatch, float64):
    """dsm of a CNN: kernels over their largest singular value, λ E, and the NLL by brute force, in float64."""
    s = published(monkeypatch, (3, 32, 32))("--arch", "cnn", "--loss", "dsm")
    images = torch.randint(256, (50, 3, 4, 4), dtype=torch.uint8)
    pre, flow = build(s, images)
    for name, p in flow.named_parameters():
        p.data += 0.3 * torch.randn_like(p)
    for layer in flow.layers:  # power iteration has converged
        if hasattr(layer, "parametrizations"):
            U, _, V = torch.linalg.svd(layer.parametrizations.weight.original.detach().flatten(1), full_matrices=False)
            layer.parametrizations.weight[0]._u, layer.parametrizations.weight[0]._v = U[:, 0].clone(), V[0].clone()
    model = EBFlow([*pre.layers, *flow.layers], pre.shape)
    step, _ = make_step(s, pre, flow, model, copy.deepcopy(model))
    torch.manual_seed(3)
    x = dequantize(augment(images[:6])).double()
    noise = torch.randn(6, 3, 4, 4)
    z = torch.logit((x / 256 + 1e-6) * (1 - 2e-6)) / 0.75

    weights = [p.detach().clone().requires_grad_() for p in flow.parameters()]
    def energy(z):
        log_det, layers = 0, iter(weights)
        for i, (bias, kernel) in enumerate(zip(layers, layers)):
            if i in (2, 4):
                z = torch.nn.functional.pixel_unshuffle(z, 2)
            kernel = kernel / torch.linalg.matrix_norm(kernel.flatten(1), 2)
            z = torch.nn.functional.conv2d(z, kernel, bias, padding=3)
            if i < 5:
                log_det = log_det + torch.log(1.3 + 0.7 * torch.sigmoid(z)).flatten(1).sum(1)
                z = 1.3 * z + 0.7 * torch.nn.functional.softplus(z)
        return 0.5 * z.flatten(1).square().sum(1) + 24 * math.log(2 * math.pi) - log_det

    noisy = (z + 0.1 * noise).requires_grad_()
    score, = torch.autograd.grad(energy(noisy).sum(), noisy, create_graph=True)
    loss = 0.5 * (score - noise / 0.1).square().flatten(1).sum(1).mean() + 1.024 * energy(z).mean()
    gradients = torch.autograd.grad(loss, weights)
    torch.manual_seed(3)
    figures = step(images[:6], 0)
    torch.testing.assert_close(figures["loss"], loss.detach(), rtol=1e-8, atol=0)
    for p, expected in zip(flow.parameters(), gradients):
        torch.testing.assert_close(p.grad, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    model.eval()
    with torch.no_grad():
        before = {name: b.clone() for name, b in model.named_buffers()}
        J = torch.func.jacrev(model)(x[:1]).view(48, 48)
        u = model(x[:1]).flatten()
        nll = 0.5 * u.square().sum() + 24 * math.log(2 * math.pi) - torch.linalg.slogdet(J).logabsdet
        torch.testing.assert_close(-model.log_prob(x[:1])[0], nll)
        torch.testing.assert_close(model.inverse(model(x)), x, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(before[name], b) for name, b in model.named_buffers())  # evaluation moves nothing


# ---- How much there is to read ---------------------------------------------------------------------------------------

def test_before_its_first_step_few_functions_are_entered_and_few_frames_in_a_step(npy, tmp_path, monkeypatch):
    calls = []

    def profile(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        ours = path.parent in (ROOT, ROOT / "support") and not frame.f_code.co_name.endswith(("comp>", "expr>"))
        if event == "call" and ours:
            calls.append((path.name, frame.f_code.co_firstlineno, frame.f_code.co_name))

    def stop(*arguments, **settings):
        sys.setprofile(None)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", stop)
    sys.setprofile(profile)
    try:
        with pytest.raises(SystemExit):
            main(arguments(npy, tmp_path, "--actnorm", "none"))
    finally:
        sys.setprofile(None)
    step = [name for _, _, name in calls].index("step")
    assert 20 < len(set(calls)) <= 61 and 10 < len(calls) - step <= 30, (sorted(set(calls)), calls[step:])


# ---- Evaluation alone ------------------------------------------------------------------------------------------------

def test_evaluate_prints_the_figures_of_a_finished_run_and_leaves_it_as_it_is(npy, tmp_path, capsys, no_pictures):
    main(arguments(npy, tmp_path / "run", "--loss", "dsm"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    main(["--evaluate", str(tmp_path / "run"), "--data", str(npy), "--device", "cpu"])
    lines, last = capsys.readouterr().out.splitlines(), rows(tmp_path / "run")[-1]
    assert lines[1] == f"test_nll {last['test_nll']:.4f}  test_bpd {last['test_bpd']:.4f}  of 50 images"
    assert lines[0].startswith(f"val_nll {last['best_val_nll']:.4f}") and "nothing was trained or refitted" in lines[2]
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_evaluate_refuses_other_settings_another_shape_and_a_run_that_was_not_finished(npy, tmp_path, capsys, images,
                                                                                       monkeypatch, no_pictures):
    out, evaluation = tmp_path / "run", ["--evaluate", tmp_path / "run", "--data", npy, "--device", "cpu"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 1)
        main(arguments(npy, out))
    assert str(out) in fails(capsys, *evaluation)
    main(arguments(npy, out, "--overwrite"))
    np.save(tmp_path / "wide.npy", np.zeros((40, 4, 5), np.uint8))
    for flags, fact in ((["--arch", "cnn"], "leave out"), (["--data", tmp_path / "wide.npy"], "(1, 4, 5)"),
                        (["--evaluate", tmp_path], str(tmp_path)), (["--data", tmp_path / "none.npy"], "none.npy")):
        assert fact in fails(capsys, *evaluation, *flags)
