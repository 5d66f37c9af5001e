"""Energies and gradients per second of molecules, one core.

    OMP_NUM_THREADS=1 python experiments/bench_force_field.py             # writes results/bench_force_field.json

Alanine dipeptide in vacuum and in OBC1, float32 and float64, a batch of 1024: written gradient eager and compiled,
reverse-mode differentiation of the same energy, and internal coordinates compiled. Seconds are CPU time of the process,
the best and the median of the repeats.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffsampler import targets
from diffsampler._report import versions
from diffsampler.targets.force_field import ForceField

OUT = Path("results/bench_force_field.json")
BATCH = 1024
SECONDS = 3.0


def rate(function: Callable[[], Any]) -> dict[str, float]:
    for _ in range(3):
        function()
    times: list[float] = []
    while sum(times) < SECONDS:
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return {"best": round(BATCH / min(times)), "median": round(BATCH / statistics.median(times))}


def differentiated(field: ForceField, x: torch.Tensor) -> torch.Tensor:
    leaf = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(field.energy(leaf).sum(), leaf)
    return gradient


def measure(model: targets.AlanineModel, dtype: torch.dtype) -> dict[str, Any]:
    system = model.system()
    noise = torch.randn(BATCH, system.num_atoms, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (system.positions + 0.005 * noise).to(dtype)
    eager, compiled = ForceField(system), ForceField(system, compiled=True)
    internal = targets.AlanineDipeptideInternal(model, compiled=True)
    z = internal.prior.sample(BATCH, generator=torch.Generator().manual_seed(0)).to(dtype)
    start = time.perf_counter()
    compiled.energy_and_gradient(x)
    row: dict[str, Any] = {
        "model": model.name,
        "dtype": str(dtype).removeprefix("torch."),
        "compile_seconds": round(time.perf_counter() - start, 1),
        "compile_failure": compiled.compile_failure,
        "eager": rate(lambda: eager.energy_and_gradient(x)),
        "compiled": rate(lambda: compiled.energy_and_gradient(x)),
        "autograd": rate(lambda: differentiated(eager, x)),
        "energy_only": rate(lambda: eager.energy(x)),
        "internal_compiled": rate(lambda: internal.log_prob_and_score(z)),
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    torch.set_num_threads(1)
    rows = [
        measure(model, dtype)
        for model in (targets.AlanineModel.AMBER99SB_ILDN, targets.AlanineModel.AMBER96_OBC1)
        for dtype in (torch.float32, torch.float64)
    ]
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps({"versions": versions(), "batch": BATCH, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
