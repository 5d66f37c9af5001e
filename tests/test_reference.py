import math

import pytest
import torch

from diffsampler.pilot.density_fits import fit_gaussian_mixture, fit_product, stack
from diffsampler.pilot.reference import EllipticalMixture, ProductMixture, Stacked, student_t


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def tril():
    return torch.diag_embed(draw(3, 2).abs() + 0.4) + torch.tensor([[0.0, 0.0], [0.5, 0.0]], dtype=torch.float64)


def references():
    weight = torch.tensor([0.1, 0.3, 1.0]).log()
    product = ProductMixture(draw(2, 3), draw(2, 3, seed=2).abs() + 0.3, draw(2, 3, seed=3))
    diagonal = EllipticalMixture(2.0 * draw(3, 2), draw(3, 2, seed=4).abs() + 0.4, weight, df=5.0)
    return {
        "gaussian": EllipticalMixture(2.0 * draw(3, 2), draw(3, 2, seed=4).abs() + 0.4, weight),
        "t": diagonal,
        "t full": EllipticalMixture(2.0 * draw(3, 2), tril(), weight, df=5.0),
        "gaussian full": EllipticalMixture(2.0 * draw(3, 2), tril(), weight),
        "explicit": EllipticalMixture(2.0 * draw(2, 2), torch.tensor([[1e-6, 1.0], [1.0, 1.0]]), df=5.0),
        "product": product,
        "stack": Stacked([diagonal, product], torch.tensor([0.3, 0.7])),
    }


@pytest.mark.parametrize("name", references())
def test_score_is_the_gradient(name):
    target = references()[name]
    x = target.sample(20, generator=generator()).reshape(4, 5, 2)
    log_prob, score = target.log_prob_and_score(x)
    torch.testing.assert_close(log_prob, target.log_prob(x))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(target.log_prob(leaf).sum(), leaf)
    torch.testing.assert_close(score, gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["gaussian", "t", "t full", "gaussian full", "product", "stack"])
def test_integrates_to_one(name):
    grid = torch.linspace(-40, 40, 1601, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    total = float(references()[name].log_prob(points).exp().sum()) * float(grid[1] - grid[0]) ** 2
    assert total == pytest.approx(1.0, abs=2e-3)  # t tails beyond 40: below 1e-3


@pytest.mark.parametrize("name", references())
def test_sampler_agrees_with_density(name):
    # E_q[p/q] = 1 for a normalised p inside q's support: 5 standard errors, false alarm 6e-7 each.
    target = references()[name]
    x = target.sample(20000, generator=generator())
    other = student_t(x.median(0).values, 0.5 * torch.ones(2), df=3.0)
    mixed = Stacked([target, other], torch.tensor([0.5, 0.5]))
    ratio = (target.log_prob(x) - mixed.log_prob(x)).exp()
    y = other.sample(20000, generator=generator(1))
    both = torch.cat([ratio, (target.log_prob(y) - mixed.log_prob(y)).exp()])
    halves = 0.5 * (ratio.mean() + both[20000:].mean())
    error = 0.5 * math.hypot(float(ratio.std()), float(both[20000:].std())) / math.sqrt(20000)
    assert abs(float(halves) - 1.0) < 5.0 * error
    # Negative control: draws that are 10 % too wide are noticed.
    if name not in ("explicit",):
        centre = x.mean(0)
        wide = (target.log_prob(centre + 1.1 * (x - centre)) - target.log_prob(x)).mean()
        assert abs(float(wide)) > 0.01


def test_far_from_the_origin_keeps_digits():
    mean = torch.tensor([[1e8, -1e8]], dtype=torch.float64)
    target = EllipticalMixture(mean, torch.full((1, 2), 1e-3))
    x = mean + 1e-3
    expected = -1.0 - math.log(2 * math.pi) - 2 * math.log(1e-3)
    assert float(target.log_prob(x)) == pytest.approx(expected, abs=1e-3)


def test_gaussian_mixture_fit_finds_its_components():
    truth = EllipticalMixture(
        torch.tensor([[-4.0, 0.0], [4.0, 0.0], [0.0, 6.0]]), torch.ones(3, 2), torch.tensor([0.2, 0.3, 0.5]).log()
    )
    x = truth.sample(4000, generator=generator())
    fit = fit_gaussian_mixture(x[:2000], x[2000:], generator=generator())
    fresh = truth.sample(4000, generator=generator(9))
    assert float((truth.log_prob(fresh) - fit.log_prob(fresh)).mean()) < 0.03
    one = fit_gaussian_mixture(x[:2000], x[2000:], sizes=(1,), generator=generator())
    assert float((truth.log_prob(fresh) - one.log_prob(fresh)).mean()) > 0.3


def test_product_fit_recombines_wells():
    sign = 2.0 * (torch.rand(4000, 8, generator=generator()) < 0.8) - 1.0
    x = sign.double() * 1.7 + 0.2 * draw(4000, 8)
    fit = fit_product(x)
    right = (fit.sample(4000, generator=generator(3)) > 0).double().mean(0)
    assert float((right - 0.8).abs().max()) < 0.04


def test_stack_prefers_what_predicts_and_keeps_floors():
    good, bad = student_t(torch.zeros(2), torch.ones(2)), student_t(torch.full((2,), 9.0), torch.ones(2))
    stacked = stack([good, bad], [0.0, 0.1], good.sample(1000, generator=generator()))
    assert stacked.log_weight.exp().tolist() == pytest.approx([0.9, 0.1], abs=1e-3)
    third = stack([good, good, bad], [0.0, 0.0, 0.0], good.sample(1000, generator=generator()))
    assert len(third.pruned(0.01).components) == 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EllipticalMixture(torch.zeros(2, 3), torch.zeros(2, 2)), "Expected mean"),
        (
            lambda: EllipticalMixture(torch.zeros(2, 3), torch.ones(2, 3), df=2.5),
            "Expected df to be a positive integer",
        ),
        (lambda: ProductMixture(torch.zeros(2, 3), torch.ones(2, 2), torch.ones(2, 3)), "of one shape"),
        (lambda: Stacked([], torch.ones(0)), "Expected one weight per component"),
        (lambda: stack([student_t(torch.zeros(1), torch.ones(1))], [1.0], torch.zeros(3, 1)), "sum below 1"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
