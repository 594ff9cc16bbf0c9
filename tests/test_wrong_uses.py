"""A wrong use of losses.py, ebflow.py, layers.py or sampling.py raises, gives the right value, or shows nan or inf.

A silent wrong number fails. Most batches have as many samples as dimensions: there a wrong shape broadcasts.
"""

import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn as nn

import layers
import losses
import sampling
from ebflow import EBFlow, fc_flow, toy_flow
from layers import ActNorm, FullyConnected, Logit, Squeeze
from layers import AffineCoupling, Conv1x1, Convolution, SmoothLeakyReLU, Standardize  # noqa: F401  of_layer makes them

torch.manual_seed(0)
X, NOISE, IMAGES = torch.randn(3, 3), torch.randn(3, 3), torch.randn(3, 3, 3, 3)  # B = D, and B = C = H = W
FIVE = torch.randn(5, 3)  # B ≠ D
SIGNS, EPS = losses.rademacher(X), losses.on_sphere(X, 0.3)
SIGMAS, MASK, NONE = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([True, False, True]), torch.zeros(3, dtype=torch.bool)
NORMAL = torch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3))
FLOW = EBFlow([], (3,))  # the standard normal


class Right(NamedTuple):
    """A wrong argument that gives the right value all the same: that of `expected()`."""
    argument: object
    expected: object


def energy(x):
    return 0.5 * x.square().reshape(len(x), -1).sum(1)


def results(use, *arguments):
    torch.manual_seed(1)
    return [torch.as_tensor(t) for t in torch.utils._pytree.tree_leaves(use(*arguments)) if t is not None]


def silent(found):
    """Nothing in the results shows that something is wrong."""
    return all(t.isfinite().all() and t.numel() for t in found)


def hold(use, right, wrong):
    """The rule: `use(right)` is fine; `use(wrong)` raises, or shows that it is wrong, or is right."""
    assert silent(results(use, right))  # so that an error with `wrong` is not one of the use itself
    wrong, expected = wrong if isinstance(wrong, Right) else (wrong, None)
    try:
        found = results(use, wrong)
    except Exception:  # torch's own words will do
        return
    if silent(found):
        assert expected is not None, f"a silent wrong number: {found}"
        for a, b in zip(found, results(expected), strict=True):
            torch.testing.assert_close(a.flatten(), b.flatten(), check_dtype=False)


# ---- Energies that are not one number for each sample, in every function that takes one ------------------------------

OBJECTIVES = {
    "ml": losses.ml, "sm": losses.sm, "ssm": losses.ssm, "sml": lambda e, x: losses.sml(e, x, 2 * x),
    "fdssm": lambda e, x: losses.fdssm(e, x, 0.3), "dsm": lambda e, x: losses.dsm(e, x, 0.3),
    "pooled dsm": lambda e, x: losses.dsm(e, x, 0.3, pooled=True)}
SAMPLERS = {sampler.__name__: lambda e, x, a=0.1, sampler=sampler, **rest: sampler(e, x, 3, a, **rest)
            for sampler in (sampling.langevin, sampling.mala, sampling.tune)}
PROPOSE = {  # functions of an energy, a flow, and states
    "independence": sampling.independence, "alternate": lambda e, q, x: sampling.alternate(e, q, x, 2, 2, 0.1),
    "unadjusted alternate": lambda e, q, x: sampling.alternate(e, q, x, 2, 2, 0.1, adjusted=False),
    "log_weights": sampling.log_weights, "reverse_log_z": sampling.reverse_log_z,
    "estimate_log_z": lambda e, q, x: sampling.estimate_log_z(e, q, 2 * len(x))}
OTHERS = {name: lambda e, x, use=use: use(e, FLOW, x) for name, use in PROPOSE.items()} | {
    "impute": lambda e, x: sampling.impute(e, x, MASK, 3, 0.1),
    "adjusted impute": lambda e, x: sampling.impute(e, x, MASK, 3, 0.1, adjusted=True),
    "tempering": lambda e, x: sampling.tempering(e, torch.stack([x, x]), [1.0, 2.0], 2, [0.1, 0.2])}
