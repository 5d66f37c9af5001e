"""Sampling from densities that are known only up to their normalizing constant.

Learned controlled diffusions and classical samplers stand on one footing: batched particles, one log weight per
particle, a normalizing constant with an error bar, and a verdict whether to trust it. Start with :func:`sample`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffsampler import evidence as evidence
from diffsampler.compare import Comparison as Comparison
from diffsampler.compare import compare as compare
from diffsampler.estimators import Estimate as Estimate
from diffsampler.inference import Budget as Budget
from diffsampler.inference import sample as sample
from diffsampler.methods.adjoint_sampling import AdjointSampling as AdjointSampling
from diffsampler.methods.asbs import ASBS as ASBS
from diffsampler.methods.cmcd import CMCD as CMCD
from diffsampler.methods.cmcd import MCD as MCD
from diffsampler.methods.cmcd import AnnealedULA as AnnealedULA
from diffsampler.methods.conditional import ConditionalDIS as ConditionalDIS
from diffsampler.methods.conditional import ConditionalTarget as ConditionalTarget
from diffsampler.methods.dds import DDS as DDS
from diffsampler.methods.dis import DIS as DIS
from diffsampler.methods.ensemble_score import EnsembleScore as EnsembleScore
from diffsampler.methods.foellmer import Foellmer as Foellmer
from diffsampler.methods.gbs import GBS as GBS
from diffsampler.methods.gfn import DGFS as DGFS
from diffsampler.methods.gfn import GFN as GFN
from diffsampler.methods.mixflow import MixFlow as MixFlow
from diffsampler.methods.pis import PIS as PIS
from diffsampler.methods.scld import SCLD as SCLD
from diffsampler.methods.snf import SNF as SNF
from diffsampler.methods.underdamped import LDVI as LDVI
from diffsampler.methods.underdamped import UCMCD as UCMCD
from diffsampler.methods.underdamped import UHA as UHA
from diffsampler.methods.wt_asbs import WTASBS as WTASBS
from diffsampler.particles import Particles as Particles
from diffsampler.result import Finding as Finding
from diffsampler.result import Fit as Fit
from diffsampler.result import load as load
from diffsampler.sampler import Sampler as Sampler
from diffsampler.space import Euclidean as Euclidean
from diffsampler.space import EuclideanTorus as EuclideanTorus
from diffsampler.space import MeanFree as MeanFree
from diffsampler.space import Space as Space
from diffsampler.space import Torus as Torus
from diffsampler.target import Target as Target

if TYPE_CHECKING:
    from diffsampler.integrations import pyro as pyro

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Pyro models are imported on first use: the core needs only Pyro's tensor functions.
    if name == "pyro":
        return importlib.import_module("diffsampler.integrations.pyro")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
