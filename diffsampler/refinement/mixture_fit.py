r"""The mixture that a learned chain is built on, and the noise levels that suit it.

Noise levels: the forward kernel is the Gaussian with the moments of the mixture's true reverse kernel, and what it
loses at step :math:`k` is close to half the variance of
:math:`\log [B_k q_{k+1} / q_k] - \log F_k`, all in closed form. The levels are respaced so that every step loses about
the same (the loss of a step grows as the square of its length, so the density of levels follows its square root).

References:
    Maximum likelihood from incomplete data via the EM algorithm (Dempster, Laird, Rubin, 1977),
    https://doi.org/10.1111/j.2517-6161.1977.tb01600.x
    Align your steps (Sabour, Fidler, Kreis, 2024), https://arxiv.org/abs/2404.14507 (optimized noise levels)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffsampler.denoiser import Denoiser, MixtureDenoiser, ProductDenoiser
from diffsampler.pilot.density_fits import fit_gaussian_mixture
from diffsampler.schedule import NoiseSchedule, exploding_levels, variance_exploding

__all__ = ["choose_denoiser", "fit_product_mixture", "tuned_levels"]

PRODUCT_SIZES = (2, 4, 8)
MIXTURE_SIZES = (1, 2, 4, 8, 16, 32, 64)
WORK = 2048
"""Largest components times dimension of a joint mixture: it is evaluated at every step of every path."""


def fit_product_mixture(x: Tensor, components: int, *, iterations: int = 60) -> ProductDenoiser:
    """Product of one-dimensional Gaussian mixtures by expectation maximisation, all coordinates at once.

    Arguments:
        x: Draws of about unit scale, shape ``(n, D)``.
        components: Components per coordinate.
        iterations: EM iterations, started at quantiles.
    """
    # Single precision is what the chain computes in, and twice as fast.
    n, x = x.shape[0], x.float()
    level = (torch.arange(components, dtype=x.dtype, device=x.device) + 0.5) / components
    mean = torch.quantile(x[:16384], level, dim=0).mT.contiguous()
    scale = torch.full_like(mean, 1.5 / components)
    log_weight = torch.full_like(mean, -math.log(components))
    for _ in range(iterations):
        delta = x.unsqueeze(-1) - mean
        share = torch.softmax(log_weight - scale.log() - 0.5 * (delta / scale).square(), -1)
        count = share.sum(0) + 1e-9
        mean = mean + (share * delta).sum(0) / count
        # As if one more draw with the scale .03 belonged to every component: none may close in on a single draw.
        square = (share * (x.unsqueeze(-1) - mean).square()).sum(0) + 1e-3
        scale = (square / (count + 1.0)).sqrt()
        log_weight = ((count + 1.0) / (n + components)).log()
    return ProductDenoiser(mean, scale, log_weight)


def choose_denoiser(
    x: Tensor, held_out: Tensor, *, centres: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Denoiser, float]:
    """Product or joint mixture, whichever predicts held-out draws better, refitted to all draws; and its likelihood.

    Arguments:
        x: Draws to fit, shape ``(n, D)``, float64.
        held_out: Draws to choose with, shape ``(m, D)``.
        centres: Known modes, shape ``(M, D)``, tried as a start of the joint mixture.
        generator: Source of randomness.
    """
    dim = x.shape[1]
    none = held_out.new_zeros(1)
    everything = torch.cat([x, held_out])
    sizes = [size for size in MIXTURE_SIZES if size * dim <= WORK]
    if centres is not None and centres.shape[0] * dim > WORK:
        centres = None
    joint = fit_gaussian_mixture(x, held_out, sizes=sizes, centres=centres, generator=generator)
    best, size = float(joint.log_prob(held_out).mean()), 0
    for components in PRODUCT_SIZES if dim > 1 else ():
        value = float(fit_product_mixture(x, components, iterations=30).log_prob(held_out, none).mean())
        # A product is cheaper and generalizes better: ties go to it.
        if value > best + (0.0 if size else -1e-3):
            best, size = value, components
    if size:
        return fit_product_mixture(everything, size), best
    again = fit_gaussian_mixture(everything, held_out, sizes=(1,), centres=joint.mean, generator=generator)
    tril = again.scale if again.full else torch.diag_embed(again.scale)
    return MixtureDenoiser(again.mean, tril, again.log_weight), best


def step_losses(
    denoiser: Denoiser, levels: Tensor, *, n: int = 1024, generator: torch.Generator | None = None
) -> Tensor:
    """Loss of every Gaussian reverse step of the mixture itself in nats, shape ``(K,)``, by ``n`` bridges per step."""
    total = torch.cat([levels, levels.new_zeros(1)]).square()
    z = denoiser.sample(n, generator=generator)
    total = total.to(z)
    losses = []
    for here, there in zip(total[:-1].split(1), total[1:].split(1), strict=True):
        noise = torch.randn(2, *z.shape, generator=generator, dtype=z.dtype, device=z.device)
        after = z + there.sqrt() * noise[0]
        before = after + (here - there).sqrt() * noise[1]
        base = denoiser(before, here)
        keep = there / here
        mean = before + (1.0 - keep) * (base.mean - before)
        variance = keep * (here - there) + (1.0 - keep).square() * base.variance
        log_forward = -0.5 * ((after - mean).square() / variance + variance.log()).sum(-1)
        log_backward = -0.5 * noise[1].square().sum(-1)
        true = log_backward + denoiser.log_prob(after, there) - denoiser.log_prob(before, here)
        losses.append(0.5 * (true - log_forward).double().var())
    return torch.stack(losses)


def tuned_levels(
    denoiser: Denoiser,
    num_steps: int,
    *,
    noise_min: float,
    noise_max: float,
    rounds: int = 2,
    generator: torch.Generator | None = None,
) -> NoiseSchedule:
    """A variance-exploding schedule whose steps lose about the same on the mixture.

    Arguments:
        denoiser: Of the mixture.
        num_steps: Number of steps ``K``, at least 2.
        noise_min: Smallest level.
        noise_max: Largest level.
        rounds: Respacings.
        generator: Source of randomness.
    """
    schedule = variance_exploding(num_steps, noise_min=noise_min, noise_max=noise_max)
    for _ in range(rounds):
        levels = schedule.total_variance[:-1].sqrt()
        # The last step, to zero noise, has a length of its own.
        root = step_losses(denoiser, levels, generator=generator).cpu()[:-1].clamp_min(1e-12).sqrt()
        log_level = levels.log()
        length = log_level[:-1] - log_level[1:]
        density = root / length
        padded = torch.cat([density[:1], density, density[-1:]])
        smooth = (padded[:-2] + padded[1:-1] + padded[2:]) / 3.0
        # A floor, because losses are estimated and the target is not quite the mixture.
        smooth = smooth + 0.05 * smooth.mean()
        passed = torch.cat([length.new_zeros(1), (smooth * length).cumsum(0)])
        wanted = torch.linspace(0.0, float(passed[-1]), num_steps, dtype=passed.dtype)
        right = torch.searchsorted(passed, wanted).clamp(1, num_steps - 1)
        share = (wanted - passed[right - 1]) / (passed[right] - passed[right - 1])
        new = log_level[right - 1] + share.clamp(0.0, 1.0) * (log_level[right] - log_level[right - 1])
        schedule = exploding_levels(new.exp())
    return schedule
