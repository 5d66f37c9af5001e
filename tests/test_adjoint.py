"""Adjoint sampling and its bridge sampler: exact weights, references, closed-form optima, regressions, resumed runs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import F64, Hinge, HyperplaneGaussian, VonMises, deviation, gaussian, mixture, perturb
from torch import Tensor, nn

import diffsampler as ds
from diffsampler import estimators
from diffsampler.equivariant import EquivariantGraphNetwork
from diffsampler.methods.adjoint_sampling import AdjointSampling
from diffsampler.methods.asbs import ASBS
from diffsampler.methods.matching import Matching, PathDivergence, Stages, clip_vectors, temper_to_share
from diffsampler.methods.reference_process import (
    GaussianStart,
    HarmonicStart,
    PointStart,
    ReferenceProcess,
    UniformStart,
)
from diffsampler.objective import LogVariance
from diffsampler.reference import Reference, constant, edm, geometric, product, variance_preserving
from diffsampler.space import Euclidean, EuclideanTorus, MeanFree, Space, Torus
from diffsampler.target import Target
from diffsampler.trajectory import simulate

CHAIN = torch.tensor([[0, 1], [1, 2], [2, 3]])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# References -----------------------------------------------------------------------------------------------------------


REFERENCES: dict[str, Callable[[int], Reference]] = {
    "geometric": lambda k: geometric(k, sigma_min=0.1, sigma_max=2.0),
    "geometric_euler": lambda k: geometric(k, sigma_min=0.1, sigma_max=2.0, left_endpoint=True),
    "constant": lambda k: constant(k, sigma=1.3),
    "edm": lambda k: edm(k, sigma_min=0.01, sigma_max=2.0),
    "preserving": lambda k: variance_preserving(k, beta_start=4.0, scale=1.2),
}


def test_schedules_have_their_closed_forms():
    assert geometric(50, sigma_min=0.1, sigma_max=2.0).variance.sum().item() == pytest.approx(4.0 - 0.01)
    assert constant(7, sigma=1.3).variance.sum().item() == pytest.approx(1.69)
    # Base variance of the published molecular setting, in square Angstrom.
    assert edm(250, sigma_min=1e-3, sigma_max=6.0).variance.sum().item() == pytest.approx(5.442, abs=2e-3)
    # The published left-endpoint step overshoots; the exact integral does not.
    for steps, ratio in ((50, 1.160), (199, 1.039)):
        euler = geometric(steps, sigma_min=1e-3, sigma_max=2.0, left_endpoint=True).variance.sum().item()
        assert euler / (4.0 - 1e-6) == pytest.approx(ratio, abs=2e-3)
    preserving = variance_preserving(20, scale=1.2)
    torch.testing.assert_close(
        preserving.contraction.square() * 1.44 + preserving.variance, torch.full((20,), 1.44).double()
    )


@pytest.mark.parametrize("name", REFERENCES)
def test_both_accumulations_agree(name):
    reference = REFERENCES[name](9)
    reach, level = reference.from_start()
    ahead, left = reference.to_end()
    torch.testing.assert_close(reach[-1], ahead[0])
    torch.testing.assert_close(level[-1], left[0])
    # Any step cuts the variance of the end in two.
    torch.testing.assert_close(ahead.square() * level + left, level[-1].expand(10))


def test_times_are_checked():
    with pytest.raises(ValueError, match="rising times from 0 to 1"):
        constant(2, time=torch.tensor([0.0, 0.7, 0.9]))
    time = torch.tensor([0.0, 0.2, 1.0], dtype=F64)
    torch.testing.assert_close(constant(2, sigma=2.0, time=time).variance, 4.0 * time.diff())
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        geometric(5, sigma_min=2.0, sigma_max=1.0)


# Start laws -----------------------------------------------------------------------------------------------------------


def test_the_harmonic_law_is_that_of_its_springs():
    space, scale = MeanFree(4, 2), 0.7
    law = HarmonicStart(space, CHAIN, scale=scale).double()
    x = law.sample(20_000, generator=generator())
    torch.testing.assert_close(space.project(x), x, atol=1e-6, rtol=0.0)
    points = x.unflatten(-1, (4, 2))
    energy = sum(0.5 * (points[:, i] - points[:, j]).square().sum(-1) for i, j in CHAIN.tolist()) / scale**2
    y = law.log_prob(x) + energy
    assert y.std() < 1e-5, "log_prob is not the energy of the springs"
    # Equipartition: six degrees of freedom, each half a unit; six standard errors.
    assert abs(deviation(energy, 3.0)) < 6.0
    entropy = -law.log_prob(x).mean()
    determinant = torch.logdet(torch.cov(x[:, :6].T))
    # The first three particles determine the fourth: a volume factor of n^(d/2) between both coordinates.
    assert entropy.item() == pytest.approx(
        3.0 * (1.0 + math.log(2.0 * math.pi)) + 0.5 * determinant.item() + math.log(4.0), abs=0.05
    )


def test_springs_must_connect_all_particles():
    space = MeanFree(4, 2)
    with pytest.raises(ValueError, match="separate groups"):
        HarmonicStart(space, torch.tensor([[0, 1], [2, 3]]))
    with pytest.raises(ValueError, match="mean-free particles"):
        HarmonicStart(Euclidean(8), CHAIN)
    with pytest.raises(ValueError, match="between particles 0 to 3"):
        HarmonicStart(space, torch.tensor([[0, 4]]))


def test_a_law_that_is_not_positive_definite_is_not_what_full_springs_give():
    """All pairs bonded: the Laplacian n I - 1 is isotropic on the mean-free space, variance s^2 / n."""
    pairs = torch.combinations(torch.arange(4))
    law = HarmonicStart(MeanFree(4, 3), pairs, scale=2.0)
    torch.testing.assert_close(law.variances[1:], torch.ones(3, dtype=F64))


# Weights --------------------------------------------------------------------------------------------------------------


def process_of(kind: str, space: Space, k: int) -> ReferenceProcess:
    """A small process whose paths stay near targets of unit scale."""
    narrow = {"sigma_min": 0.2, "sigma_max": 1.0}
    if kind == "as":
        sigma_max = 3.0 if isinstance(space, Torus) else 1.5
        return ReferenceProcess(space, geometric(k, sigma_min=0.2, sigma_max=sigma_max, left_endpoint=True), width=16)
    if kind == "asbs":
        return ReferenceProcess(space, geometric(k, **narrow), start=GaussianStart(space), width=16)
    if kind == "uniform":
        reference = geometric(k, sigma_min=0.2, sigma_max=1.2)
        if isinstance(space, EuclideanTorus):
            reference = product(variance_preserving(k, beta_start=4.0), reference)
        return ReferenceProcess(space, reference, start=UniformStart(space), width=16)
    if kind == "harmonic":
        return ReferenceProcess(space, geometric(k, **narrow), start=HarmonicStart(space, CHAIN), width=16)
    reference = variance_preserving(k, beta_start=4.0, scale=1.1)
    return ReferenceProcess(space, reference, start=GaussianStart(space, scale=1.1), width=16)


CASES: list[tuple[str, Callable[[], Target]]] = [
    ("as", gaussian),
    ("as", HyperplaneGaussian),
    ("as", VonMises),
    ("asbs", gaussian),
    ("asbs", HyperplaneGaussian),
    ("preserving", mixture),
    ("harmonic", HyperplaneGaussian),
    ("as", Hinge),
    ("uniform", Hinge),
    ("uniform", VonMises),
]


@pytest.mark.parametrize("k", [5, 50])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("kind", "make"), CASES, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_weights_average_to_the_constant(kind, make, trained, k):
    """Four standard errors, 40 cases: a false alarm in 400 runs for Gaussian means, with seeds fixed."""
    target = make()
    assert target.log_normalizer is not None
    process = process_of(kind, target.space, k).double()
    if trained:
        sampler = ds.sampler.DiffusionSampler(target, process, PathDivergence(), lesson=Matching(fresh=128, every=20))
        sampler.fit(steps=120, batch_size=128, learning_rate=5e-3)
    else:
        # Controls of about the size of the noise: larger ones make weights whose mean no sample shows.
        perturb(process, 0.05 if k == 50 else 0.1)
    log_weight = simulate(process, target, 8192, generator=generator(7)).log_weight - target.log_normalizer
    assert log_weight.std() > 1e-3
    assert abs(deviation(log_weight.exp(), 1.0)) < 4.0


def girsanov(process: ReferenceProcess, x: Tensor) -> Tensor:
    """Sum of ``sqrt(v) u xi + v |u|^2 / 2`` over the steps of paths ``(K + 1, B, D)``, term by term."""
    total = torch.zeros(x.shape[1], dtype=F64)
    with torch.no_grad():
        for k in range(process.num_steps):
            u, v = process.steer(torch.tensor(k), x[k]), process.variance[k]
            xi = (x[k + 1] - x[k] - v * u) / v.sqrt()
            total += (v.sqrt() * u * xi).sum(-1) + 0.5 * v.squeeze() * u.square().sum(-1)
    return total


@pytest.mark.parametrize(("n", "d"), [(4, 2), (3, 3)])
def test_weights_from_a_point_are_those_of_girsanov_with_the_discrete_variance(n, d):
    target = HyperplaneGaussian(n, d, scale=0.8)
    reference = geometric(50, sigma_min=1e-3, sigma_max=1.2, left_endpoint=True)
    process = perturb(ReferenceProcess(target.space, reference, width=16).double(), 0.05)
    with torch.no_grad():
        process.log_variance.zero_()
        path = simulate(process, target, 4096, generator=generator())
        end, total = path.x[-1], process.variance.sum()
        base = target.space.log_gaussian(end, torch.zeros_like(end), total.reshape(1))
        expected = target.log_prob(end) - base - girsanov(process, path.x)
        torch.testing.assert_close(path.log_weight, expected, atol=1e-6, rtol=0.0)
        assert abs(deviation((expected - target.log_normalizer).exp(), 1.0)) < 4.0
        # Negative control: the continuous variance in the terminal density is off by many standard errors.
        continuous = torch.tensor([1.2**2 - 1e-6], dtype=F64)
        assert total / continuous == pytest.approx(1.148, abs=2e-3)
        wrong = expected + base - target.space.log_gaussian(end, torch.zeros_like(end), continuous)
        assert abs(deviation((wrong - target.log_normalizer).exp(), 1.0)) > 6.0


def test_weights_on_the_torus_are_those_of_girsanov_there():
    target = VonMises(2)
    process = process_of("as", target.space, 8).double()
    perturb(process, 0.1)
    with torch.no_grad():
        process.log_variance.zero_()
        path = simulate(process, target, 512, generator=generator())
        end = target.space.project(path.x[-1])
        base = target.space.log_gaussian(end, torch.zeros_like(end), process.variance.sum().reshape(1))
        expected = target.log_prob(end) - base - girsanov(process, path.x)
        assert (path.x[-1].abs() > math.pi).any(), "no path went round"
        torch.testing.assert_close(path.log_weight, expected, atol=1e-6, rtol=0.0)


def test_lines_in_place_of_circles_make_wrong_weights():
    """Negative control: the normal law of an angle in place of the wrapped one, which differs by 30 percent."""
    target = Hinge()
    reference = product(geometric(20, sigma_min=0.2, sigma_max=1.5), geometric(20, sigma_min=0.2, sigma_max=3.0))
    process = ReferenceProcess(target.space, reference, width=16).double()
    path = simulate(process, target, 8192, generator=generator())
    log_weight = path.log_weight.detach() - target.log_normalizer
    assert abs(deviation(log_weight.exp(), 1.0)) < 4.0
    angle = target.space.project(path.x[-1])[:, 1:]
    zero, variance = torch.zeros_like(angle), process.level[-1, -1:]
    wrong = log_weight + Torus(1).log_gaussian(angle, zero, variance) - Euclidean(1).log_gaussian(angle, zero, variance)
    assert abs(deviation(wrong.exp(), 1.0)) > 6.0


@pytest.mark.parametrize("space", [Torus(2), EuclideanTorus(1, 1)])
def test_uniform_angles_stay_so_and_paths_go_round(space):
    """Without control weights are those of the start law: all one against it. Turns do not change them."""
    target = UniformTarget(space)
    process = process_of("uniform", space, 6).double()
    path = simulate(process, target, 256, generator=generator())
    torch.testing.assert_close(path.log_weight.detach(), torch.zeros(256, dtype=F64), atol=1e-6, rtol=0.0)
    assert (path.x[-1].abs() > math.pi).any(), "no path went round"
    perturb(process, 0.2)
    with torch.no_grad():
        k = torch.arange(6).unsqueeze(-1)
        turn = torch.zeros(space.dim, dtype=F64)
        turn[-1] = 2.0 * math.pi
        for kernel, x in ((process.forward, path.x[:-1]), (process.backward, path.x[1:])):
            torch.testing.assert_close(kernel(k, x + turn, None).mean, kernel(k, x, None).mean + turn)


class UniformTarget(Target):
    """The uniform start itself."""

    def __init__(self, space: Space) -> None:
        super().__init__(space, log_normalizer=0.0)
        self.law = UniformStart(space)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.law.log_prob(x)


def test_turns_are_drawn_as_the_reference_goes_round():
    """From angle 2 to angle -2: the short way is 2 pi - 4 over the cut. Five standard errors of 20,000 draws."""
    process = ReferenceProcess(Torus(1), constant(4, sigma=2.0), start=UniformStart(Torus(1))).double()
    first = torch.full((20_000, 1), 2.0, dtype=F64)
    last = process.rejoin(first, torch.full_like(first, -2.0), generator=generator())
    turns = ((last + 2.0) / (2.0 * math.pi)).round()
    torch.testing.assert_close(last, -2.0 + 2.0 * math.pi * turns)
    steps = 2.0 * math.pi * torch.arange(-4, 5, dtype=F64) - 4.0
    chance = torch.softmax(-0.5 * steps.square() / 4.0, 0)
    share = (turns == torch.arange(-4, 5)).double().mean(0)
    assert ((share - chance).abs() <= 5.0 * (chance * (1.0 - chance) / 20_000).sqrt() + 1e-4).all()


class Extra(nn.Module):
    """The difference between the corrector of a point and that of a Gaussian start."""

    def __init__(self, process: ReferenceProcess, point: ReferenceProcess) -> None:
        super().__init__()
        self.difference = (process.restoring - point.restoring) / process.back_gain
        self.time = process.time

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        k = (t * (len(self.time) - 1)).round().long()
        return self.difference[k] * x


@pytest.mark.parametrize("space", [Euclidean(2), MeanFree(4, 2)])
def test_the_bridge_sampler_from_almost_a_point_with_the_analytic_corrector_is_adjoint_sampling(space):
    """Same seeds, same control: regression targets, losses, gradients and weights to 1e-6."""
    target = gaussian() if isinstance(space, Euclidean) else HyperplaneGaussian()
    reference = geometric(10, sigma_min=0.2, sigma_max=1.5)
    point = ReferenceProcess(space, reference, width=16, learn_variance=False).double()
    narrow = GaussianStart(space, scale=1e-9)
    bridge = ReferenceProcess(space, reference, start=narrow, width=16, learn_variance=False).double()
    perturb(point, 0.1)
    bridge.control.load_state_dict(point.control.state_dict())
    with torch.no_grad():
        point.log_variance.zero_()
    # An explicit network that turns the corrector of the reference into -x / Sigma, exactly that of a point.
    extra = Extra(bridge, point)
    bridge.corrector_control = extra
    k = torch.arange(1, 11).unsqueeze(-1)
    x = space.noise((10, 6), like=bridge.time, generator=generator())
    torch.testing.assert_close(bridge.correct(k, x), -x / point.level[k])
    losses, weights = [], []
    for process in (point, bridge):
        lesson = Matching(fresh=64, clip=None)
        rows = simulate(point, target, 64, generator=generator(1)).x
        score = target.log_prob_and_score(rows[-1])[1]
        lesson.drawn.add(torch.stack([rows[0], rows[-1], score], 1))
        process.zero_grad()
        losses.append((lesson._match_control(process, 256, generator(2), 1.0), process))
        weights.append(simulate(process, target, 64, generator=_skip(process, space)).log_weight)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    for (name, a), (_, b) in zip(point.control.named_parameters(), bridge.control.named_parameters(), strict=True):
        assert a.grad is not None and b.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=1e-6)


def _skip(process: ReferenceProcess, space: Space) -> torch.Generator:
    """A generator that gives both chains the same noise: only one of them draws where it starts."""
    g = generator(3)
    if isinstance(process.start, PointStart):
        space.noise((64,), like=process.time, generator=g)
    return g


# Optima ---------------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """The optimal control of an isotropic Gaussian target with variance ``s`` from a point, divided by the gain."""

    def __init__(self, process: ReferenceProcess, s: float) -> None:
        super().__init__()
        total = process.level[-1]
        excess = 1.0 / s - 1.0 / total
        self.slope = nn.Parameter(-(excess / (1.0 + excess * process.left)) / process.gain)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.slope[(t * (len(self.slope) - 1)).round().long()] * x


def test_the_optimal_linear_control_makes_equal_weights_as_steps_shrink():
    target = HyperplaneGaussian(4, 2, scale=0.8)
    ess, bound = [], []
    for k in (10, 40, 160):
        process = ReferenceProcess(target.space, constant(k, sigma=1.5), learn_variance=False).double()
        process.control = Linear(process, 0.64)
        log_weight = simulate(process, target, 4096, generator=generator()).log_weight
        ess.append(estimators.effective_sample_size(log_weight) / 4096)
        bound.append(target.log_normalizer - log_weight.mean().item())
    assert ess[0] < ess[1] < ess[2]
    assert 1.0 - ess[2] < 0.3 * (1.0 - ess[1]) < 0.1
    # The gap of the bound is of first order in the step.
    assert bound[1] / bound[2] == pytest.approx(4.0, rel=0.35)


def test_learned_variances_make_the_linear_optimum_exact_for_any_step():
    """The transitions of the optimum have the reference's means and these variances: every weight is Z."""
    target = HyperplaneGaussian(4, 2, scale=0.8)
    process = ReferenceProcess(target.space, constant(6, sigma=1.5)).double()
    process.control = Linear(process, 0.64)
    total, level, left, v = 2.25, process.level, process.left, process.variance
    excess = 1.0 / 0.64 - 1.0 / total
    inner = 1.0 / (1.0 / left[:-1] + excess)
    ratio = left[1:] / left[:-1] + v / left[:-1].square() * inner
    with torch.no_grad():
        process.log_variance.copy_(4.0 * torch.atanh(ratio.log() / 4.0))
    assert level[-1].item() == pytest.approx(total, rel=1e-6)
    log_weight = simulate(process, target, 256, generator=generator()).log_weight
    torch.testing.assert_close(log_weight, torch.full_like(log_weight, target.log_normalizer), atol=1e-4, rtol=0.0)


