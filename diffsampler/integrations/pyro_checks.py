"""What is established about a Pyro model when a target is made from it: layout, checks, and how to draw its prior."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyro
import torch
from torch import Tensor

from diffsampler.integrations.pyro_density import Model, batched_random
from diffsampler.integrations.pyro_handlers import Draw, Latent, Site, Substitute

__all__ = [
    "check_batch",
    "check_density",
    "check_gradient",
    "draw_plan",
    "flatten",
    "layout",
    "prototypes",
    "seeded",
    "unconstrain",
]

NUM_PROBES = 6
T = TypeVar("T")


@contextlib.contextmanager
def seeded(generator: torch.Generator | None) -> Iterator[None]:
    """Seed torch's global generator, which Pyro draws from, for the length of a block."""
    home = None if generator is None else generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=home))
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield


def prototypes(model: Model) -> list[Draw]:
    """Forward runs that fix the layout, with validation as the user set it.

    A draw of the prior may be one that the model cannot handle (a covariance that is not positive definite), so only
    a model that fails at every draw is refused, with its own error.
    """
    seeds = torch.Generator().manual_seed(0)
    draws: list[Draw] = []
    errors: list[Exception] = []
    for _ in range(4 * NUM_PROBES):
        try:
            with seeded(seeds):
                draws.append(_promoting(model, _draw))
        except (ValueError, torch.linalg.LinAlgError) as error:
            errors.append(error)
        if len(draws) == NUM_PROBES:
            break
    if not draws:
        raise errors[0]
    countless = sorted({name for draw in draws for name, finite in draw.discrete.items() if not finite})
    if countless:
        raise ValueError(
            f"Expected discrete latent sites with finitely many values; got {', '.join(map(repr, countless))}, which "
            "cannot be summed out. Sum over the values that matter in the model, or truncate the law."
        )
    if any(draw.discrete for draw in draws):
        model.depth = max(draw.depth for draw in draws)
    model.deterministic = draws[0].deterministic
    shapes = [{name: tuple(latent.value.shape) for name, latent in draw.latents.items()} for draw in draws]
    for other in shapes[1:]:
        if other != shapes[0]:
            raise ValueError(f"Expected the same latent sites and shapes in every run; got {shapes[0]} and {other}.")
    if not shapes[0]:
        raise ValueError("Expected a model with latent sites; got none. Is every site observed?")
    return draws


def _draw(model: Model) -> Draw:
    with model.scope(validate=True):
        return model.draw()


def _promoting(model: Model, function: Callable[[Model], T]) -> T:
    """Call a function of the model; where it mixes dtypes, once more with promotion, which then stays on."""
    try:
        return function(model)
    except torch.linalg.LinAlgError:
        raise
    except RuntimeError as error:
        if model.promote:
            raise
        model.promote = True
        try:
            return function(model)
        except RuntimeError:
            model.promote = False
            raise error from None


def layout(latents: dict[str, Latent]) -> dict[str, Site]:
    sites, start = {}, 0
    for name, latent in latents.items():
        size = latent.unconstrained.numel()
        shape = tuple(latent.unconstrained.shape)
        sites[name] = Site(slice(start, start + size), shape, tuple(latent.value.shape))
        start += size
    return sites


def flatten(sites: dict[str, Site], latents: dict[str, Latent]) -> Tensor:
    return torch.cat([latents[name].unconstrained.reshape(-1) for name in sites])


def check_density(model: Model, points: Tensor) -> None:
    """The density, one point at a time: defined, the same twice, and finite somewhere."""
    model.vectorized = False
    _promoting(model, lambda model: _validate(model, points))
    values = _total(model, points)
    again = _total(model, points)
    if not torch.allclose(values, again, rtol=0.0, atol=0.0, equal_nan=True):
        raise ValueError(
            "Expected the same log density at the same point; got two values. The model draws random numbers outside "
            "its sample sites, or hides a site from the density."
        )
    if not values.isfinite().any():
        handler = _terms(model, points[0])
        raise ValueError(
            f"Expected a finite log density at draws from the prior; got none in {len(points)} draws "
            f"(first: log prior {float(handler.log_prior):.4g}, log likelihood {float(handler.log_likelihood):.4g} at "
            f"{ {name: value.tolist() for name, value in handler.values.items()} })."
        )
    _refuse_flat(model, points)


