r"""A funnel.

Eight schools in their natural, centred form: effects around a common mean with unknown spread tau. Where tau is small
all effects must lie close together: the posterior is a funnel whose neck gets narrower without end. The step size that
suits the wide part is too long for the neck, so NUTS turns away from it, and its draws lack small values of tau. Its
divergences say so; the usual cure is to rewrite the model.

`ds.sample` takes the model as it is. The posterior of tau is known by quadrature, and shown.

    python experiments/tutorials/funnel.py --out results/tutorials
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
from diffsampler.integrations.pyro import nuts

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def exact_density(log_tau: Tensor) -> Tensor:
    """Posterior density of log tau: effects and their mean integrated out."""
    tau = log_tau.exp()
    common = 25.0 * torch.ones(8, 8, dtype=torch.float64)
    covariance = torch.diag_embed(ERRORS.double().square() + tau.square()[:, None]) + common
    law = torch.distributions.MultivariateNormal(torch.zeros(8, dtype=torch.float64), covariance)
    log_density = law.log_prob(EFFECTS.double()) + dist.HalfCauchy(5.0).log_prob(tau) + log_tau
    return torch.softmax(log_density, 0) / (log_tau[1] - log_tau[0])


def draw(path: Path, mine: dict[str, Tensor], theirs: dict[str, Tensor], divergences: int) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12.0, 4.0), layout="constrained", width_ratios=(3, 3, 4))
    series = (("ds.sample", mine, "#2a6f97"), (f"NUTS, {divergences} divergences", theirs, "#d1495b"))
    for panel, (name, values, color) in zip(panels, series, strict=False):
        panel.scatter(values["theta"][:, 0].numpy(), values["tau"].log().numpy(), s=4, alpha=0.35, color=color, lw=0)
        panel.set(xlim=(-20.0, 40.0), ylim=(-5.0, 4.0), xlabel="effect of the first school", title=name)
    panels[0].set(ylabel="log tau")
    line = torch.linspace(-6.0, 5.0, 2001, dtype=torch.float64)
    panels[2].fill_between(line.numpy(), exact_density(line).numpy(), color="0.85", label="exact")
    for name, values, color in series:
        style = {"density": True, "histtype": "step", "color": color, "lw": 1.5, "label": name}
        panels[2].hist(values["tau"].log().numpy(), bins=torch.linspace(-6.0, 5.0, 45).numpy(), **style)
    panels[2].set(xlabel="log tau", ylabel="posterior density", xlim=(-5.0, 4.0))
    panels[2].legend(frameon=False, loc="upper left", fontsize=9)
    figure.savefig(path, dpi=130)


def main(out: Path, *, quick: bool = False) -> None:
    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    fit = ds.sample(
        ds.pyro.PyroTarget(schools, EFFECTS, ERRORS),
        seed=0,
        **({"method": "smc", "num_samples": 1024} if quick else {}),
    )
    print(fit)
    steps = 5 if quick else 500
    chains = nuts(schools, (EFFECTS, ERRORS), num_samples=steps, warmup_steps=steps, num_chains=2 if quick else 4)
    theirs = {name: value.flatten(0, 1) for name, value in chains.samples.items()}
    mine = fit.resample(2000, seed=1)
    line = torch.linspace(-14.0, 9.0, 4001, dtype=torch.float64)
    exact = float((exact_density(line) * (line < 0.0)).sum() * (line[1] - line[0]))
    for name, values in (("ds.sample", mine), ("NUTS", theirs)):
        print(f"P(tau < 1) by {name}: {float((values['tau'] < 1.0).double().mean()):.3f}, exact {exact:.3f}")
    draw(out / "funnel.png", mine, theirs, sum(chains.divergences))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/tutorials"))
    parser.add_argument("--quick", action="store_true", help="a few seconds, coarse figures")
    options = parser.parse_args()
    main(options.out, quick=options.quick)
