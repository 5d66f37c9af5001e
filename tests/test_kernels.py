"""Markov kernels: closed forms, exactness at bad step sizes, path weights, and controls that must fail.

Statistical tests compare with k standard errors over independent chains; the false-alarm rate of each is stated. Seeds
are fixed, so a pass stays a pass until the code changes.
"""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import (
    F64,
    KERNELS,
    WIDE,
    annealed_log_weights,
    deviation,
    double_well,
    gaussian,
    mixture,
    mixture_draws,
    names_on,
    normal,
    params,
    permutation_p,
    run,
    well_draws,
    well_moments,
)
from torch import Tensor

from diffsampler.kernel import Info, Kernel, KernelParams, State
from diffsampler.kernels import (
    BAOAB,
    GHMC,
    HMC,
    KLMC,
    L1,
    MALA,
    MYMALA,
    MYULA,
    OBABO,
    ULA,
    Barker,
    DualAveraging,
    EllipticalSlice,
    PooledVariance,
    RandomWalk,
    RobbinsMonro,
    reasonable_step_size,
    spread,
)
from diffsampler.kernels.hmc import leapfrog
from diffsampler.kernels.metropolis import metropolis
from diffsampler.space import Euclidean, MeanFree, Space, Torus


class EnergyOnly(Kernel):
    """A wrong MALA: the Langevin proposal accepted by the energies alone."""

    exact = True
    target_acceptance = 0.574

    def step(self, state, log_density, params, generator=None):
        proposal, _ = ULA(self.space).step(state, log_density, params, generator)
        log_accept = proposal.log_prob - state.log_prob
        broken = torch.zeros_like(log_accept, dtype=torch.bool)
        state, acceptance, log_ratio = metropolis(state, proposal, log_accept, broken=broken, generator=generator)
        return state, Info(log_ratio, acceptance, 1, broken)


# Closed forms


@pytest.mark.parametrize("step_size", [0.2, 0.5, 1.0])
def test_ula_stationary_variance(step_size: float):
    state, _ = run(ULA(Euclidean(1)), normal(20000, 1), gaussian, step_size, steps=40)
    truth = 1.0 / (1.0 - 0.5 * step_size)
    # 5 standard errors: false alarm 6e-7.
    assert deviation(state.x.square().flatten(), truth) < 5.0
    assert deviation(state.x.square().flatten(), 1.0) > 5.0


def test_leapfrog_is_reversible():
    x, v = normal(50, 3), normal(50, 3, seed=2)
    space, step = Euclidean(3), torch.tensor(0.11, dtype=F64)
    start = State(x, *double_well(x))
    end, velocity, _ = leapfrog(space, start, v, double_well, step, num_steps=25)
    back, velocity, lost = leapfrog(space, end, -velocity, double_well, step, num_steps=25)
    assert float((end.x - x).abs().max()) > 0.5
    assert torch.allclose(back.x, x, atol=1e-10, rtol=0.0)
    assert torch.allclose(-velocity, v, atol=1e-10, rtol=0.0)
    assert not bool(lost.any())


def test_leapfrog_keeps_volume():
    step = torch.tensor(0.2, dtype=F64) * torch.tensor([0.5, 1.0, 2.0], dtype=F64)

    def flow(phase: Tensor) -> Tensor:
        x, v = phase[:3], phase[3:]
        end, velocity, _ = leapfrog(Euclidean(3), State(x, *double_well(x)), v, double_well, step, num_steps=7)
        return torch.cat([end.x, velocity])

    jacobian = torch.autograd.functional.jacobian(flow, normal(6))
    assert abs(float(torch.linalg.det(jacobian)) - 1.0) < 1e-10


