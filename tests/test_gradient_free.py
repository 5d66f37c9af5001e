"""Kernels without gradients, Barker's proposal, and all kernels inside SMC."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import F64, deviation, double_well, gaussian, normal, params, run, well_draws, well_moments
from torch import Tensor

from diffsampler import targets
from diffsampler.annealing import anneal
from diffsampler.kernel import Kernel
from diffsampler.kernels import (
    BAOAB,
    GHMC,
    KLMC,
    MALA,
    MAMS,
    MCLMC,
    OBABO,
    RLMC,
    RMKLMC,
    SGLD,
    Barker,
    EllipticalSlice,
    RandomWalk,
    without_gradient,
)
from diffsampler.kernels.barker import helmert
from diffsampler.smc import smc
from diffsampler.space import Euclidean, MeanFree, Torus
from diffsampler.tempering import TemperedPath

# Exactness at bad step sizes

BAD_STEPS = [
    (Barker(Euclidean(2)), 0.2, (0.9, 0.99)),
    (Barker(Euclidean(2)), 1.5, (0.1, 0.4)),
    (RandomWalk(Euclidean(2)), 0.1, (0.8, 0.97)),
    (RandomWalk(Euclidean(2)), 2.0, (0.05, 0.3)),
]


@pytest.mark.parametrize(("kernel", "step_size", "band"), BAD_STEPS)
def test_moments_are_exact_at_bad_step_sizes(kernel: Kernel, step_size: float, band: tuple[float, float]):
    state, infos = run(kernel, well_draws(6000, 2), double_well, step_size, steps=120)
    assert band[0] < float(torch.stack([info.acceptance for info in infos]).mean()) < band[1]
    mean, square = well_moments()
    # 4.5 standard errors, two statistics: false alarm 1.4e-5.
    assert deviation(state.x.mean(-1), mean) < 4.5
    assert deviation(state.x.square().mean(-1), square) < 4.5


def test_barker_survives_steps_that_break_mala():
    scale = torch.tensor([1.0, 0.01], dtype=F64)

    def steep(x: Tensor) -> tuple[Tensor, Tensor]:
        return -0.5 * (x / scale).square().sum(-1), -x / scale.square()

    accepted = []
    for kind in (Barker, MALA):
        _, infos = run(kind(Euclidean(2)), scale * normal(2000, 2), steep, 0.2, steps=20)
        accepted.append(float(torch.stack([info.acceptance for info in infos]).mean()))
    assert accepted[0] > 0.02 and accepted[1] < 1e-4


def test_the_basis_of_the_hyperplane_is_orthonormal():
    basis = helmert(5)
    assert torch.allclose(basis @ basis.T, torch.eye(4, dtype=F64))
    assert float(basis.sum(-1).abs().max()) < 1e-14


# Elliptical slices


@pytest.mark.parametrize("form", ["isotropic", "diagonal", "full"])
def test_elliptical_slices_are_exact_for_any_gaussian_factor(form: str):
    scale = {
        "isotropic": torch.tensor([0.9], dtype=F64),
        "diagonal": torch.tensor([0.8, 1.4], dtype=F64),
        "full": torch.tensor([[1.1, 0.0], [-0.6, 0.7]], dtype=F64),
    }[form]
    kernel = EllipticalSlice(Euclidean(2), scale=scale, mean=torch.tensor([0.3, -0.2], dtype=F64))
    state, infos = run(kernel, well_draws(3000, 2), double_well, 1.0, steps=30)
    mean, square = well_moments()
    # 4.5 standard errors, two statistics: false alarm 1.4e-5.
    assert deviation(state.x.mean(-1), mean) < 4.5
    assert deviation(state.x.square().mean(-1), square) < 4.5
    for info in infos:
        assert info.useful is not None and float(info.useful.max()) == info.evaluations


def test_elliptical_slices_draw_independently_from_the_prior():
    kernel = EllipticalSlice(Euclidean(1), scale=torch.ones(1, dtype=F64))
    start = torch.full((20000, 1), 3.0, dtype=F64)
    state, infos = run(kernel, start, gaussian, 1.0, steps=12)
    assert all(info.evaluations == 1 for info in infos)
    # 4.5 standard errors: false alarm 7e-6.
    assert deviation(state.x[:, 0], 0.0) < 4.5 and deviation(state.x[:, 0].square(), 1.0) < 4.5


def test_slices_that_shrink_too_long_stay_and_keep_the_law():
    def narrow(x: Tensor) -> tuple[Tensor, Tensor]:
        return -0.5 * (x / 0.05).square().sum(-1), -x / 0.0025

    kernel = EllipticalSlice(Euclidean(1), scale=torch.ones(1, dtype=F64), max_shrinks=4)
    state, infos = run(kernel, 0.05 * normal(20000, 1), narrow, 1.0, steps=20)
    assert max(info.evaluations for info in infos) == 4
    assert 0.05 < float(infos[0].acceptance.mean()) < 0.95
    # 4.5 standard errors: false alarm 7e-6.
    assert deviation((state.x[:, 0] / 0.05).square(), 1.0) < 4.5


def test_no_gradient_is_asked_for():
    def log_prob(x: Tensor) -> Tensor:
        return torch.round(-0.5 * x.square().sum(-1) * 4.0) / 4.0

    def density(x: Tensor) -> tuple[Tensor, Tensor]:
        # A gradient that is not a number must not matter.
        return log_prob(x), torch.full_like(x, math.nan)

    for kernel in (RandomWalk(Euclidean(2)), EllipticalSlice(Euclidean(2), scale=torch.ones(1, dtype=F64))):
        ends = [run(kernel, normal(50, 2), d, 0.8, steps=5)[0].x for d in (density, without_gradient(log_prob))]
        assert torch.equal(*ends) and not torch.equal(ends[0], normal(50, 2))


def test_gaussian_factors_that_do_not_fit_are_refused():
    one = torch.ones(1, dtype=F64)
    with pytest.raises(ValueError, match="Expected a space with a Gaussian law"):
        EllipticalSlice(Torus(2), scale=one)
    with pytest.raises(ValueError, match=r"Expected scale of a shape among \[\(1,\)\]"):
        EllipticalSlice(MeanFree(3, 2), scale=torch.ones(6, dtype=F64))
    with pytest.raises(ValueError, match="Expected positive standard deviations, or a lower triangular factor"):
        EllipticalSlice(Euclidean(2), scale=torch.ones(2, 2, dtype=F64))
    with pytest.raises(ValueError, match=r"Expected mean of shape \(2,\); got \(3,\)"):
        EllipticalSlice(Euclidean(2), scale=one, mean=torch.zeros(3))
    with pytest.raises(ValueError, match="Expected max_shrinks to be a positive integer; got 0"):
        EllipticalSlice(Euclidean(2), scale=one, max_shrinks=0)


# Inside SMC

PLANE = Euclidean(2)
ADAPTIVE = [MALA(PLANE), Barker(PLANE), RandomWalk(PLANE), GHMC(PLANE), MAMS(PLANE, num_steps=4)]
FIXED = [
    OBABO(PLANE),
    BAOAB(PLANE),
    KLMC(PLANE, friction=2.0),
    MCLMC(PLANE),
    EllipticalSlice(PLANE, scale=torch.tensor([2.0])),
]


def bridge_path() -> tuple[TemperedPath, float]:
    log_z = 0.7
    reference = targets.Gaussian([0.0, 0.0], scale=[2.0, 2.0], log_normalizer=0.0)
    target = targets.Gaussian([1.0, -0.5], scale=[0.5, 0.8], log_normalizer=log_z)
    return TemperedPath(reference, target), log_z


@pytest.mark.parametrize("kernel", [*ADAPTIVE, *FIXED], ids=lambda kernel: type(kernel).__name__)
def test_smc_with_any_kernel_is_unbiased_for_the_normalizer(kernel: Kernel):
    path, log_z = bridge_path()
    options = {"step_size": 0.3, "num_moves": 2} if kernel in FIXED else {}
    # Chosen once, then frozen: the mean over 400 independent islands of 16 has the expectation Z.
    first = smc(path, n=1600, num_islands=8, kernel=kernel, generator=torch.Generator().manual_seed(0), **options)
    assert first.finished
    again = smc(
        path,
        n=6400,
        num_islands=400,
        kernel=kernel,
        schedule=first.schedule,
        generator=torch.Generator().manual_seed(1),
    )
    ratio = (again.particles.log_weight.reshape(400, 16) - log_z).exp().mean(-1)
    # 4 standard errors: false alarm 6e-5.
    assert deviation(ratio, 1.0) < 4.0
    assert float(ratio.std()) < 1.0


@pytest.mark.parametrize("kernel", [RLMC(PLANE), RMKLMC(PLANE), SGLD(PLANE)], ids=lambda kernel: type(kernel).__name__)
def test_smc_refuses_kernels_without_a_path_weight(kernel: Kernel):
    path, _ = bridge_path()
    with pytest.raises(ValueError, match=f"Expected a kernel with a path weight; got {type(kernel).__name__}"):
        smc(path, n=64, kernel=kernel, step_size=0.1, num_moves=1, generator=torch.Generator())
    with pytest.raises(ValueError, match=f"Expected a kernel with a path weight; got {type(kernel).__name__}"):
        anneal(path, (1.0,), kernel, params(0.1), normal(8, 2), torch.Generator())
