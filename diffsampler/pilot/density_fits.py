r"""Fit reference densities to draws by expectation maximisation.

* :func:`fit_gaussian_mixture`: full covariances, number of components by held-out likelihood;
* :func:`fit_student_t`: one Student-t law with full scale;
* :func:`fit_product`: one-dimensional Student-t mixtures, all coordinates at once;
* :func:`stack`: weights of given densities by held-out likelihood, with floors.

References:
    Maximum likelihood from incomplete data via the EM algorithm (Dempster, Laird, Rubin, 1977),
    https://doi.org/10.1111/j.2517-6161.1977.tb01600.x
    Robust mixture modelling using the t distribution (Peel & McLachlan, 2000), https://doi.org/10.1023/A:1008981510081
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffsampler.pilot.reference import EllipticalMixture, ProductMixture, Stacked, student_t
from diffsampler.target import Target

__all__ = ["fit_gaussian_mixture", "fit_product", "fit_student_t", "stack"]


# In robust standard deviations.
FAR_OUT = 30.0


def _robust_scale(x: Tensor) -> Tensor:
    """Half the range of the central 68 %, per coordinate; the standard deviation where that is zero."""
    low, high = torch.quantile(x[:16384], x.new_tensor([0.16, 0.84]), dim=0)
    half = 0.5 * (high - low)
    return torch.where(half > 0, half, x.std(0).clamp_min(1e-300))


def _seeds(x: Tensor, k: int, *, generator: torch.Generator | None) -> Tensor:
    """Indices of ``k`` starting centres, each drawn with probability proportional to squared distance (k-means++)."""
    first = int(torch.randint(x.shape[0], (), generator=generator, device=x.device))
    chosen = [first]
    square = (x - x[first]).square().sum(-1)
    for _ in range(k - 1):
        # All points may coincide with a centre already; any choice is then as good.
        weight = square if float(square.sum()) > 0 else torch.ones_like(square)
        index = int(torch.multinomial(weight, 1, generator=generator))
        chosen.append(index)
        square = torch.minimum(square, (x - x[index]).square().sum(-1))
    return torch.tensor(chosen, device=x.device)


def _maximise(x: Tensor, share: Tensor, *, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and Cholesky factors from responsibilities ``(n, K)`` of standardised points ``(n, D)``."""
    n, dim = x.shape
    count = share.sum(0)
    mean = (share.mT @ x) / count.clamp_min(1e-12).unsqueeze(-1)
    second = (share.mT.unsqueeze(1) * x.mT) @ x
    cov = second / count.clamp_min(1e-12)[:, None, None] - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    # Few points per component: shrink to the diagonal, as if dim + 2 further points had its own variances.
    diagonal = cov.diagonal(dim1=-2, dim2=-1).clamp_min(ridge)
    keep = (count / (count + dim + 2.0))[:, None, None]
    cov = keep * cov + (1.0 - keep) * torch.diag_embed(diagonal)
    cov = 0.5 * (cov + cov.mT) + ridge * torch.eye(dim, dtype=x.dtype, device=x.device)
    tril, failed = torch.linalg.cholesky_ex(cov)
    tril = torch.where((failed == 0)[:, None, None], tril, torch.diag_embed(diagonal.sqrt()))
    return (count + 1.0).log() - math.log(n), mean, tril


def _em(x: Tensor, centres: Tensor, *, iterations: int, ridge: float) -> EllipticalMixture:
    square = torch.cdist(x, centres).square()
    share = torch.nn.functional.one_hot(square.argmin(-1), centres.shape[0]).to(x.dtype)
    log_weight, mean, tril = _maximise(x, share, ridge=ridge)
    last = -math.inf
    for _ in range(iterations):
        mixture = EllipticalMixture(mean, tril, log_weight)
        part = mixture.log_components(x)
        total = torch.logsumexp(part, -1)
        log_weight, mean, tril = _maximise(x, (part - total.unsqueeze(-1)).exp(), ridge=ridge)
        value = float(total.mean())
        if value - last < 1e-4:
            break
        last = value
    return EllipticalMixture(mean, tril, log_weight)


