"""What is measured of draws: errors against exact answers, curves over work, effective sample sizes."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from bench_models import Answers
from torch import Tensor

Row = dict[str, Any]


def errors(answers: Answers, x: Tensor, log_weight: Tensor | None = None) -> dict[str, float]:
    """Worst error of a mean in standard deviations, of a standard deviation, and of the weights of modes."""
    weight = torch.full(x.shape[:1], 1.0 / len(x), dtype=torch.float64)
    if log_weight is not None:
        weight = torch.softmax(log_weight, 0)
    chosen = x[:, answers.coordinates].double()
    mean = weight @ chosen
    sd = (weight @ (chosen - mean).square()).sqrt()
    result = {
        "mean": float(((mean - answers.mean) / answers.sd).abs().max()),
        "sd": float((sd / answers.sd - 1.0).abs().max()),
    }
    if answers.modes is not None:
        assert answers.weights is not None
        gap = (weight @ answers.modes(x).double() - answers.weights).abs()
        result["tv"] = float(0.5 * gap.sum() if answers.partition else gap.max())
    return result


def chain_curve(
    answers: Answers, x: Tensor, *, warm: float, evaluations: int, seconds: float, points: int = 24
) -> list[dict[str, float]]:
    """Errors of growing parts of chains ``(chains, draws, D)``; ``warm`` is the warm-up's share of the work."""
    draws = x.shape[1]
    ends = np.unique(np.geomspace(min(4, draws), draws, points).round().astype(int))
    curve = []
    for end in ends.tolist():
        share = warm + (1.0 - warm) * end / draws
        work = {"evaluations": share * evaluations, "seconds": share * seconds}
        curve.append(work | errors(answers, x[:, :end].flatten(0, 1)))
    return curve


def chain_quality(x: Tensor, answers: Answers) -> Row:
    """ArviZ's bulk effective sample size, the smallest over coordinates, and the worst R-hat."""
    import arviz

    with warnings.catch_warnings():
        # Chains that never left their mode divide by zero; R-hat says so.
        warnings.simplefilter("ignore")
        columns = [x[:, :, i].double().numpy() for i in answers.coordinates]
        ess = min(float(arviz.ess(column)) for column in columns)
        rhat = max(float(arviz.rhat(column)) for column in columns) if len(x) > 1 else math.nan
    return {"ess": ess, "rhat": rhat}


def spread_ess(answers: Answers, means: Tensor) -> float:
    """Effective sample size from the means ``(blocks, D)`` of independent blocks: the median over coordinates.

    Of sixteen blocks a single coordinate's is only good to a third, and a smallest one would be biased downwards.
    """
    error = means.var(0) / len(means)
    return float((answers.sd.square() / error).median())
