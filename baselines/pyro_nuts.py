"""Pyro's own NUTS as a baseline, on the same model and in the same unconstrained space as every other sampler."""

from __future__ import annotations

import math
from typing import final

from diffsampler.integrations.pyro_nuts import nuts_particles
from diffsampler.integrations.pyro_target import PyroTarget
from diffsampler.particles import Particles
from diffsampler.sampler import Sampler

__all__ = ["PyroNUTS"]


@final
class PyroNUTS(Sampler):
    """NUTS of Pyro, chain after chain, each with its own adaptation.

    The particles are the chains' draws with equal weights: ``replicates`` is the number of chains, ``effective`` the
    smallest effective sample size over coordinates, and there is no normalizing constant.

    Arguments:
        target: A Pyro model with its data.
        num_chains: Number of chains.
        warmup_steps: Adaptation steps of each chain.

    References:
        The No-U-Turn Sampler (Hoffman and Gelman, 2014), https://arxiv.org/abs/1111.4246
    """

    target: PyroTarget

    def __init__(self, target: PyroTarget, *, num_chains: int = 4, warmup_steps: int = 500) -> None:
        if not isinstance(target, PyroTarget):
            raise TypeError(f"Expected a PyroTarget, whose model NUTS runs; got {type(target).__name__}.")
        if num_chains < 1 or warmup_steps < 0:
            raise ValueError(f"Expected num_chains >= 1 and warmup_steps >= 0; got {num_chains} and {warmup_steps}.")
        self.target = target
        self.num_chains = num_chains
        self.warmup_steps = warmup_steps

    def sample(self, n: int, *, seed: int = 0) -> Particles:
        return nuts_particles(
            self.target,
            num_samples=math.ceil(n / self.num_chains),
            warmup_steps=self.warmup_steps,
            num_chains=self.num_chains,
            seed=seed,
        )
