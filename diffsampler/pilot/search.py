r"""Scale-free variational search: where the mass of a density lies, and at what scale.

Many mean-field Gaussians :math:`q = N(m, \mathrm{diag}\, s^2)` maximise :math:`\mathrm{ELBO}(m, s) = E_q[\log\rho -
\log q]` by natural-gradient steps that are relative to their own scale and limited in size. With
:math:`x = m + s \epsilon` and :math:`g = \nabla\log\rho(x)`,

.. math::
    m \leftarrow m + \eta\, s\, \mathrm{clip}(\overline{s g}, \pm 1), \qquad
    \log s \leftarrow \log s + \tfrac{\eta}{2}\, \mathrm{clip}(1 + \overline{s g \epsilon}, -4, 1).

A step moves by at most one own scale and changes the scale by at most :math:`e^{2\eta}`, so the search needs no
unit: scales from 1e-3 to 1e4 and means at 1e5 are reached in some tens of steps. The entropy term keeps the fits out
of spikes and funnel necks into which plain ascent dives.

References:
    Stochastic variational inference (Hoffman, Blei, Wang, Paisley, 2013), https://arxiv.org/abs/1206.7051
    Advances in variational inference (Zhang, Butepage, Kjellstrom, Mandt, 2018), https://arxiv.org/abs/1711.05597
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsampler.pilot.ascent import curved_ascent
from diffsampler.target import Target

__all__ = ["MeanFieldFits", "climb", "fit_mean_field", "multistart", "spread_over"]


# Depth of a hard wall in nats, as the variational search feels it.
WALL = 6.0
RECENTRINGS = 3


@dataclass(frozen=True)
class MeanFieldFits:
    """Mean-field Gaussians fitted to a target.

    Arguments:
        location: Means, shape ``(K, D)``.
        scale: Standard deviations, shape ``(K, D)``.
        elbo: Evidence lower bounds, shape ``(K,)``; minus infinity where the fit met no finite density.
    """

    location: Tensor
    scale: Tensor
    elbo: Tensor

    def __len__(self) -> int:
        return self.elbo.shape[0]

    def subset(self, index: Tensor) -> MeanFieldFits:
        """The fits of an index or boolean mask."""
        return MeanFieldFits(self.location[index], self.scale[index], self.elbo[index])

    def good(self) -> MeanFieldFits:
        r"""Fits within :math:`12 + 2\sqrt D` nats of the best: a looser rule keeps unconverged fits in high dimension.

        Raises:
            ValueError: If no fit met a finite density.
        """
        self._check_any()
        gap = 12.0 + 2.0 * math.sqrt(self.location.shape[-1])
        return self.subset(self.elbo >= self.elbo.max() - gap)

    def _check_any(self) -> None:
        if not bool(torch.isfinite(self.elbo).any()):
            raise ValueError(
                "Expected a density that is finite near some starting point; got none. Shift or rescale it."
            )

    def distinct(self, *, limit: int = 64, tolerance: float = 0.5) -> MeanFieldFits:
        """At most ``limit`` fits, best first, no two within ``tolerance`` scales (root mean square) of each other.

        Raises:
            ValueError: If no fit met a finite density.
        """
        self._check_any()
        order = self.elbo.argsort(descending=True)
        location, log_scale = self.location[order], self.scale[order].log()
        alive = torch.ones_like(order, dtype=torch.bool)
        chosen: list[int] = []
        for i in range(order.shape[0]):
            if not bool(alive[i]) or len(chosen) == limit:
                continue
            chosen.append(i)
            ratio = log_scale - log_scale[i]
            # The narrower of two scales counts: a wide fit does not stand for a narrow one at the same place.
            shift = (location - location[i]) / torch.minimum(log_scale, log_scale[i]).exp()
            alive &= (shift.square() + 4.0 * ratio.square()).mean(-1) > tolerance**2
        return self.subset(order[torch.tensor(chosen, device=order.device)])

    def pooled(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``(D,)`` of the equally weighted mixture of the fits."""
        mean = self.location.mean(0)
        variance = (self.scale.square() + (self.location - mean).square()).mean(0)
        return mean, variance.sqrt()

    def merged(self, other: MeanFieldFits) -> MeanFieldFits:
        """Both sets of fits."""
        return MeanFieldFits(
            torch.cat([self.location, other.location]),
            torch.cat([self.scale, other.scale]),
            torch.cat([self.elbo, other.elbo]),
        )


