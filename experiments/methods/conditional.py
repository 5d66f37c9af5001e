"""One diffusion for all posteriors of a linear-Gaussian model, whose means and evidences are known for every datum."""

from __future__ import annotations

import math
import time

import torch
from show import options
from torch import Tensor
from torch.distributions import MultivariateNormal

import diffsampler as ds

DESIGN = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
NOISE = 0.5


class LinearGaussian(ds.ConditionalTarget):
    """Posterior of ``x ~ N(0, I_3)`` given two numbers ``c = A x + 0.5 e``; ``Z(c) = N(c; 0, A A' + 0.25 I)``."""

    def __init__(self) -> None:
        super().__init__(ds.Euclidean(3), 2)

    def log_prob_given(self, x: Tensor, context: Tensor) -> Tensor:
        residual = (context - x @ DESIGN.to(x).mT) / NOISE
        square = x.square().sum(-1) + residual.square().sum(-1)
        return -0.5 * square - 2.5 * math.log(2.0 * math.pi) - 2.0 * math.log(NOISE)

    def sample_context(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return noise @ torch.linalg.cholesky(self.law.covariance_matrix).mT

    @property
    def law(self) -> MultivariateNormal:
        return MultivariateNormal(torch.zeros(2).double(), DESIGN @ DESIGN.mT + NOISE**2 * torch.eye(2).double())


def main(*, steps: int, draws: int) -> None:
    start = time.process_time()
    family = LinearGaussian()
    sampler = ds.ConditionalDIS(family, num_steps=32, point_features=0)
    sampler.fit(steps=steps, batch_size=256, learning_rate=5e-3)
    contexts = family.sample_context(20, generator=torch.Generator().manual_seed(1))
    value, error = sampler.log_normalizer_given(contexts, paths=max(16, draws // 20))
    off = value - family.law.log_prob(contexts)
    print(f"log Z of 20 unseen data: off by {off.abs().mean():.4f} (worst {off.abs().max():.4f}) +- {error.mean():.4f}")
    for context in contexts[:3]:
        particles = sampler.sample_given(context, draws)
        mean, error = particles.expectation(particles.x)
        exact = DESIGN.mT @ torch.linalg.solve(family.law.covariance_matrix, context)
        gap = float(family.law.log_prob(context)) - particles.elbo
        print(
            f"ConditionalDIS: posterior mean off by {(mean - exact).abs().max():.4f} +- {error.max():.4f}, "
            f"ELBO gap {gap:.4f}, ESS/N {particles.ess / len(particles):.3f}, {time.process_time() - start:.1f} CPU s"
        )


if __name__ == "__main__":
    main(**options(300))
