"""Densities, runs and statistics that the tests of kernels share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffsampler.kernel import Info, Kernel, KernelParams, State
from diffsampler.kernels import (
    BAOAB,
    GHMC,
    HMC,
    KLMC,
    L1,
    MALA,
    MAMS,
    MCLMC,
    MYMALA,
    MYULA,
    OBABO,
    RLMC,
    RMKLMC,
    SGHMC,
    SGLD,
    ULA,
    Barker,
    EllipticalSlice,
    ForwardBackward,
    RandomWalk,
)
from diffsampler.space import Euclidean, MeanFree, Space, Torus

F64 = torch.float64

WIDE = torch.tensor([1.5], dtype=F64)

KERNELS: dict[str, tuple[Callable[[Space], Kernel], float]] = {
    "ula": (ULA, 0.05),
    "rlmc": (RLMC, 0.05),
    "mala": (MALA, 0.2),
    "hmc": (lambda space: HMC(space, num_steps=4, smallest_step=0.5), 0.4),
    "obabo": (OBABO, 0.4),
    "baoab": (BAOAB, 0.4),
    "ghmc": (GHMC, 0.6),
    "klmc": (KLMC, 0.3),
    "rmklmc": (RMKLMC, 0.3),
    "mclmc": (MCLMC, 0.4),
    "mams": (lambda space: MAMS(space, num_steps=4), 0.5),
    "barker": (Barker, 0.8),
    "random_walk": (RandomWalk, 0.8),
    "elliptical": (lambda space: EllipticalSlice(space, scale=WIDE), 1.0),
    "myula": (lambda space: MYULA(space, L1(0.2), smoothing=0.3), 0.05),
    "mymala": (lambda space: MYMALA(space, L1(0.2)), 0.2),
    "forward_backward": (lambda space: ForwardBackward(space, L1(0.2)), 0.05),
    "sgld": (SGLD, 0.05),
    "sghmc": (SGHMC, 0.2),
}
"""Every kernel, and a step size at which it moves and mostly accepts on a standard Gaussian."""


def names_on(space: Space) -> list[str]:
    """Kernels that are defined on a space."""
    euclidean = ["myula", "mymala", "forward_backward"]
    missing = {Euclidean: [], MeanFree: euclidean, Torus: [*euclidean, "elliptical"]}[type(space)]
    return [name for name in KERNELS if name not in missing]


def gaussian(x: Tensor) -> tuple[Tensor, Tensor]:
    """N(0, 1) in every coordinate, unnormalized."""
    return -0.5 * x.square().sum(-1), -x


def double_well(x: Tensor) -> tuple[Tensor, Tensor]:
    """One double well per coordinate: log density -(x^2 - 1)^2 + x/2."""
    well = x.square() - 1.0
    return (-well.square() + 0.5 * x).sum(-1), -4.0 * x * well + 0.5


def well_moments() -> tuple[float, float]:
    """Mean and mean square of :func:`double_well` by quadrature."""
    x = torch.linspace(-4.0, 4.0, 20001, dtype=F64)
    weight = double_well(x.unsqueeze(-1))[0].exp()
    weight = weight / weight.sum()
    return float((weight * x).sum()), float((weight * x.square()).sum())


def well_draws(n: int, dim: int) -> Tensor:
    """Exact draws of :func:`double_well` by inverting its distribution function on a grid."""
    x = torch.linspace(-4.0, 4.0, 20001, dtype=F64)
    cumulative = double_well(x.unsqueeze(-1))[0].exp().cumsum(0)
    uniform = torch.rand(n, dim, generator=torch.Generator().manual_seed(9), dtype=F64) * cumulative[-1]
    return x[torch.searchsorted(cumulative, uniform)]


def params(step_size: float, scale: float = 1.0) -> KernelParams:
    return KernelParams(torch.tensor(step_size, dtype=F64), torch.full((1,), scale, dtype=F64))


def run(kernel: Kernel, x: Tensor, density, step_size: float, *, steps: int, seed: int = 0) -> tuple[State, list[Info]]:
    generator = torch.Generator().manual_seed(seed)
    state, infos = kernel.init(x, density, generator=generator), []
    for _ in range(steps):
        state, info = kernel.step(state, density, params(step_size), generator)
        infos.append(info)
    return state, infos


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def deviation(values: Tensor, truth: float) -> float:
    """Distance of the mean from the truth in standard errors, over independent chains."""
    return abs(float((values.mean() - truth) / (values.std() / math.sqrt(values.numel()))))


def permutation_p(a: Tensor, b: Tensor, *, permutations: int = 999) -> float:
    """p-value of the energy distance between two samples of equal size."""
    pooled, n = torch.cat([a, b]), a.shape[0]
    distance = torch.cdist(pooled, pooled)
    sign = torch.cat([torch.ones(n, dtype=F64), -torch.ones(n, dtype=F64)])
    generator = torch.Generator().manual_seed(5)
    signs = torch.stack([sign] + [sign[torch.randperm(2 * n, generator=generator)] for _ in range(permutations)])
    statistic = -((signs @ distance) * signs).sum(-1)
    return float((statistic >= statistic[0] - 1e-9).double().mean())


MEANS = torch.tensor([[-2.0, 0.0], [2.0, 1.0], [0.0, -2.0]], dtype=F64)


def mixture(x: Tensor) -> tuple[Tensor, Tensor]:
    """Three equal Gaussians of standard deviation 0.6."""
    delta = (MEANS - x.unsqueeze(-2)) / 0.36
    log_parts = -0.5 * 0.36 * delta.square().sum(-1)
    return torch.logsumexp(log_parts, -1), (torch.softmax(log_parts, -1).unsqueeze(-1) * delta).sum(-2)


def mixture_draws(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(3, (n,), generator=generator)
    return MEANS[label] + 0.6 * torch.randn(n, 2, generator=generator, dtype=F64)


def annealed_log_weights(kernel: Kernel, step_size: float, *, n: int, honest: bool = True) -> Tensor:
    """Log weights of annealing N(0, 2^2) to a narrow off-centre Gaussian of mass 3, by Info.log_ratio alone."""
    sigma, mean, log_z = 0.5, 1.0, math.log(3.0)
    generator = torch.Generator().manual_seed(3)
    space = Euclidean(1)

    def ends(x: Tensor) -> tuple[Tensor, Tensor]:
        low = space.log_gaussian(x, torch.zeros_like(x), torch.full_like(x, 4.0))
        high = space.log_gaussian(x, torch.full_like(x, mean), torch.full_like(x, sigma**2)) + log_z
        return low, high

    x = 2.0 * torch.randn(n, 1, generator=generator, dtype=F64)
    log_weight = -ends(x)[0]
    for beta in torch.linspace(0.0, 1.0, 8, dtype=F64)[1:].tolist():

        def density(x: Tensor, beta: float = beta) -> tuple[Tensor, Tensor]:
            low, high = ends(x)
            score = -(1.0 - beta) * x / 4.0 - beta * (x - mean) / sigma**2
            return (1.0 - beta) * low + beta * high, score

        state = kernel.init(x, density, generator=generator)
        for _ in range(2):
            state, info = kernel.step(state, density, params(step_size), generator)
            log_weight = log_weight + (info.log_ratio if honest else 0.0)
        x = state.x
    return log_weight + ends(x)[1] - log_z
