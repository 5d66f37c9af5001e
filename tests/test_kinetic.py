"""Kinetic and microcanonical kernels: closed forms, splittings, path weights, and exactness of what is adjusted.

Statistical tests compare with k standard errors over independent chains; the false-alarm rate of each is stated.
"""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import (
    F64,
    annealed_log_weights,
    deviation,
    double_well,
    gaussian,
    normal,
    params,
    run,
    well_draws,
    well_moments,
)
from torch import Tensor

from diffsampler.kernel import Info, Kernel, KernelParams, State
from diffsampler.kernels import BAOAB, GHMC, KLMC, MAMS, MCLMC, OBABO, RLMC, RMKLMC, SGHMC
from diffsampler.kernels.exponential import SERIES_BELOW, _flow
from diffsampler.kernels.kinetic import KineticKernel
from diffsampler.kernels.mclmc import isokinetic_kick, isokinetic_leapfrog
from diffsampler.kernels.metropolis import is_broken, metropolis
from diffsampler.space import Euclidean, MeanFree

LINE = Euclidean(1)


# Closed forms on the harmonic oscillator


def klmc_variance(h: float) -> float:
    """Stationary variance of positions at unit friction, from the Lyapunov equation of the update."""
    e = math.exp(-h)
    update = torch.tensor([[1.0 - (h - (1.0 - e)), 1.0 - e], [-(1.0 - e), e]], dtype=F64)
    noise = torch.tensor([[2.0 * h - 3.0 + 4.0 * e - e * e, (1.0 - e) ** 2], [(1.0 - e) ** 2, 1.0 - e * e]], dtype=F64)
    lyapunov = torch.eye(4, dtype=F64) - torch.kron(update, update)
    return float(torch.linalg.solve(lyapunov, noise.flatten())[0])


def rmklmc_variance(h: float) -> float:
    """The same for the randomized midpoint, averaged over the midpoint by quadrature."""
    nodes = (torch.arange(2000, dtype=F64) + 0.5) / 2000
    update_square, noise = torch.zeros(4, 4, dtype=F64), torch.zeros(2, 2, dtype=F64)

    def free(t: float) -> Tensor:
        e = math.exp(-t)
        return torch.tensor([[2 * t - 3 + 4 * e - e * e, (1 - e) ** 2], [(1 - e) ** 2, 1 - e * e]], dtype=F64)

    for a in nodes.tolist():
        first, rest = a * h, (1.0 - a) * h
        e, ea, er = math.exp(-h), math.exp(-first), math.exp(-rest)
        kick = torch.tensor([h * (1.0 - er), h * er], dtype=F64).unsqueeze(-1)
        midpoint = torch.tensor([[1.0 - (first - (1.0 - ea)), 1.0 - ea]], dtype=F64)
        flow = torch.tensor([[1.0, 1.0 - e], [0.0, e]], dtype=F64) - kick @ midpoint
        later = torch.tensor([[1.0, 1.0 - er], [0.0, er]], dtype=F64) - kick @ torch.tensor([[1.0, 0.0]], dtype=F64)
        update_square += torch.kron(flow, flow) / len(nodes)
        noise += (later @ free(first) @ later.T + free(rest)) / len(nodes)
    return float(torch.linalg.solve(torch.eye(4, dtype=F64) - update_square, noise.flatten())[0])


CLOSED = {
    "rlmc": (RLMC(LINE), lambda h: 1.0 / (1.0 - h**3 / (3.0 * (2.0 - 2.0 * h + h * h))), None),
    "obabo": (OBABO(LINE), lambda h: 1.0 / (1.0 - h * h / 4.0), lambda h: 1.0),
    "baoab": (BAOAB(LINE), lambda h: 1.0, lambda h: 1.0 - h * h / 4.0),
    "klmc": (KLMC(LINE), klmc_variance, None),
    "rmklmc": (RMKLMC(LINE), rmklmc_variance, None),
    "sghmc": (SGHMC(LINE), lambda h: (1 - h / 2) / (1 - h / 2 - h * h / 4), lambda h: 1 / (1 - h / 2 - h * h / 4)),
}


