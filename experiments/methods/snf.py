"""Stochastic normalizing flow: coupling layers with unadjusted Langevin steps between them, reverse divergence."""

from __future__ import annotations

import time

from show import options, show

import diffsampler as ds
from diffsampler import targets


def main(*, steps: int, draws: int) -> None:
    start = time.process_time()
    target = targets.Banana()
    sampler = ds.SNF(target, num_blocks=4, scale=8.0)
    sampler.fit(steps=steps, batch_size=256)
    show("SNF, banana", sampler, sampler.sample(draws, seed=1), start)


if __name__ == "__main__":
    main(**options(500))
