"""Ensembles: exact draws keep their law, trajectories commute with affine maps, the finite-ensemble term is needed."""

from __future__ import annotations

import math

import pytest
import torch
from cases import HyperplaneGaussian, VonMises, deviation

import diffsampler as ds
from diffsampler import targets
from diffsampler.baselines.affine_invariant import (
    AffineInvariant,
    Differential,
    EnsembleMove,
    Stretch,
    ensemble_effective_sample_size,
)
from diffsampler.baselines.aldi import ALDI, aldi_step
from diffsampler.space import Euclidean, Space
from diffsampler.target import FunctionTarget, Target
from diffsampler.testing import check_sampler

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class StretchWithoutVolume(EnsembleMove):
    """A common mistake: the stretch is accepted without its factor ``z ** (d - 1)``."""

    def propose(
        self, x: torch.Tensor, others: torch.Tensor, space: Space, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, log_factor = Stretch().propose(x, others, space, generator)
        return y, torch.zeros_like(log_factor)


def worst_deviation(target: Target, moves: list[EnsembleMove], *, sweeps: int = 30) -> float:
    """Largest deviation of sines and cosines after some sweeps of 400 ensembles from exact draws."""
    ensembles, walkers = 400, 16
    init = target.sample(ensembles * walkers, generator=generator(1))
    sampler = AffineInvariant(
        target, moves=moves, num_ensembles=ensembles, num_walkers=walkers, warmup=sweeps - 1, init=init
    )
    x = sampler.sample(ensembles * walkers, seed=2).x
    exact = target.sample(200_000, generator=generator(3))
    center, scale = exact.mean(0), exact.std(0)

    def statistics(points: torch.Tensor) -> torch.Tensor:
        z = (points - center) / scale
        return torch.cat([z.sin(), z.cos(), z.square().sum(-1, keepdim=True).cos()], -1)

    # Ensembles are the independent units.
    blocks = statistics(x).reshape(ensembles, walkers, -1).mean(1)
    truth = statistics(exact)
    error = (blocks.var(0) / ensembles + truth.var(0) / len(truth)).sqrt()
    return float(((blocks.mean(0) - truth.mean(0)).abs() / error).max())


EXACT: dict[str, list[EnsembleMove]] = {
    "stretch": [Stretch()],
    "long stretch": [Stretch(reach=6.0)],
    "differential": [Differential()],
    "jumps": [Differential(jump=1.0)],
    "both": [Stretch(), Differential()],
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("target", [targets.Gaussian.correlated(3), targets.Funnel(dim=3)], ids=["gaussian", "funnel"])
def test_moves_keep_exact_draws(name: str, target: Target):
    # Seven statistics at 4.5 standard errors: 5e-5.
    assert worst_deviation(target, EXACT[name]) < 4.5


def test_stretch_without_its_volume_factor_fails():
    """Negative control."""
    assert worst_deviation(targets.Gaussian.correlated(3), [StretchWithoutVolume()]) > 6.0


def test_stretch_law():
    """The stretch has density proportional to ``z ** -0.5`` on ``[1/a, a]``: its mean is ``(a + 1 + 1/a) / 3``."""
    x = torch.ones(1, 200_000, 1, dtype=F64)
    others = torch.zeros(1, 4, 1, dtype=F64)
    y, log_factor = Stretch(reach=2.0).propose(x, others, Euclidean(1), generator())
    assert abs(deviation(y.flatten(), 3.5 / 3.0)) < 4.5
    assert float(y.min()) >= 0.5
    assert float(y.max()) <= 2.0
    assert bool((log_factor == 0.0).all())


def test_partners_of_a_differential_move_are_different():
    x = torch.zeros(3, 500, 2, dtype=F64)
    others = torch.randn(3, 6, 2, generator=generator(), dtype=F64)
    y, _ = Differential(jump=1.0).propose(x, others, Euclidean(2), generator())
    assert bool((y != 0.0).any(-1).all())


def affine_pair() -> tuple[Target, Target, torch.Tensor, torch.Tensor]:
    """A mixture and its image under ``x -> A x + b``."""
    matrix = torch.tensor([[1.0, 3.0, 0.0], [0.2, -1.0, 2.0], [0.0, 0.5, 40.0]], dtype=F64)
    shift = torch.tensor([5.0, -100.0, 0.3], dtype=F64)
    base = targets.GaussianMixture([[-1.0, 0.0, 0.5], [1.0, 0.6, 0.0]], scales=[0.7, 1.0])
    inverse = torch.linalg.inv(matrix)
    image = FunctionTarget(lambda y: base.log_prob((y - shift) @ inverse.T), Euclidean(3))
    return base, image, matrix, shift


def test_trajectories_of_walkers_commute_with_affine_maps():
    base, image, matrix, shift = affine_pair()
    init = torch.randn(2 * 16, 3, generator=generator(4), dtype=F64)
    options = {"num_ensembles": 2, "num_walkers": 16, "warmup": 0}
    first, _ = AffineInvariant(base, init=init, **options).trajectories(32 * 40, seed=5)
    second, _ = AffineInvariant(image, init=init @ matrix.T + shift, **options).trajectories(32 * 40, seed=5)
    assert torch.allclose(first @ matrix.T + shift, second, atol=1e-7)
    assert float((first[:, -1] - first[:, 0]).abs().max()) > 0.5


def test_trajectories_of_langevin_ensembles_commute_with_affine_maps():
    base, image, matrix, shift = affine_pair()
    init = torch.randn(2 * 16, 3, generator=generator(4), dtype=F64)
    options = {"num_ensembles": 2, "num_particles": 16, "warmup": 20, "thin": 1}
    first = ALDI(base, init=init, **options).trajectories(32 * 40, seed=5)
    second = ALDI(image, init=init @ matrix.T + shift, **options).trajectories(32 * 40, seed=5)
    assert torch.allclose(first @ matrix.T + shift, second, atol=1e-7)


def second_moments(size: int, *, correct: bool) -> torch.Tensor:
    """Second moments over the exact ones of small ensembles on N(0, diag(1, 4, 1/4)), h = 0.01, from exact draws."""
    rng, variance = generator(), torch.tensor([1.0, 4.0, 0.25], dtype=F64)
    x = torch.randn(300, size, 3, generator=rng, dtype=F64) * variance.sqrt()
    total = torch.zeros(300, 3, dtype=F64)
    for t in range(1200):
        x = aldi_step(x, -x / variance, 0.01, rng, dof=3, correct=correct)
        if t >= 400 and t % 10 == 0:
            total += x.square().mean(1) / 80
    return total / variance


@pytest.mark.parametrize("size", [6, 20])
def test_finite_ensembles_keep_the_product_law(size: int):
    moments = second_moments(size, correct=True)
    # The discretization adds h/2 = 0.5 %; three moments at 4.5 standard errors.
    error = moments.std(0) / math.sqrt(len(moments))
    assert bool(((moments.mean(0) - 1.005).abs() < 4.5 * error + 0.01).all())


@pytest.mark.parametrize(("size", "wanted"), [(6, 0.39), (20, 0.80)])
def test_ensembles_collapse_without_the_correction(size: int, wanted: float):
    """Negative control: the missing drift costs 60 % of the variance at N = 6 and 20 % at N = 20."""
    moments = second_moments(size, correct=False).mean(0)
    assert float((moments - wanted).abs().max()) < 0.1


def test_langevin_ensemble_reports_what_it_is():
    target = targets.Gaussian.correlated(4)
    sampler = ALDI(target, init_scale=30.0)
    particles = sampler.sample(12_000, seed=1)
    mean, error = particles.expectation(torch.cat([particles.x - 1.0, (particles.x - 1.0).square() - 1.01], -1))
    # Eight statistics of Student's t with 7 degrees of freedom at 8: 7e-4.
    assert float((mean.abs() / error).max()) < 8.0
    assert not particles.has_normalizer
    assert sampler.evaluations == 8 * 32 * (1000 + 10 * math.ceil(12_000 / 256))


def test_too_large_steps_are_an_error_not_an_answer():
    target = FunctionTarget(lambda x: -(x**4).sum(-1) * 1e6, Euclidean(2))
    with pytest.raises(RuntimeError, match="smaller step_size"):
        ALDI(target, step_size=0.9, warmup=0, init_scale=100.0).sample(10_000)


def test_walkers_conform_on_mean_free_particles_and_fit():
    sampler = AffineInvariant(HyperplaneGaussian(), warmup=200)
    assert "expectations" in check_sampler(sampler, n=8192)
    fit = ds.sample(targets.Banana(), method=AffineInvariant(targets.Banana()), num_samples=4000, seed=0)
    assert not fit.particles.has_normalizer
    assert fit.evaluations > 4000


def test_effective_sample_size_sees_walkers_that_move_together():
    x = torch.randn(8, 100, 1, 2, generator=generator(), dtype=F64)
    together = ensemble_effective_sample_size(x.expand(8, 100, 50, 2))
    apart = ensemble_effective_sample_size(torch.randn(8, 100, 50, 2, generator=generator(1), dtype=F64))
    assert 400 < together < 1600
    assert apart > 20_000


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda t: AffineInvariant(t, num_walkers=5), "even number"),
        (lambda t: AffineInvariant(t, num_walkers=4), "at least 6"),
        (lambda t: AffineInvariant(t, num_ensembles=1), "2 ensembles"),
        (lambda t: AffineInvariant(t, moves=[]), "at least one move"),
        (lambda t: AffineInvariant(t, init=torch.zeros(3, 2)), "Expected init"),
        (lambda t: AffineInvariant(VonMises()), "torus"),
        (lambda t: ALDI(t, num_particles=3), "more than dof"),
        (lambda t: ALDI(t, step_size=0.0), "step_size"),
        (lambda t: ALDI(VonMises()), "torus"),
        (lambda t: Stretch(reach=1.0), "reach"),
        (lambda t: Differential(jump=2.0), "jump"),
    ],
)
def test_options_are_checked(build, message: str):
    with pytest.raises(ValueError, match=message):
        build(targets.Gaussian([0.0, 0.0], scale=1.0))
