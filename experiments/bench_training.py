"""Cost of a training step: DIS with the log-variance loss on the nine-mode mixture, batch 512, 100 steps.

Three loops compute the same gradient and are timed in turn, round by round, so that a noisy machine slows them alike:

* ``library``: what ``fit`` runs (no graph over time, time embedded once per step, fused score, blocks of rows);
* ``straightforward``: what one writes first (time embedded per particle, autograd score, graph kept over all steps);
* ``simulation``: the library's simulation alone.

Run ``make bench`` or ``python experiments/bench_training.py``; CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffsampler import DIS, targets
from diffsampler.objective import LogVariance
from diffsampler.target import Target
from diffsampler.training import accumulate_gradient
from diffsampler.trajectory import simulate


def make_sampler(num_steps: int) -> DIS:
    target = targets.GaussianMixture.grid(9)
    return DIS(target, num_steps=num_steps, scale=4.12, learn_variance=False, point_features=0)


def library_step(sampler: DIS, batch: int, generator: torch.Generator) -> float:
    trajectory = simulate(sampler.process, sampler.target, batch, generator=generator)
    return accumulate_gradient(sampler.process, sampler.objective, trajectory)


def autograd_score(target: Target, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (score,) = torch.autograd.grad(target.log_prob(x).sum(), x)
    return score


def straightforward_step(sampler: DIS, batch: int, generator: torch.Generator) -> float:
    process, target = sampler.process, sampler.target
    space = process.space
    x = process.sample_initial(batch, generator=generator)
    log_weight = -process.log_initial(x)
    for step in range(process.num_steps):
        k = torch.full((batch,), step)
        kernel = process(k, x, autograd_score(target, x))
        with torch.no_grad():
            noise = space.noise((batch,), like=x, generator=generator)
            after = kernel.mean + kernel.variance.sqrt() * noise
        back = process.backward(k, after, None)
        log_weight = log_weight + space.log_gaussian(x, *back) - space.log_gaussian(after, *kernel)
        x = after
    log_weight = log_weight + target.log_prob(x)
    loss = log_weight.var()
    loss.backward()
    return loss.item()


def gradient(step: Callable[[DIS, int, torch.Generator], float], sampler: DIS, batch: int) -> Tensor:
    sampler.process.zero_grad()
    step(sampler, batch, torch.Generator().manual_seed(7))
    return torch.cat([p.grad.flatten() for p in sampler.process.parameters() if p.grad is not None])


def timed(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(batch: int, num_steps: int, rounds: int) -> dict[str, float]:
    sampler = make_sampler(num_steps)
    assert isinstance(sampler.objective, LogVariance)
    # A few steps first: with zero-initialised heads most of the gradient would be zero.
    sampler.fit(steps=5, batch_size=256)
    ours, theirs = (gradient(step, sampler, batch) for step in (library_step, straightforward_step))
    optimizer = torch.optim.Adam(sampler.process.parameters(), fused=True)
    generator = torch.Generator().manual_seed(0)

    def full_step() -> None:
        optimizer.zero_grad()
        library_step(sampler, batch, generator)
        torch.nn.utils.clip_grad_norm_(sampler.process.parameters(), 1.0)
        optimizer.step()

    cases: dict[str, Callable[[], object]] = {
        "library": full_step,
        "straightforward": lambda: straightforward_step(sampler, batch, generator),
        "simulation": lambda: simulate(sampler.process, sampler.target, batch, generator=generator),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            seconds[name].append(timed(run))
    ratio = statistics.median(s / f for s, f in zip(seconds["straightforward"], seconds["library"], strict=True))
    return {
        "gradient difference": float((ours - theirs).abs().max() / theirs.abs().max()),
        **{f"{name} median": statistics.median(values) for name, values in seconds.items()},
        **{f"{name} min": min(values) for name, values in seconds.items()},
        "speed-up": ratio,
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("results/bench_training.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(options.batch, options.steps, options.rounds)
    for name, value in result.items():
        print(f"{name:24} {value:.4g}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    setting = {"batch": options.batch, "steps": options.steps, "rounds": options.rounds, "torch": torch.__version__}
    options.out.write_text(json.dumps({**setting, **result}, indent=1))


if __name__ == "__main__":
    main()
