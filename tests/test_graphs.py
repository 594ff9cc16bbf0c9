"""A gradient that a GPU replays as a CUDA graph is the gradient, and so is one that is compiled."""

import os
import subprocess
import sys

import pytest
import torch

import train_mnist
import train_toy
import training
from conftest import compiler
from ebflow import cnn_flow, fc_flow, glow_flow, toy_flow
from flags import pick_device
from run import RunError
from training import Graphed, descend, gradient_of, make_optimizer, objective, theta_of, trainable, update

FLOWS = {"fc": lambda: fc_flow(16, bend=1.0), "cnn": lambda: cnn_flow((1, 8, 8), diagonal=0.6), "glow": lambda: glow_flow((1, 8, 8), 8, 2)}
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def settings(arch, loss, device):
    args = train_mnist.parse(["--arch", arch, "--loss", loss])
    torch.manual_seed(0)
    flow = FLOWS[arch]().to(device)
    return args, flow, make_optimizer(args, flow)


def assert_gradient(args, flow, optimizer):
    """Of the weights as they are, after steps of the optimiser and other gradients between the calls."""
    leave_gradient = gradient_of(args, flow, optimizer)
    for seed in range(3):
        x = torch.randn(10, *flow.shape, device=theta_of(optimizer).device)
        value = assert_gradient_at(x, args, flow, optimizer, leave_gradient, seed)
        descend(args, value, optimizer)
        update(args, objective(args, flow, x), flow, optimizer)


def in_a_row(tensors):
    return torch.cat([t.flatten() for t in tensors])


def assert_gradient_at(x, args, flow, optimizer, leave_gradient, seed=0):
    torch.manual_seed(seed)
    value = leave_gradient(x).clone()
    torch.manual_seed(seed)
    expected = objective(args, flow, x)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(theta_of(optimizer).grad, in_a_row(torch.autograd.grad(expected, trainable(flow))))
    return value


@pytest.mark.parametrize("arch", FLOWS)
def test_maximum_likelihood_is_the_gradient_of_the_energy_and_that_of_log_z(float64, arch):
    args, flow, optimizer = settings(arch, "ml", "cpu")
    x = torch.randn(10, *flow.shape)
    for leave_gradient in (gradient_of(args, flow, optimizer), gradient_of(args, flow, optimizer, graphed=True)):
        for _ in range(2):  # the second call does not add to the first one's gradient
            loss = leave_gradient(x)
        expected = torch.autograd.grad(-flow.log_prob(x).mean(), trainable(flow))
        torch.testing.assert_close(theta_of(optimizer).grad, in_a_row(expected))
        torch.testing.assert_close(loss, -flow.log_prob(x).mean())


def test_the_loss_of_maximum_likelihood_in_two_parts_has_the_type_of_the_gradient():
    args, flow, optimizer = settings("fc", "ml", "cpu")
    assert gradient_of(args, flow, optimizer, graphed=True)(torch.randn(10, 16)).dtype == torch.float32  # log Z is in float64


@compiler
@pytest.mark.parametrize("arch, loss", [*(("fc", loss) for loss in train_mnist.LOSSES), ("cnn", "ml"), ("cnn", "sml"), ("glow", "sml")])
def test_a_compiled_gradient_is_that_of_the_objective_and_draws_its_random_numbers(float64, arch, loss):
    args, flow, optimizer = settings(arch, loss, "cpu")
    args.compile = True
    assert_gradient(args, flow, optimizer)


def compiled_gradient_at_a_singular_weight(loss):
    args, flow, optimizer = settings("fc", loss, "cpu")
    args.compile = True
    with torch.no_grad():
        flow.layers[0].weight[0] = 0
    return gradient_of(args, flow, optimizer)(torch.randn(10, 16))


@compiler
def test_a_compiled_loss_is_not_finite_where_a_weight_is_singular():
    assert not compiled_gradient_at_a_singular_weight("ml").isfinite()  # at which `fit` stops


