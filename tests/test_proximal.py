"""Proximal kernels: proximal maps, Moreau envelopes, the two biases of MYULA, exactness of MYMALA, constraints."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import F64, deviation, normal, params, run
from torch import Tensor

from diffsampler.kernel import Info, KernelParams, State
from diffsampler.kernels import L1, MYMALA, MYULA, Box, CompositeDensity, ForwardBackward
from diffsampler.kernels.metropolis import metropolis
from diffsampler.kernels.proximal import Prox
from diffsampler.space import Euclidean, MeanFree

LINE = Euclidean(1)


def flat(x: Tensor) -> tuple[Tensor, Tensor]:
    """No smooth part."""
    return torch.zeros_like(x[..., 0]), torch.zeros_like(x)


def off_centre(x: Tensor) -> tuple[Tensor, Tensor]:
    """The smooth part of a lasso posterior: N(0.8, 1)."""
    return -0.5 * (x - 0.8).square().sum(-1), -(x - 0.8)


def stationary(mean: Tensor, x: Tensor, h: float, statistic: Tensor) -> float:
    """Mean of a statistic under the stationary law of ``x' = mean(x) + sqrt(2h) xi``, on a grid."""
    transition = torch.exp(-(x.unsqueeze(0) - mean.unsqueeze(-1)).square() / (4.0 * h))
    transition = transition / transition.sum(-1, keepdim=True)
    for _ in range(12):
        transition = transition @ transition
    return float(transition[len(x) // 2] @ statistic)


# Proximal maps


@pytest.mark.parametrize("nonsmooth", [L1(0.7), Box(-0.5, 1.2)], ids=lambda prox: type(prox).__name__)
def test_proximal_maps_minimize(nonsmooth: Prox):
    strength, grid = torch.tensor(0.6, dtype=F64), torch.linspace(-4.0, 4.0, 80001, dtype=F64)
    for x in (-2.3, -0.4, 0.0, 0.1, 0.9, 3.1):
        objective = nonsmooth.value(grid.unsqueeze(-1)) + (grid - x).square() / (2.0 * strength)
        near = nonsmooth.prox(torch.tensor([[x]], dtype=F64), strength)
        assert abs(float(near) - float(grid[objective.argmin()])) < 2e-4


def test_the_smoothed_density_has_the_envelope_and_the_gradient_of_the_smooth_part():
    x, smoothing = normal(200, 3), 0.4
    log_prob, score = CompositeDensity(off_centre, L1(1.3), smoothing=smoothing)(x)
    away = x.abs()
    huber = torch.where(away < 1.3 * smoothing, away.square() / (2.0 * smoothing), 1.3 * away - 0.5 * 1.69 * smoothing)
    assert torch.allclose(log_prob, off_centre(x)[0] - huber.sum(-1))
    assert torch.equal(score, off_centre(x)[1])
    exact, _ = CompositeDensity(off_centre, L1(1.3))(x)
    assert bool((exact <= log_prob).all())
    assert torch.allclose(exact, off_centre(x)[0] - 1.3 * away.sum(-1))


# MYULA

# Of exp(-|x|), second moment 2: the smoothed law's, and that of the chain at h = lambda / 2.
MOREAU = {1.0: (2.2445, 2.720), 0.1: (2.0032, 2.05)}


@pytest.mark.parametrize("smoothing", MOREAU)
def test_myula_has_the_moments_of_its_chain(smoothing: float):
    smoothed, chained = MOREAU[smoothing]
    x = torch.linspace(-60.0, 60.0, 240001, dtype=F64)
    weight = CompositeDensity(flat, L1(), smoothing=smoothing)(x.unsqueeze(-1))[0].exp()
    assert float((weight * x.square()).sum() / weight.sum()) == pytest.approx(smoothed, abs=1e-3)
    h, grid = 0.5 * smoothing, torch.linspace(-16.0, 16.0, 801, dtype=F64)
    near = L1().prox(grid, grid.new_tensor(smoothing))
    truth = stationary(grid - h * (grid - near) / smoothing, grid, h, grid.square())
    assert truth == pytest.approx(chained, abs=6e-3)
    density = CompositeDensity(flat, L1(), smoothing=smoothing)
    start = torch.distributions.Laplace(0.0, 1.0).icdf(torch.special.ndtr(normal(20000, 1)))
    state, _ = run(MYULA(LINE, L1(), smoothing=smoothing), start, density, h, steps=int(20 / h))
    # 5 standard errors: false alarm 6e-7.
    assert deviation(state.x[:, 0].square(), truth) < 5.0


def test_myula_smooths_constraints():
    density = CompositeDensity(off_centre, Box(0.0, math.inf), smoothing=0.05)
    state, infos = run(MYULA(LINE, Box(0.0, math.inf), smoothing=0.05), normal(4000, 1).abs(), density, 0.01, steps=300)
    outside = state.x[state.x < 0.0]
    assert 0 < len(outside) and float(outside.min()) > -2.0
    assert not any(bool(info.nonfinite.any()) for info in infos)


# MYMALA


def lasso_moments() -> tuple[float, float]:
    x = torch.linspace(-12.0, 12.0, 240001, dtype=F64)
    weight = CompositeDensity(off_centre, L1(1.5))(x.unsqueeze(-1))[0].exp()
    weight = weight / weight.sum()
    return float(weight @ x), float(weight @ x.square())


def lasso_draws(n: int) -> Tensor:
    x = torch.linspace(-12.0, 12.0, 240001, dtype=F64)
    cumulative = CompositeDensity(off_centre, L1(1.5))(x.unsqueeze(-1))[0].exp().cumsum(0)
    return x[torch.searchsorted(cumulative, torch.special.ndtr(normal(n, 1)) * cumulative[-1])]


@pytest.mark.parametrize("smoothing", [None, 0.05, 1.0])
@pytest.mark.parametrize("step_size", [0.05, 0.5, 1.5])
def test_mymala_is_exact_at_bad_step_sizes(step_size: float, smoothing: float | None):
    kernel = MYMALA(LINE, L1(1.5), smoothing=smoothing)
    state, infos = run(kernel, lasso_draws(8000), CompositeDensity(off_centre, L1(1.5)), step_size, steps=60)
    acceptance = float(torch.stack([info.acceptance for info in infos]).mean())
    # Drift with a smoothing of a tenth of the step overshoots; the tied one never does.
    assert (0.3 if smoothing is None else 0.01) < acceptance < 0.999
    mean, square = lasso_moments()
    # 4.5 standard errors, two statistics: false alarm 1.4e-5.
    assert deviation(state.x[:, 0], mean) < 4.5
    assert deviation(state.x[:, 0].square(), square) < 4.5


class EnergyOnly(MYMALA.__base__):
    """A wrong MYMALA: no ratio of proposal densities."""

    exact = True
    target_acceptance = 0.574

    def step(self, state, log_density, params, generator=None):
        proposal, _ = MYULA(self.space, L1(1.5), smoothing=0.5).step(state, log_density, params, generator)
        log_accept = proposal.log_prob - state.log_prob
        broken = torch.zeros_like(log_accept, dtype=torch.bool)
        state, acceptance, log_ratio = metropolis(state, proposal, log_accept, broken=broken, generator=generator)
        return state, Info(log_ratio, acceptance, 1, broken)


def test_mymala_without_the_proposal_ratio_is_wrong():
    state, _ = run(EnergyOnly(LINE), lasso_draws(8000), CompositeDensity(off_centre, L1(1.5)), 0.5, steps=60)
    assert deviation(state.x[:, 0].square(), lasso_moments()[1]) > 8.0


def test_mymala_stays_in_a_box():
    density = CompositeDensity(off_centre, Box(-0.5, 1.0))
    start = torch.rand(6000, 1, generator=torch.Generator().manual_seed(0), dtype=F64) - 0.3
    state, infos = run(MYMALA(LINE, Box(-0.5, 1.0)), start, density, 0.1, steps=120)
    x = torch.linspace(-0.5, 1.0, 100001, dtype=F64)
    weight = torch.exp(-0.5 * (x - 0.8).square())
    assert bool(((state.x >= -0.5) & (state.x <= 1.0)).all())
    # Beyond the walls is an ordinary rejection. 4.5 standard errors: false alarm 7e-6.
    assert not any(bool(info.nonfinite.any()) for info in infos)
    assert deviation(state.x[:, 0], float((weight * x).sum() / weight.sum())) < 4.5


# Forward-backward


def test_forward_backward_has_the_moments_of_its_chain():
    h, low = 0.05, 0.0
    # On the grid the chain before the projection is a Langevin step from the projected point.
    grid = torch.linspace(-3.0, 6.0, 721, dtype=F64)
    inside = grid.clamp(min=low)
    truth = stationary(inside - h * (inside - 0.8), grid, h, inside)
    start = normal(20000, 1).abs()
    kernel, density = ForwardBackward(LINE, Box(low, math.inf)), CompositeDensity(off_centre, Box(low, math.inf))
    state, infos = run(kernel, start, density, h, steps=200)
    # 5 standard errors: false alarm 6e-7.
    assert deviation(state.x[:, 0], truth) < 5.0
    assert bool((state.x >= low).all()) and 0.01 < float((state.x == low).double().mean()) < 0.3
    x = torch.linspace(low, 8.0, 100001, dtype=F64)
    weight = torch.exp(-0.5 * (x - 0.8).square())
    assert deviation(state.x[:, 0], float((weight * x).sum() / weight.sum())) > 5.0
    assert bool(infos[-1].log_ratio.isnan().all())


def test_forward_backward_makes_exact_zeros():
    density = CompositeDensity(off_centre, L1(2.0))
    state, _ = run(ForwardBackward(Euclidean(5), L1(2.0)), normal(200, 5), density, 0.05, steps=50)
    assert 0.05 < float((state.x == 0.0).double().mean()) < 0.95


def test_preconditioned_proximal_kernels_scale_the_prox():
    scale, h = torch.tensor([0.5, 2.0], dtype=F64), 0.1
    sizes, x = KernelParams(torch.tensor(h, dtype=F64), scale), normal(30, 2)
    kernel, density = ForwardBackward(Euclidean(2), L1(0.9)), CompositeDensity(off_centre, L1(0.9))
    state, _ = kernel.step(kernel.init(x, density), density, sizes, torch.Generator().manual_seed(3))
    noise = Euclidean(2).noise((30,), like=x, generator=torch.Generator().manual_seed(3))
    y = x - h * scale.square() * (x - 0.8) + math.sqrt(2.0 * h) * scale * noise
    assert torch.allclose(state.x, y.sign() * (y.abs() - 0.9 * h * scale.square()).clamp_min(0.0))


class Group:
    """The Euclidean norm, which is not separable."""

    separable = False

    def value(self, x: Tensor) -> Tensor:
        return x.norm(dim=-1)

    def prox(self, x: Tensor, strength: Tensor) -> Tensor:
        return x * (1.0 - strength / x.norm(dim=-1, keepdim=True)).relu()


def test_a_prox_of_ones_own():
    density = CompositeDensity(flat, Group())
    state, _ = run(MYMALA(Euclidean(3), Group()), normal(6000, 3), density, 0.4, steps=150)
    # Radius of exp(-|x|) in three dimensions: Gamma(3), mean 3; 4.5 standard errors: false alarm 7e-6.
    assert deviation(state.x.norm(dim=-1), 3.0) < 4.5


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="Expected weight to be positive"):
        L1(0.0)
    with pytest.raises(ValueError, match="Expected low < high"):
        Box(1.0, 1.0)
    with pytest.raises(ValueError, match="Expected smoothing to be positive"):
        MYULA(LINE, L1(), smoothing=0.0)
    with pytest.raises(ValueError, match="Expected smoothing to be positive"):
        CompositeDensity(flat, L1(), smoothing=-1.0)
    for make in (
        lambda s: MYULA(s, L1(), smoothing=1.0),
        lambda s: MYMALA(s, L1()),
        lambda s: ForwardBackward(s, L1()),
    ):
        with pytest.raises(ValueError, match="Expected Euclidean space"):
            make(MeanFree(3, 1))
    uneven = params(0.1)._replace(scale=torch.tensor([1.0, 2.0], dtype=F64))
    x = normal(4, 2)
    for kernel in (MYMALA(Euclidean(2), Group()), ForwardBackward(Euclidean(2), Group())):
        with pytest.raises(ValueError, match="Expected an isotropic scale of shape"):
            kernel.step(State(x, *flat(x)), flat, uneven, torch.Generator())
