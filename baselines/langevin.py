"""Langevin samplers: many chains of the kernels in :mod:`diffsampler.kernels.langevin`."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from diffsampler.baselines.chains import ChainSampler
from diffsampler.kernel import Kernel
from diffsampler.kernels import langevin
from diffsampler.target import Target

__all__ = ["MALA", "ULA"]


@final
class MALA(ChainSampler):
    """Metropolis-adjusted Langevin algorithm, exact in the limit of long chains.

    Reference:
        Optimal scaling of discrete approximations to Langevin diffusions (Roberts & Rosenthal, 1998),
        https://doi.org/10.1111/1467-9868.00123

    Takes the arguments of :class:`~diffsampler.baselines.chains.ChainSampler`.
    """

    def __init__(
        self,
        target: Target,
        *,
        num_chains: int = 64,
        warmup: int = 500,
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
        self._kernel = langevin.MALA(target.space)

    @property
    def kernel(self) -> Kernel:
        return self._kernel


@final
class ULA(ChainSampler):
    r"""Unadjusted Langevin algorithm. **Biased**: its law differs from the target by the order of its step.

    Nothing in the output shows the bias, and more draws do not reduce it; use :class:`MALA` for an exact chain. The
    step size is found with MALA, such that MALA would accept 90 % of the proposals, and then used without the test.

    Reference:
        Exponential convergence of Langevin distributions and their discrete approximations (Roberts & Tweedie, 1996),
        https://doi.org/10.2307/3318418

    Takes the arguments of :class:`~diffsampler.baselines.chains.ChainSampler`.
    """

    def __init__(
        self,
        target: Target,
        *,
        num_chains: int = 64,
        warmup: int = 500,
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
        self._kernel = langevin.ULA(target.space)
        self._pilot = langevin.MALA(target.space)
        self._pilot.target_acceptance = 0.9

    @property
    def kernel(self) -> Kernel:
        return self._kernel

    @property
    def warmup_kernel(self) -> Kernel:
        return self._pilot
