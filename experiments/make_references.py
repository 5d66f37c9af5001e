"""Equilibrium references of particle systems, with evidence that they are equilibrium.

Hamiltonian chains start on two sides, from the lowest minimum known and from a hot gas. A reference is trusted where
both sides agree: means within four joint standard errors, and a split R-hat over all chains below 1.05. Normalizing
constants come from paths annealed in both directions. Four particles in double wells have exact draws and exact moments
besides, against which the chains are judged as well.

    python experiments/make_references.py                       # all cases
    python experiments/make_references.py lj13                  # one case
    python experiments/make_references.py dw4 --compare dw4=path/to/samples.npy

Figures of merit go to ``<out>/<case>.json`` and pictures beside them; the pooled draws, against which samplers are
measured, to ``<out>/draws/<case>.npy``. The figures of the shipped run are kept beside this script, in
``particle_references.json`` (``--keep``). A run that was interrupted goes on after its last block of draws.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from reference_starts import disordered, ordered
from torch import Tensor

from diffsampler import baselines, metrics, plotting_particles, targets
from diffsampler._report import number, table, versions, write_json
from diffsampler.baselines.chains import Running
from diffsampler.baselines.smc import tempered_path
from diffsampler.baselines.warmup import Adapted
from diffsampler.evidence import annealed_bounds
from diffsampler.kernel import KernelParams
from diffsampler.kernels import HMC
from diffsampler.smc import smc
from diffsampler.target import Target
from diffsampler.targets.double_well_particles import exact_pair_law

SIDES = {"ordered": ordered, "disordered": disordered}
AGREE = 4.0
"""Joint standard errors by which two sides may differ: chance does that to one mean in 16,000."""
MIXED = 1.05
MOVES = 16
"""Transitions at each temperature of an annealed path."""
FLOOR_SIZE = 2000
FLOOR_REPEATS = 5


@dataclass(frozen=True)
class Case:
    """Settings of a reference."""

    particles: int
    dimensions: int = 3
    chains: int = 256
    """Chains of each side."""
    warmup: int = 300
    num_steps: int = 16
    """Largest number of leapfrog steps; short trajectories make the most of a gradient here."""
    thin: int = 10
    draws: int = 10
    """Draws of each chain in a block."""
    blocks: int = 8
    discard: int = 2
    """Blocks at the beginning that only equilibrate."""
    aligned: int = 0
    """Configurations on each side for the floor of the aligned distance; none by default."""
    paths: int = 0
    """Annealed paths in each direction for the normalizing constant; none by default."""
    scale: float = 1.0
    """Standard deviation of the Gaussian that these paths begin at; one is the trap of the clusters."""


CASES = {
    "dw4": Case(4, dimensions=2, chains=64, thin=50, draws=20, blocks=12, aligned=2000, paths=1024, scale=2.6),
    "lj13": Case(13, aligned=2000, paths=512),
    "lj55": Case(55, chains=128, thin=20, draws=10, blocks=16, discard=6, aligned=400),
}


def build(case: Case) -> Target:
    """The target of a case."""
    return targets.DoubleWell4() if case.dimensions == 2 else targets.LennardJones(case.particles)


def observables(case: Case, target: Target, x: Tensor) -> dict[str, Tensor]:
    """Scalars ``(...)`` of the configurations ``(..., D)`` by which sides are compared."""
    distances = metrics.pair_distances(x, n=case.particles)
    found = {
        "energy": target.energy(x),
        "pair distance": distances.mean(-1),
        "radius of gyration": (x.square().sum(-1) / case.particles).sqrt(),
        "outermost particle": x.unflatten(-1, (case.particles, -1)).norm(dim=-1).amax(-1),
    }
    if isinstance(target, targets.DoubleWell4):
        found["share of short pairs"] = (distances < 4.0).double().mean(-1)
    return found


def chains_of(case: Case, target: Target, side: str, seed: int) -> tuple[baselines.HMC, torch.Generator]:
    generator = torch.Generator().manual_seed(1000 * seed + list(SIDES).index(side))
    start = SIDES[side](target, case.chains, generator)
    sampler = baselines.HMC(
        target, num_steps=case.num_steps, num_chains=case.chains, warmup=case.warmup, thin=case.thin, init=start
    )
    return sampler, generator


def run_side(case: Case, side: str, seed: int, path: Path) -> dict[str, Any]:
    """All blocks of one side; ``path`` holds what is done and is written after every block."""
    target = build(case)
    saved = torch.load(path, weights_only=True) if path.exists() else {}
    if saved and (saved["settings"] != asdict(case) or saved["seed"] != seed):
        raise SystemExit(f"{path} holds a run with other settings; remove it or choose another --out.")
    sampler, generator = chains_of(case, target, side, seed)
    if saved:
        generator.set_state(saved["generator"])
        running = _resume(sampler, saved)
    else:
        started = time.process_time()
        running = sampler.begin(generator, draws=case.blocks * case.draws)
        saved = {"settings": asdict(case), "seed": seed, "blocks": [], "diverged": 0}
        saved |= {"seconds": time.process_time() - started, "evaluations": sampler.evaluations}
    while len(saved["blocks"]) < case.blocks:
        started, before = time.process_time(), sampler.evaluations
        running, record = sampler.extend(running, case.draws, generator)
        saved["blocks"].append(record.x.float())
        saved["diverged"] += int(record.diverged.sum())
        saved["seconds"] += time.process_time() - started
        saved["evaluations"] += sampler.evaluations - before
        params = running.adapted.params
        saved |= {"x": running.state.x, "steps": running.steps, "generator": generator.get_state()}
        saved |= {"step_size": params.step_size, "scale": params.scale}
        _replace(path, partial(torch.save, saved))
        print(f"  {side}: block {len(saved['blocks'])} of {case.blocks}, {saved['seconds']:.0f} CPU s", flush=True)
    return saved


def _resume(sampler: baselines.HMC, saved: dict[str, Any]) -> Running:
    density = sampler.target.log_prob_and_score
    state = sampler.kernel.init(saved["x"], density)
    adapted = Adapted(state, KernelParams(saved["step_size"], saved["scale"]), None, 0, 0)
    return Running(state, density, adapted, saved["steps"])


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """A file that is either the old one or the new one, whenever the run is interrupted."""
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    write(part)
    part.replace(path)


def summary(values: Tensor) -> dict[str, float]:
    """Mean with its error over the chains, spread and effective size of ``(chains, draws)``."""
    return {
        "mean": float(values.mean()),
        "std_error": float(values.mean(1).std()) / math.sqrt(len(values)),
        "sd": float(values.std()),
        "ess": float(effective_sample_size(values, chain_dim=0, sample_dim=1)),
    }


def two_sided(case: Case, target: Target, sides: dict[str, list[Tensor]]) -> dict[str, Any]:
    """Each observable on both sides, how far they are apart, and the pooled mean."""
    kept = {side: torch.cat(blocks[case.discard :], 1).double() for side, blocks in sides.items()}
    tables = {side: observables(case, target, x) for side, x in kept.items()}
    rows: dict[str, Any] = {}
    for name in tables["ordered"]:
        a, b = (summary(tables[side][name]) for side in SIDES)
        both = torch.cat([tables[side][name] for side in SIDES])
        rhat = float(split_gelman_rubin(both, chain_dim=0, sample_dim=1))
        z = (a["mean"] - b["mean"]) / math.hypot(a["std_error"], b["std_error"])
        rows[name] = {"ordered": a, "disordered": b, "pooled": summary(both), "z": z, "rhat": rhat}
    drift = {side: [float(target.energy(block.double()).mean()) for block in blocks] for side, blocks in sides.items()}
    agreed = all(abs(row["z"]) < AGREE and row["rhat"] < MIXED for row in rows.values())
    return {"agreed": agreed, "observables": rows, "energy_by_block": drift}


def distances_between(case: Case, target: Target, x: Tensor, y: Tensor) -> dict[str, float]:
    """The library's distances between two equally large sets of configurations."""
    n, d = case.particles, case.dimensions
    found = {
        "energy W2": metrics.wasserstein_line(target.energy(x), target.energy(y)),
        "pair distance W2": metrics.pair_wasserstein(x, y, n=n),
        "pair distance TV": metrics.pair_total_variation(x, y, n=n),
    }
    if case.aligned:
        exact = d == 2
        alignment = metrics.ExactAlignment(n=n, d=d) if exact else metrics.AlternatingAlignment(n=n, d=d)
        few = min(case.aligned, len(x), len(y))
        name = f"aligned W2 ({'exact' if exact else 'one Hungarian and Kabsch round'}, {few} against {few})"
        found[name] = metrics.aligned_wasserstein(x[:few], y[:few], alignment)
    return found


