"""sampling.py against closed forms, in float64. Monte Carlo means must lie within 4.5 standard errors."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal
from torch.utils._python_dispatch import TorchDispatchMode

import sampling
from ebflow import EBFlow, fc_flow
from experiments import described
from layers import FullyConnected
from sampling import (SamplingError, alternate, autocorrelation_time, effective_sample_size, estimate_log_z, impute,
                      independence, langevin, mala, reverse_log_z, tempering, tune)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Proposal:
    """A distribution of torch as a flow."""

    def __init__(self, distribution):
        self.distribution = distribution
        self.log_prob = distribution.log_prob

    def sample(self, n):
        return self.distribution.sample((n,))


def normal_flow(mean, std, dim=2):
    return Proposal(Independent(Normal(torch.full((dim,), float(mean)), std), 1))


class Mixture:
    """Σ_k w_k N(m_k, s² I) with its moments; the energy has a constant added, since an energy may."""

    def __init__(self, weights, means, std=1.0):
        self.weights, self.means = (torch.tensor(t, dtype=torch.float64) for t in (weights, means))
        self.std = std
        self.distribution = MixtureSameFamily(Categorical(self.weights), Independent(Normal(self.means, std), 1))

    def energy(self, x):
        return 3.0 - self.distribution.log_prob(x)

    def sample(self, n):
        return self.distribution.sample((n,))

    def mode(self, x):
        return torch.cdist(x, self.means).argmin(1)

    def mean(self):
        return self.weights @ self.means

    def covariance(self):
        d = self.means - self.mean()
        return self.std**2 * torch.eye(d.shape[1]) + d.T @ (self.weights[:, None] * d)

    def shares(self):
        """P(the nearest mean is k): a draw from another mode crosses the middle with Φ(-d/2s). Exact for two modes."""
        crosses = torch.special.ndtr(-torch.pdist(self.means).min() / (2 * self.std))
        return self.weights * (1 - crosses) + (1 - self.weights) * crosses


NEAR = Mixture([0.3, 0.7], [[-1.5, 0.0], [1.5, 0.0]])  # Langevin crosses
FAR = Mixture([0.1, 0.2, 0.3, 0.4], [[-6.0, -6.0], [-6.0, 6.0], [6.0, -6.0], [6.0, 6.0]])  # 12 std: it does not


def gaussian(covariance, mean=None):
    mean = torch.zeros(len(covariance)) if mean is None else mean
    return lambda x: -MultivariateNormal(mean, covariance).log_prob(x)


def quadratic(s):
    return lambda x: x.square().flatten(1).sum(1) / (2 * s**2)


def assert_mean(values, expected):
    """The mean of independent values (N, …) is the expected one, up to 4.5 standard errors."""
    error = values.to(torch.float64).std(0) / math.sqrt(len(values))
    assert ((values.to(torch.float64).mean(0) - expected).abs() < 4.5 * error + 1e-12).all()


def assert_moments(x, mean, covariance):
    """Mean and covariance of independent draws (N, D)."""
    assert_mean(x, mean)
    d = x - mean
    assert_mean(d[:, :, None] * d[:, None], covariance)


def assert_is_mixture(x, mixture):
    assert_moments(x, mixture.mean(), mixture.covariance())
    assert_mean(torch.nn.functional.one_hot(mixture.mode(x), len(mixture.weights)), mixture.shares())


def same_bits(a, b):
    return torch.equal(a.view(torch.int64), b.view(torch.int64))


# ---------------------------------------------------------------------------------------------------------
# 1. Langevin and MALA
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_unadjusted_langevin_has_the_stationary_variance_of_the_closed_form_and_not_that_of_the_density(share):
    s = 1.5
    a = share * 2 * s**2
    x = langevin(quadratic(s), 3 * torch.randn(100_000, 1), 80, a)
    assert_moments(x, torch.zeros(1), torch.tensor([[s**2 / (1 - share)]]))
    with pytest.raises(AssertionError):
        assert_moments(x, torch.zeros(1), torch.tensor([[s**2]]))


def test_mala_reaches_a_gaussian_and_leaves_it_invariant():
    covariance = torch.tensor([[2.0, 0.9], [0.9, 1.0]])
    energy, mean = gaussian(covariance, torch.tensor([1.0, -2.0])), torch.tensor([1.0, -2.0])
    x, report = mala(energy, torch.full((40_000, 2), 4.0), 60, 0.8)
    assert 0.3 < report.acceptance.mean() < 0.9  # so that the correction has something to do
    assert_moments(x, mean, covariance)
    x, _ = mala(energy, MultivariateNormal(mean, covariance).sample((40_000,)), 3, 0.8)
    assert_moments(x, mean, covariance)


def test_mala_reaches_a_mixture_from_one_mode_and_leaves_it_invariant():
    x, report = mala(NEAR.energy, NEAR.means[0] + torch.randn(10_000, 2), 120, 0.9)
    assert 0.3 < report.acceptance.mean() < 0.9
    assert_is_mixture(x, NEAR)
    assert_is_mixture(mala(NEAR.energy, NEAR.sample(40_000), 3, 0.9)[0], NEAR)


def test_time_averages_of_mala_agree_within_the_error_that_the_autocorrelation_time_gives():
    x, series = NEAR.sample(50), []
    for _ in range(1500):
        x, _ = mala(NEAR.energy, x, 1, 0.9)
        series.append(x)
    series = torch.stack(series)  # (T, B, 2)
    for values, expected in ((series[..., 0], NEAR.mean()[0]), (series[..., 1].square(), 1.0)):
        tau = autocorrelation_time(values)
        assert 1.3 < tau < 1500 / 50  # correlated, and long enough
        assert (values.mean() - expected).abs() < 4.5 * values.std() * (tau / values.numel()).sqrt()


def flux_is_symmetric(x, y, bins):
    """N(i → j) = N(j → i) between the cells of a line, up to 4.5 standard errors."""
    n = len(bins) + 1
    i, j = (torch.bucketize(v.flatten(), bins) for v in (x, y))
    counts = (n * i + j).bincount(minlength=n * n).view(n, n).double()
    assert (counts > 100).sum() > n * n / 2  # there is something to compare
    return bool(((counts - counts.T).abs() <= 4.5 * (counts + counts.T).sqrt()).all())


LINE = Mixture([0.35, 0.65], [[-1.0], [1.5]], std=0.8)
BINS = torch.tensor([-1.5, -0.7, 0.0, 0.8, 1.7])


def test_mala_is_reversible_as_much_goes_from_cell_to_cell_as_comes_back():
    x = LINE.sample(400_000)
    assert flux_is_symmetric(x, mala(LINE.energy, x, 1, 0.5)[0], BINS)
    assert not flux_is_symmetric(x, langevin(LINE.energy, x, 1, 0.5), BINS)  # the test can fail


def test_independence_is_reversible_as_much_goes_from_cell_to_cell_as_comes_back():
    x = LINE.sample(400_000)
    flow = normal_flow(0.5, 2.0, dim=1)
    assert flux_is_symmetric(x, independence(LINE.energy, flow, x)[0], BINS)
    assert not flux_is_symmetric(x, flow.sample(400_000), BINS)


def pairs():
    t = torch.linspace(-3, 3, 41)
    return torch.cartesian_prod(t, t).T[..., None]  # x (N, 1), y (N, 1)


def assert_detailed_balance(x, y, q_forth, q_back, alpha_forth, alpha_back):
    pi = [LINE.distribution.log_prob(v).exp() for v in (x, y)]
    torch.testing.assert_close(pi[0] * q_forth * alpha_forth, pi[1] * q_back * alpha_back, rtol=1e-11, atol=1e-300)
    assert (torch.maximum(alpha_forth, alpha_back) == 1).all()  # of all reversible choices the one that moves most
    assert (torch.minimum(alpha_forth, alpha_back) < 0.9).double().mean() > 0.5


def test_malas_acceptance_probability_has_detailed_balance_with_the_density_of_its_proposals_at_every_pair():
    (x, y), a = pairs(), 0.5
    (E_x, grad_x), (E_y, grad_y) = (sampling._energy_and_grad(LINE.energy, v) for v in (x, y))
    log_xy, log_yx = sampling._log_q(y, x, grad_x, a), sampling._log_q(x, y, grad_y, a)
    q_xy = Normal(x - a * grad_x, math.sqrt(2 * a)).log_prob(y).exp()[:, 0]
    q_yx = Normal(y - a * grad_y, math.sqrt(2 * a)).log_prob(x).exp()[:, 0]
    assert_detailed_balance(x, y, q_xy, q_yx, sampling._accept(E_x, E_y, log_xy, log_yx)[1],
                            sampling._accept(E_y, E_x, log_yx, log_xy)[1])


def test_the_acceptance_probability_of_independence_has_detailed_balance_at_every_pair():
    x, y = pairs()
    E_x, E_y = LINE.energy(x), LINE.energy(y)
    log_q = normal_flow(0.5, 2.0, dim=1).log_prob
    assert_detailed_balance(x, y, log_q(y).exp(), log_q(x).exp(), sampling._accept(E_x, E_y, log_q(y), log_q(x))[1],
                            sampling._accept(E_y, E_x, log_q(x), log_q(y))[1])


@pytest.mark.parametrize("wall", [math.inf, -math.inf, math.nan])
def test_proposals_with_a_non_finite_energy_are_rejected_and_the_density_is_cut_off_there(wall):
    def energy(x):
        return torch.where(x[:, 0] > 0, x[:, 0].square() / 2, wall)

    x, report = mala(energy, torch.ones(20_000, 1), 40, 0.5)
    assert 0.3 < report.acceptance.mean() < 0.9
    assert (x > 0).all()
    assert_mean(x, math.sqrt(2 / math.pi))  # a half-normal
    x, accepted = independence(energy, normal_flow(0.0, 1.0, dim=1), x)
    assert (x > 0).all() and 0.4 < accepted.double().mean() < 0.6
    assert_mean(x, math.sqrt(2 / math.pi))


def test_the_acceptance_that_is_reported_is_the_share_of_steps_in_which_the_chain_moved():
    start = torch.randn(7, 2)
    torch.manual_seed(1)
    _, report = mala(NEAR.energy, start, 40, 1.5)
    torch.manual_seed(1)
    x, moved = start, torch.zeros(7)
    for _ in range(40):
        x_new, _ = mala(NEAR.energy, x, 1, 1.5)
        moved += (x_new != x).any(1)
        x = x_new
    assert torch.equal(report.acceptance, moved / 40)
    assert 0 < moved.min() and moved.max() < 40 and moved.unique().numel() > 1
    assert report.step_size == 1.5
    share = moved / 40
    assert described(report) == (f"step size 1.5, acceptance {share.mean():.3f} "
                                   f"({share.min():.3f} to {share.max():.3f} by chain)")


def test_a_step_evaluates_the_energy_once():
    calls = []

    def energy(x):
        calls.append(len(x))
        return NEAR.energy(x)

    mala(energy, torch.randn(3, 2), 20, 0.1)
    assert calls == [3] * 21  # once more at the start
    calls.clear()
    langevin(energy, torch.randn(3, 2), 20, 0.1)
    assert calls == [3] * 20


class HostReads(TorchDispatchMode):
    """Counts how often a tensor's value becomes a number of Python's, for which a GPU has to be waited for."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", [langevin, mala, tune])
