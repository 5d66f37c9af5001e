"""Biases on collective variables: the grid, hills, the well-tempered limit, reweighting, free energies."""

from __future__ import annotations

import math

import pytest
import torch
from cases import F64, Hinge, VonMises, deviation, perturb
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsampler.methods.matching import Matching
from diffsampler.methods.reference_process import PointStart, UniformStart
from diffsampler.methods.wt_asbs import (
    WTASBS,
    Axis,
    BiasedTarget,
    BiasGrid,
    free_energy_difference,
    free_energy_profile,
)
from diffsampler.reference import geometric, product, variance_preserving
from diffsampler.space import Euclidean, Torus
from diffsampler.target import Target

PLAIN = Axis(-2.0, 3.0, 26, 0.3)
ROUND = Axis(-math.pi, math.pi, 30, 0.4, periodic=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(axes: list[Axis]) -> BiasGrid:
    grid = BiasGrid(axes)
    grid.value.copy_(torch.randn(grid.value.shape, generator=generator(), dtype=F64))
    return grid


# The grid -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [[PLAIN], [ROUND], [PLAIN, ROUND], [ROUND, PLAIN, ROUND]])
def test_nodes_have_their_values(axes):
    grid = filled(axes)
    nodes = torch.cartesian_prod(*grid.nodes()).reshape(-1, len(axes))
    torch.testing.assert_close(grid(nodes), grid.value.flatten(), atol=1e-9, rtol=0.0)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
def test_interpolation_reproduces_multilinear_functions_and_their_slopes(seed):
    axes = [PLAIN, Axis(0.0, 1.0, 5, 0.1)]
    grid = BiasGrid(axes)
    a, b = torch.meshgrid(*grid.nodes(), indexing="ij")
    c = torch.randn(4, generator=generator(seed), dtype=F64)
    grid.value.copy_(c[0] + c[1] * a + c[2] * b + c[3] * a * b)
    s = torch.rand(20, 2, generator=generator(seed), dtype=F64) * torch.tensor([5.0, 1.0]) + torch.tensor([-2.0, 0.0])
    s.requires_grad_()
    value = grid(s)
    torch.testing.assert_close(value, c[0] + c[1] * s[:, 0] + c[2] * s[:, 1] + c[3] * s[:, 0] * s[:, 1])
    (slope,) = torch.autograd.grad(value.sum(), s)
    expected = torch.stack([c[1] + c[3] * s[:, 1], c[2] + c[3] * s[:, 0]], -1)
    torch.testing.assert_close(slope, expected.detach())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(angle=st.floats(-math.pi, math.pi), turns=st.integers(-3, 3))
def test_periodic_axes_have_their_period_in_values_and_hills(angle, turns):
    grid = filled([ROUND])
    s = torch.tensor([[angle], [angle + 2.0 * math.pi * turns]], dtype=F64)
    first, second = grid(s)
    assert first.item() == pytest.approx(second.item(), abs=1e-9)
    hills = [BiasGrid([ROUND]) for _ in range(2)]
    for hill, row in zip(hills, s, strict=True):
        hill.deposit(row.unsqueeze(0), torch.ones(1))
    torch.testing.assert_close(hills[0].value, hills[1].value, atol=1e-9, rtol=0.0)
    assert hills[0].value.sum() == pytest.approx(math.sqrt(2.0 * math.pi) * 0.4 / ROUND.spacing, rel=1e-6)


def test_outside_the_bias_is_constant():
    grid = filled([PLAIN])
    s = torch.tensor([[-5.0], [-2.0], [3.0], [40.0]], dtype=F64, requires_grad=True)
    value = grid(s)
    assert value[0] == value[1] and value[2] == value[3]
    (slope,) = torch.autograd.grad(value.sum(), s)
    assert slope[0] == 0.0 and slope[3] == 0.0


def test_hills_are_gaussians():
    grid = BiasGrid([PLAIN, ROUND])
    centres = torch.tensor([[0.2, 1.0], [2.0, -3.0]], dtype=F64)
    heights = torch.tensor([0.5, 2.0], dtype=F64)
    grid.deposit(centres, heights)
    a, b = torch.meshgrid(*grid.nodes(), indexing="ij")
    expected = torch.zeros_like(a)
    for (x, y), height in zip(centres.tolist(), heights.tolist(), strict=True):
        turn = torch.remainder(b - y + math.pi, 2.0 * math.pi) - math.pi
        expected += height * torch.exp(-0.5 * ((a - x) / 0.3).square() - 0.5 * (turn / 0.4).square())
    torch.testing.assert_close(grid.value, expected, atol=1e-12, rtol=0.0)


def test_axes_are_checked():
    for axis in (Axis(1.0, 0.0, 5, 0.1), Axis(0.0, 1.0, 1, 0.1), Axis(0.0, 1.0, 5, 0.0)):
        with pytest.raises(ValueError, match="Expected low < high"):
            BiasGrid([axis])
    with pytest.raises(ValueError, match="one to three"):
        BiasGrid([PLAIN] * 4)


# Densities ------------------------------------------------------------------------------------------------------------


class DoubleWell(Target):
    """Two unequal wells along the first coordinate, a Gaussian along the second."""

    def __init__(self, barrier: float = 1.5) -> None:
        super().__init__(Euclidean(2))
        self.barrier = barrier

    def log_prob(self, x):
        return -self.barrier * (x[..., 0].square() - 1.0).square() - 0.5 * x[..., 0] - 0.5 * x[..., 1].square()

    def free_energy(self, s):
        return self.barrier * (s.square() - 1.0).square() + 0.5 * s


def first(x):
    return x[:, :1]


def test_biased_scores_are_gradients():
    target = BiasedTarget(DoubleWell(), first, filled([PLAIN]))
    x = torch.randn(4, 5, 2, generator=generator(), dtype=F64)
    log_prob, score = target.log_prob_and_score(x)
    torch.testing.assert_close(log_prob, DoubleWell().log_prob(x) - target.bias_at(x))
    y = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(target.log_prob(y).sum(), y)
    torch.testing.assert_close(score, expected)


@pytest.mark.parametrize("factor", [3.0, 8.0])
def test_hills_of_exact_draws_reach_the_well_tempered_limit(factor):
    """V = -(1 - 1 / gamma) F up to a constant where there is mass: hills narrower than the wells, many small ones."""
    target, g = DoubleWell(3.0), generator()
    grid = BiasGrid([Axis(-1.9, 1.9, 191, 0.08)])
    (s,) = grid.nodes()
    free = target.free_energy(s)
    for _ in range(4000):
        chance = torch.softmax(-free - grid.value, 0)
        draws = s[torch.multinomial(chance, 16, replacement=True, generator=g)].unsqueeze(-1)
        grid.deposit(draws, 0.03 * torch.exp(-grid(draws) / (factor - 1.0)))
    inside = s.abs() < 1.3
    error = (grid.value + (1.0 - 1.0 / factor) * free)[inside]
    assert (error - error.mean()).abs().max() < 0.35
    # Negative control: the bias of plain metadynamics is -F.
    wrong = (grid.value + free)[inside]
    assert (wrong - wrong.mean()).abs().max() > 0.5 if factor == 3.0 else True


# Free energies --------------------------------------------------------------------------------------------------------


def test_differences_of_weighted_draws_cover_the_truth():
    """Gaussian draws weighted to a shifted Gaussian: A is s > 0.5; errors over 200 repetitions have unit variance."""
    scores = []
    truth = -math.log((0.5 * math.erfc(-0.5 / math.sqrt(2.0))) / (0.5 * math.erfc(0.5 / math.sqrt(2.0))))
    for seed in range(200):
        s = torch.randn(1000, generator=generator(seed), dtype=F64)
        log_weight = s - 0.5
        found = free_energy_difference(s > 0.5, s <= 0.5, log_weight)
        scores.append((found.value - truth) / found.std_error)
    scores = torch.tensor(scores, dtype=F64)
    # Means and variances of 200 standard normal numbers, four standard errors.
    assert abs(scores.mean()) < 4.0 / math.sqrt(200) + 0.1
    assert abs(scores.var() - 1.0) < 0.4


def test_profiles_are_those_of_the_density():
    s = torch.randn(200_000, 1, generator=generator(), dtype=F64)
    edges = torch.linspace(-2.0, 2.0, 21, dtype=F64)
    profile = free_energy_profile(s, torch.zeros(200_000), [edges])
    centres = 0.5 * (edges[1:] + edges[:-1])
    expected = 0.5 * centres.square()
    z = (profile.value - profile.value[9:11].mean() - (expected - expected[9:11].mean())) / profile.std_error
    assert z.abs().max() < 4.0
    assert profile.value.min() == 0.0
    empty = free_energy_profile(s, torch.zeros(200_000), [torch.tensor([0.0, 1.0, 50.0, 60.0])])
    assert empty.value[2] == math.inf and empty.std_error[2] == math.inf


def test_what_was_not_visited_has_no_difference():
    s = torch.ones(10)
    with pytest.raises(ValueError, match="in both sets"):
        free_energy_difference(s > 2.0, s < 2.0, torch.zeros(10))
    with pytest.raises(ValueError, match="Expected variables of shape"):
        free_energy_profile(s, torch.zeros(10), [s])


# The sampler ----------------------------------------------------------------------------------------------------------


def sampler_of(target: Target, axes: list[Axis], variables=first, **options) -> WTASBS:
    matching = Matching(fresh=256, every=20, clip=20.0, reweight=0.3)
    defaults = {"num_steps": 20, "sigma_min": 0.2, "sigma_max": 1.5, "width": 32, "height": 0.003, "factor": 5.0}
    return WTASBS(target, variables, axes, matching=matching, **{**defaults, **options})


def test_a_trained_bias_flattens_and_its_weights_give_free_energies():
    target = DoubleWell(2.5)
    sampler = sampler_of(target, [Axis(-2.5, 2.5, 101, 0.15)])
    sampler.fit(steps=800, batch_size=256, learning_rate=5e-3)
    bias = sampler.biased.bias
    particles = sampler.sample(4000, seed=1)
    s = particles.x[:, 0].double()
    grid = torch.linspace(-4.0, 4.0, 8001, dtype=F64)
    density = torch.exp(-target.free_energy(grid))
    log_z = math.log(density.sum().item() * 0.001 * math.sqrt(2.0 * math.pi))
    assert abs(deviation(particles.log_weight.exp(), math.exp(log_z))) < 4.0
    truth = -math.log((density[grid > 0].sum() / density[grid <= 0].sum()).item())
    found = free_energy_difference(s > 0.0, s <= 0.0, particles.log_weight)
    assert abs(found.value - truth) < 4.0 * found.std_error < 0.5
    # The bias fills the wells: it is higher there than on the barrier, and draws are on the barrier more often.
    at = bias(torch.tensor([[-1.0], [0.0], [1.0]], dtype=F64))
    assert at[0] > at[1] + 0.5 and at[2] > at[1] + 0.3
    share = (s.abs() < 0.3).double().mean()
    unbiased = density[grid.abs() < 0.3].sum() / density.sum()
    assert share > 1.5 * unbiased


def test_angles_are_variables_of_themselves():
    target = VonMises(1, kappa=2.0)
    options = {"start": PointStart(Torus(1)), "sigma_max": 3.0}
    sampler = sampler_of(target, [ROUND], lambda x: x, **options).fit(steps=100, batch_size=64, learning_rate=5e-3)
    particles = sampler.sample(4000)
    assert abs(deviation(particles.log_weight.exp(), math.exp(target.log_normalizer))) < 4.0


@pytest.mark.parametrize("k", [5, 50])
@pytest.mark.parametrize("steps", [0, 100])
def test_biased_chains_on_a_line_and_a_circle_have_exact_weights(steps, k):
    """At random and trained controls, under a bias that was not learned: four standard errors, 4 cases."""
    target = Hinge()
    reference = product(variance_preserving(k, beta_start=4.0), geometric(k, sigma_min=0.2, sigma_max=1.5))
    options = {"num_steps": k, "reference": reference, "start": UniformStart(target.space), "skip": 0}
    sampler = sampler_of(target, [ROUND], lambda x: x[:, 1:], **options)
    if steps:
        sampler.fit(steps=steps, batch_size=64, learning_rate=5e-3)
    else:
        perturb(sampler.chain.process, 0.05)
    sampler.biased.bias.value.copy_(0.5 * torch.randn(30, generator=generator(), dtype=F64))
    particles = sampler.sample(8192)
    assert abs(deviation(particles.log_weight.exp(), math.exp(target.log_normalizer))) < 4.0
    # Negative control: without the bias in the weights.
    wrong = particles.log_weight - sampler.biased.bias_at(particles.x.double())
    assert abs(deviation(wrong.exp(), math.exp(target.log_normalizer))) > 6.0


def test_the_bias_is_frozen_at_the_end_and_skipped_at_the_start():
    early = sampler_of(DoubleWell(), [PLAIN], skip=100).fit(steps=60, batch_size=32)
    assert not early.biased.bias.value.any()
    seen = []

    def watch(entry: dict[str, float]) -> None:
        seen.append((entry["step"], sampler.biased.bias.value.sum().item()))

    sampler = sampler_of(DoubleWell(), [PLAIN], skip=0, until=0.5)
    sampler.fit(steps=120, batch_size=32, callback=watch)
    sums = dict(seen)
    assert 0.0 < sums[20] < sums[40] < sums[60] == sums[80] == sums[120]


def test_resumed_runs_repeat_uninterrupted_ones_bit_for_bit(tmp_path):
    class Stop(Exception):
        pass

    def interrupt(entry: dict[str, float]) -> None:
        if entry["step"] == 40:
            raise Stop

    def make() -> WTASBS:
        return sampler_of(DoubleWell(), [PLAIN], skip=0)

    whole = make().fit(steps=60, batch_size=32)
    options = {"steps": 60, "batch_size": 32, "checkpoint": tmp_path, "checkpoint_every": 20}
    with pytest.raises(Stop):
        make().fit(**options, callback=interrupt)
    resumed = make().fit(**options, resume=True)
    assert torch.equal(whole.biased.bias.value, resumed.biased.bias.value)
    assert torch.equal(whole.sample(50).log_weight, resumed.sample(50).log_weight)


def test_hills_are_checked():
    for options in ({"height": 0.0}, {"factor": 1.0}, {"until": 0.0}, {"skip": -1}):
        with pytest.raises(ValueError, match="Expected height > 0, factor > 1"):
            sampler_of(DoubleWell(), [PLAIN], **options)
