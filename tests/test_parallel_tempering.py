"""Parallel tempering: swaps keep the joint law, the ladder equalizes rejections, modes and log Z come out right."""

from __future__ import annotations

import math

import pytest
import torch

import diffsampler as ds
from diffsampler import targets
from diffsampler.baselines.parallel_tempering import ParallelTempering, to_particles
from diffsampler.kernels import HMC, MALA, ULA
from diffsampler.parallel_tempering import Ladder, parallel_tempering, respace, swap_probability
from diffsampler.space import Euclidean
from diffsampler.target import FunctionTarget
from diffsampler.tempering import TemperedPath
from diffsampler.testing import check_sampler

F64 = torch.float64
LOG_Z = math.log(0.5)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_path() -> TemperedPath:
    reference = targets.Gaussian([0.0, 0.0], scale=2.0)
    return TemperedPath(reference, targets.Gaussian([1.0, -0.5], scale=[0.7, 1.2], log_normalizer=LOG_Z))


def ladder(*betas: float, step_size: float = 0.3) -> Ladder:
    return Ladder(tensor(*betas), tensor(*[step_size] * len(betas)), torch.ones(len(betas), 1, dtype=F64))


def test_swap_probability_is_the_ratio_of_joint_densities():
    path, betas = make_path(), tensor(0.0, 0.3, 1.0)
    x = path.reference.sample(3, generator=generator())
    slope = path.target.log_prob(x) - path.reference.log_prob(x)

    def log_joint(order: list[int]) -> torch.Tensor:
        log_gamma = (1 - betas) * path.reference.log_prob(x[order]) + betas * path.target.log_prob(x[order])
        return log_gamma.sum()

    wanted = [
        min(1.0, math.exp(log_joint([1, 0, 2]) - log_joint([0, 1, 2]))),
        min(1.0, math.exp(log_joint([0, 2, 1]) - log_joint([0, 1, 2]))),
    ]
    assert torch.allclose(swap_probability(slope, betas), tensor(*wanted))


def test_swaps_without_density_are_refused():
    slope = tensor(-math.inf, 1.0, math.nan, 2.0)
    assert swap_probability(slope, tensor(0.0, 0.2, 0.6, 1.0)).tolist() == [0.0, 0.0, 0.0]
    assert swap_probability(tensor(-math.inf, -math.inf), tensor(0.0, 1.0)).tolist() == [0.0]


def test_respacing_equalizes_the_rejection():
    place = respace(tensor(0.0, 0.1, 0.5, 1.0), tensor(0.8, 0.1, 0.0))
    # Two thirds of 0.9 lie in the first interval, so both inner temperatures go there.
    assert torch.allclose(place, tensor(0.0, 0.3758, 0.7516, 3.0), atol=2e-3)
    assert torch.allclose(respace(tensor(0.0, 0.5, 1.0), tensor(0.4, 0.4)), tensor(0.0, 1.0, 2.0))


def test_every_level_keeps_its_law_at_bad_steps_and_temperatures():
    """After many scans from the reference every level has the moments of its tempered Gaussian."""
    path = make_path()
    run = parallel_tempering(
        path,
        ladder(0.0, 0.02, 0.7, 1.0, step_size=1.2),
        kernel=MALA(Euclidean(2)),
        num_scans=60,
        generator=generator(),
        num_systems=3000,
        tuning_rounds=0,
    )
    # log target - log reference of the last scan against exact draws of each level.
    for k, beta in enumerate(run.ladder.betas.tolist()):
        precision = (1 - beta) * 0.25 + beta / tensor(0.49, 1.44)
        mean = beta * tensor(1.0, -0.5) / tensor(0.49, 1.44) / precision
        x = mean + torch.randn(20_000, 2, generator=generator(k + 1), dtype=F64) / precision.sqrt()
        exact = path.target.log_prob(x) - path.reference.log_prob(x)
        got = run.slopes[:, -1, k]
        error = (got.var() / len(got) + exact.var() / len(exact)).sqrt()
        # 4 levels at 4.5 standard errors: 3e-5.
        assert abs(float((got.mean() - exact.mean()) / error)) < 4.5


def test_swaps_that_ignore_the_temperatures_fail(monkeypatch: pytest.MonkeyPatch):
    """Negative control: swaps with the wrong probability spoil the law at temperature 1."""
    module = __import__("diffsampler.parallel_tempering", fromlist=["x"])
    monkeypatch.setattr(module, "swap_probability", lambda slope, betas: torch.full_like(slope[:, 1:], 0.9))
    run = parallel_tempering(
        make_path(),
        ladder(0.0, 0.02, 0.7, 1.0),
        kernel=MALA(Euclidean(2)),
        num_scans=40,
        generator=generator(),
        num_systems=3000,
        tuning_rounds=0,
    )
    z = (run.x[:, -1] - tensor(1.0, -0.5)) / tensor(0.7, 1.2)
    second = z.square().mean(-1)
    assert abs(float((second.mean() - 1.0) / (second.std() / math.sqrt(len(second))))) > 6.0


