r"""Nested Laplace profile along one coordinate: the way into a neck that draws have not entered.

With the coordinate :math:`c = x_i` held fixed, the rest is approximated by a full Gaussian at its conditional mode,

.. math:: \rho(c, x_{-i}) \approx \rho(c, m(c))\, e^{-\frac12 (x_{-i} - m(c))^\top P(c) (x_{-i} - m(c))}, \qquad
    \log \rho(c) \approx \log\rho(c, m(c)) + \tfrac12 \log\det 2\pi P(c)^{-1},

on a grid of :math:`c` that reaches far beyond the draws. It is exact where conditionals are Gaussian: funnels, and
hierarchical models given their scale. The result is a mixture of tilted Gaussians along the grid.

References:
    Approximate Bayesian inference for latent Gaussian models by using integrated nested Laplace approximations
    (Rue, Martino, Chopin, 2009), https://doi.org/10.1111/j.1467-9868.2008.00700.x
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffsampler.pilot.reference import EllipticalMixture
from diffsampler.pilot.transport import TransportMap, TriangularMap
from diffsampler.target import Target

__all__ = ["Profile", "drivers", "laplace_profile", "profile_from_draws", "score_drivers", "weighed_profile"]

# Grid points this far below the best carry no mass worth a component.
DEPTH = 14.0


@dataclass(frozen=True)
class Profile:
    """A profile along coordinate ``index``.

    Arguments:
        index: The coordinate that was held fixed.
        grid: Its values, rising and equally spaced, shape ``(G,)``.
        mode: Conditional modes with the coordinate in place, shape ``(G, D)``.
        tril: Cholesky factors of the conditional covariances of the others, shape ``(G, D - 1, D - 1)``.
        log_mass: Approximate log marginal density of the coordinate, unnormalised, shape ``(G,)``; minus infinity
            where there is no conditional peak.
    """

    index: int
    grid: Tensor
    mode: Tensor
    tril: Tensor
    log_mass: Tensor

    @property
    def step(self) -> float:
        """Distance of neighbours on the grid."""
        return float(self.grid[1] - self.grid[0])

    def alive(self) -> Tensor:
        """Which grid points carry mass worth a component, shape ``(G,)``."""
        return self.log_mass > self.log_mass.max() - DEPTH

    def log_normalizer(self) -> float:
        """Logarithm of the integral of the approximate marginal density."""
        return float(torch.logsumexp(self.log_mass, 0)) + math.log(self.step)

    def part(self, index: slice | Tensor) -> Profile:
        """Some of the grid points."""
        return Profile(self.index, self.grid[index], self.mode[index], self.tril[index], self.log_mass[index])

    def joined(self, other: Profile) -> Profile:
        """These grid points followed by others."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("grid", "mode", "tril", "log_mass"))
        return Profile(self.index, *(torch.cat(pair) for pair in pairs))

    def weights(self) -> Tensor:
        """Probability of each grid point, shape ``(G,)``."""
        return torch.softmax(self.log_mass, 0)

    def tail(self, value: float, *, below: bool) -> float:
        """Probability that the coordinate lies below (or above) a value, each grid point's spread over its cell."""
        step = self.step
        inside = ((value - self.grid) / step + 0.5).clamp(0.0, 1.0)
        return float((self.weights() * (inside if below else 1.0 - inside)).sum())

    def mixture(self, *, df: float = 8.0, inflate: float = 1.1) -> EllipticalMixture:
        """Mixture of Gaussians along the grid, tilted with the slope of the conditional modes."""
        keep, step = self.alive(), self.step
        count, dim = int(keep.sum()), self.mode.shape[1]
        others = [j for j in range(dim) if j != self.index]
        slope = torch.gradient(self.mode, spacing=(step,), dim=0)[0][keep]
        factor = self.mode.new_zeros(count, dim, dim)
        factor[:, :, 0] = 0.75 * step * slope
        factor[:, self.index, 0] = 0.75 * step
        factor[:, others, 1:] = inflate * self.tril[keep]
        # Lower triangular by QR: a Cholesky factorisation would square a ratio of scales of 1e6.
        r = torch.linalg.qr(factor.mT).R.mT
        tril = r * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        return EllipticalMixture(self.mode[keep], tril, self.log_mass[keep], df=df)


