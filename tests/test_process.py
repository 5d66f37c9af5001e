"""Processes: conformance in every state and space, closed forms of single kernels, broken classes that must fail."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import F64, MAKERS, TORUS, HyperplaneGaussian, VonMises, mixture, perturb, torus_process
from torch import Tensor

from diffsampler import targets
from diffsampler.methods.cmcd import CMCDProcess
from diffsampler.methods.dds import DDSProcess
from diffsampler.methods.dis import DISProcess
from diffsampler.methods.pis import PISProcess
from diffsampler.process import Gaussian, Process
from diffsampler.schedule import cosine_preserving, variance_exploding, variance_preserving
from diffsampler.space import Euclidean, MeanFree, Torus
from diffsampler.testing import check_process
from diffsampler.testing.process import _check_weights


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Conformance


@pytest.mark.parametrize("std", [0.0, 0.3])
@pytest.mark.parametrize("name", MAKERS)
def test_processes_conform(name: str, std: float):
    target = mixture()
    process = perturb(MAKERS[name](target.space, 8).double(), std)
    done = check_process(process, target, generator=generator())
    assert {"record", "kernels", "declarations", "weights"} <= set(done)
    assert ("bridge" in done) == process.has_bridge and ("anchors" in done) == process.has_anchors
    assert ("shift" in done) == process.has_shift


@pytest.mark.parametrize("name", MAKERS)
def test_processes_conform_on_mean_free_particles(name: str):
    target = HyperplaneGaussian(4, 2)
    check_process(perturb(MAKERS[name](target.space, 5).double(), 0.2), target, generator=generator())


@pytest.mark.parametrize("name", TORUS)
def test_processes_conform_on_a_torus(name: str):
    target = VonMises(2)
    check_process(perturb(torus_process(name, 5).double(), 0.2), target, generator=generator())


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("num_steps", [1, 2])
def test_few_steps_and_single_precision_conform(name: str, num_steps: int):
    target = mixture()
    check_process(MAKERS[name](target.space, num_steps), target, generator=generator())


# Negative controls: a correct process with one fault at a time


class Broken(Process):
    """An uncontrolled denoising process of a standard Gaussian, with a fault."""

    def __init__(self, fault: str) -> None:
        super().__init__(Euclidean(2), 10, has_bridge=True, has_anchors=fault == "anchor")
        self.fault = fault
        self.a, _, self.total_a, self.total_v = cosine_preserving(10)
        self.control = torch.nn.Linear(2, 2, dtype=F64)
        with torch.no_grad():
            self.control.weight.zero_()
            self.control.bias.fill_(0.1)

    def sample_initial(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        match self.fault:
            case "global generator":
                torch.rand(1)
            case "unseeded":
                generator = torch.Generator().manual_seed(torch.Generator().seed() % 2**31)
            case "initial variance":
                return 1.1 * torch.randn(n, 2, generator=generator, dtype=F64)
            case "dtype":
                return torch.randn(n, 2, generator=generator)
        return torch.randn(n, 2, generator=generator, dtype=F64)

    def log_initial(self, x: Tensor) -> Tensor:
        value = self.space.log_gaussian(x, torch.zeros_like(x), x.new_ones(1))
        return value + 0.0 * self.control.bias.sum() if self.fault == "learned initial" else value

    def forward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        a = self.a[k].unsqueeze(-1)
        mean, variance = a * x + 0.1 * self.control(x), 1.0 - a.square()
        match self.fault:
            case "batched variance":
                variance = 1.05 * variance if k.ndim else variance
            case "batch mean":
                mean = mean + 1e-3 * x.mean(-2, keepdim=True)
            case "negative":
                variance = -variance
            case "detached":
                mean = mean.detach()
        return Gaussian(mean, variance)

    def backward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        a = self.a[k].unsqueeze(-1)
        if self.fault == "learned backward":
            return Gaussian(a * x + 0.0 * self.control(x), 1.0 - a.square())
        return Gaussian(a * x, 1.0 - a.square())

    def log_anchor(self, k: Tensor, x: Tensor, log_prob: Tensor) -> Tensor:
        return log_prob

    def sample_bridge(self, k: Tensor, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        noise = self.total_v[k].sqrt().unsqueeze(-1) * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        mean = self.total_a[k].unsqueeze(-1) * x
        return mean + (1.2 * noise if self.fault == "bridge" else noise)


FAULTS = {
    "global generator": "the global one moved",
    "unseeded": "Expected equal seeds to give equal initial points",
    "initial variance": "Expected log_initial to be the log density of sample_initial",
    "dtype": "Expected initial points in the dtype of the process",
    "learned initial": "Expected an initial law without parameters",
    "learned backward": "Expected backward kernels without parameters",
    "batched variance": "Expected forward at step 0 to be the same alone and in a block",
    "batch mean": "Expected forward at step 0 to be the same alone and in a block",
    "negative": "Expected finite numbers at ordinary points",
    "detached": "Expected a graph through the states with path_gradient=True",
    "anchor": "Expected the anchor at the end to be the initial law",
    "bridge": "Expected sample_bridge at step",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_suite_finds(fault: str):
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        check_process(Broken(fault), mixture(), generator=generator())


def test_suite_accepts_the_control_without_a_fault():
    check_process(Broken("none"), mixture(), generator=generator())


class Misjudged(DISProcess):
    """Draws with one variance, densities with another that is five percent larger."""

    def forward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        mean, variance = super().forward(k, x, score)
        return Gaussian(mean, 1.05 * variance if k.ndim else variance)


@pytest.mark.parametrize("kind", [DISProcess, Misjudged])
def test_weights_alone_find_a_variance_that_is_five_percent_off(kind: type[DISProcess]):
    target = targets.Gaussian([0.0, 0.0], scale=1.3)
    process = kind(target.space, variance_preserving(50), scale=1.3, width=8).double()
    if kind is DISProcess:
        _check_weights(process, target, 10000, generator())
        return
    with pytest.raises(AssertionError, match="Some kernel is not the normalized density of its draws"):
        _check_weights(process, target, 10000, generator())


def test_suite_wants_one_space():
    with pytest.raises(AssertionError, match="Expected a process on Euclidean"):
        check_process(MAKERS["dds"](Euclidean(3), 3), mixture(), generator=generator())


# Single kernels


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_kernels_integrate_to_one(name: str, direction: str):
    """On a line, by the trapezoidal rule over 16 standard deviations."""
    process = perturb(MAKERS[name](Euclidean(1), 4).double(), 0.2)
    x, score = torch.tensor([[0.7]], dtype=F64), torch.tensor([[-0.4]], dtype=F64)
    state = process.complete(x, score, generator=generator()).detach()
    for k in range(4):
        with torch.no_grad():
            mean, variance = getattr(process, direction)(torch.tensor(k), state, score)
            if float(variance) == 0.0:
                assert name in ("pis", "gfn", "gfn_backward", "dgfs", "as") and direction == "backward" and k == 0
                continue
            grid = torch.linspace(-8.0, 8.0, 2001, dtype=F64).unsqueeze(-1) * variance.sqrt() + mean
            density = process.space.log_gaussian(grid, mean, variance).exp()
        assert float(torch.trapezoid(density, grid[:, 0])) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("name", ["pis", "dds"])
def test_backward_chains_are_those_of_the_reference(name: str):
    """The uncontrolled chain started in its prior is reversed exactly: marginals and kernels agree as joint laws."""
    process = MAKERS[name](Euclidean(1), 5).double()
    x = torch.randn(200, 1, generator=generator(), dtype=F64)
    scale = float(process.scale)
    for k in range(1, 5):
        if name == "pis":
            before, after = scale**2 * k / 5, scale**2 * (k + 1) / 5
            contraction, noise = 1.0, scale**2 / 5
        else:
            before = after = scale**2
            contraction, noise = float(process.contraction[k]), scale**2 * float(process.variance[k])
        y = x.flip(0)
        forward = _line(x, 0.0, before) + _line(y, contraction * x, noise)
        with torch.no_grad():
            backward = _line(y, 0.0, after) + process.space.log_gaussian(x, *process.backward(torch.tensor(k), y, None))
        assert torch.allclose(forward, backward, atol=1e-5)


def _line(x: Tensor, mean: Tensor | float, variance: float) -> Tensor:
    return (-0.5 * (x - mean).square() / variance - 0.5 * math.log(2.0 * math.pi * variance)).squeeze(-1)


def test_dis_kernels_are_the_exact_posterior_of_a_gaussian():
    """With zero control the forward kernel is that of Bayes' rule for data N(0, S^2)."""
    for schedule in (variance_preserving(6), variance_exploding(6)):
        process = DISProcess(Euclidean(1), schedule, scale=1.7, width=8).double()
        a, v, total_a, total_v = schedule
        x, s2 = torch.tensor([[0.9]], dtype=F64), 1.7**2
        for k in range(6):
            prior = s2 * (total_a[k + 1].square() + total_v[k + 1])
            variance = 1.0 / (1.0 / prior + a[k].square() / (s2 * v[k]))
            mean = variance * a[k] * x / (s2 * v[k])
            with torch.no_grad():
                kernel = process(torch.tensor(k), x, -x / s2)
            assert torch.allclose(kernel.mean, mean, rtol=1e-5)
            assert torch.allclose(kernel.variance, variance, rtol=1e-5)