def test_matching_has_the_optimal_control_as_its_fixed_point():
    """At the optimum the mean of the regression targets is the control: no gradient within five standard errors."""
    target = HyperplaneGaussian(4, 2, scale=0.8)
    process = ReferenceProcess(target.space, constant(8, sigma=1.5)).double()
    process.control = Linear(process, 0.64)
    end = target.sample(200_000, generator=generator())
    k = torch.randint(8, (200_000,), generator=generator(1))
    x = process.sample_bridge(k, end, generator=generator(2))
    with torch.no_grad():
        target_score = -end / 0.64 - process.terminal_corrector(end)
        error = ((process.steer(k, x) - target_score) * x).sum(-1)
        bridge = ((process.steer(k, x) - (end - x) / process.left[k]) * x).sum(-1)
    for step in range(8):
        assert abs(deviation(error[k == step], 0.0)) < 5.0
        assert abs(deviation(bridge[k == step], 0.0)) < 5.0


def test_the_stationary_reference_needs_no_corrector():
    """The preserving reference from its own law has marginals of that law: h is that of the start, -x / s^2."""
    space = Euclidean(2)
    reference = variance_preserving(10, scale=1.3)
    process = ReferenceProcess(space, reference, start=GaussianStart(space, scale=1.3)).double()
    x = torch.randn(5, 2, generator=generator(), dtype=F64)
    for k in (1, 5, 10):
        torch.testing.assert_close(process.correct(torch.tensor(k), x), -x / 1.69, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["asbs", "preserving", "harmonic"])
