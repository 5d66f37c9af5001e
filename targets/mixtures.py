"""Mixtures of Gaussians, with the named ones of the literature as constructors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from diffsampler.space import Euclidean
from diffsampler.target import Target
from diffsampler.targets import checks, draws

__all__ = ["GaussianMixture"]

LOG_2PI = math.log(2.0 * math.pi)


@final
class GaussianMixture(Target):
    r"""A normalized mixture of Gaussians with diagonal or full covariances.

    .. math:: \pi(x) = \sum_k w_k N(x; \mu_k, \Sigma_k)

    Mode labels are the components with the largest share :math:`w_k N(x; \mu_k, \Sigma_k)` of the density at ``x``.
    Where components overlap, the probability of a label differs from :math:`w_k`; :meth:`mode_weights` computes it.

    Arguments:
        means: Component means, shape ``(K, D)``.
        scales: Standard deviations, a number, shape ``(K,)`` or ``(K, D)``. Exactly one of ``scales``, ``covariances``.
        covariances: Covariance matrices, shape ``(D, D)`` (shared) or ``(K, D, D)``.
        weights: Positive weights, shape ``(K,)``, normalized here; equal by default.

    Raises:
        ValueError: If shapes disagree, scales or weights are not positive, or a covariance is not positive definite.
    """

    means: Tensor
    factors: Tensor
    whitening: Tensor
    log_coefficients: Tensor
    weights: Tensor

    def __init__(
        self,
        means: Tensor | Sequence[Sequence[float]],
        *,
        scales: Tensor | Sequence[float] | float | None = None,
        covariances: Tensor | Sequence[object] | None = None,
        weights: Tensor | Sequence[float] | None = None,
    ) -> None:
        centers = checks.array("means", means, (None, None))
        components, dim = centers.shape
        if (scales is None) == (covariances is None):
            raise ValueError("Expected exactly one of scales and covariances.")
        shares = centers.new_ones(components) if weights is None else checks.positive("weights", weights, (components,))
        shares = shares / shares.sum()
        super().__init__(Euclidean(dim), log_normalizer=0.0, num_modes=components, has_sampler=True)
        self.diagonal = covariances is None
        if covariances is None:
            assert scales is not None
            spread = checks.positive("scales", scales, (), (components,), (components, dim))
            factors = (spread.unsqueeze(-1) if spread.ndim == 1 else spread).expand(components, dim).clone()
            whitening, log_scale = factors.reciprocal(), factors.log().sum(-1)
        else:
            matrices = checks.array("covariances", covariances, (dim, dim), (components, dim, dim))
            factors = checks.cholesky("covariances", matrices.expand(components, dim, dim))
            eye = torch.eye(dim, dtype=factors.dtype).expand_as(factors)
            whitening = torch.linalg.solve_triangular(factors, eye, upper=False)
            log_scale = factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        self.register_buffer("means", centers)
        self.register_buffer("factors", factors)
        self.register_buffer("whitening", whitening)
        self.register_buffer("log_coefficients", shares.log() - log_scale - 0.5 * dim * LOG_2PI)
        self.register_buffer("weights", shares)
        self.isotropic = self.diagonal and bool((factors == factors[:, :1]).all())
        self._mode_weights: Tensor | None = None

    @classmethod
    def grid(cls, components: int = 9) -> GaussianMixture:
        """Equal components with variance 0.3 on a square grid of spacing 5 around the origin, in two dimensions.

        ``grid(9)`` is the mixture of Richter and Berner, "Improved sampling via learned diffusions" (2024,
        https://arxiv.org/abs/2307.01198); ``grid(25)`` that of Sendera et al., "Improved off-policy training of
        diffusion samplers" (2024, https://arxiv.org/abs/2402.05098).
        """
        side = math.isqrt(checks.integer("components", components))
        if side * side != components:
            raise ValueError(f"Expected components to be a square number; got {components}.")
        line = 5.0 * (torch.arange(side, dtype=torch.float64) - 0.5 * (side - 1))
        return cls(torch.cartesian_prod(line, line), scales=math.sqrt(0.3))

    @classmethod
    def forty(cls) -> GaussianMixture:
        """Forty equal components with standard deviation softplus(1) = 1.3133, means uniform on [-40, 40]^2.

        After Midgley et al., "Flow annealed importance sampling bootstrap" (2023, https://arxiv.org/abs/2208.01893),
        with the means that https://github.com/juliusberner/sde_sampler draws (seed 42).
        """
        generator = torch.Generator().manual_seed(42)
        means = (torch.rand(40, 2, generator=generator, dtype=torch.float32) - 0.5) * 80.0
        return cls(means.double(), scales=math.log1p(math.e))

    @classmethod
    def difficult(cls) -> GaussianMixture:
        """Three narrow components in two dimensions, made symmetric under exchange of the coordinates: six modes.

        After Phillips et al., "Particle denoising diffusion sampler" (2024, https://arxiv.org/abs/2402.06320) and
        Vargas et al., "Transport meets variational inference" (2024, https://arxiv.org/abs/2307.01050).
        """
        means = torch.tensor([[3.0, 0.0], [-2.5, 0.0], [2.0, 3.0]], dtype=torch.float64)
        flat, tilted = [[0.7, 0.0], [0.0, 0.05]], [[1.0, 0.95], [0.95, 1.0]]
        covariances = torch.tensor([flat, flat, tilted], dtype=torch.float64)
        return cls(torch.cat([means, means.flip(-1)]), covariances=torch.cat([covariances, covariances.flip(-1, -2)]))

    @classmethod
    def seven(cls) -> GaussianMixture:
        """Seven components in five dimensions with weights .35 to .03 and scales .3 to 2; small and wide modes mixed.

        The means are fixed points at distances between 20.2 and 31.6, at least 7 times the sum of two scales, so labels
        have the components' weights. The heaviest component is the narrowest and the lightest the widest: a sampler
        that trades weight for width shows it.
        """
        means = [
            [10, 10, 0, 0, 0],
            [-10, -10, 0, 0, 5],
            [-10, 10, 10, 0, 0],
            [10, -10, 0, 10, 0],
            [0, 0, -12, -10, 8],
            [0, 0, 10, -12, -8],
            [0, 0, -10, 10, -12],
        ]
        weights = [0.35, 0.25, 0.15, 0.10, 0.07, 0.05, 0.03]
        scales = [0.3, 0.5, 0.7, 1.0, 1.3, 1.6, 2.0]
        return cls(torch.tensor(means, dtype=torch.float64), scales=scales, weights=weights)

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.logsumexp(self._log_shares(self._whiten(x)), -1)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            if self.isotropic:
                return self._isotropic(x)
            z = self._whiten(x)
            log_shares = self._log_shares(z)
            log_prob = torch.logsumexp(log_shares, -1)
            pull = z * (log_shares - log_prob.unsqueeze(-1)).exp().unsqueeze(-1)
            whitening = self.whitening.to(x)
            if self.diagonal:
                return log_prob, -(pull * whitening).sum(-2)
            return log_prob, -torch.einsum("...ki,kij->...j", pull, whitening)

    def _isotropic(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Round components need only distances: a third of the work, and half of a diffusion's simulation."""
        flat = x.reshape(-1, self.dim)
        means, precision = self.means.to(x), self.whitening[:, :1].square().to(x)
        # Not by a matrix product, which cancels when points are far from the origin; and with components first, since
        # reductions over a short last axis are ten times slower.
        square = torch.cdist(means, flat, compute_mode="donot_use_mm_for_euclid_dist").square_()
        log_shares = torch.addcmul(self.log_coefficients.to(x).unsqueeze(-1), square, precision, value=-0.5)
        shares = torch.softmax(log_shares, 0)
        # The largest share is exp(largest logit - logsumexp).
        log_prob = log_shares.amax(0) - shares.amax(0).log()
        pull = shares.mul_(precision)
        score = torch.addmm(-flat * pull.sum(0).unsqueeze(-1), pull.T, means)
        return log_prob.reshape(x.shape[:-1]), score.reshape(x.shape)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        u = draws.uniform(n, generator=generator, like=self.means)
        # The last edge is left out, so rounding in the sum cannot lead past the last component.
        component = torch.searchsorted(self.weights.to(u).cumsum(0)[:-1], u, right=True)
        z = draws.normal(n, self.dim, generator=generator, like=u)
        factor = self.factors.to(z)[component]
        step = z * factor if self.diagonal else (factor @ z.unsqueeze(-1)).squeeze(-1)
        return self.means.to(z)[component] + step

    def mode_labels(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._log_shares(self._whiten(x)).argmax(-1)

    def mode_weights(self) -> Tensor:
        """Probability of each label, shape ``(K,)``: 2^13 Sobol points per component, error about 1e-4 at overlaps."""
        if self._mode_weights is None:
            self._mode_weights = self._integrate_labels(2**13)
        return self._mode_weights.to(self.weights.device)

    def _integrate_labels(self, points: int) -> Tensor:
        sobol = torch.quasirandom.SobolEngine(self.dim).draw(points, dtype=torch.float64)
        z = torch.special.ndtri(sobol + 0.5 / points).to(self.means.device)
        total = self.weights.new_zeros(self.weights.shape, dtype=torch.float64)
        for k, weight in enumerate(self.weights.double()):
            factor = self.factors[k].double()
            x = self.means[k].double() + (z * factor if self.diagonal else z @ factor.mT)
            total += weight * torch.bincount(self.mode_labels(x), minlength=total.numel()) / points
        return total

    def _whiten(self, x: Tensor) -> Tensor:
        delta = x.unsqueeze(-2) - self.means.to(x)
        whitening = self.whitening.to(x)
        return delta * whitening if self.diagonal else torch.einsum("kij,...kj->...ki", whitening, delta)

    def _log_shares(self, z: Tensor) -> Tensor:
        return self.log_coefficients.to(z) - 0.5 * z.square().sum(-1)