def fit_mean_field(
    target: Target,
    location: Tensor,
    scale: Tensor,
    *,
    steps: int = 250,
    draws: int = 6,
    rate: float = 0.8,
    anchored: bool = False,
    generator: torch.Generator | None = None,
) -> MeanFieldFits:
    """Fit mean-field Gaussians from the given starts, all at once.

    Arguments:
        target: The density.
        location: Starting means, shape ``(K, D)``, float64.
        scale: Starting standard deviations, shape ``(K, D)``.
        steps: Natural-gradient steps; the rate is flat for 60 % of them and then falls linearly to 0.02.
        draws: Antithetic draws per step, even.
        rate: Step length of the flat part.
        anchored: Fit the scales only and leave the means where they are.
        generator: Source of randomness.
    """
    if draws < 2 or draws % 2:
        raise ValueError(f"Expected an even number of antithetic draws; got {draws}.")
    m, log_s = location.clone(), scale.log()
    half = (m.shape[0], draws // 2, m.shape[1])
    for step in range(steps):
        eta = rate + (0.02 - rate) * max(0.0, (step / steps - 0.6) / 0.4)
        eps = torch.randn(half, generator=generator, dtype=m.dtype, device=m.device)
        eps = torch.cat([eps, -eps], 1)
        s = log_s.exp()
        log_prob, score = target.log_prob_and_score(m.unsqueeze(1) + s.unsqueeze(1) * eps)
        sg = s.unsqueeze(1) * score.to(m.dtype)
        finite = (torch.isfinite(sg).all(-1) & torch.isfinite(log_prob)).unsqueeze(-1)
        pull = torch.where(finite, sg, 0.0).mean(1)
        curvature = torch.where(finite, sg * eps, 0.0).mean(1)
        if not bool(finite.all()):
            # The gradient of the bound for a density that is WALL nats lower outside the support.
            pull = pull - WALL * torch.where(finite, 0.0, eps).mean(1)
            curvature = curvature - WALL * torch.where(finite, 0.0, eps.square() - 1.0).mean(1)
            curvature = torch.where(finite.any(1), curvature, -2.0)
        moved = m if anchored else m + eta * s * pull.clamp(-1.0, 1.0)
        if not anchored and not bool(finite.all()):
            moved = _kept_inside(target, m, moved, m.unsqueeze(1) + s.unsqueeze(1) * eps, finite.squeeze(-1))
        m = moved
        # The curvature is skewed: a tight lower limit would bias scales upwards, without end on heavy tails.
        log_s = log_s + 0.5 * eta * (1.0 + curvature).clamp(-4.0, 1.0)
    return MeanFieldFits(m, log_s.exp(), _elbo(target, m, log_s, generator=generator))


def _kept_inside(target: Target, m: Tensor, moved: Tensor, draws: Tensor, finite: Tensor) -> Tensor:
    """Means that do not leave the support: the moved one, else the old one, else a draw that is inside."""
    with torch.no_grad():
        good = [torch.isfinite(target.log_prob(x)).unsqueeze(-1) for x in (moved, m)]
    first = draws[torch.arange(m.shape[0]), finite.to(torch.int8).argmax(1)]
    rescued = torch.where(finite.any(1, keepdim=True), first, m)
    return torch.where(good[0], moved, torch.where(good[1], m, rescued))


def _elbo(target: Target, m: Tensor, log_s: Tensor, *, generator: torch.Generator | None) -> Tensor:
    eps = torch.randn((m.shape[0], 16, m.shape[1]), generator=generator, dtype=m.dtype, device=m.device)
    eps = torch.cat([eps, -eps], 1)
    with torch.no_grad():
        log_prob = target.log_prob(m.unsqueeze(1) + log_s.exp().unsqueeze(1) * eps).double()
    log_q = -0.5 * eps.square().sum(-1) - log_s.sum(-1).unsqueeze(-1) - 0.5 * m.shape[1] * math.log(2.0 * math.pi)
    inside = torch.isfinite(log_prob)
    fraction = inside.double().mean(1)
    # The bound of q truncated to the support; it needs some mass there to mean anything.
    value = torch.where(inside, log_prob - log_q, 0.0).sum(1) / inside.sum(1).clamp_min(1) + fraction.log()
    return torch.where(fraction >= 0.25, value, -math.inf)


def multistart(
    target: Target,
    *,
    num_starts: int = 80,
    rounds: int = 3,
    steps: int = 250,
    scales: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0, 1000.0),
    generator: torch.Generator | None = None,
) -> MeanFieldFits:
    """Mean-field fits from starts at many scales; later rounds restart in 1, 2 and 4 times the spread of the good ones.

    Where the best fit is still on its way (the density is many of its own scales away from the origin), an ascent along
    ridges leads to a better centre for the starts.

    Returns:
        The good and distinct fits of all rounds, continued until they have settled; take ``.good().distinct()``.
    """

    def around(centre: Tensor) -> MeanFieldFits:
        return _rounds(
            target, centre, num_starts=num_starts, rounds=rounds, steps=steps, scales=scales, generator=generator
        )

    fits = around(torch.zeros(target.dim, dtype=torch.float64))
    for _ in range(RECENTRINGS):
        centre = _better_centre(target, fits, steps=steps, max_evaluations=20 * num_starts * steps, generator=generator)
        if centre is None:
            break
        # Fits that are as good stay: together they may know of more.
        fits = fits.merged(around(centre))
    return fits


