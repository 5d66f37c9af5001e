r"""The terms of a molecular mechanics energy with their gradients, for a batch of configurations.

Atoms come as ``x (3, n, B)``, the batch last, so that one term of all configurations is one contiguous row. Every term
is a function of difference vectors :math:`d = x_j - x_i` and returns its energy ``(B,)`` with the gradients with
respect to its vectors:

.. math::
    E_{bond} = \tfrac12 k (r - r_0)^2, \quad E_{angle} = \tfrac12 k (\theta - \theta_0)^2, \quad
    E_{torsion} = \sum_n k_n (1 + \cos(n \phi - \delta_n)), \quad
    E_{pair} = 4 \epsilon \left(\frac{\sigma^{12}}{r^{12}} - \frac{\sigma^6}{r^6}\right) + \frac{q_i q_j}{r}.

Implicit solvent is the generalized Born energy of Onufriev, Bashford and Case with a surface term. With descreening
:math:`I_i = \sum_j H(r_{ij}; \rho_i, s_j)`, :math:`\psi_i = \rho_i I_i` and :math:`R_i` the radius,

.. math::
    \frac1{B_i} = \frac1{\rho_i} - \frac{\tanh(\alpha\psi_i - \beta\psi_i^2 + \gamma\psi_i^3)}{R_i}, \qquad
    E = -\tau \sum_{i<j} \frac{q_i q_j}{f_{ij}} - \frac{\tau}{2} \sum_i \frac{q_i^2}{B_i}
        + \kappa \sum_i (R_i + 0.14)^2 \left(\frac{R_i}{B_i}\right)^6, \qquad
    f_{ij}^2 = r_{ij}^2 + B_i B_j e^{-r_{ij}^2 / 4 B_i B_j}.

The gradients are written out: they cost as much as the energy, where reverse-mode differentiation costs four times as
much. All functions are differentiable themselves. Units: nm, kJ/mol, elementary charges.

References:
    Exploring protein native states and large-scale conformational changes with a modified generalized Born model
    (Onufriev, Bashford & Case, 2004), https://doi.org/10.1002/prot.20033
    New formulation for derivatives of torsion angles and improper torsion angles in molecular mechanics (Blondel &
    Karplus, 1996), https://doi.org/10.1002/(SICI)1096-987X(19960715)17:9<1132::AID-JCC5>3.0.CO;2-T
    OpenMM 8 (Eastman et al., 2024), https://doi.org/10.1021/acs.jpcb.3c06662
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Pairs", "Solvent", "angles", "bonds", "cross", "pairs", "solvent", "torsions", "turn"]

PROBE = 0.14
"""Radius of the probe of the surface term, nm."""


class Pairs(NamedTuple):
    """Nonbonded parameters, one row for each pair of atoms, shape ``(P, 1)``."""

    charge: Tensor
    """Coulomb constant times the product of charges, kJ/mol nm."""
    square_sigma: Tensor
    four_epsilon: Tensor


class Solvent(NamedTuple):
    """Parameters of the implicit solvent."""

    rho: Tensor
    """Offset radii, ``(n, 1)``."""
    radius: Tensor
    """Radii ``R``, ``(n, 1)``."""
    self_charge: Tensor
    """``tau q^2 / 2``, ``(n, 1)``."""
    surface: Tensor
    """``kappa (R + 0.14)^2 R^6``, ``(n, 1)``."""
    pair_charge: Tensor
    """``tau q_i q_j``, ``(P, 1)``."""
    first_rho: Tensor
    """Offset radius of the descreened atom of each ordered pair, ``(2, P, 1)``."""
    second_scaled: Tensor
    """Scaled radius ``s`` of the descreening atom, ``(2, P, 1)``."""
    collect: Tensor
    """Which atom an ordered pair descreens, ``(n, 2 P)`` of zeros and ones."""
    first: Tensor
    """Index of the first atom of each pair, ``(P,)``."""
    second: Tensor
    """Index of the second atom of each pair, ``(P,)``."""
    alpha: Tensor
    beta: Tensor
    gamma: Tensor
    inside: Tensor
    """One where an atom swallowed by another counts its missing shell, as in OpenMM's GBSAOBCForce, else zero."""


def cross(a: Tensor, b: Tensor) -> Tensor:
    """Cross product along the first axis, ``(3, M, B)``."""
    (a0, a1, a2), (b0, b1, b2) = a.unbind(0), b.unbind(0)
    return torch.stack([a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0])


def bonds(d: Tensor, length: Tensor, constant: Tensor) -> tuple[Tensor, Tensor]:
    """Harmonic bonds along ``d (3, M, B)``, with parameters ``(M, 1)``."""
    r = d.square().sum(0).sqrt()
    slope = constant * (r - length)
    return 0.5 * (slope * (r - length)).sum(0), (slope / r) * d