def test_the_host_reads_nothing_within_the_steps(sampler):
    reads = []
    for steps in (10, 30):
        with HostReads() as mode:
            sampler(quadratic(1.0), torch.ones(3, 2), steps, 0.1, where=torch.tensor([True, False]))
        reads.append(mode.count)
    assert reads[0] == reads[1] <= 2


@pytest.mark.parametrize("step_size", [0.001, 50.0])
def test_tune_finds_the_step_size_of_the_target_from_far_below_and_far_above(step_size):
    energy, x = gaussian(torch.diag(torch.tensor([1.0, 4.0, 9.0]))), torch.randn(50, 3)
    x, found = tune(energy, x, 400, step_size)
    _, report = mala(energy, x, 400, found)
    assert abs(report.acceptance.mean() - 0.574) < 0.03
    _, lower = tune(energy, x, 400, step_size, target=0.9)
    assert lower < 0.7 * found


@pytest.mark.parametrize("sampler, a", [("langevin", 0.1), ("mala", 0.3), ("tune", 0.3)])
def test_coordinates_outside_of_where_do_not_move_and_the_others_have_their_conditional(sampler, a):
    x = torch.tensor([1.0, 0.0]).repeat(20_000, 1)
    where = torch.tensor([False, True])
    energy = gaussian(torch.tensor([[2.0, 1.2], [1.2, 1.0]]))
    y = getattr(sampling, sampler)(energy, x, 60, a, where=where)
    y = y if sampler == "langevin" else y[0]
    variance = 1 - 1.2**2 / 2
    if sampler == "langevin":
        variance = variance / (1 - a / (2 * variance))
    assert same_bits(y[:, 0], x[:, 0])
    assert_moments(y[:, 1:], torch.tensor([1.2 / 2]), torch.tensor([[variance]]))


