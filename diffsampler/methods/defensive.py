r"""A learned diffusion with a defence: no mass that a known density covers can be missed.

Path weights :math:`w_F` are exact, but where the learned chain hardly ever ends they say nothing: its estimate of log Z
is then too small and its error bar too. So a share :math:`\beta` of the draws comes from a reference density :math:`q`
with heavy tails, each continued backward by the chain's own :math:`B`. On paths, both kinds are draws of the mixture
:math:`(1 - \beta) F + \beta\, q B`, whose weight is

.. math:: w = \Big[ \frac{1 - \beta}{w_F} + \beta\, \frac{q(x_K)}{\rho(x_K)} \Big]^{-1}
    \le \frac{1}{\beta} \frac{\rho(x_K)}{q(x_K)}, \qquad E[w] = Z .

Weights are bounded wherever ``q`` covers, whatever the chain has learned or forgotten; where the chain is good they are
close to ``Z`` for both kinds, so that the defence costs next to nothing.

References:
    Weighted average importance sampling and defensive mixture distributions (Hesterberg, 1995),
    https://doi.org/10.1080/00401706.1995.10484303
    Safe and effective importance sampling (Owen, Zhou, 2000), https://doi.org/10.1080/01621459.2000.10473909
    (deterministic shares)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from diffsampler.estimators import elbo
from diffsampler.particles import Particles
from diffsampler.sampler import DiffusionSampler, Sampler
from diffsampler.target import Target

__all__ = ["DefensiveSampler", "defence_share"]

SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
PREMIUM = math.log(1.05)
"""What insurance may cost: the largest share whose effective sample size is within five per cent of the best."""
NEGLIGIBLE = math.log(1e-4)
"""Share of all weight below which paths without a finite weight do not count as lost."""


def _same(x: Tensor) -> Tensor:
    return x


@final
class DefensiveSampler(Sampler):
    """Draws of a learned diffusion and of a reference density, weighted as draws of their mixture.

    Arguments:
        target: The density, in its own coordinates.
        inner: Learned diffusion of the same density, perhaps in other coordinates.
        reference: Normalised density with an exact sampler, in the target's coordinates.
        share: Share of the draws that come from the reference.
        to_original: Map of points ``(n, D)`` of ``inner`` to the target's coordinates.
        to_inner: Its inverse.

    Raises:
        ValueError: If the reference has no exact sampler or is not normalised, or ``share`` is not in (0, 1).
    """

    def __init__(
        self,
        target: Target,
        inner: DiffusionSampler,
        reference: Target,
        *,
        share: float = 0.1,
        to_original: Callable[[Tensor], Tensor] = _same,
        to_inner: Callable[[Tensor], Tensor] = _same,
    ) -> None:
        if not reference.has_sampler or reference.log_normalizer != 0.0:
            raise ValueError(
                "Expected a normalised reference with an exact sampler; got one with "
                f"has_sampler={reference.has_sampler} and log_normalizer={reference.log_normalizer}."
            )
        if not 0.0 < share < 1.0:
            raise ValueError(f"Expected 0 < share < 1; got {share}.")
        self.target = target
        self.inner = inner
        self.reference = reference
        self.share = share
        self.to_original = to_original
        self.to_inner = to_inner

    @property
    def evaluations(self) -> int:
        return self.inner.evaluations

    def sample(self, n: int, *, seed: int = 0) -> Particles:
        """Draw ``n`` independent weighted particles, at random order of their two kinds."""
        if n < 1:
            raise ValueError(f"Expected n >= 1; got {n}.")
        generator = torch.Generator(self.inner.device).manual_seed(seed)
        defended = round(self.share * n)
        x, log_path = self._learned(n - defended, generator)
        bound = elbo(log_path).value
        lost = n - defended - x.shape[0]
        if defended:
            drawn, log_drawn = self._defended(defended, generator)
            lost += defended - drawn.shape[0]
            x, log_path = torch.cat([x, drawn]), torch.cat([log_path, log_drawn])
        log_weight, log_bound = self._mixture_weight(x, log_path, defended / n)
        keep = ~log_weight.isnan() & (log_weight < math.inf)
        missed = log_bound[~keep]
        if bool(keep.any()) and torch.logsumexp(missed, 0) < torch.logsumexp(log_weight[keep], 0) + NEGLIGIBLE:
            # Far out in the reference's tails a path may overflow; what bounds its weight says that it is nothing.
            log_weight, keep = torch.where(keep, log_weight, -math.inf), torch.ones_like(keep)
        lost += int((~keep).sum())
        if lost == n:
            raise RuntimeError("All particles are non-finite. Check the target and the reference.")
        x, log_weight = x[keep], log_weight[keep]
        order = torch.randperm(x.shape[0], generator=generator, device=x.device)
        # A lost particle is one with weight zero: the mean over all n draws stays unbiased.
        return Particles(x[order], log_weight[order] + math.log((n - lost) / n), nonfinite=lost, known_elbo=bound)

    def _learned(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ends of forward paths in the target's coordinates, and their path weights."""
        particles = self.inner.sample(n, seed=_seed(generator))
        kept = len(particles)
        return self.to_original(particles.x).double(), particles.log_weight - math.log(kept / n)

    def _defended(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws of the reference, and the path weights of backward paths from them."""
        x = self.reference.sample(n, generator=generator).double()
        z = self.to_inner(x)
        keep = z.isfinite().all(-1)
        x, z = x[keep], z[keep]
        if not len(x):
            return x, x.new_zeros(0)
        return x, self.inner.backward_weights(z, generator=generator)

    def _mixture_weight(self, x: Tensor, log_path: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Log weight of paths that end in ``x`` as draws of the mixture, and its bound for any path."""
        if share == 0.0:
            return log_path, torch.full_like(log_path, math.inf)
        with torch.no_grad():
            log_bound = self.target.log_prob(x).double() - self.reference.log_prob(x).double() - math.log(share)
        return -torch.logaddexp(math.log1p(-share) - log_path, -log_bound), log_bound


def defence_share(inner: DiffusionSampler, z: Tensor, log_ratio: Tensor, *, generator: torch.Generator) -> float:
    r"""Largest share of the reference's draws that costs next to nothing, as points from near the target tell.

    The variance of the weights is :math:`Z\,(E_\pi[w] - Z)`, and :math:`E_\pi` is a mean over backward paths. Such
    points see tails only by chance, so of all shares that are about as good the largest is taken.

    Arguments:
        inner: The learned diffusion.
        z: Points of approximately the target's law in its coordinates, shape ``(n, D)``.
        log_ratio: Unnormalized target over reference density there, shape ``(n,)``.
        generator: Source of randomness.
    """
    log_path = inner.backward_weights(z, generator=generator)
    keep = log_path.isfinite() & log_ratio.isfinite()
    path, ratio = log_path[keep], log_ratio[keep].double()
    if not len(path):
        return SHARES[0]

    def log_mean_weight(share: float) -> float:
        weight = -torch.logaddexp(math.log1p(-share) - path, math.log(share) - ratio)
        return float(torch.logsumexp(weight, 0))

    values = [log_mean_weight(share) for share in SHARES]
    return max(share for share, value in zip(SHARES, values, strict=True) if value <= min(values) + PREMIUM)


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator, device=generator.device))
