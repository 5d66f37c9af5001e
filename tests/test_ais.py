"""Annealed importance sampling and waste-free SMC: unbiased at bad schedules, error bars, options."""

from __future__ import annotations

import math

import pytest
import torch
from cases import crossing, deviation

import diffsampler as ds
from diffsampler import targets
from diffsampler.annealing import anneal, linear_betas, sigmoid_betas, tune_schedule
from diffsampler.baselines.ais import AIS
from diffsampler.baselines.smc import SMC, WasteFreeSMC
from diffsampler.kernel import Kernel, KernelParams
from diffsampler.kernels import HMC, MALA, ULA, RandomWalk
from diffsampler.space import Euclidean
from diffsampler.target import FunctionTarget
from diffsampler.tempering import Schedule, TemperedPath
from diffsampler.testing import check_sampler
from diffsampler.wastefree import waste_free_smc

F64 = torch.float64
LOG_Z = math.log(0.5)


def make_path(dim: int = 2) -> TemperedPath:
    reference = targets.Gaussian([0.0] * dim, scale=2.0)
    target = targets.Gaussian([1.0, -0.5][:dim], scale=[0.7, 1.2][:dim], log_normalizer=LOG_Z)
    return TemperedPath(reference, target)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def params(step_size: float) -> KernelParams:
    return KernelParams(torch.tensor(step_size, dtype=F64), torch.ones(1, dtype=F64))


# Step sizes far from good ones and as few as two temperatures: the weights must not care. (Jittered lengths are shared
# by all particles, so that both directions would need the same ones for an identity between single runs.)
BAD = {
    "mala-tiny": (MALA(Euclidean(2)), 1e-3, linear_betas(2)),
    "mala-huge": (MALA(Euclidean(2)), 1.5, linear_betas(4)),
    "hmc": (HMC(Euclidean(2), num_steps=3, jitter_steps=False), 1.0, sigmoid_betas(5)),
    "hmc-skewed": (HMC(Euclidean(2), num_steps=3, jitter_steps=False), 0.3, (0.9, 0.95, 1.0)),
    "ula": (ULA(Euclidean(2)), 0.1, linear_betas(6)),
}


@pytest.mark.parametrize("name", BAD)
def test_weights_are_unbiased_in_both_directions(name: str):
    kernel, step_size, betas = BAD[name]
    path = make_path()
    x0 = path.reference.sample(100_000, generator=generator())
    ahead = anneal(path, betas, kernel, params(step_size), x0, generator(1), num_moves=2)
    x1 = path.target.sample(100_000, generator=generator(2))
    back = anneal(path, betas, kernel, params(step_size), x1, generator(3), reverse=True, num_moves=2)
    # Five standard errors: 6e-7 each.
    assert abs(deviation(ahead.log_weight.exp() / 0.5, 1.0)) < 5.0
    # 1 / w has infinite variance at some of these schedules; Bennett's identity is bounded.
    assert abs(crossing(ahead.log_weight - LOG_Z, back.log_weight - LOG_Z)) < 5.0
    assert float(ahead.log_weight.mean()) < LOG_Z < float(back.log_weight.mean())
    # The weighted end points follow the target.
    first = (ahead.log_weight.exp() / 0.5) * (ahead.x[:, 0] - 1.0)
    assert abs(deviation(first, 0.0)) < 5.0


def test_unadjusted_kernel_without_its_ratio_fails():
    """Negative control: leaving out the transition ratio of ULA is an error the test above would see."""
    path = make_path()
    kernel = ULA(Euclidean(2))
    kernel.exact = True
    x0 = path.reference.sample(100_000, generator=generator())
    result = anneal(path, linear_betas(6), kernel, params(0.3), x0, generator(1), num_moves=2)
    assert abs(deviation(result.log_weight.exp() / 0.5, 1.0)) > 6.0


def test_evaluations_are_counted_and_nothing_is_evaluated_twice():
    path = make_path()
    x0 = path.reference.sample(100, generator=generator())
    for reverse in (False, True):
        result = anneal(path, linear_betas(5), MALA(Euclidean(2)), params(0.1), x0, generator(), reverse=reverse)
        assert result.evaluations == 100 * 6
        assert len(result.acceptance) == 5
        assert result.nonfinite == 0