# ---------------------------------------------------------------------------------------------------------
# 2. A flow proposes
# ---------------------------------------------------------------------------------------------------------


def test_independence_is_exact_with_a_wrong_flow():
    x, flow = torch.zeros(40_000, 2), normal_flow(1.0, 2.5)
    for _ in range(60):
        x, accepted = independence(NEAR.energy, flow, x)
    assert 0.1 < accepted.double().mean() < 0.7
    assert_is_mixture(x, NEAR)
    assert_is_mixture(independence(NEAR.energy, flow, NEAR.sample(40_000))[0], NEAR)


def test_a_flow_that_is_the_density_is_always_accepted():
    flow = fc_flow(3)
    _, accepted = independence(flow.energy, flow, torch.randn(1000, 3))
    assert accepted.double().mean() > 0.99  # α = 1 up to rounding


def wide_flow():
    """A linear EBFlow that is N(0, 8² I): over all modes of FAR, and wrong everywhere."""
    return EBFlow([FullyConnected(2, diagonal=1 / 8)], (2,))


@pytest.mark.parametrize("adjusted", [True, False])
def test_alternation_gives_distant_modes_their_weights_from_a_start_in_one_of_them(adjusted):
    start = FAR.means[0] + torch.randn(4000, 2)
    # unadjusted, the step is so small that the bias, 1 % of the variance within a mode, is below the errors
    x, report = alternate(FAR.energy, wide_flow(), start, 100, 3, 0.5 if adjusted else 0.02, adjusted)
    assert_is_mixture(x, FAR)
    assert (report.acceptance is None) != adjusted
    assert 0.02 < report.global_acceptance.mean() < 0.3


