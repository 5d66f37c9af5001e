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
* On a torus the state is the angle before wrapping. Terminal angles are lifted by the law of the winding number under
  the reference, which makes the weight that of Girsanov on the torus (:math:`W` is the wrapped normal law),

  .. math:: \log w = \log\rho(\theta) - \log W(\theta; \Sigma_{0K}) + \sum_k [\log N(x_{k+1}; x_k, v_k) - \log F_k].

References:
    Adjoint sampling: highly scalable diffusion samplers via adjoint matching (Havens et al., 2025),
    https://arxiv.org/abs/2504.11713
    Adjoint Schroedinger bridge sampler (Liu et al., 2025), https://arxiv.org/abs/2506.22565
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor, nn

from diffsampler.equivariant import PeriodicMLP
from diffsampler.networks import FourierMLP, clip
from diffsampler.process import Gaussian, Process
from diffsampler.reference import Reference
from diffsampler.space import Euclidean, MeanFree, Space, Torus

__all__ = ["GaussianStart", "HarmonicStart", "PointStart", "ReferenceProcess", "Start", "default_control"]

LOG_VARIANCE_BOUND = 4.0


class Start(nn.Module, ABC):
    r"""A centred Gaussian start law :math:`\mu`, or a point: diagonal in some orthogonal basis.

    Arguments:
        space: Where it lives.
        variances: Variances along the basis, ``(M,)``; one for all coordinates, or as many as the basis has.
    """

    variances: Tensor

    def __init__(self, space: Space, variances: Tensor) -> None:
        super().__init__()
        self.space = space
        self.register_buffer("variances", variances)

    @abstractmethod
    def apply_spectrum(self, x: Tensor, factors: Tensor) -> Tensor:
        """Multiply points ``x (..., D)`` by factors ``(..., M)`` in the basis."""

    @abstractmethod
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw points ``(n, D)``, on the device of the law."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Log density at ``x (..., D)``, shape ``(...)``, float64; zero for a point."""


@final
class PointStart(Start):
    """All particles begin at the origin."""

    def __init__(self, space: Space) -> None:
        super().__init__(space, torch.zeros(1, dtype=torch.float64))

    def apply_spectrum(self, x: Tensor, factors: Tensor) -> Tensor:
        return factors * x

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.variances.new_zeros(n, self.space.dim)

    def log_prob(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[:-1], dtype=torch.float64)


@final
class GaussianStart(Start):
    """An isotropic Gaussian, mean-free where the space is.

    Arguments:
        space: Euclidean or mean-free space.
        scale: Standard deviation.
    """

    def __init__(self, space: Space, *, scale: float = 1.0) -> None:
        _check_start(space, scale)
        super().__init__(space, torch.tensor([scale**2], dtype=torch.float64))

    def apply_spectrum(self, x: Tensor, factors: Tensor) -> Tensor:
        return factors * x

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.variances.sqrt() * self.space.noise((n,), like=self.variances, generator=generator)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.space.log_gaussian(x, torch.zeros_like(x), self.variances.to(x.dtype))


@final
class HarmonicStart(Start):
    r"""Particles joined by springs, :math:`\mu \propto \exp(-\frac{1}{2 s^2} \sum_{bonds} |x_i - x_j|^2)`, mean-free.

    The covariance is :math:`s^2 L^+`, where ``L`` is the graph Laplacian. It has one zero eigenvalue, the centre of
    mass, exactly if the bonds connect all particles. (The published matrix for fully connected particles, 1 on the
    diagonal and -1/2 elsewhere, is not of this kind: it is negative along the centre of mass from four particles on;
    without that direction it is an isotropic law of variance 2/3, a :class:`GaussianStart`.)

    Arguments:
        space: Mean-free space.
        bonds: Pairs of bonded particles, integers ``(m, 2)``.
        scale: The length ``s`` of a bond per degree of freedom.
    """

    basis: Tensor

    def __init__(self, space: Space, bonds: Tensor, *, scale: float = 1.0) -> None:
        _check_start(space, scale)
        if not isinstance(space, MeanFree):
            raise ValueError(f"Expected mean-free particles for springs between them; got {space}.")
        value, basis = torch.linalg.eigh(_laplacian(space.n, bonds))
        if not value[1] > 1e-9:
            raise ValueError("Expected bonds that connect all particles; got separate groups.")
        # The centre of mass, eigenvalue zero, does not exist on the space.
        variances = torch.cat([value.new_zeros(1), scale**2 / value[1:]])
        super().__init__(space, variances)
        self.register_buffer("basis", basis)
        self.n, self.d = space.n, space.d

    def apply_spectrum(self, x: Tensor, factors: Tensor) -> Tensor:
        basis = self.basis.to(x.dtype)
        modes = basis.T @ x.unflatten(-1, (self.n, self.d))
        return (basis @ (factors.unsqueeze(-1) * modes)).flatten(-2)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        noise = self.space.noise((n,), like=self.variances, generator=generator)
        return self.apply_spectrum(noise, self.variances.sqrt())

    def log_prob(self, x: Tensor) -> Tensor:
        modes = (self.basis.T @ x.to(self.basis.dtype).unflatten(-1, (self.n, self.d)))[..., 1:, :].double()
        variance = self.variances[1:].double()
        square = (modes.square().sum(-1) / variance).sum(-1)
        return -0.5 * (square + self.d * (2.0 * math.pi * variance).log().sum())


