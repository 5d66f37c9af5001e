r"""Chains that propose from a fixed density: iterated sampling importance resampling, mixed with local moves.

With a normalized proposal :math:`q` that can be sampled and evaluated (a Gaussian, a mixture, a flow), and weights
:math:`w = \rho / q`, each transition draws :math:`y_1, \dots, y_N \sim q`, puts the present state beside them as
:math:`y_0`, and moves to

.. math:: y_j \quad \text{with probability} \quad \frac{w(y_j)}{\sum_{i=0}^N w(y_i)}.

This leaves :math:`\pi` invariant for any :math:`N \ge 1` and any :math:`q` that covers the target, however bad. With
one proposal the Metropolis-Hastings rule :math:`\min(1, w(y) / w(x))` is used instead, which accepts more often. Local
moves of an exact kernel repair what the proposal does badly; the proposal carries chains from mode to mode. The fresh
weights are independent of the chains' states, so that their mean is an unbiased estimate of Z. It fails where
the weights are so uneven that nothing is accepted: chains then keep their modes, and the normalizer its few heavy
weights.

References:
    On Bayesian Monte Carlo methods: i-SIR and Ex2MCMC (Samsonov, Lagutin, Gabrié, Durmus, Naumov & Moulines, 2022),
    https://arxiv.org/abs/2111.02702
    Particle Markov chain Monte Carlo methods (Andrieu, Doucet & Holenstein, 2010),
    https://doi.org/10.1111/j.1467-9868.2009.00736.x
    Adaptive Monte Carlo augmented with normalizing flows (Gabrié, Rotskoff & Vanden-Eijnden, 2022),
    https://arxiv.org/abs/2105.12603
"""

from __future__ import annotations

import math
from typing import NamedTuple, final

import torch
from torch import Tensor

from diffsampler import estimators
from diffsampler.baselines.chains import bulk_effective_sample_size
from diffsampler.baselines.smc import tempered_path
from diffsampler.kernel import Kernel, KernelParams, State
from diffsampler.kernels.adaptation import RobbinsMonro, reasonable_step_size, spread
from diffsampler.kernels.langevin import MALA
from diffsampler.particles import Particles
from diffsampler.sampler import Sampler
from diffsampler.target import CountedTarget, Target

__all__ = ["IndependenceSampler", "select_by_weight"]


class _Chains(NamedTuple):
    """Positions ``(C, D)`` and log weights ``(C,)``, float64."""

    x: Tensor
    log_weight: Tensor


