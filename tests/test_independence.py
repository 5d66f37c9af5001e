"""Iterated sampling importance resampling: exact with bad proposals, log Z, options."""

from __future__ import annotations

import math

import pytest
import torch
from cases import deviation

import diffsampler as ds
from diffsampler import targets
from diffsampler.baselines.independence import IndependenceSampler, select_by_weight
from diffsampler.kernels import HMC, ULA
from diffsampler.target import FunctionTarget
from diffsampler.testing import check_sampler

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bad_pair() -> tuple[targets.Gaussian, targets.Gaussian]:
    """A proposal that is two standard deviations off and too wide in one direction."""
    target = targets.Gaussian([0.4, -0.3], scale=[0.8, 1.1], log_normalizer=0.7)
    return target, targets.Gaussian([2.0, 1.5], scale=[1.5, 4.0])


def run_chains(num_proposals: int, *, steps: int, chains: int, drop: float = 0.0) -> torch.Tensor:
    """Chains from exact draws by resampling alone; ``drop`` lowers the present state's log weight (a mistake)."""
    target, proposal = bad_pair()
    rng = generator(1)
    x = target.sample(chains, generator=rng)
    log_x = target.log_prob(x) - proposal.log_prob(x)
    for _ in range(steps):
        fresh = proposal.sample(chains * num_proposals, generator=rng).reshape(chains, num_proposals, 2)
        log_fresh = target.log_prob(fresh) - proposal.log_prob(fresh)
        x, log_x, _ = select_by_weight(x, log_x - drop, fresh, log_fresh, rng)
        log_x = log_x if drop == 0.0 else target.log_prob(x) - proposal.log_prob(x)
    return (x - torch.tensor([0.4, -0.3])) / torch.tensor([0.8, 1.1])


@pytest.mark.parametrize("num_proposals", [1, 2, 8])
def test_resampling_keeps_exact_draws_with_a_bad_proposal(num_proposals: int):
    z = run_chains(num_proposals, steps=20, chains=20_000)
    # Eight statistics at 4.5 standard errors: 6e-5.
    for statistic in (z, z.square() - 1.0, z.prod(-1, keepdim=True)):
        for column in statistic.unbind(-1):
            assert abs(deviation(column, 0.0)) < 4.5


@pytest.mark.parametrize("num_proposals", [1, 8])
def test_resampling_without_the_present_weight_fails(num_proposals: int):
    """Negative control: forgetting half a nat of the present weight shifts the law."""
    z = run_chains(num_proposals, steps=20, chains=20_000, drop=0.5)
    worst = max(abs(deviation(column, 0.0)) for column in z.unbind(-1))
    assert worst > 6.0


@pytest.mark.parametrize("num_proposals", [1, 8])
def test_resampling_moves_in_detailed_balance_on_three_points(num_proposals: int):
    """Flows between three points are equal in both directions."""
    rng = generator()
    pi, q = torch.tensor([0.6, 0.3, 0.1], dtype=F64), torch.tensor([0.1, 0.2, 0.7], dtype=F64)
    n = 200_000

    def draw(p: torch.Tensor, count: int) -> torch.Tensor:
        return torch.searchsorted(p.cumsum(0)[:-1], torch.rand(count, generator=rng, dtype=F64), right=True)

    start = draw(pi, n)
    fresh = draw(q, n * num_proposals).reshape(n, num_proposals)
    log_weight = (pi / q).log()
    x, _, _ = select_by_weight(start.unsqueeze(-1), log_weight[start], fresh.unsqueeze(-1), log_weight[fresh], rng)
    flow = torch.zeros(3, 3, dtype=F64).index_put_((start, x.squeeze(-1)), torch.ones(n, dtype=F64), accumulate=True)
    # Three pairs at 4.5 standard errors.
    assert float(((flow - flow.T) / (flow + flow.T).sqrt().clamp_min(1.0)).abs().max()) < 4.5


def test_local_moves_and_normalizer_with_a_bad_proposal():
    target, proposal = bad_pair()
    for sampler in (
        IndependenceSampler(target, proposal=proposal),
        IndependenceSampler(target, proposal=proposal, num_local=0, num_proposals=1, thin=4),
    ):
        assert check_sampler(sampler, n=4096) == ("seeds", "particles", "normalizer", "expectations")


def test_modes_and_front_door():
    target = targets.GaussianMixture.grid(9)
    sampler = IndependenceSampler(target, proposal_scale=6.0, kernel=HMC(target.space, num_steps=4))
    fit = ds.sample(target, method=sampler, num_samples=6400, seed=0)
    shares = torch.nn.functional.one_hot(target.mode_labels(fit.particles.x), 9).double()
    mean, error = fit.particles.expectation(shares)
    # Student's t with 31 degrees of freedom: nine modes at 4.5 standard errors, 8e-4.
    assert float(((mean - target.mode_weights()) / error).abs().max()) < 4.5
    value, std_error, _ = fit.log_normalizer
    assert abs(value) < 4.0 * std_error < 0.2
    assert fit.evaluations > 6400 * 16


def test_every_evaluation_is_counted():
    target, proposal = bad_pair()
    sampler = IndependenceSampler(target, proposal=proposal, num_proposals=3, num_local=0, num_chains=4, warmup=5)
    sampler.sample(40)
    assert sampler.evaluations == 4 * (4 + 3 * (5 + 10))


def test_proposals_outside_the_support_are_never_taken():
    def half(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x[..., 0] > 0.0, -0.5 * x[..., 0].square(), math.nan)

    target = FunctionTarget(half, targets.Gaussian([0.0], scale=1.0).space)
    particles = IndependenceSampler(target, proposal_scale=1.5).sample(2000)
    assert bool((particles.x > 0.0).all())
    value, error, _ = particles.log_normalizer
    assert abs(value - 0.5 * math.log(math.pi / 2)) < 5.0 * error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_proposals": 0}, "num_proposals"),
        ({"num_local": -1}, "num_local"),
        ({"num_chains": 1}, "num_chains"),
        ({"kernel": ULA(targets.Gaussian([0.0, 0.0], scale=1.0).space)}, "exact kernel"),
        ({"proposal_scale": None}, "neither"),
    ],
)
def test_options_are_checked(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        IndependenceSampler(bad_pair()[0], **({"proposal_scale": 2.0} | change))