@compiler
def test_compiled_draws_raise_where_a_weight_is_singular():
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):  # a message of torch's own
        compiled_gradient_at_a_singular_weight("sml")


@compiler
def test_a_compiled_gradient_follows_a_noise_that_falls(float64):
    [args], _ = train_toy.parse(["--loss", "dsm", "--compile"])
    flow, args.sigma = toy_flow(blocks=1, width=8), torch.tensor(0.0)
    optimizer = make_optimizer(args, flow)
    leave_gradient = gradient_of(args, flow, optimizer)
    for sigma in (6.0, 1.0, 0.375):
        args.sigma.fill_(sigma)
        assert_gradient_at(torch.randn(20, 2), args, flow, optimizer, leave_gradient)


def test_where_there_is_no_compiler_the_error_is_one_line(tmp_path):
    environment = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    failed = subprocess.run([sys.executable, train_toy.__file__, "--compile", "--blocks", "1", "--device", "cpu", "--out", str(tmp_path / "run")],
                            env=environment, capture_output=True, text=True)
    line = failed.stderr.strip().splitlines()[-1]
    assert failed.returncode == 1 and line.startswith("error: torch.compile failed") and "without --compile and with --resume" in line


def test_a_gpu_does_not_compile(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cpu", compiling=True).type == "cpu" and pick_device("auto").type == "cuda"
    with pytest.raises(RunError, match="leave it out"):
        pick_device("auto", compiling=True)


@gpu
@pytest.mark.parametrize("arch", FLOWS)
@pytest.mark.parametrize("loss", ["ml", "ssm", "dsm", "fdssm"])
def test_a_replayed_gradient_is_that_of_the_objective(float64, arch, loss):
    assert_gradient(*settings(arch, loss, "cuda"))


@gpu
def test_a_replay_draws_anew_and_recording_draws_nothing_that_is_missed():
    noise = Graphed(lambda x: (x + torch.randn_like(x)).sum())
    x = torch.zeros(5, 4, device="cuda")
    torch.manual_seed(0)
    values = [noise(x).item() for _ in range(3)]
    assert len(set(values)) == 3
    torch.manual_seed(0)
    assert [noise(x).item() for _ in range(3)] == values
    with pytest.raises(ValueError, match="recorded for batches of shape"):
        noise(x[:1])


@gpu
def test_a_noise_that_falls_is_seen_by_the_replay():
    [args], _ = train_toy.parse(["--loss", "dsm"])
    args.sigma = torch.tensor(2.0, dtype=torch.float64, device="cuda")
    flow, x = toy_flow(blocks=2).cuda(), torch.randn(100, 2, device="cuda")
    leave_gradient = gradient_of(args, flow, make_optimizer(args, flow))
    for sigma in (2.0, 0.5):
        args.sigma.fill_(sigma)
        torch.manual_seed(0)
        value = leave_gradient(x).item()
        torch.manual_seed(0)
        assert value == pytest.approx(objective(args, flow, x).item(), rel=1e-4)


@gpu
@pytest.mark.parametrize("loss", ["ml", "dsm"])
def test_a_run_on_a_gpu_that_is_resumed_ends_with_the_same_bits(tmp_path, loss, monkeypatch):
    flags = ["--loss", loss, "--blocks", "2", "--epochs", "3", "--steps", "20", "--test-points", "400", "--device", "cuda"]
    train_toy.main([*flags, "--out", str(tmp_path / "whole")])
    train_epoch = training.train_epoch

    def stopped(args, epoch, *rest):
        if epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(args, epoch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_epoch", stopped)
        with pytest.raises(SystemExit):
            train_toy.main([*flags, "--out", str(tmp_path / "stopped")])
    train_toy.main([*flags, "--out", str(tmp_path / "stopped"), "--resume"])
    whole, resumed = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["state"]["model"] for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
