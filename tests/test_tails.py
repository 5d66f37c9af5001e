"""Tails from slopes far out, and references that are heavier than what they cover."""

from __future__ import annotations

import math

import pytest
import torch

from diffsampler import targets
from diffsampler.pilot.density_fits import fit_student_t
from diffsampler.pilot.guide import Knowledge, refit_guide
from diffsampler.pilot.pilot import run_pilot
from diffsampler.pilot.search import multistart
from diffsampler.pilot.tails import Tails, probe_degrees
from diffsampler.target import Target


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cauchy(x):
    return -(torch.log1p(x.square()) + math.log(math.pi)).sum(-1)


def fits(target: Target):
    return multistart(target, num_starts=10, steps=60, generator=generator()).good().distinct()


CASES = {
    "cauchy": (lambda: Target.from_log_prob(cauchy, dim=6), 1.0, -2.0 * 6 + 12 + 6.0),
    "student 1": (lambda: targets.StudentT(dim=6, df=1.0), 6.0, 1.0),
    "student 2": (lambda: targets.StudentT(dim=6, df=2.0), 7.0, 2.0),
    "student 3": (lambda: targets.StudentT(dim=6, df=3.0), 8.0, 3.0),
    "gaussian": (lambda: targets.Gaussian(torch.zeros(6), scale=1.0), math.inf, math.inf),
    "funnel": (lambda: targets.Funnel(dim=6), math.inf, math.inf),
    "laplace": (lambda: Target.from_log_prob(lambda x: -x.abs().sum(-1), dim=6), math.inf, math.inf),
}


@pytest.mark.parametrize("name", CASES)
def test_slopes_tell_the_degrees_of_freedom(name):
    build, axis, radial = CASES[name]
    target = build()
    found = probe_degrees(target, fits(target))
    assert found.axis == pytest.approx(axis, abs=0.1)
    # In a random direction a product of D Cauchy laws falls like t^-2D, an elliptical law with D degrees of freedom.
    assert found.radial == pytest.approx(radial, abs=0.1)


def test_only_what_the_usual_references_do_not_bound_asks_for_more():
    assert Tails().product_df(5) is None and Tails().elliptical_df() == 3.0
    assert Tails(axis=1.02, radial=5.0).product_df(5) == 1.0
    assert Tails(axis=4.3, radial=25.0).product_df(5) == 4.0
    assert Tails(axis=6.5, radial=40.0).product_df(5) == 5.0
    assert Tails(axis=7.02, radial=3.02).product_df(5) is None
    assert Tails(axis=5.02, radial=1.02).elliptical_df() == 1.0
    # Slower than any law of one degree of freedom, as far as the rays go: 1 is the heaviest that can be drawn.
    for least in (0.4, -math.inf):
        assert Tails(axis=least, radial=least).elliptical_df() == 1.0
        assert Tails(axis=least, radial=least).product_df(5) == 1.0


def test_student_fit_finds_location_and_scale():
    tril = torch.tensor([[2.0, 0.0], [1.5, 0.5]], dtype=torch.float64)
    law = targets.StudentT(dim=2, df=1.0)
    x = 100.0 + law.sample(20_000, generator=generator(1)).double() @ tril.mT
    fit = fit_student_t(x, df=1.0)
    cov = tril @ tril.mT
    found = fit.scale[0] @ fit.scale[0].mT
    # Standard errors are about 0.02; five of them.
    assert (fit.mean[0] - 100.0).abs().max() < 0.15
    assert ((found - cov) / cov).abs().max() < 0.1


@pytest.mark.parametrize("heavy", [True, False])
def test_weights_of_heavy_tails_are_bounded(heavy):
    x = torch.tan(math.pi * (torch.rand(4096, 4, generator=generator(2), dtype=torch.float64) - 0.5))
    x = x[x.abs().amax(-1) < 30.0]
    target = Target.from_log_prob(cauchy, dim=4)
    tails = probe_degrees(target, fits(target)) if heavy else Tails()
    guide = refit_guide(target, x[::2], x[1::2], Knowledge(tails=tails), generator=generator())
    # The reference is a density of z = T^-1(x).
    z = guide.transport.inverse(torch.tensor([[0.0, 0, 0, 0], [1e6, 0, 0, 0]], dtype=torch.float64))
    pulled = guide.pull_back(target).log_prob(z) - guide.reference.log_prob(z)
    grown = float(pulled[1] - pulled[0])
    assert (grown < 5.0) == heavy, "without a heavy part, the control, the weight grows like a power of the distance"


def test_pilot_covers_cauchy():
    target = Target.from_log_prob(cauchy, dim=3)
    scores = []
    for seed in range(4):
        found = run_pilot(target, generator=generator(seed))
        scores.append(found.particles.log_normalizer.value / found.particles.log_normalizer.std_error)
        assert not found.findings, found.findings
    # Sum of squares of four t(15) scores above 40: false alarm below 1e-4. Before, they were -3 on average.
    assert sum(score**2 for score in scores) < 40.0