def test_the_way_back_starts_as_the_exact_reversal_of_the_reference(kind):
    """Isotropic starts: with zero control both path laws agree but for the target, a function of the end alone."""
    space = MeanFree(4, 2)
    process = process_of(kind, space, 6).double()
    path = simulate(process, HyperplaneGaussian(), 256, generator=generator())
    ratio = (path.log_backward - path.log_forward).sum(0) - path.log_initial
    reach, level = process.reach[-1], process.level[-1]
    if kind == "harmonic":
        # Backward variances must be isotropic on mean-free particles: close, not exact.
        assert ratio.isfinite().all()
        return
    variance = reach.square() * process.start.variances + level
    end = path.x[-1]
    torch.testing.assert_close(ratio, -space.log_gaussian(end, torch.zeros_like(end), variance), atol=1e-4, rtol=0.0)


# Lessons --------------------------------------------------------------------------------------------------------------


def test_scores_are_clipped_by_particle():
    v = torch.tensor([[3.0, 4.0, 0.3, 0.4, -3.3, -4.4]])
    free = clip_vectors(MeanFree(3, 2), v, 1e9)
    torch.testing.assert_close(free, v)
    short = clip_vectors(MeanFree(3, 2), v, 1.0)
    assert short.sum() == pytest.approx(0.0, abs=1e-6)
    one = torch.tensor([[0.6, 0.8, 0.3, 0.4, -0.6, -0.8]])
    torch.testing.assert_close(short, MeanFree(3, 2).project(one))
    torch.testing.assert_close(clip_vectors(Torus(2), torch.tensor([3.0, -0.5]), 1.0), torch.tensor([1.0, -0.5]))
    torch.testing.assert_close(clip_vectors(Euclidean(2), torch.tensor([3.0, 4.0]), 1.0), torch.tensor([0.6, 0.8]))