def test_ula_ratio_is_the_ratio_of_its_transition_densities():
    space, h = Euclidean(3), 0.07
    scale = torch.tensor([0.5, 1.0, 3.0], dtype=F64)
    old = ULA(space).init(normal(40, 3), double_well)
    generator = torch.Generator().manual_seed(0)
    new, info = ULA(space).step(old, double_well, KernelParams(torch.tensor(h, dtype=F64), scale), generator)

    def log_transition(start: State, end: State) -> Tensor:
        law = torch.distributions.Normal(start.x + h * scale**2 * start.score, math.sqrt(2.0 * h) * scale)
        return law.log_prob(end.x).sum(-1)

    assert torch.allclose(info.log_ratio, log_transition(new, old) - log_transition(old, new), atol=1e-10)


@pytest.mark.parametrize("kernel", [MALA(Euclidean(3)), HMC(Euclidean(3), num_steps=4)])
def test_exact_kernels_ratio_is_the_difference_of_log_densities(kernel: Kernel):
    old = kernel.init(normal(200, 3), double_well)
    new, info = kernel.step(old, double_well, params(0.2), torch.Generator().manual_seed(0))
    moved = (new.x != old.x).any(-1)
    assert 0 < int(moved.sum()) < 200
    assert torch.equal(info.log_ratio, old.log_prob - new.log_prob)
    assert float(info.log_ratio[~moved].abs().max()) == 0.0
    value, score = double_well(new.x)
    assert torch.allclose(new.log_prob, value) and torch.allclose(new.score, score)


# Exactness

EXACT = [
    (MALA(Euclidean(2)), 0.05, (0.8, 0.95)),
    (MALA(Euclidean(2)), 0.3, (0.2, 0.4)),
    (HMC(Euclidean(2), num_steps=1, jitter_steps=False), 0.65, (0.3, 0.5)),
    (HMC(Euclidean(2), num_steps=5), 0.1, (0.97, 1.0)),
    (HMC(Euclidean(2), num_steps=5), 0.6, (0.15, 0.35)),
    (HMC(Euclidean(2), num_steps=6, smallest_step=0.15), 0.6, (0.5, 0.85)),
]


@pytest.mark.parametrize(("kernel", "step_size", "band"), EXACT)
def test_exact_kernels_have_exact_moments_at_bad_step_sizes(
    kernel: Kernel, step_size: float, band: tuple[float, float]
):
    # Exact draws to start from: at steps as long as these, chains in the quartic tails would hardly ever move.
    state, infos = run(kernel, well_draws(6000, 2), double_well, step_size, steps=150)
    acceptance = float(torch.stack([info.acceptance for info in infos]).mean())
    assert band[0] < acceptance < band[1]
    mean, square = well_moments()
    # 4.5 standard errors, two statistics: false alarm 1.4e-5.
    assert deviation(state.x.mean(-1), mean) < 4.5
    assert deviation(state.x.square().mean(-1), square) < 4.5


def test_energy_only_acceptance_is_wrong():
    right, _ = run(MALA(Euclidean(1)), normal(5000, 1), gaussian, 0.5, steps=60)
    wrong, _ = run(EnergyOnly(Euclidean(1)), normal(5000, 1), gaussian, 0.5, steps=60)
    assert deviation(right.x.square().flatten(), 1.0) < 4.5
    assert deviation(wrong.x.square().flatten(), 1.0) > 10.0
    # At small steps such a chain samples the square of the density, variance 1/2.
    assert float(wrong.x.var()) < 0.7


def test_recording_accepted_states_only_is_wrong():
    kernel, generator = MALA(Euclidean(1)), torch.Generator().manual_seed(0)
    state, every, accepted = kernel.init(normal(3000, 1), gaussian), [], []
    for _ in range(40):
        before = state
        state, _ = kernel.step(state, gaussian, params(1.5), generator)
        every.append(state.x.square().mean(0))
        accepted.append(state.x[state.x != before.x].square().mean())
    # 120,000 draws of integrated autocorrelation time below 5: standard error below 0.01, false alarm below 1e-5.
    assert abs(float(torch.stack(every).mean()) - 1.0) < 0.045
    assert float(torch.stack(accepted).mean()) > 1.1


