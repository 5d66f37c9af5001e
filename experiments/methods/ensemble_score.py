"""Ensemble scores: gradient-free reverse diffusion of ensembles, with exact path weights and no training."""

from __future__ import annotations

import time

from show import options, show

import diffsampler as ds
from diffsampler import targets


def main(*, steps: int, draws: int) -> None:
    start = time.process_time()
    target = targets.GaussianMixture.grid(9)
    sampler = ds.EnsembleScore(target, num_particles=256, num_levels=steps)
    show("EnsembleScore, 9 modes", sampler, sampler.sample(draws, seed=1), start)


if __name__ == "__main__":
    main(**options(40, what="levels of noise"))
