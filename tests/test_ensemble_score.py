"""The ensemble score sampler: estimators against closed forms, unbiased weights under interaction, and its verdicts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import diffsampler as ds
from diffsampler import targets
from diffsampler.ensemble import chain, clouds, frame, pilot
from diffsampler.ensemble.clouds import Archive, Cloud, Independent, Points, Pooled
from diffsampler.ensemble.proposals import Belief, Components, Kalman, LocalKalman, Natural
from diffsampler.ensemble.transitions import PlugIn, PosteriorDraw, ScoreBlend, Transition, Tweedie, posterior_weights
from diffsampler.methods.ensemble_score import EnsembleScore, energy_ratio
from diffsampler.target import Target

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture() -> targets.GaussianMixture:
    return targets.GaussianMixture([[-1.0, 0.5], [1.5, -0.5]], scales=[0.5, 0.8], weights=[0.3, 0.7])


def without_score(target: Target) -> Target:
    def refuse(x: Tensor) -> Tensor:
        raise AssertionError("The score was called.")

    return Target.from_log_prob(
        target.log_prob, dim=target.dim, score=refuse, log_normalizer=target.log_normalizer, prior=target.prior
    )


def components(replicates: int, members: int, dim: int) -> Components:
    g = generator(1)
    factor = torch.randn(replicates, dim, dim, generator=g, dtype=F64).tril(-1) * 0.3
    factor = factor + torch.diag_embed(0.5 + torch.rand(replicates, dim, generator=g, dtype=F64))
    scale = 0.5 + torch.rand(replicates, members, dim, generator=g, dtype=F64)
    return Components(torch.randn(replicates, members, dim, generator=g, dtype=F64), factor, scale)


def test_component_densities_are_those_of_torch():
    parts = components(2, 3, 4)
    y = parts.sample(4, generator=generator())
    cholesky = parts.factor.unsqueeze(1) * parts.scale.unsqueeze(-2)
    law = torch.distributions.MultivariateNormal(parts.mean, scale_tril=cholesky)
    own = law.log_prob(y.permute(2, 0, 1, 3)).permute(1, 2, 0)
    assert torch.allclose(parts.log_own(y), own)
    flat = y.flatten(1, 2)
    each = torch.stack([law.log_prob(flat[:, k].unsqueeze(1)) for k in range(flat.shape[1])], 1)
    exact = torch.logsumexp(each, -1) - math.log(3)
    assert torch.allclose(parts.log_mixture(flat, chunk=10**6), exact)
    assert torch.allclose(parts.log_mixture(flat, chunk=1), exact)


def test_points_come_in_mirrored_pairs():
    parts = components(1, 5, 3)
    y = parts.sample(6, generator=generator())
    assert torch.allclose(y.mean(-2), parts.mean)
    assert parts.sample(5, generator=generator()).shape == (1, 5, 5, 3)


def test_archive_mixes_levels_by_their_points():
    first, second = components(1, 4, 2), components(1, 4, 2)._replace(mean=torch.zeros(1, 4, 2, dtype=F64))
    levels = []
    for parts, count in ((first, 2), (second, 6)):
        y = parts.sample(count, generator=generator(count))
        levels.append(Points(y, torch.zeros(y.shape[:-1], dtype=F64), None, parts))
    cloud = Archive(2).cloud(levels)
    mixed = [parts.log_mixture(cloud.y, chunk=100).exp() for parts in (first, second)]
    assert torch.allclose(cloud.log_ratio, -(0.25 * mixed[0] + 0.75 * mixed[1]).log())
    assert torch.equal(Archive(1).cloud(levels[1:]).log_ratio, Pooled().cloud(levels[1:]).log_ratio)


def test_pooled_estimate_is_consistent_and_independent_one_is_its_ensemble_of_one():
    target = targets.Gaussian([0.5, -0.5], covariance=[[1.0, 0.4], [0.4, 0.8]])
    x = torch.tensor([[[0.3, 1.0], [-2.0, 0.5]]], dtype=F64)
    parts = Components(x, torch.eye(2, dtype=F64).unsqueeze(0), torch.ones_like(x))
    y = parts.sample(20_000, generator=generator())
    points = Points(y, target.log_prob(y), None, parts)
    precision = torch.linalg.inv(torch.tensor([[1.0, 0.4], [0.4, 0.8]], dtype=F64))
    covariance = torch.linalg.inv(precision + torch.eye(2, dtype=F64))
    exact = (x[0] + precision @ target.mean) @ covariance
    for estimator in (Pooled(), Independent()):
        cloud = estimator.cloud([points])
        members = x.reshape(len(cloud.y), -1, 2)
        weight, alive = posterior_weights(members, cloud, 1.0)
        mean = Tweedie()(members, weight, cloud, 1.0).reshape(2, 2)
        # Effective sizes exceed 4,000, so 0.05 is above 4 standard errors.
        assert bool(alive.all())
        assert torch.allclose(mean, exact, atol=0.05)
    one = Points(y[:, :1], points.log_gamma[:, :1], None, Components(x[:, :1], parts.factor, parts.scale[:, :1]))
    assert torch.allclose(Pooled().cloud([one]).log_ratio, Independent().cloud([one]).log_ratio)


def test_blend_with_the_score_has_no_variance_for_a_gaussian():
    v, sigma = torch.tensor([0.5, 3.0], dtype=F64), 0.8
    y = torch.randn(1, 6, 2, generator=generator(), dtype=F64)
    cloud = Cloud(y, torch.randn(1, 6, generator=generator(1), dtype=F64), -y / v)
    x = torch.tensor([[[1.0, -2.0], [0.3, 0.1]]], dtype=F64)
    weight, _ = posterior_weights(x, cloud, sigma)
    exact = x * v / (v + sigma**2)
    assert torch.allclose(ScoreBlend()(x, weight, cloud, sigma), exact, atol=1e-10)
    # Negative control: without the score the same points are off.
    assert (Tweedie()(x, weight, cloud, sigma) - exact).abs().max() > 0.05


def test_kalman_proposal_is_the_posterior_of_a_gaussian():
    moments = frame.Moments(
        torch.tensor([[1.0, 2.0]], dtype=F64), torch.tensor([[[2.0, 0.5], [0.5, 1.0]]], dtype=F64), torch.ones(1)
    )
    x, sigma = torch.tensor([[[0.0, 0.0], [3.0, 1.0]]], dtype=F64), 0.7
    parts = Kalman(excess=0.0).components(x, sigma, Belief(moments, None))
    covariance = torch.linalg.inv(torch.linalg.inv(moments.covariance[0]) + torch.eye(2, dtype=F64) / sigma**2)
    centre = (torch.linalg.solve(moments.covariance[0], moments.mean[0]) + x[0] / sigma**2) @ covariance
    assert torch.allclose(parts.mean[0], centre, atol=1e-5)
    assert torch.allclose(parts.factor[0] @ parts.factor[0].mT, covariance, atol=1e-5)


def test_tempered_moments_keep_the_effective_size():
    y = torch.randn(2, 400, 3, generator=generator(), dtype=F64)
    log_ratio = torch.stack([-20.0 * y[0].square().sum(-1), torch.zeros(400, dtype=F64)])
    log_ratio[0, :50] = -math.inf
    moments = frame.tempered_moments(y, log_ratio, ess=60.0)
    assert moments.beta[1] == 1.0 and 0.0 < moments.beta[0] < 1.0
    weight = torch.softmax(moments.beta[0] * log_ratio[0, 50:], -1)
    assert 1.0 / weight.square().sum() == pytest.approx(60.0, rel=0.01)
    assert torch.allclose(moments.mean[1], y[1].mean(0))


class Displaced(Transition):
    """Negative control: moves on after the density of the step was taken."""

    def __init__(self) -> None:
        self.inner = PlugIn()
        self.mean = self.inner.mean

    def step(self, x, cloud, sigma, sigma_next, *, noise, uniform):
        step = self.inner.step(x, cloud, sigma, sigma_next, noise=noise, uniform=uniform)
        return step._replace(x=step.x + sigma_next)


RECIPES = {
    "pooled": (Pooled(), Natural(), PlugIn()),
    "matched": (Pooled(), Kalman(), PlugIn()),
    "local": (Pooled(), LocalKalman(), PlugIn()),
    "archive": (Archive(2), Kalman(), PlugIn()),
    "draw": (Pooled(), Kalman(), PosteriorDraw()),
    "independent": (Independent(), Kalman(), PlugIn()),
    "blend": (Pooled(), Kalman(), PlugIn(mean=ScoreBlend())),
    "displaced": (Pooled(), Kalman(), Displaced()),
}


def replicate_ratios(name: str, *, replicates: int = 600) -> Tensor:
    estimator, proposal, transition = RECIPES[name]
    recipe = chain.Recipe(num_particles=24, num_points=2, estimator=estimator, proposal=proposal, transition=transition)
    where = frame.Frame(torch.tensor([0.5, 0.0], dtype=F64), torch.diag(torch.tensor([1.2, 0.9], dtype=F64)))
    sigmas = chain.geometric_levels(2.0, 0.15, 8)
    run = chain.reverse_diffusion(mixture(), where, sigmas, recipe, replicates=replicates, generator=generator(7))
    return run.log_weight.exp().mean(-1)


@pytest.mark.parametrize("name", RECIPES)
def test_weights_are_unbiased_under_interaction(name):
    ratio = replicate_ratios(name)
    error = float(ratio.std()) / math.sqrt(len(ratio))
    # 4 standard errors of independent replicates: one false alarm in 16,000 seeds each.
    unbiased = abs(float(ratio.mean()) - 1.0) < 4.0 * error
    assert unbiased == (name != "displaced"), (float(ratio.mean()), error)
    if unbiased:
        assert error < 0.1


def test_chunks_change_nothing(monkeypatch):
    whole = replicate_ratios("draw", replicates=3)
    monkeypatch.setattr(chain, "CHUNK", 500)
    monkeypatch.setattr(clouds, "CHUNK", 500)
    assert torch.allclose(replicate_ratios("draw", replicates=3), whole, rtol=1e-9)


def test_only_values_are_used_and_counted():
    target = without_score(mixture())
    sampler = EnsembleScore(target, num_particles=64, num_levels=10, num_points=2, radius=3.0)
    first = sampler.run(200, seed=2)
    spent = sampler.evaluations
    again = sampler.run(200, seed=2, plan=first.plan)
    assert sampler.evaluations - spent == 4 * 64 * (10 * 2 + 1)
    assert len(first.particles) == 256 and first.particles.replicates == 4
    assert len(again.levels) == 10 and again.levels[0].sigma > again.levels[-1].sigma
    repeat = EnsembleScore(target, num_particles=64, num_levels=10, num_points=2, radius=3.0).sample(200, seed=2)
    assert torch.equal(repeat.x, first.particles.x)


def test_two_modes_with_an_honest_error_bar():
    particles = EnsembleScore(without_score(mixture()), num_particles=256, num_levels=20, radius=4.0).sample(1024)
    z = particles.log_normalizer
    # Student's t with 3 degrees of freedom: beyond 13 one time in a thousand.
    assert abs(z.value) < 13.0 * z.std_error and z.std_error < 0.1
    assert particles.ess > 400
    share, error = particles.expectation((mixture().mode_labels(particles.x) == 0).double())
    assert abs(float(share) - float(mixture().mode_weights()[0])) < 0.06


def test_any_location_and_scale():
    target = targets.Gaussian([1e4, -3.0], scale=[20.0, 0.01], log_normalizer=3.0)
    particles = EnsembleScore(without_score(target), num_particles=128, num_levels=20).sample(512, seed=1)
    assert abs(particles.log_normalizer.value - 3.0) < 0.2
    mean, _ = particles.expectation(particles.x)
    assert bool(((mean - target.mean).abs() < 0.3 * torch.tensor([20.0, 0.01])).all())


def test_inverse_problem_against_its_exact_posterior():
    target = targets.LinearInversion.travel_time(5)
    result = EnsembleScore(without_score(target), num_particles=256, num_levels=40).run(1024, seed=0)
    particles = result.particles
    mean, _ = particles.expectation(particles.x)
    spread = (target.factor @ target.factor.mT).diagonal().sqrt()
    # The effective size is above 200: 0.3 is 4.2 standard errors, in 5 coordinates one false alarm in 7,000.
    assert particles.ess > 200
    assert bool(((mean - target.mean).abs() < 0.3 * spread).all())
    assert abs(particles.log_normalizer.value - target.log_normalizer) < 0.25


def test_poor_estimates_are_found_out():
    dim = 20
    means = 1.5 * torch.randn(4, dim, generator=generator(), dtype=F64)
    hard = targets.GaussianMixture(means, scales=1.0)
    fit = ds.sample(hard, method=EnsembleScore(hard, num_particles=64, num_levels=10, radius=4.0), num_samples=256)
    assert any("untrustworthy" in finding.message for finding in fit.findings)
    easy = mixture()
    method = EnsembleScore(easy, num_particles=256, num_levels=20, radius=4.0)
    fit = ds.sample(easy, method=method, num_samples=1024)
    assert fit.findings == []


def test_uncorrected_draws_have_no_normalizer():
    particles = EnsembleScore(mixture(), num_particles=128, num_levels=20, radius=4.0, corrected=False).sample(512)
    assert not particles.has_normalizer and particles.replicates == 4
    assert bool((particles.log_weight == 0.0).all())


def test_density_with_a_bounded_support():
    target = Target.from_log_prob(
        lambda x: torch.where(x[:, 0] > 0.0, -x.square().sum(-1) / 2.0, x.new_full((), -math.inf)),
        dim=2,
        log_normalizer=math.log(math.pi),
    )
    particles = EnsembleScore(target, num_particles=256, num_levels=20, radius=2.0).sample(1024)
    inside = particles.log_weight > -math.inf
    assert bool((particles.x[inside, 0] > 0.0).all())
    assert abs(particles.log_normalizer.value - math.log(math.pi)) < 0.15


def test_energy_ratio_is_one_between_equal_laws():
    x, y = torch.randn(2, 200, 100, 3, generator=generator(), dtype=F64)
    ratio = energy_ratio(x, y)
    # Mean of 200 ratios with standard deviation about 0.5.
    assert abs(float(ratio.mean()) - 1.0) < 4.0 * float(ratio.std()) / math.sqrt(200)
    assert float(energy_ratio(x, y + 1.0).mean()) > 5.0


def test_plan_is_found_at_the_scale_of_the_smallest_mode():
    recipe = chain.Recipe(num_particles=256, num_points=4, estimator=Pooled(), proposal=Kalman(), transition=PlugIn())
    target = targets.GaussianMixture([[-3.0, 0.0], [3.0, 0.0]], scales=[0.3, 1.0])
    plan = pilot.make_plan(target, recipe, radius=4.0, generator=generator())
    # The frame stretches the axes differently: the noise is fine enough along the short one.
    assert 0.01 * 0.3 < float(plan.sigma_min * plan.frame.factor.diagonal().amin()) < 0.15 * 0.3
    fewer = pilot.make_plan(target, replace(recipe, num_particles=64), radius=4.0, generator=generator())
    assert fewer.sigma_max == plan.sigma_max == 2.0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EnsembleScore(mixture(), num_particles=4), "Expected num_particles"),
        (lambda: EnsembleScore(mixture(), num_levels=1), "Expected num_levels"),
        (lambda: EnsembleScore(mixture(), num_points=True), "Expected num_points"),
        (lambda: EnsembleScore(mixture(), radius=0.0), "Expected a positive radius"),
        (lambda: EnsembleScore(mixture()).sample(0), "Expected n >= 1"),
        (lambda: Archive(0), "Expected depth"),
        (lambda: Kalman(excess=-1.0), "Expected excess"),
        (lambda: LocalKalman(prior_points=0.0), "Expected prior_points"),
        (lambda: PlugIn(last=0.0), "Expected last"),
        (lambda: chain.geometric_levels(1.0, 2.0, 5), "Expected 0 < sigma_min"),
        (
            lambda: EnsembleScore(Target.from_log_prob(lambda x: x.sum(-1) * math.inf, dim=2), radius=1.0).sample(9),
            "Expected a finite density",
        ),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