def test_tempering_leaves_the_share_that_was_asked_for():
    log_weight = 3.0 * torch.randn(2000, generator=generator(), dtype=F64)
    tempered = temper_to_share(log_weight, 0.3)
    assert estimators.effective_sample_size(tempered) / 2000 == pytest.approx(0.3, abs=1e-3)
    flat = 0.1 * log_weight
    assert torch.equal(temper_to_share(flat, 0.3), flat)


@pytest.mark.parametrize("reweight", [None, 0.3])
def test_adjoint_sampling_learns_a_mixture(reweight):
    target = mixture()
    lesson = Matching(fresh=256, every=25, clip=None, reweight=reweight)
    sampler = AdjointSampling(target, num_steps=20, sigma_min=0.2, sigma_max=1.6, lesson=lesson, width=32)
    before = estimators.effective_sample_size(sampler.sample(2000).log_weight) / 2000
    sampler.fit(steps=300, batch_size=256, learning_rate=5e-3)
    particles = sampler.sample(4000)
    ess = estimators.effective_sample_size(particles.log_weight) / 4000
    assert ess > 0.9 > 0.7 > before
    assert abs(deviation(particles.log_weight.exp(), math.exp(target.log_normalizer))) < 4.0
    # One gradient a fresh end point: 12 rounds and the first, plus those two batches of draws.
    assert sampler.evaluations == 13 * 256 + 6000


