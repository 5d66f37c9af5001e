r"""Simulation-based calibration of `ds.sample` on a hierarchical model with five parameters.

Parameters are drawn from the prior, data from the model, and the posterior is sampled. If the posterior is right, the
rank of every true parameter among independent draws is uniform, and so is that of any function of parameters and data;
the log likelihood is one that is sensitive. Uniformity is judged by a chi-square test over ten bins.

The five marginal posteriors are known by quadrature over the scale. Their distribution functions at the truth show what
the drawn data sets alone would give ("exact"), and at the draws of every run they test the sampler against the very
posterior that it had to find ("draws"): pooled over runs, these are uniform.

Every simulation is one JSON file; those that exist are not made again. As a control, `--shrink` pulls all draws towards
their mean, which must be noticed.

    OMP_NUM_THREADS=1 python experiments/sbc_table.py                             # defaults: 20 CPU s each
    OMP_NUM_THREADS=1 python experiments/sbc_table.py --evaluations 900000        # the pilot alone: 2 CPU s
    OMP_NUM_THREADS=1 python experiments/sbc_table.py --evaluations 900000 --table  # no new simulations

References:
    Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018),
    https://arxiv.org/abs/1804.06788
    Simulation-Based Calibration Checking for Bayesian Computation: The Choice of Test Quantities Shapes Sensitivity
    (Modrak et al., 2023), https://doi.org/10.1214/23-BA1404
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import stats
from table_cases import Folder
from torch import Tensor

import diffsampler as ds
from diffsampler._report import table

Row = dict[str, Any]
NUM_DRAWS = 99
"""Draws among which a rank is taken: ranks 0 to 99 fill ten bins evenly."""
NUM_BINS = 10
GROUPS, PER_GROUP = 3, 4
NAMES = ["mu", "log tau", "theta[0]", "theta[1]", "theta[2]", "log likelihood"]


@dataclass(frozen=True)
class Settings:
    """What all simulations have in common."""

    num_samples: int = 4000
    evaluations: int | None = None
    steps: int | None = None


def model(y: Tensor) -> None:
    """Three groups of four observations, centred: a funnel where the groups are alike."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.LogNormal(-0.5, 1.0))
    with pyro.plate("group", GROUPS):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        with pyro.plate("observation", PER_GROUP):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def simulate(seed: int) -> tuple[Tensor, Tensor]:
    """Parameters ``(mu, log tau, theta)`` of shape ``(5,)`` and data ``(4, 3)``."""
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1))
    noise = torch.randn(2 + GROUPS + GROUPS * PER_GROUP, generator=generator, dtype=torch.float64)
    mu, log_tau = 2.0 * noise[:1], noise[1:2] - 0.5
    theta = mu + log_tau.exp() * noise[2 : 2 + GROUPS]
    y = theta + noise[2 + GROUPS :].reshape(PER_GROUP, GROUPS)
    return torch.cat([mu, log_tau, theta]), y


def quantities(parameters: Tensor, y: Tensor) -> Tensor:
    """Parameters ``(n, 5)`` with the log likelihood appended, ``(n, 6)``."""
    residual = y - parameters[:, None, 2:]
    return torch.cat([parameters, -0.5 * residual.square().sum((-1, -2)).unsqueeze(-1)], -1)


def exact_cdf(at: np.ndarray, y: Tensor) -> np.ndarray:
    """Posterior distribution functions of the five parameters at points ``(n, 5)``, same shape.

    Given the scale everything is Gaussian; the scale is integrated on a grid of its logarithm.
    """
    mean, error = y.mean(0).numpy()[:, None], 1.0 / PER_GROUP
    log_tau = np.linspace(-9.0, 6.0, 3001)
    variance = np.exp(2.0 * log_tau)
    precision = GROUPS / (variance + error) + 0.25
    centre = mean.sum(0) / (variance + error) / precision
    evidence = (mean**2).sum(0) / (variance + error) - centre**2 * precision
    log_weight = -0.5 * (evidence + GROUPS * np.log(variance + error) + np.log(precision) + (log_tau + 0.5) ** 2)
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    share = variance / (variance + error)
    location = [centre, *(share * mean + (1.0 - share) * centre)]
    scale = [1.0 / precision, *[error * share + (1.0 - share) ** 2 / precision] * GROUPS]
    mixed = [
        stats.norm.cdf((at[:, [column]] - m) / np.sqrt(v)) @ weight
        for column, m, v in zip([0, 2, 3, 4], location, scale, strict=True)
    ]
    return np.stack([mixed[0], np.interp(at[:, 1], log_tau, weight.cumsum()), *mixed[1:]], 1)


