r"""The No-U-Turn sampler, multinomial and iterative, for many chains at once.

A trajectory doubles, forwards or backwards in time with equal probability, until it turns back on itself. Between two
ends with velocities :math:`v_-, v_+` and the sum :math:`\rho` of all velocities between them, it turns when

.. math:: \langle v_-, \rho \rangle \le 0 \quad\text{or}\quad \langle v_+, \rho \rangle \le 0 .

The test is made on every balanced subtree, and across the seam of its halves (each half with the first velocity of the
other). A point is drawn with probability :math:`\propto e^{-H}`: uniformly inside a new subtree, and between the
old tree and the new one with the bias :math:`\min(1, W_\mathrm{new} / W_\mathrm{old})` towards the new.

There is no recursion. Leaf :math:`n` of a subtree is the right end of as many balanced subtrees as its binary form has
trailing ones; their left ends are even leaves, kept in slots numbered by the ones of :math:`n / 2`. Every chain is at
its own leaf of its own subtree, one gradient per round.

:meth:`NUTS.step` makes one transition, and chains wait for the longest trajectory. :meth:`NUTS.run` makes many: a chain
whose trajectory ends begins the next one in the same round, and waits only when all its transitions are made. Their
number is fixed beforehand, so that no chain counts for more because it is fast, and each chain has random numbers of
its own, so that its draws do not depend on what the others do. Rounds that a chain only waits through are wasted: of
400 transitions of 64 chains for a logistic regression of 35 coefficients 4 %, against 47 % in steps
(``experiments/bench_chains.py``).

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

from diffsampler.kernel import FreeRunningKernel, Info, KernelParams, LogDensity, State, Trace
from diffsampler.kernels.compiled import evaluate, while_loop
from diffsampler.kernels.hmc import DIVERGENCE
from diffsampler.kernels.metropolis import columns, kinetic
from diffsampler.space import Space

__all__ = ["NUTS"]

ROUNDS_PER_CALL = 32
"""Leaves for which random numbers are drawn at once."""
ENDS_PER_CALL = 8
"""Trajectories that a chain may finish before the next call."""


class _Tree(NamedTuple):
    """Everything that changes from leaf to leaf. Chains come last: ``n`` is long, and ``D`` may be anything."""

    round: Tensor
    """Rounds made with the random numbers at hand, ``()``."""
    ends: Tensor
    """Position, velocity and score at both ends in time, ``(2, 3, D, n)``."""
    rho: Tensor
    """Sum of the velocities of the old tree, ``(D, n)``."""
    sample: Tensor
    """Position and score of the old tree's draw, ``(2, D, n)``."""
    log_prob: Tensor
    """Log density of that draw, ``(n,)``."""
    log_weight: Tensor
    """Log weight of the old tree relative to the start, ``(n,)``, float64."""
    energy: Tensor
    """Energy of the start, ``(n,)``, float64."""
    depth: Tensor
    """Doublings made, ``(n,)``."""
    ahead: Tensor
    """Whether the new subtree grows forwards in time, ``(n,)``."""
    leaf: Tensor
    """Leaves of the new subtree so far, ``(n,)``."""
    new_rho: Tensor
    new_sample: Tensor
    new_log_prob: Tensor
    new_log_weight: Tensor
    """The same four of the new subtree."""
    slots: Tensor
    """Velocity, sum before it, and the velocity before it, at even leaves, ``(slots + 1, 3, D, n)``; the last slot is
    where odd leaves are written."""
    draws: Tensor
    """Ends of the trajectories of this call, ``(ENDS_PER_CALL + 1, D, n)``; the last is where others are written."""
    finished: Tensor
    """Number of these, ``(n,)``."""
    accepted: Tensor
    """Sum of the leaves' acceptance probabilities, ``(n,)``, float64."""
    leaves: Tensor
    """Leaves in all, ``(n,)``."""
    faults: Tensor
    """How many leaves diverged, how many met a non-finite density, ``(2, n)``."""


