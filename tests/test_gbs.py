"""The bridge sampler and the priors that chains share."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import F64, HyperplaneGaussian, deviation, gaussian, mixture, perturb, two_centres
from torch import Tensor

import diffsampler as ds
from diffsampler import estimators
from diffsampler.methods.cmcd import CMCDProcess
from diffsampler.methods.gbs import GBSProcess
from diffsampler.methods.underdamped import UnderdampedProcess
from diffsampler.objective import LogVariance, ReverseKL
from diffsampler.priors import GaussianPrior, MixturePrior, Prior, UniformTorusPrior, default_prior
from diffsampler.space import Euclidean, MeanFree, Space, Torus
from diffsampler.trajectory import simulate


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Priors

PRIORS: dict[str, Callable[[], Prior]] = {
    "gaussian": lambda: GaussianPrior(Euclidean(2), mean=torch.tensor([0.3, -1.0]), scale=0.8),
    "mixture": lambda: two_centres(Euclidean(2)),
    "narrow mixture": lambda: two_centres(Euclidean(2), scale=0.3),
    "mean free": lambda: GaussianPrior(MeanFree(3, 2), scale=1.4),
    "mean free mixture": lambda: two_centres(MeanFree(3, 2)),
    "torus": lambda: UniformTorusPrior(Torus(2)),
}


@pytest.mark.parametrize("name", PRIORS)
def test_scores_are_the_gradients_of_the_densities(name: str):
    prior = perturb_prior(PRIORS[name]())
    x = prior.sample(50, generator=generator()).detach().requires_grad_()
    log_prob = prior.log_prob(x)
    assert log_prob.shape == (50,) and log_prob.dtype == F64
    if not log_prob.requires_grad:
        assert not bool(prior.score(x).any())
        return
    (gradient,) = torch.autograd.grad(log_prob.sum(), x)
    space = prior.space
    assert torch.allclose(space.project_vector(prior.score(x)), space.project_vector(gradient), atol=1e-10)


def perturb_prior(prior: Prior) -> Prior:
    prior = prior.double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator(5), dtype=F64)
    return prior


@pytest.mark.parametrize("name", PRIORS)
def test_draws_follow_the_density(name: str):
    """The mean ratio of a known density to the prior's, over its draws, is one."""
    prior = perturb_prior(PRIORS[name]())
    x = prior.sample(40000, generator=generator()).detach()
    space = prior.space
    assert float((space.project(x) - x).abs().max()) < 1e-12
    if isinstance(space, Torus):
        log_other = torch.cos(x).sum(-1) - 2.0 * (math.log(2.0 * math.pi) + math.log(1.2660658777520084))
    else:
        # A narrower Gaussian about a centre, so that the ratio is bounded.
        centre = space.project(next(prior.parameters()).detach()).reshape(-1, space.dim)[0]
        variance = 0.7 * (2.0 * prior.log_scale.detach()).exp().amin().reshape(1)
        log_other = space.log_gaussian(x, centre, variance)
    ratio = (log_other - prior.log_prob(x).detach()).exp()
    # False alarm 6e-5 per prior.
    assert abs(deviation(ratio, 1.0)) < 4.0
    assert abs(deviation(1.1 * ratio, 1.0)) > 4.0, "the control must fail"


