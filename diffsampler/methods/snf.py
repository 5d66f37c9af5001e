r"""Stochastic normalizing flows: coupling layers interleaved with Markov kernels.

A path :math:`x_0 \to \dots \to x_K` starts from :math:`p_0 = N(m, s^2)`. Block ``k`` applies a flow :math:`T_k` and
then kernel steps for :math:`\log\gamma_k = (1 - \beta_k) \log p_0 + \beta_k \log\rho`, :math:`\beta_k = k / K`:

.. math:: \log w = \log\rho(x_K) - \log p_0(x_0)
          + \sum_k \Bigl[\log|\det T_k'| + \log\frac{B_k(y_k | x_{k+1})}{F_k(x_{k+1} | y_k)}\Bigr], \quad
          y_k = T_k(x_k),

with the kernel's own ``Info.log_ratio``: a ratio of noise densities for unadjusted Langevin, a change of kinetic energy
for OBABO, and :math:`\log\gamma_k(y_k) - \log\gamma_k(x_{k+1})` for kernels in detailed balance (MALA, HMC). An energy
difference put in place of an unadjusted kernel's ratio would be biased. :math:`E[w] = Z` for any parameters.

Training minimizes the reverse path divergence :math:`-E_F[\log w]`, the forward one :math:`E_B[\log w]` from target
samples (maximum likelihood), or a mixture of both, pathwise through flows and kernels. Step sizes of unadjusted kernels
are learned. Of exact kernels the *accept indicators* are not differentiated, so their gradient lacks the
score-function term: a biased training signal (as in the paper's code) with unbiased weights; their step sizes are
therefore fixed.

When it fails: a mode that neither flow nor kernels reach under the reverse divergence; use samples or tempering. Cost:
``num_blocks * num_moves`` gradients per particle (and their derivatives in training), with the whole graph in memory.

References:
    Stochastic Normalizing Flows (Wu, Koehler & Noe, 2020), https://arxiv.org/abs/2002.06707
    MCMC variational inference via uncorrected Hamiltonian annealing (Geffner & Domke, 2021),
    https://arxiv.org/abs/2107.04150
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast, final

import torch
from torch import Tensor

from diffsampler import estimators
from diffsampler.estimators import Estimate
from diffsampler.kernel import Kernel
from diffsampler.kernels.langevin import ULA
from diffsampler.lessons import Paths
from diffsampler.methods.flow_chain import FlowChain, FlowPaths, PathKL
from diffsampler.methods.flows import Flow, surviving
from diffsampler.particles import Particles
from diffsampler.process import Process
from diffsampler.sampler import Sampler
from diffsampler.space import Euclidean
from diffsampler.target import CountedTarget, Target
from diffsampler.training import Recipe, fit

__all__ = ["SNF"]

PARTICLES_PER_BATCH = 16384


@final
class SNF(Sampler):
    """Stochastic normalizing flow with exact path weights.

    Example:
        >>> import math
        >>> target = Target.from_log_prob(lambda x: -0.5 * (x - 1.0).square().sum(-1), dim=2)
        >>> particles = SNF(target, num_blocks=2).fit(steps=50, batch_size=64).sample(1000)
        >>> abs(particles.log_normalizer.value - math.log(2.0 * math.pi)) < 0.2
        True

    Arguments:
        target: The density, on a Euclidean space.
        num_blocks: Number of blocks of a flow and a kernel.
        kernel: Transition that ends each block: unadjusted Langevin by default; any kernel with a path weight.
        num_moves: Kernel steps in each block.
        location: Mean of the Gaussian prior, a number or shape ``(D,)``.
        scale: Standard deviation of the prior.
        step_size: Step size of the kernels, in units of ``scale``.
        flows: One flow for each block instead of coupling layers, acting on ``(x - location) / scale``.
        num_layers: Coupling layers in each block.
        width: Width of their networks.
        seed: Seed of their initial parameters.

    Attributes:
        history: Training history, a list of dicts.

    Raises:
        ValueError: If the space is not Euclidean, the kernel has no path weight or a number is out of range.
    """

    def __init__(
        self,
        target: Target,
        *,
        num_blocks: int = 4,
        kernel: Kernel | None = None,
        num_moves: int = 1,
        location: Tensor | float = 0.0,
        scale: float = 1.0,
        step_size: float = 0.03,
        flows: list[Flow] | None = None,
        num_layers: int = 2,
        width: int = 64,
        seed: int = 0,
    ) -> None:
        if not isinstance(target.space, Euclidean):
            raise ValueError(f"Expected a target on a Euclidean space; got one on {target.space}.")
        for name, number in (("num_blocks", num_blocks), ("num_moves", num_moves), ("width", width)):
            if number < 1:
                raise ValueError(f"Expected {name} to be a positive integer; got {number}.")
        if not scale > 0.0 or not step_size > 0.0:
            raise ValueError(f"Expected scale and step_size to be positive; got {scale} and {step_size}.")
        if flows is not None and len(flows) != num_blocks:
            raise ValueError(f"Expected one flow for each of {num_blocks} blocks; got {len(flows)}.")
        kernel = ULA(target.space) if kernel is None else kernel
        if kernel.space != target.space:
            raise ValueError(f"Expected a kernel on {target.space}; got one on {kernel.space}.")
        if not kernel.exact and not kernel.has_path_weight:
            raise ValueError(f"Expected a kernel with a path weight; got {type(kernel).__name__}, which has none.")
        self.target = target
        self.chain = FlowChain(
            target.space,
            num_blocks=num_blocks,
            kernel=kernel,
            num_moves=num_moves,
            location=location,
            scale=scale,
            step_size=step_size,
            flows=flows,
            num_layers=num_layers,
            width=width,
            seed=seed,
        )
        self.history: list[dict[str, float]] = []
        self._counted = CountedTarget(target)

    @property
    def evaluations(self) -> int:
        """Points at which the target's density or gradient was computed so far, training included."""
        return self._counted.evaluations

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SNF:
        """Move chain and target in place; the target keeps its own float64 constants."""
        self.chain.to(device=device, dtype=dtype)
        self.target.to(device=device)
        return self

    def fit(
        self,
        *,
        steps: int = 1000,
        batch_size: int = 256,
        learning_rate: float = 2e-3,
        seed: int = 0,
        samples: Tensor | None = None,
        sample_share: float = 0.5,
        clip_norm: float = 1.0,
        ema_decay: float = 0.99,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 200,
        resume: bool = False,
        callback: Callable[[dict[str, float]], None] | None = None,
    ) -> SNF:
        """Train with the library's loop, and return the sampler itself.

        Arguments:
            steps: Number of gradient steps.
            batch_size: Paths per step.
            learning_rate: Initial learning rate of a cosine decay.
            seed: Seed of all randomness in training.
            samples: Draws of the target ``(m, D)``, for the forward divergence.
            sample_share: Share of the steps that run backward from them; 1 is maximum likelihood alone.
            clip_norm: Largest norm of a gradient.
            ema_decay: Decay of the parameter average that is used for sampling.
            checkpoint: Folder of an atomic checkpoint.
            checkpoint_every: Steps between checkpoints.
            resume: Continue from the folder's checkpoint if there is one.
            callback: Called with every history entry.

        Raises:
            ValueError: If an option is out of range or the checkpoint is foreign.
            RuntimeError: If training diverges.
        """
        if samples is not None:
            if samples.ndim != 2 or samples.shape[1] != self.target.dim:
                raise ValueError(f"Expected samples of shape (m, {self.target.dim}); got {tuple(samples.shape)}.")
            samples = samples.to(self.chain.location)
        recipe = Recipe(
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            clip_norm=clip_norm,
            ema_decay=ema_decay,
            bank_share=sample_share,
        )
        self.history = fit(
            # Of a chain whose source draws its own paths the loop asks for parameters, space and config only.
            cast(Process, self.chain),
            self._counted,
            PathKL(),
            recipe,
            lesson=Paths([(FlowPaths(self.chain, samples, sample_share), 1.0)]),
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            resume=resume,
            identity={"sampler": type(self).__name__, "target": type(self.target).__name__, "dim": self.target.dim},
            callback=callback,
        )
        return self

    def sample(self, n: int, *, seed: int = 0) -> Particles:
        """Draw ``n`` independent weighted particles; those lost to non-finite values are counted, not repaired."""
        if n < 1:
            raise ValueError(f"Expected n >= 1; got {n}.")
        generator = torch.Generator(self.chain.location.device).manual_seed(seed)
        paths = [
            self.chain.simulate(self._counted, size, generator=generator, path_gradient=False) for size in _batches(n)
        ]
        x = torch.cat([path.x[-1] for path in paths])
        return surviving(x.unsqueeze(1), torch.cat([path.log_weight for path in paths]).unsqueeze(1))

    def backward_log_weight(self, n: int, *, seed: int = 0) -> Tensor:
        """Log weights ``(n,)`` of backward paths from exact samples of the target.

        Raises:
            NotImplementedError: If the target has no exact sampler.
        """
        generator = torch.Generator(self.chain.location.device).manual_seed(seed)
        weights = []
        for size in _batches(n):
            x = self.target.sample(size, generator=generator).to(self.chain.location)
            path = self.chain.simulate_backward(self._counted, x, generator=generator, path_gradient=False)
            weights.append(path.log_weight)
        return torch.cat(weights)

    def eubo(self, n: int, *, seed: int = 0) -> Estimate:
        """Upper bound of ``log Z`` from ``n`` exact samples of the target."""
        return estimators.eubo(self.backward_log_weight(n, seed=seed))


def _batches(n: int) -> list[int]:
    return [min(PARTICLES_PER_BATCH, n - start) for start in range(0, n, PARTICLES_PER_BATCH)]