@pytest.mark.parametrize(
    ("kernel", "step_size"),
    [
        (MALA(Euclidean(2)), 0.3),
        (HMC(Euclidean(2), num_steps=5), 0.7),
        (HMC(Euclidean(2), num_steps=5, smallest_step=0.15), 0.9),
    ],
)
def test_exact_draws_stay_exact(kernel: Kernel, step_size: float):
    state, _ = run(kernel, mixture_draws(700, 1), mixture, step_size, steps=50)
    # False alarm 1e-3 per case.
    assert permutation_p(state.x, mixture_draws(700, 2)) > 1e-3


def test_permutation_test_sees_the_bias_of_ula():
    state, _ = run(ULA(Euclidean(2)), mixture_draws(700, 1), mixture, 0.5, steps=50)
    assert permutation_p(state.x, mixture_draws(700, 2)) <= 1e-3


# Path weights


ANNEALED = [
    (ULA(Euclidean(1)), 0.08),
    (MALA(Euclidean(1)), 0.3),
    (HMC(Euclidean(1), num_steps=3), 0.5),
    (OBABO(Euclidean(1)), 0.5),
    (BAOAB(Euclidean(1)), 0.5),
    (GHMC(Euclidean(1)), 0.7),
    (KLMC(Euclidean(1), friction=3.0), 0.4),
    (Barker(Euclidean(1)), 1.0),
    (RandomWalk(Euclidean(1)), 1.0),
    (EllipticalSlice(Euclidean(1), scale=WIDE), 1.0),
    (MYULA(Euclidean(1), L1(0.3), smoothing=0.2), 0.08),
    (MYMALA(Euclidean(1), L1(0.3)), 0.3),
]
ANNEALED_IDS = [type(kernel).__name__ for kernel, _ in ANNEALED]


@pytest.mark.parametrize(("kernel", "step_size"), ANNEALED, ids=ANNEALED_IDS)
def test_annealing_by_log_ratio_is_unbiased(kernel: Kernel, step_size: float):
    # 4 standard errors over 20,000 independent replicates: false alarm 6e-5.
    assert deviation(annealed_log_weights(kernel, step_size, n=20000).exp(), 1.0) < 4.0


@pytest.mark.parametrize(("kernel", "step_size"), ANNEALED, ids=ANNEALED_IDS)
def test_annealing_without_log_ratio_is_biased(kernel: Kernel, step_size: float):
    assert deviation(annealed_log_weights(kernel, step_size, n=20000, honest=False).exp(), 1.0) > 8.0


# Spaces, batches, failures


def make(name: str, space: Space) -> tuple[Kernel, float]:
    maker, step_size = KERNELS[name]
    return maker(space), step_size


@pytest.mark.parametrize("name", names_on(MeanFree(4, 2)))
def test_mean_free_keeps_the_centre_of_mass(name: str):
    space = MeanFree(4, 2)
    kernel, step_size = make(name, space)
    x = space.project(normal(2000, 8))
    # The score of this density points off the hyperplane; the kernel must project it.
    state, _ = run(kernel, x, lambda x: (-0.5 * x.square().sum(-1), -x + 3.0), step_size, steps=40)
    centre = state.x.unflatten(-1, (4, 2)).mean(-2)
    assert float(centre.abs().max()) < 1e-12
    if kernel.exact:
        # 6 degrees of freedom, each of variance 1; 4.5 standard errors: false alarm 7e-6.
        assert deviation(state.x.square().sum(-1), 6.0) < 4.5


@pytest.mark.parametrize("name", names_on(Torus(2)))
def test_torus_wraps(name: str):
    space = Torus(2)
    kernel, step_size = make(name, space)
    x = space.project(3.0 * normal(4000, 2))

    def von_mises(x: Tensor) -> tuple[Tensor, Tensor]:
        return 0.7 * torch.cos(x).sum(-1), -0.7 * torch.sin(x)

    # Steps so long that proposals go around.
    state, _ = run(kernel, x, von_mises, 4.0 * step_size if kernel.exact else step_size, steps=60)
    assert float(state.x.abs().max()) <= math.pi
    if kernel.exact:
        truth = float(torch.special.i1(torch.tensor(0.7, dtype=F64)) / torch.special.i0(torch.tensor(0.7, dtype=F64)))
        # 4.5 standard errors: false alarm 7e-6.
        assert deviation(torch.cos(state.x).mean(-1), truth) < 4.5


