r"""The posterior of a Pyro model as a target, its prior as an exact, normalized reference.

References:
    Pyro: Deep Universal Probabilistic Programming (Bingham et al., 2019), https://arxiv.org/abs/1810.09538
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from diffsampler.integrations.pyro_checks import (
    check_batch,
    check_density,
    check_gradient,
    draw_plan,
    flatten,
    layout,
    prototypes,
    seeded,
    unconstrain,
)
from diffsampler.integrations.pyro_density import Model
from diffsampler.integrations.pyro_graphs import CompiledDensity, TracedDensity
from diffsampler.integrations.pyro_handlers import Latent
from diffsampler.integrations.pyro_laws import draw_law
from diffsampler.space import Euclidean
from diffsampler.target import Target

__all__ = ["PyroPrior", "PyroTarget", "sample_prior"]


@final
class PyroTarget(Target):
    r"""The posterior of a Pyro model, unnormalized, over one unconstrained vector.

    The model may use plates, masks, scales, factors, deterministic sites, ``pyro.param`` (taken at its current value)
    and any support that has a bijection to :math:`\mathbb{R}^n` (:mod:`.pyro_supports`), also one that depends on other
    sites. Discrete latent sites with finitely many values are summed out (:mod:`.pyro_enumeration`). All positional and
    keyword arguments after ``model`` are the model's own. They are evaluated in float64; results have the dtype of
    ``x``. A target is one fixed density: do not change data in place afterwards.

    Arguments:
        model: A Pyro model.
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.

    Attributes:
        prior: The model's prior as a :class:`PyroPrior`, or None where it is not a normalized law that can be drawn
            from (``ImproperUniform``, masked or scaled latent sites).
        names: Names of the latent sites in the order of the vector.
        site_slices: The entries of the vector that belong to each site.
        vectorized: Whether the model is evaluated as a batch (otherwise by a Python loop, after a warning).

    Raises:
        ValueError: If the model has no continuous latent site, a discrete one that cannot be summed out, one without a
            bijection or without a density, two of one name, random minibatches, sites that differ between runs, no
            prior draw with a finite density, or a density whose gradient is cut.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     pyro.sample("y", dist.Normal(0.0, scale).expand(y.shape).to_event(1), obs=y)
        >>> target = PyroTarget(model, torch.tensor([0.3, -1.2]))
        >>> target.log_prob(torch.zeros(5, 1)).shape, target.constrain(torch.zeros(5, 1))["scale"].shape
        (torch.Size([5]), torch.Size([5]))
    """

    def __init__(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        if not callable(model):
            raise TypeError(f"Expected a Pyro model, a callable; got {type(model).__name__}.")
        traced = Model(model, args, kwargs)
        draws = prototypes(traced)
        latents = draws[0].latents
        traced.sites = layout(latents)
        points = torch.stack([flatten(traced.sites, draw.latents) for draw in draws])
        check_density(traced, points)
        check_batch(traced, points)
        check_gradient(traced, points)
        proper = all(latent.proper for latent in latents.values()) and not draws[0].tempered
        prior = PyroPrior(traced, latents) if proper else None
        super().__init__(Euclidean(points.shape[1]), prior=prior)
        self._model = traced
        self._points = points
        # Not super(): a bound method is pickled by its name, which is overridden.
        self._traced = TracedDensity(partial(Target.log_prob_and_score, self))

    @property
    def names(self) -> list[str]:
        """Latent sites, in the order of the vector."""
        return list(self._model.sites)

    @property
    def site_slices(self) -> dict[str, slice]:
        """Entries of the vector that belong to each site."""
        return {name: site.entries for name, site in self._model.sites.items()}

    @property
    def vectorized(self) -> bool:
        """Whether the model is evaluated as a batch."""
        return self._model.vectorized

    def log_prob(self, x: Tensor) -> Tensor:
        return _log_prob(self._model, x, likelihood=True)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.vectorized:
            return super().log_prob_and_score(x)
        if x.ndim == 2:
            return self._traced(x)
        log_prob, score = self._traced(x.reshape(-1, self.dim))
        return log_prob.reshape(x.shape[:-1]), score.reshape(x.shape)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Log density of the observed sites and factors, ``(..., D) -> (...)``."""
        flat = _rows(x, self.dim)
        return self._model.log_density(flat, likelihood=True)[1].to(x.dtype).reshape(x.shape[:-1])

    def compiled(
        self, batch_size: int, *, dtype: torch.dtype = torch.float64, backend: str = "inductor"
    ) -> CompiledDensity:
        """:meth:`log_prob_and_score` compiled for batches of ``batch_size``, for runs that need it thousands of times.

        Compiling takes seconds; afterwards small models are ten times as fast, large ones a few times.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"Expected batch_size to be a positive integer; got {batch_size!r}.")
        index = torch.arange(batch_size, device=self._points.device) % len(self._points)
        points = self._points[index].to(dtype)
        density = partial(Target.log_prob_and_score, self)
        return CompiledDensity(density, points, backend=backend, vectorized=self.vectorized)

    def constrain(self, x: Tensor, *, deterministic: bool = False) -> dict[str, Tensor]:
        """Values of the latent sites (and of deterministic sites on request), ``(..., D)`` to ``(..., *event)``."""
        return _constrain(self._model, x, deterministic=deterministic)

    def unconstrain(self, values: dict[str, Tensor]) -> Tensor:
        """Inverse of :meth:`constrain`: values ``(n, *event)`` of all latent sites to ``(n, D)``, float64."""
        return unconstrain(self._model, values)

    def flatten(self, values: dict[str, Tensor]) -> Tensor:
        """Unconstrained values ``(..., *shape)`` of all latent sites to ``(..., D)``."""
        parts = []
        for name, site in self._model.sites.items():
            if name not in values:
                raise ValueError(f"Expected values of all sites {self.names}; got {sorted(values)}.")
            batch = values[name].shape[: values[name].ndim - len(site.unconstrained)]
            parts.append(values[name].reshape((*batch, -1)))
        return torch.cat(parts, -1)

    def unflatten(self, x: Tensor) -> dict[str, Tensor]:
        """Split ``(..., D)`` into the unconstrained values ``(..., *shape)`` of each site."""
        sites = self._model.sites.items()
        return {name: x[..., site.entries].reshape(x.shape[:-1] + site.unconstrained) for name, site in sites}


@final
class PyroPrior(Target):
    """The normalized prior of a Pyro model over the unconstrained vector, with an exact sampler.

    Sites whose law does not depend on other sites are drawn as one batch. The rest follow by running the model
    forward, under ``vmap`` where its random operations allow and in a loop where they do not.
    """

    def __init__(self, model: Model, latents: dict[str, Latent]) -> None:
        dim = sum(math.prod(site.unconstrained) for site in model.sites.values())
        super().__init__(Euclidean(dim), log_normalizer=0.0, has_sampler=True)
        self._model = model
        self._home = next(iter(latents.values())).value.device
        self._roots, self._batched = draw_plan(model, latents)

    def log_prob(self, x: Tensor) -> Tensor:
        return _log_prob(self._model, x, likelihood=False)

    def constrain(self, x: Tensor) -> dict[str, Tensor]:
        return _constrain(self._model, x)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        x = self._draw(n, generator)
        return x if generator is None else x.to(generator.device)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        model = self._model
        with seeded(generator), model.scope(self._home):
            rows = {name: draw_law(fn, (n,)).double() for name, fn in self._roots.items()}
        if self._batched:
            with seeded(generator):
                return unconstrain(model, rows, size=n, randomness="different")
        with seeded(generator), model.scope(self._home):
            draws = [model.draw({name: row[i] for name, row in rows.items()}) for i in range(n)]
        return torch.stack([flatten(model.sites, draw.latents) for draw in draws])


def sample_prior(
    model: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    num_samples: int,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Draw latent sites of a Pyro model from its prior, each of shape ``(num_samples, *event)``, float64.

    Raises:
        ValueError: If the prior is not a normalized law (``ImproperUniform``, masked or scaled latent sites).
    """
    target = PyroTarget(model, *args, **({} if kwargs is None else kwargs))
    if target.prior is None:
        raise ValueError("Expected a proper prior; got a model with improper, masked or scaled latent sites.")
    return target.constrain(target.prior.sample(num_samples, generator=torch.Generator().manual_seed(seed)))


