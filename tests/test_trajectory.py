"""Exactness of the weights: every process, every state of training, every number of steps, every space.

All statistical tests fix their seeds; a limit of 4 standard errors is a false alarm with probability 6e-5 per case when
the code changes. Two statements are tested: the mean weight is the normalizing constant, and the crossing of forward
and backward log weights (bounded, so the Gaussian limit also holds for strongly perturbed processes, whose weights
have heavy tails).
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import (
    EUCLIDEAN,
    F64,
    MAKERS,
    TORUS,
    HyperplaneGaussian,
    VonMises,
    crossing,
    deviation,
    perturb,
    torus_process,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffsampler import estimators, targets
from diffsampler.methods.dis import DISProcess
from diffsampler.objective import LogVariance, ReverseKL
from diffsampler.process import Process
from diffsampler.schedule import variance_preserving
from diffsampler.space import Euclidean, Space
from diffsampler.target import Target
from diffsampler.training import Recipe, fit
from diffsampler.trajectory import Trajectory, cat, chunks, log_kernels, simulate, simulate_backward

LIMIT = 4.0
STATES = ("untrained", "perturbed", "trained")


def prepare(process: Process, target: Target, state: str) -> Process:
    process = process.double()
    if state == "perturbed":
        perturb(process, 0.1)
    if state == "strongly perturbed":
        perturb(process, 0.3)
    if state == "trained":
        objective = ReverseKL() if process.learns_shift else LogVariance()
        fit(process, target, objective, Recipe(steps=12, batch_size=64, learning_rate=1e-2))
    return process


def log_weights(process: Process, target: Target, n: int, *, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Log weights relative to the true constant, of forward paths and of backward paths from exact samples."""
    generator = torch.Generator().manual_seed(seed)
    assert target.log_normalizer is not None
    forward = simulate(process, target, n, generator=generator).log_weight
    x = target.sample(n, generator=generator)
    backward = simulate_backward(process, target, x, generator=generator).log_weight
    return forward - target.log_normalizer, backward - target.log_normalizer


def assert_exact(forward: Tensor, backward: Tensor) -> None:
    assert abs(deviation(forward.exp(), 1.0)) < LIMIT
    assert abs(crossing(forward, backward)) < LIMIT
    # Bounds hold in expectation; a one-sided 4 standard errors is a false alarm of 3e-5.
    assert deviation(forward, 0.0) < LIMIT
    assert deviation(backward, 0.0) > -LIMIT


CASES = [("gaussian", 3), ("mixture", 10), ("mixture", 50)]


@pytest.mark.parametrize(("density", "num_steps"), CASES)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", MAKERS)
def test_mean_weight_is_the_normalizer(name: str, density: str, state: str, num_steps: int):
    target = EUCLIDEAN[density]()
    process = prepare(MAKERS[name](target.space, num_steps), target, state)
    assert_exact(*log_weights(process, target, 3000 if num_steps < 50 else 1000))


@pytest.mark.parametrize("num_steps", [3, 10])
@pytest.mark.parametrize("name", MAKERS)
def test_forward_and_backward_paths_cross_at_the_normalizer(name: str, num_steps: int):
    target = EUCLIDEAN["mixture"]()
    process = prepare(MAKERS[name](target.space, num_steps), target, "strongly perturbed")
    assert abs(crossing(*log_weights(process, target, 10000))) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("density", EUCLIDEAN)
@pytest.mark.parametrize("name", MAKERS)
def test_mean_weight_is_the_normalizer_closely(name: str, density: str, state: str):
    target = EUCLIDEAN[density]()
    process = prepare(MAKERS[name](target.space, 50), target, state)
    assert_exact(*log_weights(process, target, 40000, seed=2))


@pytest.mark.parametrize("num_steps", [6])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", MAKERS)
def test_mean_weight_on_mean_free_particles(name: str, state: str, num_steps: int):
    target = HyperplaneGaussian(4, 2, scale=1.0)
    process = prepare(MAKERS[name](target.space, num_steps), target, state)
    assert_exact(*log_weights(process, target, 4000))


