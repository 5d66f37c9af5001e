"""Sequential controlled Langevin: training on pieces, memory of pieces, resuming, and evidence of populations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import F64, deviation, gaussian, mixture, perturb
from torch import Tensor

import diffsampler as ds
from diffsampler.gradient import accumulate_gradient
from diffsampler.kernels.langevin import MALA
from diffsampler.methods.scld import SCLD, Pieces, SegmentMemory
from diffsampler.objective import (
    ForwardKL,
    LogVariance,
    ReverseKL,
    SubTrajectoryLogVariance,
    TrajectoryBalance,
    VarGrad,
)
from diffsampler.population import populate, stretches
from diffsampler.replay import WeightPriority
from diffsampler.sources import Draw
from diffsampler.trajectory import log_kernels


class Stop(Exception):
    """Stands for a kill in the middle of training."""


def small(**options: Any) -> SCLD:
    return SCLD(mixture(), num_steps=6, segments=3, scale=1.4, width=8, capacity=60, num_islands=4, **options)


def parameters(sampler: SCLD) -> list[Tensor]:
    return [p.detach().clone() for p in sampler.process.parameters()]


@pytest.mark.parametrize("options", [{}, {"replay_share": 0.0}, {"num_moves": 0}, {"kernel": "mala"}])
def test_resuming_repeats_the_uninterrupted_run_bit_for_bit(options: dict[str, Any], tmp_path: Path):
    if "kernel" in options:
        options = {"kernel": MALA(mixture().space), "num_moves": 2}

    def stop(entry: dict[str, float]) -> None:
        if entry["step"] >= 20:
            raise Stop

    settings: dict[str, Any] = {"steps": 26, "batch_size": 24, "seed": 3}
    whole = small(**options).fit(**settings)
    with pytest.raises(Stop):
        small(**options).fit(**settings, checkpoint=tmp_path, checkpoint_every=7, callback=stop)
    resumed = small(**options).fit(**settings, checkpoint=tmp_path, checkpoint_every=7, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(parameters(whole), parameters(resumed), strict=True))
    # Step sizes, metrics and memories too: sampling uses the former.
    a, b = whole.sample(40, seed=4), resumed.sample(40, seed=4)
    assert torch.equal(a.x, b.x) and torch.equal(a.log_weight, b.log_weight)
    for one, other in zip(whole.lesson.memories, resumed.lesson.memories, strict=True):
        assert torch.equal(one.log_weight[: len(one)], other.log_weight[: len(other)]) and len(one) == len(other)


def test_other_pieces_are_another_configuration(tmp_path: Path):
    small().fit(steps=2, batch_size=8, checkpoint=tmp_path)
    other = SCLD(mixture(), num_steps=6, segments=2, scale=1.4, width=8, capacity=60, num_islands=4)
    with pytest.raises(ValueError, match="lesson: checkpoint"):
        other.fit(steps=2, batch_size=8, checkpoint=tmp_path, resume=True)


def test_training_tunes_and_helps():
    target = gaussian()
    sampler = SCLD(target, num_steps=8, segments=2, scale=3.0, width=16, num_islands=32)
    before = torch.cat([p.lower_bound for p in sampler.populations(4096)]).mean()
    sampler.fit(steps=80, batch_size=64, learning_rate=5e-3)
    after = torch.cat([p.lower_bound for p in sampler.populations(4096)]).mean()
    assert target.log_normalizer is not None
    assert float(before) < float(after) - 0.3 and float(after) < target.log_normalizer + 0.02
    assert sampler.chain.sample(2000).elbo < target.log_normalizer + 0.05
    assert 0.5 < min(sampler.populations(512)[0].acceptance) < 0.95
    assert sampler.lesson.moves is not None and sampler.lesson.moves.steps[0].updates == 80
    assert sampler.evaluations > 80 * 32 * 8 and len(sampler.history) > 2


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_evidence_after_training_is_unbiased(threshold: float):
    """400 islands of 16 at 4 standard errors: a false alarm of 6e-5 per case; tuned moves are frozen."""
    target = mixture()
    sampler = SCLD(target, num_steps=6, segments=3, scale=1.4, width=8, num_islands=400, resample_below=threshold).fit(
        steps=15, batch_size=32, learning_rate=1e-2
    )
    perturb(sampler.process, 0.1)
    particles = sampler.sample(6400, seed=2)
    assert target.log_normalizer is not None and particles.replicates == 400
    assert abs(deviation((particles.log_replicates - target.log_normalizer).exp(), 1.0)) < 4.0
    mean, error = particles.expectation(particles.x)
    truth = torch.tensor([-0.9 * 0.4 + 0.8 * 0.6, 0.36], dtype=F64)
    assert float(((mean - truth).abs() / error).max()) < 4.5


# Memory


def path_of(sampler: SCLD, n: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    return populate(sampler.lesson.pieces, mixture(), n, generator=generator, keep=True).pieces


def test_memory_is_a_ring_of_paths():
    sampler, memory = small(), SegmentMemory(10)
    for seed in range(3):
        memory.add(path_of(sampler, 4, seed)[1])
    assert len(memory) == 10
    expected = torch.cat([path_of(sampler, 4, s)[1].log_weight for s in range(3)])[-10:]
    assert torch.equal(memory.log_weight.sort().values, expected.sort().values)
    memory.add(path_of(sampler, 16, 9)[1])
    assert torch.equal(memory.log_weight.sort().values, path_of(sampler, 16, 9)[1].log_weight[-10:].sort().values)
    with pytest.raises(ValueError, match="Expected capacity >= 1; got 0"):
        SegmentMemory(0)


def test_replayed_weights_are_those_of_the_process_as_it_is():
    """Formula (W) of the piece, written out at the replayed states, after the parameters have changed."""
    sampler, memory = small(), SegmentMemory(50)
    sampler.process.double()
    memory.add(path_of(sampler, 30, 0)[1])
    stale = memory.log_weight[:30].clone()
    perturb(sampler.process, 0.2)
    piece, target = sampler.lesson.pieces[1], mixture()
    path = memory.replay(200, WeightPriority(0.0), piece, torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = torch.zeros(7, 200, 2, dtype=F64)
        whole[2:5] = path.x
        score = target.score(whole)
        log_f, log_b = log_kernels(sampler.process, whole, score, slice(2, 4), slice(0, 200))
        ends = [
            sampler.process.log_anchor(torch.tensor(k), whole[k], target.log_prob(whole[k]).double()) for k in (2, 4)
        ]
        expected = ends[1] - ends[0] + (log_b - log_f).sum(0)
    assert torch.allclose(path.log_weight, expected, atol=1e-9)
    assert not path.on_policy
    # Priorities follow what was drawn.
    assert int(((memory.log_weight[:30] - stale).abs() > 1e-6).sum()) > 20
    assert all(bool((memory.log_weight[:30] - w).abs().min() < 1e-9) for w in path.log_weight[:20])


def test_the_lesson_is_the_mean_of_the_pieces():
    sampler = small(replay_share=0.0, num_moves=0)
    use = Draw(sampler.process, mixture(), torch.Generator().manual_seed(5), 0.0)
    sampler.lesson.accumulate(LogVariance(), use, 20, weight=0.7)
    got = [p.grad.clone() for p in sampler.process.parameters() if p.grad is not None]
    sampler.process.zero_grad()
    kept = populate(
        sampler.lesson.pieces, mixture(), 20, generator=torch.Generator().manual_seed(5), resample_below=0.3, keep=True
    ).pieces
    for piece, path in zip(stretches(sampler.process, 3), kept, strict=True):
        accumulate_gradient(piece, LogVariance(), path, weight=0.7 / 3)
    expected = [p.grad.clone() for p in sampler.process.parameters() if p.grad is not None]
    assert len(got) == len(expected)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(got, expected, strict=True))


def test_half_of_a_batch_is_replayed_once_there_is_enough():
    sampler = small()
    sampler.fit(steps=1, batch_size=24)
    first = sampler.evaluations
    assert len(sampler.lesson.memories[0]) == 24
    sampler.fit(steps=1, batch_size=24)
    assert len(sampler.lesson.memories[0]) == 36
    assert sampler.evaluations - first < first


# Refusals

REFUSED: dict[str, tuple[Any, str]] = {
    "pathwise": (lambda: small(objective=ReverseKL()).fit(steps=1), "loss of weights at fixed paths.*got ReverseKL"),
    "backward": (lambda: small(objective=ForwardKL()).fit(steps=1), "from any source; got ForwardKL"),
    "constants": (
        lambda: small(objective=TrajectoryBalance()).fit(steps=1),
        "without constants of its own.*got TrajectoryBalance",
    ),
    "anchors": (lambda: small(objective=SubTrajectoryLogVariance(2)).fit(steps=1), "got SubTrajectoryLogVariance"),
    "other process": (
        lambda: small().lesson.check(small().process, LogVariance()),
        "the process that the pieces belong to",
    ),
    "all replayed": (
        lambda: Pieces(small().lesson.pieces, moves=None, replay_share=1.0),
        "replay_share in .0, 1.; got",
    ),
    "islands": (lambda: SCLD(mixture(), num_islands=0), "Expected num_islands >= 1; got 0"),
    "segments": (lambda: SCLD(mixture(), num_steps=4, segments=5), "Expected between 1 and 4 segments; got 5"),
    "nothing": (lambda: small().sample(0), "Expected n >= 1; got 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused(case: str):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_other_losses_of_weights_are_welcome():
    assert len(small(objective=VarGrad()).fit(steps=2, batch_size=8).history) == 2
    assert ds.SCLD is SCLD
