r"""What Pyro's ``MCMC`` wants of a kernel, around chains that run many at a time.

``MCMC`` asks a kernel for one draw per call, and knows nothing of chains inside it. A :class:`BlockKernel` therefore
runs its own chains in blocks and hands the draws out one by one, chain after chain inside each block. That order keeps
Pyro's summary honest: autocorrelation inside a chain is seen as such, and the effective sample size of a block is that
of its chains. What only the kernel can see, R-hat and effective sample size over its own chains, is in ``diagnostics``.
(``MCMC.summary`` and ``MCMC.diagnostics`` of Pyro take memory quadratic in the number of draws: 10 GB for 20,000 draws
of 35 coordinates. For long runs ask the kernel, or ArviZ.)

The base class of Pyro leaves much unsaid: ``transforms`` and ``model`` are read after all sampling is done;
``initial_params`` is set before :meth:`setup` and read after it; warm-up draws come through :meth:`sample` like all
others; ``cleanup`` is called twice; ``setup(0)`` is also called in the parent of worker processes, only for the
transforms; with several chains in one process one kernel is set up again for each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor
from torch.distributions import Transform
from torch.utils._pytree import tree_flatten

from diffsampler.integrations.pyro_supports import bijection
from diffsampler.integrations.pyro_target import PyroTarget

__all__ = ["BlockKernel", "Chart", "SiteTransform"]

LONGEST = 512
"""Draws of a chain that are looked at in one piece for its effective sample size."""
JITTER = 0.1
"""Spread of chains about one starting point that was given for all."""


@final
class SiteTransform(Transform):
    """A site's value to its unconstrained one, by a bijection in the other direction; survives pickling.

    Arguments:
        bijection: From unconstrained values to the support.
    """

    bijective = True

    def __init__(self, bijection: Transform) -> None:
        super().__init__()
        self.bijection = bijection
        self.domain = bijection.codomain
        self.codomain = bijection.domain

    def _call(self, x: Tensor) -> Tensor:
        return self.bijection.inv(x).to(x.dtype)

    def _inverse(self, y: Tensor) -> Tensor:
        # Bounds are kept in float64, which must not change the user's dtype.
        return self.bijection(y).to(y.dtype)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -self.bijection.log_abs_det_jacobian(y, x)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return self.bijection.inverse_shape(shape)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return self.bijection.forward_shape(shape)


@final
class Chart:
    """Between a target's vector and the dict of parameters that ``MCMC`` stores.

    Sites are unconstrained, with a transform. A site whose support depends on other sites has no transform of its own:
    it is passed by value.

    Arguments:
        target: A Pyro model with its data.
    """

    def __init__(self, target: PyroTarget) -> None:
        self.target = target
        points = target._points
        model = target._model
        with model.scope(points.device):
            values = {name: value[0].double() for name, value in target.constrain(points[:1]).items()}
            latents = model.draw(values).latents
            self.transforms = {name: SiteTransform(bijection(name, latent.fn)) for name, latent in latents.items()}
        for name, entries in target.site_slices.items():
            x = points.clone()
            x[:, entries] = 0.3
            value = target.constrain(x)[name]
            if not torch.equal(value, value[:1].expand_as(value)):
                del self.transforms[name]

    def params(self, x: Tensor) -> dict[str, Tensor]:
        """A point ``(D,)`` as parameters, in torch's default dtype."""
        return self.rows(x.unsqueeze(0))[0]

    def rows(self, x: Tensor) -> list[dict[str, Tensor]]:
        """Points ``(n, D)`` as parameters of each."""
        params = self.target.unflatten(x)
        if len(self.transforms) < len(params):
            values = self.target.constrain(x)
            params |= {name: values[name] for name in params if name not in self.transforms}
        columns = [value.detach().to(torch.get_default_dtype()).unbind() for value in params.values()]
        return [dict(zip(params, row, strict=True)) for row in zip(*columns, strict=True)]

    def points(self, params: dict[str, Tensor]) -> Tensor:
        """Parameters of one point, or of several along a first axis, as points ``(n, D)``, float64."""
        shapes = {name: tuple(value.shape) for name, value in self.params(self.target._points[0]).items()}
        if set(params) != set(shapes):
            raise ValueError(f"Expected initial_params of the sites {sorted(shapes)}; got {sorted(params)}.")
        rows = {}
        for name, shape in shapes.items():
            value = params[name].detach().to(self.target._points)
            if tuple(value.shape) != shape and tuple(value.shape[1:]) != shape:
                raise ValueError(f"Expected initial_params[{name!r}] of shape {shape}; got {tuple(value.shape)}.")
            rows[name] = value.reshape(-1, *shape)
        if len({len(value) for value in rows.values()}) != 1:
            raise ValueError("Expected initial_params with one number of points; got several.")
        if len(self.transforms) == len(rows):
            return self.target.flatten(rows)
        values = {n: self.transforms[n].bijection(row) if n in self.transforms else row for n, row in rows.items()}
        return self.target.unconstrain(values)


