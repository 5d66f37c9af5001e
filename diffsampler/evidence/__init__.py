"""Normalizing constants from draws that somebody else made, each with an error bar that knows about autocorrelation.

* :func:`bridge`: draws of the target alone, from any sampler, against a fitted proposal;
* :func:`thermodynamic_integration`, :func:`stepping_stone`, :func:`mbar_ladder`: draws at a ladder of temperatures;
* :func:`mbar`: draws of any set of densities, all evaluated at all draws;
* :func:`sandwich`, :func:`annealed_bounds`: lower and upper bounds from paths run in both directions.
"""

from __future__ import annotations

from diffsampler.evidence.bidirectional import Sandwich, annealed_bounds, sandwich
from diffsampler.evidence.bridge import Density, GaussianProposal, bridge
from diffsampler.evidence.mbar import MBAR, mbar, mbar_ladder
from diffsampler.evidence.thermodynamic import Thermodynamic, stepping_stone, thermodynamic_integration

__all__ = [
    "MBAR",
    "Density",
    "GaussianProposal",
    "Sandwich",
    "Thermodynamic",
    "annealed_bounds",
    "bridge",
    "mbar",
    "mbar_ladder",
    "sandwich",
    "stepping_stone",
    "thermodynamic_integration",
]
