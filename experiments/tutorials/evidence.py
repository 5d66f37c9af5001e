r"""How much evidence?

Is there a trend in the data, a curve, or more? Polynomials of degree 0 to 4 are fitted, and their evidences compared:
`ds.compare` turns log evidences with errors into posterior probabilities with errors. The models are conjugate, so the
exact answer is known, and shown.

Two things to take home. Evidence punishes what the data do not ask for: no separate penalty is needed. And an evidence
with an error bar of half a nat is not worth much: the same comparison from a few hundred particles is told to be
undecided, instead of a ranking by chance.

    python experiments/tutorials/evidence.py --out results/tutorials
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import diffsampler as ds

NOISE, PRIOR = 0.5, 1.5
NAMES = ("constant", "line", "parabola", "cubic", "quartic")


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    x = torch.linspace(-1.0, 1.0, 15, dtype=torch.float64)
    noise = torch.randn(15, generator=generator, dtype=torch.float64)
    return x, 0.3 + 0.8 * x - 0.9 * x.square() + NOISE * noise


def powers(x: Tensor, degree: int) -> Tensor:
    return x.unsqueeze(-1) ** torch.arange(degree + 1)


def polynomial(x: Tensor, y: Tensor, degree: int) -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, PRIOR).expand([degree + 1]).to_event(1))
    pyro.sample("y", dist.Normal(powers(x, degree) @ beta, NOISE).to_event(1), obs=y)


def exact(x: Tensor, y: Tensor, degree: int) -> float:
    basis = powers(x, degree)
    covariance = PRIOR**2 * basis @ basis.mT + NOISE**2 * torch.eye(len(y), dtype=torch.float64)
    return float(torch.distributions.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y))


def draw(path: Path, x: Tensor, y: Tensor, fits: dict[str, ds.Fit], comparison: ds.Comparison) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12.0, 3.8), layout="constrained", width_ratios=(4, 3, 3))
    fine = torch.linspace(-1.1, 1.1, 200, dtype=torch.float64)
    for degree, name in enumerate(NAMES):
        weight = torch.softmax(fits[name].particles.log_weight, 0)
        mean = weight @ fits[name].posterior["beta"].double()
        panels[0].plot(fine.numpy(), (powers(fine, degree) @ mean).numpy(), label=name, lw=1.5)
    panels[0].errorbar(x.numpy(), y.numpy(), NOISE, fmt="o", color="black", ms=4, capsize=2)
    panels[0].set(xlabel="x", ylabel="y")
    panels[0].legend(frameon=False, fontsize=8)
    panels[0].set_title("Posterior mean of each model", fontsize=10)
    truth = torch.tensor([exact(x, y, degree) for degree in range(len(NAMES))])
    evidence = [comparison.models[name].log_evidence for name in NAMES]
    place = range(len(NAMES))
    panels[1].plot(place, truth.tolist(), "_", color="black", ms=22, mew=1.5, label="exact")
    panels[1].errorbar(
        place, [z.value for z in evidence], [1.96 * z.std_error for z in evidence], fmt="o", ms=4, capsize=3,
        color="#2a6f97", label="ds.sample, 95 %",
    )  # fmt: skip
    panels[1].set_title("Log evidence", fontsize=10)
    panels[1].legend(frameon=False, fontsize=8, loc="lower right")
    panels[1].margins(y=0.15)
    panels[2].bar(place, torch.softmax(truth, 0).tolist(), width=0.6, color="0.85", label="exact")
    probability = [comparison.models[name] for name in NAMES]
    middle = [model.probability.value for model in probability]
    below = [max(0.0, value - model.interval[0]) for value, model in zip(middle, probability, strict=True)]
    above = [max(0.0, model.interval[1] - value) for value, model in zip(middle, probability, strict=True)]
    panels[2].errorbar(
        place, middle, [below, above], fmt="o", ms=4, capsize=3, color="#2a6f97", label="ds.compare, 95 %"
    )
    panels[2].set_title("Posterior probability", fontsize=10)
    panels[2].set_ylim(0.0, 1.35 * max(model.interval[1] for model in probability))
    panels[2].legend(frameon=False, fontsize=8, loc="upper left")
    for panel in panels[1:]:
        panel.set_xticks(place, NAMES, rotation=30)
        panel.set_xlim(-0.6, len(NAMES) - 0.4)
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
    figure.savefig(path, dpi=130)


def main(out: Path, *, quick: bool = False) -> None:
    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    x, y = data()
    options = {"method": "smc", "num_samples": 1024} if quick else {}
    targets = {name: ds.pyro.PyroTarget(polynomial, x, y, degree) for degree, name in enumerate(NAMES)}
    fits = {name: ds.sample(target, seed=0, **options) for name, target in targets.items()}
    comparison = ds.compare(fits)
    print(comparison)
    print("\nThe same from a handful of particles:\n")
    poor = {name: ds.sample(target, method="smc", num_samples=512, seed=1) for name, target in targets.items()}
    print(ds.compare(poor))
    draw(out / "evidence.png", x, y, fits, comparison)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/tutorials"))
    parser.add_argument("--quick", action="store_true", help="a few seconds, coarse figures")
    arguments = parser.parse_args()
    main(arguments.out, quick=arguments.quick)
