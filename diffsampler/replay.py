r"""Memories of terminal points, replayed backward.

A :class:`Replay` keeps where forward paths ended; replayed paths start there and follow the current backward chain. A
:class:`LocalSearch` improves such points by parallel Langevin chains first: it finds the tops of modes that the chain
only brushed. Both keep points only, so nothing in them is stale: densities are evaluated anew when they are replayed.

References:
    Improved off-policy training of diffusion samplers (Sendera et al., 2024), https://arxiv.org/abs/2402.05098
    An empirical study of the effectiveness of using a replay buffer on mode discovery in GFlowNets (Vemgal, Lau and
    Precup, 2023), https://arxiv.org/abs/2307.07674
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, final

import torch
from torch import Tensor

from diffsampler.kernel import KernelParams
from diffsampler.kernels.adaptation import RobbinsMonro
from diffsampler.kernels.langevin import MALA
from diffsampler.sources import Draw, Source
from diffsampler.trajectory import Trajectory, simulate_backward

__all__ = ["LocalSearch", "Memory", "Priority", "RankPriority", "Replay", "WeightPriority"]


class Priority(ABC):
    """Chances of stored points to be replayed."""

    @abstractmethod
    def chance(self, log_prob: Tensor, log_weight: Tensor) -> Tensor:
        """Unnormalized chances ``(m,)`` of points with these densities and path weights ``(m,)``."""


@final
class RankPriority(Priority):
    r"""Chances :math:`1 / (c\,m + \mathrm{rank})` by density, the highest first: robust to its scale.

    Arguments:
        offset: The constant ``c``; larger is more even.
    """

    def __init__(self, offset: float = 0.01) -> None:
        if not offset > 0.0:
            raise ValueError(f"Expected offset > 0; got {offset}.")
        self.offset = offset

    def chance(self, log_prob: Tensor, log_weight: Tensor) -> Tensor:
        rank = log_prob.argsort(descending=True).argsort()
        return 1.0 / (self.offset * log_prob.shape[0] + rank.double())


@final
class WeightPriority(Priority):
    r"""Chances :math:`w^\eta` by path weight, ``eta`` in [0, 1]; 0 replays evenly."""

    def __init__(self, eta: float = 0.5) -> None:
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"Expected eta in [0, 1]; got {eta}.")
        self.eta = eta

    def chance(self, log_prob: Tensor, log_weight: Tensor) -> Tensor:
        return torch.softmax(self.eta * log_weight.double(), 0)


@final
class Memory:
    """A ring of terminal points with their densities and the weights of the paths that led there."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"Expected capacity >= 1; got {capacity}.")
        self.capacity = capacity
        self.points = torch.empty(0, 0)
        self.log_prob = torch.empty(0, dtype=torch.float64)
        self.log_weight = torch.empty(0, dtype=torch.float64)

    def __len__(self) -> int:
        return self.log_prob.shape[0]

    def add(self, points: Tensor, log_prob: Tensor, log_weight: Tensor) -> None:
        """Append points ``(n, S)``; the oldest leave when the ring is full."""
        if len(self) == 0:
            self.points, self.log_prob, self.log_weight = points[:0], log_prob[:0], log_weight[:0]
        keep = slice(-self.capacity, None)
        self.points = torch.cat([self.points, points])[keep]
        self.log_prob = torch.cat([self.log_prob, log_prob])[keep]
        self.log_weight = torch.cat([self.log_weight, log_weight])[keep]

    def pick(self, n: int, priority: Priority, generator: torch.Generator) -> Tensor:
        """Draw ``n`` points with replacement."""
        chance = priority.chance(self.log_prob, self.log_weight)
        index = torch.multinomial(chance, n, replacement=True, generator=generator)
        return self.points[index]

    def state(self) -> dict[str, Any]:
        return {"points": self.points, "log_prob": self.log_prob, "log_weight": self.log_weight}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        for name, value in state.items():
            setattr(self, name, value.to(device))


