"""Weights of modes by `ds.sample(model)` with its defaults and by four chains of Pyro's NUTS, against the exact ones.

Errors are total variation distances between the weights of the modes and the truth. Every run is one JSON file; runs
that exist are not made again. Where no exact weights are known the reference is a long run of tempered SMC.

    OMP_NUM_THREADS=1 python experiments/modes_table.py
    OMP_NUM_THREADS=1 python experiments/modes_table.py --only "variable star" --seeds 3
    OMP_NUM_THREADS=1 python experiments/modes_table.py --table                # no new runs
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from modes_models import MULTIMODAL, Multimodal, shares
from table_cases import Folder

import diffsampler as ds
from diffsampler import baselines
from diffsampler._report import number, table

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What all runs have in common."""

    num_samples: int = 4000
    nuts_samples: int = 200
    nuts_warmup: int = 200
    nuts_chains: int = 4
    reference_samples: int = 65_536


def reference(case: Multimodal, settings: Settings) -> Row:
    """Weights of the modes with their standard errors."""
    if case.truth is not None:
        return {"shares": case.truth().tolist(), "errors": None}
    target = case.build()
    fit = ds.sample(target, method="smc", num_samples=settings.reference_samples, seed=12345)
    one_hot = torch.nn.functional.one_hot(case.label(fit.posterior), case.modes).double()
    mean, error = fit.particles.expectation(one_hot)
    return {"shares": mean.tolist(), "errors": error.tolist(), "log_normalizer": list(fit.log_normalizer)}


def run_sample(case: Multimodal, seed: int, settings: Settings) -> Row:
    target = case.build()
    cpu = time.process_time()
    fit = ds.sample(target, num_samples=settings.num_samples, seed=seed)
    return {
        "shares": shares(case.label(fit.posterior), torch.softmax(fit.particles.log_weight, 0), case.modes).tolist(),
        "cpu": time.process_time() - cpu,
        "dim": target.dim,
        "method": fit.method,
        "log_normalizer": list(fit.log_normalizer),
        "ess": fit.ess,
        "pareto_k": fit.pareto_k,
        "evaluations": fit.evaluations,
        "findings": [str(finding) for finding in fit.findings],
        "notes": fit.notes,
        "choices": fit.choices,
    }


def run_nuts(case: Multimodal, seed: int, settings: Settings) -> Row:
    target = case.build()
    cpu = time.process_time()
    sampler = baselines.PyroNUTS(target, num_chains=settings.nuts_chains, warmup_steps=settings.nuts_warmup)
    particles = sampler.sample(settings.nuts_chains * settings.nuts_samples, seed=seed)
    labels = case.label(target.constrain(particles.x))
    by_chain = labels.reshape(settings.nuts_chains, -1)
    each = [shares(row, torch.ones(len(row)), case.modes).tolist() for row in by_chain]
    return {
        "shares": shares(labels, torch.ones(len(labels)), case.modes).tolist(),
        "chains": each,
        "divergences": particles.divergences,
        "cpu": time.process_time() - cpu,
    }


def distance(first: list[float], second: list[float]) -> float:
    return 0.5 * sum(abs(a - b) for a, b in zip(first, second, strict=True))


def text_of(found: list[float]) -> str:
    return " ".join(f"{share:.2f}".lstrip("0") if share < 0.995 else "1" for share in found)


HEADER = ("posterior", "d", "seed", "exact", "ds.sample", "TV", "CPU s", "NUTS", "TV ", "CPU s ", "findings")


def line(name: str, truth: Row, mine: Row, theirs: Row) -> tuple[str, ...]:
    return (
        name,
        str(mine["dim"]),
        str(mine["seed"]),
        text_of(truth["shares"]),
        text_of(mine["shares"]),
        number(distance(mine["shares"], truth["shares"])),
        f"{mine['cpu']:.0f}",
        text_of(theirs["shares"]),
        number(distance(theirs["shares"], truth["shares"])),
        f"{theirs['cpu']:.0f}",
        str(len(mine["findings"])),
    )


