"""Markov transitions: one file per family, adaptation apart from the kernels."""

from diffsampler.kernels.adaptation import DualAveraging, PooledVariance, RobbinsMonro, reasonable_step_size, spread
from diffsampler.kernels.barker import Barker
from diffsampler.kernels.chees import ChEES
from diffsampler.kernels.compiled import CompiledDensity
from diffsampler.kernels.exponential import KLMC, RMKLMC
from diffsampler.kernels.hmc import HMC
from diffsampler.kernels.kinetic import BAOAB, GHMC, OBABO
from diffsampler.kernels.langevin import MALA, RLMC, ULA
from diffsampler.kernels.mclmc import MAMS, MCLMC
from diffsampler.kernels.metric import DenseMetric, DiagonalMetric
from diffsampler.kernels.nuts import NUTS
from diffsampler.kernels.proximal import L1, MYMALA, MYULA, Box, CompositeDensity, ForwardBackward, Prox
from diffsampler.kernels.random_walk import EllipticalSlice, RandomWalk, without_gradient
from diffsampler.kernels.stochastic_gradient import SGHMC, SGLD, MinibatchDensity, MinibatchTarget, differentiated

__all__ = [
    "BAOAB",
    "GHMC",
    "HMC",
    "KLMC",
    "L1",
    "MALA",
    "MAMS",
    "MCLMC",
    "MYMALA",
    "MYULA",
    "NUTS",
    "OBABO",
    "RLMC",
    "RMKLMC",
    "SGHMC",
    "SGLD",
    "ULA",
    "Barker",
    "Box",
    "ChEES",
    "CompiledDensity",
    "CompositeDensity",
    "DenseMetric",
    "DiagonalMetric",
    "DualAveraging",
    "EllipticalSlice",
    "ForwardBackward",
    "MinibatchDensity",
    "MinibatchTarget",
    "PooledVariance",
    "Prox",
    "RandomWalk",
    "RobbinsMonro",
    "differentiated",
    "reasonable_step_size",
    "spread",
    "without_gradient",
]
