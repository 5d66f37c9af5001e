"""The questions asked of a target before work starts: what they find, what they leave alone, what they cost."""

from __future__ import annotations

import pytest
import torch

import diffsampler as ds
from diffsampler import targets
from diffsampler.checks import check_points, check_target, differing_point, working_dtype
from diffsampler.pilot.reference import student_t
from diffsampler.target import CountedTarget, Target

CPU = torch.device("cpu")


def gaussian(x):
    return -0.5 * x.square().sum(-1)


def wrap(function, dim=2, **options):
    return Target.from_log_prob(function, dim=dim, **options)


@pytest.mark.parametrize("name", targets.REGISTRY)
def test_every_target_of_the_library_passes(name):
    assert check_target(targets.REGISTRY[name]()) == []


def test_the_questions_are_cheap():
    calls = 0

    def function(x):
        nonlocal calls
        calls += 1
        return gaussian(x)

    counted = CountedTarget(wrap(function, dim=10))
    check_target(counted)
    assert calls <= 30
    assert counted.evaluations <= 1500


def test_points_are_fixed_and_come_from_the_prior():
    plain = wrap(gaussian)
    assert torch.equal(check_points(plain), check_points(plain))
    assert check_points(plain).dtype == torch.float64
    prior = targets.Gaussian([1e6, 0.0], scale=1.0)
    points = check_points(wrap(gaussian, prior=prior))
    assert (points[:, 0] > 9e5).all()
    assert check_points(wrap(gaussian), 5).shape == (5, 2)


def test_points_lie_in_the_space():
    space = ds.MeanFree(3, 2)
    points = check_points(Target.from_log_prob(gaussian, space=space))
    torch.testing.assert_close(points.reshape(-1, 3, 2).mean(1), torch.zeros(16, 2, dtype=torch.float64))


def test_working_dtype():
    constants = torch.eye(2)
    assert working_dtype(wrap(gaussian), CPU) == torch.float64
    assert working_dtype(wrap(lambda x: gaussian(x @ constants)), CPU) == torch.float32
    assert working_dtype(wrap(lambda x: 1 / 0), CPU) == torch.float64, "other failures are left to check_target"


def test_some_points_without_density_are_a_warning():
    target = wrap(lambda x: gaussian(x).masked_fill(x[..., 0] > 1.0, -torch.inf))
    ((level, text),) = check_target(target)
    assert level == "warning"
    assert "log_prob is -inf at" in text
    assert "of 16 starting points, first at [" in text


@pytest.mark.parametrize(("edge", "level"), [(1.0, "note"), (0.0, "warning")])
def test_what_data_exclude_of_a_prior_is_a_note_unless_it_is_much(edge, level):
    prior = student_t(torch.zeros(2), torch.ones(2))
    target = wrap(lambda x: gaussian(x).masked_fill(x[..., 0] > edge, -torch.inf), prior=prior)
    ((found, text),) = check_target(target)
    assert found == level
    assert "log_prob is -inf at" in text


def test_long_points_are_shortened():
    with pytest.raises(ValueError, match=r"first at x = \[(-?[\d.]+, ){6}\.\.\.\]"):
        check_target(wrap(lambda x: gaussian(x) * torch.nan, dim=20))


def test_the_users_own_errors_are_not_rewritten():
    def refuse(x):
        raise ValueError("my own words")

    with pytest.raises(ValueError, match="^my own words$"):
        check_target(wrap(refuse))


def test_the_cause_of_a_failure_is_kept():
    with pytest.raises(ValueError, match="ZeroDivisionError") as caught:
        check_target(wrap(lambda x: 1 / 0))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


class Rigid(Target):
    """A target of one's own that understands one batch axis only."""

    def __init__(self, *, columns: bool = False):
        super().__init__(ds.Euclidean(2))
        self.columns = columns

    def log_prob(self, x):
        total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        value = total - 0.5 * (x[:, 0] ** 2 + x[:, 1] ** 2 if x.ndim == 2 else x.square().sum((-1, -2)))
        return value.unsqueeze(-1) if self.columns else value


def test_own_targets_are_asked_for_all_batch_shapes():
    with pytest.raises(ValueError, match=r"Expected log_prob to return shape \(2, 2\); got \(2,\)"):
        check_target(Rigid())
    with pytest.raises(ValueError, match=r"Expected log_prob to return shape \(16,\); got \(16, 1\)\. Drop the last"):
        check_target(Rigid(columns=True))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_a_right_score_passes_and_a_wrong_one_does_not_at_any_scale(scale, offset):
    def function(x):
        return gaussian((x - offset) / scale)

    def score(x):
        return -(x - offset) / scale**2

    check_target(wrap(function, score=score))
    # Where the density is flat at the starting points its slope is below what differences can tell from zero.
    if scale == 1e4:
        return
    for factor in (-1.0, 2.0):
        with pytest.raises(ValueError, match="Expected score to be the gradient of log_prob"):
            check_target(wrap(function, score=lambda x, f=factor: f * score(x)))


SPREAD = {
    "flat": (lambda x: -x[..., 0].square(), False),
    "oblique": (lambda x: -(x[..., 0] - 3.0 * x[..., 1]).square(), False),
    "1/x": (lambda x: -torch.log1p(x.square()).sum(-1) / 2.0, False),
    "one tail grows": (lambda x: gaussian(x) + (x[..., 0].clamp_min(0.0) + 1.0).pow(3).log() * 0.0 - x[..., 1], True),
    "exponential growth": (lambda x: x[..., 0] - x[..., 1].square(), False),
    "Cauchy": (lambda x: -torch.log1p(x.square()).sum(-1), True),
    "heavy": (lambda x: -0.55 * torch.log1p(x.square()).sum(-1), True),
    "wide": (lambda x: gaussian(1e-7 * x), True),
    "narrow": (lambda x: gaussian(1e5 * x), True),
    "overflows": (lambda x: gaussian(x) - x[..., 0].exp(), True),
    "funnel": (lambda x: gaussian(x[..., :1]) - 0.5 * x[..., 1].square() * (-x[..., 0]).exp() - 0.5 * x[..., 0], True),
}


@pytest.mark.parametrize("name", SPREAD)
def test_improper_densities_are_told_from_wide_ones(name):
    function, proper = SPREAD[name]
    if proper:
        check_target(wrap(function))
        return
    with pytest.raises(ValueError, match="looks improper: along the direction"):
        check_target(wrap(function))


def test_a_prior_is_proof_enough():
    prior = targets.Gaussian([0.0, 0.0], scale=1.0)
    check_target(wrap(lambda x: -x[..., 0].square(), prior=prior))


def test_periodic_densities_pass_on_a_torus():
    assert check_target(Target.from_log_prob(lambda x: x.cos().sum(-1), space=ds.Torus(3))) == []
    with pytest.raises(ValueError, match=r"Expected log_prob to have period 2 pi"):
        check_target(Target.from_log_prob(lambda x: (0.5 * x).cos().sum(-1), space=ds.Torus(3)))


def test_differing_points():
    assert differing_point(wrap(gaussian), wrap(lambda x: gaussian(x)), device=CPU) is None
    found = differing_point(wrap(gaussian), wrap(lambda x: gaussian(x) + 1.0), device=CPU)
    assert found is not None
    assert found[2] == pytest.approx(found[1] + 1.0)
    empty = wrap(lambda x: gaussian(x).masked_fill(x[..., 0] > 0, -torch.inf))
    assert differing_point(empty, empty, device=CPU) is None
