"""The underdamped chain: exact weights, the leapfrog written out, what fixed paths cannot train, broken shifts.

Statistical tests fix their seeds; 4 standard errors are a false alarm with probability 6e-5 per case.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import F64, HyperplaneGaussian, crossing, deviation, gaussian, mixture, perturb, underdamped
from torch import Tensor

import diffsampler as ds
from diffsampler import targets
from diffsampler.methods.cmcd import CMCDProcess
from diffsampler.methods.underdamped import UnderdampedProcess
from diffsampler.objective import LogVariance, ReverseKL, TrajectoryBalance, VarGrad
from diffsampler.process import Gaussian, Process
from diffsampler.sampler import DiffusionSampler
from diffsampler.space import Euclidean
from diffsampler.target import Target
from diffsampler.testing import check_process
from diffsampler.training import Recipe, fit
from diffsampler.trajectory import Trajectory, simulate, simulate_backward

LIMIT = 4.0
SMALL = Recipe(steps=6, batch_size=16, learning_rate=1e-2)

VARIANTS: dict[str, dict[str, Any]] = {
    "ucmcd": {},
    "local": {"local_mass": True},
    "ldvi": {"forward_control": False},
    "uha": {"forward_control": False, "backward_control": False},
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Exact weights


@pytest.mark.parametrize("num_steps", [1, 3, 10])
@pytest.mark.parametrize("target", [gaussian(), HyperplaneGaussian(4, 2)], ids=["euclidean", "mean free"])
@pytest.mark.parametrize("name", VARIANTS)
def test_mean_weight_is_the_normalizer_at_random_parameters(name: str, target: Target, num_steps: int):
    process = perturb(underdamped(target.space, num_steps, **VARIANTS[name]).double(), 0.1, seed=num_steps)
    forward = simulate(process, target, 4000, generator=generator()).log_weight - target.log_normalizer
    x = target.sample(4000, generator=generator())
    backward = simulate_backward(process, target, x, generator=generator(1)).log_weight - target.log_normalizer
    assert abs(deviation(forward.exp(), 1.0)) < LIMIT
    assert abs(crossing(forward, backward)) < LIMIT
    assert deviation(forward, 0.0) < LIMIT and deviation(backward, 0.0) > -LIMIT


def checked_paths() -> tuple[Process, Target, Trajectory]:
    target = targets.Gaussian([0.0, 0.0], scale=1.3)
    process = perturb(underdamped(target.space, 8).double(), 0.05)
    path = simulate(process, target, 8000, generator=generator())
    assert abs(deviation(path.log_weight.exp(), 1.0)) < LIMIT
    return process, target, path


def test_weights_without_the_carried_velocity_are_caught():
    process, _, path = checked_paths()
    assert path.score is not None
    carried = process.log_carried(path.x[-1], path.score[-1]).detach()
    dropped = replace(path, log_terminal=path.log_terminal - carried)
    # The mean log weight then exceeds what it is a lower bound of.
    assert deviation(dropped.log_weight, 0.0) > 20.0


def test_a_score_at_the_wrong_point_is_caught():
    """Forward kernels with the score where the step ends, and a last half kick from where the step began.

    Either depends on what is drawn, so that nothing normalizes it.
    """
    process, target, path = checked_paths()
    assert path.score is not None
    k = torch.arange(8).unsqueeze(-1)
    drawn = process.drawn(process.unshift(k, path.x[1:]))
    with torch.no_grad():
        log_forward = target.space.log_gaussian(drawn, *process(k, path.x[:-1], path.score[1:]))
        log_backward = target.space.log_gaussian(
            process.drawn(path.x[1:-1]),
            *process.backward(k[1:], process.place(path.x[1:-1], drawn[1:]), path.score[:-2]),
        )
    first = path.log_backward[:1]
    for wrong in (
        replace(path, log_forward=log_forward),
        replace(path, log_backward=torch.cat([first, log_backward])),
    ):
        assert abs(deviation(wrong.log_weight.exp(), 1.0)) > 6.0


# The chain written out


def test_hamiltonian_annealing_weights_are_the_heat_of_a_plain_loop():
    """Leapfrog steps and exact refreshes by hand; the weight is the end's density less the heat of the refreshes."""
    target, num_steps, n = mixture(), 5, 50
    process = underdamped(target.space, num_steps, **VARIANTS["uha"]).double()
    beta, step = process.beta.detach(), process.log_step.exp().detach()
    keep = torch.exp(-process.log_friction.exp()).detach()
    path = simulate(process, target, n, generator=generator())
    source = generator()
    x = process.prior.sample(n, generator=source).detach()
    velocity = torch.randn(n, 2, generator=source, dtype=F64)

    def normal(v: Tensor) -> Tensor:
        return -0.5 * v.square().sum(-1)

    def kick(k: int, e: Tensor, x: Tensor) -> Tensor:
        force = beta[k] * target.score(x) - (1.0 - beta[k]) * x / 1.3**2
        return 4.0 * torch.tanh(0.5 * e * force / 4.0)

    log_weight = -process.log_initial(torch.cat([x, velocity], -1)) + 2.0 * -0.5 * math.log(2.0 * math.pi)
    for k in range(num_steps):
        noise = torch.randn(n, 2, generator=source, dtype=F64)
        fresh = keep[k] * velocity + (1.0 - keep[k].square()).sqrt() * noise
        log_weight = log_weight + normal(velocity) - normal(fresh)
        half = fresh + kick(k, step[k], x)
        x = x + step[k] * half
        velocity = half + kick(k + 1, step[k], x)
    log_weight = log_weight + target.log_prob(x) + normal(velocity)
    assert torch.allclose(path.x[-1, :, :2], x, atol=1e-10)
    assert torch.allclose(path.log_weight, log_weight.detach(), atol=1e-6)