def _refuse_flat(model: Model, points: Tensor) -> None:
    """A density that ignores an entry of the vector cannot be normalized (masked sites, imputation of known data)."""
    x = points.clone().requires_grad_()
    prior, data = model.log_density(x, likelihood=True)
    total = prior + data
    # A density without a gradient (a uniform law behind a shift, whose support torch does not know) ignores all.
    score = torch.autograd.grad(total.sum(), x)[0] if total.requires_grad else torch.zeros_like(x)
    value = total.detach()
    flat = (score == 0).all(0)
    if not flat.any():
        return
    moved = _total(model, points + flat.to(points.dtype))
    if torch.allclose(moved, value, rtol=0.0, atol=0.0, equal_nan=True):
        names = {name: int(flat[site.entries].sum()) for name, site in model.sites.items() if flat[site.entries].any()}
        found = ", ".join(f"{count} of latent site {name!r}" for name, count in names.items())
        raise ValueError(
            f"Expected a density that depends on every latent entry; it ignores {found}, so it cannot be normalized. "
            "Leave out entries that are masked or whose data are known (obs_mask imputes all entries)."
        )


def _validate(model: Model, points: Tensor) -> None:
    """Observed values must be in their support; with validation on, Pyro says so itself."""
    errors: list[Exception] = []
    for point in points:
        try:
            with model.scope(point.device, validate=True):
                model.substitute(point, likelihood=True)
            return
        except (ValueError, torch.linalg.LinAlgError) as error:
            errors.append(error)
    raise errors[0]


def _total(model: Model, points: Tensor) -> Tensor:
    with torch.no_grad():
        prior, data = model.log_density(points, likelihood=True)
    return prior + data


def _terms(model: Model, point: Tensor) -> Substitute:
    with model.scope(point.device):
        return model.substitute(point, likelihood=True)


def check_batch(model: Model, points: Tensor) -> None:
    """Compare the batched density with the loop; keep the loop, with one warning, where they do not agree."""
    loop = _total(model, points)
    model.vectorized = True
    try:
        with torch.random.fork_rng(devices=[]):
            batch = _total(model, points)
    except Exception as error:  # whatever vmap cannot do, the loop can
        reason = _reason(error)
    else:
        if torch.allclose(batch, loop, rtol=1e-8, atol=1e-8, equal_nan=True):
            return
        reason = f"batched and single log densities differ by {float((batch - loop).abs().max()):.3g}"
    model.vectorized = False
    warnings.warn(
        f"Evaluating this Pyro model with a Python loop over points, which is slow: {reason}.",
        UserWarning,
        stacklevel=3,
    )


