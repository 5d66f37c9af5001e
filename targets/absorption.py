"""Oral absorption of a drug: a real posterior with two modes of different weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from diffsampler.space import Euclidean
from diffsampler.target import Target
from diffsampler.targets import checks
from diffsampler.targets.gaussian import Gaussian

__all__ = ["Absorption"]

LOG_2PI = math.log(2.0 * math.pi)
HOURS = (0.0, 0.25, 0.57, 1.12, 2.02, 3.82, 5.10, 7.03, 9.05, 12.12, 24.37)
CONCENTRATIONS = (0.74, 2.84, 6.57, 10.50, 9.66, 8.58, 8.36, 7.47, 6.89, 5.94, 3.28)
DOSE = 4.02
PRIOR_MEAN = (-1.0, -1.0, -1.0, -1.0)
PRIOR_SCALE = (2.0, 2.0, 2.0, 1.0)


@final
class Absorption(Target):
    r"""Posterior of the one-compartment model with first-order absorption, in 4 dimensions.

    .. math:: y_i \sim N(c(t_i), s^2), \qquad
              c(t) = \frac{d\, k_a}{V (k_a - k_e)} \left(e^{-k_e t} - e^{-k_a t}\right)

    with ``x`` the logs of the rates of absorption :math:`k_a` and elimination :math:`k_e` (1 / h), the volume ``V``
    (l / kg) and the noise ``s`` (mg / l), all with Gaussian priors. To exchange the rates and replace ``V`` by
    :math:`V k_e / k_a` leaves the curve as it is ("flip-flop", :meth:`flip`), so that every data set gives two modes,
    told apart by the prior of the volume alone, which makes them unequal. Which mode a point belongs to is the sign of
    ``x[..., 0] - x[..., 1]``.

    ``prior`` is the Gaussian prior.

    References:
        Nonlinear Mixed-Effects Models in S and S-PLUS (Pinheiro & Bates, 2000), appendix A.29 (data: theophylline,
        subject 1; Boeckmann, Sheiner & Beal, 1994); Clinical Pharmacokinetics: Concepts and Applications (Rowland &
        Tozer, 1995), on flip-flop kinetics

    Arguments:
        times: Hours since the dose, shape ``(n,)``, not negative.
        concentrations: In serum, mg / l, shape ``(n,)``.
        dose: mg per kg of body weight.

    Raises:
        ValueError: If shapes disagree, a time is negative or the dose is not positive.
    """

    times: Tensor
    concentrations: Tensor
    prior: Target

    def __init__(
        self,
        times: Tensor | Sequence[float] = HOURS,
        concentrations: Tensor | Sequence[float] = CONCENTRATIONS,
        *,
        dose: float = DOSE,
    ) -> None:
        hours = checks.array("times", times, (None,))
        observed = checks.array("concentrations", concentrations, (len(hours),))
        if bool((hours < 0).any()):
            raise ValueError(f"Expected times that are not negative; got {hours.min().item():g}.")
        amount = checks.positive("dose", dose, ()).item()
        super().__init__(Euclidean(4), prior=Gaussian(PRIOR_MEAN, scale=PRIOR_SCALE))
        self.dose = amount
        self.register_buffer("times", hours)
        self.register_buffer("concentrations", observed)

    def log_prob(self, x: Tensor) -> Tensor:
        log_noise = x[..., 3]
        z = (self.concentrations.to(x) - self.curve(x)) * torch.exp(-log_noise).unsqueeze(-1)
        count = len(self.times)
        return self.prior.log_prob(x) - 0.5 * z.square().sum(-1) - count * (log_noise + 0.5 * LOG_2PI)

    def curve(self, x: Tensor) -> Tensor:
        """Expected concentrations, ``(..., 4)`` to ``(..., n)``."""
        first, second, log_volume = x[..., 0], x[..., 1], x[..., 2]
        # In terms of the slower rate and the gap nothing overflows and nothing cancels.
        fast, slow = torch.maximum(first, second).exp(), torch.minimum(first, second).exp()
        gap = torch.maximum(fast - slow, 1e-12 * fast).unsqueeze(-1)
        times = self.times.to(x)
        shape = torch.exp(-slow.unsqueeze(-1) * times) * -torch.expm1(-gap * times) / gap
        return self.dose * torch.exp(first - log_volume).unsqueeze(-1) * shape

    def constrain(self, x: Tensor) -> dict[str, Tensor]:
        """``absorption``, ``elimination``, ``volume`` and ``noise``, each ``(n,)``."""
        names = ("absorption", "elimination", "volume", "noise")
        return {name: x[..., i].exp() for i, name in enumerate(names)}

    def flip(self, x: Tensor) -> Tensor:
        """The other point of the same curve, ``(..., 4)``: an involution that preserves volume and likelihood."""
        first, second, log_volume, log_noise = x.unbind(-1)
        return torch.stack([second, first, log_volume + second - first, log_noise], -1)