def test_draws_of_another_sampler_stand_in_for_resampled_ends():
    target = mixture()
    bank = target.sample(4000, generator=generator())
    lesson = Matching(fresh=64, every=50, clip=None, bank=bank)
    sampler = AdjointSampling(target, num_steps=20, sigma_min=0.2, sigma_max=1.6, lesson=lesson, width=32)
    sampler.fit(steps=300, batch_size=256, learning_rate=5e-3)
    particles = sampler.sample(4000)
    assert estimators.effective_sample_size(particles.log_weight) / 4000 > 0.9
    assert abs(deviation(particles.log_weight.exp(), math.exp(target.log_normalizer))) < 4.0
    # Seven rounds of fresh end points, one gradient for each point of the bank, and the draws.
    assert sampler.evaluations == 7 * 64 + 4000 + 4000
    with pytest.raises(ValueError, match="Expected a process from a point for a bank"):
        ASBS(target, lesson=Matching(bank=bank)).fit(steps=1)
    for options in ({"bank": bank[0]}, {"bank": bank, "reweight": 0.3}):
        with pytest.raises(ValueError, match="Expected a bank of shape"):
            Matching(**options)


@pytest.mark.parametrize("stages", [None, Stages(60, 30)])
def test_the_bridge_sampler_learns_a_mixture(stages):
    target = mixture()
    lesson = Matching(fresh=256, every=25, clip=None, stages=stages)
    sampler = ASBS(target, num_steps=20, scale=1.0, sigma_min=0.2, sigma_max=1.2, lesson=lesson, width=32)
    before = estimators.effective_sample_size(sampler.sample(2000).log_weight) / 2000
    sampler.fit(steps=400, batch_size=256, learning_rate=5e-3)
    particles = sampler.sample(4000)
    ess = estimators.effective_sample_size(particles.log_weight) / 4000
    assert ess > 0.85 > before
    assert abs(deviation(particles.log_weight.exp(), math.exp(target.log_normalizer))) < 4.0


