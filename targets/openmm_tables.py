"""Lennard-Jones parameters that OpenMM writes as tables over pairs of atom types, as it does for CHARMM.

A CustomNonbondedForce gives :math:`A_{ij} / r^{12} - B_{ij} / r^6` for all pairs but exclusions, and a CustomBondForce
the pairs that are three bonds apart; charges stay in the NonbondedForce. Together they are one table of exceptions, in
which every pair has parameters of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["lennard_jones_tables"]

TABLE = "acoef(type1,type2)/r^12-bcoef(type1,type2)/r^6"
SINGLE = "4*epsilon*((sigma/r)^12-(sigma/r)^6)"


def lennard_jones_tables(forces: Sequence[Any], entries: dict[str, Any]) -> dict[str, Tensor]:
    """Exceptions for all pairs.

    Arguments:
        forces: The custom forces of a system.
        entries: Charges and exceptions of its NonbondedForce, as the fields of a system.

    Raises:
        ValueError: If a force is another one, or the NonbondedForce has Lennard-Jones terms of its own.
    """
    n = len(entries["charge"])
    charge = entries["charge"].unsqueeze(1) * entries["charge"]
    first, second = entries["exception_atoms"].unbind(1)
    charge[first, second] = charge[second, first] = entries["exception_charge"]
    if bool((entries["epsilon"] != 0).any()) or bool((entries["exception_epsilon"] != 0).any()):
        raise ValueError("Expected Lennard-Jones terms in one kind of force; got tables beside a NonbondedForce's.")
    repulsion, attraction = charge.new_zeros(n, n), charge.new_zeros(n, n)
    for force in forces:
        expression = force.getEnergyFunction().replace(" ", "").rstrip(";")
        if type(force).__name__ == "CustomNonbondedForce" and expression == TABLE:
            a, b = _table(force)
        elif type(force).__name__ == "CustomBondForce" and expression == SINGLE:
            a, b = _single(force, n)
        else:
            raise ValueError(f"Expected custom forces that are Lennard-Jones terms; got {force.getEnergyFunction()}.")
        repulsion, attraction = repulsion + a, attraction + b
    rows, columns = torch.triu_indices(n, n, 1).unbind(0)
    a, b = repulsion[rows, columns], attraction[rows, columns]
    if bool(((a > 0) != (b > 0)).any()):
        raise ValueError("Expected Lennard-Jones terms with repulsion and attraction; got pairs with one of them.")
    alive = a > 0
    one = torch.ones_like(a)
    return {
        "exception_atoms": torch.stack([rows, columns], 1),
        "exception_charge": charge[rows, columns],
        "exception_sigma": torch.where(alive, a / torch.where(alive, b, one), one) ** (1.0 / 6.0),
        "exception_epsilon": torch.where(alive, b.square() / (4.0 * torch.where(alive, a, one)), 0.0 * one),
    }


def _table(force: Any) -> tuple[Tensor, Tensor]:
    if force.getNonbondedMethod() != force.NoCutoff:
        raise ValueError("Expected a CustomNonbondedForce without cut-off; got one with.")
    if force.getNumInteractionGroups():
        raise ValueError("Expected a CustomNonbondedForce between all atoms; got interaction groups.")
    kind = torch.tensor([int(force.getParticleParameters(i)[0]) for i in range(force.getNumParticles())])
    found = {}
    for k in range(force.getNumTabulatedFunctions()):
        size, _, values = force.getTabulatedFunction(k).getFunctionParameters()
        # The first index runs fastest; both orders of a pair are the same.
        table = torch.tensor(values, dtype=torch.float64).reshape(size, -1)
        found[force.getTabulatedFunctionName(k)] = table[kind][:, kind]
    for k in range(force.getNumExclusions()):
        i, j = force.getExclusionParticles(k)
        for table in found.values():
            table[i, j] = table[j, i] = 0.0
    return found["acoef"], found["bcoef"]


def _single(force: Any, n: int) -> tuple[Tensor, Tensor]:
    names = [force.getPerBondParameterName(k) for k in range(force.getNumPerBondParameters())]
    a, b = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    for k in range(force.getNumBonds()):
        i, j, values = force.getBondParameters(k)
        sigma, epsilon = values[names.index("sigma")], values[names.index("epsilon")]
        for row, column in ((i, j), (j, i)):
            a[row, column] += 4.0 * epsilon * sigma**12
            b[row, column] += 4.0 * epsilon * sigma**6
    return a, b
