"""sampling.py against closed forms, in float64. Monte Carlo means must lie within 4.5 standard errors."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

import densities
import sampling
from ebflow import EBFlow, fc_flow
from layers import FullyConnected
from sampling import (alternate, autocorrelation_time, effective_sample_size, estimate_log_z, impute, independence,
                      langevin, mala, reverse_log_z, tempering, tune)

pytestmark = pytest.mark.usefixtures("float64")


class Mixture(densities.Mixture):
    """Σ_k w_k N(m_k, s² I) with its moments; the energy has a constant added, since an energy may."""

    def energy(self, x):
        return 3.0 - self.log_prob(x)

    def mean(self):
        return self.weights @ self.means

    def covariance(self):
        d = self.means - self.mean()
        return self.std[0]**2 * torch.eye(d.shape[1]) + d.T @ (self.weights[:, None] * d)


NEAR = Mixture([0.3, 0.7], [[-1.5, 0.0], [1.5, 0.0]])  # Langevin crosses
FAR = Mixture([0.1, 0.2, 0.3, 0.4], [[-6.0, -6.0], [-6.0, 6.0], [6.0, -6.0], [6.0, 6.0]])  # 12 std: it does not
COVARIANCE = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
GAUSSIAN = MultivariateNormal(torch.tensor([1.0, -2.0], dtype=torch.float64), COVARIANCE)


def normal_flow(mean, std, dim=2):
    normal = Independent(Normal(torch.full((dim,), float(mean)), std, validate_args=False), 1, validate_args=False)
    return SimpleNamespace(sample=lambda n: normal.sample((n,)), log_prob=normal.log_prob)


def quadratic(s):
    return lambda x: x.square().flatten(1).sum(1) / (2 * s**2)


def assert_mean(values, expected):
    """The mean of independent values (N, …) is the expected one, up to 4.5 standard errors."""
    error = values.double().std(0) / math.sqrt(len(values))
    assert ((values.double().mean(0) - expected).abs() < 4.5 * error + 1e-12).all()


def assert_moments(x, mean, covariance):
    """Mean and covariance of independent draws (N, D)."""
    assert_mean(x, mean)
    d = x - mean
    assert_mean(d[:, :, None] * d[:, None], covariance)


def same_bits(a, b):
    return torch.equal(a.view(torch.int64), b.view(torch.int64))


# ---- Langevin and MALA -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("share", [0.1, 0.5])
def test_unadjusted_langevin_has_the_stationary_variance_of_the_closed_form_and_not_that_of_the_density(share):
    s = 1.5
    x = langevin(quadratic(s), 3 * torch.randn(100_000, 1), 80, share * 2 * s**2)
    assert_moments(x, torch.zeros(1), torch.tensor([[s**2 / (1 - share)]]))
    with pytest.raises(AssertionError):
        assert_moments(x, torch.zeros(1), torch.tensor([[s**2]]))


def test_mala_reaches_a_gaussian_and_leaves_it_invariant():
    energy = lambda x: -GAUSSIAN.log_prob(x)  # noqa: E731
    x, report = mala(energy, torch.full((20_000, 2), 4.0), 60, 0.8)
    assert 0.3 < report.acceptance.mean() < 0.9  # so that the correction has something to do
    for x in (x, mala(energy, GAUSSIAN.sample((40_000,)), 3, 0.8)[0]):
        assert_moments(x, GAUSSIAN.mean, COVARIANCE)


LINE = Mixture([0.35, 0.65], [[-1.0], [1.5]], std=0.8)
T = torch.linspace(-3, 3, 41, dtype=torch.float64)
PAIRS = torch.cartesian_prod(T, T).T[..., None]  # x (N, 1), y (N, 1)


def assert_detailed_balance(q_forth, q_back, log_forth, log_back):
    """π(x) q(y|x) α(x → y) = π(y) q(x|y) α(y → x) for all PAIRS, with the largest α for which it holds."""
    (E_x, E_y), (p_x, p_y) = map(LINE.energy, PAIRS), (LINE.log_prob(x).exp() for x in PAIRS)
    forth, back = sampling._accept(E_x, E_y, log_forth, log_back)[1], sampling._accept(E_y, E_x, log_back, log_forth)[1]
    torch.testing.assert_close(p_x * q_forth * forth, p_y * q_back * back, rtol=1e-11, atol=1e-300)
    assert (torch.maximum(forth, back) == 1).all() and (torch.minimum(forth, back) < 0.9).double().mean() > 0.5


def test_malas_acceptance_probability_has_detailed_balance_with_the_density_of_its_proposals_at_every_pair():
    (x, y), a = PAIRS, 0.5
    (_, grad_x), (_, grad_y) = (sampling._energy_and_grad(LINE.energy, v) for v in PAIRS)
    q_forth = Normal(x - a * grad_x, math.sqrt(2 * a)).log_prob(y).exp()[:, 0]
    q_back = Normal(y - a * grad_y, math.sqrt(2 * a)).log_prob(x).exp()[:, 0]
    assert_detailed_balance(q_forth, q_back, sampling._log_q(y, x, grad_x, a), sampling._log_q(x, y, grad_y, a))


def test_the_acceptance_probability_of_independence_has_detailed_balance_at_every_pair():
    log_back, log_forth = map(normal_flow(0.5, 2.0, dim=1).log_prob, PAIRS)
    assert_detailed_balance(log_forth.exp(), log_back.exp(), log_forth, log_back)


@pytest.mark.parametrize("wall", [math.inf, -math.inf, math.nan])
def test_proposals_with_a_non_finite_energy_are_rejected_and_the_density_is_cut_off_there(wall):
    def energy(x):
        return torch.where(x[:, 0] > 0, x[:, 0].square() / 2, wall)

    x, report = mala(energy, torch.ones(10_000, 1), 40, 0.5)
    assert 0.3 < report.acceptance.mean() < 0.9 and (x > 0).all()
    assert_mean(x, math.sqrt(2 / math.pi))  # a half-normal
    x, accepted = independence(energy, normal_flow(0.0, 1.0, dim=1), x)
    assert 0.4 < accepted.double().mean() < 0.6 and (x > 0).all()
    assert_mean(x, math.sqrt(2 / math.pi))


@pytest.mark.parametrize("wall", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("sample", [
    lambda energy, x: langevin(energy, x, 5, 0.01), lambda energy, x: mala(energy, x, 5, 0.01)[0],
    lambda energy, x: tune(energy, x, 5, 0.01)[0], lambda energy, x: independence(energy, normal_flow(9.0, 1.0), x)[0],
    lambda energy, x: alternate(energy, normal_flow(9.0, 1.0), x, 2, 2, 0.01)[0],
    lambda energy, x: alternate(energy, normal_flow(9.0, 1.0), x, 2, 2, 0.01, adjusted=False)[0],
    lambda energy, x: tempering(energy, x[None], [1.0], 5, [0.01])[0][0],
    lambda energy, x: impute(energy, x, torch.tensor([False, True]), 5, 0.01)[0],
    lambda energy, x: impute(energy, x, torch.tensor([False, True]), 5, 0.01, adjusted=True)[0]])
def test_a_chain_that_starts_at_a_non_finite_energy_becomes_nan_and_no_other(sample, wall):
    """Even where its gradient is finite there, as 0 is behind a wall."""
    x = torch.full((6, 2), 2.0)
    x[3:] = -2
    x = sample(lambda x: torch.where(x[:, 0] > 0, x.square().sum(1), wall), x)
    assert x[:3].isfinite().all() and x[3:].isnan().any(1).all()


def test_a_langevin_chain_that_diverges_becomes_nan_and_a_global_step_does_not_cover_it_up():
    x, quartic = torch.tensor([[0.1], [50.0], [-50.0]]), lambda x: x.pow(4).sum(1)
    assert langevin(quartic, x, 15, 0.01).isfinite().tolist() == [[True], [False], [False]]
    x, _ = alternate(quartic, normal_flow(0.0, 1.0, dim=1), x, 5, 15, 0.01, adjusted=False)
    assert x.isnan().tolist() == [[False], [True], [True]]


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


@pytest.mark.parametrize("step_size", [0.001, 50.0])
def test_tune_finds_the_step_size_of_the_target_from_far_below_and_far_above(step_size):
    energy, x = lambda x: (x / torch.tensor([1.0, 2.0, 3.0])).square().sum(1) / 2, torch.randn(50, 3)
    x, found = tune(energy, x, 400, step_size)
    assert abs(mala(energy, x, 400, found)[1].acceptance.mean() - 0.574) < 0.03
    assert tune(energy, x, 400, step_size, target=0.9)[1] < 0.7 * found


@pytest.mark.parametrize("sampler, a", [(langevin, 0.1), (mala, 0.3), (tune, 0.3)])
def test_coordinates_outside_of_where_do_not_move_and_the_others_have_their_conditional(sampler, a):
    x, variance = torch.tensor([1.0, 0.0]).repeat(20_000, 1), 1 - 0.9**2 / 2
    y = sampler(lambda x: -MultivariateNormal(torch.zeros(2), COVARIANCE).log_prob(x), x, 60, a,
                where=torch.tensor([False, True]))
    if sampler == langevin:
        variance = variance / (1 - a / (2 * variance))
    y = y if sampler == langevin else y[0]
    assert same_bits(y[:, 0], x[:, 0])
    assert_moments(y[:, 1:], torch.tensor([0.9 / 2]), torch.tensor([[variance]]))


# ---- A flow proposes -------------------------------------------------------------------------------------------------

def test_independence_is_exact_with_a_wrong_flow():
    x, flow = torch.zeros(20_000, 2), normal_flow(1.0, 2.5)
    for _ in range(60):
        x, accepted = independence(NEAR.energy, flow, x)
    assert 0.1 < accepted.double().mean() < 0.7
    for x in (x, independence(NEAR.energy, flow, NEAR.sample(40_000))[0]):
        assert_moments(x, NEAR.mean(), NEAR.covariance())


@pytest.mark.parametrize("adjusted", [True, False])
def test_alternation_gives_distant_modes_their_weights_from_a_start_in_one_of_them(adjusted):
    start, wide = FAR.means[0] + torch.randn(2000, 2), EBFlow([FullyConnected(2, diagonal=1 / 8)], (2,))  # N(0, 8² I)
    # unadjusted, the step is so small that the bias, 1 % of the variance within a mode, is below the errors
    x, report = alternate(FAR.energy, wide, start, 100, 3, 0.5 if adjusted else 0.02, adjusted)
    assert_moments(x, FAR.mean(), FAR.covariance())
    assert (report.acceptance is None) != adjusted and 0.02 < report.global_acceptance.mean() < 0.3


def test_langevin_alone_stays_in_the_mode_where_it_starts():
    x, report = alternate(FAR.energy, None, FAR.means[0] + torch.randn(1000, 2), 60, 5, 0.5)
    assert (FAR.mode(x) == 0).all() and report.global_acceptance is None
    assert_moments(x, FAR.means[0], torch.eye(2))  # in it, the chain is right
    with pytest.raises(AssertionError):
        assert_moments(x, FAR.mean(), FAR.covariance())


def test_reports_count_local_and_global_moves_by_chain():
    start, flow = torch.randn(6, 2), normal_flow(0.0, 3.0)
    torch.manual_seed(1)
    found, report = alternate(NEAR.energy, flow, start, 30, 4, 1.5)
    torch.manual_seed(1)
    x, moves = start, []
    for _ in range(30):
        for step in [lambda x: mala(NEAR.energy, x, 1, 1.5)] * 4 + [lambda x: independence(NEAR.energy, flow, x)]:
            before, (x, _) = x, step(x)
            moves.append((x != before).any(1))
    local, jumps = torch.stack(moves).view(30, 5, 6).double().sum(0).split([4, 1])
    assert torch.equal(found, x) and torch.equal(report.acceptance, local.sum(0) / 120)
    assert torch.equal(report.global_acceptance, jumps[0] / 30) and report.step_size == 1.5
    assert 0 < local.sum(0).max() < 120 and 0 < jumps.sum() < 6 * 30


# ---- Hotter chains ---------------------------------------------------------------------------------------------------

LADDER = torch.tensor([1.0, 3.0, 9.0])


def hot(mixture, T, n):
    """Draws of π_t ∝ exp(-E/T), by rejection: p^(1/T) ≤ Σ_k (w_k N_k)^(1/T), which is a mixture of wider modes."""
    weights = mixture.weights ** (1 / T)
    x = Mixture(weights / weights.sum(), mixture.means, math.sqrt(T)).sample(20 * n)
    each = mixture.weights.log() - torch.cdist(x, mixture.means).square() / 2 - math.log(2 * math.pi)
    keep = torch.rand(len(x)).log() < each.logsumexp(1) / T - (each / T).logsumexp(1)
    assert keep.sum() >= n
    return x[keep][:n]


def test_tempering_leaves_the_density_of_every_temperature_invariant():
    x = torch.stack([hot(NEAR, T, 20_000) for T in LADDER.tolist()])
    after, report = tempering(NEAR.energy, x, LADDER, 2, 0.9 * LADDER)
    assert report.acceptance.shape == (3, 20_000) and (abs(report.acceptance.mean(1) - 0.6) < 0.3).all()
    assert_moments(after[0], NEAR.mean(), NEAR.covariance())
    for a, b in zip(after, x):  # the same moments before and after
        assert_mean(torch.cat([a - b, a.square() - b.square()], dim=1), 0.0)


def test_a_swap_is_accepted_with_the_probability_that_balances_the_pair():
    """At steps of almost no length only swaps move: α = min(1, exp((1 - 1/2)(E(x_1) - E(x_2)))) at temperatures 1, 2"""
    for low, high in ((0.3, 0.9), (0.9, 0.3)):
        x = torch.stack([torch.full((40_000, 1), low), torch.full((40_000, 1), high)])
        y, report = tempering(lambda x: 2.0 * x[:, 0], x, [1.0, 2.0], 1, [1e-18, 1e-18])
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


# ---- Imputation ------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("adjusted", [True, False])
def test_with_a_mask_for_each_sample_the_observed_is_bit_identical_and_the_missing_moves(adjusted):
    flow, x = fc_flow(12), torch.randn(30, 3, 2, 2)
    x[0, 0] = -0.0  # x + 0 would make it +0
    mask = torch.rand(x.shape) < 0.5
    mask[:, 0, 0, 0], mask[:, 0, 0, 1] = False, True
    y, _ = impute(lambda x: flow.energy(x.flatten(1)), x, mask, 20, 0.05, adjusted)
    assert same_bits(y[~mask], x[~mask]) and (y[mask] != x[mask]).all()


def test_imputation_starts_at_noise_or_where_it_is_told_to():
    x, mask = torch.zeros(4000, 2), torch.tensor([True, False])
    y, _ = impute(quadratic(1.0), x, mask, 1, 1e-20)
    assert_moments(y[:, :1], torch.zeros(1), torch.eye(1))
    torch.testing.assert_close(impute(quadratic(1.0), x, mask, 1, 1e-20, start=x)[0], x)


# ---- What the draws are worth ----------------------------------------------------------------------------------------

def test_log_z_is_a_known_normaliser_with_an_honest_standard_error():
    D, s = 4, 0.7
    energy, exact = quadratic(s), D / 2 * math.log(2 * math.pi * s**2)
    estimates = [estimate_log_z(energy, normal_flow(0.2, 1.0, dim=D), 2000) for _ in range(200)]
    z = torch.stack([(e.log_z - exact) / e.standard_error for e in estimates])
    assert_mean(z, 0.0)
    assert abs(z.std() - 1) < 0.25  # of 200 standard normal numbers: 1 ± 0.05
    assert all(e.enough for e in estimates)
    estimate = estimate_log_z(quadratic(0.1), normal_flow(0.0, 3.0, dim=4), 2000)
    assert estimate.effective_sample_size < 100 and not estimate.enough
    assert not estimate_log_z(lambda x: quadratic(1.0)(x) * math.nan, normal_flow(0.0, 1.0), 2000).enough


def test_log_z_of_a_flow_from_its_own_samples_is_exact():
    flow, _, _ = linear_flow(3)
    estimate = estimate_log_z(flow.energy, flow, 500)
    torch.testing.assert_close(estimate.log_z, flow.log_z().detach())
    assert estimate.standard_error < 1e-6 and abs(estimate.effective_sample_size - 500) < 1e-6


def test_where_the_flow_misses_a_mode_only_the_estimate_from_the_chains_has_its_mass():
    """q lies on one of two modes, with 84 % of the mass: log 0.84 = -0.17 is missing. ESS and error do not show it."""
    p, q = Mixture([0.84, 0.16], [[-6.0, 0.0], [6.0, 0.0]]), Mixture([1.0], [[-6.0, 0.0]], 1.1)
    estimate = estimate_log_z(p.energy, q, 20_000)  # E is 3 - log p
    assert estimate.enough and abs(estimate.log_z - (math.log(0.84) - 3)) < 4.5 * estimate.standard_error < 0.02
    assert abs(reverse_log_z(p.energy, q, p.sample(200_000)) + 3) < 0.02


def test_a_draw_that_overflows_has_no_weight_and_is_never_accepted():
    normal = normal_flow(0.0, 1.5)
    flow = SimpleNamespace(
        sample=lambda n: torch.cat([normal.sample(n - 1), torch.full((1, 2), math.inf)]),
        log_prob=lambda x: torch.where(x.isfinite().all(1), normal.log_prob(x.nan_to_num()), math.nan))
    estimate = estimate_log_z(quadratic(1.0), flow, 5000)
    assert abs(estimate.log_z - math.log(2 * math.pi)) < 5 * estimate.standard_error < 0.1
    assert not independence(quadratic(1.0), flow, torch.randn(5, 2))[1][-1]


def test_a_draw_so_far_away_that_rounding_leaves_no_digit_has_no_weight_and_is_never_accepted():
    """A flow with small scales makes them: E = 2·10²³, and by rounding log q = -5·10²³ where it is about -80."""
    normal = normal_flow(0.0, 1.5)
    flow = SimpleNamespace(
        sample=lambda n: torch.cat([normal.sample(n - 1), torch.full((1, 2), 4.5e11)]),
        log_prob=lambda x: torch.where(x[:, 0] < 1e9, normal.log_prob(x.clamp(max=1e9)), -5e23))
    estimate = estimate_log_z(quadratic(1.0), flow, 5000)
    assert abs(estimate.log_z - math.log(2 * math.pi)) < 5 * estimate.standard_error < 0.1
    x, accepted = independence(quadratic(1.0), flow, torch.randn(500, 2))
    assert not accepted[-1] and 0.3 < accepted.float().mean() < 1 and x.abs().max() < 10


def test_the_effective_sample_size_is_the_square_of_the_sum_over_the_sum_of_the_squares():
    w = torch.rand(50)
    torch.testing.assert_close(effective_sample_size(w.log() - 1000), w.sum() ** 2 / w.square().sum())
    torch.testing.assert_close(effective_sample_size(torch.zeros(50)), torch.tensor(50.0))
    torch.testing.assert_close(effective_sample_size(torch.tensor([0.0, -math.inf, -math.inf])), torch.tensor(1.0))


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


@pytest.mark.parametrize("device, dtype", [("cpu", torch.float32), ("cpu", torch.float64), ("meta", torch.float64)])
def test_samples_have_the_device_and_the_dtype_of_the_start_and_no_graph(device, dtype):
    """Whatever torch's default is, and under no_grad, too. On "meta" a tensor created on another device is an error."""
    flow, x = fc_flow(4).to(device, dtype), torch.randn(5, 4, device=device, dtype=dtype)
    mask = torch.tensor([True, False, True, False], device=device)
    with torch.no_grad():
        results = [langevin(flow.energy, x, 12, 0.1), langevin(flow.energy, x, 12, 0.1, mask),
                   mala(flow.energy, x, 12, 0.1)[0], tune(flow.energy, x, 12, 0.1)[0],
                   independence(flow.energy, flow, x)[0], alternate(flow.energy, flow, x, 3, 4, 0.1)[0],
                   alternate(flow.energy, flow, x, 3, 4, 0.1, adjusted=False)[0],
                   impute(flow.energy, x, mask, 3, 0.1)[0], impute(flow.energy, x, mask, 3, 0.1, adjusted=True)[0],
                   tempering(flow.energy, x.expand(2, 5, 4), [1.0, 2.0], 4, [0.1, 0.1])[0]]
        others = [*estimate_log_z(flow.energy, flow, 5), autocorrelation_time(x), *mala(flow.energy, x, 2, 0.1)[1][1:2]]
    assert {(t.device.type, t.dtype, t.requires_grad) for t in results} == {(device, dtype, False)}
    assert {t.device.type for t in others} == {device} and all(p.grad is None for p in flow.parameters())
