r"""The log density of a Pyro model as a batched function of one unconstrained vector.

A model with latent sites :math:`\theta_s` of support :math:`S_s` and data :math:`y` is read through two handlers of our
own, without a trace: :class:`Substitute` puts values in and adds up

.. math:: \log \rho(x) = \sum_s [\log p(\theta_s) + \log |\det J_s(x_s)|] + \sum_o \log p(y_o | \theta),
          \qquad \theta_s = T_s(x_s),

with :math:`T_s` the bijection onto the site's support as it is *in that run* (a support may depend on other sites), and
:class:`Draw` runs the model forward. Discrete latent sites are summed out (:mod:`.pyro_enumeration`). :class:`Model`
batches both with ``torch.func.vmap`` or, where a model cannot be batched, with a Python loop.

While a model runs, argument validation is off (it branches on values) and the default dtype is float64; both are
process-wide settings of torch and Pyro, so they are restored after every call.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from pyro import validation_enabled
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from diffsampler.integrations.pyro_enumeration import Enumeration
from diffsampler.integrations.pyro_handlers import Complete, Draw, Site, Substitute, changed

__all__ = ["Model", "batched_random", "stack"]

# Random operations that vmap draws anew for every row, whether or not their arguments are batched.
BATCHED_RANDOM = {"normal", "normal_", "rand", "randn", "uniform_", "_standard_gamma"}


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
        self.depth: int | None = None
        """Number of plates where discrete latent sites are summed out; None where there are none."""
        self.deterministic: dict[str, tuple[int, ...]] = {}

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
        enumerates = self.depth is not None
        handler = Substitute(self.sites, x, likelihood=likelihood, whole=whole or likelihood, enumerates=enumerates)
        self._run(handler)
        if len(handler.values) != len(self.sites):
            raise ValueError(changed(set(self.sites), set(handler.values)))
        if enumerates:
            handler.finish()
        return handler

    def draw(self, given: dict[str, Tensor] | None = None) -> Draw:
        """Run the model forward once, inside :meth:`scope`; to its end as long as its sites are not known."""
        handler = Draw(given, num_sites=len(self.sites) or None)
        self._run(handler)
        return handler

    def _run(self, handler: Messenger) -> None:
        # The inner handler comes first: it sets discrete sites, and tells every site its dimensions.
        inner = contextlib.nullcontext() if self.depth is None else Enumeration(-1 - self.depth)
        with contextlib.suppress(Complete), handler:
            if isinstance(handler, Substitute):
                with inner:
                    self.function(*self.args, **self.kwargs)
            else:
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
