r"""Reversal of a variance-exploding chain, built on the exact denoiser of a fitted mixture.

The noising chain is :math:`B_k(z_k | z_{k+1}) = N(z_{k+1}, (s_k^2 - s_{k+1}^2) I)`, :math:`s_0 > \dots > s_K = 0`. A
mixture fitted to particles gives posterior moments :math:`\mu_k(z), v_k(z)` of :math:`z_K` given :math:`z_k = z` in
closed form (:mod:`diffsampler.denoiser`), and with :math:`r = s_{k+1}^2 / s_k^2`

.. math::
   \hat z &= \mu_k + \sqrt{v_k}\,(a_\theta + g_k h), \qquad
   h = c \tanh\big(\sqrt{v_k}\,(\nabla\log\rho - \nabla\log q)(z) / c\big), \\
   F_k &= N\big(r z + (1 - r)\hat z,\; [r (s_k^2 - s_{k+1}^2) + (1 - r)^2 v_k]\, e^{2 \tanh(l_\theta / 2)}\big).

With :math:`a = l = 0` it samples the mixture :math:`q` up to discretization. To first order in a shift of a component,
:math:`g = 1` corrects it. The initial law is a Gaussian with learned mean and scales. All kernels are Gaussian
functions of (step, point, score), so the weights are exact whatever was learned.

References:
    Denoising Diffusion Samplers (Vargas, Grathwohl, Doucet, 2023), https://arxiv.org/abs/2302.13834
    Elucidating the design space of diffusion-based generative models (Karras et al., 2022),
    https://arxiv.org/abs/2206.00364 (variance exploding, preconditioned data prediction)
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffsampler.denoiser import Denoised, Denoiser
from diffsampler.networks import clip, linear
from diffsampler.process import Gaussian, Process
from diffsampler.schedule import NoiseSchedule
from diffsampler.space import Euclidean

__all__ = ["RefinedProcess"]

CLIP = 5.0


@final
class _Correction(nn.Module):
    """The learned part: ``a`` and ``l``, each ``(..., D)``, zero at the start.

    A joint residual MLP of point, clipped score difference and joint shares, plus one coefficient per component,
    linear in smooth features of time.
    """

    def __init__(self, dim: int, denoiser: Denoiser, *, num_time: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.dim = dim
        self.joint = denoiser.joint
        self.components = denoiser.components
        seen = 2 * dim + (denoiser.components if denoiser.joint else 0)
        self.point_in = linear(seen, width, generator=generator)
        self.time_in = linear(num_time, width, generator=generator)
        self.hidden = linear(width, width, generator=generator)
        self.head = linear(width, 2 * dim, generator=generator, zero=True)
        self.by_component = linear(num_time, 2 * dim * denoiser.components, generator=generator, zero=True)

    def forward(self, features: Tensor, point: Tensor, difference: Tensor, share: Tensor) -> Tensor:
        """Both outputs, shape ``(..., 2 D)``."""
        seen = [point, difference, share] if self.joint else [point, difference]
        h = functional.silu(self.point_in(torch.cat(seen, -1)) + self.time_in(features))
        h = h + functional.silu(self.hidden(h))
        coefficient = self.by_component(features)
        if self.joint:
            coefficient = coefficient.unflatten(-1, (self.components, 2 * self.dim))
            local = (share.unsqueeze(-2) @ coefficient).squeeze(-2)
        else:
            coefficient = coefficient.unflatten(-1, (2, self.dim, self.components))
            local = (share.unsqueeze(-3) * coefficient).sum(-1).flatten(-2)
        return self.head(h) + local


@final
class RefinedProcess(Process):
    """Learned reversal of a variance-exploding chain around the denoiser of a fitted mixture.

    Arguments:
        dim: Dimension of the Euclidean space.
        schedule: A variance-exploding chain (``a_k = 1``).
        denoiser: Of a mixture that resembles the target, about the origin at unit scale.
        width: Width of the network.
        seed: Seed of the network's initial parameters.
    """

    level: Tensor
    noise: Tensor
    variance: Tensor
    total_noise: Tensor
    keep: Tensor
    features: Tensor
    shrink: Tensor

    def __init__(
        self,
        dim: int,
        schedule: NoiseSchedule,
        denoiser: Denoiser,
        *,
        width: int = 96,
        seed: int = 0,
    ) -> None:
        if not bool((schedule.contraction == 1.0).all()):
            raise ValueError("Expected a variance-exploding schedule (a_k = 1).")
        if denoiser.dim != dim:
            raise ValueError(f"Expected a denoiser in {dim} dimensions; got one in {denoiser.dim}.")
        num_steps = len(schedule.variance)
        super().__init__(Euclidean(dim), num_steps, has_bridge=True, learns_initial=True)
        self.denoiser = denoiser.float()
        total = schedule.total_variance
        self.register_buffer("variance", total.float().unsqueeze(-1))
        self.register_buffer("noise", schedule.variance.float().unsqueeze(-1))
        self.register_buffer("total_noise", total.sqrt().float().unsqueeze(-1))
        self.register_buffer("keep", (total[1:] / total[:-1]).float().unsqueeze(-1))
        self.register_buffer("shrink", (1.0 + total).rsqrt().float().unsqueeze(-1))
        t = (torch.arange(num_steps, dtype=torch.float64) + 0.5) / num_steps
        angle = math.pi * t.unsqueeze(-1) * torch.arange(1, 9)
        features = torch.cat([torch.ones_like(t).unsqueeze(-1), angle.cos(), angle.sin()], -1)
        self.register_buffer("features", features.float())
        self.gate = nn.Parameter(torch.zeros(num_steps, dim))
        self.bias = nn.Parameter(torch.zeros(num_steps, 2 * dim))
        self.initial_mean = nn.Parameter(torch.zeros(dim))
        self.initial_log_scale = nn.Parameter(torch.zeros(dim))
        generator = torch.Generator().manual_seed(seed)
        self.control = _Correction(dim, denoiser, num_time=features.shape[-1], width=width, generator=generator)

    def sample_initial(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        noise = self.space.noise((n,), like=self.initial_mean, generator=generator)
        u = self.denoiser.sample(n, generator=generator) + self.total_noise[0] * noise
        return self.initial_mean + self.initial_log_scale.exp() * u

    def log_initial(self, x: Tensor) -> Tensor:
        u = (x - self.initial_mean) * (-self.initial_log_scale).exp()
        return (self.denoiser.log_prob(u, self.variance[0]) - self.initial_log_scale.sum()).double()

    def forward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        assert score is not None
        base: Denoised = self.denoiser(x, self.variance[k])
        std = base.variance.sqrt()
        difference = clip(std * (score - base.score), CLIP)
        out = self.control(self.features[k], self.shrink[k] * x, difference, base.share) + self.bias[k]
        shift, log_factor = out.chunk(2, -1)
        data = base.mean + std * (shift + self.gate[k] * difference)
        keep = self.keep[k]
        variance = keep * self.noise[k] + (1.0 - keep).square() * base.variance
        return Gaussian(x + (1.0 - keep) * (data - x), variance * (2.0 * torch.tanh(0.5 * log_factor)).exp())

    def backward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        return Gaussian(x, self.noise[k])

    def sample_bridge(self, k: Tensor, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        noise = self.space.noise(tuple(x.shape[:-1]), like=x, generator=generator)
        return x + self.total_noise[k] * noise
