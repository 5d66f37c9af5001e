import math

import pytest
import torch

from diffsampler.pilot import profile as profiles
from diffsampler.pilot.frame import joint_diagonalise, separating_frame
from diffsampler.pilot.profile import drivers, laplace_profile, profile_from_draws
from diffsampler.pilot.reference import student_t
from diffsampler.pilot.search import multistart
from diffsampler.pilot.transport import AffineMap, Composed, PulledBack, Pushforward, TriangularMap, fit_affine
from diffsampler.pilot.transport_fit import fit_transport, fit_triangular, fitted_log_prob
from diffsampler.target import Target


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def funnel_draws(n, *, seed=0, low=-math.inf):
    z = normal(n, 5, seed=seed)
    v = 3.0 * z[:, :1]
    x = torch.cat([v, z[:, 1:] * torch.exp(0.5 * v)], 1)[:, [2, 0, 1, 3, 4]]
    return x[x[:, 1] > low]


def funnel_log_prob(x):
    v, y = x[:, 1], x[:, [0, 2, 3, 4]]
    gaussian = -0.5 * v.square() / 9.0 - 2.0 * v - 0.5 * y.square().sum(-1) * torch.exp(-v)
    return gaussian - math.log(3.0) - 2.5 * math.log(2.0 * math.pi)


def banana_draws(n, *, seed=0):
    z = normal(n, 2, seed=seed)
    return torch.stack([2.0 * z[:, 0], 2.0 * z[:, 0].square() + 0.5 * z[:, 1]], 1)


def maps():
    outer = AffineMap(normal(5), normal(5, 5, seed=1) + 3.0 * torch.eye(5, dtype=torch.float64))
    return {
        "composed": Composed(outer, fit_triangular(funnel_draws(1500))),
        "affine": AffineMap(normal(3), normal(3, 3, seed=1) + 3.0 * torch.eye(3, dtype=torch.float64)),
        "funnel": fit_triangular(funnel_draws(1500)),
        "banana": fit_triangular(banana_draws(1500)),
    }


@pytest.mark.parametrize("name", maps())
def test_round_trip_determinant_and_score(name):
    transport = maps()[name]
    dim = {"affine": 3, "funnel": 5, "composed": 5, "banana": 2}[name]
    z = 1.5 * normal(6, dim, seed=5)
    x, log_det = transport(z)
    torch.testing.assert_close(transport.inverse(x), z, rtol=1e-9, atol=1e-9)
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda v: transport(v)[0], row) for row in z])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det, rtol=1e-9, atol=1e-9)
    force = normal(6, dim, seed=6)
    leaf = z.clone().requires_grad_()
    image, determinant = transport(leaf)
    ((image * force).sum() + determinant.sum()).backward()
    torch.testing.assert_close(transport.pull_score(z, force), leaf.grad, rtol=1e-9, atol=1e-9)


def test_fit_whitens_a_gaussian_and_stays_affine():
    matrix = normal(4, 4, seed=3)
    x = normal(3000, 4) @ matrix.mT + 5.0
    transport = fit_transport(x[:1500], x[1500:])
    assert isinstance(transport, AffineMap)
    z = transport.inverse(x)
    assert float((torch.cov(z.mT) - torch.eye(4, dtype=torch.float64)).abs().max()) < 0.12


def test_heavy_tails_alone_stay_affine_or_do_no_harm():
    x = student_t(torch.zeros(6), torch.ones(6), df=3.0).sample(3000, generator=generator())
    fresh = student_t(torch.zeros(6), torch.ones(6), df=3.0).sample(3000, generator=generator(1))
    transport = fit_transport(x[:1500], x[1500:])
    affine = fit_affine(x[:1500])
    assert (
        float(fitted_log_prob(transport, fresh, df=4.0).mean())
        > float(fitted_log_prob(affine, fresh, df=4.0).mean()) - 0.1
    )


def test_funnel_is_straightened():
    x, fresh = funnel_draws(3000), funnel_draws(3000, seed=1)
    transport = fit_transport(x[:1500], x[1500:])
    assert isinstance(transport, TriangularMap)
    assert int(transport.order[0]) == 1
    assert drivers(transport) == [1]
    gap = (funnel_log_prob(fresh) - fitted_log_prob(transport, fresh)).mean()
    assert float(gap) < 0.2
    # Negative control: the affine map is far off.
    assert float((funnel_log_prob(fresh) - fitted_log_prob(fit_affine(x), fresh)).mean()) > 3.0


def test_banana_is_straightened():
    x = banana_draws(3000)
    transport = fit_transport(x[:1500], x[1500:])
    assert isinstance(transport, TriangularMap)
    z = transport.inverse(banana_draws(2000, seed=2))
    assert float((z.std(0) - 1.0).abs().max()) < 0.1


def test_pull_back_and_push_forward_keep_the_normaliser():
    transport = fit_triangular(funnel_draws(1500))
    target = Target.from_log_prob(funnel_log_prob, dim=5, log_normalizer=0.0)
    pulled = PulledBack(target, transport)
    z = normal(7, 5, seed=4)
    log_prob, score = pulled.log_prob_and_score(z)
    leaf = z.clone().requires_grad_()
    pulled.log_prob(leaf).sum().backward()
    torch.testing.assert_close(score, leaf.grad, rtol=1e-8, atol=1e-8)
    pushed = Pushforward(student_t(torch.zeros(5), torch.ones(5)), transport)
    x, log_det = transport(z)
    torch.testing.assert_close(pushed.log_prob(x), pushed.base.log_prob(z) - log_det)
    assert pushed.sample(10, generator=generator()).shape == (10, 5)


