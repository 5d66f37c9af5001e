"""Parametrisations of controls: potentials, gates and scores, each in processes that keep their promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F64, HyperplaneGaussian, VonMises, gaussian, mixture, perturb
from torch import Tensor

from diffsampler.controls import (
    AnnealedScore,
    LerpedScore,
    NoScore,
    PotentialControl,
    ResidualScore,
    ScoreFeature,
    TargetScore,
    gated,
)
from diffsampler.gradient import accumulate_gradient
from diffsampler.methods.dds import DDS, DDSProcess
from diffsampler.methods.dis import DIS, DISProcess
from diffsampler.methods.gfn import DGFS, GFNProcess
from diffsampler.methods.pis import PISProcess
from diffsampler.networks import Control
from diffsampler.objective import LogVariance, ReverseKL
from diffsampler.process import Process
from diffsampler.schedule import cosine_preserving, variance_exploding
from diffsampler.space import Euclidean, MeanFree, Space, Torus
from diffsampler.target import Target
from diffsampler.testing import check_process
from diffsampler.trajectory import simulate


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def potential(space: Space, **options: Any) -> PotentialControl:
    return PotentialControl(space, generator=generator(), width=16, **options)


def points(space: Space, *shape: int) -> Tensor:
    return space.project(torch.randn(*shape, space.dim, generator=generator(1), dtype=F64))


# Potentials


@pytest.mark.parametrize("space", [Euclidean(3), MeanFree(3, 2), Torus(2)], ids=repr)
def test_the_control_is_the_gradient_of_the_potential(space: Space):
    control = potential(space, extra_outputs=2).double()
    with torch.no_grad():
        control.net.head.weight += 0.3 * torch.randn(control.net.head.weight.shape, generator=generator(2), dtype=F64)
    x, t = points(space, 5), torch.tensor(0.3, dtype=F64)
    with torch.no_grad():
        value, extra = control(t, x, torch.zeros_like(x))
    assert not value.requires_grad and not extra.requires_grad and extra.shape == (5, 2)
    step = 1e-5
    for k in range(space.dim):
        basis = space.project_vector(torch.eye(space.dim, dtype=F64)[k])
        slope = (control.potential(t, x + step * basis) - control.potential(t, x - step * basis)) / (2.0 * step)
        assert torch.allclose(value @ basis, slope, atol=1e-8)
    assert float(value.abs().max()) > 1e-3
    # A gradient has no curl.
    if isinstance(space, Euclidean):
        jacobian = torch.autograd.functional.jacobian(lambda y: control(t, y, torch.zeros_like(y))[0], x[0])
        assert torch.allclose(jacobian, jacobian.T, atol=1e-10)


def test_untrained_potential_is_the_gated_feature():
    control = potential(Euclidean(3), gate_init=0.7, bound=4.0).double()
    x, feature = points(Euclidean(3), 5), 3.0 * points(Euclidean(3), 5)
    value, _ = control(torch.tensor(0.3, dtype=F64), x, feature, 0.5)
    assert torch.allclose(value, 0.5 * 0.7 * 4.0 * torch.tanh(feature / 4.0))


@pytest.mark.parametrize("scalar", [True, False])
def test_gates_are_scalar_or_one_for_each_coordinate(scalar: bool):
    for kind in (Control, PotentialControl):
        control = kind(Euclidean(3), generator=generator(), scalar_gate=scalar, width=8)
        assert control.gate.out.weight.shape[0] == (1 if scalar else 3)
        assert kind(MeanFree(3, 2), generator=generator(), width=8).gate.out.weight.shape[0] == 1


# Scores


def test_features_are_the_scores_they_are_named_after():
    score, prior, t = points(Euclidean(2), 4), points(Euclidean(2), 4).flip(0), torch.full((4, 1), 0.25, dtype=F64)
    assert torch.equal(TargetScore()(t, score, prior), score)
    assert torch.equal(ResidualScore()(t, score, prior), score - prior)
    assert torch.allclose(LerpedScore()(t, score, prior), 0.25 * score + 0.75 * prior)
    assert not NoScore()(t, score, prior).any()
    annealed = AnnealedScore(8).double()
    assert torch.allclose(annealed(t, score, prior), LerpedScore()(t, score, prior))
    with torch.no_grad():
        annealed.increments += torch.randn(8, generator=generator(), dtype=F64)
        beta = annealed.beta(torch.linspace(0.0, 1.0, 50, dtype=F64))
    assert beta[0] == 0.0 and float(beta[-1]) == pytest.approx(1.0) and bool((beta.diff() > 0.0).all())
    with pytest.raises(ValueError, match="Expected knots >= 1; got 0"):
        AnnealedScore(0)


def test_without_a_feature_the_weighted_residual_is_gated():
    score, prior, weight = points(Euclidean(2), 4), points(Euclidean(2), 4).flip(0), torch.tensor(0.3)
    seen, factor = gated(None, torch.tensor(0.5), score, prior, weight)
    assert torch.equal(seen, score - prior) and factor is weight
    seen, factor = gated(LerpedScore(), torch.tensor(0.5), score, prior, weight)
    assert torch.allclose(seen, 0.5 * (score + prior)) and factor == 1.0


# In processes

BUILDERS: dict[str, Callable[..., Process]] = {
    "pis": lambda space, **o: PISProcess(space, 5, scale=1.6, width=16, **o),
    "dds": lambda space, **o: DDSProcess(space, cosine_preserving(5), scale=1.4, width=16, **o),
    "dis": lambda space, **o: DISProcess(
        space, variance_exploding(5, noise_min=0.3, noise_max=4.0), learn_variance=False, width=16, **o
    ),
    "gfn": lambda space, **o: GFNProcess(space, 5, scale=1.6, width=16, **o),
}
FEATURES: dict[str, Callable[[], ScoreFeature]] = {
    "annealed": lambda: AnnealedScore(4),
    "lerped": LerpedScore,
    "target": TargetScore,
    "none": NoScore,
}


@pytest.mark.parametrize(
    ("name", "feature"),
    [("pis", "target"), ("dds", "lerped"), ("dis", "annealed"), ("gfn", "annealed"), ("pis", "none")],
)
def test_processes_with_other_controls_conform(name: str, feature: str):
    target = mixture()
    process = BUILDERS[name](target.space, control=potential(target.space), feature=FEATURES[feature]())
    assert process.needs_score == (feature != "none")
    check_process(perturb(process.double(), 0.2), target, generator=generator(), paths=2048)


@pytest.mark.parametrize("target", [HyperplaneGaussian(3, 2), VonMises(2)], ids=["mean free", "torus"])
def test_they_conform_on_other_spaces(target: Target):
    process = BUILDERS["dis"](target.space, control=potential(target.space), feature=AnnealedScore(4))
    check_process(perturb(process.double(), 0.2), target, generator=generator(), paths=2048)


@pytest.mark.parametrize("pathwise", [True, False])
def test_every_part_gets_a_gradient_that_finite_differences_confirm(pathwise: bool):
    target, space = mixture(), Euclidean(2)
    process = BUILDERS["dds"](space, control=potential(space), feature=AnnealedScore(4), detach_score=False)
    perturb(process.double(), 0.3)
    objective = ReverseKL() if pathwise else LogVariance()
    path = simulate(process, target, 16, generator=generator(), path_gradient=pathwise)
    if pathwise:
        objective(path).backward()
    else:
        accumulate_gradient(process, objective, path, rows=7)

    def loss() -> float:
        if pathwise:
            again = simulate(process, target, 16, generator=generator(), path_gradient=True)
            return objective(again).item()
        k = torch.arange(5).unsqueeze(-1)
        with torch.no_grad():
            log_f = process.space.log_gaussian(path.x[1:], *process(k, path.x[:-1], path.score[:-1]))
        return (path.log_terminal + (path.log_backward - log_f).sum(0) - path.log_initial).var().item()

    for parameter in (process.feature.increments, process.control.gate.out.bias, process.control.net.point_in.bias):
        slope, step = float(parameter.grad.flatten()[1]), 1e-5
        assert abs(slope) > 1e-5
        values = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                parameter.view(-1)[1] += sign * step
            values.append(loss())
            with torch.no_grad():
                parameter.view(-1)[1] -= sign * step
        assert slope == pytest.approx((values[0] - values[1]) / (2.0 * step), rel=1e-4, abs=1e-7)


def test_a_potential_learns_a_gaussian():
    target = gaussian()
    control = PotentialControl(target.space, generator=generator(), width=16)
    model = DDS(target, num_steps=12, scale=1.4, control=control, feature=LerpedScore())
    model.fit(steps=80, batch_size=128, learning_rate=1e-2)
    assert model.sample(2000, seed=1).ess / 2000 > 0.85


REFUSED: dict[str, tuple[Any, str]] = {
    "space": (
        lambda: DDS(gaussian(), num_steps=3, control=potential(Euclidean(3))),
        r"Expected a control on Euclidean\(.*2\); got one on Euclidean\(.*3\)",
    ),
    "outputs": (
        lambda: DIS(gaussian(), num_steps=3, control=potential(Euclidean(2))),
        "Expected a control with extra_outputs=2; got 0",
    ),
    "inputs": (
        lambda: DDS(gaussian(), num_steps=3, control=potential(Euclidean(2), extra_inputs=1)),
        "Expected a control with extra_inputs=0; got 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_controls_that_do_not_fit_are_refused(case: str):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_scores_are_not_asked_for_where_none_is_gated():
    calls = []

    def score(x: Tensor) -> Tensor:
        calls.append(1)
        return -x

    target = Target.from_log_prob(lambda x: -0.5 * x.square().sum(-1), dim=2, score=score)
    DIS(target, num_steps=3, feature=NoScore(), width=8).fit(steps=2, batch_size=8).sample(10)
    assert not calls
    DGFS(target, num_steps=3, feature=NoScore(), width=8).sample(10)
    assert calls, "flow functions need densities along the path, which come with scores"