def _better_centre(
    target: Target, fits: MeanFieldFits, *, steps: int, max_evaluations: float, generator: torch.Generator | None
) -> Tensor | None:
    """Where an ascent from the best fit leads, ``(D,)``, if it is far from all fits and its own has a higher bound.

    In a spike or a neck it has not, however high the density.
    """
    best = fits.good().distinct(limit=1)
    # A fit that was thrown far out may be beyond the reach of an ascent where the origin is not.
    starts = [(best.location[0], best.scale[0]), (torch.zeros_like(best.location[0]), torch.ones_like(best.scale[0]))]
    ends = [curved_ascent(target, x, scale, max_evaluations=max_evaluations) for x, scale in starts]
    location, scale = (torch.stack(parts) for parts in zip(*ends, strict=True))
    usable = (torch.isfinite(location) & torch.isfinite(scale) & (scale > 0)).all(-1)
    if not bool(usable.any()):
        return None
    fit = fit_mean_field(target, location[usable], scale[usable], steps=steps // 2, generator=generator)
    fit = fit.subset(fit.elbo.argmax().reshape(1))
    mean, spread = fits.good().pooled()
    elsewhere = bool(((fit.location[0] - mean).abs() > 4.0 * spread).any())
    return fit.location[0] if elsewhere and float(fit.elbo) > float(best.elbo) + 3.0 else None


def _rounds(
    target: Target,
    centre: Tensor,
    *,
    num_starts: int,
    rounds: int,
    steps: int,
    scales: tuple[float, ...],
    generator: torch.Generator | None,
) -> MeanFieldFits:
    dim = target.dim
    like = torch.zeros((), dtype=torch.float64)
    draw = torch.randn((num_starts, dim), generator=generator, dtype=like.dtype)
    size = torch.tensor(scales, dtype=like.dtype).repeat(-(-num_starts // len(scales)))[:num_starts, None]
    fits = fit_mean_field(target, centre + size * draw, size.expand(-1, dim), steps=steps, generator=generator)
    for _ in range(rounds - 1):
        mean, spread = fits.good().pooled()
        draw = torch.randn((num_starts, dim), generator=generator, dtype=like.dtype)
        factor = torch.tensor([1.0, 2.0, 4.0], dtype=like.dtype).repeat(-(-num_starts // 3))[:num_starts, None]
        typical = fits.good().scale.log().median(0).values.exp()
        start = mean + factor * spread * draw
        fits = fits.merged(fit_mean_field(target, start, factor * typical, steps=steps // 2, generator=generator))
    # Fits that are still on their way from a far too wide start can pass for good ones: let them arrive.
    good = fits.good().distinct()
    return fit_mean_field(target, good.location, good.scale, steps=steps // 2, generator=generator)


def climb(target: Target, x: Tensor, step: Tensor, *, steps: int = 60) -> tuple[Tensor, Tensor]:
    """Ascend the density by resilient propagation, a step length per coordinate, all points at once.

    Steps grow by 1.5 while the sign of the gradient holds and shrink by 0.4 when it turns.

    Arguments:
        target: The density.
        x: Starting points, shape ``(n, D)``.
        step: First step length per coordinate, broadcasting against ``(n, D)``.
        steps: Number of steps, each one evaluation per point.

    Returns:
        The end points ``(n, D)`` and the last step lengths ``(n, D)``.

    References:
        A direct adaptive method for faster backpropagation learning: the RPROP algorithm (Riedmiller, Braun, 1993),
        https://doi.org/10.1109/ICNN.1993.298623
    """
    step = step.expand_as(x).clone()
    previous = torch.zeros_like(x)
    for _ in range(steps):
        sign = target.log_prob_and_score(x)[1].to(x.dtype).sign()
        sign = torch.where(torch.isfinite(sign), sign, -previous)
        turn = sign * previous
        step = torch.where(turn > 0, 1.5 * step, torch.where(turn < 0, 0.4 * step, step))
        x = x + sign * step
        previous = sign
    return x, step


def spread_over(
    target: Target, fits: MeanFieldFits, *, num_starts: int = 24, generator: torch.Generator | None = None
) -> MeanFieldFits:
    """Local fits along the ways of ascents: they spread over ridges and necks that full fits leave empty.

    Ascents start in the box of the fits and are looked at after 6, 12, 24 and 48 steps; at each point one fit finds
    the local scales only, and one moves for a few steps.
    """
    mean, spread = fits.pooled()
    low = (fits.location - 1.5 * fits.scale).amin(0)
    high = (fits.location + 1.5 * fits.scale).amax(0)
    uniform = torch.rand((num_starts, target.dim), generator=generator, dtype=mean.dtype, device=mean.device)
    x, step = low + (high - low) * uniform, 0.1 * (high - low)
    stops, scales = [], []
    for steps in (6, 6, 12, 24):
        x, step = climb(target, x, step, steps=steps)
        stops.append(x)
        # The steps of an ascent that has come to rest are far below the local scale.
        scales.append(torch.maximum(torch.minimum(step, 0.5 * spread), 1e-3 * spread))
    points, scale = torch.cat(stops), torch.cat(scales)
    kept = fit_mean_field(target, points, scale, steps=40, anchored=True, generator=generator)
    return kept.merged(fit_mean_field(target, points[::2], scale[::2], steps=40, generator=generator))
