r"""Bridge sampling: the normalizing constant from draws of the target, whoever made them.

With draws :math:`x_i` of :math:`\rho = Z \pi` and :math:`y_j` of a normalized proposal :math:`q`, and
:math:`\ell = \rho / q`, the optimal bridge estimate is the fixed point

.. math:: r = \frac{\frac{1}{n_2} \sum_j \ell(y_j) / (s_1 \ell(y_j) + s_2 r)}
                   {\frac{1}{n_1} \sum_i 1 / (s_1 \ell(x_i) + s_2 r)}, \qquad s_1 = 1 - s_2 = \frac{n_1}{n_1 + n_2},

:math:`n_1` the effective number of draws. It is found as the only root of a monotone function of :math:`\log r`. Its
relative error is

.. math:: \mathrm{re}^2 = \frac{V_q[f_1]}{n_2 E_q[f_1]^2} + \tau \frac{V_\pi[f_2]}{n_1 E_\pi[f_2]^2}, \qquad
          f_1 = \frac{\pi}{s_1 \pi + s_2 q}, \quad f_2 = \frac{q}{s_1 \pi + s_2 q}

with the autocorrelation time :math:`\tau` of :math:`f_2`.

The proposal is fitted to one half of every chain and evaluated on the other, then the halves change places and the two
logarithms are averaged: a proposal that knows the draws it is compared with would make :math:`Z` too large.

When it fails: a mode that the chains never visited is missing here too; a proposal that shares little mass with the
target (long curved tails, many dimensions) gives a large error, which is reported. Cost: one density per draw and per
proposal draw.

References:
    Simulating ratios of normalizing constants via a simple identity (Meng & Wong, 1996), Statistica Sinica 6, 831-860
    Estimating marginal likelihoods for mixture and Markov switching models using bridge sampling techniques
    (Fruehwirth-Schnatter, 2004), https://doi.org/10.1111/j.1368-423X.2004.00125.x
    A tutorial on bridge sampling (Gronau et al., 2017), https://arxiv.org/abs/1703.05984
    Warp bridge sampling: the next generation (Wang, Jones & Meng, 2020), https://arxiv.org/abs/1609.07690 (halves)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, final

import torch
from torch import Tensor

from diffsampler.estimators import Estimate
from diffsampler.evidence import series
from diffsampler.particles import Particles

__all__ = ["Density", "GaussianProposal", "Root", "bridge", "solve"]

DISAGREEMENT = 1.05
"""Split R-hat of a coordinate or of the log density above which chains are said to disagree."""


class Density(Protocol):
    """A normalized density that can be drawn from, such as a :class:`~diffsampler.target.Target` with a sampler."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Normalized log density ``(n, D) -> (n,)``."""
        ...

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``(n, D)``."""
        ...


@final
class GaussianProposal:
    r"""The Gaussian with the mean and covariance of given draws, shrunk towards the diagonal where draws are few.

    .. math:: \Sigma = \frac{n S + D\, \mathrm{diag}(S)}{n + D}

    Arguments:
        x: Draws, shape ``(n, D)``.

    Raises:
        ValueError: If the draws do not span all coordinates.
    """

    def __init__(self, x: Tensor) -> None:
        n, dim = x.shape
        x = x.double()
        self.mean = x.mean(0)
        # Factorized in units of the coordinates' own spread: scales may differ by any factor.
        self.scale = x.std(0)
        z = (x - self.mean) / torch.where(self.scale > 0.0, self.scale, torch.ones_like(self.scale))
        correlation = z.mT @ z / (n - 1)
        shrunk = (n * correlation + dim * torch.diag(correlation.diagonal())) / (n + dim)
        flat = n > dim and float(torch.linalg.eigvalsh(correlation)[0]) < 1e-13 * dim
        self.factor, failed = torch.linalg.cholesky_ex(shrunk)
        if flat or int(failed) or not bool((self.scale > 0.0).all()):
            raise ValueError(
                f"Expected draws that span all {dim} coordinates; got a singular covariance. "
                "Pass a proposal that lives where the draws do."
            )

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density ``(n, D) -> (n,)``, float64."""
        z = ((x.double() - self.mean) / self.scale).unsqueeze(-1)
        white = torch.linalg.solve_triangular(self.factor, z, upper=False).squeeze(-1)
        log_det = self.factor.diagonal().log().sum() + self.scale.log().sum()
        return -0.5 * (white.square().sum(-1) + x.shape[-1] * math.log(2.0 * math.pi)) - log_det

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``(n, D)``, float64."""
        like = self.mean
        noise = torch.randn(n, like.shape[0], generator=generator, dtype=like.dtype, device=like.device)
        return like + self.scale * (noise @ self.factor.mT)


class Root(NamedTuple):
    """The solution of the bridge equation, with what its error is made of."""

    log_ratio: float
    """:math:`\\log r`."""
    proposal: Tensor
    """:math:`f_1 / E_q[f_1]` at the proposal's draws, ``(n2,)``."""
    target: Tensor
    """:math:`f_2 / E_\\pi[f_2]` at the target's draws, ``(n1,)``."""


