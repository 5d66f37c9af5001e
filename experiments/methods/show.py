"""What every example prints, and its options on the command line."""

from __future__ import annotations

import argparse
import time

import torch

from diffsampler.particles import Particles
from diffsampler.sampler import Sampler


def show(name: str, sampler: Sampler, particles: Particles, start: float) -> None:
    """One line about draws of a target with known log Z; ``start`` is a reading of ``time.process_time``."""
    exact, found = sampler.target.log_normalizer, particles.log_normalizer
    assert exact is not None
    print(
        f"{name}: ELBO gap {exact - particles.elbo:.3f}, log Z off by {found.value - exact:+.4f} +- "
        f"{found.std_error:.4f}, ESS/N {particles.ess / len(particles):.3f}, {time.process_time() - start:.1f} CPU s"
    )


def options(steps: int, *, what: str = "training steps") -> dict[str, int]:
    """The arguments of an example's ``main``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=steps, help=f"{what} (default: {steps})")
    parser.add_argument("--draws", type=int, default=4000, help="draws that are judged (default: 4000)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    return {"steps": chosen.steps, "draws": chosen.draws}
