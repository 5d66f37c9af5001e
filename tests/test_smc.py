"""Tempered SMC: unbiasedness of the frozen pass, its error bar, what it counts, and controls that must fail.

One frozen run with many islands is many independent estimates of Z from one schedule. Seeds are fixed; false-alarm
rates are stated.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffsampler import smc as smc_module
from diffsampler.baselines.smc import GaussianReference
from diffsampler.estimators import effective_sample_size
from diffsampler.kernels import HMC, MALA, ULA
from diffsampler.smc import Schedule, SMCResult, TemperedPath, smc
from diffsampler.space import Euclidean, MeanFree, Space, Torus
from diffsampler.target import CountedTarget, Target
from diffsampler.tempering import next_beta

F64 = torch.float64
PLANE = Euclidean(2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian_target() -> Target:
    """Correlated Gaussian off the centre with log Z = 1.3."""
    mean = torch.tensor([1.0, -2.0], dtype=F64)
    precision = torch.tensor([[4.0, -1.5], [-1.5, 1.0]], dtype=F64)
    constant = 1.3 - math.log(2.0 * math.pi) + 0.5 * float(torch.logdet(precision))

    def log_prob(x: Tensor) -> Tensor:
        delta = x - mean.to(x)
        return -0.5 * ((delta @ precision.to(x)) * delta).sum(-1) + constant

    return Target.from_log_prob(log_prob, dim=2, log_normalizer=1.3)


def bimodal_target() -> Target:
    """Two Gaussians of standard deviation 0.5, one with a quarter of the mass, log Z = -0.7."""
    means = torch.tensor([[3.0, 0.0], [-3.0, 1.0]], dtype=F64)
    log_weight = torch.tensor([0.25, 0.75], dtype=F64).log() - math.log(2.0 * math.pi * 0.25) - 0.7

    def log_prob(x: Tensor) -> Tensor:
        square = ((x.unsqueeze(-2) - means.to(x)) / 0.5).square().sum(-1)
        return torch.logsumexp(log_weight.to(x) - 0.5 * square, -1)

    return Target.from_log_prob(log_prob, dim=2, log_normalizer=-0.7)


TARGETS = {"gaussian": gaussian_target, "bimodal": bimodal_target}


def path_to(target: Target, scale: float = 4.0) -> TemperedPath:
    return TemperedPath(GaussianReference(target.space, scale=scale), target)


def deviation(values: Tensor, truth: float) -> float:
    return abs(float((values.mean() - truth) / (values.std() / math.sqrt(values.numel()))))


def relative_z(result: SMCResult, target: Target) -> Tensor:
    """Estimate over truth of each island."""
    return (result.particles.log_replicates - target.log_normalizer).exp()


class Bent:
    """x = (sinh z0, 2 z1 + z0^2 / 2)."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.stack([torch.sinh(z[..., 0]), 2.0 * z[..., 1] + 0.5 * z[..., 0].square()], -1)
        return x, torch.log(2.0 * torch.cosh(z[..., 0]))

    def inverse(self, x: Tensor) -> Tensor:
        first = torch.asinh(x[..., 0])
        return torch.stack([first, 0.5 * (x[..., 1] - 0.5 * first.square())], -1)