def test_langevin_alone_stays_in_the_mode_where_it_starts():
    start = FAR.means[0] + torch.randn(2000, 2)
    x, report = alternate(FAR.energy, None, start, 60, 5, 0.5)
    assert (FAR.mode(x) == 0).all() and report.global_acceptance is None
    assert_moments(x, FAR.means[0], torch.eye(2))  # in it, the chain is right
    with pytest.raises(AssertionError):
        assert_is_mixture(x, FAR)


def test_the_report_of_alternate_counts_local_and_global_moves_by_chain():
    start, flow = torch.randn(6, 2), normal_flow(0.0, 3.0)
    torch.manual_seed(1)
    x_found, report = alternate(NEAR.energy, flow, start, 30, 4, 1.5)
    torch.manual_seed(1)
    x, local, jumps = start, torch.zeros(6), torch.zeros(6)
    for _ in range(30):
        for _ in range(4):
            x_new, _ = mala(NEAR.energy, x, 1, 1.5)
            local, x = local + (x_new != x).any(1), x_new
        x_new, _ = independence(NEAR.energy, flow, x)
        jumps, x = jumps + (x_new != x).any(1), x_new
    assert torch.equal(x_found, x)
    assert torch.equal(report.acceptance, local / 120) and torch.equal(report.global_acceptance, jumps / 30)
    assert local.max() < 120 and 0 < jumps.sum() < 6 * 30
    assert "global acceptance" in described(report)


# ---------------------------------------------------------------------------------------------------------
# 3. Hotter chains
# ---------------------------------------------------------------------------------------------------------

LADDER = torch.tensor([1.0, 3.0, 9.0])


def hot(mixture, T, n):
    """Draws of π_t ∝ exp(-E/T), by rejection: p^(1/T) ≤ Σ_k (w_k N_k)^(1/T), which is a mixture of wider modes."""
    weights = mixture.weights ** (1 / T)
    q = Mixture((weights / weights.sum()).tolist(), mixture.means.tolist(), math.sqrt(T))
    x = q.sample(20 * n)
    each = mixture.weights.log() - torch.cdist(x, mixture.means).square() / 2 - math.log(2 * math.pi)
    keep = torch.rand(len(x)).log() < each.logsumexp(1) / T - (each / T).logsumexp(1)
    assert keep.sum() >= n
    return x[keep][:n]


def test_tempering_gives_distant_modes_their_weights_from_a_start_in_one_of_them():
    distant = Mixture([0.3, 0.7], [[-4.0, 0.0], [4.0, 0.0]])  # at temperature 9 they overlap
    x = (distant.means[0] + torch.randn(2000, 2)).repeat(3, 1, 1)
    for _ in range(100):
        x, report = tempering(distant.energy, x, LADDER, 3, 0.9 * LADDER)
    assert_is_mixture(x[0], distant)
    assert report.acceptance.shape == (3, 2000) and report.global_acceptance.shape == (2, 2000)
    assert (0.2 < report.global_acceptance.mean(1)).all() and (report.global_acceptance.mean(1) < 0.9).all()
    start = distant.means[0] + torch.randn(500, 2)
    assert (distant.mode(mala(distant.energy, start, 360, 0.9)[0]) == 0).double().mean() > 0.9  # alone it stays


def test_tempering_leaves_the_density_of_every_temperature_invariant():
    x = torch.stack([hot(NEAR, T, 20_000) for T in LADDER.tolist()])
    after, _ = tempering(NEAR.energy, x, LADDER, 2, 0.9 * LADDER)
    assert_is_mixture(after[0], NEAR)
    for a, b in zip(after, x):  # the same moments before and after
        assert_mean(torch.cat([a - b, a.square() - b.square()], dim=1), 0.0)


