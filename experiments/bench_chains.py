"""Speed of many chains: ChEES and batched NUTS of the library, Pyro's NUTS and, if asked for, BlackJAX's ChEES.

Effective draws per CPU second of one process, warm-up included, compilation apart. Everybody runs on one thread and is
timed in turn, seed by seed, so that a noisy machine slows all alike; a first run compiles and is not counted (Pyro's
NUTS compiles nothing and starts cold). The effective sample size is ArviZ's, the smallest over coordinates of the bulk
ESS of ``x`` (and, in its own column, of ``(x - mean)^2``), for everybody the same.

    python experiments/bench_chains.py --data ionosphere.npz --blackjax-python /path/to/python --out chains.json

``--data`` is an ``.npz`` file with ``x (N, P)`` and ``y (N,)``; without it the regression is on synthetic data of the
same size. ``--blackjax-python`` is an interpreter that has BlackJAX; it runs this file again as a peer.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

CHAINS = 64


@dataclass(frozen=True)
class Settings:
    """What a row of the table is made of."""

    draws: int = 400
    warmup: int = 300
    peer_warmup: int = 300
    seeds: tuple[int, ...] = (1, 2, 3)
    pyro_draws: int = 300
    pyro_warmup: int = 200


def cpu_seconds() -> float:
    """CPU seconds of this process and of the compilers that it has waited for."""
    return time.process_time() + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


def regression(path: str | None) -> dict[str, np.ndarray]:
    """Design matrix with intercept, standardized, and labels in 0 and 1."""
    if path is None:
        rng = np.random.default_rng(0)
        x = rng.standard_normal((351, 34)) @ (np.eye(34) + 0.3 * rng.standard_normal((34, 34)))
        y = rng.random(351) < 1.0 / (1.0 + np.exp(-x @ rng.standard_normal(34) * 0.3))
    else:
        with np.load(path) as data:
            x, y = data["x"].astype(float), data["y"]
        y = y == y.max()
    spread = x.std(0)
    x = (x - x.mean(0)) / np.where(spread > 1e-9, spread, 1.0)
    return {"x": np.concatenate([np.ones((len(x), 1)), x], 1), "y": y.astype(float)}


def summary(x: np.ndarray, seconds: float, evaluations: int) -> dict[str, float]:
    """A row from draws ``(chains, draws, D)``."""
    import arviz

    def smallest(values: np.ndarray) -> float:
        return min(float(arviz.ess(values[:, :, i])) for i in range(values.shape[2]))

    ess = smallest(x)
    rhat = max(float(arviz.rhat(x[:, :, i])) for i in range(x.shape[2])) if len(x) > 1 else math.nan
    square = smallest((x - x.mean((0, 1))) ** 2)
    return {
        "seconds": seconds,
        "ess": ess,
        "ess_per_second": ess / seconds,
        "square_ess_per_second": square / seconds,
        "gradients": evaluations,
        "ess_per_1000_gradients": 1000.0 * ess / evaluations if evaluations else math.nan,
        "rhat": rhat,
    }


def library_row(make: Callable[[], Any], draws: int) -> Callable[[int], dict[str, float]]:
    """Timed runs of a sampler of chains, after a first one that compiles."""
    began = cpu_seconds()
    sampler = make()
    sampler.sample(CHAINS * 8, seed=0)
    compiling = cpu_seconds() - began

    def run(seed: int) -> dict[str, float]:
        before, began = sampler.evaluations, time.process_time()
        particles = sampler.sample(CHAINS * draws, seed=seed)
        seconds = time.process_time() - began
        x = particles.x.reshape(CHAINS, -1, particles.x.shape[1]).numpy()
        row = summary(x, seconds, sampler.evaluations - before)
        return row | {"compile_seconds": compiling, "waste": sampler.lockstep_waste, "path": sampler.compilation}

    return run


def pyro_row(target: Any, settings: Settings) -> Callable[[int], dict[str, float]]:
    """Pyro's own NUTS, one chain, as its users run it."""
    from diffsampler import baselines

    def run(seed: int) -> dict[str, float]:
        began = time.process_time()
        nuts = baselines.PyroNUTS(target, num_chains=1, warmup_steps=settings.pyro_warmup)
        x = nuts.sample(settings.pyro_draws, seed=seed).x
        return summary(x.unsqueeze(0).numpy(), time.process_time() - began, 0)

    return run