def test_normalizer_is_consistent_at_a_bad_ladder():
    """The mean of 400 systems approaches Z as scans are added; within 4 standard errors (6e-5) at 200 scans."""
    errors = []
    for scans in (4, 200):
        run = parallel_tempering(
            make_path(),
            ladder(0.0, 0.3, 1.0),
            kernel=HMC(Euclidean(2), num_steps=3),
            num_scans=scans,
            generator=generator(),
            num_systems=400,
            tuning_rounds=3,
        )
        ratio = (run.log_normalizers - LOG_Z).exp()
        errors.append(float(ratio.std()))
        if scans == 200:
            assert abs(float(ratio.mean() - 1.0)) < 4.0 * float(ratio.std()) / math.sqrt(400)
    # The spread falls like one over the square root of the scans.
    assert 4.0 < errors[0] / errors[1] < 13.0


def test_tuning_equalizes_rejections_and_reaches_the_acceptance():
    sampler = ParallelTempering(targets.ManyWell(8), reference_scale=2.0, num_levels=6)
    run = sampler.run(32 * 200, seed=1)
    assert float(run.rejection.max() - run.rejection.min()) < 0.12
    assert float((run.acceptance[1:] - sampler.kernel.target_acceptance).abs().max()) < 0.08
    assert 1.0 < run.barrier < 4.0
    assert 0 < int(run.round_trips.sum()) < 1.3 * run.expected_round_trip_rate * 32 * 200
    assert sampler.evaluations >= run.evaluations


def test_round_trips_come_at_the_rate_of_the_theory():
    """With six moves between swaps replicas forget, and the rate is that of the rejections alone."""
    path = make_path()
    run = parallel_tempering(
        path,
        ladder(0.0, 0.05, 0.3, 1.0),
        kernel=HMC(Euclidean(2), num_steps=4),
        num_scans=200,
        generator=generator(),
        num_systems=100,
        tuning_rounds=5,
        num_moves=6,
    )
    rate = run.round_trips.double() / 200
    assert abs(float(rate.mean()) / run.expected_round_trip_rate - 1.0) < 0.12


def test_mode_weights_and_normalizer_of_nine_modes():
    target = targets.GaussianMixture.grid(9)
    particles = ParallelTempering(target, reference_scale=6.0, num_systems=32).sample(32 * 200, seed=0)
    shares = torch.nn.functional.one_hot(target.mode_labels(particles.x), 9).double()
    mean, error = particles.expectation(shares)
    # Student's t with 31 degrees of freedom: nine modes at 4.5 standard errors, 8e-4.
    assert float(((mean - target.mode_weights()) / error).abs().max()) < 4.5
    value, std_error, _ = particles.log_normalizer
    assert abs(value) < 4.0 * std_error
    assert std_error < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gmm40", "label_switching"])
def test_mode_weights_of_many_modes(name: str):
    """All of 40 and 24 modes within 4.5 standard errors, 128 systems: 3e-4; their mean square is that of chance."""
    target = targets.REGISTRY[name]()
    scale = 30.0 if name == "gmm40" else None
    particles = ParallelTempering(target, reference_scale=scale, num_systems=128).sample(128 * 250, seed=0)
    shares = torch.nn.functional.one_hot(target.mode_labels(particles.x), target.num_modes).double()
    mean, error = particles.expectation(shares)
    z = (mean - target.mode_weights()) / error
    assert float(z.abs().max()) < 4.5
    assert float(z.square().mean()) < 2.0
    value, std_error, _ = particles.log_normalizer
    assert abs(value - target.log_normalizer) < 4.0 * std_error < 0.2


def test_conformance_and_front_door():
    sampler = ParallelTempering(
        targets.Gaussian([0.4, -0.3], scale=[0.8, 1.1], log_normalizer=0.7), reference_scale=2.0
    )
    assert check_sampler(sampler) == ("seeds", "particles", "normalizer", "expectations")
    fit = ds.sample(sampler.target, method=sampler, num_samples=800, seed=0)
    assert fit.evaluations > 0
    assert abs(fit.log_normalizer.value - 0.7) < 5.0 * fit.log_normalizer.std_error
    assert len(fit.particles.log_replicates) == 32


def test_prior_with_bounded_support():
    prior = targets.Gaussian([0.0], scale=1.0)

    def half(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x[..., 0] > 0.0, -0.5 * x[..., 0].square(), -math.inf)

    target = FunctionTarget(half, Euclidean(1), prior=prior, log_normalizer=0.5 * math.log(math.pi / 2))
    run = ParallelTempering(target).run(32 * 200, seed=0)
    assert bool((run.x > 0.0).all())
    particles = to_particles(run)
    assert abs(particles.log_normalizer.value - 0.5 * math.log(math.pi / 2)) < 5.0 * particles.log_normalizer.std_error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_systems": 1}, "at least 2 systems"),
        ({"tuning_rounds": 0}, "tuning_rounds"),
        ({"num_moves": 0}, "num_moves"),
        ({"num_levels": 1}, "num_levels"),
        ({"kernel": ULA(Euclidean(2))}, "exact kernel"),
        ({"reference_scale": None}, "neither"),
    ],
)
def test_bad_options_are_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ParallelTempering(targets.GaussianMixture.grid(9), **({"reference_scale": 6.0} | change))


def test_bad_ladders_are_refused():
    for betas in ((0.0, 0.5), (0.1, 1.0), (0.0, 0.6, 0.5, 1.0)):
        with pytest.raises(ValueError, match="increase from 0 to 1"):
            parallel_tempering(
                make_path(), ladder(*betas), kernel=MALA(Euclidean(2)), num_scans=1, generator=generator()
            )
