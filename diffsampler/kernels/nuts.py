r"""The No-U-Turn sampler, multinomial and iterative, for many chains at once.

A trajectory doubles, forwards or backwards in time with equal probability, until it turns back on itself. Between two
ends with velocities :math:`v_-, v_+` and the sum :math:`\rho` of all velocities between them, it turns when

.. math:: \langle v_-, \rho \rangle \le 0 \quad\text{or}\quad \langle v_+, \rho \rangle \le 0 .

The test is made on every balanced subtree, and across the seam of its halves (each half with the first velocity of the
other). A point is drawn with probability :math:`\propto e^{-H}`: uniformly inside a new subtree, and between the
old tree and the new one with the bias :math:`\min(1, W_\mathrm{new} / W_\mathrm{old})` towards the new.

There is no recursion. Leaf :math:`n` of a subtree is the right end of as many balanced subtrees as its binary form has
trailing ones; their left ends are even leaves, kept in slots numbered by the ones of :math:`n / 2`. Every chain is at
its own leaf of its own subtree, one gradient per round, until the last one has finished. Rounds that a chain only
waits through are wasted: ``Info.evaluations`` counts rounds, ``Info.useful`` each chain's own leaves. With 64 chains
14 % were wasted on eight schools and 46 % on a logistic regression of 35 coefficients
(``experiments/bench_chains.py``); :class:`~diffsampler.kernels.HMC` with a learned length wastes none.

References:
    The No-U-Turn Sampler (Hoffman & Gelman, 2014), https://arxiv.org/abs/1111.4246
    A Conceptual Introduction to Hamiltonian Monte Carlo (Betancourt, 2017), https://arxiv.org/abs/1701.02434
    Composable Effects for Flexible and Accelerated Probabilistic Programming in NumPyro (Phan, Pradhan & Jankowiak,
    2019), https://arxiv.org/abs/1912.11554 (the iterative form)
"""

from __future__ import annotations

import math
from typing import NamedTuple, final

import torch
from torch import Tensor

from diffsampler.kernel import Info, Kernel, KernelParams, LogDensity, State
from diffsampler.kernels.compiled import evaluate, while_loop
from diffsampler.kernels.hmc import DIVERGENCE
from diffsampler.kernels.metropolis import columns, is_broken, kinetic
from diffsampler.space import Space

__all__ = ["NUTS"]

ROUNDS_PER_CALL = 32
"""Leaves for which random numbers are drawn at once."""
FIRST_SLOTS = 5
"""Slots to start with, enough for subtrees of 32 leaves; all that a longest trajectory needs come when it does."""


class _Tree(NamedTuple):
    """Everything that changes from leaf to leaf, batched over ``n`` chains."""

    round: Tensor
    """Rounds made with the random numbers at hand, ``()``."""
    ends: Tensor
    """Position, velocity and score at both ends in time, ``(2, 3, n, D)``."""
    rho: Tensor
    """Sum of the velocities of the old tree, ``(n, D)``."""
    sample: Tensor
    """Position and score of the old tree's draw, ``(2, n, D)``."""
    log_prob: Tensor
    """Log density of that draw, ``(n,)``."""
    log_weight: Tensor
    """Log weight of the old tree relative to the start, ``(n,)``, float64."""
    depth: Tensor
    """Doublings made, ``(n,)``."""
    leaf: Tensor
    """Leaves of the new subtree so far, ``(n,)``."""
    new_rho: Tensor
    new_sample: Tensor
    new_log_prob: Tensor
    new_log_weight: Tensor
    """The same four of the new subtree."""
    slots: Tensor
    """Velocity, sum up to it, and the velocity before it, at even leaves, ``(3, n, slots, D)``."""
    active: Tensor
    """Who is still moving, ``(n,)``."""
    flags: Tensor
    """Who diverged, who met a non-finite density, ``(2, n)``."""
    accepted: Tensor
    """Sum of the leaves' acceptance probabilities, ``(n,)``, float64."""
    leaves: Tensor
    """Leaves in all, ``(n,)``."""


