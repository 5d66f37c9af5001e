"""Bayesian logistic regression on given data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from diffsampler.space import Euclidean
from diffsampler.target import Target
from diffsampler.targets import checks
from diffsampler.targets.gaussian import Gaussian

__all__ = ["LogisticRegression"]


@final
class LogisticRegression(Target):
    r"""The posterior of logistic regression with a Gaussian prior; its normalizer is the evidence.

    .. math:: \log \rho(w) = \log N(w; 0, s^2 I) + \sum_i \log \sigma\left((2 y_i - 1)\, w^T a_i\right)

    The prior is normalized and can be sampled, so the likelihood can be tempered from it.

    Arguments:
        features: Design matrix, shape ``(N, P)``.
        labels: Classes 0 and 1 (numbers or booleans), shape ``(N,)``.
        prior_scale: Prior standard deviation ``s`` of every coefficient, the intercept included.
        standardize: Bring every feature to mean 0 and standard deviation 1 (divisor ``N``).
        intercept: Put a constant column first; then ``D = P + 1`` and coefficient 0 is the intercept.

    Raises:
        ValueError: If shapes disagree, labels are other than 0 and 1, or a feature to be standardized is constant.
    """

    design: Tensor
    signs: Tensor
    prior: Target

    def __init__(
        self,
        features: Tensor | Sequence[Sequence[float]],
        labels: Tensor | Sequence[float],
        *,
        prior_scale: float = 1.0,
        standardize: bool = True,
        intercept: bool = True,
    ) -> None:
        design = checks.array("features", features, (None, None))
        classes = checks.array("labels", labels, (design.shape[0],))
        wrong = (classes != 0) & (classes != 1)
        if wrong.any():
            raise ValueError(f"Expected labels to be 0 or 1; got {classes[wrong][0].item():g}.")
        if standardize:
            spread = design.std(0, correction=0)
            constant = spread <= 1e-12 * design.abs().amax(0)
            if constant.any():
                column = int(constant.nonzero()[0, 0])
                raise ValueError(f"Expected features that vary; got constant column {column}. Drop it.")
            design = (design - design.mean(0)) / spread
        if intercept:
            design = torch.cat([torch.ones_like(design[:, :1]), design], -1)
        dim = design.shape[1]
        scale = checks.positive("prior_scale", prior_scale, ()).item()
        super().__init__(Euclidean(dim), prior=Gaussian(design.new_zeros(dim), scale=scale))
        self.intercept = intercept
        self.register_buffer("design", design)
        self.register_buffer("signs", 2.0 * classes - 1.0)

    def log_prob(self, x: Tensor) -> Tensor:
        margin = (x @ self.design.to(x).mT) * self.signs.to(x)
        return self.prior.log_prob(x) + nn.functional.logsigmoid(margin).sum(-1)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_prior, score_prior = self.prior.log_prob_and_score(x)
        with torch.no_grad():
            design, signs = self.design.to(x), self.signs.to(x)
            margin = (x @ design.mT) * signs
            score = (torch.sigmoid(-margin) * signs) @ design
            return log_prior + nn.functional.logsigmoid(margin).sum(-1), score_prior + score

    def constrain(self, x: Tensor) -> dict[str, Tensor]:
        """``intercept (n,)`` where there is one, and ``coefficients (n, P)``."""
        if self.intercept:
            return {"intercept": x[..., 0], "coefficients": x[..., 1:]}
        return {"coefficients": x}