def test_angles_are_learned():
    target = VonMises(2, kappa=1.0)
    sampler = AdjointSampling(target, num_steps=20, lesson=Matching(fresh=256, every=25, clip=None), width=32)
    sampler.fit(steps=300, batch_size=256, learning_rate=5e-3)
    particles = sampler.sample(4000)
    # Steps of finite size leave 84 percent; three times as many 94.
    assert estimators.effective_sample_size(particles.log_weight) / 4000 > 0.75
    assert particles.x.abs().max() <= math.pi + 1e-6
    assert abs(deviation(particles.log_weight.exp(), math.exp(target.log_normalizer))) < 4.0


def test_the_bridge_sampler_learns_angles_and_a_line():
    target = Hinge()
    reference = product(variance_preserving(20, beta_start=8.0), geometric(20, sigma_min=0.1, sigma_max=1.5))
    lesson = Matching(fresh=256, every=25, clip=None, reweight=0.3)
    sampler = ASBS(target, num_steps=20, reference=reference, lesson=lesson, width=32)
    sampler.fit(steps=300, batch_size=256, learning_rate=5e-3)
    particles = sampler.sample(4000)
    assert estimators.effective_sample_size(particles.log_weight) / 4000 > 0.8
    assert abs(deviation(particles.log_weight.exp(), math.exp(target.log_normalizer))) < 4.0


