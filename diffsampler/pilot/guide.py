r"""References that pilots temper from: built from a search first, from draws later.

A :class:`Guide` is a transport map with a normalised reference density in its coordinates ``z``. All passes of the
pilot run in ``z``, where the target is :math:`\log\rho(T(z)) + \log|\det T'(z)|` and has the same normaliser.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffsampler.pilot.density_fits import fit_gaussian_mixture, fit_product, fit_student_t, stack
from diffsampler.pilot.modes import ModeSet
from diffsampler.pilot.profile import Profile, drivers, profile_from_draws
from diffsampler.pilot.reference import EllipticalMixture, ProductMixture, Stacked, student_t
from diffsampler.pilot.search import MeanFieldFits
from diffsampler.pilot.tails import WIDE_DF, Tails
from diffsampler.pilot.transport import AffineMap, PulledBack, TransportMap, TriangularMap, fit_affine
from diffsampler.pilot.transport_fit import fit_transport, fit_triangular, typical_gain
from diffsampler.target import Target

__all__ = ["Guide", "Knowledge", "first_guide", "prior_guide", "refit_guide"]

STRETCH = 2.5


@dataclass(frozen=True)
class Guide:
    """A map and a reference in its coordinates.

    Arguments:
        transport: ``x = T(z)``; None for the identity, on spaces without maps.
        reference: Normalised density of ``z`` with an exact sampler.
        weights: Name and weight of each component of the reference.
        profiles: Nested Laplace profiles that the reference holds.
    """

    transport: TransportMap | None
    reference: Target
    weights: dict[str, float]
    profiles: tuple[Profile, ...] = ()

    def map(self, z: Tensor) -> Tensor:
        """Points ``x (n, D)`` of map coordinates ``z (n, D)``."""
        return z if self.transport is None else self.transport(z)[0]

    def pull_back(self, target: Target) -> Target:
        """The target in map coordinates."""
        return target if self.transport is None else PulledBack(target, self.transport)


@dataclass(frozen=True)
class Knowledge:
    """What the search found, in ``x``.

    Arguments:
        fits: Good, distinct variational fits, or None before a search.
        modes: Peaked modes that repeat, or None.
        prior: Normalised prior with an exact sampler, or None.
        wide: Widest plausible law, a Student-t, or None before a search.
        product: Product of the marginals of the fits, or None. It recombines coordinates: with two sides found in
            each of ``D`` coordinates it covers all ``2^D`` modes.
        tails: How slowly the density falls.
    """

    fits: MeanFieldFits | None = None
    modes: ModeSet | None = None
    prior: Target | None = None
    wide: EllipticalMixture | None = None
    product: ProductMixture | None = None
    tails: Tails = field(default_factory=Tails)

    def components(self) -> dict[str, tuple[Target, float]]:
        """Component and smallest weight, by name."""
        parts: dict[str, tuple[Target, float]] = {}
        if self.wide is not None:
            parts["wide"] = (self.wide, 0.05)
        if self.fits is not None:
            parts["variational"] = (variational(self.fits), 0.05)
        if self.product is not None:
            parts["variational product"] = (self.product, 0.05)
        if self.modes is not None:
            parts["laplace"] = (self.modes.mixture(df=5.0, inflate=1.1, mix=0.3), 0.05)
        if self.prior is not None:
            parts["prior"] = (self.prior, 0.2)
        return parts


def variational(fits: MeanFieldFits) -> EllipticalMixture:
    """Mixture of diagonal Student-t laws at the fits; half of the weight by bound, half equal."""
    weight = 0.5 * torch.softmax(fits.elbo, 0) + 0.5 / len(fits)
    return EllipticalMixture(fits.location, 1.3 * fits.scale, weight.log(), df=3.0)


def wide_law(fits: MeanFieldFits, *, df: float = WIDE_DF) -> EllipticalMixture:
    """Student-t law at twice the pooled spread of the fits, covariance shrunk half-way to its diagonal."""
    mean, spread = fits.pooled()
    centred = (fits.location - mean) / spread
    within = torch.diag((fits.scale / spread).square().mean(0))
    cov = centred.mT @ centred / len(fits) + within
    cov = 0.5 * cov + 0.5 * torch.diag(cov.diagonal())
    return student_t(mean, 2.0 * spread.unsqueeze(-1) * torch.linalg.cholesky(cov), df=df)


def _diagonal_map(mean: Tensor, spread: Tensor) -> AffineMap:
    return AffineMap(mean, torch.diag(spread))


def first_guide(knowledge: Knowledge) -> Guide:
    """The reference of the first pass after a search: wide law, variational mixture, Laplace mixture, prior.

    Raises:
        ValueError: If there was no search.
    """
    if knowledge.fits is None:
        raise ValueError("Expected variational fits for a first reference; got None.")
    transport = _diagonal_map(*knowledge.fits.pooled())
    weight = {"wide": 0.2, "variational": 0.3, "variational product": 0.2, "laplace": 0.3, "prior": 0.5}
    parts = knowledge.components()
    weights = torch.tensor([weight[name] for name in parts], dtype=torch.float64)
    reference = Stacked([part for part, _ in parts.values()], weights)
    return Guide(transport, PulledBack(reference, transport), _weights(parts, reference))


def prior_guide(prior: Target, *, generator: torch.Generator | None = None) -> Guide:
    """Tempering of the likelihood from the prior."""
    x = prior.sample(2048, generator=generator).double()
    # Quartiles: a heavy-tailed prior has no standard deviation to speak of.
    low, mid, high = torch.quantile(x, x.new_tensor([0.25, 0.5, 0.75]), dim=0)
    spread = ((high - low) / 1.349).clamp_min(1e-12)
    transport = _diagonal_map(mid, spread)
    return Guide(transport, PulledBack(prior, transport), {"prior": 1.0})


def _weights(names: dict[str, tuple[Target, float]], reference: Stacked) -> dict[str, float]:
    return dict(zip(names, [round(float(w), 4) for w in reference.log_weight.exp()], strict=True))


def _stacked(
    parts: dict[str, tuple[Target, float]],
    held_out: Tensor,
    transport: TransportMap,
    *,
    profiles: list[Profile],
    smallest: float = 0.015,
) -> Guide:
    """Stack by held-out likelihood in ``z`` and drop what does not matter."""
    reference = stack([part for part, _ in parts.values()], [floor for _, floor in parts.values()], held_out)
    weight = reference.log_weight.exp()
    kept = {name: part for (name, part), w in zip(parts.items(), weight.tolist(), strict=True) if w >= smallest}
    reference = reference.pruned(smallest)
    return Guide(transport, reference, _weights(kept, reference), tuple(profiles))


def _heavy(x: Tensor, tails: Tails) -> dict[str, Target]:
    """Laws that fall as slowly as the density, where the usual references do not bound its weights."""
    parts: dict[str, Target] = {}
    df = tails.product_df(x.shape[1])
    if df is not None:
        parts["product heavy"] = fit_product(x, df=df)
    if tails.elliptical_df() < WIDE_DF:
        parts["elliptical heavy"] = fit_student_t(x, df=tails.elliptical_df())
    return parts


def _extended(x: Tensor, profiles: list[Profile], *, generator: torch.Generator | None) -> Tensor:
    """Draws with a quarter as many from each profile."""
    count = x.shape[0] // 4
    return torch.cat([x, *(p.mixture().sample(count, generator=generator) for p in profiles)])


def _profiles(
    target: Target, x: Tensor, held_out: Tensor, triangular: TriangularMap, known: Sequence[Profile], *, size: int
) -> list[Profile]:
    """Profiles along the drivers of a triangular map that is the better one at most held-out draws.

    That it is much worse at a few may be the very neck that the profile is for.
    """
    found = {p.index: p for p in known}
    called_for = typical_gain(triangular, fit_affine(x), held_out) > 0.05
    for index in drivers(triangular) if called_for else []:
        profile = profile_from_draws(target, index, x, size=size)
        if profile is not None:
            found.pop(index, None)
            found[index] = profile
    return list(found.values())[-2:]


def refit_guide(
    target: Target,
    x: Tensor,
    held_out: Tensor,
    knowledge: Knowledge,
    *,
    profile_size: int = 64,
    profiles: Sequence[Profile] = (),
    generator: torch.Generator | None = None,
) -> Guide:
    """The reference of a later pass, from equally weighted draws of the one before.

    Arguments:
        target: The density, for profiles along coordinates that drive the scale of others.
        x: Draws to fit, shape ``(n, D)``.
        held_out: Draws from other islands, shape ``(m, D)``.
        knowledge: What the search found.
        profile_size: Grid points of profiles; none are made below 8.
        profiles: Profiles of the pass before; they stay where these draws do not lead to new ones.
        generator: Source of randomness.
    """
    triangular = fit_triangular(x) if x.shape[1] > 1 else None
    several = knowledge.modes is not None and len(knowledge.modes) > 1
    # Separate modes have no single conditional peak to follow.
    found: list[Profile] = []
    if not several and triangular is not None and profile_size >= 8:
        found = _profiles(target, x, held_out, triangular, profiles, size=profile_size)
    transport = fit_transport(x, held_out, triangular=triangular)
    if found:
        # The map must know the necks that the draws have not entered, or it bends wildly there.
        transport = fit_transport(*(_extended(draws, found, generator=generator) for draws in (x, held_out)))
    z, z_held = transport.inverse(x), transport.inverse(held_out)
    keep = torch.isfinite(z_held).all(-1)
    dim = x.shape[1]
    unit = z.new_ones(dim)
    stretched = unit.clone()
    stretched[0] = STRETCH
    zero = z.new_zeros(dim)
    parts: dict[str, tuple[Target, float]] = {
        "map": (student_t(zero, 1.02 * unit), 0.1),
        "map heavy": (student_t(zero, unit, df=4.0), 0.05),
        "map stretched": (student_t(zero, stretched, df=8.0), 0.1),
    }
    centres = None if knowledge.modes is None else transport.inverse(knowledge.modes.centre)
    if centres is not None and not bool(torch.isfinite(centres).all()):
        centres = None
    parts["mixture"] = (
        fit_gaussian_mixture(z[torch.isfinite(z).all(-1)], z_held[keep], centres=centres, generator=generator),
        0.0,
    )
    if dim > 1:
        parts["product"] = (PulledBack(fit_product(x), transport), 0.0)
    parts |= {name: (PulledBack(part, transport), 0.1) for name, part in _heavy(x, knowledge.tails).items()}
    for profile in found:
        # The first is exact where conditionals are Gaussian, the second is there for the case that they are not.
        parts[f"profile {profile.index}"] = (PulledBack(profile.mixture(df=math.inf, inflate=1.0), transport), 0.05)
        parts[f"profile {profile.index} heavy"] = (PulledBack(profile.mixture(), transport), 0.05)
    for name, (part, floor) in knowledge.components().items():
        parts[name] = (PulledBack(part, transport), floor)
    return _stacked(parts, z_held[keep], transport, profiles=found)
