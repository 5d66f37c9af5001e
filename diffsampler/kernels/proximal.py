r"""Langevin kernels for log densities :math:`-f(x) - g(x)` with :math:`f` smooth and :math:`g` convex and not smooth.

What is known of :math:`g` is its proximal map and its Moreau envelope, a smooth function below it,

.. math::
    \mathrm{prox}_{\lambda g}(x) = \arg\min_z\ g(z) + \frac{|z - x|^2}{2\lambda}, \qquad
    g^\lambda(x) = \min_z\ g(z) + \frac{|z - x|^2}{2\lambda}, \qquad
    \nabla g^\lambda(x) = \frac{x - \mathrm{prox}_{\lambda g}(x)}{\lambda}.

The density that these kernels are given returns the whole log density and the gradient of its *smooth part*,
:math:`-\nabla f`: a :class:`CompositeDensity` does. The kernels add what :math:`g` contributes. The exact kernel is
exact for whatever law the log density states, gradient right or not.

References:
    Proximal Markov chain Monte Carlo algorithms (Pereyra, 2016), https://arxiv.org/abs/1306.0187 (MYMALA, P-MALA)
    Efficient Bayesian computation by proximal Markov chain Monte Carlo: when Langevin meets Moreau
    (Durmus, Moulines & Pereyra, 2018), https://arxiv.org/abs/1612.07471 (MYULA)
    Stochastic proximal Langevin algorithm: potential splitting and nonasymptotic rates
    (Salim, Kovalev & Richtarik, 2019), https://arxiv.org/abs/1905.11768
    Analysis of Langevin Monte Carlo via convex optimization (Durmus, Majewski & Miasojedow, 2019),
    https://arxiv.org/abs/1802.09188 (stochastic proximal gradient Langevin)
"""

from __future__ import annotations

import math
from typing import Protocol, final

import torch
from torch import Tensor

from diffsampler.kernel import Info, Kernel, KernelParams, LogDensity, State
from diffsampler.kernels.langevin import propose, take_finite
from diffsampler.kernels.metropolis import is_broken, metropolis, scaled_columns
from diffsampler.space import Euclidean, Space

__all__ = ["L1", "MYMALA", "MYULA", "Box", "CompositeDensity", "ForwardBackward", "Prox"]


class Prox(Protocol):
    """A convex function with a proximal map."""

    separable: bool
    """Whether it is a sum over coordinates, so that each may have a strength of its own."""

    def value(self, x: Tensor) -> Tensor:
        """``g(x)``, shape ``(..., D) -> (...)``; ``inf`` outside its domain."""
        ...

    def prox(self, x: Tensor, strength: Tensor) -> Tensor:
        """The proximal map of ``strength * g``, shape ``(..., D)``; ``strength`` broadcasts, and is positive."""
        ...


@final
class L1:
    r"""The norm :math:`g(x) = w \sum_i |x_i|`, whose proximal map shrinks towards zero; a Laplace prior.

    Arguments:
        weight: :math:`w`, the inverse scale of the prior; positive.
    """

    separable = True

    def __init__(self, weight: float = 1.0) -> None:
        if not weight > 0.0:
            raise ValueError(f"Expected weight to be positive; got {weight}.")
        self.weight = weight

    def value(self, x: Tensor) -> Tensor:
        return self.weight * x.abs().sum(-1)

    def prox(self, x: Tensor, strength: Tensor) -> Tensor:
        return x.sign() * (x.abs() - self.weight * strength).relu()


@final
class Box:
    r"""The indicator of :math:`l \le x \le u`: zero inside, infinite outside; its proximal map is the projection.

    Arguments:
        low: :math:`l`, a number; ``-inf`` for none.
        high: :math:`u > l`, a number; ``inf`` for none.
    """

    separable = True

    def __init__(self, low: float, high: float) -> None:
        if not low < high:
            raise ValueError(f"Expected low < high; got {low} and {high}.")
        self.low = low
        self.high = high

    def value(self, x: Tensor) -> Tensor:
        outside = ((x < self.low) | (x > self.high)).any(-1)
        return torch.zeros_like(x[..., 0]).masked_fill(outside, math.inf)

    def prox(self, x: Tensor, strength: Tensor) -> Tensor:
        return x.clamp(self.low, self.high)