def test_priors_learn_or_not():
    space, means = Euclidean(2), torch.zeros(3, 2)
    assert GaussianPrior(space).learns and MixturePrior(space, means).learns
    assert not GaussianPrior(space, learn=False).learns and not MixturePrior(space, means, learn=False).learns
    assert not UniformTorusPrior(Torus(2)).learns
    assert isinstance(default_prior(Torus(2), 1.0), UniformTorusPrior)
    assert isinstance(default_prior(space, 1.0), GaussianPrior)
    for process in (CMCDProcess, GBSProcess, UnderdampedProcess):
        assert not process(space, 3, prior=two_centres(space, learn=False)).learns_initial
        assert process(space, 3, prior=two_centres(space)).learns_initial


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: GaussianPrior(Torus(2)), "Expected a Euclidean or mean-free space"),
    (lambda: GaussianPrior(Euclidean(2), scale=0.0), "Expected scale > 0; got 0.0"),
    (lambda: GaussianPrior(Euclidean(2), mean=torch.zeros(3)), r"Expected a mean of shape \(2,\); got \(3,\)"),
    (lambda: MixturePrior(Euclidean(2), torch.zeros(3)), r"Expected means of shape \(M, 2\); got \(3,\)"),
    (lambda: MixturePrior(Euclidean(2), torch.zeros(3, 2), shares=torch.zeros(3)), "Expected 3 positive shares"),
    (lambda: MixturePrior(Euclidean(2), torch.zeros(3, 2), scale=math.inf), "Expected scale > 0; got inf"),
    (lambda: UniformTorusPrior(Euclidean(2)), "Expected a torus"),
    (lambda: GBSProcess(Euclidean(2), 3, scale=0.0), "Expected scale > 0; got 0.0"),
    (lambda: GBSProcess(Euclidean(2), 3, local_scale=2.0), r"Expected local_scale in \(0, 1\]; got 2.0"),
    (lambda: GBSProcess(Euclidean(2), 0), "Expected num_steps >= 1; got 0"),
    (lambda: GBSProcess(Euclidean(2), 3, prior=GaussianPrior(Euclidean(3))), "Expected a prior on Euclidean"),
]


