"""Weighted draws as ArviZ data: ``InferenceData`` of ArviZ 0.x or ``DataTree`` of 1.x.

ArviZ has no weighted draws. They are therefore resampled first, or exported as produced with their log weights in
``sample_stats.log_weight``; the attribute ``weighting`` says which. Chains of the result are contiguous blocks of
particles, so that blocks that were independent (chains, islands) stay apart.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffsampler.estimators import systematic_resample

__all__ = ["to_arviz"]


def to_arviz(
    posterior: Mapping[str, Tensor],
    log_weight: Tensor,
    *,
    weights: Literal["resample", "keep"] = "resample",
    num_chains: int = 4,
    log_prob: Tensor | None = None,
    posterior_predictive: Mapping[str, Tensor] | None = None,
    log_likelihood: Mapping[str, Tensor] | None = None,
    observed_data: Mapping[str, Tensor] | None = None,
    attrs: Mapping[str, object] | None = None,
    seed: int = 0,
) -> Any:
    """Convert weighted draws to ArviZ.

    With ``"resample"`` the draws are resampled systematically and kept in their order: duplicates lie next to each
    other, so ArviZ sees them as autocorrelation and its effective sample size falls with that of the weights. Draws
    of equal weight come back unchanged.

    Arguments:
        posterior: Draws of each parameter, shape ``(n, *event)``.
        log_weight: Log weights, shape ``(n,)``.
        weights: What becomes of the weights.
        num_chains: Number of chains to divide the draws into. ``"keep"`` drops nothing, so it must divide ``n``.
        log_prob: Log density of each draw, shape ``(n,)``; stored as ``sample_stats.lp`` and, negated, ``energy``.
        posterior_predictive: Data drawn for each draw, shape ``(n, *shape)``.
        log_likelihood: Log likelihood of each observation for each draw, shape ``(n, *shape)``.
        observed_data: The observations, shape ``shape``.
        attrs: Attributes of the result, such as ``log_z``; None values are left out.
        seed: Seed of the resampling.

    Raises:
        ValueError: If shapes do not agree, no weight is finite, or ``num_chains`` does not fit the number of draws.
        ImportError: If ArviZ is not installed.
    """
    n = log_weight.shape[0] if log_weight.ndim == 1 else -1
    drawn = {
        "posterior": posterior,
        "posterior_predictive": posterior_predictive or {},
        "log_likelihood": log_likelihood or {},
    }
    for group in drawn.values():
        _check(group, n, tuple(log_weight.shape), weights, num_chains)
    log_weight = log_weight.detach().double()
    if not torch.isfinite(log_weight).any():
        raise ValueError(f"Expected finite log weights; got none in {n} draws.")
    stats: dict[str, Tensor] = {} if log_prob is None else {"lp": log_prob, "energy": -log_prob}
    if weights == "keep":
        index = torch.arange(n, device=log_weight.device)
        stats["log_weight"] = log_weight
    else:
        generator = torch.Generator(log_weight.device).manual_seed(seed)
        index = systematic_resample(log_weight, n - n % num_chains, generator=generator)

    def chains(values: Tensor) -> np.ndarray:
        kept = values.detach()[index.to(values.device)]
        return kept.reshape(num_chains, -1, *values.shape[1:]).cpu().numpy()

    groups = {
        group: {name: chains(values) for name, values in variables.items()}
        for group, variables in drawn.items()
        if variables or group == "posterior"
    }
    if stats:
        groups["sample_stats"] = {name: chains(values) for name, values in stats.items()}
    if observed_data:
        groups["observed_data"] = {name: values.detach().cpu().numpy() for name, values in observed_data.items()}
    weighting = "resampled" if weights == "resample" else "sample_stats.log_weight"
    return _from_dict(groups, {"inference_library": "diffsampler", "weighting": weighting, **_plain(attrs or {})})


def _check(posterior: Mapping[str, Tensor], n: int, shape: tuple[int, ...], weights: str, num_chains: int) -> None:
    if n < 1:
        raise ValueError(f"Expected log_weight of shape (n,); got {shape}.")
    for name, values in posterior.items():
        if values.shape[:1] != (n,):
            raise ValueError(f"Expected {n} draws of {name!r}, one for each weight; got shape {tuple(values.shape)}.")
    if weights not in ("resample", "keep"):
        raise ValueError(f'Expected weights to be "resample" or "keep"; got {weights!r}.')
    if not 1 <= num_chains <= n:
        raise ValueError(f"Expected num_chains between 1 and the {n} draws; got {num_chains}.")
    if weights == "keep" and n % num_chains:
        raise ValueError(f"Expected num_chains to divide the {n} draws that are kept; got {num_chains}.")


def _plain(attrs: Mapping[str, object]) -> dict[str, object]:
    """Attributes that netCDF can store."""
    kept = {name: value for name, value in attrs.items() if value is not None}
    return {
        name: int(value) if isinstance(value, bool) else value if isinstance(value, (int, float, str)) else str(value)
        for name, value in kept.items()
    }


def _from_dict(groups: dict[str, dict[str, np.ndarray]], attrs: dict[str, object]) -> Any:
    """Build the object of whichever ArviZ is installed: the one place that knows of their difference."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*ArviZ is undergoing a major refactor.*", FutureWarning)
        try:
            import arviz
        except ImportError as error:
            raise ImportError("Expected arviz to be installed: pip install 'arviz>=0.23,<2'.") from error
    if int(arviz.__version__.split(".")[0]) >= 1:
        return arviz.from_dict(groups, attrs={"/": attrs})
    options: dict[str, Any] = {**groups, "attrs": attrs}
    return arviz.from_dict(**options)
