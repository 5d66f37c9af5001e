"""Spaces: projections, noise, and Gaussian log densities with the right number of degrees of freedom."""

from __future__ import annotations

import math
import pickle

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from diffsampler.space import Euclidean, MeanFree, Space, Torus

SPACES = [Euclidean(1), Euclidean(5), MeanFree(2, 1), MeanFree(4, 3), Torus(1), Torus(3)]
EACH = pytest.mark.parametrize("space", SPACES, ids=repr)
LIKE = torch.empty(0, dtype=torch.float64)


def draw(space: Space, *shape: int, seed: int = 0) -> torch.Tensor:
    return space.noise(shape, like=LIKE, generator=torch.Generator().manual_seed(seed))


@EACH
def test_projection_is_idempotent_and_noise_is_tangent(space):
    x = space.project(3.0 * torch.randn(20, space.dim, generator=torch.Generator().manual_seed(1), dtype=LIKE.dtype))
    torch.testing.assert_close(space.project(x), x, rtol=0, atol=1e-14)
    z = draw(space, 20)
    torch.testing.assert_close(space.project_vector(z), z, rtol=0, atol=1e-14)
    assert torch.equal(z, draw(space, 20)) and not torch.equal(z, draw(space, 20, seed=1))


@given(
    shape=st.lists(st.integers(0, 3), max_size=3),
    space=st.sampled_from(SPACES),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_batch_shapes_and_dtypes(shape, space, dtype):
    shape = tuple(shape)
    generator = torch.Generator().manual_seed(0)
    z = space.noise(shape, like=torch.empty(0, dtype=dtype), generator=generator)
    assert z.shape == (*shape, space.dim) and z.dtype == dtype
    assert space.project(z).shape == z.shape and space.project_vector(z).dtype == dtype
    log_prob = space.log_gaussian(z, 0.5 * z, torch.full((*shape, 1), 0.7, dtype=dtype))
    assert log_prob.shape == shape and log_prob.dtype == torch.float64
    flat = space.log_gaussian(
        z.reshape(-1, space.dim), 0.5 * z.reshape(-1, space.dim), torch.full((1, 1), 0.7, dtype=dtype)
    )
    torch.testing.assert_close(log_prob.reshape(-1), flat, rtol=1e-9, atol=1e-9)


@EACH
def test_float32_noise_density_agrees_with_float64(space):
    z, mean = draw(space, 50), draw(space, 50, seed=1)
    variance = torch.full((1,), 0.3, dtype=LIKE.dtype)
    single = space.log_gaussian(z.float(), mean.float(), variance.float())
    torch.testing.assert_close(single, space.log_gaussian(z, mean, variance), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("space", [s for s in SPACES if not isinstance(s, Torus)], ids=repr)
def test_entropy_of_noise_has_the_right_degrees_of_freedom(space):
    # E[log N] = -dof (1 + log 2 pi v) / 2, standard deviation sqrt(dof / 2) per draw; five standard errors: 6e-7.
    v, n = 0.3, 20_000
    x = math.sqrt(v) * draw(space, n)
    mean = space.log_gaussian(x, torch.zeros_like(x), x.new_full((1,), v)).mean().item()
    expected = -0.5 * space.dof * (1.0 + math.log(2.0 * math.pi * v))
    assert abs(mean - expected) < 5.0 * math.sqrt(0.5 * space.dof / n)


def test_euclidean_density_matches_scipy():
    space = Euclidean(3)
    x, mean = draw(space, 7), draw(space, 7, seed=1)
    variance = torch.tensor([0.1, 1.0, 30.0], dtype=LIKE.dtype)
    expected = stats.norm.logpdf(x.numpy(), mean.numpy(), numpy.sqrt(variance.numpy())).sum(-1)
    assert space.log_gaussian(x, mean, variance).tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    expected = stats.norm.logpdf(x.numpy(), mean.numpy(), math.sqrt(0.2)).sum(-1)
    assert space.log_gaussian(x, mean, x.new_full((1,), 0.2)).tolist() == pytest.approx(expected.tolist(), rel=1e-12)


@pytest.mark.parametrize(("n", "d"), [(2, 1), (3, 1), (2, 2)])
def test_mean_free_gaussian_normalises_on_its_hyperplane(n, d):
    """Trapezoidal rule on an orthonormal basis of the hyperplane, whose Lebesgue measure the space uses."""
    space = MeanFree(n, d)
    projector = torch.stack([space.project(row) for row in torch.eye(n * d, dtype=LIKE.dtype)])
    values, vectors = torch.linalg.eigh(projector)
    basis = vectors[:, values > 0.5].mT
    assert basis.shape[0] == space.dof
    line = torch.linspace(-8.0, 8.0, 161, dtype=LIKE.dtype)
    grid = torch.cartesian_prod(*[line] * space.dof).reshape(-1, space.dof)
    mean = 0.3 * basis[0]
    log_prob = space.log_gaussian(grid @ basis, mean, line.new_full((1,), 0.8))
    total = log_prob.exp().sum().item() * (line[1] - line[0]).item() ** space.dof
    assert total == pytest.approx(1.0, abs=1e-9)
    # Negative control: counting all n d coordinates is off by a factor.
    wrong = Euclidean(n * d).log_gaussian(grid @ basis, mean, line.new_full((1,), 0.8)).exp().sum().item()
    assert abs(wrong * (line[1] - line[0]).item() ** space.dof - 1.0) > 0.1


def test_mean_free_ignores_translations_and_refuses_anisotropy():
    space = MeanFree(3, 2)
    x = draw(space, 4)
    shift = torch.tensor([1.0, -2.0], dtype=x.dtype).repeat(3)
    variance = x.new_full((1,), 0.5)
    torch.testing.assert_close(
        space.log_gaussian(x + shift, 0.0 * x, variance), space.log_gaussian(x, 0.0 * x, variance)
    )
    torch.testing.assert_close(space.project(x + shift), x)
    with pytest.raises(
        ValueError, match=r"Expected an isotropic variance of shape \(..., 1\) on MeanFree; got \(4, 6\)"
    ):
        space.log_gaussian(x, x, x.abs())


@pytest.mark.parametrize("sd", [0.05, 0.5, 2.0, 5.9, 6.1, 40.0])
def test_wrapped_normal_integrates_to_one(sd):
    space = Torus(1)
    n = 4000
    x = (2.0 * math.pi * (torch.arange(n, dtype=LIKE.dtype) / n) - math.pi).unsqueeze(-1)
    density = space.log_gaussian(x, x.new_full((1,), 3.0), x.new_full((1,), sd**2)).exp()
    assert density.sum().item() * 2.0 * math.pi / n == pytest.approx(1.0, abs=1e-7)


def test_wrapped_normal_is_periodic_and_continuous_at_the_switch():
    space = Torus(2)
    x, mean = space.project(3.0 * draw(space, 9)), draw(space, 9, seed=1)
    variance = torch.tensor([0.4, 9.0], dtype=LIKE.dtype)
    value = space.log_gaussian(x, mean, variance)
    torch.testing.assert_close(space.log_gaussian(x + 2.0 * math.pi, mean - 4.0 * math.pi, variance), value)
    # A narrow law far from the cut is the ordinary normal.
    near = space.log_gaussian(mean + 0.1, mean, x.new_full((1,), 0.01))
    torch.testing.assert_close(near, Euclidean(2).log_gaussian(mean + 0.1, mean, x.new_full((1,), 0.01)))
    below, above = (space.log_gaussian(x, mean, x.new_full((1,), s**2)) for s in (6.0, 6.0 + 1e-9))
    torch.testing.assert_close(below, above, rtol=0, atol=2e-7)


def test_wrapped_normal_matches_its_fourier_series():
    space, sd = Torus(1), 1.3
    x = torch.linspace(-3.0, 3.0, 13, dtype=LIKE.dtype).unsqueeze(-1)
    k = torch.arange(1, 30, dtype=LIKE.dtype)
    series = (1.0 + 2.0 * (torch.exp(-0.5 * (k * sd) ** 2) * torch.cos(k * (x - 0.7))).sum(-1)) / (2.0 * math.pi)
    value = space.log_gaussian(x, x.new_full((1,), 0.7), x.new_full((1,), sd**2)).exp()
    torch.testing.assert_close(value, series, rtol=1e-12, atol=1e-12)


def test_torus_angles_are_half_open():
    x = torch.tensor([[math.pi, -math.pi, 7.0, -7.0]], dtype=LIKE.dtype)
    wrapped = Torus(4).project(x)
    assert ((wrapped >= -math.pi) & (wrapped < math.pi)).all()
    torch.testing.assert_close(torch.cos(wrapped), torch.cos(x))
    torch.testing.assert_close(torch.sin(wrapped), torch.sin(x), rtol=0, atol=1e-12)


@EACH
def test_zero_variance_is_a_point_mass_that_counts_nothing(space):
    x = draw(space, 3)
    zero = torch.zeros(3, 1, dtype=x.dtype)
    assert torch.equal(space.log_gaussian(x, x, zero), torch.zeros(3, dtype=x.dtype))


@pytest.mark.parametrize("space", [Euclidean(2), Torus(2)], ids=repr)
def test_zero_variance_of_one_coordinate(space):
    x, mean = 0.1 * draw(space, 3), torch.zeros(3, 2, dtype=LIKE.dtype)
    value = space.log_gaussian(x, mean, torch.tensor([0.0, 0.5], dtype=LIKE.dtype))
    alone = type(space)(1).log_gaussian(x[:, 1:], mean[:, 1:], torch.tensor([0.5], dtype=LIKE.dtype))
    torch.testing.assert_close(value, alone)


@EACH
def test_densities_have_gradients(space):
    x = draw(space, 3).requires_grad_()
    mean = draw(space, 3, seed=1).requires_grad_()
    variance = torch.full((3, 1), 0.4, dtype=LIKE.dtype, requires_grad=True)
    assert torch.autograd.gradcheck(space.log_gaussian, (x, mean, variance))


def test_equality_hash_and_pickle():
    assert Euclidean(3) == Euclidean(3) and Euclidean(3) != Euclidean(4) and Euclidean(3) != Torus(3)
    assert MeanFree(2, 3) != MeanFree(3, 2) and MeanFree(2, 3) != Euclidean(6)
    assert len({Euclidean(3), Euclidean(3), Torus(3), MeanFree(3, 2), MeanFree(2, 3)}) == 4
    for space in SPACES:
        assert pickle.loads(pickle.dumps(space)) == space
    assert repr(MeanFree(4, 3)) == "MeanFree(dim=12, dof=9)"


@pytest.mark.parametrize("build", [lambda: Euclidean(0), lambda: MeanFree(1, 3), lambda: Torus(-1)])
def test_empty_spaces_are_refused(build):
    with pytest.raises(ValueError, match="Expected a space with at least one degree of freedom; got dim="):
        build()
