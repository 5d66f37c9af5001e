r"""Pyro models as targets, kernels for Pyro's ``MCMC``, and Pyro's NUTS as a peer: what ``ds.pyro`` offers.

:class:`PyroTarget` turns a model with continuous latent sites into a density on :math:`\mathbb{R}^D` that is evaluated
for a whole batch of points at once, with the model's prior as an exact, normalized reference, so that
``log_prob - prior.log_prob`` is the log likelihood and the normalizing constant is the evidence of the data.
"""

from __future__ import annotations

from diffsampler.integrations.pyro_chains import BatchedNUTSKernel, ChEESKernel
from diffsampler.integrations.pyro_graphs import CompiledDensity
from diffsampler.integrations.pyro_nuts import Chains, nuts
from diffsampler.integrations.pyro_paths import DiffusionKernel, InterleavedKernel
from diffsampler.integrations.pyro_predict import log_likelihoods, observed_data, predict
from diffsampler.integrations.pyro_prior import ModelPrior
from diffsampler.integrations.pyro_target import PyroPrior, PyroTarget, sample_prior

__all__ = [
    "BatchedNUTSKernel",
    "ChEESKernel",
    "Chains",
    "CompiledDensity",
    "DiffusionKernel",
    "InterleavedKernel",
    "ModelPrior",
    "PyroPrior",
    "PyroTarget",
    "log_likelihoods",
    "nuts",
    "observed_data",
    "predict",
    "sample_prior",
]
