"""Anything that turns a target into particles."""

from __future__ import annotations

from abc import ABC, abstractmethod

from diffsampler.particles import Particles
from diffsampler.target import Target

__all__ = ["Sampler"]


class Sampler(ABC):
    """Draws weighted particles from ``target``."""

    target: Target

    @abstractmethod
    def sample(self, n: int, *, seed: int = 0) -> Particles:
        """Draw at least ``n`` weighted particles (samplers that work in blocks round up)."""
