"""The prior of a Pyro model as the law from which learned chains start."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from diffsampler.integrations.pyro_target import PyroTarget
from diffsampler.priors import Prior
from diffsampler.target import Target

__all__ = ["ModelPrior"]


@final
class ModelPrior(Prior):
    r"""The prior :math:`p(\theta)` of a model, so that annealed chains temper its likelihood.

    ``ds.CMCD(target, prior=ds.pyro.ModelPrior(target))`` then goes along :math:`p(\theta)\, p(y | \theta)^\beta`, as
    SMC and parallel tempering do by themselves. Nothing of it is learned. Where the prior is far wider than the
    posterior, a fitted Gaussian (the default of those methods) needs fewer steps.

    Arguments:
        target: A model with a proper prior.

    Raises:
        ValueError: If the model has none.
    """

    origin: Tensor

    def __init__(self, target: PyroTarget) -> None:
        if target.prior is None:
            raise ValueError("Expected a proper prior; got a model with improper, masked or scaled latent sites.")
        super().__init__(target.space)
        self.law: Target = target.prior
        self.register_buffer("origin", torch.zeros(()))

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.law.sample(n, generator=generator).to(self.origin)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.law.log_prob(x.double())

    def score(self, x: Tensor) -> Tensor:
        return self.law.score(x, create_graph=torch.is_grad_enabled() and x.requires_grad)
