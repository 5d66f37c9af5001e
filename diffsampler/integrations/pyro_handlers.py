"""Handlers that read a Pyro model: one sets its latent sites and adds up densities, one draws them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro import distributions as dist
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from diffsampler.integrations.pyro_enumeration import Factor, is_enumerated, marginal
from diffsampler.integrations.pyro_laws import draw_discrete, draw_law, first_discrete, law_log_prob
from diffsampler.integrations.pyro_supports import bijection

__all__ = ["Complete", "Draw", "Latent", "Site", "Substitute", "changed", "is_deterministic"]


class Site(NamedTuple):
    """Place of a latent site in the unconstrained vector."""

    entries: slice
    """Entries of the vector."""
    unconstrained: tuple[int, ...]
    """Shape before the bijection."""
    constrained: tuple[int, ...]
    """Shape of the site's value, plates included."""


class Latent(NamedTuple):
    """A latent site as one run of the model met it."""

    value: Tensor
    unconstrained: Tensor
    fn: Any
    proper: bool
    """Whether the site is a normalized law that can be drawn from: not scaled, not masked, not improper."""
    dependent: bool
    """Whether its law depends on other latent sites (known under vmap only)."""


class Complete(BaseException):
    """Leaves a model once its last latent site is known; not an Exception, so that no model catches it."""


class Substitute(Messenger):
    """Sets latent sites from one unconstrained vector and adds up log densities.

    Arguments:
        sites: Layout of the vector.
        x: The vector, shape ``(D,)``.
        likelihood: Whether to evaluate observed sites and factors.
        whole: Whether to run the model to its end; otherwise it is left after the last latent site.
        enumerates: Whether discrete latent sites are summed out; :meth:`finish` must then follow the run.

    Attributes:
        values: Values of the latent sites.
        deterministic: Values of deterministic sites.
        latent: Sites of the prior, where discrete ones are summed out.
        observed: Observed sites and factors.
    """

    def __init__(
        self, sites: dict[str, Site], x: Tensor, *, likelihood: bool, whole: bool, enumerates: bool = False
    ) -> None:
        super().__init__()
        self.whole = whole
        self.sites = sites
        self.x = x
        self.likelihood = likelihood
        self.enumerates = enumerates
        self.log_prior = x.new_zeros(())
        self.log_likelihood = x.new_zeros(())
        self.values: dict[str, Tensor] = {}
        self.deterministic: dict[str, Tensor] = {}
        self.latent: list[Factor] = []
        self.observed: list[Factor] = []

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        name, fn = msg["name"], msg["fn"]
        if self.enumerates and is_enumerated(msg):
            self.latent.append(Factor.of(msg))
            return
        if name not in self.sites:
            raise ValueError(changed(set(self.sites), {*self.values, name}))
        site = self.sites[name]
        transform = bijection(name, fn)
        u = self.x[site.entries].reshape(site.unconstrained)
        value = transform(u)
        # Under enumeration the law may have one more dimension for every discrete site that it depends on.
        if value.shape != (site.constrained if self.enumerates else fn.shape()):
            raise ValueError(
                f"Expected latent site {name!r} to keep the shape {site.constrained}; got {tuple(fn.shape())}."
            )
        self.log_prior = self.log_prior + transform.log_abs_det_jacobian(u, value).sum()
        self.values[name] = msg["value"] = value
        if self.enumerates:
            self.latent.append(Factor.of(msg))
        else:
            self.log_prior = self.log_prior + scale_and_mask(law_log_prob(fn, value), msg["scale"], msg["mask"]).sum()
        msg["done"] = True
        if not self.whole and len(self.values) == len(self.sites):
            raise Complete

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            return
        if is_deterministic(msg):
            self.deterministic[msg["name"]] = msg["value"]
        elif self.likelihood:
            self.observed.append(Factor.of(msg))
            if not self.enumerates:
                log_prob = scale_and_mask(law_log_prob(msg["fn"], msg["value"]), msg["scale"], msg["mask"])
                self.log_likelihood = self.log_likelihood + log_prob.sum()

    def _pyro_post_param(self, msg: Any) -> None:
        msg["value"] = msg["value"].detach()

    def finish(self) -> None:
        """Sum discrete sites out, once the run is over."""
        jacobian = self.log_prior
        prior = marginal(self.latent)
        self.log_prior = jacobian + prior
        if self.observed:
            self.log_likelihood = marginal([*self.latent, *self.observed]) - prior


