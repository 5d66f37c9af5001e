"""The result record of every sampler: points with one log weight each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffsampler import estimators
from diffsampler.estimators import Estimate

__all__ = ["Particles", "disagreement"]


@dataclass(frozen=True)
class Particles:
    """Weighted particles.

    Arguments:
        x: Points, shape ``(n, D)``.
        log_weight: Log weights, shape ``(n,)``, float64, with ``E[w] = Z``. Non-finite points carry ``-inf``.
        replicates: 1 when particles are independent of each other. Otherwise the particles are this many equal,
            contiguous, mutually independent blocks (islands of SMC, chains of MCMC) with dependence inside a block.
        has_normalizer: Whether the weights estimate the normalizing constant (False for MCMC chains).
        effective: Effective sample size known from elsewhere (autocorrelation of chains), instead of the weights'.
        nonfinite: Number of particles that were lost to non-finite values.
        divergences: Number of recorded transitions whose trajectory lost its energy (chains only).
        known_replicates: ``log Z`` of each block known from elsewhere (the ladder of parallel tempering), shape
            ``(replicates,)``, instead of the weights'. Blocks of chains keep equal weights in expectations: to weight
            them by a noisy estimate of Z would add that noise to all of them.
        known_elbo: Lower bound of ``log Z`` known from elsewhere (the learned part of a defended sampler, whose other
            draws may weigh nothing), instead of the weights' own.
    """

    x: Tensor
    log_weight: Tensor
    replicates: int = 1
    has_normalizer: bool = True
    effective: float | None = None
    nonfinite: int = 0
    divergences: int = 0
    known_replicates: Tensor | None = None
    known_elbo: float | None = None

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.log_weight.shape != self.x.shape[:1]:
            raise ValueError(
                f"Expected x of shape (n, D) and log_weight of shape (n,); "
                f"got {tuple(self.x.shape)} and {tuple(self.log_weight.shape)}."
            )
        if self.log_weight.dtype != torch.float64:
            raise TypeError(f"Expected log_weight in float64; got {self.log_weight.dtype}.")
        if self.replicates < 1 or self.x.shape[0] % self.replicates:
            raise ValueError(f"Expected replicates to divide {self.x.shape[0]} particles; got {self.replicates}.")
        known = self.known_replicates
        if known is not None and (known.shape != (self.replicates,) or not self.has_normalizer):
            raise ValueError(
                f"Expected known_replicates of shape {(self.replicates,)} with has_normalizer=True; "
                f"got {tuple(known.shape)} and {self.has_normalizer}."
            )

    def __len__(self) -> int:
        return self.x.shape[0]

    @cached_property
    def log_replicates(self) -> Tensor:
        """``log Z`` of each independent block, shape ``(replicates,)``."""
        if self.known_replicates is not None:
            return self.known_replicates
        blocks = self.log_weight.reshape(self.replicates, -1)
        return torch.logsumexp(blocks, -1) - math.log(blocks.shape[-1])

    @cached_property
    def log_normalizer(self) -> Estimate:
        """``log Z`` with a standard error: delta method for independent particles, spread of the blocks otherwise."""
        if not self.has_normalizer:
            return Estimate(math.nan, math.nan, "unavailable")
        if self.replicates > 1 or self.known_replicates is not None:
            return estimators.replicate_log_normalizer(self.log_replicates)
        return estimators.importance_log_normalizer(self.log_weight)

    @cached_property
    def elbo(self) -> float:
        """Lower bound of ``log Z``: mean log weight, or the mean of the blocks' ``log Z`` where particles interact."""
        if not self.has_normalizer:
            return math.nan
        if self.known_elbo is not None:
            # Two lower bounds, of different draws: the smaller does not contradict the estimate of these.
            return min(self.known_elbo, self.log_normalizer.value)
        values = self.log_replicates if self.replicates > 1 else self.log_weight
        return estimators.elbo(values).value

    @cached_property
    def ess(self) -> float:
        """Effective sample size, a count."""
        if self.effective is not None:
            return self.effective
        return estimators.effective_sample_size(self.log_weight)

    @cached_property
    def pareto_k(self) -> float:
        """Tail shape of the weights; above 0.7 the importance estimates are not reliable."""
        return estimators.pareto_smooth(self.log_weight)[1]

    def expectation(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean of function values ``(n, *event)`` and its standard error, each of shape ``event``.

        Where particles interact, the error comes from the spread of the blocks' contributions.
        """
        mean, error = estimators.expectation(values, self.log_weight)
        if self.replicates == 1:
            return mean, error
        residual = values.double() - mean
        weight = torch.softmax(self.log_weight, 0).reshape(-1, *[1] * (values.ndim - 1))
        block = (weight * residual).reshape(self.replicates, -1, *values.shape[1:]).sum(1)
        scale = self.replicates / (self.replicates - 1)
        return mean, (scale * block.square().sum(0)).sqrt()

    def resample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` equally weighted points by systematic resampling, in random order, shape ``(n, D)``."""
        index = estimators.systematic_resample(self.log_weight, n, generator=generator)
        shuffle = torch.randperm(n, generator=generator, device=index.device)
        return self.x[index[shuffle]]


def disagreement(first: Particles, second: Particles) -> float:
    """Largest z-score by which two results differ in a coordinate's mean, square, or share beyond a quantile.

    The quantiles are the outer 1 and 5 percent of ``second``. A sampler that loses the end of a tail moves neither its
    log normalizer nor its moments by much, but the share beyond the outermost quantile falls to nothing.
    """
    generator = torch.Generator(second.x.device).manual_seed(0)
    drawn = second.resample(len(second), generator=generator).double()
    centre, scale = drawn.mean(0), drawn.std(0).clamp_min(1e-300)
    levels = torch.tensor([0.01, 0.05, 0.95, 0.99], dtype=torch.float64, device=drawn.device)
    edges = torch.quantile((drawn - centre) / scale, levels, dim=0)

    def statistics(x: Tensor) -> Tensor:
        z = (x.double() - centre) / scale
        beyond = [(z < edge).double() for edge in edges[:2]] + [(z > edge).double() for edge in edges[2:]]
        return torch.cat([z, z.square(), *beyond], -1)

    (mine, my_error), (theirs, their_error) = (p.expectation(statistics(p.x)) for p in (first, second))
    # Every share is uncertain by about one draw, also where none fell beyond the quantile.
    floor = 1.0 / min(len(first), len(second))
    return float(((mine - theirs).abs() / (my_error.square() + their_error.square() + floor**2).sqrt()).max())
