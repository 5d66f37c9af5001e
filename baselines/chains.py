"""Many Markov chains in one batch: warm up, freeze, record."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from diffsampler.kernel import Kernel, KernelParams, LogDensity, State
from diffsampler.kernels.adaptation import DualAveraging, PooledVariance, reasonable_step_size, spread
from diffsampler.particles import Particles
from diffsampler.sampler import Sampler
from diffsampler.target import CountedTarget, Target

__all__ = ["ChainSampler", "Warmup", "bulk_effective_sample_size"]


class Warmup(NamedTuple):
    """Where the chains are after adaptation, and the frozen parameters."""

    state: State
    params: KernelParams
    evaluations: int
    """Evaluations spent per chain."""


class ChainSampler(Sampler):
    """Chains that start dispersed, adapt together, freeze, and record every state, accepted or not.

    Step sizes follow the acceptance averaged over chains (dual averaging), the diagonal metric is the variance pooled
    over chains in windows that double, as in Stan. The weights of the result are equal and carry no normalizer; its
    effective sample size is the smallest over coordinates, across chains.

    Arguments:
        target: The density.
        num_chains: Number of chains.
        warmup: Adaptation steps; none of them is recorded.
        thin: Record every so many steps.
        init: Starting points ``(num_chains, D)``. By default exact draws of the target's prior if it has one, else
            ``init_scale`` times Gaussian noise.
        init_scale: See ``init``.
        step_size: Fixed step size in units of the metric, instead of an adapted one.
        dtype: Dtype of the particles.

    Raises:
        ValueError: If ``init`` has the wrong shape or a number is out of range.
    """

    def __init__(
        self,
        target: Target,
        *,
        num_chains: int,
        warmup: int,
        thin: int,
        init: Tensor | None,
        init_scale: float,
        step_size: float | None,
        dtype: torch.dtype,
    ) -> None:
        if num_chains < 2:
            raise ValueError(f"Expected at least 2 chains; got {num_chains}.")
        if warmup < 1 or thin < 1:
            raise ValueError(f"Expected warmup and thin to be positive integers; got {warmup} and {thin}.")
        if init is not None and init.shape != (num_chains, target.dim):
            raise ValueError(f"Expected init of shape {(num_chains, target.dim)}; got {tuple(init.shape)}.")
        if step_size is not None and not step_size > 0.0:
            raise ValueError(f"Expected step_size to be positive; got {step_size}.")
        self.target = target
        self._counted = CountedTarget(target)
        self.num_chains = num_chains
        self.warmup = warmup
        self.thin = thin
        self.init = init
        self.init_scale = init_scale
        self.step_size = step_size
        self.dtype = dtype

    @property
    @abstractmethod
    def kernel(self) -> Kernel:
        """The transition that is recorded."""

    @property
    def warmup_kernel(self) -> Kernel:
        """The exact transition that adaptation listens to."""
        return self.kernel

    @property
    def evaluations(self) -> int:
        """Points at which the target's density and gradient were computed so far, warm-up included."""
        return self._counted.evaluations

    def sample(self, n: int, *, seed: int = 0) -> Particles:
        """Draw at least ``n`` points, ``ceil(n / num_chains)`` from each chain, chain after chain."""
        generator = torch.Generator().manual_seed(seed)
        log_density = self._counted.log_prob_and_score
        start = self.warmup_kernel.init(self._start(generator), log_density)
        if not bool((start.log_prob.isfinite() & start.score.isfinite().all(-1)).all()):
            bad = start.x[~(start.log_prob.isfinite() & start.score.isfinite().all(-1))][0]
            raise ValueError(f"Expected a finite density and score at the starting points; got none at {bad.tolist()}.")
        state, params, _ = self._warm_up(start, log_density, generator)
        draws, nonfinite = [], 0
        for _ in range(max(math.ceil(n / self.num_chains), 1)):
            for _ in range(self.thin):
                state, info = self.kernel.step(state, log_density, params, generator)
                nonfinite += int(info.nonfinite.sum())
            draws.append(state.x)
        x = torch.stack(draws, 1)
        return Particles(
            x.flatten(0, 1),
            torch.zeros(x.shape[0] * x.shape[1], dtype=torch.float64, device=x.device),
            replicates=self.num_chains,
            has_normalizer=False,
            effective=bulk_effective_sample_size(x),
            nonfinite=nonfinite,
        )

    def _start(self, generator: torch.Generator) -> Tensor:
        space, prior = self.target.space, self.target.prior
        if self.init is not None:
            return space.project(self.init.to(self.dtype))
        if prior is not None:
            return prior.sample(self.num_chains, generator=generator).to(self.dtype)
        like = torch.zeros((), dtype=self.dtype)
        return space.project(self.init_scale * space.noise((self.num_chains,), like=like, generator=generator))

    def _warm_up(self, state: State, log_density: LogDensity, generator: torch.Generator) -> Warmup:
        kernel, space = self.warmup_kernel, self.target.space
        scale = spread(space, state.x)
        guess = KernelParams(scale.new_tensor(self.step_size or 0.5 * space.dof**-0.25), scale)
        tuner, pool, evaluations = DualAveraging(kernel.target_acceptance), PooledVariance(space), 1
        adapts = self.step_size is None
        if adapts:
            first, spent = reasonable_step_size(kernel, state, log_density, guess, generator=generator)
            guess, evaluations = guess._replace(step_size=scale.new_tensor(first)), evaluations + spent
        tuned, moments, params = tuner.init(float(guess.step_size)), pool.init(state.x), guess
        ends = _window_ends(self.warmup)
        for t in range(1, self.warmup + 1):
            state, info = kernel.step(state, log_density, params, generator)
            evaluations += info.evaluations
            moments = pool.update(moments, state.x)
            if adapts:
                tuned = tuner.update(tuned, float(info.acceptance.mean()))
                params = params._replace(step_size=scale.new_tensor(tuner.step_size(tuned)))
            if t in ends:
                scale = pool.scale(moments)
                params, moments = params._replace(scale=scale), pool.init(state.x)
                # The best step size belongs to the metric: look for it anew.
                tuned = tuner.init(tuner.averaged(tuned))
        if adapts:
            params = params._replace(step_size=scale.new_tensor(tuner.averaged(tuned)))
        return Warmup(state, params, evaluations)


def _window_ends(warmup: int) -> set[int]:
    """Steps after which the metric is renewed: windows double, and the last fifth adapts the step size only."""
    last, end, width = warmup - max(warmup // 5, 1), 0, max(warmup // 20, 1)
    ends = set()
    while end + width <= last:
        end += width
        ends.add(end)
        width *= 2
    return ends


def bulk_effective_sample_size(x: Tensor) -> float:
    """Smallest effective sample size over coordinates of chains ``(chains, draws, D)``, between-chain spread included.

    Reference:
        Inference from iterative simulation using multiple sequences (Gelman & Rubin, 1992); Bayesian Data Analysis
        (Gelman et al., 2013), section 11.5

    Returns:
        A count; NaN for fewer than four draws per chain; 1 if some coordinate never moved.
    """
    if x.shape[1] < 4:
        return math.nan
    ess = effective_sample_size(x.double(), chain_dim=0, sample_dim=1)
    return float(torch.where(ess.isfinite(), ess, torch.ones_like(ess)).min())