Found = list[tuple[str, Row, Row, Row]]


def show(found: Found) -> str:
    lines = [table(HEADER, [line(*entry) for entry in found]), ""]
    for name, truth, mine, theirs in found:
        lines += [f"{name} seed {mine['seed']}: {text}" for text in mine["findings"]]
        chains = "; ".join(text_of(chain) for chain in theirs["chains"])
        lines.append(f"{name} seed {mine['seed']}: NUTS chain by chain {chains}; divergences {theirs['divergences']}")
        if truth["errors"]:
            lines.append(f"{name}: standard errors of the reference {text_of(truth['errors'])}")
    return "\n".join(lines)


def draw(found: Found, path: Path) -> None:
    """Bars of the weights of the modes, the first seed of each posterior."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = {name: (truth, mine, theirs) for name, truth, mine, theirs in reversed(found)}
    names = [name for name in MULTIMODAL if name in first]
    figure, panels = pyplot.subplots(
        2, -(-len(names) // 2), figsize=(12.0, 5.0), sharey=True, layout="constrained", squeeze=False
    )
    for panel, name in zip(panels.flat, names, strict=False):
        rows = zip(
            ("exact, or a long run", "ds.sample", "NUTS, 4 chains"),
            first[name],
            ("0.35", "#2a6f97", "#d1495b"),
            strict=True,
        )
        for offset, (label, row, color) in enumerate(rows):
            place = [index + 0.27 * (offset - 1) for index in range(len(row["shares"]))]
            panel.bar(place, row["shares"], width=0.25, color=color, label=label)
        panel.set_title(f"{name}, d = {first[name][1]['dim']}", fontsize=10)
        panel.set_xticks(range(len(first[name][0]["shares"])), [])
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
    for panel in list(panels.flat)[len(names) :]:
        panel.set_axis_off()
    handles, labels = panels.flat[0].get_legend_handles_labels()
    place = {"loc": "center", "bbox_to_anchor": (0.88, 0.25)} if len(names) % 2 else {"loc": "outside lower center"}
    figure.legend(handles, labels, frameon=False, ncols=1 if len(names) % 2 else 3, **place)
    figure.supylabel("weight of the mode", fontsize=10)
    figure.suptitle("Weights of the modes: exact, found without options, and found by NUTS", x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(MULTIMODAL), choices=list(MULTIMODAL), metavar="POSTERIOR")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--num-samples", type=int, default=Settings.num_samples)
    parser.add_argument("--nuts-samples", type=int, default=Settings.nuts_samples)
    parser.add_argument("--reference-samples", type=int, default=Settings.reference_samples)
    parser.add_argument("--table", action="store_true", help="make no new runs")
    parser.add_argument("--out", type=Path, default=Path("results/modes"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(
        options.num_samples,
        options.nuts_samples,
        options.nuts_samples,
        reference_samples=options.reference_samples,
    )
    folder = Folder(options.out, settings)
    parts = {"sample": run_sample, "nuts": run_nuts}
    for seed in range(options.seeds):
        for name in options.only:
            if options.table:
                continue
            if not folder.done(f"{name} reference", 0):
                folder.write(f"{name} reference", 0, reference(MULTIMODAL[name], settings))
            for part, run in parts.items():
                if not folder.done(f"{name} {part}", seed):
                    row = run(MULTIMODAL[name], seed, settings)
                    folder.write(f"{name} {part}", seed, row)
                    print(f"{name} {part} {seed}: {text_of(row['shares'])}, {row['cpu']:.0f} CPU s", flush=True)
    found: Found = []
    for name in options.only:
        truth, mine, theirs = (folder.read(f"{name} {part}") for part in ("reference", *parts))
        found += [(name, truth[0], a, b) for a, b in zip(mine, theirs, strict=False)]
    if found:
        folder.publish(show(found), lambda path: draw(found, path))


if __name__ == "__main__":
    main()