def test_other_losses_train_the_same_chain():
    target = gaussian()
    sampler = AdjointSampling(target, num_steps=8, sigma_min=0.2, sigma_max=1.6, width=16, objective=LogVariance())
    sampler.fit(steps=60, batch_size=128, learning_rate=5e-3)
    history = sampler.history
    assert history[-1]["ess"] > history[0]["ess"]


def network(seed: int = 0) -> EquivariantGraphNetwork:
    return EquivariantGraphNetwork(4, 2, generator=generator(seed), width=8, depth=1, radial=4)


def make(kind: str) -> ds.sampler.DiffusionSampler:
    target = HyperplaneGaussian()
    if kind == "as":
        lesson = Matching(fresh=64, every=7, capacity=100, reweight=0.3)
        return AdjointSampling(target, num_steps=5, control=network(), lesson=lesson)
    stages = Stages(4, 3)
    lesson = Matching(fresh=64, every=7, capacity=100, stages=stages)
    return ASBS(target, num_steps=5, control=network(), corrector=network(1), lesson=lesson)


@pytest.mark.parametrize("kind", ["as", "asbs"])
def test_resumed_runs_repeat_uninterrupted_ones_bit_for_bit(kind, tmp_path):
    whole = make(kind).fit(steps=30, batch_size=32)

    class Stop(Exception):
        pass

    def interrupt(entry: dict[str, float]) -> None:
        if entry["step"] == 20:
            raise Stop

    options = {"steps": 30, "batch_size": 32, "checkpoint": tmp_path, "checkpoint_every": 10}
    with pytest.raises(Stop):
        make(kind).fit(**options, callback=interrupt)
    resumed = make(kind).fit(**options, resume=True)
    for a, b in zip(whole.process.parameters(), resumed.process.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(whole.sample(50).log_weight, resumed.sample(50).log_weight)


# Errors ---------------------------------------------------------------------------------------------------------------


def test_what_would_train_something_else_is_refused():
    target = gaussian()
    with pytest.raises(ValueError, match="Expected a reference without drift"):
        AdjointSampling(target, reference=variance_preserving(5))
    with pytest.raises(ValueError, match="without contraction on a torus"):
        ReferenceProcess(Torus(2), variance_preserving(5))
    with pytest.raises(ValueError, match="on a torus use the point start"):
        GaussianStart(Torus(2))
    with pytest.raises(ValueError, match="Expected angles for a uniform start"):
        UniformStart(Euclidean(2))
    with pytest.raises(ValueError, match="Expected a reference for 1 factors; got one for 2"):
        ReferenceProcess(Euclidean(2), product(constant(3), constant(3)))
    with pytest.raises(ValueError, match="references over the same times"):
        product(constant(3), constant(4))
    with pytest.raises(ValueError, match="no corrector to train"):
        AdjointSampling(target, lesson=Matching(stages=Stages(1, 1))).fit(steps=1)
    with pytest.raises(ValueError, match="Expected a ReferenceProcess"):
        ds.DIS(target).fit(steps=1, lesson=Matching())
    with pytest.raises(ValueError, match="Expected a start law on"):
        ReferenceProcess(Euclidean(2), constant(3), start=PointStart(Euclidean(3)))
    for options in ({"fresh": 1}, {"clip": 0.0}, {"reweight": 1.0}, {"stages": Stages(0, 1)}, {"capacity": 0}):
        with pytest.raises(ValueError, match="Expected"):
            Matching(**options)
