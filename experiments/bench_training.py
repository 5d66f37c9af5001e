"""Cost of a training step: DIS with the log-variance loss on the nine-mode mixture, batch 512, 100 steps.

Loops that compute the same gradient are timed in turn, round by round, so that a noisy machine slows them alike:

* ``library``: what ``fit`` runs (no graph over time, time embedded once per step, fused score, blocks of rows);
* ``straightforward``: what one writes first (a density of ``torch.distributions`` with its score by autograd, time
  embedded per particle, graph kept over all steps), as the published implementations do;
* ``same density``: the same loop on the library's own density;
* ``simulation``: the library's simulation alone.

Run ``make bench`` or ``python experiments/bench_training.py``; CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from diffsampler import DIS, targets
from diffsampler.gradient import accumulate_gradient
from diffsampler.objective import LogVariance
from diffsampler.trajectory import simulate


def make_sampler(num_steps: int) -> DIS:
    target = targets.GaussianMixture.grid(9)
    return DIS(target, num_steps=num_steps, scale=4.12, learn_variance=False, point_features=0)


def library_step(sampler: DIS, batch: int, generator: torch.Generator) -> float:
    trajectory = simulate(sampler.process, sampler.target, batch, generator=generator)
    return accumulate_gradient(sampler.process, sampler.objective, trajectory)


def textbook_mixture() -> Callable[[Tensor], Tensor]:
    """The nine-mode mixture as written with torch.distributions."""
    line = torch.tensor([-5.0, 0.0, 5.0])
    means = torch.cartesian_prod(line, line)
    normal = torch.distributions.Normal(means, math.sqrt(0.3) * torch.ones_like(means))
    components = torch.distributions.Independent(normal, 1)
    weights = torch.distributions.Categorical(torch.ones(9))
    return torch.distributions.MixtureSameFamily(weights, components).log_prob


def autograd_score(log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (score,) = torch.autograd.grad(log_prob(x).sum(), x)
    return score


def loop_step(log_prob: Callable[[Tensor], Tensor], sampler: DIS, batch: int, generator: torch.Generator) -> float:
    process = sampler.process
    space = process.space
    x = process.sample_initial(batch, generator=generator)
    log_weight = -process.log_initial(x)
    for step in range(process.num_steps):
        k = torch.full((batch,), step)
        kernel = process(k, x, autograd_score(log_prob, x))
        with torch.no_grad():
            noise = space.noise((batch,), like=x, generator=generator)
            after = kernel.mean + kernel.variance.sqrt() * noise
        back = process.backward(k, after, None)
        log_weight = log_weight + space.log_gaussian(x, *back) - space.log_gaussian(after, *kernel)
        x = after
    log_weight = log_weight + log_prob(x)
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
    straightforward = partial(loop_step, textbook_mixture())
    same_density = partial(loop_step, sampler.target.log_prob)
    ours, theirs = (gradient(step, sampler, batch) for step in (library_step, straightforward))
    optimizer = torch.optim.Adam(sampler.process.parameters(), fused=True)
    generator = torch.Generator().manual_seed(0)

    def full_step() -> None:
        optimizer.zero_grad()
        library_step(sampler, batch, generator)
        torch.nn.utils.clip_grad_norm_(sampler.process.parameters(), 1.0)
        optimizer.step()

    cases: dict[str, Callable[[], object]] = {
        "library": full_step,
        "straightforward": lambda: straightforward(sampler, batch, generator),
        "same density": lambda: same_density(sampler, batch, generator),
        "simulation": lambda: simulate(sampler.process, sampler.target, batch, generator=generator),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            seconds[name].append(timed(run))

    def ratio(name: str) -> float:
        return statistics.median(s / f for s, f in zip(seconds[name], seconds["library"], strict=True))

    return {
        "gradient difference": float((ours - theirs).abs().max() / theirs.abs().max()),
        **{f"{name} median": statistics.median(values) for name, values in seconds.items()},
        **{f"{name} min": min(values) for name, values in seconds.items()},
        "speed-up": ratio("straightforward"),
        "speed-up, same density": ratio("same density"),
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
