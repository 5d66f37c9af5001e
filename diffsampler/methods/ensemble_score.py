r"""Gradient-free reverse diffusion of an interacting ensemble, with exact weights.

The score of the noised target, :math:`\nabla\log p_\sigma(x) = (E[y | x] - x) / \sigma^2`, is estimated by importance
sampling over points that the whole ensemble shares (:mod:`diffsampler.ensemble.clouds`), from values of the density
alone. Members are brought down a geometric ladder of noise (:mod:`diffsampler.ensemble.transitions`). Their path
weights satisfy :math:`E[w_i] = Z` exactly in spite of the interaction (:mod:`diffsampler.ensemble.chain`), also where
the estimates are poor; then only their variance tells.

For a density without gradient, such as an expensive batched simulator, in few dimensions. Weights are useful up to
about five dimensions; to about ten the unweighted draws are (``corrected=False``), as long as the findings are silent.
With a gradient use :class:`~diffsampler.baselines.SMC` or a learned method.

Cost: ``num_levels * num_points`` evaluations per draw and a pilot of about ten thousand; arithmetic
``O(num_levels * num_particles * num_points * D)`` per draw.

References:
    Gradient-Free Score-Based Sampling Methods with Ensembles (Riel & Bischoff, 2024), https://arxiv.org/abs/2401.17539
    (the class of methods; estimators, proposals and weights are derived here, not transcribed)
"""

from __future__ import annotations

import math
from typing import NamedTuple, final

import torch
from torch import Tensor

from diffsampler.ensemble.chain import LevelReport, Recipe, geometric_levels, reverse_diffusion
from diffsampler.ensemble.clouds import Estimator, Pooled
from diffsampler.ensemble.frame import Frame
from diffsampler.ensemble.pilot import Plan, make_plan
from diffsampler.ensemble.proposals import Kalman, Proposal, square_distance
from diffsampler.ensemble.transitions import PlugIn, Transition
from diffsampler.particles import Particles
from diffsampler.sampler import Sampler
from diffsampler.space import Euclidean
from diffsampler.target import CountedTarget, Target

__all__ = ["EnsembleResult", "EnsembleScore", "energy_ratio"]

MIN_REPLICATES = 4
"""Independent ensembles of a call at least: their spread is the error bar."""
MAX_POOR = 0.1
"""Share of members with fewer than five effective points, above which the estimates are not trusted."""
MAX_ENERGY = 4.0
"""Energy distance between ensembles, in units of its mean between independent samples."""


class EnsembleResult(NamedTuple):
    """What a run returns."""

    particles: Particles
    """Weighted draws; ensembles are the replicates."""
    plan: Plan
    """Frame and noise levels that the pilot found."""
    levels: tuple[LevelReport, ...]
    """Effective sample sizes of the estimates at each level."""
    poor: float
    """Largest share of members with an effective sample size below five, over levels with noise above local scale."""
    half_distance: float
    """Energy distance between the halves of an ensemble, relative to independent samples; mean over ensembles."""
    replicate_distance: float
    """The same between one ensemble and the next: ensembles that settle in different modes show here."""


