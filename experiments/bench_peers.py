"""NUTS, ChEES and tempered SMC of BlackJAX and NumPyro on the densities of the benchmark, timed by themselves.

Needs jax, blackjax and numpyro and nothing of this library, so that it runs in an environment of its own:
``bench_nuts.py`` writes a job (``job.npz``: data, starting points, settings), runs this file with it, and reads one
``<sampler>.npz`` per sampler. Programs are compiled ahead and timed apart; the run is timed on one thread. NumPyro's
kernel is driven by one compiled loop, since ``MCMC.run`` compiles anew at every call.

    python experiments/bench_peers.py job.npz folder
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

jax.config.update("jax_enable_x64", True)  # noqa: FBT003

Density = Callable[[Any], Any]


def gaussian(x: Any, mean: Any, scale: Any) -> Any:
    return -0.5 * jnp.sum(((x - mean) / scale) ** 2)


def mixture(data: dict[str, Any]) -> Density:
    scale = data["scale"]
    return lambda x: logsumexp(-0.5 * jnp.sum(((x - data["means"]) / scale) ** 2, -1))


def funnel(_: dict[str, Any]) -> Density:
    def log_density(x: Any) -> Any:
        square = jnp.sum((x[1:] * jnp.exp(-0.5 * x[0])) ** 2)
        return -0.5 * ((x[0] / 3.0) ** 2 + (len(x) - 1) * x[0] + square)

    return log_density


def many_well(_: dict[str, Any]) -> Density:
    def log_density(x: Any) -> Any:
        a, b = x[0::2], x[1::2]
        return jnp.sum(a**2 * (6.0 - a**2) + 0.5 * a - 0.5 * b**2)

    return log_density


def schools_prior(data: dict[str, Any]) -> Density:
    centered = bool(data["centered"])

    def log_density(x: Any) -> Any:
        tau = jnp.exp(x[1])
        z = (x[2:] - x[0]) / tau if centered else x[2:]
        width = 8.0 * x[1] if centered else 0.0
        return -0.5 * (x[0] / 5.0) ** 2 - jnp.log1p((tau / 5.0) ** 2) + x[1] - 0.5 * jnp.sum(z**2) - width

    return log_density


def schools(data: dict[str, Any]) -> Density:
    prior, centered = schools_prior(data), bool(data["centered"])

    def log_density(x: Any) -> Any:
        theta = x[2:] if centered else x[0] + jnp.exp(x[1]) * x[2:]
        return prior(x) + gaussian(data["effects"], theta, data["errors"])

    return log_density


def logistic(data: dict[str, Any]) -> Density:
    return lambda w: gaussian(w, 0.0, 1.0) + jnp.sum(jax.nn.log_sigmoid((data["design"] @ w) * data["signs"]))


def label_switching(data: dict[str, Any]) -> Density:
    def log_density(x: Any) -> Any:
        z = (data["observed"][:, None] - x) / data["noise"]
        return gaussian(x, 0.0, data["tau"]) + jnp.sum(logsumexp(-0.5 * z**2, -1))

    return log_density


def absorption(data: dict[str, Any]) -> Density:
    def log_density(x: Any) -> Any:
        fast, slow = jnp.exp(jnp.maximum(x[0], x[1])), jnp.exp(jnp.minimum(x[0], x[1]))
        gap = jnp.maximum(fast - slow, 1e-12 * fast)
        level = jnp.exp(-slow * data["times"]) * -jnp.expm1(-gap * data["times"]) / gap
        mean = data["dose"] * jnp.exp(x[0] - x[2]) * level
        count = len(data["times"])
        prior = gaussian(x, data["prior_mean"], data["prior_scale"])
        return prior + gaussian(data["observed"], mean, jnp.exp(x[3])) - count * x[3]

    return log_density


DENSITIES: dict[str, Callable[[dict[str, Any]], Density]] = {
    "gaussian": lambda data: lambda x: -0.5 * jnp.sum((x @ data["whitening"]) ** 2),
    "logistic": logistic,
    "schools": schools,
    "funnel": funnel,
    "mixture": mixture,
    "many_well": many_well,
    "label_switching": label_switching,
    "absorption": absorption,
}


def reference(job: dict[str, Any]) -> Density:
    """What SMC starts from: the model's prior, or a Gaussian."""
    if job["family"] == "schools":
        return schools_prior(job)
    return lambda x: gaussian(x, job["reference_mean"], job["reference_scale"])