@final
class NUTS(FreeRunningKernel):
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
        new, trace = self.run(state, log_density, params, generator, draws=1)
        info = Info(
            state.log_prob.double() - new.log_prob.double(),
            trace.acceptance,
            trace.evaluations,
            trace.nonfinite > 0,
            useful=trace.useful,
            diverged=trace.diverged > 0,
        )
        return new, info

    def run(
        self,
        state: State,
        log_density: LogDensity,
        params: KernelParams,
        generator: torch.Generator | None = None,
        *,
        draws: int,
        thin: int = 1,
    ) -> tuple[State, Trace]:
        batch, shape, transitions = tuple(state.log_prob.shape), state.x.shape, draws * thin
        x = state.x.reshape(-1, shape[-1])
        step, scale = columns(params, state.x)
        step = (step * scale).expand_as(state.x).reshape_as(x).mT.contiguous()
        velocities = self.space.noise((transitions, x.shape[0]), like=x, generator=generator)
        tree = self._plant(State(x, state.log_prob.reshape(-1), state.score.reshape_as(x)), velocities[0])
        kept, made, rounds = x.new_empty(x.shape[0], draws, x.shape[1]), torch.zeros_like(tree.leaf), 0
        uniform = _uniform(x, generator)
        while bool((made < transitions).any()):
            if int(tree.round) == ROUNDS_PER_CALL:
                uniform = _uniform(x, generator)
                tree = tree._replace(round=torch.zeros_like(tree.round))
            before = int(tree.round)
            fresh = _following(velocities, made)
            tree = _Tree(*evaluate(log_density, self._grow, x, step, fresh, uniform, transitions - made, *tree))
            rounds += int(tree.round) - before
            _keep(kept, tree, made, thin=thin)
            made = made + tree.finished
            tree = tree._replace(finished=torch.zeros_like(made))
        sample = tree.sample.mT.contiguous()
        new = State(sample[0].reshape(shape), tree.log_prob.reshape(batch), sample[1].reshape(shape))
        trace = Trace(
            kept.reshape(*batch, draws, shape[-1]),
            (tree.accepted / tree.leaves).reshape(batch),
            rounds,
            tree.leaves.reshape(batch),
            tree.faults[1].reshape(batch),
            tree.faults[0].reshape(batch),
        )
        return new, trace

    def _plant(self, state: State, velocity: Tensor) -> _Tree:
        """The tree of the starting point alone."""
        n, dim = state.x.shape
        x, score, velocity = state.x.mT, state.score.mT, velocity.mT
        zero = torch.zeros(n, dtype=torch.float64, device=x.device)
        count = torch.zeros(n, dtype=torch.int64, device=x.device)
        end, sample = torch.stack([x, velocity, score]), torch.stack([x, score])
        tree = _Tree(
            round=count.new_zeros(()),
            ends=torch.stack([end, end]),
            rho=velocity.contiguous(),
            sample=sample,
            log_prob=state.log_prob,
            log_weight=zero,
            energy=kinetic(velocity.mT) - state.log_prob.double(),
            depth=count,
            ahead=count > 0,
            leaf=count,
            new_rho=x.new_zeros(dim, n),
            new_sample=sample,
            new_log_prob=state.log_prob,
            new_log_weight=torch.full_like(zero, -math.inf),
            slots=x.new_zeros(max(self.max_depth - 1, 1) + 1, 3, dim, n),
            draws=x.new_zeros(ENDS_PER_CALL + 1, dim, n),
            finished=count,
            accepted=zero,
            leaves=count,
            faults=count.new_zeros(2, n),
        )
        # A compiled call is compiled anew where two arguments are one tensor that were two before.
        return _Tree(*(part.clone() for part in tree))

    def _grow(
        self,
        log_density: LogDensity,
        _x: Tensor,
        step: Tensor,
        velocities: Tensor,
        uniform: Tensor,
        wanted: Tensor,
        *tree: Tensor,
    ) -> tuple[Tensor, ...]:
        """Add leaves until no chain wants more, or the random numbers of some chain are used up."""

        def unfinished(*carry: Tensor) -> Tensor:
            tree = _Tree(*carry)
            more = (tree.finished < wanted).any() & (tree.finished < ENDS_PER_CALL).all()
            return more & (tree.round < ROUNDS_PER_CALL)

        def body(*carry: Tensor) -> tuple[Tensor, ...]:
            tree = _Tree(*carry)
            chance = uniform.index_select(0, tree.round.reshape(1)).squeeze(0)
            return self._add_leaf(log_density, tree, step, velocities, chance, tree.finished < wanted)

        return while_loop(unfinished, body, tree)

    def _add_leaf(
        self, log_density: LogDensity, tree: _Tree, step: Tensor, velocities: Tensor, chance: Tensor, active: Tensor
    ) -> _Tree:
        """One leapfrog step of every active chain, and what follows from it."""
        ahead = torch.where(tree.leaf == 0, chance[2] < 0.5, tree.ahead)
        end = torch.where(ahead, tree.ends[1], tree.ends[0])
        leaf, log_prob, lost = self._leapfrog(log_density, end, torch.where(ahead, step, -step))
        log_weight = tree.energy + log_prob.double() - _kinetic(leaf[1])
        broken = lost | log_prob.isnan() | log_prob.isposinf() | (log_prob.isfinite() & ~leaf[2].sum(0).isfinite())
        log_weight = torch.where(broken | log_weight.isnan(), torch.full_like(log_weight, -math.inf), log_weight)
        # Outside the support is the end of a trajectory too, but no fault of the integrator.
        failed = ~(log_weight > -DIVERGENCE)
        diverged = failed & (log_prob.isfinite() | lost)

        total = torch.logaddexp(tree.new_log_weight, log_weight)
        taken = active & (chance[0].log() < log_weight - total)
        acceptance = log_weight.clamp_max(0.0).exp()
        slots, turning = _remember(tree.slots, tree.leaf, end[1], leaf[1], tree.new_rho)
        grown = tree._replace(
            round=tree.round + 1,
            ends=torch.where(torch.stack([active & ~ahead, active & ahead]).reshape(2, 1, 1, -1), leaf, tree.ends),
            ahead=ahead,
            leaf=tree.leaf + 1,
            new_rho=tree.new_rho + leaf[1],
            new_sample=torch.where(taken, leaf[::2], tree.new_sample),
            new_log_prob=torch.where(taken, log_prob, tree.new_log_prob),
            new_log_weight=total,
            slots=slots,
            accepted=tree.accepted + torch.where(active, acceptance, torch.zeros_like(acceptance)),
            leaves=tree.leaves + active,
            faults=tree.faults + torch.stack([active & diverged, active & broken]),
        )
        return self._merge(grown, velocities, chance[1], active=active, ended=active & (failed | turning))

    def _merge(self, tree: _Tree, velocities: Tensor, chance: Tensor, *, active: Tensor, ended: Tensor) -> _Tree:
        """Join subtrees that are complete, record trajectories that have ended, and begin the next ones."""
        whole = active & ~ended & (tree.leaf >> tree.depth == 1)
        merged = whole & (chance.log() < _log_bias(tree.new_log_weight, tree.log_weight))
        sample = torch.where(merged, tree.new_sample, tree.sample)
        log_prob = torch.where(merged, tree.new_log_prob, tree.log_prob)
        rho, depth = tree.rho + tree.new_rho, tree.depth + whole
        far = torch.where(tree.ahead, tree.ends[0, 1], tree.ends[1, 1])
        last = torch.where(tree.ahead, tree.ends[1, 1], tree.ends[0, 1])
        first, seam = tree.slots[0, 0], tree.slots[0, 2]
        turned = _turns(far, last, rho) | _turns(far, first, tree.rho + first) | _turns(seam, last, tree.new_rho + seam)
        ended = ended | (whole & (turned | (depth >= self.max_depth)))

        dim, n = rho.shape
        velocity = velocities.gather(0, tree.finished.clamp_max(ENDS_PER_CALL - 1).expand(1, dim, n)).squeeze(0)
        row = torch.where(ended, tree.finished, torch.full_like(tree.finished, ENDS_PER_CALL))
        draws = tree.draws.scatter(0, row.expand(1, dim, n), sample[0].unsqueeze(0))
        start = torch.stack([sample[0], velocity, sample[1]])
        zero, closed = torch.zeros_like(tree.log_weight), whole | ended
        log_weight = torch.where(whole, torch.logaddexp(tree.log_weight, tree.new_log_weight), tree.log_weight)
        return tree._replace(
            ends=torch.where(ended, start, tree.ends),
            rho=torch.where(ended, velocity, torch.where(whole, rho, tree.rho)),
            sample=sample,
            log_prob=log_prob,
            log_weight=torch.where(ended, zero, log_weight),
            energy=torch.where(ended, _kinetic(velocity) - log_prob.double(), tree.energy),
            depth=torch.where(ended, torch.zeros_like(depth), depth),
            leaf=torch.where(closed, torch.zeros_like(depth), tree.leaf),
            new_rho=torch.where(closed, torch.zeros_like(rho), tree.new_rho),
            new_log_weight=torch.where(closed, torch.full_like(zero, -math.inf), tree.new_log_weight),
            draws=draws,
            finished=tree.finished + ended,
        )

    def _leapfrog(self, log_density: LogDensity, end: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step from ``end (3, D, n)``: the leaf, its log density, and who left the numbers."""
        x, velocity, score = end[0], end[1], end[2]
        half = velocity + 0.5 * step * self.space.project_vector(score.mT).mT
        moved = self.space.project((x + step * half).mT).mT
        lost = ~moved.sum(0).isfinite()
        # No density is asked about a point that is not a number.
        moved = torch.where(lost, x, moved)
        log_prob, gradient = log_density(moved.mT.contiguous())
        velocity = half + 0.5 * step * self.space.project_vector(gradient).mT
        return torch.stack([moved, velocity, gradient.mT]), log_prob, lost


def _uniform(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random numbers of the unit interval for every leaf of a call, ``(rounds, 3, n)``."""
    shape = (ROUNDS_PER_CALL, 3, x.shape[0])
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=x.device)


