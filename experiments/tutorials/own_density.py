r"""Bring your own log density.

No modelling language is needed: a function from a batch of points ``(n, d)`` to ``n`` log densities, up to a constant,
is a target. Here it is the Boltzmann density of a particle in the Mueller-Brown potential, the standard test of
chemistry: three curved basins at very different depths.

The function is checked before any work is done, and the errors say what to change. Three of the usual mistakes are made
below on purpose. If there is a gradient already, for example the forces of a simulation code, it is handed over as
``score``.

    python experiments/tutorials/own_density.py --out results/tutorials

References:
    Location of saddle points and minimum energy paths by a constrained simplex optimization procedure (Mueller and
    Brown, 1979), https://doi.org/10.1007/BF00547608
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

import diffsampler as ds

AMPLITUDE = (-200.0, -100.0, -170.0, 15.0)
CURVATURE = ((-1.0, 0.0, -10.0), (-1.0, 0.0, -10.0), (-6.5, 11.0, -6.5), (0.7, 0.6, 0.7))
CENTRE = ((1.0, 0.0), (0.0, 0.5), (-0.5, 1.5), (-1.0, 1.0))
TEMPERATURE = 25.0


def energy(x: Tensor) -> Tensor:
    """Energy over temperature of points ``(n, 2)``."""
    total = torch.zeros_like(x[:, 0])
    for amplitude, (a, b, c), (x0, y0) in zip(AMPLITUDE, CURVATURE, CENTRE, strict=True):
        dx, dy = x[:, 0] - x0, x[:, 1] - y0
        total = total + amplitude * torch.exp(a * dx.square() + b * dx * dy + c * dy.square())
    return total / TEMPERATURE


def mistakes() -> list[str]:
    """What is said to a density that was not summed, one that forgot the batch, and one of infinite mass."""
    functions = (
        lambda x: -0.5 * x.square(),
        lambda x: -0.5 * (x[0].square() + x[1].square()),
        lambda x: -0.5 * (x[:, 0] - x[:, 1]).square(),
    )
    said = []
    for function in functions:
        try:
            ds.sample(ds.Target.from_log_prob(function, dim=2))
        except ValueError as error:
            said.append(str(error))
    return said


def grid(*, points: int = 400) -> tuple[Tensor, Tensor]:
    """Points ``(points^2, 2)`` of a window around all basins, and the density there."""
    first = torch.linspace(-3.0, 1.6, points, dtype=torch.float64)
    second = torch.linspace(-1.2, 2.8, points, dtype=torch.float64)
    nodes = torch.cartesian_prod(first, second)
    return nodes, (-energy(nodes)).exp() * (first[1] - first[0]) * (second[1] - second[0])


def draw(path: Path, fit: ds.Fit) -> None:
    from matplotlib import pyplot

    nodes, mass = grid()
    side = math.isqrt(len(nodes))
    first, second = (column.reshape(side, side).numpy() for column in nodes.mT)
    level = (energy(nodes) - energy(nodes).min()).reshape(side, side).numpy()
    levels = list(range(15))
    figure, panels = pyplot.subplots(1, 3, figsize=(12.5, 3.9), layout="constrained", width_ratios=(4, 4, 4))
    draws = fit.resample(3000, seed=1)["x"]
    for panel in panels[:2]:
        panel.contour(first, second, level, levels=levels, colors="0.65", linewidths=0.6)
        panel.set(xlabel="$x_1$", ylabel="$x_2$", xlim=(-1.8, 1.3), ylim=(-0.6, 2.2))
    filled = panels[0].contourf(first, second, level, levels=levels, cmap="Blues_r", alpha=0.8)
    figure.colorbar(filled, ax=panels[0], label="energy above the lowest, in kT", shrink=0.9, ticks=range(0, 15, 2))
    panels[0].set_title("The potential", fontsize=10)
    panels[1].scatter(*draws.mT.numpy(), s=3, alpha=0.3, color="#d1495b", lw=0)
    panels[1].set_title("3,000 draws", fontsize=10)
    marginal = (mass.reshape(side, side).sum(1) / mass.sum()).numpy() / (first[1, 0] - first[0, 0])
    panels[2].fill_between(first[:, 0], marginal, color="0.85", label="quadrature")
    weight = torch.softmax(fit.particles.log_weight, 0)
    style = {"density": True, "histtype": "step", "color": "#d1495b", "lw": 1.5, "label": "ds.sample"}
    panels[2].hist(fit.posterior["x"][:, 0].numpy(), bins=60, weights=weight.numpy(), **style)
    panels[2].set(xlabel="$x_1$", ylabel="density", xlim=(-2.2, 1.4))
    panels[2].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def main(out: Path, *, quick: bool = False) -> None:
    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    for text in mistakes():
        print("refused:", text)
    target = ds.Target.from_energy(energy, dim=2)
    fit = ds.sample(target, seed=0, **({"method": "smc", "num_samples": 2048} if quick else {}))
    print(fit)
    _, mass = grid()
    print(f"log of the partition function by quadrature in a window: {float(mass.sum().log()):.4f}")
    draw(out / "own_density.png", fit)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/tutorials"))
    parser.add_argument("--quick", action="store_true", help="a few seconds, coarse figures")
    options = parser.parse_args()
    main(options.out, quick=options.quick)