@pytest.mark.parametrize("num_steps", [6])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", TORUS)
def test_mean_weight_on_a_torus(name: str, state: str, num_steps: int):
    target = VonMises(2)
    process = prepare(torus_process(name, num_steps), target, state)
    assert_exact(*log_weights(process, target, 3000))


# Negative controls


@pytest.mark.parametrize(("factor", "caught"), [(1.0, False), (1.05, True), (1.0 / 1.05, True)])
def test_a_variance_wrong_by_five_percent_is_caught(factor: float, caught: bool):
    target = targets.Gaussian([0.0, 0.0], scale=1.3)
    process = DISProcess(target.space, variance_preserving(50), scale=1.3, width=16).double()
    honest = simulate(process, target, 4000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean, variance = process(torch.arange(50).unsqueeze(-1), honest.x[:-1], honest.score[:-1])
    log_forward = target.space.log_gaussian(honest.x[1:], mean, factor * variance)
    found = abs(deviation(replace(honest, log_forward=log_forward).log_weight.exp(), 1.0))
    # The mean moves by half the squared error per step and coordinate, 50 steps: +12%.
    assert found > 10.0 if caught else found < LIMIT


def test_continuous_time_weights_are_caught():
    """The divergence formula on the Euler chain of the variance-preserving process, with its exact optimal control."""
    num_steps, dim, scale, mean, n = 20, 2, 0.5, 1.0, 20000
    generator = torch.Generator().manual_seed(0)
    dt = 1.0 / num_steps
    beta = 10.0 + (0.1 - 10.0) * torch.arange(num_steps, dtype=F64) * dt
    # The noising time left at each grid point, in units of accumulated rate.
    left = (beta * dt).flip(0).cumsum(0).flip(0)
    shrink = torch.exp(-0.5 * left)
    variance = shrink.square() * scale**2 + 1.0 - shrink.square()
    x = torch.randn(n, dim, generator=generator, dtype=F64)
    continuous = -_log_normal(x, torch.zeros(dim, dtype=F64), torch.tensor(1.0, dtype=F64))
    exact = continuous.clone()
    for k in range(num_steps):
        noise = torch.randn(n, dim, generator=generator, dtype=F64)
        control = beta[k].sqrt() * (shrink[k] * mean - x) / variance[k]
        after = x + (0.5 * beta[k] * x + beta[k].sqrt() * control) * dt + (beta[k] * dt).sqrt() * noise
        step = 0.5 * control.square().sum(-1) * dt - 0.5 * dim * beta[k] * dt
        continuous = continuous - step - (control * noise).sum(-1) * math.sqrt(dt)
        forward = _log_normal(after, x + (after - x - (beta[k] * dt).sqrt() * noise), beta[k] * dt)
        exact = exact + _log_normal(x, after - 0.5 * beta[k] * after * dt, beta[k] * dt) - forward
        x = after
    terminal = _log_normal(x, torch.full((dim,), mean, dtype=F64), torch.tensor(scale**2, dtype=F64))
    assert abs(deviation((exact + terminal).exp(), 1.0)) < LIMIT
    assert abs(deviation((continuous + terminal).exp(), 1.0)) > 8.0


def _log_normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return (-0.5 * (x - mean).square() / variance - 0.5 * (2.0 * math.pi * variance).log()).sum(-1)


# Perfect reversal


@pytest.mark.parametrize("name", [name for name in MAKERS if name.startswith("dis")])
@pytest.mark.parametrize("space", [Euclidean(3), HyperplaneGaussian().space])
def test_uncontrolled_reversal_of_a_gaussian_has_constant_weights(name: str, space: Space):
    process = MAKERS[name](space, 20).double()
    constant = 0.3 + 0.5 * space.dof * math.log(2.0 * math.pi * 1.3**2)
    target = Target.from_log_prob(
        lambda x: 0.3 - 0.5 * space.project(x).square().sum(-1) / 1.3**2, space=space, log_normalizer=constant
    )
    if "exploding" in name:
        # The chain starts from the noised target itself, so the end of the noising needs no limit.
        assert float(process.total_noise[0]) > 1.0
    log_weight = simulate(process, target, 500, generator=torch.Generator().manual_seed(0)).log_weight
    assert float(log_weight.var()) < 1e-8
    assert abs(float(log_weight.mean()) - constant) < 1e-5


# The record


def make(name: str, *, num_steps: int = 7, n: int = 6) -> Trajectory:
    target = EUCLIDEAN["mixture"]()
    process = perturb(MAKERS[name](target.space, num_steps).double(), 0.2)
    return simulate(process, target, n, generator=torch.Generator().manual_seed(3))


@given(st.sets(st.integers(1, 6)), st.sampled_from(list(MAKERS)), st.booleans())
@settings(max_examples=40)
def test_segments_sum_to_the_log_weight(cuts: set[int], name: str, backward: bool):
    trajectory = make(name)
    if backward:
        target = EUCLIDEAN["mixture"]()
        process = perturb(MAKERS[name](target.space, 7).double(), 0.2)
        end = process.point(trajectory.x[-1])
        trajectory = simulate_backward(process, target, end, generator=torch.Generator().manual_seed(0))
    edges = [0, *sorted(cuts), 7]
    total = sum(trajectory.segment_log_weight(a, b) for a, b in zip(edges, edges[1:], strict=False))
    assert torch.allclose(total, trajectory.log_weight, rtol=0.0, atol=1e-9)


def test_segments_of_anchored_processes_refer_to_the_anchors():
    trajectory = make("cmcd")
    assert trajectory.log_anchor is not None and trajectory.log_anchor.shape == (8, 6)
    ratio = (trajectory.log_backward - trajectory.log_forward)[2:5].sum(0)
    expected = trajectory.log_anchor[5] - trajectory.log_anchor[2] + ratio
    assert torch.allclose(trajectory.segment_log_weight(2, 5), expected, atol=1e-12)
    assert torch.allclose(trajectory.log_anchor[0], trajectory.log_initial, atol=1e-12)
    assert torch.allclose(trajectory.log_anchor[-1], trajectory.log_terminal, atol=1e-12)
    assert make("pis").log_anchor is None


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 2), (0, 8)])
def test_segments_refuse_bad_ends(start: int, stop: int):
    with pytest.raises(ValueError, match=f"Expected 0 <= start < stop <= 7; got {start} and {stop}"):
        make("pis").segment_log_weight(start, stop)


