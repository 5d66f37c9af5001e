"""Non-reversible parallel tempering as a sampler."""

from __future__ import annotations

import math
from typing import final

import torch

from diffsampler import estimators
from diffsampler.baselines.chains import bulk_effective_sample_size
from diffsampler.baselines.smc import tempered_path
from diffsampler.kernel import Kernel
from diffsampler.kernels.hmc import HMC
from diffsampler.parallel_tempering import TemperingRun, parallel_tempering, pilot_ladder
from diffsampler.particles import Particles
from diffsampler.sampler import Sampler
from diffsampler.target import CountedTarget, Target

__all__ = ["ParallelTempering"]


@final
class ParallelTempering(Sampler):
    """Non-reversible parallel tempering of many independent systems in one batch, with ``log Z``.

    Every system is a ladder of replicas from the reference to the target. Temperatures and step sizes are tuned in
    rounds of doubling length, frozen, and then all states at temperature 1 are recorded with equal weights. Chains of
    systems are independent of each other, so their spread is the error bar of expectations and of the normalizer. See
    :mod:`diffsampler.parallel_tempering` for the algorithm and for when it fails.

    References:
        Non-reversible parallel tempering: a scalable highly parallel MCMC scheme (Syed, Bouchard-Côté, Deligiannidis &
        Doucet, 2022), https://arxiv.org/abs/1905.02939

    Arguments:
        target: The density.
        reference: Normalized law to start from, with a sampler (a fitted Gaussian or mixture, say); the target's prior
            by default.
        reference_scale: Standard deviation of a Gaussian reference, for targets without a prior. It must be wide
            enough to cover the target.
        kernel: Exact transition between swaps; HMC with mixed step sizes by default.
        num_systems: Independent systems.
        num_levels: Temperatures, both ends included; by default as many as a pilot run suggests.
        tuning_rounds: Rounds of 2, 4, 8, ... scans that tune and burn in; by default so many that the burn-in is about
            as long as the record.
        num_moves: Kernel steps between swaps.
        dtype: Dtype of the replicas.

    Raises:
        ValueError: If neither a prior nor exactly one of ``reference`` and ``reference_scale`` is there, or a number
            is out of range.
    """

    def __init__(
        self,
        target: Target,
        *,
        reference: Target | None = None,
        reference_scale: float | None = None,
        kernel: Kernel | None = None,
        num_systems: int = 32,
        num_levels: int | None = None,
        tuning_rounds: int | None = None,
        num_moves: int = 1,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if num_systems < 2:
            raise ValueError(f"Expected at least 2 systems, whose spread is the error bar; got {num_systems}.")
        for name, value in (("tuning_rounds", tuning_rounds), ("num_moves", num_moves)):
            if value is not None and value < 1:
                raise ValueError(f"Expected {name} to be a positive integer; got {value}.")
        if num_levels is not None and num_levels < 2:
            raise ValueError(f"Expected num_levels to be at least 2; got {num_levels}.")
        self.target = target
        self._counted = CountedTarget(target)
        self.path = tempered_path(self._counted, reference=reference, reference_scale=reference_scale)
        self.kernel = HMC(target.space, num_steps=6, smallest_step=0.15) if kernel is None else kernel
        if not self.kernel.exact:
            raise ValueError(f"Expected an exact kernel; got {type(self.kernel).__name__}.")
        self.num_systems = num_systems
        self.num_levels = num_levels
        self.tuning_rounds = tuning_rounds
        self.num_moves = num_moves
        self.dtype = dtype

    @property
    def evaluations(self) -> int:
        """Points at which the target's density and gradient were computed so far, tuning included."""
        return self._counted.evaluations

    def run(self, n: int, *, seed: int = 0) -> TemperingRun:
        """Everything about a run: slopes at all levels, rejection rates, the barrier, round trips.

        Raises:
            ValueError: If the target is improper, or finite at none of the reference draws.
        """
        generator = torch.Generator().manual_seed(seed)
        ladder = pilot_ladder(
            self.path, kernel=self.kernel, generator=generator, num_levels=self.num_levels, dtype=self.dtype
        )
        num_scans = max(math.ceil(n / self.num_systems), 1)
        # Rounds 1 .. r take 2^(r+1) - 2 scans together.
        rounds = max(4, math.ceil(math.log2(num_scans)) - 1) if self.tuning_rounds is None else self.tuning_rounds
        return parallel_tempering(
            self.path,
            ladder,
            kernel=self.kernel,
            num_scans=num_scans,
            generator=generator,
            num_systems=self.num_systems,
            tuning_rounds=rounds,
            num_moves=self.num_moves,
            dtype=self.dtype,
        )

    def sample(self, n: int, *, seed: int = 0) -> Particles:
        """Record at least ``n`` states, ``ceil(n / num_systems)`` scans of each system, system after system."""
        return to_particles(self.run(n, seed=seed))


def to_particles(run: TemperingRun) -> Particles:
    """The states at temperature 1 with equal weights, and the normalizer of each system."""
    systems, scans, _ = run.x.shape
    log_z = run.log_normalizers
    return Particles(
        run.x.flatten(0, 1),
        log_z.new_full((systems * scans,), estimators.log_mean_exp(log_z)),
        replicates=systems,
        effective=bulk_effective_sample_size(run.x),
        nonfinite=0,
        known_replicates=log_z,
    )