def test_a_swap_is_accepted_with_the_probability_that_balances_the_pair():
    """At steps of almost no length only swaps move: α = min(1, exp((1 - 1/2)(E(x_1) - E(x_2)))) at temperatures 1, 2"""
    energy = lambda x: 2.0 * x[:, 0]
    for low, high in ((0.3, 0.9), (0.9, 0.3)):
        x = torch.stack([torch.full((40_000, 1), low), torch.full((40_000, 1), high)])
        y, report = tempering(energy, x, [1.0, 2.0], 1, [1e-18, 1e-18])
        assert_mean(report.global_acceptance[0], min(1.0, math.exp(0.5 * 2 * (low - high))))
        swapped = report.global_acceptance[0].bool()
        torch.testing.assert_close(y[:, swapped], x.flip(0)[:, swapped], rtol=0, atol=1e-6)
        torch.testing.assert_close(y[:, ~swapped], x[:, ~swapped], rtol=0, atol=1e-6)


def test_a_state_that_was_swapped_takes_its_energy_along():
    """Both swaps lower the energy of the colder chain, so both are certain; by the old energies the second is not."""
    x = torch.tensor([0.9, 0.3, 0.6]).repeat(2000, 1).T[..., None]
    y, report = tempering(lambda x: 2.0 * x[:, 0], x, [1.0, 2.0, 4.0], 1, [1e-18] * 3)
    assert (report.global_acceptance == 1).all()
    torch.testing.assert_close(y, x[[1, 2, 0]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperatures, message", [
    ([1.0, 3.0, 2.0], r"temperatures must rise from 1, not be \[1.0, 3.0, 2.0\]"), ([2.0, 3.0, 4.0], "rise from 1"),
    ([1.0, 1.0, 2.0], "rise from 1"), ([1.0, 2.0], "3 replicas need a temperature and a step size each, not 2 and 3")])
def test_a_ladder_that_does_not_rise_from_one_is_an_error(temperatures, message):
    with pytest.raises(SamplingError, match=message):
        tempering(quadratic(1.0), torch.zeros(3, 5, 2), temperatures, 2, [0.1] * 3)


# ---------------------------------------------------------------------------------------------------------
# 4. Imputation
# ---------------------------------------------------------------------------------------------------------


def linear_flow(D):
    """An EBFlow of two linear layers, the Gaussian N(mean, precision⁻¹).   -> flow, mean (D,), precision (D, D)"""
    flow = EBFlow([FullyConnected(D), FullyConnected(D, bias=0.5)], (D,))
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
        b = flow(torch.zeros(1, D))[0]
        W = (flow(torch.eye(D)) - b).T
    return flow, -torch.linalg.solve(W, b), W.T @ W


@pytest.mark.parametrize("adjusted", [True, False])
def test_imputation_on_a_linear_flow_draws_from_the_conditional_gaussian(adjusted):
    flow, mean, precision = linear_flow(5)
    mask = torch.tensor([False, True, True, False, True])
    observed = mean + torch.randn(5)
    x = torch.where(mask, math.nan, observed).repeat(20_000, 1)  # what is missing is not looked at
    P = precision[mask][:, mask]
    a = 0.8 / torch.linalg.eigvalsh(P)[-1].item()
    steps = int(8 * 0.8 / (a * torch.linalg.eigvalsh(P)[0].item())) + 20
    y, report = impute(flow.energy, x, mask, steps, a, adjusted)
    # μ_m - P⁻¹ P_mo (x_o - μ_o); Langevin's covariance is (P - aP²/2)⁻¹, which is P⁻¹ for a → 0
    center = mean[mask] - torch.linalg.solve(P, precision[mask][:, ~mask] @ (observed - mean)[~mask])
    assert_moments(y[:, mask], center, torch.linalg.inv(P if adjusted else P - a / 2 * P @ P))
    assert same_bits(y[:, ~mask], x[:, ~mask])
    assert (report.acceptance is not None) == adjusted and report.step_size == a


def test_imputation_draws_from_a_conditional_with_two_modes():
    mixture = Mixture([0.3, 0.7], [[-0.8, -1.5], [0.8, 1.5]])
    mask = torch.tensor([False, True])
    x = torch.tensor([-0.4, 0.0]).repeat(10_000, 1)
    y, _ = impute(mixture.energy, x, mask, 120, 0.9, adjusted=True)
    weights = mixture.weights * Normal(mixture.means[:, 0], 1.0).log_prob(torch.tensor(-0.4)).exp()
    assert_is_mixture(y[:, 1:], Mixture((weights / weights.sum()).tolist(), mixture.means[:, 1:].tolist()))
    assert 0.4 < weights[0] / weights.sum() < 0.6  # both modes count, and not as they do without the observation


