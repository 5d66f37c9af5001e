r"""Draws of a density that separates, from its profiles along the axes.

If :math:`\log\rho(z) = \sum_i f_i(z_i)`, the line through any point along axis :math:`i` shows :math:`f_i` whole, up
to a constant: the marginal law of every coordinate follows by quadrature, all :math:`2^D` combinations of wells
included, whether or not any particle ever visited them. Where the density does not separate, the draws are wrong, and
the importance weights of a law fitted to them say so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffsampler.target import Target

__all__ = ["profile_draws"]

GRID = 2001
REACH = 40.0


def profile_draws(
    target: Target, point: Tensor, n: int, *, reach: float = REACH, generator: torch.Generator | None = None
) -> Tensor | None:
    """Draws with independent coordinates from the profiles through ``point``, shape ``(n, D)``; None if not finite.

    Arguments:
        target: The density, in coordinates of about unit scale.
        point: A typical point, shape ``(D,)``, float64.
        n: Number of draws.
        reach: How far the lines go to either side.
        generator: Source of randomness.
    """
    dim = point.shape[0]
    # Fine where the mass is known to be, coarse far out: sinh spacing.
    u = torch.linspace(-1.0, 1.0, GRID, dtype=point.dtype, device=point.device)
    grid = reach * torch.sinh(4.0 * u) / torch.sinh(u.new_tensor(4.0))
    lines = point.expand(dim, GRID, dim).clone()
    index = torch.arange(dim, device=point.device)
    lines[index, :, index] = grid
    log_prob = target.log_prob(lines.reshape(-1, dim)).double().reshape(dim, GRID)
    log_prob = torch.where(log_prob.isnan(), -torch.inf, log_prob)
    if not bool(log_prob.amax(-1).isfinite().all()):
        return None
    density = (log_prob - log_prob.amax(-1, keepdim=True)).exp()
    mass = 0.5 * (density[:, 1:] + density[:, :-1]) * grid.diff()
    passed = torch.nn.functional.pad(mass.cumsum(-1), (1, 0))
    uniform = torch.rand(dim, n, generator=generator, dtype=point.dtype, device=point.device) * passed[:, -1:]
    right = torch.searchsorted(passed, uniform).clamp(1, GRID - 1)
    low, high = passed.gather(1, right - 1), passed.gather(1, right)
    share = ((uniform - low) / (high - low).clamp_min(1e-300)).clamp(0.0, 1.0)
    start = grid[right - 1]
    return (start + share * (grid[right] - start)).mT.contiguous()
