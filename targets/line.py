r"""One-dimensional densities, tabulated: the factors that several targets are made of.

For a log density :math:`f` on an interval :math:`[a, b]` outside of which :math:`e^f` is negligible, the trapezoidal
rule on :math:`N` equal cells of width :math:`h` gives

.. math:: Z = \int_a^b e^{f(t)} dt, \qquad P(t) = \frac{1}{Z} \int_a^t e^{f(s)} ds, \qquad t = P^{-1}(u).

The rule converges faster than any power of :math:`h` for smooth densities that vanish at both ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from diffsampler.targets import draws

__all__ = ["LineDensity"]


@final
class LineDensity(nn.Module):
    """A normalizing constant, masses of intervals and an inverse distribution function, by quadrature.

    Inside a cell the density is taken to be linear, so distribution functions are exact to ``O(h**2)``, about 1e-9 for
    the targets of this package: far below anything that samples can show.

    Arguments:
        log_density: Unnormalized log density, float64 ``(m,) -> (m,)``; ``-inf`` is allowed.
        low: Lower end of the interval.
        high: Upper end of the interval.
        cells: Number of equal cells.

    Raises:
        ValueError: If the interval is empty or cuts off a visible part of the density.
    """

    points: Tensor
    density: Tensor
    distribution: Tensor

    def __init__(
        self, log_density: Callable[[Tensor], Tensor], *, low: float, high: float, cells: int = 100_000
    ) -> None:
        super().__init__()
        if not low < high:
            raise ValueError(f"Expected low < high; got low={low} and high={high}.")
        points = torch.linspace(low, high, cells + 1, dtype=torch.float64)
        log_values = log_density(points)
        top = log_values.max()
        density = (log_values - top).exp()
        if max(density[0].item(), density[-1].item()) > 1e-10:
            raise ValueError(f"Expected the density to vanish at both ends of [{low}, {high}].")
        width = (high - low) / cells
        distribution = torch.cat([density.new_zeros(1), torch.cumsum(0.5 * width * (density[1:] + density[:-1]), 0)])
        total = distribution[-1]
        self.log_normalizer = (top + total.log()).item()
        self.register_buffer("points", points, persistent=False)
        self.register_buffer("density", density / total, persistent=False)
        self.register_buffer("distribution", distribution / total, persistent=False)

    def mass(self, low: float, high: float) -> float:
        """Probability of the interval from ``low`` to ``high``."""
        ends = self.points.new_tensor([low, high]).clamp(self.points[0], self.points[-1])
        cell, offset = self._locate(ends)
        width = self.points[1] - self.points[0]
        left, right = self.density[cell], self.density[cell + 1]
        below = self.distribution[cell] + offset * (left + 0.5 * offset * (right - left) / width)
        return (below[1] - below[0]).item()

    def quantile(self, u: Tensor) -> Tensor:
        """Inverse distribution function at ``u`` in [0, 1), any shape, float64."""
        points, density, distribution = self.points.to(u), self.density.to(u), self.distribution.to(u)
        cell = torch.searchsorted(distribution, u, right=True).sub(1).clamp(0, density.numel() - 2)
        width = points[1] - points[0]
        left, right = density[cell], density[cell + 1]
        rest = u - distribution[cell]
        # Root of left * s + (right - left) / (2 width) * s**2 = rest in the form that does not cancel.
        root = (left.square() + 2.0 * rest * (right - left) / width).clamp_min(0.0).sqrt()
        offset = torch.where(rest > 0, 2.0 * rest / (left + root), torch.zeros_like(rest))
        return points[cell] + torch.minimum(offset, width)

    def sample(self, shape: tuple[int, ...], *, generator: torch.Generator | None = None) -> Tensor:
        """Independent draws, float64."""
        return self.quantile(draws.uniform(*shape, generator=generator, like=self.points))

    def _locate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        cell = torch.searchsorted(self.points, x, right=True).sub(1).clamp(0, self.points.numel() - 2)
        return cell, x - self.points[cell]