def test_points_outside_the_support_have_weight_zero():
    reference = targets.Gaussian([0.0], scale=1.0)

    def half(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x[..., 0] > 0.0, -0.5 * x[..., 0].square(), -math.inf)

    path = TemperedPath(reference, FunctionTarget(half, Euclidean(1), log_normalizer=0.5 * math.log(math.pi / 2)))
    x0 = reference.sample(50_000, generator=generator())
    result = anneal(path, linear_betas(3), MALA(Euclidean(1)), params(0.3), x0, generator(1))
    assert bool((result.log_weight.isneginf() == (x0[:, 0] <= 0.0)).all())
    assert abs(deviation(result.log_weight.exp(), math.sqrt(math.pi / 2))) < 5.0


def test_tuned_schedule_reaches_the_acceptance():
    path = make_path()
    kernel: Kernel = MALA(Euclidean(2))
    betas = linear_betas(12)
    schedule = tune_schedule(path, betas, kernel, n=512, generator=generator(), num_moves=6)
    each = [
        KernelParams(torch.tensor(h, dtype=F64), s) for h, s in zip(schedule.step_sizes, schedule.scales, strict=True)
    ]
    x0 = path.reference.sample(4000, generator=generator(1))
    result = anneal(path, betas, kernel, each, x0, generator(2))
    assert all(abs(a - kernel.target_acceptance) < 0.15 for a in result.acceptance[2:])


def test_schedules_increase_to_one():
    for betas in (linear_betas(7), sigmoid_betas(7), sigmoid_betas(1), sigmoid_betas(9, sharpness=8.0)):
        assert betas[-1] == 1.0
        assert all(a < b for a, b in zip((0.0, *betas[:-1]), betas, strict=True))
    middle = sigmoid_betas(8)[3]
    assert abs(middle - 0.5) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"betas": (0.5, 0.4, 1.0)}, "increase"),
        ({"betas": (0.5, 0.9)}, "exactly 1"),
        ({"betas": ()}, "exactly 1"),
        ({"params": [params(0.1)]}, "for each of 4"),
        ({"num_moves": [1, 2]}, "for each of 4"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str):
    path = make_path()
    x0 = path.reference.sample(10, generator=generator())
    arguments = {"betas": linear_betas(4), "params": params(0.1), "num_moves": 1} | change
    betas, each = arguments.pop("betas"), arguments.pop("params")
    with pytest.raises(ValueError, match=message):
        anneal(path, betas, MALA(Euclidean(2)), each, x0, generator(), **arguments)


def test_bad_schedules_are_refused():
    with pytest.raises(ValueError, match="positive integer"):
        linear_betas(0)
    with pytest.raises(ValueError, match="sharpness"):
        sigmoid_betas(3, sharpness=0.0)
    with pytest.raises(ValueError, match="exact kernel"):
        tune_schedule(make_path(), linear_betas(3), ULA(Euclidean(2)), n=10, generator=generator())


def gaussian() -> targets.Gaussian:
    return targets.Gaussian([0.4, -0.3], scale=[0.8, 1.1], log_normalizer=0.7)


