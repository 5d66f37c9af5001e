r"""Ascent of one point along curved ridges that are many of their own widths long.

Coordinates :math:`x = x_0 + L w` whiten the curvature found so far; all derivatives are differences of scores along the
columns of :math:`L`, so that a ratio of scales far beyond the digits of one Hessian is resolved in a few iterations.
In the local axes :math:`e_i`, from short to long, trial points are

* Newton steps with many dampings: from heavily damped, which go across a ridge, to not at all;
* parabolas along each long axis, bent so that the slope :math:`s` in the shorter ones stays as it is,

.. math:: x(t) = x_0 + t e_i + \tfrac12 t^2 \sum_{j < i} e_j\, e_j^\top s''[e_i, e_i], \qquad e_j^\top |H| e_j = 1,

and then brought back to the crest by Newton steps in those shorter axes. The best of all is taken. Steps are limited
by how far the crest turns, not by the width of the ridge: tens of steps for a parabola 1e7 widths long.

References:
    Geometry of nonlinear least squares with applications to sloppy models and optimization (Transtrum, Machta,
    Sethna, 2011), https://arxiv.org/abs/1010.1449 (steps that bend with
    the ridge)
    Identifying and attacking the saddle point problem in high-dimensional non-convex optimization (Dauphin et al.,
    2014), https://arxiv.org/abs/1406.2572 (absolute eigenvalues)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffsampler.target import Target

__all__ = ["curved_ascent"]

# Differences reach this far, in whitened units.
REACH = 1e-2
RESOLUTIONS = 6
LOST = 30.0
"""Fall of the local Laplace mass, in nats, that ends an ascent."""
DAMPINGS = 40
CORRECTIONS = 4
LONGEST = 4
"""Number of directions, the longest ones, along which ridges are followed."""
SIZES = [sign * 2.0**k for sign in (1, -1) for k in range(-6, 34)]


def _derivatives(target: Target, x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Score ``(D,)`` and negative Hessian ``(D, D)`` in the coordinates ``w`` of ``x + factor @ w``."""
    dim = x.shape[0]
    step = REACH * factor.mT
    score = target.log_prob_and_score(torch.cat([x.unsqueeze(0), x + step, x - step]))[1].to(x.dtype) @ factor
    hessian = (score[dim + 1 :] - score[1 : dim + 1]) / (2.0 * REACH)
    return score[0], 0.5 * (hessian + hessian.mT)


def _resolved(target: Target, x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates in which the absolute Hessian is the identity: ``factor (D, D)``, and the score there ``(D,)``."""
    score = x
    for _ in range(RESOLUTIONS):
        score, hessian = _derivatives(target, x, factor)
        if not bool(torch.isfinite(score).all() and torch.isfinite(hessian).all()):
            break
        value, vector = torch.linalg.eigh(hessian)
        value = value.abs()
        # Differences cannot tell smaller ones from zero: they come out in the next, better units.
        turn = vector * value.clamp_min(1e-6 * float(value.max())).clamp_min(1e-30).rsqrt()
        factor, score = factor @ turn, turn.mT @ score
        if 0.5 < float(value.min()) and float(value.max()) < 2.0:
            break
    return factor, score


def _damped(target: Target, x: Tensor, stretch: Tensor, frame: Tensor, score: Tensor) -> Tensor:
    """Newton steps ``(n, D)`` for many dampings; from heavily damped, across the ridge, to not at all."""
    low, high = -2.0 - float(stretch[-1].log10()), 2.0 - float(stretch[0].log10())
    damping = 10.0 ** torch.linspace(low, high, DAMPINGS, dtype=x.dtype)
    damping[0] = 0.0
    full = (score / (1.0 + damping.unsqueeze(-1) * stretch)) @ frame.mT
    return torch.cat([full, 0.25 * full])


def _along(target: Target, x: Tensor, frame: Tensor) -> Tensor:
    """Trials ``(n, D)`` along each direction; the stiffer ones then bring them back to where their slope vanishes."""
    dim = x.shape[0]
    h = 10.0 * REACH
    points = torch.cat([x + h * frame.mT, x - h * frame.mT, x.unsqueeze(0)])
    score = target.log_prob_and_score(points)[1].to(x.dtype) @ frame
    second = (score[:dim] - 2.0 * score[-1] + score[dim:-1]) / h**2
    # Directions are sorted by rising length: row i is bent by columns j < i.
    stiffer = torch.ones_like(frame).tril(-1)
    bend = torch.where(torch.isfinite(second), second, 0.0) * stiffer @ frame.mT
    size = torch.tensor(SIZES, dtype=x.dtype)[:, None, None]
    longest = slice(max(0, dim - LONGEST), dim)
    trial = size * frame.mT[longest] + 0.5 * size.square() * bend[longest]
    trials = [trial]
    for _ in range(CORRECTIONS):
        slope = target.log_prob_and_score(x + trial)[1].to(x.dtype) @ frame
        trial = trial + torch.where(torch.isfinite(slope), slope, 0.0) * stiffer[longest] @ frame.mT
        trials.append(trial)
    return torch.cat(trials).reshape(-1, dim)


def curved_ascent(
    target: Target, x: Tensor, scale: Tensor, *, steps: int = 300, max_evaluations: float = 400_000
) -> tuple[Tensor, Tensor]:
    """Where an ascent along ridges ends.

    Arguments:
        target: The density.
        x: Starting point, shape ``(D,)``, float64.
        scale: First guess of the local scales, shape ``(D,)``.
        steps: Most steps, about ``400 min(D, 4) + 4 D`` evaluations each.
        max_evaluations: Budget.

    Returns:
        The end point ``(D,)`` and the local scales there given the other coordinates, ``(D,)``.
    """
    dim = x.shape[0]
    factor = torch.diag(scale)
    log_prob, stuck, most = float(target.log_prob(x.unsqueeze(0))[0]), 0, -math.inf
    cost = (2 * CORRECTIONS + 3) * len(SIZES) * min(dim, LONGEST) + 6 * dim + 2 * DAMPINGS
    for _ in range(min(steps, int(max_evaluations / cost))):
        factor, score = _resolved(target, x, factor)
        if not bool(torch.isfinite(score).all() and torch.isfinite(factor).all()):
            break
        # Axes of the local ellipsoid: the right singular vectors keep the short ones exact beside long ones.
        _, stretch, turn = torch.linalg.svd(factor)
        stretch, turn = stretch.flip(0), turn.flip(0)
        frame = factor @ turn.mT
        trial = x + torch.cat([_damped(target, x, stretch.square(), frame, turn @ score), _along(target, x, frame)])
        with torch.no_grad():
            reached = target.log_prob(trial).double()
        reached = torch.where(torch.isfinite(reached), reached, -torch.inf)
        best = int(reached.argmax())
        gain = float(reached[best]) - log_prob
        if gain > 0:
            x, log_prob = trial[best], float(reached[best])
        stuck = 0 if gain > 1e-3 else stuck + 1
        # In a neck the density rises without end, and its mass falls.
        mass = log_prob + float(stretch.log().sum())
        most = max(most, mass)
        if stuck == 2 or mass < most - LOST:
            break
    precision = torch.linalg.inv(factor).square().sum(0)
    return x, precision.rsqrt()