def _check_start(space: Space, scale: float) -> None:
    if isinstance(space, Torus):
        raise ValueError("Expected a Euclidean or mean-free space; on a torus use the point start.")
    if not scale > 0.0:
        raise ValueError(f"Expected scale > 0; got {scale}.")


def _laplacian(n: int, bonds: Tensor) -> Tensor:
    if bonds.ndim != 2 or bonds.shape[1] != 2 or bonds.is_floating_point():
        raise ValueError(f"Expected bonds of shape (m, 2), integers; got {tuple(bonds.shape)}, {bonds.dtype}.")
    if len(bonds) and not 0 <= int(bonds.min()) <= int(bonds.max()) < n:
        raise ValueError(
            f"Expected bonds between particles 0 to {n - 1}; got {int(bonds.min())} to {int(bonds.max())}."
        )
    laplacian = torch.zeros(n, n, dtype=torch.float64)
    for i, j in bonds.tolist():
        if i == j:
            raise ValueError(f"Expected bonds between two particles; got {i} with itself.")
        laplacian[i, i] += 1.0
        laplacian[j, j] += 1.0
        laplacian[i, j] -= 1.0
        laplacian[j, i] -= 1.0
    return laplacian


def default_control(space: Space, *, generator: torch.Generator, width: int = 64, point_features: int = 0) -> nn.Module:
    """A network on points that assumes no symmetry but the period of angles."""
    if isinstance(space, Torus):
        return PeriodicMLP(space.dim, generator=generator, width=width)
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
    end_variance: Tensor

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
        if isinstance(space, Torus) and not bool((reference.contraction == 1.0).all()):
            raise ValueError("Expected a reference chain without contraction on a torus.")
        fixed = bool((start.variances == 0.0).all())
        super().__init__(
            space,
            reference.num_steps,
            needs_score=False,
            learns_backward=not fixed,
            has_bridge=fixed and not isinstance(space, Torus),
            drawn_space=Euclidean(space.dim) if isinstance(space, Torus) else None,
        )
        self.start = start
        self._tables(reference, resolution)
        generator = torch.Generator().manual_seed(seed)
        self.control = (
            default_control(space, generator=generator, width=width, point_features=point_features)
            if control is None
            else control
        )
        self.log_variance = nn.Parameter(torch.zeros(self.num_steps, 1), requires_grad=learn_variance)
        self.corrector_control: nn.Module | None = None
        self.back_log_variance: nn.Parameter | None = None
        if not fixed:
            self.corrector_control = (
                default_control(space, generator=generator, width=width, point_features=point_features)
                if corrector is None
                else corrector
            )
            self.back_log_variance = nn.Parameter(torch.zeros(self.num_steps, 1), requires_grad=learn_variance)

    def _tables(self, reference: Reference, resolution: float) -> None:
        reach, level = reference.from_start()
        ahead, left = reference.to_end()
        kappa, v = reference.contraction, reference.variance
        # Variances of the uncontrolled chain along the start's basis, and their mean over the directions that exist.
        modes = reach.square().unsqueeze(-1) * self.start.variances.double() + level.unsqueeze(-1)
        mean = modes[:, -1:] if modes.shape[-1] == 1 else modes[:, 1:].mean(-1, keepdim=True)
        smallest = resolution**2 * level[-1]
        table = {
            "contraction": kappa.unsqueeze(-1),
            "variance": v.unsqueeze(-1),
            "reach": reach.unsqueeze(-1),
            "level": level.unsqueeze(-1),
            "ahead": ahead.unsqueeze(-1),
            "left": left.unsqueeze(-1),
            "pull": kappa.unsqueeze(-1) * modes[:-1] / modes[1:],
            "back_variance": mean[:-1] * v.unsqueeze(-1) / mean[1:],
            "gain": (left + smallest).rsqrt().unsqueeze(-1),
            "back_gain": (mean + smallest).rsqrt(),
            "restoring": torch.cat([modes.new_zeros(1, modes.shape[-1]), 1.0 / modes[1:]]),
            "end_variance": modes[-1],
        }
        self.register_buffer("time", reference.time)
        for name, value in table.items():
            self.register_buffer(name, value)

    def at(self, table: Tensor, k: Tensor) -> Tensor:
        """Entries of a table of the reference, kept in float64, in the dtype of the process."""
        return table[k].to(self.log_variance.dtype)

    def sample_initial(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.start.sample(n, generator=generator).to(self.log_variance.dtype)

    def log_initial(self, x: Tensor) -> Tensor:
        return self.start.log_prob(x)

    def steer(self, k: Tensor, x: Tensor) -> Tensor:
        """The control ``u (..., D)`` at steps ``k (...)`` in ``0..K-1`` and states ``x (..., D)``."""
        return self.at(self.gain, k) * self.space.project_vector(self.control(self.at(self.time, k), x))

    def correct(self, k: Tensor, x: Tensor) -> Tensor:
        """The corrector ``h (..., D)`` at steps ``k (...)`` in ``1..K``."""
        h = -self.start.apply_spectrum(x, self.at(self.restoring, k))
        if self.corrector_control is None:
            return h
        return h + self.at(self.back_gain, k) * self.space.project_vector(
            self.corrector_control(self.at(self.time, k), x)
        )

    def forward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        mean = self.at(self.contraction, k) * x + self.at(self.variance, k) * self.steer(k, x)
        return Gaussian(mean, self.at(self.variance, k) * clip(self.log_variance[k], LOG_VARIANCE_BOUND).exp())

    def backward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        mean = self.start.apply_spectrum(x, self.at(self.pull, k))
        if self.corrector_control is None or self.back_log_variance is None:
            return Gaussian(mean, self.at(self.back_variance, k))
        net = self.space.project_vector(self.corrector_control(self.at(self.time, k + 1), x))
        mean = mean + self.at(self.variance, k) / self.at(self.contraction, k) * self.at(self.back_gain, k + 1) * net
        return Gaussian(
            mean, self.at(self.back_variance, k) * clip(self.back_log_variance[k], LOG_VARIANCE_BOUND).exp()
        )

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
        return self.space.project(state) if isinstance(self.space, Torus) else state

    def point(self, state: Tensor) -> Tensor:
        return self.observed(state)

    def complete(self, x: Tensor, score: Tensor | None, *, generator: torch.Generator | None = None) -> Tensor:
        if not isinstance(self.space, Torus):
            return x
        turns, log_chance = self._windings(x)
        chance = log_chance.exp().reshape(-1, len(turns))
        choice = torch.multinomial(chance, 1, generator=generator).reshape(x.shape)
        return x + turns[choice]

    def log_carried(self, state: Tensor, score: Tensor | None) -> Tensor:
        if not isinstance(self.space, Torus):
            return super().log_carried(state, score)
        angle = self.space.project(state)
        lifted = Euclidean(self.space.dim).log_gaussian(state, torch.zeros_like(state), self.end_variance)
        return lifted - self.space.log_gaussian(angle, torch.zeros_like(angle), self.end_variance)

    def _windings(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Turns ``(J,)`` and the log chance of each, ``(..., m, J)``, given angles ``x (..., m)``."""
        furthest = 1 + math.ceil(6.0 * math.sqrt(float(self.end_variance)) / (2.0 * math.pi))
        turns = 2.0 * math.pi * torch.arange(-furthest, furthest + 1, dtype=x.dtype, device=x.device)
        square = (x.unsqueeze(-1) + turns).square() / self.end_variance
        return turns, torch.log_softmax(-0.5 * square.double(), -1)

    def terminal_corrector(self, state: Tensor) -> Tensor:
        """The corrector at the end, ``(..., D)``; on a torus the score of the wrapped end point of the reference."""
        if not isinstance(self.space, Torus):
            return self.correct(torch.tensor(self.num_steps, device=state.device), state)
        turns, log_chance = self._windings(self.space.project(state))
        lifted = self.space.project(state).unsqueeze(-1) + turns
        return -((log_chance.exp() * lifted).sum(-1) / self.end_variance).to(state.dtype)