def select_by_weight(
    current: Tensor, log_current: Tensor, fresh: Tensor, log_fresh: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """One transition of all chains by importance resampling.

    Arguments:
        current: States, shape ``(C, D)``.
        log_current: Their log weights, shape ``(C,)``, float64.
        fresh: Independent draws of the proposal, shape ``(C, N, D)``.
        log_fresh: Their log weights, shape ``(C, N)``, float64; ``-inf`` outside the target.
        generator: Source of randomness.

    Returns:
        New states ``(C, D)``, their log weights ``(C,)``, and whether each chain moved ``(C,)``.
    """
    if log_fresh.shape[1] == 1:
        uniform = torch.rand(log_current.shape, generator=generator, dtype=torch.float64, device=current.device)
        # A chain whose own weight is zero takes whatever has one.
        moved = uniform.log() < log_fresh[:, 0] - log_current
        pick = torch.zeros_like(moved, dtype=torch.long)
    else:
        weights = torch.softmax(torch.cat([log_current.unsqueeze(-1), log_fresh], -1), -1)
        # Where nobody has a weight the softmax is not a number, and the chain stays.
        weights = torch.where(weights.isnan(), torch.zeros_like(weights), weights)
        uniform = torch.rand((len(weights), 1), generator=generator, dtype=torch.float64, device=current.device)
        cumulative = weights.cumsum(-1)
        place = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(-1)
        place = place.clamp_max(log_fresh.shape[1])
        moved = (place > 0) & (cumulative[:, -1] > 0)
        pick = (place - 1).clamp_min(0)
    chosen = fresh.gather(1, pick.reshape(-1, 1, 1).expand(-1, 1, fresh.shape[-1])).squeeze(1)
    log_chosen = log_fresh.gather(1, pick.unsqueeze(-1)).squeeze(-1)
    x = torch.where(moved.unsqueeze(-1), chosen, current)
    return x, torch.where(moved, log_chosen, log_current), moved


@final
class IndependenceSampler(Sampler):
    """Chains of iterated sampling importance resampling and local moves, with ``log Z`` from the fresh weights.

    Weights of the particles are equal: the chains are exact whatever the proposal. The estimate of the normalizer is
    that of importance sampling with all recorded proposals, and its error bar the spread over chains; where a few
    weights carry it, the spread is large and itself uncertain.

    References:
        On Bayesian Monte Carlo methods: i-SIR and Ex2MCMC (Samsonov et al., 2022), https://arxiv.org/abs/2111.02702

    Arguments:
        target: The density.
        proposal: Normalized law with a sampler; the target's prior by default. It must cover the target: where it has
            no mass, chains never go by it and the normalizer misses a share.
        proposal_scale: Standard deviation of a Gaussian proposal instead.
        num_proposals: Fresh draws for each chain and transition; one is independence Metropolis-Hastings.
        kernel: Exact kernel for local moves; MALA by default.
        num_local: Local moves after each resampling; 0 for none, which needs no gradient.
        num_chains: Number of chains.
        warmup: Transitions that are not recorded; they adapt the local kernel.
        thin: Record every so many transitions.
        dtype: Dtype of the particles.

    Raises:
        ValueError: If there is no proposal or more than one, the kernel is not exact, or a number is out of range.
    """

    def __init__(
        self,
        target: Target,
        *,
        proposal: Target | None = None,
        proposal_scale: float | None = None,
        num_proposals: int = 16,
        kernel: Kernel | None = None,
        num_local: int = 1,
        num_chains: int = 32,
        warmup: int = 200,
        thin: int = 1,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        for name, value, least in (
            ("num_proposals", num_proposals, 1),
            ("num_local", num_local, 0),
            ("num_chains", num_chains, 2),
            ("warmup", warmup, 1),
            ("thin", thin, 1),
        ):
            if value < least:
                raise ValueError(f"Expected {name} to be at least {least}; got {value}.")
        self.kernel = MALA(target.space) if kernel is None else kernel
        if not self.kernel.exact:
            raise ValueError(f"Expected an exact kernel; got {type(self.kernel).__name__}.")
        self.target = target
        self._counted = CountedTarget(target)
        self.path = tempered_path(self._counted, reference=proposal, reference_scale=proposal_scale)
        self.num_proposals = num_proposals
        self.num_local = num_local
        self.num_chains = num_chains
        self.warmup = warmup
        self.thin = thin
        self.dtype = dtype

    @property
    def evaluations(self) -> int:
        """Points at which the target's density or gradient was computed so far, warm-up included."""
        return self._counted.evaluations

    def sample(self, n: int, *, seed: int = 0) -> Particles:
        """Record at least ``n`` states, ``ceil(n / num_chains)`` of each chain, chain after chain.

        Raises:
            ValueError: If the target has no density at any of the first proposals.
        """
        generator = torch.Generator().manual_seed(seed)
        chains, params = self._warm_up(generator)
        kept, totals, nonfinite = [], [], 0
        for _ in range(max(math.ceil(n / self.num_chains), 1)):
            for _ in range(self.thin):
                chains, log_fresh = self._jump(chains, generator)
                totals.append(torch.logsumexp(log_fresh, -1) - math.log(self.num_proposals))
                chains, _, refused = self._wander(chains, params, generator)
                nonfinite += refused
            kept.append(chains.x)
        x = torch.stack(kept, 1)
        log_z = torch.logsumexp(torch.stack(totals), 0) - math.log(len(totals))
        return Particles(
            x.flatten(0, 1),
            log_z.new_full((x.shape[0] * x.shape[1],), estimators.log_mean_exp(log_z)),
            replicates=self.num_chains,
            effective=bulk_effective_sample_size(x),
            nonfinite=nonfinite,
            known_replicates=log_z,
        )

    def _warm_up(self, generator: torch.Generator) -> tuple[_Chains, KernelParams]:
        """Start from the best of many proposals; then step size and metric of the local kernel."""
        x = self._propose(4, generator)
        log_weight = self._log_weight(x)
        if not bool(log_weight.isfinite().any()):
            raise ValueError("Expected a finite target density at some of the first proposals; got none.")
        # Resampled over all chains, so that everybody starts where there is density.
        pick = estimators.systematic_resample(log_weight.reshape(-1), self.num_chains, generator=generator)
        chains = _Chains(x.flatten(0, 1)[pick], log_weight.reshape(-1)[pick])
        scale = spread(self.path.space, chains.x)
        params = KernelParams(scale.new_tensor(0.5 * self.path.space.dof**-0.25), scale)
        tuner, tuned = RobbinsMonro(self.kernel.target_acceptance), None
        for t in range(self.warmup):
            chains, _ = self._jump(chains, generator)
            if not self.num_local:
                continue
            if t in (0, self.warmup // 4, self.warmup // 2):
                params = KernelParams(params.step_size, spread(self.path.space, chains.x))
                density = self._counted.log_prob_and_score
                state = self.kernel.init(chains.x, density, generator=generator)
                tuned = tuner.init(reasonable_step_size(self.kernel, state, density, params, generator=generator)[0])
            assert tuned is not None
            params = params._replace(step_size=scale.new_tensor(tuner.step_size(tuned)))
            chains, acceptance, _ = self._wander(chains, params, generator)
            tuned = tuner.update(tuned, acceptance)
        return chains, params

    def _jump(self, chains: _Chains, generator: torch.Generator) -> tuple[_Chains, Tensor]:
        fresh = self._propose(self.num_proposals, generator)
        log_fresh = self._log_weight(fresh)
        x, log_weight, _ = select_by_weight(chains.x, chains.log_weight, fresh, log_fresh, generator)
        return _Chains(x, log_weight), log_fresh

    def _wander(self, chains: _Chains, params: KernelParams, generator: torch.Generator) -> tuple[_Chains, float, int]:
        """Local moves; the mean acceptance and the number of refused proposals that were not a number."""
        if not self.num_local:
            return chains, 1.0, 0
        density = self._counted.log_prob_and_score
        state: State = self.kernel.init(chains.x, density, generator=generator)
        total, refused = 0.0, 0
        for _ in range(self.num_local):
            state, info = self.kernel.step(state, density, params, generator)
            total += float(info.acceptance.mean())
            refused += int(info.nonfinite.sum())
        log_weight = state.log_prob.double() - self._log_proposal(state.x)
        return _Chains(state.x, log_weight), total / self.num_local, refused

    def _propose(self, count: int, generator: torch.Generator) -> Tensor:
        x = self.path.reference.sample(self.num_chains * count, generator=generator)
        return x.to(device=generator.device, dtype=self.dtype).reshape(self.num_chains, count, -1)

    def _log_proposal(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.path.reference.log_prob(x).double() - (self.path.reference.log_normalizer or 0.0)

    def _log_weight(self, x: Tensor) -> Tensor:
        """Log weights ``(C, N)`` of proposals; zero weight where the target is not a number."""
        with torch.no_grad():
            log_weight = self._counted.log_prob(x).double() - self._log_proposal(x)
        return torch.where(
            log_weight.isnan() | log_weight.isposinf(), torch.full_like(log_weight, -math.inf), log_weight
        )
