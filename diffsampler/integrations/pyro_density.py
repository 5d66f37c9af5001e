r"""The log density of a Pyro model as a batched function of one unconstrained vector.

A model with latent sites :math:`\theta_s` of support :math:`S_s` and data :math:`y` is read through two handlers of our
own, without a trace and without enumeration: :class:`Substitute` puts values in and adds up

.. math:: \log \rho(x) = \sum_s [\log p(\theta_s) + \log |\det J_s(x_s)|] + \sum_o \log p(y_o | \theta),
          \qquad \theta_s = T_s(x_s),

with :math:`T_s` = ``biject_to`` of the site's support as it is *in that run* (a support may depend on other sites), and
:class:`Draw` runs the model forward. :class:`Model` batches both with ``torch.func.vmap`` or, where a model cannot be
batched, with a Python loop.

While a model runs, argument validation is off (it branches on values) and the default dtype is float64; both are
process-wide settings of torch and Pyro, so they are restored after every call.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from pyro import distributions as dist
from pyro import validation_enabled
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

__all__ = ["Draw", "Latent", "Model", "Site", "Substitute"]

# Random operations that vmap draws anew for every row, whether or not their arguments are batched.
BATCHED_RANDOM = {"normal", "normal_", "rand", "randn", "uniform_", "_standard_gamma"}
PERIODIC = (torch.distributions.VonMises, dist.SineBivariateVonMises)


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


class _Complete(BaseException):
    """Leaves a model once its last latent site is known; not an Exception, so that no model catches it."""


class Substitute(Messenger):
    """Sets latent sites from one unconstrained vector and adds up log densities.

    Arguments:
        sites: Layout of the vector.
        x: The vector, shape ``(D,)``.
        likelihood: Whether to evaluate observed sites and factors.
        whole: Whether to run the model to its end; otherwise it is left after the last latent site.
    """

    def __init__(self, sites: dict[str, Site], x: Tensor, *, likelihood: bool, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        self.sites = sites
        self.x = x
        self.likelihood = likelihood
        self.log_prior = x.new_zeros(())
        self.log_likelihood = x.new_zeros(())
        self.values: dict[str, Tensor] = {}
        self.deterministic: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        name, fn = msg["name"], msg["fn"]
        if name not in self.sites:
            raise ValueError(_changed(set(self.sites), {*self.values, name}))
        site = self.sites[name]
        transform = biject_to(fn.support)
        u = self.x[site.entries].reshape(site.unconstrained)
        value = transform(u)
        if value.shape != fn.shape():
            raise ValueError(
                f"Expected latent site {name!r} to keep the shape {site.constrained}; got {tuple(fn.shape())}."
            )
        log_prob = scale_and_mask(fn.log_prob(value), msg["scale"], msg["mask"])
        self.log_prior = self.log_prior + log_prob.sum() + transform.log_abs_det_jacobian(u, value).sum()
        self.values[name] = msg["value"] = value
        msg["done"] = True
        if not self.whole and len(self.values) == len(self.sites):
            raise _Complete

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            return
        if msg["infer"].get("_deterministic"):
            self.deterministic[msg["name"]] = msg["value"]
        elif self.likelihood:
            log_prob = scale_and_mask(msg["fn"].log_prob(msg["value"]), msg["scale"], msg["mask"])
            self.log_likelihood = self.log_likelihood + log_prob.sum()

    def _pyro_post_param(self, msg: Any) -> None:
        msg["value"] = msg["value"].detach()


class Draw(Messenger):
    """Runs the model forward and records its latent sites.

    Arguments:
        given: Sites that are set instead of drawn.
        num_sites: Number of latent sites after which the model is left; None to run it to its end.
    """

    def __init__(self, given: dict[str, Tensor] | None = None, *, num_sites: int | None = None) -> None:
        super().__init__()
        self.num_sites = num_sites
        self.given = {} if given is None else given
        self.latents: dict[str, Latent] = {}
        self.discrete: list[str] = []

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            _refuse_minibatch(msg)
            return
        if msg["is_observed"]:
            return
        name, fn = msg["name"], msg["fn"]
        support = fn.support
        if support.is_discrete:
            self.discrete.append(name)
            return
        _refuse_support(name, fn)
        transform = biject_to(support)
        proper = _is_plain(msg["scale"], msg["mask"])
        if name in self.given:
            value = self.given[name]
        else:
            try:
                value = fn.sample(*msg["args"], **msg["kwargs"])
            except NotImplementedError:
                # No sampler (ImproperUniform): a point near the origin of the unconstrained space, as Pyro starts.
                proper = False
                value = transform(torch.rand(transform.inverse_shape(fn.shape())) * 4.0 - 2.0)
        value = value.double()
        self.latents[name] = Latent(value, transform.inv(value), fn, proper, _is_batched(fn))
        msg["value"] = value
        msg["done"] = True
        if len(self.latents) == self.num_sites:
            raise _Complete

    def _pyro_post_param(self, msg: Any) -> None:
        msg["value"] = msg["value"].detach()


class Model:
    """A Pyro model with its arguments, run under handlers one point at a time or batched over points.

    Floating-point tensors among the arguments are promoted to float64. ``promote`` does so for every operation that
    refuses to mix dtypes, for models that hold float32 data in a closure or a module.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.function = function
        self.user_args, self.user_kwargs = args, kwargs
        self.args, self.kwargs = _convert((args, kwargs))
        self.sites: dict[str, Site] = {}
        self.device: torch.device | None = None
        self.promote = False
        self.vectorized = True

    @contextlib.contextmanager
    def scope(self, device: torch.device | None = None, *, validate: bool = False) -> Iterator[None]:
        """Settings under which the model runs; all of them are restored on exit.

        Arguments:
            device: Where the arguments and new tensors of the model shall be; as they are if None.
            validate: Leave validation as the user set it instead of switching it off.
        """
        if device is not None and device != self.device:
            self.args, self.kwargs = _convert((self.args, self.kwargs), device)
            self.device = device
        dtype = torch.get_default_dtype()
        # Pyro restores torch's validation switch to its own; the two may differ.
        switch = torch.distributions.Distribution._validate_args
        try:
            with contextlib.ExitStack() as stack:
                if not validate:
                    stack.enter_context(validation_enabled(is_validate=False))
                if self.promote:
                    stack.enter_context(_Promote())
                if device is not None and device.type != "cpu":
                    stack.enter_context(device)
                torch.set_default_dtype(torch.float64)
                yield
        finally:
            torch.set_default_dtype(dtype)
            torch.distributions.Distribution._validate_args = switch

    def substitute(self, x: Tensor, *, likelihood: bool, whole: bool = False) -> Substitute:
        """Run the model at one point ``(D,)``, inside :meth:`scope`; to its end for the likelihood or if ``whole``."""
        handler = Substitute(self.sites, x, likelihood=likelihood, whole=whole or likelihood)
        self._run(handler)
        if len(handler.values) != len(self.sites):
            raise ValueError(_changed(set(self.sites), set(handler.values)))
        return handler

    def draw(self, given: dict[str, Tensor] | None = None) -> Draw:
        """Run the model forward once, inside :meth:`scope`; to its end as long as its sites are not known."""
        handler = Draw(given, num_sites=len(self.sites) or None)
        self._run(handler)
        return handler

    def _run(self, handler: Messenger) -> None:
        with contextlib.suppress(_Complete), handler:
            self.function(*self.args, **self.kwargs)

    def batch(self, function: Callable[..., Any], rows: Any, *, randomness: str = "error") -> Any:
        """Map a function of one point over the first axis of ``rows`` (a tensor or a dict of tensors)."""
        first = rows if isinstance(rows, Tensor) else next(iter(rows.values()))
        with self.scope(first.device):
            if self.vectorized:
                return _vmap(function, randomness)(rows)
            if isinstance(rows, Tensor):
                return stack([function(row) for row in rows])
            return stack([function({key: row[i] for key, row in rows.items()}) for i in range(first.shape[0])])

    def log_density(self, x: Tensor, *, likelihood: bool) -> tuple[Tensor, Tensor]:
        """Log prior (with Jacobian) and log likelihood of ``(n, D)`` float64 points, each ``(n,)``.

        A point at which the model fails with a linear-algebra error (a covariance that is not positive definite)
        gets NaN instead of taking the whole batch down.
        """

        def one(point: Tensor) -> tuple[Tensor, Tensor]:
            handler = self.substitute(point, likelihood=likelihood)
            return handler.log_prior, handler.log_likelihood

        try:
            return cast(tuple[Tensor, Tensor], self.batch(one, x))
        except torch.linalg.LinAlgError:
            if x.shape[0] == 1:
                failed = (x * torch.nan).sum(-1)
                return failed, failed
            halves = [self.log_density(half, likelihood=likelihood) for half in x.tensor_split(2)]
            return torch.cat([prior for prior, _ in halves]), torch.cat([data for _, data in halves])


