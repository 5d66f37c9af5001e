"""Evidence estimators against known constants, and their error bars against repetition."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import diffsampler as ds
from diffsampler import baselines, evidence, targets
from diffsampler.annealing import linear_betas
from diffsampler.evidence import series
from diffsampler.evidence.bridge import solve
from diffsampler.kernel import KernelParams
from diffsampler.kernels.langevin import MALA
from diffsampler.pilot.density_fits import fit_gaussian_mixture
from diffsampler.tempering import TemperedPath

F64 = torch.float64
REPLICATES = 100
# A 95 % interval misses more than 14 of 100 times with probability 2e-4; the wanted coverage is 90 %.
FEWEST_COVERED = 86


def autoregression(shape, phi, generator):
    """Stationary chains with unit variance and lag-one correlation ``phi``; draws on the last axis but one."""
    noise = torch.randn(shape, generator=generator, dtype=F64).movedim(-2, 0)
    rows = [noise[0]]
    for row in noise[1:]:
        rows.append(phi * rows[-1] + math.sqrt(1.0 - phi**2) * row)
    return torch.stack(rows).movedim(0, -2)


def covered(estimates, truth):
    """How many of the 95 % intervals hold the truth."""
    return sum(abs(e.value - truth) < 1.96 * e.std_error for e in estimates)


class Line:
    """A Gaussian prior ``N(0, 3^2)`` and an unnormalized posterior ``exp(-2 (x - 1)^2)``, ``dim`` times."""

    def __init__(self, dim):
        self.dim = dim
        self.truth = dim * math.log(0.5 * math.sqrt(2.0 * math.pi))

    def log_ratio(self, x):
        log_prior = -0.5 * (x / 3.0).square() - math.log(3.0 * math.sqrt(2.0 * math.pi))
        return (-2.0 * (x - 1.0).square() - log_prior).sum(-1)

    def draws(self, betas, chains, n, generator, phi=0.0):
        beta = torch.as_tensor(betas, dtype=F64).reshape(-1, 1, 1, 1)
        precision = (1.0 - beta) / 9.0 + 4.0 * beta
        z = autoregression((len(betas), chains, n, self.dim), phi, generator)
        return 4.0 * beta / precision + z / precision.sqrt()


LADDER = [(k / 8) ** 3 for k in range(9)]


# Bridge sampling.


@pytest.mark.parametrize(("dim", "phi"), [(1, 0.0), (1, 0.9), (5, 0.9), (3, 0.97)])
def test_bridge_covers_the_truth_for_correlated_chains(dim, phi, generator):
    scale = torch.linspace(0.5, 2.0, dim, dtype=F64)
    x = autoregression((REPLICATES, 4, 500, dim), phi, generator) * scale + 3.0
    truth = float(scale.log().sum()) + 0.5 * dim * math.log(2.0 * math.pi)

    def log_prob(x):
        return -0.5 * ((x - 3.0) / scale).square().sum(-1)

    estimates = [evidence.bridge(each, log_prob, generator=generator) for each in x]
    assert covered(estimates, truth) >= FEWEST_COVERED


def test_errors_that_ignore_autocorrelation_undercover(generator):
    # Negative control: an interval for independent draws, asked about chains of correlation 0.9.
    x = autoregression((REPLICATES, 4, 500, 1), 0.9, generator).squeeze(-1)
    estimates = [ds.Estimate(float(c.mean()), float(c.std()) / math.sqrt(c.numel()), "iid") for c in x]
    assert covered(estimates, 0.0) < 70
    honest = [ds.Estimate(float(c.mean()), math.sqrt(float(series.variance_of_mean(c))), "chain") for c in x]
    assert covered(honest, 0.0) >= FEWEST_COVERED


def test_bridge_is_exact_where_the_proposal_is_the_target(generator):
    target = targets.Gaussian([0.3, -1.0], scale=[0.2, 5.0], log_normalizer=2.5)
    proposal = targets.Gaussian([0.3, -1.0], scale=[0.2, 5.0])
    estimate = evidence.bridge(target.sample(64, generator=generator), target.log_prob, proposal=proposal)
    assert abs(estimate.value - 2.5) < 1e-10
    assert estimate.std_error < 1e-10


@pytest.mark.parametrize("target", [targets.Funnel(dim=3, scale=1.5), targets.StudentT(dim=3, df=5.0)], ids=repr)
def test_bridge_where_the_proposal_does_not_fit(target, generator):
    estimates = [
        evidence.bridge(target.sample(1000, generator=generator), target.log_prob, generator=generator)
        for _ in range(50)
    ]
    # A 95 % interval misses more than 10 of 50 times with probability 4e-5.
    assert covered(estimates, target.log_normalizer) >= 40


def test_bridge_with_a_given_mixture_counts_both_modes(generator):
    target = targets.GaussianMixture([[-4.0, 0.0], [4.0, 0.0]], scales=0.7, weights=[0.3, 0.7])
    proposal = targets.GaussianMixture([[-4.0, 0.0], [4.0, 0.0]], scales=1.0, weights=[0.5, 0.5])
    estimate = evidence.bridge(target.sample(2000, generator=generator), target.log_prob, proposal=proposal)
    # Five standard errors: 6e-7 in the Gaussian limit.
    assert abs(estimate.value) < 5.0 * estimate.std_error < 0.2


def test_bridge_with_a_fitted_mixture_is_sharper_than_with_a_gaussian(generator):
    target = targets.GaussianMixture([[-4.0, 0.0], [4.0, 0.0]], scales=0.7, weights=[0.3, 0.7])
    x = target.sample(4000, generator=generator)

    def fit(x):
        return fit_gaussian_mixture(x, x, sizes=(2,), generator=generator)

    plain, mixed = evidence.bridge(x, target.log_prob), evidence.bridge(x, target.log_prob, fit=fit)
    for estimate in (plain, mixed):
        assert abs(estimate.value) < 5.0 * estimate.std_error
    assert mixed.std_error < 0.3 * plain.std_error


def test_bridge_names_chains_that_disagree(generator):
    x = torch.randn(4, 200, 2, generator=generator, dtype=F64)
    apart = x + torch.tensor([0.0, 0.0, 4.0, 4.0], dtype=F64).reshape(4, 1, 1)

    def log_prob(x):
        return torch.logaddexp(-0.5 * x.square().sum(-1), -0.5 * (x - 4.0).square().sum(-1))

    assert evidence.bridge(x, lambda x: -0.5 * x.square().sum(-1)).kind == "bridge"
    assert evidence.bridge(apart, log_prob).kind == "bridge, chains disagree"


def test_bridge_takes_draws_with_units_and_particles(generator):
    scale = torch.tensor([1e-4, 1e5], dtype=F64)
    x = 1e6 * scale + scale * torch.randn(2000, 2, generator=generator, dtype=F64)
    estimate = evidence.bridge(x, lambda x: -0.5 * ((x - 1e6 * scale) / scale).square().sum(-1))
    assert abs(estimate.value - math.log(2.0 * math.pi * 10.0)) < 5.0 * estimate.std_error
    target = targets.Gaussian([0.0], scale=2.0, log_normalizer=1.0)
    chains = baselines.HMC(target, num_chains=8, warmup=100).sample(2000)
    estimate = evidence.bridge(chains, target.log_prob)
    assert abs(estimate.value - 1.0) < 5.0 * estimate.std_error < 0.05


def test_bridge_is_reproducible_and_leaves_the_global_generator_alone(generator):
    x = torch.randn(2, 100, 2, generator=generator, dtype=F64)
    before = torch.get_rng_state()
    first, second = (evidence.bridge(x, lambda x: -x.square().sum(-1)) for _ in range(2))
    assert first == second
    assert torch.equal(before, torch.get_rng_state())


def test_bridge_refuses_what_it_cannot_use(generator):
    x = torch.randn(100, 2, generator=generator, dtype=F64)

    def log_prob(x):
        return -x.square().sum(-1)

    with pytest.raises(TypeError, match="Expected samples to be a floating-point tensor"):
        evidence.bridge(x.numpy(), log_prob)
    with pytest.raises(ValueError, match=r"Expected samples of shape \(draws, D\)"):
        evidence.bridge(x[:, 0], log_prob)
    with pytest.raises(ValueError, match="at least 8 draws per chain"):
        evidence.bridge(x[:5], log_prob)
    with pytest.raises(ValueError, match="non-finite"):
        evidence.bridge(torch.where(x > 2.0, math.nan, x), log_prob)
    with pytest.raises(ValueError, match=r"Expected log_prob to return shape \(100,\); got \(100, 2\)"):
        evidence.bridge(x, lambda x: -x.square())
    with pytest.raises(ValueError, match="Expected log_prob below infinity"):
        evidence.bridge(x, lambda x: log_prob(x).log())
    with pytest.raises(ValueError, match="at which log_prob is finite"):
        evidence.bridge(x, lambda x: torch.where(x[:, 0] > 0.0, log_prob(x), -math.inf))
    with pytest.raises(ValueError, match="span all 2 coordinates"):
        evidence.bridge(x[:, :1].expand(-1, 2), log_prob)
    with pytest.raises(ValueError, match="weights estimate Z"):
        evidence.bridge(ds.Particles(x, torch.zeros(100, dtype=F64)), log_prob)
    with pytest.raises(ValueError, match="num_proposals"):
        evidence.bridge(x, log_prob, num_proposals=1)


# Ladders of temperatures.


@pytest.mark.parametrize("phi", [0.0, 0.8])
def test_ladder_estimates_cover_the_truth(phi, generator):
    problem = Line(3)
    results = []
    for _ in range(REPLICATES):
        ratio = problem.log_ratio(problem.draws(LADDER, 4, 200, generator, phi))
        integral = evidence.thermodynamic_integration(ratio, LADDER)
        assert integral.lower < problem.truth < integral.upper
        results.append((integral.estimate, evidence.stepping_stone(ratio, LADDER), evidence.mbar_ladder(ratio, LADDER)))
    for estimates in zip(*results, strict=True):
        assert covered(estimates, problem.truth) >= FEWEST_COVERED


def test_error_of_the_integral_holds_its_own_bias(generator):
    # Three rungs over a range where the mean bends: without the ladder's bias in the error, nothing is covered.
    problem, betas = Line(3), [0.0, 0.3, 1.0]
    results = [
        evidence.thermodynamic_integration(problem.log_ratio(problem.draws(betas, 1, 4000, generator)), betas)
        for _ in range(20)
    ]
    assert covered([r.estimate for r in results], problem.truth) == 20
    without = [r.estimate._replace(std_error=r.monte_carlo_error) for r in results]
    assert covered(without, problem.truth) == 0


def test_correction_makes_the_integral_of_the_fourth_order(generator):
    # Means and variances of a Gaussian ladder are exact when 'draws' have them exactly.
    problem = Line(1)

    def error(rungs):
        betas = torch.linspace(0.2, 1.0, rungs, dtype=F64)
        z = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(40000, dtype=F64) + 0.5) / 40000)
        precision = (1.0 - betas) / 9.0 + 4.0 * betas
        x = (4.0 * betas / precision)[:, None] + z / precision.sqrt()[:, None]
        # At 0.2 the normalizer is that of a Gaussian with this precision.
        b, p = betas[0], precision[0]
        log_first = -0.5 * torch.log(p) + 0.5 * math.log(2 * math.pi) - 2.0 * b + 0.5 * (4.0 * b) ** 2 / p
        log_first = log_first - (1.0 - b) * math.log(3.0 * math.sqrt(2.0 * math.pi))
        ratio = problem.log_ratio(x.unsqueeze(-1))
        result = evidence.thermodynamic_integration(ratio, betas)
        return abs(result.estimate.value - (problem.truth - float(log_first)))

    assert 10.0 < error(3) / error(5) < 22.0


def test_stepping_stone_is_unbiased_on_a_coarse_ladder(generator):
    problem, betas = Line(1), [0.0, 0.15, 1.0]
    ratio = problem.log_ratio(problem.draws(betas, 3000, 8, generator))
    z = torch.stack([evidence_ratio(ratio[:, r], betas) for r in range(3000)]) / math.exp(problem.truth)
    # Four standard errors: 6e-5.
    assert abs(float(z.mean()) - 1.0) < 4.0 * float(z.std()) / math.sqrt(3000)


def evidence_ratio(log_ratio, betas):
    """The stepping-stone ratio of one replicate, ``(rungs, draws)``, as the estimator computes it."""
    return torch.tensor(evidence.stepping_stone(log_ratio, betas).value, dtype=F64).exp()


def test_replicas_that_share_noise_across_rungs_are_allowed_for(generator):
    # The same noise at every rung, as extreme as swaps can make it: errors that add rungs' variances are too small.
    problem, shape = Line(1), (9, 1, 1, 1)
    beta = torch.tensor(LADDER, dtype=F64).reshape(shape)
    precision = (1.0 - beta) / 9.0 + 4.0 * beta
    estimates = []
    for _ in range(REPLICATES):
        z = autoregression((1, 4, 200, 1), 0.5, generator)
        x = 4.0 * beta / precision + z / precision.sqrt()
        estimates.append(evidence.mbar_ladder(problem.log_ratio(x), LADDER))
    assert covered(estimates, problem.truth) >= FEWEST_COVERED


def test_ladder_with_impossible_draws(generator):
    # Half of the prior has likelihood zero, so the evidence is one half.
    u = torch.rand(2, 4000, generator=generator, dtype=F64)
    ratio = torch.where(u < 0.5, 0.0, -math.inf)
    ratio[1] = 0.0
    for estimator in (evidence.stepping_stone, evidence.mbar_ladder):
        estimate = estimator(ratio, [0.0, 1.0])
        assert abs(estimate.value - math.log(0.5)) < 5.0 * estimate.std_error < 0.2
    with pytest.raises(ValueError, match="Expected a finite log_ratio everywhere"):
        evidence.thermodynamic_integration(ratio, [0.0, 1.0])


def test_ladders_refuse_what_they_cannot_use():
    good = torch.zeros(3, 10, dtype=F64)
    for estimator in (evidence.thermodynamic_integration, evidence.stepping_stone, evidence.mbar_ladder):
        with pytest.raises(TypeError, match="floating-point tensor"):
            estimator([[0.0]], [0.0, 1.0])
        with pytest.raises(ValueError, match=r"log_ratio of shape \(rungs, draws\)"):
            estimator(good[0], [0.0])
        with pytest.raises(ValueError, match="one temperature for each of 3 rungs"):
            estimator(good, [0.0, 1.0])
        with pytest.raises(ValueError, match="Expected betas to increase"):
            estimator(good, [0.0, 1.0, 0.5])
        with pytest.raises(ValueError, match="below infinity"):
            estimator(good + math.nan, [0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="neighbouring temperatures to overlap"):
        evidence.stepping_stone(good - math.inf, [0.0, 0.5, 1.0])


# MBAR.


def test_mbar_of_two_states_is_bridge_sampling(generator):
    first, second = targets.Gaussian([0.0, 0.0], scale=1.0), targets.Gaussian([0.5, 0.5], scale=1.5, log_normalizer=3.0)
    x, y = first.sample(400, generator=generator), second.sample(300, generator=generator)
    both = torch.cat([x, y])
    result = evidence.mbar(torch.stack([first.log_prob(both), second.log_prob(both)]), [400, 300])
    ratio = [second.log_prob(z) - first.log_prob(z) for z in (y, x)]
    root = solve(*ratio, share=300 / 700)
    assert abs(float(result.log_normalizer[1]) - root.log_ratio) < 1e-8
    error = float(root.target.var() / 300 + root.proposal.var() / 400)
    # The same delta method with the Hessian's two forms, equal up to sampling.
    assert abs(float(result.covariance[1, 1]) / error - 1.0) < 0.05


def test_mbar_recovers_gaussians_and_its_covariance_is_that_of_replicates(generator):
    scales, constants, counts = [0.7, 1.0, 1.6, 2.2], [0.0, 2.0, -1.0, 4.0], [60, 100, 80, 120]
    states = [targets.Gaussian([0.2 * s], scale=s, log_normalizer=c) for s, c in zip(scales, constants, strict=True)]
    results = []
    for _ in range(200):
        x = torch.cat([s.sample(n, generator=generator) for s, n in zip(states, counts, strict=True)])
        results.append(evidence.mbar(torch.stack([s.log_prob(x) for s in states]), counts))
    value = torch.stack([r.log_normalizer for r in results]) - torch.tensor(constants, dtype=F64)
    assert float(value[:, 0].abs().max()) == 0.0
    z = value[:, 1:].mean(0) / value[:, 1:].std(0) * math.sqrt(200)
    # Bias of the logarithm is 0.2 standard errors at most here; 4.5 leaves a false alarm of 1e-4 over three states.
    assert float(z.abs().max()) < 4.5
    mean_covariance = torch.stack([r.covariance for r in results]).mean(0)[1:, 1:]
    ratio = torch.cov(value[:, 1:].mT).diagonal() / mean_covariance.diagonal()
    # A variance over 200 replicates is uncertain by 10 %.
    assert float((ratio - 1.0).abs().max()) < 0.4
    for k in (1, 2, 3):
        estimates = [ds.Estimate(float(r.log_normalizer[k]), float(r.std_error[k]), "mbar") for r in results]
        assert covered(estimates, constants[k]) >= 172


def test_mbar_beats_stepping_stone_and_survives_a_poor_start(generator):
    problem, betas = Line(3), [0.0, 0.02, 1.0]
    errors = []
    for _ in range(40):
        ratio = problem.log_ratio(problem.draws(betas, 1, 400, generator))
        errors.append([e(ratio, betas).value - problem.truth for e in (evidence.mbar_ladder, evidence.stepping_stone)])
    mbar, stone = torch.tensor(errors).square().mean(0).sqrt().tolist()
    assert mbar < stone


def test_mbar_far_apart_and_shifted(generator):
    # Adding a constant to one density adds it to its log normalizer, however large.
    x = torch.randn(200, generator=generator, dtype=F64)
    pooled = torch.cat([x[:100], x[100:] + 1.0])
    log_density = torch.stack([-0.5 * pooled.square(), -0.5 * (pooled - 1.0).square()])
    plain = evidence.mbar(log_density, [100, 100]).log_normalizer[1]
    shifted = evidence.mbar(log_density + torch.tensor([[0.0], [5000.0]], dtype=F64), [100, 100]).log_normalizer[1]
    assert abs(float(shifted - plain) - 5000.0) < 1e-7


def test_mbar_refuses_what_it_cannot_use():
    good = torch.zeros(2, 20, dtype=F64)
    with pytest.raises(ValueError, match="K counts that sum to N"):
        evidence.mbar(good, [10, 11])
    with pytest.raises(ValueError, match="at least 8 draws each"):
        evidence.mbar(good, [15, 5])
    with pytest.raises(ValueError, match="below infinity"):
        evidence.mbar(good + math.inf, [10, 10])
    with pytest.raises(ValueError, match="positive density under its own law"):
        evidence.mbar(good - math.inf, [10, 10])


# Bounds from both directions.


def test_annealed_bounds_sandwich_the_truth(generator):
    target = targets.Gaussian([1.0, -0.5], scale=[0.4, 0.7], log_normalizer=1.5)
    path = TemperedPath(targets.Gaussian([0.0, 0.0], scale=2.0), target)
    params = KernelParams(torch.tensor(0.1, dtype=F64), torch.ones(1, dtype=F64))

    def bounds(steps):
        samples = target.sample(1000, generator=generator)
        return evidence.annealed_bounds(
            path,
            samples,
            betas=linear_betas(steps),
            kernel=MALA(target.space),
            params=params,
            generator=generator,
        )

    coarse, fine = bounds(4), bounds(32)
    for result in (coarse, fine):
        # Bounds hold within four standard errors, the estimate within five: 1e-4 in all.
        assert result.lower.value < 1.5 + 4.0 * result.lower.std_error
        assert result.upper.value > 1.5 - 4.0 * result.upper.std_error
        assert abs(result.estimate.value - 1.5) < 5.0 * result.estimate.std_error
    assert fine.gap < 0.5 * coarse.gap
    # Negative control: the bounds of the coarse ladder are bounds, not estimates.
    assert coarse.lower.value < 1.5 - 4.0 * coarse.lower.std_error
    assert coarse.upper.value > 1.5 + 4.0 * coarse.upper.std_error


def test_sandwich_of_gaussian_weights_is_exact_in_expectation(generator):
    # log w ~ N(log Z - s^2/2, s^2) forward is N(log Z + s^2/2, s^2) backward.
    s, log_z = 1.2, -3.0
    estimates = []
    for _ in range(REPLICATES):
        z = torch.randn(2, 500, generator=generator, dtype=F64)
        result = evidence.sandwich(log_z - 0.5 * s**2 + s * z[0], log_z + 0.5 * s**2 + s * z[1])
        estimates.append(result.estimate)
    assert covered(estimates, log_z) >= FEWEST_COVERED
    assert abs(result.gap - s**2) < 0.5


def test_sandwich_refuses_what_it_cannot_use():
    good = torch.zeros(10, dtype=F64)
    with pytest.raises(ValueError, match="at least two each"):
        evidence.sandwich(good, good[:1])
    with pytest.raises(ValueError, match="finite backward"):
        evidence.sandwich(good, good - math.inf)


def test_impossible_forward_paths_count(generator):
    forward = torch.tensor([0.0, -math.inf], dtype=F64).repeat(500)
    result = evidence.sandwich(forward, torch.zeros(500, dtype=F64))
    assert abs(result.estimate.value - math.log(0.5)) < 5.0 * result.estimate.std_error
    assert result.lower.value == -math.inf


def test_no_warning_is_raised_by_ordinary_use(generator):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evidence.bridge(torch.randn(50, 1, generator=generator), lambda x: -x.square().sum(-1))


# Against sequential Monte Carlo, as a user would compare them.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["schools", "logistic"])
def test_bridge_agrees_with_smc(name, generator):
    if name == "schools":
        target = targets.EightSchools(centered=False)
    else:
        features = torch.randn(200, 10, generator=generator, dtype=F64)
        logits = 0.5 * features @ torch.randn(10, generator=generator, dtype=F64)
        labels = torch.rand(200, generator=generator, dtype=F64) < torch.sigmoid(logits)
        target = targets.LogisticRegression(features, labels)
    chains = baselines.HMC(target, num_chains=16, warmup=300).sample(8000)
    ours = evidence.bridge(chains, target.log_prob)
    smc = baselines.SMC(target, conditional_ess=0.9).sample(8192, seed=1).log_normalizer
    assert ours.kind == "bridge"
    assert max(ours.std_error, smc.std_error) < 0.05
    assert abs(ours.value - smc.value) < 3.5 * math.hypot(ours.std_error, smc.std_error)