class BlockKernel(MCMCKernel, ABC):
    """A kernel of Pyro that runs chains of its own in blocks.

    ``warmup_steps`` of ``MCMC`` are transitions of every chain inside; ``num_samples`` counts draws over all of them.
    After the run the kernel stays warm: another ``MCMC(kernel, ..., warmup_steps=0).run(...)`` with the same data goes
    on where it was, also from a pickle. Draws have torch's default dtype, and follow Pyro's seed
    (``pyro.set_rng_seed``).

    Arguments:
        model: A Pyro model, as :class:`~diffsampler.integrations.pyro.PyroTarget` takes them.
        num_chains: Chains inside the kernel.
        block: Draws of each chain that are handed out before those of the next.
    """

    def __init__(self, model: Callable[..., Any], *, num_chains: int, block: int) -> None:
        if not callable(model):
            raise TypeError(f"Expected a Pyro model, a callable; got {type(model).__name__}.")
        for name, number in (("num_chains", num_chains), ("block", block)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"Expected {name} to be a positive integer; got {number!r}.")
        self.model = model
        self.num_chains = num_chains
        self.block = block
        self.target: PyroTarget | None = None
        self.generator: torch.Generator | None = None
        self._chart: Chart | None = None
        self._given: Any = None
        self._start: dict[str, Tensor] | None = None
        self._warm = False
        self._restart(0)

    def _restart(self, warmup_steps: int) -> None:
        """Forget what belongs to one run of ``MCMC``; draws that are left over are kept."""
        self._warmup_steps = warmup_steps
        self._calls = 0
        self._divergences: list[int] = []
        self._blocks: list[Tensor] = []
        self._shown: dict[str, str] = {}
        if not self._warm:
            self._left: list[dict[str, Tensor]] = []
            self._last: dict[str, Tensor] | None = None

    @abstractmethod
    def warm_up(self, start: Tensor | None, steps: int) -> None:
        """Begin anew: train or adapt for ``steps`` transitions, from points ``(num_chains, D)`` if given."""

    @abstractmethod
    def advance(self, draws: int) -> tuple[Tensor, Tensor]:
        """``draws`` more of every chain, ``(num_chains, draws, D)``, and how many diverged, ``(num_chains,)``."""

    @abstractmethod
    def facts(self) -> dict[str, float]:
        """What was adapted, for the diagnostics."""

    @property
    def transforms(self) -> dict[str, Transform] | None:
        """Transforms of the sites to unconstrained space; None before :meth:`setup`."""
        return None if self._chart is None else dict(self._chart.transforms)

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Read the model with its data; with ``warmup_steps=0`` go on with a kernel that is warm.

        Raises:
            ValueError: If a warm kernel is to go on with other data, or the model cannot be sampled.
        """
        same = self._chart is not None and _equal((args, kwargs), self._given)
        if warmup_steps == 0 and self._warm and not same:
            raise ValueError("Expected the data of the warm-up to go on with it; got others. Give warmup_steps > 0.")
        if not same:
            self.target = PyroTarget(self.model, *args, **kwargs)
            self._chart = Chart(self.target)
            self._given = (args, kwargs)
        if warmup_steps > 0:
            self._warm = False
        if not self._warm:
            # Pyro's seed decides: this is what set_rng_seed, and every worker's own seed, sets.
            self.generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        self._restart(warmup_steps)

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """Where the first chain is, unconstrained."""
        chart = self._ready()
        if self._last is None:
            start = self._starting_points(chart)
            self._last = chart.params(chart.target._points[0] if start is None else start[0])
        return self._last

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        """Start at unconstrained values: those of one point, or of one for each chain along a first axis."""
        self._start = dict(params)
        self._last = None

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The next draw. Chains keep their own states; ``params`` is not asked."""
        chart = self._ready()
        self._calls += 1
        if not self._warm:
            if self._warmup_steps == 0:
                raise ValueError("Expected warmup_steps > 0 for a kernel that is not warm; got 0.")
            self.warm_up(self._starting_points(chart), self._warmup_steps)
            self._warm = True
        if self._calls > self._warmup_steps:
            self._last = self._next(chart)
        return self.initial_params

    def logging(self) -> dict[str, str]:
        """What the progress bar shows."""
        return self._shown

    def diagnostics(self) -> dict[str, Any]:
        """Divergent draws, R-hat and effective sample size of the smallest over coordinates, and :meth:`facts`."""
        handed_out = max(self._calls - self._warmup_steps, 0)
        divergences = [draw for draw in self._divergences if draw < handed_out]
        facts: dict[str, Any] = {"divergences": divergences, "num_inner_chains": self.num_chains}
        if self._blocks:
            x = torch.cat(self._blocks, 1)
            facts |= {"inner_ess": _smallest_ess(x), "inner_r_hat": _largest_r_hat(x)}
        return facts | (self.facts() if self._warm else {})

    def _ready(self) -> Chart:
        if self._chart is None:
            raise ValueError("Expected setup(warmup_steps, *args) before; MCMC(kernel, ...).run(*args) calls it.")
        return self._chart

    def _starting_points(self, chart: Chart) -> Tensor | None:
        """Points ``(num_chains, D)`` from the given start, or None."""
        if self._start is None:
            return None
        x = chart.points(self._start)
        if len(x) == self.num_chains:
            return x
        if len(x) != 1:
            raise ValueError(f"Expected initial_params of 1 or {self.num_chains} points; got {len(x)}.")
        noise = torch.randn(self.num_chains, x.shape[1], generator=self.generator, dtype=x.dtype)
        noise[0] = 0.0
        return x + JITTER * noise

    def _next(self, chart: Chart) -> dict[str, Tensor]:
        if not self._left:
            x, diverged = self.advance(self.block)
            self._blocks.append(x)
            self._shown = {name: f"{value:.3g}" for name, value in self.facts().items()}
            first = self._calls - self._warmup_steps - 1
            for chain, count in enumerate(diverged.tolist()):
                # Which draws of the chain they were is not recorded.
                at = first + chain * self.block
                self._divergences += range(at, at + min(int(count), self.block))
            # Backwards, to be taken from the end.
            self._left = chart.rows(x.flatten(0, 1))[::-1]
        return self._left.pop()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.generator is not None:
            state["generator"] = self.generator.get_state()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if state["generator"] is not None:
            self.generator = torch.Generator()
            self.generator.set_state(state["generator"])