def test_hamiltonian_flow_keeps_a_gaussian_to_second_order():
    """Prior and target alike: the weights' variance falls as the fourth power of the step, as leapfrog's error does."""
    target = targets.Gaussian([0.0, 0.0], scale=1.0)
    spread = []
    for factor in (1.0, 0.5):
        process = underdamped(target.space, 8, **VARIANTS["uha"]).double()
        with torch.no_grad():
            process.prior.log_scale.zero_()
            process.log_step.fill_(math.log(0.4 * factor))
        process.clip_bound = 1e6
        spread.append(float(simulate(process, target, 4000, generator=generator()).log_weight.var()))
    assert 8.0 < spread[0] / spread[1] < 32.0


def test_high_friction_is_overdamped_langevin():
    """With velocities forgotten at once, points move by Langevin steps of size e^2 / 2."""
    target = mixture()
    process = underdamped(target.space, 4, friction=50.0, **VARIANTS["uha"]).double()
    state = process.sample_initial(6, generator=generator()).detach()
    x = process.point(state)
    score, k = target.score(x), torch.tensor(2)
    with torch.no_grad():
        mean, variance = process(k, state, score)
        e, beta = process.log_step[2].exp(), process.beta[2]
        annealed = beta * score - (1.0 - beta) * x / 1.3**2
        assert torch.allclose(variance, torch.ones_like(variance))
        assert torch.allclose(e * mean, 0.5 * e.square() * annealed, atol=2e-2)


def test_states_keep_points_and_velocities_apart():
    process = underdamped(Euclidean(3), 4).double()
    state = torch.arange(12, dtype=F64).reshape(2, 6)
    assert torch.equal(process.point(state), state[:, :3]) and torch.equal(process.observed(state), state[:, :3])
    assert torch.equal(process.drawn(state), state[:, 3:])
    assert torch.equal(process.place(state, -state[:, 3:])[:, :3], state[:, :3])
    moved = process.shift(torch.tensor(1), state)
    assert torch.allclose(moved[:, :3] - state[:, :3], process.log_step[1].exp() * state[:, 3:])
    assert torch.allclose(process.unshift(torch.tensor(1), moved), state)


def test_terminal_states_complete_points_by_their_law():
    process = perturb(underdamped(Euclidean(2), 4, local_mass=True).double(), 0.3)
    x = torch.randn(5, 2, generator=generator(), dtype=F64).repeat(4000, 1)
    score = -x
    with torch.no_grad():
        state = process.complete(x, score, generator=generator())
        entropy = -process.log_carried(state, score)
    assert torch.equal(process.point(state), x)
    # The mean of -log N counts half a degree of freedom each, plus the normalizer at the velocity's own scale.
    with torch.no_grad():
        width = process._last(x, score)[1]
    expected = (0.5 * math.log(2.0 * math.pi) + width.log()).sum(-1)
    assert abs(deviation(entropy - expected, 1.0)) < LIMIT
    assert float(width.std()) > 0.01


# What fixed paths cannot train


