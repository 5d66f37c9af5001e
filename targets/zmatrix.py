r"""Internal coordinates of a molecule: bond lengths, bond angles and dihedrals along a tree of chemical bonds.

Atom ``k`` sits at distance :math:`b` from its parent ``p``, at the angle :math:`\theta` with ``p``'s own reference
``q``, and at the dihedral :math:`\phi` with a fourth atom ``s``:

.. math:: x_k = x_p - b \cos\theta\, e + b \sin\theta (\cos\phi\, n \times e + \sin\phi\, n), \qquad
          e = \frac{x_p - x_q}{|x_p - x_q|}, \quad n = \frac{(x_q - x_s) \times e}{|(x_q - x_s) \times e|}.

Further children of ``p`` follow the first one, :math:`\phi_k = \phi_1 + \delta_k`, so that one *rotor* turns all of
them and every other dihedral is a stiff *offset*. The measure of ``n`` atoms splits into rigid motions and

.. math:: dx = 8 \pi^2 V \; b_l^2 b_r^2 \sin\theta_r \prod_k b_k^2 \sin\theta_k \; db\, d\theta\, d\phi.

Gradients need no differentiation: a coordinate moves everything beyond it as a rigid body, so its derivative is the
force on, or the torque about its axis of, those atoms; sums over bodies are products with a matrix of zeros and ones.

The tree is exact for any connected molecule with an atom that has two neighbours. In rings the bond that closes the
ring is no coordinate, and its stiffness then couples all dihedrals of the ring.

Coordinates come with the batch last, ``bonds (n - 1, B)``, ``angles (n - 2, B)``, ``dihedrals (n - 3, B)``, atoms as
``x (3, n, B)``, as in :mod:`diffsampler.targets.force_terms`.

Reference: Practical conversion from torsion space to Cartesian space for in silico protein synthesis (Parsons, Holmes,
Rojas, Tsai & Strauss, 2005), https://doi.org/10.1002/jcc.20237
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from diffsampler.targets.force_terms import cross

__all__ = ["Internal", "ZMatrix", "dihedral", "wrap"]


class Internal(NamedTuple):
    """Coordinates of a batch of configurations, or derivatives with respect to them."""

    bonds: Tensor
    """Lengths of all atoms but the centre, ``(n - 1, B)``."""
    angles: Tensor
    """Angles of all atoms but the centre and its left neighbour, ``(n - 2, B)``."""
    dihedrals: Tensor
    """Dihedrals of rotors and offsets of all others, ``(n - 3, B)``."""


def wrap(angle: Tensor) -> Tensor:
    """Angles in [-pi, pi)."""
    return torch.remainder(angle + torch.pi, 2.0 * torch.pi) - torch.pi


def dihedral(x: Tensor, atoms: Tensor | Sequence[Sequence[int]]) -> Tensor:
    """Dihedral angles of atoms ``(m, 4)`` in positions ``(..., n, 3)``, shape ``(..., m)``, in the IUPAC convention."""
    index = torch.as_tensor(atoms, device=x.device)
    i, j, k, l = (x.index_select(-2, column) for column in index.unbind(-1))  # noqa: E741
    u, v, w = j - i, k - j, l - k
    m, n = torch.linalg.cross(u, v), torch.linalg.cross(v, w)
    return torch.atan2(v.norm(dim=-1) * (u * n).sum(-1), (m * n).sum(-1))


class _Row(NamedTuple):
    atom: int
    parent: int
    angle: int
    dihedral: int
    leader: int
    """Place among the rows of the dihedral that this one follows: ROTOR for none, CENTER for the root's own plane."""


ROTOR, CENTER = -1, -2


