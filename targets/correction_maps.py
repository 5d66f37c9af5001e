r"""Energies of pairs of dihedrals by interpolation in a periodic table (CMAP).

A map gives energies at :math:`\phi = 2 \pi i / s`, :math:`\psi = 2 \pi j / s`. Between them it is the product of
periodic cubic splines, written in every cell as a polynomial :math:`\sum_{k, l = 0}^{3} c_{kl}\, t^k u^l` of the
fractions :math:`t, u \in [0, 1)`, as OpenMM does.

Reference: Extending the treatment of backbone energetics in protein force fields (Mackerell, Feig & Brooks, 2004),
https://doi.org/10.1002/jcc.20065
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CorrectionMaps", "MapTerms", "map_terms", "maps"]

HERMITE = ((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (-3.0, 3.0, -2.0, -1.0), (2.0, -2.0, 1.0, 1.0))
"""From values and slopes at both ends of a cell, ``(f0, f1, f0', f1')``, to the coefficients of a cubic."""


@dataclass(frozen=True)
class CorrectionMaps:
    """Tables and where they apply.

    Arguments:
        energy: Energies in kJ/mol, first angle first, ``(maps, s, s)``.
        atoms: Atoms of both dihedrals, ``(c, 8)``.
        which: Map of each, ``(c,)``.
    """

    energy: Tensor
    atoms: Tensor
    which: Tensor


class MapTerms(NamedTuple):
    """What an evaluation needs."""

    coefficients: Tensor
    """Of all cells of all maps, ``(maps * s * s, 16)``, powers of the first fraction first."""
    offset: Tensor
    """First cell of each pair's map, ``(c, 1)``."""
    size: Tensor
    """``s``, an integer."""


def map_terms(model: CorrectionMaps) -> MapTerms:
    """Coefficients of all cells."""
    f = model.energy
    count, size = f.shape[:2]
    eye = torch.eye(size, dtype=f.dtype, device=f.device)
    up, down = eye.roll(1, 1), eye.roll(-1, 1)
    # Slopes of a periodic spline at its knots: m[i-1] + 4 m[i] + m[i+1] = 3 (f[i+1] - f[i-1]).
    slope = torch.linalg.solve(up + 4.0 * eye + down, 3.0 * (up - down))
    by_first, by_second = slope @ f, f @ slope.mT
    both = slope @ f @ slope.mT

    def corners(values: Tensor) -> Tensor:
        after = values.roll(-1, 1)
        near, far = torch.stack([values, values.roll(-1, 2)], -1), torch.stack([after, after.roll(-1, 2)], -1)
        return torch.stack([near, far], -2)

    upper = torch.cat([corners(f), corners(by_second)], -1)
    lower = torch.cat([corners(by_first), corners(both)], -1)
    hermite = f.new_tensor(HERMITE)
    coefficients = hermite @ torch.cat([upper, lower], -2) @ hermite.mT
    offset = (model.which * size * size).unsqueeze(1)
    return MapTerms(coefficients.reshape(count * size * size, 16), offset, torch.tensor(size, device=f.device))


def maps(first: Tensor, second: Tensor, terms: MapTerms) -> tuple[Tensor, Tensor, Tensor]:
    """Energies ``(B,)`` of pairs of angles ``(c, B)`` and their derivatives with respect to both."""
    # In the dtype of the angles: a whole number over a float would be rounded to single precision.
    scale = terms.size.to(first.dtype) / (2.0 * math.pi)
    a, b = (torch.remainder(angle, 2.0 * math.pi) * scale for angle in (first, second))
    i, j = (x.detach().floor().clamp_max(float(terms.size) - 1.0) for x in (a, b))
    cell = terms.offset + i.long() * terms.size + j.long()
    c = terms.coefficients[cell].unflatten(-1, (4, 4))
    t, u = (a - i).unsqueeze(-1), (b - j).unsqueeze(-1)
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    powers_t, slopes_t = torch.cat([one, t, t**2, t**3], -1), torch.cat([zero, one, 2.0 * t, 3.0 * t**2], -1)
    powers_u, slopes_u = torch.cat([one, u, u**2, u**3], -1), torch.cat([zero, one, 2.0 * u, 3.0 * u**2], -1)
    along = (c * powers_u.unsqueeze(-2)).sum(-1)
    by_first = scale * (along * slopes_t).sum(-1)
    by_second = scale * ((c * slopes_u.unsqueeze(-2)).sum(-1) * powers_t).sum(-1)
    return (along * powers_t).sum(-1).sum(0), by_first, by_second
