r"""Coordinates in which a density separates, from its Hessians.

If :math:`\log\rho(z) = \sum_i f_i((Wz)_i)` for some invertible matrix :math:`W`, every Hessian is
:math:`W^\top D(z) W` with a diagonal :math:`D`. So with :math:`F = -\overline{H}` over some points, the matrices
:math:`F^{-1/2} H F^{-1/2}` commute, and the eigenvectors of one random combination of them diagonalize all. Unlike
independent component analysis of draws, this has no sampling error: exact scores give exact directions, and one
point of every kind is enough. Where nothing separates, the directions are merely some directions; whoever fits a
product in them sees it in the likelihood.

References:
    Independent component analysis by tensor and matrix diagonalization: Blind beamforming for non-Gaussian signals
    (Cardoso, Souloumiac, 1993), https://doi.org/10.1049/ip-f-2.1993.0054
    Source separation from the Hessian of the log density (Yeredor, 2000), https://doi.org/10.1109/97.852921
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffsampler.pilot.transport import AffineMap
from diffsampler.target import Target

__all__ = ["hessians", "separating_map"]


def hessians(target: Target, points: Tensor, *, step: Tensor) -> Tensor:
    """Hessians of the log density at ``points (n, D)`` by central differences of scores, shape ``(n, D, D)``.

    Arguments:
        target: The density.
        points: Where, float64.
        step: Half the distance of a difference, per coordinate, shape ``(D,)``.
    """
    n, dim = points.shape
    shift = torch.diag(step)
    ends = torch.stack([points.unsqueeze(1) + shift, points.unsqueeze(1) - shift])
    score = target.score(ends.reshape(-1, dim)).double().reshape(2, n, dim, dim)
    hessian = (score[0] - score[1]) / (2.0 * step.unsqueeze(-1))
    return 0.5 * (hessian + hessian.mT)


def separating_map(target: Target, points: Tensor, *, generator: torch.Generator | None = None) -> AffineMap | None:
    """A linear map to coordinates in which ``target`` separates, if it does in any; None where there is no such map.

    Arguments:
        target: The density.
        points: Typical points, shape ``(n, D)``, float64; 64 are plenty.
        generator: Source of randomness.
    """
    scale = 1.0 / target.score(points).double().square().mean(0).sqrt()
    found = hessians(target, points, step=1e-3 * scale)
    usable = found.isfinite().all(-1).all(-1)
    if int(usable.sum()) < 2 or not bool(scale.isfinite().all()):
        return None
    found = found[usable]
    value, vector = torch.linalg.eigh(-found.mean(0))
    # Curvature may average out in a direction; its sign does not matter for the directions, only that it is there.
    size = value.abs()
    if not bool((size > 1e-9 * size.max()).all()) or bool((value < 0).any()):
        return None
    root = vector * size.rsqrt() @ vector.mT
    white = root @ found @ root
    mix = torch.randn(white.shape[0], 1, 1, generator=generator, dtype=white.dtype, device=white.device)
    axes = torch.linalg.eigh((mix * white).sum(0))[1]
    return AffineMap(torch.zeros_like(scale), root @ axes)