@final
class ZMatrix(nn.Module):
    """The tree of a molecule and its maps to and from internal coordinates.

    Arguments:
        graph: Chemical bonds, ``(E, 2)``.
        num_atoms: Number of atoms ``n``.
        root: Centre, left and right atom, the latter two bonded to the first; by default the atom with two heavy
            branches that is nearest to all others.

    Attributes:
        order: Atoms in the order of their rows: left, right, then all others; the centre has none.
        rotor: Which dihedrals are rotors, ``(n - 3,)``, boolean.

    Raises:
        ValueError: If the molecule is not connected, too small, or the root does not fit.
    """

    order: Tensor
    rotor: Tensor
    _leader: Tensor
    _following: Tensor
    _parent: Tensor
    _angle: Tensor
    _dihedral: Tensor
    _body: Tensor
    _turned: Tensor

    def __init__(self, graph: Tensor, num_atoms: int, *, root: tuple[int, int, int] | None = None) -> None:
        super().__init__()
        neighbours: list[list[int]] = [[] for _ in range(num_atoms)]
        for first, second in graph.tolist():
            neighbours[first].append(second)
            neighbours[second].append(first)
        self.root = _choose_root(neighbours) if root is None else root
        center, left, right = self.root
        if left == right or not {left, right} <= set(neighbours[center]):
            raise ValueError(f"Expected root (centre, left, right) with two bonds at the centre; got {self.root}.")
        rows = _grow(neighbours, self.root)
        if len(rows) != num_atoms - 3:
            raise ValueError(f"Expected a connected molecule of {num_atoms} atoms; got a part of {len(rows) + 3}.")
        self.rows = tuple(rows)
        self.num_atoms = num_atoms
        self.levels = _levels(rows, self.root)
        order = torch.tensor([left, right, *(row.atom for row in rows)])
        leader = torch.tensor([row.leader for row in rows], dtype=torch.int64)
        self.register_buffer("order", order)
        self.register_buffer("rotor", leader == ROTOR)
        self.register_buffer("_following", (leader >= 0).unsqueeze(1))
        self.register_buffer("_leader", torch.where(leader < 0, torch.arange(len(rows)), leader))
        self.register_buffer("_parent", torch.tensor([center, center, *(row.parent for row in rows)]))
        self.register_buffer("_angle", torch.tensor([left, *(row.angle for row in rows)]))
        self.register_buffer("_dihedral", torch.tensor([row.dihedral for row in rows], dtype=torch.int64))
        body = _bodies(order, self._parent)
        follows = (self._leader == torch.arange(len(rows)).unsqueeze(1)) | torch.eye(len(rows), dtype=torch.bool)
        turned = (follows.double() @ body[2:]).clamp_max(1.0)
        self.register_buffer("_body", body)
        self.register_buffer("_turned", turned)

    def to_cartesian(self, internal: Internal) -> Tensor:
        """Positions ``(3, n, B)``: the centre at the origin, the left atom on the first axis, the right in a plane."""
        b, theta = internal.bonds, internal.angles
        phi = self._full_dihedrals(internal.dihedrals)
        zero = torch.zeros_like(b[0])
        sine, cosine = theta.sin(), theta.cos()
        atoms = [torch.stack([zero, zero, zero]), torch.stack([b[0], zero, zero])]
        atoms.append(torch.stack([b[1] * cosine[0], b[1] * sine[0], zero]))
        x = torch.stack(atoms, 1)
        along, across = -b[2:] * cosine[1:], b[2:] * sine[1:]
        aside, up = across * phi.cos(), across * phi.sin()
        for start, stop, references in self.levels:
            p, q, s = (x.index_select(1, column) for column in references.to(x.device).unbind(1))
            e = p - q
            e = e / e.square().sum(0).sqrt()
            n = cross(q - s, e)
            n = n / n.square().sum(0).sqrt()
            x = torch.cat([x, p + along[start:stop] * e + aside[start:stop] * cross(n, e) + up[start:stop] * n], 1)
        place = torch.cat([self.order.new_tensor([self.root[0]]), self.order]).argsort()
        return x.index_select(1, place)

    def to_internal(self, x: Tensor) -> Internal:
        """Coordinates of positions ``(3, n, B)``; offsets and dihedrals in [-pi, pi)."""
        child, parent = x.index_select(1, self.order), x.index_select(1, self._parent)
        d = child - parent
        bonds = d.square().sum(0).sqrt()
        arm = x.index_select(1, self._angle) - parent[:, 1:]
        angles = torch.atan2(cross(d[:, 1:], arm).square().sum(0).sqrt(), (d[:, 1:] * arm).sum(0))
        quads = torch.stack([self.order[2:], self._parent[2:], self._angle[1:], self._dihedral], 1)
        phi = dihedral(x.permute(2, 1, 0), quads).mT
        leading = phi.index_select(0, self._leader)
        return Internal(bonds, angles, wrap(phi - torch.where(self._following, leading, torch.zeros_like(phi))))

    def log_volume(self, internal: Internal) -> Tensor:
        """``log |dx / d(bonds, angles, dihedrals)|`` without rigid motions, ``(B,)``."""
        return 2.0 * internal.bonds.log().sum(0) + internal.angles.sin().log().sum(0)

    def pull_back(self, x: Tensor, gradient: Tensor) -> Internal:
        """Derivatives of an energy with respect to the coordinates, from those with respect to ``x (3, n, B)``."""
        body, turned = self._body.to(x), self._turned.to(x)
        twist = cross(x, gradient)
        parent = x.index_select(1, self._parent)
        d = x.index_select(1, self.order) - parent
        force = body @ gradient
        bonds = (d * force).sum(0) / d.square().sum(0).sqrt()
        torque = body[1:] @ twist - cross(parent[:, 1:], force[:, 1:])
        arm = x.index_select(1, self._angle) - parent[:, 1:]
        axis = cross(arm, d[:, 1:])
        angles = (axis * torque).sum(0) / axis.square().sum(0).sqrt()
        force = turned @ gradient
        torque = turned @ twist - cross(parent[:, 2:], force)
        axis = -arm[:, 1:]
        dihedrals = (axis * torque).sum(0) / axis.square().sum(0).sqrt()
        return Internal(bonds, angles, dihedrals)

    def _full_dihedrals(self, dihedrals: Tensor) -> Tensor:
        leading = dihedrals.index_select(0, self._leader)
        return dihedrals + torch.where(self._following, leading, torch.zeros_like(leading))