@pytest.mark.parametrize(("build", "message"), BAD)
def test_bad_arguments_are_refused(build: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        build()


# Bridges


def test_bridges_start_as_annealed_langevin_in_both_directions():
    process = GBSProcess(Euclidean(2), 6, scale=2.0, width=8).double()
    x, score = torch.randn(5, 2, generator=generator(), dtype=F64), torch.full((5, 2), 0.01, dtype=F64)
    for k in range(6):
        for kernel, t in ((process.forward, k / 6.0), (process.backward, (k + 1) / 6.0)):
            with torch.no_grad():
                mean, variance = kernel(torch.tensor(k), x, score)
            step = process.log_step[k].exp().detach()
            annealed = t * score - (1.0 - t) * x / 4.0
            # The clip is smooth: a small drift passes up to its cube.
            assert torch.allclose(mean, x + step * annealed, atol=1e-3)
            assert torch.allclose(variance, 2.0 * step)


def test_bridges_have_two_networks():
    process = perturb(GBSProcess(Euclidean(2), 4, width=8).double(), 0.3)
    x = torch.randn(5, 2, generator=generator(), dtype=F64)
    k = torch.tensor(1)
    with torch.no_grad():
        before = process(k, x, -x).mean
        process.backward_control.net.head.bias += 1.0
        assert torch.equal(before, process(k, x, -x).mean)
    (gradient,) = torch.autograd.grad(
        process(k, x, -x).mean.sum(), process.backward_control.net.head.bias, allow_unused=True
    )
    assert gradient is None


def test_training_approaches_the_normalizer_from_below():
    target = mixture()
    before = estimators.elbo(ds.GBS(target, num_steps=16, scale=1.3, width=32).sample(4000, seed=1).log_weight).value
    model = ds.GBS(target, num_steps=16, scale=1.3, width=32).fit(steps=150, batch_size=128, learning_rate=5e-3)
    particles = model.sample(4000, seed=1)
    assert before + 0.05 < particles.elbo < 0.0
    # 4 standard errors, false alarm 6e-5.
    assert abs(particles.log_normalizer.value) < 4.0 * particles.log_normalizer.std_error
    assert particles.ess > 2800.0


# Chains with less than two controls


@pytest.mark.parametrize("kind", [ds.MCD, ds.AnnealedULA, ds.GBS, ds.CMCD])
@pytest.mark.parametrize("objective", [ReverseKL(), LogVariance()])
def test_thin_samplers_train_on_either_loss(kind: type, objective: torch.nn.Module):
    model = kind(gaussian(), num_steps=8, scale=1.3, width=16, objective=objective)
    model.fit(steps=40, batch_size=64, learning_rate=1e-2)
    particles = model.sample(4000)
    assert abs(particles.log_normalizer.value - 0.7) < 4.0 * particles.log_normalizer.std_error


def test_chains_without_controls_have_no_network_and_only_the_backward_one_where_asked():
    space, k = Euclidean(2), torch.tensor(1)
    x = torch.randn(5, 2, generator=generator(), dtype=F64)
    ula = CMCDProcess(space, 4, forward_control=False, backward_control=False).double()
    assert ula.control is None
    for flags, moves in (
        ((False, False), (False, False)),
        ((False, True), (False, True)),
        ((True, True), (True, True)),
    ):
        process = CMCDProcess(space, 4, forward_control=flags[0], backward_control=flags[1], width=8).double()
        if process.control is not None:
            with torch.no_grad():
                process.control.net.head.bias += 1.0
        with torch.no_grad():
            moved = [not torch.equal(process.forward(k, x, -x).mean, ula.forward(k, x, -x).mean)]
            moved.append(not torch.equal(process.backward(k, x, -x).mean, ula.backward(k, x, -x).mean))
        assert tuple(moved) == moves


def test_annealed_langevin_weights_are_those_of_a_plain_loop():
    """Written out by hand with the schedule and steps of the process."""
    target = gaussian()
    process = CMCDProcess(target.space, 5, scale=1.3, forward_control=False, backward_control=False).double()
    path = simulate(process, target, 20, generator=generator())
    beta, step = process.beta.detach(), process.log_step.exp().detach()

    def normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return (-0.5 * (x - mean).square() / variance - 0.5 * (2.0 * math.pi * variance).log()).sum(-1)

    def drift(k: int, x: Tensor) -> Tensor:
        annealed = beta[k] * target.score(x) - (1.0 - beta[k]) * x / 1.3**2
        noise = (2.0 * step[k]).sqrt()
        return noise * 4.0 * torch.tanh(0.5 * noise * annealed / 4.0)

    x = path.x
    log_weight = target.log_prob(x[-1]) - normal(x[0], torch.zeros(2, dtype=F64), torch.tensor(1.69, dtype=F64))
    for k in range(5):
        variance = 2.0 * step[k]
        log_weight = log_weight + normal(x[k], x[k + 1] + drift(k, x[k + 1]), variance)
        log_weight = log_weight - normal(x[k + 1], x[k] + drift(k, x[k]), variance)
    assert torch.allclose(path.log_weight, log_weight, atol=1e-6)


# A mixture as the prior


def test_a_mixture_prior_on_the_modes_finds_what_a_gaussian_misses():
    """Two far modes of unequal weight: centred on them, an untrained chain already weighs both right."""
    target = ds.Target.from_log_prob(far_modes, dim=2)
    means = torch.tensor([[-12.0, 0.0], [12.0, 0.0]])
    options = {"num_steps": 8, "local_scale": 1.0, "width": 8}
    prior = MixturePrior(Euclidean(2), means, scale=1.1)
    particles = ds.CMCD(target, prior=prior, **options).sample(4000)
    share = particles.expectation((particles.x[:, 0] > 0.0).double())[0]
    # The modes weigh 0.2 and 0.8; 4 standard errors of 4000 draws, false alarm 6e-5.
    assert abs(float(share) - 0.8) < 4.0 * math.sqrt(0.16 / particles.ess)
    assert abs(particles.log_normalizer.value) < 4.0 * particles.log_normalizer.std_error
    lost = ds.CMCD(target, **options).sample(4000)
    assert lost.ess < 100.0


def far_modes(x: Tensor) -> Tensor:
    centres = x.new_tensor([[-12.0, 0.0], [12.0, 0.0]])
    square = (x.unsqueeze(-2) - centres).square().sum(-1)
    return torch.logsumexp(-0.5 * square + x.new_tensor([0.2, 0.8]).log(), -1) - math.log(2.0 * math.pi)


@pytest.mark.parametrize("space", [Euclidean(2), MeanFree(4, 2)])
def test_learned_centres_move(space: Space):
    target = mixture() if space == Euclidean(2) else HyperplaneGaussian(4, 2)
    prior = two_centres(space)
    start = prior.means.detach().clone()
    model = ds.GBS(target, num_steps=4, width=8, prior=prior).fit(steps=5, batch_size=32)
    assert not torch.equal(start, model.process.prior.means.detach())