@pytest.mark.parametrize("local_steps", [False, True])
def test_cmcd_starts_as_annealed_langevin(local_steps: bool):
    process = CMCDProcess(Euclidean(2), 6, scale=2.0, local_steps=local_steps, width=8).double()
    x, score = torch.randn(5, 2, generator=generator(), dtype=F64), torch.full((5, 2), 0.01, dtype=F64)
    beta, step = process.beta.detach(), process.log_step.exp().detach()
    assert beta.shape == (6,) and bool((beta.diff() > 0.0).all()) and 0.0 < float(beta[0]) and float(beta[-1]) < 1.0
    for k in range(6):
        with torch.no_grad():
            forward, backward = process(torch.tensor(k), x, score), process.backward(torch.tensor(k), x, score)
        annealed = beta[k] * score - (1.0 - beta[k]) * x / 4.0
        assert torch.allclose(forward.variance, 2.0 * step[k], rtol=1e-6)
        # The clip is smooth: a small drift passes up to its cube.
        assert torch.allclose(forward.mean, x + step[k] * annealed, atol=0.05 * float((step[k] * annealed).abs().max()))
        assert torch.allclose(forward.mean, backward.mean) and torch.allclose(forward.variance, backward.variance)


def test_cmcd_drift_is_bounded():
    process = CMCDProcess(Euclidean(2), 4, width=8).double()
    x, score = torch.zeros(3, 2, dtype=F64), torch.full((3, 2), 1e12, dtype=F64)
    with torch.no_grad():
        mean, variance = process(torch.tensor(3), x, score)
    assert float(((mean - x) / variance.sqrt()).abs().max()) <= process.clip_bound * (1.0 + 1e-9)