def run(seed: int, settings: Settings) -> Row:
    truth, y = simulate(seed)
    budget = ds.Budget(evaluations=settings.evaluations, steps=settings.steps)
    cpu = time.process_time()
    fit = ds.sample(ds.pyro.PyroTarget(model, y), num_samples=settings.num_samples, seed=seed, budget=budget)
    cpu = time.process_time() - cpu
    values = fit.resample(NUM_DRAWS, seed=seed)
    columns = [values["mu"].unsqueeze(-1), values["tau"].log().unsqueeze(-1), values["theta"]]
    draws = quantities(torch.cat(columns, -1).double(), y)
    known = quantities(truth.unsqueeze(0), y)
    return {
        "draws": draws.tolist(),
        "truth": known[0].tolist(),
        "method": fit.method,
        "pareto_k": fit.pareto_k,
        "log_normalizer": list(fit.log_normalizer),
        "findings": [str(finding) for finding in fit.findings],
        "cpu": cpu,
    }


def ranks(rows: list[Row], *, shrink: float = 1.0) -> np.ndarray:
    """How many draws lie below the truth, ``(simulations, quantities)``."""
    draws, truth = np.array([row["draws"] for row in rows]), np.array([row["truth"] for row in rows])
    centre = draws.mean(1, keepdims=True)
    draws = centre + shrink * (draws - centre)
    return (draws < truth[:, None]).sum(1)


def uniformity(shares: np.ndarray) -> list[tuple[float, float]]:
    """Chi-square statistic over ten bins and its p-value, of each column of numbers in [0, 1)."""
    result = []
    for column in shares.T:
        counts = np.bincount((column * NUM_BINS).astype(int).clip(0, NUM_BINS - 1), minlength=NUM_BINS)
        statistic, p = stats.chisquare(counts)
        result.append((float(statistic), float(p)))
    return result


def against_exact(rows: list[Row], *, shrink: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Exact distribution functions at the truths ``(simulations, 5)`` and at all draws ``(simulations * 99, 5)``."""
    truths, draws = [], []
    for row in rows:
        _, y = simulate(row["seed"])
        drawn = np.array(row["draws"])[:, :-1]
        drawn = drawn.mean(0) + shrink * (drawn - drawn.mean(0))
        truths.append(exact_cdf(np.array([row["truth"][:-1]]), y))
        draws.append(exact_cdf(drawn, y))
    return np.concatenate(truths), np.concatenate(draws)


def show(rows: list[Row], *, shrink: float = 1.0) -> str:
    found = ranks(rows, shrink=shrink)
    exact = [[f"{p:.4f}" for _, p in uniformity(part)] + ["-"] for part in against_exact(rows, shrink=shrink)]
    lines = [
        (name, f"{statistic:.1f}", f"{p:.4f}", f"{column.mean() / NUM_DRAWS:.3f}", *more)
        for name, column, (statistic, p), *more in zip(
            NAMES, found.T, uniformity(found / (NUM_DRAWS + 1)), *exact, strict=True
        )
    ]
    text = table(("quantity", "chi-square (9)", "p", "mean rank", "p, exact", "p, draws"), lines)
    flagged = sum(bool(row["findings"]) for row in rows)
    learned = sum("learned" in row["method"] for row in rows)
    cost = float(np.mean([row["cpu"] for row in rows]))
    return f"{text}\n{len(rows)} simulations, {flagged} with findings, {learned} learned, {cost:.1f} CPU s each"


def draw(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = ranks(rows)
    low, high = stats.binom.ppf([0.005, 0.995], len(rows), 1.0 / NUM_BINS)
    figure, panels = pyplot.subplots(2, 3, figsize=(9.0, 4.6), sharex=True, sharey=True, layout="constrained")
    for panel, name, column, (_, p) in zip(
        panels.flat, NAMES, found.T, uniformity(found / (NUM_DRAWS + 1)), strict=True
    ):
        panel.axhspan(low, high, color="#2a6f97", alpha=0.15, lw=0)
        panel.axhline(len(rows) / NUM_BINS, color="0.4", lw=0.8)
        panel.hist(column, bins=np.linspace(0, NUM_DRAWS + 1, NUM_BINS + 1), color="#2a6f97", rwidth=0.92)
        panel.set_title(f"{name}, p = {p:.3f}", fontsize=10)
    figure.supxlabel(f"rank of the truth among {NUM_DRAWS} draws", fontsize=10)
    figure.supylabel("simulations", fontsize=10)
    figure.suptitle(f"Simulation-based calibration, {len(rows)} simulations (band: 99 %)", x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=200)
    parser.add_argument("--num-samples", type=int, default=Settings.num_samples)
    parser.add_argument("--evaluations", type=int, default=None, help="budget of a run")
    parser.add_argument("--steps", type=int, default=None, help="gradient steps of the learned process")
    parser.add_argument("--shrink", type=float, default=1.0, help="sabotage: factor on the spread of all draws")
    parser.add_argument("--table", action="store_true", help="make no new simulations")
    parser.add_argument("--out", type=Path, default=Path("results/sbc"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(options.num_samples, options.evaluations, options.steps)
    folder = Folder(options.out, settings)
    for seed in range(options.simulations):
        if not options.table and not folder.done("sbc", seed):
            folder.write("sbc", seed, run(seed, settings))
    rows = folder.read("sbc")
    if rows:
        text = show(rows, shrink=options.shrink)
        if options.shrink == 1.0:
            folder.publish(text, lambda path: draw(rows, path))
        else:
            print(text)


if __name__ == "__main__":
    main()
