"""Langevin samplers: many chains of the kernels in :mod:`diffsampler.kernels.langevin`."""

from __future__ import annotations

from typing import Unpack, final

from diffsampler.baselines.chains import ChainOptions, ChainSampler
from diffsampler.kernels import langevin
from diffsampler.target import Target

__all__ = ["MALA", "ULA"]


@final
class MALA(ChainSampler):
    """Metropolis-adjusted Langevin algorithm, exact in the limit of long chains.

    Reference:
        Optimal scaling of discrete approximations to Langevin diffusions (Roberts & Rosenthal, 1998),
        https://doi.org/10.1111/1467-9868.00123

    Takes the options of :class:`~diffsampler.baselines.chains.ChainSampler`.
    """

    def __init__(self, target: Target, **options: Unpack[ChainOptions]) -> None:
        super().__init__(target, langevin.MALA(target.space), **options)


@final
class ULA(ChainSampler):
    r"""Unadjusted Langevin algorithm. **Biased**: its law differs from the target by the order of its step.

    Nothing in the output shows the bias, and more draws do not reduce it; use :class:`MALA` for an exact chain. The
    step size is found with MALA, such that MALA would accept 90 % of the proposals, and then used without the test.

    Reference:
        Exponential convergence of Langevin distributions and their discrete approximations (Roberts & Tweedie, 1996),
        https://doi.org/10.2307/3318418

    Takes the options of :class:`~diffsampler.baselines.chains.ChainSampler`.
    """

    def __init__(self, target: Target, **options: Unpack[ChainOptions]) -> None:
        pilot = langevin.MALA(target.space)
        pilot.target_acceptance = 0.9
        super().__init__(target, langevin.ULA(target.space), warmup_kernel=pilot, **options)