def test_learned_variances_stay_in_their_range():
    fixed = DISProcess(Euclidean(2), variance_preserving(4), learn_variance=False, width=8).double()
    learned = DISProcess(Euclidean(2), variance_preserving(4), learn_variance=True, width=8).double()
    x = torch.randn(50, 2, generator=generator(), dtype=F64)
    with torch.no_grad():
        learned.control.net.head.bias += torch.tensor([0.0, 0.0, 50.0, -50.0])
        ratio = learned(torch.tensor(2), x, -x).variance / fixed(torch.tensor(2), x, -x).variance
    assert torch.allclose(ratio.log(), torch.tensor([2.0, -2.0], dtype=F64), atol=1e-3)


# Construction

BAD: list[tuple[Any, str]] = [
    (lambda: PISProcess(Euclidean(2), 0), "Expected num_steps >= 1; got 0"),
    (lambda: PISProcess(Euclidean(2), 3, scale=-1.0), "Expected scale > 0; got -1.0"),
    (lambda: PISProcess(Torus(2), 3), "Expected a Euclidean or mean-free space"),
    (lambda: DDSProcess(Torus(2), cosine_preserving(3)), "Expected a Euclidean or mean-free space"),
    (lambda: DDSProcess(Euclidean(2), variance_exploding(3)), "Expected a variance-preserving schedule"),
    (lambda: DDSProcess(Euclidean(2), cosine_preserving(3), scale=0.0), "Expected scale > 0; got 0.0"),
    (lambda: DISProcess(Torus(2), variance_preserving(3)), "Expected an exploding schedule"),
    (lambda: DISProcess(Euclidean(2), variance_preserving(3), scale=math.nan), "Expected scale > 0; got nan"),
    (lambda: CMCDProcess(Euclidean(2), 3, scale=0.0), "Expected scale > 0; got 0.0"),
    (lambda: CMCDProcess(Euclidean(2), 0), "Expected num_steps >= 1; got 0"),
]


@pytest.mark.parametrize(("build", "message"), BAD)
def test_bad_processes_are_refused(build: Any, message: str):
    with pytest.raises(ValueError, match=message):
        build()


def test_missing_parts_say_so():
    x, k = torch.zeros(1, 2), torch.tensor(0)
    with pytest.raises(NotImplementedError, match="CMCDProcess has no closed-form bridge"):
        MAKERS["cmcd"](Euclidean(2), 3).sample_bridge(k, x)
    with pytest.raises(NotImplementedError, match="PISProcess has no anchor densities"):
        MAKERS["pis"](Euclidean(2), 3).log_anchor(k, x, torch.zeros(1))


@pytest.mark.parametrize("name", MAKERS)
def test_construction_is_seeded_and_touches_no_global_state(name: str):
    before = torch.get_rng_state()
    first, again = MAKERS[name](Euclidean(2), 4), MAKERS[name](Euclidean(2), 4)
    assert torch.equal(before, torch.get_rng_state())
    for (key, a), b in zip(first.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert first.config() == again.config() != MAKERS[name](Euclidean(2), 5).config()


def test_mean_free_processes_are_equivariant_in_their_parameters():
    """Mean-free particles share one scale, so that kernels stay isotropic."""
    for name in MAKERS:
        process = perturb(MAKERS[name](MeanFree(3, 2), 4).double(), 0.2)
        x = process.space.project(torch.randn(5, 6, generator=generator(), dtype=F64))
        with torch.no_grad():
            y = process.complete(x, -x, generator=generator())
            for kernel in (process(torch.tensor(2), y, -x), process.backward(torch.tensor(2), y, -x)):
                assert kernel.variance.shape[-1] == 1
