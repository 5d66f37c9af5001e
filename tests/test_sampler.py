"""Learned samplers end to end, and the suites of samplers and kernels with controls that must fail."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import F64, HyperplaneGaussian, VonMises, deviation, gaussian, mixture
from torch import Tensor

from diffsampler import baselines
from diffsampler.estimators import effective_sample_size, log_mean_exp
from diffsampler.kernel import Info, Kernel, KernelParams, LogDensity, State
from diffsampler.kernels import HMC, MALA, ULA
from diffsampler.methods.cmcd import CMCD
from diffsampler.methods.dds import DDS, DDSProcess
from diffsampler.methods.dis import DIS
from diffsampler.methods.pis import PIS
from diffsampler.objective import LogVariance, ReverseKL
from diffsampler.particles import Particles
from diffsampler.sampler import DiffusionSampler, Sampler
from diffsampler.schedule import cosine_preserving, variance_exploding
from diffsampler.space import Euclidean, MeanFree, Torus
from diffsampler.target import Target
from diffsampler.testing import check_kernel, check_sampler

METHODS: dict[str, Callable[[Target], DiffusionSampler]] = {
    "pis": lambda target: PIS(target, num_steps=8, scale=1.5, width=16),
    "dds": lambda target: DDS(target, num_steps=8, scale=1.4, width=16),
    "dis": lambda target: DIS(target, num_steps=8, scale=1.3, width=16, point_features=8),
    "cmcd": lambda target: CMCD(target, num_steps=8, scale=1.3, width=16),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Randomness


@pytest.mark.parametrize("method", METHODS)
def test_the_global_generator_is_left_alone_and_seeds_decide(method: str):
    before = torch.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        model = METHODS[method](mixture()).fit(steps=3, batch_size=8, seed=seed)
        runs.append(model.sample(20, seed=seed))
    model.eubo(10, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(runs[0].x, runs[1].x) and torch.equal(runs[0].log_weight, runs[1].log_weight)
    assert not torch.equal(runs[0].x, runs[2].x)


def test_the_global_seed_does_not_matter():
    draws = []
    state = torch.get_rng_state()
    for seed in (1, 2):
        torch.manual_seed(seed)
        draws.append(METHODS["dds"](mixture()).fit(steps=3, batch_size=8).sample(9).x)
    torch.set_rng_state(state)
    assert torch.equal(draws[0], draws[1])


# Draws


@pytest.mark.parametrize("method", METHODS)
def test_trained_samplers_conform(method: str):
    model = METHODS[method](mixture()).fit(steps=40, batch_size=64, learning_rate=1e-2)
    done = check_sampler(model, n=4096)
    assert {"seeds", "particles", "normalizer", "expectations"} == set(done)


@pytest.mark.parametrize("target", [HyperplaneGaussian(4, 2), VonMises(2)], ids=["mean free", "torus"])
@pytest.mark.parametrize("method", ["cmcd", "dis"])
def test_samplers_conform_on_other_spaces(target: Target, method: str):
    if method == "dis" and isinstance(target.space, Torus):
        schedule = variance_exploding(8, noise_min=0.3, noise_max=4.0)
        model = DIS(target, num_steps=8, schedule=schedule, width=16, point_features=0)
    else:
        model = METHODS[method](target)
    check_sampler(model.fit(steps=60, batch_size=64, learning_rate=1e-2), n=4096)


def test_bounds_enclose_the_normalizer():
    model = METHODS["dds"](gaussian()).fit(steps=20, batch_size=64, learning_rate=1e-2)
    particles, upper = model.sample(4000), model.eubo(4000)
    assert particles.elbo < 0.7 < upper.value
    # 4 standard errors, false alarm 6e-5.
    assert abs(particles.log_normalizer.value - 0.7) < 4.0 * particles.log_normalizer.std_error
    assert upper.kind == "upper bound"


def test_double_precision_throughout():
    model = METHODS["cmcd"](mixture()).to(dtype=F64)
    particles = model.fit(steps=2, batch_size=8).sample(5)
    assert particles.x.dtype == particles.log_weight.dtype == F64
    assert METHODS["cmcd"](mixture()).sample(5).x.dtype == torch.float32
    assert METHODS["cmcd"](mixture()).sample(5).log_weight.dtype == F64


def test_large_requests_are_drawn_in_batches(monkeypatch: pytest.MonkeyPatch):
    model = METHODS["dds"](mixture())
    assert model._batches(100) == [100]
    monkeypatch.setattr("diffsampler.sampler.STATES_PER_BATCH", 9 * 2 * 30)
    assert model._batches(100) == [30, 30, 30, 10]
    particles = model.sample(100)
    assert len(particles) == 100 and len(particles.x.unique(dim=0)) == 100
    assert model.backward_log_weight(70).shape == (70,)


def test_evaluations_are_counted():
    model = METHODS["dds"](mixture())
    assert model.evaluations == 0
    model.sample(10)
    assert model.evaluations == 90
    model.fit(steps=2, batch_size=4)
    assert model.evaluations == 90 + 2 * 4 * 9
    model.eubo(5)
    assert model.evaluations == 162 + 45


# Lost particles


class Leaky(Target):
    """A standard Gaussian whose density is not a number beyond x = 2; its score is finite everywhere."""

    def __init__(self, bad: float = math.nan) -> None:
        super().__init__(Euclidean(1))
        self.bad = bad

    def log_prob(self, x: Tensor) -> Tensor:
        log_prob = -0.5 * x.square().sum(-1) - 0.5 * math.log(2.0 * math.pi)
        return log_prob.masked_fill(x[..., 0] > 2.0, self.bad)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.log_prob(x), -x


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["pis", "dds", "dis", "cmcd"])
def test_lost_particles_count_as_zero_weights(method: str, bad: float):
    particles = METHODS[method](Leaky(bad)).sample(20000, seed=2)
    assert particles.nonfinite > 20 and len(particles) + particles.nonfinite == 20000
    assert bool(particles.x.isfinite().all()) and bool(particles.log_weight.isfinite().all())
    weight = torch.cat(
        [(particles.log_weight - math.log(len(particles) / 20000)).exp(), torch.zeros(particles.nonfinite)]
    )
    mass = 0.5 * (1.0 + math.erf(2.0 / math.sqrt(2.0)))
    # 4 standard errors, false alarm 6e-5; without the shift the mean would be off by the lost share.
    assert abs(deviation(weight, mass)) < 4.0
    assert log_mean_exp(particles.log_weight) == pytest.approx(math.log(float(weight.mean())), abs=1e-9)
    assert particles.nonfinite > 20 * 0.02 * 4


def test_points_outside_the_support_are_not_lost():
    particles = METHODS["dds"](Leaky(-math.inf)).sample(5000)
    assert particles.nonfinite == 0 and len(particles) == 5000
    outside = particles.x[:, 0] > 2.0
    assert bool(outside.any()) and bool((particles.log_weight[outside] == -math.inf).all())


def test_nothing_left_is_an_error():
    broken = Target.from_log_prob(lambda x: math.nan * x.sum(-1), dim=2)
    with pytest.raises(RuntimeError, match="All particles are non-finite"):
        METHODS["dds"](broken).sample(10)


# Input


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="Expected n >= 1; got 0"):
        METHODS["dds"](mixture()).sample(0)
    with pytest.raises(
        ValueError, match=r"Expected a process on Euclidean\(dim=2, dof=2\); got one on Euclidean\(dim=3"
    ):
        DiffusionSampler(mixture(), DDSProcess(Euclidean(3), cosine_preserving(4)))
    with pytest.raises(ValueError, match="Expected batch_size >= 2"):
        METHODS["dds"](mixture()).fit(steps=1, batch_size=1)
    unknown = Target.from_log_prob(lambda x: -x.square().sum(-1), dim=2)
    with pytest.raises(NotImplementedError, match="has no exact sampler"):
        METHODS["dds"](unknown).eubo(10)


def test_defaults():
    assert isinstance(METHODS["dds"](mixture()).objective, LogVariance)
    assert isinstance(DDS(mixture(), objective=ReverseKL()).objective, ReverseKL)
    assert METHODS["dds"](mixture()).history == []
    with pytest.raises(TypeError, match="abstract"):
        Sampler()


# The suite of samplers finds faults


class Faulty(Sampler):
    """Self-normalized importance sampling of the mixture from a wide Gaussian, with a fault."""

    def __init__(self, fault: str) -> None:
        self.target = mixture()
        self.fault = fault
        self.calls = 0

    def sample(self, n: int, *, seed: int = 0) -> Particles:
        self.calls += 1
        random = generator(0 if self.fault == "constant seed" else seed)
        if self.fault == "unseeded":
            random = generator(self.calls)
        if self.fault == "global generator":
            torch.rand(1)
        n = n // 2 if self.fault == "few" else n
        z = torch.randn(n, 2, generator=random, dtype=F64)
        x = 1.5 * z
        proposal = -0.5 * z.square().sum(-1) - math.log(2.0 * math.pi * 1.5**2)
        log_weight = self.target.log_prob(x) - proposal
        match self.fault:
            case "normalizer":
                log_weight = log_weight + 0.3
            case "law":
                log_weight = log_weight + 0.3 * x[:, 0]
                log_weight = log_weight - log_mean_exp(log_weight)
            case "nan":
                log_weight[3] = math.nan
            case "points":
                x[3] = math.inf
            case "graph":
                x = x.requires_grad_()
        return Particles(x, log_weight)


FAULTS = {
    "constant seed": "Expected other seeds to give other particles",
    "unseeded": "Expected equal seeds to give equal particles",
    "global generator": "the global one moved",
    "few": "Expected at least 4096 particles",
    "normalizer": "Expected log Z = 0; got",
    "law": "Expected weighted particles to follow the target",
    "nan": "Expected log weights below infinity; got 1",
    "points": "Expected finite points where weights are positive",
    "graph": "Expected particles without a graph",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_suite_of_samplers_finds(fault: str):
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        check_sampler(Faulty(fault))


def test_suite_of_samplers_accepts_the_control_without_a_fault():
    done = check_sampler(Faulty("none"))
    assert "normalizer" in done and "expectations" in done


CLASSICAL: dict[str, Callable[[Target], Sampler]] = {
    "smc": lambda target: baselines.SMC(target, reference_scale=2.0),
    "mala": baselines.MALA,
    "hmc": baselines.HMC,
}


@pytest.mark.parametrize("method", CLASSICAL)
def test_classical_samplers_conform(method: str):
    done = check_sampler(CLASSICAL[method](mixture()))
    assert "expectations" in done and ("normalizer" in done) == (method == "smc")


# The suite of kernels


@pytest.mark.parametrize("space", [Euclidean(3), MeanFree(4, 2), Torus(2)], ids=repr)
@pytest.mark.parametrize("kind", [ULA, MALA, HMC])
def test_kernels_conform(kind: type[Kernel], space: Euclidean | MeanFree | Torus):
    kernel = HMC(space, num_steps=3) if kind is HMC else kind(space)
    done = check_kernel(kernel, generator=generator(), step_size=0.5 if kind is HMC else 0.1)
    assert ("invariance" in done) == kernel.exact


class FaultyKernel(Kernel):
    """Metropolis random walk on the line, with a fault."""

    exact = True
    target_acceptance = 0.4

    def __init__(self, fault: str) -> None:
        super().__init__(Euclidean(2))
        self.fault = fault

    def step(
        self, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        noise = self.space.noise(tuple(state.log_prob.shape), like=state.x, generator=generator)
        x = state.x + 5.0 * params.step_size * noise
        log_prob, score = log_density(x)
        broken = ~log_prob.isfinite()
        uniform = torch.rand(log_prob.shape, generator=generator, dtype=log_prob.dtype)
        ratio = log_prob - state.log_prob
        if self.fault == "always accepts":
            ratio = torch.zeros_like(ratio)
        accepted = (uniform.log() < ratio) & (~broken if self.fault != "takes all" else True)
        if self.fault == "takes all":
            accepted = torch.ones_like(broken)
        if self.fault == "global generator":
            torch.rand(1)
        column = accepted.unsqueeze(-1)
        new = State(
            torch.where(column, x, state.x),
            torch.where(accepted, log_prob, state.log_prob),
            torch.where(column, score, state.score),
        )
        if self.fault == "stale":
            new = new._replace(log_prob=state.log_prob)
        log_ratio = (state.log_prob - new.log_prob).double()
        if self.fault == "sign":
            log_ratio = -log_ratio
        if self.fault == "shape":
            log_ratio = log_ratio.unsqueeze(-1)
        if self.fault == "precision":
            log_ratio = log_ratio.float()
        reported = torch.zeros_like(broken) if self.fault == "silent" else broken
        return new, Info(log_ratio, ratio.clamp_max(0.0).exp().nan_to_num(0.0), 1, reported)


KERNEL_FAULTS = {
    "always accepts": "Expected an exact kernel to keep the law",
    "takes all": "Expected proposals without a finite density to be refused",
    "global generator": "the global one moved",
    "stale": "Expected a state that agrees with the density",
    "sign": "Expected log_ratio of an exact kernel",
    "shape": "Expected log_ratio of shape",
    "precision": "Expected log_ratio in float64",
    "silent": "Expected refused non-finite proposals in Info.nonfinite",
}


@pytest.mark.parametrize("fault", KERNEL_FAULTS)
def test_suite_of_kernels_finds(fault: str):
    with pytest.raises(AssertionError, match=KERNEL_FAULTS[fault]):
        check_kernel(FaultyKernel(fault), generator=generator())


def test_suite_of_kernels_accepts_the_control_without_a_fault():
    assert "invariance" in check_kernel(FaultyKernel("none"), generator=generator())


def test_suite_of_kernels_finds_a_wrong_ratio_of_an_unadjusted_kernel():
    class Forgetful(ULA):
        def step(self, *args, **kwargs):
            state, info = super().step(*args, **kwargs)
            return state, info._replace(log_ratio=1.05 * info.log_ratio)

    with pytest.raises(AssertionError, match="Expected path weights of mean one"):
        check_kernel(Forgetful(Euclidean(2)), generator=generator(), step_size=0.2, chains=40000)


def test_unadjusted_kernels_must_not_claim_to_be_exact():
    kernel = ULA(Euclidean(2))
    kernel.exact = True
    with pytest.raises(AssertionError, match="Expected log_ratio of an exact kernel"):
        check_kernel(kernel, generator=generator(), step_size=0.6)


def test_resampled_particles_look_like_the_target():
    target = mixture()
    model = METHODS["dis"](target).fit(steps=60, batch_size=64, learning_rate=1e-2)
    particles = model.sample(4000)
    assert effective_sample_size(particles.log_weight) == particles.ess > 1000
    drawn = particles.resample(2000, generator=generator())
    share = (target.mode_labels(drawn.double()) == 0).double().mean()
    # Binomial error of the effective sample 1.1% to 1.6%; 4 of them.
    assert abs(float(share - target.mode_weights()[0])) < 0.065
