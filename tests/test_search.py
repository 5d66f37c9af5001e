import math

import pytest
import torch

from diffsampler.pilot.improper import probe_tails
from diffsampler.pilot.modes import laplace, search_modes
from diffsampler.pilot.search import MeanFieldFits, climb, fit_mean_field, multistart, spread_over
from diffsampler.target import Target


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(mean, scale):
    mean, scale = torch.tensor(mean, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64)
    return Target.from_log_prob(
        lambda x: -0.5 * ((x - mean) / scale).square().sum(-1), dim=len(mean), score=lambda x: (mean - x) / scale**2
    )


def mixture(means, scales, weights):
    means, scales, weights = (torch.as_tensor(v, dtype=torch.float64) for v in (means, scales, weights))
    constant = weights.log() - means.shape[1] * (scales.log() + 0.5 * math.log(2.0 * math.pi))

    def parts(x):
        return constant - 0.5 * torch.cdist(x, means).square() / scales.square()

    def score(x):
        share = torch.softmax(parts(x), -1) / scales.square()
        return share @ means - x * share.sum(-1, keepdim=True)

    return Target.from_log_prob(lambda x: torch.logsumexp(parts(x), -1), dim=means.shape[1], score=score)


def search(target, seed=0):
    fits = multistart(target, generator=generator(seed)).good().distinct()
    return search_modes(target, fits, generator=generator(seed))


@pytest.mark.parametrize("shift", [0.0, 1e5])
def test_multistart_is_free_of_scale(shift):
    mean, scale = [shift, -3.0, 0.0, 100.0], [1e4, 1e-3, 1.0, 10.0]
    best = multistart(gaussian(mean, scale), generator=generator()).good().distinct()
    error = (best.location[0] - torch.tensor(mean, dtype=torch.float64)) / torch.tensor(scale, dtype=torch.float64)
    assert float(error.abs().max()) < 0.1
    ratio = best.scale[0] / torch.tensor(scale, dtype=torch.float64)
    assert float((ratio - 1.0).abs().max()) < 0.1
    # The bound of an exact fit is the log normaliser.
    log_z = 2.0 * math.log(2.0 * math.pi) + math.log(1e4 * 1e-3 * 10.0)
    assert float(best.elbo[0]) == pytest.approx(log_z, abs=0.1)


@pytest.mark.parametrize("shift", [1e5, 1e7])
def test_multistart_finds_a_gaussian_far_from_the_origin(shift):
    # Fits from the origin shrink to the scale of the density before they arrive; ascents lead on.
    mean = torch.tensor([shift, -2.0 * shift], dtype=torch.float64)
    best = multistart(gaussian([shift, -2.0 * shift], [1.0, 2.0]), generator=generator()).good().distinct()
    assert float((best.location[0] - mean).abs().max()) < 0.3
    # The best of some ten fits by a bound of 32 draws; each scale has a noise of some per cent.
    assert float((best.scale[0] / torch.tensor([1.0, 2.0]) - 1.0).abs().max()) < 0.2


def test_fits_do_not_run_away_on_heavy_tails():
    # A symmetric limit of the scale steps is biased upwards here, without end.
    target = Target.from_log_prob(lambda x: -11.5 * torch.log1p(x.square().sum(-1) / 3.0), dim=20)
    best = multistart(target, generator=generator()).good().distinct()
    assert float(best.scale.max()) < 3.0


def test_truncated_support():
    target = Target.from_log_prob(lambda x: torch.where((x > 0).all(-1), -x.sum(-1), -math.inf), dim=2)
    start = torch.full((4, 2), 2.0, dtype=torch.float64)
    fits = fit_mean_field(target, start, torch.ones_like(start), generator=generator())
    assert bool((fits.elbo > -1.5).all())
    assert bool((fits.location > 0).all())


def test_anchored_fits_stay():
    start = torch.full((3, 2), 2.0, dtype=torch.float64)
    fits = fit_mean_field(
        gaussian([0.0, 0.0], [1.0, 5.0]), start, torch.ones_like(start), anchored=True, generator=generator()
    )
    torch.testing.assert_close(fits.location, start)
    assert float((fits.scale / torch.tensor([1.0, 5.0]) - 1.0).abs().max()) < 0.2


def test_climb_ends_at_the_mode_of_an_ill_scaled_gaussian():
    end, _ = climb(gaussian([5.0, -2.0], [1e-3, 1e3]), torch.zeros(1, 2, dtype=torch.float64), torch.ones(2), steps=80)
    assert float(((end - torch.tensor([5.0, -2.0])) / torch.tensor([1e-3, 1e3])).abs().max()) < 0.3


def test_spread_over_covers_the_neck_of_a_funnel():
    def log_prob(x):
        v = x[:, 0]
        return -v.square() / 18.0 - 0.5 * (x[:, 1:].square() * torch.exp(-v).unsqueeze(-1) + v.unsqueeze(-1)).sum(-1)

    target = Target.from_log_prob(log_prob, dim=5)
    fits = multistart(target, generator=generator()).good().distinct()
    extra = spread_over(target, fits, generator=generator()).good()
    assert float(extra.location[:, 0].min()) < float(fits.location[:, 0].min()) - 1.0


