"""The No-U-Turn sampler: many chains of the kernel in :mod:`diffsampler.kernels.nuts`."""

from __future__ import annotations

from typing import Unpack, final

from diffsampler.baselines.chains import ChainOptions, ChainSampler
from diffsampler.kernels import nuts
from diffsampler.target import Target

__all__ = ["NUTS"]


@final
class NUTS(ChainSampler):
    """The No-U-Turn sampler on many chains in one batch, multinomial, as in Stan.

    Every trajectory finds its own length, so it needs least knowledge of the target and few chains. Chains make their
    transitions each at its own pace and wait for each other only at the end, and where the step size is adapted;
    :attr:`lockstep_waste` says how much of the recorded work that was. Like all local samplers it does not travel
    between separated modes.

    Reference:
        The No-U-Turn Sampler (Hoffman & Gelman, 2014), https://arxiv.org/abs/1111.4246

    Takes the options of :class:`~diffsampler.baselines.chains.ChainSampler`, and:

    Arguments:
        target: The density.
        max_depth: Largest number of doublings of a trajectory.
    """

    def __init__(self, target: Target, *, max_depth: int = 10, **options: Unpack[ChainOptions]) -> None:
        kernel = nuts.NUTS(target.space, max_depth=max_depth)
        super().__init__(target, kernel, typical_evaluations=16.0, **options)
