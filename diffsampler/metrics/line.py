r"""Distances between weighted samples of numbers: energies, distances, bond lengths."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["shares", "total_variation", "wasserstein_line"]


def shares(x: Tensor, log_weight: Tensor | None, *, name: str = "x") -> Tensor:
    """Weights ``(n,)`` of the samples ``x (n, ...)`` that sum to one, float64; equal without log weights.

    Raises:
        ValueError: If there are no samples, a weight is missing, or no weight is positive and finite.
    """
    if x.ndim == 0 or len(x) == 0:
        raise ValueError(f"Expected at least one sample in {name}; got shape {tuple(x.shape)}.")
    if log_weight is None:
        return torch.full((len(x),), 1.0 / len(x), dtype=torch.float64, device=x.device)
    if log_weight.shape != x.shape[:1]:
        raise ValueError(
            f"Expected log weights of {name} of shape {tuple(x.shape[:1])}; got {tuple(log_weight.shape)}."
        )
    share = torch.softmax(log_weight.detach().double(), 0)
    if not bool(torch.isfinite(share).all()):
        raise ValueError(f"Expected log weights of {name} that are finite or -inf, one of them finite; got others.")
    return share


def wasserstein_line(
    x: Tensor,
    y: Tensor,
    *,
    order: float = 2.0,
    x_log_weight: Tensor | None = None,
    y_log_weight: Tensor | None = None,
) -> float:
    r"""Wasserstein distance between two weighted samples of numbers, exactly.

    .. math:: W_p(x, y) = \left(\int_0^1 |F_x^{-1}(u) - F_y^{-1}(u)|^p\, du\right)^{1/p}

    With energies as numbers and ``order=2`` this is the energy distance of the tables on particle systems; the root is
    taken there as it is here.

    Arguments:
        x: Numbers, shape ``(n,)``.
        y: Numbers, shape ``(m,)``; the sizes may differ.
        order: Order :math:`p \ge 1`.
        x_log_weight: Log weights of ``x``, shape ``(n,)``; equal by default.
        y_log_weight: Log weights of ``y``, shape ``(m,)``; equal by default.

    Raises:
        ValueError: If a shape is wrong or a number is not finite; lost particles must be removed and reported first.
    """
    if not order >= 1.0:
        raise ValueError(f"Expected order to be at least 1; got {order}.")
    (x, p), (y, q) = _sorted(x, x_log_weight, "x"), _sorted(y, y_log_weight, "y")
    below_x, below_y = p.cumsum(0), q.cumsum(0)
    # Rounding must not leave a sliver of mass behind the last sample.
    below_x, below_y = below_x / below_x[-1], below_y / below_y[-1]
    levels = torch.cat([below_x, below_y]).sort().values
    mass = torch.diff(levels, prepend=levels.new_zeros(1))
    middle = levels - 0.5 * mass
    of_x = x[torch.searchsorted(below_x, middle).clamp_max(len(x) - 1)]
    of_y = y[torch.searchsorted(below_y, middle).clamp_max(len(y) - 1)]
    return float(((of_x - of_y).abs().pow(order) * mass).sum() ** (1.0 / order))


def total_variation(
    x: Tensor,
    y: Tensor,
    *,
    bins: int = 200,
    limits: tuple[float, float] | None = None,
    x_log_weight: Tensor | None = None,
    y_log_weight: Tensor | None = None,
) -> float:
    r"""Total variation between two weighted histograms, :math:`\tfrac12 \sum_b |p_b - q_b|`, in [0, 1].

    Mass outside the limits counts in one further bin on each side. The value depends on the number of bins and of
    samples: two sets of ``n`` exact samples differ by about :math:`\sqrt{b / (\pi n)}` with ``b`` occupied bins.

    Arguments:
        x: Numbers, shape ``(n,)``.
        y: Numbers, shape ``(m,)``.
        bins: Number of equal bins.
        limits: Range of the bins; by default that of both samples together.
        x_log_weight: Log weights of ``x``; equal by default.
        y_log_weight: Log weights of ``y``; equal by default.
    """
    if bins < 1:
        raise ValueError(f"Expected bins to be at least 1; got {bins}.")
    (x, p), (y, q) = _sorted(x, x_log_weight, "x"), _sorted(y, y_log_weight, "y")
    low, high = (min(float(x[0]), float(y[0])), max(float(x[-1]), float(y[-1]))) if limits is None else limits
    if low > high or (limits is not None and low == high):
        raise ValueError(f"Expected limits in increasing order; got {limits}.")
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64, device=x.device)

    def histogram(values: Tensor, share: Tensor) -> Tensor:
        # The last bin is closed, so that the largest sample is inside.
        index = torch.where(values == high, bins, torch.searchsorted(edges, values, right=True))
        return torch.zeros(bins + 2, dtype=torch.float64, device=x.device).index_add(0, index, share)

    return 0.5 * float((histogram(x, p) - histogram(y, q)).abs().sum())


def _sorted(x: Tensor, log_weight: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """Numbers in increasing order with their shares."""
    if x.ndim != 1:
        raise ValueError(f"Expected {name} of shape (n,); got {tuple(x.shape)}.")
    share = shares(x, log_weight, name=name)
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"Expected finite numbers in {name}; got {int((~torch.isfinite(x)).sum())} that are not.")
    ordered, index = x.detach().double().sort()
    return ordered, share[index]
