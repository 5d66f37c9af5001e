"""The library's kernels against Pyro's NUTS, both inside Pyro's ``MCMC``, and the cost of a model's gradient.

    python experiments/bench_pyro_kernels.py --out kernels.json

One process on one thread, everybody in turn, three seeds. Seconds are CPU seconds of all that a user waits for: reading
the model, warm-up, compiling, and Pyro's own loop over draws. The effective sample size is ArviZ's bulk ESS, the
smallest over coordinates, of what ``MCMC`` returns; for kernels with chains inside, the smaller of that and the one
over their own chains. Both answer the same question with the model and data as users write them: eight schools in the
non-centred form, and a logistic regression of 351 cases on 34 features and an intercept, synthetic data.

Pyro's NUTS runs as long as the table says, far shorter than the others: its rate counts, not its length.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

import diffsampler as ds
from diffsampler._report import versions, write_json
from diffsampler.integrations.examples import EFFECTS, ERRORS, eight_schools_noncentered
from diffsampler.integrations.pyro_kernel import BlockKernel


@dataclass(frozen=True)
class Settings:
    """What the runs have in common; kernels have their defaults."""

    draws: int = 20_000
    warmup: int = 200
    nuts_draws: int = 200
    nuts_warmup: int = 200
    diffusion_draws: int = 4000
    seeds: tuple[int, ...] = (1, 2, 3)
    repeats: int = 300


def logistic(x: Tensor, y: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 2.5).expand([x.shape[1]]).to_event(1))
    pyro.sample("y", dist.Bernoulli(logits=x @ b).to_event(1), obs=y)


def regression() -> tuple[Tensor, Tensor]:
    """Correlated features, an intercept, and labels from the model."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((351, 34)) @ (np.eye(34) + 0.3 * rng.standard_normal((34, 34)))
    y = rng.random(351) < 1.0 / (1.0 + np.exp(-x @ rng.standard_normal(34) * 0.3))
    x = np.concatenate([np.ones((351, 1)), x / x.std(0)], 1)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)


MODELS: dict[str, tuple[Callable[..., None], tuple[Tensor, Tensor]]] = {
    "eight schools": (eight_schools_noncentered, (torch.tensor(EFFECTS), torch.tensor(ERRORS))),
    "logistic regression": (logistic, regression()),
}


def cpu_seconds() -> float:
    """CPU seconds of this process and of the compilers that it has waited for."""
    return time.process_time() + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


def samplers(settings: Settings) -> dict[str, tuple[Callable[[Any], Any], int, int]]:
    """Kernel of a model, draws, warm-up steps."""
    long = (settings.draws, settings.warmup)
    short = (settings.nuts_draws, settings.nuts_warmup)
    return {
        "Pyro NUTS": (lambda model: NUTS(model), *short),
        "Pyro NUTS, jit": (lambda model: NUTS(model, jit_compile=True, ignore_jit_warnings=True), *short),
        "ChEESKernel": (lambda model: ds.pyro.ChEESKernel(model), *long),
        "ChEESKernel, compiled": (lambda model: ds.pyro.ChEESKernel(model, compile="on"), *long),
        "BatchedNUTSKernel": (lambda model: ds.pyro.BatchedNUTSKernel(model), *long),
        "DiffusionKernel": (lambda model: ds.pyro.DiffusionKernel(model), settings.diffusion_draws, settings.warmup),
        "InterleavedKernel": (lambda model: ds.pyro.InterleavedKernel(model), settings.diffusion_draws, 50),
    }


def flat(samples: dict[str, Tensor]) -> np.ndarray:
    """Draws ``(n, D)`` of all coordinates."""
    return np.concatenate([value.double().reshape(len(value), -1).numpy() for _, value in sorted(samples.items())], 1)


def run(model: Callable[..., None], args: tuple[Tensor, ...], make: Any, draws: int, warmup: int, seed: int) -> Any:
    """One call of ``MCMC`` and what it gave."""
    pyro.set_rng_seed(seed)
    began = cpu_seconds()
    kernel = make(model)
    mcmc = MCMC(kernel, draws, warmup_steps=warmup, disable_progbar=True)
    mcmc.run(*args)
    seconds = cpu_seconds() - began
    x = flat(mcmc.get_samples())
    half = len(x) // 2
    split = np.stack([x[:half], x[half : 2 * half]])
    ess = min(float(arviz.ess(split[..., i], method="bulk")) for i in range(x.shape[1]))
    # Not those of MCMC, which take memory quadratic in the number of draws.
    if isinstance(kernel, BlockKernel):
        ess = min(ess, kernel.diagnostics()["inner_ess"])
    return {"seconds": seconds, "ess": ess, "rate": ess / seconds, "mean": x.mean(0).tolist(), "sd": x.std(0).tolist()}