class BentWithoutVolume(Bent):
    """The same map with its volume forgotten."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = super().forward(z)
        return x, 0.0 * log_det


class PretendsToBeExact(ULA):
    """ULA whose path weight is dropped."""

    exact = True


# Unbiasedness

VARIANTS = {
    "hmc": {},
    "mala": {"kernel": MALA(PLANE)},
    "ula": {"kernel": ULA(PLANE), "step_size": 0.02, "num_moves": 2},
    "always": {"resample_below": 2.0},
    "never": {"resample_below": 0.0},
    "map": {"coordinates": Bent()},
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_frozen_pass_is_unbiased(name: str, variant: str):
    target, options = TARGETS[name](), VARIANTS[variant]
    first = smc(path_to(target), n=1024, num_islands=4, generator=generator(1), **options)
    result = smc(path_to(target), n=9600, num_islands=400, generator=generator(2), schedule=first.schedule, **options)
    assert result.finished and len(result.schedule) == len(first.schedule)
    # 4 standard errors of 400 islands: false alarm 6e-5 each, 12 cases.
    assert deviation(relative_z(result, target), 1.0) < 4.0


def frozen(target: Target, *, seed: int = 2, **options) -> SMCResult:
    first = smc(path_to(target), n=1024, num_islands=4, generator=generator(1), **options)
    return smc(path_to(target), n=9600, num_islands=400, generator=generator(seed), schedule=first.schedule, **options)


def test_forgetting_the_weights_when_resampling_is_biased(monkeypatch: pytest.MonkeyPatch):
    resample = smc_module._resample

    def forgetful(settings, population, log, *, decided):
        after = resample(settings, population, log, decided=decided)
        return after._replace(log_weight=torch.zeros_like(after.log_weight)) if log.resampled[-1] else after

    monkeypatch.setattr(smc_module, "_resample", forgetful)
    target = bimodal_target()
    assert deviation(relative_z(frozen(target), target), 1.0) > 10.0


def test_dropping_the_path_weight_of_an_unadjusted_kernel_is_biased():
    target = gaussian_target()
    options = {"step_size": 0.3, "num_moves": 3}
    # The step size of this control is large, so that the target's variance is visibly wrong at every temperature.
    result = frozen(target, kernel=PretendsToBeExact(PLANE), **options)
    assert deviation(relative_z(result, target), 1.0) > 8.0


def test_forgetting_the_volume_of_the_map_is_biased():
    target = gaussian_target()
    assert deviation(relative_z(frozen(target, coordinates=BentWithoutVolume()), target), 1.0) > 8.0


@pytest.mark.parametrize("name", TARGETS)
def test_moments(name: str):
    target = TARGETS[name]()
    result = smc(path_to(target), n=4096, generator=generator(4), two_pass=True)
    mean, error = result.particles.expectation(result.particles.x)
    truth = {"gaussian": [1.0, -2.0], "bimodal": [-1.5, 0.75]}[name]
    # 16 islands, two coordinates; t with 15 degrees of freedom at 5: false alarm 3e-4.
    assert bool(((mean - torch.tensor(truth, dtype=F64)).abs() < 5.0 * error).all())
    assert float(error.max()) < 0.2


def test_island_error_bar_covers():
    target, hits, count = bimodal_target(), 0, 40
    schedule = smc(path_to(target), n=1024, num_islands=4, generator=generator(1)).schedule
    for seed in range(count):
        result = smc(path_to(target), n=512, generator=generator(100 + seed), schedule=schedule)
        estimate = result.particles.log_normalizer
        assert estimate.kind == "replicates"
        # 95 % interval of Student's t with 15 degrees of freedom.
        hits += abs(estimate.value - target.log_normalizer) < 2.131 * estimate.std_error
    # Binomial(40, 0.95): below 32 with probability 2e-4.
    assert hits >= 32


def test_jumps_of_thousands_of_scales():
    # A reference 1e4 times too wide in every direction, and a target that is thin in one of them.
    scale = torch.tensor([1e-2, 10.0], dtype=F64)
    target = Target.from_log_prob(
        lambda x: -0.5 * (x / scale).square().sum(-1) - scale.log().sum() - math.log(2.0 * math.pi), dim=2
    )
    result = smc(path_to(target, 1e3), n=2048, generator=generator(0), two_pass=True)
    estimate = result.particles.log_normalizer
    # t with 15 degrees of freedom at 5: false alarm 2e-4.
    assert abs(estimate.value) < 5.0 * estimate.std_error and estimate.std_error < 0.2


# Spaces and dtypes


@pytest.mark.parametrize("kernel", [HMC, MALA])
def test_mean_free(kernel: type):
    space = MeanFree(3, 2)
    target = Target.from_log_prob(lambda x: -2.0 * x.square().sum(-1), space=space)
    result = smc(path_to(target, 2.0), n=2048, generator=generator(1), kernel=kernel(space), two_pass=True)
    assert float(result.particles.x.unflatten(-1, (3, 2)).mean(-2).abs().max()) < 1e-12
    estimate = result.particles.log_normalizer
    # Four degrees of freedom of variance 1/4; t(15) at 5: false alarm 2e-4.
    assert abs(estimate.value - 2.0 * math.log(2.0 * math.pi / 4.0)) < 5.0 * estimate.std_error


@pytest.mark.parametrize("kernel", [HMC, MALA])
def test_torus(kernel: type):
    space = Torus(2)
    target = Target.from_log_prob(lambda x: 3.0 * torch.cos(x).sum(-1), space=space)
    result = smc(path_to(target, 8.0), n=2048, generator=generator(1), kernel=kernel(space), two_pass=True)
    assert float(result.particles.x.abs().max()) <= math.pi
    truth = 2.0 * math.log(2.0 * math.pi * float(torch.special.i0(torch.tensor(3.0, dtype=F64))))
    estimate = result.particles.log_normalizer
    # t(15) at 5: false alarm 2e-4.
    assert abs(estimate.value - truth) < 5.0 * estimate.std_error


@pytest.mark.parametrize("coordinates", [None, Bent()])
def test_float32(coordinates: Bent | None):
    target = bimodal_target()
    result = smc(path_to(target), n=1024, generator=generator(1), dtype=torch.float32, coordinates=coordinates)
    assert result.particles.x.dtype == result.z.dtype == torch.float32
    assert result.particles.log_weight.dtype == result.log_target.dtype == F64
    assert abs(result.particles.log_normalizer.value - target.log_normalizer) < 0.5


# Bookkeeping


@pytest.mark.parametrize("coordinates", [None, Bent()])
@pytest.mark.parametrize("kernel", [HMC(PLANE, num_steps=3), MALA(PLANE)])
def test_what_is_carried_along_is_what_would_be_evaluated(coordinates: Bent | None, kernel):
    target = bimodal_target()
    counted = CountedTarget(target)
    result = smc(path_to(counted), n=512, generator=generator(1), kernel=kernel, coordinates=coordinates, two_pass=True)
    assert result.evaluations == counted.evaluations
    assert torch.allclose(result.log_target, target.log_prob(result.particles.x), rtol=1e-12)
    if coordinates is not None:
        assert torch.allclose(coordinates.forward(result.z)[0], result.particles.x, rtol=1e-12)


def test_density_is_the_path_in_move_coordinates():
    target, bent = bimodal_target(), Bent()
    path = path_to(target)
    z = torch.randn(20, 2, generator=generator(), dtype=F64)
    for beta in (0.0, 0.3, 1.0):
        leaf = z.clone().requires_grad_()
        x, log_det = bent.forward(leaf)
        expected = (1.0 - beta) * path.reference.log_prob(x) + beta * target.log_prob(x) + log_det
        (gradient,) = torch.autograd.grad(expected.sum(), leaf)
        log_prob, score = path.density(beta, coordinates=bent)(z)
        assert torch.allclose(log_prob, expected.detach()) and torch.allclose(score, gradient)


def test_a_kernel_that_ends_elsewhere_than_at_its_last_evaluation_is_served():
    path = path_to(bimodal_target())
    density = path.density(0.5)
    x = torch.randn(10, 2, generator=generator(), dtype=F64)
    before = path.evaluate(x, x)
    middle = density(x + 1.0)
    density(x + 2.0)
    after = density.points(density.state(path.evaluate(x + 1.0, x + 1.0)), before)
    assert torch.equal(after.x, x + 1.0)
    assert torch.allclose(density.state(after).log_prob, middle[0])


def test_next_beta_meets_its_fraction():
    log_weight, slope = torch.randn(2, 500, generator=generator(), dtype=F64)
    slope = 30.0 * slope
    beta = next_beta(log_weight, slope, 0.1, 0.6)
    weight, increment = torch.softmax(log_weight, 0), ((beta - 0.1) * slope).exp()
    cess = float((weight * increment).sum() ** 2 / (weight * increment.square()).sum())
    assert 0.1 < beta < 1.0 and abs(cess - 0.6) < 1e-6
    assert next_beta(log_weight, 1e-6 * slope, 0.1, 0.6) == 1.0
    # Half of the points outside the target's support must not stop the path.
    slope[:250] = -math.inf
    assert next_beta(log_weight, slope, 0.1, 0.9) > 0.1


def test_same_seed_same_numbers():
    path = path_to(bimodal_target())
    first, again, other = (smc(path, n=256, generator=generator(seed), two_pass=True) for seed in (3, 3, 4))
    assert torch.equal(first.particles.x, again.particles.x)
    assert torch.equal(first.particles.log_weight, again.particles.log_weight)
    assert not torch.equal(first.particles.x, other.particles.x)
    assert first.adaptive is not None and first.adaptive.schedule.betas == first.schedule.betas
    assert first.schedule.step_sizes == pytest.approx(first.adaptive.schedule.step_sizes)


def test_ancestors_stay_on_their_island():
    result = smc(path_to(bimodal_target()), n=640, num_islands=10, generator=generator(1))
    assert torch.equal(result.ancestors // 64, torch.arange(640) // 64)
    assert result.effective_ancestors.shape == (10,)
    assert bool((result.effective_ancestors > 1.0).all()) and bool((result.effective_ancestors < 64.0).all())
    without = smc(path_to(bimodal_target()), n=640, num_islands=1, generator=generator(1), resample_below=0.0)
    assert torch.equal(without.ancestors, torch.arange(640))
    assert float(without.effective_ancestors) == pytest.approx(effective_sample_size(without.particles.log_weight))


def test_stop_ends_between_temperatures():
    betas: list[float] = []
    path = path_to(bimodal_target())
    result = smc(path, n=256, generator=generator(1), progress=betas.append, stop=lambda: len(betas) == 2)
    assert not result.finished and result.beta == betas[-1] < 1.0 and len(result.schedule) == 2
    at_once = smc(path, n=256, generator=generator(1), stop=lambda: True, two_pass=True)
    assert at_once.beta == 0.0 and float(at_once.particles.log_weight.abs().max()) == 0.0
    with pytest.raises(ValueError, match="Expected a schedule that ends at temperature 1; got an unfinished one"):
        smc(path, n=256, generator=generator(1), schedule=result.schedule)


def test_non_finite_densities_are_counted_and_weigh_nothing():
    base = gaussian_target()

    def holed(x: Tensor) -> Tensor:
        return torch.where(x[..., 0] > 2.0, torch.full_like(x[..., 0], math.nan), base.log_prob(x))

    target = Target.from_log_prob(holed, dim=2)
    result = smc(path_to(target), n=1024, generator=generator(1), two_pass=True)
    assert result.particles.nonfinite > 100 and result.nonfinite > result.particles.nonfinite
    alive = result.particles.log_weight.isfinite()
    assert bool((result.particles.x[alive, 0] <= 2.0).all()) and bool(result.particles.x.isfinite().all())
    # The mass of the holed Gaussian, standard deviation of x0 from its covariance; 5 island errors: false alarm 2e-4.
    sd = math.sqrt(1.0 / (4.0 * 1.0 - 1.5**2))
    mass = float(torch.special.ndtr(torch.tensor(1.0 / sd, dtype=F64)))
    estimate = result.particles.log_normalizer
    assert abs(estimate.value - 1.3 - math.log(mass)) < 5.0 * estimate.std_error


def test_bounded_support():
    target = Target.from_log_prob(
        lambda x: torch.where((x.abs() < 0.5).all(-1), 0.0 * x.sum(-1), torch.full_like(x[..., 0], -math.inf)), dim=2
    )
    result = smc(path_to(target, 1.0), n=4096, generator=generator(1), two_pass=True)
    assert result.nonfinite == 0 and result.finished
    estimate = result.particles.log_normalizer
    # t(15) at 5: false alarm 2e-4.
    assert abs(estimate.value) < 5.0 * estimate.std_error


class NoSampler(Target):
    def __init__(self, space: Space, *, has_sampler: bool = False) -> None:
        super().__init__(space, has_sampler=has_sampler)

    def log_prob(self, x: Tensor) -> Tensor:
        return -x.square().sum(-1)


def test_bad_arguments_are_refused():
    target = gaussian_target()
    path = path_to(target)
    cases = [
        ({"n": 100}, r"Expected n to be a multiple of num_islands=16, at least twice it; got 100"),
        ({"n": 64, "conditional_ess": 1.0}, r"Expected conditional_ess in \(0, 1\); got 1.0"),
        ({"n": 64, "num_moves": 0}, "Expected num_moves to be a positive integer; got 0"),
        ({"n": 64, "max_moves": 1}, "Expected max_moves to be at least 2; got 1"),
        ({"n": 64, "step_size": -1.0}, "Expected step_size to be positive; got -1.0"),
        ({"n": 64, "kernel": ULA(PLANE)}, "Expected step_size and num_moves with the unadjusted kernel ULA; got None"),
        ({"n": 64, "schedule": Schedule((1.0,)), "two_pass": True}, "Expected at most one of schedule and two_pass"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            smc(path, generator=generator(), **options)
    with pytest.raises(ValueError, match="Expected a reference with an exact sampler; got FunctionTarget"):
        TemperedPath(target, target)
    with pytest.raises(ValueError, match="Expected a reference with a declared log_normalizer; got None"):
        TemperedPath(NoSampler(PLANE, has_sampler=True), target)
    with pytest.raises(ValueError, match="Expected reference and target on the same space"):
        TemperedPath(GaussianReference(Euclidean(3), scale=1.0), target)
    with pytest.raises(
        ValueError, match="Expected a finite target density at some of the 64 reference draws; got none"
    ):
        nowhere = Target.from_log_prob(lambda x: x[..., 0] * math.nan, dim=2)
        smc(path_to(nowhere), n=64, generator=generator())


@pytest.mark.parametrize("spent", [0.8, 1.0, 5.0])
def test_a_pass_short_of_budget_is_coarse_but_finished(spent: float) -> None:
    path = TemperedPath(GaussianReference(PLANE, scale=20.0), gaussian_target())
    calm = smc(path, n=256, num_islands=4, generator=generator(), pace=lambda: 0.5)
    free = smc(path, n=256, num_islands=4, generator=generator())
    assert torch.equal(calm.particles.x, free.particles.x)
    hurried = smc(path, n=256, num_islands=4, generator=generator(), pace=lambda: spent)
    assert hurried.finished
    assert hurried.evaluations < free.evaluations
    assert len(hurried.schedule) == 1 if spent >= 1.0 else len(hurried.schedule) < len(free.schedule)
