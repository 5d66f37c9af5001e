r"""Mode search with a stated budget, and what it cannot exclude.

Starts are spread over a box and beyond; each either climbs to its mode, or is *explained* by the modes known so far:
where the score at the start agrees with the score of the mixture of local Gaussian approximations

.. math:: q(x) = \sum_k v_k\, N(x; c_k, (-H_k)^{-1}), \qquad v_k \propto \rho(c_k)\,|{-H_k}|^{-1/2},

the start lies in a known basin and has cost one evaluation instead of a climb. The Good-Turing estimate :math:`f_1/n`
(:math:`f_1` modes hit by exactly one start) estimates the chance that one more start would end in a new mode.

References:
    The population frequencies of species and the estimation of population parameters (Good, 1953),
    https://doi.org/10.1093/biomet/40.3-4.237
    Stochastic global optimization methods: multi-level single linkage (Rinnooy Kan & Timmer, 1987),
    https://doi.org/10.1007/BF02592071
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsampler.pilot.reference import EllipticalMixture
from diffsampler.pilot.search import MeanFieldFits, climb
from diffsampler.target import Target

__all__ = ["ModeSet", "SearchReport", "laplace", "search_modes"]

MAX_MODES = 128
# Relative disagreement of scores above which a start is worth a climb.
NOVELTY = 0.1


@dataclass(frozen=True)
class ModeSet:
    """Modes with local Gaussian approximations.

    Arguments:
        centre: Positions, shape ``(M, D)``.
        tril: Cholesky factors of the local covariances, shape ``(M, D, D)``.
        log_prob: Log density at the centres, shape ``(M,)``.
        peaked: Whether the density curves downwards in all directions there, boolean ``(M,)``.
        hits: Number of starts that ended at each, int64 ``(M,)``.
    """

    centre: Tensor
    tril: Tensor
    log_prob: Tensor
    peaked: Tensor
    hits: Tensor

    def __len__(self) -> int:
        return self.centre.shape[0]

    def subset(self, mask: Tensor) -> ModeSet:
        """The modes of a mask or index."""
        return ModeSet(self.centre[mask], self.tril[mask], self.log_prob[mask], self.peaked[mask], self.hits[mask])

    def singletons(self) -> int:
        """Peaks with at least a thousandth of the largest mass that exactly one start found."""
        mass = self.log_mass()
        if not bool(self.peaked.any()):
            return 0
        counts = self.peaked & (mass > mass[self.peaked].max() - 7.0)
        return int((counts & (self.hits == 1)).sum())

    def log_mass(self) -> Tensor:
        """Laplace approximation of the log mass of each mode, shape ``(M,)``."""
        log_det = self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.log_prob + log_det + 0.5 * self.centre.shape[1] * math.log(2.0 * math.pi)

    def mixture(self, *, df: float = math.inf, inflate: float = 1.0, mix: float = 0.0) -> EllipticalMixture:
        """The Laplace mixture; weights ``(1 - mix) * Laplace + mix * equal``."""
        weight = (1.0 - mix) * torch.softmax(self.log_mass(), 0) + mix / len(self)
        return EllipticalMixture(self.centre, inflate * self.tril, weight.log(), df=df)


@dataclass(frozen=True)
class SearchReport:
    """What the search did, in numbers.

    Arguments:
        starts: Number of starting points whose mode is known.
        evaluations: Score evaluations spent.
        singletons: Modes that exactly one start found.
        missing_rate: Good-Turing estimate of the chance that another start finds a new mode.
        continuum: Whether end points do not repeat (ridges, necks, or more modes than can be listed).
        stopped: Why it ended: "one mode", "continuum", "complete" or "budget".
    """

    starts: int
    evaluations: int
    singletons: int
    missing_rate: float
    continuum: bool
    stopped: str

    def not_excluded(self) -> str:
        """What the search cannot rule out, one sentence."""
        if self.continuum:
            return "There are ridges or too many modes to list; separate modes that no start reached are not excluded."
        share = 3.0 / max(self.starts, 1)
        return f"Modes whose basin of attraction is below {share:.1g} of the searched box are not excluded."


def laplace(target: Target, centre: Tensor, scale: Tensor, *, refine: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Local Gaussian approximations at ``centre (M, D)`` from differences of scores.

    Arguments:
        target: The density.
        centre: Points, shape ``(M, D)``.
        scale: Guess of the local scale, ``(M, D)``; refined from the curvature.
        refine: Number of passes, each ``2 D`` evaluations per centre.

    Returns:
        Cholesky factors ``(M, D, D)`` of the covariances, log densities ``(M,)``, and where the density is peaked.
    """
    dim = target.dim
    eye = torch.eye(dim, dtype=centre.dtype, device=centre.device)
    with torch.no_grad():
        log_prob = target.log_prob(centre).double()
    hessian, score = -eye.expand(centre.shape[0], dim, dim), torch.zeros_like(centre).unsqueeze(1)
    for _ in range(refine):
        step = 1e-3 * scale
        offset = step.unsqueeze(1) * eye
        points = torch.cat([centre.unsqueeze(1) + offset, centre.unsqueeze(1) - offset], 1)
        score = target.log_prob_and_score(points)[1].to(centre.dtype)
        slope = (score[:, :dim] - score[:, dim:]) / (2.0 * step.unsqueeze(-1))
        hessian = scale.unsqueeze(-1) * slope * scale.unsqueeze(-2)
        hessian = 0.5 * (hessian + hessian.mT)
        diagonal = -hessian.diagonal(dim1=-2, dim2=-1)
        usable = torch.isfinite(diagonal) & (diagonal > 1e-8)
        new = torch.where(usable, scale * diagonal.clamp_min(1e-8).rsqrt(), scale)
        ratio = new / scale
        scale, hessian = new, ratio.unsqueeze(-1) * hessian * ratio.unsqueeze(-2)
    finite = torch.isfinite(hessian).all(-1).all(-1)
    hessian = torch.where(finite[:, None, None], hessian, -eye)
    value, vector = torch.linalg.eigh(-hessian)
    # Newton's step in standard deviations: points on a ridge that are still moving are no peaks.
    gradient = scale * score.mean(1)
    left = (vector.mT @ gradient.unsqueeze(-1)).squeeze(-1) / value.abs().clamp_min(1e-300).sqrt()
    settled = left.square().mean(-1) < 0.1
    peaked = finite & settled & torch.isfinite(log_prob) & (value[:, 0] > 1e-6 * value[:, -1])
    # A flat or rising direction gets the scale that was guessed, so that the covariance exists.
    value = torch.where(value > 1e-6 * value[:, -1:], value, value.clamp_min(1e-12).abs().clamp_min(1.0))
    cov = (vector / value.unsqueeze(-2)) @ vector.mT
    return scale.unsqueeze(-1) * torch.linalg.cholesky(0.5 * (cov + cov.mT)), log_prob, peaked