@final
class CompositeDensity:
    r"""The log density :math:`-f - g`, or :math:`-f - g^\lambda`, with the gradient of its smooth part :math:`-f` only.

    Arguments:
        smooth: ``x -> (-f(x), -grad f(x))``, as ``Target.log_prob_and_score``.
        nonsmooth: The function :math:`g`.
        smoothing: :math:`\lambda`, for the law that :class:`MYULA` aims at; None for the true one.
    """

    def __init__(self, smooth: LogDensity, nonsmooth: Prox, *, smoothing: float | None = None) -> None:
        _check_smoothing(smoothing)
        self.smooth = smooth
        self.nonsmooth = nonsmooth
        self.smoothing = smoothing

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, score = self.smooth(x)
        if self.smoothing is None:
            return log_prob - self.nonsmooth.value(x), score
        near = self.nonsmooth.prox(x, x.new_tensor(self.smoothing))
        distance = (x - near).square().sum(-1) / (2.0 * self.smoothing)
        return log_prob - self.nonsmooth.value(near) - distance, score


def _check_smoothing(smoothing: float | None) -> None:
    if smoothing is not None and not 0.0 < smoothing < math.inf:
        raise ValueError(f"Expected smoothing to be positive; got {smoothing}.")


def _check_space(space: Space, name: str) -> None:
    if not isinstance(space, Euclidean):
        raise ValueError(f"Expected Euclidean space, where the proximal maps act, for {name}; got {space}.")


