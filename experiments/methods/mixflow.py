"""MixFlow: averaged images of a Gaussian under leapfrog flows; no training, a density that can be evaluated."""

from __future__ import annotations

import time

from show import options, show

import diffsampler as ds
from diffsampler import targets


def main(*, steps: int, draws: int) -> None:
    start = time.process_time()
    target = targets.GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], scales=0.6)
    reference = targets.Gaussian([0.0, 0.0], scale=0.6)
    sampler = ds.MixFlow(target, reference=reference, num_images=steps, num_steps=10, step_size=0.2)
    show("MixFlow, 2 modes", sampler, sampler.sample(draws, seed=1), start)


if __name__ == "__main__":
    main(**options(100, what="images of the flow"))
