r"""Molecular mechanics energies of batches of configurations.

:class:`ForceField` turns a record of parameters, a :class:`~diffsampler.targets.molecular_system.MolecularSystem`, into
an energy in kJ/mol of positions in nm with a hand-written gradient; see :mod:`diffsampler.targets.force_terms` for the
formulas.

All pairs of atoms interact (no cutoff, no periodic box, no constraints), so the cost grows with the square of the
number of atoms: this is for molecules of up to a hundred or so. Energies agree with OpenMM to 1e-10 kJ/mol in float64
and to 1e-3 kJ/mol in float32. Two atoms at the same place give an energy that is not finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from diffsampler.targets import checks
from diffsampler.targets.correction_maps import MapTerms, map_terms, maps
from diffsampler.targets.force_terms import PROBE, Pairs, Solvent, angles, bonds, pairs, solvent, torsions, turn
from diffsampler.targets.molecular_system import ImplicitSolvent, MolecularSystem

__all__ = ["ForceField"]

CHUNK = 256
"""Configurations of a small molecule that a processor evaluates at once: intermediate results stay in its cache."""
CHUNK_NUMBERS = 200_000
"""Numbers of an intermediate result above which chunks become smaller."""
DEVICE_FACTOR = 64
"""How much larger both are on other devices, which are slow on small tensors."""


class _Terms(NamedTuple):
    """What one evaluation needs, ready for rows of configurations; see :mod:`diffsampler.targets.force_terms`."""

    start: Tensor
    """First atom of every difference vector: bonds, both arms of angles, three of each torsion, pairs; ``(M,)``."""
    end: Tensor
    collect: Tensor
    """From gradients of difference vectors to those of atoms, ``(n, M)``."""
    bond_length: Tensor
    bond_constant: Tensor
    angle_value: Tensor
    angle_constant: Tensor
    torsion_cosines: Tensor
    torsion_sines: Tensor
    constant: Tensor
    pairs: Pairs
    solvent: Solvent | None
    maps: MapTerms | None

    def map(self, function: Callable[[Tensor], Tensor]) -> _Terms:
        plain = {k: function(v) for k, v in self._asdict().items() if isinstance(v, Tensor)}
        inner = None if self.solvent is None else Solvent(*map(function, self.solvent))
        tables = None if self.maps is None else MapTerms(*map(function, self.maps))
        return _Terms(**plain, pairs=Pairs(*map(function, self.pairs)), solvent=inner, maps=tables)


PARTS: dict[str, Any] = {"pairs": Pairs, "solvent": Solvent, "maps": MapTerms}


def _evaluate(x: Tensor, terms: _Terms) -> tuple[Tensor, Tensor]:
    """Energies ``(B,)`` and gradients with respect to difference vectors ``(3, M, B)`` at ``x (3, n, B)``."""
    d = x.index_select(1, terms.end) - x.index_select(1, terms.start)
    b, a, t = len(terms.bond_length), len(terms.angle_value), terms.torsion_cosines.shape[1]
    p, c = len(terms.pairs.charge), 0 if terms.maps is None else 2 * len(terms.maps.offset)
    bond, arm_a, arm_b, u, v, w, *turns, pair = d.split([b, a, a, t, t, t, c, c, c, p], 1)
    bond_energy, *bond_slopes = bonds(bond, terms.bond_length, terms.bond_constant)
    angle_energy, *angle_slopes = angles(arm_a, arm_b, terms.angle_value, terms.angle_constant)
    torsion_energy, *torsion_slopes = torsions(u, v, w, terms.torsion_cosines, terms.torsion_sines)
    square = pair.square().sum(0)
    pair_energy, rate = pairs(square, terms.pairs)
    energy = bond_energy + angle_energy + torsion_energy + pair_energy + terms.constant
    if terms.solvent is not None:
        solvent_energy, solvent_rate = solvent(square, terms.solvent)
        energy, rate = energy + solvent_energy, rate + solvent_rate
    map_slopes: tuple[Tensor, ...] = ()
    if terms.maps is not None:
        cosine, sine, spread = turn(*turns)
        first, second = torch.atan2(sine, cosine).chunk(2)
        map_energy, *by_angle = maps(first, second, terms.maps)
        energy, map_slopes = energy + map_energy, spread(torch.cat(by_angle))
    return energy, torch.cat([*bond_slopes, *angle_slopes, *torsion_slopes, *map_slopes, rate * pair], 1)


def _energy(x: Tensor, terms: _Terms) -> Tensor:
    return _evaluate(x, terms)[0]


def _energy_and_gradient(x: Tensor, terms: _Terms) -> tuple[Tensor, Tensor]:
    energy, slopes = _evaluate(x, terms)
    return energy, terms.collect @ slopes


@final
class ForceField(nn.Module):
    """Energies in kJ/mol of positions in nm, with the parameters of ``system``.

    Configurations are evaluated in chunks whose intermediate results stay in the cache. With ``compiled`` the gradient
    is compiled on first use for full chunks in the dtype at hand (half a minute, needs a C++ compiler); where that
    fails the same function runs uncompiled, and ``compile_failure`` says why.

    Arguments:
        system: The parameters.
        compiled: Whether :meth:`energy_and_gradient` is compiled.
    """

    def __init__(self, system: MolecularSystem, *, compiled: bool = False) -> None:
        super().__init__()
        if not isinstance(system, MolecularSystem):
            raise TypeError(f"Expected system to be a MolecularSystem; got {type(system).__name__}.")
        self.system = system
        self.compiled = compiled
        self.compile_failure: str | None = None
        self._compiled_function: Callable[[Tensor, _Terms], tuple[Tensor, Tensor]] | None = None
        terms = _terms(system)
        self._num_pairs = len(terms.pairs.charge)
        self._parts = [name for name in PARTS if getattr(terms, name) is not None]
        for name, value in _flat(terms).items():
            self.register_buffer(name, value)

    def energy(self, x: Tensor) -> Tensor:
        """Energies of positions ``(..., n, 3)``, shape ``(...)``; differentiable twice."""
        self._check(x)
        flat = x.reshape(-1, *x.shape[-2:])
        terms = self._terms_for(x)
        parts = [_energy(part.permute(2, 1, 0).contiguous(), terms) for part in flat.split(self._chunk(x))]
        return torch.cat(parts).reshape(x.shape[:-2]) if parts else flat.new_zeros(x.shape[:-2])

    @torch.no_grad()
    def energy_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies ``(...)`` and their gradients ``(..., n, 3)`` at positions ``(..., n, 3)``, without a graph."""
        self._check(x)
        flat = x.reshape(-1, *x.shape[-2:])
        terms = self._terms_for(x)
        energy, gradient = flat.new_empty(len(flat)), torch.empty_like(flat)
        chunk = self._chunk(x)
        for start in range(0, len(flat), chunk):
            part = flat[start : start + chunk].permute(2, 1, 0).contiguous()
            value, slope = self._evaluate_chunk(part, terms, chunk)
            energy[start : start + chunk] = value
            gradient[start : start + chunk] = slope.permute(2, 1, 0)
        return energy.reshape(x.shape[:-2]), gradient.reshape(x.shape)

    def __getstate__(self) -> dict[str, Any]:
        # Compiled functions cannot be copied; they are made anew on first use.
        return {**self.__dict__, "_compiled_function": None}

    def _evaluate_chunk(self, part: Tensor, terms: _Terms, chunk: int) -> tuple[Tensor, Tensor]:
        count = part.shape[-1]
        # A small remainder is not worth a full chunk's work.
        if not self.compiled or self.compile_failure is not None or 4 * count < chunk:
            return _energy_and_gradient(part, terms)
        if count < chunk:
            part = torch.cat([part, part[..., :1].expand(*part.shape[:-1], chunk - count)], -1)
        if self._compiled_function is None:
            self._compiled_function = torch.compile(_energy_and_gradient, dynamic=False)
        try:
            energy, gradient = self._compiled_function(part, terms)
        except Exception as error:  # noqa: BLE001 - whatever the compiler lacks, the answer is the same without it
            self.compile_failure = f"{type(error).__name__}: {error}"[:2000]
            energy, gradient = _energy_and_gradient(part, terms)
        return energy[:count], gradient[..., :count]

    def _chunk(self, x: Tensor) -> int:
        factor = 1 if x.device.type == "cpu" else DEVICE_FACTOR
        return factor * max(min(CHUNK, CHUNK_NUMBERS // max(self._num_pairs, 1)), 16)

    def _check(self, x: Tensor) -> None:
        if x.ndim < 2 or tuple(x.shape[-2:]) != (self.system.num_atoms, 3):
            raise ValueError(f"Expected positions of shape (..., {self.system.num_atoms}, 3); got {tuple(x.shape)}.")

    def _terms_for(self, x: Tensor) -> _Terms:
        buffers = dict(self.named_buffers())
        parts: dict[str, Any] = dict.fromkeys(PARTS)
        for part in self._parts:
            parts[part] = PARTS[part](*(buffers[f"{part}_{name}"] for name in PARTS[part]._fields))
        terms = _Terms(**{name: buffers[name] for name in _Terms._fields if name not in PARTS} | parts)
        return terms.map(lambda v: v.to(x) if v.is_floating_point() else v.to(x.device))


def _flat(terms: _Terms) -> dict[str, Tensor]:
    flat = {name: value for name, value in terms._asdict().items() if isinstance(value, Tensor)}
    for part in PARTS:
        record = getattr(terms, part)
        flat |= {} if record is None else {f"{part}_{name}": value for name, value in record._asdict().items()}
    return flat


def _terms(system: MolecularSystem) -> _Terms:
    n = system.num_atoms
    checks.integer("number of atoms", n, minimum=2)
    first, second = torch.triu_indices(n, n, 1).unbind(0)
    quads, cosines, sines, constant = _fourier(system)
    i, j, k = system.angle_atoms.unbind(1)
    pairs_of = quads.new_zeros(0, 8) if system.maps is None else system.maps.atoms
    turns = torch.cat([pairs_of[:, :4], pairs_of[:, 4:]])
    start = torch.cat([system.bond_atoms[:, 0], j, j, *quads[:, :3].unbind(1), *turns[:, :3].unbind(1), first])
    end = torch.cat([system.bond_atoms[:, 1], i, k, *quads[:, 1:].unbind(1), *turns[:, 1:].unbind(1), second])
    one_hot = nn.functional.one_hot
    collect = (one_hot(end, n) - one_hot(start, n)).mT.to(torch.float64).contiguous()
    pair_terms = _pair_terms(system, first, second)
    # Pairs that do not interact at all need no row; the solvent, however, knows no exceptions.
    if system.solvent is None:
        alive = ((pair_terms.charge != 0) | (pair_terms.four_epsilon != 0)).squeeze(1)
        keep = torch.cat([torch.ones(len(start) - len(first), dtype=torch.bool), alive])
        start, end, collect = start[keep], end[keep], collect[:, keep].contiguous()
        pair_terms = Pairs(*(value[alive] for value in pair_terms))
    return _Terms(
        start=start,
        end=end,
        collect=collect,
        bond_length=system.bond_length.unsqueeze(1),
        bond_constant=system.bond_constant.unsqueeze(1),
        angle_value=system.angle_value.unsqueeze(1),
        angle_constant=system.angle_constant.unsqueeze(1),
        torsion_cosines=cosines,
        torsion_sines=sines,
        constant=constant,
        pairs=pair_terms,
        solvent=None if system.solvent is None else _solvent_terms(system.solvent, first, second),
        maps=None if system.maps is None else map_terms(system.maps),
    )


def _fourier(system: MolecularSystem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distinct dihedrals ``(M, 4)`` and their series: cosines and sines ``(h, M, 1)``, and the constant."""
    alive = system.torsion_constant != 0
    atoms, constant = system.torsion_atoms[alive], system.torsion_constant[alive]
    period, phase = system.torsion_period[alive], system.torsion_phase[alive]
    # Read backwards, a dihedral is the same.
    atoms = torch.where((atoms[:, :1] > atoms[:, 3:]), atoms.flip(1), atoms)
    quads, place = torch.unique(atoms, dim=0, return_inverse=True)
    order = max(int(period.max()), 1) if len(period) else 1
    cosines = constant.new_zeros(order, len(quads)).index_put((period - 1, place), constant * phase.cos(), True)  # noqa: FBT003
    # A phase of pi has a sine of 1e-16, which is not worth a series.
    sine = torch.where(phase.sin().abs() > 1e-12, phase.sin(), torch.zeros_like(phase))
    sines = constant.new_zeros(order, len(quads)).index_put((period - 1, place), constant * sine, True)  # noqa: FBT003
    if not bool((sines != 0).any()):
        sines = sines[:0]
    return quads, cosines.unsqueeze(-1), sines.unsqueeze(-1), constant.sum()


def _pair_terms(system: MolecularSystem, first: Tensor, second: Tensor) -> Pairs:
    n = system.num_atoms
    charge = system.charge[first] * system.charge[second]
    sigma = 0.5 * (system.sigma[first] + system.sigma[second])
    epsilon = (system.epsilon[first] * system.epsilon[second]).sqrt()
    row = torch.full((n, n), -1, dtype=torch.int64)
    row[first, second] = torch.arange(len(first))
    place = row[system.exception_atoms.amin(1), system.exception_atoms.amax(1)]
    charge[place], sigma[place] = system.exception_charge, system.exception_sigma
    epsilon[place] = system.exception_epsilon
    return Pairs(*(v.unsqueeze(1) for v in (system.coulomb * charge, sigma.square(), 4.0 * epsilon)))


def _solvent_terms(model: ImplicitSolvent, first: Tensor, second: Tensor) -> Solvent:
    rho, n = model.radius - model.offset, len(model.radius)
    scaled = model.scale * rho
    alpha, beta, gamma = (rho.new_tensor(value) for value in model.tanh)
    return Solvent(
        rho=rho.unsqueeze(1),
        radius=model.radius.unsqueeze(1),
        self_charge=0.5 * model.strength * model.charge.square().unsqueeze(1),
        surface=(model.surface * (model.radius + PROBE).square() * model.radius**6).unsqueeze(1),
        pair_charge=(model.strength * model.charge[first] * model.charge[second]).unsqueeze(1),
        first_rho=torch.stack([rho[first], rho[second]]).unsqueeze(-1),
        second_scaled=torch.stack([scaled[second], scaled[first]]).unsqueeze(-1),
        collect=nn.functional.one_hot(torch.cat([first, second]), n).mT.to(rho).contiguous(),
        first=first,
        second=second,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        inside=rho.new_tensor(float(model.swallow)),
    )