@pytest.mark.parametrize("name", KERNELS)
def test_any_batch_shape_and_per_particle_steps(name: str):
    kernel, step_size = make(name, Euclidean(2))
    x = normal(3, 5, 2)
    steps = torch.full((3, 5), step_size, dtype=F64)
    steps[0] = 0.0
    sizes = KernelParams(steps, torch.ones(2, dtype=F64))
    generator = torch.Generator().manual_seed(0)
    state, info = kernel.step(kernel.init(x, gaussian, generator=generator), gaussian, sizes, generator)
    assert state.x.shape == x.shape and state.log_prob.shape == info.log_ratio.shape == info.nonfinite.shape == (3, 5)
    assert info.log_ratio.dtype == F64
    # An ellipse has no step size.
    assert torch.equal(state.x[0], x[0]) == (name != "elliptical") and not torch.equal(state.x[1], x[1])


@pytest.mark.parametrize("name", KERNELS)
def test_same_seed_same_numbers(name: str):
    kernel, step_size = make(name, Euclidean(2))
    first, _ = run(kernel, normal(20, 2), mixture, step_size, steps=5, seed=7)
    again, _ = run(kernel, normal(20, 2), mixture, step_size, steps=5, seed=7)
    other, _ = run(kernel, normal(20, 2), mixture, step_size, steps=5, seed=8)
    assert torch.equal(first.x, again.x) and not torch.equal(first.x, other.x)