def blackjax_row(python: str, name: str, data: str | None, settings: Settings) -> Callable[[int], dict[str, float]]:
    """BlackJAX's ChEES with diagonal metric in an interpreter of its own, which times itself after compiling."""

    def run(seed: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "draws.npz"
            command = [python, __file__, "--peer", name, "--seed", str(seed), "--out", str(out)]
            command += ["--draws", str(settings.draws), "--warmup", str(settings.peer_warmup)]
            subprocess.run(command + ([] if data is None else ["--data", data]), check=True)
            with np.load(out) as result:
                row = summary(result["x"], float(result["seconds"]), int(result["gradients"]))
                return row | {"compile_seconds": float(result["compile_seconds"])}

    return run


def peer(name: str, data: str | None, *, draws: int, warmup: int, seed: int, out: str) -> None:
    """One run of BlackJAX's ChEES; needs jax and blackjax, and nothing of this library."""
    import blackjax
    import jax
    import jax.numpy as jnp
    import optax

    jax.config.update("jax_enable_x64", True)  # noqa: FBT003
    effects = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    errors = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    table = {key: jnp.array(value) for key, value in regression(data).items()}

    def schools(x: Any) -> Any:
        mu, log_tau, z = x[0], x[1], x[2:]
        tau = jnp.exp(log_tau)
        prior = -0.5 * (mu / 5.0) ** 2 - jnp.log1p((tau / 5.0) ** 2) + log_tau - 0.5 * jnp.sum(z**2)
        return prior - 0.5 * jnp.sum(((effects - mu - tau * z) / errors) ** 2)

    def logistic(w: Any) -> Any:
        margin = (table["x"] @ w) * (2.0 * table["y"] - 1.0)
        return -0.5 * jnp.sum(w**2) + jnp.sum(jax.nn.log_sigmoid(margin))

    density, dim = (schools, 10) if name == "eight schools" else (logistic, table["x"].shape[1])
    chees = blackjax.chees_adaptation(density, CHAINS, mass_matrix_estimation="diagonal")

    @jax.jit
    def run(key: Any) -> Any:
        first, second, third = jax.random.split(key, 3)
        start = jax.random.normal(first, (CHAINS, dim))
        (states, params), info = chees.run(second, start, 0.1, optax.adam(0.025), warmup, max_sampling_steps=draws)
        kernel = blackjax.dynamic_hmc(density, **params).step

        def step(states: Any, key: Any) -> Any:
            states, moved = jax.vmap(kernel)(jax.random.split(key, CHAINS), states)
            return states, (states.position, moved.num_integration_steps)

        _, (x, steps) = jax.lax.scan(step, states, jax.random.split(third, draws))
        return x, steps.sum() + info.info.num_integration_steps.sum()

    began = time.process_time()
    jax.block_until_ready(run(jax.random.key(0)))
    compiling, began = time.process_time() - began, time.process_time()
    x, steps = jax.block_until_ready(run(jax.random.key(seed)))
    seconds = time.process_time() - began
    x = np.asarray(x).swapaxes(0, 1)
    np.savez(out, x=x, seconds=seconds, gradients=int(steps), compile_seconds=compiling - seconds)


def rows(settings: Settings, data: str | None, python: str | None) -> dict[str, dict[str, Callable[[int], dict]]]:
    """Every model's samplers, ready to run."""
    import torch

    from diffsampler import baselines, targets
    from diffsampler.integrations.examples import EFFECTS, ERRORS, eight_schools_noncentered
    from diffsampler.integrations.pyro import PyroTarget

    table = {key: torch.tensor(value) for key, value in regression(data).items()}
    logistic = targets.LogisticRegression(table["x"], table["y"], standardize=False, intercept=False)

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        import pyro
        import pyro.distributions as dist

        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
        pyro.sample("y", dist.Bernoulli(logits=x @ w).to_event(1), obs=y)

    models = {
        "logistic regression": (logistic, PyroTarget(model, table["x"].float(), table["y"].float())),
        "eight schools": (PyroTarget(eight_schools_noncentered, torch.tensor(EFFECTS), torch.tensor(ERRORS)), None),
    }
    options: dict[str, Any] = {"warmup": settings.warmup, "num_chains": CHAINS}
    result: dict[str, dict[str, Callable[[int], dict]]] = {}
    for name, (target, pyro_target) in models.items():
        result[name] = {
            "ChEES": library_row(lambda t=target: baselines.ChEES(t, compile="on", **options), settings.draws),
            "ChEES, eager": library_row(lambda t=target: baselines.ChEES(t, compile="off", **options), settings.draws),
            "NUTS": library_row(lambda t=target: baselines.NUTS(t, compile="on", **options), settings.draws),
            "Pyro NUTS": pyro_row(pyro_target or target, settings),
        }
        if python is not None:
            result[name]["BlackJAX ChEES"] = blackjax_row(python, name, data, settings)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data")
    parser.add_argument("--blackjax-python")
    parser.add_argument("--out", default="results/bench_chains.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--draws", type=int, default=Settings.draws)
    parser.add_argument("--warmup", type=int, default=Settings.warmup)
    parser.add_argument("--peer-warmup", type=int, default=Settings.peer_warmup)
    options = parser.parse_args()
    if options.peer:
        peer(
            options.peer,
            options.data,
            draws=options.draws,
            warmup=options.warmup,
            seed=options.seed,
            out=options.out,
        )
        return
    import torch

    torch.set_num_threads(1)
    settings = Settings(
        draws=options.draws,
        warmup=options.warmup,
        peer_warmup=options.peer_warmup,
        seeds=tuple(range(1, options.seeds + 1)),
    )
    record: dict[str, Any] = {"settings": asdict(settings), "torch": torch.__version__, "rows": {}}
    for model, samplers in rows(settings, options.data, options.blackjax_python).items():
        found: dict[str, list[dict]] = {name: [] for name in samplers}
        for seed in settings.seeds:
            for name, run in samplers.items():
                found[name].append(run(seed))
                print(f"{model}, {name}, seed {seed}: {found[name][-1]['ess_per_second']:.0f} ESS/CPU-s", flush=True)
        print(f"\n{model}: ESS/CPU-s (of squares), ESS per 1000 gradients, seconds, R-hat, compile seconds, waste")
        for name, runs in found.items():
            middle = {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "path"}
            record["rows"][f"{model}, {name}"] = middle | {"runs": runs}
            print(
                f"{name:16} {middle['ess_per_second']:9.0f} ({middle['square_ess_per_second']:8.0f}) "
                f"{middle['ess_per_1000_gradients']:7.1f} {middle['seconds']:7.2f} {middle['rhat']:6.3f} "
                f"{middle.get('compile_seconds', 0.0):6.1f} {middle.get('waste', 0.0):6.2f} {runs[0].get('path', '')}"
            )
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    sys.exit(main())
