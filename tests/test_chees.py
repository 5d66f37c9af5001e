"""ChEES: the length that it learns, exactness of what it drives, and compiled loops that equal eager ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffsampler import baselines, targets
from diffsampler.kernel import Kernel, KernelParams, LogDensity, State
from diffsampler.kernels import HMC, MALA
from diffsampler.kernels.chees import ChEES, halton, largest_spread
from diffsampler.kernels.compiled import CompiledDensity, Frame, evaluate, while_loop, whiten
from diffsampler.kernels.nuts import NUTS
from diffsampler.space import Euclidean, Torus
from diffsampler.target import Target

F64 = torch.float64


def gaussian(x: Tensor) -> tuple[Tensor, Tensor]:
    return -0.5 * x.square().sum(-1), -x


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def params(step_size: float, length: float | None = None) -> KernelParams:
    span = None if length is None else torch.tensor(length, dtype=F64)
    return KernelParams(torch.tensor(step_size, dtype=F64), torch.ones(1, dtype=F64), span)


def test_halton_sequence():
    assert [halton(i) for i in range(1, 8)] == [0.5, 0.25, 0.75, 0.125, 0.625, 0.375, 0.875]
    assert [halton(i, base=3) for i in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1 / 9])


def test_length_decides_the_number_of_steps():
    kernel, generator = HMC(Euclidean(2), num_steps=50), torch.Generator().manual_seed(0)
    state = kernel.init(normal(4, 2), gaussian)
    for length, expected in ((0.0, 1), (0.05, 1), (0.55, 6), (100.0, 50), (math.inf, 50)):
        assert kernel.step(state, gaussian, params(0.1, length), generator)[1].evaluations == expected


def test_slope_is_the_derivative_of_the_criterion():
    # On a Gaussian the flow is a rotation, x(t) = x cos t + v sin t, so the criterion has a derivative in closed form.
    x, v, t = normal(4000, 3), normal(4000, 3, seed=1), 0.6
    chees = ChEES(Euclidean(3))

    def criterion(time: float) -> float:
        moved = x * math.cos(time) + v * math.sin(time)
        after, before = (moved - moved.mean(0)).square().sum(-1), (x - x.mean(0)).square().sum(-1)
        return float(0.25 * (after - before).square().mean())

    moved, velocity = x * math.cos(t) + v * math.sin(t), v * math.cos(t) - x * math.sin(t)
    kernel = HMC(Euclidean(3))
    start = kernel.init(x, gaussian)
    _, info = kernel.step(start, gaussian, params(0.1), torch.Generator().manual_seed(0))
    info = info._replace(
        proposal=State(moved, start.log_prob, start.score, velocity), acceptance=torch.ones(4000, dtype=F64)
    )
    difference = (criterion(t + 1e-4) - criterion(t - 1e-4)) / 2e-4
    # The centre moves with the chains, which the published gradient leaves out: of order 1 / chains.
    assert chees.slope(start, info, scale=torch.ones(1)) == pytest.approx(difference, rel=0.01)
    # Lost proposals say nothing and break nothing.
    lost = info.proposal._replace(x=torch.where(torch.arange(4000).unsqueeze(-1) < 10, math.nan, moved))
    weight = (torch.arange(4000) >= 10).double()
    slope = chees.slope(start, info._replace(proposal=lost, acceptance=weight), scale=torch.ones(1))
    assert slope == pytest.approx(difference, rel=0.05)


def test_length_is_learned_on_a_gaussian():
    # A rotation by u T changes distances most where sin(u T)^2 is large on average: T near 2.3. There are further,
    # lower peaks beyond full rotations, so that a length is to be approached from below.
    kernel, generator = HMC(Euclidean(8), num_steps=200), torch.Generator().manual_seed(0)
    for first in (0.2, 3.2):
        chees = ChEES(Euclidean(8))
        state, learned = kernel.init(normal(64, 8), gaussian), chees.init(first)
        for t in range(1, 300):
            length = chees.length(learned) * halton(t)
            new, info = kernel.step(state, gaussian, params(0.15, length), generator)
            learned = chees.update(learned, state, info, scale=torch.ones(1), jitter=halton(t))
            state = new
        assert 1.4 < chees.averaged(learned) < 3.2, first


def test_floor_and_refusals():
    chees = ChEES(Euclidean(2))
    state = chees.floor(chees.init(0.1), 1.5)
    assert chees.length(state) == pytest.approx(1.5) and chees.averaged(state) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="Expected a space with distances from a centre"):
        ChEES(Torus(2))
    with pytest.raises(ValueError, match="Expected no length, which ChEES learns"):
        baselines.ChEES(targets.Funnel(dim=2), length=1.0)
    state, kernel = MALA(Euclidean(2)).init(normal(4, 2), gaussian), MALA(Euclidean(2))
    _, info = kernel.step(state, gaussian, params(0.1), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="Expected a kernel that reports proposals with velocities"):
        chees.slope(state, info, scale=torch.ones(1))


def test_largest_spread_is_a_cautious_estimate():
    x = normal(400, 5) * torch.tensor([9.0, 1.0, 1.0, 1.0, 1.0], dtype=F64)
    # tr C^2 / tr C = (9^4 + 4) / (81 + 4): 8.79; its relative error at 400 points is about 4 percent.
    assert largest_spread(x, torch.ones(1)) == pytest.approx(8.79, rel=0.2)
    # Sixteen points in fifty dimensions: the largest sample eigenvalue is 8, the estimate stays near 1.
    assert largest_spread(normal(16, 50), torch.ones(1)) < 2.0


@pytest.mark.parametrize("step_size", [0.1, 0.8])
def test_gaussian_is_exact_with_a_jittered_length(step_size: float):
    kernel, generator = HMC(Euclidean(4), num_steps=100), torch.Generator().manual_seed(2)
    state = kernel.init(normal(3000, 4), gaussian)
    for t in range(1, 8):
        state, info = kernel.step(state, gaussian, params(step_size, 2.0 * halton(t)), generator)
    square = state.x.square().flatten()
    # 4.5 standard errors from exact draws: false alarm 7e-6.
    assert abs(float((square.mean() - 1.0) / (square.std() / math.sqrt(square.numel())))) < 4.5


def test_sampler_learns_freezes_and_is_exact():
    target = targets.EightSchools(centered=False)
    sampler = baselines.ChEES(target, warmup=150)
    particles = sampler.sample(12800, seed=0)
    exact = target.sample(40000, generator=torch.Generator().manual_seed(5))
    for power in (1, 2):
        mean, error = particles.expectation(particles.x**power)
        truth = exact**power
        limit = (error.square() + truth.var(0) / 40000).sqrt()
        # 64 chains at 5 standard errors, ten coordinates: false alarm 5e-5.
        assert bool(((mean - truth.mean(0)).abs() < 5.0 * limit).all())
    adapted = sampler.adapted
    assert adapted is not None and adapted.params.length is not None
    assert 1.0 < float(adapted.params.length) < 6.0 and particles.ess > 1500.0
    assert sampler.evaluations % 64 == 0 and sampler.evaluations > 64 * (adapted.evaluations + 200)


class Watched(Kernel):
    """Notes the parameters that it is stepped with."""

    exact = True
    target_acceptance = 0.651

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel.space)
        self.kernel = kernel
        self.seen: list[KernelParams] = []

    def step(self, state, log_density, params, generator=None):
        self.seen.append(params)
        return self.kernel.step(state, log_density, params, generator)


def test_parameters_are_frozen_while_recording():
    target = targets.EightSchools(centered=False)
    kernel = Watched(HMC(target.space, num_steps=100))
    sampler = baselines.Chains(target, kernel, num_chains=16, warmup=60)
    sampler.sample(16 * 20, seed=0)
    recorded, adapted = kernel.seen[-20:], sampler.adapted
    assert adapted is not None
    assert all(p.step_size is adapted.params.step_size and p.scale is adapted.params.scale for p in recorded)
    assert len({float(p.step_size.mean()) for p in kernel.seen[:-20]}) > 20


# Compiled loops


def skewed(x: Tensor) -> Tensor:
    return -0.5 * (x[:, 0] - 0.3).square() - (x[:, 1] - 0.2 * x[:, 0].square()).square() - x[:, 2].cosh()


SKEWED = Target.from_log_prob(skewed, dim=3)
LOGISTIC = targets.LogisticRegression(normal(40, 2), (normal(40, seed=4) > 0.0).double())


@pytest.mark.parametrize("target", [SKEWED, LOGISTIC], ids=["traced", "analytic"])
@pytest.mark.parametrize("make", [lambda s: HMC(s, num_steps=9), lambda s: HMC(s, smallest_step=0.2), NUTS, MALA])
def test_compiled_equals_eager(target: Target, make):
    # The tracing compiler without its code generator: the same graphs, loops and random numbers in seconds.
    x, kernel = normal(8, 3, seed=7), make(target.space)
    compiled = CompiledDensity(target.log_prob_and_score, x, backend="eager")
    frame = Frame(normal(3, seed=8), torch.eye(3, dtype=F64) + normal(3, 3, seed=9).tril(-1))
    for where in (None, frame):
        runs = []
        for density in (target.log_prob_and_score, compiled):
            generator, whitened = torch.Generator().manual_seed(1), whiten(density, where)
            state = kernel.init(x, whiten(target.log_prob_and_score, where))
            for _ in range(6):
                state, info = kernel.step(state, whitened, params(0.4), generator)
            runs.append((*state[:3], info.acceptance, torch.tensor(info.evaluations)))
        for ours, theirs in zip(*runs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert compiled.failure is None and compiled.num_operations > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", [baselines.ChEES, baselines.NUTS, baselines.MALA])
@pytest.mark.parametrize("metric", ["diagonal", "dense"])
def test_compiled_samplers_draw_the_same(kind, metric: str):
    # Ten transitions of warm-up and ten recorded: rounding has no time to grow.
    runs = {}
    for choice in ("off", "on"):
        sampler = kind(LOGISTIC, num_chains=16, warmup=10, metric=metric, compile=choice)
        runs[choice] = sampler.sample(160, seed=3).x
        assert sampler.compilation == choice
    torch.testing.assert_close(runs["on"], runs["off"], rtol=1e-6, atol=1e-6)


def branching(x: Tensor) -> Tensor:
    return -0.5 * x.square().sum(-1) if bool((x[:, 0] > 0.0).any()) else -x.square().sum(-1)


def noisy(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return -0.5 * x.square().sum(-1) + 0.0 * torch.randn(x.shape[0], dtype=x.dtype, generator=generator)


@pytest.mark.parametrize("function", [branching, noisy])
def test_what_cannot_be_traced_is_evaluated_eagerly(function):
    target = Target.from_log_prob(function, dim=2)
    sampler = baselines.HMC(target, num_chains=4, warmup=5, compile="on", num_steps=2)
    same = baselines.HMC(target, num_chains=4, warmup=5, compile="off", num_steps=2)
    assert torch.equal(sampler.sample(40, seed=0).x, same.sample(40, seed=0).x)
    assert ":" in sampler.compilation and same.compilation == "off"


def test_what_cannot_be_compiled_is_evaluated_eagerly_and_validation_survives():
    compiled = CompiledDensity(SKEWED.log_prob_and_score, normal(4, 3), backend="none")
    expected = SKEWED.log_prob_and_score(normal(4, 3, seed=2))
    for _ in range(2):
        for ours, theirs in zip(compiled(normal(4, 3, seed=2)), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert compiled.failure is not None
    assert torch.distributions.Distribution._validate_args


def test_other_shapes_and_wrong_graphs_are_evaluated_eagerly():
    compiled = CompiledDensity(SKEWED.log_prob_and_score, normal(4, 3), backend="eager")
    for x in (normal(5, 3), normal(4, 3).float()):
        for ours, theirs in zip(compiled(x), SKEWED.log_prob_and_score(x), strict=True):
            torch.testing.assert_close(ours, theirs)

    def forgetful(log_density: LogDensity, x: Tensor) -> tuple[Tensor, ...]:
        # A wrong compiler, played by a function that knows when it is traced.
        log_prob, score = log_density(x)
        return (log_prob + 1.0, score) if torch.compiler.is_compiling() else (log_prob, score)

    log_prob, _ = evaluate(compiled, forgetful, normal(4, 3))
    assert torch.equal(log_prob, SKEWED.log_prob(normal(4, 3)))
    assert compiled.failure == "ValueError: compiled and eager values differ"


def test_while_loop_in_python():
    k, x = while_loop(lambda k, x: k < 5, lambda k, x: (k + 1, 2.0 * x), (torch.tensor(0), torch.ones(2)))
    assert int(k) == 5 and x.tolist() == [32.0, 32.0]


def test_auto_compiles_long_runs_only(monkeypatch):
    from diffsampler.baselines import chains

    made = []

    def density(log_density, x):
        made.append(x.shape)
        return CompiledDensity(log_density, x, backend="eager")

    monkeypatch.setattr(chains, "CompiledDensity", density)
    sampler = baselines.HMC(SKEWED, num_chains=4, warmup=20, num_steps=2)
    sampler.sample(40)
    assert sampler.compilation == "off" and not made
    monkeypatch.setattr(chains, "WORTH_TRACING", 0)
    sampler.sample(40)
    assert sampler.compilation == "off" and len(made) == 1
    monkeypatch.setattr(chains, "WORTH_COMPILING", 0.0)
    sampler.sample(40)
    assert sampler.compilation == "on"