def _equal(a: Any, b: Any) -> bool:
    """Whether two trees of tensors and values are the same."""
    (left, shape), (right, other) = tree_flatten(a), tree_flatten(b)
    if shape != other:
        return False
    for x, y in zip(left, right, strict=True):
        tensors = isinstance(x, Tensor) + isinstance(y, Tensor)
        if tensors == 1 or (tensors == 2 and not torch.equal(x, y)):
            return False
        if tensors == 0 and x is not y and not bool(x == y):
            return False
    return True


def _smallest_ess(x: Tensor) -> float:
    """Over coordinates of chains ``(C, T, D)``; NaN for fewer than four draws of each."""
    chains, draws, _ = x.shape
    if draws < 4:
        return math.nan
    # Pyro's estimate takes memory quadratic in the length of a chain: long ones are cut.
    pieces = -(-draws // LONGEST)
    x = x[:, : draws - draws % pieces].reshape(chains * pieces, draws // pieces, -1)
    ess = effective_sample_size(x.double(), chain_dim=0, sample_dim=1)
    return float(torch.where(ess.isfinite(), ess, torch.ones_like(ess)).min())


def _largest_r_hat(x: Tensor) -> float:
    """Split R-hat, largest over coordinates of chains ``(C, T, D)``; NaN for fewer than four draws of each."""
    if x.shape[1] < 4:
        return math.nan
    return float(split_gelman_rubin(x.double(), chain_dim=0, sample_dim=1).max())
