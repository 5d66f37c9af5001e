"""Free-energy surface of alanine dipeptide over phi and psi by parallel tempering, with error bars.

    python experiments/aldp_reference.py                                   # ff96 with OBC1, ten minutes of one core
    python experiments/aldp_reference.py AMBER99SB_ILDN --blocks 4

Replicas travel between the prior of the internal coordinates (uniform rotors) and the molecule at 300 K under a frozen
bias ``V(phi)``, which makes all values of phi about equally likely, and states are reweighted by ``exp(-V)``. The bias
comes from a few short runs first. No data enters: what the replicas find, they find from the prior. Every block is a
run of its own from new draws of the prior; the spread over all systems of all blocks is the error bar. Finished blocks
are kept in ``results/aldp/<model>.jsonl`` and not run again; the summary goes to ``results/aldp/<model>.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffsampler import targets
from diffsampler._report import versions
from diffsampler.kernels.hmc import HMC
from diffsampler.parallel_tempering import Ladder, TemperingRun, parallel_tempering, pilot_ladder
from diffsampler.target import ForwardingTarget
from diffsampler.tempering import TemperedPath

FOLDER = Path("results/aldp")
BASIN = (0.0, 2.0 * math.pi / 3.0)
"""Where phi counts as the left-handed basin: its two barriers lie near 0 and 120 degrees."""


@dataclass(frozen=True)
class Settings:
    model: str = "AMBER96_OBC1"
    temperature: float = 300.0
    num_systems: int = 32
    leapfrog_steps: int = 10
    harmonics: int = 8
    bias_rounds: int = 5
    bias_scans: int = 128
    highest_bias: float = 12.0
    """Free energies above the minimum that the bias still lifts, kT."""
    tuning_rounds: int = 6
    scans: int = 512
    blocks: int = 12
    bins: int = 36
    """Per angle."""


class BiasedTarget(ForwardingTarget):
    """The molecule with a Fourier series of phi, cosines and then sines, added to its log density."""

    def __init__(self, target: targets.AlanineDipeptideInternal, coefficients: Tensor) -> None:
        super().__init__(target)
        self.coefficients = coefficients

    def bias(self, phi: Tensor) -> Tensor:
        return series(phi, len(self.coefficients) // 2) @ self.coefficients.to(phi)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.target.log_prob(x) + self.bias(self.target.torsion_angles(x)[..., 0])

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, score = self.target.log_prob_and_score(x)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            bias = self.bias(self.target.torsion_angles(leaf)[..., 0])
            (slope,) = torch.autograd.grad(bias.sum(), leaf)
        return log_prob + bias.detach(), score + slope


def series(phi: Tensor, harmonics: int) -> Tensor:
    """``(cos phi, ..., sin phi, ...)``, ``(...) -> (..., 2 harmonics)``."""
    angles = phi.unsqueeze(-1) * torch.arange(1, harmonics + 1, dtype=phi.dtype, device=phi.device)
    return torch.cat([angles.cos(), angles.sin()], -1)


def learn_bias(target: targets.AlanineDipeptideInternal, settings: Settings) -> tuple[Tensor, Ladder]:
    """Bias that flattens phi up to ``highest_bias``, from runs each of which is biased by all before it."""
    bias = torch.zeros(2 * settings.harmonics, dtype=torch.float64)
    centres = -math.pi + 2.0 * math.pi / 72 * (torch.arange(72, dtype=torch.float64) + 0.5)
    counts, flattened = torch.zeros(72, dtype=torch.float64), torch.zeros(72, dtype=torch.float64)
    ladder = None
    for index in range(settings.bias_rounds):
        run, _ = temper(target, bias, ladder, settings, seed=1000 + index, scans=settings.bias_scans)
        ladder = run.ladder
        phi = target.torsion_angles(run.x.double())[..., 0].flatten()
        found = torch.histc(phi, 72, -math.pi, math.pi)
        # Each run counts states under its own bias: all together are one mixture (Ferrenberg & Swendsen, 1989).
        counts = counts + found
        flattened = flattened + found.sum() * (series(centres, settings.harmonics) @ bias).exp() / normalizer(
            found, series(centres, settings.harmonics) @ bias
        )
        free = -(counts.clamp_min(0.3) / flattened).log()
        free = (free - free.min()).clamp_max(settings.highest_bias)
        bias = torch.linalg.lstsq(series(centres, settings.harmonics), (free - free.mean()).unsqueeze(1)).solution[:, 0]
        print(f"bias round {index}: phi > 0 in {float((phi > 0).double().mean()):.3f} of states", flush=True)
    assert ladder is not None
    return bias, ladder


def normalizer(found: Tensor, bias: Tensor) -> Tensor:
    """Mean of ``exp(bias)`` under the unbiased law, from states under the biased one."""
    return found.sum() / (found * (-bias).exp()).sum()


def temper(
    target: targets.AlanineDipeptideInternal,
    bias: Tensor,
    ladder: Ladder | None,
    settings: Settings,
    *,
    seed: int,
    scans: int,
) -> tuple[TemperingRun, BiasedTarget]:
    biased = BiasedTarget(target, bias)
    assert target.prior is not None
    path = TemperedPath(target.prior, biased)
    kernel = HMC(target.space, num_steps=settings.leapfrog_steps, smallest_step=0.15)
    generator = torch.Generator().manual_seed(seed)
    if ladder is None:
        ladder = pilot_ladder(path, kernel=kernel, generator=generator, dtype=torch.float32)
    run = parallel_tempering(
        path,
        ladder,
        kernel=kernel,
        num_scans=scans,
        generator=generator,
        num_systems=settings.num_systems,
        tuning_rounds=settings.tuning_rounds,
        dtype=torch.float32,
    )
    return run, biased


def block(
    target: targets.AlanineDipeptideInternal, bias: Tensor, ladder: Ladder, settings: Settings, index: int
) -> dict[str, Any]:
    start = time.process_time()
    run, biased = temper(target, bias, ladder, settings, seed=index, scans=settings.scans)
    angles = target.torsion_angles(run.x.double())
    phi, psi = angles.unbind(-1)
    log_weight = -biased.bias(phi)
    weight = (log_weight - log_weight.max()).exp()
    total = weight.sum(1)
    cell = ((angles + math.pi) * settings.bins / (2.0 * math.pi)).long().clamp(0, settings.bins - 1)
    place = cell[..., 0] * settings.bins + cell[..., 1]
    histogram = torch.zeros(len(total), settings.bins**2, dtype=torch.float64).scatter_add(1, place, weight)
    rows = {
        "total": total,
        "positive": (weight * (phi > 0)).sum(1),
        "basin": (weight * ((phi > BASIN[0]) & (phi < BASIN[1]))).sum(1),
    }
    scale = (log_weight.max()).exp()
    return {
        "block": index,
        "seconds": time.process_time() - start,
        "evaluations": run.evaluations,
        "levels": len(run.ladder.betas),
        "barrier": run.barrier,
        "round_trips": run.round_trips.tolist(),
        "crossings": int(((phi[:, 1:] > 0) != (phi[:, :-1] > 0)).sum()),
        "histogram": [float(f"{v:.5g}") for v in (scale * histogram.sum(0)).tolist()],
        # Relative normalizer of the biased density, for the record only.
        "log_z_biased": run.log_normalizers.tolist(),
        **{name: (scale * value).tolist() for name, value in rows.items()},
    }


def ratio(numerator: Tensor, denominator: Tensor) -> tuple[float, float]:
    """Ratio of sums over independent systems with its standard error (delta method)."""
    value = numerator.sum() / denominator.sum()
    residual = (numerator - value * denominator) / denominator.mean()
    return float(value), float(residual.std() / math.sqrt(len(residual)))


def summary(rows: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    columns = {name: torch.tensor([v for row in rows for v in row[name]]).double() for name in FIELDS}
    result: dict[str, Any] = {"settings": asdict(settings), "versions": versions(), "blocks": len(rows)}
    for name in ("positive", "basin"):
        share, error = ratio(columns[name], columns["total"])
        result[f"share_{name}"] = [share, error]
        # F(phi > 0) - F(phi < 0) in kT.
        result[f"free_energy_difference_{name}"] = [math.log((1.0 - share) / share), error / (share * (1.0 - share))]
    histograms = torch.tensor([row["histogram"] for row in rows]).double()
    each = histograms / histograms.sum(1, keepdim=True)
    mean = histograms.sum(0) / histograms.sum()
    free = -(mean / mean.max()).log()
    error = (each.std(0) / math.sqrt(len(rows))) / mean
    result |= {
        "surface": [[round(v, 3) for v in line] for line in finite(free.reshape(settings.bins, -1)).tolist()],
        "surface_error": [[round(v, 3) for v in line] for line in finite(error.reshape(settings.bins, -1)).tolist()],
        "evaluations": sum(row["evaluations"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
        "round_trips": sum(sum(row["round_trips"]) for row in rows),
        "crossings": sum(row["crossings"] for row in rows),
        "levels": rows[0]["levels"],
        "barrier": sum(row["barrier"] for row in rows) / len(rows),
    }
    return result


FIELDS = ("total", "positive", "basin")


def finite(values: Tensor) -> Tensor:
    """Empty cells as -1: JSON has no infinity."""
    return torch.where(values.isfinite(), values, torch.full_like(values, -1.0))


def prepared(target: targets.AlanineDipeptideInternal, settings: Settings) -> tuple[Tensor, Ladder]:
    path = FOLDER / f"{settings.model}-bias.json"
    if not path.is_file():
        bias, ladder = learn_bias(target, settings)
        text = {"bias": bias.tolist(), "ladder": [value.tolist() for value in ladder]}
        path.write_text(json.dumps(text) + "\n")
    stored = json.loads(path.read_text())
    ladder = Ladder(*(torch.tensor(value, dtype=torch.float64) for value in stored["ladder"]))
    return torch.tensor(stored["bias"], dtype=torch.float64), ladder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=Settings.model, choices=[m.name for m in targets.AlanineModel])
    parser.add_argument("--blocks", type=int, default=Settings.blocks)
    arguments = parser.parse_args()
    settings = Settings(model=arguments.model, blocks=arguments.blocks)
    FOLDER.mkdir(parents=True, exist_ok=True)
    target = targets.AlanineDipeptideInternal(
        targets.AlanineModel[settings.model], temperature=settings.temperature, compiled=True
    )
    bias, ladder = prepared(target, settings)
    path = FOLDER / f"{settings.model}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    for index in range(len(rows), settings.blocks):
        rows.append(block(target, bias, ladder, settings, index))
        with path.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        if len(rows) > 1:
            result = summary(rows, settings)
            (FOLDER / f"{settings.model}.json").write_text(json.dumps(result) + "\n")
            value, error = result["free_energy_difference_positive"]
            print(
                f"{len(rows)} blocks: F(phi > 0) - F(phi < 0) = {value:.3f} +- {error:.3f} kT, "
                f"{result['round_trips']} round trips, {result['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