def test_profile_reaches_the_neck_that_draws_lack():
    target = Target.from_log_prob(funnel_log_prob, dim=5, log_normalizer=0.0)
    x = funnel_draws(4000, low=-1.0)  # 37 % of the mass, all of the neck, is missing
    profile = profile_from_draws(target, 1, x)
    mean = float((profile.weights() * profile.grid).sum())
    sd = math.sqrt(float((profile.weights() * (profile.grid - mean).square()).sum()))
    assert mean == pytest.approx(0.0, abs=0.02)
    assert sd == pytest.approx(3.0, rel=0.02)
    fresh = funnel_draws(3000, seed=3)
    # The mixture is heavier-tailed and inflated on purpose; it stays within a nat of the exact density.
    gap = funnel_log_prob(fresh) - profile.mixture().log_prob(fresh)
    assert 0.0 < float(gap.mean()) < 1.0
    assert float(gap.max()) < 5.0


@pytest.mark.parametrize("followed", [True, False])
def test_profile_follows_modes_that_bend_away(monkeypatch, followed):
    """A chain of parabolas: x_0 ~ N(1, 10), x_1 close to x_0^2, x_2 to x_1^2; the draws end at a third of its width."""

    def chain(x):
        return -0.05 * (x[:, 0] - 1.0).square() - 5.0 * (x[:, 1:] - x[:, :-1].square()).square().sum(-1)

    x = normal(2000, 3, seed=4)
    x[:, 0] = x[:, 0].clamp(-2.5, 2.5)
    x[:, 1] = x[:, 0].square() + 0.3 * x[:, 1]
    x[:, 2] = x[:, 1].square() + 0.3 * x[:, 2]
    if not followed:
        monkeypatch.setattr(profiles, "_followed", lambda target, profile, **_: profile)
    profile = profile_from_draws(Target.from_log_prob(chain, dim=3), 0, x)
    mean = float((profile.weights() * profile.grid).sum())
    variance = float((profile.weights() * (profile.grid - mean).square()).sum())
    # The Laplace approximation of x_1 and x_2 given x_0 is off where x_0 is near 0; far out it is exact.
    near = abs(mean - 1.0) < 0.3 and abs(math.sqrt(variance / 10.0) - 1.0) < 0.1
    assert near == followed, "without following, the control, the profile ends where Newton's method does"


def test_profile_without_conditional_peaks_is_none():
    target = Target.from_log_prob(lambda x: -0.5 * x[:, 0].square() + 0.5 * x[:, 1].square(), dim=2)
    assert profile_from_draws(target, 0, normal(500, 2)) is None


def test_profile_log_mass_is_exact_for_gaussians():
    target = Target.from_log_prob(lambda x: -0.5 * (x * 2.0).square().sum(-1), dim=3)
    grid = torch.linspace(-1.0, 1.0, 9, dtype=torch.float64)
    start = normal(9, 3, seed=2)
    profile = laplace_profile(target, 0, grid, start, torch.ones(9, 2, dtype=torch.float64))
    torch.testing.assert_close(
        profile.log_mass, -2.0 * grid.square() + math.log(2.0 * math.pi / 4.0), rtol=0, atol=1e-6
    )


def wells(x):
    return (-x[:, ::2].pow(4) + 6.0 * x[:, ::2].square() + 0.5 * x[:, ::2]).sum(-1) - 0.5 * x[:, 1::2].square().sum(-1)


def test_frame_undoes_a_linear_mixing():
    mixing = normal(6, 6, seed=8) + 2.0 * torch.eye(6, dtype=torch.float64)
    inverse = torch.linalg.inv(mixing)
    target = Target.from_log_prob(lambda x: wells(x @ inverse.mT), dim=6)
    fits = multistart(target, num_starts=40, generator=generator()).good().distinct()
    frame = separating_frame(target, fits)
    # Every well coordinate of the truth is one coordinate of the frame, up to scale.
    rows = (inverse @ frame.matrix)[::2].abs()
    top = rows.sort(-1, descending=True).values
    assert float((top[:, 1] / top[:, 0]).max()) < 0.01


def test_no_frame_where_the_axes_serve_or_none_exists():
    for log_prob, dim in ((wells, 6), (funnel_log_prob, 5)):
        target = Target.from_log_prob(log_prob, dim=dim)
        fits = multistart(target, num_starts=40, generator=generator()).good().distinct()
        assert separating_frame(target, fits) is None


def test_no_frame_of_a_flat_density():
    box = Target.from_log_prob(lambda x: torch.where((x.abs() < 1.0).all(-1), 0.0 * x.sum(-1), -torch.inf), dim=3)
    fits = multistart(box, num_starts=10, steps=60, generator=generator()).good().distinct()
    assert separating_frame(box, fits) is None


def test_joint_diagonalisation_of_commuting_matrices():
    rotation = torch.linalg.qr(normal(5, 5, seed=2))[0]
    matrices = rotation @ torch.diag_embed(normal(7, 5, seed=3)) @ rotation.mT
    found = joint_diagonalise(matrices)
    rest = found.mT @ matrices @ found
    assert float((rest - torch.diag_embed(rest.diagonal(dim1=-2, dim2=-1))).abs().max()) < 1e-9


def test_errors():
    with pytest.raises(ValueError, match=r"Expected shift \(D,\) and matrix"):
        AffineMap(torch.zeros(2), torch.eye(3))
    with pytest.raises(ValueError, match="Expected coefficients of shapes"):
        TriangularMap(torch.arange(2), torch.zeros(2), torch.ones(2), torch.zeros(3, 2), torch.zeros(5, 2))
