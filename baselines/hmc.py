"""Hamiltonian Monte Carlo: many chains of the kernel in :mod:`diffsampler.kernels.hmc`."""

from __future__ import annotations

from typing import Unpack, final

from diffsampler.baselines.chains import ChainOptions, ChainSampler
from diffsampler.kernels import hmc
from diffsampler.target import Target

__all__ = ["HMC"]


@final
class HMC(ChainSampler):
    """Hamiltonian Monte Carlo with a jittered number of leapfrog steps, the same for all chains.

    Reference:
        MCMC using Hamiltonian dynamics (Neal, 2011), https://arxiv.org/abs/1206.1901

    Takes the options of :class:`~diffsampler.baselines.chains.ChainSampler`, and:

    Arguments:
        target: The density.
        num_steps: Largest number of leapfrog steps of a transition.
        smallest_step: Mixed step sizes per chain, see :class:`~diffsampler.kernels.HMC`.
    """

    def __init__(
        self, target: Target, *, num_steps: int = 16, smallest_step: float = 1.0, **options: Unpack[ChainOptions]
    ) -> None:
        kernel = hmc.HMC(target.space, num_steps=num_steps, smallest_step=smallest_step)
        super().__init__(target, kernel, typical_evaluations=0.5 * (1 + num_steps), **options)
