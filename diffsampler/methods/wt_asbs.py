r"""Well-tempered adjoint Schroedinger bridge sampler: a bias on collective variables that flattens barriers.

Few collective variables :math:`s(x)` name the slow directions. While the sampler learns, every fresh end point leaves a
hill on a grid of them (energies in units of kT),

.. math:: V(s) \leftarrow V(s) + \omega\, e^{-V(s_i) / (\gamma - 1)} \prod_j e^{-(s_j - s_{ij})^2 / 2 \sigma_j^2},

and the density that it learns is :math:`\rho(x) e^{-V(s(x))}`. Hills shrink where there are many already; in the limit
:math:`V = -(1 - 1/\gamma) F` up to a constant, where :math:`F(s) = -\log \int \rho\,\delta(s - s(x))\,dx`,
so that ``s`` is explored at :math:`\gamma` times the temperature. For the last part of the training the bias is frozen.
Draws carry the path weights of the biased process times :math:`e^{V}`: exact weights towards ``rho`` itself, whatever
the bias and however far the training came. (Published: :math:`e^V` alone, right only for a converged sampler.)

It needs collective variables that name the barriers; others stay what they are. It costs what the sampler costs, and
the grid, whose size is exponential in the number of variables: three at most.

References:
    Enhanced sampling with the adjoint Schroedinger bridge sampler (Nam et al., 2025), https://arxiv.org/abs/2510.11923
    Well-tempered metadynamics (Barducci, Bussi, Parrinello, 2008), https://doi.org/10.1103/PhysRevLett.100.020603
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from diffsampler.estimators import Estimate
from diffsampler.lessons import Lesson, Taught
from diffsampler.methods.asbs import ASBS
from diffsampler.methods.matching import Matching
from diffsampler.objective import Objective
from diffsampler.particles import Particles
from diffsampler.process import Process
from diffsampler.sampler import DiffusionSampler, Sampler
from diffsampler.sources import Draw
from diffsampler.target import Target

__all__ = [
    "WTASBS",
    "Axis",
    "BiasGrid",
    "BiasedTarget",
    "Profile",
    "WellTempered",
    "free_energy_difference",
    "free_energy_profile",
]

CollectiveVariables = Callable[[Tensor], Tensor]
"""A differentiable function of points, ``(n, D) -> (n, c)``."""


class Axis(NamedTuple):
    """One collective variable of a grid; outside an axis that is not periodic the bias is that of its end."""

    low: float
    high: float
    nodes: int
    width: float
    """Standard deviation of a hill."""
    periodic: bool = False

    @property
    def spacing(self) -> float:
        """Distance of two nodes; the last node of a periodic axis comes one spacing before ``high``."""
        return (self.high - self.low) / (self.nodes if self.periodic else self.nodes - 1)


@final
class BiasGrid(nn.Module):
    """A bias on collective variables, in units of kT: values on a grid, multilinear between its nodes.

    Arguments:
        axes: One to three collective variables.

    Raises:
        ValueError: If an axis has no extent, fewer than two nodes or hills of no width.
    """

    value: Tensor

    def __init__(self, axes: Sequence[Axis]) -> None:
        super().__init__()
        if not 1 <= len(axes) <= 3:
            raise ValueError(f"Expected one to three collective variables; got {len(axes)}.")
        for axis in axes:
            if not axis.low < axis.high or axis.nodes < 2 or not axis.width > 0.0:
                raise ValueError(f"Expected low < high, nodes >= 2 and width > 0; got {axis}.")
        self.axes = tuple(axes)
        self.register_buffer("value", torch.zeros([axis.nodes for axis in axes], dtype=torch.float64))

    def nodes(self) -> list[Tensor]:
        """Positions of the nodes of every axis, float64."""
        steps = [torch.arange(axis.nodes, dtype=torch.float64, device=self.value.device) for axis in self.axes]
        return [axis.low + axis.spacing * step for axis, step in zip(self.axes, steps, strict=True)]

    def forward(self, s: Tensor) -> Tensor:
        """The bias ``(n,)``, float64, at ``s (n, c)``; differentiable in ``s``."""
        s = s.double()
        lower: list[Tensor] = []
        share: list[Tensor] = []
        for axis, value in zip(self.axes, s.unbind(-1), strict=True):
            place = (value - axis.low) / axis.spacing
            if not axis.periodic:
                place = place.clamp(0.0, axis.nodes - 1.0)
            cell = place.detach().floor()
            if not axis.periodic:
                cell = cell.clamp(max=axis.nodes - 2.0)
            lower.append(cell.long())
            share.append(place - cell)
        total = s.new_zeros(s.shape[:-1])
        for corner in itertools.product((0, 1), repeat=len(self.axes)):
            weight = torch.ones_like(total)
            index: list[Tensor] = []
            for axis, low, part, up in zip(self.axes, lower, share, corner, strict=True):
                weight = weight * (part if up else 1.0 - part)
                index.append(torch.remainder(low + up, axis.nodes))
            total = total + weight * self.value[tuple(index)]
        return total

    def deposit(self, s: Tensor, height: Tensor) -> None:
        """Add hills of ``height (n,)`` centred at ``s (n, c)``."""
        kernels = []
        for axis, nodes, value in zip(self.axes, self.nodes(), s.double().unbind(-1), strict=True):
            delta = nodes - value.unsqueeze(-1)
            if axis.periodic:
                period = axis.high - axis.low
                delta = delta - period * (delta / period).round()
            kernels.append(torch.exp(-0.5 * (delta / axis.width).square()))
        letters = "abc"[: len(kernels)]
        terms = ",".join("n" + letter for letter in letters)
        self.value += torch.einsum(f"n,{terms}->{letters}", height.double(), *kernels)


@final
class BiasedTarget(Target):
    """A density times the exponential of minus a bias on collective variables of its points.

    Arguments:
        target: The density.
        variables: The collective variables, ``(n, D) -> (n, c)``.
        bias: The bias; what is added to it later is seen.
    """

    def __init__(self, target: Target, variables: CollectiveVariables, bias: BiasGrid) -> None:
        super().__init__(target.space)
        self.target = target
        self.variables = variables
        self.bias = bias

    def bias_at(self, x: Tensor) -> Tensor:
        """The bias ``(...)`` at points ``x (..., D)``, float64."""
        value: Tensor = self.bias(self.variables(x.reshape(-1, self.dim)))
        return value.reshape(x.shape[:-1])

    def log_prob(self, x: Tensor) -> Tensor:
        return self.target.log_prob(x) - self.bias_at(x).to(x.dtype)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, score = self.target.log_prob_and_score(x)
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            bias = self.bias_at(point)
            (slope,) = torch.autograd.grad(bias.sum(), point)
        return log_prob - bias.detach().to(log_prob.dtype), score - self.space.project_vector(slope).to(score.dtype)


@final
class WellTempered(Lesson):
    r"""Matching whose fresh end points leave hills, until the bias is frozen.

    Arguments:
        matching: How the process is trained.
        biased: The density with the bias.
        height: Height of the first hills, in kT. Every fresh end point leaves one: 512 of them that overlap raise the
            bias by 512 heights.
        factor: The bias factor :math:`\gamma > 1`.
        skip: Draws of end points before the first hills.
        until: Share of the training after which the bias is frozen.
    """

    def __init__(
        self,
        matching: Matching,
        biased: BiasedTarget,
        *,
        height: float = 0.02,
        factor: float = 8.0,
        skip: int = 5,
        until: float = 0.7,
    ) -> None:
        if not height > 0.0 or not factor > 1.0 or skip < 0 or not 0.0 < until <= 1.0:
            raise ValueError(
                "Expected height > 0, factor > 1, skip >= 0 and until in (0, 1]; "
                f"got {height}, {factor}, {skip} and {until}."
            )
        self.matching = matching
        self.biased = biased
        self.height = height
        self.factor = factor
        self.skip = skip
        self.until = until
        self.draws = 0

    def check(self, process: Process, objective: Objective) -> None:
        self.matching.check(process, objective)

    def accumulate(self, objective: Objective, use: Draw, size: int, *, weight: float) -> Taught:
        return self.matching.accumulate(objective, use, size, weight=weight)

    def made(self, use: Draw) -> None:
        self.matching.made(use)
        latest = self.matching.latest
        if latest is None or use.progress >= self.until:
            return
        self.draws += 1
        if self.draws > self.skip and len(latest):
            with torch.no_grad():
                s = self.biased.variables(use.process.point(latest))
                # Heights are those of the bias before this batch.
                self.biased.bias.deposit(s, self.height * torch.exp(-self.biased.bias(s) / (self.factor - 1.0)))

    def state(self) -> list[dict[str, Any]]:
        return [{"bias": self.biased.bias.value.clone(), "draws": self.draws}, *self.matching.state()]

    def restore(self, state: list[dict[str, Any]], device: torch.device) -> None:
        self.biased.bias.value.copy_(state[0]["bias"])
        self.draws = state[0]["draws"]
        self.matching.restore(state[1:], device)

    def config(self) -> list[str]:
        axes = " ".join(f"{a.low:g}:{a.high:g}:{a.nodes}:{a.width:g}:{a.periodic}" for a in self.biased.bias.axes)
        hills = f"WellTempered({self.height:g}, {self.factor:g}, {self.skip}, {self.until:g})"
        return [hills, axes, *self.matching.config()]


class Profile(NamedTuple):
    """A free energy on bins of collective variables, in kT, with the smallest at zero."""

    edges: list[Tensor]
    """Edges of the bins of every variable."""
    value: Tensor
    """Free energies, one axis a variable; infinite where there was no draw."""
    std_error: Tensor
    """Standard errors of independent draws, infinite likewise."""


def free_energy_profile(s: Tensor, log_weight: Tensor, edges: Sequence[Tensor]) -> Profile:
    r"""Free energy :math:`F = -\log \sum_i w_i 1[s_i \in bin]` per volume of the bins, from weighted draws.

    The error is that of a ratio estimator, :math:`\mathrm{Var} F = \sum_i w_i^2 (1_i / W_{bin} - 1 / W)^2`.

    Arguments:
        s: Collective variables of independent draws, ``(n, c)``.
        log_weight: Their log weights, ``(n,)``.
        edges: Rising edges of the bins of every variable.
    """
    if s.ndim != 2 or s.shape[1] != len(edges):
        raise ValueError(f"Expected variables of shape (n, {len(edges)}); got {tuple(s.shape)}.")
    weight = torch.softmax(log_weight.double(), 0)
    shape = [len(e) - 1 for e in edges]
    bins, inside = torch.zeros_like(s[:, 0], dtype=torch.long), torch.ones_like(s[:, 0], dtype=torch.bool)
    volume = s.new_ones((), dtype=torch.float64)
    for value, edge in zip(s.double().unbind(-1), edges, strict=True):
        edge = edge.double().to(s.device)
        index = torch.bucketize(value, edge, right=True) - 1
        inside &= (index >= 0) & (index < len(edge) - 1)
        bins = bins * (len(edge) - 1) + index.clamp(0, len(edge) - 2)
        volume = volume.unsqueeze(-1) * edge.diff()
    zero = weight.new_zeros(math.prod(shape))
    mass = zero.index_add(0, bins[inside], weight[inside])
    square = zero.index_add(0, bins[inside], weight[inside].square())
    total = weight.square().sum()
    value = -(mass / volume.flatten()).log()
    variance = square / mass.square() - 2.0 * square / mass + total
    error = torch.where(mass > 0.0, variance.clamp_min(0.0).sqrt(), torch.full_like(mass, math.inf))
    return Profile([e.double() for e in edges], (value - value.min()).reshape(shape), error.reshape(shape))


def free_energy_difference(in_a: Tensor, in_b: Tensor, log_weight: Tensor) -> Estimate:
    r"""Free energy of a set A over that of B, :math:`-\log (W_A / W_B)` in kT, from weighted independent draws.

    Arguments:
        in_a: Whether each draw is in A, boolean ``(n,)``.
        in_b: Whether it is in B, disjoint from A.
        log_weight: Log weights ``(n,)``.

    Raises:
        ValueError: If a set has no draw: there is no estimate then, only a bound.
    """
    weight = torch.softmax(log_weight.double(), 0)
    a, b = weight[in_a].sum(), weight[in_b].sum()
    if not (a > 0.0 and b > 0.0):
        raise ValueError("Expected draws with weight in both sets; got none in one of them.")
    terms = weight * (in_a.double() / a - in_b.double() / b)
    return Estimate(float(b.log() - a.log()), float(terms.square().sum().sqrt()), "free energy difference")


@final
class WTASBS(Sampler):
    """Well-tempered adjoint Schroedinger bridge sampler.

    Example:
        ``WTASBS(target, phi_psi, [Axis(-pi, pi, 100, 0.2, periodic=True)] * 2, num_steps=100).fit(steps=20_000)``

    Arguments:
        target: The density to sample.
        variables: The collective variables, ``(n, D) -> (n, c)``, differentiable.
        axes: Their grid and the widths of hills.
        num_steps: Number of steps ``K``.
        height: As in :class:`WellTempered`.
        factor: As there.
        skip: As there.
        until: As there.
        matching: How the process is trained.
        options: As in :class:`~diffsampler.methods.asbs.ASBS`; its start law may be a point.

    Attributes:
        biased: The density that is learned.
        chain: Its sampler.
        lesson: How it is trained.
    """

    def __init__(
        self,
        target: Target,
        variables: CollectiveVariables,
        axes: Sequence[Axis],
        *,
        num_steps: int = 64,
        height: float = 0.02,
        factor: float = 8.0,
        skip: int = 5,
        until: float = 0.7,
        matching: Matching | None = None,
        **options: Any,
    ) -> None:
        self.target = target
        self.biased = BiasedTarget(target, variables, BiasGrid(axes))
        self.chain: DiffusionSampler = ASBS(self.biased, num_steps=num_steps, **options)
        matching = Matching() if matching is None else matching
        self.lesson = WellTempered(matching, self.biased, height=height, factor=factor, skip=skip, until=until)

    @property
    def evaluations(self) -> int:
        return self.chain.evaluations

    @property
    def history(self) -> list[dict[str, float]]:
        """Training history, a list of dicts; weights there are those towards the biased density."""
        return self.chain.history

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> WTASBS:
        """Move chain, bias and target in place; the bias stays in float64."""
        self.chain.to(device=device, dtype=dtype)
        return self

    def fit(self, **options: Any) -> WTASBS:
        """Train, and return the sampler itself; options as in :meth:`~diffsampler.sampler.DiffusionSampler.fit`."""
        # The identity of a checkpoint holds values of the density: those without hills.
        self.biased.bias.value.zero_()
        self.lesson.draws = 0
        self.chain.fit(lesson=self.lesson, **options)
        return self

    def sample(self, n: int, *, seed: int = 0) -> Particles:
        """Draw ``n`` particles with exact weights towards the target itself."""
        particles = self.chain.sample(n, seed=seed)
        with torch.no_grad():
            bias = self.biased.bias_at(particles.x)
        return Particles(particles.x, particles.log_weight + bias, nonfinite=particles.nonfinite)
