"""Defence by a reference density: exact weights whatever the chain has forgotten, and the price of it."""

from __future__ import annotations

import math

import pytest
import torch

from diffsampler import targets
from diffsampler.methods.defensive import SHARES, DefensiveSampler, defence_share
from diffsampler.methods.dis import DIS
from diffsampler.objective import BridgeLikelihood
from diffsampler.pilot.reference import student_t
from diffsampler.target import Target

ONE = torch.ones(2, dtype=torch.float64)


def two_wells() -> Target:
    """Nine tenths of the mass at the origin and one tenth twelve away, Z = 1."""
    mean = torch.tensor([[0.0, 0.0], [12.0, 0.0]])
    return targets.GaussianMixture(mean, scales=0.7, weights=torch.tensor([0.9, 0.1]))


def forgetful_chain(seed: int = 0) -> DIS:
    """A chain that was only trained on paths from the large well."""
    sampler = DIS(two_wells(), num_steps=12, seed=seed)
    x = 0.7 * torch.randn(512, 2, generator=torch.Generator().manual_seed(5))
    sampler.objective = BridgeLikelihood()
    sampler.fit(steps=150, batch_size=128, seed=0, bank=x)
    return sampler


@pytest.fixture(scope="module")
def chain() -> DIS:
    return forgetful_chain()


def reference() -> Target:
    return student_t(torch.tensor([6.0, 0.0]), torch.tensor([6.0, 1.5]), df=5)


def test_log_normalizer_is_right_where_the_chain_forgot_a_mode(chain):
    defended = DefensiveSampler(two_wells(), chain, reference(), share=0.3)
    particles = defended.sample(20_000, seed=1)
    estimate = particles.log_normalizer
    # Four standard errors: false alarm 6e-5.
    assert abs(estimate.value) < 4.0 * estimate.std_error
    assert estimate.std_error < 0.03
    small = float((torch.softmax(particles.log_weight, 0) * (particles.x[:, 0] > 6.0)).sum())
    assert small == pytest.approx(0.1, abs=0.02)
    # Negative control: the chain alone misses the mass, and its error bar says nothing of it.
    alone = chain.sample(20_000, seed=1).log_normalizer
    assert alone.value < -4.0 * alone.std_error


def test_mean_weight_is_z_for_few_draws_and_any_share(chain):
    # Deterministic shares are exact for every n, also where the reference gets no draw or almost all.
    for n, share in ((3, 0.1), (7, 0.3), (5, 0.8)):
        defended = DefensiveSampler(two_wells(), chain, reference(), share=share)
        if round(share * n) == 0:
            assert len(defended.sample(n, seed=0)) == n
            continue
        z = torch.stack([defended.sample(n, seed=s).log_weight.exp().mean() for s in range(120)])
        # Means of 120 estimates with bounded weights; five standard errors: false alarm 6e-7.
        assert abs(float(z.mean()) - 1.0) < 5.0 * float(z.std()) / math.sqrt(len(z))


def test_coordinates_of_the_chain_may_differ(chain):
    """A chain in shifted coordinates draws the shifted target with the same weights."""
    shift = torch.tensor([100.0, -50.0], dtype=torch.float64)
    whole = two_wells()
    moved = Target.from_log_prob(lambda x: whole.log_prob(x - shift), dim=2)
    law = student_t(torch.tensor([6.0, 0.0]) + shift, torch.tensor([6.0, 1.5]), df=5)
    defended = DefensiveSampler(
        moved, chain, law, share=0.3, to_original=lambda z: z.double() + shift, to_inner=lambda x: x - shift
    )
    particles = defended.sample(10_000, seed=1)
    # Four standard errors: false alarm 6e-5.
    assert abs(particles.log_normalizer.value) < 4.0 * particles.log_normalizer.std_error
    plain = DefensiveSampler(whole, chain, reference(), share=0.3).sample(10_000, seed=1)
    assert torch.allclose(particles.log_weight, plain.log_weight, atol=1e-2)


def test_lower_bound_is_that_of_the_chain(chain):
    defended = DefensiveSampler(two_wells(), chain, student_t(torch.zeros(2), 50.0 * ONE, df=1), share=0.2)
    particles = defended.sample(4000, seed=2)
    assert particles.elbo > -2.0
    assert float(particles.log_weight.mean()) < -100.0, "negative control: most draws of a wide law weigh nothing"


def test_shares_follow_what_the_chain_lacks(chain):
    generator = torch.Generator().manual_seed(0)
    density = two_wells()
    x = density.sample(2000, generator=generator).double()
    near = density.log_prob(x).double() - reference().log_prob(x)
    far = student_t(torch.full((2,), 40.0), ONE, df=1)
    useless = density.log_prob(x).double() - far.log_prob(x)
    assert defence_share(chain, x, near, generator=generator) >= 0.3
    one = x[x[:, 0] < 6.0]
    assert defence_share(chain, one, useless[x[:, 0] < 6.0], generator=generator) <= 0.1
    nowhere = torch.full_like(near, -math.inf)
    assert defence_share(chain, x, nowhere, generator=generator) == SHARES[0]


def test_bad_references_and_shares_are_refused(chain):
    with pytest.raises(ValueError, match="Expected 0 < share < 1; got 1.5"):
        DefensiveSampler(two_wells(), chain, reference(), share=1.5)
    unnormalised = Target.from_log_prob(lambda x: -x.square().sum(-1), dim=2)
    with pytest.raises(ValueError, match="normalised reference with an exact sampler"):
        DefensiveSampler(two_wells(), chain, unnormalised)
    with pytest.raises(ValueError, match="Expected n >= 1"):
        DefensiveSampler(two_wells(), chain, reference()).sample(0)
