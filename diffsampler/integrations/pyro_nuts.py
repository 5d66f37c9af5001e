"""Pyro's NUTS as its users run it, a peer.

References:
    The No-U-Turn Sampler (Hoffman and Gelman, 2014), https://arxiv.org/abs/1111.4246
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from diffsampler.integrations.pyro_checks import seeded
from diffsampler.integrations.pyro_density import stack
from diffsampler.integrations.pyro_target import PyroTarget
from diffsampler.particles import Particles

__all__ = ["Chains", "nuts", "nuts_particles"]


class Chains(NamedTuple):
    """Draws of Pyro's NUTS."""

    samples: dict[str, Tensor]
    """Constrained draws of each site, shape ``(chains, draws, *event)``."""
    divergences: list[int]
    """Divergent transitions of each chain."""


def nuts(
    model: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    num_samples: int = 1000,
    warmup_steps: int = 1000,
    num_chains: int = 4,
    seed: int = 0,
) -> Chains:
    """Run Pyro's NUTS as its users do, chain after chain in this process.

    Arguments:
        model: A Pyro model.
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        num_samples: Draws of each chain.
        warmup_steps: Adaptation steps of each chain, not kept.
        num_chains: Number of chains, each from its own random start.
        seed: Seed; the state of torch's global generator is restored.
    """
    runs, divergences = [], []
    for chain in range(num_chains):
        with seeded(torch.Generator().manual_seed(seed + 7919 * chain)):
            mcmc = MCMC(NUTS(model), num_samples=num_samples, warmup_steps=warmup_steps, disable_progbar=True)
            mcmc.run(*args, **({} if kwargs is None else kwargs))
        runs.append({name: draws.detach() for name, draws in mcmc.get_samples().items()})
        divergences.append(sum(len(found) for found in mcmc.diagnostics()["divergences"].values()))
    return Chains(stack(runs), divergences)


def nuts_particles(target: PyroTarget, *, num_samples: int, warmup_steps: int, num_chains: int, seed: int) -> Particles:
    """Draws of :func:`nuts` as equally weighted particles in the unconstrained space of ``target``.

    ``effective`` is the smallest effective sample size over coordinates, from the autocorrelation within and the
    variance between chains. The weights say nothing about the normalizing constant.
    """
    model = target._model
    chains = nuts(
        model.function,
        model.user_args,
        model.user_kwargs,
        num_samples=num_samples,
        warmup_steps=warmup_steps,
        num_chains=num_chains,
        seed=seed,
    )
    x = target.unconstrain({name: draws.flatten(0, 1) for name, draws in chains.samples.items()})
    finite = x.isfinite().all(-1)
    log_weight = torch.where(finite, 0.0, -torch.inf).double()
    grouped = x.reshape(num_chains, num_samples, target.dim)
    size = effective_sample_size(grouped, chain_dim=0, sample_dim=1) if num_samples >= 4 else x.new_ones(1)
    # A coordinate that never moved has no autocorrelation and is worth one draw.
    effective = float(torch.where(size.isfinite(), size, 1.0).min())
    return Particles(
        x,
        log_weight,
        replicates=num_chains,
        has_normalizer=False,
        effective=min(effective, float(len(x))),
        nonfinite=int((~finite).sum()),
    )
