"""Trust regions: the tempering, the gradients of the first steps, and every guard of the inner fit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import F64, MAKERS, gaussian, mixture, perturb
from torch import Tensor

from diffsampler import targets
from diffsampler.gradient import accumulate_gradient
from diffsampler.methods.cmcd import CMCD
from diffsampler.methods.dds import DDS
from diffsampler.methods.gbs import GBS
from diffsampler.methods.pis import PISProcess
from diffsampler.objective import (
    ForwardKL,
    LogVariance,
    ReverseKL,
    SubTrajectoryLogVariance,
    TrajectoryBalance,
    VarGrad,
)
from diffsampler.process import Gaussian, Process
from diffsampler.sampler import DiffusionSampler
from diffsampler.sources import Draw
from diffsampler.space import Euclidean
from diffsampler.trust_region import TrustRegion, divergence, temper


class Stop(Exception):
    """Stands for a kill in the middle of training."""


def drawn(name: str = "dds", *, std: float = 0.3, seed: int = 0) -> Draw:
    process = perturb(MAKERS[name](Euclidean(2), 5).double(), std)
    return Draw(process, mixture(), torch.Generator().manual_seed(seed), 0.0)


def gradient(process: Process) -> Tensor:
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in process.parameters()]
    flat = torch.cat([part.flatten() for part in parts]).clone()
    process.zero_grad()
    return flat


def paths(lesson: TrustRegion):
    assert lesson._region is not None
    return lesson._region.paths


def trained_part(lesson: TrustRegion):
    region = lesson._region
    assert region is not None
    return paths(lesson).select(torch.arange(len(region.log_weight) - lesson._num_held_out(region)))


# Tempering


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("bound", [0.05, 0.5])
def test_bisection_is_right_on_gaussian_weights(spread: float, bound: float):
    r"""For :math:`\log w \sim N(m, s^2)`, :math:`KL(Q_\eta | P) = \eta^2 s^2 / 2`; quantiles stand for draws."""
    u = (torch.arange(400_000, dtype=F64) + 0.5) / 400_000
    log_weight = 3.0 + spread * torch.special.ndtri(u)
    eta = temper(log_weight, bound)
    assert eta == pytest.approx(min(1.0, math.sqrt(2.0 * bound) / spread), rel=2e-3)
    if eta < 1.0:
        assert divergence(log_weight, eta) == pytest.approx(bound, abs=1e-9)


def test_divergence_rises_with_the_power_up_to_log_n():
    log_weight = 30.0 * torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=F64)
    values = [divergence(log_weight, eta) for eta in (0.0, 0.01, 0.1, 0.5, 1.0, 100.0)]
    assert values == sorted(values) and abs(values[0]) < 1e-12
    assert values[-1] == pytest.approx(math.log(50), abs=1e-6)
    for bound in (0.0, math.log(50) + 0.01):
        with pytest.raises(ValueError, match="Expected bound in"):
            temper(log_weight, bound)


# Gradients


@pytest.mark.parametrize("name", ["dds", "cmcd", "dgfs", "ucmcd_fixed"])
@pytest.mark.parametrize("kind", [LogVariance, VarGrad])
def test_without_tempering_it_is_the_gradient_of_the_loss(name: str, kind: type):
    use = drawn(name, std=0.05)
    lesson = TrustRegion(buffer=64, bound=4.0)
    taught = lesson.accumulate(kind(), use, 1000, weight=0.7)
    got = gradient(use.process)
    assert lesson.eta == 1.0
    loss = accumulate_gradient(use.process, kind(), trained_part(lesson), weight=0.7)
    assert taught.loss == pytest.approx(loss, rel=1e-9)
    assert torch.allclose(got, gradient(use.process), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["dds", "dis_preserving", "pis", "cmcd"])
def test_the_first_step_is_eta_times_the_untempered_one(name: str):
    """With a fixed backward chain; where it is learned (the control that must fail) its part has eta squared."""
    use = drawn(name, std=0.3)
    lesson = TrustRegion(buffer=64, bound=0.2)
    lesson.accumulate(LogVariance(), use, 1000, weight=1.0)
    got = gradient(use.process)
    assert 0.0 < lesson.eta < 0.9
    accumulate_gradient(use.process, LogVariance(), trained_part(lesson))
    expected = lesson.eta * gradient(use.process)
    close = torch.allclose(got, expected, rtol=1e-8, atol=1e-9)
    assert close == (name != "cmcd")


def test_later_steps_fit_the_tempered_law_of_the_last_iterate():
    """The loss after a move of the parameters, written out from its definition."""
    use = drawn("cmcd")
    lesson = TrustRegion(buffer=64, bound=0.2)
    lesson.accumulate(LogVariance(), use, 8, weight=1.0)
    old = trained_part(lesson)
    perturb(use.process, 0.1)
    loss = lesson.accumulate(LogVariance(), use, 1000, weight=1.0).loss
    again = trained_part(lesson)
    k = torch.arange(5).unsqueeze(-1)
    assert old.score is not None
    with torch.no_grad():
        space = use.process.space
        log_f = space.log_gaussian(old.x[1:], *use.process(k, old.x[:-1], old.score[:-1])).sum(0)
        log_b = space.log_gaussian(old.x[:-1], *use.process.backward(k, old.x[1:], old.score[1:])).sum(0)
        now = use.process.log_initial(old.x[0]) + log_f
    before = old.log_initial + old.log_forward.sum(0)
    value = lesson.eta * (mixture().log_prob(old.x[-1]) + log_b) + (1.0 - lesson.eta) * before - now
    assert loss == pytest.approx(float(value.var()), rel=1e-9)
    assert torch.equal(again.x, old.x)


# Guards


def perturb_after(use: Draw, lesson: TrustRegion, std: float, *, steps: int = 1) -> None:
    lesson.accumulate(LogVariance(), use, 64, weight=1.0)
    use.process.zero_grad()
    perturb(use.process, std, seed=1)
    for _ in range(steps):
        lesson.made(use)


def flat(process: Process) -> Tensor:
    return torch.cat([p.detach().flatten() for p in process.parameters()])


def test_a_step_that_drifts_is_shortened():
    use = drawn()
    lesson = TrustRegion(buffer=2048, bound=0.05, check_every=1)
    start = flat(use.process)
    perturb_after(use, lesson, 0.1)
    share = (flat(use.process) - start).norm() / (0.1 * math.sqrt(len(start)))
    assert 0.0 < float(share) < 0.9
    region = lesson._region
    assert region is not None and region.over
    unseen, log_drawn = lesson._current(region, use.process, torch.arange(2048))
    gone = float((log_drawn - unseen.log_initial - unseen.log_forward.sum(0)).mean())
    assert 0.3 * 0.15 < gone < 3.0 * 0.15


def test_a_fit_that_gets_worse_ends_with_the_best_parameters():
    use = drawn()
    lesson = TrustRegion(buffer=256, bound=0.5, check_every=1, patience=2, drift=1e9)
    start = flat(use.process)
    perturb_after(use, lesson, 0.0)
    for size in (0.2, 0.3):
        perturb(use.process, size, seed=2)
        lesson.made(use)
    region = lesson._region
    assert region is not None and region.over and region.steps == 3
    assert torch.equal(flat(use.process), start)


def test_a_far_worse_iterate_is_given_up():
    use = drawn(std=0.1)
    lesson = TrustRegion(buffer=256, bound=0.5, inner_steps=1, drift=1e9)
    lesson.accumulate(LogVariance(), use, 64, weight=1.0)
    first, eta = paths(lesson), lesson.eta
    start = flat(use.process)
    lesson.made(use)
    perturb(use.process, 1.5, seed=3)
    evaluations = lesson.accumulate(LogVariance(), use, 64, weight=1.0)
    assert lesson.given_up == 1 and lesson.caution == 0.5
    assert torch.equal(flat(use.process), start) and paths(lesson) is first
    assert lesson.eta < eta or eta == 1.0
    assert torch.equal(evaluations.log_weight, first.log_weight)
    # A good one is kept, and the bound recovers.
    lesson.made(use)
    lesson.accumulate(LogVariance(), use, 64, weight=1.0)
    assert lesson.given_up == 1 and lesson.caution == pytest.approx(0.75) and paths(lesson) is not first


def test_parameters_that_are_no_numbers_are_given_up():
    use = drawn(std=0.1)
    lesson = TrustRegion(buffer=64, bound=0.5, inner_steps=1)
    lesson.accumulate(LogVariance(), use, 64, weight=1.0)
    start = flat(use.process)
    with torch.no_grad():
        next(use.process.parameters()).fill_(math.nan)
    lesson.made(use)
    assert torch.equal(flat(use.process), start)


def dds(**options: Any) -> DDS:
    return DDS(mixture(), num_steps=5, scale=1.4, width=8, **options)


def cmcd(**options: Any) -> CMCD:
    return CMCD(mixture(), num_steps=5, scale=1.4, width=8, **{"objective": LogVariance(), **options})


@pytest.mark.parametrize("make", [dds, cmcd])
def test_resuming_repeats_the_uninterrupted_run_bit_for_bit(make: Any, tmp_path: Path):
    def lesson() -> TrustRegion:
        return TrustRegion(buffer=64, inner_steps=6, check_every=2, bound=0.3)

    def stop(entry: dict[str, float]) -> None:
        if entry["step"] >= 20:
            raise Stop

    settings: dict[str, Any] = {"steps": 27, "batch_size": 16, "seed": 3}
    whole = make().fit(**settings, lesson=lesson())
    with pytest.raises(Stop):
        make().fit(**settings, lesson=lesson(), checkpoint=tmp_path, checkpoint_every=9, callback=stop)
    resumed = make().fit(**settings, lesson=lesson(), checkpoint=tmp_path, checkpoint_every=9, resume=True)
    assert torch.equal(flat(whole.process), flat(resumed.process))


def test_training_reaches_the_target_and_the_region_opens():
    target = gaussian()
    lesson = TrustRegion(buffer=512, bound=0.3)
    sampler: DiffusionSampler = GBS(target, num_steps=6, objective=LogVariance(), scale=2.0, width=16)
    before = sampler.sample(2000).elbo
    sampler.fit(steps=250, batch_size=128, learning_rate=1e-2, lesson=lesson)
    after = sampler.sample(2000).elbo
    assert target.log_normalizer is not None
    assert after > before + 1.0 and abs(after - target.log_normalizer) < 0.4
    assert lesson.eta > 0.6 and lesson.regions > 4


class Blind(Process):
    """Controlled Brownian motion that never sees the target's gradient."""

    def __init__(self, base: PISProcess) -> None:
        super().__init__(base.space, base.num_steps, needs_score=False)
        self.base = base

    def sample_initial(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.base.sample_initial(n, generator=generator)

    def log_initial(self, x: Tensor) -> Tensor:
        return self.base.log_initial(x)

    def forward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        # The score of the uncontrolled end point's law, with which the gated feature vanishes.
        return self.base(k, x, -x / self.base.scale.square())

    def backward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        return self.base.backward(k, x, None)


def evenness(lesson: TrustRegion | None) -> tuple[int, float]:
    """Modes that a trained chain visits (a fifth of their share), and the entropy of their shares over its most."""
    target = targets.DoubleWells(20, wells=5, separation=2.0)
    sampler = DiffusionSampler(target, Blind(PISProcess(target.space, 16, scale=0.5, seed=1)))
    sampler.fit(steps=700, batch_size=1024, learning_rate=1e-2, seed=1, lesson=lesson)
    labels = target.mode_labels(sampler.sample(8192, seed=1).x)
    share = torch.bincount(labels, minlength=32).double() / 8192
    entropy = -torch.special.xlogy(share, share).sum() / math.log(32)
    return int((share > 0.2 / 32).sum()), float(entropy)


@pytest.mark.slow
def test_many_wells_from_a_narrow_start():
    """Plain training ends in few of 32 equal modes, training inside trust regions keeps nearly all."""
    modes, entropy = evenness(None)
    assert modes < 16 and entropy < 0.7
    modes, entropy = evenness(TrustRegion())
    assert modes >= 28 and entropy > 0.9


REFUSED: dict[str, tuple[Any, str]] = {
    "pathwise": (lambda: dds(objective=ReverseKL()), "loss of weights at fixed paths.*got ReverseKL"),
    "backward": (lambda: dds(objective=ForwardKL()), "at fixed paths from any source; got ForwardKL"),
    "constants": (lambda: dds(objective=TrajectoryBalance()), "constants of its own; got TrajectoryBalance"),
    "anchors": (lambda: cmcd(objective=SubTrajectoryLogVariance(2)), "whole paths.*got SubTrajectoryLogVariance"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_losses_that_cannot_be_tempered_are_refused(case: str):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make().fit(steps=1, lesson=TrustRegion())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bound": 0.0}, "Expected bound in"),
        ({"bound": 20.0}, "Expected bound in"),
        ({"buffer": 4}, "Expected buffer >= 8; got 4"),
        ({"inner_steps": 0}, "Expected inner_steps >= 1; got 0"),
        ({"check_every": 0}, "Expected check_every >= 1; got 0"),
        ({"patience": 0}, "Expected patience >= 1; got 0"),
        ({"held_out": 0.0}, "Expected held_out in"),
        ({"held_out": 0.9}, "Expected held_out in"),
        ({"drift": 0.0}, "Expected drift > 0"),
        ({"tolerance": -1.0}, "tolerance >= 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TrustRegion(**options)
