"""Candidate coordinates for a learned chain, chosen by how well a mixture predicts held-out particles in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffsampler.denoiser import Denoiser
from diffsampler.pilot.transport import AffineMap, PulledBack, TransportMap
from diffsampler.refinement.mixture_fit import choose_denoiser
from diffsampler.refinement.separation import separating_map
from diffsampler.target import AffineTarget, Target

__all__ = ["Frame", "Ranked", "candidate_frames", "make_frame", "rank_frames"]

SEPARATION_POINTS = 64
TAIL = 0.005
"""Share of points, at either end of a coordinate, beyond its core."""
OUTLYING = 1.5
"""Ratio of the spread of all points to that of their core from which the core alone counts."""


class Frame(NamedTuple):
    """Coordinates ``z`` of unit scale about the origin."""

    name: str
    transport: TransportMap | None
    standard: AffineTarget
    """The target in these coordinates."""

    def to_original(self, z: Tensor) -> Tensor:
        """``z (n, D)`` to the target's own coordinates, float64."""
        u = self.standard.to_original(z)
        return u if self.transport is None else self.transport(u)[0]

    def to_frame(self, x: Tensor) -> Tensor:
        """The target's own coordinates to ``z``, float64."""
        return self.standard.to_standard(x if self.transport is None else self.transport.inverse(x))

    def log_volume(self, z: Tensor) -> Tensor:
        """``log |det dx/dz|``, shape ``(n,)``."""
        own = z.new_full(z.shape[:1], self.standard.log_volume)
        return own if self.transport is None else own + self.transport(self.standard.to_original(z))[1]


def make_frame(name: str, target: Target, transport: TransportMap | None, x: Tensor) -> Frame | None:
    """Standardize ``target`` behind a map, by particles ``x (n, D)``; None where the map does not reach them."""
    u = x if transport is None else transport.inverse(x)
    u = u[u.isfinite().all(-1)]
    if u.shape[0] < 0.99 * x.shape[0]:
        return None
    location, scale = _location_scale(u)
    if not bool((scale > 0.0).all()):
        return None
    base = target if transport is None else PulledBack(target, transport)
    return Frame(name, transport, AffineTarget(base, location, scale))


def _location_scale(u: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of ``u (n, D)``; a map may send a few points very far, and they must not set both."""
    beyond = round(TAIL * len(u))
    core = u.clamp(u.kthvalue(1 + beyond, 0).values, u.kthvalue(len(u) - beyond, 0).values)
    outlying = u.std(0) > OUTLYING * core.std(0)
    return torch.where(outlying, core.mean(0), u.mean(0)), torch.where(outlying, core.std(0), u.std(0))


def candidate_frames(
    target: Target, transport: TransportMap | None, x: Tensor, *, generator: torch.Generator | None = None
) -> list[Frame]:
    """Plain standardization, the pilot's map, and directions in which the density separates.

    Arguments:
        target: On Euclidean space.
        transport: The pilot's map, or None.
        x: Equally weighted particles, shape ``(n, D)``, float64.
        generator: Source of randomness.
    """
    plain = make_frame("diagonal", target, None, x)
    if plain is None:
        raise ValueError("Expected particles with spread in every coordinate.")
    frames = [plain]
    mixes = not isinstance(transport, AffineMap) or not torch.equal(
        transport.matrix, torch.diag(transport.matrix.diagonal())
    )
    if transport is not None and target.dim > 1 and mixes:
        mapped = make_frame("map", target, transport, x)
        frames += [] if mapped is None else [mapped]
    if target.dim > 1:
        points = x[:: max(1, x.shape[0] // SEPARATION_POINTS)][:SEPARATION_POINTS]
        apart = separating_map(plain.standard, plain.to_frame(points), generator=generator)
        if apart is not None:
            location, scale = plain.standard.location, plain.standard.scale
            turned = make_frame("separating", target, AffineMap(location, scale.unsqueeze(-1) * apart.matrix), x)
            frames += [] if turned is None else [turned]
    return frames


class Ranked(NamedTuple):
    """A frame, the denoiser of the mixture fitted in it, and the mixture's held-out log likelihood."""

    frame: Frame
    denoiser: Denoiser
    value: float


def rank_frames(
    frames: list[Frame],
    x: Tensor,
    centres: Tensor | None,
    *,
    generator: torch.Generator | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Ranked]:
    """Fit a mixture in every frame and judge it by held-out particles, in the target's own units.

    Arguments:
        frames: Candidates.
        x: Particles, shape ``(n, D)``; the second half is held out.
        centres: Known modes, shape ``(M, D)``, or None.
        generator: Source of randomness.
        stop: Whether to leave out the frames that are left; the first is always ranked.
    """
    half = x.shape[0] // 2
    ranked: list[Ranked] = []
    for frame in frames:
        if ranked and stop():
            break
        z = frame.to_frame(x)
        modes = None if centres is None else frame.to_frame(centres)
        if modes is not None and not bool(modes.isfinite().all()):
            modes = None
        denoiser, value = choose_denoiser(z[:half], z[half:], centres=modes, generator=generator)
        ranked.append(Ranked(frame, denoiser, value - float(frame.log_volume(z[half:]).mean())))
    return ranked