SAMPLERS = {
    "default": lambda t: AIS(t, reference_scale=2.0),
    "linear": lambda t: AIS(t, reference_scale=2.0, betas=linear_betas(12), kernel=MALA(t.space)),
    "unadjusted": lambda t: AIS(
        t, reference_scale=2.0, betas=sigmoid_betas(12), kernel=ULA(t.space), step_size=0.02, num_moves=2
    ),
    "smc walk": lambda t: SMC(t, reference_scale=2.0, kernel=RandomWalk(t.space)),
    "smc mala": lambda t: SMC(t, reference_scale=2.0, kernel=MALA(t.space)),
    "waste-free": lambda t: WasteFreeSMC(t, reference_scale=2.0),
    "waste-free walk": lambda t: WasteFreeSMC(t, reference_scale=2.0, kernel=RandomWalk(t.space), chain_length=16),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_conform_and_fit(name: str):
    sampler = SAMPLERS[name](gaussian())
    assert {"normalizer", "expectations"} <= set(check_sampler(sampler, n=1024))
    fit = ds.sample(sampler.target, method=SAMPLERS[name](sampler.target), num_samples=1000, seed=3)
    # Five standard errors of Student's t with 15 degrees of freedom: 2e-4.
    assert abs(fit.log_normalizer.value - 0.7) < 5.0 * fit.log_normalizer.std_error
    assert fit.evaluations > 1000


@pytest.mark.parametrize("betas", [(0.05, 1.0), (0.5, 0.6, 1.0), (1.0,)])
@pytest.mark.parametrize("step_size", [1e-3, 1.5])
def test_frozen_waste_free_smc_is_unbiased(betas: tuple[float, ...], step_size: float):
    """1,000 islands of 24 particles at bad schedules: E[Zhat] = Z within 4 standard errors (6e-5 each)."""
    count = len(betas)
    scale = torch.ones(1, dtype=F64)
    schedule = Schedule(betas, (step_size,) * count, (scale,) * count, (3,) * count, (True,) * count)
    run = waste_free_smc(
        make_path(),
        kernel=MALA(Euclidean(2)),
        num_chains=6,
        chain_length=4,
        num_islands=1000,
        schedule=schedule,
        generator=generator(5),
    )
    ratio = (run.particles.log_replicates - LOG_Z).exp()
    assert abs(deviation(ratio, 1.0)) < 4.0
    weight = (run.particles.log_weight - LOG_Z).exp().reshape(1000, -1)
    first = (weight * (run.particles.x[:, 0] - 1.0).reshape(1000, -1)).mean(-1)
    assert abs(deviation(first, 0.0)) < 4.0


def test_waste_free_smc_that_forgets_ratios_fails():
    """Negative control: an unadjusted kernel passed off as exact shifts the estimate."""
    kernel = ULA(Euclidean(2))
    kernel.exact = True
    scale = torch.ones(1, dtype=F64)
    schedule = Schedule((0.3, 1.0), (0.3,) * 2, (scale,) * 2, (15,) * 2, (True,) * 2)
    run = waste_free_smc(
        make_path(),
        kernel=kernel,
        num_chains=8,
        chain_length=16,
        num_islands=1000,
        schedule=schedule,
        generator=generator(5),
    )
    second = ((run.particles.x - torch.tensor([1.0, -0.5])) / torch.tensor([0.7, 1.2])).square().mean(-1)
    assert abs(deviation(second.reshape(1000, -1).mean(-1), 1.0)) > 6.0


@pytest.mark.slow
@pytest.mark.parametrize("build", [SMC, WasteFreeSMC], ids=["smc", "waste-free"])
def test_error_bars_cover_on_label_switching(build: type):
    """50 whole runs, adaptive pass included: 24 modes each, and the interval covers in at least 90 %.

    A nominal coverage of 95 % falls below 43 of 50 with probability 4e-3; 42 are asked for.
    """
    target = targets.LabelSwitching()
    limit = 2.131  # Student's t with 15 degrees of freedom
    covered = 0
    for seed in range(50):
        particles = build(target).sample(16 * 256, seed=seed)
        value, error, _ = particles.log_normalizer
        covered += abs(value - target.log_normalizer) < limit * error
        assert abs(value - target.log_normalizer) < 0.2
        assert len(torch.unique(target.mode_labels(particles.x))) == 24
    assert covered >= 42


def test_chain_variance_agrees_with_the_islands():
    """One island's own variance estimate is that of 200 islands within a third, where chains mix."""
    run = waste_free_smc(
        make_path(),
        kernel=HMC(Euclidean(2), num_steps=4),
        num_chains=32,
        chain_length=16,
        num_islands=200,
        generator=generator(1),
        two_pass=True,
    )
    spread = float(run.particles.log_replicates.var())
    assert 0.67 < float(run.chain_variance.mean()) / spread < 1.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": ULA(Euclidean(2))}, "exact kernel"),
        ({"num_chains": 1}, "num_chains"),
        ({"chain_length": 1}, "chain_length"),
        ({"num_islands": 0}, "num_islands"),
        ({"conditional_ess": 1.0}, "conditional_ess"),
        ({"schedule": Schedule()}, "ends at temperature 1"),
    ],
)
def test_waste_free_options_are_checked(change: dict, message: str):
    options = {"kernel": MALA(Euclidean(2)), "num_chains": 4, "chain_length": 4} | change
    with pytest.raises(ValueError, match=message):
        waste_free_smc(make_path(), generator=generator(), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": ULA(Euclidean(2))}, "step_size and betas"),
        ({"step_size": 0.1}, "Expected betas"),
        ({"betas": (0.5,)}, "exactly 1"),
        ({"num_moves": 0}, "num_moves"),
        ({"reference_scale": None}, "neither"),
    ],
)
def test_ais_options_are_checked(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        AIS(gaussian(), **({"reference_scale": 2.0} | change))
