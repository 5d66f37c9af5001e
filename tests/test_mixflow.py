"""MixFlow: an exact density for any map, bounds that grow, maps that are inverted."""

from __future__ import annotations

import math

import pytest
import torch
from cases import deviation, gaussian, mixture

import diffsampler as ds
from diffsampler import targets
from diffsampler.methods.flow_mixture import FlowMixture
from diffsampler.methods.flows import Flow
from diffsampler.methods.mixflow import HamiltonianFlow
from diffsampler.testing import check_sampler

F64 = torch.float64


class Rotation(Flow):
    """Turns the plane: leaves every round density exactly invariant."""

    def __init__(self, angle):
        super().__init__()
        c, s = math.cos(angle), math.sin(angle)
        self.register_buffer("matrix", torch.tensor([[c, -s], [s, c]], dtype=F64))

    def forward(self, x):
        return x @ self.matrix.mT, x.new_zeros(x.shape[:-1])

    def inverse(self, y):
        return y @ self.matrix, y.new_zeros(y.shape[:-1])


class Stretch(Flow):
    """A nonlinear map of the line with a varying Jacobian: ``asinh`` of a shifted ``sinh``."""

    def forward(self, x):
        y = torch.asinh(torch.sinh(x) + 0.8)
        return y, (torch.cosh(x) / torch.cosh(y)).log().sum(-1)

    def inverse(self, y):
        x = torch.asinh(torch.sinh(y) - 0.8)
        return x, (torch.cosh(y) / torch.cosh(x)).log().sum(-1)


def make(target=None, *, reference=None, **options):
    target = gaussian() if target is None else target
    reference = targets.Gaussian([0.2, 0.0], scale=0.6) if reference is None else reference
    return ds.MixFlow(target, reference=reference, **{"num_images": 16, "num_steps": 5, "step_size": 0.2, **options})


def divergence(flow, reference, truth, n, *, generator):
    """KL divergence of a mixture of the plane from a normalized density, by quadrature."""
    line = torch.linspace(-7.0, 7.0, 281, dtype=F64)
    grid = torch.cartesian_prod(line, line)
    log_q = FlowMixture(flow, reference, num_images=n).log_prob(grid)
    return float((log_q.exp() * (log_q - truth.log_prob(grid))).sum() * (line[1] - line[0]) ** 2)


# The mixture of any map.


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_density_along_orbits_is_the_density_anywhere(size, generator):
    mixture_flow = FlowMixture(Stretch(), targets.Gaussian([0.3], scale=0.7), num_images=size)
    orbit = mixture_flow.orbit(torch.randn(6, 1, generator=generator, dtype=F64))
    assert orbit.z.shape == (size, 6, 1)
    torch.testing.assert_close(orbit.log_density, mixture_flow.log_prob(orbit.z), atol=1e-10, rtol=0.0)


def test_density_integrates_to_one_on_the_line():
    x = torch.linspace(-12.0, 12.0, 40001, dtype=F64).unsqueeze(-1)
    for size in (1, 3, 10):
        density = FlowMixture(Stretch(), targets.Gaussian([0.3], scale=0.7), num_images=size).log_prob(x).exp()
        assert abs(float(torch.trapezoid(density, x.squeeze(-1))) - 1.0) < 1e-8


def test_samples_follow_the_density(generator):
    mixture_flow = FlowMixture(Stretch(), targets.Gaussian([-0.5], scale=0.5), num_images=6)
    drawn = mixture_flow.sample(20000, generator=generator)
    x = torch.linspace(-12.0, 12.0, 40001, dtype=F64)
    density = mixture_flow.log_prob(x.unsqueeze(-1)).exp()
    for function in (torch.sin, torch.cos, torch.tanh):
        truth = float(torch.trapezoid(density * function(x), x))
        # Four standard errors over three functions: 2e-4.
        assert abs(deviation(function(drawn), truth)) < 4.0
        orbit = mixture_flow.orbit(mixture_flow.reference.sample(4000, generator=generator)).z
        assert abs(deviation(function(orbit).mean((0, 2)), truth)) < 4.0