@final
class MYULA(Kernel):
    r"""Moreau-Yosida unadjusted Langevin. **Biased** twice: by :math:`\lambda` and by the step size.

    .. math:: x' = x + h \sigma^2 \Bigl(-\nabla f(x) - \frac{x - \mathrm{prox}_{\lambda g}(x)}{\lambda}\Bigr)
        + \sqrt{2h}\, \sigma \xi

    is ULA on :math:`e^{-f - g^\lambda}`; stable for :math:`h \sigma^2 < 2 / (L_f + 1 / \lambda)`, advised at half of
    it. Particles leave the domain of :math:`g` by about :math:`\sqrt\lambda`, so give it the smoothed
    :class:`CompositeDensity` where :math:`g` is infinite; points with an infinite log density are refused. For the
    Laplace law :math:`e^{-|x|}`, second moment 2, the smoothed law has 2.244, 2.0032 and the chain at
    :math:`h = \lambda / 2` has 2.720, 2.05 at :math:`\lambda` = 1, 0.1. One evaluation a step; the
    path weight is the ratio of the Gaussian transitions.

    Arguments:
        space: Euclidean.
        nonsmooth: The function :math:`g`.
        smoothing: :math:`\lambda`; of the order of :math:`1 / L_f`.
    """

    exact = False
    target_acceptance = 1.0

    def __init__(self, space: Space, nonsmooth: Prox, *, smoothing: float) -> None:
        super().__init__(space)
        _check_space(space, "MYULA")
        _check_smoothing(smoothing)
        self.nonsmooth = nonsmooth
        self.smoothing = smoothing

    def step(
        self, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        def drift(at: State, std: Tensor) -> Tensor:
            near = self.nonsmooth.prox(at.x, at.x.new_tensor(self.smoothing))
            return at.score + (near - at.x) / self.smoothing

        proposal, log_ratio, broken = propose(self.space, state, log_density, params, drift, generator)
        return take_finite(state, proposal, log_ratio, broken, 1)


@final
class MYMALA(Kernel):
    r"""The proposal of :class:`MYULA`, accepted or refused under the log density itself. Exact.

    Arguments:
        space: Euclidean.
        nonsmooth: The function :math:`g`.
        smoothing: :math:`\lambda`; None ties it to the step, :math:`\lambda = h \sigma^2` (P-MALA: the drift is then
            :math:`\mathrm{prox}_{h \sigma^2 g}(x) - x`, which cannot overshoot). A ``KernelParams.scale`` that is not
            isotropic then needs a separable function.
    """

    exact = True
    target_acceptance = 0.574

    def __init__(self, space: Space, nonsmooth: Prox, *, smoothing: float | None = None) -> None:
        super().__init__(space)
        _check_space(space, "MYMALA")
        _check_smoothing(smoothing)
        self.nonsmooth = nonsmooth
        self.smoothing = smoothing

    def step(
        self, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        if self.smoothing is None:
            _check_separable(self.nonsmooth, params)

        def drift(at: State, std: Tensor) -> Tensor:
            strength = 0.5 * std.square() if self.smoothing is None else at.x.new_tensor(self.smoothing)
            # A step of size zero moves nobody, and its direction is 0 / 0.
            strength = torch.where(strength > 0.0, strength, 1.0)
            return at.score + (self.nonsmooth.prox(at.x, strength) - at.x) / strength

        proposal, log_ratio, broken = propose(self.space, state, log_density, params, drift, generator)
        log_accept = proposal.log_prob.double() - state.log_prob.double() + log_ratio
        state, acceptance, log_ratio = metropolis(state, proposal, log_accept, broken=broken, generator=generator)
        return state, Info(log_ratio, acceptance, 1, broken)


def _check_separable(nonsmooth: Prox, params: KernelParams) -> None:
    if params.scale.shape[-1] != 1 and not nonsmooth.separable:
        raise ValueError(
            f"Expected an isotropic scale of shape (1,) with a function that is not separable; "
            f"got {tuple(params.scale.shape)}."
        )


@final
class ForwardBackward(Kernel):
    r"""Proximal-gradient Langevin: a Langevin step for :math:`f`, then the proximal map of :math:`g`.

    .. math:: x' = \mathrm{prox}_{h \sigma^2 g}\bigl(x - h \sigma^2 \nabla f(x) + \sqrt{2h}\, \sigma \xi\bigr)

    **Biased**, by :math:`O(\sqrt h)` at hard walls: particles are always in the domain of :math:`g` (inside the box, at
    exact zeros of an :math:`\ell_1` norm), and on its boundary with positive probability. The order gradient, noise,
    prox is that of proximal stochastic gradient Langevin; P-ULA (prox first) is the same chain seen before the prox.
    There is no path weight, since the proximal map forgets where it came from. One evaluation a step.

    Arguments:
        space: Euclidean.
        nonsmooth: The function :math:`g`; separable if ``KernelParams.scale`` is not isotropic.
    """

    exact = False
    has_path_weight = False
    target_acceptance = 1.0

    def __init__(self, space: Space, nonsmooth: Prox) -> None:
        super().__init__(space)
        _check_space(space, "ForwardBackward")
        self.nonsmooth = nonsmooth

    def step(
        self, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        _check_separable(self.nonsmooth, params)
        step, scale = scaled_columns(self.space, params, state.x)
        strength = step * scale.square()
        noise = self.space.noise(tuple(state.log_prob.shape), like=state.x, generator=generator)
        x = self.nonsmooth.prox(state.x + strength * state.score + (2.0 * strength).sqrt() * noise, strength)
        lost = ~x.isfinite().all(-1)
        x = torch.where(lost.unsqueeze(-1), state.x, x)
        proposal = State(x, *log_density(x))
        unknown = torch.full_like(proposal.log_prob, math.nan, dtype=torch.float64)
        state, info = take_finite(state, proposal, unknown, lost | is_broken(proposal), 1)
        return state, info._replace(log_ratio=unknown)