ENERGIES = {  # and for some the energy that gives the same result
    "(B, 1)": (lambda x: energy(x)[:, None],), "(1, B)": (lambda x: energy(x)[None],),
    "a mean": (lambda x: energy(x).mean(),), "a number": (lambda x: 1.0,), "a score": (lambda x: -x,),
    "a flow": (FLOW,), "a distribution": (NORMAL,), "a function to a distribution": (lambda x: NORMAL,),
    "integers": (lambda x: (9 * energy(x)).long(), lambda x: (9 * energy(x)).floor()),
    "under no_grad": (torch.no_grad()(energy), energy), "detached": (lambda x: energy(x.detach()), energy),
    "linear": (lambda x: x.sum(1), lambda x: x.sum(1) + 0 * energy(x)),
    "a linear network": (lambda x, w=nn.Parameter(X[0]): w @ x.T, lambda x: x @ X[0] + 0 * energy(x))}
BATCHES = {
    "events without dimensions": (X[:, 0], lambda use: use(energy, X[:, :1])), "no samples": (X[:0],),
    "events of no elements": (X[:, :0], lambda use: torch.zeros(())), "a list": ([[0.0, 1.0, 2.0]],),
    "integers": ((9 * X).long(), lambda use: use(energy, (9 * X).trunc())),
    "an array": (X.numpy(), lambda use: use(energy, X))}


@pytest.mark.parametrize("wrong", ENERGIES)
@pytest.mark.parametrize("function", OBJECTIVES | SAMPLERS | OTHERS)
def test_an_energy_that_is_not_one_number_for_each_sample(function, wrong):
    use, (e, *right) = (OBJECTIVES | SAMPLERS | OTHERS)[function], ENERGIES[wrong]
    right = right if function not in OBJECTIVES or wrong != "integers" else []  # they have no gradient to train with
    hold(lambda e: use(e, X), energy, Right(e, lambda: use(right[0], X)) if right else e)


@pytest.mark.parametrize("wrong", BATCHES)
@pytest.mark.parametrize("function", OBJECTIVES | SAMPLERS)
def test_a_batch_that_is_not_one_of_events_in_floating_point(function, wrong):
    use, (wrong, *right) = (OBJECTIVES | SAMPLERS)[function], BATCHES[wrong]
    hold(lambda x: use(energy, x), X, Right(wrong, lambda: right[0](use)) if right else wrong)


@pytest.mark.parametrize("function", [losses.ml, losses.sm, lambda e, x: sampling.mala(e, x, 2, 0.1)])
def test_the_error_of_a_wrong_energy_says_what_was_expected_and_what_came(function):
    with pytest.raises(ValueError, match=r"\(5,\).*\(5, 1\)"):
        function(ENERGIES["(B, 1)"][0], FIVE)


# ---- Everything else -------------------------------------------------------------------------------------------------

def flow(sample=FLOW.sample, log_prob=FLOW.log_prob):
    return SimpleNamespace(sample=sample, log_prob=log_prob)


def own(forward=lambda x: x, log_abs_det=torch.zeros(()), kind=layers.LinearLayer, x=FIVE):
    """What the flow of one layer of somebody's own gives."""
    methods = {"forward": lambda self, x: forward(x), "inverse": None, "log_abs_det": lambda self, shape: log_abs_det}
    mine = EBFlow([type("Own", (kind,), methods)()], x.shape[1:])
    return mine.energy(x), mine.log_prob(x)


def of_layer(code, shape):
    """What the flow of this layer gives, with 0.3 added to each of its parameters, on three events of the shape."""
    mine = EBFlow([eval(code)], shape)
    for p in mine.parameters():
        p.data += 0.3
    x = torch.randn(3, *shape)
    return mine.energy(x), mine.log_prob(x), mine(x)


def steps_of(a):
    """Three Langevin steps on ½‖x‖² of the sizes `a`."""
    x = X
    for _ in range(3):
        x = x - a * x + (2 * a).sqrt() * torch.randn_like(x)
    return x


def each(x, noise):
    """dsm at one sigma for each sample: the mean over the samples, each by itself."""
    return sum(losses.dsm(energy, x[i:i + 1], SIGMAS[i].item(), noise[i:i + 1]) for i in range(3)) / 3