def check(density: Density, job: dict[str, Any]) -> float:
    """That density and reference are the library's up to constants; what these add to the log normalizer."""
    prior = reference(job)
    for name, function in (("values", density), ("ratios", lambda x: density(x) - prior(x))):
        gap = job[name] - np.asarray(jax.vmap(function)(job["points"]))
        if not np.allclose(gap, gap[0], atol=1e-6 * (1.0 + np.abs(job[name]).max())):
            raise SystemExit(f"The {name} of {job['family']} differ from the library's by {gap - gap[0]}.")
    return float(gap[0])


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float, float]:
    """Result, CPU seconds of the run and of the compilation."""
    began = time.process_time()
    compiled = jax.jit(function).lower(*arguments).compile()
    middle = time.process_time()
    result = jax.block_until_ready(compiled(*arguments))
    return result, time.process_time() - middle, middle - began


def lockstep(steps: Any) -> int:
    """Gradients of chains in one batch, ``(draws, chains)``: all wait for the longest."""
    return int(steps.max(1).sum()) * steps.shape[1]


def blackjax_chees(density: Density, job: dict[str, Any], settings: dict[str, Any], seed: int) -> dict[str, Any]:
    import blackjax
    import optax

    start, warmup, draws = job["start"], settings["warmup"], settings["draws"]
    chains = len(start)
    chees = blackjax.chees_adaptation(density, chains, mass_matrix_estimation="diagonal")

    def run(key: Any) -> Any:
        first, second = jax.random.split(key)
        (states, params), info = chees.run(first, start, 0.1, optax.adam(0.025), warmup, max_sampling_steps=draws)
        kernel = blackjax.dynamic_hmc(density, **params).step

        def step(states: Any, key: Any) -> Any:
            states, moved = jax.vmap(kernel)(jax.random.split(key, chains), states)
            return states, (states.position, moved.num_integration_steps)

        _, (x, steps) = jax.lax.scan(step, states, jax.random.split(second, draws))
        return x, steps.sum(), info.info.num_integration_steps.sum()

    (x, steps, warm), seconds, compiling = timed(run, jax.random.key(seed))
    return {
        "x": np.asarray(x).swapaxes(0, 1),
        "seconds": seconds,
        "compile_seconds": compiling,
        "warm_evaluations": int(warm),
        "evaluations": int(warm) + int(steps),
    }


