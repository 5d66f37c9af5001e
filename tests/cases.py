"""Processes and targets that the tests of the core share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffsampler import targets
from diffsampler.methods.cmcd import CMCDProcess
from diffsampler.methods.dds import DDSProcess
from diffsampler.methods.dis import DISProcess
from diffsampler.methods.gbs import GBSProcess
from diffsampler.methods.gfn import GFNProcess
from diffsampler.methods.pis import PISProcess
from diffsampler.methods.reference_process import GaussianStart, ReferenceProcess, UniformStart
from diffsampler.methods.underdamped import UnderdampedProcess
from diffsampler.priors import MixturePrior
from diffsampler.process import Process
from diffsampler.reference import Reference, edm, geometric
from diffsampler.reference import variance_preserving as preserving_reference
from diffsampler.schedule import cosine_preserving, variance_exploding, variance_preserving
from diffsampler.space import EuclideanTorus, MeanFree, Space, Torus
from diffsampler.target import Target

F64 = torch.float64


class HyperplaneGaussian(Target):
    """An unnormalized isotropic Gaussian on mean-free particles."""

    def __init__(self, n: int = 4, d: int = 2, *, scale: float = 0.8) -> None:
        space = MeanFree(n, d)
        super().__init__(space, log_normalizer=0.5 * space.dof * math.log(2.0 * math.pi * scale**2), has_sampler=True)
        self.scale = scale

    def log_prob(self, x: Tensor) -> Tensor:
        return -0.5 * self.space.project(x).square().sum(-1) / self.scale**2

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.scale * self.space.noise((n,), like=torch.empty(0, dtype=F64), generator=generator)


class VonMises(Target):
    """Independent unnormalized von Mises angles."""

    def __init__(self, m: int = 2, *, kappa: float = 1.0, mean: float = 2.5) -> None:
        bessel = torch.special.i0(torch.tensor(kappa, dtype=F64)).log().item()
        super().__init__(Torus(m), log_normalizer=m * (math.log(2.0 * math.pi) + bessel), has_sampler=True)
        self.kappa = kappa
        self.mean = mean

    def log_prob(self, x: Tensor) -> Tensor:
        return self.kappa * torch.cos(x - self.mean).sum(-1)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        # Rejection from the uniform law, coordinate by coordinate; at kappa 1 a proposal survives with chance 0.47.
        shape = (n, self.dim, 40)
        angle = (2.0 * torch.rand(shape, generator=generator, dtype=F64) - 1.0) * math.pi
        kept = torch.rand(shape, generator=generator, dtype=F64).log() < self.kappa * (torch.cos(angle) - 1.0)
        first = kept.double().argmax(-1, keepdim=True)
        return self.space.project(self.mean + angle.gather(-1, first).squeeze(-1))


class Hinge(Target):
    """A coordinate on a line whose mean follows an angle, and the angle's von Mises law."""

    def __init__(self, *, kappa: float = 1.5, mean: float = 2.5) -> None:
        bessel = torch.special.i0(torch.tensor(kappa, dtype=F64)).log().item()
        super().__init__(EuclideanTorus(1, 1), log_normalizer=1.5 * math.log(2.0 * math.pi) + bessel)
        self.kappa = kappa
        self.mean = mean

    def log_prob(self, x: Tensor) -> Tensor:
        line, angle = x.unbind(-1)
        return self.kappa * torch.cos(angle - self.mean) - 0.5 * (line - angle.sin()).square()


def gaussian() -> targets.Gaussian:
    return targets.Gaussian([0.4, -0.3], scale=[0.8, 1.1], log_normalizer=0.7)


def mixture() -> targets.GaussianMixture:
    return targets.GaussianMixture([[-0.9, 0.0], [0.8, 0.6]], scales=0.7, weights=[0.4, 0.6])


def cmcd(space: Space, num_steps: int, **options: Any) -> CMCDProcess:
    return CMCDProcess(space, num_steps, scale=1.3, width=16, **options)


def two_centres(space: Space, *, scale: float = 1.2, learn: bool = True) -> MixturePrior:
    """A mixture of two Gaussians with unequal shares."""
    means = space.project(torch.linspace(-1.0, 1.0, 2 * space.dim).reshape(2, space.dim))
    return MixturePrior(space, means, scale=scale, shares=torch.tensor([0.3, 0.7]), learn=learn)


def underdamped(space: Space, num_steps: int, **options: Any) -> UnderdampedProcess:
    return UnderdampedProcess(space, num_steps, scale=1.3, width=16, **options)


def dis(space: Space, num_steps: int, *, exploding: bool, learn_variance: bool) -> DISProcess:
    schedule = variance_exploding(num_steps, noise_min=0.1) if exploding else variance_preserving(num_steps)
    return DISProcess(space, schedule, scale=1.3, learn_variance=learn_variance, width=16)


