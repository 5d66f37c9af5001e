"""Minibatch kernels: unbiased estimates, stationary variances with gradient noise, posteriors of regressions."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import F64, deviation, gaussian, normal, params
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffsampler.kernel import Kernel, LogDensity
from diffsampler.kernels import SGHMC, SGLD, MinibatchDensity, MinibatchTarget, differentiated
from diffsampler.space import Euclidean

N = 200


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def location() -> tuple[MinibatchTarget, Tensor]:
    """Data of N(x, 2^2) with a flat prior: the posterior is N(mean, 4 / N), and gradients differ by a constant."""
    data = 2.0 * normal(N, seed=5)

    def likelihood(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        away = data[index] - x
        return -away.square().sum(-1) / 8.0, away.sum(-1, keepdim=True) / 4.0

    return MinibatchTarget(lambda x: (torch.zeros_like(x[..., 0]), torch.zeros_like(x)), likelihood, N), data


def regression() -> tuple[MinibatchTarget, Tensor, Tensor]:
    """Linear regression with unit noise and prior N(0, I); the posterior's mean ``(3,)`` and covariance ``(3, 3)``."""
    features = normal(N, 3, seed=6)
    response = features @ torch.tensor([1.0, -0.5, 0.3], dtype=F64) + normal(N, seed=7)
    covariance = torch.linalg.inv(torch.eye(3, dtype=F64) + features.T @ features)

    def likelihood(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        rows = features[index]
        error = response[index] - (rows * x.unsqueeze(-2)).sum(-1)
        return -0.5 * error.square().sum(-1), (error.unsqueeze(-1) * rows).sum(-2)

    return MinibatchTarget(gaussian, likelihood, N), covariance @ (features.T @ response), covariance


def settle(
    kernel: Kernel, density: LogDensity, x: Tensor, step_size: float, *, burn: int, steps: int
) -> tuple[Tensor, Tensor]:
    """Means over time of positions and their squares, one for each chain, ``(n, D)``."""
    source = generator(1)
    state = kernel.init(x, density, generator=source)
    mean, square = torch.zeros_like(x), torch.zeros_like(x)
    for k in range(burn + steps):
        state, _ = kernel.step(state, density, params(step_size), source)
        if k >= burn:
            mean, square = mean + state.x / steps, square + state.x.square() / steps
    return mean, square


# Estimates


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_estimates_are_unbiased(centred: bool, share: bool):
    target, mean, _ = regression()
    mode = mean + 0.05 if centred else None
    density = MinibatchDensity(target, batch_size=10, generator=generator(), mode=mode, share=share)
    x = (mean + 0.1 * normal(2, 3)).unsqueeze(0)
    truth, score = target.full(x[0])
    calls = [density(x.expand(1 if share else 4000, 2, 3)) for _ in range(4000 if share else 1)]
    values, scores = torch.cat([v for v, _ in calls]), torch.cat([s for _, s in calls])
    # 4.5 standard errors for 2 values and 6 slopes: false alarm 6e-5.
    for k in range(2):
        assert deviation(values[:, k], float(truth[k])) < 4.5
        for j in range(3):
            assert deviation(scores[:, k, j], float(score[k, j])) < 4.5


def test_control_variates_cut_the_noise_and_stay_the_gradient_of_their_density():
    target, mean, covariance = regression()
    x = mean + covariance.diagonal().sqrt() * normal(2000, 3)
    full = target.full(x)[1]
    noise = []
    for mode in (None, mean):
        density = MinibatchDensity(target, batch_size=10, generator=generator(), mode=mode)
        noise.append(float((density(x)[1] - full).var()))
    assert noise[1] < 0.05 * noise[0]
    density = MinibatchDensity(target, batch_size=10, generator=generator(3), mode=mean)
    leaf = x[:5].clone().requires_grad_()
    log_prob, score = density(leaf)
    (slope,) = torch.autograd.grad(log_prob.sum(), leaf)
    assert torch.allclose(slope, score.detach(), atol=1e-9)


def test_automatic_differentiation_makes_a_likelihood():
    target, mean, _ = regression()
    by_hand = target.likelihood

    def value(x: Tensor, index: Tensor) -> Tensor:
        return by_hand(x, index)[0]

    x, index = mean + normal(4, 3), torch.arange(20)
    for a, b in zip(differentiated(value)(x, index), by_hand(x, index), strict=True):
        assert torch.allclose(a, b)


# Closed forms


def test_sgld_has_the_stationary_variance_of_its_gradient_noise():
    target, data = location()
    h, batch = 0.004, 20
    precision = N / 4.0
    noise = N**2 / batch * float(data.var(correction=0)) / 16.0
    start = data.mean() + math.sqrt(4.0 / N) * normal(2000, 1)
    for mode, variance in ((None, noise), (data.mean().reshape(1), 0.0)):
        density = MinibatchDensity(target, batch_size=batch, generator=generator(2), mode=mode)
        mean, square = settle(SGLD(Euclidean(1)), density, start, h, burn=60, steps=300)
        truth = (2.0 + h * variance) / (2.0 * precision - h * precision**2)
        # 5 standard errors, two statistics: false alarm 1.2e-6.
        assert deviation(mean[:, 0], float(data.mean())) < 5.0
        assert deviation(square[:, 0] - 2.0 * mean[:, 0] * data.mean() + data.mean().square(), truth) < 5.0
    # Half of the plain chain's variance is noise of the batches.
    assert (2.0 + h * noise) / 2.0 > 1.7


def test_sghmc_takes_known_gradient_noise_out_of_its_own():
    target, data = location()
    h, batch = 0.02, 20
    noise = N**2 / batch * float(data.var(correction=0)) / 16.0
    start = data.mean() + math.sqrt(4.0 / N) * normal(2000, 1)
    density = MinibatchDensity(target, batch_size=batch, generator=generator(2))
    known = torch.tensor([noise], dtype=F64)
    deviations = []
    for variance in (known, None):
        kernel = SGHMC(Euclidean(1), friction=6.0, gradient_variance=variance)
        mean, square = settle(kernel, density, start, h, burn=150, steps=400)
        centred = square[:, 0] - 2.0 * mean[:, 0] * data.mean() + data.mean().square()
        # A harmonic oscillator of precision N / 4, in units of which the closed form is that of the unit one.
        omega = math.sqrt(N / 4.0)
        g, s = 6.0 / omega, h * omega
        truth = 4.0 / N * (1 - g * s / 2) / (1 - g * s / 2 - s * s / 4)
        deviations.append(deviation(centred, truth))
    # 5 standard errors: false alarm 6e-7.
    assert deviations[0] < 5.0 and deviations[1] > 8.0


# Posteriors


def test_sgld_with_control_variates_has_the_exact_posterior_of_a_regression():
    target, mean, covariance = regression()
    start = mean + covariance.diagonal().sqrt() * normal(1000, 3)
    errors = []
    for mode in (mean, None):
        density = MinibatchDensity(target, batch_size=10, generator=generator(2), mode=mode)
        h = 0.1 * float(covariance.diagonal().min())
        center, square = settle(SGLD(Euclidean(3)), density, start, h, burn=100, steps=300)
        variance = (square - 2.0 * center * mean + mean.square()).mean(0)
        errors.append(float((variance / covariance.diagonal() - 1.0).abs().max()))
        # 5 standard errors, three statistics: false alarm 2e-6.
        assert max(deviation(center[:, j], float(mean[j])) for j in range(3)) < 5.0
    # Five parts in a hundred are the step size; the standard error is below 0.01.
    assert errors[0] < 0.09 and errors[1] > 0.5


def test_sgld_with_control_variates_on_a_logistic_regression():
    features = normal(N, 2, seed=8)
    label = (
        torch.rand(N, generator=generator(4), dtype=F64) < torch.sigmoid(features @ torch.ones(2, dtype=F64))
    ).double()
    sign = 2.0 * label - 1.0

    def value(x: Tensor, index: Tensor) -> Tensor:
        return logsigmoid(sign[index] * (features[index] * x.unsqueeze(-2)).sum(-1)).sum(-1)

    target = MinibatchTarget(gaussian, differentiated(value), N)
    grid = torch.cartesian_prod(*[torch.linspace(-1.0, 3.0, 161, dtype=F64)] * 2)
    weight = torch.softmax(target.full(grid)[0], 0)
    mean = weight @ grid
    variance = weight @ (grid - mean).square()
    mode = grid[weight.argmax()]
    density = MinibatchDensity(target, batch_size=10, generator=generator(2), mode=mode)
    start = mean + variance.sqrt() * normal(400, 2)
    center, square = settle(SGLD(Euclidean(2)), density, start, 0.05 * float(variance.min()), burn=100, steps=500)
    found = (square - 2.0 * center * mean + mean.square()).mean(0)
    assert float((center.mean(0) - mean).abs().max()) < 0.05 * float(variance.min().sqrt())
    assert float((found / variance - 1.0).abs().max()) < 0.08


def test_bad_arguments_are_refused():
    target, _ = location()
    with pytest.raises(ValueError, match="Expected batch_size from 1 to num_data=200; got 201"):
        MinibatchDensity(target, batch_size=201, generator=generator())
    kernel = SGHMC(Euclidean(1), gradient_variance=torch.tensor([1e6], dtype=F64))
    state = kernel.init(normal(3, 1), gaussian, generator=generator())
    with pytest.raises(ValueError, match=r"Expected 2 \* friction > step_size"):
        kernel.step(state, gaussian, params(0.1), generator())
