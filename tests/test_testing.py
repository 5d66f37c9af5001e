"""The conformance suite must find faults: a correct target with one fault at a time."""

from __future__ import annotations

import math

import pytest
import torch

from diffsampler import targets
from diffsampler.space import Euclidean
from diffsampler.target import Target
from diffsampler.testing import check_target


class Broken(Target):
    """A correct two-mode target in the plane with one fault at a time."""

    def __init__(self, fault: str) -> None:
        prior = None
        if fault == "prior constant":
            prior = targets.Gaussian([0.0, 0.0], scale=1.0, log_normalizer=1.0)
        log_normalizer = 0.3 if fault == "constant" else 0.0
        super().__init__(Euclidean(2), log_normalizer=log_normalizer, prior=prior, num_modes=2, has_sampler=True)
        self.fault = fault
        self.inner = targets.GaussianMixture([[-4.0, 0.0], [4.0, 0.0]], scales=1.0, weights=[0.7, 0.3])

    def log_prob(self, x):
        match self.fault:
            case "last axis":
                return self.inner.log_prob(x).unsqueeze(-1)
            case "batch mean":
                return self.inner.log_prob(x) + x.sum() * 1e-3
            case "dtype":
                return self.inner.log_prob(x).double()
            case "detach":
                return self.inner.log_prob(x) - 0.1 * (x * x.detach()).sum(-1) + 0.1 * x.detach().square().sum(-1)
            case "nan":
                return self.inner.log_prob(x) + torch.where(x[..., 0] > 4, math.nan, 0.0)
            case "writes":
                value = self.inner.log_prob(x)
                x.detach().mul_(1.0 + 1e-9)
                return value
        return self.inner.log_prob(x)

    def log_prob_and_score(self, x):
        if self.fault in ("score", "graph"):
            log_prob, score = self.inner.log_prob_and_score(x)
            return log_prob, 1.001 * score if self.fault == "score" else score * torch.ones(2, requires_grad=True).to(x)
        return super().log_prob_and_score(x)

    def sample(self, n, *, generator=None):
        match self.fault:
            case "global generator":
                return self.inner.sample(n) if n > 50 else self.inner.sample(n, generator=generator) + 0 * torch.rand(1)
            case "unseeded":
                state = torch.get_rng_state()
                x = self.inner.sample(n, generator=torch.Generator().manual_seed(torch.Generator().seed() % 2**31))
                torch.set_rng_state(state)
                return x
            case "constant seed":
                return self.inner.sample(n, generator=torch.Generator().manual_seed(0))
            case "sample dtype":
                return self.inner.sample(n, generator=generator).float()
        x = self.inner.sample(n, generator=generator)
        match self.fault:
            case "scale":
                center = torch.tensor([4.0, 0.0], dtype=x.dtype) * x[:, :1].sign()
                return center + 1.1 * (x - center)
            case "shift":
                return x + 0.15
            case "weights":
                return x * torch.where(torch.rand(n, 1, generator=generator) < 0.2, -1.0, 1.0)
        return x

    def mode_labels(self, x):
        return self.inner.mode_labels(x) + (1 if self.fault == "label range" else 0)

    def mode_weights(self):
        weights = self.inner.mode_weights()
        return weights.flip(0) if self.fault == "swapped weights" else weights * (2 if self.fault == "sum" else 1)

    def constrain(self, x):
        return {"x": x.sum(0)} if self.fault == "constrain" else {"x": x}


FAULTS = {
    "last axis": r"Expected log_prob of shape \(64,\); got \(64, 1\)",
    "batch mean": "Expected the same log_prob in any batch shape",
    "dtype": "Expected results in the dtype of x",
    "detach": "Expected autograd to match finite differences",
    "nan": "Expected log_prob to be finite at all points",
    "writes": "Expected log_prob to leave its input unchanged",
    "score": "Expected the fused score to equal autograd",
    "graph": "Expected log_prob_and_score to return no graph",
    "global generator": "Expected sample to leave the global generator alone",
    "unseeded": "Expected equal seeds to give equal samples",
    "constant seed": "Expected other seeds to give other samples",
    "sample dtype": "Expected samples in float64; got torch.float32",
    "scale": "Stein's identity fails in coordinate",
    "shift": "Stein's identity fails in coordinate",
    "weights": "Expected a share of 0.[37]000 of samples in mode",
    "label range": r"Expected labels in \[0, 2\)",
    "swapped weights": "Expected a share of 0.[37]000 of samples in mode",
    "sum": "Expected mode_weights to be probabilities; they sum to 2",
    "constrain": "Expected constrain to keep the particle axis",
    "constant": "Expected log_normalizer 0.3 to agree",
    "prior constant": "Expected a normalized prior",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_suite_finds(fault):
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        check_target(Broken(fault), generator=torch.Generator().manual_seed(0))


def test_suite_accepts_the_control_without_a_fault():
    check_target(Broken("none"), generator=torch.Generator().manual_seed(0))
