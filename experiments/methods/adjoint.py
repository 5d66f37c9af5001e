"""Adjoint sampling from a point, and the adjoint Schroedinger bridge sampler from a Gaussian with a corrector."""

from __future__ import annotations

import time

from show import options, show

import diffsampler as ds
from diffsampler import targets


def main(*, steps: int, draws: int) -> None:
    target = targets.GaussianMixture.grid(9)
    for name, kind in {"AS, 9 modes": ds.AdjointSampling, "ASBS, the same": ds.ASBS}.items():
        start = time.process_time()
        sampler = kind(target, sigma_max=5.0, point_features=64)
        sampler.fit(steps=steps, batch_size=256, learning_rate=2e-3)
        show(name, sampler, sampler.sample(draws, seed=1), start)


if __name__ == "__main__":
    main(**options(500))