def solve(target: Tensor, proposal: Tensor, *, share: float) -> Root:
    r"""Solve the bridge equation for :math:`\log r`.

    With :math:`u = \ell + \log(s_1 / s_2) - \log r` it reads
    :math:`\overline{\sigma(u)}_q / s_1 = \overline{\sigma(-u)}_\pi / s_2`; the left side falls in :math:`\log r` and
    the right side rises.

    Arguments:
        target: :math:`\log (\rho / q)` at draws of the target, ``(n1,)``; ``-inf`` where the target has no mass.
        proposal: The same at draws of the proposal, ``(n2,)``.
        share: :math:`s_1`.

    Raises:
        ValueError: If the target is zero at every draw of the proposal.
    """
    offset = math.log(share / (1.0 - share))
    finite = torch.cat([target[target.isfinite()], proposal[proposal.isfinite()]])
    if not bool(proposal.isfinite().any()) or not bool(target.isfinite().any()):
        raise ValueError("Expected target and proposal to share mass; got a density ratio that is zero at all draws.")

    def sides(log_r: float) -> tuple[Tensor, Tensor]:
        log_left = torch.nn.functional.logsigmoid(proposal + offset - log_r)
        log_right = torch.nn.functional.logsigmoid(-(target + offset - log_r))
        return log_left, log_right

    def excess(log_r: float) -> float:
        log_left, log_right = sides(log_r)
        left = torch.logsumexp(log_left, 0) - math.log(proposal.numel()) - math.log(share)
        right = torch.logsumexp(log_right, 0) - math.log(target.numel()) - math.log(1.0 - share)
        return float(left - right)

    # The ratio of the means lies between the extremes of the ratio of densities, up to the weight of one draw.
    slack = abs(offset) + math.log(proposal.numel()) + math.log(target.numel()) + 1.0
    low, high = float(finite.min()) - slack, float(finite.max()) + slack
    while high - low > 1e-12 * max(1.0, abs(low), abs(high)):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if excess(middle) > 0.0 else (low, middle)
    log_left, log_right = sides(0.5 * (low + high))
    return Root(0.5 * (low + high), *(torch.softmax(side, 0) * side.numel() for side in (log_left, log_right)))


