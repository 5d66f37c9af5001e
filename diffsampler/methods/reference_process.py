r"""Controlled linear Gaussian chains between a start law and the target.

A :class:`~diffsampler.reference.Reference` chain :math:`x_{k+1} = \kappa_k x_k + \sqrt{v_k}\,\xi` starts at a law
:math:`\mu` (a point, a Gaussian, a harmonic law of bonded particles) and is steered by a control u. With a corrector h
for the way back,

.. math::
   F_k = N(\kappa_k x + v_k u_\theta(t_k, x),\ v_k e^{l_k}), \qquad
   B_k = N\Big(\frac{x + v_k h_\phi(t_{k+1}, x)}{\kappa_k},\ \frac{s_k v_k}{s_{k+1}} e^{m_k}\Big),

where :math:`s_k` is the variance of the uncontrolled chain. At the optimum :math:`u = \nabla \log \varphi_t` and
:math:`h = \nabla \log \hat\varphi_t` are the two potentials of the Schroedinger bridge, and the means are exactly those
of the bridge's own transitions, for any step size. What a step of finite size changes is the variance: :math:`l_k` and
:math:`m_k` are learned numbers, one a step (published: zero). Weights are exact whatever u, h, l and m are.

* The corrector is the uncontrolled chain's, :math:`h = -x / s_k` for an isotropic start at the origin, plus a network
  that starts at zero. From a point the first part is all there is, and the way back is a bridge to the point.
* On a torus the state is the angle before wrapping. From a point, terminal angles are lifted by the law of the winding
  number under the reference, which makes the weight that of Girsanov on the torus (:math:`W`: the wrapped normal law),

  .. math:: \log w = \log\rho(\theta) - \log W(\theta; \Sigma_{0K}) + \sum_k [\log N(x_{k+1}; x_k, v_k) - \log F_k].

  From uniform angles nothing is lifted: a path is its first angle and its increments, both kernels give increments that
  depend on the angle alone, and :math:`\log w = \log\rho(\theta) - \log\mu + \sum_k [\log B_k - \log F_k]`.
* On a product of a line and a torus each factor has a reference of its own (:func:`~diffsampler.reference.product`).

References:
    Adjoint sampling: highly scalable diffusion samplers via adjoint matching (Havens et al., 2025),
    https://arxiv.org/abs/2504.11713
    Adjoint Schroedinger bridge sampler (Liu et al., 2025), https://arxiv.org/abs/2506.22565
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

from diffsampler.equivariant import PeriodicMLP
from diffsampler.methods.starts import GaussianStart, HarmonicStart, PointStart, Start, UniformStart
from diffsampler.networks import FourierMLP, clip
from diffsampler.process import Gaussian, Process
from diffsampler.reference import Reference, product
from diffsampler.space import Euclidean, EuclideanTorus, Space, Torus

__all__ = [
    "GaussianStart",
    "HarmonicStart",
    "PointStart",
    "ReferenceProcess",
    "Start",
    "UniformStart",
    "default_control",
]

LOG_VARIANCE_BOUND = 4.0
UNIFORM_GAIN = math.sqrt(3.0) / math.pi
"""Gain of a corrector on uniform angles, one over their standard deviation."""


def default_control(space: Space, *, generator: torch.Generator, width: int = 64, point_features: int = 0) -> nn.Module:
    """A network on points that assumes no symmetry but the period of angles."""
    if isinstance(space, Torus | EuclideanTorus):
        line = 0 if isinstance(space, Torus) else space.n
        return PeriodicMLP(space.dim - line, line=line, generator=generator, width=width)
    return FourierMLP(space.dim, space.dim, generator=generator, width=width, point_features=point_features)


@final
class ReferenceProcess(Process):
    """A reference chain with a control, and the way back.

    Networks are modules ``(t, x) -> (..., D)`` with times ``t`` that broadcast against points ``x (..., D)``; they are
    multiplied by gains with the right units and order of size.

    Arguments:
        space: Where the particles live.
        reference: The uncontrolled chain; on a torus it must not contract.
        start: The start law, a point by default.
        control: Network of the control, :func:`default_control` by default.
        corrector: Network of the corrector, likewise; unused from a point.
        learn_variance: Whether the variance of each step has a learned factor.
        resolution: Smallest length that matters, in units of the reference's end point: it bounds the gains.
        width: Width of default networks.
        point_features: Random Fourier features of the point in them.
        seed: Seed of their initial parameters.
    """

    time: Tensor
    contraction: Tensor
    variance: Tensor
    reach: Tensor
    level: Tensor
    ahead: Tensor
    left: Tensor
    pull: Tensor
    back_variance: Tensor
    gain: Tensor
    back_gain: Tensor
    restoring: Tensor

    def __init__(
        self,
        space: Space,
        reference: Reference,
        *,
        start: Start | None = None,
        control: nn.Module | None = None,
        corrector: nn.Module | None = None,
        learn_variance: bool = True,
        resolution: float = 0.03,
        width: int = 64,
        point_features: int = 0,
        seed: int = 0,
    ) -> None:
        start = PointStart(space) if start is None else start
        if start.space != space:
            raise ValueError(f"Expected a start law on {space}; got one on {start.space}.")
        line = _line(space)
        blocks = (line, space.dim - line) if isinstance(space, EuclideanTorus) else (space.dof,)
        _check_reference(space, reference, len(blocks))
        fixed, circular = bool((start.variances == 0.0).all()), line < space.dim
        super().__init__(
            space,
            reference.num_steps,
            needs_score=False,
            learns_backward=not fixed,
            has_bridge=fixed and not circular,
            drawn_space=Euclidean(space.dim) if circular else None,
        )
        self.start = start
        self.line = line
        """Coordinates before the first angle."""
        self.circular = circular
        self.lifted = circular and fixed
        """Whether terminal angles are lifted."""
        self.blocks = blocks
        """Degrees of freedom of the factors of the space."""
        self._tables(reference, resolution)
        generator = torch.Generator().manual_seed(seed)
        self.control = (
            default_control(space, generator=generator, width=width, point_features=point_features)
            if control is None
            else control
        )
        self.log_variance = nn.Parameter(torch.zeros(self.num_steps, len(blocks)), requires_grad=learn_variance)
        self.corrector_control: nn.Module | None = None
        self.back_log_variance: nn.Parameter | None = None
        if not fixed:
            self.corrector_control = (
                default_control(space, generator=generator, width=width, point_features=point_features)
                if corrector is None
                else corrector
            )
            self.back_log_variance = nn.Parameter(
                torch.zeros(self.num_steps, len(blocks)), requires_grad=learn_variance
            )

    def _tables(self, reference: Reference, resolution: float) -> None:
        reference = reference.in_columns()
        if reference.variance.shape[1] < len(self.blocks):
            reference = product(*[reference] * len(self.blocks))
        reach, level = reference.from_start()
        ahead, left = reference.to_end()
        kappa, v = reference.contraction, reference.variance
        # Variances of the uncontrolled chain along the start's basis, and their mean over the directions that exist.
        modes = reach.square() * self.start.variances.double() + level
        mean = modes if modes.shape[-1] == len(self.blocks) else modes[:, 1:].mean(-1, keepdim=True)
        # Uniform angles stay so: nothing pulls them back, and steps back are as wide as steps ahead.
        uniform = mean.isinf()
        smallest = resolution**2 * level[-1]
        table = {
            "contraction": kappa,
            "variance": v,
            "reach": reach,
            "level": level,
            "ahead": ahead,
            "left": left,
            "pull": torch.where(modes[1:].isinf(), kappa, kappa * modes[:-1] / modes[1:]),
            "back_variance": torch.where(uniform[1:], v, mean[:-1] * v / mean[1:]),
            "gain": (left + smallest).rsqrt(),
            "back_gain": torch.where(uniform, UNIFORM_GAIN, (mean + smallest).rsqrt()),
            "restoring": torch.cat([modes.new_zeros(1, modes.shape[-1]), 1.0 / modes[1:]]),
        }
        self.register_buffer("time", reference.time)
        for name, value in table.items():
            self.register_buffer(name, value)

    def at(self, table: Tensor, k: Tensor) -> Tensor:
        """Entries of a table, ``(..., 1)`` or ``(..., D)``; those of the reference are kept in float64."""
        return self.spread(table[k].to(self.log_variance.dtype))

    def spread(self, values: Tensor) -> Tensor:
        """Values ``(..., B)`` of the factors at their coordinates, ``(..., D)``; as they are for one factor."""
        if len(self.blocks) == 1:
            return values
        columns = values.unsqueeze(-1).unbind(-2)
        return torch.cat([v.expand(*v.shape[:-1], n) for v, n in zip(columns, self.blocks, strict=True)], -1)

    def sums(self, x: Tensor) -> Tensor:
        """Sums of ``x (..., D)`` over the coordinates of each factor, ``(..., B)``."""
        if len(self.blocks) == 1:
            return x.sum(-1, keepdim=True)
        return torch.stack([part.sum(-1) for part in x.split(self.blocks, -1)], -1)

    def sample_initial(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.start.sample(n, generator=generator).to(self.log_variance.dtype)

    def log_initial(self, x: Tensor) -> Tensor:
        return self.start.log_prob(x)

    def steer(self, k: Tensor, x: Tensor) -> Tensor:
        """The control ``u (..., D)`` at steps ``k (...)`` in ``0..K-1`` and states ``x (..., D)``."""
        return self.at(self.gain, k) * self.space.project_vector(self.control(self.time_at(k), x))

    def time_at(self, k: Tensor) -> Tensor:
        """Times ``(...)`` of steps."""
        return self.time[k].to(self.log_variance.dtype)

    def correct(self, k: Tensor, x: Tensor) -> Tensor:
        """The corrector ``h (..., D)`` at steps ``k (...)`` in ``1..K``."""
        h = -self.start.apply_spectrum(x, self.at(self.restoring, k))
        if self.corrector_control is None:
            return h
        return h + self.at(self.back_gain, k) * self.space.project_vector(self.corrector_control(self.time_at(k), x))

    def forward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        mean = self.at(self.contraction, k) * x + self.at(self.variance, k) * self.steer(k, x)
        factor = self.spread(clip(self.log_variance[k], LOG_VARIANCE_BOUND).exp())
        return Gaussian(mean, self.at(self.variance, k) * factor)

    def backward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        mean = self.start.apply_spectrum(x, self.at(self.pull, k))
        if self.corrector_control is None or self.back_log_variance is None:
            return Gaussian(mean, self.at(self.back_variance, k))
        net = self.space.project_vector(self.corrector_control(self.time_at(k + 1), x))
        mean = mean + self.at(self.variance, k) / self.at(self.contraction, k) * self.at(self.back_gain, k + 1) * net
        factor = self.spread(clip(self.back_log_variance[k], LOG_VARIANCE_BOUND).exp())
        return Gaussian(mean, self.at(self.back_variance, k) * factor)

    def between(self, k: Tensor, first: Tensor, last: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``x_k`` of the reference given states ``x_0`` and ``x_K``, each ``(..., D)``, for ``k (...)``."""
        level, left = self.at(self.level, k), self.at(self.left, k)
        total = self.at(self.level, torch.tensor(-1))
        mean = (self.at(self.reach, k) * left * first + self.at(self.ahead, k) * level * last) / total
        noise = self.drawn_space.noise(tuple(last.shape[:-1]), like=last, generator=generator)
        return mean + (level * left / total).sqrt() * noise

    def sample_bridge(self, k: Tensor, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return self.between(k, torch.zeros_like(x), x, generator=generator)

    # On a torus the state is the angle before wrapping.

    def observed(self, state: Tensor) -> Tensor:
        return self.space.project(state) if self.circular else state

    def point(self, state: Tensor) -> Tensor:
        return self.observed(state)

    def complete(self, x: Tensor, score: Tensor | None, *, generator: torch.Generator | None = None) -> Tensor:
        return self.rejoin(torch.zeros_like(x), x, generator=generator) if self.lifted else x

    def rejoin(self, first: Tensor, last: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Last states ``(..., D)`` whose turns since ``first`` are drawn anew, as the reference goes round."""
        if not self.circular:
            return last
        start = first[..., self.line :]
        moved = _wrap(last[..., self.line :] - start)
        turns, log_chance = self._windings(moved)
        choice = torch.multinomial(log_chance.exp().reshape(-1, len(turns)), 1, generator=generator)
        return torch.cat([last[..., : self.line], start + moved + turns[choice.reshape(moved.shape)]], -1)

    def log_carried(self, state: Tensor, score: Tensor | None) -> Tensor:
        if not self.lifted:
            return super().log_carried(state, score)
        angle, variance = state[..., self.line :], self.level[-1, -1:]
        zero = torch.zeros_like(angle)
        lifted = Euclidean(angle.shape[-1]).log_gaussian(angle, zero, variance)
        return lifted - Torus(angle.shape[-1]).log_gaussian(_wrap(angle), zero, variance)

    def _windings(self, moved: Tensor) -> tuple[Tensor, Tensor]:
        """Turns ``(J,)`` and the log chance of each, ``(..., m, J)``, for angles ``(..., m)`` from the first ones."""
        variance = self.level[-1, -1]
        furthest = 1 + math.ceil(6.0 * math.sqrt(float(variance)) / (2.0 * math.pi))
        turns = 2.0 * math.pi * torch.arange(-furthest, furthest + 1, dtype=moved.dtype, device=moved.device)
        square = (moved.unsqueeze(-1) + turns).square() / variance
        return turns, torch.log_softmax(-0.5 * square.double(), -1)

    def terminal_corrector(self, state: Tensor) -> Tensor:
        """The corrector at the end, ``(..., D)``; of lifted angles the score of the reference's wrapped end point."""
        h = self.correct(torch.tensor(self.num_steps, device=state.device), state)
        if not self.lifted:
            return h
        angle = _wrap(state[..., self.line :])
        turns, log_chance = self._windings(angle)
        mean = (log_chance.exp() * (angle.unsqueeze(-1) + turns)).sum(-1)
        return torch.cat([h[..., : self.line], -(mean / self.level[-1, -1]).to(state.dtype)], -1)


def _line(space: Space) -> int:
    """Number of coordinates before the first angle."""
    return space.n if isinstance(space, EuclideanTorus) else 0 if isinstance(space, Torus) else space.dim


def _wrap(angle: Tensor) -> Tensor:
    return torch.remainder(angle + math.pi, 2.0 * math.pi) - math.pi


def _check_reference(space: Space, reference: Reference, factors: int) -> None:
    columns = reference.in_columns()
    if columns.variance.shape[1] not in (1, factors):
        raise ValueError(f"Expected a reference for {factors} factors; got one for {columns.variance.shape[1]}.")
    if _line(space) < space.dim and not bool((columns.contraction[:, -1] == 1.0).all()):
        raise ValueError("Expected a reference chain without contraction on a torus.")
