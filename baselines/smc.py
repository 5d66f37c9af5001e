"""Adaptive tempered sequential Monte Carlo as a sampler."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from diffsampler.baselines.chains import bulk_effective_sample_size
from diffsampler.kernel import Kernel
from diffsampler.kernels.hmc import HMC
from diffsampler.particles import Particles
from diffsampler.sampler import Sampler
from diffsampler.smc import smc
from diffsampler.space import Space
from diffsampler.target import CountedTarget, Target
from diffsampler.tempering import TemperedPath
from diffsampler.wastefree import WasteFreeRun, waste_free_smc

__all__ = ["SMC", "GaussianReference", "WasteFreeSMC", "tempered_path"]


@final
class GaussianReference(Target):
    """Isotropic normalized Gaussian about the origin, on any space (wrapped on a torus).

    Arguments:
        space: Where it lives.
        scale: Standard deviation.
    """

    def __init__(self, space: Space, *, scale: float) -> None:
        if not (scale > 0.0 and math.isfinite(scale)):
            raise ValueError(f"Expected a positive scale; got {scale}.")
        super().__init__(space, log_normalizer=0.0, has_sampler=True)
        self.scale = scale

    def log_prob(self, x: Tensor) -> Tensor:
        return self.space.log_gaussian(x, torch.zeros_like(x), torch.full_like(x[..., :1], self.scale**2))

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        device = None if generator is None else generator.device
        like = torch.zeros((), dtype=torch.float64, device=device)
        return self.space.project(self.scale * self.space.noise((n,), like=like, generator=generator))


def tempered_path(target: Target, *, reference: Target | None, reference_scale: float | None) -> TemperedPath:
    """The path to ``target`` from what the user gave, by default from the target's prior.

    Arguments:
        target: The density.
        reference: Normalized law with a sampler.
        reference_scale: Standard deviation of a Gaussian reference.

    Raises:
        ValueError: If neither a prior nor exactly one of ``reference`` and ``reference_scale`` is there.
    """
    if reference is not None and reference_scale is not None:
        raise ValueError("Expected at most one of reference and reference_scale; got both.")
    if reference_scale is not None:
        reference = GaussianReference(target.space, scale=reference_scale)
    reference = target.prior if reference is None else reference
    if reference is None:
        raise ValueError("Expected reference or reference_scale for a target without a prior; got neither.")
    return TemperedPath(reference, target)


@final
class SMC(Sampler):
    """Adaptive tempered SMC, by default with a second, frozen pass whose normalizer is unbiased.

    Reference:
        Sequential Monte Carlo samplers (Del Moral, Doucet & Jasra, 2006),
        https://doi.org/10.1111/j.1467-9868.2006.00553.x

    Arguments:
        target: The density.
        reference: Normalized law to start from, with a sampler; the target's prior by default.
        reference_scale: Standard deviation of a Gaussian reference, for targets without a prior. It must be wide
            enough to cover the target.
        kernel: Transition; HMC with mixed step sizes by default.
        num_islands: Independent islands, whose spread is the error bar of the normalizer.
        two_pass: Whether to repeat the adapted schedule frozen.
        conditional_ess: Fraction that sets the temperatures.
        num_moves: Kernel steps per temperature; adaptive by default.
        step_size: First step size; found by default.
        dtype: Dtype of the particles.

    Raises:
        ValueError: If neither a prior nor exactly one of ``reference`` and ``reference_scale`` is there.
    """

    def __init__(
        self,
        target: Target,
        *,
        reference: Target | None = None,
        reference_scale: float | None = None,
        kernel: Kernel | None = None,
        num_islands: int = 16,
        two_pass: bool = True,
        conditional_ess: float = 0.7,
        num_moves: int | None = None,
        step_size: float | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.target = target
        self._counted = CountedTarget(target)
        self.path = tempered_path(self._counted, reference=reference, reference_scale=reference_scale)
        self.kernel = kernel
        self.num_islands = num_islands
        self.two_pass = two_pass
        self.conditional_ess = conditional_ess
        self.num_moves = num_moves
        self.step_size = step_size
        self.dtype = dtype

    @property
    def evaluations(self) -> int:
        """Points at which the target's density and gradient were computed so far, warm-up included."""
        return self._counted.evaluations

    def sample(self, n: int, *, seed: int = 0) -> Particles:
        """Draw ``n`` weighted particles, rounded up to a multiple of ``num_islands``.

        Raises:
            RuntimeError: If temperature 1 is not reached, which an improper target brings about.
        """
        size = max(math.ceil(n / self.num_islands), 2)
        result = smc(
            self.path,
            n=size * self.num_islands,
            generator=torch.Generator().manual_seed(seed),
            num_islands=self.num_islands,
            kernel=self.kernel,
            two_pass=self.two_pass,
            conditional_ess=self.conditional_ess,
            num_moves=self.num_moves,
            step_size=self.step_size,
            dtype=self.dtype,
        )
        if not result.finished:
            raise RuntimeError(f"Expected to reach temperature 1; got stuck at {result.beta}. Is the target proper?")
        return result.particles


