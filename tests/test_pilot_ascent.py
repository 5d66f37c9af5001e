import math

import pytest
import torch

from diffsampler.pilot.ascent import curved_ascent
from diffsampler.pilot.search import climb, multistart
from diffsampler.target import Target


def ridge(dim, shift, scale, seed):
    """Log density ``x_2 = x_1^2 / 2 + noise`` in rotated, shifted and scaled coordinates, zero at its mode."""
    source = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=source, dtype=torch.float64))[0]
    m = shift * torch.randn(dim, generator=source, dtype=torch.float64)

    def log_prob(x):
        z = ((x - m) / scale) @ rotation
        bend = z[..., 1] - 0.5 * z[..., 0].square()
        return -0.5 * (z[..., 0].square() + 4.0 * bend.square() + z[..., 2:].square().sum(-1))

    return Target.from_log_prob(log_prob, dim=dim), m


@pytest.mark.parametrize(("dim", "shift", "scale"), [(2, 1e3, 1.0), (3, 1e4, 1e-3), (5, 1e4, 1.0), (12, 1e3, 1.0)])
def test_follows_a_curved_ridge_that_is_many_widths_long(dim, shift, scale):
    target, mode = ridge(dim, shift, scale, 1)
    end, unit = curved_ascent(target, torch.zeros(dim).double(), torch.full((dim,), shift).double())
    assert float(target.log_prob(end.unsqueeze(0))) > -1e-6
    assert float((end - mode).abs().max()) < 1e-2 * scale
    assert bool((unit > 0.05 * scale).all() and (unit < 3.0 * scale).all())


def test_steps_per_coordinate_do_not_follow_the_ridge():
    # Negative control of the test above.
    target, _ = ridge(3, 1e4, 1e-3, 1)
    end, _ = climb(target, torch.zeros(1, 3).double(), torch.full((3,), 1e4).double(), steps=300)
    assert float(target.log_prob(end)) < -1e3


def test_stays_at_a_mode_and_ends_on_a_density_without_one():
    gaussian = Target.from_log_prob(lambda x: -0.5 * (x / 3.0).square().sum(-1), dim=4)
    end, unit = curved_ascent(gaussian, torch.zeros(4).double(), torch.ones(4).double())
    assert float(end.abs().max()) < 1e-9
    torch.testing.assert_close(unit, torch.full((4,), 3.0).double(), rtol=1e-6, atol=0.0)
    rising = Target.from_log_prob(lambda x: x.sum(-1), dim=2)
    end, _ = curved_ascent(rising, torch.zeros(2).double(), torch.ones(2).double(), steps=5)
    assert float(end.sum()) > 1.0


def test_budget_bounds_evaluations():
    target, _ = ridge(3, 1e4, 1e-3, 1)
    count = 0

    def log_prob(x):
        nonlocal count
        count += x.reshape(-1, 3).shape[0]
        return target.log_prob(x)

    counted = Target.from_log_prob(log_prob, dim=3)
    start = torch.zeros(3).double()
    curved_ascent(counted, start, torch.ones(3).double(), max_evaluations=10_000)
    assert 1_000 < count <= 10_001


def test_search_starts_again_where_the_ascent_leads():
    target, mode = ridge(3, 1e4, 1e-3, 2)
    fits = multistart(target, generator=torch.Generator().manual_seed(0)).good().distinct()
    mean, spread = fits.pooled()
    assert float(((mean - mode) / spread).abs().max()) < 3.0
    # The bound of one mean-field Gaussian on a ridge of this shape is within two nats of log Z.
    truth = 1.5 * math.log(2.0 * math.pi) + math.log(0.5) + 3.0 * math.log(1e-3)
    assert float(fits.elbo.max()) > truth - 2.0


def test_a_neck_is_no_better_centre():
    def funnel(x):
        v = x[..., 0]
        return -v.square() / 18.0 - 0.5 * (x[..., 1:].square() * (-v).exp().unsqueeze(-1) + v.unsqueeze(-1)).sum(-1)

    target = Target.from_log_prob(funnel, dim=6)
    fits = multistart(target, generator=torch.Generator().manual_seed(0)).good().distinct()
    assert float(fits.location[fits.elbo.argmax(), 0]) > -3.0