def drivers(transport: TransportMap) -> list[int]:
    """At most two coordinates that drive the scale of others in a fitted map, strongest first."""
    if not isinstance(transport, TriangularMap):
        return []
    dim = transport.dim
    strength = transport.log_scale[1 : dim + 1].abs().sum(1) + transport.log_scale[dim + 1 :].abs().sum(1)
    found = [j for j in range(min(dim, 3)) if float(strength[j]) > 0.3]
    return [int(transport.order[j]) for j in found[:2]]


def score_drivers(x: Tensor, score: Tensor, *, least: float = 0.4) -> list[int]:
    r"""At most two coordinates with which the scores of others grow or shrink, strongest first.

    The rank correlation of :math:`x_i` with :math:`|\partial_j \log\rho|`, :math:`j \ne i`, is zero for every Gaussian,
    since :math:`\mathrm{cov}(x, \nabla\log\rho) = -I`, and for whatever is symmetric about its centre; where
    :math:`x_i` sets the scale of others it is large even for a few hundred draws that miss the neck.

    Arguments:
        x: Equally weighted draws, shape ``(n, D)``.
        score: Their scores, shape ``(n, D)``; rows that are not finite are left out.
        least: Smallest absolute correlation.
    """
    keep = torch.isfinite(score).all(-1)
    x, size = x[keep], score[keep].abs()
    if len(x) < 32:
        return []
    a, b = (u.argsort(0).argsort(0).double() - 0.5 * (len(x) - 1) for u in (x, size))
    correlation = (a.mT @ b / a[:, 0].square().sum()).fill_diagonal_(0.0).abs()
    strongest = correlation.amax(1)
    found = correlation.square().sum(1).argsort(descending=True, stable=True).tolist()
    return [i for i in found if float(strongest[i]) > least][:2]