def table(settings: Settings, only: list[str] | None) -> dict[str, Any]:
    """Rows by model and sampler."""
    rows: dict[str, Any] = {}
    for name, (model, args) in MODELS.items():
        rows[name] = {
            label: [run(model, args, make, draws, warmup, seed) for seed in settings.seeds]
            for label, (make, draws, warmup) in samplers(settings).items()
            if only is None or label in only
        }
        show(name, rows[name])
    return rows


def show(name: str, rows: dict[str, Any]) -> None:
    """Print the rows of one model; the posterior is compared with the long run of the first of our kernels."""
    reference = next((runs for label, runs in rows.items() if "Pyro" not in label), next(iter(rows.values())))
    mean, sd = np.mean([r["mean"] for r in reference], 0), np.mean([r["sd"] for r in reference], 0)
    peer = statistics.median(r["rate"] for r in rows["Pyro NUTS"]) if "Pyro NUTS" in rows else math.nan
    print(f"\n{name}\n{'':<22}  CPU s     ESS  ESS/CPU s  times NUTS  largest error / sd (expected)  sd ratios")
    for label, runs in rows.items():
        seconds, ess, rate = (statistics.median(r[key] for r in runs) for key in ("seconds", "ess", "rate"))
        shift = max(float(np.abs((np.array(r["mean"]) - mean) / sd).max()) for r in runs)
        ratios = np.concatenate([np.array(r["sd"]) / sd for r in runs])
        print(
            f"{label:<22} {seconds:>6.1f} {ess:>7.0f} {rate:>10.0f} {rate / peer:>11.0f}"
            f"  {shift:>8.3f} ({3.0 / math.sqrt(ess):.3f})  {ratios.min():>18.2f} .. {ratios.max():.2f}"
        )


def gradients(settings: Settings) -> dict[str, float]:
    """Microseconds of CPU time of a gradient of eight schools."""
    target = ds.pyro.PyroTarget(*_model("eight schools"))
    effects, errors = torch.tensor(EFFECTS, dtype=torch.float64), torch.tensor(ERRORS, dtype=torch.float64)

    def by_hand(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        mu, log_tau, z = x[:, 0], x[:, 1], x[:, 2:]
        tau = log_tau.exp()
        residual = (effects - mu[:, None] - tau[:, None] * z) / errors
        prior = -0.5 * (mu / 5.0) ** 2 - torch.log1p((tau / 5.0) ** 2) + log_tau - 0.5 * z.square().sum(-1)
        log_prob = prior - 0.5 * residual.square().sum(-1)
        (score,) = torch.autograd.grad(log_prob.sum(), x)
        return log_prob.detach(), score

    _, potential, _, _ = pyro.infer.mcmc.util.initialize_model(*_initialize("eight schools"))

    def pyro_one(x: Tensor) -> None:
        values = {"mu": x[0, 0], "tau": x[0, 1], "z": x[0, 2:]}
        values = {name: value.float().detach().requires_grad_() for name, value in values.items()}
        torch.autograd.grad(potential(values), list(values.values()))

    found: dict[str, float] = {}
    for size in (64, 1024):
        x = torch.randn(size, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        functions: dict[str, Callable[[Tensor], object]] = {
            "by hand": by_hand,
            "model under vmap": lambda x: ds.Target.log_prob_and_score(target, x),
            "traced (default)": target.log_prob_and_score,
            "compiled": target.compiled(size),
        }
        if size == 64:
            functions["Pyro, one chain"] = pyro_one
        for label, function in functions.items():
            found[f"{size}: {label}"] = microseconds(lambda f=function, x=x: f(x), settings.repeats)
    print("\nCPU microseconds of one gradient of eight schools, by the number of points")
    for label, value in found.items():
        print(f"{label:<24} {value:>8.0f}")
    return found


def _model(name: str) -> tuple[Any, ...]:
    model, args = MODELS[name]
    return model, *args


def _initialize(name: str) -> tuple[Any, tuple[Tensor, ...]]:
    return MODELS[name]


def microseconds(function: Callable[[], object], repeats: int) -> float:
    """Median over five batches of calls."""
    for _ in range(30):
        function()
    spans = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(repeats // 5):
            function()
        spans.append((time.process_time() - began) / (repeats // 5))
    return 1e6 * statistics.median(spans)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", help="samplers of the table")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    settings = Settings(seeds=tuple(range(1, options.seeds + 1)))
    content = {"gradients": gradients(settings), "table": table(settings, options.only)}
    if options.out is not None:
        write_json(options.out, content | {"settings": asdict(settings), "versions": versions()})


if __name__ == "__main__":
    main()
