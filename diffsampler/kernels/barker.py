r"""Barker's proposal: a random walk whose signs lean uphill.

With scale :math:`\sigma`, step size :math:`h`, score :math:`s` and whitened force :math:`c = \sigma s(x)`, each
coordinate draws :math:`w \sim N(0, h^2)` and keeps its sign with probability :math:`1 / (1 + e^{-w c})`, else turns it:

.. math::
    x' = x + \sigma w, \qquad
    \alpha = \min\Bigl(1, \frac{\rho(x')}{\rho(x)} \prod_i \frac{1 + e^{-w_i c_i(x)}}{1 + e^{w_i c_i(x')}}\Bigr).

Gradients enter bounded, so a step size far too large costs acceptance but does not break the chain, unlike MALA;
at its best step size MALA is somewhat faster. Exact; one evaluation a step.

References:
    The Barker proposal: combining robustness and efficiency in gradient-based MCMC (Livingstone & Zanella, 2022),
    https://arxiv.org/abs/1908.11812
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffsampler.kernel import Info, Kernel, KernelParams, LogDensity, State
from diffsampler.kernels.metropolis import is_broken, metropolis, scaled_columns
from diffsampler.space import MeanFree, Space

__all__ = ["Barker"]


@final
class Barker(Kernel):
    """Metropolis-Hastings with Barker's proposal.

    On mean-free particles the coordinates are those of an orthonormal (Helmert) basis of the hyperplane.

    Arguments:
        space: Where the particles live.
    """

    exact = True
    target_acceptance = 0.4

    def __init__(self, space: Space) -> None:
        super().__init__(space)
        self._basis = helmert(space.n) if isinstance(space, MeanFree) else None

    def step(
        self, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        space = self.space
        step, scale = scaled_columns(space, params, state.x)
        noise = space.noise(tuple(state.log_prob.shape), like=state.x, generator=generator)
        size = step * self._coordinates(noise)
        slope = self._coordinates(scale * state.score)
        uniform = torch.rand(size.shape, generator=generator, dtype=size.dtype, device=size.device)
        move = torch.where(uniform < torch.sigmoid(size * slope), size, -size)
        x = space.project(state.x + scale * self._vector(move))
        lost = ~x.isfinite().all(-1)
        x = torch.where(lost.unsqueeze(-1), state.x, x)
        proposal = State(x, *log_density(x))
        back = self._coordinates(scale * proposal.score)
        log_ratio = (logsigmoid(-move * back) - logsigmoid(move * slope)).sum(-1, dtype=torch.float64)
        log_accept = proposal.log_prob.double() - state.log_prob.double() + log_ratio
        broken = lost | is_broken(proposal)
        state, acceptance, log_ratio = metropolis(state, proposal, log_accept, broken=broken, generator=generator)
        return state, Info(log_ratio, acceptance, 1, broken)

    def _coordinates(self, vector: Tensor) -> Tensor:
        """Components ``(..., dof)`` of a vector ``(..., D)`` in an orthonormal basis of the tangent space."""
        if self._basis is None:
            return vector
        points = vector.unflatten(-1, (self._basis.shape[1], -1))
        return (self._basis.to(vector) @ points).flatten(-2)

    def _vector(self, coordinates: Tensor) -> Tensor:
        if self._basis is None:
            return coordinates
        points = coordinates.unflatten(-1, (self._basis.shape[0], -1))
        return (self._basis.to(coordinates).mT @ points).flatten(-2)


def helmert(n: int) -> Tensor:
    """Orthonormal rows ``(n - 1, n)``, each orthogonal to the vector of ones, float64."""
    k = torch.arange(1, n, dtype=torch.float64).unsqueeze(-1)
    rows = torch.ones(n - 1, n, dtype=torch.float64).tril() - k * torch.eye(n, dtype=torch.float64)[1:]
    return rows / (k * (k + 1.0)).sqrt()
