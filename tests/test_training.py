"""What a step descends, and the parameters as one vector: a step of it is a step of theirs."""

import pytest
import torch

import losses
from conftest import failing
from ebflow import fc_flow, toy_flow
from train_mnist import LOSSES, parse
from train_toy import main
from training import MovingAverage, as_vector, gradient_of, gradient_vector, make_optimizer, objective, restore, theta_of, train_step, trainable


def test_the_parameters_are_views_of_the_vector(float64):
    flow = toy_flow(blocks=2, width=8)
    flow.layers[0].weight.requires_grad_(False)
    flow.layers[3].weight = torch.nn.Parameter(torch.randn(2, 2).T)  # by columns, as inverses are
    before = [p.detach().clone() for p in trainable(flow)]
    theta = as_vector(flow)
    assert torch.equal(theta, torch.cat([p.flatten() for p in before])) and len(theta) == sum(p.numel() for p in flow.parameters()) - 4
    with torch.no_grad():
        theta += 1  # as an optimiser does
    torch.testing.assert_close([p.detach() for p in trainable(flow)], [p + 1 for p in before])
    flow.load_state_dict({name: torch.zeros_like(p) for name, p in flow.state_dict().items()})  # as `restore` does
    assert not theta.any()


def test_the_objective_of_a_batch_is_that_loss_of_that_energy(float64):
    flow, x = fc_flow(3, bend=1.0), torch.randn(50, 3)
    expected = {"ml": lambda args: -flow.log_prob(x).mean(),
                "sml": lambda args: flow.energy(x).mean() - flow.energy(flow.sample(args.model_samples)).mean(),
                "ssm": lambda args: losses.ssm(flow.energy, x), "dsm": lambda args: losses.dsm(flow.energy, x, args.sigma),
                "fdssm": lambda args: losses.fdssm(flow.energy, x, args.xi)}
    with torch.no_grad():
        flow.layers[0].bias += 1  # so that x is not -x
    for loss in LOSSES:
        args = parse(["--loss", loss])
        torch.manual_seed(0)
        found = objective(args, flow, x)
        torch.manual_seed(0)
        torch.testing.assert_close(found, expected[loss](args))


@pytest.mark.parametrize("flags", [[], ["--clip", "0.1"], ["--weight-decay", "0.1"], ["--optimizer", "rmsprop"]], ids=str)
def test_steps_down_the_vector_are_steps_of_each_parameter(float64, flags):
    args = parse(["--loss", "ssm", "--lr", "1e-2", *flags])
    x, ours, theirs = torch.randn(50, 3), fc_flow(3, bend=1.0), fc_flow(3, bend=1.0)
    optimizer = make_optimizer(args, ours)
    kind = torch.optim.RMSprop if "rmsprop" in flags else torch.optim.Adam
    expected = kind(theirs.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    for step in range(5):
        torch.manual_seed(step)
        loss, norm = train_step(args, ours, x, optimizer)
        torch.manual_seed(step)
        expected.zero_grad()
        value = objective(args, theirs, x)
        value.backward()
        assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs.parameters(), args.clip or torch.inf).item())
        assert loss == pytest.approx(value.item())
        assert not args.clip or theta_of(optimizer).grad.norm().item() == pytest.approx(args.clip, rel=1e-4) and norm > args.clip
        expected.step()
    torch.testing.assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()))


def test_a_parameter_that_the_loss_does_not_see_has_gradient_0():
    flow = fc_flow(3)
    theta = theta_of(make_optimizer(parse([]), flow))
    found = gradient_vector(flow.log_z(), trainable(flow), out=theta.grad)
    assert found is theta.grad and found.any()
    for p, g in zip(trainable(flow), found.split([p.numel() for p in trainable(flow)])):
        assert g.any() == (p.dim() == 2)  # the matrices alone have a determinant


def test_theta_of_another_model_or_of_one_that_was_moved_is_refused():
    args, flow = parse(["--loss", "ssm"]), fc_flow(3)
    optimizer = make_optimizer(args, flow)
    gradient_of(args, flow, optimizer)
    for other in (fc_flow(3), fc_flow(4)):
        with pytest.raises(ValueError, match="of another model"):
            gradient_of(args, other, optimizer)
    with pytest.raises(ValueError, match="was moved"):
        gradient_of(args, flow.double(), optimizer)


def test_every_matrix_starts_at_16_bytes():
    flow = toy_flow(blocks=2, width=8)
    as_vector(flow)
    assert all(p.data_ptr() % 16 == 0 for p in trainable(flow) if p.numel() % 4 == 0) and any(p.data_ptr() % 16 for p in trainable(flow))


def test_the_moving_average_is_no_view_of_what_it_follows():
    flow = fc_flow(3, bend=1.0)
    theta = as_vector(flow)
    average = MovingAverage(flow, 0.5)
    with torch.no_grad():
        theta += 1
    assert torch.equal(average.model.layers[0].weight, torch.eye(3))
    average.update()  # the first takes all
    torch.testing.assert_close(average.model.layers[0].weight, flow.layers[0].weight)


def test_a_checkpoint_of_another_version_is_one_line(tmp_path, capsys):
    arguments = ["--loss", "ml", "--blocks", "1", "--epochs", "1", "--steps", "2", "--test-points", "40", "--device", "cpu", "--out", str(tmp_path)]
    main(arguments)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    checkpoint["state"]["optimizer"] = torch.optim.Adam(toy_flow(blocks=1).parameters()).state_dict()  # of many tensors
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    assert "written by another version of this code: start anew with --overwrite" in failing(main)(capsys, *arguments, "--resume")


def test_lack_of_memory_is_no_other_version():
    class Full:
        def load_state_dict(self, state):
            raise torch.OutOfMemoryError
    with pytest.raises(torch.OutOfMemoryError):
        restore({"model": Full()}, {"model": {}})
