r"""Free energies over two dihedral angles (Ramachandran plots) of weighted configurations, side by side.

.. math:: F(\phi, \psi) = -\log \sum_i w_i\, 1[(\phi_i, \psi_i) \in \mathrm{cell}] + \mathrm{const}, \qquad \min F = 0,

in kT. Cells without a draw have no free energy and stay white: an empty basin must not look like a shallow one. As in
:mod:`diffsampler.plotting`, figures belong to nobody and Matplotlib is imported on first use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffsampler.plotting import COLORS, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["free_energy_surface", "ramachandran"]


def free_energy_surface(angles: Tensor, log_weight: Tensor | None = None, *, bins: int = 36) -> Tensor:
    """Free energies of the cells of a periodic grid, in kT over the lowest; infinite where there is no draw.

    Arguments:
        angles: Pairs of angles in radians, any multiple of a turn, ``(..., 2)``.
        log_weight: Their log weights, ``(...)``; equal by default. Draws with infinite or NaN weight are refused.
        bins: Cells per angle, which start at -pi.

    Returns:
        ``(bins, bins)``, float64, the first angle first.

    Raises:
        ValueError: If shapes disagree, there are no draws, or a weight is NaN or infinitely large.
    """
    if angles.ndim < 2 or angles.shape[-1] != 2 or not angles.numel():
        raise ValueError(f"Expected angles of shape (..., 2) of at least one draw; got {tuple(angles.shape)}.")
    flat = angles.detach().double().reshape(-1, 2).cpu()
    weight = torch.zeros(len(flat), dtype=torch.float64)
    if log_weight is not None:
        if log_weight.shape != angles.shape[:-1]:
            raise ValueError(f"Expected log_weight of shape {tuple(angles.shape[:-1])}; got {tuple(log_weight.shape)}.")
        weight = log_weight.detach().double().reshape(-1).cpu()
        if not bool((weight < math.inf).all()):
            raise ValueError("Expected log weights below infinity; got some that are not.")
    turn = torch.remainder(flat + math.pi, 2.0 * math.pi) / (2.0 * math.pi)
    cell = (turn * bins).long().clamp_max(bins - 1)
    mass = torch.zeros(bins * bins, dtype=torch.float64).index_add(
        0, cell[:, 0] * bins + cell[:, 1], torch.softmax(weight, 0)
    )
    return -(mass / mass.max()).log().reshape(bins, bins)


def ramachandran(surfaces: Mapping[str, Tensor], *, highest: float = 12.0, title: str = "") -> Figure:
    """Free-energy surfaces on one colour scale, and the profiles over the first angle in a last panel.

    Arguments:
        surfaces: For each sampler its surface ``(bins, bins)`` in kT, infinite where there is no draw, from
            :func:`free_energy_surface` or a stored reference. Grids may differ.
        highest: Free energy at which the colours end, kT.
        title: Heading of the figure.

    Raises:
        ValueError: If there are no surfaces, or one is not square or has no finite value.
    """
    if not surfaces:
        raise ValueError("Expected at least one surface; got none.")
    for label, surface in surfaces.items():
        if surface.ndim != 2 or surface.shape[0] != surface.shape[1]:
            raise ValueError(f"Expected a surface of shape (bins, bins) for {label}; got {tuple(surface.shape)}.")
        if not bool(surface.isfinite().any()):
            raise ValueError(f"Expected a surface with finite values for {label}; got none.")
    count = len(surfaces)
    with styled(2.9 * count + 3.4, 3.0, 1, count + 1) as (figure, axes):
        image: Any = None
        for ax, (label, surface) in zip(axes[0], surfaces.items(), strict=False):
            shown = surface.double().cpu()
            shown = torch.where(shown.isfinite(), shown - shown[shown.isfinite()].min(), math.nan)
            image = ax.imshow(
                shown.mT.numpy(), origin="lower", extent=(-180, 180, -180, 180), vmin=0.0, vmax=highest, cmap="viridis"
            )
            ax.set(xlabel="φ [°]", ylabel="ψ [°]", title=label)
        figure.colorbar(image, ax=list(axes[0][:count]), label="free energy [kT]", shrink=0.85, extend="max")
        last = axes[0][count]
        for k, (label, surface) in enumerate(surfaces.items()):
            profile = -torch.logsumexp(-surface.double().cpu(), 1)
            centres = (torch.arange(len(profile)) + 0.5) * (360.0 / len(profile)) - 180.0
            profile = torch.where(profile.isfinite(), profile - profile[profile.isfinite()].min(), math.nan)
            last.plot(centres.numpy(), profile.numpy(), color=COLORS[k % len(COLORS)], linewidth=1.4, label=label)
        last.set(xlabel="φ [°]", ylabel="free energy [kT]", xlim=(-180, 180), ylim=(0.0, None))
        for ax in axes[0][:count]:
            ax.set_yticks([-180, -90, 0, 90, 180])
        for ax in axes[0]:
            ax.set_xticks([-180, -90, 0, 90, 180])
        last.legend()
        if title:
            figure.suptitle(title)
    return figure
