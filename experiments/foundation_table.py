"""The figures that the README quotes: one row per case, with what it must reach beside what was measured.

Every case is one JSON file in ``results/foundation``; finished cases are not run again. CPU seconds of one thread.

    python experiments/foundation_table.py            # all cases
    python experiments/foundation_table.py auto_gmm40 # one case
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import diffsampler as ds
from diffsampler import targets
from diffsampler.estimators import expectation
from diffsampler.integrations.examples import eight_schools
from diffsampler.objective import ReverseKL
from diffsampler.particles import Particles
from diffsampler.schedule import variance_exploding
from diffsampler.target import Target

SEEDS = (0, 1, 2)
Row = dict[str, Any]


def cpu_timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    value = run()
    return value, time.process_time() - start


def weights_row(particles: Particles, exact: float) -> Row:
    return {
        "elbo_gap": particles.elbo - exact,
        "log_z_error": particles.log_normalizer.value - exact,
        "log_z_se": particles.log_normalizer.std_error,
        "ess_fraction": particles.ess / len(particles),
        "pareto_k": particles.pareto_k,
    }


def mode_variation(target: Target, x: torch.Tensor) -> Row:
    """Total variation of mode frequencies among equally weighted draws, and modes with a tenth of their weight."""
    exact = target.mode_weights().double()
    share = torch.bincount(target.mode_labels(x), minlength=len(exact)).double() / len(x)
    return {"mode_tv": 0.5 * float((share - exact).abs().sum()), "modes": int((share > 0.1 * exact).sum())}


def moments_row(draws: torch.Tensor, log_weight: torch.Tensor, mean: torch.Tensor, sd: torch.Tensor) -> Row:
    """Worst error of a mean in standard deviations, and the range of the ratios of standard deviations."""
    estimate, _ = expectation(draws, log_weight)
    ratio = expectation((draws - estimate).square(), log_weight)[0].sqrt() / sd
    error = float(((estimate - mean) / sd).abs().max())
    return {"worst_mean_error": error, "sd_ratio_min": float(ratio.min()), "sd_ratio_max": float(ratio.max())}


def gmm9_dis(seed: int) -> Row:
    """DIS with the log-variance loss, half of each batch replayed from tempered SMC's particles; 100 CPU seconds."""
    target = targets.GaussianMixture.grid(9)
    budget, start = 100.0, time.process_time()
    particles = ds.sample(target, method="smc", seed=seed).particles
    bank = particles.resample(4000, generator=torch.Generator().manual_seed(seed))
    schedule = variance_exploding(32, noise_min=0.06, noise_max=2.0)
    sampler = ds.DIS(target, num_steps=32, scale=4.12, schedule=schedule, point_features=64, seed=seed)
    sampler.fit(
        steps=10**6,
        bank=bank,
        learning_rate=3e-3,
        seed=seed,
        spent=lambda: (time.process_time() - start) / budget,
    )
    cpu = time.process_time() - start
    drawn = sampler.sample(20_000, seed=seed + 100)
    return {"cpu": cpu, **weights_row(drawn, 0.0), **mode_variation(target, drawn.x)}


def gmm9_published_setting(seed: int) -> Row:
    """The published recipe's size: 100 steps, batch 512, small net with a score gate, 110 CPU seconds."""
    target = targets.GaussianMixture.grid(9)
    budget, start = 110.0, time.process_time()
    sampler = ds.DIS(target, num_steps=100, scale=4.12, learn_variance=False, point_features=0, seed=seed)
    sampler.fit(steps=10**6, batch_size=512, seed=seed, spent=lambda: (time.process_time() - start) / budget)
    cpu = time.process_time() - start
    return {"cpu": cpu, "steps": sampler.history[-1]["step"], **weights_row(sampler.sample(20_000, seed=7), 0.0)}


def funnel_cmcd(seed: int) -> Row:
    """CMCD with 64 steps, pathwise reverse KL, step sizes that depend on the point."""
    target = targets.Funnel(dim=10, scale=3.0)
    sampler = ds.CMCD(target, num_steps=64, local_steps=True, objective=ReverseKL(), seed=seed)
    _, cpu = cpu_timed(lambda: sampler.fit(steps=2500, batch_size=256, learning_rate=4e-3, seed=seed))
    return {"cpu": cpu, **weights_row(sampler.sample(20_000, seed=seed + 100), 0.0)}


