"""The library's samplers that need no training against NUTS, ChEES and SMC of Pyro, NumPyro and BlackJAX.

One command, one table, one figure:

    python experiments/bench_nuts.py --peers /path/to/python     # interpreter with numpyro, blackjax and scikit-learn
    python experiments/bench_nuts.py --only gmm9 absorption      # some targets
    python experiments/bench_nuts.py --table                     # of what is there

Every cell (target, sampler, seed) is a JSON file with settings and versions; an interrupted run goes on where it was.
All chains start from the same points and all particles from the same law. Everybody runs on one thread and is timed in
CPU seconds of the process, with warm-up and tuning and without compilation, which has its own column. A cell is a curve
of errors against work: for chains over growing parts of one run, for weighted particles over runs of growing size, for
BlackJAX's SMC over growing numbers of populations. Equal evaluations and equal seconds are two readings of that curve.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_measures import Row, chain_curve, chain_quality, errors, spread_ess
from bench_models import MODELS, Answers, Model
from bench_report import report
from torch import Tensor

from diffsampler import baselines
from diffsampler._report import versions
from diffsampler.integrations.pyro import PyroTarget
from diffsampler.methods.ensemble_score import EnsembleScore
from diffsampler.particles import Particles
from diffsampler.target import Target

PEERS = ("BlackJAX ChEES", "BlackJAX NUTS", "NumPyro NUTS", "BlackJAX SMC")
SINGLE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
}


@dataclass(frozen=True)
class Settings:
    """What all cells have in common.

    Arguments:
        chains: Chains of ChEES and of the library's NUTS.
        warmup: Their warm-up.
        draws: Their recorded steps.
        nuts_chains: Chains of the peers' NUTS, as their users run it.
        nuts_warmup: Its warm-up.
        nuts_draws: Its recorded steps.
        pyro_steps: Warm-up steps and again draws of Pyro's NUTS, one chain: a short run, whose rate is extrapolated.
        populations: Most populations of BlackJAX's SMC.
        particles: Size of each.
        sizes: Particles of the library's SMC and draws of its parallel tempering, growing.
        limit: CPU seconds above which sizes and numbers of populations do not grow.
    """

    chains: int = 64
    warmup: int = 300
    draws: int = 400
    nuts_chains: int = 4
    nuts_warmup: int = 500
    nuts_draws: int = 1000
    pyro_steps: int = 100
    populations: int = 8
    particles: int = 500
    sizes: tuple[int, ...] = (256, 1024, 4096, 16384)
    limit: float = 4.0


def cpu_seconds() -> float:
    """Of this process and of the compilers that it has waited for."""
    return time.process_time() + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


def chains_row(
    make: Callable[[Target], baselines.ChEES | baselines.NUTS], model: Model, settings: Settings
) -> Callable:
    """Chains, compiled before they are timed."""

    def run(answers: Answers, start: Tensor, seed: int) -> Row:
        target = model.target
        if model.on_pyro:
            assert model.pyro is not None
            target = PyroTarget(model.pyro[0], *model.pyro[1])
        sampler = make(target)
        sampler.init = start
        began = cpu_seconds()
        # Long enough for a first metric, with which transitions compile anew.
        sampler.warmup = min(50, settings.warmup)
        sampler.sample(settings.chains * 2, seed=0)
        first, spent = cpu_seconds() - began, sampler.evaluations
        sampler.warmup = settings.warmup
        began = time.process_time()
        particles = sampler.sample(settings.chains * settings.draws, seed=seed)
        seconds = time.process_time() - began
        evaluations = sampler.evaluations - spent
        assert sampler.adapted is not None
        x = particles.x.reshape(settings.chains, -1, target.dim)
        warm = sampler.adapted.evaluations * settings.chains / evaluations
        return {
            "seconds": seconds,
            "compile_seconds": first - spent * seconds / evaluations,
            "evaluations": evaluations,
            "waste": sampler.lockstep_waste,
            "compilation": sampler.compilation,
            "curve": chain_curve(answers, x, warm=warm, evaluations=evaluations, seconds=seconds),
            **chain_quality(x, answers),
        }

    return run


def weighted_row(
    make: Callable[[int], Any], model: Model, settings: Settings, sizes: tuple[int, ...], *, chains: int | None = None
) -> Callable:
    """Runs of growing size, as long as the next one seems to stay below the limit."""

    def run(answers: Answers, _: Tensor, seed: int) -> Row:
        curve: list[dict[str, float]] = []
        for size in sizes:
            sampler = make(size)
            began = time.process_time()
            particles: Particles = sampler.sample(size, seed=seed)
            seconds = time.process_time() - began
            point = {"evaluations": float(sampler.evaluations), "seconds": seconds}
            value = particles.log_normalizer[0] if particles.has_normalizer else math.nan
            point["log_z"] = abs(value - answers.log_z)
            point |= errors(answers, particles.x, particles.log_weight)
            curve.append(point)
            if 3.0 * seconds > settings.limit:
                break
        row: Row = {"seconds": seconds, "compile_seconds": 0.0, "evaluations": sampler.evaluations, "curve": curve}
        if chains is not None:
            return row | chain_quality(particles.x.reshape(chains, -1, particles.x.shape[1]), answers)
        blocks = particles.replicates
        weight = torch.softmax(particles.log_weight, 0).unsqueeze(-1) * blocks
        values = (weight * (particles.x[:, answers.coordinates] - answers.mean)).reshape(blocks, -1, len(answers.mean))
        return row | {"ess": spread_ess(answers, values.sum(1)), "rhat": math.nan, "by_spread": True}

    return run


def pyro_row(model: Model, settings: Settings) -> Callable:
    """Pyro's own NUTS; the model counts how often it is run, once for each gradient."""
    assert model.pyro is not None
    function, arguments = model.pyro
    calls = [0]

    def counted(*values: Any) -> None:
        calls[0] += 1
        function(*values)

    def run(answers: Answers, _: Tensor, seed: int) -> Row:
        nuts = baselines.PyroNUTS(PyroTarget(counted, *arguments), num_chains=1, warmup_steps=settings.pyro_steps)
        calls[0] = 0
        began = time.process_time()
        x = nuts.sample(settings.pyro_steps, seed=seed).x.unsqueeze(0)
        seconds = time.process_time() - began
        work = {"evaluations": calls[0], "seconds": seconds}
        # How the work divides over warm-up and draws is not known: only the end of the run is a point.
        curve = [work | errors(answers, x.flatten(0, 1))]
        return work | {"compile_seconds": 0.0, "curve": curve, "short": True} | chain_quality(x, answers)

    return run


