"""The gradient that a GPU replays as a CUDA graph, and the one that torch.compile makes, are that of the objective."""

import copy

import pytest
import torch

import train_mnist
import train_toy
from conftest import assert_same_bits, checkpoint, compiler, stop_after
from ebflow import EBFlow, cnn_flow, fc_flow, glow_flow, toy_flow
from layers import ActNorm
from losses import OBJECTIVES
from support import fast, settings
from support.fast import Graphed, accelerated, compiled
from support.optimization import trainable
from support.run import RunError

FLOWS = {"fc": lambda: fc_flow(4, bend=1.0), "cnn": lambda: cnn_flow((1, 2, 2), kernel_size=3, blocks=1, diagonal=0.6),
         "glow": lambda: glow_flow((1, 4, 4), width=2, depth=1, floor=0.5), "toy": lambda: toy_flow(blocks=1, width=8)}
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def a_gradient(loss, flow):
    """What the training scripts accelerate: leaves the gradient in p.grad.   -> the function, and its objective"""
    parameters = trainable(flow)

    def objective(x, sigma):
        return OBJECTIVES[loss](flow, x, share=lambda rows: rows, sigma=sigma, xi=0.7, model_samples=10)

    def gradient(x, sigma):
        loss = objective(x, sigma)
        loss.backward(inputs=parameters)
        return loss.detach()

    return gradient, objective


def assert_gradient(gradient, objective, parameters, x, sigma):
    """Loss and gradient are those of the objective with the same random numbers, and p.grad is this gradient alone."""
    torch.manual_seed(1)
    for p in parameters:
        p.grad = None
    found = gradient(x, sigma).clone()
    after = torch.rand(3)
    torch.manual_seed(1)
    expected = objective(x, sigma)
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close([p.grad for p in parameters], [*torch.autograd.grad(expected, parameters)])
    assert x.is_cuda or torch.equal(after, torch.rand(3))  # as many of them were drawn


def assert_gradient_while_training(gradient, objective, flow):
    """With steps of the optimiser and a falling σ between the calls."""
    parameters = trainable(flow)
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    for sigma in (6.0, 1.0, 0.4):
        sigma = torch.tensor(sigma, dtype=torch.float64, device=parameters[0].device)
        x = torch.randn(10, *flow.shape, device=parameters[0].device)
        assert_gradient(gradient, objective, parameters, x, sigma)
        optimizer.step()


# ---- torch.compile ---------------------------------------------------------------------------------------------------

@compiler
def test_a_compiled_gradient_is_that_of_the_objective_and_draws_its_random_numbers(float64):
    """For one layer of each kind and one objective, since C++ takes long; the others below go as far as that."""
    flow = EBFlow(FLOWS["fc"]().layers[:2], (4,))
    gradient, objective = a_gradient("dsm", flow)
    assert_gradient_while_training(compiled(gradient), objective, flow)


@pytest.mark.parametrize("arch, loss", [("fc", "ml"), ("fc", "sml"), ("fc", "ssm"), ("fc", "dsm"), ("fc", "fdssm"),
                                        ("cnn", "ml"), ("cnn", "sml"), ("glow", "sml"), ("toy", "dsm")])
def test_a_gradient_can_be_captured_whole_and_is_then_that_of_the_objective(float64, captured, arch, loss):
    flow = FLOWS[arch]()
    gradient, objective = a_gradient(loss, flow)
    assert_gradient_while_training(compiled(gradient), objective, flow)


@pytest.mark.parametrize("loss", ["ml", "sml"])
def test_at_a_singular_weight_a_captured_loss_is_not_finite_and_captured_draws_raise(captured, loss):
    flow = fc_flow(4)
    with torch.no_grad():
        flow.layers[0].weight[0] = 0
    gradient = compiled(a_gradient(loss, flow)[0])
    if loss == "ml":  # at which a run stops
        assert not gradient(torch.randn(10, 4), torch.tensor(0.4)).isfinite()
    else:
        with pytest.raises(torch.linalg.LinAlgError, match="singular"):  # a message of torch's own
            gradient(torch.randn(10, 4), torch.tensor(0.4))