def bridge(
    samples: Tensor | Particles,
    log_prob: Callable[[Tensor], Tensor],
    *,
    proposal: Density | None = None,
    fit: Callable[[Tensor], Density] = GaussianProposal,
    num_proposals: int | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""Estimate :math:`\log Z` of a density from draws of it.

    The standard error covers the draws' autocorrelation, the spread between chains and the proposal's own draws. Chains
    that disagree (split R-hat of a coordinate or of the log density above 1.05) give the kind ``"bridge, chains
    disagree"``: the value and the error are what the draws say, but no error bar of unconverged chains can be trusted.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(4, 500, 2, generator=generator, dtype=torch.float64)
        >>> estimate = bridge(x, lambda x: -0.5 * x.square().sum(-1), generator=generator)
        >>> abs(estimate.value - math.log(2.0 * math.pi)) < 5.0 * estimate.std_error + 1e-9
        True

    Arguments:
        samples: Equally weighted draws in the coordinates of ``log_prob``, in the order they were made: ``(chains,
            draws, D)``, or ``(draws, D)`` for one chain, or the particles of a chain sampler (``fit.particles``).
        log_prob: Unnormalized log density ``(n, D) -> (n,)``; Jacobians of constrained parameters included.
        proposal: Normalized density to compare with, fixed in advance. By default one is fitted to each half.
        fit: How to fit it: draws ``(n, D)`` to a :class:`Density`. Separated modes call for a mixture.
        num_proposals: Draws of the proposal for each half; as many as draws of the target by default.
        generator: Source of the proposal's draws; seeded with 0 by default.

    Raises:
        TypeError: If ``samples`` is not a floating-point tensor.
        ValueError: If shapes or values cannot be used, or the weighted particles of another sampler are given.
    """
    x = series.as_chains("samples", _draws(samples), event=1)
    chains, draws, dim = x.shape
    half = draws // 2
    if num_proposals is not None and num_proposals < 2:
        raise ValueError(f"Expected num_proposals to be at least 2; got {num_proposals}.")
    generator = torch.Generator(x.device).manual_seed(0) if generator is None else generator
    log_target = _evaluate("log_prob", log_prob, x.reshape(-1, dim)).reshape(chains, draws)
    if not bool(log_target.isfinite().all()):
        raise ValueError("Expected draws at which log_prob is finite; is it the density that they were drawn from?")
    first, second = slice(0, half), slice(half, draws)
    size = num_proposals or chains * half
    roots, values, spread = [], [], 0.0
    for fitted, held in ((second, first), (first, second)):
        density = fit(x[:, fitted].reshape(-1, dim)) if proposal is None else proposal
        ell = log_target[:, held] - _evaluate("proposal", density.log_prob, x[:, held].reshape(-1, dim)).reshape(
            chains, -1
        )
        y = density.sample(size, generator=generator).to(x)
        other = _evaluate("log_prob", log_prob, y) - _evaluate("proposal", density.log_prob, y)
        effective = float(series.effective_size(torch.sigmoid(ell - ell.median())))
        root = solve(ell.flatten(), other, share=effective / (effective + size))
        roots.append(root.log_ratio)
        values.append(root.target.reshape(chains, -1))
        spread += float(root.proposal.var()) / size / 4.0
    # Both halves at once: the average's error is that of the whole chain's influence, dependence of halves included.
    variance = float(series.variance_of_mean(torch.cat(values, -1))) + spread
    checked = torch.cat([x, log_target.unsqueeze(-1)], -1).movedim(-1, 0)
    agree = float(series.split_r_hat(checked).max()) < DISAGREEMENT
    return Estimate(0.5 * sum(roots), math.sqrt(variance), "bridge" if agree else "bridge, chains disagree")


def _draws(samples: Tensor | Particles) -> Tensor:
    if not isinstance(samples, Particles):
        return samples
    if samples.has_normalizer:
        raise ValueError("Expected draws of equal weight; these particles' weights estimate Z: see log_normalizer.")
    return samples.x.reshape(samples.replicates, -1, samples.x.shape[-1])


def _evaluate(name: str, log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Log density at ``(n, D)`` in float64; zero density is a value, NaN and infinity are errors."""
    with torch.no_grad():
        value = log_prob(x)
    if value.shape != x.shape[:1]:
        raise ValueError(f"Expected {name} to return shape {tuple(x.shape[:1])}; got {tuple(value.shape)}.")
    if bool((value.isnan() | value.isposinf()).any()):
        bad = x[value.isnan() | value.isposinf()][0]
        raise ValueError(f"Expected {name} below infinity; got {float(log_prob(bad[None])[0])} at {bad.tolist()}.")
    return value.detach().double()