def controlled(space: Space, reference: Reference, *, start: float | None = None) -> ReferenceProcess:
    """A controlled reference chain from a point, or from a Gaussian of a given scale (from uniform angles)."""
    law = (
        None
        if start is None
        else UniformStart(space)
        if isinstance(space, Torus)
        else GaussianStart(space, scale=start)
    )
    return ReferenceProcess(space, reference, start=law, width=16)


MAKERS: dict[str, Callable[[Space, int], Process]] = {
    "pis": lambda space, k: PISProcess(space, k, scale=1.6, width=16),
    "gfn": lambda space, k: GFNProcess(space, k, scale=1.6, learn_variance=True, flow=False, width=16),
    "gfn_backward": lambda space, k: GFNProcess(space, k, scale=1.6, backward_range=0.3, flow=False, width=16),
    "dgfs": lambda space, k: GFNProcess(space, k, scale=1.6, width=16),
    "dds": lambda space, k: DDSProcess(space, cosine_preserving(k), scale=1.4, width=16),
    "dds_noise": lambda space, k: DDSProcess(space, cosine_preserving(k), scale=1.4, learn_noise=True, width=16),
    "dis_preserving": lambda space, k: dis(space, k, exploding=False, learn_variance=True),
    "dis_preserving_fixed": lambda space, k: dis(space, k, exploding=False, learn_variance=False),
    "dis_exploding": lambda space, k: dis(space, k, exploding=True, learn_variance=True),
    "dis_exploding_fixed": lambda space, k: dis(space, k, exploding=True, learn_variance=False),
    "cmcd": lambda space, k: cmcd(space, k),
    "cmcd_local": lambda space, k: cmcd(space, k, local_steps=True),
    "cmcd_mixture": lambda space, k: cmcd(space, k, prior=two_centres(space)),
    "mcd": lambda space, k: cmcd(space, k, forward_control=False),
    "annealed_ula": lambda space, k: cmcd(space, k, forward_control=False, backward_control=False),
    "gbs": lambda space, k: GBSProcess(space, k, scale=1.3, width=16),
    "ucmcd": lambda space, k: underdamped(space, k),
    "ucmcd_fixed": lambda space, k: underdamped(space, k, learn_steps=False),
    "ucmcd_local": lambda space, k: underdamped(space, k, local_mass=True, learn_steps=False),
    "ldvi": lambda space, k: underdamped(space, k, forward_control=False, prior=two_centres(space)),
    "uha": lambda space, k: underdamped(space, k, forward_control=False, backward_control=False),
    "as": lambda space, k: controlled(space, geometric(k, sigma_min=0.1, sigma_max=1.6)),
    "asbs": lambda space, k: controlled(space, edm(k, sigma_min=0.1, sigma_max=2.5), start=1.2),
    "asbs_preserving": lambda space, k: controlled(
        space, preserving_reference(k, beta_start=4.0, scale=1.3), start=1.3
    ),
}
TORUS = (
    "cmcd",
    "cmcd_local",
    "annealed_ula",
    "gbs",
    "ucmcd",
    "ucmcd_local",
    "uha",
    "as",
    "asbs",
    "dis_exploding",
    "dis_exploding_fixed",
)
"""Methods that have a torus."""
EUCLIDEAN: dict[str, Callable[[], Target]] = {"gaussian": gaussian, "mixture": mixture}


def torus_process(name: str, num_steps: int) -> Process:
    """The methods that have a torus: scale 1, and noise wide enough to forget the start."""
    if name == "as":
        return controlled(Torus(2), geometric(num_steps, sigma_min=0.3, sigma_max=3.0))
    if not name.startswith("dis"):
        return MAKERS[name](Torus(2), num_steps)
    schedule = variance_exploding(num_steps, noise_min=0.3, noise_max=4.0)
    return DISProcess(Torus(2), schedule, learn_variance=not name.endswith("fixed"), width=16)


def perturb(process: Process, std: float, *, seed: int = 0) -> Process:
    """Add noise to every parameter, zero-initialized heads and gates included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in process.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return process


def deviation(values: Tensor, truth: float) -> float:
    """Signed distance of the mean from the truth in standard errors, over independent values."""
    values = values.double()
    return float((values.mean() - truth) / (values.std() / math.sqrt(values.numel()) + 1e-12))


def crossing(forward: Tensor, backward: Tensor) -> float:
    r"""Deviation from :math:`E_F[\sigma(\log w - \log Z)] = E_B[\sigma(\log Z - \log w)]`, in standard errors.

    Both sides are bounded, so that the Gaussian limit holds however heavy the tails of the weights are. Bennett,
    "Efficient estimation of free energy differences from Monte Carlo data" (1976).
    """
    a, b = torch.sigmoid(forward), torch.sigmoid(-backward)
    return float((a.mean() - b.mean()) / (a.var() / a.numel() + b.var() / b.numel()).sqrt())
