r"""Closed-form fit of the sparse triangular map, coordinate by coordinate.

Given :math:`z_{<j}`, the location is a ridge regression of :math:`y_j` weighted by :math:`e^{-2\eta_j}`, and the
log-scale :math:`\eta = G b` is fitted by Fisher scoring of the Gaussian likelihood,

.. math:: b \leftarrow b + (2 G^\top G + \lambda)^{-1} G^\top (r^2 e^{-2\eta} - 1),

with :math:`r` the residual. A feature enters only if its score correlation is significant, so a map that is not
called for stays affine. The order puts first the coordinates that drive the scale of others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffsampler.pilot.reference import student_t
from diffsampler.pilot.transport import AffineMap, TransportMap, TriangularMap, fit_affine

__all__ = ["driving_order", "fit_transport", "fit_triangular", "fitted_log_prob", "typical_gain"]

RIDGE = 1e-3


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a = (a - a.mean(0)) / a.std(0).clamp_min(1e-12)
    b = (b - b.mean(0)) / b.std(0).clamp_min(1e-12)
    return a.mT @ b / a.shape[0]


def driving_order(y: Tensor) -> Tensor:
    r"""Order of the coordinates, shape ``(D,)``: first those that drive the scale or bend the mean of others.

    :math:`C_{ij} = \mathrm{corr}(y_i, \log r_j^2)^2 + \mathrm{corr}(y_i^2, y_j)^2` with :math:`r_j` the residual of
    :math:`y_j` on *all* other coordinates, thresholded at its noise level; sorted by out-strength minus in-strength.
    """
    n, dim = y.shape
    correlation = torch.corrcoef(y.mT) if dim > 1 else torch.ones(1, 1, dtype=y.dtype)
    precision = torch.linalg.inv(correlation + RIDGE * torch.eye(dim, dtype=y.dtype, device=y.device))
    residual = (y - y.mean(0)) / y.std(0) @ precision / precision.diagonal()
    strength = _correlation(y, (residual.square() + 1e-12).log()).square()
    strength = strength + _correlation(y.square(), y).square()
    strength = torch.where(strength > (4.0 / math.sqrt(n) + 0.04) ** 2, strength, 0.0)
    strength.fill_diagonal_(0.0)
    return (strength.sum(1) - strength.sum(0)).argsort(descending=True, stable=True)


def _weighted_ridge(features: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    gram = features.mT @ (weight.unsqueeze(-1) * features)
    penalty = RIDGE * gram.diagonal().clamp_min(1e-12)
    penalty[0] = 0.0
    return torch.linalg.solve(gram + torch.diag(penalty + 1e-12 * gram.diagonal().mean()), features.mT @ (weight * y))


def _score_scale(features: Tensor, residual: Tensor, start: Tensor, *, steps: int = 8) -> Tensor:
    """Damped Fisher scoring of the log-scale coefficients."""
    gram = 2.0 * features.mT @ features
    gram = gram + torch.diag(RIDGE * gram.diagonal() + 1e-9 * gram.diagonal().mean())
    factor = torch.linalg.cholesky(gram)
    b = start
    for _ in range(steps):
        # One far outlier would otherwise throw the step; the excess is bounded as in robust scoring.
        excess = (residual.square() * (-2.0 * (features @ b)).exp() - 1.0).clamp_max(20.0)
        b = b + torch.cholesky_solve((features.mT @ excess).unsqueeze(-1), factor).squeeze(-1).clamp(-1.0, 1.0)
    return b


def _fit_coordinate(y: Tensor, location: Tensor, log_scale: Tensor, *, linear: int) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of location and log-scale over the given features, and the residual ``z_j``.

    The first ``linear`` location features are always kept; the others, and those of the scale but the constant, are
    screened by score correlation.
    """
    n = y.shape[0]
    limit = 4.0 / math.sqrt(n) + 0.04
    keep_loc = torch.zeros(location.shape[1], dtype=torch.bool)
    keep_loc[:linear] = True
    keep_scale = torch.zeros(log_scale.shape[1], dtype=torch.bool)
    keep_scale[0] = True
    b = y.new_zeros(log_scale.shape[1])
    a = y.new_zeros(location.shape[1])
    for _ in range(3):
        weight = (-2.0 * (log_scale @ b)).exp()
        a = torch.zeros_like(a)
        a[keep_loc] = _weighted_ridge(location[:, keep_loc], y, weight)
        residual = y - location @ a
        z = residual * weight.sqrt()
        # Bounded scores: single heavy draws must not let a feature in.
        keep_loc |= _correlation(location, z.clamp(-4.0, 4.0).unsqueeze(-1)).squeeze(-1).abs() > limit
        excess = (z.square() - 1.0).clamp_max(8.0).unsqueeze(-1)
        keep_scale |= _correlation(log_scale, excess).squeeze(-1).abs() > limit
        start = torch.where(keep_scale, b, 0.0)
        if float(start.abs().sum()) == 0.0:
            start[0] = 0.5 * residual.square().mean().clamp_min(1e-24).log()
        b = torch.zeros_like(b)
        b[keep_scale] = _score_scale(log_scale[:, keep_scale], residual, start[keep_scale])
    z = (y - location @ a) * (-(log_scale @ b)).exp()
    return a, b, z