def _rows(x: Tensor, dim: int) -> Tensor:
    if x.shape[-1:] != (dim,):
        raise ValueError(f"Expected x with trailing shape ({dim},); got {tuple(x.shape)}.")
    return x.reshape(-1, dim).double()


def _log_prob(model: Model, x: Tensor, *, likelihood: bool) -> Tensor:
    dim = sum(math.prod(site.unconstrained) for site in model.sites.values())
    prior, data = model.log_density(_rows(x, dim), likelihood=likelihood)
    return (prior + data).to(x.dtype).reshape(x.shape[:-1])


def _constrain(model: Model, x: Tensor, *, deterministic: bool = False) -> dict[str, Tensor]:
    dim = sum(math.prod(site.unconstrained) for site in model.sites.values())

    def one(point: Tensor) -> dict[str, Tensor]:
        handler = model.substitute(point, likelihood=False, whole=deterministic)
        if not deterministic:
            return handler.values
        # What depends on a discrete site that is summed out has no value.
        known = {name: v for name, v in handler.deterministic.items() if v.shape == model.deterministic.get(name)}
        return handler.values | known

    with torch.no_grad():
        values = model.batch(one, _rows(x, dim))
    return {name: value.to(x.dtype).reshape(x.shape[:-1] + value.shape[1:]) for name, value in values.items()}
