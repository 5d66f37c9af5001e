"""Denoisers of mixtures, the chain built on them, the choice of coordinates, and the refinement as a whole."""

from __future__ import annotations

import math

import pytest
import torch

from diffsampler import targets
from diffsampler.denoiser import MixtureDenoiser, ProductDenoiser, UnitDenoiser
from diffsampler.estimators import effective_sample_size, importance_log_normalizer
from diffsampler.methods.refined import RefinedProcess
from diffsampler.refinement import Course, refine
from diffsampler.refinement.frames import candidate_frames, make_frame, rank_frames
from diffsampler.refinement.mixture_fit import choose_denoiser, fit_product_mixture, step_losses, tuned_levels
from diffsampler.refinement.profiles import profile_draws
from diffsampler.refinement.separation import hessians, separating_map
from diffsampler.refinement.stages import Refinement, tempering_exponent
from diffsampler.sampler import DiffusionSampler
from diffsampler.schedule import exploding_levels, variance_exploding
from diffsampler.target import Target
from diffsampler.trajectory import simulate, simulate_backward


def make_product(dim=3, components=2):
    g = torch.Generator().manual_seed(1)
    mean = torch.randn(dim, components, generator=g, dtype=torch.float64)
    scale = 0.3 + torch.rand(dim, components, generator=g, dtype=torch.float64)
    return ProductDenoiser(mean, scale, torch.randn(dim, components, generator=g, dtype=torch.float64))


def make_mixture(dim=3, components=4):
    g = torch.Generator().manual_seed(2)
    mean = torch.randn(components, dim, generator=g, dtype=torch.float64)
    tril = torch.randn(components, dim, dim, generator=g, dtype=torch.float64).tril(-1) * 0.3
    tril = tril + torch.diag_embed(0.3 + torch.rand(components, dim, generator=g, dtype=torch.float64))
    return MixtureDenoiser(mean, tril, torch.randn(components, generator=g, dtype=torch.float64))


DENOISERS = {
    "unit": lambda: UnitDenoiser(3).double(),
    "product": make_product,
    "mixture": make_mixture,
}


@pytest.fixture(params=DENOISERS, ids=list(DENOISERS))
def denoiser(request):
    return DENOISERS[request.param]()


@pytest.mark.parametrize("noise", [1e-4, 0.3, 4.0])
def test_moments_follow_from_the_smoothed_density(denoiser, generator, noise):
    """Tweedie: E[z|y] = y + s^2 grad log q_s, Var = s^2 + s^4 diag Hess log q_s."""
    y = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    s2 = torch.tensor([noise], dtype=torch.float64)
    gradient = torch.func.vmap(torch.func.grad(lambda u: denoiser.log_prob(u, s2)))(y)
    hessian = torch.func.vmap(torch.func.hessian(lambda u: denoiser.log_prob(u, s2)))(y)
    got = denoiser(y, s2)
    assert torch.allclose(got.mean, y + noise * gradient, atol=1e-9)
    wanted = noise + noise**2 * hessian.diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(got.variance, wanted, rtol=1e-7, atol=1e-10)
    none = torch.zeros(1, dtype=torch.float64)
    own = torch.func.vmap(torch.func.grad(lambda u: denoiser.log_prob(u, none)))(y)
    assert torch.allclose(got.score, own, atol=1e-9)
    assert torch.allclose(got.share.sum(-1), torch.ones(()).double().expand(got.share.shape[:-1]))


def test_denoisers_take_one_noise_level_per_point(denoiser, generator):
    y = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    noise = torch.rand(4, 1, generator=generator, dtype=torch.float64)
    together = denoiser(y, noise)
    for i in range(4):
        alone = denoiser(y[i], noise[i])
        assert all(torch.allclose(a[i], b) for a, b in zip(together, alone, strict=True))
    assert torch.allclose(denoiser.log_prob(y, noise)[2], denoiser.log_prob(y[2], noise[2]))


def test_denoisers_are_normalised_and_sample_what_they_say(denoiser):
    g = torch.Generator().manual_seed(3)
    n, none = 20000, torch.zeros(1, dtype=torch.float64)
    z = denoiser.sample(n, generator=g)
    # Importance sampling of a wider law from the draws: mean weight 1 within 5 standard errors, p = 6e-7.
    other = torch.distributions.Normal(z.mean(0), 0.8 * z.std(0))
    ratio = (other.log_prob(z).sum(-1) - denoiser.log_prob(z, none)).exp()
    assert float(ratio.std()) < 30.0
    assert abs(float(ratio.mean()) - 1.0) < 5.0 * float(ratio.std()) / math.sqrt(n)
    # The identity E[score] = 0 and E[score z] = -1 hold for the density that was drawn from, and for no other.
    score = denoiser(z, none + 1.0).score
    product = score * z + 1.0
    assert bool((product.mean(0).abs() < 5.5 * product.std(0) / math.sqrt(n)).all())
    wrong = 1.3 * score * z + 1.0
    assert bool((wrong.mean(0).abs() > 5.5 * wrong.std(0) / math.sqrt(n)).any())


