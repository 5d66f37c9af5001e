"""Graphs through paths: in pieces as at once, at frozen forward parameters, and without the paths that are lost."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from cases import F64, MAKERS, HyperplaneGaussian, mixture, perturb
from torch import Tensor

from diffsampler import targets
from diffsampler.methods.dds import DDSProcess
from diffsampler.objective import LogVariance, Objective, ReverseKL
from diffsampler.pathwise import simulate_pathwise
from diffsampler.process import Process
from diffsampler.schedule import cosine_preserving
from diffsampler.space import Euclidean
from diffsampler.target import Target
from diffsampler.trajectory import Trajectory, simulate


def flat(process: Process) -> Tensor:
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in process.parameters()])
    process.zero_grad()
    return gradient


def taught(process: Process, target: Target, objective: Objective, **options: Any) -> tuple[Trajectory, Tensor]:
    path = simulate_pathwise(process, target, 7, generator=torch.Generator().manual_seed(3), **options)
    objective(path).backward()
    return path, flat(process)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_pieces_have_the_gradient_of_the_whole(name: str, detach: bool):
    target = mixture()
    process = perturb(MAKERS[name](target.space, 5).double(), 0.2)
    process.detach_score = detach
    plain = simulate(process, target, 7, generator=torch.Generator().manual_seed(3), path_gradient=True)
    ReverseKL()(plain).backward()
    expected = flat(process)
    scale = float(expected.abs().max())
    assert scale > 1e-6
    for pieces in (1, 2, 5):
        path, gradient = taught(process, target, ReverseKL(), pieces=pieces)
        assert torch.equal(path.x, plain.x)
        assert torch.allclose(path.log_weight, plain.log_weight, rtol=0.0, atol=1e-12)
        assert float((gradient - expected).abs().max()) < 1e-12 * (1.0 + scale), pieces


def test_pieces_on_mean_free_particles_and_other_losses():
    target = HyperplaneGaussian(3, 2)
    process = perturb(MAKERS["cmcd"](target.space, 6).double(), 0.2)
    whole, pieces = (taught(process, target, LogVariance(), pieces=count)[1] for count in (1, 4))
    assert torch.allclose(whole, pieces, rtol=1e-10, atol=1e-12) and float(whole.abs().max()) > 1e-3


def test_more_pieces_than_steps_are_refused():
    with pytest.raises(ValueError, match="Expected between 1 and 5 pieces of the chain; got 6"):
        taught(MAKERS["dds"](Euclidean(2), 5), mixture(), ReverseKL(), pieces=6)


# Sticking the landing


@pytest.mark.parametrize("name", ["cmcd_mixture", "ucmcd"])
def test_frozen_forward_densities_keep_the_mean_gradient(name: str):
    """Paired differences over 40 batches of 64 at 4.5 standard errors, 8 directions: false alarm 5e-5 per case."""
    target = mixture()
    process = perturb(MAKERS[name](target.space, 4).double(), 0.2)
    along = torch.randn(sum(p.numel() for p in process.parameters()), 8, generator=torch.Generator(), dtype=F64)
    differences, plain = [], []
    for seed in range(40):
        both = []
        for freeze in (False, True):
            path = simulate_pathwise(
                process, target, 64, generator=torch.Generator().manual_seed(seed), freeze=freeze, pieces=1 + freeze
            )
            ReverseKL()(path).backward()
            both.append(flat(process) @ along)
        plain.append(both[0])
        differences.append(both[1] - both[0])

    def worst(values: list[Tensor]) -> float:
        stacked = torch.stack(values)
        return float((stacked.mean(0).abs() / (stacked.std(0) / math.sqrt(len(stacked)))).max())

    assert worst(differences) < 4.5
    assert worst(plain) > 5.0, "there is a gradient to compare"
    assert float(torch.stack(differences).abs().max()) > 1e-6, "each batch has another one"


def test_at_the_optimum_frozen_densities_leave_no_noise():
    target = targets.Gaussian([0.0, 0.0], scale=1.4)
    process = DDSProcess(Euclidean(2), cosine_preserving(6), scale=1.4, width=8, detach_score=False).double()
    assert float(taught(process, target, ReverseKL(), freeze=True)[1].abs().max()) < 1e-6
    assert float(taught(process, target, ReverseKL())[1].abs().max()) > 1e-3


# Lost paths


class Walled(Target):
    """A Gaussian that is no number beyond a wall, gradients and all."""

    def __init__(self) -> None:
        super().__init__(Euclidean(2))

    def log_prob(self, x: Tensor) -> Tensor:
        beyond = x[..., 0] > 2.0
        return -0.5 * x.square().sum(-1) * torch.where(beyond, math.nan, 1.0)


@pytest.mark.parametrize("pieces", [1, 3])
def test_lost_paths_do_not_spoil_the_gradient_of_the_others(pieces: int):
    process = perturb(MAKERS["cmcd"](Euclidean(2), 5).double(), 0.1)
    generator = torch.Generator().manual_seed(0)
    path = simulate_pathwise(process, Walled(), 64, generator=generator, pieces=pieces)
    whole = simulate(process, Walled(), 64, generator=torch.Generator().manual_seed(0), path_gradient=True)
    finite = whole.log_weight.isfinite()
    assert 0 < path.x.shape[1] == int(finite.sum()) < 64
    assert torch.allclose(path.x, whole.x[:, finite], atol=1e-12)
    ReverseKL()(path).backward()
    assert bool(flat(process).isfinite().all())
    ReverseKL()(whole.select(finite)).backward()
    assert not bool(flat(process).isfinite().all()), "leaving them out of the loss is not enough"


# Memory


def test_memory_of_pieces():
    """Peak memory of one step in a process of its own: 128 steps of 512 paths."""
    script = """
        import re, sys, torch
        from diffsampler import targets
        from diffsampler.methods.dds import DDSProcess
        from diffsampler.objective import ReverseKL
        from diffsampler.pathwise import simulate_pathwise
        from diffsampler.schedule import cosine_preserving

        target = targets.Gaussian(torch.zeros(8), scale=1.0)
        process = DDSProcess(target.space, cosine_preserving(128), scale=1.3)

        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

        before = peak()
        path = simulate_pathwise(
            process, target, 512, generator=torch.Generator().manual_seed(0), pieces=int(sys.argv[1])
        )
        ReverseKL()(path).backward()
        print((peak() - before) // 1024)
    """
    used = []
    for pieces in (1, 12):
        command = [sys.executable, "-c", textwrap.dedent(script), str(pieces)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        used.append(int(done.stdout))
    assert used[1] < 0.4 * used[0], used
    print(f"peak of one step: {used[0]} MiB at once, {used[1]} MiB in 12 pieces")