@pytest.mark.parametrize("name", MAKERS)
def test_record_holds_what_the_process_says(name: str):
    target = EUCLIDEAN["mixture"]()
    process = perturb(MAKERS[name](target.space, 5), 0.2)
    trajectory = simulate(process, target, 9, generator=torch.Generator().manual_seed(0))
    width = process.sample_initial(1).shape[-1]
    assert trajectory.on_policy and trajectory.num_steps == 5 and trajectory.x.shape == (6, 9, width)
    assert trajectory.x.dtype == torch.float32 and trajectory.log_forward.dtype == trajectory.log_weight.dtype == F64
    assert not any(value.requires_grad for value in vars(trajectory).values() if isinstance(value, Tensor)), (
        "a detached trajectory must not carry a graph"
    )
    assert (trajectory.score is not None) == process.needs_score
    score = [None] * 6 if trajectory.score is None else trajectory.score
    with torch.no_grad():
        for k in range(5):
            step, before = torch.tensor(k), trajectory.x[k]
            after = process.unshift(step, trajectory.x[k + 1])
            f = process(step, before, score[k])
            b = process.backward(step, after, score[k if process.has_shift else k + 1])
            log_f = process.drawn_space.log_gaussian(process.drawn(after), *f)
            log_b = process.drawn_space.log_gaussian(process.drawn(before), *b)
            assert torch.allclose(log_f, trajectory.log_forward[k], atol=1e-4, rtol=1e-5)
            assert torch.allclose(log_b, trajectory.log_backward[k], atol=1e-4, rtol=1e-5)
        end = trajectory.x[-1]
        log_terminal = target.log_prob(process.point(end)).double() + process.log_carried(end, score[-1])
        assert torch.allclose(log_terminal, trajectory.log_terminal)
        assert torch.allclose(trajectory.log_initial, process.log_initial(trajectory.x[0]))


