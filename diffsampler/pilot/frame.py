r"""A linear frame in which a density falls apart into independent coordinates, where there is one.

If :math:`\rho(x) = \prod_j f_j((A^{-1} x)_j)`, all Hessians of :math:`\log\rho` are :math:`A^{-\top} D(x) A^{-1}` with
diagonal :math:`D(x)`: after whitening by their mean absolute value they share one orthogonal eigenbasis. It is found
without sampling noise, from differences of scores at a few points, by Jacobi rotations.

References:
    Jacobi angles for simultaneous diagonalization (Cardoso & Souloumiac, 1996),
    https://doi.org/10.1137/S0895479893259546
"""

from __future__ import annotations

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


def _rounds(dim: int) -> list[tuple[Tensor, Tensor]]:
    """All pairs of coordinates in rounds of disjoint pairs, as in a tournament where everybody meets everybody."""
    players = list(range(dim)) + ([-1] if dim % 2 else [])
    half, rounds = len(players) // 2, []
    for _ in range(len(players) - 1):
        pairs = [(min(a, b), max(a, b)) for a, b in zip(players[:half], reversed(players[half:]), strict=True)]
        pairs = [pair for pair in pairs if pair[0] >= 0]
        rounds.append((torch.tensor([p for p, _ in pairs]), torch.tensor([q for _, q in pairs])))
        players = [players[0], players[-1], *players[1:-1]]
    return rounds


def joint_diagonalise(matrices: Tensor, *, sweeps: int = 20, tolerance: float = 1e-6) -> Tensor:
    """Orthogonal ``R (D, D)`` that makes ``R.T @ H @ R`` as diagonal as it can for symmetric ``H``, ``(m, D, D)``.

    It starts from the eigenvectors of one random combination, exact where the matrices commute. Disjoint pairs are
    turned at once.
    """
    dim = matrices.shape[-1]
    weight = torch.randn(matrices.shape[0], generator=torch.Generator().manual_seed(0), dtype=matrices.dtype)
    rotation = torch.linalg.eigh((weight[:, None, None] * matrices).sum(0))[1]
    off = _off_diagonal(rotation.mT @ matrices @ rotation)
    # Rows first: turns of rows are then turns of contiguous blocks.
    h, turned = (rotation.mT @ matrices @ rotation).permute(1, 2, 0).contiguous(), rotation.mT.contiguous()
    rounds = _rounds(dim)
    for _ in range(sweeps):
        for p, q in rounds:
            a, b = h[p, p] - h[q, q], 2.0 * h[p, q]
            angle = 0.25 * torch.atan2(2.0 * (a * b).sum(-1), (a.square() - b.square()).sum(-1))
            if float(angle.abs().max()) < tolerance:
                continue
            c, s = angle.cos().unsqueeze(-1), angle.sin().unsqueeze(-1)
            turned[p], turned[q] = c * turned[p] + s * turned[q], c * turned[q] - s * turned[p]
            for x in (h, h.transpose(0, 1)):
                left, right = x[p], x[q]
                x[p], x[q] = c[..., None] * left + s[..., None] * right, c[..., None] * right - s[..., None] * left
        before, off = off, _off_diagonal(h.permute(2, 0, 1))
        if off > 0.999 * before or off < 1e-9:
            break
    return turned.mT.contiguous()


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