def angles(a: Tensor, b: Tensor, value: Tensor, constant: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Harmonic angles between the vectors ``a`` and ``b (3, M, B)`` that leave the central atom."""
    sine = cross(a, b).square().sum(0).sqrt()
    cosine = (a * b).sum(0)
    excess = torch.atan2(sine, cosine) - value
    slope = constant * excess
    rate = slope / sine
    along_a, along_b = rate * cosine / a.square().sum(0), rate * cosine / b.square().sum(0)
    return 0.5 * (slope * excess).sum(0), along_a * a - rate * b, along_b * b - rate * a


def turn(u: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """Cosine and sine ``(M, B)`` of the dihedral between successive vectors ``(3, M, B)``.

    The last result turns derivatives with respect to the dihedral into those with respect to the vectors.
    """
    m, n = cross(u, v), cross(v, w)
    length = v.square().sum(0).sqrt()
    x, y = (m * n).sum(0), length * (u * n).sum(0)
    size = (x.square() + y.square()).rsqrt()

    def spread(slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rate_m, rate_n = slope / m.square().sum(0), slope / n.square().sum(0)
        inverse = 1.0 / length
        twist = -(rate_m * (u * v).sum(0) * inverse) * m - (rate_n * (v * w).sum(0) * inverse) * n
        return (rate_m * length) * m, twist, (rate_n * length) * n

    return x * size, y * size, spread


def torsions(u: Tensor, v: Tensor, w: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Fourier series :math:`\sum_n a_n \cos n\phi + b_n \sin n\phi` of the dihedral between successive vectors.

    Arguments:
        u: From the first to the second atom, ``(3, M, B)``.
        v: From the second to the third.
        w: From the third to the fourth.
        cosines: :math:`a_n` for :math:`n = 1, 2, \dots`, ``(h, M, 1)``.
        sines: :math:`b_n`, likewise, or ``(0, M, 1)`` where all are zero.
    """
    c, s, spread = turn(u, v, w)
    energy, slope = cosines[0] * c, -cosines[0] * s
    if len(sines):
        energy, slope = energy + sines[0] * s, slope + sines[0] * c
    c_n, s_n = c, s
    for k in range(1, len(cosines)):
        c_n, s_n = c_n * c - s_n * s, s_n * c + c_n * s
        energy = energy + cosines[k] * c_n
        slope = slope - (k + 1) * cosines[k] * s_n
        if len(sines):
            energy, slope = energy + sines[k] * s_n, slope + (k + 1) * sines[k] * c_n
    return energy.sum(0), *spread(slope)


def pairs(square: Tensor, terms: Pairs) -> tuple[Tensor, Tensor]:
    r"""Lennard-Jones and Coulomb energy of squared distances ``(P, B)``, and the rate that multiplies ``d``.

    The gradient with respect to ``d`` is ``rate * d``, :math:`\mathrm{rate} = E'(r) / r`.
    """
    inverse = 1.0 / square
    u = (terms.square_sigma * inverse) ** 3
    repulsion = terms.four_epsilon * u
    coulomb = terms.charge * inverse.sqrt()
    dispersion = repulsion * u
    rate = -(12.0 * dispersion - 6.0 * repulsion + coulomb) * inverse
    return (dispersion - repulsion + coulomb).sum(0), rate


def _descreening(r: Tensor, rho: Tensor, s: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Integral ``H`` over the part of a sphere ``s`` at distance ``r`` outside of ``rho``, and its slope."""
    far, near = r + s, (r - s).abs()
    low = torch.maximum(rho, near)
    inverse, inverse_far, inverse_low = 1.0 / r, 1.0 / far, 1.0 / low
    gap = 0.25 * (r - s.square() * inverse)
    log = 0.5 * (low * inverse_far).log() * inverse
    difference = inverse_far.square() - inverse_low.square()
    value = 0.5 * (inverse_low - inverse_far + gap * difference + log)
    explicit = 0.25 * (1.0 + (s * inverse).square()) * difference - log * inverse
    by_far = inverse_far.square() - 2.0 * gap * inverse_far**3 - 0.5 * inverse_far * inverse
    by_low = -inverse_low.square() + 2.0 * gap * inverse_low**3 + 0.5 * inverse_low * inverse
    outside = (near > rho).to(r)
    swallowed = inside * (s - r > rho).to(r)
    sign = outside * torch.sign(r - s)
    value = value + swallowed * (1.0 / rho - inverse_low)
    slope = 0.5 * (explicit + by_far + sign * by_low) + swallowed * sign * inverse_low.square()
    reached = (far > rho).to(r)
    return reached * value, reached * slope


def solvent(square: Tensor, terms: Solvent) -> tuple[Tensor, Tensor]:
    """Generalized Born and surface energy of squared distances ``(P, B)``, and the rate that multiplies ``d``."""
    r = square.sqrt()
    value, slope = _descreening(r, terms.first_rho, terms.second_scaled, terms.inside)
    psi = terms.rho * (terms.collect @ value.flatten(0, 1))
    tanh = torch.tanh(psi * (terms.alpha - psi * (terms.beta - psi * terms.gamma)))
    born = 1.0 / (1.0 / terms.rho - tanh / terms.radius)
    born_slope = terms.alpha - psi * (2.0 * terms.beta - 3.0 * psi * terms.gamma)
    born_slope = born.square() * (1.0 - tanh.square()) * born_slope * (terms.rho / terms.radius)
    own, surface = terms.self_charge / born, terms.surface / born**6
    b_first, b_second = born.index_select(0, terms.first), born.index_select(0, terms.second)
    product = b_first * b_second
    reduced = 0.25 * square / product
    shield = torch.exp(-reduced)
    inverse = (square + product * shield).rsqrt()
    energy = -terms.pair_charge * inverse
    # Derivative of the energy with respect to f^2.
    pull = -0.5 * energy * inverse.square()
    by_product = pull * shield * (1.0 + reduced)
    by_born = terms.collect @ torch.cat([by_product * b_second, by_product * b_first])
    by_descreening = (by_born + (own - 6.0 * surface) / born) * born_slope
    rate = by_descreening.index_select(0, terms.first) * slope[0]
    rate = rate + by_descreening.index_select(0, terms.second) * slope[1]
    total = energy.sum(0) + (surface - own).sum(0)
    return total, rate / r + pull * (2.0 - 0.5 * shield)
