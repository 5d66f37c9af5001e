"""Conformance of samplers."""

from __future__ import annotations

import math

import torch
from scipy import special
from torch import Tensor

from diffsampler.particles import Particles
from diffsampler.sampler import Sampler
from diffsampler.space import Torus
from diffsampler.target import Target
from diffsampler.testing.common import FALSE_ALARM, normal_quantile, require

__all__ = ["check_sampler"]


def check_sampler(sampler: Sampler, *, n: int = 4096, seed: int = 0) -> tuple[str, ...]:
    """Check that a sampler keeps the promises of :class:`~diffsampler.sampler.Sampler`.

    Always: the record, seeds, no use of the global generator. Where the target's constant is known and the weights have
    a finite variance (Pareto shape below 0.5, or replicates): the normalizing constant. Where the target has an exact
    sampler: bounded expectations.

    Arguments:
        sampler: The sampler, trained where it needs training.
        n: Number of particles; each statistical check fails by chance with probability 1e-6 in the Gaussian limit.
        seed: Seed of the draws.

    Returns:
        Names of the checks that ran.

    Raises:
        AssertionError: At the first broken promise.
    """
    target, state = sampler.target, torch.get_rng_state()
    particles, again, other = (sampler.sample(n, seed=s) for s in (seed, seed, seed + 1))
    require(torch.equal(state, torch.get_rng_state()), "Expected an explicit generator; the global one moved.")
    _check_particles(particles, target, n)
    require(
        torch.equal(particles.x, again.x) and torch.equal(particles.log_weight, again.log_weight),
        "Expected equal seeds to give equal particles; they differ.",
    )
    require(not torch.equal(particles.x, other.x), "Expected other seeds to give other particles; they are equal.")
    done = ["seeds", "particles"]
    regular = particles.replicates > 1 or particles.pareto_k < 0.5
    if target.log_normalizer is not None and particles.has_normalizer and regular:
        _check_normalizer(particles, target.log_normalizer)
        done.append("normalizer")
    if target.has_sampler and (regular or not particles.has_normalizer):
        generator = torch.Generator(particles.x.device).manual_seed(seed)
        _check_expectations(particles, target, target.sample(n, generator=generator))
        done.append("expectations")
    return tuple(done)


def _check_particles(particles: Particles, target: Target, n: int) -> None:
    x, log_weight = particles.x, particles.log_weight
    count = len(particles) + particles.nonfinite
    require(count >= n, f"Expected at least {n} particles, lost ones included; got {count}.")
    require(x.shape[1:] == (target.dim,), f"Expected particles of length {target.dim}; got {tuple(x.shape)}.")
    require(not (x.requires_grad or log_weight.requires_grad), "Expected particles without a graph; they carry one.")
    require(bool(x[log_weight > -math.inf].isfinite().all()), "Expected finite points where weights are positive.")
    bad = log_weight.isnan() | (log_weight == math.inf)
    require(not bool(bad.any()), f"Expected log weights below infinity; got {int(bad.sum())} that are not.")
    finite = x[log_weight > -math.inf]
    error = (target.space.project(finite) - finite).abs().max().item()
    require(error < 1e-4, f"Expected particles on the space; the projection moves them by {error:.2g}.")


def _quantile(particles: Particles, probability: float) -> float:
    """Two-sided limit of a standardized error: Student's where it was estimated from a few replicates."""
    if particles.replicates == 1:
        return normal_quantile(probability)
    return -float(special.stdtrit(particles.replicates - 1, 0.5 * probability))


def _check_normalizer(particles: Particles, truth: float) -> None:
    value, error, _ = particles.log_normalizer
    limit = _quantile(particles, FALSE_ALARM)
    z = abs(value - truth) / (error + 1e-7)
    require(z < limit, f"Expected log Z = {truth:.6g}; got {value:.6g} +- {error:.2g} ({z:.1f} standard errors).")


def _check_expectations(particles: Particles, target: Target, exact: Tensor) -> None:
    """Sines of the points on the exact samples' own scale, weighted against unweighted."""
    center, scale = exact.mean(0), exact.std(0)

    def statistics(x: Tensor) -> Tensor:
        if isinstance(target.space, Torus):
            return target.space.features(x.double())
        z = (x.double() - center) / scale
        return torch.cat([z.sin(), z.cos()], -1)

    mean, error = particles.expectation(statistics(particles.x))
    if particles.effective is not None:
        error = statistics(exact).std(0) / math.sqrt(max(particles.effective, 1.0))
    truth = statistics(exact)
    error = (error.square() + truth.var(0) / len(truth)).sqrt()
    z = (mean - truth.mean(0)).abs() / (error + 1e-9)
    limit = _quantile(particles, FALSE_ALARM / z.numel())
    require(
        z.max().item() < limit,
        f"Expected weighted particles to follow the target; an expectation is {z.max().item():.1f} standard errors off "
        f"(limit {limit:.1f}).",
    )
