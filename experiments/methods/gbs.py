"""Bridge sampler: the chain to the target and the chain back are both learned."""

from __future__ import annotations

import time

from show import options, show

import diffsampler as ds
from diffsampler import targets


def main(*, steps: int, draws: int) -> None:
    start = time.process_time()
    target = targets.ManyWell(dim=8)
    sampler = ds.GBS(target, num_steps=64, scale=2.0, local_scale=0.1)
    sampler.fit(steps=steps, batch_size=256, learning_rate=5e-3)
    show("GBS, 16 wells in 8 dimensions", sampler, sampler.sample(draws, seed=1), start)


if __name__ == "__main__":
    main(**options(300))
