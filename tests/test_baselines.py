"""Classical samplers as users meet them: right moments, honest records, clear errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffsampler import baselines, targets
from diffsampler.baselines.chains import bulk_effective_sample_size
from diffsampler.baselines.smc import GaussianReference
from diffsampler.sampler import Sampler
from diffsampler.space import Euclidean, MeanFree, Torus
from diffsampler.target import Target

F64 = torch.float64
MEAN = torch.tensor([3.0, -100.0, 0.5], dtype=F64)
SCALE = torch.tensor([0.5, 20.0, 0.01], dtype=F64)


def gaussian(prior: Target | None = None) -> Target:
    """Ill-scaled Gaussian, log Z = 0."""
    constant = -SCALE.log().sum() - 1.5 * math.log(2.0 * math.pi)
    return Target.from_log_prob(
        lambda x: -0.5 * ((x - MEAN) / SCALE).square().sum(-1) + constant, dim=3, prior=prior, log_normalizer=0.0
    )


SAMPLERS = {
    "hmc": lambda target: baselines.HMC(target, init_scale=10.0, warmup=300),
    "mala": lambda target: baselines.MALA(target, init_scale=10.0, warmup=800),
    "smc": lambda target: baselines.SMC(target, reference_scale=200.0),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_moments_of_an_ill_scaled_gaussian(name: str):
    sampler = SAMPLERS[name](gaussian())
    assert isinstance(sampler, Sampler)
    particles = sampler.sample(12800, seed=1)
    z = (particles.x - MEAN) / SCALE
    mean, error = particles.expectation(z)
    square, square_error = particles.expectation(z.square())
    assert particles.ess > 400.0
    # 64 chains or 16 islands, six statistics; t(15) at 5.5: false alarm 4e-4 for SMC, 1e-5 for chains.
    assert bool((mean.abs() < 5.5 * error).all()) and bool(((square - 1.0).abs() < 5.5 * square_error).all())
    assert float(error.max()) < 0.1
    assert particles.nonfinite == 0


def test_ula_is_biased_and_mala_is_not():
    target = Target.from_log_prob(lambda x: -0.5 * x.square().sum(-1), dim=8)
    options = {"warmup": 300, "thin": 3}
    biased = baselines.ULA(target, **options).sample(25600, seed=0).x.square().mean()
    exact = baselines.MALA(target, **options).sample(25600, seed=0).x.square().mean()
    # 200,000 correlated squares of standard deviation 1.4: the standard error is below 0.01; 5 of them.
    assert abs(float(exact) - 1.0) < 0.05 and float(biased) > 1.05
    assert "**Biased**" in (baselines.ULA.__doc__ or "")


@pytest.mark.parametrize("name", ["HMC", "MALA", "ULA"])
def test_chains_are_recorded_as_chains(name: str):
    start = torch.zeros(6, 2, dtype=F64)
    target = Target.from_log_prob(lambda x: -0.5 * x.square().sum(-1), dim=2)
    sampler = getattr(baselines, name)(target, num_chains=6, warmup=20, init=start + 0.1)
    particles = sampler.sample(100, seed=3)
    # 17 draws from each of the 6 chains; consecutive draws of one chain lie side by side.
    assert particles.x.shape == (102, 2) and particles.replicates == 6
    assert not particles.has_normalizer and math.isnan(particles.log_normalizer.value)
    assert float(particles.log_weight.abs().max()) == 0.0
    blocks = particles.x.reshape(6, 17, 2)
    assert particles.ess == pytest.approx(bulk_effective_sample_size(blocks))
    again, other = sampler.sample(100, seed=3), sampler.sample(100, seed=4)
    assert torch.equal(particles.x, again.x) and not torch.equal(particles.x, other.x)


def test_rejected_states_are_recorded():
    target = Target.from_log_prob(lambda x: -0.5 * x.square().sum(-1), dim=2)
    x = baselines.MALA(target, num_chains=8, warmup=5, step_size=1.5).sample(800).x.reshape(8, 100, 2)
    stayed = (x[:, 1:] == x[:, :-1]).all(-1).double().mean()
    assert 0.1 < float(stayed) < 0.9


def test_effective_sample_size():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(32, 500, 2, generator=generator, dtype=F64)
    # Relative error of the estimate for independent draws is a few percent.
    assert bulk_effective_sample_size(noise) == pytest.approx(16000.0, rel=0.1)
    chain = torch.zeros_like(noise)
    for t in range(1, 500):
        chain[:, t] = 0.9 * chain[:, t - 1] + math.sqrt(1.0 - 0.81) * noise[:, t]
    # An autoregression of coefficient 0.9 has autocorrelation time 19.
    assert bulk_effective_sample_size(chain[:, 50:]) == pytest.approx(32 * 450 / 19, rel=0.25)
    # Chains that never leave their own mode know no more than their number.
    assert bulk_effective_sample_size(noise + 20.0 * torch.arange(32.0, dtype=F64).reshape(-1, 1, 1)) < 64.0
    assert bulk_effective_sample_size(torch.zeros(4, 10, 1)) == 1.0
    assert math.isnan(bulk_effective_sample_size(noise[:, :3]))


def test_bimodal_chains_report_few_effective_draws():
    target = Target.from_log_prob(
        lambda x: torch.logaddexp(-0.5 * (x - 20.0).square(), -0.5 * (x + 20.0).square())[:, 0], dim=1
    )
    particles = baselines.HMC(target, init_scale=20.0, warmup=100).sample(6400, seed=0)
    assert particles.ess < 200.0


@pytest.mark.parametrize("two_pass", [False, True])
def test_smc_estimates_the_normalizer(two_pass: bool):
    particles = baselines.SMC(gaussian(), reference_scale=200.0, two_pass=two_pass).sample(2000, seed=2)
    assert particles.replicates == 16 and len(particles) == 2000
    estimate = particles.log_normalizer
    # t(15) at 5: false alarm 2e-4.
    assert abs(estimate.value) < 5.0 * estimate.std_error and estimate.std_error < 0.25


def test_smc_rounds_up_and_repeats():
    sampler = baselines.SMC(gaussian(), reference_scale=200.0, num_islands=7, two_pass=False)
    particles = sampler.sample(100, seed=2)
    assert len(particles) == 105 and particles.replicates == 7
    assert torch.equal(particles.x, sampler.sample(100, seed=2).x)


def test_prior_is_the_default_reference_and_start():
    prior = GaussianReference(Euclidean(3), scale=150.0)
    target = gaussian(prior)
    sampler = baselines.SMC(target, two_pass=False)
    assert sampler.path.reference is prior
    assert len(baselines.HMC(target, num_chains=4, warmup=10, num_steps=2).sample(8)) == 8


@pytest.mark.parametrize("space", [Euclidean(3), MeanFree(3, 2), Torus(2)])
def test_gaussian_reference_is_normalized_and_samples_itself(space):
    reference = GaussianReference(space, scale=0.8)
    x = reference.sample(20000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(space.project(x), x)
    # E_p[q / p] = 1 for a narrower normalized q; 4.5 standard errors: false alarm 7e-6.
    narrow = GaussianReference(space, scale=0.6)
    ratio = (narrow.log_prob(x) - reference.log_prob(x)).exp()
    assert abs(float(ratio.mean()) - 1.0) < 4.5 * float(ratio.std()) / math.sqrt(20000)


@pytest.mark.parametrize("name", ["HMC", "MALA"])
@pytest.mark.parametrize("space", [MeanFree(3, 2), Torus(2)])
def test_other_spaces(name: str, space):
    target = Target.from_log_prob(lambda x: 2.0 * torch.cos(x).sum(-1), space=space)
    particles = getattr(baselines, name)(target, num_chains=16, warmup=50).sample(160, seed=0)
    assert torch.allclose(space.project(particles.x), particles.x, atol=1e-12)


def test_float32():
    target = Target.from_log_prob(lambda x: -0.5 * x.square().sum(-1), dim=2)
    particles = baselines.HMC(target, num_chains=8, warmup=20, dtype=torch.float32).sample(80)
    assert particles.x.dtype == torch.float32 and particles.log_weight.dtype == F64


def test_pyro_nuts_is_offered():
    assert issubclass(baselines.PyroNUTS, Sampler)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        baselines.Nothing  # noqa: B018


def test_bad_arguments_are_refused():
    target = gaussian()
    cases = [
        (lambda: baselines.HMC(target, num_chains=1), "Expected at least 2 chains; got 1"),
        (lambda: baselines.MALA(target, warmup=0), "Expected warmup and thin to be positive integers; got 0 and 1"),
        (lambda: baselines.ULA(target, step_size=0.0), "Expected step_size to be positive; got 0.0"),
        (lambda: baselines.HMC(target, init=torch.zeros(3, 3)), r"Expected init of shape \(64, 3\); got \(3, 3\)"),
        (
            lambda: baselines.SMC(target),
            "Expected reference or reference_scale for a target without a prior; got neither",
        ),
        (
            lambda: baselines.SMC(target, reference=GaussianReference(Euclidean(3), scale=1.0), reference_scale=1.0),
            "Expected at most one of reference and reference_scale; got both",
        ),
        (lambda: baselines.SMC(target, reference_scale=-1.0), "Expected a positive scale; got -1.0"),
    ]
    for build, message in cases:
        with pytest.raises(ValueError, match=message):
            build()


def test_start_without_density_is_refused():
    def half(x: Tensor) -> Tensor:
        return torch.where(x[..., 0] > 0.0, -x.sum(-1), torch.full_like(x[..., 0], math.nan))

    target = Target.from_log_prob(half, dim=1)
    with pytest.raises(ValueError, match="Expected a finite density and score at the starting points; got none at"):
        baselines.HMC(target, warmup=5).sample(64)
    particles = baselines.HMC(target, warmup=50, init=torch.ones(64, 1, dtype=F64)).sample(640)
    assert particles.nonfinite > 0 and bool((particles.x > 0.0).all())


def test_evaluations_are_counted():
    target = targets.Gaussian(torch.zeros(2), scale=1.0)
    chains = baselines.MALA(target, num_chains=8, warmup=20)
    tempered = baselines.SMC(target, reference_scale=2.0, num_islands=2)
    for sampler in (chains, tempered):
        assert sampler.evaluations == 0
        particles = sampler.sample(64, seed=0)
        assert sampler.evaluations >= len(particles)
