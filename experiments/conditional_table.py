"""Amortized samplers on families of posteriors whose answers are known at every context.

* ``linear``: ``x ~ N(0, I_4)``, three data ``c = A x + 0.5 e``. Mean, covariance and log Z(c) in closed form.
* ``vae``: a variational autoencoder with two latent numbers is trained here on 8 x 8 pictures of blobs; its decoder is
  fixed then, and one sampler is trained for the posterior of the latents given a picture of 64 binary pixels. Its log
  evidence, posterior mean and covariance come from quadrature on a grid.

One diffusion is trained per case and seed; it is judged on contexts that it has not seen: the error of log Z(c) and its
standard error, the gap between log Z(c) and the ELBO, the posterior mean's error in standard deviations of the
posterior, the covariance's relative error, and ESS/N. Every run is one JSON file with its settings and versions; runs
that exist are not made again. Figures are medians over contexts and, in brackets, the worst context.

    OMP_NUM_THREADS=1 python experiments/conditional_table.py                # two cases, 3 seeds, about 2 CPU minutes
    OMP_NUM_THREADS=1 python experiments/conditional_table.py --seeds 1 --only linear
    OMP_NUM_THREADS=1 python experiments/conditional_table.py --table        # of what is there, no new runs
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from table_cases import Folder
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.nn import functional

import diffsampler as ds
from diffsampler._report import table

F64 = torch.float64


@dataclass(frozen=True)
class Settings:
    """What all runs have in common.

    Arguments:
        steps: Training steps of the sampler.
        contexts: Unseen contexts it is judged on.
        draws: Draws for each of them.
    """

    steps: int = 400
    batch_size: int = 256
    num_steps: int = 24
    learning_rate: float = 5e-3
    contexts: int = 20
    draws: int = 2000


class Answer(NamedTuple):
    """What is known about the posterior of one context."""

    log_evidence: float
    mean: Tensor
    covariance: Tensor


class LinearGaussian(ds.ConditionalTarget):
    """Posterior of ``x ~ N(0, I_4)`` given ``c = A x + 0.5 e`` with a fixed random ``A``."""

    noise = 0.5

    def __init__(self) -> None:
        super().__init__(ds.Euclidean(4), 3)
        self.design = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
        covariance = self.design @ self.design.mT + self.noise**2 * torch.eye(3, dtype=F64)
        self.law = MultivariateNormal(torch.zeros(3, dtype=F64), covariance)

    def log_prob_given(self, x: Tensor, context: Tensor) -> Tensor:
        residual = (context - x @ self.design.to(x).mT) / self.noise
        square = x.square().sum(-1) + residual.square().sum(-1)
        return -0.5 * square - 3.5 * math.log(2.0 * math.pi) - 3.0 * math.log(self.noise)

    def sample_context(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(n, 3, generator=generator, dtype=F64)
        return noise @ self.law.scale_tril.mT

    def answer(self, context: Tensor) -> Answer:
        gain = torch.linalg.solve(self.law.covariance_matrix, self.design).mT
        covariance = torch.eye(4, dtype=F64) - gain @ self.design
        return Answer(float(self.law.log_prob(context)), gain @ context, covariance)


def blobs(n: int, generator: torch.Generator) -> Tensor:
    """Binary pictures ``(n, 64)`` of blobs at random places."""
    centre = 1.0 + 5.0 * torch.rand(n, 1, 1, 2, generator=generator)
    grid = torch.arange(8.0)
    square = (grid.view(1, 8, 1) - centre[..., 0]).square() + (grid.view(1, 1, 8) - centre[..., 1]).square()
    chance = 0.02 + 0.94 * torch.exp(-square / 6.0)
    return torch.bernoulli(chance, generator=generator).flatten(1)


class Autoencoder(nn.Module):
    """Two latent numbers, Bernoulli pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64))

    def train_on(self, pictures: Tensor, *, steps: int, generator: torch.Generator) -> float:
        """Maximize the evidence lower bound; its last value, averaged over the last tenth of the steps."""
        optimizer = torch.optim.Adam(self.parameters(), lr=3e-3)
        bounds = []
        for _ in range(steps):
            batch = pictures[torch.randint(len(pictures), (256,), generator=generator)]
            mean, log_scale = self.encoder(batch).chunk(2, -1)
            z = mean + log_scale.exp() * torch.randn(mean.shape, generator=generator)
            fit = -functional.binary_cross_entropy_with_logits(self.decoder(z), batch, reduction="none").sum(-1)
            divergence = 0.5 * (mean.square() + (2.0 * log_scale).exp() - 1.0 - 2.0 * log_scale).sum(-1)
            bound = (fit - divergence).mean()
            optimizer.zero_grad()
            (-bound).backward()
            optimizer.step()
            bounds.append(bound.item())
        return statistics.fmean(bounds[-max(1, steps // 10) :])


class Latents(ds.ConditionalTarget):
    """Posterior of an autoencoder's two latents given a picture; pictures are fresh draws of blobs."""

    def __init__(self, *, steps: int = 600) -> None:
        super().__init__(ds.Euclidean(2), 64)
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Autoencoder()
        self.bound = model.train_on(blobs(4000, generator), steps=steps, generator=generator)
        self.decoder = model.decoder.double()
        for parameter in self.decoder.parameters():
            parameter.requires_grad = False
        axis = torch.linspace(-6.0, 6.0, 241, dtype=F64)
        self.cell = float(axis[1] - axis[0]) ** 2
        self.grid = torch.cartesian_prod(axis, axis)

    def log_prob_given(self, x: Tensor, context: Tensor) -> Tensor:
        logit = self.decoder(x.to(F64))
        fit = (context.to(F64) * logit - functional.softplus(logit)).sum(-1)
        return (fit - 0.5 * x.square().sum(-1) - math.log(2.0 * math.pi)).to(x)

    def sample_context(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(1) if generator is None else generator
        return blobs(n, generator).double()

    def answer(self, context: Tensor) -> Answer:
        with torch.no_grad():
            log_prob = self.log_prob_given(self.grid, context.expand(len(self.grid), -1))
        share = torch.softmax(log_prob, 0)
        mean = share @ self.grid
        centred = self.grid - mean
        evidence = float(torch.logsumexp(log_prob, 0)) + math.log(self.cell)
        return Answer(evidence, mean, (share.unsqueeze(-1) * centred).mT @ centred)


CASES = {"linear": LinearGaussian, "vae": Latents}


def run(family: LinearGaussian | Latents, seed: int, settings: Settings) -> dict[str, Any]:
    """Train one sampler for the family, and judge it context by context."""
    start = time.process_time()
    sampler = ds.ConditionalDIS(family, num_steps=settings.num_steps, point_features=0, seed=seed)
    sampler.fit(steps=settings.steps, batch_size=settings.batch_size, learning_rate=settings.learning_rate, seed=seed)
    trained = time.process_time() - start
    contexts = family.sample_context(settings.contexts, generator=torch.Generator().manual_seed(1000 + seed))
    rows = []
    for context in contexts:
        exact = family.answer(context)
        particles = sampler.sample_given(context, settings.draws, seed=seed)
        weight = torch.softmax(particles.log_weight, 0)
        x = particles.x.to(F64)
        mean = weight @ x
        covariance = (weight.unsqueeze(-1) * (x - mean)).mT @ (x - mean)
        rows.append(
            {
                "log_evidence": exact.log_evidence,
                "error": particles.log_normalizer.value - exact.log_evidence,
                "std_error": particles.log_normalizer.std_error,
                "elbo_gap": exact.log_evidence - particles.elbo,
                "mean_error": float(((mean - exact.mean).abs() / exact.covariance.diagonal().sqrt()).max()),
                "covariance_error": float((covariance - exact.covariance).norm() / exact.covariance.norm()),
                "ess_fraction": particles.ess / len(particles),
            }
        )
    return {"cpu_training": trained, "cpu_drawing": time.process_time() - start - trained, "contexts": rows}


HEADER = ("family", "seed", "log Z off", "s.e.", "ELBO gap", "mean off, sd", "cov off", "ESS/N", "CPU s")


def line(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    """Medians over contexts, and the worst one."""

    def cell(field: str, *, lowest: bool = False) -> str:
        values = [abs(entry[field]) for entry in row["contexts"]]
        return f"{statistics.median(values):.4f} ({(min if lowest else max)(values):.4f})"

    return (
        name,
        str(row["seed"]),
        cell("error"),
        cell("std_error"),
        cell("elbo_gap"),
        cell("mean_error"),
        cell("covariance_error"),
        cell("ess_fraction", lowest=True),
        f"{row['cpu_training'] + row['cpu_drawing']:.0f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="training steps")
    parser.add_argument("--table", action="store_true", help="make no new runs")
    parser.add_argument("--out", type=Path, default=Path("results/conditional"), help="folder of the runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Folder(options.out, Settings(steps=options.steps))
    for name in options.only:
        missing = [seed for seed in range(options.seeds) if not options.table and not folder.done(name, seed)]
        family = CASES[name]() if missing else None
        for seed in missing:
            assert family is not None
            row = run(family, seed, folder.settings)
            folder.write(name, seed, row)
            print(*line(name, {**row, "seed": seed}), sep="  ", flush=True)
    rows = [line(name, row) for name in options.only for row in folder.read(name)]
    text = table(HEADER, rows)
    print(text)
    (options.out / "table.txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
