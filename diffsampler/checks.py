"""Questions asked of a target before work starts.

A density that is non-finite, has a NaN gradient, or answers a batch differently from single points would otherwise
give a wrong answer much later, or none. Every question costs a handful of evaluations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffsampler.space import Torus
from diffsampler.target import Target

__all__ = ["check_points", "check_target", "working_dtype"]

NUM_POINTS = 16


def check_points(target: Target, n: int = NUM_POINTS, *, seed: int = 0) -> Tensor:
    """Points ``(n, D)``, float64, to ask about: prior draws where a prior is known, standard normal ones otherwise."""
    generator = torch.Generator().manual_seed(seed)
    if target.prior is not None:
        return target.prior.sample(n, generator=generator).cpu().double()
    like = torch.empty(0, dtype=torch.float64)
    scale = 3.0 if isinstance(target.space, Torus) else 1.0
    return target.space.project(scale * target.space.noise((n,), like=like, generator=generator))


def working_dtype(target: Target, device: torch.device) -> torch.dtype:
    """float64 if the density accepts it, else float32 (a density with float32 constants refuses mixed types)."""
    x = check_points(target, 2).to(device)
    try:
        target.log_prob(x)
    except RuntimeError as error:
        if "dtype" not in str(error) and "scalar type" not in str(error):
            raise _failed(error, x) from error
        return torch.float32
    return torch.float64


def check_target(target: Target, *, device: torch.device | None = None) -> list[str]:
    """Ask a target whether it can be sampled.

    Returns:
        Warnings, empty when all is well.

    Raises:
        TypeError: If it is not a :class:`~diffsampler.target.Target`.
        ValueError: With the offending points, if its density is NaN, infinite or nowhere positive at the starting
            points, has a wrong shape, a non-finite or wrong gradient, or depends on the other points of a batch.
    """
    if not isinstance(target, Target):
        raise TypeError(
            f"Expected a Target; got {type(target).__name__}. Wrap a density with Target.from_log_prob(f, dim=...), "
            "an energy with Target.from_energy, a Pyro model with ds.pyro.PyroTarget(model, *args)."
        )
    device = torch.device("cpu") if device is None else device
    dtype = working_dtype(target, device)
    x = check_points(target).to(device=device, dtype=dtype)
    log_prob = _evaluate(target, x)
    usable = _check_values(log_prob, x)
    _check_batch(target, x, log_prob)
    _check_score(target, x[usable], log_prob[usable])
    if bool(usable.all()):
        return []
    return [f"log_prob is -inf at {int((~usable).sum())} of {len(x)} starting points, first at {_show(x[~usable][0])}."]


def _failed(error: Exception, x: Tensor) -> ValueError:
    return ValueError(
        f"log_prob failed on a batch of shape {tuple(x.shape)} ({type(error).__name__}: {error}). "
        "Expected a function of batched points, (n, D) -> (n,), that does not branch on their values."
    )


def _evaluate(target: Target, x: Tensor) -> Tensor:
    try:
        log_prob = target.log_prob(x)
    except (RuntimeError, IndexError) as error:
        raise _failed(error, x) from error
    if log_prob.shape != x.shape[:1]:
        raise ValueError(f"Expected log_prob to return shape {tuple(x.shape[:1])}; got {tuple(log_prob.shape)}.")
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


def _check_batch(target: Target, x: Tensor, log_prob: Tensor) -> None:
    tolerance = 1e-3 if x.dtype == torch.float32 else 1e-6
    for i in range(3):
        alone = _evaluate(target, x[i : i + 1])[0]
        together = log_prob[i]
        if bool((alone - together).abs() > tolerance * (1.0 + together.abs())):
            raise ValueError(
                f"Expected log_prob to treat the points of a batch independently; at x = {_show(x[i])} it is "
                f"{together.item():.6g} in a batch of {len(x)} and {alone.item():.6g} alone."
            )


def _check_score(target: Target, x: Tensor, log_prob: Tensor) -> None:
    try:
        score = target.score(x)
    except RuntimeError as error:
        raise ValueError(
            f"Expected log_prob to be differentiable ({error}). Compute it from x with torch operations, without "
            ".detach(), .item() or numpy, or pass score=."
        ) from error
    bad = ~score.isfinite().all(-1)
    if bool(bad.any()):
        raise ValueError(
            f"Expected a finite gradient of log_prob; got {_show(score[bad][0])} at x = {_show(x[bad][0])}."
        )
    if x.dtype != torch.float64:
        return
    generator = torch.Generator().manual_seed(1)
    direction = target.space.noise((len(x),), like=torch.empty(0, dtype=x.dtype), generator=generator).to(x)
    step = 1e-5
    with torch.no_grad():
        slope = (target.log_prob(x + step * direction) - target.log_prob(x - step * direction)) / (2.0 * step)
    expected = (score * direction).sum(-1)
    # Rounding of the two densities, and one kink or steep spot among many points, must not raise an alarm.
    size = 1e-16 * log_prob.abs() / step + 1e-2 * (1.0 + expected.abs())
    wrong = (slope - expected).abs() > size
    if int(wrong.sum()) > len(x) // 2:
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"Expected score to be the gradient of log_prob; along one direction at x = {_show(x[i])} it gives "
            f"{expected[i].item():.6g} where differences give {slope[i].item():.6g}. Is it an energy's gradient?"
        )


def _show(x: Tensor) -> str:
    head = ", ".join(f"{v:.4g}" for v in x[:6].tolist())
    return f"[{head}{', ...' if x.numel() > 6 else ''}]"
