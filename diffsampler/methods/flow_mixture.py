r"""Mixtures of a reference and its images under an invertible map, with their exact density.

.. math:: q_N = \frac1N \sum_{n=0}^{N-1} T^n q_0, \qquad
          q_N(z) = \frac1N \sum_{n=0}^{N-1} \frac{q_0(T^{-n} z)}{\prod_{j=1}^{n} J_T(T^{-j} z)}.

From one start :math:`z_0`, the densities of all of :math:`z_0, \dots, z_{N-1}` need only the orbit
:math:`z_{-(N-1)}, \dots, z_{N-1}`: :math:`2N - 2` maps for ``N`` weighted points. With
:math:`a_j = \log q_0(z_j) + \log|\det DT^j(z_0)|` and :math:`\log|\det DT^n|` subtracted, they are sliding windows of
log-sum-exp, computed in :math:`O(N)` by a suffix and a prefix scan.

References:
    MixFlows: principled variational inference via mixed flows (Xu, Chen & Campbell, 2023),
    https://arxiv.org/abs/2205.07475
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, final

import torch
from torch import Tensor

from diffsampler.methods.flows import Flow

__all__ = ["FlowMixture", "Orbit", "at_numbers"]


class Reference(Protocol):
    """A normalized density on the flow's space."""

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density ``(..., S) -> (...)``."""
        ...

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``(n, S)``."""
        ...


class Orbit(NamedTuple):
    """The forward half of orbits."""

    z: Tensor
    r""":math:`z_0 \dots z_{N-1}`, shape ``(N, B, S)``; each row is distributed as a component of the mixture."""
    log_density: Tensor
    r""":math:`\log q_N(z_n)`, shape ``(N, B)``, float64."""


@final
class FlowMixture:
    r"""The mixture :math:`q_N` of a reference and its images.

    Arguments:
        flow: The map ``T``.
        reference: :math:`q_0`, normalized.
        num_images: Number ``N`` of components, the reference itself included.
    """

    def __init__(self, flow: Flow, reference: Reference, *, num_images: int) -> None:
        if num_images < 1:
            raise ValueError(f"Expected num_images to be a positive integer; got {num_images}.")
        self.flow = flow
        self.reference = reference
        self.num_images = num_images

    def orbit(self, start: Tensor) -> Orbit:
        """Follow the map in both directions from draws of the reference, ``(B, S)``."""
        with torch.no_grad():
            zero = start.new_zeros(start.shape[:-1], dtype=torch.float64)
            ahead, log_ahead = self._follow(start, zero)
            behind, log_behind = self._follow(start, zero, inverse=True)
            z = torch.stack([*behind[:0:-1], *ahead])
            log_det = torch.stack([*log_behind[:0:-1], *log_ahead])
            term = at_numbers(self.reference.log_prob, z) + log_det
        # Window n of N terms ends where point n stands: a suffix of the first N and a prefix of the rest.
        size = self.num_images
        suffix = torch.logcumsumexp(term[:size].flip(0), 0).flip(0)
        window = suffix
        if size > 1:
            prefix = torch.logcumsumexp(term[size:], 0)
            window = torch.cat([suffix[:1], torch.logaddexp(suffix[1:], prefix)])
        return Orbit(z[size - 1 :], window - log_det[size - 1 :] - math.log(size))

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of the mixture anywhere, ``(..., S) -> (...)``, float64, by ``N - 1`` inverse maps."""
        with torch.no_grad():
            total, log_det = at_numbers(self.reference.log_prob, z), z.new_zeros(z.shape[:-1], dtype=torch.float64)
            for _ in range(self.num_images - 1):
                z, change = self.flow.inverse(z)
                log_det = log_det + change
                total = torch.logaddexp(total, at_numbers(self.reference.log_prob, z) + log_det)
        return total - math.log(self.num_images)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` independent points, ``(n, S)``."""
        with torch.no_grad():
            z = self.reference.sample(n, generator=generator)
            count = torch.randint(self.num_images, (n,), generator=generator, device=z.device)
            for step in range(1, self.num_images):
                active = (count >= step).nonzero().squeeze(-1)
                z[active] = self.flow(z[active])[0]
        return z

    def round_trip(self, start: Tensor) -> Tensor:
        """Where ``N - 1`` maps out and as many back lead from ``(B, S)``: to the start, but for rounding."""
        with torch.no_grad():
            z = start
            for _ in range(self.num_images - 1):
                z = self.flow(z)[0]
            for _ in range(self.num_images - 1):
                z = self.flow.inverse(z)[0]
        return z

    def _follow(self, z: Tensor, log_det: Tensor, *, inverse: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        states, log_dets = [z], [log_det]
        for _ in range(self.num_images - 1):
            z, change = self.flow.inverse(z) if inverse else self.flow(z)
            log_det = log_det + change
            states.append(z)
            log_dets.append(log_det)
        return states, log_dets


def at_numbers(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """``function`` of points ``(..., S)``, NaN where they are no numbers; it is never asked about those."""
    lost = ~z.isfinite().all(-1)
    value = function(torch.where(lost.unsqueeze(-1), torch.zeros_like(z), z)).double()
    return torch.where(lost, torch.full_like(value, math.nan), value)