@final
class WasteFreeSMC(Sampler):
    """Waste-free tempered SMC, by default with a second, frozen pass whose normalizer is unbiased.

    All states of all Markov chains are kept, so that long chains, which hold mode weights, cost no particles. See
    :mod:`diffsampler.wastefree` for the algorithm.

    Reference:
        Waste-free sequential Monte Carlo (Dau & Chopin, 2022), https://arxiv.org/abs/2011.02328

    Arguments:
        target: The density.
        reference: Normalized law to start from, with a sampler; the target's prior by default.
        reference_scale: Standard deviation of a Gaussian reference, for targets without a prior. It must be wide
            enough to cover the target.
        kernel: Exact transition; HMC with mixed step sizes by default.
        num_islands: Independent islands, whose spread is the error bar of the normalizer.
        chain_length: States of each chain at each temperature, its ancestor included.
        two_pass: Whether to repeat the adapted schedule frozen.
        conditional_ess: Fraction that sets the temperatures.
        dtype: Dtype of the particles.

    Raises:
        ValueError: If neither a prior nor exactly one of ``reference`` and ``reference_scale`` is there.
    """

    def __init__(
        self,
        target: Target,
        *,
        reference: Target | None = None,
        reference_scale: float | None = None,
        kernel: Kernel | None = None,
        num_islands: int = 16,
        chain_length: int = 8,
        two_pass: bool = True,
        conditional_ess: float = 0.7,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.target = target
        self._counted = CountedTarget(target)
        self.path = tempered_path(self._counted, reference=reference, reference_scale=reference_scale)
        self.kernel = HMC(target.space, num_steps=6, smallest_step=0.15) if kernel is None else kernel
        self.num_islands = num_islands
        self.chain_length = chain_length
        self.two_pass = two_pass
        self.conditional_ess = conditional_ess
        self.dtype = dtype

    @property
    def evaluations(self) -> int:
        """Points at which the target's density and gradient were computed so far, warm-up included."""
        return self._counted.evaluations

    def run(self, n: int, *, seed: int = 0) -> WasteFreeRun:
        """Everything about a run: the schedule, acceptance, and the variance from chains.

        Raises:
            RuntimeError: If temperature 1 is not reached, which an improper target brings about.
        """
        result = waste_free_smc(
            self.path,
            kernel=self.kernel,
            num_chains=max(math.ceil(n / (self.num_islands * self.chain_length)), 2),
            chain_length=self.chain_length,
            generator=torch.Generator().manual_seed(seed),
            num_islands=self.num_islands,
            two_pass=self.two_pass,
            conditional_ess=self.conditional_ess,
            dtype=self.dtype,
        )
        if not result.finished:
            reached = result.schedule.betas[-1]
            raise RuntimeError(f"Expected to reach temperature 1; got stuck at {reached}. Is the target proper?")
        return result

    def sample(self, n: int, *, seed: int = 0) -> Particles:
        """Draw at least ``n`` weighted particles, a multiple of ``num_islands * chain_length``.

        The effective sample size is that of the chains: neighbours in a chain are no independent draws.
        """
        particles = self.run(n, seed=seed).particles
        chains = particles.x.reshape(-1, self.chain_length, self.target.dim)
        effective = min(bulk_effective_sample_size(chains), particles.ess)
        return replace(particles, effective=effective if self.chain_length >= 4 else None)