@final
class NUTS(Kernel):
    """The No-U-Turn sampler on many chains, see the module.

    ``Info.acceptance`` is the mean over a trajectory of the acceptance probabilities that its leaves would have had, as
    step-size adaptation needs it. On a torus trajectories run round without turning back; give a small ``max_depth``.

    Arguments:
        space: Where the particles live.
        max_depth: Largest number of doublings; a trajectory has at most ``2 ** max_depth - 1`` new leaves.
    """

    exact = True
    target_acceptance = 0.8

    def __init__(self, space: Space, *, max_depth: int = 10) -> None:
        super().__init__(space)
        if not 1 <= max_depth <= 20:
            raise ValueError(f"Expected max_depth in 1 .. 20; got {max_depth}.")
        self.max_depth = max_depth

    def step(
        self, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        x = state.x.reshape(-1, state.x.shape[-1])
        batch, n, device = tuple(state.log_prob.shape), x.shape[0], x.device
        step, scale = columns(params, state.x)
        step = (step * scale).expand_as(state.x).reshape_as(x)
        velocity = self.space.noise((n,), like=x, generator=generator)
        forward = torch.rand((self.max_depth, n), generator=generator, dtype=x.dtype, device=device) < 0.5
        energy, most = kinetic(velocity) - state.log_prob.reshape(-1).double(), max(self.max_depth - 1, 1)
        tree = _plant(
            x, state.log_prob.reshape(-1), state.score.reshape_as(x), velocity, slots=max(self.max_depth - 1, 1)
        )
        rounds = 0
        while bool(tree.active.any()):
            if bool((tree.active & (tree.depth > tree.slots.shape[2])).any()):
                tree = tree._replace(slots=torch.nn.functional.pad(tree.slots, (0, 0, 0, most - tree.slots.shape[2])))
            shape = (ROUNDS_PER_CALL, 2, n)
            uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
            tree = tree._replace(round=torch.zeros_like(tree.round))
            tree = _Tree(*evaluate(log_density, self._grow, x, energy, step, forward, uniform, *tree))
            rounds += int(tree.round)
        new_log_prob = tree.log_prob.reshape(batch)
        new = State(tree.sample[0].reshape_as(state.x), new_log_prob, tree.sample[1].reshape_as(state.x))
        info = Info(
            state.log_prob.double() - new_log_prob.double(),
            (tree.accepted / tree.leaves).reshape(batch),
            rounds,
            tree.flags[1].reshape(batch),
            useful=tree.leaves.reshape(batch),
            diverged=tree.flags[0].reshape(batch),
        )
        return new, info

    def _grow(
        self,
        log_density: LogDensity,
        start: Tensor,
        energy: Tensor,
        step: Tensor,
        forward: Tensor,
        uniform: Tensor,
        *tree: Tensor,
    ) -> tuple[Tensor, ...]:
        """Add leaves until no chain is active, or random numbers or slots are used up."""

        def unfinished(*carry: Tensor) -> Tensor:
            tree = _Tree(*carry)
            # A subtree of depth j needs j slots.
            deep = tree.active & (tree.depth > tree.slots.shape[2])
            return tree.active.any() & ~deep.any() & (tree.round < ROUNDS_PER_CALL)

        def body(*carry: Tensor) -> tuple[Tensor, ...]:
            tree = _Tree(*carry)
            chance = uniform.index_select(0, tree.round.reshape(1)).squeeze(0)
            ahead = forward.gather(0, tree.depth.clamp_max(self.max_depth - 1).unsqueeze(0)).squeeze(0)
            return self._add_leaf(log_density, tree, start, energy, step, ahead, chance)

        return while_loop(unfinished, body, tree)

    def _add_leaf(
        self,
        log_density: LogDensity,
        tree: _Tree,
        start: Tensor,
        energy: Tensor,
        step: Tensor,
        ahead: Tensor,
        chance: Tensor,
    ) -> _Tree:
        """One leapfrog step of every active chain, and what follows from it."""
        active = tree.active
        end = torch.where(ahead.unsqueeze(-1), tree.ends[1], tree.ends[0])
        leaf, log_prob, lost = self._leapfrog(log_density, end, start, torch.where(ahead.unsqueeze(-1), step, -step))
        log_weight = energy + log_prob.double() - kinetic(leaf[1])
        broken = lost | is_broken(State(leaf[0], log_prob, leaf[2]))
        log_weight = torch.where(broken | log_weight.isnan(), torch.full_like(log_weight, -math.inf), log_weight)
        # Outside the support is the end of a trajectory too, but no fault of the integrator.
        failed = ~(log_weight > -DIVERGENCE)
        diverged = failed & (log_prob.isfinite() | lost)

        total = torch.logaddexp(tree.new_log_weight, log_weight)
        taken = active & (chance[0].log() < log_weight - total)
        new_sample = torch.where(taken.unsqueeze(-1), leaf[::2], tree.new_sample)
        new_log_prob = torch.where(taken, log_prob, tree.new_log_prob)
        new_rho = tree.new_rho + leaf[1]
        slots, turning = _remember(tree.slots, tree.leaf, end[1], leaf[1], new_rho)

        whole = active & ~failed & ~turning & (tree.leaf + 1 == torch.pow(2, tree.depth))
        far = torch.where(ahead.unsqueeze(-1), tree.ends[0, 1], tree.ends[1, 1])
        merged = whole & (chance[1].log() < _log_bias(total, tree.log_weight))
        rho = tree.rho + new_rho
        seam, first = slots[2, :, 0], slots[0, :, 0]
        turned = (
            _turns(far, leaf[1], rho) | _turns(far, first, tree.rho + first) | _turns(seam, leaf[1], new_rho + seam)
        )
        depth = tree.depth + whole
        going = active & ~failed & ~turning & ~(whole & (turned | (depth >= self.max_depth)))
        moves = torch.stack([active & ~ahead, active & ahead]).reshape(2, 1, -1, 1)
        fresh = whole.unsqueeze(-1)
        acceptance = log_weight.clamp_max(0.0).exp()
        return _Tree(
            tree.round + 1,
            torch.where(moves, leaf.unsqueeze(0), tree.ends),
            torch.where(fresh, rho, tree.rho),
            torch.where(merged.unsqueeze(-1), new_sample, tree.sample),
            torch.where(merged, new_log_prob, tree.log_prob),
            torch.where(whole, torch.logaddexp(tree.log_weight, total), tree.log_weight),
            depth,
            torch.where(whole, torch.zeros_like(tree.leaf), tree.leaf + 1),
            torch.where(fresh, torch.zeros_like(rho), new_rho),
            new_sample,
            new_log_prob,
            torch.where(whole, torch.full_like(total, -math.inf), total),
            slots,
            going,
            tree.flags | torch.stack([active & diverged, active & broken]),
            tree.accepted + torch.where(active, acceptance, torch.zeros_like(acceptance)),
            tree.leaves + active,
        )

    def _leapfrog(
        self, log_density: LogDensity, end: Tensor, start: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step from ``end (3, n, D)``: the leaf, its log density, and who left the numbers."""
        x, velocity, score = end[0], end[1], end[2]
        half = velocity + 0.5 * step * self.space.project_vector(score)
        moved = self.space.project(x + step * half)
        lost = ~moved.sum(-1, keepdim=True).isfinite()
        # No density is asked about a point that is not a number, and nobody moves whose trajectory has ended.
        moved = torch.where(lost, start, moved)
        log_prob, score = log_density(moved)
        velocity = half + 0.5 * step * self.space.project_vector(score)
        return torch.stack([moved, velocity, score]), log_prob, lost.squeeze(-1)


def _plant(x: Tensor, log_prob: Tensor, score: Tensor, velocity: Tensor, *, slots: int) -> _Tree:
    """The tree of the starting point alone."""
    n, dim = x.shape
    zero = torch.zeros(n, dtype=torch.float64, device=x.device)
    count = torch.zeros(n, dtype=torch.int64, device=x.device)
    none = torch.zeros(2, n, dtype=torch.bool, device=x.device)
    end = torch.stack([x, velocity, score])
    return _Tree(
        count.new_zeros(()),
        torch.stack([end, end]),
        velocity,
        torch.stack([x, score]),
        log_prob,
        zero,
        count,
        count,
        torch.zeros_like(x),
        torch.stack([x, score]),
        log_prob,
        torch.full_like(zero, -math.inf),
        x.new_zeros(3, n, slots, dim),
        ~none[0],
        none,
        zero,
        count,
    )


def _log_bias(new: Tensor, old: Tensor) -> Tensor:
    """Log probability, up to one, of moving the draw from the old tree into the new subtree."""
    return new - old


def _turns(first: Tensor, last: Tensor, rho: Tensor) -> Tensor:
    """Whether a stretch between two velocities has turned, ``(...)``."""
    return ((first * rho).sum(-1) <= 0.0) | ((last * rho).sum(-1) <= 0.0)


def _remember(slots: Tensor, leaf: Tensor, before: Tensor, velocity: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    """Keep an even leaf, or test the balanced subtrees that an odd one completes.

    Arguments:
        slots: Velocity, sum up to it, and velocity before it of even leaves, ``(3, n, slots, D)``.
        leaf: Number of this leaf in its subtree, ``(n,)``.
        before: Velocity of the leaf before, ``(n, D)``.
        velocity: Velocity of this leaf, ``(n, D)``.
        rho: Sum of the subtree's velocities, this leaf's included, ``(n, D)``.

    Returns:
        The slots, and who has turned.
    """
    size = slots.shape[2]
    powers = 2 ** torch.arange(1, size + 1, device=leaf.device)
    bits = (leaf.unsqueeze(-1) // powers) % 2
    top = bits.sum(-1, keepdim=True)
    # Trailing ones: the lowest zero bit of the leaf says how many subtrees end here.
    ones = torch.cat([(leaf % 2).unsqueeze(-1), bits], -1).cumprod(-1).sum(-1, keepdim=True)
    slot = torch.arange(size, device=leaf.device)
    keep = ((slot == top) & (ones == 0)).unsqueeze(-1)
    new = torch.stack([velocity, rho, before]).unsqueeze(2)
    slots = torch.where(keep, new, slots)
    ends_here = (slot <= top) & (slot > top - ones)
    velocity, rho = velocity.unsqueeze(1), rho.unsqueeze(1)
    first, upto = slots[0], slots[1]
    turned = ends_here & _turns(first, velocity, rho - upto + first)
    # The right half of the subtree in a slot begins in the next one; pairs of leaves have no other seam.
    middle, through, seam = first[:, 1:], upto[:, 1:], slots[2, :, 1:]
    left = _turns(first[:, :-1], middle, through - upto[:, :-1] + first[:, :-1])
    right = _turns(seam, velocity, rho - through + middle + seam)
    halves = (ends_here & (slot < top))[:, :-1] & (left | right)
    return slots, turned.any(-1) | halves.any(-1)