@pytest.mark.parametrize("adjusted", [True, False])
def test_with_a_mask_for_each_sample_the_observed_is_bit_identical_and_the_missing_moves(adjusted):
    flow = fc_flow(12)
    energy = lambda x: flow.energy(x.flatten(1))
    x = torch.randn(30, 3, 2, 2)
    x[0, 0] = -0.0  # x + 0 would make it +0
    mask = torch.rand(x.shape) < 0.5
    mask[:, 0, 0, 0], mask[:, 0, 0, 1] = False, True
    y, _ = impute(energy, x, mask, 20, 0.05, adjusted)
    assert same_bits(y[~mask], x[~mask]) and (y[mask] != x[mask]).all()
    assert all(p.grad is None for p in flow.parameters()) and not y.requires_grad


def test_imputation_starts_at_noise_or_where_it_is_told_to():
    x, mask = torch.zeros(4000, 2), torch.tensor([True, False])
    y, _ = impute(quadratic(1.0), x, mask, 1, 1e-20)
    assert_moments(y[:, :1], torch.zeros(1), torch.eye(1))
    torch.testing.assert_close(impute(quadratic(1.0), x, mask, 1, 1e-20, start=x)[0], x)


# ---------------------------------------------------------------------------------------------------------
# 5. What the draws are worth
# ---------------------------------------------------------------------------------------------------------


def test_log_z_is_a_known_normaliser_with_an_honest_standard_error():
    D, s = 4, 0.7
    energy, exact = quadratic(s), D / 2 * math.log(2 * math.pi * s**2)
    estimates = [estimate_log_z(energy, normal_flow(0.2, 1.0, dim=D), 2000) for _ in range(200)]
    z = torch.stack([(e.log_z - exact) / e.standard_error for e in estimates])
    assert_mean(z, 0.0)
    assert abs(z.std() - 1) < 0.25  # of 200 standard normal numbers: 1 ± 0.05
    assert all(e.enough for e in estimates)


def test_log_z_of_a_flow_from_its_own_samples_is_exact():
    flow, _, _ = linear_flow(3)
    estimate = estimate_log_z(flow.energy, flow, 500)
    torch.testing.assert_close(estimate.log_z, flow.log_z().detach())
    assert estimate.standard_error < 1e-6 and abs(estimate.effective_sample_size - 500) < 1e-6


def test_log_z_is_flagged_where_few_draws_carry_the_weight():
    estimate = estimate_log_z(quadratic(0.1), normal_flow(0.0, 3.0, dim=4), 2000)
    assert estimate.effective_sample_size < 100 and not estimate.enough
    assert not estimate_log_z(lambda x: quadratic(1.0)(x) * math.nan, normal_flow(0.0, 1.0), 2000).enough


def test_where_the_flow_misses_a_mode_only_the_estimate_from_the_chains_has_its_mass():
    """q lies on one of two modes, with 84 % of the mass: log 0.84 = -0.17 is missing. ESS and error do not show it."""
    p = Mixture([0.84, 0.16], [[-6.0, 0.0], [6.0, 0.0]])
    flow = Proposal(Independent(Normal(torch.tensor([-6.0, 0.0]), 1.1), 1))
    estimate = estimate_log_z(p.energy, flow, 20_000)  # E is 3 - log p
    assert estimate.enough and abs(estimate.log_z - (math.log(0.84) - 3)) < 4.5 * estimate.standard_error < 0.02
    assert abs(reverse_log_z(p.energy, flow, p.sample(200_000)) + 3) < 0.02


@pytest.mark.parametrize("use", [
    lambda flow, x: independence(quadratic(1.0), flow, x), lambda flow, x: estimate_log_z(quadratic(1.0), flow, 5),
    lambda flow, x: reverse_log_z(quadratic(1.0), flow, x)])
def test_a_proposal_whose_log_prob_is_not_one_number_for_each_draw_is_an_error(use):
    flow = normal_flow(0.0, 1.0)
    flow.log_prob = lambda x: x.sum(1, keepdim=True)
    with pytest.raises(SamplingError, match=r"the log_prob must be one number for each sample, of shape \(5,\)"):
        use(flow, torch.randn(5, 2))


