"""Annealed importance sampling as a sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch

from diffsampler.annealing import anneal, check_betas, tune_schedule
from diffsampler.baselines.smc import tempered_path
from diffsampler.kernel import Kernel, KernelParams
from diffsampler.kernels.hmc import HMC
from diffsampler.particles import Particles
from diffsampler.sampler import Sampler
from diffsampler.smc import smc
from diffsampler.target import CountedTarget, Target
from diffsampler.tempering import Schedule

__all__ = ["AIS"]


@final
class AIS(Sampler):
    """Annealed importance sampling: independent particles, each with the exact weight of its own path.

    The schedule is fixed before any recorded particle moves, so ``E[w] = Z`` exactly. Particles never interact, which
    makes the bounds of bidirectional Monte Carlo possible; the price is that weights degenerate as the number of
    temperatures falls short of the dimension, where :class:`~diffsampler.baselines.SMC` resamples. The weights see
    nothing of a mode that no path entered.

    Reference:
        Annealed importance sampling (Neal, 2001), https://arxiv.org/abs/physics/9803008

    Arguments:
        target: The density.
        reference: Normalized law to start from, with a sampler; the target's prior by default.
        reference_scale: Standard deviation of a Gaussian reference, for targets without a prior. It must be wide
            enough to cover the target.
        betas: Temperatures after 0, such as :func:`~diffsampler.annealing.linear_betas` or
            :func:`~diffsampler.annealing.sigmoid_betas` give; by default those of an adaptive SMC run of ``pilot``
            particles, at steps of equal conditional ESS.
        conditional_ess: Fraction that sets the temperatures of the default.
        kernel: Transition; HMC of four steps by default. With an unadjusted kernel the weights take its path term; it
            needs ``step_size``.
        num_moves: Kernel steps at each temperature.
        step_size: One step size for all temperatures, in units of the reference's spread; by default tuned with the
            metric at each temperature in the pilot run.
        pilot: Particles of the run that tunes.
        dtype: Dtype of the particles.

    Raises:
        ValueError: If neither a prior nor exactly one of ``reference`` and ``reference_scale`` is there, or options do
            not fit.
    """

    def __init__(
        self,
        target: Target,
        *,
        reference: Target | None = None,
        reference_scale: float | None = None,
        betas: Sequence[float] | None = None,
        conditional_ess: float = 0.98,
        kernel: Kernel | None = None,
        num_moves: int = 1,
        step_size: float | None = None,
        pilot: int = 512,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        # Its number of leapfrog steps is fixed: particles that shared a random one would not be independent.
        self.kernel = HMC(target.space, num_steps=4, jitter_steps=False) if kernel is None else kernel
        if betas is not None:
            check_betas(betas)
        if not self.kernel.exact and (step_size is None or betas is None):
            name = type(self.kernel).__name__
            raise ValueError(f"Expected step_size and betas with the unadjusted kernel {name}; got None.")
        if step_size is not None and betas is None:
            raise ValueError("Expected betas with a fixed step_size; got None.")
        if num_moves < 1 or pilot < 2:
            raise ValueError(f"Expected num_moves >= 1 and pilot >= 2; got {num_moves} and {pilot}.")
        self.target = target
        self._counted = CountedTarget(target)
        self.path = tempered_path(self._counted, reference=reference, reference_scale=reference_scale)
        self.betas = None if betas is None else tuple(betas)
        self.conditional_ess = conditional_ess
        self.num_moves = num_moves
        self.step_size = step_size
        self.pilot = pilot
        self.dtype = dtype

    @property
    def evaluations(self) -> int:
        """Points at which the target's density and gradient were computed so far, the pilot run included."""
        return self._counted.evaluations

    def sample(self, n: int, *, seed: int = 0) -> Particles:
        """Draw ``n`` independent weighted particles.

        Raises:
            ValueError: If the target is finite at none of the reference draws.
            RuntimeError: If the pilot run does not reach temperature 1, which an improper target brings about.
        """
        if n < 1:
            raise ValueError(f"Expected n >= 1; got {n}.")
        generator = torch.Generator().manual_seed(seed)
        betas, params = self._prepare(generator)
        x0 = self.path.reference.sample(n, generator=generator).to(self.dtype)
        result = anneal(self.path, betas, self.kernel, params, x0, generator, num_moves=self.num_moves)
        return Particles(result.x, result.log_weight, nonfinite=0)

    def _prepare(self, generator: torch.Generator) -> tuple[tuple[float, ...], list[KernelParams]]:
        """Temperatures and parameters, from numbers of the pilot run only."""
        if self.betas is not None and self.step_size is not None:
            x = self.path.reference.sample(self.pilot, generator=generator)
            step = torch.tensor(self.step_size, dtype=torch.float64)
            return self.betas, [KernelParams(step, x.std().reshape(1))] * len(self.betas)
        schedule = self._tune(generator)
        pairs = zip(schedule.step_sizes, schedule.scales, strict=True)
        return schedule.betas, [KernelParams(scale.new_tensor(step), scale) for step, scale in pairs]

    def _tune(self, generator: torch.Generator) -> Schedule:
        if self.betas is not None:
            return tune_schedule(
                self.path, self.betas, self.kernel, n=self.pilot, generator=generator, dtype=self.dtype
            )
        result = smc(
            self.path,
            n=self.pilot,
            generator=generator,
            num_islands=1,
            kernel=self.kernel,
            conditional_ess=self.conditional_ess,
            max_moves=4,
            dtype=self.dtype,
        )
        if not result.finished:
            raise RuntimeError(f"Expected to reach temperature 1; got stuck at {result.beta}. Is the target proper?")
        return result.schedule
