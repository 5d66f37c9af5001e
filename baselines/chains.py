"""Many Markov chains in one batch: warm up, freeze, record."""

from __future__ import annotations

import math
from abc import ABC
from typing import Literal, NamedTuple, TypedDict, final

import torch
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from diffsampler.baselines.warmup import Adapted, jittered, warm_up
from diffsampler.kernel import FreeRunningKernel, Kernel, LogDensity, State
from diffsampler.kernels.chees import ChEES
from diffsampler.kernels.compiled import CompiledDensity, whiten
from diffsampler.kernels.metric import DenseMetric, DiagonalMetric
from diffsampler.particles import Particles
from diffsampler.sampler import Sampler
from diffsampler.target import Target

__all__ = ["ChainOptions", "ChainSampler", "Chains", "Record", "Running", "bulk_effective_sample_size"]

TRANSITIONS_PER_RUN = 512
"""Transitions after which chains that run freely meet again, which bounds the memory of their random starts."""
WORTH_TRACING = 2_000
"""Gradient calls of a run below which compiling cannot pay, whatever the density."""
SECONDS_PER_OPERATION = 5e-6
"""What one small tensor operation costs when Python calls it."""
WORTH_COMPILING = 10.0
"""Seconds of such calls above which compiling pays; it takes about five."""


class ChainOptions(TypedDict, total=False):
    """Options of every sampler of chains, explained and given their defaults by :class:`ChainSampler`."""

    num_chains: int
    warmup: int
    thin: int
    init: Tensor | None
    init_scale: float
    step_size: float | None
    length: float | None
    metric: Literal["diagonal", "dense"]
    compile: Literal["auto", "on", "off"]
    dtype: torch.dtype


class Running(NamedTuple):
    """Chains that are warm, with everything that is frozen."""

    state: State
    """In the coordinates of ``adapted.frame``."""
    log_density: LogDensity
    """In the same coordinates."""
    adapted: Adapted
    steps: int
    """Transitions made since the warm-up."""


class Record(NamedTuple):
    """What a recorded phase leaves behind."""

    x: Tensor
    """Draws, shape ``(chains, draws, D)``."""
    nonfinite: int
    diverged: Tensor
    """Divergent transitions of each chain, shape ``(chains,)``, int64."""
    evaluations: int
    useful: float


