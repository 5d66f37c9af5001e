"""Mixtures of products of von Mises laws: densities of angles whose constants, samplers and modes are exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from diffsampler.space import Torus
from diffsampler.target import Target
from diffsampler.targets import checks, draws

__all__ = ["VonMisesMixture", "sample_von_mises"]

LOG_2PI = math.log(2.0 * math.pi)


@final
class VonMisesMixture(Target):
    r"""A mixture of products of von Mises laws on a torus.

    .. math:: \rho(x) = Z \sum_k w_k \prod_j \frac{\exp(\kappa_{kj} \cos(x_j - \mu_{kj}))}{2 \pi I_0(\kappa_{kj})}

    The analogue on angles of a Gaussian mixture with diagonal covariances: near its mean a component has the standard
    deviation :math:`\kappa^{-1/2}`. Mode labels are the components with the largest share of the density.

    Reference: Mardia and Jupp, "Directional Statistics" (2000, https://doi.org/10.1002/9780470316979).

    Arguments:
        means: Component means in radians, shape ``(K, m)``.
        concentrations: :math:`\kappa > 0`, a number, shape ``(K,)`` or ``(K, m)``.
        weights: Positive weights, shape ``(K,)``, normalized here; equal by default.
        log_normalizer: :math:`\log Z`. By default the one that makes a single component
            :math:`\exp(\sum_j \kappa_j \cos(x_j - \mu_j))`: the mean over components, by weight, of
            :math:`\sum_j \log 2 \pi I_0(\kappa_{kj})`.

    Raises:
        ValueError: If shapes disagree, or concentrations or weights are not positive.
    """

    means: Tensor
    concentrations: Tensor
    log_coefficients: Tensor
    weights: Tensor

    def __init__(
        self,
        means: Tensor | Sequence[Sequence[float]],
        *,
        concentrations: Tensor | Sequence[object] | float = 4.0,
        weights: Tensor | Sequence[float] | None = None,
        log_normalizer: float | None = None,
    ) -> None:
        centers = checks.array("means", means, (None, None))
        components, m = centers.shape
        kappa = checks.positive("concentrations", concentrations, (), (components,), (components, m))
        kappa = (kappa.unsqueeze(-1) if kappa.ndim == 1 else kappa).expand(components, m).clone()
        shares = centers.new_ones(components) if weights is None else checks.positive("weights", weights, (components,))
        shares = shares / shares.sum()
        # Exponents are counted from the peak of each component, so that no concentration overflows.
        log_scaled = (LOG_2PI + torch.special.i0e(kappa).log()).sum(-1)
        if log_normalizer is None:
            log_normalizer = (shares * (log_scaled + kappa.sum(-1))).sum().item()
        log_z = float(checks.array("log_normalizer", log_normalizer, ()))
        super().__init__(Torus(m), log_normalizer=log_z, num_modes=components, has_sampler=True)
        self.register_buffer("means", centers)
        self.register_buffer("concentrations", kappa)
        self.register_buffer("log_coefficients", log_z + shares.log() - log_scaled)
        self.register_buffer("weights", shares)
        self._mode_weights: Tensor | None = None

    @classmethod
    def basins(cls) -> VonMisesMixture:
        """Two angles with four basins of weights .55, .3, .1 and .05, laid out like those of alanine dipeptide.

        Three basins have a negative first angle; the fourth, light and narrow, stands alone at a positive one.
        """
        means = torch.deg2rad(torch.tensor([[-75.0, 150.0], [-150.0, 160.0], [-80.0, -20.0], [60.0, 40.0]]).double())
        return cls(
            means,
            concentrations=[[10.0, 8.0], [6.0, 8.0], [10.0, 6.0], [20.0, 12.0]],
            weights=[0.55, 0.3, 0.1, 0.05],
        )

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.logsumexp(self._log_shares(self._delta(x)), -1)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            delta = self._delta(x)
            log_shares = self._log_shares(delta)
            log_prob = torch.logsumexp(log_shares, -1)
            pull = self.concentrations.to(x) * delta.sin()
            return log_prob, -torch.einsum("...k,...kj->...j", (log_shares - log_prob.unsqueeze(-1)).exp(), pull)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        u = draws.uniform(n, generator=generator, like=self.means)
        # The last edge is left out, so rounding in the sum cannot lead past the last component.
        component = torch.searchsorted(self.weights.to(u).cumsum(0)[:-1], u, right=True)
        offset = sample_von_mises(self.concentrations.to(u)[component], generator=generator)
        return self.space.project(self.means.to(u)[component] + offset)

    def mode_labels(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._log_shares(self._delta(x)).argmax(-1)

    def mode_weights(self) -> Tensor:
        """Probability of each label, shape ``(K,)``: exact where components are apart, error about 1e-3 at overlaps."""
        if self._mode_weights is None:
            self._mode_weights = self._integrate_labels(2**16)
        return self._mode_weights.to(self.weights.device)

    def _integrate_labels(self, points: int) -> Tensor:
        generator = torch.Generator(self.means.device).manual_seed(0)
        total = self.weights.new_zeros(self.weights.shape, dtype=torch.float64)
        for k, weight in enumerate(self.weights.double()):
            kappa = self.concentrations[k].double().expand(points, -1)
            x = self.means[k].double() + sample_von_mises(kappa, generator=generator)
            total += weight * torch.bincount(self.mode_labels(x), minlength=total.numel()) / points
        return total

    def _delta(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-2) - self.means.to(x)

    def _log_shares(self, delta: Tensor) -> Tensor:
        # cos - 1 as a square keeps its digits near the mean, where large concentrations need them.
        exponent = -2.0 * (0.5 * delta).sin().square() * self.concentrations.to(delta)
        return self.log_coefficients.to(delta) + exponent.sum(-1)


def sample_von_mises(concentration: Tensor, *, generator: torch.Generator | None) -> Tensor:
    r"""Draws with density proportional to :math:`\exp(\kappa \cos x)`, one for each entry, in [-pi, pi], float64.

    Rejection from a wrapped Cauchy law, which accepts at least two of three candidates at any concentration.

    Reference: Best and Fisher, "Efficient simulation of the von Mises distribution" (1979,
    https://doi.org/10.2307/2346732).
    """
    kappa = concentration.double().reshape(-1)
    tau = 1.0 + (1.0 + 4.0 * kappa.square()).sqrt()
    rho = (tau - (2.0 * tau).sqrt()) / (2.0 * kappa)
    # For small concentrations the difference above cancels.
    ratio = torch.where(kappa < 1e-4, 1.0 / kappa + kappa, (1.0 + rho.square()) / (2.0 * rho))
    x = torch.empty_like(kappa)
    open_ = torch.arange(len(kappa), device=kappa.device)
    while len(open_) > 0:
        u = draws.uniform(3, len(open_), generator=generator, like=kappa)
        r, k = ratio[open_], kappa[open_]
        z = torch.cos(math.pi * u[0])
        f = (1.0 + r * z) / (r + z)
        c = k * (r - f)
        # log1p of minus a uniform draw is finite at zero, which [0, 1) contains.
        accepted = (c.log() - torch.log1p(-u[1]) + 1.0 - c) >= 0.0
        angle = f.clamp(-1.0, 1.0).acos() * torch.where(u[2] < 0.5, -1.0, 1.0)
        x[open_[accepted]] = angle[accepted]
        open_ = open_[~accepted]
    return x.reshape(concentration.shape)