def _distance(x: Tensor, centre: Tensor, tril: Tensor) -> Tensor:
    """Root mean square Mahalanobis distance of points ``(n, D)`` to modes, shape ``(n, M)``."""
    u = torch.linalg.solve_triangular(tril, (x.unsqueeze(0) - centre.unsqueeze(1)).mT, upper=False)
    return u.square().mean(1).sqrt().mT


class _Search:
    """The list of modes as it grows. ``local`` is a guess of the scale of a mode, ``(D,)``."""

    def __init__(self, target: Target, local: Tensor) -> None:
        self.target = target
        self.local = local
        dim = target.dim
        self.modes = ModeSet(
            local.new_zeros(0, dim),
            local.new_zeros(0, dim, dim),
            local.new_zeros(0),
            torch.zeros(0, dtype=torch.bool),
            torch.zeros(0, dtype=torch.long),
        )
        self.evaluations = 0
        self.unplaced = 0

    def hit(self, index: Tensor) -> None:
        hits = self.modes.hits + torch.bincount(index, minlength=len(self.modes))
        self.modes = ModeSet(self.modes.centre, self.modes.tril, self.modes.log_prob, self.modes.peaked, hits)

    def absorb(self, x: Tensor, *, count: bool) -> None:
        """Assign end points ``(n, D)`` to modes, opening new ones, best first; ``count`` them as independent starts."""
        with torch.no_grad():
            log_prob = self.target.log_prob(x).double()
        self.evaluations += x.shape[0]
        keep = torch.isfinite(log_prob) & torch.isfinite(x).all(-1)
        x, log_prob = x[keep], log_prob[keep]
        x = x[log_prob.argsort(descending=True)]
        if len(self.modes):
            distance, nearest = _distance(x, self.modes.centre, self.modes.tril).min(-1)
            if count:
                self.hit(nearest[distance < 0.5])
            x = x[distance >= 0.5]
        while x.shape[0] and len(self.modes) < MAX_MODES:
            tril, log_prob, peaked = laplace(self.target, x[:1], self.local.unsqueeze(0))
            self.evaluations += 4 * self.target.dim
            near = _distance(x, x[:1], tril).squeeze(-1) < 0.5
            near[0] = True
            old = self.modes
            hits = near.sum().reshape(1) if count else torch.zeros(1, dtype=torch.long)
            self.modes = ModeSet(
                torch.cat([old.centre, x[:1]]),
                torch.cat([old.tril, tril]),
                torch.cat([old.log_prob, log_prob]),
                torch.cat([old.peaked, peaked]),
                torch.cat([old.hits, hits]),
            )
            x = x[~near]
        if count:
            self.unplaced += x.shape[0]

    def polish(self, max_evaluations: float, *, steps: int = 25) -> None:
        """Saddle-free Newton steps from every centre, then merge what came together; hits are added up."""
        x, scale = self.modes.centre, self.modes.tril.diagonal(dim1=-2, dim2=-1)
        tril, log_prob, peaked = self.modes.tril, self.modes.log_prob, self.modes.peaked
        for _ in range(steps):
            if self.evaluations > max_evaluations:
                break
            score = self.target.log_prob_and_score(x)[1].to(x.dtype)
            white = (tril.mT @ score.unsqueeze(-1)).squeeze(-1)
            length = white.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[1])
            move = (tril @ (white / length.clamp_min(1.0)).unsqueeze(-1)).squeeze(-1)
            trial = torch.where(torch.isfinite(move), x + move, x)
            with torch.no_grad():
                better = self.target.log_prob(trial).double() > log_prob
            if not bool((better & (length.squeeze(-1) > 1e-3)).any()):
                break
            x = torch.where(better.unsqueeze(-1), trial, x)
            tril, log_prob, peaked = laplace(self.target, x, scale, refine=1)
            self.evaluations += (2 + 2 * self.target.dim) * x.shape[0]
        order = log_prob.argsort(descending=True)
        owner = torch.full_like(order, -1)
        for i in order.tolist():
            if owner[i] < 0:
                free = (owner < 0) & (_distance(x, x[i : i + 1], tril[i : i + 1]).squeeze(-1) < 0.5)
                free[i] = True
                owner[free] = i
        kept = torch.unique(owner)
        hits = torch.zeros_like(self.modes.hits).index_add_(0, owner, self.modes.hits)
        self.modes = ModeSet(x, tril, log_prob, peaked, hits).subset(kept)

    def continuum(self) -> bool:
        """Whether end points do not repeat, or do not end at peaks: ridges, necks, very many modes."""
        placed = max(int(self.modes.hits.sum()), 1)
        singles = int((self.modes.hits == 1).sum())
        peaks = int(self.modes.hits[self.modes.peaked].sum())
        crowded = self.unplaced > 0.2 * (placed + self.unplaced) or singles > 0.2 * placed
        return crowded or peaks < 0.8 * placed or len(self.modes) >= MAX_MODES

    def explained(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which points have the score that the known modes predict, boolean ``(n,)``, and their modes ``(n,)``."""
        mixture = self.modes.mixture()
        score = self.target.log_prob_and_score(x)[1].to(x.dtype)
        self.evaluations += x.shape[0]
        predicted = mixture.log_prob_and_score(x)[1]
        label = mixture.log_components(x).argmax(-1)
        unit = self.modes.tril.diagonal(dim1=-2, dim2=-1)[label]
        error = ((score - predicted) * unit).norm(dim=-1)
        size = ((score.abs() + predicted.abs()) * unit).norm(dim=-1)
        return error < NOVELTY * size, label


def _boxes(fits: MeanFieldFits, modes: ModeSet) -> list[tuple[Tensor, Tensor]]:
    """Boxes to start in: that of the known modes, the same 1.5 and 2 times as wide, and that of the fits."""
    fit_box = ((fits.location - 1.5 * fits.scale).amin(0), (fits.location + 1.5 * fits.scale).amax(0))
    if len(modes) < 2:
        return [fit_box]
    local = modes.tril.square().sum(-1).sqrt()
    low, high = (modes.centre - 1.5 * local).amin(0), (modes.centre + 1.5 * local).amax(0)
    middle, half = 0.5 * (low + high), 0.5 * (high - low)
    return [(middle - f * half, middle + f * half) for f in (1.0, 1.5, 2.0)] + [fit_box]


def _starts(fits: MeanFieldFits, modes: ModeSet, n: int, *, generator: torch.Generator | None) -> Tensor:
    """Three quarters uniform in the boxes, one quarter Gaussian and twice as wide as the fits, shuffled ``(n, D)``."""
    mean, spread = fits.pooled()
    boxes = _boxes(fits, modes)
    inner = n - n // 4
    uniform = torch.rand((inner, mean.shape[0]), generator=generator, dtype=mean.dtype, device=mean.device)
    normal = torch.randn((n // 4, mean.shape[0]), generator=generator, dtype=mean.dtype, device=mean.device)
    parts = [low + (high - low) * part for (low, high), part in zip(boxes, uniform.chunk(len(boxes)), strict=True)]
    x = torch.cat([*parts, mean + 2.0 * spread * normal])
    return x[torch.randperm(n, generator=generator, device=x.device)]


def search_modes(
    target: Target,
    fits: MeanFieldFits,
    *,
    first_batch: int = 600,
    batch: int = 20000,
    max_climbs: int = 300,
    climb_evaluations: int = 400_000,
    min_starts: int | None = None,
    max_evaluations: int = 5_000_000,
    stop: Callable[[], bool] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[ModeSet, SearchReport]:
    """Find modes from variational fits (``fits.good().distinct()``) and random starts.

    Arguments:
        target: The density.
        fits: Where the search starts and how large the box is.
        first_batch: Starts that all climb; they decide whether more are worth it.
        batch: Starts per later batch, which climb only where the known modes do not explain their score.
        max_climbs: Most climbs per later batch.
        climb_evaluations: Budget of later climbs: where the known modes explain little, more starts buy little.
        min_starts: Starts before the search may call itself complete; ``40000 * 2^D`` up to 2 million by default.
        max_evaluations: Budget.
        stop: Asked between batches; True ends the search.
        generator: Source of randomness.
    """
    if min_starts is None:
        min_starts = min(2_000_000, 40_000 * 2 ** min(target.dim, 10))
    low, high = _boxes(fits, _Search(target, fits.scale.amin(0)).modes)[0]
    search = _Search(target, fits.scale.amin(0))
    # The best fits only where the budget is small.
    best = fits.subset(torch.arange(len(fits), device=fits.elbo.device)[: max(4, max_evaluations // 240)])
    centres, _ = climb(target, best.location, 0.2 * best.scale, steps=60)
    search.evaluations += 60 * len(best)
    search.absorb(centres, count=False)
    starts, stopped, known, climbed = 0, "budget", 0, 0
    while search.evaluations < max_evaluations and not (stop is not None and stop() and starts):
        first = starts == 0
        x = _starts(fits, search.modes, first_batch if first else batch, generator=generator)
        if not first:
            explained, label = search.explained(x)
            search.hit(label[explained])
            starts += int(explained.sum())
            # What is cut here was not looked at and is not counted.
            x = x[~explained][:max_climbs]
        starts += x.shape[0]
        if x.shape[0]:
            end, _ = climb(target, x, 0.1 * (high - low), steps=60)
            search.evaluations += 60 * x.shape[0]
            search.absorb(end, count=True)
        if len(search.modes) > known:
            search.polish(max_evaluations)
            known = len(search.modes)
        climbed += 0 if first else 60 * x.shape[0]
        if search.continuum():
            stopped = "continuum"
            break
        if not first and len(search.modes) == 1:
            stopped = "one mode"
            break
        if starts >= min_starts and search.modes.singletons() == 0:
            stopped = "complete"
            break
        if climbed >= climb_evaluations:
            break
    singles = search.modes.singletons()
    report = SearchReport(
        starts, search.evaluations, singles, singles / max(starts, 1), stopped == "continuum", stopped
    )
    return search.modes, report
