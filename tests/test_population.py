"""Processes in pieces: weights, gradients and evidence are those of the whole, whatever happens between the pieces."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import EUCLIDEAN, F64, MAKERS, HyperplaneGaussian, VonMises, deviation, gaussian, mixture, perturb
from torch import Tensor

from diffsampler import population as population_module
from diffsampler.gradient import accumulate_gradient
from diffsampler.kernels.hmc import HMC
from diffsampler.kernels.langevin import MALA, ULA
from diffsampler.objective import LogVariance, SubTrajectoryLogVariance
from diffsampler.population import AnchorDensity, Moves, Population, Stretch, populate, stretches
from diffsampler.process import Process
from diffsampler.space import Euclidean, Torus
from diffsampler.target import Target
from diffsampler.trajectory import Trajectory, log_kernels, retrace, simulate

STEPS = 8
ANCHORED = ("cmcd", "cmcd_local", "cmcd_mixture", "dgfs")


def process(name: str = "cmcd", *, std: float = 0.2, steps: int = STEPS) -> Process:
    return perturb(MAKERS[name](Euclidean(2), steps).double(), std, seed=5)


def frozen_moves(space: Any, ends: int, *, count: int = 2) -> Moves:
    return Moves.init(MALA(space), ends, scale=torch.ones(1, dtype=F64), step_size=0.3, count=count)


def run(
    chain: Process, target: Target, segments: int, threshold: float, *, size: int = 8, islands: int = 600, seed: int = 1
) -> Population:
    moves = frozen_moves(chain.space, segments - 1)
    generator = torch.Generator().manual_seed(seed)
    return populate(
        stretches(chain, segments),
        target,
        size * islands,
        generator=generator,
        moves=moves,
        resample_below=threshold,
        num_islands=islands,
    )


def relative(population: Population, target: Target) -> Tensor:
    """``Zhat / Z`` of each island."""
    blocks = population.log_weight.reshape(population.lower_bound.shape[0], -1)
    assert target.log_normalizer is not None
    return (torch.logsumexp(blocks, -1) - math.log(blocks.shape[-1]) - target.log_normalizer).exp()


# Evidence. At 4 standard errors of 600 islands a false alarm has probability 6e-5 per case.


@pytest.mark.parametrize("segments", [1, 2, 4, STEPS])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("name", EUCLIDEAN)
def test_evidence_is_unbiased_at_random_parameters(name: str, threshold: float, segments: int):
    target = EUCLIDEAN[name]()
    population = run(process(), target, segments, threshold)
    assert abs(deviation(relative(population, target), 1.0)) < 4.0
    if segments > 1:
        share = float(population.resampled.double().mean())
        assert share == threshold if threshold in (0.0, 1.0) else share < 1.0
        assert share > 0.0 or threshold < 0.5 or segments == 2
        assert 0.3 < min(population.acceptance) < 1.0


@pytest.mark.parametrize("name", ["dgfs", "cmcd_mixture"])
def test_evidence_is_unbiased_with_a_learned_flow_and_a_mixture_prior(name: str):
    target = mixture()
    assert abs(deviation(relative(run(process(name), target, 4, 0.5), target), 1.0)) < 4.0


@pytest.mark.parametrize("space", ["hyperplane", "torus"])
def test_evidence_on_other_spaces(space: str):
    target: Target = HyperplaneGaussian() if space == "hyperplane" else VonMises()
    chain = perturb(MAKERS["cmcd"](target.space, STEPS).double(), 0.1, seed=5)
    assert abs(deviation(relative(run(chain, target, 4, 0.5, islands=400), target), 1.0)) < 4.0
    assert isinstance(target.space, Torus) == (space == "torus")


def test_sums_of_segment_means_are_no_evidence():
    """Negative control: without resampling, the means of the pieces do not multiply to the mean of the product."""
    target, chain = mixture(), process(std=0.3)
    ratios = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        kept = populate(stretches(chain, STEPS), target, 64, generator=generator, resample_below=0.0, keep=True)
        means = [torch.logsumexp(p.log_weight, 0) - math.log(64) for p in kept.pieces]
        ratios.append((torch.stack(means).sum() - target.log_normalizer).exp())
    assert abs(deviation(torch.stack(ratios), 1.0)) > 10.0


def test_moves_within_a_wrong_density_are_no_moves(monkeypatch: pytest.MonkeyPatch):
    """Negative control: the target's density between the pieces instead of the anchor's."""

    def at_the_end(chain: Process, k: int, target: Target) -> AnchorDensity:
        return AnchorDensity(chain, chain.num_steps, target)

    monkeypatch.setattr(population_module, "AnchorDensity", at_the_end)
    target = mixture()
    assert abs(deviation(relative(run(process(), target, 4, 0.3), target), 1.0)) > 8.0


def test_the_bound_is_below_and_meets_the_elbo_without_resampling():
    target, chain = mixture(), process()
    whole = run(chain, target, 1, 0.0, size=64, islands=50)
    assert torch.allclose(whole.lower_bound, whole.log_weight.reshape(50, -1).mean(-1))
    cut = run(chain, target, 4, 1.0, size=64, islands=50)
    assert target.log_normalizer is not None
    assert float(whole.lower_bound.mean()) < float(cut.lower_bound.mean()) < target.log_normalizer


# Pieces


@pytest.mark.parametrize("name", ANCHORED)
@pytest.mark.parametrize("segments", [1, 3, STEPS])
def test_weights_of_the_pieces_sum_to_the_weight_of_the_path(name: str, segments: int):
    chain, target = process(name), mixture()
    path = simulate(chain, target, 20, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(20, dtype=F64)
    for piece in stretches(chain, segments):
        part = slice(piece.start, piece.stop + 1)
        assert path.score is not None and path.log_prob is not None
        again = retrace(piece, path.x[part], path.score[part], path.log_prob[part])
        assert torch.allclose(again.log_weight, path.segment_log_weight(piece.start, piece.stop), atol=1e-10)
        total = total + again.log_weight
    assert torch.allclose(total, path.log_weight, atol=1e-10)


@pytest.mark.parametrize("name", ANCHORED)
def test_paths_of_a_piece_are_those_of_the_process(name: str):
    """The same generator gives the same states, tabulated times included; formula (W) recomputed from the states."""
    chain, target = process(name), mixture()
    path = simulate(chain, target, 10, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    x = None
    for piece in stretches(chain, 3):
        part = simulate(piece, target, 10, generator=generator, initial=x)
        assert torch.allclose(part.x, path.x[piece.start : piece.stop + 1], atol=1e-10)
        with torch.no_grad():
            steps = slice(piece.start, piece.stop), slice(0, 10)
            log_f, log_b = log_kernels(chain, path.x, path.score, *steps)
        assert torch.allclose(part.log_forward, log_f, atol=1e-9)
        assert torch.allclose(part.log_backward, log_b, atol=1e-9)
        x = part.x[-1]


def gradients(chain: Process) -> dict[str, Tensor]:
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in chain.named_parameters()}
    chain.zero_grad()
    return grads


def one_graph(chain: Process, path: Trajectory) -> Trajectory:
    """The record of fixed states with a graph to every parameter, written out."""
    size = slice(0, chain.num_steps), slice(0, path.x.shape[1])
    log_f, log_b = log_kernels(chain, path.x, path.score, *size)
    k = torch.arange(chain.num_steps + 1).unsqueeze(-1)
    assert path.log_prob is not None
    return replace(
        path,
        log_forward=log_f,
        log_backward=log_b,
        log_initial=chain.log_initial(path.x[0]),
        log_anchor=chain.log_anchor(k, path.x, path.log_prob),
    )


@pytest.mark.parametrize("name", ANCHORED)
@pytest.mark.parametrize("segments", [1, 3])
def test_gradients_of_the_pieces_in_blocks_are_that_of_the_segment_loss_in_one_graph(name: str, segments: int):
    chain, target = process(name), mixture()
    path = simulate(chain, target, 12, generator=torch.Generator().manual_seed(0))
    SubTrajectoryLogVariance(segments)(one_graph(chain, path)).backward()
    expected = gradients(chain)
    assert path.score is not None and path.log_prob is not None
    for piece in stretches(chain, segments):
        part = slice(piece.start, piece.stop + 1)
        again = retrace(piece, path.x[part], path.score[part], path.log_prob[part])
        accumulate_gradient(piece, LogVariance(), again, weight=1.0 / segments, rows=7)
    for parameter, value in gradients(chain).items():
        assert torch.allclose(value, expected[parameter], rtol=1e-8, atol=1e-9), parameter
    # Something to compare: anchors learn where there are inner ones.
    learned = "increments" if name.startswith("cmcd") else "flow.head.weight"
    assert float(expected[learned].abs().max()) > 1e-6 or (segments == 1 and name == "dgfs")


@pytest.mark.parametrize("name", ANCHORED)
def test_anchor_densities_have_the_gradient_of_autograd(name: str):
    chain, target = process(name), mixture()
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(2), dtype=F64)
    for k in (1, 4, STEPS):
        value, score = AnchorDensity(chain, k, target)(x)
        y = x.clone().requires_grad_()
        direct = chain.log_anchor(torch.tensor(k), y, target.log_prob(y))
        (expected,) = torch.autograd.grad(direct.sum(), y)
        assert torch.allclose(value, direct.detach()) and torch.allclose(score, expected)
        assert not value.requires_grad and not score.requires_grad


# Trouble


class Holes(Target):
    """A Gaussian that is not a number beyond a line."""

    def __init__(self) -> None:
        super().__init__(Euclidean(2))

    def log_prob(self, x: Tensor) -> Tensor:
        value = -0.5 * x.square().sum(-1)
        return torch.where(x[..., 0] > 0.8, torch.full_like(value, math.nan), value)


def test_lost_particles_weigh_nothing_and_are_counted():
    population = run(process(), Holes(), 4, 0.5, size=16, islands=20)
    assert population.nonfinite > 10
    assert not population.log_weight.isnan().any() and bool(population.x.isfinite().all())
    alive = population.log_weight > -math.inf
    assert bool((population.x[alive, 0] <= 0.8).all()) and int(alive.sum()) > 100


def test_tuning_reaches_the_wanted_acceptance_and_is_no_part_of_a_run():
    target, chain = gaussian(), process()
    pieces = stretches(chain, 3)
    moves = Moves.init(HMC(chain.space, num_steps=3), 2, scale=torch.ones(2, dtype=F64), step_size=5.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        population = populate(pieces, target, 128, generator=generator, moves=moves)
        before = moves
        moves = moves.tuned(population)
        assert before.steps != moves.steps
    assert all(abs(a - moves.kernel.target_acceptance) < 0.12 for a in population.acceptance)
    assert all(abs(float(s.mean()) - 1.0) < 0.5 for s in moves.scales)


def carrying() -> Process:
    """No method has both; a chain with velocities that claims anchors must be refused all the same."""
    chain = process("ucmcd")
    chain.has_anchors = True
    return chain


REFUSED: dict[str, tuple[Any, str]] = {
    "no anchors": (lambda: Stretch(process("dds"), 0, 4), "Expected a process with anchor densities; DDSProcess has"),
    "carried": (lambda: Stretch(carrying(), 0, 4), "whose states are points; those of UnderdampedProcess carry more"),
    "no steps": (lambda: Stretch(process(), 4, 4), "Expected 0 <= start < stop <= 8; got 4 and 4"),
    "law of a later start": (lambda: stretches(process(), 2)[1].sample_initial(3), "stretch that starts at step 4"),
    "density of a later start": (
        lambda: stretches(process(), 2)[1].log_initial(torch.zeros(1, 2, dtype=F64)),
        "use log_start",
    ),
    "gaps": (
        lambda: populate([Stretch(process(), 0, 4)], mixture(), 8, generator=torch.Generator()),
        "end where the process does",
    ),
    "order": (
        lambda: populate(stretches(process(), 2)[::-1], mixture(), 8, generator=torch.Generator()),
        "consecutive pieces",
    ),
    "islands": (
        lambda: populate(stretches(process(), 2), mixture(), 9, generator=torch.Generator(), num_islands=2),
        "multiple of num_islands=2",
    ),
    "threshold": (
        lambda: populate(stretches(process(), 2), mixture(), 8, generator=torch.Generator(), resample_below=1.5),
        r"Expected resample_below in \[0, 1\]; got 1.5",
    ),
    "ends": (
        lambda: populate(
            stretches(process(), 2),
            mixture(),
            8,
            generator=torch.Generator(),
            moves=frozen_moves(Euclidean(2), 3),
        ),
        "Expected moves for 1 inner ends; got 3",
    ),
    "biased kernel": (
        lambda: Moves.init(ULA(Euclidean(2)), 2, scale=torch.ones(1)),
        "leaves its density exactly invariant; got ULA",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused(case: str):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()
