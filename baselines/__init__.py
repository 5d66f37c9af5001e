"""Complete classical samplers, to compare with and to fall back on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffsampler.baselines.affine_invariant import AffineInvariant
from diffsampler.baselines.ais import AIS
from diffsampler.baselines.aldi import ALDI
from diffsampler.baselines.chains import Chains
from diffsampler.baselines.chees import ChEES
from diffsampler.baselines.hmc import HMC
from diffsampler.baselines.independence import IndependenceSampler
from diffsampler.baselines.langevin import MALA, ULA
from diffsampler.baselines.nuts import NUTS
from diffsampler.baselines.parallel_tempering import ParallelTempering
from diffsampler.baselines.smc import SMC, WasteFreeSMC

if TYPE_CHECKING:
    from diffsampler.baselines.numpyro_nuts import NumPyroNUTS
    from diffsampler.baselines.pyro_nuts import PyroNUTS

__all__ = [
    "AIS",
    "ALDI",
    "HMC",
    "MALA",
    "NUTS",
    "SMC",
    "ULA",
    "AffineInvariant",
    "ChEES",
    "Chains",
    "IndependenceSampler",
    "NumPyroNUTS",
    "ParallelTempering",
    "PyroNUTS",
    "WasteFreeSMC",
]


def __getattr__(name: str) -> Any:
    # Pyro's inference machinery is loaded by those who ask for it.
    if name == "PyroNUTS":
        from diffsampler.baselines.pyro_nuts import PyroNUTS

        return PyroNUTS
    if name == "NumPyroNUTS":
        from diffsampler.baselines.numpyro_nuts import NumPyroNUTS

        return NumPyroNUTS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