def test_backward_paths_end_where_they_were_told():
    target = EUCLIDEAN["mixture"]()
    process = MAKERS["dds"](target.space, 5)
    x = target.sample(4, generator=torch.Generator().manual_seed(0)).float()
    trajectory = simulate_backward(process, target, x, generator=torch.Generator().manual_seed(0))
    assert torch.equal(trajectory.x[-1], x) and not trajectory.on_policy
    assert not trajectory.log_forward.requires_grad


def test_select_and_cat_are_inverse():
    trajectory = make("cmcd")
    mask = torch.tensor([True, False, True, True, False, False])
    joined = cat(trajectory.select(mask), trajectory.select(~mask))
    order = torch.cat([mask.nonzero(), (~mask).nonzero()]).flatten()
    for name, value in vars(trajectory.select(order)).items():
        other = getattr(joined, name)
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other
    assert not cat(trajectory, simulate_again(trajectory)).on_policy
    assert cat(trajectory, make("pis")).log_anchor is None


def simulate_again(trajectory: Trajectory) -> Trajectory:
    target = EUCLIDEAN["mixture"]()
    process = MAKERS["cmcd"](target.space, 7).double()
    return simulate_backward(process, target, trajectory.x[-1], generator=torch.Generator().manual_seed(0))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 200))
def test_chunks_cover_every_pair_once(num_steps: int, batch: int, rows: int):
    seen = torch.zeros(num_steps, batch)
    for steps, particles in chunks(num_steps, batch, rows):
        seen[steps, particles] += 1
        assert seen[steps, particles].numel() <= max(rows, 1)
    assert bool((seen == 1).all())


def test_blocks_of_kernels_equal_one_block():
    trajectory = make("cmcd_local")
    target = EUCLIDEAN["mixture"]()
    process = perturb(MAKERS["cmcd_local"](target.space, 7).double(), 0.2)
    with torch.no_grad():
        log_f, log_b = log_kernels(process, trajectory.x, trajectory.score, slice(2, 6), slice(1, 4))
    assert log_f is not None and log_b is not None
    assert torch.allclose(log_f, trajectory.log_forward[2:6, 1:4], atol=1e-10)
    assert torch.allclose(log_b, trajectory.log_backward[2:6, 1:4], atol=1e-10)


@pytest.mark.parametrize("name", ["pis", "cmcd_local"])
def test_large_batches_are_evaluated_in_blocks_alike(name: str, monkeypatch: pytest.MonkeyPatch):
    whole = make(name, n=20)
    monkeypatch.setattr("diffsampler.trajectory.CHUNK_ROWS", 13)
    cut = make(name, n=20)
    assert torch.equal(whole.x, cut.x)
    assert torch.allclose(whole.log_weight, cut.log_weight, atol=1e-10)


def test_float32_weights_agree_with_float64():
    target = EUCLIDEAN["gaussian"]()
    process = perturb(MAKERS["dis_exploding"](target.space, 20), 0.1)
    single = simulate(process, target, 4000, generator=torch.Generator().manual_seed(0)).log_weight
    # 4 standard errors, false alarm 6e-5; rounding of float32 states is far below that.
    assert abs(deviation((single - 0.7).exp(), 1.0)) < LIMIT
    assert estimators.effective_sample_size(single) > 400
