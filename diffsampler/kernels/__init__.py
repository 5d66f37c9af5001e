"""Markov transitions: one file per family, adaptation apart from the kernels."""

from diffsampler.kernels.adaptation import DualAveraging, PooledVariance, RobbinsMonro, reasonable_step_size, spread
from diffsampler.kernels.hmc import HMC
from diffsampler.kernels.langevin import MALA, ULA

__all__ = ["HMC", "MALA", "ULA", "DualAveraging", "PooledVariance", "RobbinsMonro", "reasonable_step_size", "spread"]
