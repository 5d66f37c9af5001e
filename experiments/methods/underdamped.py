"""Chains with velocities on the funnel: no control (UHA), learned reversal (LDVI), learned drift (UCMCD)."""

from __future__ import annotations

import time

from show import options, show

import diffsampler as ds
from diffsampler import targets
from diffsampler.objective import ReverseKL


def main(*, steps: int, draws: int) -> None:
    target = targets.Funnel()
    for name, kind in {"UHA, funnel": ds.UHA, "LDVI, the same": ds.LDVI, "UCMCD, the same": ds.UCMCD}.items():
        start = time.process_time()
        sampler = kind(target, num_steps=32, objective=ReverseKL())
        sampler.fit(steps=steps, batch_size=128, learning_rate=4e-3)
        show(name, sampler, sampler.sample(draws, seed=1), start)


if __name__ == "__main__":
    main(**options(60))