@pytest.mark.parametrize("objective", [LogVariance(), VarGrad(), TrajectoryBalance()])
def test_losses_at_fixed_paths_refuse_learned_steps(objective: torch.nn.Module):
    with pytest.raises(ValueError, match="cannot train the step sizes of UnderdampedProcess; pass learn_steps=False"):
        fit(underdamped(Euclidean(2), 3), gaussian(), objective, SMALL)


def test_samplers_freeze_their_steps_under_such_losses():
    target = gaussian()
    for objective, learns in ((None, True), (ReverseKL(), True), (LogVariance(), False)):
        model = ds.UCMCD(target, num_steps=4, width=8, objective=objective)
        start = {name: p.detach().clone() for name, p in model.process.named_parameters()}
        model.fit(steps=5, batch_size=32, learning_rate=1e-2)
        moved = {name for name, p in model.process.named_parameters() if not torch.equal(p.detach(), start[name])}
        assert ("log_step" in moved) == ("log_friction" in moved) == learns
        assert {"increments", "prior.mean", "prior.log_scale"} <= moved
        assert any(name.startswith("control.") for name in moved)
    with pytest.raises(ValueError, match="LogVariance is a loss at fixed paths"):
        ds.UCMCD(target, num_steps=4, objective=LogVariance(), learn_steps=True).fit(steps=1, batch_size=8)


def test_the_pathwise_gradient_of_the_steps_is_right():
    target = mixture()
    process = perturb(underdamped(target.space, 4, local_mass=True).double(), 0.1)

    def loss() -> Tensor:
        return ReverseKL()(simulate(process, target, 16, generator=generator(5), path_gradient=True))

    loss().backward()
    for parameter in (process.log_step, process.log_friction, process.increments, process.prior.log_scale):
        flat = parameter.detach().view(-1)
        gradient = float(parameter.grad.view(-1)[0])
        flat[0] += 1e-5
        up = loss().item()
        flat[0] -= 2e-5
        slope = (up - loss().item()) / 2e-5
        flat[0] += 1e-5
        assert math.isclose(gradient, slope, rel_tol=1e-4, abs_tol=1e-7)


# Training end to end


@pytest.mark.parametrize("kind", [ds.UCMCD, ds.LDVI, ds.UHA])
def test_samplers_improve_and_return_points(kind: type[DiffusionSampler]):
    target = gaussian()
    start = kind(target, num_steps=6, scale=1.3, width=16).sample(2000)
    model = kind(target, num_steps=6, scale=1.3, width=16).fit(steps=60, batch_size=64, learning_rate=1e-2)
    particles = model.sample(4000)
    assert particles.x.shape == (4000, 2)
    assert start.elbo + 0.02 < particles.elbo < 0.7 + 1e-9 + 0.02
    assert abs(particles.log_normalizer.value - 0.7) < LIMIT * particles.log_normalizer.std_error
    assert model.eubo(2000).value > 0.7 - 0.02


def test_both_losses_train():
    for objective in (ReverseKL(), LogVariance()):
        model = ds.UCMCD(mixture(), num_steps=6, scale=1.3, width=16, objective=objective)
        before = model.sample(2000).ess
        after = model.fit(steps=120, batch_size=64, learning_rate=1e-2).sample(2000).ess
        assert after > before + 100.0


def test_a_resumed_run_repeats_the_whole_one(tmp_path: Path):
    def model() -> DiffusionSampler:
        return ds.UCMCD(gaussian(), num_steps=3, width=8, local_mass=True)

    whole = model().fit(steps=8, batch_size=16)
    spent = iter([0.0] * 5 + [1.0])
    model().fit(steps=8, batch_size=16, checkpoint=tmp_path, spent=lambda: next(spent))
    resumed = model().fit(steps=8, batch_size=16, checkpoint=tmp_path, resume=True)
    for (name, a), b in zip(whole.process.state_dict().items(), resumed.process.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="belongs to another configuration"):
        ds.UCMCD(gaussian(), num_steps=4, width=8).fit(steps=8, batch_size=16, checkpoint=tmp_path, resume=True)


