r"""Read the diagnostics.

One density, four runs: one that is right, and three that are not. The density has nine well separated modes of equal
weight and normalizer 1, so that log Z = 0 and every mode holds a ninth.

* `ds.sample(target)`: no findings.
* A learned process after ten steps of training: the weights are exact for any network, but a handful of particles carry
  them. The effective sample size and k-hat say so, and log Z is too low.
* Tempered SMC on hardly any budget: the report says what was cut and what nothing confirms.
* Chains that start far apart: each explores its own mode. R-hat compares them. The weights are silent here: chains have
  none.

Read a report from the end: findings first, then k-hat (above 0.7 the error bars are too small), then the effective
sample size, then log Z. No diagnostic sees a mode that nothing has visited.

    python experiments/tutorials/diagnostics.py --out results/tutorials
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

import diffsampler as ds
from diffsampler import baselines, targets


def starts(num_chains: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return 6.0 * torch.randn(num_chains, 2, generator=generator, dtype=torch.float64)


def runs(target: ds.Target, *, quick: bool) -> dict[str, ds.Fit]:
    chains = baselines.HMC(target, num_chains=8, warmup=100, init=starts(8))
    return {
        "as it should be": ds.sample(target, seed=0, **({"method": "smc", "num_samples": 2048} if quick else {})),
        "hardly trained": ds.sample(target, method="dis", seed=0, budget=ds.Budget(steps=10)),
        "hardly any budget": ds.sample(target, seed=0, budget=ds.Budget(evaluations=12_000)),
        "chains from afar": ds.sample(target, method=chains, num_samples=1600, seed=0),
    }


def sorted_share(log_weight: Tensor) -> Tensor:
    """Share of the total weight that the largest 1, 2, 3, ... particles hold."""
    return torch.softmax(log_weight.double(), 0).sort(descending=True).values.cumsum(0)


def draw(path: Path, target: targets.GaussianMixture, fits: dict[str, ds.Fit]) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 4, figsize=(13.0, 6.4), layout="constrained", height_ratios=(5, 4))
    # Square panels may push their titles over the edge.
    figure.get_layout_engine().set(rect=(0.0, 0.0, 1.0, 0.97))
    truth = target.mode_weights()
    for column, (name, fit) in enumerate(fits.items()):
        x = fit.particles.resample(1000, generator=torch.Generator().manual_seed(0))
        share = torch.bincount(target.mode_labels(x), minlength=len(truth)).double() / len(x)
        panels[0, column].scatter(*x.mT.numpy(), s=5, alpha=0.4, color="#2a6f97", lw=0)
        panels[0, column].set(xlim=(-9.0, 9.0), ylim=(-9.0, 9.0), aspect="equal")
        log_z = f"log Z {fit.log_normalizer}" if fit.particles.has_normalizer else "log Z: chains have none"
        lost = int((share == 0).sum())
        panels[0, column].set_title(f"{name}\n{log_z}, modes lost: {lost}", fontsize=9)
        panel = panels[1, column]
        if fit.particles.has_normalizer:
            held = sorted_share(fit.particles.log_weight)
            panel.plot((torch.arange(1, len(held) + 1) / len(held)).numpy(), held.numpy(), color="#2a6f97")
            panel.plot([0, 1], [0, 1], color="0.6", lw=0.8, ls="--")
            panel.set(xlabel="share of the particles", xlim=(0, 1), ylim=(0, 1.02))
            note = f"k-hat {fit.pareto_k:.2f}, ess {fit.ess:.0f} of {len(fit.particles)}"
        else:
            each = fit.particles.x[:, 0].reshape(fit.particles.replicates, -1)
            for chain in each:
                panel.plot(chain.tolist(), lw=0.6)
            panel.set(xlabel="draw", ylabel="$x_1$ of each chain")
            note = f"ess {fit.ess:.0f} of {len(fit.particles)}"
        panel.set_title(f"{note}\nfindings: {len(fit.findings)}", fontsize=9)
    panels[0, 0].set_ylabel("1,000 draws")
    panels[1, 0].set_ylabel("share of the weight")
    figure.savefig(path, dpi=130)


def main(out: Path, *, quick: bool = False) -> None:
    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    target = targets.GaussianMixture.grid(9)
    fits = runs(target, quick=quick)
    for name, fit in fits.items():
        print(f"--- {name}\n{fit}\n")
    draw(out / "diagnostics.png", target, fits)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/tutorials"))
    parser.add_argument("--quick", action="store_true", help="a few seconds, coarse figures")
    options = parser.parse_args()
    main(options.out, quick=options.quick)