def blackjax_nuts(density: Density, job: dict[str, Any], settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Every chain adapts for itself, as in Stan."""
    import blackjax

    start = job["start"][: settings["nuts_chains"]]
    adaptation = blackjax.window_adaptation(blackjax.nuts, density, is_mass_matrix_diagonal=not bool(job["dense"]))

    def chain(key: Any, x: Any) -> Any:
        first, second = jax.random.split(key)
        (state, params), info = adaptation.run(first, x, num_steps=settings["nuts_warmup"])
        kernel = blackjax.nuts(density, **params).step

        def step(state: Any, key: Any) -> Any:
            state, moved = kernel(key, state)
            return state, (state.position, moved.num_integration_steps)

        _, (x, steps) = jax.lax.scan(step, state, jax.random.split(second, settings["nuts_draws"]))
        return x, steps, info.info.num_integration_steps

    keys = jax.random.split(jax.random.key(seed), len(start))
    (x, steps, warm), seconds, compiling = timed(jax.vmap(chain), keys, start)
    first = lockstep(np.asarray(warm).T)
    return {
        "x": np.asarray(x),
        "seconds": seconds,
        "compile_seconds": compiling,
        "warm_evaluations": first,
        "evaluations": first + lockstep(np.asarray(steps).T),
    }


def numpyro_nuts(density: Density, job: dict[str, Any], settings: dict[str, Any], seed: int) -> dict[str, Any]:
    from numpyro.infer import NUTS

    start, warmup = job["start"][: settings["nuts_chains"]], settings["nuts_warmup"]
    kernel = NUTS(potential_fn=lambda x: -density(x), dense_mass=bool(job["dense"]))
    keys = jax.random.split(jax.random.PRNGKey(seed), len(start))
    state = kernel.init(keys, warmup, init_params=start, model_args=(), model_kwargs={})

    def run(state: Any) -> Any:
        def step(state: Any, _: Any) -> Any:
            state = kernel.sample(state, (), {})
            return state, (state.z, state.num_steps)

        return jax.lax.scan(step, state, None, length=warmup + settings["nuts_draws"])[1]

    (x, steps), seconds, compiling = timed(run, state)
    steps = np.asarray(steps)
    first = lockstep(steps[:warmup])
    return {
        "x": np.asarray(x)[warmup:].swapaxes(0, 1),
        "seconds": seconds,
        "compile_seconds": compiling,
        "warm_evaluations": first,
        "evaluations": first + lockstep(steps[warmup:]),
    }


def blackjax_smc(density: Density, job: dict[str, Any], settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Independent populations one after another: ten HMC moves of eight jittered steps at each temperature.

    The metric is that of the particles and the step size follows the acceptance, for BlackJAX brings no tuner.
    """
    import blackjax
    from blackjax.smc import resampling

    prior, moves, leapfrogs = reference(job), 10, 8
    particles = job["particles"]
    count = particles.shape[1]

    def run(key: Any, particles: Any) -> Any:
        def body(carry: Any) -> Any:
            state, key, log_step, log_z, levels = carry
            key, first, second = jax.random.split(key, 3)
            jitter = jax.random.uniform(second, (count,), minval=0.5, maxval=1.5)
            parameters = {
                "step_size": jnp.exp(log_step) * jitter,
                "inverse_mass_matrix": jnp.var(state.particles, 0)[None] + 1e-12,
                "num_integration_steps": jnp.full((1,), leapfrogs),
            }
            smc = blackjax.adaptive_tempered_smc(
                prior,
                lambda x: density(x) - prior(x),
                blackjax.hmc.build_kernel(),
                blackjax.hmc.init,
                parameters,
                resampling.systematic,
                target_ess=0.9,
                num_mcmc_steps=moves,
            )
            state, info = smc.step(first, state)
            log_step = log_step + 2.0 * (jnp.mean(info.update_info.acceptance_rate) - 0.8)
            return state, key, log_step, log_z + info.log_likelihood_increment, levels + 1

        initial = (blackjax.smc.tempered.init(particles), key, jnp.log(0.2), 0.0, 0)

        def unfinished(carry: Any) -> Any:
            return (carry[0].tempering_param < 1.0) & (carry[4] < 500)

        state, _, _, log_z, levels = jax.lax.while_loop(unfinished, body, initial)
        return state.particles, log_z, levels

    keys = jax.random.split(jax.random.key(seed), len(particles))
    began = time.process_time()
    compiled = jax.jit(run).lower(keys[0], particles[0]).compile()
    middle = time.process_time()
    done: list[Any] = []
    # Two at least, whose spread is the error; more only while there is time.
    while len(done) < 2 or (len(done) < len(keys) and time.process_time() - middle < settings["limit"]):
        done.append(jax.block_until_ready(compiled(keys[len(done)], particles[len(done)])))
    seconds = time.process_time() - middle
    x, log_z, levels = (np.stack([np.asarray(run[i]) for run in done]) for i in range(3))
    return {
        "x": x,
        "log_z": log_z,
        "seconds": seconds,
        "compile_seconds": middle - began,
        "warm_evaluations": 0,
        "evaluations": int(levels.sum()) * count * moves * leapfrogs,
    }


SAMPLERS = {
    "BlackJAX ChEES": blackjax_chees,
    "BlackJAX NUTS": blackjax_nuts,
    "NumPyro NUTS": numpyro_nuts,
    "BlackJAX SMC": blackjax_smc,
}


def versions() -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in ("jax", "jaxlib", "blackjax", "numpyro")}


def main() -> None:
    path, folder = Path(sys.argv[1]), Path(sys.argv[2])
    with np.load(path) as file:
        job: dict[str, Any] = {key: file[key] for key in file.files}
    settings = json.loads(str(job.pop("settings")))
    job["family"] = str(job["family"])
    density = DENSITIES[job["family"]](job)
    offset = check(density, job)
    for name in settings["samplers"]:
        result = SAMPLERS[name](density, job, settings, settings["seed"])
        part = folder / "part.npz"
        np.savez(part, versions=json.dumps(versions()), offset=offset, **result)
        os.replace(part, folder / f"{name}.npz")


if __name__ == "__main__":
    main()