def _following(velocities: Tensor, made: Tensor) -> Tensor:
    """The velocities ``(transitions, n, D)`` that each chain needs after ``made (n,)``, ``(ENDS_PER_CALL, D, n)``."""
    ahead = torch.arange(1, ENDS_PER_CALL + 1, device=made.device).unsqueeze(-1)
    index = (made + ahead).clamp_max(velocities.shape[0] - 1)
    return velocities[index, torch.arange(made.shape[0], device=made.device)].mT.contiguous()


def _keep(kept: Tensor, tree: _Tree, made: Tensor, *, thin: int) -> None:
    """Write the ends of this call's trajectories to their places in ``kept (n, draws, D)``."""
    k = torch.arange(ENDS_PER_CALL, device=made.device).unsqueeze(-1)
    number = made + k + 1
    k, chain = ((k < tree.finished) & (number % thin == 0)).nonzero(as_tuple=True)
    kept[chain, number[k, chain] // thin - 1] = tree.draws[k, :, chain]


def _log_bias(new: Tensor, old: Tensor) -> Tensor:
    """Log probability, up to one, of moving the draw from the old tree into the new subtree."""
    return new - old


def _kinetic(velocity: Tensor) -> Tensor:
    """Kinetic energy of velocities ``(D, n)``, ``(n,)``, float64."""
    return 0.5 * velocity.square().sum(0, dtype=torch.float64)


def _turns(first: Tensor, last: Tensor, rho: Tensor) -> Tensor:
    """Whether a stretch between two velocities ``(..., D, n)`` has turned, ``(..., n)``."""
    return ((first * rho).sum(-2) <= 0.0) | ((last * rho).sum(-2) <= 0.0)


def _ones(number: Tensor, *, bits: int) -> Tensor:
    """Count the ones of the lowest bits."""
    return ((number >> torch.arange(bits, device=number.device).unsqueeze(-1)) & 1).sum(0)


def _remember(slots: Tensor, leaf: Tensor, before: Tensor, velocity: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    """Keep an even leaf, and test the stretches that end at this one.

    An odd leaf completes balanced subtrees, which are tested, and so is each one's right half with the last velocity of
    the left. Where an even leaf begins a right half, the left half with the velocity of this leaf is tested.

    Arguments:
        slots: Velocity, sum before it, and velocity before it of even leaves, ``(slots + 1, 3, D, n)``.
        leaf: Number of this leaf in its subtree, ``(n,)``.
        before: Velocity of the leaf before, ``(D, n)``.
        velocity: Velocity of this leaf, ``(D, n)``.
        rho: Sum of the subtree's velocities before this leaf, ``(D, n)``.

    Returns:
        The slots, and who has turned.
    """
    size, (dim, n) = slots.shape[0] - 1, velocity.shape
    odd = leaf % 2 == 1
    top = _ones(leaf >> 1, bits=size)
    # Trailing ones: how many subtrees end here.
    ones = _ones((leaf ^ (leaf + 1)) >> 1, bits=size + 1)
    slot = torch.arange(size, device=leaf.device).unsqueeze(-1)
    ends_here = torch.where(odd, (slot <= top) & (slot > top - ones), slot == top - 1)
    # The right half of the subtree in a slot begins in the next one; pairs of leaves have no other seam.
    right_half = odd & (slot <= top) & (slot > top - ones + 1)
    first, earlier, seam = slots[:size, 0], slots[:size, 1], slots[:size, 2]
    stretch = rho + velocity - earlier
    turned = (ends_here & _turns(first, velocity, stretch)) | (right_half & _turns(seam, velocity, stretch + seam))
    place = torch.where(odd, torch.full_like(top, size), top).expand(1, 3, dim, n)
    new = torch.stack([velocity, rho, before]).unsqueeze(0)
    return slots.scatter(0, place, new), turned.any(0)