def fit_triangular(x: Tensor) -> TriangularMap:
    """Fit the sparse triangular map to draws ``(n, D)``."""
    n, dim = x.shape
    median = x.median(0).values
    scale = x.std(0)
    scale = torch.where(scale > 0, scale, 1.0)
    y = (x - median) / scale
    order = driving_order(y)
    y = y[:, order]
    z = torch.zeros_like(y)
    location = y.new_zeros(2 + 3 * dim, dim)
    log_scale = y.new_zeros(1 + 2 * dim, dim)
    for j in range(dim):
        before = torch.arange(j)
        # Rows of f: 1, z, z^2, sigma, sigma z; sigma is a function of z_1 and needs j > 0.
        rows = torch.cat([torch.zeros(1, dtype=torch.long), 1 + before, 1 + dim + before])
        if j > 0:
            rows = torch.cat([rows, torch.tensor([1 + 2 * dim]), 2 + 2 * dim + before])
        scale_rows = torch.cat([torch.zeros(1, dtype=torch.long), 1 + before, 1 + dim + before])
        features = TriangularMap.location_features(z)[:, rows]
        scale_features = TriangularMap.scale_features(z)[:, scale_rows]
        a, b, z[:, j] = _fit_coordinate(y[:, j], features, scale_features, linear=1 + j)
        location[rows, j] = a
        log_scale[scale_rows, j] = b
    return TriangularMap(order, median[order], scale[order], location, log_scale)


def fitted_log_prob(transport: TransportMap, x: Tensor, *, df: float = math.inf) -> Tensor:
    """Log density ``(n,)`` of the law that the map makes from a standard Gaussian or Student-t law."""
    z = transport.inverse(x)
    base = student_t(z.new_zeros(z.shape[1]), z.new_ones(z.shape[1]), df=df)
    return base.log_prob(z) - transport(z)[1]


def _held_out(transport: TransportMap, x: Tensor) -> Tensor:
    """Log densities ``(2, n)`` with a Student-t(4) and with a Gaussian base."""
    return torch.stack([fitted_log_prob(transport, x, df=df) for df in (4.0, math.inf)])


def typical_gain(transport: TransportMap, other: TransportMap, held_out: Tensor) -> float:
    """Gain in nats of one map over another in the median over draws, each with its better base.

    A map that has not seen a neck can be hundreds of nats wrong at one draw in it and right everywhere else.
    """
    value = [float(_held_out(t, held_out).median(-1).values.max()) for t in (transport, other)]
    return value[0] - value[1] if all(map(math.isfinite, value)) else -math.inf


def fit_transport(
    x: Tensor, held_out: Tensor, *, triangular: TriangularMap | None = None, margin: float = 0.05
) -> TransportMap:
    """The triangular map where it beats the affine one on held-out draws by ``margin`` nats, else the affine one.

    Each is judged with the better of a Gaussian and a Student-t base, so that heavy tails alone, which look like
    scales that depend on everything, do not call for a non-linear map.

    Arguments:
        x: Draws to fit, shape ``(n, D)``.
        held_out: Draws to judge with, shape ``(m, D)``.
        triangular: ``fit_triangular(x)`` where it is known already.
        margin: Gain in nats that a non-linear map must bring.
    """
    affine: AffineMap = fit_affine(x)
    if x.shape[1] == 1:
        return affine
    triangular = fit_triangular(x) if triangular is None else triangular
    value = [float(_held_out(t, held_out).mean(-1).max()) for t in (affine, triangular)]
    gain = value[1] - value[0]
    return triangular if math.isfinite(gain) and gain > margin else affine
