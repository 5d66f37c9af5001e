"""The command line: ``python -m diffsampler {sample,targets,methods,demo}``."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsampler._report import number, table, versions, write_json

if TYPE_CHECKING:
    from diffsampler.result import Fit
    from diffsampler.target import Target

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = _parser().parse_args(arguments)
    if "OMP_NUM_THREADS" not in os.environ:
        # Densities of a few numbers are faster on one thread; here, unlike in the library, the process is ours.
        import torch

        torch.set_num_threads(1)
    try:
        return int(options.command(options))
    except (ValueError, TypeError, ImportError, OSError) as error:
        # What the library refuses is an answer to the user, not a crash.
        print(f"diffsampler: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m diffsampler", description="Sample unnormalized densities.")
    commands = parser.add_subparsers(required=True, metavar="{sample,targets,methods,demo}")

    sample = commands.add_parser("sample", help="sample one of the benchmark targets")
    sample.set_defaults(command=_sample)
    sample.add_argument("--target", required=True, help="name of a target, see the command 'targets'")
    sample.add_argument("--method", default="auto", help="name of a method, see the command 'methods' (default: auto)")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--num-samples", type=_positive(int), default=4000)
    sample.add_argument("--seconds", type=_positive(float), help="budget of wall-clock time")
    sample.add_argument("--evaluations", type=_positive(int), help="budget of density and gradient evaluations")
    sample.add_argument("--steps", type=_positive(int), help="budget of training steps")
    sample.add_argument("--out", type=Path, help="folder for the result, its figures and summary.json")
    sample.add_argument("--device", help="such as cpu or cuda (default: torch's)")
    sample.add_argument("--dtype", choices=["float32", "float64"], help="arithmetic of particles and networks")
    sample.add_argument("--progress", action="store_true", help="show a progress bar")

    commands.add_parser("targets", help="list the benchmark targets").set_defaults(command=_targets)
    commands.add_parser("methods", help="list the methods").set_defaults(command=_methods)

    demo = commands.add_parser("demo", help="real posteriors and hard benchmarks, side by side, in four minutes")
    demo.set_defaults(command=_demo)
    demo.add_argument("--out", type=Path, default=Path("results/demo"), help="folder for results.json and figures")
    demo.add_argument("--seed", type=int, default=0)
    return parser


def _positive(kind: type[int] | type[float]) -> Any:
    def parse(text: str) -> int | float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"Expected a positive number; got {text}.")
        return value

    parse.__name__ = kind.__name__
    return parse


def _choose(name: str, names: Iterable[str], what: str) -> str:
    """The name itself if it is known, an error that suggests the nearest one otherwise."""
    known = list(names)
    if name in known:
        return name
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
    raise ValueError(f"Expected the name of a {what}; got {name!r}. {hint}")


def _sample(options: argparse.Namespace) -> int:
    import torch

    import diffsampler as ds
    from diffsampler import inference, targets

    target = targets.REGISTRY[_choose(options.target, targets.REGISTRY, "target")]()
    method = _choose(options.method, inference.METHODS, "method")
    settings: dict[str, Any] = {
        "method": method,
        "num_samples": options.num_samples,
        "seed": options.seed,
        "progress": options.progress,
    }
    limits = {key: getattr(options, key) for key in ("seconds", "evaluations", "steps")}
    if any(limit is not None for limit in limits.values()):
        settings["budget"] = ds.Budget(**limits)
    if options.device is not None:
        settings["device"] = options.device
    if options.dtype is not None:
        settings["dtype"] = getattr(torch, options.dtype)
    fit = ds.sample(target, **settings)
    print(fit)
    if options.out is not None:
        _write(fit, target, options.out, {"target": options.target, **limits, **settings})
        print(f"written to {options.out}")
    return 0


def _write(fit: Fit, target: Target, out: Path, settings: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    fit.save(out / "fit")
    fit.plot("pair").savefig(out / "pair.png")
    fit.plot("weights").savefig(out / "weights.png")
    if fit.history:
        fit.plot("training").savefig(out / "training.png")
    settings.pop("budget", None)
    summary = {
        "versions": versions(),
        "settings": settings,
        "log_normalizer": fit.log_normalizer._asdict() | {"exact": target.log_normalizer},
        "elbo": fit.elbo,
        "ess": fit.ess,
        "pareto_k": fit.pareto_k,
        "choices": fit.choices,
        "evaluations": fit.evaluations,
        "seconds": fit.seconds,
        "findings": [finding._asdict() for finding in fit.findings],
    }
    write_json(out / "summary.json", summary)


def _targets(_: argparse.Namespace) -> int:
    from diffsampler import targets

    built = {name: build() for name, build in targets.REGISTRY.items()}
    rows = [
        (name, str(t.dim), number(t.log_normalizer, ".6f"), "-" if t.num_modes is None else str(t.num_modes))
        for name, t in built.items()
    ]
    print(table(("target", "dim", "exact log Z", "modes"), rows))
    return 0


def _methods(_: argparse.Namespace) -> int:
    from diffsampler import inference

    rows = [(info.name, info.paper, str(info.year or "-"), info.needs) for info in inference.METHODS.values()]
    print(table(("method", "paper", "year", "needs"), rows))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from diffsampler import _demo as demo

    return demo.run(options.out, seed=options.seed)


if __name__ == "__main__":
    sys.exit(main())
