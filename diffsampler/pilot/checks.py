"""What the pilot can find wrong with its own result: tuples (level, message, remedy)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffsampler.estimators import systematic_resample
from diffsampler.kernel import KernelParams
from diffsampler.kernels import HMC
from diffsampler.particles import Particles
from diffsampler.pilot.modes import ModeSet, SearchReport
from diffsampler.pilot.profile import Profile, weighed_profile
from diffsampler.smc import SMCResult
from diffsampler.target import Target

__all__ = ["FindingTuple", "confirmed_tail", "drift", "island_findings", "judge", "lost_tail", "missing_modes"]

LOST = {0.02: 0.05, 0.1: 0.2}
"""Mass that a profile must see in a tail for a neck to count as lost, by the mass that the particles have there."""
CONFIRMING = 32
"""Draws per grid point that confirm a lost tail."""
FindingTuple = tuple[str, str, str]
"""Level ("error", "warning" or "note"), message, remedy."""


def missing_modes(particles: Particles, modes: ModeSet) -> Tensor:
    """Indices of modes whose Laplace mass calls for at least 20 particles and that fewer than 3 are near."""
    if len(modes) < 2:
        # One mode cannot be missing, and at a kink its local scale means nothing.
        return torch.zeros(0, dtype=torch.long)
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


def lost_tail(particles: Particles, profile: Profile) -> tuple[float, float] | None:
    """Mass that a profile sees in a tail and mass that the particles have there, where that is far too little.

    The outermost 2 % show what is missing at the end, the outermost 10 % what a few particles stuck in a neck hide.
    None where nothing is lost, and where the profile disagrees with the bulk of the particles or has less than two and
    a half grid points in it: it is then not an approximation to rely on.
    """
    edges = _quantiles(particles, profile.index, (0.1, 0.3, 0.5, 0.7, 0.9))
    if float(profile.grid[1] - profile.grid[0]) > (edges[-1] - edges[0]) / 2.5:
        return None
    inner = [profile.tail(e, below=True) for e in edges]
    mass = max(inner[-1] - inner[0], 1e-12)
    bulk = [(value - inner[0]) / mass for value in inner[1:-1]]
    if max(abs(value - expected) for value, expected in zip(bulk, (0.25, 0.5, 0.75), strict=True)) > 0.15:
        return None
    return _worst_tail(particles, profile)


def confirmed_tail(
    target: Target, particles: Particles, profile: Profile, *, generator: torch.Generator | None
) -> tuple[float, float] | None:
    """A :func:`lost_tail` that draws of the profile confirm: their weights hold that mass against the run's ``Z``.

    Laplace's approximation may see far too much mass where a ridge turns round; weights of draws do not.
    """
    if lost_tail(particles, profile) is None:
        return None
    weighed = weighed_profile(target, profile, draws=CONFIRMING, generator=generator)
    share = math.exp(min(0.0, weighed.log_normalizer() - particles.log_normalizer.value))
    return _worst_tail(particles, weighed, share=share)


def _quantiles(particles: Particles, index: int, at: tuple[float, ...]) -> list[float]:
    x, order = particles.x[:, index].sort()
    cumulative = torch.softmax(particles.log_weight, 0)[order].cumsum(0)
    return [float(x[int((cumulative < q).sum().clamp_max(len(particles) - 1))]) for q in at]


def _worst_tail(particles: Particles, profile: Profile, *, share: float = 1.0) -> tuple[float, float] | None:
    """Mass in the most underrated tail, where it is too much, and the particles' own; the profile holds a share.

    The grid cell that holds the tail's edge does not count: where a ridge turns round, much of the mass is in one cell.
    """
    seen = {}
    for had in LOST:
        low, high = _quantiles(particles, profile.index, (had, 1.0 - had))
        tails = profile.tail(low - profile.step, below=True), profile.tail(high + profile.step, below=False)
        seen[had] = share * max(tails)
    worst = max(LOST, key=lambda had: seen[had] / LOST[had])
    return (seen[worst], worst) if seen[worst] > LOST[worst] else None


def drift(
    target: Target, final: SMCResult, *, n: int = 1024, moves: int = 8, generator: torch.Generator | None = None
) -> float:
    """Largest z-score by which ``moves`` further moves shift the mean of a coordinate or its square.

    Arguments:
        target: The target in the coordinates of the run.
        final: The run.
        n: Particles to move, resampled from the run.
        moves: Moves of the kernel at the last step size.
        generator: Source of randomness.

    Returns:
        The z-score; ordinary runs stay below 4, the largest of ``2 D`` nearly standard normals.
    """
    index = systematic_resample(final.particles.log_weight, n, generator=generator)
    z = final.particles.x[index]
    kernel = HMC(target.space, num_steps=6, smallest_step=0.15)
    scale = final.schedule.scales[-1]
    params = KernelParams(z.new_tensor(final.schedule.step_sizes[-1]), scale)
    state = kernel.init(z, target.log_prob_and_score)
    for _ in range(moves):
        state, _ = kernel.step(state, target.log_prob_and_score, params, generator)
    centre = z.median(0).values
    # Bounded statistics: the square of a heavy-tailed coordinate has no central limit theorem.
    before, after = (((x - centre) / scale).clamp(-4.0, 4.0) for x in (z, state.x))
    shift = torch.cat([after - before, after.square() - before.square()], -1)
    return float((shift.mean(0) / (shift.std(0) / math.sqrt(n)).clamp_min(1e-12)).abs().max())


def judge(
    *,
    lost: dict[str, tuple[float, float]],
    shift: float,
    particles: Particles,
    final: SMCResult,
    passes: list[SMCResult],
    modes: ModeSet | None,
    report: SearchReport | None,
    settled: bool,
    prior: bool = False,
) -> list[FindingTuple]:
    """All findings about a finished run, with the tails that it has ``lost``: their true mass and its own, by name.

    Where a ``prior`` is known, no remedy asks for one.
    """
    findings: list[FindingTuple] = []
    if not final.finished:
        message = f"The budget ended at temperature {final.beta:.3g}: the particles do not represent the target."
        findings.append(("error", message, "Raise the budget."))
        return findings
    estimates = [p.particles.log_normalizer for p in passes]
    if not settled:
        values = ", ".join(f"{e.value:.3f}" for e in estimates[-3:])
        message = f"Successive passes do not agree on log Z ({values})."
        if len(estimates) == 1:
            message = "The budget paid for one pass only: nothing confirms its log Z."
        findings.append(
            ("warning", message, "Raise the budget." if prior else "Raise the budget, or hand over a prior.")
        )
    last = particles.log_normalizer
    gap = abs(last.value - estimates[-1].value)
    if gap > 4.0 * math.hypot(last.std_error, estimates[-1].std_error) + 0.05:
        message = f"The adaptive and the frozen pass differ by {gap:.2f} in log Z."
        findings.append(("warning", message, "Use more particles."))
    findings += island_findings(final, prior=prior)
    if min(final.acceptance) < 0.3:
        message = f"Moves were accepted at a rate of {min(final.acceptance):.2f} only."
        findings.append(("warning", message, "The density may not be smooth; check its gradient."))
    if shift > 5.0:
        message = f"Further moves shift the particles: {shift:.1f} standard errors."
        findings.append(("warning", message, "Use more particles."))
    for name, (seen, had) in lost.items():
        message = (
            f"A neck may be lost: a profile along {name} sees a probability of {seen:.2f} in a tail where the "
            f"particles have {had:g}."
        )
        remedy = "Use a non-centred parametrisation."
        findings.append(("warning", message, remedy if prior else f"Hand over a prior, or {remedy.lower()}"))
    return findings + _search_findings(particles, modes, report)


def island_findings(final: SMCResult, *, prior: bool) -> list[FindingTuple]:
    """What islands say about a finished run: whether they agree on log Z, and on how many reference draws they rest.

    Too few particles show here before the weights degenerate: resampling hides from them what a handful of families
    have in common. Where a ``prior`` is known, no remedy asks for one.
    """
    findings: list[FindingTuple] = []
    spread = float(final.particles.log_replicates.std())
    # Ordinary runs of full size stay below 0.15.
    if not spread <= 0.4:
        message = f"Islands disagree on log Z: standard deviation {spread:.2f}."
        findings.append(("warning", message, "Use more particles."))
    ancestors = float(final.effective_ancestors.mean())
    if ancestors < 10.0:
        message = f"Only {ancestors:.1f} reference draws per island have descendants that count."
        findings.append(
            ("warning", message, "Use more particles." if prior else "Use more particles or hand over a prior.")
        )
    return findings


def _search_findings(particles: Particles, modes: ModeSet | None, report: SearchReport | None) -> list[FindingTuple]:
    findings: list[FindingTuple] = []
    if report is not None and report.singletons and not report.continuum:
        found = "1 mode was" if report.singletons == 1 else f"{report.singletons} modes were each"
        message = (
            f"{found} found by one start of {report.starts} only; the chance that the next start finds a new mode is "
            f"about {report.missing_rate:.1g}."
        )
        findings.append(("warning", message, "Raise the budget of the search."))
    if modes is not None:
        missing = missing_modes(particles, modes).tolist()
        if missing:
            message = f"{len(missing)} modes that the search found are missing from the particles."
            findings.append(("warning", message, "Use more particles."))
    return findings