def test_denoisers_check_their_shapes():
    with pytest.raises(ValueError, match="Expected mean, scale and log_weight of one shape"):
        ProductDenoiser(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="Expected mean"):
        MixtureDenoiser(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2))


def perturbed(process, size, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in process.parameters():
            parameter += size * torch.randn(parameter.shape, generator=g, dtype=parameter.dtype)
    return process


@pytest.mark.parametrize("name", list(DENOISERS))
def test_weights_are_exact_for_any_parameters(name):
    """E[w] = Z whatever the network says. |error| < 5 se: false alarms 6e-7 per case, 3 cases."""
    target = targets.Gaussian([0.2, -0.1, 0.3], covariance=torch.diag(torch.tensor([0.5, 1.0, 1.5])))
    process = RefinedProcess(3, variance_exploding(8, noise_min=0.3), DENOISERS[name]())
    sampler = DiffusionSampler(target, perturbed(process, 0.03)).to(dtype=torch.float64)
    estimate = importance_log_normalizer(sampler.sample(20000, seed=1).log_weight)
    assert estimate.std_error < 0.1
    assert abs(estimate.value - target.log_normalizer) < 5.0 * estimate.std_error


def test_a_wrong_transition_density_is_seen():
    """Negative control of the test above: an initial density evaluated at 5 % larger points is far off."""
    target = targets.Gaussian([0.0, 0.0], covariance=torch.eye(2))
    process = RefinedProcess(2, variance_exploding(8, noise_min=0.3), UnitDenoiser(2))
    sampler = DiffusionSampler(target, process).to(dtype=torch.float64)
    honest = process.log_initial
    process.log_initial = lambda x: honest(1.05 * x)
    estimate = importance_log_normalizer(sampler.sample(20000, seed=1).log_weight)
    assert abs(estimate.value - target.log_normalizer) > 5.0 * estimate.std_error


def test_chain_of_the_unit_gaussian_is_exact_before_training():
    target = targets.Gaussian([0.0, 0.0], covariance=torch.eye(2))
    process = RefinedProcess(2, variance_exploding(8, noise_min=0.3), UnitDenoiser(2))
    log_weight = DiffusionSampler(target, process).to(dtype=torch.float64).sample(100).log_weight
    assert torch.allclose(log_weight, torch.full_like(log_weight, target.log_normalizer), atol=1e-5)


def test_bridge_has_the_marginals_of_the_backward_chain(generator):
    process = RefinedProcess(2, variance_exploding(5), UnitDenoiser(2))
    end = torch.zeros(40000, 2)
    direct = process.sample_bridge(torch.tensor(2), end, generator=generator)
    x = end
    for k in (4, 3, 2):
        kernel = process.backward(torch.tensor(k), x, None)
        x = kernel.mean + kernel.variance.sqrt() * torch.randn(x.shape, generator=generator)
    # Variances of 80,000 numbers each: relative error of the ratio .007, 5 of them.
    assert abs(float(direct.var() / x.var()) - 1.0) < 0.036


def test_process_checks_its_arguments():
    with pytest.raises(ValueError, match="denoiser in 2 dimensions; got one in 3"):
        RefinedProcess(2, variance_exploding(4), UnitDenoiser(3))
    with pytest.raises(ValueError, match="falling positive levels"):
        exploding_levels(torch.tensor([1.0, 2.0]))


def test_product_fit_finds_two_sides(generator):
    side = torch.where(torch.rand(4000, 2, generator=generator) < 0.25, -1.0, 1.0).double()
    x = side + 0.2 * torch.randn(4000, 2, generator=generator).double()
    fit = fit_product_mixture(x, 2)
    mean, order = fit.mean.double().sort(-1)
    # Means of 1,000 and 3,000 draws with sd .2: standard error .006.
    assert torch.allclose(mean, torch.tensor([-1.0, 1.0]).double().expand(2, 2), atol=0.04)
    assert torch.allclose(fit.log_weight.double().exp().gather(1, order)[:, 0], torch.tensor(0.25).double(), atol=0.04)
    assert torch.allclose(fit.variance.double().sqrt(), torch.tensor(0.2).double(), atol=0.03)


def test_product_for_independent_coordinates_and_mixture_for_joint_modes():
    g = torch.Generator().manual_seed(0)
    wells = targets.ManyWell(8)
    x = wells.sample(4096, generator=g).double()
    denoiser, value = choose_denoiser(x[:2048], x[2048:], generator=g)
    assert isinstance(denoiser, ProductDenoiser)
    assert value > float(wells.log_prob(x[2048:]).mean()) - wells.log_normalizer - 0.3
    grid = targets.GaussianMixture.forty()
    y = grid.sample(4096, generator=g).double() / 25.0
    assert isinstance(choose_denoiser(y[:2048], y[2048:], generator=g)[0], MixtureDenoiser)


def test_tuned_levels_lose_less():
    g = torch.Generator().manual_seed(0)
    denoiser = ProductDenoiser(torch.tensor([[-1.0, 1.0]]).expand(8, 2), torch.full((8, 2), 0.15), torch.zeros(8, 2))
    plain = variance_exploding(24, noise_min=0.05, noise_max=2.5)
    tuned = tuned_levels(denoiser, 24, noise_min=0.05, noise_max=2.5, generator=g)
    before, after = (
        float(step_losses(denoiser, s.total_variance[:-1].sqrt(), n=4096, generator=g).sum()) for s in (plain, tuned)
    )
    assert after < 0.8 * before
    assert torch.allclose(tuned.total_variance[:-1].sqrt()[[0, -1]], torch.tensor([2.5, 0.05]).double())


def test_hessians_of_a_gaussian(generator):
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    target = targets.Gaussian([1.0, 2.0], covariance=covariance)
    points = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    got = hessians(target, points, step=torch.full((2,), 1e-3, dtype=torch.float64))
    assert torch.allclose(got, -torch.linalg.inv(covariance).expand(3, 2, 2), atol=1e-7)


def test_rotated_wells_separate_in_the_directions_of_their_hessians():
    g = torch.Generator().manual_seed(0)
    target = targets.ManyWell(8, rotation_seed=3)
    points = target.sample(64, generator=g).double()
    found = separating_map(target, points, generator=g)
    assert found is not None
    inner = target.rotation.double().mT @ found.matrix
    # Rows of the wells: each well is one of the found directions alone. Gaussian directions may mix among themselves.
    wells = inner[0::2].abs()
    share = wells.max(-1).values.square() / wells.square().sum(-1)
    assert bool((share > 1.0 - 1e-6).all())


def test_coordinates_are_chosen_by_held_out_likelihood():
    g = torch.Generator().manual_seed(0)
    target = targets.ManyWell(6, rotation_seed=3)
    x = target.sample(3000, generator=g).double()
    frames = candidate_frames(target, None, x, generator=g)
    plain, turned = rank_frames(frames, x, None, generator=g)
    frame = turned.frame
    assert frame.name == "separating" and isinstance(turned.denoiser, ProductDenoiser)
    assert turned.value > plain.value + 0.1
    z = frame.to_frame(x[:50])
    assert torch.allclose(frame.to_original(z), x[:50], atol=1e-9)
    # The same normalizing constant in all coordinates: log rho(x) + log |dx/dz|.
    assert torch.allclose(frame.standard.log_prob(z), target.log_prob(x[:50]) + frame.log_volume(z), atol=1e-9)


def test_profiles_show_wells_that_no_particle_visited():
    g = torch.Generator().manual_seed(0)
    target = targets.ManyWell(6)
    x = profile_draws(target, torch.full((6,), 1.0).double(), 20000, generator=g)
    # Five standard errors of a share of .844 among 20,000 draws, three pairs: false alarms 2e-6.
    assert bool(((target.right_well_mass(x) - target.right_mass).abs() < 5.0 * 0.363 / 20000**0.5).all())
    assert abs(float(x[:, 1].var()) - 1.0) < 5.0 * (2.0 / 20000) ** 0.5


def test_refinement_finds_hidden_wells_and_only_where_there_are_some():
    target = targets.ManyWell(4)
    x = target.sample(4096, generator=torch.Generator().manual_seed(5)).double()
    lost = x[x[:, 0] > 0]
    work, choices = run_refinement(target, lost, steps=2)
    assert any("no particle visited" in stage for stage in choices["stages"])
    particles = work.sampler.sample(4000, seed=1)
    estimate = importance_log_normalizer(particles.log_weight)
    assert abs(estimate.value - target.log_normalizer) < 5.0 * estimate.std_error + 1e-3
    _, choices = run_refinement(target, x, steps=2)
    assert not any("no particle visited" in stage for stage in choices["stages"])


def test_a_frame_needs_spread():
    assert make_frame("diagonal", targets.ManyWell(2), None, torch.zeros(10, 2).double()) is None


def test_points_sent_far_away_do_not_set_a_frames_scale():
    """Three of 1,000 at 500 spread a coordinate 27-fold; ordinary points keep their own mean and spread."""
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = make_frame("diagonal", targets.ManyWell(2), None, x)
    assert torch.equal(plain.standard.location, x.mean(0))
    assert torch.equal(plain.standard.scale, x.std(0))
    x[:3, 0] = 500.0
    assert float(x[:, 0].std()) > 25.0
    frame = make_frame("diagonal", targets.ManyWell(2), None, x)
    torch.testing.assert_close(frame.standard.scale, torch.ones(2).double(), rtol=0.1, atol=0.0)
    torch.testing.assert_close(frame.standard.location, torch.zeros(2).double(), rtol=0.0, atol=0.15)


def test_tempering_exponent_gives_the_share_it_promises(generator):
    log_weight = 5.0 * torch.randn(4000, generator=generator, dtype=torch.float64)
    exponent = tempering_exponent(log_weight)
    assert 0.0 < exponent < 1.0
    assert abs(effective_sample_size(exponent * log_weight) / 4000 - 0.25) < 1e-3
    assert tempering_exponent(0.1 * log_weight) == 1.0


def run_refinement(target: Target, x, *, steps=None, seed=0):
    return refine(
        target,
        x,
        transport=None,
        centres=None,
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float32,
        course=Course(steps=steps),
    )


def test_held_out_particles_that_are_no_draws_of_the_target_are_no_merit(generator):
    """A chain of N(0, 1) for N(0, 4), held out N(0, 0.01): E_B[log w] is 0.74 below E_F[log w], no small gap."""
    target = targets.Gaussian([0.0, 0.0], scale=2.0)
    x = torch.randn(2048, 2, generator=generator, dtype=torch.float64)
    frame = make_frame("diagonal", target, None, x)
    work = Refinement(frame, UnitDenoiser(2), x, generator=generator, dtype=torch.float32)
    work.held = 0.1 * torch.randn(512, 2, generator=generator, dtype=torch.float64)
    process, inner = work.sampler.process, work.sampler.target
    ahead = simulate(process, inner, 2000, generator=generator).log_weight
    back = simulate_backward(process, inner, work.held.float(), generator=generator).log_weight
    assert back.mean() - ahead.mean() < -0.5
    assert work.judge(work.sampler).gap > 0.5


def test_refinement_of_a_mixture_is_precise_and_repeats_itself():
    target = targets.GaussianMixture.grid(9)
    x = target.sample(2048, generator=torch.Generator().manual_seed(5)).double()
    work, choices = run_refinement(target, x, steps=2)
    log_weight = work.sampler.sample(4000, seed=1).log_weight
    assert effective_sample_size(log_weight) > 0.85 * 4000
    # 5 standard errors, p = 6e-7.
    estimate = importance_log_normalizer(log_weight)
    assert abs(estimate.value - target.log_normalizer) < 5.0 * estimate.std_error + 1e-4
    again, _ = run_refinement(target, x, steps=2)
    assert torch.equal(log_weight, again.sampler.sample(4000, seed=1).log_weight)
    assert choices["stages"]


def test_refinement_does_not_care_about_units():
    """Shifted and scaled by 1e-3 and 1e4 per coordinate, the same particles give the same chain up to rounding."""
    inner = targets.GaussianMixture.grid(9)
    shift, scale = torch.tensor([1e4, -3.0]).double(), torch.tensor([1e-3, 1e4]).double()
    moved = Target.from_log_prob(lambda x: inner.log_prob((x - shift) / scale), dim=2)
    x = inner.sample(2048, generator=torch.Generator().manual_seed(5)).double()
    work, _ = run_refinement(moved, shift + scale * x, steps=2)
    estimate = importance_log_normalizer(work.sampler.sample(4000, seed=1).log_weight)
    wanted = float(scale.log().sum())
    assert abs(estimate.value - wanted) < 5.0 * estimate.std_error + 1e-3
    assert estimate.std_error < 0.02


@pytest.mark.slow
def test_many_wells_in_32_dimensions():
    target = targets.ManyWell(32)
    x = target.sample(4096, generator=torch.Generator().manual_seed(5)).double()
    work, _ = run_refinement(target, x)
    log_weight = work.sampler.sample(8000, seed=1).log_weight
    assert float(log_weight.mean()) > target.log_normalizer - 0.45
    assert effective_sample_size(log_weight) > 0.5 * 8000
