"""Diffusion generative flow sampler: a flow function and sub-trajectory balance."""

from __future__ import annotations

import time

from show import options, show

import diffsampler as ds
from diffsampler import targets


def main(*, steps: int, draws: int) -> None:
    start = time.process_time()
    target = targets.GaussianMixture.grid(9)
    sampler = ds.DGFS(target, num_steps=64, scale=5.0, point_features=64)
    sampler.fit(steps=steps, batch_size=256, learning_rate=5e-3)
    show("DGFS, 9 modes", sampler, sampler.sample(draws, seed=1), start)


if __name__ == "__main__":
    main(**options(300))
