"""Time-reversed diffusion sampler with exact Gaussian kernels: the noising is fixed, its reversal is learned."""

from __future__ import annotations

import time

from show import options, show

import diffsampler as ds
from diffsampler import targets


def main(*, steps: int, draws: int) -> None:
    start = time.process_time()
    target = targets.GaussianMixture.grid(9)
    sampler = ds.DIS(target, num_steps=32, scale=4.12, point_features=64)
    sampler.fit(steps=steps, batch_size=256, learning_rate=5e-3)
    show("DIS, 9 modes", sampler, sampler.sample(draws, seed=1), start)


if __name__ == "__main__":
    main(**options(500))
