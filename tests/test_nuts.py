"""NUTS on many chains: exact at bad step sizes and from exact draws, with controls that must fail."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffsampler import baselines, targets
from diffsampler.kernel import KernelParams
from diffsampler.kernels import nuts
from diffsampler.kernels.nuts import NUTS
from diffsampler.space import Euclidean, MeanFree, Torus
from diffsampler.testing.kernel import check_kernel

F64 = torch.float64


def gaussian(x: Tensor) -> tuple[Tensor, Tensor]:
    return -0.5 * x.square().sum(-1), -x


def params(step_size: float) -> KernelParams:
    return KernelParams(torch.tensor(step_size, dtype=F64), torch.ones(1, dtype=F64))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def square_deviation(dim: int, step_size: float, *, n: int = 4000, steps: int = 6) -> float:
    """Distance of the mean square from one, in standard errors over independent coordinates, from exact draws."""
    kernel, generator = NUTS(Euclidean(dim)), torch.Generator().manual_seed(1)
    state = kernel.init(normal(n, dim), gaussian)
    for _ in range(steps):
        state, _ = kernel.step(state, gaussian, params(step_size), generator)
    square = state.x.square().flatten()
    return abs(float((square.mean() - 1.0) / (square.std() / math.sqrt(square.numel()))))


# Depths of 1 to 5, acceptances of 0.5 to 0.99. False alarm of one at 4.5 standard errors: 7e-6.
@pytest.mark.parametrize(("dim", "step_size"), [(1, 1.5), (1, 0.2), (2, 1.7), (2, 0.35), (10, 0.5), (10, 1.2)])
def test_gaussians_are_exact_at_bad_step_sizes(dim: int, step_size: float):
    assert square_deviation(dim, step_size) < 4.5


@pytest.mark.parametrize(("dim", "step_size"), [(1, 1.5), (2, 1.7), (10, 1.2)])
def test_without_the_weights_of_the_trees_it_is_wrong(monkeypatch, dim: int, step_size: float):
    monkeypatch.setattr(nuts, "_log_bias", lambda new, old: torch.zeros_like(new))
    assert square_deviation(dim, step_size) > 6.0


def test_with_a_turning_rule_that_knows_the_arrow_of_time_it_is_wrong(monkeypatch):
    monkeypatch.setattr(nuts, "_turns", lambda first, last, rho: (first * rho).sum(-1) <= 0.0)
    assert square_deviation(2, 0.35, n=8000) > 6.0


def test_slots_come_when_a_trajectory_needs_them(monkeypatch):
    runs = []
    for first in (1, 9):
        monkeypatch.setattr(nuts, "FIRST_SLOTS", first)
        kernel, generator = NUTS(Euclidean(3)), torch.Generator().manual_seed(0)
        state = kernel.init(normal(20, 3), gaussian)
        for _ in range(3):
            state, info = kernel.step(state, gaussian, params(0.05), generator)
        assert info.useful is not None and int(info.useful.max()) > 60
        runs.append(state.x)
    # Fewer slots end a call earlier, and the random numbers of the next one are others: the law is the same.
    assert runs[0].shape == runs[1].shape
    assert square_deviation(1, 0.1, n=2000, steps=3) < 4.5


def ring(x: Tensor) -> tuple[Tensor, Tensor]:
    """A curved density of two dimensions: radius N(2, 0.3^2), up to the area element."""
    radius = x.norm(dim=-1, keepdim=True)
    gap = (radius - 2.0) / 0.09
    return (-0.5 * ((radius - 2.0) / 0.3).square() - radius.log()).squeeze(-1), -gap * x / radius - x / radius.square()


def ring_draws(n: int, seed: int) -> Tensor:
    # The area element r dr cancels the factor 1 / r: the radius is normal.
    radius = 2.0 + 0.3 * normal(n, 1, seed=seed)
    direction = normal(n, 2, seed=seed + 1)
    return radius * direction / direction.norm(dim=-1, keepdim=True)


def energy_p(a: Tensor, b: Tensor, *, permutations: int = 499) -> float:
    """P-value of the energy distance between two samples of equal size, by permutation."""
    joint, n = torch.cat([a, b]), a.shape[0]
    distance = torch.cdist(joint, joint)
    generator = torch.Generator().manual_seed(0)
    signs = torch.cat([torch.ones(n, dtype=F64), -torch.ones(n, dtype=F64)])
    orders = [torch.arange(2 * n), *(torch.randperm(2 * n, generator=generator) for _ in range(permutations))]
    s = torch.stack([signs[order] for order in orders])
    values = -((s @ distance) * s).sum(-1)
    return float((values >= values[0]).double().mean())


@pytest.mark.parametrize("wrong", [False, True])
def test_exact_draws_of_a_curved_density_stay_exact(monkeypatch, wrong: bool):
    if wrong:
        monkeypatch.setattr(nuts, "_log_bias", lambda new, old: torch.zeros_like(new))
    kernel, generator = NUTS(Euclidean(2)), torch.Generator().manual_seed(3)
    state = kernel.init(ring_draws(800, 10), ring)
    for _ in range(6):
        state, _ = kernel.step(state, ring, params(0.7), generator)
    p = energy_p(state.x, ring_draws(800, 20))
    # False alarm of the exact kernel: 4e-3; the seed is fixed.
    assert p <= 0.01 if wrong else p > 0.004


@pytest.mark.parametrize("space", [Euclidean(3), MeanFree(4, 2), Torus(2)], ids=repr)
def test_conforms(space: Euclidean | MeanFree | Torus):
    # Angles run round and round without turning back: on a torus the depth ends trajectories.
    done = check_kernel(NUTS(space, max_depth=4), generator=torch.Generator().manual_seed(0), step_size=0.5)
    assert "invariance" in done


def brute_force_slots(leaf: int) -> tuple[int, list[tuple[int, int]]]:
    """Left ends and middles of the balanced subtrees that end at a leaf, by counting."""
    found, size = [], 2
    while (leaf + 1) % size == 0:
        found.append((leaf + 1 - size, leaf + 1 - size // 2))
        size *= 2
    return bin(leaf // 2).count("1"), found


def test_slots_hold_the_left_ends_of_the_subtrees_that_a_leaf_completes():
    # Velocities that name their leaf: the slots read back must name the left ends, and sums the stretches between.
    slots, size = torch.full((3, 1, 6, 2), math.nan, dtype=F64), 64
    velocities = torch.stack([torch.tensor([2.0**-k, k], dtype=F64) for k in range(size)])
    for leaf in range(size):
        before, now = velocities[leaf - 1 : leaf] if leaf else velocities[:1], velocities[leaf : leaf + 1]
        rho = velocities[: leaf + 1].sum(0, keepdim=True)
        filled, _ = nuts._remember(slots, torch.tensor([leaf]), before, now, rho)
        top, subtrees = brute_force_slots(leaf)
        if leaf % 2 == 0:
            assert torch.equal(filled[0, :, top], now) and torch.equal(filled[1, :, top], rho)
        for k, (left, middle) in enumerate(subtrees):
            slot = top - k
            assert torch.equal(filled[0, 0, slot], velocities[left])
            if middle < leaf:
                assert torch.equal(filled[0, 0, slot + 1], velocities[middle])
                assert torch.equal(filled[2, 0, slot + 1], velocities[middle - 1])
        slots = filled


def test_waste_divergence_and_depth_are_reported():
    kernel, generator = NUTS(Euclidean(2), max_depth=3), torch.Generator().manual_seed(0)
    state = kernel.init(normal(50, 2), gaussian)
    _, info = kernel.step(state, gaussian, params(0.05), generator)
    assert info.useful is not None and info.evaluations == 7 and bool((info.useful <= 7).all())
    _, info = kernel.step(state, gaussian, params(0.6), generator)
    assert info.useful is not None and int(info.useful.max()) == info.evaluations
    assert float(info.useful.double().mean()) < info.evaluations
    _, info = kernel.step(state, gaussian, params(200.0), generator)
    assert info.diverged is not None and bool(info.diverged.all()) and not bool(info.nonfinite.any())
    with pytest.raises(ValueError, match="Expected max_depth in 1 .. 20; got 0"):
        NUTS(Euclidean(2), max_depth=0)


def test_sampler_of_a_correlated_posterior():
    target = targets.EightSchools(centered=False)
    sampler = baselines.NUTS(target, num_chains=32, warmup=100)
    particles = sampler.sample(3200, seed=0)
    exact = target.sample(40000, generator=torch.Generator().manual_seed(5))
    mean, error = particles.expectation(particles.x)
    limit = (error.square() + exact.var(0) / 40000).sqrt()
    # t(31) at 5 standard errors, ten coordinates: false alarm 2e-4.
    assert bool(((mean - exact.mean(0)).abs() < 5.0 * limit).all())
    assert 0.0 < sampler.lockstep_waste < 0.6 and particles.ess > 300.0
    assert sampler.evaluations % 32 == 0 and sampler.evaluations > 3200


@pytest.mark.slow
def test_agrees_with_the_nuts_of_pyro():
    from diffsampler.integrations.examples import EFFECTS, ERRORS, eight_schools_noncentered
    from diffsampler.integrations.pyro import PyroTarget

    target = PyroTarget(eight_schools_noncentered, torch.tensor(EFFECTS), torch.tensor(ERRORS))
    theirs = baselines.PyroNUTS(target, num_chains=4, warmup_steps=200).sample(1200, seed=0)
    for sampler in (baselines.NUTS(target, warmup=200, compile="on"), baselines.ChEES(target, warmup=200)):
        ours = sampler.sample(12800, seed=0)
        for power in (1, 2):
            mean, error = ours.expectation(ours.x**power)
            other = theirs.x**power
            # Their error from their smallest effective size; ten coordinates at 4.5 of it: false alarm 7e-5.
            scale = (error.square() + other.var(0) / theirs.ess).sqrt()
            assert bool(((mean - other.mean(0)).abs() < 4.5 * scale).all())
