"""Kernels for Pyro's ``MCMC`` that propose from a learned diffusion: modes far apart are one step away."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from diffsampler import estimators
from diffsampler.baselines.independence import select_by_weight
from diffsampler.integrations.pyro_kernel import BlockKernel
from diffsampler.integrations.pyro_proposals import PathProposal, Paths, learn_proposal
from diffsampler.kernel import KernelParams
from diffsampler.kernels.adaptation import RobbinsMonro, reasonable_step_size, spread
from diffsampler.kernels.hmc import HMC
from diffsampler.sampler import DiffusionSampler
from diffsampler.target import Target

__all__ = ["DiffusionKernel", "InterleavedKernel"]

MAX_WEIGHTS = 100_000
"""Weights of proposals that are kept for the normalizing constant."""


class _PathKernel(BlockKernel, ABC):
    """Chains that jump to paths of a diffusion, drawn in batches for all of them.

    Arguments:
        model: A Pyro model.
        sampler: Makes a trained diffusion of the target, such as a function that returns ``ds.CMCD(target).fit()``;
            by default a pilot and a refined process, with nothing to tune.
        training_steps: Gradient steps of the default, which otherwise decides itself.
        num_proposals: Paths to choose from at each transition; one is Metropolis-Hastings.
        num_chains: Chains inside the kernel.
        block: Draws of each chain that are handed out before those of the next.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        sampler: Callable[[Target], DiffusionSampler] | None,
        training_steps: int | None,
        num_proposals: int,
        num_chains: int,
        block: int,
    ) -> None:
        super().__init__(model, num_chains=num_chains, block=block)
        if sampler is not None and not callable(sampler):
            raise TypeError(f"Expected sampler to be a function of the target; got {type(sampler).__name__}.")
        for name, number, least in (("num_proposals", num_proposals, 1), ("training_steps", training_steps, 1)):
            if number is not None and number < least:
                raise ValueError(f"Expected {name} to be at least {least}; got {number}.")
        self.sampler = sampler
        self.training_steps = training_steps
        self.num_proposals = num_proposals
        self.proposal: PathProposal | None = None
        self._paths: Paths | None = None
        self._weights: list[Tensor] = []
        self._moved: list[Tensor] = []

    @abstractmethod
    def adapt(self, steps: int) -> None:
        """Make ``steps`` transitions, adapting what there is to adapt."""

    def warm_up(self, start: Tensor | None, steps: int) -> None:
        assert self.target is not None and self.generator is not None
        if self.sampler is None:
            self.proposal = learn_proposal(self.target, steps=self.training_steps, generator=self.generator)
        else:
            made = self.sampler(self.target)
            if not isinstance(made, DiffusionSampler):
                raise TypeError(f"Expected sampler(target) to return a DiffusionSampler; got {type(made).__name__}.")
            self.proposal = PathProposal(self.target, made)
        if start is None:
            drawn = self.proposal.draw(4 * max(self.num_chains, 64), self.generator)
            if not bool(drawn.log_weight.isfinite().any()):
                raise ValueError("Expected a finite density at the end of some paths; got none. Train the sampler.")
            pick = estimators.systematic_resample(drawn.log_weight, self.num_chains, generator=self.generator)
            self._paths = Paths(drawn.x[pick], drawn.log_weight[pick])
        else:
            self._paths = Paths(start, self.proposal.weigh(start, self.generator))
        self.adapt(steps)
        self._weights, self._moved = [], []

    def jump(self, fresh: Paths) -> None:
        """One transition to proposals ``(C, N)``."""
        assert self._paths is not None and self.generator is not None
        x, log_weight, moved = select_by_weight(*self._paths, *fresh, self.generator)
        self._paths = Paths(x, log_weight)
        self._moved.append(moved)

    def propose(self, draws: int) -> list[Paths]:
        """Proposals for ``draws`` transitions of all chains, in one batch."""
        assert self.proposal is not None and self.generator is not None
        shape = (draws, self.num_chains, self.num_proposals)
        x, log_weight = self.proposal.draw(draws * self.num_chains * self.num_proposals, self.generator)
        if sum(map(len, self._weights)) < MAX_WEIGHTS:
            self._weights.append(log_weight)
        rows = zip(x.reshape(*shape, -1), log_weight.reshape(shape), strict=True)
        return [Paths(*row) for row in rows]

    def facts(self) -> dict[str, float]:
        if not self._weights:
            return {}
        log_weight = torch.cat(self._weights)
        log_z = estimators.importance_log_normalizer(log_weight)
        return {
            "jumps": float(torch.cat(self._moved).double().mean()),
            "log_z": log_z.value,
            "log_z_se": log_z.std_error,
            "k_hat": estimators.pareto_smooth(log_weight)[1],
        }