def test_closed_forms_are_those_of_the_literature():
    # Exact Lyapunov solutions at h = 0.2, 0.5, 1, to four digits.
    for name, wanted in {
        "rlmc": (1.0016, 1.0345, 1.5),
        "klmc": (1.111, 1.325, 1.865),
        "rmklmc": (1.0003, 1.0057, 1.0566),
        "obabo": (1.0101, 1.0667, 1.3333),
    }.items():
        values = [CLOSED[name][1](h) for h in (0.2, 0.5, 1.0)]
        assert values == pytest.approx(wanted, abs=6e-4), name


@pytest.mark.parametrize("step_size", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("name", CLOSED)
def test_stationary_variance_on_a_harmonic_oscillator(name: str, step_size: float):
    kernel, position, speed = CLOSED[name]
    state, _ = run(kernel, normal(3000, 1), gaussian, step_size, steps=int(12 / step_size))
    generator, count = torch.Generator().manual_seed(3), int(40 / step_size)
    squares, speeds = torch.zeros(3000, dtype=F64), torch.zeros(3000, dtype=F64)
    for _ in range(count):
        state, _ = kernel.step(state, gaussian, params(step_size), generator)
        squares += state.x[:, 0].square() / count
        if state.velocity is not None:
            speeds += state.velocity[:, 0].square() / count
    # 5 standard errors over chains: false alarm 6e-7.
    assert deviation(squares, position(step_size)) < 5.0
    assert speed is None or deviation(speeds, speed(step_size)) < 5.0
    if step_size == 1.0 and name != "baoab":
        assert deviation(squares, 1.0) > 5.0


@pytest.mark.parametrize("decay", [1e-9, 1e-4, 0.5 * SERIES_BELOW, 0.99 * SERIES_BELOW, 1.01 * SERIES_BELOW, 0.3, 40.0])
def test_two_half_steps_of_free_motion_make_a_whole_one(decay: float):
    whole = _flow(torch.tensor([decay], dtype=F64), F64)
    half = _flow(torch.tensor([0.5 * decay], dtype=F64), F64)
    # In units of the whole step: position noise is slope and rest, velocity noise std.
    later = 0.5 * half.drift
    variance_v = (half.keep * half.std).square() + half.std.square()
    covariance = half.keep * half.std * (0.5 * half.slope + later * half.std) + 0.5 * half.slope * half.std
    variance_x = (0.5 * half.slope + later * half.std).square() + (0.5 * half.rest).square()
    variance_x = variance_x + (0.5 * half.slope).square() + (0.5 * half.rest).square()
    assert torch.allclose(whole.std.square(), variance_v, rtol=1e-9)
    assert torch.allclose(whole.slope * whole.std, covariance, rtol=1e-9)
    assert torch.allclose(whole.slope.square() + whole.rest.square(), variance_x, rtol=1e-9)
    assert torch.allclose(whole.drift, 0.5 * half.drift * (1.0 + half.keep), rtol=1e-9)
    # A constant force drives at a_2 what the velocity gained at a_1.
    force = 0.25 * half.force + 0.5 * half.drift * 0.5 * half.drift + 0.25 * half.force
    assert torch.allclose(whole.force, force, rtol=1e-9)


# Path weights


def test_klmc_ratio_is_the_ratio_of_its_joint_transition_densities():
    h, friction, kernel = 0.3, 1.7, KLMC(Euclidean(3), friction=1.7)
    scale = torch.tensor([0.5, 1.0, 3.0], dtype=F64)
    generator = torch.Generator().manual_seed(0)
    old = kernel.init(normal(40, 3), double_well, generator=generator)
    new, info = kernel.step(old, double_well, KernelParams(torch.tensor(h, dtype=F64), scale), generator)
    e = math.exp(-friction * h)
    noise = torch.tensor(
        [
            [(2 * friction * h - 3 + 4 * e - e * e) / friction**2, (1 - e) ** 2 / friction],
            [(1 - e) ** 2 / friction, 1 - e * e],
        ],
        dtype=F64,
    )

    def log_transition(start: State, v: Tensor, end: State, w: Tensor) -> Tensor:
        kick = scale * start.score
        mean_x = (1 - e) / friction * v + (h - (1 - e) / friction) / friction * kick
        mean_v = e * v + (1 - e) / friction * kick
        law = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=F64), noise)
        return law.log_prob(torch.stack([(end.x - start.x) / scale - mean_x, w - mean_v], -1)).sum(-1)

    v, w = old.velocity, new.velocity
    assert v is not None and w is not None
    ratio = log_transition(new, -w, old, -v) - log_transition(old, v, new, w)
    ratio = ratio + 0.5 * (v.square() - w.square()).sum(-1)
    assert torch.allclose(info.log_ratio, ratio, atol=1e-9)


