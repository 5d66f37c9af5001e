"""Diffusion GFlowNet: trajectory balance on exploratory paths and on points that local search has improved."""

from __future__ import annotations

import time

from show import options, show

import diffsampler as ds
from diffsampler import targets
from diffsampler.replay import LocalSearch
from diffsampler.sources import Exploratory


def main(*, steps: int, draws: int) -> None:
    start = time.process_time()
    target = targets.GaussianMixture.grid(25)
    sampler = ds.GFN(target, num_steps=64, scale=8.0, level_min=0.03, point_features=64)
    sources = [(Exploratory(), 0.5), (LocalSearch(every=20), 0.5)]
    sampler.fit(steps=steps, batch_size=256, learning_rate=5e-3, sources=sources)
    show("GFN, 25 modes", sampler, sampler.sample(draws, seed=1), start)


if __name__ == "__main__":
    main(**options(400))
