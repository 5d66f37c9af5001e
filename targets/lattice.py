r"""The scalar field theory on a periodic lattice, in the hopping form used for Monte Carlo."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from diffsampler.space import Euclidean
from diffsampler.target import Target
from diffsampler.targets import checks

__all__ = ["PhiFour"]

CELLS = 600


@final
class PhiFour(Target):
    r"""A real field on a periodic lattice with a quartic potential.

    .. math:: S(\phi) = \sum_x \left[-2 \kappa \sum_\mu \phi_x \phi_{x + \hat\mu} + (1 - 2 \lambda) \phi_x^2
              + \lambda \phi_x^4\right], \qquad \log \rho = -S

    Sites are numbered in row-major order. With growing hopping :math:`\kappa` the field orders: the magnetization
    :math:`M = \sum_x \phi_x / V` has two modes of equal weight, between which local moves pass ever more rarely; mode
    labels are its sign. On 8 x 8 sites the mean of :math:`|M|` is 0.147, 2.087 and 4.830 at hoppings 0.2, 0.3 and 0.5.
    (The code of SCLD quotes the last two, and 0.6239 for the first, which two independent samplers contradict.) From
    disordered starts at 0.5 local moves leave walls between domains. The hopping term alone would win over
    the quadratic one, so without the quartic term the density exists only for :math:`2 \kappa d < 1`.

    The normalizing constant is exact on a chain (one axis), where :math:`Z = \operatorname{tr} T^V` with the transfer
    operator :math:`T(a, b) = e^{2 \kappa a b - (v(a) + v(b)) / 2}`; on other lattices it is not known.

    Reference: Nicoli et al., "Estimation of thermodynamic observables in lattice field theories with deep generative
    models" (2021, https://arxiv.org/abs/2007.07115).

    Arguments:
        shape: Sites per axis, at least 3 each; every site then has two different neighbours along each axis.
        hopping: :math:`\kappa`.
        coupling: :math:`\lambda \ge 0`.

    Raises:
        ValueError: If an axis is too short, or the density cannot be normalized.
    """

    def __init__(self, shape: Sequence[int] = (8, 8), *, hopping: float = 0.3, coupling: float = 0.022) -> None:
        self._check(shape, hopping, coupling)
        self.hopping = float(hopping)
        self.coupling = float(coupling)
        self.shape = tuple(shape)
        log_z = self._chain_log_normalizer(self.shape[0]) if len(self.shape) == 1 else None
        super().__init__(Euclidean(math.prod(self.shape)), log_normalizer=log_z, num_modes=2)

    @staticmethod
    def _check(shape: Sequence[int], hopping: float, coupling: float) -> None:
        if len(shape) == 0:
            raise ValueError("Expected shape to name at least one axis; got ().")
        for sites in shape:
            checks.integer("sites per axis", sites, minimum=3)
        checks.array("hopping", hopping, ())
        if not (math.isfinite(coupling) and coupling >= 0.0):
            raise ValueError(f"Expected coupling to be at least 0; got {coupling}.")
        if coupling == 0.0 and 2.0 * abs(hopping) * len(shape) >= 1.0:
            limit = 0.5 / len(shape)
            raise ValueError(f"Expected |hopping| below {limit:.4g} without a quartic term; got {hopping}.")

    def log_prob(self, x: Tensor) -> Tensor:
        field = x.unflatten(-1, self.shape)
        return (
            (2.0 * self.hopping * field * self._neighbours(field, (1,)) - self._potential(field))
            .flatten(-len(self.shape))
            .sum(-1)
        )

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            field = x.unflatten(-1, self.shape)
            around = self._neighbours(field, (1, -1))
            # Every bond is seen from both of its ends.
            density = self.hopping * field * around - self._potential(field)
            slope = 2.0 * field * ((1.0 - 2.0 * self.coupling) + 2.0 * self.coupling * field.square())
            score = 2.0 * self.hopping * around - slope
            return density.flatten(-len(self.shape)).sum(-1), score.reshape(x.shape)

    def magnetization(self, x: Tensor) -> Tensor:
        """Mean of the field over the lattice, ``(..., D) -> (...)``."""
        return x.mean(-1)

    def mode_labels(self, x: Tensor) -> Tensor:
        return (self.magnetization(x) > 0).long()

    def mode_weights(self) -> Tensor:
        """One half each, by the symmetry of the action."""
        return torch.tensor([0.5, 0.5], dtype=torch.float64)

    def _neighbours(self, field: Tensor, steps: tuple[int, ...]) -> Tensor:
        axes = range(-len(self.shape), 0)
        return torch.stack([field.roll(-step, axis) for axis in axes for step in steps]).sum(0)

    def _potential(self, field: Tensor) -> Tensor:
        square = field.square()
        return square * ((1.0 - 2.0 * self.coupling) + self.coupling * square)

    def _chain_log_normalizer(self, sites: int) -> float:
        """``log tr T^V`` by the trapezoidal rule, which converges faster than any power of the spacing."""
        # Along the uniform direction the action per site is v(a) - 2 kappa a^2, the least that a field of its size has.
        reach, least = 1.0, 0.0
        while least < 60.0 or reach < 4.0:
            reach *= 1.1
            a = torch.linspace(0.0, reach, 1000, dtype=torch.float64)
            action = self._potential(a) - 2.0 * abs(self.hopping) * a.square()
            least = (action[-1] - action.min()).item()
        a = torch.linspace(-reach, reach, CELLS + 1, dtype=torch.float64)
        exponent = 2.0 * self.hopping * a[:, None] * a - 0.5 * (self._potential(a)[:, None] + self._potential(a))
        top = exponent.max()
        spectrum = torch.linalg.eigvalsh((exponent - top).exp() * (a[1] - a[0]))
        # Negative eigenvalues (of odd functions when neighbours repel) enter with the sign of their power.
        largest = spectrum.abs().max()
        return sites * (top + largest.log()).item() + (spectrum / largest).pow(sites).sum().log().item()
