"""Stochastic normalizing flows: exact weights for any parameters, two-sided training, invertible layers."""

from __future__ import annotations

import math

import pytest
import torch
from cases import crossing, deviation, mixture

import diffsampler as ds
from diffsampler import evidence, targets
from diffsampler.kernel import Kernel
from diffsampler.kernels.hmc import HMC
from diffsampler.kernels.kinetic import BAOAB, OBABO
from diffsampler.kernels.langevin import MALA, RLMC, ULA
from diffsampler.methods.flows import Affine, AffineCoupling, Composition, couplings, surviving
from diffsampler.testing import check_sampler

F64 = torch.float64
KERNELS = {
    "ula": ULA,
    "mala": MALA,
    "hmc": lambda space: HMC(space, num_steps=3),
    "obabo": OBABO,
    "baoab": BAOAB,
}


def make(kernel=ULA, *, std=0.0, target=None, dtype=F64, **options):
    """A small flow with perturbed parameters."""
    target = mixture() if target is None else target
    options = {"num_blocks": 3, "num_moves": 2, "scale": 1.5, "step_size": 0.05, "width": 16, **options}
    sampler = ds.SNF(target, kernel=kernel(target.space), **options).to(dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in sampler.chain.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return sampler


# Flows.


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_flows_are_inverted_and_know_their_jacobian(dim, generator):
    flow = couplings(dim, num_layers=4, width=16, generator=generator).double()
    x = torch.randn(6, dim, generator=generator, dtype=F64)
    torch.testing.assert_close(flow(x)[0], x)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=F64)
    y, log_det = flow(x)
    back, log_back = flow.inverse(y)
    torch.testing.assert_close(back, x, atol=1e-12, rtol=0.0)
    torch.testing.assert_close(log_back, -log_det, atol=1e-12, rtol=0.0)
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda z: flow(z)[0], point) for point in x])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det, atol=1e-10, rtol=0.0)
    assert not torch.allclose(y, x, atol=1e-2)


def test_coupling_refuses_a_mask_that_moves_nothing(generator):
    with pytest.raises(ValueError, match="some coordinate to move"):
        AffineCoupling(torch.ones(3, dtype=torch.bool), width=4, generator=generator)


def test_lost_blocks_count_as_zero():
    x = torch.zeros(4, 2, 1, dtype=F64)
    x[1, 0] = math.nan
    particles = surviving(x, torch.zeros(4, 2, dtype=F64))
    assert (len(particles), particles.nonfinite, particles.replicates) == (6, 2, 3)
    assert abs(particles.log_normalizer.value - math.log(0.75)) < 1e-12
    with pytest.raises(RuntimeError, match="All particles are non-finite"):
        surviving(x + math.nan, torch.zeros(4, 2, dtype=F64))


# Weights.


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("std", [0.0, 0.08])
def test_weights_are_unbiased_for_any_parameters(name, std):
    sampler = make(KERNELS[name], std=std)
    forward = sampler.sample(20000, seed=1).log_weight
    # Four standard errors: 6e-5. Weights of perturbed flows are heavy-tailed, so there the bounded pair decides.
    if std == 0.0:
        assert abs(deviation(forward.exp(), 1.0)) < 4.0
    assert abs(crossing(forward, sampler.backward_log_weight(20000, seed=2))) < 4.0


class EnergyOnly(Kernel):
    """Unadjusted Langevin with the ratio of a kernel in detailed balance, as in some public code."""

    exact = False
    target_acceptance = 1.0

    def step(self, state, log_density, params, generator=None):
        new, info = ULA(self.space).step(state, log_density, params, generator)
        return new, info._replace(log_ratio=state.log_prob.double() - new.log_prob.double())


def test_energy_ratio_of_unadjusted_langevin_is_biased():
    sampler = make(EnergyOnly, step_size=0.15)
    assert abs(deviation(sampler.sample(20000, seed=1).log_weight.exp(), 1.0)) > 8.0
    right = make(ULA, step_size=0.15)
    assert abs(deviation(right.sample(20000, seed=1).log_weight.exp(), 1.0)) < 4.0


