r"""Affine-invariant ensembles of walkers: gradient-free, exact, no step size to tune.

Walkers of an ensemble move with the help of the others, one half at a time, so that a half moves in one batch. For a
walker :math:`x_i` of the moving half and :math:`x_j, x_k` of the resting one, drawn uniformly and different,

.. math::
    \text{stretch:} \quad & y = x_j + z (x_i - x_j), \quad g(z) \propto z^{-1/2} \text{ on } [1/a, a], \quad
        \alpha = \min\bigl(1, z^{d-1} \rho(y) / \rho(x_i)\bigr), \\
    \text{differential:} \quad & y = x_i + \gamma (x_j - x_k), \quad \gamma = \frac{2.38}{\sqrt{2 d}} (1 + 0.1 \xi)
        \text{ or } 1, \quad \alpha = \min\bigl(1, \rho(y) / \rho(x_i)\bigr).

Both commute with every affine map, so that any Gaussian is as easy as the standard one. They are poor beyond about
twenty dimensions, where stretches are refused or short, and they do not leave a mode that no walker has found: a
differential move with :math:`\gamma = 1` travels between modes that walkers know.

References:
    Ensemble samplers with affine invariance (Goodman & Weare, 2010), https://doi.org/10.2140/camcos.2010.5.65
    A Markov chain Monte Carlo version of the genetic algorithm differential evolution (ter Braak, 2006),
    https://doi.org/10.1007/s11222-006-8769-1
    emcee: the MCMC hammer (Foreman-Mackey, Hogg, Lang & Goodman, 2013), https://arxiv.org/abs/1202.3665 (halves)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from diffsampler.particles import Particles
from diffsampler.sampler import Sampler
from diffsampler.space import EuclideanTorus, Space, Torus
from diffsampler.target import CountedTarget, Target

__all__ = ["AffineInvariant", "Differential", "EnsembleMove", "Stretch", "ensemble_effective_sample_size", "starts"]


class EnsembleMove(ABC):
    """A proposal for one half of an ensemble from the other half."""

    @abstractmethod
    def propose(self, x: Tensor, others: Tensor, space: Space, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Propose moves.

        Arguments:
            x: Moving walkers, shape ``(E, M, D)``.
            others: Resting walkers, shape ``(E, M', D)``.
            space: Where they live; its degrees of freedom count.
            generator: Source of randomness.

        Returns:
            Proposals ``(E, M, D)`` and the log factor ``(E, M)`` that multiplies the ratio of densities.
        """


