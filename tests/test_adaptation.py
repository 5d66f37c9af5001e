"""Adaptation of many chains: windows, means, metrics, and what a dense metric is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffsampler import baselines, targets
from diffsampler.kernel import State
from diffsampler.kernels import HMC, MALA, ULA
from diffsampler.kernels.adaptation import harmonic_mean, windows
from diffsampler.kernels.compiled import Frame, whiten
from diffsampler.kernels.metric import DenseMetric, DiagonalMetric, enter, leave
from diffsampler.space import Euclidean, MeanFree
from diffsampler.target import Target

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def rotated(dim: int = 8, condition: float = 1e3) -> tuple[Target, Tensor]:
    """Gaussian of random orientation, and its covariance."""
    axes = torch.linalg.qr(normal(dim, dim, seed=3))[0]
    variance = torch.logspace(0.0, -torch.log10(torch.tensor(condition)).item(), dim, dtype=F64)
    precision = axes @ variance.reciprocal().diag() @ axes.mT
    return (
        Target.from_log_prob(lambda x: -0.5 * ((x @ precision) * x).sum(-1), dim=dim),
        axes @ variance.diag() @ axes.mT,
    )


def test_harmonic_mean_hears_the_slow_ones():
    assert harmonic_mean(torch.tensor([0.5, 0.5])) == pytest.approx(0.5)
    assert harmonic_mean(torch.tensor([0.2, 0.8])) == pytest.approx(0.32)
    # One chain that accepts nothing is one voice among 64.
    assert 0.4 < harmonic_mean(torch.tensor([0.0] + [0.9] * 63)) < 0.6


def test_windows_double_and_leave_a_last_fifth():
    assert windows(500) == [25, 75, 175, 375]
    assert windows(1) == [] and windows(10) == [1, 3, 7]


def test_metrics_are_the_moments_of_everything():
    x = normal(6, 40, 3) @ torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.5, 0.1]], dtype=F64)
    flat = x.flatten(0, 1)
    diagonal, dense = DiagonalMetric(Euclidean(3)), DenseMetric(Euclidean(3))
    for metric in (diagonal, dense):
        state = metric.init(x)
        for part in x.split(2):
            state = metric.update(state, part)
        shape = metric.shape(state)
        if shape.frame is None:
            torch.testing.assert_close(shape.scale, flat.std(0))
            continue
        covariance, n = flat.mT.cov(), 240
        expected = (n * covariance + 5.0 * covariance.diagonal().diag()) / (n + 5.0)
        torch.testing.assert_close(shape.frame.factor @ shape.frame.factor.mT, expected)
        torch.testing.assert_close(shape.frame.location, flat.mean(0))
        assert shape.scale.tolist() == [1.0]


def test_dense_metric_of_too_few_or_flat_points_is_still_a_metric():
    metric = DenseMetric(Euclidean(30))
    few = metric.shape(metric.update(metric.init(normal(1)), normal(4, 30))).frame
    flat = metric.shape(metric.update(metric.init(normal(1)), torch.cat([normal(9, 29), torch.ones(9, 1)], -1))).frame
    for frame in (few, flat):
        assert frame is not None and bool(frame.factor.isfinite().all())
        assert bool((frame.factor.diagonal() > 0.0).all())
    with pytest.raises(ValueError, match="Expected a Euclidean space for a dense metric"):
        DenseMetric(MeanFree(3, 2))


def test_frames_there_and_back():
    target, _ = rotated(4)
    frame = Frame(normal(4), torch.eye(4, dtype=F64) + normal(4, 4, seed=1).tril(-1))
    x = normal(5, 4, seed=2)
    state = State(x, *target.log_prob_and_score(x))
    inside = enter(state, frame)
    log_prob, score = whiten(target.log_prob_and_score, frame)(inside.x)
    torch.testing.assert_close(log_prob, state.log_prob)
    torch.testing.assert_close(score, inside.score)
    back = leave(inside, frame)
    torch.testing.assert_close(back.x, x)
    torch.testing.assert_close(back.score, state.score)
    assert enter(state, None) is state and leave(state, None) is state


@pytest.mark.parametrize("kind", [baselines.ChEES, baselines.NUTS])
def test_dense_metric_beats_a_diagonal_one_where_coordinates_are_correlated(kind):
    target, covariance = rotated()
    per_gradient = {}
    for metric in ("diagonal", "dense"):
        sampler = kind(target, num_chains=16, warmup=80, metric=metric, init_scale=0.5)
        particles = sampler.sample(1280, seed=0)
        recorded = sampler.evaluations - 16 * sampler.adapted.evaluations
        per_gradient[metric] = particles.ess / recorded
        if metric == "dense":
            z = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), particles.x.mT, upper=False).mT
            mean, error = particles.expectation(z.square())
            # t(15) at 5.5 standard errors, eight coordinates: false alarm 1e-3.
            assert bool(((mean - 1.0).abs() < 5.5 * error).all())
    assert per_gradient["dense"] > 2.0 * per_gradient["diagonal"]


def test_any_kernel_becomes_a_sampler():
    target = targets.Gaussian(torch.tensor([3.0, -1.0]), scale=0.5)
    exact = baselines.Chains(target, MALA(target.space), num_chains=16, warmup=100)
    biased = baselines.Chains(target, ULA(target.space), num_chains=16, warmup=20, step_size=0.2)
    piloted = baselines.Chains(target, ULA(target.space), warmup_kernel=MALA(target.space), num_chains=16, warmup=50)
    fixed = baselines.Chains(target, HMC(target.space, num_steps=50), num_chains=16, warmup=50, length=1.5)
    for sampler in (exact, biased, piloted, fixed):
        particles = sampler.sample(1600, seed=0)
        mean, error = particles.expectation(particles.x)
        # t(15) at 6 standard errors, two coordinates, four samplers: false alarm 2e-4.
        assert bool(((mean - torch.tensor([3.0, -1.0])).abs() < 6.0 * error).all())
        assert sampler.evaluations > 1600
    with pytest.raises(ValueError, match="Expected step_size or warmup_kernel for ULA, which never refuses"):
        baselines.Chains(target, ULA(target.space))
    for options, message in (
        ({"metric": "full"}, "Expected metric to be one of diagonal, dense; got 'full'"),
        ({"compile": "yes"}, "Expected compile to be one of auto, on, off; got 'yes'"),
        ({"length": -1.0}, "Expected length to be positive; got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            baselines.HMC(target, **options)


def test_divergences_become_a_finding():
    from diffsampler.result import diagnose

    target = targets.Funnel(dim=4, scale=3.0)
    particles = baselines.HMC(target, num_chains=32, warmup=1, step_size=2.0).sample(640, seed=0)
    assert particles.divergences > 0
    assert any("trajectories diverged" in finding.message for finding in diagnose(particles))
    calm = baselines.HMC(targets.Gaussian(torch.zeros(2), scale=1.0), num_chains=32, warmup=40).sample(6400, seed=0)
    assert calm.divergences == 0 and not diagnose(calm)
