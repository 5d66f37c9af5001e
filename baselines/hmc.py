"""Hamiltonian Monte Carlo: many chains of the kernel in :mod:`diffsampler.kernels.hmc`."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from diffsampler.baselines.chains import ChainSampler
from diffsampler.kernel import Kernel
from diffsampler.kernels import hmc
from diffsampler.target import Target

__all__ = ["HMC"]


@final
class HMC(ChainSampler):
    """Hamiltonian Monte Carlo with a jittered number of leapfrog steps, the same for all chains.

    Reference:
        MCMC using Hamiltonian dynamics (Neal, 2011), https://arxiv.org/abs/1206.1901

    Takes the arguments of :class:`~diffsampler.baselines.chains.ChainSampler`, and:

    Arguments:
        num_steps: Largest number of leapfrog steps of a transition.
        smallest_step: Mixed step sizes per chain, see :class:`~diffsampler.kernels.HMC`.
    """

    def __init__(
        self,
        target: Target,
        *,
        num_chains: int = 64,
        warmup: int = 500,
        num_steps: int = 16,
        smallest_step: float = 1.0,
        thin: int = 1,
        init: Tensor | None = None,
        init_scale: float = 1.0,
        step_size: float | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(
            target,
            num_chains=num_chains,
            warmup=warmup,
            thin=thin,
            init=init,
            init_scale=init_scale,
            step_size=step_size,
            dtype=dtype,
        )
        self._kernel = hmc.HMC(target.space, num_steps=num_steps, smallest_step=smallest_step)

    @property
    def kernel(self) -> Kernel:
        return self._kernel