def fit_gaussian_mixture(
    x: Tensor,
    held_out: Tensor,
    *,
    sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    centres: Tensor | None = None,
    df: float = math.inf,
    inflate: float = 1.0,
    iterations: int = 30,
    generator: torch.Generator | None = None,
) -> EllipticalMixture:
    """Full-covariance mixture whose size is chosen by held-out likelihood.

    Arguments:
        x: Draws to fit, shape ``(n, D)``.
        held_out: Draws to choose the size with, shape ``(m, D)``.
        sizes: Numbers of components to try, rising; the search stops when two in a row do not help.
        centres: Known centres ``(K, D)``, tried as another start.
        df: Degrees of freedom of the result; the fit itself is Gaussian.
        inflate: Factor on the scales of the result.
        iterations: Most EM iterations per size.
        generator: Source of randomness.
    """
    shift, scale = x.median(0).values, _robust_scale(x)
    u, v = (x - shift) / scale, (held_out - shift) / scale
    # A handful of draws far outside would own the components; the heavy-tailed parts of a stack are for them.
    u = u[u.abs().amax(-1) < FAR_OUT]
    largest = max(1, u.shape[0] // (4 * (x.shape[1] + 1)))
    starts = [_seeds(u, k, generator=generator) for k in sizes if k <= largest]
    trials = [u[index] for index in starts]
    if centres is not None and 1 < centres.shape[0] <= largest:
        trials.append((centres - shift) / scale)
    best, best_value, misses = None, -math.inf, 0
    for i, start in enumerate(trials):
        if misses >= 2 and i < len(starts):
            continue
        mixture = _em(u, start, iterations=iterations, ridge=1e-6)
        value = float(mixture.log_prob(v).clamp_min(-1e3 * x.shape[1]).mean())
        if best is None or value > best_value + 1e-3:
            best, best_value, misses = mixture, value, 0
        else:
            misses += 1
    if best is None:
        raise ValueError(f"Expected at least one size; got {tuple(sizes)}.")
    return EllipticalMixture(
        shift + scale * best.mean, inflate * scale.unsqueeze(-1) * best.scale, best.log_weight, df=df
    )


def fit_student_t(x: Tensor, *, df: float, iterations: int = 40) -> EllipticalMixture:
    """Multivariate Student-t law of given degrees of freedom by EM, started at medians and quantiles.

    Arguments:
        x: Draws, shape ``(n, D)``.
        df: Degrees of freedom, a positive integer.
        iterations: EM iterations.
    """
    n, dim = x.shape
    shift, spread = x.median(0).values, _robust_scale(x)
    u = (x - shift) / spread
    mean, eye = torch.zeros_like(shift), torch.eye(dim, dtype=x.dtype, device=x.device)
    tril = eye
    for _ in range(iterations):
        delta = u - mean
        square = torch.linalg.solve_triangular(tril, delta.mT, upper=False).square().sum(0)
        weight = (df + dim) / (df + square)
        mean = weight @ u / weight.sum()
        cov = (weight * delta.mT) @ delta / n
        # Few draws: shrink to the diagonal, as for the components of a mixture.
        keep = n / (n + dim + 2.0)
        cov = keep * cov + (1.0 - keep) * torch.diag(cov.diagonal()) + 1e-9 * eye
        tril = torch.linalg.cholesky(cov)
    return student_t(shift + spread * mean, spread.unsqueeze(-1) * tril, df=df)


def fit_product(x: Tensor, *, num_components: int = 3, df: float = 5.0, iterations: int = 40) -> ProductMixture:
    """Product of one-dimensional Student-t mixtures, all coordinates at once, started at quantiles.

    Arguments:
        x: Draws, shape ``(n, D)``.
        num_components: Components per coordinate.
        df: Degrees of freedom, a positive integer.
        iterations: EM iterations.
    """
    shift, spread = x.median(0).values, _robust_scale(x)
    u = (x - shift) / spread
    level = (torch.arange(num_components, dtype=u.dtype, device=u.device) + 0.5) / num_components
    mean = torch.quantile(u[:16384], level, dim=0).mT
    scale = torch.full_like(mean, 1.0 / num_components)
    log_weight = torch.full_like(mean, -math.log(num_components))
    for _ in range(iterations):
        delta = u.unsqueeze(-1) - mean
        square = (delta / scale).square()
        log_t = log_weight - scale.log() - 0.5 * (df + 1.0) * torch.log1p(square / df)
        share = torch.softmax(log_t, -1)
        robust = share * ((df + 1.0) / (df + square))
        count = share.sum(0)
        mean = (robust * u.unsqueeze(-1)).sum(0) / robust.sum(0).clamp_min(1e-12)
        scale = ((robust * delta.square()).sum(0) / count.clamp_min(1e-12)).sqrt().clamp_min(1e-3)
        log_weight = ((count + 1.0) / (u.shape[0] + num_components)).log()
    return ProductMixture(
        shift.unsqueeze(-1) + spread.unsqueeze(-1) * mean, spread.unsqueeze(-1) * scale, log_weight, df=df
    )


def stack(components: Sequence[Target], floors: Sequence[float], held_out: Tensor, *, iterations: int = 100) -> Stacked:
    """Stacked mixture with weights by EM on held-out draws; component ``i`` keeps at least the weight ``floors[i]``.

    Arguments:
        components: Normalised densities with exact samplers.
        floors: Smallest weights, summing to less than 1. They are the insurance against what the draws do not show.
        held_out: Draws that no component was fitted to, shape ``(m, D)``.
        iterations: EM iterations.
    """
    floor = torch.tensor(list(floors), dtype=torch.float64)
    if floor.shape != (len(components),) or float(floor.sum()) >= 1.0 or float(floor.min()) < 0.0:
        raise ValueError(f"Expected one floor per component, non-negative with sum below 1; got {list(floors)}.")
    uniform = torch.full_like(floor, 1.0 / len(components))
    log_part = Stacked(components, uniform).parts(held_out)
    # A draw where no component has any density says nothing about their weights.
    log_part = log_part[~(log_part.isneginf().all(-1) | log_part.isnan().any(-1))]
    free = uniform
    for _ in range(iterations):
        weight = floor + (1.0 - floor.sum()) * free
        share = torch.softmax(log_part + weight.log(), -1)
        # The floor's share of the responsibility is not free to move.
        free = (share * ((1.0 - floor.sum()) * free / weight)).sum(0)
        # Never exactly zero, or a component without a floor would divide zero by zero.
        free = (free / free.sum()).clamp_min(1e-12)
    return Stacked(components, floor + (1.0 - floor.sum()) * free)
