"""Kernels for Pyro's ``MCMC`` that run many Hamiltonian chains in one process, each gradient for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, final

from torch import Tensor

from diffsampler.baselines.chains import ChainOptions, ChainSampler, Running
from diffsampler.baselines.chees import ChEES
from diffsampler.baselines.nuts import NUTS
from diffsampler.integrations.pyro_kernel import BlockKernel
from diffsampler.kernels.compiled import whiten

__all__ = ["BatchedNUTSKernel", "ChEESKernel"]

FORESEEN_BLOCKS = 8
"""Blocks that a run is expected to hand out, for the choice whether compiling pays: ``MCMC`` does not say."""


class _ChainsKernel(BlockKernel, ABC):
    """Chains of a :class:`~diffsampler.baselines.chains.ChainSampler`, extended block by block.

    Arguments:
        model: A Pyro model.
        num_chains: Chains inside the kernel, at least 2. They cost little more than one.
        block: Draws of each chain that are handed out before those of the next.
        thin: Transitions for each draw.
        metric: ``"diagonal"``, or ``"dense"`` for correlated coordinates.
        compile: ``"on"`` compiles density and trajectories (seconds of work, for long runs), ``"off"``, or ``"auto"``.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_chains: int = 128,
        block: int = 16,
        thin: int = 2,
        metric: Literal["diagonal", "dense"] = "diagonal",
        compile: Literal["auto", "on", "off"] = "auto",  # noqa: A002
    ) -> None:
        super().__init__(model, num_chains=num_chains, block=block)
        if num_chains < 2:
            raise ValueError(f"Expected at least 2 chains; got {num_chains}.")
        self.thin = thin
        self.metric = metric
        self.compile = compile
        self._sampler: ChainSampler | None = None
        self._running: Running | None = None

    @abstractmethod
    def make(self, options: ChainOptions) -> ChainSampler:
        """The sampler of ``self.target``."""

    def warm_up(self, start: Tensor | None, steps: int) -> None:
        assert self.generator is not None
        self._sampler = self._make(start, steps)
        self._running = self._sampler.begin(self.generator, draws=FORESEEN_BLOCKS * self.block)

    def advance(self, draws: int) -> tuple[Tensor, Tensor]:
        assert self._sampler is not None and self._running is not None and self.generator is not None
        self._running, record = self._sampler.extend(self._running, draws, self.generator)
        return record.x, record.diverged

    def facts(self) -> dict[str, float]:
        assert self._sampler is not None and self._running is not None
        params = self._running.adapted.params
        facts = {"step_size": float(params.step_size), "evaluations": float(self._sampler.evaluations)}
        return facts if params.length is None else facts | {"length": float(params.length)}

    def _make(self, start: Tensor | None, steps: int) -> ChainSampler:
        return self.make(
            {
                "num_chains": self.num_chains,
                "warmup": max(steps, 1),
                "thin": self.thin,
                "metric": self.metric,
                "compile": self.compile,
                "init": start,
            }
        )

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        # Compiled functions cannot be pickled, and are made again.
        state["_sampler"] = None if self._sampler is None else self._sampler.evaluations
        if self._running is not None:
            state["_running"] = self._running._replace(log_density=None)  # type: ignore[arg-type]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._running is None:
            return
        assert self.target is not None
        evaluations = state["_sampler"]
        self._sampler = self._make(None, 1)
        self._sampler._evaluations = evaluations
        density = whiten(self.target.log_prob_and_score, self._running.adapted.frame)
        self._running = self._running._replace(log_density=density)


@final
class ChEESKernel(_ChainsKernel):
    """Hamiltonian Monte Carlo that learns step size, metric and trajectory length from all its chains at once.

    The kernel to use instead of Pyro's ``NUTS`` for unimodal posteriors; 16 chains at least. It fails where one length
    cannot suit all places (funnels; ``inner_r_hat`` tells) and does not travel between separated modes.

    Takes the arguments of :class:`BatchedNUTSKernel` except ``max_depth``, makes two transitions for each draw unless
    told otherwise, and takes:

    Arguments:
        max_steps: Largest number of leapfrog steps of a transition.

    Example:
        >>> import torch
        >>> from pyro.infer import MCMC
        >>> from diffsampler.integrations.examples import EFFECTS, ERRORS, eight_schools_noncentered
        >>> mcmc = MCMC(ChEESKernel(eight_schools_noncentered), 64, warmup_steps=4, disable_progbar=True)
        >>> mcmc.run(torch.tensor(EFFECTS), torch.tensor(ERRORS))
        >>> mcmc.get_samples()["z"].shape
        torch.Size([64, 8])

    Reference:
        An Adaptive-MCMC Scheme for Setting Trajectory Lengths in Hamiltonian Monte Carlo (Hoffman, Radul & Sountsov,
        2021), https://proceedings.mlr.press/v130/hoffman21a.html
    """

    def __init__(self, model: Callable[..., Any], *, max_steps: int = 1000, **options: Any) -> None:
        super().__init__(model, **options)
        self.max_steps = max_steps

    def make(self, options: ChainOptions) -> ChainSampler:
        assert self.target is not None
        return ChEES(self.target, max_steps=self.max_steps, **options)


@final
class BatchedNUTSKernel(_ChainsKernel):
    """The No-U-Turn sampler on many chains, each at its own pace.

    Every trajectory finds its own length, so it needs least knowledge of the posterior. It does not travel between
    separated modes.

    Arguments:
        model: A Pyro model.
        max_depth: Largest number of doublings of a trajectory.
        num_chains: Chains inside the kernel, at least 2. They cost little more than one.
        block: Draws of each chain that are handed out before those of the next.
        thin: Transitions for each draw.
        metric: ``"diagonal"``, or ``"dense"`` for correlated coordinates.
        compile: ``"on"`` compiles density and trajectories (seconds of work, for long runs), ``"off"``, or ``"auto"``.

    Reference:
        The No-U-Turn Sampler (Hoffman & Gelman, 2014), https://arxiv.org/abs/1111.4246
    """

    def __init__(self, model: Callable[..., Any], *, max_depth: int = 10, thin: int = 1, **options: Any) -> None:
        super().__init__(model, thin=thin, **options)
        self.max_depth = max_depth

    def make(self, options: ChainOptions) -> ChainSampler:
        assert self.target is not None
        return NUTS(self.target, max_depth=self.max_depth, **options)