@pytest.mark.parametrize("name", KERNELS)
def test_float32_particles_stay_float32(name: str):
    kernel, step_size = make(name, Euclidean(2))
    state, infos = run(kernel, normal(20, 2).float(), gaussian, step_size, steps=2)
    assert state.x.dtype == state.score.dtype == torch.float32 and infos[0].log_ratio.dtype == F64


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_proposals_are_refused_and_counted(name: str, bad: float):
    kernel, step_size = make(name, Euclidean(2))
    seen, x = [], normal(4000, 2).abs()

    def half(x: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(x)
        log_prob, score = gaussian(x)
        return torch.where(x[..., 0] > 0.0, log_prob, torch.full_like(log_prob, bad)), score

    state, infos = run(kernel, x, half, step_size, steps=30)
    assert bool((state.x[:, 0] > 0.0).all()) and bool(state.log_prob.isfinite().all())
    assert all(0 < int(info.nonfinite.sum()) < 4000 for info in infos)
    assert all(bool(x.isfinite().all()) for x in seen)
    if kernel.exact:
        # The half-normal law, mean square 1; 4.5 standard errors: false alarm 7e-6.
        assert deviation(state.x[:, 0].square(), 1.0) < 4.5


@pytest.mark.parametrize("name", KERNELS)
def test_runaway_trajectories_never_reach_the_density_as_non_numbers(name: str):
    kernel, _ = make(name, Euclidean(2))

    def steep(x: Tensor) -> tuple[Tensor, Tensor]:
        assert bool(x.isfinite().all())
        return -x.square().square().sum(-1), -4.0 * x**3

    # The step throws everybody to infinity within a few leapfrog steps.
    x = 1e3 * normal(50, 2)
    generator = torch.Generator().manual_seed(0)
    huge = KernelParams(torch.tensor(1e150, dtype=F64), torch.tensor([1e150], dtype=F64))
    state, info = kernel.step(kernel.init(x, steep, generator=generator), steep, huge, generator)
    assert bool(state.x.isfinite().all()) and (state.velocity is None or bool(state.velocity.isfinite().all()))
    # An ellipse has no step, and a random walk ends where the density is zero: refused, but a number.
    if name == "elliptical":
        return
    assert torch.equal(state.x, x)
    assert bool(info.nonfinite.all()) == (name not in ("barker", "random_walk"))
    assert not kernel.has_path_weight or float(info.log_ratio.abs().max()) == 0.0


def test_outside_the_support_is_an_ordinary_rejection():
    def wall(x: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, score = gaussian(x)
        outside = x[..., 0] < 0.0
        return log_prob.masked_fill(outside, -math.inf), score.masked_fill(outside.unsqueeze(-1), math.nan)

    state, infos = run(MALA(Euclidean(1)), normal(500, 1).abs(), wall, 0.5, steps=10)
    assert bool((state.x >= 0.0).all()) and not any(bool(info.nonfinite.any()) for info in infos)


@pytest.mark.parametrize("name", KERNELS)
def test_evaluations_are_counted(name: str):
    kernel, step_size = make(name, Euclidean(2))
    calls = []

    def counted(x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return gaussian(x)

    _, infos = run(kernel, normal(5, 2), counted, step_size, steps=12)
    assert len(calls) == 1 + sum(info.evaluations for info in infos)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "Expected num_steps to be a positive integer; got 0"),
        ({"smallest_step": 0.0}, r"Expected smallest_step in \(0, 1\]; got 0.0"),
    ],
)
def test_hmc_refuses_bad_options(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        HMC(Euclidean(2), **options)


# Adaptation


@pytest.mark.parametrize("tuner", [RobbinsMonro(0.6), DualAveraging(0.6)])
@pytest.mark.parametrize("start", [1e-3, 10.0])
def test_step_size_reaches_the_target_acceptance(tuner, start: float):
    kernel, generator = MALA(Euclidean(5)), torch.Generator().manual_seed(0)
    state, tuned = kernel.init(normal(256, 5), gaussian), tuner.init(start)
    for _ in range(200):
        state, info = kernel.step(state, gaussian, params(tuner.step_size(tuned)), generator)
        tuned = tuner.update(tuned, float(info.acceptance.mean()))
    final = tuner.averaged(tuned) if isinstance(tuner, DualAveraging) else tuner.step_size(tuned)
    _, infos = run(kernel, state.x, gaussian, final, steps=20)
    assert abs(float(torch.stack([info.acceptance for info in infos]).mean()) - 0.6) < 0.05


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_reasonable_step_size_is_scale_free(scale: float):
    kernel, generator = HMC(Euclidean(4), num_steps=1), torch.Generator().manual_seed(0)

    def density(x: Tensor) -> tuple[Tensor, Tensor]:
        return -0.5 * (x / scale).square().sum(-1), -x / scale**2

    state = kernel.init(scale * normal(64, 4), density)
    step_size, spent = reasonable_step_size(kernel, state, density, params(1.0), generator=generator)
    assert 0.3 < step_size / scale < 6.0 and spent <= 30


def test_pooled_variance_is_the_variance_of_everything():
    pool, x = PooledVariance(Euclidean(3)), normal(4, 50, 3) * torch.tensor([1e-3, 1.0, 1e3]) + 1e4
    state = pool.init(x)
    for part in x:
        state = pool.update(state, part)
    assert torch.allclose(pool.scale(state), x.reshape(-1, 3).std(0), rtol=1e-8)
    assert PooledVariance(MeanFree(3, 1)).scale(state).shape == (1,)


def test_spread_weighs_its_points():
    x, log_weight = normal(100, 2), normal(100, seed=4)
    weight = torch.softmax(log_weight, 0).unsqueeze(-1)
    mean = (weight * x).sum(0)
    expected = (weight * (x - mean).square()).sum(0).sqrt()
    assert torch.allclose(spread(Euclidean(2), x, log_weight=log_weight), expected)
    assert torch.equal(spread(Torus(2), x), torch.ones(1, dtype=F64))
    x[:, 0] = 3.0
    assert torch.allclose(spread(Euclidean(2), x)[0], spread(Euclidean(2), x)[1])
