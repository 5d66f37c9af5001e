"""What a posterior says about data: replicated or new data, and the log likelihood of every observation."""

from __future__ import annotations

from typing import Any, final

import torch
from pyro.distributions import Unit
from pyro.distributions.util import broadcast_shape, scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from diffsampler.integrations.pyro_checks import seeded
from diffsampler.integrations.pyro_density import Model, batched_random
from diffsampler.integrations.pyro_enumeration import Factor, pointwise
from diffsampler.integrations.pyro_handlers import is_deterministic
from diffsampler.integrations.pyro_laws import draw_discrete, draw_law, law_log_prob
from diffsampler.integrations.pyro_target import PyroTarget

__all__ = ["log_likelihoods", "observed_data", "predict"]


@final
class _Replicate(Messenger):
    """Runs a model with given latent sites and draws everything else, also what was observed.

    Attributes:
        data: Drawn sites, except latent ones that are not asked for.
        deterministic: Deterministic sites.
    """

    def __init__(self, given: dict[str, Tensor]) -> None:
        super().__init__()
        self.given = given
        self.data: dict[str, Tensor] = {}
        self.deterministic: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        fn, name = msg["fn"], msg["name"]
        if site_is_subsample(msg) or is_deterministic(msg) or _is_factor(fn):
            return
        if name in self.given:
            msg["value"] = self.given[name]
        else:
            if msg["value"] is not None:
                # Data may be longer than the law that they share.
                batch = msg["value"].shape[: msg["value"].dim() - fn.event_dim]
                fn = fn.expand(broadcast_shape(fn.batch_shape, batch))
            msg["value"] = draw_discrete(fn) if fn.has_enumerate_support else draw_law(fn)
            self.data[name] = msg["value"]
        msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_deterministic(msg):
            self.deterministic[msg["name"]] = msg["value"]

    def _pyro_post_param(self, msg: Any) -> None:
        msg["value"] = msg["value"].detach()


def predict(
    target: PyroTarget,
    values: dict[str, Tensor],
    *,
    args: tuple[Any, ...] | None = None,
    kwargs: dict[str, Any] | None = None,
    deterministic: bool = False,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    r"""Draws of data given draws of the latent sites: of :math:`p(\tilde y | y)` if those are of :math:`p(\theta | y)`.

    Observed sites are drawn from their laws, whatever was observed. Discrete latent sites, and latent sites that
    ``values`` lacks, are drawn from their laws too.

    Arguments:
        target: A Pyro model with its data.
        values: Equally weighted draws of the latent sites, each ``(n, *shape)``.
        args: Positional arguments of the model instead of the target's, such as new covariates.
        kwargs: Keyword arguments of the model instead of the target's.
        deterministic: Whether to return deterministic sites too.
        generator: Source of randomness.

    Returns:
        Drawn sites, each ``(n, *shape)``, float64 if real.
    """
    own = target._model
    model = Model(own.function, own.user_args if args is None else args, own.user_kwargs if kwargs is None else kwargs)
    model.promote, model.vectorized = own.promote, own.vectorized
    rows = {name: value.detach().double() for name, value in values.items()}
    missing = sorted(set(target.names) - set(rows))
    if missing:
        raise ValueError(f"Expected values of all latent sites; got none of {', '.join(map(repr, missing))}.")

    def one(row: dict[str, Tensor]) -> dict[str, Tensor]:
        handler = _Replicate(row)
        with handler:
            model.function(*model.args, **model.kwargs)
        return handler.data | (handler.deterministic if deterministic else {})

    def some() -> Any:
        with torch.random.fork_rng(devices=[]):
            return model.batch(one, {name: value[:2] for name, value in rows.items()}, randomness="different")

    if model.vectorized:
        try:
            model.vectorized = batched_random(some)
        except RuntimeError:  # whatever vmap cannot do, the loop can
            model.vectorized = False
    with seeded(generator), torch.no_grad():
        drawn: dict[str, Tensor] = model.batch(one, rows, randomness="different")
    return drawn


def observed_data(target: PyroTarget) -> dict[str, Tensor]:
    """Values of the observed sites."""
    return {factor.name: factor.value.detach() for factor in _observed(target)}


def log_likelihoods(target: PyroTarget, x: Tensor) -> dict[str, Tensor]:
    """Log likelihood of every observation at points ``x (n, D)``, each site ``(n, *batch)``.

    Discrete latent sites are summed out. A site whose observations share one cannot be split, and is left out.
    """
    model = target._model
    names = [factor.name for factor in _observed(target)]
    with torch.no_grad(), model.scope(x.device):
        probe = model.substitute(target._points[0].to(x.device), likelihood=True)
        kept = [name for name in names if _split(probe.latent, probe.observed, name) is not None]

    def one(point: Tensor) -> dict[str, Tensor]:
        handler = model.substitute(point, likelihood=True)
        terms = {name: _split(handler.latent, handler.observed, name) for name in kept}
        return {name: term for name, term in terms.items() if term is not None}

    if not kept:
        return {}
    with torch.no_grad():
        found: dict[str, Tensor] = model.batch(one, x.reshape(-1, target.dim).double())
    return found


def _split(latent: list[Factor], observed: list[Factor], name: str) -> Tensor | None:
    site = next(factor for factor in observed if factor.name == name)
    if any("_enumerate_dim" in factor.infer for factor in latent):
        return pointwise([*latent, *observed], name)
    return scale_and_mask(law_log_prob(site.fn, site.value), site.scale, site.mask)


def _observed(target: PyroTarget) -> list[Factor]:
    model = target._model
    with torch.no_grad(), model.scope(target._points.device):
        handler = model.substitute(target._points[0], likelihood=True)
    return [factor for factor in handler.observed if not _is_factor(factor.fn)]


def _is_factor(fn: Any) -> bool:
    """Whether a law is the unit law of ``pyro.factor``, masked or not."""
    while fn is not None:
        if isinstance(fn, Unit):
            return True
        fn = getattr(fn, "base_dist", None)
    return False
