"""Settings of ``boltzmann.py``: for a CPU, from particles of tempered SMC, and as published."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diffsampler.methods.matching import Stages


@dataclass(frozen=True)
class Setting:
    """How a system is sampled."""

    particles: int
    dimensions: int
    num_steps: int
    sigma_min: float
    sigma_max: float
    draw_steps: int | None = None
    """Steps of the chain that is judged, with the same control on a finer grid; as in training by default."""
    start_scale: float | None = None
    """Standard deviation of the start law; None starts at a point."""
    left_endpoint: bool = False
    learn_variance: bool = True
    resolution: float = 0.03
    width: int = 48
    depth: int = 4
    radial: int = 16
    reach: float = 8.0
    """Largest distance that the radial functions resolve."""
    attention: bool = False
    steps: int = 12_000
    batch_size: int = 512
    learning_rate: float = 2e-3
    fresh: int = 512
    every: int = 100
    capacity: int = 8000
    clip: float = 100.0
    power: float = 1.0
    reweight: float | None = 0.3
    stages: Stages | None = None
    core: float | None = None
    """Continuation of the pair energy in training; draws and weights are those of the exact energy."""
    bank: int | None = None
    """Particles of SMC in place of reweighted end points; with no steps of training they are the answer."""
    spread: float = 1.0
    """Standard deviation of the Gaussian that SMC begins at."""


PUBLISHED = Setting(
    4,
    2,
    num_steps=199,
    sigma_min=1e-3,
    sigma_max=1.0,
    start_scale=1.633,
    left_endpoint=True,
    learn_variance=False,
    width=128,
    depth=5,
    attention=True,
    steps=500_000,
    learning_rate=1e-4,
    capacity=10_000,
    power=0.0,
    reweight=None,
    stages=Stages(20_000, 2_000),
)
SMC = Setting(4, 2, num_steps=1, sigma_min=0.1, sigma_max=1.0, steps=0, bank=4096)
SETTINGS = {
    "dw4": {
        "cpu": Setting(
            4,
            2,
            num_steps=100,
            sigma_min=0.07,
            sigma_max=2.0,
            draw_steps=200,
            steps=20_000,
            fresh=1024,
            capacity=10_000,
        ),
        "smc": replace(SMC, spread=2.6),
        "published": PUBLISHED,
    },
    "lj13": {
        "cpu": Setting(
            13,
            3,
            num_steps=80,
            sigma_min=0.03,
            sigma_max=1.0,
            reach=4.0,
            width=32,
            depth=3,
            batch_size=64,
            fresh=128,
            every=50,
            steps=20_000,
        ),
        "bank": Setting(
            13,
            3,
            num_steps=80,
            sigma_min=0.03,
            sigma_max=1.2,
            draw_steps=320,
            reach=3.1,
            radial=32,
            width=32,
            depth=3,
            batch_size=64,
            fresh=64,
            every=250,
            steps=6000,
            reweight=None,
            bank=16_384,
        ),
        "smc": replace(SMC, particles=13, dimensions=3),
        "published": replace(
            PUBLISHED, particles=13, dimensions=3, num_steps=999, reach=5.0, stages=Stages(30_000, 2_000)
        ),
    },
    "lj55": {
        "cpu": Setting(
            55,
            3,
            num_steps=60,
            sigma_min=0.03,
            sigma_max=1.5,
            reach=6.0,
            radial=24,
            width=32,
            depth=3,
            batch_size=16,
            fresh=32,
            every=50,
            steps=10_000,
        ),
        "smc": replace(SMC, particles=55, dimensions=3, bank=2048),
        "published": replace(
            PUBLISHED,
            particles=55,
            dimensions=3,
            num_steps=999,
            sigma_max=2.0,
            start_scale=0.816,
            reach=7.0,
            batch_size=200,
            fresh=200,
            stages=Stages(30_000, 2_000),
        ),
    },
}
