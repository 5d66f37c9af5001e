r"""Microcanonical Langevin: motion at constant speed on an energy surface, without and with Metropolis.

With whitened velocities of constant length :math:`|v| = \sqrt d` (:math:`u = v / |v|`, :math:`d` degrees of freedom),
scale :math:`\sigma` and score :math:`s`, a leapfrog step of size :math:`h` is B(h/2) A(h) B(h/2) with

.. math::
    \mathrm{A}(h):\ x \leftarrow x + h \sigma v, \qquad
    \mathrm{B}(h):\ u \leftarrow \frac{u + e\,(\sinh\delta + c (\cosh\delta - 1))}{D}, \quad
    D = \cosh\delta + c \sinh\delta,

.. math:: \delta = \frac{h \sqrt d\, |\sigma s|}{d - 1}, \qquad e = \frac{\sigma s}{|\sigma s|}, \qquad c = e \cdot u .

B contracts the sphere: the log of its Jacobian is :math:`-(d - 1) \log D`, the amount by which kinetic energy grows.
Step sizes and lengths are those of the papers over :math:`\sqrt d`, so that they compare with those of HMC. At least
two degrees of freedom are needed.

References:
    Microcanonical Hamiltonian Monte Carlo (Robnik, De Luca, Silverstein & Seljak, 2023),
    https://arxiv.org/abs/2212.08549
    Fluctuation without dissipation: microcanonical Langevin Monte Carlo (Robnik & Seljak, 2024),
    https://arxiv.org/abs/2303.18221
    Metropolis adjusted microcanonical Hamiltonian Monte Carlo (Robnik, Cohn-Gordon & Seljak, 2025),
    https://arxiv.org/abs/2503.01707 (MAMS)
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from diffsampler.kernel import Info, Kernel, KernelParams, LogDensity, State
from diffsampler.kernels.kinetic import take_or_turn, velocity_of
from diffsampler.kernels.metropolis import is_broken, metropolis, scaled_columns
from diffsampler.space import Space

__all__ = ["MAMS", "MCLMC", "isokinetic_kick", "isokinetic_leapfrog"]


def isokinetic_kick(velocity: Tensor, force: Tensor, step: Tensor, dof: int) -> tuple[Tensor, Tensor]:
    """The B step.

    Arguments:
        velocity: Whitened velocities of length ``sqrt(dof)``, shape ``(..., D)``.
        force: Whitened score, shape ``(..., D)``.
        step: Step size, shape ``(..., 1)``.
        dof: Degrees of freedom, at least 2.

    Returns:
        New velocities of the same length, and the log of the Jacobian, shape ``(...)``, float64.
    """
    speed = math.sqrt(dof)
    unit = velocity / speed
    size = force.norm(dim=-1, keepdim=True)
    pull = force / torch.where(size > 0.0, size, 1.0)
    delta = step * speed / (dof - 1) * size
    along = (pull * unit).sum(-1, keepdim=True)
    # All over e^delta, which overflows where the force is strong.
    shrink = torch.exp(-delta)
    width = 0.5 * ((1.0 + along) + (1.0 - along) * shrink.square())
    push = 0.5 * (1.0 - shrink.square()) + along * (0.5 * (1.0 + shrink.square()) - shrink)
    unit = (shrink * unit + push * pull) / width
    log_jacobian = -(dof - 1) * (delta.double() + width.double().log()).squeeze(-1)
    # Rounding must not let the speed drift.
    return speed * unit / unit.norm(dim=-1, keepdim=True), log_jacobian


def isokinetic_leapfrog(
    space: Space,
    state: State,
    velocity: Tensor,
    log_density: LogDensity,
    step: Tensor,
    scale: Tensor,
    *,
    num_steps: int,
) -> tuple[State, Tensor, Tensor, Tensor]:
    """Integrate ``num_steps`` leapfrog steps at constant speed.

    Arguments:
        space: Where the particles live.
        state: Start, positions ``(..., D)``.
        velocity: Whitened velocities of length ``sqrt(dof)``, shape ``(..., D)``.
        log_density: The density that makes the force.
        step: Step size, broadcastable to ``(..., 1)``.
        scale: Standard deviation per coordinate, ``(D,)`` or ``(1,)``.
        num_steps: Number of steps.

    Returns:
        The end point; its velocities; the log of the Jacobian ``(...)``, float64; and who left the numbers on the way,
        boolean ``(...)``, who stay at their start.
    """
    start = state.x
    lost = torch.zeros_like(state.log_prob, dtype=torch.bool).unsqueeze(-1)
    velocity, log_jacobian = isokinetic_kick(velocity, scale * space.project_vector(state.score), 0.5 * step, space.dof)
    for k in range(num_steps):
        x = space.project(state.x + step * scale * velocity)
        lost = lost | ~x.sum(-1, keepdim=True).isfinite()
        x = torch.where(lost, start, x)
        state = State(x, *log_density(x))
        kick = 0.5 if k == num_steps - 1 else 1.0
        velocity, increment = isokinetic_kick(
            velocity, scale * space.project_vector(state.score), kick * step, space.dof
        )
        log_jacobian = log_jacobian + increment
    return state, velocity, log_jacobian, lost.squeeze(-1)


def _on_sphere(space: Space, like: Tensor, generator: torch.Generator | None) -> Tensor:
    noise = space.noise(tuple(like.shape[:-1]), like=like, generator=generator)
    return math.sqrt(space.dof) * noise / noise.norm(dim=-1, keepdim=True)


def _check_dof(space: Space, name: str) -> None:
    if space.dof < 2:
        raise ValueError(f"Expected a space with at least 2 degrees of freedom for {name}; got {space}.")


@final
class MCLMC(Kernel):
    r"""Microcanonical Langevin Monte Carlo, unadjusted. **Biased**: :math:`O(h^2)`, and nothing in a run shows it.

    Half a partial refresh of the direction, one isokinetic leapfrog step, half a refresh, where half a refresh is
    :math:`u \leftarrow (u + \nu \xi) / |\cdot|` with :math:`\nu^2 = (e^{h / L} - 1) / d`. The refresh keeps the uniform
    law on the sphere reversible, so ``Info.log_ratio``, the log of the Jacobian, corrects the bias in path weights.

    Fast where a small known bias is acceptable: the papers choose the step size by the variance of the energy error
    per degree of freedom, 5e-4. One evaluation a step.

    Arguments:
        space: Where the particles live; at least 2 degrees of freedom.
        length: Time over which directions decohere where ``KernelParams.length`` is None; ``inf`` for no refresh.
    """

    exact = False
    target_acceptance = 1.0

    def __init__(self, space: Space, *, length: float = 1.0) -> None:
        super().__init__(space)
        _check_dof(space, "MCLMC")
        if not length > 0.0:
            raise ValueError(f"Expected length to be positive; got {length}.")
        self.length = length

    def refresh(self, state: State, *, generator: torch.Generator | None = None) -> State:
        """Draw velocities uniformly from the sphere."""
        return state._replace(velocity=_on_sphere(self.space, state.x, generator))

    def step(
        self, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        step, scale = scaled_columns(self.space, params, state.x)
        decay = step / self.length if params.length is None else step / params.length.to(step).unsqueeze(-1)
        velocity = self._turn(velocity_of(state), decay, generator)
        proposal, end, log_jacobian, lost = isokinetic_leapfrog(
            self.space, state, velocity, log_density, step, scale, num_steps=1
        )
        broken = lost | is_broken(proposal)
        refused = broken | ~proposal.log_prob.isfinite()
        state = take_or_turn(state, proposal._replace(velocity=end), velocity, refused)
        state = state._replace(velocity=self._turn(velocity_of(state), decay, generator))
        log_ratio = torch.where(refused, torch.zeros_like(log_jacobian), log_jacobian)
        return state, Info(log_ratio, torch.ones_like(log_ratio), 1, broken)

    def _turn(self, velocity: Tensor, decay: Tensor, generator: torch.Generator | None) -> Tensor:
        noise = self.space.noise(tuple(velocity.shape[:-1]), like=velocity, generator=generator)
        velocity = torch.exp(-0.5 * decay) * velocity + torch.sqrt(-torch.expm1(-decay)) * noise
        return math.sqrt(self.space.dof) * velocity / velocity.norm(dim=-1, keepdim=True)


@final
class MAMS(Kernel):
    r"""Metropolis-adjusted microcanonical sampler: fresh directions, isokinetic steps, one acceptance. Exact.

    .. math:: \alpha = \min\Bigl(1, \frac{\rho(x')}{\rho(x)} \prod_k |J_k|\Bigr)

    with the Jacobians of all kicks. Without them the chain is wrong.

    Arguments:
        space: Where the particles live; at least 2 degrees of freedom.
        num_steps: Largest number of leapfrog steps, where ``KernelParams.length`` is None. With a length :math:`L` it
            is :math:`2 L / h`, twice the mean.
        jitter_steps: Draw the number of steps, shared by all chains, uniformly from 1 to the largest.
    """

    exact = True
    target_acceptance = 0.9

    def __init__(self, space: Space, *, num_steps: int = 8, jitter_steps: bool = True) -> None:
        super().__init__(space)
        _check_dof(space, "MAMS")
        if num_steps < 1:
            raise ValueError(f"Expected num_steps to be a positive integer; got {num_steps}.")
        self.num_steps = num_steps
        self.jitter_steps = jitter_steps

    def step(
        self, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        step, scale = scaled_columns(self.space, params, state.x)
        num_steps = self._draw_steps(params, generator, state.x.device)
        velocity = _on_sphere(self.space, state.x, generator)
        proposal, end, log_jacobian, lost = isokinetic_leapfrog(
            self.space, state, velocity, log_density, step, scale, num_steps=num_steps
        )
        log_accept = proposal.log_prob.double() - state.log_prob.double() + log_jacobian
        broken = lost | is_broken(proposal)
        new, acceptance, log_ratio = metropolis(state, proposal, log_accept, broken=broken, generator=generator)
        return new, Info(log_ratio, acceptance, num_steps, broken, proposal._replace(velocity=end))

    def _draw_steps(self, params: KernelParams, generator: torch.Generator | None, device: torch.device) -> int:
        largest = self.num_steps
        if params.length is not None:
            ratio = float((params.length / params.step_size).mean())
            largest = max(math.ceil((2.0 if self.jitter_steps else 1.0) * ratio), 1)
        if not self.jitter_steps:
            return largest
        return int(torch.randint(1, largest + 1, (), generator=generator, device=device))