def test_single_and_double_precision_agree():
    single = perturb(underdamped(Euclidean(2), 6), 0.1)
    double = underdamped(Euclidean(2), 6).double()
    double.load_state_dict(single.state_dict())
    target = gaussian()
    path = simulate(double, target, 40, generator=generator())
    k = torch.arange(6).unsqueeze(-1)
    for chain, atol in ((single, 1e-3), (double, 1e-10)):
        x = path.x.to(next(chain.parameters()))
        assert path.score is not None
        with torch.no_grad():
            log_f = target.space.log_gaussian(
                chain.drawn(chain.unshift(k, x[1:])), *chain(k, x[:-1], path.score[:-1].to(x.dtype))
            )
        assert torch.allclose(log_f, path.log_forward, atol=atol)


# The suite finds broken shifts


class BrokenShift(Process):
    """A plain refresh of velocities whose shift has a fault."""

    def __init__(self, fault: str) -> None:
        super().__init__(Euclidean(2), 3, learns_backward=True, has_shift=True, learns_shift=fault != "undeclared")
        self.fault = fault
        self.step = torch.nn.Parameter(torch.tensor(0.3, dtype=F64))

    def observed(self, state: Tensor) -> Tensor:
        return state[..., :2]

    def point(self, state: Tensor) -> Tensor:
        return state[..., :2]

    def drawn(self, state: Tensor) -> Tensor:
        return state[..., 2:]

    def place(self, state: Tensor, drawn: Tensor) -> Tensor:
        return torch.cat([state[..., :2], drawn], -1)

    def shift(self, k: Tensor, state: Tensor) -> Tensor:
        x, v = state[..., :2], state[..., 2:]
        scale = 1.1 if self.fault == "volume" else 1.0
        return torch.cat([scale * x + self.step * v, 1.01 * v if self.fault == "drawn" else v], -1)

    def unshift(self, k: Tensor, state: Tensor) -> Tensor:
        x, v = state[..., :2], state[..., 2:]
        if self.fault == "drawn":
            v = v / 1.01
        step = self.step * (1.01 if self.fault == "inverse" else 1.0)
        return torch.cat([(x - step * v) / (1.1 if self.fault == "volume" else 1.0), v], -1)

    def sample_initial(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        state = torch.randn(n, 4, generator=generator, dtype=F64)
        return torch.cat([state[:, :2], 1.2 * state[:, 2:]], -1) if self.fault == "initial" else state

    def log_initial(self, x: Tensor) -> Tensor:
        return (-0.5 * x.square() - 0.5 * math.log(2.0 * math.pi)).sum(-1).double()

    def forward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        assert score is not None
        return Gaussian(0.5 * x[..., 2:] + self.step * score, x.new_full((1,), 0.75).expand(*x.shape[:-1], 1))

    def backward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        assert score is not None
        return Gaussian(0.5 * (x[..., 2:] - self.step * score), x.new_full((1,), 0.75).expand(*x.shape[:-1], 1))

    def complete(self, x: Tensor, score: Tensor | None, *, generator: torch.Generator | None = None) -> Tensor:
        return torch.cat([x, torch.randn(x.shape, generator=generator, dtype=x.dtype)], -1)

    def log_carried(self, state: Tensor, score: Tensor | None) -> Tensor:
        v = state[..., 2:] if self.fault != "carried" else 0.8 * state[..., 2:]
        return (-0.5 * v.square() - 0.5 * math.log(2.0 * math.pi)).sum(-1).double()


SHIFT_FAULTS = {
    "inverse": "Expected unshift to undo shift",
    "drawn": "Expected a shift that leaves the drawn part alone",
    "volume": "Expected a shift of unit Jacobian",
    "undeclared": "Expected a shift without parameters",
    "initial": "Expected log_initial to be the log density of sample_initial",
    "carried": "Some kernel is not the normalized density of its draws",
}


@pytest.mark.parametrize("fault", SHIFT_FAULTS)
def test_suite_finds_a_wrong_shift(fault: str):
    with pytest.raises(AssertionError, match=SHIFT_FAULTS[fault]):
        check_process(BrokenShift(fault), mixture(), generator=generator())


def test_suite_accepts_the_shift_without_a_fault():
    assert "shift" in check_process(BrokenShift("none"), mixture(), generator=generator())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"friction": 0.0}, "Expected friction > 0; got 0.0"),
        ({"scale": -1.0}, "Expected scale > 0; got -1.0"),
        ({"local_scale": 0.0}, r"Expected local_scale in \(0, 1\]; got 0.0"),
        ({"prior": CMCDProcess(Euclidean(3), 2).prior}, "Expected a prior on Euclidean"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        UnderdampedProcess(Euclidean(2), 3, **options)
