r"""MixFlows: averages of a reference pushed along a nearly invariant, invertible map.

With an invertible map :math:`T` and a reference :math:`q_0`,

.. math:: q_N = \frac1N \sum_{n=0}^{N-1} T^n q_0, \qquad
          q_N(z) = \frac1N \sum_{n=0}^{N-1} \frac{q_0(T^{-n} z)}{\prod_{j=1}^{n} J_T(T^{-j} z)}.

If ``T`` leaves the target invariant and is ergodic, :math:`q_N` converges to it, and its divergence from the target
never grows with ``N``. Here :math:`z = (x, v, u)` with :math:`v \sim N(0, I)` and ``u`` uniform, and ``T`` is

1. leapfrog steps *without* an accept step (volume preserving; not quite invariant),
2. :math:`u \leftarrow u + \pi / 16 \bmod 1`,
3. :math:`v_i \leftarrow \Phi^{-1}\bigl(\Phi(v_i) + \tfrac12 \sin(2 x_i / \sigma_i + u) + \tfrac12 \bmod 1\bigr)`,
   which keeps :math:`N(0, 1)` and has the Jacobian :math:`\phi(v) / \phi(v')`.

Because the density is exact whatever the map, bounds and weights stay honest: :math:`E[w] = Z` with
:math:`w = \rho(x) \phi(v) / q_N(z)`, up to rounding.

The ``N`` points of an orbit get their densities from :math:`2N - 2` maps, see
:mod:`diffsampler.methods.flow_mixture`.

When it fails: a reference that is wider than the target, or far from it. A start of excess energy :math:`E` turns it
into velocities whose distribution function is one up to :math:`e^{-E}`, which float64 cannot tell from one; choose the
reference inside the target's bulk. Every call checks on some orbits that single maps are inverted within a tolerance.
Whole orbits are chaotic and are not (the error grows by about :math:`e^{1/2}` a map; ``round_trip_error`` measures it);
as the cited analysis explains by shadowing, and tests of :math:`E[w] = Z` here confirm, estimates do not suffer.
Separated modes that no leapfrog path joins stay unvisited, and the lower bound then lacks their mass, honestly.
No training; ``tune`` picks the step size by the bound.

References:
    MixFlows: principled variational inference via mixed flows (Xu, Chen & Campbell, 2023),
    https://arxiv.org/abs/2205.07475
    Embracing the chaos: analysis and diagnosis of numerical instability in variational flows (Xu & Campbell, 2023),
    https://arxiv.org/abs/2307.06957
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from diffsampler.estimators import Estimate
from diffsampler.kernel import State
from diffsampler.kernels.hmc import leapfrog
from diffsampler.methods.flow_mixture import FlowMixture, Orbit, at_numbers
from diffsampler.methods.flows import Flow, surviving
from diffsampler.particles import Particles
from diffsampler.sampler import Sampler
from diffsampler.space import Euclidean
from diffsampler.target import CountedTarget, Target

__all__ = ["HamiltonianFlow", "MixFlow"]

TURN = math.pi / 16.0
CHECKED_ORBITS = 16
"""Orbits of each call of ``sample`` on which every map is checked against its inverse."""


@final
class HamiltonianFlow(Flow):
    """Uncorrected leapfrog steps and a deterministic refreshment of velocities, on ``z = (x, v, u)``.

    Points that leave the numbers become NaN.

    Arguments:
        target: The density that makes the force.
        step_size: Leapfrog step in units of ``scale``.
        num_steps: Leapfrog steps between refreshments.
        scale: Standard deviation per coordinate, shape ``(D,)``.
    """

    scale: Tensor

    def __init__(self, target: Target, *, step_size: float, num_steps: int, scale: Tensor) -> None:
        super().__init__()
        self.target = target
        self.step_size = step_size
        self.num_steps = num_steps
        self.register_buffer("scale", scale)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, v, u = self._split(z)
        x, v = self._integrate(x, v)
        u = torch.remainder(u + TURN, 1.0)
        turned = torch.special.ndtri(torch.remainder(torch.special.ndtr(v) + self._shift(x, u), 1.0))
        return torch.cat([x, turned, u], -1), _log_jacobian(v, turned)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, v, u = self._split(z)
        turned = torch.special.ndtri(torch.remainder(torch.special.ndtr(v) - self._shift(x, u), 1.0))
        # Leapfrog runs backward with velocities reversed.
        x, back = self._integrate(x, -turned)
        return torch.cat([x, -back, torch.remainder(u - TURN, 1.0)], -1), _log_jacobian(v, turned)

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dim = self.target.dim
        return z[..., :dim], z[..., dim : 2 * dim], z[..., 2 * dim :]

    def _shift(self, x: Tensor, u: Tensor) -> Tensor:
        return 0.5 * torch.sin(2.0 * x / self.scale + u) + 0.5

    def _integrate(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        density = self.target.log_prob_and_score
        broken = ~(x.isfinite().all(-1) & v.isfinite().all(-1))
        x = torch.where(broken.unsqueeze(-1), torch.zeros_like(x), x)
        state, v, lost = leapfrog(
            self.target.space,
            State(x, *density(x)),
            v,
            density,
            self.step_size * self.scale,
            num_steps=self.num_steps,
        )
        x = torch.where((lost | broken).unsqueeze(-1), torch.full_like(x, math.nan), state.x)
        return x, v


def _log_jacobian(v: Tensor, turned: Tensor) -> Tensor:
    r""":math:`\log \phi(v) - \log \phi(v')`."""
    return 0.5 * (turned.square() - v.square()).sum(-1)


@final
class _Augmented:
    """The reference with standard Gaussian velocities and a uniform phase."""

    def __init__(self, reference: Target) -> None:
        self.reference = reference

    def log_prob(self, z: Tensor) -> Tensor:
        dim = self.reference.dim
        log_prob = self.reference.log_prob(z[..., :dim]).double() - (self.reference.log_normalizer or 0.0)
        return log_prob + _log_velocity(z[..., dim : 2 * dim])

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        x = self.reference.sample(n, generator=generator).double()
        v = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        u = torch.rand(n, 1, generator=generator, dtype=x.dtype, device=x.device)
        return torch.cat([x, v, u], -1)


def _log_velocity(v: Tensor) -> Tensor:
    return -0.5 * (v.square().sum(-1) + v.shape[-1] * math.log(2.0 * math.pi))


@final
class MixFlow(Sampler):
    """A training-free sampler with an evaluable density and a lower bound that converges to ``log Z``.

    Arguments:
        target: The density, on a Euclidean space.
        reference: Normalized density with an exact sampler, inside the target's bulk.
        num_images: Number ``N`` of mixture components.
        num_steps: Leapfrog steps in each map.
        step_size: Leapfrog step in units of ``scale``.
        scale: Standard deviation per coordinate, shape ``(D,)``; that of 1,000 draws of the reference by default.
        round_trip_tolerance: Largest error, in units of ``scale`` and of velocities, of one map and back.

    Raises:
        ValueError: If the space is not Euclidean, there is no usable reference or a number is out of range.
    """

    def __init__(
        self,
        target: Target,
        *,
        reference: Target,
        num_images: int = 100,
        num_steps: int = 10,
        step_size: float = 0.1,
        scale: Tensor | None = None,
        round_trip_tolerance: float = 1e-6,
    ) -> None:
        if not isinstance(target.space, Euclidean):
            raise ValueError(f"Expected a target on a Euclidean space; got one on {target.space}.")
        if not reference.has_sampler or reference.log_normalizer is None:
            raise ValueError(f"Expected a normalized reference with an exact sampler; got {type(reference).__name__}.")
        if reference.space != target.space:
            raise ValueError(f"Expected a reference on {target.space}; got one on {reference.space}.")
        if num_steps < 1:
            raise ValueError(f"Expected num_steps to be a positive integer; got {num_steps}.")
        _check_step_size(step_size)
        if scale is None:
            scale = reference.sample(1000, generator=torch.Generator().manual_seed(0)).std(0)
        if scale.shape != (target.dim,) or not bool((scale > 0.0).all()):
            raise ValueError(f"Expected positive scales of shape ({target.dim},); got {scale.tolist()}.")
        self.target = target
        self.round_trip_tolerance = round_trip_tolerance
        self._counted = CountedTarget(target)
        flow = HamiltonianFlow(self._counted, step_size=step_size, num_steps=num_steps, scale=scale.double())
        self._flow = flow
        self.mixture = FlowMixture(flow, _Augmented(reference), num_images=num_images)

    @property
    def evaluations(self) -> int:
        """Points at which the target's density or gradient was computed so far."""
        return self._counted.evaluations

    @property
    def step_size(self) -> float:
        """Leapfrog step in units of the scale."""
        return self._flow.step_size

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of the mixture at ``z = (x, v, u)``, ``(..., 2 D + 1) -> (...)``."""
        return self.mixture.log_prob(z)

    def sample(self, n: int, *, seed: int = 0) -> Particles:
        """Draw at least ``n`` weighted particles: all points of ``ceil(n / num_images)`` orbits, at least two.

        Particles of an orbit depend on each other; orbits are the independent replicates, on which all standard errors
        rest. The effective sample size knows the weights only.

        Raises:
            RuntimeError: If maps are not inverted within the tolerance, or all orbits are lost to non-finite values.
        """
        if n < 1:
            raise ValueError(f"Expected n >= 1; got {n}.")
        generator = torch.Generator().manual_seed(seed)
        start = self.mixture.reference.sample(max(2, math.ceil(n / self.mixture.num_images)), generator=generator)
        orbit = self.mixture.orbit(start)
        error = self._map_error(orbit)
        if not error <= self.round_trip_tolerance:
            raise RuntimeError(
                f"Expected maps that are inverted within {self.round_trip_tolerance:g}; got an error of {error:.2g}. "
                "Use a smaller step_size, or a reference that is narrower or nearer to the target's bulk."
            )
        x, log_weight = self._weights(orbit)
        return surviving(x, log_weight)

    def elbo(self, num_orbits: int = 64, *, seed: int = 0) -> Estimate:
        """Lower bound of ``log Z``: mean log weight over all points of ``num_orbits`` independent orbits."""
        if num_orbits < 2:
            raise ValueError(f"Expected num_orbits >= 2; got {num_orbits}.")
        start = self.mixture.reference.sample(num_orbits, generator=torch.Generator().manual_seed(seed))
        mean = self._weights(self.mixture.orbit(start))[1].mean(-1)
        return Estimate(float(mean.mean()), float(mean.std()) / math.sqrt(num_orbits), "lower bound")

    def round_trip_error(self, n: int = 64, *, seed: int = 0) -> float:
        """Median over ``n`` orbits of the error of going out ``N - 1`` maps and back, in units of the scale."""
        start = self.mixture.reference.sample(n, generator=torch.Generator().manual_seed(seed))
        return float(self._distance(self.mixture.round_trip(start), start).median())

    def tune(self, step_sizes: Sequence[float], *, num_orbits: int = 64, seed: int = 0) -> MixFlow:
        """Keep the step size with the largest lower bound on common orbits, and return the sampler itself.

        Raises:
            ValueError: If there is no step size, or one is not positive.
            RuntimeError: If none gives a finite bound with maps that are inverted within the tolerance.
        """
        if not step_sizes:
            raise ValueError("Expected at least one step size; got none.")
        for step_size in step_sizes:
            _check_step_size(step_size)
        bounds = []
        for step_size in step_sizes:
            self._flow.step_size = float(step_size)
            start = self.mixture.reference.sample(num_orbits, generator=torch.Generator().manual_seed(seed))
            orbit = self.mixture.orbit(start)
            value = float(self._weights(orbit)[1].mean())
            steady = self._map_error(orbit) <= self.round_trip_tolerance
            bounds.append(value if steady and math.isfinite(value) else -math.inf)
        best = max(range(len(bounds)), key=bounds.__getitem__)
        if bounds[best] == -math.inf:
            raise RuntimeError(f"Expected a finite lower bound at some step size of {tuple(step_sizes)}; got none.")
        self._flow.step_size = float(step_sizes[best])
        return self

    def _weights(self, orbit: Orbit) -> tuple[Tensor, Tensor]:
        """Points ``(B, N, D)`` and log weights ``(B, N)`` of orbits."""
        dim = self.target.dim
        x, v = orbit.z[..., :dim], orbit.z[..., dim : 2 * dim]
        with torch.no_grad():
            log_target = at_numbers(self._counted.log_prob, x) + _log_velocity(v)
        return x.transpose(0, 1), (log_target - orbit.log_density).T

    def _map_error(self, orbit: Orbit) -> float:
        """Largest error of one map and back along some orbits; infinite where it leads out of the numbers."""
        z = orbit.z[:, :CHECKED_ORBITS].flatten(0, 1)
        # Orbits that were lost on the way are reported as such.
        z = z[z.isfinite().all(-1)]
        with torch.no_grad():
            back = self._flow.inverse(self._flow(z)[0])[0]
        return float(self._distance(back, z).max()) if z.shape[0] else 0.0

    def _distance(self, first: Tensor, second: Tensor) -> Tensor:
        """Largest difference of a position, in units of the scale, or a velocity; infinite for lost points."""
        dim, change = self.target.dim, (first - second).abs()
        # The phase moves by itself: its rounding feeds on nothing.
        error = torch.cat([change[..., :dim] / self._flow.scale, change[..., dim : 2 * dim]], -1).amax(-1)
        return torch.where(error.isnan(), torch.full_like(error, math.inf), error)


def _check_step_size(step_size: float) -> None:
    if not 0.0 < step_size < math.inf:
        raise ValueError(f"Expected step_size to be positive; got {step_size}.")
