"""Annealed Langevin dynamics with a learned reversal (MCD), and with none (ULA): only steps and prior are learned."""

from __future__ import annotations

import time

from show import options, show

import diffsampler as ds
from diffsampler import targets


def main(*, steps: int, draws: int) -> None:
    target = targets.ManyWell(dim=8)
    for name, kind in {"ULA, 16 wells in 8 dimensions": ds.AnnealedULA, "MCD, the same": ds.MCD}.items():
        start = time.process_time()
        sampler = kind(target, num_steps=64, scale=2.0, local_scale=0.1)
        sampler.fit(steps=steps, batch_size=256, learning_rate=5e-3)
        show(name, sampler, sampler.sample(draws, seed=1), start)


if __name__ == "__main__":
    main(**options(150))
