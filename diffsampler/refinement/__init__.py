"""From a pilot's particles to a learned sampler: coordinates, a fitted mixture's denoiser, training with keep-best."""

from diffsampler.refinement.stages import Refinement, refine

__all__ = ["Refinement", "refine"]