def test_divergence_never_grows_for_an_invariant_map(generator):
    truth = targets.Gaussian([0.0, 0.0], scale=1.0)
    reference = targets.Gaussian([1.5, 0.0], scale=[0.6, 0.9])
    values = [divergence(Rotation(2.4), reference, truth, n, generator=generator) for n in (1, 2, 4, 8, 16, 32)]
    assert all(b <= a + 1e-9 for a, b in zip(values[:-1], values[1:], strict=True))
    assert values[-1] < 0.5 * values[0]
    # Negative control: a map that moves the target away makes it grow.
    drifting = targets.Gaussian([0.0, 0.0], scale=1.0)

    class Shift(Flow):
        def forward(self, x):
            return x + 0.5, x.new_zeros(x.shape[:-1])

        def inverse(self, y):
            return y - 0.5, y.new_zeros(y.shape[:-1])

    values = [divergence(Shift(), drifting, truth, n, generator=generator) for n in (1, 2, 4)]
    assert values[0] < values[1] < values[2]


# The Hamiltonian map.


@pytest.mark.parametrize("dim", [1, 2, 6])
def test_map_is_inverted_and_knows_its_jacobian(dim, generator):
    target = targets.StudentT(dim=dim, df=5.0)
    flow = HamiltonianFlow(target, step_size=0.3, num_steps=4, scale=torch.ones(dim, dtype=F64))
    z = torch.randn(8, 2 * dim + 1, generator=generator, dtype=F64)
    z[:, -1] = torch.rand(8, generator=generator, dtype=F64)
    out, log_det = flow(z)
    back, log_back = flow.inverse(out)
    torch.testing.assert_close(back, z, atol=1e-10, rtol=0.0)
    torch.testing.assert_close(log_back, -log_det, atol=1e-10, rtol=0.0)
    # Central differences: the density hands out scores without a graph.
    step = 1e-6 * torch.eye(2 * dim + 1, dtype=F64)
    for point, expected in zip(z[:3], log_det[:3], strict=True):
        jacobian = (flow(point + step)[0] - flow(point - step)[0]) / 2e-6
        assert abs(float(torch.linalg.slogdet(jacobian)[1] - expected)) < 1e-5


def test_map_keeps_the_target_as_steps_shrink(generator):
    # T is invariant but for leapfrog's error: log target(T z) + log J - log target(z) falls as the step squared.
    target = mixture()
    z = torch.randn(500, 5, generator=generator, dtype=F64)
    z[:, -1] = torch.rand(500, generator=generator, dtype=F64)

    def worst(step_size):
        flow = HamiltonianFlow(
            target, step_size=step_size, num_steps=round(0.8 / step_size), scale=torch.ones(2, dtype=F64)
        )
        out, log_det = flow(z)

        def log_prob(z):
            return target.log_prob(z[:, :2]) - 0.5 * z[:, 2:4].square().sum(-1)

        return float((log_prob(out) + log_det - log_prob(z)).abs().mean())

    assert 3.0 < worst(0.1) / worst(0.05) < 5.0


def test_whole_orbits_return():
    # Chaos multiplies rounding by about e^(1/2) a map.
    assert make(num_images=8, num_steps=10, step_size=0.1).round_trip_error() < 1e-10
    assert make(num_images=8, num_steps=10, step_size=0.1).round_trip_error() > 0.0


@pytest.mark.parametrize("size", [1, 3])
def test_hamiltonian_density_integrates_to_one(size, generator):
    # Three dimensions (x, v, u) by a grid in v and u and x; the seam of the refreshment limits the rule to first order.
    flow = make(
        targets.Gaussian([0.5], scale=0.8),
        reference=targets.Gaussian([0.0], scale=0.7),
        num_images=size,
        num_steps=3,
        step_size=0.3,
    )
    x, v = (torch.linspace(-6.0, 6.0, 161, dtype=F64) for _ in range(2))
    u = (torch.arange(16, dtype=F64) + 0.5) / 16
    density = flow.log_prob(torch.cartesian_prod(x, v, u)).exp()
    assert abs(float(density.sum() * (x[1] - x[0]) * (v[1] - v[0]) / 16) - 1.0) < 2e-3


# The sampler.


