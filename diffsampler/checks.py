"""Questions asked of a target before work starts.

A density that is non-finite, has a NaN gradient, or answers a batch differently from single points would otherwise
give a wrong answer much later, or none. Every question costs a handful of evaluations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffsampler.space import Euclidean, EuclideanTorus, Torus
from diffsampler.target import Target, shape_message

__all__ = ["check_points", "check_target", "differing_point", "working_dtype"]

NUM_POINTS = 16
STRETCHES = ((5.0, 30.0), (1e4, 1e6), (1e8, 1e12))
"""Distances between which a density must fall faster than 1/distance, on one stretch at least: near ones may lie inside
a wide density, and on far ones transforms of constrained parameters saturate."""


def check_points(target: Target, n: int = NUM_POINTS, *, seed: int = 0) -> Tensor:
    """Points ``(n, D)``, float64, to ask about: prior draws where a prior is known, standard normal ones otherwise."""
    generator = torch.Generator().manual_seed(seed)
    if target.prior is not None:
        return target.prior.sample(n, generator=generator).cpu().double()
    like = torch.empty(0, dtype=torch.float64)
    scale = 3.0 if isinstance(target.space, Torus) else 1.0
    return target.space.project(scale * target.space.noise((n,), like=like, generator=generator))


def _count(target: Target, n: int) -> int:
    """A batch size that differs from the dimension, so that no result has the right shape by chance."""
    return n + 1 if n == target.dim else n


def working_dtype(target: Target, device: torch.device) -> torch.dtype:
    """float64 if the density accepts it, else float32 (a density with float32 constants refuses mixed types)."""
    x = check_points(target, _count(target, 3)).to(device)
    try:
        target.log_prob(x)
    except RuntimeError as error:
        if "dtype" in str(error) or "scalar type" in str(error):
            return torch.float32
    except Exception:  # check_target asks again and says what is wrong
        return torch.float64
    return torch.float64


def check_target(target: Target, *, device: torch.device | None = None) -> list[tuple[str, str]]:
    """Ask a target whether it can be sampled.

    Returns:
        Level (``"warning"`` or ``"note"``) and message of each remark, empty when all is well. That the data exclude
        some draws of a prior is no more than a note; a density without a prior that has an edge is met with a warning.

    Raises:
        TypeError: If it is not a :class:`~diffsampler.target.Target`, or its density is no floating-point tensor.
        ValueError: With the offending points, if its density cannot be computed, is NaN, infinite or nowhere positive
            at the starting points, has a wrong shape, a non-finite or wrong gradient, depends on the other points of
            a batch, or is not periodic on a torus.
    """
    if not isinstance(target, Target):
        got = f"the class {target.__name__}" if isinstance(target, type) else type(target).__name__
        raise TypeError(
            f"Expected a Target; got {got}. Wrap a density with Target.from_log_prob(f, dim=...), "
            "an energy with Target.from_energy, a Pyro model with ds.pyro.PyroTarget(model, *args)."
        )
    device = torch.device("cpu") if device is None else device
    dtype = working_dtype(target, device)
    x = check_points(target, _count(target, NUM_POINTS)).to(device=device, dtype=dtype)
    log_prob = _evaluate(target, x)
    usable = _check_values(log_prob, x)
    _check_batch(target, x, log_prob)
    if isinstance(target.space, Torus | EuclideanTorus):
        _check_period(target, x, log_prob)
    score = _check_score(target, x[usable], log_prob[usable])
    if isinstance(target.space, Euclidean) and target.prior is None:
        _check_tails(target, x[usable], score)
    if bool(usable.all()):
        return []
    lost = int((~usable).sum())
    level = "note" if target.prior is not None and lost <= len(x) // 4 else "warning"
    return [(level, f"log_prob is -inf at {lost} of {len(x)} starting points, first at {_show(x[~usable][0])}.")]


def differing_point(a: Target, b: Target, *, device: torch.device) -> tuple[str, float, float] | None:
    """A point at which two targets on one space differ, with both log densities; None if they seem to be the same."""
    dtype = torch.float64 if working_dtype(a, device) == working_dtype(b, device) == torch.float64 else torch.float32
    x = check_points(a).to(device=device, dtype=dtype)
    with torch.no_grad():
        first, second = a.log_prob(x).double(), b.log_prob(x).double()
    wrong = ~torch.isclose(first, second, rtol=1e-3, atol=1e-3, equal_nan=True)
    if not bool(wrong.any()):
        return None
    i = int(wrong.nonzero()[0])
    return _show(x[i]), first[i].item(), second[i].item()


def _failed(error: Exception, x: Tensor) -> ValueError:
    text = str(error)
    remedy = f"It must take a batch of points of dimension {x.shape[-1]}, (n, D) -> (n,)."
    if "Boolean value" in text:
        remedy = "It must not branch on the values of a batch of points; use torch.where."
    elif "same device" in text:
        remedy = "Move its constants to the device of x."
    return ValueError(
        f"Expected log_prob to accept a batch of shape {tuple(x.shape)}; got {type(error).__name__}: {text}. {remedy}"
    )


def _evaluate(target: Target, x: Tensor) -> Tensor:
    try:
        log_prob = target.log_prob(x)
    except (ValueError, TypeError):  # the target's own refusal, or the user's: both say what they mean
        raise
    except Exception as error:
        raise _failed(error, x) from error
    if not isinstance(log_prob, Tensor) or log_prob.dtype not in (torch.float32, torch.float64):
        kind = log_prob.dtype if isinstance(log_prob, Tensor) else type(log_prob).__name__
        raise TypeError(f"Expected log_prob to return a tensor in float32 or float64; got {kind}.")
    if log_prob.shape != x.shape[:-1]:
        raise ValueError(shape_message(tuple(x.shape[:-1]), tuple(log_prob.shape), target.dim))
    return log_prob.detach()


def _check_values(log_prob: Tensor, x: Tensor) -> Tensor:
    bad = log_prob.isnan() | (log_prob == torch.inf)
    if bool(bad.any()):
        value = "NaN" if bool(log_prob[bad][0].isnan()) else "+inf"
        raise ValueError(
            f"Expected a finite log_prob; got {value} at {int(bad.sum())} of {len(x)} starting points, "
            f"first at x = {_show(x[bad][0])}."
        )
    usable = log_prob.isfinite()
    if not bool(usable.any()):
        raise ValueError(
            f"Expected a positive density at some starting point; log_prob is -inf at all {len(x)}, "
            f"first at x = {_show(x[0])}. Map a bounded support to unconstrained space first."
        )
    return usable


def _differ(a: Tensor, b: Tensor) -> Tensor:
    tolerance = 1e-3 if torch.float32 in (a.dtype, b.dtype) else 1e-6
    return ~((a == b) | ((a - b).abs() <= tolerance * (1.0 + b.abs())))


def _check_batch(target: Target, x: Tensor, log_prob: Tensor) -> None:
    """One density, whatever else is in the batch and however many batch axes there are."""
    total = x.sum(-1)
    # The extremes are the points where a branch on the batch as a whole is most likely to be seen.
    extreme = [log_prob.argmax(), log_prob.argmin(), total.argmax(), total.argmin()]
    for i in sorted({0, 1, 2, *(int(j) for j in extreme)}):
        alone = _evaluate(target, x[i : i + 1])[0]
        if bool(_differ(alone, log_prob[i])):
            raise ValueError(
                f"Expected log_prob to treat the points of a batch independently; at x = {_show(x[i])} it is "
                f"{log_prob[i].item():.6g} in a batch of {len(x)} and {alone.item():.6g} alone."
            )
    stacked = _evaluate(target, x[:4].reshape(2, 2, -1)).flatten()
    wrong = _differ(stacked, log_prob[:4])
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"Expected log_prob to accept any number of batch axes; at x = {_show(x[i])} it is "
            f"{log_prob[i].item():.6g} in a batch of shape ({len(x)},) and {stacked[i].item():.6g} in one of (2, 2)."
        )


def _check_period(target: Target, x: Tensor, log_prob: Tensor) -> None:
    shift = 2.0 * math.pi * (torch.arange(x.numel(), device=x.device) % 2).reshape(x.shape)
    if isinstance(target.space, EuclideanTorus):
        shift[:, : target.space.n] = 0.0
    shifted = _evaluate(target, x + shift.to(x))
    wrong = _differ(shifted, log_prob)
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"Expected log_prob to have period 2 pi on {target.space}; it is {log_prob[i].item():.6g} at "
            f"x = {_show(x[i])} and {shifted[i].item():.6g} one period away."
        )


def _check_score(target: Target, x: Tensor, log_prob: Tensor) -> Tensor:
    try:
        score = target.score(x)
    except RuntimeError as error:
        if "does not require grad" not in str(error) and "numpy()" not in str(error):
            raise ValueError(f"Expected log_prob to be differentiable; got {type(error).__name__}: {error}.") from error
        raise ValueError(
            "Expected log_prob to be differentiable; its result does not depend on x through torch operations. "
            "Compute it from x without .detach(), .item() or numpy, or pass score=."
        ) from error
    bad = ~score.isfinite().all(-1)
    if bool(bad.any()):
        raise ValueError(
            f"Expected a finite gradient of log_prob; got {_show(score[bad][0])} at x = {_show(x[bad][0])}."
        )
    if bool((score == 0.0).all()) and bool((log_prob != log_prob[0]).any()):
        raise ValueError(
            f"Expected log_prob to have a gradient; it is zero at all {len(x)} starting points although log_prob "
            "differs between them. Rounding, counting and comparing have no gradient."
        )
    _check_slope(target, x, log_prob, score)
    return score


def _check_slope(target: Target, x: Tensor, log_prob: Tensor, score: Tensor) -> None:
    """Compare the score with differences of the density along one direction."""
    generator = torch.Generator().manual_seed(1)
    direction = target.space.noise((len(x),), like=torch.empty(0, dtype=x.dtype), generator=generator).to(x)
    expected = (score * direction).sum(-1)
    precision = 1e-7 if torch.float32 in (x.dtype, log_prob.dtype) else 1e-16
    wrong, slope = torch.ones_like(expected, dtype=torch.bool), expected
    # A score is wrong if it is wrong at every width: narrow ones suffer from rounding, wide ones from curvature.
    for width in (1e-2, 1e-3) if precision > 1e-10 else (1e-5, 1e-3, 1e-2):
        step = width * x.abs().amax(-1, keepdim=True).clamp_min(1.0)
        with torch.no_grad():
            ends = [_evaluate(target, x + sign * step * direction) for sign in (1.0, -1.0)]
        step = step.squeeze(-1)
        slope = (ends[0] - ends[1]) / (2.0 * step)
        # Rounding of the two densities, and one kink or steep spot among many points, must not raise an alarm.
        size = 4.0 * precision * (1.0 + log_prob.abs()) / step + 1e-2 * (1.0 + expected.abs())
        wrong &= (slope - expected).abs() > size
    if int(wrong.sum()) > len(x) // 2:
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"Expected score to be the gradient of log_prob; along one direction at x = {_show(x[i])} it gives "
            f"{expected[i].item():.6g} where differences give {slope[i].item():.6g}. Is it an energy's gradient?"
        )


def _check_tails(target: Target, x: Tensor, score: Tensor) -> None:
    """Rays along the axes and along what the scores leave free: on none may the density fall like 1/distance or slower.

    A density that passes may still be improper.
    """
    base = x[:4]
    unit = score / score.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    rays = torch.cat([torch.eye(target.dim).to(x), torch.linalg.eigh(unit.mT @ unit)[1].mT])
    rays = torch.cat([rays, -rays])
    slow = torch.ones(len(rays), dtype=torch.bool, device=x.device)
    for near, far in STRETCHES:
        try:
            with torch.no_grad():
                first, last = (target.log_prob(base.unsqueeze(1) + r * rays).double() for r in (near, far))
        except (ValueError, RuntimeError):  # a density may refuse what overflows out there, such as a scale of zero
            return
        slope = (last - first) / math.log(far / near)
        # NaN compares as False: where nothing can be computed, nothing is claimed.
        slow &= ((slope > -1.01) | (last == torch.inf)).double().mean(0) > 0.5
    if bool(slow.any()):
        ray = rays[int(slow.nonzero()[0])]
        raise ValueError(
            f"Expected a density with a finite integral; it looks improper: along the direction {_show(ray)} it falls "
            "like 1/distance or more slowly. Give flat directions a proper prior, or bound them."
        )


def _show(x: Tensor) -> str:
    head = ", ".join(f"{v:.4g}" for v in x[:6].tolist())
    return f"[{head}{', ...' if x.numel() > 6 else ''}]"