def auto_gmm40(seed: int) -> Row:
    target = targets.GaussianMixture.forty()
    fit, cpu = cpu_timed(lambda: ds.sample(target, seed=seed))
    draws = fit.resample(4000, seed=seed)["x"]
    findings = [str(f) for f in fit.findings]
    row = {"cpu": cpu, "method": fit.method, "findings": findings}
    return {**row, **weights_row(fit.particles, 0.0), **mode_variation(target, draws)}


def auto_ill_scaled(seed: int) -> Row:
    target = targets.REGISTRY["ill_scaled"]()
    exact = target.sample(200_000, generator=torch.Generator().manual_seed(1))
    fit, cpu = cpu_timed(lambda: ds.sample(target, seed=seed))
    assert target.log_normalizer is not None
    row = {"cpu": cpu, "method": fit.method, "findings": [str(f) for f in fit.findings]}
    moments = moments_row(fit.particles.x.double(), fit.particles.log_weight, exact.mean(0), exact.std(0))
    return {**row, **weights_row(fit.particles, target.log_normalizer), **moments}


def auto_eight_schools(seed: int) -> Row:
    """The centred Pyro model against exact draws of the same posterior."""
    exact = targets.EightSchools(centered=True)
    draws = exact.constrain(exact.sample(200_000, generator=torch.Generator().manual_seed(1)))
    target = eight_schools()
    fit, cpu = cpu_timed(lambda: ds.sample(target, seed=seed))

    def flat(posterior: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = [posterior["mu"], posterior["tau"].log()]
        return torch.cat([torch.stack(parts, -1), posterior["theta"]], -1).double()

    reference = flat(draws)
    moments = moments_row(flat(fit.posterior), fit.particles.log_weight, reference.mean(0), reference.std(0))
    assert exact.log_normalizer is not None
    row = {"cpu": cpu, "method": fit.method, "findings": [str(f) for f in fit.findings]}
    return {**row, **weights_row(fit.particles, exact.log_normalizer), **moments}


CASES: dict[str, tuple[Callable[[int], Row], str]] = {
    "gmm9_dis": (gmm9_dis, "abs log Z error <= 0.02, ESS/N >= 0.85, 180 s"),
    "gmm9_published_setting": (gmm9_published_setting, "ESS/N >= 0.6, abs log Z error <= 0.02, 110 s"),
    "funnel_cmcd": (funnel_cmcd, "ELBO >= -0.59, abs log Z error <= 0.11"),
    "auto_gmm40": (auto_gmm40, "40 modes, TV <= 0.08, abs log Z error <= 0.05, 60 s"),
    "auto_ill_scaled": (auto_ill_scaled, "means within 0.1 sd, sds within 5%, abs log Z error <= 0.05"),
    "auto_eight_schools": (auto_eight_schools, "means within 0.1 sd, sd ratios in [0.9, 1.1], log Z within 2 se"),
}


def run_cell(name: str, seed: int, folder: Path) -> Row:
    path = folder / f"{name}_{seed}.json"
    if path.exists():
        return json.loads(path.read_text())
    row = {"case": name, "seed": seed, **CASES[name][0](seed), "torch": torch.__version__, "version": ds.__version__}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(row, indent=1))
    temporary.replace(path)
    return row


def show(row: Row) -> str:
    skip = ("case", "torch", "version", "findings")
    parts = [
        f"{k} {v:.4g}" if isinstance(v, float) and math.isfinite(v) else f"{k} {v}"
        for k, v in row.items()
        if k not in skip
    ]
    return ", ".join(parts) + "".join(f"\n      {finding}" for finding in row.get("findings", []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"any of {', '.join(CASES)}; all by default")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=Path("results/foundation"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.cases or CASES:
        print(f"{name}: must reach {CASES[name][1]}")
        for seed in options.seeds:
            print("   ", show(run_cell(name, seed, options.out)), flush=True)


if __name__ == "__main__":
    main()