@final
class DiffusionKernel(_PathKernel):
    """Independence Metropolis-Hastings with paths of a diffusion that is trained in the warm-up.

    Exact for any diffusion; see :mod:`~diffsampler.integrations.pyro_proposals`. Proposals are drawn ``prefetch`` at a
    time, and every draw of ``MCMC`` uses the next one. It jumps between modes that Hamiltonian chains never leave, and
    its proposals give the evidence: ``diagnostics`` holds ``log_z``, ``log_z_se`` and ``k_hat``, and ``jumps``, the
    share of proposals that were accepted. It fails where the diffusion has missed a mode: then nothing tells, except
    the defence that the default training has. Where few jumps are accepted use :class:`InterleavedKernel`.

    Training takes ten seconds and more, whatever ``warmup_steps`` is; those are transitions after it.

    Arguments:
        model: A Pyro model.
        sampler: Makes a trained diffusion of the target, such as a function that returns ``ds.CMCD(target).fit()``;
            by default a pilot and a refined process, with nothing to tune.
        training_steps: Gradient steps of the default, which otherwise decides itself.
        num_proposals: Paths to choose from for each draw; one is Metropolis-Hastings.
        prefetch: Draws for which proposals are made at once.

    References:
        Annealed importance sampling (Neal, 2001), https://arxiv.org/abs/physics/9803008
        Adaptive Monte Carlo augmented with normalizing flows (Gabrié, Rotskoff & Vanden-Eijnden, 2022),
        https://arxiv.org/abs/2105.12603
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        sampler: Callable[[Target], DiffusionSampler] | None = None,
        training_steps: int | None = None,
        num_proposals: int = 1,
        prefetch: int = 512,
    ) -> None:
        super().__init__(
            model,
            sampler=sampler,
            training_steps=training_steps,
            num_proposals=num_proposals,
            num_chains=1,
            block=prefetch,
        )

    def adapt(self, steps: int) -> None:
        for fresh in self.propose(steps):
            self.jump(fresh)

    def advance(self, draws: int) -> tuple[Tensor, Tensor]:
        kept = []
        for fresh in self.propose(draws):
            self.jump(fresh)
            assert self._paths is not None
            kept.append(self._paths.x)
        return torch.stack(kept, 1), torch.zeros(1, dtype=torch.int64)


class _Local(NamedTuple):
    """What the local moves have learned."""

    params: KernelParams
    acceptance: float


@final
class InterleavedKernel(_PathKernel):
    """Jumps to paths of a learned diffusion, and Hamiltonian moves between them.

    Each transition of each chain inside is a jump as in :class:`DiffusionKernel`, ``num_local`` transitions of
    Hamiltonian Monte Carlo, and a new path behind the point that they reach. Jumps carry chains from mode to mode,
    moves repair what the diffusion does badly, so that the diffusion need not be good everywhere. Step size and metric
    are adapted in the warm-up.

    Arguments:
        model: A Pyro model.
        sampler: Makes a trained diffusion of the target; by default a pilot and a refined process.
        training_steps: Gradient steps of the default, which otherwise decides itself.
        num_proposals: Paths to choose from at each jump.
        num_local: Hamiltonian transitions after each jump.
        num_leapfrogs: Largest number of leapfrog steps of each.
        num_chains: Chains inside the kernel.
        block: Draws of each chain that are handed out before those of the next.

    Reference:
        On Bayesian Monte Carlo methods: i-SIR and Ex2MCMC (Samsonov, Lagutin, Gabrié, Durmus, Naumov & Moulines, 2022),
        https://arxiv.org/abs/2111.02702
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        sampler: Callable[[Target], DiffusionSampler] | None = None,
        training_steps: int | None = None,
        num_proposals: int = 1,
        num_local: int = 1,
        num_leapfrogs: int = 8,
        num_chains: int = 32,
        block: int = 16,
    ) -> None:
        super().__init__(
            model,
            sampler=sampler,
            training_steps=training_steps,
            num_proposals=num_proposals,
            num_chains=num_chains,
            block=block,
        )
        for name, number in (("num_local", num_local), ("num_leapfrogs", num_leapfrogs)):
            if number < 1:
                raise ValueError(f"Expected {name} to be at least 1; got {number}.")
        self.num_local = num_local
        self.num_leapfrogs = num_leapfrogs
        self._local: _Local | None = None

    def adapt(self, steps: int) -> None:
        assert self.target is not None and self.proposal is not None and self.generator is not None
        drawn = self.proposal.draw(1024, self.generator)
        pick = estimators.systematic_resample(drawn.log_weight, generator=self.generator)
        scale = spread(self.target.space, drawn.x[pick])
        params = KernelParams(scale.new_tensor(0.5 * self.target.space.dof**-0.25), scale)
        kernel, density = self._kernel(), self.target.log_prob_and_score
        assert self._paths is not None
        state = kernel.init(self._paths.x, density, generator=self.generator)
        found, _ = reasonable_step_size(kernel, state, density, params, generator=self.generator)
        tuner = RobbinsMonro(kernel.target_acceptance)
        tuned = tuner.init(found)
        for fresh in self.propose(steps):
            params = params._replace(step_size=scale.new_tensor(tuner.step_size(tuned)))
            self._local = _Local(params, 0.0)
            self.jump(fresh)
            self._move()
            tuned = tuner.update(tuned, self._local.acceptance)

    def advance(self, draws: int) -> tuple[Tensor, Tensor]:
        kept, diverged = [], torch.zeros(self.num_chains, dtype=torch.int64)
        for fresh in self.propose(draws):
            self.jump(fresh)
            diverged = diverged + self._move()
            assert self._paths is not None
            kept.append(self._paths.x)
        return torch.stack(kept, 1), diverged

    def facts(self) -> dict[str, float]:
        facts = super().facts()
        if self._local is None:
            return facts
        return facts | {
            "step_size": float(self._local.params.step_size),
            "local_acceptance": self._local.acceptance,
        }

    def _kernel(self) -> HMC:
        assert self.target is not None
        return HMC(self.target.space, num_steps=self.num_leapfrogs)

    def _move(self) -> Tensor:
        """Local moves of all chains and new paths behind them; who diverged, ``(C,)``."""
        assert self.target is not None and self.proposal is not None and self.generator is not None
        assert self._paths is not None and self._local is not None
        kernel, density = self._kernel(), self.target.log_prob_and_score
        state = kernel.init(self._paths.x, density, generator=self.generator)
        diverged = torch.zeros(self.num_chains, dtype=torch.int64)
        total = 0.0
        for _ in range(self.num_local):
            state, info = kernel.step(state, density, self._local.params, self.generator)
            total += float(info.acceptance.mean())
            if info.diverged is not None:
                diverged = diverged + info.diverged
        self._paths = Paths(state.x, self.proposal.weigh(state.x, self.generator))
        self._local = self._local._replace(acceptance=total / self.num_local)
        return diverged
