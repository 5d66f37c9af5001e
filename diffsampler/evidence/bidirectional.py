r"""Bounds of the normalizing constant from paths run in both directions.

For any pair of path laws with weight :math:`\log w` (formula (W)), forward paths :math:`F` started from the tractable
end and backward paths :math:`B` started from exact draws of the target,

.. math:: E_F[w] = Z, \quad E_B[1 / w] = 1 / Z, \qquad E_F[\log w] \le \log Z \le E_B[\log w].

The gap of the two bounds is the sum of both Kullback-Leibler divergences: a certificate, up to Monte Carlo error, that
needs no reference value. Both sets of weights together give the optimal (Bennett) estimate of :math:`\log Z`.

The upper bound holds for **exact** draws of the target only: on synthetic data, from a model whose parameters were
drawn from the prior first; with draws of a Markov chain that missed a mode it can fall below the truth.

References:
    Sandwiching the marginal likelihood using bidirectional Monte Carlo (Grosse, Ghahramani & Adams, 2015),
    https://arxiv.org/abs/1511.02543
    Efficient estimation of free energy differences from Monte Carlo data (Bennett, 1976),
    https://doi.org/10.1016/0021-9991(76)90078-4
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffsampler import estimators
from diffsampler.annealing import anneal
from diffsampler.estimators import Estimate
from diffsampler.evidence.bridge import solve
from diffsampler.kernel import Kernel, KernelParams
from diffsampler.tempering import TemperedPath

__all__ = ["Sandwich", "annealed_bounds", "sandwich"]


class Sandwich(NamedTuple):
    """Both bounds and the best estimate between them."""

    lower: Estimate
    """Mean forward log weight, at most ``log Z``."""
    upper: Estimate
    """Mean backward log weight, at least ``log Z`` for exact draws of the target."""
    estimate: Estimate
    """Bennett's estimate of ``log Z`` from both directions."""

    @property
    def gap(self) -> float:
        """Upper minus lower bound, the sum of both Kullback-Leibler divergences between the path laws."""
        return self.upper.value - self.lower.value


def sandwich(forward_log_weight: Tensor, backward_log_weight: Tensor) -> Sandwich:
    """Bounds and Bennett estimate from log weights of independent paths.

    Works for everything that has weights in both directions: annealed importance sampling, learned diffusions
    (``sampler.backward_log_weight``), stochastic normalizing flows.

    Arguments:
        forward_log_weight: ``log w`` of forward paths ``(n,)``; ``-inf`` is allowed.
        backward_log_weight: ``log w`` of backward paths from exact draws of the target, ``(m,)``, in the same (forward)
            convention.

    Raises:
        ValueError: If one of them has fewer than two values, or holds NaN, or a backward weight is zero.
    """
    forward, backward = forward_log_weight.detach().double(), backward_log_weight.detach().double()
    if forward.ndim != 1 or backward.ndim != 1 or min(forward.numel(), backward.numel()) < 2:
        raise ValueError(
            "Expected forward and backward log weights of shape (n,) and (m,), at least two each; "
            f"got {tuple(forward.shape)} and {tuple(backward.shape)}."
        )
    if bool((forward.isnan() | forward.isposinf()).any()) or not bool(backward.isfinite().all()):
        raise ValueError("Expected forward log weights below infinity and finite backward ones; got others.")
    root = solve(backward, forward, share=backward.numel() / (backward.numel() + forward.numel()))
    variance = root.proposal.var() / forward.numel() + root.target.var() / backward.numel()
    best = Estimate(root.log_ratio, math.sqrt(float(variance)), "bennett")
    return Sandwich(estimators.elbo(forward), estimators.eubo(backward), best)


def annealed_bounds(
    path: TemperedPath,
    samples: Tensor,
    *,
    betas: Sequence[float],
    kernel: Kernel,
    params: KernelParams | Sequence[KernelParams],
    generator: torch.Generator,
    num_moves: int | Sequence[int] = 1,
) -> Sandwich:
    """Annealed importance sampling forward from the reference and backward from exact draws.

    Arguments:
        path: Reference and target.
        samples: Independent exact draws of the target, ``(n, D)``; as many forward paths are run.
        betas: Temperatures after 0, increasing to 1.
        kernel: Transition at each temperature.
        params: Its step size and metric, one or one per temperature, frozen.
        generator: Source of randomness.
        num_moves: Kernel steps at each temperature.

    Raises:
        ValueError: If the schedule or the draws cannot be used.
    """
    if samples.ndim != 2 or samples.shape[0] < 2 or samples.shape[1] != path.space.dim:
        raise ValueError(f"Expected at least two samples of shape (n, {path.space.dim}); got {tuple(samples.shape)}.")
    start = path.reference.sample(samples.shape[0], generator=generator).to(samples)
    forward = anneal(path, betas, kernel, params, start, generator, num_moves=num_moves)
    backward = anneal(path, betas, kernel, params, samples, generator, reverse=True, num_moves=num_moves)
    return sandwich(forward.log_weight, backward.log_weight)