def _choose_root(neighbours: list[list[int]]) -> tuple[int, int, int]:
    """The atom with two neighbours that is nearest to all others, and the neighbours with the largest branches."""
    best: tuple[int, int, int] | None = None
    for atom, around in enumerate(neighbours):
        if len(around) < 2:
            continue
        distance = _distances(neighbours, atom)
        # Two branches with more than one atom make a better centre than a chain's end.
        inner = sum(len(neighbours[a]) > 1 for a in around)
        score = (-min(inner, 2), sum(distance), atom)
        best = score if best is None else min(best, score)
    if best is None:
        raise ValueError("Expected an atom with at least two bonds; got none.")
    center = best[2]
    size = {a: _branch(neighbours, a, center) for a in neighbours[center]}
    left, right = sorted(neighbours[center], key=lambda a: (-size[a], a))[:2]
    return center, left, right


def _distances(neighbours: list[list[int]], start: int) -> list[int]:
    distance = {start: 0}
    queue = [start]
    for atom in queue:
        for other in neighbours[atom]:
            if other not in distance:
                distance[other] = distance[atom] + 1
                queue.append(other)
    return list(distance.values())


def _branch(neighbours: list[list[int]], atom: int, without: int) -> int:
    """Number of atoms that can be reached from ``atom`` without passing ``without``."""
    seen = {atom, without}
    queue = [atom]
    for current in queue:
        for other in neighbours[current]:
            if other not in seen:
                seen.add(other)
                queue.append(other)
    return len(seen) - 1


def _grow(neighbours: list[list[int]], root: tuple[int, int, int]) -> list[_Row]:
    """Rows in breadth-first order, the largest branch of each parent first."""
    center, left, right = root
    above = {center: center, left: center, right: center}
    # The right atom leads the other children of the centre, with a dihedral of zero about the axis to the left one.
    rows: list[_Row] = []
    queue = [left, right, center]
    for parent in queue:
        children = [a for a in neighbours[parent] if a not in above]
        children.sort(key=lambda a, p=parent: (-_branch(neighbours, a, p), a))  # type: ignore[misc]
        angle = left if parent == center else above[parent]
        if parent == center:
            fourth = right
        elif angle == center:
            fourth = right if parent == left else left
        else:
            fourth = above[angle]
        leader = CENTER if parent == center else ROTOR
        for child in children:
            above[child] = parent
            rows.append(_Row(child, parent, angle, fourth, leader))
            if leader == ROTOR:
                leader = len(rows) - 1
        queue += children
    return rows


def _levels(rows: list[_Row], root: tuple[int, int, int]) -> list[tuple[int, int, Tensor]]:
    """Runs of rows whose references are all placed before: start, stop, and where their references are, ``(m, 3)``."""
    place = {atom: k for k, atom in enumerate((*root, *(row.atom for row in rows)))}
    levels: list[tuple[int, int, Tensor]] = []
    start = 0
    while start < len(rows):
        stop = start
        while stop < len(rows) and max(place[a] for a in rows[stop][1:4]) < start + 3:
            stop += 1
        references = torch.tensor([[place[a] for a in row[1:4]] for row in rows[start:stop]])
        levels.append((start, stop, references))
        start = stop
    return levels


def _bodies(order: Tensor, parent: Tensor) -> Tensor:
    """Which atoms hang on which, ``(n - 1, n)``: row ``k`` has a one for its atom and all beyond it."""
    body = torch.zeros(len(order), len(order) + 1, dtype=torch.float64)
    row = {atom: k for k, atom in enumerate(order.tolist())}
    for k, atom in enumerate(order.tolist()):
        body[k, atom] = 1.0
        above = int(parent[k])
        while above in row:
            body[row[above], atom] = 1.0
            above = int(parent[row[above]])
    return body
