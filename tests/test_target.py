"""Target, its functional wrapper and its counter."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffsampler.space import Euclidean, MeanFree, Torus
from diffsampler.target import CountedTarget, FunctionTarget, Target
from diffsampler.targets import Funnel, Gaussian, GaussianMixture
from diffsampler.testing import check_target


def quartic(x: torch.Tensor) -> torch.Tensor:
    return -x.pow(4).sum(-1)


def points(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


# --- functions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        Target.from_log_prob(quartic, dim=3),
        Target.from_energy(lambda x: x.pow(4).sum(-1), dim=3),
        Target.from_log_prob(quartic, dim=3, score=lambda x: -4.0 * x.pow(3)),
        Target.from_energy(lambda x: x.pow(4).sum(-1), dim=3, force=lambda x: -4.0 * x.pow(3)),
    ],
    ids=["log_prob", "energy", "score", "force"],
)
def test_functions_become_targets(target, generator):
    x = points(4, 3)
    torch.testing.assert_close(target.log_prob(x), quartic(x))
    torch.testing.assert_close(target.energy(x), -quartic(x))
    torch.testing.assert_close(target.score(x), -4.0 * x.pow(3))
    torch.testing.assert_close(target.score(x, create_graph=True), -4.0 * x.pow(3))
    assert target.dim == 3 and target.space == Euclidean(3)
    assert target.log_normalizer is None and target.num_modes is None and not target.has_sampler
    check_target(target, generator=generator)


@given(shape=st.lists(st.integers(0, 3), max_size=3), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_function_sees_one_batch_axis(shape, dtype):
    seen = []

    def log_prob(x):
        seen.append(tuple(x.shape))
        return quartic(x)

    target = Target.from_log_prob(log_prob, dim=2)
    x = points(*shape, 2, dtype=dtype)
    value, score = target.log_prob_and_score(x)
    assert seen == [(math.prod(shape), 2)]
    assert value.shape == tuple(shape) and score.shape == x.shape
    assert value.dtype == score.dtype == dtype
    torch.testing.assert_close(value, quartic(x))


@pytest.mark.parametrize("space", [MeanFree(3, 2), Torus(4)], ids=repr)
def test_function_on_another_space(space, generator):
    if isinstance(space, Torus):
        target = Target.from_log_prob(lambda x: x.cos().sum(-1), space=space)
    else:
        target = Target.from_log_prob(lambda x: -0.5 * space.project(x).square().sum(-1), space=space)
    assert target.dim == space.dim
    assert "space" in check_target(target, generator=generator)


def test_suite_sees_a_density_that_breaks_the_space(generator):
    square = lambda x: -0.5 * x.square().sum(-1)
    with pytest.raises(AssertionError, match="period 2 pi on a Torus"):
        check_target(Target.from_log_prob(square, space=Torus(2)), generator=generator)
    with pytest.raises(AssertionError, match="not to change under translation on MeanFree"):
        check_target(Target.from_log_prob(square, space=MeanFree(2, 2)), generator=generator)


SHAPES = [
    (lambda x: quartic(x).unsqueeze(-1), r"return shape \(3,\); got \(3, 1\)\. Drop the last axis\."),
    (lambda x: -x.pow(4).sum(), r"return shape \(3,\); got \(\)\. Sum over the event axis only \(dim=-1\)"),
    (lambda x: -x.pow(4), r"return shape \(3,\); got \(3, 2\)\. Sum over the last axis\.$"),
    (lambda x: quartic(x)[:1], r"return shape \(3,\); got \(1,\)\.$"),
    (lambda x: -x.pow(4).sum(0), r"return shape \(3,\); got \(2,\)\. The function sees a batch"),
    (lambda x: -x @ x.mT, r"return shape \(3,\); got \(3, 3\)\. A product of batches is \(x \* y\)\.sum\(-1\)"),
]


@pytest.mark.parametrize(("log_prob", "message"), SHAPES)
def test_wrong_return_shape(log_prob, message):
    for target in (Target.from_log_prob(log_prob, dim=2), Target.from_energy(lambda x: -log_prob(x), dim=2)):
        with pytest.raises(ValueError, match=message):
            target.log_prob(points(3, 2))
        with pytest.raises(ValueError, match=message):
            target.log_prob_and_score(points(3, 2))


@pytest.mark.parametrize(
    ("log_prob", "got"),
    [
        (lambda x: (x > 0).all(-1), r"torch\.bool"),
        (lambda x: x.sum(-1).long(), r"torch\.int64"),
        (lambda x: 1.0, "float"),
        (lambda x: quartic(x).detach().numpy(), "ndarray"),
        (lambda x: None, "NoneType"),
    ],
)
def test_wrong_return_type(log_prob, got):
    with pytest.raises(TypeError, match=f"Expected log_prob to return a floating-point tensor; got {got}"):
        Target.from_log_prob(log_prob, dim=2).log_prob(points(3, 2))


def test_wrong_score_shape():
    target = Target.from_log_prob(quartic, dim=2, score=lambda x: x[:, :1])
    with pytest.raises(ValueError, match=r"Expected score to return shape \(3, 2\); got \(3, 1\)"):
        target.log_prob_and_score(points(3, 2))


@pytest.mark.parametrize("dim", [0, -1, 2.0, True, "2"])
def test_bad_dim(dim):
    with pytest.raises(ValueError, match="Expected dim to be a positive integer; got"):
        Target.from_log_prob(quartic, dim=dim)


def test_dim_or_space():
    with pytest.raises(ValueError, match="Expected exactly one of dim and space"):
        Target.from_log_prob(quartic)
    with pytest.raises(ValueError, match="Expected exactly one of dim and space"):
        Target.from_energy(quartic, dim=2, space=Euclidean(2))


def test_declared_facts_are_kept():
    prior = Gaussian([0.0, 0.0], scale=1.0)
    target = Target.from_log_prob(quartic, dim=2, log_normalizer=1.5, prior=prior)
    assert isinstance(target, FunctionTarget)
    assert target.log_normalizer == 1.5 and target.prior is prior
    assert Target.from_energy(quartic, dim=2, log_normalizer=-2.0).log_normalizer == -2.0


def test_undeclared_facts_raise():
    target = Target.from_log_prob(quartic, dim=2)
    with pytest.raises(NotImplementedError, match=r"FunctionTarget has no exact sampler \(has_sampler is False\)"):
        target.sample(3)
    with pytest.raises(NotImplementedError, match=r"FunctionTarget declares no modes \(num_modes is None\)"):
        target.mode_labels(points(3, 2))
    with pytest.raises(NotImplementedError, match=r"FunctionTarget declares no modes \(num_modes is None\)"):
        target.mode_weights()
    x = points(3, 2)
    assert list(target.constrain(x)) == ["x"] and target.constrain(x)["x"] is x


# --- scores --------------------------------------------------------------------------------------------------------


def test_scores_carry_a_graph_only_on_request():
    target = Target.from_log_prob(quartic, dim=2)
    x = points(3, 2).requires_grad_()
    log_prob, score = target.log_prob_and_score(x)
    assert not log_prob.requires_grad and not score.requires_grad and x.grad is None
    assert not target.score(x).requires_grad
    (second,) = torch.autograd.grad(target.score(x, create_graph=True).sum(), x)
    torch.testing.assert_close(second, -12.0 * x.detach().square())
    with torch.no_grad():
        torch.testing.assert_close(target.score(points(3, 2)), -4.0 * points(3, 2).pow(3))
        graph = target.score(points(3, 2), create_graph=True)
    assert graph.requires_grad


def test_log_prob_is_differentiable_through_its_argument():
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    Target.from_log_prob(quartic, dim=2).log_prob(points(5, 2) + shift).sum().backward()
    torch.testing.assert_close(shift.grad, -4.0 * points(5, 2).pow(3).sum(0))


def test_buffers_stay_in_float64_and_results_follow_the_input():
    target = GaussianMixture.grid(9)
    assert all(buffer.dtype == torch.float64 for buffer in target.buffers())
    assert target.log_prob(points(3, 2, dtype=torch.float32)).dtype == torch.float32
    assert target.log_prob(points(3, 2)).dtype == torch.float64
    assert not list(target.parameters())


# --- counting ------------------------------------------------------------------------------------------------------


def test_counter_counts_points():
    target = CountedTarget(Target.from_log_prob(quartic, dim=2))
    assert target.evaluations == 0
    target.log_prob(points(5, 2))
    target.log_prob_and_score(points(2, 3, 2))
    target.score(points(2))
    target.energy(points(0, 2))
    assert target.evaluations == 5 + 6 + 1
    target.score(points(4, 2), create_graph=True)
    assert target.evaluations == 12 + 4


def test_counter_is_transparent(generator):
    for inner in (GaussianMixture.seven(), Funnel()):
        target = CountedTarget(inner)
        assert (target.space, target.log_normalizer, target.num_modes) == (inner.space, 0.0, inner.num_modes)
        check_target(target, generator=generator)
        x = inner.sample(6, generator=torch.Generator().manual_seed(3))
        assert torch.equal(target.sample(6, generator=torch.Generator().manual_seed(3)), x)
        assert torch.equal(target.log_prob_and_score(x)[1], inner.log_prob_and_score(x)[1])
        assert target.constrain(x)["x"] is x
    target = CountedTarget(Target.from_log_prob(quartic, dim=2, prior=Gaussian([0.0, 0.0], scale=1.0)))
    assert target.prior is target.target.prior and not target.has_sampler
