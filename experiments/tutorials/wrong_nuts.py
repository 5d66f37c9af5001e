r"""A posterior NUTS gets wrong.

A star's brightness was measured on eleven nights. Its variation is a sine of unknown frequency; observed at night only,
frequencies that differ by one cycle per day ("aliases") look nearly the same. Given the frequency the model is linear,
so that the posterior of the frequency is known exactly: a row of narrow peaks.

Four chains of NUTS each climb one peak, often a side lobe, and stay. Nothing is wrong with any chain by itself: no
divergences, good acceptance. `ds.sample` finds the peaks, weights them, and says how much evidence there is.

    python experiments/tutorials/wrong_nuts.py --out results/tutorials
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import diffsampler as ds
from diffsampler.integrations.pyro import nuts

LOWEST, HIGHEST, AMPLITUDE, NOISE = 0.1, 2.1, 2.0, 0.7


def observations() -> tuple[Tensor, Tensor]:
    """Days since the first night, close to midnight, and magnitudes."""
    generator = torch.Generator().manual_seed(3)
    draw = torch.rand(3, 11, generator=generator, dtype=torch.float64)
    time = (60.0 * draw[0]).floor().sort().values + 0.125 * (draw[1] - 0.5)
    noise = torch.randn(11, generator=generator, dtype=torch.float64)
    return time, 1.7 * torch.cos(2.0 * math.pi * 0.74 * time + 0.3) + NOISE * noise


def star(time: Tensor, y: Tensor) -> None:
    frequency = pyro.sample("frequency", dist.Uniform(LOWEST, HIGHEST))
    a = pyro.sample("a", dist.Normal(0.0, AMPLITUDE))
    b = pyro.sample("b", dist.Normal(0.0, AMPLITUDE))
    phase = 2.0 * math.pi * frequency * time
    pyro.sample("y", dist.Normal(a * phase.cos() + b * phase.sin(), NOISE).to_event(1), obs=y)


def exact_density(frequency: Tensor, time: Tensor, y: Tensor) -> Tensor:
    """Posterior density of the frequency on a fine grid, the amplitudes integrated out."""
    phase = 2.0 * math.pi * frequency[:, None] * time
    basis = torch.stack([phase.cos(), phase.sin()], -1)
    precision = torch.eye(2, dtype=torch.float64) / AMPLITUDE**2 + basis.mT @ basis / NOISE**2
    projected = (basis.mT @ y / NOISE**2).unsqueeze(-1)
    fit = (projected.mT @ torch.linalg.solve(precision, projected)).squeeze((-1, -2))
    density = torch.softmax(0.5 * fit - 0.5 * torch.logdet(precision), 0)
    return density / (frequency[1] - frequency[0])


def draw(path: Path, time: Tensor, y: Tensor, fit: ds.Fit, chains: Tensor) -> None:
    from matplotlib import pyplot

    fine = torch.linspace(LOWEST, HIGHEST, 40_001, dtype=torch.float64)
    density = exact_density(fine, time, y)
    edges = torch.linspace(LOWEST, HIGHEST, 101)
    figure, panels = pyplot.subplots(3, 1, figsize=(9.0, 7.2), layout="constrained", height_ratios=(3, 3, 2))
    days = torch.linspace(float(time.min()) - 1.0, float(time.min()) + 16.0, 3000, dtype=torch.float64)
    draws = fit.resample(6, seed=1)
    for f, a, b in zip(draws["frequency"], draws["a"], draws["b"], strict=True):
        phase = 2.0 * math.pi * f * days
        panels[0].plot(days.numpy(), (a * phase.cos() + b * phase.sin()).numpy(), color="#2a6f97", alpha=0.35, lw=0.7)
    panels[0].errorbar(time.numpy(), y.numpy(), NOISE, fmt="o", color="black", ms=4, capsize=2)
    panels[0].set(xlabel="day", ylabel="magnitude", xlim=(float(days[0]), float(days[-1])))
    panels[0].set_title("The first nights of eleven, and six curves from the posterior", fontsize=10)
    # The same bins for the exact law and for draws: peaks are narrower than a bin.
    place = ((fine - LOWEST) / (HIGHEST - LOWEST) * 100).long().clamp_max(99)
    share = torch.zeros(100, dtype=torch.float64).index_add(0, place, density * (fine[1] - fine[0]))
    weight = torch.softmax(fit.particles.log_weight, 0)
    panels[1].stairs(share.numpy(), edges.numpy(), fill=True, color="0.8", label="exact")
    style = {"histtype": "step", "color": "#2a6f97", "lw": 1.5, "label": "ds.sample"}
    panels[1].hist(fit.posterior["frequency"].numpy(), bins=edges.numpy(), weights=weight.numpy(), **style)
    panels[1].set(ylabel="posterior probability", xlim=(LOWEST, HIGHEST))
    panels[1].legend(frameon=False)
    colors = ("#d1495b", "#edae49", "#6a994e", "#8d5a97")
    for chain, color in zip(chains, colors, strict=False):
        panels[2].plot(chain.tolist(), range(len(chain)), color=color, lw=0.8)
    panels[2].set(
        xlabel="frequency, cycles per day", ylabel="NUTS, draw", xlim=(LOWEST, HIGHEST), ylim=(0, len(chains[0]) - 1)
    )
    panels[2].set_title("Chains of NUTS, one color each: a straight line never left its peak", fontsize=10)
    figure.savefig(path, dpi=130)


def main(out: Path, *, quick: bool = False) -> None:
    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    time, y = observations()
    target = ds.pyro.PyroTarget(star, time, y)
    fit = ds.sample(target, seed=0, **({"method": "smc", "num_samples": 1024} if quick else {}))
    print(fit)
    steps = 5 if quick else 150
    chains = nuts(star, (time, y), num_samples=steps, warmup_steps=steps, num_chains=2 if quick else 4, seed=0)
    frequency = chains.samples["frequency"]
    print("mean frequency of each chain of NUTS:", [round(float(chain.mean()), 3) for chain in frequency])
    print("divergences of each chain:", chains.divergences)
    draw(out / "wrong_nuts.png", time, y, fit, frequency)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/tutorials"))
    parser.add_argument("--quick", action="store_true", help="a few seconds, coarse figures")
    options = parser.parse_args()
    main(options.out, quick=options.quick)
