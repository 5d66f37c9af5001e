"""What the pilot can find wrong with its own result: tuples (level, message, remedy)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffsampler.particles import Particles
from diffsampler.pilot.modes import ModeSet, SearchReport
from diffsampler.smc import SMCResult

__all__ = ["FindingTuple", "judge", "missing_modes"]

FindingTuple = tuple[str, str, str]
"""Level ("error", "warning" or "note"), message, remedy."""


def missing_modes(particles: Particles, modes: ModeSet) -> Tensor:
    """Indices of modes whose Laplace mass calls for at least 20 particles and that fewer than 3 are near."""
    dim = particles.x.shape[1]
    share = torch.softmax(modes.log_mass(), 0)
    count = torch.zeros(len(modes), dtype=torch.float64)
    label = torch.empty(len(particles), dtype=torch.long)
    nearest = torch.full((len(particles),), math.inf, dtype=torch.float64)
    for k in range(len(modes)):
        u = torch.linalg.solve_triangular(modes.tril[k], (particles.x - modes.centre[k]).mT, upper=False)
        distance = u.square().mean(0).sqrt()
        label = torch.where(distance < nearest, k, label)
        nearest = torch.minimum(distance, nearest)
    near = nearest < 3.0 + 3.0 / math.sqrt(dim)
    weight = torch.softmax(particles.log_weight, 0) * len(particles)
    count.index_add_(0, label[near], weight[near])
    return torch.nonzero((share * len(particles) > 20.0) & (count < 3.0)).flatten()


def judge(
    *,
    particles: Particles,
    final: SMCResult,
    passes: list[SMCResult],
    modes: ModeSet | None,
    report: SearchReport | None,
    settled: bool,
) -> list[FindingTuple]:
    """All findings about a finished run."""
    findings: list[FindingTuple] = []
    if not final.finished:
        message = f"The budget ended at temperature {final.beta:.3g}: the particles do not represent the target."
        findings.append(("error", message, "Raise the budget."))
        return findings
    estimates = [p.particles.log_normalizer for p in passes]
    if not settled:
        values = ", ".join(f"{e.value:.3f}" for e in estimates[-3:])
        message = f"Successive passes do not agree on log Z ({values})."
        findings.append(("warning", message, "Raise the budget, or hand over a prior."))
    last = particles.log_normalizer
    gap = abs(last.value - estimates[-1].value)
    if gap > 4.0 * math.hypot(last.std_error, estimates[-1].std_error) + 0.05:
        message = f"The adaptive and the frozen pass differ by {gap:.2f} in log Z."
        findings.append(("warning", message, "Use more particles."))
    spread = float(particles.log_replicates.std())
    if not spread <= 1.0:
        message = f"Islands disagree on log Z: standard deviation {spread:.2f}."
        findings.append(("warning", message, "Use more particles."))
    ancestors = float(final.effective_ancestors.mean())
    if ancestors < 10.0:
        message = f"Only {ancestors:.1f} reference draws per island have descendants that count."
        findings.append(("warning", message, "Use more particles or hand over a prior."))
    if min(final.acceptance) < 0.3:
        message = f"Moves were accepted at a rate of {min(final.acceptance):.2f} only."
        findings.append(("warning", message, "The density may not be smooth; check its gradient."))
    if report is not None and report.singletons and not report.continuum:
        message = (
            f"{report.singletons} modes were each found by one start of {report.starts} only; the chance that the next "
            f"start finds a new mode is about {report.missing_rate:.1g}."
        )
        findings.append(("warning", message, "Raise the budget of the search."))
    if modes is not None:
        missing = missing_modes(particles, modes).tolist()
        if missing:
            message = f"{len(missing)} modes that the search found are missing from the particles."
            findings.append(("warning", message, "Use more particles."))
    return findings