def stack(results: list[Any]) -> Any:
    """Stack equal structures (tensors, tuples or dicts of tensors) along a new first axis."""
    first = results[0]
    if isinstance(first, Tensor):
        return torch.stack(results)
    if isinstance(first, dict):
        return {key: torch.stack([result[key] for result in results]) for key in first}
    return tuple(torch.stack(column) for column in zip(*results, strict=True))


def batched_random(function: Callable[[], object]) -> bool:
    """Whether a function draws only with operations that vmap is known to draw anew for every row."""

    class Watch(TorchDispatchMode):
        unknown = False

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if torch.Tag.nondeterministic_seeded in func.tags:
                self.unknown |= func._schema.name.removeprefix("aten::") not in BATCHED_RANDOM
            return func(*args, **(kwargs or {}))

    with Watch() as watch:
        function()
    return not watch.unknown


class _Promote(TorchFunctionMode):
    """Repeats an operation that refuses to mix float32 and float64 with everything in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if not any(word in str(error) for word in ("dtype", "scalar type", "Float", "Double")):
                raise
            args, kwargs = _convert((args, kwargs))
            return func(*args, **kwargs)


def _convert(tree: Any, device: torch.device | None = None) -> Any:
    """Floating-point tensors in float64, all tensors on ``device`` if one is given."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device=device, dtype=torch.float64 if leaf.is_floating_point() else leaf.dtype)

    return tree_map(convert, tree)