@pytest.mark.parametrize("size", [1, 16, 100])
def test_weights_are_unbiased_at_bad_step_sizes(size):
    # Whole orbits of a hundred maps do not return, and the step is far too large: weights must not care.
    flow = make(num_images=size, step_size=0.9, num_steps=3)
    particles = flow.sample(2000 * size, seed=4)
    # Four standard errors: 6e-5.
    assert abs(deviation(particles.log_weight.exp().reshape(-1, size).mean(-1), math.exp(0.7))) < 4.0


def test_bound_grows_towards_the_truth_and_stays_below():
    bounds = [make(num_images=size).elbo(200, seed=1) for size in (1, 8, 64)]
    for bound in bounds:
        assert bound.value < 0.7 + 4.0 * bound.std_error
    assert bounds[0].value + 0.1 < bounds[1].value < bounds[2].value
    assert abs(bounds[2].value - 0.7) < 0.05
    assert bounds[2].std_error < 0.02


def test_two_modes_that_overlap_get_their_weights():
    target = mixture()
    flow = make(target, num_images=200, num_steps=8, step_size=0.2)
    particles = flow.sample(100 * 200, seed=2)
    truth = target.sample(40000, generator=torch.Generator().manual_seed(0))
    mean, error = particles.expectation((particles.x[:, 0] > 0.0).double())
    # Four standard errors: 6e-5, plus that of the exact draws.
    assert abs(float(mean) - float((truth[:, 0] > 0.0).double().mean())) < 4.0 * float(error) + 0.01
    assert float(error) < 0.03


def test_sampler_conforms():
    checks = check_sampler(make(num_images=32))
    assert {"seeds", "particles", "normalizer", "expectations"} <= set(checks)


def test_orbits_are_the_replicates():
    particles = make(num_images=10).sample(35)
    assert len(particles) == 40
    assert particles.replicates == 4
    assert make().evaluations == 0


def test_tuning_takes_the_best_bound():
    flow = make(num_images=32, num_steps=5)
    choices = (1e-4, 0.3, 3.0)
    bounds = [make(num_images=32, num_steps=5, step_size=s).elbo(64).value for s in choices]
    assert flow.tune(choices) is flow
    assert flow.step_size == choices[max(range(3), key=bounds.__getitem__)] == 0.3
    with pytest.raises(ValueError, match="at least one step size"):
        flow.tune([])


def test_maps_that_lose_digits_are_refused():
    # A reference ten times wider than the target: excess energies beyond what a distribution function can hold.
    wide = make(targets.Gaussian([0.0, 0.0], scale=0.05), reference=targets.Gaussian([0.0, 0.0], scale=1.0))
    with pytest.raises(RuntimeError, match="Expected maps that are inverted within 1e-06"):
        wide.sample(1000)
    with pytest.raises(RuntimeError, match="finite lower bound"):
        wide.tune([0.2])


def test_lost_orbits_are_counted():
    def log_prob(x):
        return torch.where(x[:, 0] < 1.2, -0.5 * x.square().sum(-1), math.nan)

    flow = make(ds.Target.from_log_prob(log_prob, dim=2), num_images=4)
    particles = flow.sample(4000)
    assert 0 < particles.nonfinite < 2000
    assert bool(particles.x.isfinite().all())


def test_bad_input():
    target, reference = gaussian(), targets.Gaussian([0.0, 0.0], scale=1.0)
    unnormalized = ds.Target.from_log_prob(lambda x: -x.square().sum(-1), dim=2)
    with pytest.raises(ValueError, match="Euclidean"):
        make(ds.Target.from_log_prob(lambda x: x.cos().sum(-1), space=ds.Torus(2)))
    with pytest.raises(ValueError, match="normalized reference with an exact sampler; got FunctionTarget"):
        make(reference=unnormalized)
    with pytest.raises(ValueError, match="Expected a reference on"):
        make(reference=targets.Gaussian([0.0], scale=1.0))
    with pytest.raises(ValueError, match="num_images to be a positive integer"):
        make(num_images=0)
    with pytest.raises(ValueError, match="num_steps to be a positive integer"):
        make(num_steps=0)
    with pytest.raises(ValueError, match="step_size to be positive"):
        make(step_size=-0.1)
    with pytest.raises(ValueError, match=r"scales of shape \(2,\)"):
        ds.MixFlow(target, reference=reference, scale=torch.ones(3))
    with pytest.raises(ValueError, match="n >= 1"):
        make().sample(0)