def test_friction_is_one_over_the_length():
    x = normal(20, 2)
    for kind in (OBABO, BAOAB, GHMC, KLMC, RMKLMC, SGHMC):
        ends = []
        for kernel, length in ((kind(Euclidean(2), friction=4.0), None), (kind(Euclidean(2)), 0.25)):
            generator = torch.Generator().manual_seed(1)
            state = kernel.init(x, gaussian, generator=generator)
            given = params(0.2)._replace(length=None if length is None else torch.full((20,), length, dtype=F64))
            ends.append(kernel.step(state, gaussian, given, generator)[0].x)
        assert torch.allclose(*ends)


class NoTurn(KineticKernel):
    """OBABO whose refused particles keep their direction, as if nothing had happened."""

    exact = False
    target_acceptance = 1.0

    def step(self, state, log_density, params, generator=None):
        new, info = OBABO(self.space).step(state, log_density, params, generator)
        stayed = (new.x == state.x).all(-1, keepdim=True)
        return new._replace(velocity=torch.where(stayed, -new.velocity, new.velocity)), info


def truncated_log_weights(kernel: Kernel, n: int, *, steps: int = 6) -> Tensor:
    """Weights of moves from exact draws of N(0, 1) on x > 0.3, a cliff, at a step size with large errors."""

    def wall(x: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, score = gaussian(x)
        return log_prob.masked_fill(x[..., 0] <= 0.3, -math.inf), score

    generator = torch.Generator().manual_seed(2)
    below = torch.special.ndtr(torch.tensor(0.3, dtype=F64))
    uniform = torch.rand(n, 1, generator=generator, dtype=F64)
    state = kernel.init(torch.special.ndtri(below + (1.0 - below) * uniform), wall, generator=generator)
    log_weight = -state.log_prob
    for _ in range(steps):
        state, info = kernel.step(state, wall, params(1.0), generator)
        log_weight = log_weight + info.log_ratio
    return log_weight + state.log_prob


@pytest.mark.parametrize("kind", [OBABO, BAOAB, KLMC])
def test_weights_count_refused_particles_rightly(kind: type[KineticKernel]):
    # 4 standard errors: false alarm 6e-5.
    assert deviation(truncated_log_weights(kind(LINE, friction=3.0), 40000).exp(), 1.0) < 4.0


def test_refused_particles_that_do_not_turn_bias_the_weights():
    assert deviation(truncated_log_weights(NoTurn(LINE), 40000).exp(), 1.0) > 8.0


# Generalized HMC

BAD_STEPS = [
    (GHMC(Euclidean(2)), 0.15, (0.97, 1.0)),
    (GHMC(Euclidean(2)), 0.65, (0.3, 0.55)),
    (MAMS(Euclidean(2), num_steps=5), 0.07, (0.97, 1.0)),
    (MAMS(Euclidean(2), num_steps=5), 0.2, (0.7, 0.95)),
    (MAMS(Euclidean(2), num_steps=1), 0.5, (0.3, 0.7)),
]


@pytest.mark.parametrize(("kernel", "step_size", "band"), BAD_STEPS)
def test_adjusted_kernels_have_exact_moments_at_bad_step_sizes(
    kernel: Kernel, step_size: float, band: tuple[float, float]
):
    state, infos = run(kernel, well_draws(6000, 2), double_well, step_size, steps=120)
    assert band[0] < float(torch.stack([info.acceptance for info in infos]).mean()) < band[1]
    mean, square = well_moments()
    # 4.5 standard errors, two statistics: false alarm 1.4e-5.
    assert deviation(state.x.mean(-1), mean) < 4.5
    assert deviation(state.x.square().mean(-1), square) < 4.5


class NoFlip(KineticKernel):
    """A wrong GHMC: refused particles keep their direction."""

    exact = True
    target_acceptance = 0.9

    def step(self, state, log_density, params, generator=None):
        step, scale = params.step_size, params.scale
        keep = torch.exp(-0.5 * step)
        noise = self.space.noise(tuple(state.log_prob.shape), like=state.x, generator=generator)
        v = keep * state.velocity + (1.0 - keep.square()).sqrt() * noise
        middle = v + 0.5 * step * scale * state.score
        x = state.x + step * scale * middle
        proposal = State(x, *log_density(x))
        end = middle + 0.5 * step * scale * proposal.score
        log_accept = proposal.log_prob - state.log_prob + 0.5 * (v.square() - end.square()).sum(-1)
        state, acceptance, log_ratio = metropolis(
            state._replace(velocity=v),
            proposal._replace(velocity=end),
            log_accept,
            broken=is_broken(proposal),
            generator=generator,
        )
        noise = self.space.noise(tuple(state.log_prob.shape), like=state.x, generator=generator)
        state = state._replace(velocity=keep * state.velocity + (1.0 - keep.square()).sqrt() * noise)
        return state, Info(log_ratio, acceptance, 1, is_broken(proposal))


def test_ghmc_without_the_flip_is_wrong():
    _, square = well_moments()
    state, _ = run(NoFlip(LINE), well_draws(20000, 1), double_well, 0.65, steps=120)
    assert deviation(state.x[:, 0].square(), square) > 8.0


# Microcanonical dynamics


def test_isokinetic_steps_are_reversible_and_keep_the_speed():
    space, step, scale = Euclidean(3), torch.tensor([0.1], dtype=F64), torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    x, v = normal(50, 3), normal(50, 3, seed=2)
    v = math.sqrt(3.0) * v / v.norm(dim=-1, keepdim=True)
    start = State(x, *gaussian(x))
    end, w, forth, lost = isokinetic_leapfrog(space, start, v, gaussian, step, scale, num_steps=20)
    back, w_back, again, _ = isokinetic_leapfrog(space, end, -w, gaussian, step, scale, num_steps=20)
    assert float((end.x - x).abs().max()) > 0.5 and not bool(lost.any())
    assert torch.allclose(back.x, x, atol=1e-10) and torch.allclose(-w_back, v, atol=1e-10)
    assert torch.allclose(forth, -again, atol=1e-9)
    assert torch.allclose(w.norm(dim=-1), torch.full((50,), math.sqrt(3.0), dtype=F64))


def test_jacobian_of_a_kick_is_that_of_the_sphere():
    force, h = normal(3, seed=4), torch.tensor([0.4], dtype=F64)
    v = normal(3)
    v = math.sqrt(3.0) * v / v.norm()

    def kick(w: Tensor) -> Tensor:
        return isokinetic_kick(math.sqrt(3.0) * w / w.norm(), force, h, 3)[0]

    end, log_jacobian = isokinetic_kick(v, force, h, 3)
    jacobian = torch.autograd.functional.jacobian(kick, v)
    # Between the tangent planes at both ends.
    basis, after = (torch.linalg.svd(w.unsqueeze(0))[2][1:] for w in (v, end))
    determinant = torch.linalg.det(after @ jacobian @ basis.T).abs().log()
    assert abs(float(determinant) - float(log_jacobian)) < 1e-10


def test_strong_forces_do_not_overflow():
    v = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=F64)
    end, log_jacobian = isokinetic_kick(
        v, torch.tensor([[1e5, 0.0], [0.0, -1e5]], dtype=F64), torch.ones(1, dtype=F64), 2
    )
    assert torch.allclose(end, math.sqrt(2.0) * torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=F64), atol=1e-6)
    assert bool(log_jacobian.isfinite().all())