@final
class EnsembleScore(Sampler):
    """Reverse diffusion with a score estimated from an ensemble; only ``log_prob`` of the target is called.

    Arguments:
        target: The density, on a Euclidean space.
        num_particles: Members of an ensemble ``M``.
        num_levels: Noise levels ``T``.
        num_points: New density evaluations per member and level ``K``; even numbers are best, points come in pairs.
        estimator: Who uses which points, :class:`~diffsampler.ensemble.clouds.Pooled` by default.
        proposal: Where points are drawn, :class:`~diffsampler.ensemble.proposals.Kalman` by default.
        transition: The step, :class:`~diffsampler.ensemble.transitions.PlugIn` with matched variance by default.
        radius: Standard deviation of a Gaussian about the origin that covers the target. By default the target's
            prior, or a search that may miss modes far away.
        corrected: Whether particles carry path weights. Without, they are approximate draws of equal weight and there
            is no estimate of the normalizer.

    Raises:
        ValueError: If an option is out of range or the space is not Euclidean.
    """

    def __init__(
        self,
        target: Target,
        *,
        num_particles: int = 512,
        num_levels: int = 40,
        num_points: int = 4,
        estimator: Estimator | None = None,
        proposal: Proposal | None = None,
        transition: Transition | None = None,
        radius: float | None = None,
        corrected: bool = True,
    ) -> None:
        if not isinstance(target.space, Euclidean):
            raise ValueError(f"Expected a target on a Euclidean space; got {target.space}.")
        for name, value, least in (
            ("num_particles", num_particles, 8),
            ("num_levels", num_levels, 2),
            ("num_points", num_points, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Expected {name} to be an integer of at least {least}; got {value!r}.")
        if radius is not None and not 0.0 < radius < math.inf:
            raise ValueError(f"Expected a positive radius; got {radius}.")
        self.target = target
        self.num_levels = num_levels
        self.radius = radius
        self.corrected = corrected
        self.recipe = Recipe(
            num_particles=num_particles,
            num_points=num_points,
            estimator=Pooled() if estimator is None else estimator,
            proposal=Kalman() if proposal is None else proposal,
            transition=PlugIn() if transition is None else transition,
        )
        self._counted = CountedTarget(target)
        self._findings: list[tuple[str, str, str]] = []

    @property
    def evaluations(self) -> int:
        """Points at which the density was computed so far, pilots included."""
        return self._counted.evaluations

    @property
    def findings(self) -> list[tuple[str, str, str]]:
        """Level, message and remedy of what the last call of :meth:`sample` noticed."""
        return list(self._findings)

    def sample(self, n: int, *, seed: int = 0) -> Particles:
        """Draw ``n`` particles, rounded up to whole ensembles, four at least.

        Raises:
            ValueError: If the density is finite hardly anywhere.
        """
        result = self.run(n, seed=seed)
        self._findings = _findings(result)
        return result.particles

    def run(self, n: int, *, seed: int = 0, plan: Plan | None = None) -> EnsembleResult:
        """As :meth:`sample`, with all diagnostics.

        Arguments:
            n: Number of particles.
            seed: Seed of all randomness.
            plan: Frame and levels of an earlier run, instead of a pilot.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"Expected n >= 1; got {n!r}.")
        device = next(iter(self.target.buffers()), torch.empty(0)).device
        generator = torch.Generator(device).manual_seed(seed)
        if plan is None:
            plan = make_plan(self._counted, self.recipe, radius=self.radius, generator=generator)
        replicates = max(MIN_REPLICATES, math.ceil(n / self.recipe.num_particles))
        sigmas = geometric_levels(plan.sigma_max, plan.sigma_min, self.num_levels)
        u, log_weight, levels = reverse_diffusion(
            self._counted, plan.frame, sigmas, self.recipe, replicates=replicates, generator=generator
        )
        particles = _particles(u, log_weight, plan.frame, corrected=self.corrected)
        halves = u.unflatten(1, (2, -1)) if u.shape[1] % 2 == 0 else u[:, 1:].unflatten(1, (2, -1))
        return EnsembleResult(
            particles,
            plan,
            levels,
            max((level.poor for level in levels if level.roughness > 1.0), default=0.0),
            float(energy_ratio(halves[:, 0], halves[:, 1]).mean()),
            float(energy_ratio(u, u.roll(1, 0)).mean()),
        )


def energy_ratio(x: Tensor, y: Tensor) -> Tensor:
    r"""Energy distance between samples ``(R, m, D)``, relative to its mean under the null hypothesis, shape ``(R,)``.

    .. math:: \mathcal{E} = 2 \overline{|x - y|} - \overline{|x - x'|} - \overline{|y - y'|},

    where the means within a sample include the zeros of the diagonal. Between independent samples of one law its mean
    is :math:`2 E|x - x'| / m`; the ratio is near one there.

    Reference:
        Energy statistics (Szekely & Rizzo, 2013), https://doi.org/10.1016/j.jspi.2013.03.018
    """
    m = x.shape[-2]
    across, mine, theirs = (square_distance(a, b).sqrt().mean((-2, -1)) for a, b in ((x, y), (x, x), (y, y)))
    pooled = 0.5 * (mine + theirs) * m / (m - 1)
    return (2.0 * across - mine - theirs) * m / (2.0 * pooled)


def _particles(u: Tensor, log_weight: Tensor, frame: Frame, *, corrected: bool) -> Particles:
    x, flat = frame.to_original(u.flatten(0, 1)), log_weight.flatten()
    broken = ~x.isfinite().all(-1) | flat.isnan()
    flat = torch.where(broken, torch.full_like(flat, -math.inf), flat)
    if not bool((flat > -math.inf).any()):
        raise RuntimeError("Expected a finite density at some final particles; got none. Is the target proper?")
    if corrected:
        return Particles(x, flat, replicates=u.shape[0], nonfinite=int(broken.sum()))
    # Draws outside the support are no draws of the target, whatever the diffusion made of them.
    inside = torch.where(flat > -math.inf, torch.zeros_like(flat), flat)
    return Particles(x, inside, replicates=u.shape[0], has_normalizer=False, nonfinite=int(broken.sum()))


def _findings(result: EnsembleResult) -> list[tuple[str, str, str]]:
    found = []
    if result.poor > MAX_POOR:
        message = (
            f"The score estimates are untrustworthy: up to {result.poor:.0%} of members have fewer than five effective "
            f"points (limit {MAX_POOR:.0%})."
        )
        found.append(
            ("warning", message, "Raise num_points or num_particles; weights stay exact, but may vary wildly.")
        )
    if result.replicate_distance > MAX_ENERGY:
        message = (
            f"Independent ensembles differ by {result.replicate_distance:.1f} times the energy distance of independent "
            f"samples (limit {MAX_ENERGY:g})."
        )
        found.append(("warning", message, "They may have settled in different modes: raise num_particles."))
    return found