@final
class Replay(Source):
    """Backward paths from where earlier forward paths ended.

    Arguments:
        capacity: Number of points kept.
        priority: Their chances, by rank of density by default.
        fewest: Points needed before anything is replayed.
    """

    backward = True

    def __init__(self, *, capacity: int = 20_000, priority: Priority | None = None, fewest: int = 1000) -> None:
        self.memory = Memory(capacity)
        self.priority = RankPriority() if priority is None else priority
        self.fewest = fewest

    @property
    def ready(self) -> bool:
        return len(self.memory) >= self.fewest

    def draw(self, n: int, use: Draw) -> Trajectory:
        points = self.memory.pick(n, self.priority, use.generator)
        return simulate_backward(use.process, use.target, points, generator=use.generator)

    def learn(self, trajectory: Trajectory, use: Draw) -> None:
        ends = use.process.observed(trajectory.x[-1]).detach()
        self.memory.add(ends, trajectory.log_terminal.detach(), trajectory.log_weight.detach())

    def state(self) -> dict[str, Any]:
        return self.memory.state()

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        self.memory.restore(state, device)

    def config(self) -> str:
        return f"Replay({self.memory.capacity}, {type(self.priority).__name__}, {self.fewest})"


@final
class LocalSearch(Source):
    """Backward paths from points that parallel Metropolis-adjusted Langevin chains reached.

    Every ``every`` steps, ``chains`` points of the memory of earlier paths make ``moves`` moves; where they are after
    each of the last half is kept. The moves leave the target invariant, so points drift to where mass is, never away.

    Arguments:
        every: Training steps between searches.
        chains: Number of chains.
        moves: Moves of each search.
        capacity: Number of points kept, of earlier paths and of searches each.
        priority: Chances of earlier points to start a chain, by rank of density by default.
    """

    backward = True

    def __init__(
        self,
        *,
        every: int = 100,
        chains: int = 256,
        moves: int = 40,
        capacity: int = 20_000,
        priority: Priority | None = None,
    ) -> None:
        for name, value in (("every", every), ("chains", chains), ("moves", moves)):
            if value < 1:
                raise ValueError(f"Expected {name} >= 1; got {value}.")
        self.every = every
        self.chains = chains
        self.moves = moves
        self.seen, self.found = Memory(capacity), Memory(capacity)
        self.priority = RankPriority() if priority is None else priority
        self.steps = 0

    @property
    def ready(self) -> bool:
        return len(self.found) > 0

    def draw(self, n: int, use: Draw) -> Trajectory:
        # Found points are draws of chains at equilibrium or on the way: equal chances.
        points = self.found.pick(n, WeightPriority(0.0), use.generator)
        return simulate_backward(use.process, use.target, points, generator=use.generator)

    def learn(self, trajectory: Trajectory, use: Draw) -> None:
        ends = use.process.observed(trajectory.x[-1]).detach()
        self.seen.add(ends, trajectory.log_terminal.detach(), trajectory.log_weight.detach())
        self.steps += 1
        if self.steps % self.every == 0:
            self._search(use)

    def _search(self, use: Draw) -> None:
        start = self.seen.pick(self.chains, self.priority, use.generator)
        kernel = MALA(use.target.space)
        state = kernel.init(start, use.target.log_prob_and_score)
        # The size of the score tells the local scale; the spread over modes would be far too large a step.
        square = state.score.double().square().mean(0)
        if use.target.space.dof < use.target.space.dim:
            square = square.mean(0, keepdim=True)
        scale = square.rsqrt()
        search = RobbinsMonro(kernel.target_acceptance)
        step = search.init(0.5 * use.target.space.dof ** (-1.0 / 3.0))
        for move in range(self.moves):
            params = KernelParams(scale.new_tensor(search.step_size(step)), scale)
            state, info = kernel.step(state, use.target.log_prob_and_score, params, use.generator)
            step = search.update(step, float(info.acceptance.mean()))
            if 2 * move >= self.moves:
                log_prob = state.log_prob.double()
                self.found.add(state.x, log_prob, torch.zeros_like(log_prob))

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen.state(), "found": self.found.state(), "steps": self.steps}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        self.seen.restore(state["seen"], device)
        self.found.restore(state["found"], device)
        self.steps = state["steps"]

    def config(self) -> str:
        return f"LocalSearch({self.every}, {self.chains}, {self.moves}, {self.seen.capacity})"