def samplers(model: Model, settings: Settings) -> dict[str, Callable]:
    """The library's rows and Pyro's."""
    target, scale = model.target, model.scale
    metric = "dense" if model.dense else "diagonal"
    options: dict[str, Any] = {"num_chains": settings.chains, "metric": metric, "compile": "on"}
    tempering = {"reference_scale": scale}
    systems = 32
    rows = {
        "ChEES": chains_row(lambda t: baselines.ChEES(t, **options), model, settings),
        "NUTS": chains_row(lambda t: baselines.NUTS(t, **options), model, settings),
        "SMC": weighted_row(lambda _: baselines.SMC(target, **tempering), model, settings, settings.sizes),
        "parallel tempering": weighted_row(
            lambda _: baselines.ParallelTempering(target, num_systems=systems, **tempering),
            model,
            settings,
            settings.sizes,
            chains=systems,
        ),
    }
    if model.gradient_free:
        rows["ensemble score"] = weighted_row(
            lambda n: EnsembleScore(target, radius=scale, num_particles=n // 4),
            model,
            settings,
            settings.sizes[1:3] or settings.sizes,
        )
    if model.pyro is not None:
        rows["Pyro NUTS"] = pyro_row(model, settings)
    return rows


class Cells:
    """Finished cells, one file each."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(asdict(settings)))
        path.mkdir(parents=True, exist_ok=True)

    def file(self, target: str, sampler: str, seed: int) -> Path:
        return self.path / f"{target}-{sampler.replace(' ', '_')}-{seed}.json"

    def write(self, target: str, sampler: str, seed: int, row: Row) -> None:
        """Atomically: a kill leaves no half cell behind."""
        content = {"target": target, "sampler": sampler, "seed": seed, "settings": self.settings}
        content = {**content, "versions": versions(), **row}
        part = self.file(target, sampler, seed).with_suffix(".part")
        part.write_text(json.dumps(content, indent=1))
        os.replace(part, self.file(target, sampler, seed))

    def read(self) -> list[Row]:
        rows = [json.loads(path.read_text()) for path in sorted(self.path.glob("*-*.json"))]
        for row in rows:
            if row["settings"] != self.settings:
                raise SystemExit(f"{self.path} holds cells with other settings: name another --out.")
        return sorted(rows, key=lambda row: list(MODELS).index(row["target"]))


def write_job(path: Path, model: Model, settings: Settings, names: list[str], seed: int, start: Tensor) -> None:
    """What the peers need to know."""
    generator = torch.Generator().manual_seed(1000 + seed)
    reference = model.reference
    count = settings.populations * settings.particles
    particles = reference.sample(count, generator=generator).double()
    points = start[:8]
    data = {"reference_mean": 0.0, "reference_scale": model.scale or 1.0, **model.data}
    np.savez(
        path,
        settings=json.dumps({**asdict(settings), "samplers": names, "seed": seed}),
        family=model.family,
        dense=model.dense,
        start=start.numpy(),
        particles=particles.reshape(settings.populations, settings.particles, -1).numpy(),
        points=points.numpy(),
        values=model.target.log_prob(points).numpy(),
        ratios=(model.target.log_prob(points) - reference.log_prob(points)).numpy(),
        **data,
    )


def peer_row(answers: Answers, path: Path) -> Row:
    """A cell from what a peer left behind."""
    with np.load(path) as file:
        x = torch.tensor(file["x"])
        numbers = {key: float(file[key]) for key in ("seconds", "compile_seconds", "evaluations", "warm_evaluations")}
        log_z = torch.tensor(file["log_z"]) if "log_z" in file else None
        found, offset = json.loads(str(file["versions"])), float(file["offset"])
    row: Row = {key: numbers[key] for key in ("seconds", "compile_seconds", "evaluations")} | {"peer_versions": found}
    if log_z is None:
        warm = numbers["warm_evaluations"] / numbers["evaluations"]
        work = {"evaluations": numbers["evaluations"], "seconds": numbers["seconds"]}
        return row | {"curve": chain_curve(answers, x, warm=warm, **work)} | chain_quality(x, answers)
    curve = []
    for count in sorted({2**k for k in range(int(math.log2(len(x))) + 1)} | {len(x)}):
        share = count / len(x)
        value = float(torch.logsumexp(log_z[:count], 0)) - math.log(count)
        # Populations count by their estimates of the normalizer, as islands do.
        weight = torch.softmax(log_z[:count], 0).log().unsqueeze(-1).expand(count, x.shape[1])
        point = {"evaluations": share * numbers["evaluations"], "seconds": share * numbers["seconds"]}
        point["log_z"] = abs(value + offset - answers.log_z)
        curve.append(point | errors(answers, x[:count].flatten(0, 1), weight.flatten()))
    means = x[:, :, answers.coordinates].mean(1)
    return row | {"curve": curve, "ess": spread_ess(answers, means), "rhat": math.nan, "by_spread": True}


def run_peers(
    python: str,
    model: Model,
    answers: Answers,
    settings: Settings,
    names: list[str],
    seed: int,
    start: Tensor,
    out: Path,
) -> dict[str, Row]:
    folder = out / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    write_job(folder / "job.npz", model, settings, names, seed, start)
    script = Path(__file__).parent / "bench_peers.py"
    command = [python, str(script), str(folder / "job.npz"), str(folder)]
    subprocess.run(command, env={**os.environ, **SINGLE_THREAD}, check=True)
    return {name: peer_row(answers, folder / f"{name}.npz") for name in names}


def run_target(name: str, options: argparse.Namespace, settings: Settings, cells: Cells) -> None:
    """All cells of a target that are not there yet, one after another on the same machine."""
    wanted = [s for s in options.samplers or () if s not in PEERS]
    peers = [s for s in PEERS if options.peers and (not options.samplers or s in options.samplers)]
    try:
        model = MODELS[name](options.data, options.peers)
    except ModuleNotFoundError as error:
        print(f"{name}: left out, {error}", flush=True)
        return
    rows = {s: run for s, run in samplers(model, settings).items() if not options.samplers or s in wanted}
    missing = [s for seed in options.seeds for s in (*rows, *peers) if not cells.file(name, s, seed).exists()]
    if not missing:
        return
    answers = model.answers()
    for seed in options.seeds:
        start = model.starts(settings.chains, seed)
        for sampler, run in rows.items():
            if not cells.file(name, sampler, seed).exists():
                save(cells, name, sampler, seed, run(answers, start, seed))
        left = [s for s in peers if not cells.file(name, s, seed).exists()]
        if left:
            found = run_peers(options.peers, model, answers, settings, left, seed, start, options.out)
            for sampler, row in found.items():
                save(cells, name, sampler, seed, row)


def save(cells: Cells, target: str, sampler: str, seed: int, row: Row) -> None:
    cells.write(target, sampler, seed, row)
    rate = row["ess"] / row["seconds"]
    print(f"{target}, {sampler}, seed {seed}: {row['seconds']:.2f} s, {rate:.0f} ESS/CPU-s", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="TARGET")
    parser.add_argument("--samplers", nargs="+", metavar="SAMPLER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--peers", metavar="PYTHON", default=sys.executable if find_spec("blackjax") else None)
    parser.add_argument("--table", action="store_true", help="only the table and the figure of what is there")
    parser.add_argument("--out", type=Path, default=Path("results/nuts"))
    parser.add_argument("--data", type=Path, default=Path("results/data"))
    for name in ("warmup", "draws", "nuts_warmup", "nuts_draws", "pyro_steps", "populations", "particles"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Settings, name))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(Settings.sizes))
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    chosen = ("warmup", "draws", "nuts_warmup", "nuts_draws", "pyro_steps", "populations", "particles")
    settings = Settings(sizes=tuple(options.sizes), **{name: getattr(options, name) for name in chosen})
    cells = Cells(options.out, settings)
    if not options.table:
        for name in options.only:
            run_target(name, options, settings, cells)
        if options.peers is None:
            print("NumPyro and BlackJAX are not installed here and --peers is not given: their rows are missing.")
    report(cells.read(), options.out)


if __name__ == "__main__":
    main()