class NoJacobian(MAMS.__base__):
    """A wrong MAMS: accepted by the densities alone."""

    exact = True
    target_acceptance = 0.9

    def step(self, state, log_density, params, generator=None):
        v = self.space.noise(tuple(state.log_prob.shape), like=state.x, generator=generator)
        v = math.sqrt(self.space.dof) * v / v.norm(dim=-1, keepdim=True)
        step = params.step_size.unsqueeze(-1)
        proposal, _, _, lost = isokinetic_leapfrog(self.space, state, v, log_density, step, params.scale, num_steps=3)
        log_accept = proposal.log_prob - state.log_prob
        state, acceptance, log_ratio = metropolis(state, proposal, log_accept, broken=lost, generator=generator)
        return state, Info(log_ratio, acceptance, 3, lost)


def test_mams_without_the_jacobian_is_wrong():
    _, square = well_moments()
    state, _ = run(NoJacobian(Euclidean(2)), well_draws(6000, 2), double_well, 0.2, steps=120)
    assert deviation(state.x.square().mean(-1), square) > 8.0


@pytest.mark.parametrize("step_size", [0.2, 0.7])
def test_mams_in_ten_dimensions(step_size: float):
    state, _ = run(MAMS(Euclidean(10), num_steps=6), normal(3000, 10), gaussian, step_size, steps=60)
    # 4.5 standard errors: false alarm 7e-6.
    assert deviation(state.x.square().mean(-1), 1.0) < 4.5


