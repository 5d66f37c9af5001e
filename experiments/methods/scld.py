"""Sequential controlled Langevin: pieces of a controlled chain with resampling and moves between them."""

from __future__ import annotations

import time

from show import options, show

import diffsampler as ds
from diffsampler import targets


def main(*, steps: int, draws: int) -> None:
    start = time.process_time()
    target = targets.GaussianMixture.forty()
    sampler = ds.SCLD(target, num_steps=64, segments=4, scale=25.0, local_scale=0.05)
    sampler.fit(steps=steps, batch_size=256)
    show("SCLD, 40 modes", sampler, sampler.sample(draws, seed=1), start)


if __name__ == "__main__":
    main(**options(100))