def test_a_draw_that_overflows_has_no_weight_and_is_never_accepted():
    flow = normal_flow(0.0, 1.5)
    sample = flow.sample
    flow.sample = lambda n: torch.cat([sample(n - 1), torch.full((1, 2), math.inf)])
    flow.log_prob = lambda x: torch.where(x.isfinite().all(1), normal_flow(0.0, 1.5).log_prob(x.nan_to_num()), math.nan)
    estimate = estimate_log_z(quadratic(1.0), flow, 5000)
    assert abs(estimate.log_z - math.log(2 * math.pi)) < 5 * estimate.standard_error < 0.1
    assert not independence(quadratic(1.0), flow, torch.randn(5, 2))[1][-1]


def test_the_effective_sample_size_is_the_square_of_the_sum_over_the_sum_of_the_squares():
    w = torch.rand(50)
    torch.testing.assert_close(effective_sample_size(w.log() - 1000), w.sum() ** 2 / w.square().sum())
    torch.testing.assert_close(effective_sample_size(torch.zeros(50)), torch.tensor(50.0))
    torch.testing.assert_close(effective_sample_size(torch.tensor([0.0, -math.inf, -math.inf])), torch.tensor(1.0))


@pytest.mark.parametrize("rho, B", [(0.0, 1), (0.5, 20), (0.9, 20), (-0.5, 20), (0.9, 1)])
def test_the_autocorrelation_time_of_an_autoregression_is_the_closed_form(rho, B):
    T = 4000 if B > 1 else 40_000
    noise = math.sqrt(1 - rho**2) * torch.randn(T, B)
    series = [torch.randn(B)]
    for t in range(1, T):
        series.append(rho * series[-1] + noise[t])
    assert abs(autocorrelation_time(torch.stack(series)) / ((1 + rho) / (1 - rho)) - 1) < 0.15


def test_the_autocorrelation_time_is_the_windowed_sum_of_the_definition():
    x = torch.randn(64, 3).unfold(0, 5, 1).mean(-1)  # a moving average: τ is about 5
    d, T = x - x.mean(), len(x)
    covariance = torch.stack([(d[:T - t] * d[t:]).sum() for t in range(T)])
    tau = 1.0
    for t in range(1, T):
        tau += 2 * covariance[t] / covariance[0]
        if t >= 2 * max(tau, 1):
            break
    assert t < T - 1
    torch.testing.assert_close(autocorrelation_time(x, window=2), tau)


def test_chains_that_never_leave_their_modes_have_an_autocorrelation_time_of_the_order_of_their_length():
    series = torch.randn(1000, 20) + 10 * (torch.arange(20) % 2)
    assert autocorrelation_time(series) > 500
    assert autocorrelation_time(series - series.mean(0)) < 2  # each chain by itself looks fine


# ---------------------------------------------------------------------------------------------------------
# 6. Errors, devices, dtypes
# ---------------------------------------------------------------------------------------------------------


def wall(x):
    return torch.where(x[:, 0] > 0, x.square().sum(1), math.nan)


@pytest.mark.parametrize("sample", [
    lambda x: langevin(wall, x, 5, 0.1),
    lambda x: mala(wall, x, 5, 0.1),
    lambda x: tune(wall, x, 5, 0.1),
    lambda x: independence(wall, normal_flow(0.0, 1.0), x),
    lambda x: alternate(wall, None, x, 1, 5, 0.1),
    lambda x: tempering(wall, x[None], [1.0], 5, [0.1]),
    lambda x: impute(wall, x, torch.tensor([False, True]), 5, 0.1),
])
def test_a_start_at_a_non_finite_energy_is_an_error(sample):
    x = torch.ones(5, 2)
    sample(x)
    x[3:] = -1
    with pytest.raises(SamplingError, match="not finite where 2 of 5 chains start: start them elsewhere"):
        sample(x)


def test_a_langevin_chain_that_diverges_is_an_error_with_the_step_size_in_it():
    x = torch.tensor([[0.1], [50.0], [-50.0]])
    message = r"2 of 3 chains became non-finite in 15 Langevin steps of size 0.01: lower step_size"
    with pytest.raises(SamplingError, match=message):
        langevin(lambda x: x.pow(4).sum(1), x, 15, 0.01)
    with pytest.raises(SamplingError, match=message):  # before a global step could cover it up
        alternate(lambda x: x.pow(4).sum(1), normal_flow(0.0, 1.0, dim=1), x, 1, 15, 0.01, adjusted=False)


@pytest.mark.parametrize("step_size", [0.0, -0.1, math.nan, torch.tensor(-0.1), torch.tensor([[0.1], [-0.1]])])
@pytest.mark.parametrize("sampler", [langevin, mala, tune])
def test_a_step_size_that_is_not_positive_is_an_error(sampler, step_size):
    with pytest.raises(SamplingError, match="step_size must be positive"):
        sampler(quadratic(1.0), torch.ones(2, 1), 3, step_size)
    with pytest.raises(SamplingError, match="steps must be at least 1, not 0"):
        sampler(quadratic(1.0), torch.ones(2, 1), 0, 0.1)


