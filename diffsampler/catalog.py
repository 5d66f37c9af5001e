"""The methods that the front door knows by name."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["LEARNED", "METHODS", "MethodInfo"]


class MethodInfo(NamedTuple):
    """A row of the table of methods."""

    name: str
    paper: str
    year: int
    needs: str


METHODS: dict[str, MethodInfo] = {
    "auto": MethodInfo("auto", "pilot (variational search, tempered SMC) and a learned diffusion", 2026, "density"),
    "smc": MethodInfo("smc", "Sequential Monte Carlo samplers (Del Moral, Doucet, Jasra)", 2006, "gradient"),
    "pis": MethodInfo("pis", "Path Integral Sampler (Zhang, Chen)", 2022, "gradient"),
    "dds": MethodInfo("dds", "Denoising Diffusion Samplers (Vargas, Grathwohl, Doucet)", 2023, "gradient"),
    "dis": MethodInfo("dis", "Improved sampling via learned diffusions (Richter, Berner)", 2024, "gradient"),
    "cmcd": MethodInfo("cmcd", "Controlled Monte Carlo Diffusions (Vargas et al.)", 2024, "gradient"),
}
LEARNED = tuple(name for name in METHODS if name not in ("auto", "smc"))
"""Methods that train, and so keep checkpoints."""