class ChainSampler(Sampler, ABC):
    """Chains that start dispersed, adapt together, freeze, and record every state, accepted or not.

    Step sizes follow the acceptance averaged over chains (dual averaging), the metric is pooled over chains in windows
    that double, as in Stan. The weights of the result are equal and carry no normalizer; its effective sample size is
    the smallest over coordinates, across chains.

    Arguments:
        target: The density.
        kernel: The transition that is recorded.
        warmup_kernel: An exact transition for the adaptation to listen to, ``kernel`` itself by default.
        trajectory: What learns the length of trajectories, for kernels that take one; it is then varied from transition
            to transition by a Halton sequence, and the step size follows the harmonic mean of the acceptance.
        typical_evaluations: Gradients that a transition takes as a rule, for ``compile="auto"``.
        num_chains: Number of chains.
        warmup: Adaptation steps; none of them is recorded.
        thin: Record every so many steps.
        init: Starting points ``(num_chains, D)``. By default exact draws of the target's prior if it has one, else
            ``init_scale`` times Gaussian noise.
        init_scale: See ``init``.
        step_size: Fixed step size in units of the metric, instead of an adapted one.
        length: Fixed length of trajectories (or time over which velocities decohere) in units of the metric, for
            kernels that take one.
        metric: ``"diagonal"``, or ``"dense"`` for correlated coordinates in at most a hundred or so dimensions.
        compile: Compile the loops around the density (see :mod:`diffsampler.kernels.compiled`): ``"on"``, ``"off"``, or
            ``"auto"``: where the number of calls foreseen times their number of operations says that it pays. The rule
            knows no clock, so that equal seeds give equal numbers. The target must not change between calls of
            :meth:`sample` then.
        dtype: Dtype of the particles.

    Attributes:
        adapted: What the last warm-up found: step size, metric, length, evaluations per chain, divergences.
        lockstep_waste: Share of the recorded gradients that only waited for other chains, after :meth:`sample`.

    Raises:
        ValueError: If ``init`` has the wrong shape, a number is out of range, a choice is unknown, or a kernel without
            acceptance test is given neither step size nor warm-up kernel.
    """

    def __init__(
        self,
        target: Target,
        kernel: Kernel,
        *,
        warmup_kernel: Kernel | None = None,
        trajectory: ChEES | None = None,
        typical_evaluations: float = 1.0,
        num_chains: int = 64,
        warmup: int = 500,
        thin: int = 1,
        init: Tensor | None = None,
        init_scale: float = 1.0,
        step_size: float | None = None,
        length: float | None = None,
        metric: Literal["diagonal", "dense"] = "diagonal",
        compile: Literal["auto", "on", "off"] = "auto",  # noqa: A002
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if num_chains < 2:
            raise ValueError(f"Expected at least 2 chains; got {num_chains}.")
        if warmup < 1 or thin < 1:
            raise ValueError(f"Expected warmup and thin to be positive integers; got {warmup} and {thin}.")
        if init is not None and init.shape != (num_chains, target.dim):
            raise ValueError(f"Expected init of shape {(num_chains, target.dim)}; got {tuple(init.shape)}.")
        for name, number in (("step_size", step_size), ("length", length)):
            if number is not None and not number > 0.0:
                raise ValueError(f"Expected {name} to be positive; got {number}.")
        for name, choice, known in (("metric", metric, METRICS), ("compile", compile, ("auto", "on", "off"))):
            if choice not in known:
                raise ValueError(f"Expected {name} to be one of {', '.join(known)}; got {choice!r}.")
        if step_size is None and not (warmup_kernel or kernel).exact:
            raise ValueError(f"Expected step_size or warmup_kernel for {type(kernel).__name__}, which never refuses.")
        self.target = target
        self.kernel = kernel
        self.warmup_kernel = warmup_kernel or kernel
        self.trajectory = trajectory
        self.typical_evaluations = typical_evaluations
        self.num_chains = num_chains
        self.warmup = warmup
        self.thin = thin
        self.init = init
        self.init_scale = init_scale
        self.step_size = step_size
        self.length = length
        self.metric = METRICS[metric](target.space)
        self.compile = compile
        self.dtype = dtype
        self.adapted: Adapted | None = None
        self.lockstep_waste = 0.0
        self._evaluations = 0
        self._compiled: CompiledDensity | None = None

    @property
    def evaluations(self) -> int:
        """Points at which the target's density and gradient were computed so far, warm-up included."""
        return self._evaluations

    @property
    def compilation(self) -> str:
        """What became of ``compile``: ``"off"``, ``"on"``, or why something is evaluated in Python after all."""
        if self._compiled is None:
            return "off"
        return self._compiled.failure or "on"

    def sample(self, n: int, *, seed: int = 0) -> Particles:
        """Draw at least ``n`` points, ``ceil(n / num_chains)`` from each chain, chain after chain."""
        draws = max(math.ceil(n / self.num_chains), 1)
        generator = torch.Generator().manual_seed(seed)
        _, record = self.extend(self.begin(generator, draws=draws), draws, generator)
        return Particles(
            record.x.flatten(0, 1),
            torch.zeros(self.num_chains * draws, dtype=torch.float64, device=record.x.device),
            replicates=self.num_chains,
            has_normalizer=False,
            effective=bulk_effective_sample_size(record.x),
            nonfinite=record.nonfinite,
            divergences=int(record.diverged.sum()),
        )

    def begin(self, generator: torch.Generator, *, draws: int) -> Running:
        """Start the chains and warm them up; ``draws`` of each are foreseen, which decides what is compiled."""
        eager = self.target.log_prob_and_score
        start = self.warmup_kernel.init(self._start(generator), eager, generator=generator)
        _check_start(start)
        log_density = self._density(start.x, self.warmup + draws * self.thin)
        adapted = self.adapted = warm_up(
            self.warmup_kernel,
            start,
            log_density,
            generator,
            steps=self.warmup,
            metric=self.metric,
            trajectory=self.trajectory,
            step_size=self.step_size,
            length=self.length,
        )
        self._evaluations += self.num_chains * adapted.evaluations
        state = adapted.state
        if self.kernel is not self.warmup_kernel:
            state = self.kernel.refresh(state, generator=generator)
        return Running(state, whiten(log_density, adapted.frame), adapted, 0)

    def extend(self, running: Running, draws: int, generator: torch.Generator) -> tuple[Running, Record]:
        """Record ``draws`` more of every chain."""
        record_more = self._record_freely if isinstance(self.kernel, FreeRunningKernel) else self._record_together
        state, record = record_more(running, draws, generator)
        self._evaluations += self.num_chains * record.evaluations
        self.lockstep_waste = 1.0 - record.useful / (self.num_chains * record.evaluations)
        frame = running.adapted.frame
        if frame is not None:
            record = record._replace(x=frame.to_original(record.x))
        return running._replace(state=state, steps=running.steps + draws * self.thin), record

    def _record_freely(self, running: Running, draws: int, generator: torch.Generator) -> tuple[State, Record]:
        """Every chain makes its own number of transitions at its own pace."""
        kernel, state, params = self.kernel, running.state, running.adapted.params
        assert isinstance(kernel, FreeRunningKernel)
        most, kept, evaluations = max(TRANSITIONS_PER_RUN // self.thin, 1), [], 0
        nonfinite = diverged = useful = torch.zeros(self.num_chains, dtype=torch.int64, device=state.x.device)
        while draws > 0:
            count = min(draws, most)
            state, trace = kernel.run(state, running.log_density, params, generator, draws=count, thin=self.thin)
            draws -= count
            kept.append(trace.x)
            nonfinite = nonfinite + trace.nonfinite
            diverged = diverged + trace.diverged
            useful = useful + trace.useful
            evaluations += trace.evaluations
        return state, Record(torch.cat(kept, 1), int(nonfinite.sum()), diverged, evaluations, float(useful.sum()))

    def _record_together(self, running: Running, draws: int, generator: torch.Generator) -> tuple[State, Record]:
        kept, broken, diverged, useful, evaluations = [], [], [], [], 0
        state = running.state
        for step in range(1, draws * self.thin + 1):
            moved = jittered(running.adapted.params, running.steps + step, jitter=self.trajectory is not None)
            state, info = self.kernel.step(state, running.log_density, moved, generator)
            evaluations += info.evaluations
            broken.append(info.nonfinite)
            useful.append(info.useful)
            if info.diverged is not None:
                diverged.append(info.diverged)
            if step % self.thin == 0:
                kept.append(state.x)
        used = [part for part in useful if part is not None]
        none = torch.zeros(self.num_chains, dtype=torch.int64, device=state.x.device)
        record = Record(
            torch.stack(kept, 1),
            int(torch.stack(broken).sum()),
            torch.stack(diverged).sum(0) if diverged else none,
            evaluations,
            float(torch.stack(used).sum()) if used else float(self.num_chains * evaluations),
        )
        return state, record

    def _density(self, x: Tensor, steps: int) -> LogDensity:
        """The density to run with: compiled where it is asked for or pays."""
        log_density = self.target.log_prob_and_score
        calls = steps * self.typical_evaluations
        if self.compile == "off" or (self.compile == "auto" and calls < WORTH_TRACING):
            return log_density
        compiled = self._compiled
        if compiled is None or compiled.like.dtype != x.dtype:
            compiled = CompiledDensity(log_density, x)
        if self.compile == "auto" and calls * compiled.num_operations * SECONDS_PER_OPERATION < WORTH_COMPILING:
            return log_density
        self._compiled = compiled
        return compiled

    def _start(self, generator: torch.Generator) -> Tensor:
        space, prior = self.target.space, self.target.prior
        if self.init is not None:
            return space.project(self.init.to(self.dtype))
        if prior is not None:
            return prior.sample(self.num_chains, generator=generator).to(self.dtype)
        like = torch.zeros((), dtype=self.dtype)
        return space.project(self.init_scale * space.noise((self.num_chains,), like=like, generator=generator))


METRICS = {"diagonal": DiagonalMetric, "dense": DenseMetric}


@final
class Chains(ChainSampler):
    """Chains of any kernel, with the warm-up, the record and the options of :class:`ChainSampler`.

    Example:
        >>> from diffsampler import targets
        >>> from diffsampler.kernels import MALA
        >>> target = targets.Funnel(dim=2)
        >>> len(Chains(target, MALA(target.space), num_chains=4, warmup=10).sample(100))
        100
    """


def _check_start(start: State) -> None:
    good = start.log_prob.isfinite() & start.score.isfinite().all(-1)
    if not bool(good.all()):
        bad = start.x[~good][0].tolist()
        raise ValueError(f"Expected a finite density and score at the starting points; got none at {bad}.")


def bulk_effective_sample_size(x: Tensor) -> float:
    """Smallest effective sample size over coordinates of chains ``(chains, draws, D)``, between-chain spread included.

    Reference:
        Inference from iterative simulation using multiple sequences (Gelman & Rubin, 1992); Bayesian Data Analysis
        (Gelman et al., 2013), section 11.5

    Returns:
        A count; NaN for fewer than four draws per chain; 1 if some coordinate never moved.
    """
    if x.shape[1] < 4:
        return math.nan
    ess = effective_sample_size(x.double(), chain_dim=0, sample_dim=1)
    return float(torch.where(ess.isfinite(), ess, torch.ones_like(ess)).min())