def test_laplace_is_exact_for_a_gaussian():
    root = torch.tensor([[2.0, 0.0], [1.5, 0.3]], dtype=torch.float64)
    precision = torch.linalg.inv(root @ root.mT)
    target = Target.from_log_prob(lambda x: -0.5 * ((x @ precision) * x).sum(-1), dim=2)
    start = torch.zeros(1, 2, dtype=torch.float64)
    tril, _, peaked = laplace(target, start, torch.full((1, 2), 10.0, dtype=torch.float64))
    torch.testing.assert_close(tril[0] @ tril[0].mT, root @ root.mT, rtol=1e-5, atol=1e-6)
    assert bool(peaked[0])
    # Half a standard deviation away it is no peak.
    assert not bool(laplace(target, start + root[:, 0], torch.ones(1, 2, dtype=torch.float64))[2][0])


def test_one_mode_is_cheap():
    modes, report = search(gaussian([1.0, 2.0], [1.0, 3.0]))
    assert len(modes) == 1
    assert report.stopped == "one mode"
    assert report.evaluations < 80_000


def test_finds_a_narrow_mode_in_five_dimensions():
    means = (torch.rand(7, 5, generator=generator(7)) - 0.5) * 30.0
    target = mixture(means, [1.0, 0.3, 2.0, 0.7, 1.5, 0.5, 1.2], [0.35, 0.25, 0.15, 0.1, 0.07, 0.05, 0.03])
    modes, report = search(target, seed=11)
    assert len(modes) == 7
    assert report.stopped == "complete"
    assert report.singletons == 0
    assert float(torch.logsumexp(modes.log_mass(), 0)) == pytest.approx(0.0, abs=0.01)


def test_ridges_are_called_a_continuum():
    target = Target.from_log_prob(
        lambda x: -0.125 * x[:, 0].square() - 8.0 * (x[:, 1] - x[:, 0].square()).square(), dim=2
    )
    _, report = search(target)
    assert report.continuum
    assert "not excluded" in report.not_excluded()


def test_too_many_modes_are_called_a_continuum():
    target = Target.from_log_prob(lambda x: (-x.pow(4) + 6.0 * x.square()).sum(-1), dim=12)
    _, report = search(target)
    assert report.continuum


IMPROPER = {
    "flat": (lambda x: -0.5 * x[:, 0].square() + 0.0 * x[:, 1], 2),
    "slow": (lambda x: -0.5 * x[:, 0].square() - torch.log1p(x[:, 1].abs()), 2),
    "oblique": (lambda x: -0.5 * (x[:, 0] - 2.0 * x[:, 1]).square() - 0.5 * x[:, 2].square(), 3),
    "cone": (lambda x: -0.75 * torch.log1p(x.square().sum(-1)), 2),
    "growing": (lambda x: -0.5 * x[:, 0].square() + 0.1 * x[:, 1], 2),
}
PROPER = {
    "cauchy": (lambda x: -torch.log1p(x.square()).sum(-1), 3),
    "laplace": (lambda x: -x.abs().sum(-1), 3),
    "funnel": (
        lambda x: -x[:, 0].square() / 18.0 - 0.5 * (x[:, 1:].square().sum(-1) * torch.exp(-x[:, 0]) + 4.0 * x[:, 0]),
        5,
    ),
    "student": (lambda x: -6.5 * torch.log1p(x.square().sum(-1) / 3.0), 10),
}


@pytest.mark.parametrize("name", [*IMPROPER, *PROPER])
def test_improper_densities_are_told_from_proper_ones(name):
    log_prob, dim = (IMPROPER | PROPER)[name]
    target = Target.from_log_prob(log_prob, dim=dim)
    for seed in range(3):
        fits = multistart(target, generator=generator(seed)).good().distinct()
        report = probe_tails(target, fits, generator=generator(seed))
        assert report.improper == (name in IMPROPER), report.describe()
        assert bool(report.describe()) == (name in IMPROPER)


def test_same_seed_same_answer():
    target = gaussian([1.0, 2.0], [1.0, 3.0])
    one, two = (multistart(target, generator=generator(3)) for _ in range(2))
    assert torch.equal(one.location, two.location)


def test_errors():
    with pytest.raises(ValueError, match="even number of antithetic draws"):
        fit_mean_field(gaussian([0.0], [1.0]), torch.zeros(1, 1), torch.ones(1, 1), draws=3)
    nowhere = Target.from_log_prob(lambda x: torch.full_like(x[:, 0], -math.inf) + 0.0 * x[:, 0], dim=1)
    with pytest.raises(ValueError, match="Expected a density that is finite near some starting point"):
        multistart(nowhere, generator=generator())
    none = MeanFieldFits(torch.zeros(2, 1), torch.ones(2, 1), torch.full((2,), -math.inf))
    for choose in (none.good, none.distinct):
        with pytest.raises(ValueError, match="Expected a density that is finite near some starting point"):
            choose()
