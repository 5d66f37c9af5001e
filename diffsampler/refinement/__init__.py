"""From a pilot's particles to a learned sampler: coordinates, a fitted mixture's denoiser, training with keep-best."""

from diffsampler.refinement.course import Course
from diffsampler.refinement.stages import Refinement, refine

__all__ = ["Course", "Refinement", "refine"]
