r"""Draws of the laws of sites, right also where a library's own sampler is not.

The prior of a model is a reference only if its draws follow its density. Two samplers of torch 2.13 and Pyro 1.9.2 do
not (``tests/test_pyro_supports.py`` measures it): ``LKJCholesky`` draws rows from the third on too long, and is drawn
here by the onion method, in which row :math:`i = 1 \dots d - 1` below the first is

.. math:: (\sqrt{b}\, u, \sqrt{1 - b}), \quad b \sim \mathrm{Beta}(i/2,\; \eta + (d - 1 - i)/2), \quad
    u \text{ uniform on the sphere of } \mathbb{R}^i;

``SineBivariateVonMises`` is not drawn, so that a model with such a latent site has no prior to start from.

Reference:
    Generating random correlation matrices based on vines and extended onion method (Lewandowski, Kurowicka & Joe,
    2009), https://doi.org/10.1016/j.jmva.2009.04.008
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from pyro import distributions as dist
from pyro.distributions.util import sum_rightmost
from torch import Tensor

__all__ = ["draw_discrete", "draw_law", "first_discrete", "law_log_prob"]


def law_log_prob(fn: Any, value: Tensor) -> Tensor:
    r"""Log density of a law; with validation on, its own.

    The binary cross entropy that ``Bernoulli`` calls falls apart into forty operations under ``vmap``. Here it is
    :math:`y l + \log\sigma(-l)` for logits :math:`l`. That of ``Multinomial`` writes at indices that depend on values,
    which ``vmap`` refuses; here :math:`0 \cdot (-\infty) = 0` is a choice between two values.
    """
    if fn._validate_args:
        return cast(Tensor, fn.log_prob(value))
    if isinstance(fn, torch.distributions.Independent):
        return sum_rightmost(law_log_prob(fn.base_dist, value), fn.reinterpreted_batch_ndims)
    if isinstance(fn, torch.distributions.Bernoulli):
        return value * fn.logits + torch.nn.functional.logsigmoid(-fn.logits)
    if isinstance(fn, torch.distributions.Multinomial):
        ways = (value.sum(-1) + 1.0).lgamma() - (value + 1.0).lgamma().sum(-1)
        return ways + (value * torch.where(value == 0.0, 0.0, fn.logits)).sum(-1)
    return cast(Tensor, fn.log_prob(value))


def draw_law(fn: Any, shape: tuple[int, ...] = ()) -> Tensor:
    """Draws ``(*shape, *batch, *event)`` of a law.

    Raises:
        NotImplementedError: If the law has no sampler, or a wrong one.
    """
    if isinstance(fn, torch.distributions.LKJCholesky):
        return _draw_lkj(fn, shape)
    if isinstance(fn, dist.SineBivariateVonMises):
        raise NotImplementedError("Its sampler does not follow its density.")
    if isinstance(fn, torch.distributions.Independent):
        return draw_law(fn.base_dist, shape)
    if isinstance(fn, torch.distributions.TransformedDistribution):
        value = draw_law(fn.base_dist, shape)
        for transform in fn.transforms:
            value = transform(value)
        return value
    if isinstance(fn, dist.SineSkewed):
        draw_law(fn.base_dist)
    with warnings.catch_warnings():
        # A test of torch that is upside down: every good draw is called singular, and drawn once more.
        warnings.filterwarnings("ignore", "Singular sample detected", UserWarning)
        value = fn.sample(torch.Size(shape))
    return value


def _draw_lkj(fn: Any, shape: tuple[int, ...]) -> Tensor:
    eta, d = fn.concentration, fn.dim
    rows = torch.arange(d, dtype=eta.dtype, device=eta.device)
    first = (0.5 * rows).clamp_min(0.5).expand((*shape, *eta.shape, d))
    second = (eta.unsqueeze(-1) + 0.5 * (d - 1 - rows)).expand_as(first)
    short, long = torch._standard_gamma(first.contiguous()), torch._standard_gamma(second.contiguous())
    # The first row has no entries below the diagonal.
    length = torch.where(rows > 0, short / (short + long), torch.zeros_like(short)).unsqueeze(-1)
    normal = torch.randn((*first.shape, d), dtype=eta.dtype, device=eta.device).tril(-1)
    norm = normal.square().sum(-1, keepdim=True).sqrt()
    below = length.sqrt() * normal / torch.where(rows.unsqueeze(-1) > 0, norm, torch.ones_like(norm))
    return below + torch.diag_embed((1.0 - length).clamp_min(torch.finfo(eta.dtype).tiny).sqrt().squeeze(-1))


def draw_discrete(fn: Any) -> Tensor:
    """A draw of a discrete law with finite support, by operations that vmap draws anew for every row."""
    support = fn.enumerate_support(expand=True)
    log_prob = fn.log_prob(support)
    noise = torch.rand(log_prob.shape, dtype=log_prob.dtype, device=log_prob.device)
    # The largest of Gumbel variables shifted by log probabilities is a draw.
    index = (log_prob - (-noise.log()).log()).argmax(0, keepdim=True)
    index = index.reshape(index.shape + (1,) * (support.dim() - index.dim()))
    return torch.take_along_dim(support, index.expand(1, *support.shape[1:]), 0).squeeze(0)


def first_discrete(fn: Any) -> Tensor:
    """Some value of a discrete law, the same in every run."""
    value: Tensor = fn.enumerate_support(expand=True)[0]
    return value
