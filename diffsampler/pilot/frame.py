r"""A linear frame in which a density falls apart into independent coordinates, where there is one.

If :math:`\rho(x) = \prod_j f_j((A^{-1} x)_j)`, all Hessians of :math:`\log\rho` are :math:`A^{-\top} D(x) A^{-1}` with
diagonal :math:`D(x)`: after whitening by their mean absolute value they share one orthogonal eigenbasis. It is found
without sampling noise, from differences of scores at a few points, by Jacobi rotations.

References:
    Jacobi angles for simultaneous diagonalization (Cardoso & Souloumiac, 1996),
    https://doi.org/10.1137/S0895479893259546
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffsampler.pilot.search import MeanFieldFits
from diffsampler.pilot.transport import AffineMap
from diffsampler.target import Target

__all__ = ["joint_diagonalise", "separating_frame"]


def _off_diagonal(matrices: Tensor) -> float:
    """Share of the off-diagonal entries in the square norm of matrices ``(m, D, D)``."""
    total = float(matrices.square().sum())
    return 1.0 - float(matrices.diagonal(dim1=-2, dim2=-1).square().sum()) / max(total, 1e-300)


def joint_diagonalise(matrices: Tensor, *, sweeps: int = 20, tolerance: float = 1e-6) -> Tensor:
    """Orthogonal ``R (D, D)`` that makes ``R.T @ H @ R`` as diagonal as it can for symmetric ``H``, ``(m, D, D)``.

    It starts from the eigenvectors of one random combination, exact where the matrices commute.
    """
    dim = matrices.shape[-1]
    weight = torch.randn(matrices.shape[0], generator=torch.Generator().manual_seed(0), dtype=matrices.dtype)
    rotation = torch.linalg.eigh((weight[:, None, None] * matrices).sum(0))[1]
    h = rotation.mT @ matrices @ rotation
    for _ in range(sweeps):
        largest = 0.0
        for p in range(dim - 1):
            for q in range(p + 1, dim):
                a, b = h[:, p, p] - h[:, q, q], 2.0 * h[:, p, q]
                on, off = float(a.square().sum() - b.square().sum()), 2.0 * float((a * b).sum())
                angle = 0.25 * math.atan2(off, on)
                if abs(angle) < tolerance:
                    continue
                largest = max(largest, abs(angle))
                c, s = math.cos(angle), math.sin(angle)
                turn = torch.tensor([[c, -s], [s, c]], dtype=h.dtype)
                h[:, :, [p, q]] = h[:, :, [p, q]] @ turn
                h[:, [p, q]] = turn.mT @ h[:, [p, q]]
                rotation[:, [p, q]] = rotation[:, [p, q]] @ turn
        if largest < 1e-3:
            break
    return rotation


def separating_frame(target: Target, fits: MeanFieldFits, *, points: int = 24) -> AffineMap | None:
    """Frame ``x = m + A z`` in which the density separates, or None where the given axes serve as well or none do.

    Arguments:
        target: The density.
        fits: Variational fits; Hessians are taken at their means and one standard deviation away.
        points: Most points to take Hessians at, ``2 D`` evaluations each.
    """
    dim = target.dim
    if dim < 3:
        return None
    mean, spread = fits.pooled()
    unit = fits.scale.log().median(0).values.exp()
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(points) % len(fits)
    noise = torch.randn((points, dim), generator=generator, dtype=mean.dtype)
    x = fits.location[index] + fits.scale[index] * noise
    eye = torch.eye(dim, dtype=mean.dtype)
    step = (1e-4 * unit).unsqueeze(-1) * eye
    score = target.log_prob_and_score(torch.cat([x.unsqueeze(1) + step, x.unsqueeze(1) - step], 1))[1].to(mean.dtype)
    hessian = (score[:, :dim] - score[:, dim:]) / 2e-4 * unit
    hessian = -0.5 * (hessian + hessian.mT)
    if not bool(torch.isfinite(hessian).all()):
        return None
    value, vector = torch.linalg.eigh(hessian)
    size = ((vector * value.abs().unsqueeze(-2)) @ vector.mT).mean(0)
    for _ in range(40):
        # H S^-1 H transforms like H under a linear map, |H| does not; the fixed point does, too.
        solved, failed = torch.linalg.solve_ex(size, hessian)
        if bool(failed.any()):
            return None
        size = 0.5 * (size + (hessian @ solved).mean(0))
    level, basis = torch.linalg.eigh(0.5 * (size + size.mT))
    if float(level[0]) < 1e-10 * float(level[-1]):
        return None
    root = (basis * level.rsqrt()) @ basis.mT
    given = hessian / (size.diagonal().sqrt() * size.diagonal().sqrt().unsqueeze(-1))
    white = root @ hessian @ root
    rotation = joint_diagonalise(white)
    # Worth it only where the axes fail and the frame does not.
    if _off_diagonal(given) < 0.05 or _off_diagonal(rotation.mT @ white @ rotation) > 0.02:
        return None
    return AffineMap(mean, unit.unsqueeze(-1) * (root @ rotation))
