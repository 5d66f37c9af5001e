r"""Affine-invariant Langevin dynamics of an ensemble, with the term that makes finite ensembles right.

With the mean :math:`m` and covariance :math:`C = \frac1N \sum_j (x_j - m)(x_j - m)^T` of the ensemble,

.. math:: x_i' = x_i + h\, C\, s(x_i) + h \frac{d + 1}{N} (x_i - m) + \sqrt{\frac{2h}{N}} \sum_j (x_j - m)\, \xi_{ij},
    \qquad \xi_{ij} \sim N(0, 1).

The noise has covariance :math:`2 h C` without a Cholesky factor. The drift :math:`(d + 1)(x_i - m)/N` is the divergence
of :math:`C` with respect to :math:`x_i`: with it the product law :math:`\pi^N` is invariant in continuous time for any
:math:`N > d + 1`, without it the ensemble collapses (variances of .40 instead of 1 at d = 3, N = 6). The dynamics
commute with every affine map. **Biased**: the discretization has an error of order h, about h/2 in relative variance,
that nothing in the output shows; use it to precondition and to warm up, or with small steps.

Reference:
    Affine invariant interacting Langevin dynamics for Bayesian inference (Garbuno-Inigo, Nüsken & Reich, 2020),
    https://arxiv.org/abs/1912.02859
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from diffsampler.baselines.affine_invariant import ensemble_effective_sample_size, starts
from diffsampler.particles import Particles
from diffsampler.sampler import Sampler
from diffsampler.space import EuclideanTorus, Torus
from diffsampler.target import CountedTarget, Target

__all__ = ["ALDI", "aldi_step"]


def aldi_step(
    x: Tensor, score: Tensor, step_size: float | Tensor, generator: torch.Generator, *, dof: int, correct: bool = True
) -> Tensor:
    """One step of the dynamics.

    Arguments:
        x: Ensembles, shape ``(E, N, D)``.
        score: Gradient of the log density at ``x``, shape ``(E, N, D)``.
        step_size: ``h``, a number or shape ``(E, 1, 1)``.
        generator: Source of randomness.
        dof: Degrees of freedom ``d``.
        correct: Include the drift ``(d + 1)(x - m)/N``. Without it the law is wrong for finite ensembles; for tests.

    Returns:
        New ensembles, shape ``(E, N, D)``.
    """
    size = x.shape[1]
    deviation = x - x.mean(1, keepdim=True)
    # C s without C: two products of N x N x D each.
    drift = (score @ deviation.mT) @ deviation / size
    if correct:
        drift = drift + (dof + 1) / size * deviation
    noise = torch.randn(*x.shape[:2], size, generator=generator, dtype=x.dtype, device=x.device)
    step = x.new_tensor(step_size) if isinstance(step_size, float) else step_size
    return x + step * drift + (2.0 * step / size).sqrt() * (noise @ deviation)


@final
class ALDI(Sampler):
    """Independent ensembles of affine-invariant Langevin dynamics in one batch. **Biased** by the order of its step.

    More draws do not reduce the bias; halve ``step_size`` to see it. Weights are equal and carry no normalizer.
    Particles of an ensemble depend on each other; ensembles do not, and their spread is the error bar.

    Reference:
        Affine invariant interacting Langevin dynamics for Bayesian inference (Garbuno-Inigo, Nüsken & Reich, 2020),
        https://arxiv.org/abs/1912.02859

    Arguments:
        target: The density.
        step_size: ``h``, in units of the ensemble's own covariance: 0.02 is a bias of about 1 % in variance.
        num_ensembles: Independent ensembles ``E``.
        num_particles: Particles ``N`` of each, more than ``dof + 1``; by default ``max(32, 4 (dof + 1))``.
        warmup: Steps that are not recorded; while the ensemble is far from the target, they are shorter.
        thin: Record every so many steps.
        init: Starting points ``(E * N, D)``. By default exact draws of the target's prior if it has one, else
            ``init_scale`` times Gaussian noise.
        init_scale: See ``init``.
        dtype: Dtype of the particles.

    Raises:
        ValueError: If the target lives on a torus, which has no affine maps, or a number is out of range.
    """

    def __init__(
        self,
        target: Target,
        *,
        step_size: float = 0.02,
        num_ensembles: int = 8,
        num_particles: int | None = None,
        warmup: int = 1000,
        thin: int = 10,
        init: Tensor | None = None,
        init_scale: float = 1.0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        dof = target.space.dof
        self.num_particles = max(32, 4 * (dof + 1)) if num_particles is None else num_particles
        if isinstance(target.space, Torus | EuclideanTorus):
            raise ValueError("Expected a target on a vector space, which has affine maps; got one on a torus.")
        if self.num_particles <= dof + 1:
            raise ValueError(f"Expected more than dof + 1 = {dof + 1} particles; got {self.num_particles}.")
        if num_ensembles < 2:
            raise ValueError(f"Expected at least 2 ensembles, whose spread is the error bar; got {num_ensembles}.")
        if not 0.0 < step_size < 1.0:
            raise ValueError(f"Expected step_size in (0, 1); got {step_size}.")
        if warmup < 0 or thin < 1:
            raise ValueError(f"Expected warmup >= 0 and thin >= 1; got {warmup} and {thin}.")
        if init is not None and init.shape != (num_ensembles * self.num_particles, target.dim):
            wanted = (num_ensembles * self.num_particles, target.dim)
            raise ValueError(f"Expected init of shape {wanted}; got {tuple(init.shape)}.")
        self.target = target
        self._counted = CountedTarget(target)
        self.step_size = step_size
        self.num_ensembles = num_ensembles
        self.warmup = warmup
        self.thin = thin
        self.init = init
        self.init_scale = init_scale
        self.dtype = dtype

    @property
    def evaluations(self) -> int:
        """Points at which the target's density and gradient were computed so far, warm-up included."""
        return self._counted.evaluations

    def sample(self, n: int, *, seed: int = 0) -> Particles:
        """Record at least ``n`` states, as many steps of all particles as it takes, ensemble after ensemble.

        Raises:
            RuntimeError: If an ensemble leaves the numbers: ``step_size`` is too large for the target.
        """
        x = self.trajectories(n, seed=seed)
        flat = x.reshape(-1, x.shape[-1])
        return Particles(
            flat,
            torch.zeros(len(flat), dtype=torch.float64, device=x.device),
            replicates=self.num_ensembles,
            has_normalizer=False,
            effective=ensemble_effective_sample_size(x),
        )

    def trajectories(self, n: int, *, seed: int = 0) -> Tensor:
        """Recorded ensembles ``(E, steps, N, D)``."""
        generator = torch.Generator().manual_seed(seed)
        shape, space = (self.num_ensembles, self.num_particles), self.target.space
        x = starts(self.target, shape, self.init, self.init_scale, self.dtype, generator)
        kept = []
        for t in range(self.warmup + self.thin * math.ceil(n / (shape[0] * shape[1]))):
            _, score = self._counted.log_prob_and_score(x.flatten(0, 1))
            score = space.project_vector(score).reshape(x.shape)
            if not bool(score.isfinite().all()):
                raise RuntimeError(
                    f"The dynamics met a gradient that is not finite at step {t}. Use a smaller step_size "
                    f"(now {self.step_size}), or start closer to the target."
                )
            step = self._cautious(x, score) if t < self.warmup else self.step_size
            x = space.project(aldi_step(x, score, step, generator, dof=space.dof))
            if t >= self.warmup and (t + 1 - self.warmup) % self.thin == 0:
                kept.append(x)
        return torch.stack(kept, 1)

    def _cautious(self, x: Tensor, score: Tensor) -> Tensor:
        r"""Step sizes ``(E, 1, 1)`` that shrink where :math:`s^T C s` exceeds its stationary value ``dof``."""
        deviation = x - x.mean(1, keepdim=True)
        square = (score @ deviation.mT).square().mean((1, 2), keepdim=True) / self.target.space.dof
        return self.step_size / square.sqrt().clamp_min(1.0)
