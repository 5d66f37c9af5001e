r"""Proposals that are whole paths of a learned diffusion, with exact weights on the space of paths.

A diffusion has no tractable density at its end, but one on its paths. Independence Metropolis-Hastings therefore runs
on paths :math:`x_{0:K}` with the extended target :math:`\rho(x_K) \prod_k B_k(x_k | x_{k+1})`, whose marginal at the
end is :math:`\rho`. With forward law :math:`F` and weight :math:`w = \rho B / F` a proposed path is accepted with
probability :math:`\min(1, w' / w)`. Nothing is approximate: however bad the diffusion, the chain leaves
:math:`\pi` invariant, and it forgets its start at the rate :math:`1 - Z / \sup w`.

So that :math:`w` is bounded, a share :math:`\beta` of the proposals starts from a reference density :math:`q` with
heavy tails and runs backward; both kinds are draws of the mixture :math:`(1 - \beta) F + \beta\, q B`, whose weight is
:math:`w = [(1 - \beta) / w_F + \beta\, q / \rho]^{-1} \le \rho / (\beta q)`.

After any move of the end point alone, its path is drawn anew from :math:`B`, a Gibbs step.

References:
    Particle Markov chain Monte Carlo methods (Andrieu, Doucet & Holenstein, 2010),
    https://doi.org/10.1111/j.1467-9868.2009.00736.x (Metropolis-Hastings on an extended space)
    Annealed importance sampling (Neal, 2001), https://arxiv.org/abs/physics/9803008 (weights of paths)
    Rates of convergence of the Hastings and Metropolis algorithms (Mengersen & Tweedie, 1996),
    https://doi.org/10.1214/aos/1033066201
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, final

import torch
from torch import Tensor

from diffsampler.estimators import systematic_resample
from diffsampler.pilot import run_pilot
from diffsampler.pilot.transport import Pushforward
from diffsampler.refinement import Course, refine
from diffsampler.sampler import DiffusionSampler
from diffsampler.target import Target

__all__ = ["PathProposal", "Paths", "learn_proposal"]

SHARE = 0.1
"""Share of proposals that come from the reference."""
PILOT_PARTICLES = 4096
PILOT_ISLANDS = 16


class Paths(NamedTuple):
    """End points ``(n, D)``, float64, and log weights of their paths ``(n,)``; ``-inf`` for those that were lost."""

    x: Tensor
    log_weight: Tensor


def _same(x: Tensor) -> Tensor:
    return x


@final
class PathProposal:
    """Independent paths of a frozen diffusion, defended by a reference density.

    Arguments:
        target: The density in its own coordinates.
        inner: A trained sampler of it, perhaps in other coordinates.
        to_original: Map of points ``(n, D)`` of ``inner`` to the target's coordinates.
        to_inner: Its inverse.
        reference: Normalized density with an exact sampler, in the target's coordinates, or None for no defence.
    """

    def __init__(
        self,
        target: Target,
        inner: DiffusionSampler,
        *,
        to_original: Callable[[Tensor], Tensor] = _same,
        to_inner: Callable[[Tensor], Tensor] = _same,
        reference: Target | None = None,
    ) -> None:
        self.target = target
        self.inner = inner
        self.to_original = to_original
        self.to_inner = to_inner
        self.reference = reference

    def draw(self, n: int, generator: torch.Generator) -> Paths:
        """``n`` independent proposals, each of either kind by a coin of its own."""
        coin = torch.rand(n, generator=generator)
        defended = 0 if self.reference is None else int((coin < SHARE).sum())
        parts = [self._forward(n - defended, generator)] if defended < n else []
        if defended:
            assert self.reference is not None
            ends = self.reference.sample(defended, generator=generator).double()
            parts.append(Paths(ends, self._backward(ends, generator)))
        x, log_path = (torch.cat(column) for column in zip(*parts, strict=True))
        order = torch.randperm(n, generator=generator)
        log_weight = self._weight(x[order], log_path[order])
        return Paths(x[order], torch.where(log_weight.isnan() | log_weight.isposinf(), -math.inf, log_weight))

    def weigh(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Log weights ``(n,)`` of new paths behind points ``x (n, D)``, drawn backward.

        A path that is not a number counts as infinitely heavy: its chain stays until the next path.
        """
        log_weight = self._weight(x, self._backward(x, generator))
        return torch.where(log_weight.isnan(), math.inf, log_weight)

    def _forward(self, n: int, generator: torch.Generator) -> Paths:
        particles = self.inner.sample(n, seed=_seed(generator))
        x = self.to_original(particles.x).double()
        # What was lost comes back as proposals that nobody accepts.
        lost = n - len(particles)
        log_weight = particles.log_weight - math.log(1.0 - lost / n)
        return Paths(
            torch.cat([x, x[:1].expand(lost, -1)]), torch.cat([log_weight, log_weight.new_full((lost,), -math.inf)])
        )

    def _backward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return self.inner.backward_weights(self.to_inner(x), generator=generator)

    def _weight(self, x: Tensor, log_path: Tensor) -> Tensor:
        """Log weight of a path as a draw of the mixture, from that as a draw of the diffusion."""
        if self.reference is None:
            return log_path
        with torch.no_grad():
            log_ratio = self.reference.log_prob(x).double() - self.target.log_prob(x).double()
        return -torch.logaddexp(math.log1p(-SHARE) - log_path, math.log(SHARE) + log_ratio)


def learn_proposal(target: Target, *, steps: int | None, generator: torch.Generator) -> PathProposal:
    """A proposal from nothing but the density: a pilot finds the mass, a diffusion learns it.

    Arguments:
        target: On Euclidean space.
        steps: Gradient steps; None leaves the choice to the stages of training.
        generator: Source of randomness.

    Raises:
        ValueError: If the pilot refuses the target; the message is the pilot's.
    """
    pilot = run_pilot(target, generator=generator, num_particles=PILOT_PARTICLES, num_islands=PILOT_ISLANDS)
    if pilot.particles is None:
        raise ValueError(" ".join(f"{message} {remedy}" for _, message, remedy in pilot.findings))
    index = systematic_resample(pilot.particles.log_weight, generator=generator)
    work, _ = refine(
        target,
        pilot.particles.x[index],
        transport=pilot.transport,
        centres=pilot.modes if len(pilot.modes) > 1 else None,
        generator=generator,
        dtype=torch.float32,
        course=Course(steps=steps),
    )
    reference = None
    if pilot.reference is not None and pilot.transport is not None:
        reference = Pushforward(pilot.reference, pilot.transport)
    frame = work.frame
    return PathProposal(
        target, work.sampler, to_original=frame.to_original, to_inner=frame.to_frame, reference=reference
    )


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator))
