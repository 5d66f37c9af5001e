"""Well-tempered adjoint Schroedinger bridge sampling: hills along one coordinate level the barrier of a double well."""

from __future__ import annotations

import time

import torch
from show import options, show

import diffsampler as ds
from diffsampler import targets
from diffsampler.methods.matching import Matching
from diffsampler.methods.wt_asbs import Axis


def first(x: torch.Tensor) -> torch.Tensor:
    return x[:, :1]


def main(*, steps: int, draws: int) -> None:
    start = time.process_time()
    target = targets.ManyWell(dim=2)
    matching = Matching(fresh=512, every=20, clip=20.0, reweight=0.3)
    sampler = ds.WTASBS(
        target,
        first,
        [Axis(-3.0, 3.0, 121, 0.2)],
        num_steps=32,
        height=0.003,
        matching=matching,
        sigma_min=0.1,
        sigma_max=2.5,
    )
    sampler.fit(steps=steps, batch_size=256, learning_rate=5e-3)
    particles = sampler.sample(draws, seed=1)
    share = particles.expectation((particles.x[:, :1] > 0.0).double())[0]
    print(f"right well: weight {float(share):.3f} (exact {float(target.mode_weights()[1]):.3f})")
    show("WTASBS, two wells", sampler, particles, start)


if __name__ == "__main__":
    main(**options(600))