def floors(case: Case, target: Target, x: Tensor, generator: torch.Generator) -> dict[str, list[float]]:
    """What disjoint sets of independent draws of the reference itself are apart: the score of a perfect sampler."""
    repeats = max(min(FLOOR_REPEATS, len(x) // (2 * FLOOR_SIZE)), 1)
    size = min(FLOOR_SIZE, len(x) // 2)
    parts = x[torch.randperm(len(x), generator=generator)].split(size)
    # The aligned distance in space takes most of a minute: once is enough.
    rows = [
        distances_between(case, target, parts[2 * k], parts[2 * k + 1])
        for k in range(repeats if case.dimensions == 2 else 1)
    ]
    for k in range(len(rows), repeats):
        rows.append(distances_between(Case(case.particles, case.dimensions), target, parts[2 * k], parts[2 * k + 1]))
    return {name: [row[name] for row in rows if name in row] for name in rows[0]}


def log_normalizer(case: Case, target: Target, x: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Bennett's estimate from annealed paths in both directions, from a Gaussian and from draws of the reference.

    The forward bound alone says little: steps at vanishing temperature meet overlapping particles, whose energies have
    no mean. A single population that anneals is reported beside it.
    """
    path = tempered_path(target, reference=None, reference_scale=case.scale)
    kernel = HMC(target.space, num_steps=8)
    adapted = smc(
        path, n=1024, generator=generator, num_islands=8, kernel=kernel, conditional_ess=0.95, num_moves=MOVES
    )
    chosen = adapted.schedule
    found = annealed_bounds(
        path,
        x[torch.randperm(len(x), generator=generator)[: case.paths]],
        betas=chosen.betas,
        kernel=kernel,
        params=[KernelParams(s.new_tensor(e), s) for e, s in zip(chosen.step_sizes, chosen.scales, strict=True)],
        generator=generator,
        num_moves=MOVES,
    )
    alone = adapted.particles.log_normalizer
    return {
        "temperatures": len(chosen.betas),
        "bennett": [found.estimate.value, found.estimate.std_error],
        "upper_bound": [found.upper.value, found.upper.std_error],
        "smc": [alone.value, alone.std_error],
        "exact": target.log_normalizer,
    }


def exact_moments() -> dict[str, float]:
    """Exact energy, pair distance and share of short pairs of four particles in double wells."""
    law = exact_pair_law(spacing=0.05)
    r, p = law.distance, law.density * (law.distance[1] - law.distance[0])
    w = (r - 4.0).square()
    short = (r < 4.0 - 1e-9).double() + 0.5 * ((r - 4.0).abs() < 1e-9).double()
    return {
        "energy": float(6.0 * (p * w * (0.9 * w - 4.0)).sum()),
        "pair distance": float((p * r).sum()),
        "share of short pairs": float((p * short).sum()),
    }


def reference(name: str, case: Case, seed: int, out: Path, compare: dict[str, Path]) -> dict[str, Any]:
    """Make or complete one reference and write all its files."""
    target, generator = build(case), torch.Generator().manual_seed(seed)
    runs = {side: run_side(case, side, seed, out / "draws" / f"{name}-{side}.pt") for side in SIDES}
    blocks = {side: run["blocks"] for side, run in runs.items()}
    result: dict[str, Any] = {"versions": versions(), "settings": asdict(case), "seed": seed}
    result |= two_sided(case, target, blocks)
    result["work"] = {s: {k: run[k] for k in ("seconds", "evaluations", "diverged")} for s, run in runs.items()}
    chains = torch.cat([torch.cat(blocks[side][case.discard :], 1) for side in SIDES]).double()
    pooled = chains.flatten(0, 1)
    if target.has_sampler:
        result["exact"] = exact_moments()
        pooled = target.sample(len(pooled), generator=generator)
    _replace(out / "draws" / f"{name}.npy", lambda part: np.save(part, pooled.float().numpy()))
    energy = target.energy(pooled)
    levels = torch.tensor([0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99], dtype=torch.float64)
    result["energy_quantiles"] = dict(zip(map(str, levels.tolist()), energy.quantile(levels).tolist(), strict=True))
    result["heat_capacity"] = float(energy.var())
    counts = metrics.radial_distribution(pooled, n=case.particles, bins=100)
    result["pair_distances"] = {"distance": counts.distance.tolist(), "density": counts.density.tolist()}
    if case.paths:
        result["log_normalizer"] = log_normalizer(case, target, pooled, generator)
    result["floors"] = floors(case, target, pooled, generator)
    shown: dict[str, Tensor] = {
        side: torch.cat(blocks[side][case.discard :], 1).flatten(0, 1).double() for side in SIDES
    }
    if target.has_sampler:
        shown["exact draws"] = pooled
    if name in compare:
        other = target.space.project(torch.from_numpy(np.load(compare[name])).double())
        shown["compared"] = other = other[torch.randperm(len(other), generator=generator)]
        result["compared"] = compared(case, target, pooled[torch.randperm(len(pooled), generator=generator)], other)
    pictures(name, case, target, shown, out)
    write_json(out / f"{name}.json", result)
    return result


def compared(case: Case, target: Target, reference: Tensor, other: Tensor) -> dict[str, Any]:
    """A set of configurations from elsewhere against the reference."""
    size = min(FLOOR_SIZE, len(other), len(reference))
    rows: dict[str, Any] = {"count": len(other)}
    for name, values in observables(case, target, other).items():
        rows[name] = {"mean": float(values.mean()), "naive_std_error": float(values.std()) / math.sqrt(len(values))}
    return rows | {"distances": distances_between(case, target, reference[:size], other[:size])}


def pictures(name: str, case: Case, target: Target, shown: dict[str, Tensor], out: Path) -> None:
    first = "exact draws" if "exact draws" in shown else "disordered"
    configurations = {label: (x, None) for label, x in shown.items()}
    figure = plotting_particles.energies(
        {label: (target.energy(x), None) for label, x in shown.items()}, reference=first, title=name
    )
    figure.savefig(out / f"{name}-energy.png")
    exact = None
    if target.has_sampler:
        law = exact_pair_law(spacing=0.05)
        exact = plotting_particles.Curve(law.distance, law.density)
    n = case.particles
    figure = plotting_particles.pair_distances(configurations, n=n, reference=first, exact=exact, title=name)
    figure.savefig(out / f"{name}-pairs.png")
    figure = plotting_particles.radial_distributions(configurations, n=n, reference=first, title=name)
    figure.savefig(out / f"{name}-radial.png")


def report(name: str, result: dict[str, Any]) -> None:
    print(f"{name}: {'both sides agree' if result['agreed'] else 'SIDES DISAGREE'}")
    header = ("", "mean", "error", "sd", "ordered", "disordered", "z", "R-hat", "ESS", "exact")
    rows = []
    for key, row in result["observables"].items():
        pooled = row["pooled"]
        means = (pooled["mean"], pooled["std_error"], pooled["sd"], row["ordered"]["mean"], row["disordered"]["mean"])
        cells = [*(number(value, ".4f") for value in means), number(row["z"], "+.1f"), number(row["rhat"], ".4f")]
        rows.append((key, *cells, number(pooled["ess"], ".0f"), number(result.get("exact", {}).get(key), ".5f")))
    print(table(header, rows))
    if "log_normalizer" in result:
        row = result["log_normalizer"]
        pairs = ", ".join(f"{key} {row[key][0]:.3f} +- {row[key][1]:.3f}" for key in ("bennett", "smc", "upper_bound"))
        print(f"  log Z: {pairs}, exact {number(row['exact'], '.6f')}")
    for key, values in result["floors"].items():
        print(f"  floor of {key}: {np.mean(values):.4f} (sd {np.std(values):.4f}, {len(values)} repeats)")
    for key, value in result.get("compared", {}).get("distances", {}).items():
        print(f"  compared set, {key}: {value:.4f}")


def kept(result: dict[str, Any]) -> dict[str, Any]:
    """The figures of merit of a reference: a page of numbers, without histograms and histories."""
    names = ("versions", "settings", "seed", "agreed", "observables", "exact", "log_normalizer", "work", "floors")
    figures = {name: result[name] for name in names if name in result}
    figures["floors"] = {
        key: [float(np.mean(values)), float(np.std(values))] for key, values in result["floors"].items()
    }
    return json.loads(json.dumps(figures), parse_float=lambda text: float(f"{float(text):.8g}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="references to make, all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/references"))
    parser.add_argument("--compare", nargs="*", default=[], metavar="CASE=NPY", help="configurations to compare with")
    parser.add_argument("--keep", type=Path, help="write the figures of all cases here as well")
    arguments = parser.parse_args()
    figures = {}
    compare = {name: Path(path) for name, _, path in (entry.partition("=") for entry in arguments.compare)}
    (arguments.out / "draws").mkdir(parents=True, exist_ok=True)
    for name in arguments.cases or CASES:
        path = arguments.out / f"{name}.json"
        finished = json.loads(path.read_text()) if path.exists() else {}
        same = finished.get("settings") == asdict(CASES[name]) and finished.get("seed") == arguments.seed
        if not same or (name in compare and "compared" not in finished):
            finished = reference(name, CASES[name], arguments.seed, arguments.out, compare)
        report(name, finished)
        figures[name] = kept(finished)
    if arguments.keep is not None:
        write_json(arguments.keep, figures)


if __name__ == "__main__":
    main()