def test_chains_that_reject_everything_are_an_error_but_not_for_a_few_steps():
    stiff, x = quadratic(1e-3), torch.full((4, 3), 1e-4)
    assert (alternate(stiff, None, x, 10, 1, 10.0)[1].acceptance == 0).all()  # it reports, whatever the number of steps
    for sample in (lambda n: mala(stiff, x, n, 10.0),
                   lambda n: impute(stiff, x, torch.tensor([True, False, False]), n, 10.0, adjusted=True)):
        with pytest.raises(SamplingError, match="all 10 proposals of all 4 chains were rejected at step size 10: "):
            sample(10)
        if sample(5)[1].acceptance.any():
            pytest.fail("the energy is not stiff enough for this test")


@pytest.mark.parametrize("mask, message", [
    (torch.ones(3, 4), "must be boolean, True where x is missing, not torch.float32"),
    (torch.ones(3, dtype=torch.bool), r"shape of x, \(3, 4\), or of one event, \(4,\), not \(3,\)"),
    (torch.ones(1, 4, dtype=torch.bool), r"not \(1, 4\)"),
    (torch.zeros(4, dtype=torch.bool), "nothing is missing in 3 of 3 samples, the first of them 0"),
    (torch.ones(4, dtype=torch.bool), "everything is missing in 3 of 3 samples, the first of them 0"),
    (torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).bool(), "nothing is missing in 1 of 3 .* them 1:"),
    (torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool(), "everything is missing in 1 of 3 .* them 2:"),
])
def test_a_mask_that_imputation_cannot_use_is_an_error_of_one_line(mask, message):
    with pytest.raises(SamplingError, match=message) as error:
        impute(quadratic(1.0), torch.randn(3, 4), mask, 5, 0.1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sample", [
    lambda energy, x: langevin(energy, x, 2, 0.1),
    lambda energy, x: mala(energy, x, 2, 0.1),
    lambda energy, x: independence(energy, normal_flow(0.0, 1.0), x),
    lambda energy, x: estimate_log_z(energy, normal_flow(0.0, 1.0), 5),
])
def test_an_energy_with_a_trailing_dimension_is_an_error_not_a_broadcast(sample):
    with pytest.raises(SamplingError, match=r"one number for each sample, of shape \(5,\), not \(5, 1\)"):
        sample(lambda x: x.square().sum(1, keepdim=True), torch.randn(5, 2))


def test_everything_runs_on_the_meta_device():
    flow = fc_flow(4).to("meta")
    x, mask = torch.randn(5, 4, device="meta"), torch.tensor([True, False, True, False], device="meta")
    results = [langevin(flow.energy, x, 12, 0.1), langevin(flow.energy, x, 12, 0.1, mask),
               *mala(flow.energy, x, 12, 0.1)[1][1:2], *tune(flow.energy, x, 12, 0.1),
               *independence(flow.energy, flow, x), alternate(flow.energy, flow, x, 3, 4, 0.1)[0],
               alternate(flow.energy, flow, x, 3, 4, 0.1, adjusted=False)[0], impute(flow.energy, x, mask, 3, 0.1)[0],
               tempering(flow.energy, x[None], torch.ones(1, device="meta"), 4, [0.1])[0],
               impute(flow.energy, x, mask.expand(5, 4), 3, 0.1, adjusted=True)[0],
               *estimate_log_z(flow.energy, flow, 5), autocorrelation_time(torch.randn(9, 3, device="meta"))]
    assert {result.device.type for result in results} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_have_the_dtype_of_the_start_whatever_the_default_is_and_no_graph(dtype):
    flow = fc_flow(4).to(dtype)
    x, mask = torch.randn(5, 4, dtype=dtype), torch.tensor([True, False, True, False])
    with torch.no_grad():  # ∇E is needed there, too
        x_tuned, step_size = tune(flow.energy, x, 12, 0.1)
        results = [langevin(flow.energy, x, 12, 0.1), mala(flow.energy, x, 12, step_size)[0], x_tuned,
                   independence(flow.energy, flow, x)[0], alternate(flow.energy, flow, x, 3, 4, step_size)[0],
                   impute(flow.energy, x, mask, 3, 0.1, start=x.double())[0],
                   tempering(flow.energy, x[None], [1.0], 4, [step_size])[0]]
    assert {result.dtype for result in results} == {dtype}
    assert not any(result.requires_grad for result in results)
    assert all(p.grad is None for p in flow.parameters())
