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
    "gbs": MethodInfo("gbs", "Bridge sampler, both chains learned (Richter, Berner)", 2024, "gradient"),
    "cmcd": MethodInfo("cmcd", "Controlled Monte Carlo Diffusions (Vargas et al.)", 2024, "gradient"),
    "mcd": MethodInfo(
        "mcd", "Score-based diffusion meets annealed importance sampling (Doucet et al.)", 2022, "gradient"
    ),
    "ula": MethodInfo("ula", "Monte Carlo variational auto-encoders: annealed ULA (Thin et al.)", 2021, "gradient"),
    "ucmcd": MethodInfo("ucmcd", "Controlled Monte Carlo Diffusions, underdamped (Vargas et al.)", 2024, "gradient"),
    "ldvi": MethodInfo("ldvi", "Langevin diffusion variational inference (Geffner, Domke)", 2023, "gradient"),
    "uha": MethodInfo("uha", "Uncorrected Hamiltonian annealing (Geffner, Domke)", 2021, "gradient"),
    "gfn": MethodInfo("gfn", "Off-policy training of diffusion samplers (Sendera et al.)", 2024, "gradient"),
    "dgfs": MethodInfo("dgfs", "Diffusion generative flow samplers (Zhang et al.)", 2024, "gradient"),
    "scld": MethodInfo("scld", "Sequential controlled Langevin diffusions (Chen et al.)", 2025, "gradient"),
    "as": MethodInfo("as", "Adjoint sampling (Havens et al.)", 2025, "gradient"),
    "asbs": MethodInfo("asbs", "Adjoint Schroedinger bridge sampler (Liu et al.)", 2025, "gradient"),
}
LEARNED = tuple(name for name in METHODS if name not in ("auto", "smc"))
"""Methods that train, and so keep checkpoints."""
