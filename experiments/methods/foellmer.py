"""The Foellmer process with a Monte Carlo drift on a curved density, from values alone: no gradient, no training."""

from __future__ import annotations

import math
import time

import torch
from show import options, show

import diffsampler as ds


def main(*, steps: int, draws: int) -> None:
    start = time.process_time()

    def log_prob(x: torch.Tensor) -> torch.Tensor:
        bend = x[:, 1] + 0.3 * (x[:, 0].square() - 1.0)
        return -0.5 * (x[:, 0].square() + (bend / 0.7).square()) - math.log(2.0 * math.pi * 0.7)

    target = ds.Target.from_log_prob(log_prob, dim=2, log_normalizer=0.0)
    sampler = ds.Foellmer(target, num_steps=steps, num_points=256)
    show("Foellmer, a banana", sampler, sampler.sample(draws, seed=1), start)


if __name__ == "__main__":
    main(**options(24, what="steps of a draw"))
