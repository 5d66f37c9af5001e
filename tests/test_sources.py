"""Sources of paths: whatever they draw, log densities are those of the chain, and what they remember survives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import F64, MAKERS, crossing, gaussian, mixture, perturb

from diffsampler import targets
from diffsampler.methods.cmcd import CMCD
from diffsampler.methods.dis import DIS
from diffsampler.methods.gfn import DGFS, GFN
from diffsampler.objective import (
    DetailedBalance,
    LogVariance,
    SubTrajectoryBalance,
    SubTrajectoryLogVariance,
    TrajectoryBalance,
    segment_edges,
)
from diffsampler.replay import LocalSearch, Memory, RankPriority, Replay, WeightPriority
from diffsampler.sources import Draw, Exploratory, OnPolicy, Source, Stored
from diffsampler.space import Euclidean
from diffsampler.trajectory import log_kernels, simulate, simulate_backward


def use(name: str = "dds", *, progress: float = 0.0, seed: int = 0) -> Draw:
    process = perturb(MAKERS[name](Euclidean(2), 5).double(), 0.2)
    return Draw(process, mixture(), torch.Generator().manual_seed(seed), progress)


def filled(source: Source, given: Draw, n: int = 64) -> Source:
    source.learn(OnPolicy().draw(n, given), given)
    return source


SOURCES = {
    "on policy": lambda given: OnPolicy(),
    "exploratory": lambda given: Exploratory(inflation=0.8),
    "stored": lambda given: Stored(mixture().sample(20, generator=given.generator)),
    "replay": lambda given: filled(Replay(fewest=10), given),
    "local search": lambda given: filled(LocalSearch(every=1, chains=16, moves=4), given),
}


@pytest.mark.parametrize("process", ["dds", "cmcd", "dgfs"])
@pytest.mark.parametrize("name", SOURCES)
def test_weights_of_every_source_are_those_of_the_chain(name: str, process: str):
    """Formula (W) recomputed from the states alone: exploration noise and buffers never enter."""
    given = use(process)
    source = SOURCES[name](given)
    assert source.ready
    path = source.draw(12, given)
    blocks = slice(0, 5), slice(0, 12)
    with torch.no_grad():
        log_f, log_b = log_kernels(given.process, path.x, path.score, *blocks)
        expected = mixture().log_prob(path.x[-1]) + (log_b - log_f).sum(0) - given.process.log_initial(path.x[0])
    assert torch.allclose(path.log_weight, expected, rtol=0.0, atol=1e-10)
    assert path.on_policy == source.on_policy
    assert path.x.shape == (6, 12, 2)


def test_exploration_spreads_and_ends():
    wide = Exploratory(inflation=2.0, until=0.5)
    start, late = wide.draw(4000, use()), wide.draw(4000, use(progress=0.6))
    same = OnPolicy().draw(4000, use(progress=0.6))
    assert torch.equal(late.x, same.x), "after the schedule's end nothing is inflated"
    assert float(start.x[-1].var()) > 1.5 * float(same.x[-1].var())


def test_exploratory_weights_would_be_biased():
    """Negative control of `on_policy`: inflated paths break the crossing of weights, the chain's own keep it.

    Both at 4 standard errors of 20,000 paths: a false alarm of 6e-5.
    """
    given = use()
    ends = mixture().sample(20_000, generator=given.generator)
    backward = simulate_backward(given.process, given.target, ends, generator=given.generator).log_weight
    chain, inflated = OnPolicy().draw(20_000, given), Exploratory(inflation=1.0).draw(20_000, given)
    assert abs(crossing(chain.log_weight, backward)) < 4.0
    assert abs(crossing(inflated.log_weight, backward)) > 10.0


def test_rank_priority_prefers_the_dense_and_ignores_scale():
    log_prob = torch.tensor([0.0, 3.0, -1.0], dtype=F64)
    chance = RankPriority(0.1).chance(log_prob, log_prob)
    assert chance.argsort(descending=True).tolist() == [1, 0, 2]
    assert torch.equal(chance, RankPriority(0.1).chance(1000.0 * log_prob, log_prob))
    even = WeightPriority(0.0).chance(log_prob, 100.0 * log_prob)
    assert torch.allclose(even, torch.full((3,), 1.0 / 3.0, dtype=F64))
    assert float(WeightPriority(1.0).chance(log_prob, log_prob)[1]) == pytest.approx(0.9362, abs=1e-4)


def test_memory_is_a_ring():
    memory = Memory(5)
    for k in range(4):
        points = torch.full((2, 3), float(k))
        memory.add(points, points[:, 0].double(), points[:, 0].double())
    assert len(memory) == 5 and memory.points[:, 0].tolist() == [1.0, 2.0, 2.0, 3.0, 3.0]


def test_local_search_climbs():
    """Points far in the tail move into the mode; the last half of the moves is kept."""
    given = use()
    search = LocalSearch(every=2, chains=32, moves=60)
    path = OnPolicy().draw(64, given)
    far = path.x.clone()
    far[-1] += 6.0
    search.learn(replace(path, x=far), given)
    assert not search.ready
    search.learn(replace(path, x=far), given)
    assert len(search.found) == 32 * 30
    start = float(mixture().log_prob(far[-1]).mean())
    assert float(search.found.log_prob.mean()) > start + 5.0


def test_sources_that_cannot_draw_yet_leave_their_share_to_the_first():
    sampler = DIS(gaussian(), num_steps=4, width=8)
    sampler.fit(steps=3, batch_size=16, sources=[(OnPolicy(), 0.5), (Replay(fewest=33), 0.5)])
    assert len(sampler.history) >= 1
    with pytest.raises(ValueError, match="first source that can draw from the start; Replay cannot"):
        sampler.fit(steps=1, batch_size=16, sources=[(Replay(), 1.0)])
    with pytest.raises(ValueError, match="Expected shares of sources > 0; got 0.0 for OnPolicy"):
        sampler.fit(steps=1, batch_size=16, sources=[(OnPolicy(), 0.0)])


@pytest.mark.parametrize("make", [lambda: Replay(fewest=16), lambda: LocalSearch(every=2, chains=8, moves=4)])
def test_resumed_training_repeats_the_uninterrupted_one(make, tmp_path):
    def run(steps: list[int], folder):
        for count in steps:
            sampler = GFN(mixture(), num_steps=4, width=8, scale=1.5)
            seen = []
            sampler.fit(
                steps=8,
                batch_size=32,
                sources=[(OnPolicy(), 0.5), (make(), 0.5)],
                checkpoint=folder,
                checkpoint_every=1,
                resume=True,
                callback=seen.append,
                spent=lambda at=count, seen=seen, s=sampler: 1.0 if stop(folder) >= at else 0.0,
            )
        return [p.detach().clone() for p in sampler.process.parameters()]

    def stop(folder) -> int:
        path = folder / "checkpoint.pt"
        return torch.load(path, weights_only=True)["state"]["step"] if path.exists() else 0

    whole = run([8], tmp_path / "whole")
    parts = run([3, 8], tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


# Objectives of parts of trajectories


def test_one_segment_is_the_whole():
    given = use("cmcd")
    path = OnPolicy().draw(50, given)
    whole = LogVariance()(path)
    assert float(SubTrajectoryLogVariance(1)(path)) == pytest.approx(float(whole), rel=1e-12)
    balance = SubTrajectoryBalance(5, decay=1e6)
    with torch.no_grad():
        balance.log_normalizers[0] = 0.3
    expected = float(TrajectoryBalance(0.3)(path).detach())
    assert float(balance(path).detach()) == pytest.approx(expected, rel=1e-4)
    assert segment_edges(10, 3) == [0, 3, 7, 10]


def test_balances_by_the_definition():
    given = use("dgfs")
    path = OnPolicy().draw(7, given)
    constants = torch.linspace(-0.4, 0.5, 5, dtype=F64)
    sub, detailed = SubTrajectoryBalance(5, decay=0.7), DetailedBalance(5)
    for objective in (sub, detailed):
        with torch.no_grad():
            objective.log_normalizers.copy_(constants)
    flow = [path.log_initial, *path.log_anchor[1:-1], path.log_terminal]
    flow = [f + c for f, c in zip(flow, [*constants, 0.0], strict=True)]
    ratio = path.log_backward - path.log_forward
    total, weights = 0.0, 0.0
    for m in range(5):
        for n in range(m + 1, 6):
            difference = flow[n] - flow[m] + ratio[m:n].sum(0)
            total += 0.7 ** (n - m) * float(difference.square().mean())
            weights += 0.7 ** (n - m)
    assert float(sub(path).detach()) == pytest.approx(0.5 * total / weights, rel=1e-10)
    steps = torch.stack([flow[k + 1] - flow[k] + ratio[k] for k in range(5)])
    assert float(detailed(path).detach()) == pytest.approx(0.5 * float(steps.square().mean()), rel=1e-10)


def test_balance_needs_anchors():
    sampler = DIS(gaussian(), num_steps=4, objective=DetailedBalance(4), width=8)
    with pytest.raises(ValueError, match="DetailedBalance needs a process with anchor densities; DISProcess has none"):
        sampler.fit(steps=1, batch_size=8)
    sampler = CMCD(gaussian(), num_steps=4, objective=DetailedBalance(3), width=8)
    with pytest.raises(ValueError, match="Expected paths of 3 steps; got 4"):
        sampler.fit(steps=1, batch_size=8)


def test_flow_function_learns_log_z():
    """Sub-trajectory balance on a Gaussian with log Z = 0.7: the learned constant gets there, the start does not."""
    sampler = DGFS(gaussian(), num_steps=8, width=32, scale=1.2)
    before = float(sampler.objective.log_normalizer.detach())
    sampler.fit(steps=250, batch_size=128, learning_rate=5e-3)
    assert abs(before - 0.7) > 0.5
    assert float(sampler.objective.log_normalizer.detach()) == pytest.approx(0.7, abs=0.1)
    particles = sampler.sample(4000)
    assert particles.log_normalizer.value == pytest.approx(0.7, abs=0.05)
    assert particles.ess > 2500


def test_sub_trajectory_losses_reach_the_schedule():
    """Anchors depend on the annealing schedule: its gradient must come through them, in blocks as in one graph."""
    from diffsampler.gradient import accumulate_gradient

    process = perturb(MAKERS["cmcd"](Euclidean(2), 6).double(), 0.1)
    path = simulate(process, mixture(), 9, generator=torch.Generator().manual_seed(0))
    objective = SubTrajectoryLogVariance(3)
    accumulate_gradient(process, objective, path, rows=4)
    blocked = process.increments.grad.clone()
    process.zero_grad()
    log_f, log_b = log_kernels(process, path.x, path.score, slice(0, 6), slice(0, 9))
    k = torch.arange(7).unsqueeze(-1)
    whole = replace(
        path,
        log_forward=log_f,
        log_backward=log_b,
        log_initial=process.log_initial(path.x[0]),
        log_anchor=process.log_anchor(k, path.x, path.log_prob),
    )
    objective(whole).backward()
    assert torch.allclose(blocked, process.increments.grad, rtol=1e-9, atol=1e-9)
    assert float(blocked.abs().max()) > 1e-6


@pytest.mark.slow
def test_local_search_finds_the_modes_that_fresh_paths_miss():
    """25 modes, trajectory balance from a narrow start; replay of searched points covers more (two runs, one seed)."""

    def covered(sources) -> int:
        target = targets.GaussianMixture.grid(25)
        sampler = GFN(target, num_steps=32, scale=5.0, point_features=64)
        sampler.fit(steps=400, batch_size=256, sources=sources, seed=1)
        x = sampler.sample(2000).x
        return len(torch.cdist(x.double(), target.means.double()).argmin(1).unique())

    fresh = covered([(OnPolicy(), 1.0)])
    searched = covered([(Exploratory(), 0.5), (LocalSearch(every=20), 0.5)])
    assert searched >= fresh and searched >= 23
