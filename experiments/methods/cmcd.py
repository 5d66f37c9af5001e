"""Controlled Monte Carlo diffusion on the funnel, pathwise, with step sizes that depend on the point."""

from __future__ import annotations

import time

from show import options, show

import diffsampler as ds
from diffsampler import targets
from diffsampler.objective import ReverseKL


def main(*, steps: int, draws: int) -> None:
    start = time.process_time()
    target = targets.Funnel()
    sampler = ds.CMCD(target, num_steps=32, objective=ReverseKL(), local_steps=True)
    sampler.fit(steps=steps, batch_size=128, learning_rate=4e-3)
    show("CMCD, funnel", sampler, sampler.sample(draws, seed=1), start)


if __name__ == "__main__":
    main(**options(150))
