"""Training in little memory and with rates that change: the same gradients, or a refusal."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import F64, MAKERS, gaussian, mixture, perturb
from torch import Tensor

import diffsampler as ds
from diffsampler.lessons import Bridges, Paths, RampedClip
from diffsampler.methods.cmcd import CMCD
from diffsampler.methods.dds import DDS
from diffsampler.objective import (
    BridgeLikelihood,
    LogVariance,
    Objective,
    ReverseKL,
    ScoreFunctionKL,
    SubTrajectoryBalance,
    TrajectoryBalance,
    VarGrad,
)
from diffsampler.process import Process
from diffsampler.rates import Constant, Cosine, Exponential, Linear, Rate, Warmup
from diffsampler.recipes import MappedSampler
from diffsampler.sources import Draw, Exploratory, OnPolicy, Stored
from diffsampler.space import Euclidean
from diffsampler.target import Target
from diffsampler.training import Recipe, fit
from diffsampler.trajectory import Trajectory, cat, log_kernels, simulate
from diffsampler.trust_region import TrustRegion


def flat(process: Process) -> Tensor:
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in process.parameters()])
    process.zero_grad()
    return gradient


def draw(process: Process, objective: Objective, **options: Any) -> Draw:
    generator = torch.Generator().manual_seed(4)
    return Draw(process, mixture(), generator, 0.0, objective.needs_path_gradient, **options)


def joined(process: Process, sizes: list[int], *, graph: bool) -> Trajectory:
    """The paths that parts of these sizes draw, as one batch."""
    generator = torch.Generator().manual_seed(4)
    parts = [simulate(process, mixture(), n, generator=generator, path_gradient=graph) for n in sizes]
    batch = parts[0]
    for part in parts[1:]:
        batch = cat(batch, part)
    return batch


# Parts of a batch

CENTRED = {
    "log variance": LogVariance,
    "vargrad": VarGrad,
    "balance": lambda: TrajectoryBalance(0.3),
    "score function": ScoreFunctionKL,
}


@pytest.mark.parametrize("loss", CENTRED)
def test_losses_that_centre_over_the_batch_keep_their_gradient(loss: str):
    """Paths drawn in parts of 4, 4 and 2, against plain autograd of the whole batch of ten in one graph."""
    process, objective = perturb(MAKERS["cmcd"](Euclidean(2), 5).double(), 0.2), CENTRED[loss]()
    Paths([(OnPolicy(), 1.0)]).accumulate(objective, draw(process, objective, micro_batch=4), 10, weight=0.7)
    got = flat(process)
    path = joined(process, [4, 4, 2], graph=False)
    log_f, log_b = log_kernels(process, path.x, path.score, slice(0, 5), slice(0, 10))
    assert log_f is not None and log_b is not None
    ahead, back = process.log_initial(path.x[0]) + log_f.sum(0), path.log_terminal + log_b.sum(0)
    log_weight = back - ahead
    whole = {"log variance": log_weight.var(), "balance": 0.5 * (log_weight - 0.3).square().mean()}
    whole["vargrad"] = 0.5 * log_weight.var(correction=0)
    whole["score function"] = -torch.cov(torch.stack([log_weight.detach(), ahead]))[0, 1] - back.mean()
    (0.7 * whole[loss]).backward()
    expected = flat(process)
    assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12) and float(expected.abs().max()) > 1e-3


@pytest.mark.parametrize("pieces", [1, 3])
def test_pathwise_means_keep_their_gradient(pieces: int):
    process = perturb(MAKERS["cmcd"](Euclidean(2), 5).double(), 0.2)
    use = draw(process, ReverseKL(), micro_batch=4, pieces=pieces)
    taught = Paths([(OnPolicy(), 1.0)]).accumulate(ReverseKL(), use, 10, weight=0.7)
    got = flat(process)
    path = joined(process, [4, 4, 2], graph=True)
    (0.7 * ReverseKL()(path)).backward()
    expected = flat(process)
    assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12) and float(expected.abs().max()) > 1e-3
    assert taught.loss == pytest.approx(float(ReverseKL()(path).detach()), rel=1e-12)
    assert torch.allclose(taught.log_weight, path.log_weight) and not taught.log_weight.requires_grad


def test_bridges_in_parts_have_the_mean_gradient():
    process = perturb(MAKERS["dds"](Euclidean(2), 5).double(), 0.2)
    bank = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    lesson, objective = Bridges(bank), BridgeLikelihood()
    lesson.accumulate(objective, draw(process, objective, micro_batch=4), 10, weight=0.7)
    got = flat(process)
    use = draw(process, objective)
    for size in (4, 4, 2):
        lesson.accumulate(objective, use, size, weight=0.7 * size / 10)
    assert torch.allclose(got, flat(process), rtol=1e-10) and float(got.abs().max()) > 1e-3


class PathwiseVariance(Objective):
    """A loss that is no mean over paths and wants a graph along them."""

    needs_path_gradient = True
    on_policy_only = True

    def forward(self, trajectory: Trajectory) -> Tensor:
        return trajectory.log_weight.var()


REFUSED: dict[str, tuple[Any, str]] = {
    "centred and pathwise": (
        lambda: fit(MAKERS["dds"](Euclidean(2), 3), gaussian(), PathwiseVariance(), Recipe(micro_batch=8)),
        "micro_batch=None: PathwiseVariance with a path gradient is no mean over paths",
    ),
    "a lesson of its own": (
        lambda: fit(
            MAKERS["dds"](Euclidean(2), 3), gaussian(), LogVariance(), Recipe(micro_batch=8), lesson=TrustRegion()
        ),
        "micro_batch=None: TrustRegion draws what it needs at once; got 8",
    ),
    "nothing to cut": (
        lambda: fit(MAKERS["dds"](Euclidean(2), 3), gaussian(), LogVariance(), Recipe(pieces=2)),
        "Expected pieces=1: LogVariance keeps no graph along paths to be cut; got 2",
    ),
    "more pieces than steps": (
        lambda: fit(MAKERS["dds"](Euclidean(2), 3), gaussian(), ReverseKL(), Recipe(pieces=4)),
        "Expected between 1 and 3 pieces of the chain; got 4",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_the_gradient_is_refused(case: str):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("stick", [False, True])
def test_pieces_and_parts_train_resume_and_are_part_of_the_identity(stick: bool, tmp_path: Any):
    def build() -> CMCD:
        return CMCD(gaussian(), num_steps=5, width=8, scale=1.3, objective=ReverseKL(stick_landing=stick))

    settings: dict[str, Any] = {"steps": 12, "batch_size": 12, "micro_batch": 8, "pieces": 2, "checkpoint_every": 5}
    whole = build().fit(**settings)
    spent = iter([0.0] * 8 + [1.0])
    build().fit(**settings, checkpoint=tmp_path, spent=lambda: next(spent))
    resumed = build().fit(**settings, checkpoint=tmp_path, resume=True)
    # The shortened run's average was stored, not its last word: parameters agree bit for bit.
    for (name, a), b in zip(whole.process.named_parameters(), resumed.process.parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="pieces: checkpoint 2, now 1"):
        build().fit(**{**settings, "pieces": 1}, checkpoint=tmp_path, resume=True)
    other = CMCD(gaussian(), num_steps=5, width=8, scale=1.3, objective=ReverseKL(stick_landing=not stick))
    with pytest.raises(ValueError, match="sticking the landing"):
        other.fit(**settings, checkpoint=tmp_path, resume=True)


def test_mixed_sources_are_drawn_in_parts():
    process, objective = perturb(MAKERS["dds"](Euclidean(2), 4).double(), 0.1), LogVariance()
    bank = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    lesson = Paths([(OnPolicy(), 0.5), (Exploratory(), 0.25), (Stored(bank), 0.25)])
    taught = lesson.accumulate(objective, draw(process, objective, micro_batch=8), 24, weight=1.0)
    assert len(taught.log_weight) == 12, "half of each part is on-policy"


# Steps without a gradient


class SometimesBroken(Target):
    """A Gaussian whose gradient is no number every now and then."""

    def __init__(self) -> None:
        super().__init__(Euclidean(2))
        self.calls = 0

    def log_prob(self, x: Tensor) -> Tensor:
        return -0.5 * x.square().sum(-1)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return self.log_prob(x), -x * (math.nan if self.calls % 17 == 0 else 1.0)


def test_skipped_steps_are_counted_and_said():
    sampler = DDS(SometimesBroken(), num_steps=3, width=8, objective=ReverseKL())
    sampler.fit(steps=40, batch_size=8)
    skipped = sampler.history[-1]["skipped"]
    assert 2 <= skipped <= 20
    ((level, message, remedy),) = sampler.findings
    assert level == "warning" and f"{int(skipped)} of 40 training steps" in message and "learning_rate" in remedy
    sound = DDS(gaussian(), num_steps=3, width=8).fit(steps=2, batch_size=8)
    assert sound.history[-1]["skipped"] == 0 and sound.findings == []


def test_skipped_steps_reach_the_front_door():
    inner = DDS(gaussian(), num_steps=3, width=8).fit(steps=1, batch_size=8)
    inner.history[-1].update(step=100, skipped=30)
    fit = ds.sample(gaussian(), method=inner, num_samples=64)
    assert [f.message for f in fit.findings if "30 of 100 training steps had no finite gradient" in f.message]
    assert MappedSampler(gaussian(), inner, lambda x: x).findings == inner.findings


# Rates

RATES: list[tuple[Rate, list[float]]] = [
    (Constant(), [1.0, 1.0, 1.0]),
    (Cosine(0.1), [1.0, 0.55, 0.1]),
    (Exponential(0.01), [1.0, 0.1, 0.01]),
    (Linear(0.2, until=0.5), [0.2, 1.0, 1.0]),
    (Linear(1.0, 3.0), [1.0, 2.0, 3.0]),
    (Warmup(Constant(), share=1.0, start=0.5), [0.5, 0.75, 1.0]),
]


@pytest.mark.parametrize(("rate", "expected"), RATES, ids=repr)
def test_rates_are_what_they_say(rate: Rate, expected: list[float]):
    assert [rate(progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Cosine(0.0), "Expected final > 0; got 0.0"),
        (lambda: Linear(-1.0), "Expected start > 0; got -1.0"),
        (lambda: Linear(1.0, until=0.0), r"Expected until in \(0, 1\]; got 0.0"),
        (lambda: Warmup(Constant(), share=2.0), r"Expected share in \(0, 1\]; got 2.0"),
    ],
)
def test_bad_rates_are_refused(build: Any, message: str):
    with pytest.raises(ValueError, match=message):
        build()


def test_rates_drive_learning_and_clipping(tmp_path: Any):
    def run(**options: Any) -> tuple[list[float], list[Tensor]]:
        sampler, rates = DDS(gaussian(), num_steps=3, width=8), []
        settings = {"steps": 25, "batch_size": 8, "learning_rate": 0.01, "ema_decay": 0.0, **options}
        sampler.fit(**settings, callback=lambda e: rates.append(e["learning_rate"]))
        return rates, [p.detach().clone() for p in sampler.process.parameters()]

    assert run(rate=Constant())[0] == [0.01] * 3
    assert run(rate=Exponential(0.5))[0] == pytest.approx([0.01 * 0.5 ** (k / 25) for k in (0, 19, 24)])
    plain, tight = run(rate=Constant())[1], run(rate=Constant(), clip_rate=Linear(1e-9, 1e-9))[1]
    assert not all(torch.equal(a, b) for a, b in zip(plain, tight, strict=True))
    DDS(gaussian(), num_steps=3, width=8).fit(steps=2, batch_size=8, checkpoint=tmp_path, rate=Exponential(0.5))
    with pytest.raises(ValueError, match=r"rate: checkpoint 'Exponential\(final=0.5\)', now 'Cosine"):
        DDS(gaussian(), num_steps=3, width=8).fit(steps=2, batch_size=8, checkpoint=tmp_path, resume=True)


def test_sub_trajectory_balance_at_any_constants_centres_nothing():
    """Balances are means over paths, so that their rows may be drawn in parts as well."""
    process, objective = perturb(MAKERS["dgfs"](Euclidean(2), 5).double(), 0.2), SubTrajectoryBalance(5)
    lesson = Paths([(OnPolicy(), 1.0)])
    lesson.accumulate(objective, draw(process, objective, micro_batch=3), 9, weight=1.0)
    got = flat(process)
    use = draw(process, objective)
    for _ in range(3):
        lesson.accumulate(objective, use, 3, weight=1.0 / 3.0)
    assert torch.allclose(got, flat(process), rtol=1e-9, atol=1e-12)


def test_a_ramped_clip_binds_while_gradients_are_taken(tmp_path: Any):
    process, objective = perturb(MAKERS["cmcd"](Euclidean(2), 5).double(), 0.2), LogVariance()
    lesson = RampedClip(Paths([(OnPolicy(), 1.0)]), Linear(0.1, until=0.5))
    lesson.accumulate(objective, draw(process, objective), 10, weight=1.0)
    ramped, bound = flat(process), process.control.bound
    process.control.bound = 0.1 * bound
    Paths([(OnPolicy(), 1.0)]).accumulate(objective, draw(process, objective), 10, weight=1.0)
    assert torch.equal(ramped, flat(process))
    process.control.bound = bound
    lesson.accumulate(objective, draw(process, objective)._replace(progress=0.6), 10, weight=1.0)
    late = flat(process)
    Paths([(OnPolicy(), 1.0)]).accumulate(objective, draw(process, objective), 10, weight=1.0)
    assert torch.equal(late, flat(process)) and not torch.equal(late, ramped)
    with pytest.raises(ValueError, match="Expected a rate that ends at 1; got Linear.* which ends at 0.5"):
        RampedClip(Paths([(OnPolicy(), 1.0)]), Linear(1.0, 0.5))
    sampler = DDS(gaussian(), num_steps=3, width=8)
    sampler.fit(steps=2, batch_size=8, lesson=lesson, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="lesson: checkpoint"):
        sampler.fit(steps=2, batch_size=8, checkpoint=tmp_path, resume=True)