def check_gradient(model: Model, points: Tensor) -> None:
    """The gradient along each latent site against differences of the density.

    A value that leaves the graph (``.item()``, ``float``, ``.detach()``) takes its part of the gradient along, and
    every sampler that follows gradients would be slow or stuck without a sign. A site is at fault where gradient and
    differences disagree at most points, at every width: kinks, rounding and curvature do not add up to that.
    """
    x = points.clone().requires_grad_()
    prior, data = model.log_density(x, likelihood=True)
    total = prior + data
    gradient = torch.autograd.grad(total.sum(), x)[0] if total.requires_grad else torch.zeros_like(x)
    value = total.detach()
    directions = points.new_zeros(len(model.sites), points.shape[1])
    for direction, site in zip(directions, model.sites.values(), strict=True):
        direction[site.entries] = 1.0
    expected = gradient @ directions.mT
    wrong, slope = torch.ones_like(expected, dtype=torch.bool), expected
    for width in (1e-5, 1e-3):
        ends = [_total(model, (points[:, None] + sign * width * directions).flatten(0, 1)) for sign in (1.0, -1.0)]
        slope = ((ends[0] - ends[1]) / (2.0 * width)).reshape(expected.shape)
        size = 1e-14 * (1.0 + value.abs())[:, None] / width + 2e-2 * (1.0 + slope.abs() + expected.abs())
        # NaN compares as False: where nothing can be computed, nothing is claimed.
        wrong &= (slope - expected).abs() > size
    for name, bad, by_point, found in zip(model.sites, wrong.mT, expected.mT, slope.mT, strict=True):
        if int(bad.sum()) > len(points) // 2:
            first = int(bad.nonzero()[0])
            raise ValueError(
                f"Expected the gradient of the log density to follow latent site {name!r}; it is "
                f"{float(by_point[first]):.4g} where differences give {float(found[first]):.4g}. The model takes "
                "values out of the graph: use torch operations instead of .item(), float(), .detach(), torch.tensor() "
                "or numpy on what depends on the site, and torch.where instead of a branch."
            )


def _reason(error: Exception) -> str:
    text = str(error)
    if "data-dependent control flow" in text or "guard on data-dependent" in text:
        reason = "it branches on a sampled value"
    elif ".item()" in text:
        reason = "it takes .item() of a sampled value"
    elif "random" in text:
        reason = "it draws random numbers outside its sample sites"
    else:
        sentence = text.strip().partition("\n")[0].partition(". ")[0]
        reason = f"torch.func.vmap raised {type(error).__name__}: {sentence}"
    return reason + _place(error)


def _place(error: Exception) -> str:
    """Where in the user's code an error arose."""
    frames = traceback.extract_tb(error.__traceback__)
    library = [str(Path(file).parent) for file in (torch.__file__, pyro.__file__, __file__)]
    own = [frame for frame in frames if not frame.filename.startswith(tuple(library))]
    return f" at {own[-1].filename}:{own[-1].lineno}" if own else ""


def draw_plan(model: Model, latents: dict[str, Latent]) -> tuple[dict[str, Any], bool]:
    """Laws of the sites that depend on no other site, and whether the rest can be drawn as a batch."""
    if not model.vectorized:
        return {}, False
    dependent: dict[str, bool] = {}

    def probe(row: dict[str, Tensor]) -> Tensor:
        draw = model.draw(row)
        dependent.update({name: latent.dependent for name, latent in draw.latents.items()})
        return flatten(model.sites, draw.latents)

    values = {name: torch.stack([latent.value, latent.value]) for name, latent in latents.items()}
    try:
        model.batch(probe, values)
    except RuntimeError:
        return {}, False
    roots = {name: latent.fn for name, latent in latents.items() if not dependent[name]}
    two = {name: values[name] for name in roots}

    def redraw() -> Tensor:
        with torch.random.fork_rng(devices=[]):
            return unconstrain(model, two, size=2, randomness="different")

    try:
        return roots, batched_random(redraw)
    except RuntimeError:
        return roots, False


def unconstrain(
    model: Model, values: dict[str, Tensor], *, size: int | None = None, randomness: str = "error"
) -> Tensor:
    """Points ``(n, D)`` with the given values ``(n, *event)``; sites that are not given are drawn, ``size`` times."""

    def one(row: dict[str, Tensor]) -> Tensor:
        given = {name: value for name, value in row.items() if name}
        return flatten(model.sites, model.draw(given).latents)

    rows = {name: value.double() for name, value in values.items()}
    if size is not None:
        # Something to map over where nothing is given.
        rows[""] = torch.zeros(size)
    with torch.no_grad():
        return model.batch(one, rows, randomness=randomness)