def test_where_there_is_no_compiler_the_error_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    with pytest.raises(RunError, match="torch.compile failed .* without --compile and with --resume") as error:
        compiled(lambda x: (x.sin() + 0.123).sum())(torch.ones(7))
    assert "\n" not in str(error.value)


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------

def mnist_settings(loss, *flags):
    return settings.parse(settings.Mnist, ["--loss", loss, *flags])


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_on_a_cpu_the_gradient_is_the_function_itself_and_so_is_a_graphed_one(loss):
    flow = fc_flow(4)
    gradient, objective = a_gradient(loss, flow)
    assert accelerated(gradient, trainable(flow), mnist_settings(loss)) is gradient
    assert_gradient_while_training(Graphed(gradient, trainable(flow)), objective, flow)


def test_a_gpu_replays_all_gradients_but_those_that_wait_for_it_and_does_not_compile():
    class OnGPU:
        is_cuda = True

    for loss in OBJECTIVES:
        gradient = accelerated(len, [OnGPU()], mnist_settings(loss))
        assert gradient is len if loss in ("ml", "sml") else isinstance(gradient, Graphed)
    with pytest.raises(RunError, match="leave it out"):
        accelerated(len, [OnGPU()], mnist_settings("dsm", "--compile"))


@pytest.mark.parametrize("loss", [loss for loss in OBJECTIVES if loss not in fast.WAITING])
@pytest.mark.parametrize("clip", ["0", "1"])
def test_nothing_in_a_step_of_score_matching_waits_for_a_gpu(loss, clip):
    """Python waits where a tensor's value becomes a number. On device "meta" there is no value, and it is an error."""
    flow = EBFlow([*fc_flow(4).layers, ActNorm(4)], (4,)).to("meta")
    s = mnist_settings(loss, "--clip", clip, "--optimizer", "rmsprop")  # torch has no fused Adam there
    step, _ = train_mnist.make_step(s, lambda x: x, flow, flow, copy.deepcopy(flow))
    for n in (3, 10):  # in the second, the actnorm moves
        figures = step(torch.zeros(10, 1, 2, 2, dtype=torch.uint8, device="meta"), n)
        assert all(figure.is_meta for figure in figures.values())


@gpu
@pytest.mark.parametrize("arch", FLOWS)
@pytest.mark.parametrize("loss", [loss for loss in OBJECTIVES if loss not in fast.WAITING])
def test_a_replayed_gradient_is_that_of_the_objective(float64, arch, loss):
    flow = FLOWS[arch]().cuda()
    gradient, objective = a_gradient(loss, flow)
    assert_gradient_while_training(accelerated(gradient, trainable(flow), mnist_settings(loss)), objective, flow)


@gpu
def test_a_replay_draws_anew_and_recording_draws_nothing_that_is_missed():
    noise = Graphed(lambda x: (x + torch.randn_like(x)).sum(), [])
    x = torch.zeros(5, 4, device="cuda")
    torch.manual_seed(0)
    values = [noise(x).item() for _ in range(3)]
    assert len(set(values)) == 3
    torch.manual_seed(0)
    assert [noise(x).item() for _ in range(3)] == values
    with pytest.raises(ValueError, match="recorded for shape"):
        noise(x[:1])


@gpu
@pytest.mark.parametrize("loss", ["ml", "dsm"])
def test_a_run_on_a_gpu_that_is_resumed_ends_with_the_same_bits(tmp_path, loss, monkeypatch, no_pictures):
    flags = ["--loss", loss, "--blocks", "2", "--epochs", "3", "--steps", "20", "--test-points", "400",
             "--device", "cuda"]
    train_toy.main([*flags, "--out", str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 2)
        train_toy.main([*flags, "--out", str(tmp_path / "stopped")])
    train_toy.main([*flags, "--out", str(tmp_path / "stopped"), "--resume"])
    assert_same_bits(*(checkpoint(tmp_path / name)["state"] for name in ("whole", "stopped")))
