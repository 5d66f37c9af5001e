"""Ordered and disordered configurations from which reference chains of particle systems start."""

from __future__ import annotations

import itertools
import math

import torch
from scipy.optimize import minimize
from torch import Tensor

from diffsampler.space import MeanFree
from diffsampler.target import Target

QUENCHES = 24


def icosahedron(shells: int) -> Tensor:
    """Mackay's icosahedron of 13 (one shell) or 55 (two shells) points with unit distance along its radii, ``(n, 3)``.

    Reference: Mackay, "A dense non-crystallographic packing of equal spheres" (1962,
    https://doi.org/10.1107/S0365110X6200239X).
    """
    golden = 0.5 * (1.0 + math.sqrt(5.0))
    corners = torch.tensor(
        [
            torch.tensor([0.0, s, t * golden]).roll(k).tolist()
            for s, t in itertools.product((1.0, -1.0), repeat=2)
            for k in range(3)
        ],
        dtype=torch.float64,
    ) / math.hypot(1.0, golden)
    points = [torch.zeros(1, 3, dtype=torch.float64), corners]
    if shells == 2:
        i, j = torch.triu_indices(12, 12, 1)
        edges = (corners[i] - corners[j]).norm(dim=-1) < 1.1
        # The second shell has a point at the middle of each of the 30 edges.
        points += [2.0 * corners, (corners[i] + corners[j])[edges]]
    return torch.cat(points)


def quench(target: Target, x: Tensor) -> Tensor:
    """The local minimum of the energy below one configuration ``(D,)``, by L-BFGS."""

    def energy(flat):
        log_prob, score = target.log_prob_and_score(torch.from_numpy(flat))
        return -float(log_prob), -score.numpy()

    found = minimize(energy, x.double().numpy(), jac=True, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 1e-14})
    return target.space.project(torch.from_numpy(found.x))


def disordered(target: Target, count: int, generator: torch.Generator) -> Tensor:
    """Random configurations ``(count, D)`` without overlaps: a hot gas in the trap, pushed apart in capped steps."""
    space = target.space
    assert isinstance(space, MeanFree)
    like = torch.empty(0, dtype=torch.float64)
    x = 1.2 * space.n ** (1.0 / space.d) * space.noise((count,), like=like, generator=generator)
    for _ in range(60):
        push = target.log_prob_and_score(x)[1].unflatten(-1, (space.n, space.d))
        length = push.norm(dim=-1, keepdim=True)
        # Only forces far above thermal ones are followed: the configuration must stay hot.
        step = 0.02 * push / length.clamp_min(1e-12) * (length > 20.0)
        x = space.project(x + step.flatten(-2))
    return x


def ordered(target: Target, count: int, generator: torch.Generator) -> Tensor:
    """The lowest minimum known, ``(count, D)``, each copy in a frame of its own.

    Candidates are quenched random configurations and, for 13 and 55 particles, Mackay's icosahedra, which are the known
    global minima of free clusters.
    """
    space = target.space
    assert isinstance(space, MeanFree)
    candidates = list(disordered(target, QUENCHES, generator))
    if space.d == 3 and space.n in (13, 55):
        candidates.append(icosahedron(1 if space.n == 13 else 2).flatten())
    minima = torch.stack([quench(target, x) for x in candidates])
    lowest = minima[target.energy(minima).argmin()].reshape(space.n, space.d)
    frames = torch.randn(count, space.d, space.d, generator=generator, dtype=torch.float64)
    return (lowest @ torch.linalg.qr(frames)[0]).flatten(1)