@final
class Stretch(EnsembleMove):
    """Stretch move.

    Arguments:
        reach: Largest stretch ``a > 1``.
    """

    def __init__(self, *, reach: float = 2.0) -> None:
        if not reach > 1.0:
            raise ValueError(f"Expected reach above 1; got {reach}.")
        self.reach = reach

    def propose(self, x: Tensor, others: Tensor, space: Space, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        uniform = torch.rand(x.shape[:2], generator=generator, dtype=x.dtype, device=x.device)
        stretch = (1.0 + (self.reach - 1.0) * uniform).square() / self.reach
        (partner,) = _partners(x, others, 1, generator)
        return partner + stretch.unsqueeze(-1) * (x - partner), (space.dof - 1) * stretch.double().log()


@final
class Differential(EnsembleMove):
    """Differential evolution.

    Arguments:
        jump: Probability of ``gamma = 1``, which leads from mode to mode.
    """

    def __init__(self, *, jump: float = 0.1) -> None:
        if not 0.0 <= jump <= 1.0:
            raise ValueError(f"Expected jump in [0, 1]; got {jump}.")
        self.jump = jump

    def propose(self, x: Tensor, others: Tensor, space: Space, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        batch = x.shape[:2]
        uniform = torch.rand(batch, generator=generator, dtype=x.dtype, device=x.device)
        noise = torch.randn(batch, generator=generator, dtype=x.dtype, device=x.device)
        gamma = 2.38 / math.sqrt(2.0 * space.dof) * (1.0 + 0.1 * noise)
        gamma = torch.where(uniform < self.jump, torch.ones_like(gamma), gamma)
        first, second = _partners(x, others, 2, generator)
        return x + gamma.unsqueeze(-1) * (first - second), torch.zeros(batch, dtype=torch.float64, device=x.device)


class _Walkers(NamedTuple):
    """Positions ``(E, N, D)`` and log densities ``(E, N)``."""

    x: Tensor
    log_prob: Tensor


@final
class AffineInvariant(Sampler):
    """Independent affine-invariant ensembles in one batch; every state of every walker is recorded, accepted or not.

    Weights are equal and carry no normalizer. Walkers of an ensemble depend on each other; ensembles do not, and their
    spread is the error bar.

    Arguments:
        target: The density; only its values are used.
        moves: Proposals, taken in turns; stretch and differential evolution by default.
        num_ensembles: Independent ensembles ``E``.
        num_walkers: Walkers ``N`` of each, even and at least ``2 (dof + 1)``; by default ``max(32, 4 (dof + 1))``.
        warmup: Sweeps that are not recorded.
        thin: Record every so many sweeps.
        init: Starting points ``(E * N, D)``. By default exact draws of the target's prior if it has one, else
            ``init_scale`` times Gaussian noise.
        init_scale: See ``init``.
        dtype: Dtype of the walkers.

    Raises:
        ValueError: If the target lives on a torus, which has no affine maps, or a number is out of range.
    """

    def __init__(
        self,
        target: Target,
        *,
        moves: Sequence[EnsembleMove] | None = None,
        num_ensembles: int = 8,
        num_walkers: int | None = None,
        warmup: int = 500,
        thin: int = 1,
        init: Tensor | None = None,
        init_scale: float = 1.0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        least = 2 * (target.space.dof + 1)
        self.num_walkers = max(32, 2 * least) if num_walkers is None else num_walkers
        if isinstance(target.space, Torus | EuclideanTorus):
            raise ValueError("Expected a target on a vector space, which has affine maps; got one on a torus.")
        if self.num_walkers < least or self.num_walkers % 2:
            raise ValueError(f"Expected an even number of at least {least} walkers; got {self.num_walkers}.")
        if num_ensembles < 2:
            raise ValueError(f"Expected at least 2 ensembles, whose spread is the error bar; got {num_ensembles}.")
        if warmup < 0 or thin < 1:
            raise ValueError(f"Expected warmup >= 0 and thin >= 1; got {warmup} and {thin}.")
        if init is not None and init.shape != (num_ensembles * self.num_walkers, target.dim):
            wanted = (num_ensembles * self.num_walkers, target.dim)
            raise ValueError(f"Expected init of shape {wanted}; got {tuple(init.shape)}.")
        self.target = target
        self._counted = CountedTarget(target)
        self.moves = (Stretch(), Differential()) if moves is None else tuple(moves)
        if not self.moves:
            raise ValueError("Expected at least one move; got none.")
        self.num_ensembles = num_ensembles
        self.warmup = warmup
        self.thin = thin
        self.init = init
        self.init_scale = init_scale
        self.dtype = dtype

    @property
    def evaluations(self) -> int:
        """Points at which the target's density was computed so far, warm-up included."""
        return self._counted.evaluations

    def sample(self, n: int, *, seed: int = 0) -> Particles:
        """Record at least ``n`` states, as many sweeps of all walkers as it takes, ensemble after ensemble."""
        x, nonfinite = self.trajectories(n, seed=seed)
        ensembles, _, _, dim = x.shape
        flat = x.reshape(-1, dim)
        return Particles(
            flat,
            torch.zeros(len(flat), dtype=torch.float64, device=x.device),
            replicates=ensembles,
            has_normalizer=False,
            effective=ensemble_effective_sample_size(x),
            nonfinite=nonfinite,
        )

    def trajectories(self, n: int, *, seed: int = 0) -> tuple[Tensor, int]:
        """Recorded walkers ``(E, sweeps, N, D)``, and how many proposals were refused as not a number."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.num_ensembles, self.num_walkers)
        x = starts(self.target, shape, self.init, self.init_scale, self.dtype, generator)
        walkers = _Walkers(x, self._log_prob(x))
        if not bool(walkers.log_prob.isfinite().all()):
            bad = x[~walkers.log_prob.isfinite()][0]
            raise ValueError(f"Expected a finite density at the starting points; got none at {bad.tolist()}.")
        kept, nonfinite = [], 0
        for t in range(self.warmup + self.thin * math.ceil(n / (shape[0] * shape[1]))):
            walkers, refused = self._sweep(walkers, self.moves[t % len(self.moves)], generator)
            done = t + 1 - self.warmup
            if done > 0:
                nonfinite += refused
            if done > 0 and done % self.thin == 0:
                kept.append(walkers.x)
        return torch.stack(kept, 1), nonfinite

    def _sweep(self, walkers: _Walkers, move: EnsembleMove, generator: torch.Generator) -> tuple[_Walkers, int]:
        """Move one half, then the other."""
        half, refused = self.num_walkers // 2, 0
        parts = [_Walkers(walkers.x[:, :half], walkers.log_prob[:, :half])]
        parts.append(_Walkers(walkers.x[:, half:], walkers.log_prob[:, half:]))
        for k in (0, 1):
            x, log_prob = parts[k]
            y, log_factor = move.propose(x, parts[1 - k].x, self.target.space, generator)
            y = self.target.space.project(y)
            proposed = self._log_prob(y)
            broken = proposed.isnan() | proposed.isposinf()
            log_accept = log_factor + proposed - log_prob
            uniform = torch.rand(log_prob.shape, generator=generator, dtype=torch.float64, device=x.device)
            taken = ~broken & (uniform.log() < log_accept)
            parts[k] = _Walkers(torch.where(taken.unsqueeze(-1), y, x), torch.where(taken, proposed, log_prob))
            refused += int(broken.sum())
        return _Walkers(torch.cat([p.x for p in parts], 1), torch.cat([p.log_prob for p in parts], 1)), refused

    def _log_prob(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._counted.log_prob(x.flatten(0, 1)).double().reshape(x.shape[:2])


def starts(
    target: Target,
    shape: tuple[int, int],
    init: Tensor | None,
    init_scale: float,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Tensor:
    """Starting points of ensembles, ``(*shape, D)``: ``init``, draws of the prior, or scaled noise."""
    space, count = target.space, shape[0] * shape[1]
    if init is not None:
        x = space.project(init.to(dtype))
    elif target.prior is not None:
        x = target.prior.sample(count, generator=generator).to(dtype)
    else:
        like = torch.zeros((), dtype=dtype)
        x = space.project(init_scale * space.noise((count,), like=like, generator=generator))
    return x.reshape(*shape, -1)


def ensemble_effective_sample_size(x: Tensor) -> float:
    """Effective sample size of interacting walkers ``(E, sweeps, N, D)``, smallest over coordinates.

    From the autocorrelation of the ensembles' means, which contains the correlation of the walkers, and from that of
    single walkers; the smaller one. NaN for fewer than four sweeps.
    """
    if x.shape[1] < 4:
        return math.nan
    x = x.double()
    means = x.mean(2)
    total, spread = x.var((0, 1, 2)), means.var((0, 1)).clamp_min(1e-300)
    joint = effective_sample_size(means, chain_dim=0, sample_dim=1) * total / spread
    single = effective_sample_size(x.transpose(1, 2).flatten(0, 1), chain_dim=0, sample_dim=1)
    ess = torch.minimum(joint, single)
    return float(torch.where(ess.isfinite(), ess, torch.ones_like(ess)).min())


def _partners(x: Tensor, others: Tensor, count: int, generator: torch.Generator) -> list[Tensor]:
    """``count`` different walkers of ``others`` for each walker of ``x``, each ``(E, M, D)``."""
    ensembles, size, dim = others.shape
    batch = x.shape[:2]
    first = torch.randint(size, batch, generator=generator, device=x.device)
    picks = [first]
    if count == 2:
        # A shift by 1 .. size - 1 is uniform over the others.
        shift = torch.randint(1, size, batch, generator=generator, device=x.device)
        picks.append((first + shift) % size)
    return [others.gather(1, pick.unsqueeze(-1).expand(-1, -1, dim)) for pick in picks]