def _vmap(function: Callable[..., Any], randomness: str) -> Callable[..., Any]:
    mapped = torch.func.vmap(function, randomness=randomness)

    def call(rows: Any) -> Any:
        with warnings.catch_warnings():
            # Slow batching rules are still right, and not the user's concern.
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            return mapped(rows)

    return call


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


def _refuse_support(name: str, fn: Any) -> None:
    base = fn
    while base is not None:
        if isinstance(base, dist.Delta):
            raise ValueError(
                f"Expected continuous latent sites; got Delta at {name!r}. Use pyro.deterministic or obs= instead."
            )
        if isinstance(base, PERIODIC):
            raise ValueError(
                f"Expected latent sites with a proper density on R^n; got the periodic {type(base).__name__} at "
                f"{name!r}. Sample a Uniform(-pi, pi) angle and put the law in a pyro.factor."
            )
        base = getattr(base, "base_dist", None)
    try:
        biject_to(fn.support)
    except NotImplementedError as error:
        raise ValueError(
            f"Expected a support with a bijection to R^n; got {fn.support} at latent site {name!r}."
        ) from error


def _changed(expected: set[str], got: set[str]) -> str:
    return (
        f"Expected the same latent sites in every run; got {sorted(got)} after {sorted(expected)}. "
        "Which sites exist must not depend on sampled values."
    )
