"""What chains learn beside their networks: priors, temperatures, step sizes, friction, noise. Each gradient is right.

Central differences of the loss itself: along the path with the same noise, or at fixed paths as they are retraced.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import cmcd, dis, mixture, perturb, two_centres, underdamped
from torch import Tensor

from diffsampler.gradient import accumulate_gradient
from diffsampler.methods.dds import DDSProcess
from diffsampler.methods.gbs import GBSProcess
from diffsampler.methods.gfn import GFNProcess
from diffsampler.objective import LogVariance, Objective, ReverseKL, SubTrajectoryLogVariance
from diffsampler.priors import GaussianPrior
from diffsampler.process import Process
from diffsampler.schedule import cosine_preserving
from diffsampler.space import Euclidean
from diffsampler.trajectory import retrace, simulate

SPACE = Euclidean(2)


def learned_prior() -> GaussianPrior:
    return GaussianPrior(SPACE, mean=torch.tensor([0.3, -0.2]), scale=1.2)


CHAINS: dict[str, tuple[Callable[[], Process], dict[str, tuple[str, ...]]]] = {
    "cmcd": (
        lambda: cmcd(SPACE, 5, prior=learned_prior()),
        {
            "path": ("prior.mean", "prior.log_scale", "increments", "log_step"),
            "fixed": ("prior.mean", "prior.log_scale", "increments", "log_step"),
            "pieces": ("prior.mean", "prior.log_scale", "increments", "log_step"),
        },
    ),
    "cmcd on a mixture": (
        lambda: cmcd(SPACE, 5, prior=two_centres(SPACE)),
        {"path": ("prior.means", "prior.log_scale"), "fixed": ("prior.means", "prior.log_scale")},
    ),
    "gbs": (
        lambda: GBSProcess(SPACE, 5, scale=1.3, prior=learned_prior(), width=16, detach_score=False),
        {
            "path": ("prior.mean", "prior.log_scale", "log_step"),
            "fixed": ("prior.mean", "prior.log_scale", "log_step"),
        },
    ),
    "ucmcd": (
        lambda: underdamped(SPACE, 5, prior=two_centres(SPACE)),
        {"path": ("prior.means", "prior.log_scale", "increments", "log_step", "log_friction")},
    ),
    "ucmcd at fixed steps": (
        lambda: underdamped(SPACE, 5, learn_steps=False, prior=learned_prior()),
        {"fixed": ("prior.mean", "prior.log_scale", "increments")},
    ),
    "dis": (
        lambda: dis(SPACE, 5, exploding=True, learn_variance=True),
        {"fixed": ("control.net.head.bias", "control.gate.out.bias")},
    ),
    "gfn": (
        lambda: GFNProcess(SPACE, 5, scale=1.6, learn_variance=True, backward_range=0.3, flow=False, width=16),
        {"fixed": ("control.net.head.bias", "backward_control.head.bias")},
    ),
    "dds": (
        lambda: DDSProcess(SPACE, cosine_preserving(5), scale=1.4, learn_noise=True, width=16, detach_score=False),
        {"path": ("log_rate",), "fixed": ("log_rate",)},
    ),
}
LOSSES: dict[str, Objective] = {
    "path": ReverseKL(),
    "fixed": LogVariance(),
    "pieces": SubTrajectoryLogVariance(2),
}
CASES = [(chain, way, name) for chain, (_, ways) in CHAINS.items() for way, names in ways.items() for name in names]


def first_of(process: Process, name: str) -> tuple[Tensor, Tensor]:
    """A parameter, and its entry with the largest slope."""
    parameter = process.get_parameter(name)
    assert parameter.grad is not None
    return parameter.data.view(-1), parameter.grad.view(-1).abs().argmax()


@pytest.mark.parametrize(("chain", "way", "name"), CASES)
def test_gradients_are_those_of_the_loss(chain: str, way: str, name: str):
    target, objective = mixture(), LOSSES[way]
    process = perturb(CHAINS[chain][0]().double(), 0.15)
    along = way == "path"
    path = simulate(process, target, 24, generator=torch.Generator().manual_seed(0), path_gradient=along)
    if along:
        objective(path).backward()
    else:
        accumulate_gradient(process, objective, path, rows=50)

    def loss() -> float:
        if along:
            again = simulate(process, target, 24, generator=torch.Generator().manual_seed(0), path_gradient=True)
        else:
            again = retrace(process, path.x, path.score, path.log_prob, log_terminal=path.log_terminal)
        return objective(again).item()

    values, index = first_of(process, name)
    slope, step, ends = float(process.get_parameter(name).grad.view(-1)[index]), 1e-5, []
    for sign in (1.0, -1.0):
        values[index] += sign * step
        ends.append(loss())
        values[index] -= sign * step
    assert abs(slope) > 1e-5
    assert slope == pytest.approx((ends[0] - ends[1]) / (2.0 * step), rel=1e-4, abs=1e-7)