class Draw(Messenger):
    """Runs the model forward and records its latent sites.

    Arguments:
        given: Sites that are set instead of drawn.
        num_sites: Number of continuous latent sites after which the model is left; None to run it to its end.

    Attributes:
        latents: Continuous latent sites.
        discrete: Names of discrete latent sites, and whether each can be summed out.
        depth: Number of batch dimensions, plates included, of the deepest site.
        tempered: Whether the law of a discrete site is scaled or masked.
        deterministic: Shapes of deterministic sites.
    """

    def __init__(self, given: dict[str, Tensor] | None = None, *, num_sites: int | None = None) -> None:
        super().__init__()
        self.num_sites = num_sites
        self.given = {} if given is None else given
        self.latents: dict[str, Latent] = {}
        self.discrete: dict[str, bool] = {}
        self.depth = 0
        self.tempered = False
        self.deterministic: dict[str, tuple[int, ...]] = {}
        self.names: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            _refuse_minibatch(msg)
            return
        self._name(msg["name"])
        if msg["is_observed"]:
            return
        name, fn = msg["name"], msg["fn"]
        if fn.support.is_discrete:
            self._draw_discrete(msg)
            return
        transform = bijection(name, fn)
        proper = _is_plain(msg["scale"], msg["mask"])
        if name in self.given:
            value = self.given[name]
        else:
            try:
                value = draw_law(fn)
            except NotImplementedError:
                # No sampler (ImproperUniform) or a wrong one: a point near the origin, as Pyro starts.
                proper = False
                value = transform(torch.rand(transform.inverse_shape(fn.shape())) * 4.0 - 2.0)
        value = value.double()
        # What a discrete site decides about a later law is not seen here.
        dependent = bool(self.discrete) or _is_batched(fn)
        self.latents[name] = Latent(value, transform.inv(value), fn, proper, dependent)
        msg["value"] = value
        msg["done"] = True
        if len(self.latents) == self.num_sites:
            raise Complete

    def _name(self, name: str) -> None:
        """Two sites of one name would share one value, or hide each other from the result."""
        if name in self.names:
            raise ValueError(
                f"Expected every sample site to have a name of its own; got two named {name!r}. In a loop, number "
                f'them: pyro.sample(f"{name}_{{i}}", ...), or use a plate that is not iterated over.'
            )
        self.names.add(name)

    def _draw_discrete(self, msg: Any) -> None:
        """A draw, or any value once all continuous sites are given: their supports do not depend on it."""
        fn = msg["fn"]
        self.discrete[msg["name"]] = bool(fn.has_enumerate_support)
        self.tempered |= not _is_plain(msg["scale"], msg["mask"])
        if not fn.has_enumerate_support:
            return
        msg["value"] = first_discrete(fn) if len(self.given) == self.num_sites else draw_discrete(fn)
        msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            self.depth = max(self.depth, len(msg["fn"].batch_shape))
        if is_deterministic(msg):
            self.deterministic[msg["name"]] = tuple(msg["value"].shape)

    def _pyro_post_param(self, msg: Any) -> None:
        msg["value"] = msg["value"].detach()


def is_deterministic(msg: Any) -> bool:
    """Whether a site only records a value: ``pyro.deterministic``, or what a reparametrized site has become."""
    fn = msg["fn"]
    if msg["infer"].get("_deterministic"):
        return True
    masked = isinstance(fn, dist.MaskedDistribution) and fn._mask is False
    return bool(msg["is_observed"]) and masked and isinstance(fn.base_dist, dist.Delta)


def _is_batched(value: Any, depth: int = 0) -> bool:
    """Whether any tensor inside a distribution is batched by the vmap in progress."""
    if isinstance(value, Tensor):
        return torch._C._functorch.is_batchedtensor(value)
    if isinstance(value, dict):
        return any(_is_batched(item, depth) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_is_batched(item, depth) for item in value)
    inside = isinstance(value, (torch.distributions.Distribution, torch.distributions.Transform))
    return inside and depth < 8 and _is_batched(vars(value), depth + 1)


def _is_plain(scale: Any, mask: Any) -> bool:
    """Whether a site's law is neither scaled nor masked; either would leave it unnormalized."""
    return not isinstance(scale, Tensor) and scale == 1 and (mask is None or mask is True)


def _refuse_minibatch(msg: Any) -> None:
    fn = msg["fn"]
    if msg["value"] is None and fn.subsample_size is not None and fn.subsample_size < fn.size:
        raise ValueError(
            f"Expected a model without minibatches; got plate {msg['name']!r} with subsample_size={fn.subsample_size} "
            f"of {fn.size}: its density is random, so weights and evidence would be wrong. Drop subsample_size."
        )


def changed(expected: set[str], got: set[str]) -> str:
    return (
        f"Expected the same latent sites in every run; got {sorted(got)} after {sorted(expected)}. "
        "Which sites exist must not depend on sampled values."
    )
