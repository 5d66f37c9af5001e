"""NumPyro's NUTS as a baseline: compiled chains side by side on a density written in JAX."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from diffsampler.particles import Particles
from diffsampler.sampler import Sampler
from diffsampler.space import Euclidean
from diffsampler.target import Target

__all__ = ["NumPyroNUTS"]


@final
class NumPyroNUTS(Sampler):
    """NUTS of NumPyro on a density that the user has written in JAX; it is compared with the target before it runs.

    The particles are the chains' draws with equal weights: ``replicates`` is the number of chains, ``effective`` the
    smallest effective sample size over coordinates, and there is no normalizing constant. Needs the packages of the
    extra ``bench``. The first call compiles, which takes seconds.

    Arguments:
        target: The density, on Euclidean space.
        log_density: The same in JAX, for one point: ``(D,) -> ()``; it may differ by a constant.
        num_chains: Number of chains, run side by side.
        warmup_steps: Adaptation steps of each chain.
        start_scale: Chains start at draws of ``N(0, start_scale^2)``.

    Raises:
        ImportError: At :meth:`sample`, where NumPyro is not installed.
        ValueError: If an option is out of range; at :meth:`sample`, if the two densities differ.

    References:
        Composable effects for flexible and accelerated probabilistic programming in NumPyro (Phan, Pradhan, Jankowiak,
        2019), https://arxiv.org/abs/1912.11554
    """

    def __init__(
        self,
        target: Target,
        log_density: Callable[[Any], Any],
        *,
        num_chains: int = 4,
        warmup_steps: int = 500,
        start_scale: float = 1.0,
    ) -> None:
        if not isinstance(target.space, Euclidean):
            raise ValueError(f"Expected a target on Euclidean space; got {target.space}.")
        if num_chains < 1 or warmup_steps < 0:
            raise ValueError(f"Expected num_chains >= 1 and warmup_steps >= 0; got {num_chains} and {warmup_steps}.")
        if not 0.0 < start_scale < math.inf:
            raise ValueError(f"Expected a positive start_scale; got {start_scale}.")
        self.target = target
        self.log_density = log_density
        self.num_chains = num_chains
        self.warmup_steps = warmup_steps
        self.start_scale = start_scale

    def sample(self, n: int, *, seed: int = 0) -> Particles:
        import jax
        import numpy as np
        from numpyro.diagnostics import effective_sample_size
        from numpyro.infer import MCMC, NUTS

        generator = torch.Generator().manual_seed(seed)
        shape = (self.num_chains, self.target.dim)
        start = self.start_scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        _check_same_density(self.target, self.log_density, torch.cat([start, 0.5 * start]))
        mcmc = MCMC(
            NUTS(potential_fn=lambda x: -self.log_density(x)),
            num_warmup=self.warmup_steps,
            num_samples=math.ceil(n / self.num_chains),
            num_chains=self.num_chains,
            chain_method="vectorized",
            progress_bar=False,
        )
        begin = start.numpy() if self.num_chains > 1 else start[0].numpy()
        mcmc.run(jax.random.PRNGKey(seed), init_params=jax.numpy.asarray(begin), extra_fields=("diverging",))
        draws = np.asarray(mcmc.get_samples(group_by_chain=True), dtype=np.float64)
        x = torch.from_numpy(draws.copy()).flatten(0, 1)
        size = torch.from_numpy(np.array(effective_sample_size(draws))) if draws.shape[1] >= 4 else x.new_ones(1)
        finite = x.isfinite().all(-1)
        return Particles(
            x,
            torch.where(finite, 0.0, -torch.inf).double(),
            replicates=self.num_chains,
            has_normalizer=False,
            effective=min(float(torch.where(size.isfinite(), size, 1.0).min()), float(len(x))),
            nonfinite=int((~finite).sum()),
            divergences=int(np.asarray(mcmc.get_extra_fields()["diverging"]).sum()),
        )


def _check_same_density(target: Target, log_density: Callable[[Any], Any], x: Tensor) -> None:
    """A chain on another density would answer the wrong question without a sign."""
    import jax
    import numpy as np

    theirs = torch.from_numpy(np.array(jax.vmap(log_density)(jax.numpy.asarray(x.numpy())), dtype=np.float64))
    if theirs.shape != (len(x),):
        raise ValueError(f"Expected log_density to return one number for a point; got shape {tuple(theirs.shape[1:])}.")
    ours = target.log_prob(x).double()
    difference = (ours - theirs) - (ours - theirs)[0]
    tolerance = 1e-3 * (1.0 + ours.abs())
    worst = int((difference.abs() / tolerance).argmax())
    if not bool((difference.abs() <= tolerance).all()):
        raise ValueError(
            f"Expected log_density to be the target's log_prob up to a constant; relative to the first point they "
            f"differ by {float(difference[worst]):.4g} at {x[worst].tolist()}."
        )