def _curvature(target: Target, x: Tensor, scale: Tensor, others: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Log density ``(G,)``, score ``(G, d)`` and Hessian ``(G, d, d)`` over ``others``, in units of ``scale``."""
    unit = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[others]
    offset = 1e-3 * scale.unsqueeze(-1) * unit
    centre = x.unsqueeze(1)
    points = torch.cat([centre, centre + offset, centre - offset], 1)
    log_prob, score = target.log_prob_and_score(points)
    score = score.to(x.dtype)[..., others]
    d = len(others)
    hessian = (score[:, 1 : d + 1] - score[:, d + 1 :]) / 2e-3 * scale.unsqueeze(-2)
    return log_prob[:, 0].double(), score[:, 0] * scale, 0.5 * (hessian + hessian.mT)


def laplace_profile(
    target: Target, index: int, grid: Tensor, start: Tensor, scale: Tensor, *, steps: int = 20
) -> Profile:
    """Profile on a grid, from starting points, by saddle-free Newton steps at fixed ``x[index]``.

    Arguments:
        target: The density.
        index: Coordinate to hold fixed.
        grid: Its values, shape ``(G,)``.
        start: Starting points, shape ``(G, D)``.
        scale: Guess of the conditional scales of the others, shape ``(G, D - 1)``.
        steps: Newton steps, ``2 D - 1`` evaluations each per grid point.
    """
    others = [j for j in range(target.dim) if j != index]
    x = start.clone()
    x[:, index] = grid
    damping = torch.ones_like(grid).unsqueeze(-1)
    log_prob, score, hessian = _curvature(target, x, scale, others)
    for _ in range(steps):
        good = torch.isfinite(hessian).flatten(1).all(-1) & torch.isfinite(score).all(-1)
        value, vector = torch.linalg.eigh(torch.where(good[:, None, None], -hessian, torch.eye(len(others)).to(x)))
        value = value.abs().clamp_min(1e-10 * value.abs().amax(-1, keepdim=True)).clamp_min(1e-300)
        white = (vector.mT @ torch.where(good.unsqueeze(-1), score, 0.0).unsqueeze(-1)).squeeze(-1)
        move = damping * scale * (vector @ (white / value).unsqueeze(-1)).squeeze(-1)
        trial = x.clone()
        trial[:, others] = x[:, others] + move
        # Units follow the curvature, so that differences stay meaningful in a narrowing neck.
        diagonal = -hessian.diagonal(dim1=-2, dim2=-1)
        unit = torch.where(good.unsqueeze(-1) & (diagonal > 1e-12), scale * diagonal.clamp_min(1e-12).rsqrt(), scale)
        new = _curvature(target, trial, unit, others)
        better = new[0] >= log_prob
        ratio = unit / scale
        kept = (log_prob, score * ratio, ratio.unsqueeze(-1) * hessian * ratio.unsqueeze(-2))
        pick = [better.reshape(-1, *[1] * (a.ndim - 1)) for a in kept]
        log_prob, score, hessian = (torch.where(p, a, b) for p, a, b in zip(pick, new, kept, strict=True))
        x = torch.where(better.unsqueeze(-1), trial, x)
        scale = unit
        damping = torch.where(better.unsqueeze(-1), (2.0 * damping).clamp_max(1.0), 0.25 * damping)
    return _finish(index, grid, x, scale, log_prob, score, hessian)


def _finish(
    index: int, grid: Tensor, x: Tensor, scale: Tensor, log_prob: Tensor, score: Tensor, hessian: Tensor
) -> Profile:
    """Covariances and masses where the search ended at a peak."""
    tril, failed = torch.linalg.cholesky_ex(-hessian)
    d = hessian.shape[-1]
    eye = torch.eye(d, dtype=x.dtype, device=x.device).expand_as(hessian)
    peaked = (failed == 0) & torch.isfinite(log_prob)
    safe = torch.where(peaked[:, None, None], tril, eye)
    # The distance that Newton's method would still go, in conditional standard deviations.
    left = torch.linalg.solve_triangular(safe, score.unsqueeze(-1), upper=False).squeeze(-1)
    peaked = peaked & (left.square().mean(-1) < 0.1)
    inverse = torch.linalg.solve_triangular(safe, eye, upper=False)
    covariance = torch.linalg.cholesky_ex(inverse.mT @ inverse)[0]
    covariance = scale.unsqueeze(-1) * torch.where(peaked[:, None, None], covariance, eye)
    log_det = covariance.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_mass = torch.where(peaked, log_prob + log_det + 0.5 * d * math.log(2.0 * math.pi), -math.inf)
    return Profile(index, grid, x, covariance, log_mass)


def profile_from_draws(target: Target, index: int, x: Tensor, *, size: int = 64, steps: int = 20) -> Profile | None:
    """Profile along a coordinate on a grid that goes as far as the profile itself says there is mass.

    Arguments:
        target: The density.
        index: Coordinate to hold fixed.
        x: Draws, shape ``(n, D)``: where the search for conditional modes starts.
        size: Grid points of the final grid; half of them in the first, wide one.
        steps: Newton steps on each grid.

    Returns:
        The profile, or None where the conditionals have no peaks.
    """
    others = [j for j in range(x.shape[1]) if j != index]
    low, high = torch.quantile(x[:, index], x.new_tensor([0.005, 0.995])).tolist()
    reach = 2.0 * (high - low)
    grid = torch.linspace(low - reach, high + reach, size // 2, dtype=x.dtype, device=x.device)
    wide = laplace_profile(target, index, grid, *_local_moments(x, index, grid, others), steps=steps)
    if int(wide.alive().sum()) < 4:
        return None
    wide = _followed(target, wide, steps=steps, most=size // 2)
    alive, step = wide.grid[wide.alive()], wide.step
    grid = torch.linspace(float(alive.min()) - step, float(alive.max()) + step, size, dtype=x.dtype, device=x.device)
    profile = laplace_profile(target, index, grid, *_between(wide, grid), steps=steps)
    return profile if int(profile.alive().sum()) >= 4 else None


def _followed(target: Target, profile: Profile, *, steps: int, most: int) -> Profile:
    """The profile, continued from its ends while there is mass: modes that bend away are found from their neighbours.

    Draws know nothing beyond the last of them, and Newton's method from there may not reach a curved ridge.
    """
    ends = torch.nonzero(profile.alive()).flatten()[[0, -1]].tolist()
    profile = profile.part(slice(ends[0], ends[1] + 1))
    for side in (-1, 1):
        for _ in range(most):
            order = slice(None, 2) if side < 0 else slice(-2, None)
            near = profile.part(order)
            last, before = (0, 1) if side < 0 else (1, 0)
            start = (2.0 * near.mode[last] - near.mode[before]).unsqueeze(0)
            scale = near.tril[last].square().sum(-1).sqrt().unsqueeze(0)
            grid = near.grid[last : last + 1] + side * profile.step
            new = laplace_profile(target, profile.index, grid, start, scale, steps=steps)
            if not float(new.log_mass) > float(profile.log_mass.max()) - DEPTH:
                break
            profile = new.joined(profile) if side < 0 else profile.joined(new)
    return profile


def _between(profile: Profile, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Modes ``(G, D)``, between those of the two nearest points that have one, and scales ``(G, D - 1)`` on a grid."""
    known = profile.part(torch.isfinite(profile.log_mass))
    right = torch.searchsorted(known.grid, grid.contiguous()).clamp(1, len(known.grid) - 1)
    left = right - 1
    share = ((grid - known.grid[left]) / (known.grid[right] - known.grid[left])).clamp(0.0, 1.0).unsqueeze(-1)
    scale = known.tril.square().sum(-1).sqrt()
    nearest = torch.where(share > 0.5, scale[right], scale[left])
    return (1.0 - share) * known.mode[left] + share * known.mode[right], nearest


def _local_moments(x: Tensor, index: int, grid: Tensor, others: list[int]) -> tuple[Tensor, Tensor]:
    """Means ``(G, D)`` and standard deviations ``(G, D - 1)`` of the nearest 5 % of the draws to each grid value."""
    count = max(8, x.shape[0] // 20)
    nearest = (grid.unsqueeze(-1) - x[:, index]).abs().topk(count, largest=False).indices
    local = x[nearest]
    return local.mean(1), local.std(1)[:, others].clamp_min(1e-12)


def weighed_profile(target: Target, profile: Profile, *, draws: int, generator: torch.Generator | None) -> Profile:
    """The profile with marginal densities by importance sampling instead of Laplace's approximation.

    Estimates are means over ``draws`` points of each conditional Gaussian, without bias where it covers the
    conditional. What it does not cover, as a second branch of a ridge, is left out: they may be too low, hardly ever
    too high.
    """
    peaked = torch.isfinite(profile.log_mass)
    mode, tril = profile.mode[peaked], profile.tril[peaked]
    count, d = tril.shape[:2]
    others = [j for j in range(profile.mode.shape[1]) if j != profile.index]
    u = torch.randn(draws, count, d, dtype=mode.dtype, device=mode.device, generator=generator)
    x = mode.expand(draws, -1, -1).clone()
    x[..., others] += (tril @ u.unsqueeze(-1)).squeeze(-1)
    log_q = -0.5 * u.square().sum(-1) - tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) - 0.5 * d * math.log(2 * math.pi)
    log_weight = torch.nan_to_num(target.log_prob(x).double() - log_q, nan=-math.inf)
    log_mass = torch.full_like(profile.log_mass, -math.inf)
    log_mass[peaked] = (torch.logsumexp(log_weight, 0) - math.log(draws)).to(log_mass)
    return replace(profile, log_mass=log_mass)