def test_mclmc_is_biased_and_its_weights_are_not():
    scale = torch.linspace(0.3, 1.7, 10, dtype=F64)

    def uneven(x: Tensor) -> tuple[Tensor, Tensor]:
        return -0.5 * (x / scale).square().sum(-1), -x / scale.square()

    kernel, generator = MCLMC(Euclidean(10)), torch.Generator().manual_seed(0)
    state = kernel.init(scale * normal(20000, 10), uneven, generator=generator)
    log_weight = -state.log_prob
    for k in range(40):
        state, info = kernel.step(state, uneven, params(0.4), generator)
        log_weight = log_weight + info.log_ratio
        if k == 1:
            # 4 standard errors: false alarm 6e-5.
            assert deviation((log_weight + state.log_prob).exp(), 1.0) < 4.0
    assert deviation((state.x[:, 0] / scale[0]).square(), 1.0) > 5.0


def test_length_sets_the_number_of_steps_of_mams():
    kernel = MAMS(Euclidean(2), jitter_steps=False)
    state = kernel.init(normal(5, 2), gaussian)
    given = params(0.1)._replace(length=torch.tensor(0.75, dtype=F64))
    _, info = kernel.step(state, gaussian, given, torch.Generator().manual_seed(0))
    assert info.evaluations == 8


# Refusals


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"Expected friction to be positive; got 0\.0"):
        OBABO(LINE, friction=0.0)
    with pytest.raises(ValueError, match="Expected a space with at least 2 degrees of freedom for MAMS"):
        MAMS(LINE)
    with pytest.raises(ValueError, match="Expected length to be positive"):
        MCLMC(Euclidean(2), length=0.0)
    state = State(normal(4, 2), *gaussian(normal(4, 2)))
    with pytest.raises(ValueError, match="Expected a state with velocities; got None"):
        GHMC(Euclidean(2)).step(state, gaussian, params(0.1), torch.Generator())
    space = MeanFree(3, 2)
    uneven = params(0.1)._replace(scale=torch.arange(1.0, 7.0, dtype=F64))
    kernel, generator = OBABO(space), torch.Generator().manual_seed(0)
    state = kernel.init(space.project(normal(4, 6)), gaussian, generator=generator)
    with pytest.raises(ValueError, match=r"Expected an isotropic scale of shape \(1,\)"):
        kernel.step(state, gaussian, uneven, generator)


def test_annealing_with_forgotten_velocities_is_biased():
    class Silent(KineticKernel):
        exact = False
        target_acceptance = 1.0

        def step(self, state, log_density, params, generator=None):
            state, info = BAOAB(self.space).step(state, log_density, params, generator)
            return state, info._replace(log_ratio=torch.zeros_like(info.log_ratio))

    assert deviation(annealed_log_weights(Silent(LINE), 0.5, n=20000).exp(), 1.0) > 8.0
