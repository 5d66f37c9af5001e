"""Losses and their gradients: the identity between losses, the exact surrogate in blocks, and the control that fails.

Gradients of independent batches are compared component by component in standard errors over batches.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import EUCLIDEAN, F64, MAKERS, mixture, perturb
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffsampler import targets
from diffsampler.gradient import accumulate_gradient
from diffsampler.methods.cmcd import CMCDProcess
from diffsampler.methods.dis import DISProcess
from diffsampler.methods.pis import PISProcess
from diffsampler.objective import (
    BridgeLikelihood,
    ForwardKL,
    LogVariance,
    Objective,
    ReverseKL,
    ScoreFunctionKL,
    TrajectoryBalance,
    VarGrad,
)
from diffsampler.process import Process
from diffsampler.schedule import variance_preserving
from diffsampler.space import Euclidean
from diffsampler.target import Target
from diffsampler.trajectory import Trajectory, cat, log_kernels, simulate, simulate_backward

# The identity between gradients

BATCHES, BATCH = 120, 128


def line() -> targets.GaussianMixture:
    return targets.GaussianMixture([[-0.7], [0.9]], scales=0.6, weights=[0.4, 0.6])


IDENTITY: dict[str, Process] = {
    "pis": PISProcess(Euclidean(1), 6, scale=1.3, width=8, detach_score=False),
    "dis": DISProcess(Euclidean(1), variance_preserving(6), scale=1.2, width=8, detach_score=False),
    "cmcd": CMCDProcess(Euclidean(1), 6, scale=1.3, width=8, detach_score=False),
}


def flat_gradient(process: Process) -> Tensor:
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in process.parameters()]
    gradient = torch.cat([part.flatten() for part in parts])
    process.zero_grad()
    return gradient


def batch_gradients(process: Process, target: Target, objective: Objective, factor: float, *, graph: bool) -> Tensor:
    """Gradients of ``factor * objective`` over independent batches, ``(batches, parameters)``."""
    generator, gradients = torch.Generator().manual_seed(7), []
    for _ in range(BATCHES):
        trajectory = simulate(process, target, BATCH, generator=generator, path_gradient=graph)
        if graph:
            (factor * objective(trajectory)).backward()
        else:
            accumulate_gradient(process, objective, trajectory, weight=factor)
        gradients.append(flat_gradient(process))
    return torch.stack(gradients)


def directions(gradients: Tensor) -> Tensor:
    """Six random directions and the six components with the clearest mean, ``(parameters, 12)``."""
    noise = torch.randn(gradients.shape[1], 6, generator=torch.Generator().manual_seed(1), dtype=F64)
    clear = gradients.mean(0).abs() / (gradients.std(0) + 1e-9 * gradients.abs().max())
    return torch.cat([noise, torch.eye(gradients.shape[1], dtype=F64)[:, clear.topk(6).indices]], -1)


def worst(gradients: Tensor, along: Tensor) -> float:
    """Largest mean along the directions, in standard errors over batches."""
    values = gradients @ along
    return float((values.mean(0).abs() / (values.std(0) / math.sqrt(len(values)) + 1e-12)).max())


@pytest.mark.parametrize("name", ["pis", "dis"])
def test_detached_losses_have_the_gradient_of_the_divergence(name: str):
    target = line()
    process = perturb(IDENTITY[name].double(), 0.25, seed=3)
    pathwise = batch_gradients(process, target, ReverseKL(), 1.0, graph=True)
    along = directions(pathwise)
    # Something to compare: far from the optimum.
    assert worst(pathwise, along) > 15.0
    balance = TrajectoryBalance(0.0, learn=False)
    # VarGrad divides by the batch size, the variance by one less.
    for objective, factor in [(LogVariance(), 0.5), (VarGrad(), BATCH / (BATCH - 1.0)), (balance, 1.0)]:
        detached = batch_gradients(process, target, objective, factor, graph=False)
        # The same paths, so differences are paired; 12 directions at 4 standard errors: false alarm 8e-4 per loss.
        assert worst(pathwise - detached, along) < 4.0, type(objective).__name__
    undetached = batch_gradients(process, target, LogVariance(), 0.5, graph=True)
    assert worst(pathwise - undetached, directions(undetached)) > 10.0


def test_the_identity_needs_a_fixed_backward_chain():
    # E_F[grad log B] is not zero: a process that learns its backward chain follows different gradients per loss.
    process = perturb(IDENTITY["cmcd"].double(), 0.15, seed=3)
    pathwise = batch_gradients(process, line(), ReverseKL(), 1.0, graph=True)
    along = directions(pathwise)
    detached = batch_gradients(process, line(), LogVariance(), 0.5, graph=False)
    assert worst(pathwise - detached, along) > 10.0
    # The score function has it where kernels share step sizes, temperatures and control: false alarm 8e-4.
    score = batch_gradients(process, line(), ScoreFunctionKL(), 1.0, graph=False)
    assert worst(pathwise - score, along) < 4.0
    assert worst(score, along) > 10.0


# Closed forms of the losses


def weights_only(log_weight: Tensor) -> Trajectory:
    nothing = torch.zeros_like(log_weight)
    return Trajectory(
        x=torch.zeros(2, len(log_weight), 1, dtype=F64),
        score=None,
        log_forward=-log_weight.unsqueeze(0),
        log_backward=nothing.unsqueeze(0),
        log_initial=nothing,
        log_terminal=nothing,
        log_anchor=None,
        on_policy=True,
    )


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (ReverseKL(), -2.0),
        (ScoreFunctionKL(), -2.0),
        (LogVariance(), 1.0),
        (VarGrad(), 1.0 / 3.0),
        (TrajectoryBalance(0.5), 0.5 * (0.25 + 2.25 + 6.25) / 3.0),
        (ForwardKL(), 2.0),
        (BridgeLikelihood(), 2.0),
    ],
)
def test_losses_are_what_they_say(objective: Objective, expected: float):
    loss = objective(weights_only(torch.tensor([1.0, 2.0, 3.0], dtype=F64)))
    assert loss.shape == () and loss.dtype == F64
    assert math.isclose(loss.item(), expected, rel_tol=1e-12)


def test_forward_likelihood_counts_the_initial_law():
    trajectory = weights_only(torch.zeros(3, dtype=F64))
    shifted = Trajectory(**{**vars(trajectory), "log_initial": torch.full((3,), -1.5, dtype=F64)})
    assert ForwardKL()(shifted).item() == 1.5


def test_declarations():
    assert ReverseKL.needs_path_gradient and ReverseKL.on_policy_only and ReverseKL.trains_shared
    assert ScoreFunctionKL.on_policy_only and ScoreFunctionKL.trains_shared
    assert not ScoreFunctionKL.needs_path_gradient
    assert ForwardKL.needs_backward_paths and BridgeLikelihood.needs_backward_paths and BridgeLikelihood.needs_bridge
    for objective in (LogVariance, VarGrad, TrajectoryBalance):
        assert not (objective.needs_path_gradient or objective.on_policy_only or objective.needs_backward_paths)
        assert not objective.trains_shared


def test_balance_learns_its_constant_only_if_asked():
    assert [p.requires_grad for p in TrajectoryBalance(1.0).parameters()] == [True]
    assert [p.requires_grad for p in TrajectoryBalance(1.0, learn=False).parameters()] == [False]


# The surrogate in blocks of rows

OBJECTIVES = {
    "log variance": LogVariance,
    "vargrad": VarGrad,
    "balance": lambda: TrajectoryBalance(0.3),
    "forward": ForwardKL,
    "score function": ScoreFunctionKL,
}


def direct_gradient(process: Process, objective: Objective, trajectory: Trajectory) -> tuple[float, Tensor]:
    """The detached loss in one graph over all steps and particles, by plain autograd."""
    num_steps, batch = trajectory.log_forward.shape
    log_f, log_b = log_kernels(process, trajectory.x, trajectory.score, slice(0, num_steps), slice(0, batch))
    values = {"log_forward": log_f, "log_backward": log_b, "log_initial": process.log_initial(trajectory.x[0])}
    if process.learns_carried:
        last, score = trajectory.x[-1], None if trajectory.score is None else trajectory.score[-1]
        fixed = trajectory.log_terminal - process.log_carried(last, score)
        values["log_terminal"] = fixed.detach() + process.log_carried(last, score)
    loss = objective(Trajectory(**{**vars(trajectory), **values}))
    loss.backward()
    own = [p.grad.flatten() for p in objective.parameters() if p.grad is not None]
    gradient = torch.cat([flat_gradient(process), *own])
    objective.zero_grad()
    return loss.item(), gradient


def blocked_gradient(
    process: Process, objective: Objective, trajectory: Trajectory, rows: int, weight: float = 1.0
) -> tuple[float, Tensor]:
    loss = accumulate_gradient(process, objective, trajectory, rows=rows, weight=weight)
    own = [p.grad.flatten() for p in objective.parameters() if p.grad is not None]
    gradient = torch.cat([flat_gradient(process), *own])
    objective.zero_grad()
    return loss, gradient


@given(
    name=st.sampled_from(list(MAKERS)),
    loss=st.sampled_from(list(OBJECTIVES)),
    rows=st.integers(1, 60),
    backward=st.booleans(),
    seed=st.integers(0, 100),
)
@settings(max_examples=60)
def test_blocks_give_the_gradient_of_one_graph(name: str, loss: str, rows: int, backward: bool, seed: int):
    target = mixture()
    process = perturb(MAKERS[name](target.space, 5).double(), 0.2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    if backward:
        trajectory = simulate_backward(process, target, target.sample(9, generator=generator), generator=generator)
    else:
        trajectory = simulate(process, target, 9, generator=generator)
    expected_loss, expected = direct_gradient(process, OBJECTIVES[loss](), trajectory)
    value, gradient = blocked_gradient(process, OBJECTIVES[loss](), trajectory, rows)
    assert math.isclose(value, expected_loss, rel_tol=1e-10, abs_tol=1e-10)
    scale = 1.0 + float(expected.abs().max())
    assert float((gradient - expected).abs().max()) < 1e-10 * scale
    assert float(expected.abs().max()) > 1e-6


def test_balance_gets_the_gradient_of_its_constant():
    target = EUCLIDEAN["gaussian"]()
    process, objective = MAKERS["dds"](target.space, 4).double(), TrajectoryBalance(0.3)
    trajectory = simulate(process, target, 50, generator=torch.Generator().manual_seed(0))
    accumulate_gradient(process, objective, trajectory, weight=2.0)
    expected = 2.0 * float(0.3 - trajectory.log_weight.mean())
    assert math.isclose(objective.log_normalizer.grad.item(), expected, rel_tol=1e-10)


def test_blocks_accumulate_and_scale():
    target = mixture()
    process = perturb(MAKERS["cmcd"](target.space, 4).double(), 0.1)
    trajectory = simulate(process, target, 8, generator=torch.Generator().manual_seed(0))
    once = blocked_gradient(process, LogVariance(), trajectory, 7)[1]
    half = blocked_gradient(process, LogVariance(), trajectory, 7, weight=0.5)[1]
    accumulate_gradient(process, LogVariance(), trajectory)
    accumulate_gradient(process, LogVariance(), trajectory)
    assert torch.allclose(0.5 * once, half, atol=1e-12)
    assert torch.allclose(2.0 * once, flat_gradient(process), atol=1e-10)


def test_mixed_batches_train_alike():
    """Fresh and replayed paths in one batch have the gradient of one graph as well."""
    target = mixture()
    process = perturb(MAKERS["cmcd_local"](target.space, 4).double(), 0.1)
    generator = torch.Generator().manual_seed(0)
    x = target.sample(6, generator=generator)
    both = cat(
        simulate(process, target, 5, generator=generator), simulate_backward(process, target, x, generator=generator)
    )
    expected = direct_gradient(process, LogVariance(), both)[1]
    assert torch.allclose(blocked_gradient(process, LogVariance(), both, 3)[1], expected, atol=1e-10)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("detach", [True, False])
def test_pathwise_gradient_equals_finite_differences(name: str, detach: bool):
    """With the score as a feature the pathwise gradient is exact; detached it is a different, cheaper direction."""
    target = mixture()
    process = perturb(MAKERS[name](target.space, 4).double(), 0.15)
    process.detach_score = detach

    def loss() -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return ReverseKL()(simulate(process, target, 16, generator=generator, path_gradient=True))

    loss().backward()
    # Where no network moves the paths, the schedule does.
    if not process.needs_score:
        bias = process.control.head.bias
    else:
        bias = process.control.net.head.bias if getattr(process, "forward_control", True) else process.increments
    gradient, step = float(bias.grad[0]), 1e-5
    with torch.no_grad():
        bias[0] += step
    up = loss().item()
    with torch.no_grad():
        bias[0] -= 2.0 * step
    slope = (up - loss().item()) / (2.0 * step)
    exact = math.isclose(gradient, slope, rel_tol=1e-5, abs_tol=1e-7)
    # There is nothing to detach where the score is no feature.
    assert exact == (not detach or not process.needs_score)