def test_without_kernels_steps_it_is_importance_sampling(generator):
    # A step of vanishing size moves nothing: the weight is target over prior.
    target = mixture()
    sampler = make(ULA, target=target, num_blocks=1, num_moves=1, step_size=1e-14)
    particles = sampler.sample(100)
    prior = targets.Gaussian([0.0, 0.0], scale=1.5)
    expected = target.log_prob(particles.x) - prior.log_prob(particles.x)
    torch.testing.assert_close(particles.log_weight, expected, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("name", ["ula", "hmc"])
def test_sampler_conforms(name):
    checks = check_sampler(make(KERNELS[name], dtype=torch.float32))
    assert {"seeds", "particles", "normalizer"} <= set(checks)


def test_bounds_sandwich_the_truth():
    sampler = make(ULA)
    bounds = evidence.sandwich(sampler.sample(4000).log_weight, sampler.backward_log_weight(4000))
    # Four and five standard errors: 1e-4.
    assert bounds.lower.value < 4.0 * bounds.lower.std_error
    assert bounds.upper.value > -4.0 * bounds.upper.std_error
    assert abs(bounds.estimate.value) < 5.0 * bounds.estimate.std_error
    assert abs(sampler.eubo(4000).value - bounds.upper.value) < 1e-9


def test_one_dimension_and_another_place():
    target = targets.Gaussian([1000.0], scale=20.0, log_normalizer=-2.0)
    sampler = ds.SNF(target, num_blocks=2, location=990.0, scale=30.0, width=8)
    estimate = sampler.sample(4000).log_normalizer
    # Four standard errors: 6e-5.
    assert abs(estimate.value + 2.0) < 4.0 * estimate.std_error


# Training.


def test_path_gradient_is_that_of_finite_differences():
    sampler = make(ULA, num_blocks=2, num_moves=1, std=0.05)
    chain, parameter = sampler.chain, sampler.chain.log_step

    def bound():
        generator = torch.Generator().manual_seed(0)
        return chain.simulate(sampler.target, 64, generator=generator, path_gradient=True).log_weight.mean()

    bound().backward()
    analytic = parameter.grad.clone()
    numeric = torch.zeros_like(analytic)
    for k in range(2):
        ends = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                parameter[k] += sign * 1e-5
            ends.append(bound().item())
            with torch.no_grad():
                parameter[k] -= sign * 1e-5
        numeric[k] = (ends[0] - ends[1]) / 2e-5
    torch.testing.assert_close(analytic, numeric, rtol=1e-5, atol=1e-7)
    assert all(p.grad is not None for p in chain.parameters())


@pytest.mark.parametrize("share", [None, 0.5, 1.0])
def test_training_closes_the_gap(share):
    target = targets.Gaussian([1.5, -1.0], covariance=[[0.5, 0.3], [0.3, 0.4]], log_normalizer=0.7)
    samples = None if share is None else target.sample(2000, generator=torch.Generator().manual_seed(3))
    sampler = ds.SNF(target, num_blocks=2, width=16, scale=1.5)
    before = evidence.sandwich(sampler.sample(2000).log_weight, sampler.backward_log_weight(2000)).gap
    assert (
        sampler.fit(steps=80, batch_size=64, learning_rate=1e-2, samples=samples, sample_share=share or 0.5) is sampler
    )
    after = evidence.sandwich(sampler.sample(2000).log_weight, sampler.backward_log_weight(2000))
    assert after.gap < 0.15 * before
    assert abs(after.estimate.value - 0.7) < 5.0 * after.estimate.std_error
    assert sampler.history[-1]["step"] == 80
    assert sampler.evaluations > 80 * 64


def test_exact_kernels_keep_their_step_size_and_train_their_flows():
    target = targets.Gaussian([1.5, -1.0], scale=0.5)
    sampler = ds.SNF(target, num_blocks=2, kernel=MALA(target.space), width=16, scale=1.5, step_size=0.02)
    before = sampler.chain.log_step.clone()
    bound = sampler.sample(2000).elbo
    sampler.fit(steps=60, batch_size=64, learning_rate=1e-2)
    assert torch.equal(before, sampler.chain.log_step)
    assert sampler.sample(2000).elbo > bound + 0.5


def test_resumed_training_repeats_the_uninterrupted_one(tmp_path):
    def fresh():
        return ds.SNF(mixture(), num_blocks=2, width=8)

    options = {"steps": 12, "batch_size": 16, "checkpoint_every": 5}
    whole = fresh().fit(**options)

    partial, calls = fresh(), []
    original = partial.chain.simulate

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) > 8:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    partial.chain.simulate = interrupted
    with pytest.raises(KeyboardInterrupt):
        partial.fit(**options, checkpoint=tmp_path)
    again = fresh().fit(**options, checkpoint=tmp_path, resume=True)
    for one, other in zip(whole.chain.parameters(), again.chain.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="another configuration"):
        ds.SNF(mixture(), num_blocks=3, width=8).fit(**options, checkpoint=tmp_path, resume=True)


def test_own_flows_are_used(generator):
    target = mixture()
    flows = [Composition([Affine(2)]), Affine(2)]
    sampler = ds.SNF(target, num_blocks=2, flows=flows)
    assert sum(p.numel() for p in sampler.chain.control.parameters()) == 8
    with pytest.raises(ValueError, match="one flow for each of 3 blocks"):
        ds.SNF(target, num_blocks=3, flows=flows)


def test_bad_input():
    target = mixture()
    with pytest.raises(ValueError, match="Euclidean"):
        ds.SNF(ds.Target.from_log_prob(lambda x: x.cos().sum(-1), space=ds.Torus(2)))
    with pytest.raises(ValueError, match="num_blocks to be a positive integer"):
        ds.SNF(target, num_blocks=0)
    with pytest.raises(ValueError, match="step_size to be positive"):
        ds.SNF(target, step_size=0.0)
    with pytest.raises(ValueError, match="Expected a kernel on"):
        ds.SNF(target, kernel=ULA(ds.Euclidean(3)))
    with pytest.raises(ValueError, match="a kernel with a path weight; got RLMC"):
        ds.SNF(target, kernel=RLMC(target.space))
    with pytest.raises(ValueError, match=r"samples of shape \(m, 2\)"):
        ds.SNF(target).fit(steps=1, samples=torch.zeros(4, 3))
    with pytest.raises(ValueError, match="n >= 1"):
        ds.SNF(target).sample(0)