def impute(mask, adjusted=False, x=FIVE, **rest):
    return sampling.impute(energy, x, mask, 2, 0.1, adjusted, **rest)


def tempering(T=(1.0, 2.0, 3.0), step_sizes=(0.1, 0.2, 0.3), x=torch.stack([X, X, X]), energy=energy):
    return sampling.tempering(energy, x, T, 2, step_sizes)


USES = {  # a use, an argument with which it is right, and wrong ones
    "sigma": (lambda sigma: losses.dsm(energy, X, sigma, NOISE), 0.3, None, [0.1], 0.0, math.inf, math.nan, X,
              SIGMAS[:2], SIGMAS[None], torch.ones(9), Right(-0.3, lambda: losses.dsm(energy, X, 0.3, -NOISE)),
              *(Right(SIGMAS.view(shape), lambda: each(X, NOISE)) for shape in [(3,), (3, 1)])),
    "sigma of images": (lambda sigma: losses.dsm(energy, IMAGES, sigma, -IMAGES), 0.3, X, SIGMAS[:2], SIGMAS[None],
                        *(Right(SIGMAS.view(shape), lambda: each(IMAGES, -IMAGES))
                          for shape in [(3,), (3, 1), (3, 1, 1), (3, 1, 1, 1)])),
    "sigma of one": (lambda sigma: losses.dsm(energy, X[:1], sigma), 0.3, SIGMAS, SIGMAS[None], SIGMAS[:, None]),
    "pooled sigma": (lambda sigma: losses.dsm(energy, IMAGES, sigma, pooled=True), 0.3, SIGMAS.view(3, 1, 1, 1), X),
    "noise": (lambda noise: losses.dsm(energy, X, 0.3, noise), NOISE, 0.5, NOISE[0], NOISE[:1], NOISE[:, :1],
              Right(NOISE.double(), lambda: losses.dsm(energy, X, 0.3, NOISE))),
    "v": (lambda v: losses.ssm(energy, X, v), SIGNS, 1.0, SIGNS[0], SIGNS[:, :1],
          Right(SIGNS.long(), lambda: losses.ssm(energy, X, SIGNS))),
    "eps": (lambda eps: losses.fdssm(energy, X, 0.3, eps), EPS, 0.3, EPS[0], EPS[:1], EPS[:, :1]),
    "xi": (lambda xi: losses.fdssm(energy, X, xi), 0.3, None, math.nan, 0, -0.3, 1e-8, math.inf, SIGMAS, "0.3"),
    "xi in float64": (lambda xi: losses.fdssm(energy, X.double(), xi), 0.3, 1e-9),
    "x_model": (lambda x_model: losses.sml(energy, X, x_model), X, X[:, :2], X[:, :1], X[0], X[:0], X[:, None], None),
    "x_model of x (B,)": (lambda x_model: losses.sml(energy, X[:, 0], x_model), X[:, 0], X),
    # ---- EBFlow
    **{f"the events of {name}": (lambda shape, use=use: use(torch.zeros(4, *shape)), (4,), (5,), (1,), (), (2, 2),
                                 (4, 1), (1, 4)) for name, use in {
        "energy": fc_flow(4).energy, "log_prob": fc_flow(4).log_prob, "score": fc_flow(4).score, "forward": fc_flow(4),
        "no layers": EBFlow([], (4,)).energy}.items()},
    "a batch": (fc_flow(3).energy, X, X.long(), X.double(), X.tolist(), X[:0], None),
    "bytes": (EBFlow([Logit()], (3,)).energy, X,
              Right(X.byte(), lambda: EBFlow([Logit()], (3,)).energy(1.0 * X.byte()))),
    "u": (fc_flow(3).inverse, X, X[:, :2], X[0], None),
    "a start": (lambda x: toy_flow(3, 1, 4).initialize(x) or 0.0, FIVE, FIVE[:, :2], FIVE[:, :1], FIVE[0]),
    "an actnorm's start": (lambda x: [layer := ActNorm(3), EBFlow([layer], (3,)).initialize(x)][0].bias, FIVE,
                           FIVE[:, :1], FIVE[:1], torch.ones(5, 3), 1 / FIVE.clamp(min=0)),
    "draws": (fc_flow(4).sample, 3, (3,), 3.0, -1, None, 0),
    "layers": (lambda layer: EBFlow([layer], (3,)).energy(X), FullyConnected(3), nn.Linear(3, 3), FLOW, Squeeze, None),
    "a shape": (lambda shape: EBFlow([FullyConnected(3)], shape).energy(X), (3,), 3, None, (4,), (3, 3)),
    "one's own linear layer": (own, lambda x: x, *(lambda x, code=code: eval(code) for code in (
        "x[:, :2]", "(x, x.sum(1))", "x.T", "x[:1]", "x[0]", "x[:, :1]", "x.sum(1)", "None", "x.repeat(2, 1)"))),
    "one's own layer of one number": (lambda forward: own(forward, x=FIVE[:, :1]), lambda x: x, lambda x: x.T,
                                      lambda x: x.expand(5, 3), lambda x: x[:1], lambda x: x[:, 0]),
    "one's own non-linear layer": (
        lambda forward: own(forward, kind=layers.NonlinearLayer), lambda x: (x, x.sum(1)),
        *(lambda x, code=code: eval(code) for code in (
            "(x, x.sum())", "(x, x[:, :1])", "(x, x)", "(x, 0.0)", "x", "(x[:, :2], x.sum(1))", "(x, x.sum(1)[None])",
            "(x, x.sum(0))", "(x.T, x.sum(1))", "(x[:1], x.sum(1))"))),
    "one's own log-determinant": (lambda value: own(log_abs_det=value), torch.zeros(()), torch.zeros(3), torch.zeros(5),
                                  0, 0.0, torch.zeros(5, 1), None, Right(torch.zeros(1), own)),
    # ---- Layers
    **{f"{name} of {shape}": (lambda code, name=name, shape=shape: of_layer(f"{name}({code})", shape), right, *wrong)
       for name, shape, right, *wrong in [
           ("FullyConnected", (3,), "3", "4", "1", "9"), ("FullyConnected", (3, 3), "9", "3"),
           ("Convolution", (3, 3, 3), "3, 3", "1, 3", "2, 3"), ("Convolution", (1, 3, 3), "1, 3", "3, 3"),
           ("Conv1x1", (3, 3, 3), "3", "1", "2"), ("ActNorm", (1,), "1", "3"),
           ("ActNorm", (3, 3, 3), "3", Right("1", lambda: of_layer("ActNorm(3)", (3, 3, 3))), "2", "9"),
           ("Standardize", (3,), "2.0", "X.exp()", "X[:, :1].exp()", "2.0, X", "2.0, X[:, :1]", "torch.ones(2)",
            "2.0, torch.ones(2)", "math.inf", "2.0, math.nan", "2.0, math.inf"),
           ("SmoothLeakyReLU", (3,), "bend=1.0", "bend=math.nan", "bend=math.inf", "math.nan"),
           ("AffineCoupling", (3,), "nn.Linear(2, 2)", "nn.Linear(2, 1)", "nn.Linear(2, 4)", "nn.Linear(1, 2)")]},
    **{f"the events of {code}": (lambda shape, code=code: of_layer(code, shape), right, *wrong)
       for code, right, *wrong in [
           ("AffineCoupling(nn.Linear(1, 2))", (2,), (1,), ()), ("Conv1x1(2)", (2, 2, 2), (2,), (2, 2), ()),
           ("Convolution(2, 3)", (2, 3, 3), (2,), (2, 3), (3, 3)), ("Convolution(1, 3)", (1, 3, 3), (3, 3), (1, 3))]},
    # ---- Sampling
    **{f"the step size of {name}": (lambda a, use=use: use(energy, X, a), 0.1, None, "0.1", -0.1, math.nan, math.inf,
                                    SIGMAS[:2],
                                    *wrong) for (name, use), wrong in zip(SAMPLERS.items(), [
        [torch.tensor(-0.1), Right(0.0, lambda: X), Right(SIGMAS, lambda: steps_of(SIGMAS)),
         Right(SIGMAS[:, None], lambda: steps_of(SIGMAS[:, None]))],
        [SIGMAS, SIGMAS.repeat(3, 1), *(Right(a, lambda a=a: (X, a, NONE)) for a in (0.0, torch.tensor(-0.1)))],
        [SIGMAS, Right(0.0, lambda: (X, 0.0))]])},
    **{f"where of {name}": (lambda where, use=use: use(energy, X, where=where), MASK, MASK.float(), MASK.long(),
                            MASK[:2], MASK.expand(2, 1, 3), 1.0) for name, use in SAMPLERS.items()},
    "steps": (lambda steps: sampling.mala(energy, X, steps, 0.1), 3, 0, 2.5, None),
    "langevin's steps": (lambda steps: sampling.langevin(energy, X, steps, 0.1), 3, 2.5, None, Right(0, lambda: X)),
    "rounds": (lambda rounds: sampling.alternate(energy, FLOW, X, rounds, 1, 0.1), 2, 0, 2.5, None),
    **{f"masks, adjusted {adjusted}": (
        lambda mask, adjusted=adjusted: impute(mask, adjusted), MASK, None, MASK.float(), MASK.long(), MASK[:2],
        FIVE[:, 0] > 0, MASK.expand(2, 1, 3), MASK.tolist(),
        Right(NONE, lambda adjusted=adjusted: (FIVE, 0.1, *[torch.ones(5)] * adjusted)),
        Right(MASK[None], lambda adjusted=adjusted: impute(MASK, adjusted)),
        Right(FIVE[:, :1] > 0, lambda adjusted=adjusted: impute((FIVE[:, :1] > 0).repeat(1, 3), adjusted)))
       for adjusted in (False, True)},
    "imputation's start": (lambda start: impute(MASK, start=start), FIVE, FIVE[0], FIVE[:, :1], 0.0, FIVE[:, :2]),
    "temperatures": (tempering, (1.0, 2.0, 3.0), [1.0, 2.0], [1.0, 2.0, 3.0, 4.0], 2.0, None, [0.0, 1.0, 2.0],
                     [1.0, math.nan, 2.0], SIGMAS[None],
                     Right([2.0, 4.0, 6.0], lambda: tempering(energy=lambda x: energy(x) / 2))),
    "the step sizes of replicas": (lambda a: tempering(step_sizes=a), SIGMAS, SIGMAS[:2], 0.1, [0.1, 0.1, None]),
    "replicas": (lambda x: tempering(x=x), torch.stack([X, X, X]), X, torch.stack([X, X]), X.expand(4, 3, 3)),
    **{f"the flow of {name}": (
        lambda q, use=use: use(energy, q, FIVE), FLOW, flow(log_prob=lambda x: FLOW.log_prob(x)[:, None]),
        flow(log_prob=lambda x: FLOW.log_prob(x).mean()), flow(log_prob=lambda x: 0.0),
        flow(log_prob=torch.distributions.Normal(0.0, 1.0).log_prob),
        *(Right(q, lambda use=use, n=n: use(energy, FLOW, FIVE[:n])) for q, n in (  # some functions do not draw
            (NORMAL, 5), (flow(lambda n: FLOW.sample(n)[:, :1]), 5), (flow(lambda n: FLOW.sample(n)[0]), 5),
            (flow(lambda n: FLOW.sample(n).T), 5)))) for name, use in PROPOSE.items()},
    "one draw": (lambda q: sampling.independence(energy, q, FIVE), FLOW, flow(lambda n: FLOW.sample(1))),
    "half of the draws": (lambda q: sampling.estimate_log_z(lambda x: 2 * energy(x), q, 6), FLOW, Right(
        flow(lambda n: FLOW.sample(n // 2)), lambda: sampling.estimate_log_z(lambda x: 2 * energy(x), FLOW, 3))),
    "a series": (sampling.autocorrelation_time, FIVE, FIVE[:, 0], IMAGES[..., 0], torch.ones(5, 3),
                 Right(X.repeat(20, 1)[:, :, None], lambda: sampling.autocorrelation_time(X.repeat(20, 1)))),
}


@pytest.mark.parametrize("name, i", [(name, i) for name, (_, _, *wrong) in USES.items() for i in range(len(wrong))])
def test_a_wrong_use_raises_or_shows_it_or_is_right(name, i):
    use, right, *wrong = USES[name]
    hold(use, right, wrong[i])
