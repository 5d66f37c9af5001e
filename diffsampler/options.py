"""Options of the front door: their checks, and their record, from which a run can be repeated."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, final

import torch

from diffsampler.budget import Budget, Series, TimeRecord
from diffsampler.catalog import LEARNED, METHODS
from diffsampler.sampler import DiffusionSampler, Sampler
from diffsampler.target import Target

__all__ = [
    "DECIDED",
    "Options",
    "check_checkpoint",
    "checksum",
    "find_device",
    "record_options",
    "repeat_options",
    "unrepeated",
]

DECIDED: dict[str, frozenset[str]] = {
    "auto": frozenset(
        "pilot coordinates held_out_log_likelihood mixture stages gap num_steps noise_min learned_steps "
        "learned_log_normalizer learned_ess learned_pareto_k largest_difference pilot_log_normalizer chosen "
        "defence_share".split()
    ),
    "smc": frozenset(("betas", "num_islands")),
    **dict.fromkeys(LEARNED, frozenset(("location", "scale", "local_scale", "learning_rate", "num_steps"))),
}
"""What each method decides for itself; a repetition decides it again and is compared."""
GIVEN = frozenset(("steps_before",))
"""The same for a sampler that was handed over."""
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@final
@dataclass(frozen=True)
class Options:
    """Options of :func:`diffsampler.sample` that decide what is drawn, at their defaults.

    Arguments:
        method: Name, or a configured sampler.
        num_samples: Number of draws at least.
        seed: Seed of everything.
        device: Where to compute; None for where the target is.
        dtype: Arithmetic of learned processes.
        budget: What the run may spend.
    """

    method: str | Sampler = "auto"
    num_samples: int = 4000
    seed: int = 0
    device: torch.device | str | None = None
    dtype: torch.dtype = torch.float32
    budget: Budget = Budget()

    def check(self) -> None:
        """Raise for options of a wrong type or out of range."""
        for name in ("num_samples", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Expected {name} to be an integer; got {value!r}.")
        if self.num_samples < 1:
            raise ValueError(f"Expected num_samples >= 1; got {self.num_samples}.")
        if self.dtype not in DTYPES.values():
            raise ValueError(f"Expected dtype to be torch.float32 or torch.float64; got {self.dtype}.")
        if not isinstance(self.budget, Budget):
            raise TypeError(f"Expected a Budget, such as ds.Budget(seconds=60); got {type(self.budget).__name__}.")


def _name(method: str | Sampler) -> str:
    return method if isinstance(method, str) else type(method).__name__


def checksum(*tensors: torch.Tensor) -> str:
    """Of all bits of some tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def record_options(options: Options, *, device: torch.device, record: TimeRecord, resumed: bool) -> dict[str, Any]:
    """Options as plain values, and what time decided; the latter is not complete after ``resumed`` training."""
    from diffsampler import __version__

    plain = {
        "method": _name(options.method),
        "num_samples": options.num_samples,
        "seed": options.seed,
        "device": str(device),
        "dtype": str(options.dtype).removeprefix("torch."),
        "budget": asdict(options.budget),
        "version": __version__,
    }
    if options.budget.seconds is not None:
        plain["clock"] = None if resumed else record.series
    return plain


def repeat_options(options: Options, choices: Mapping[str, Any], *, resume: bool) -> tuple[Options, TimeRecord]:
    """Options and clock of the run that ``choices`` describe.

    Arguments:
        options: As given besides; each must be left at its default, or agree.
        choices: Of a fit.
        resume: Whether a checkpoint is to be continued, which is another run.

    Raises:
        TypeError: If the choices are no mapping.
        ValueError: If the choices are incomplete, unknown, or contradict each other or the options.
    """
    if not isinstance(choices, Mapping):
        raise TypeError(f"Expected choices to be a dict, such as fit.choices; got {type(choices).__name__}.")
    if resume:
        raise ValueError("Expected either choices= or resume=True; got both, and a resumed run is no repetition.")
    method = _repeated_method(options.method, choices)
    _check_names(method, choices)
    budget = choices["budget"]
    names = [entry.name for entry in fields(Budget)]
    if not isinstance(budget, Mapping) or sorted(budget) != sorted(names):
        raise ValueError(f"Expected choices['budget'] with {', '.join(names)}; got {budget!r}.")
    if choices["dtype"] not in DTYPES:
        raise ValueError(f"Expected choices['dtype'] to be one of {', '.join(DTYPES)}; got {choices['dtype']!r}.")
    plain = {name: choices[name] for name in ("num_samples", "seed", "device")}
    recorded = Options(method, dtype=DTYPES[choices["dtype"]], budget=Budget(**budget), **plain)
    given = replace(options, device=None if options.device is None else str(torch.device(options.device)))
    for entry in fields(Options):
        name, value = entry.name, getattr(given, entry.name)
        if name != "method" and value not in (entry.default, getattr(recorded, name)):
            raise ValueError(
                f"Expected {name} to be left out or {getattr(recorded, name)!r} as in choices; got {value!r}. Draw "
                "more from fit.sampler, or leave choices out."
            )
    return recorded, TimeRecord(_clock(recorded, choices))


def _repeated_method(given: str | Sampler, choices: Mapping[str, Any]) -> str | Sampler:
    recorded = choices.get("method")
    if _name(given) == recorded:
        return given
    if given != "auto":
        raise ValueError(f"Expected method to be left out or {recorded!r} as in choices; got {_name(given)!r}.")
    if isinstance(recorded, str) and recorded in METHODS:
        return recorded
    raise ValueError(
        f"Expected method= to hand over the sampler again; choices of a run with {recorded!r} do not hold it."
        if recorded is not None
        else "Expected choices of a fit; got none of a method. Pass fit.choices whole."
    )


def _check_names(method: str | Sampler, choices: Mapping[str, Any]) -> None:
    needed = {entry.name for entry in fields(Options)} | {"version", "checksum"}
    decided = DECIDED.get(method, GIVEN) if isinstance(method, str) else GIVEN
    missing, unknown = sorted(needed - set(choices)), sorted(set(choices) - needed - {"clock"} - decided)
    if missing:
        raise ValueError(f"Expected choices of a fit; got none of {', '.join(missing)}. Pass fit.choices whole.")
    if unknown:
        raise ValueError(f"Expected choices of method {_name(method)!r}; got {', '.join(map(repr, unknown))} as well.")


def _clock(recorded: Options, choices: Mapping[str, Any]) -> dict[str, Series] | None:
    """What time decided in the run to be repeated; None where nothing can depend on it."""
    series = choices.get("clock")
    if (recorded.budget.seconds is None) != ("clock" not in choices):
        state = "without" if recorded.budget.seconds is not None else "with"
        raise ValueError(
            f"Expected choices['clock'] exactly where choices['budget'] has seconds; got them {state} a clock."
        )
    if "clock" not in choices:
        return None
    if series is None:
        raise ValueError("Expected choices of a whole run; got those of one that resumed, which cannot be repeated.")
    try:
        return {
            str(name): [[float(value), int(count)] for value, count in pairs] for name, pairs in dict(series).items()
        }
    except (TypeError, ValueError) as error:
        raise ValueError("Expected choices['clock'] to hold lists of [value, count]; got something else.") from error


def unrepeated(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of the choices that came out differently; a number that is none equals itself."""

    def plain(choices: Mapping[str, Any], name: str) -> str:
        return json.dumps(choices.get(name, "left out"), sort_keys=True)

    return [name for name in sorted({*before, *after}) if plain(before, name) != plain(after, name)]


def check_checkpoint(method: str | Sampler, checkpoint: str | Path | None, *, resume: bool) -> None:
    """Options that would have no effect are refused."""
    if resume and checkpoint is None:
        raise ValueError("Expected checkpoint=folder with resume=True; got no folder to resume from.")
    trains = isinstance(method, DiffusionSampler) or method in LEARNED
    if checkpoint is not None and not trains:
        raise ValueError(
            f"Expected a learned method with checkpoint=; got {_name(method)!r}, which keeps none. Use one of "
            f"{', '.join(LEARNED)}, or leave checkpoint out."
        )


def find_device(device: torch.device | str | None, target: Target, method: str | Sampler) -> torch.device:
    """The device that was asked for, by default that of the sampler or of the target.

    Raises:
        ValueError: If it is not there.
    """
    if device is None:
        if isinstance(method, DiffusionSampler):
            return method.device
        tensors = itertools.chain(target.buffers(), target.parameters()) if isinstance(target, Target) else iter(())
        first = next(tensors, None)
        return torch.device("cpu") if first is None else first.device
    try:
        place = torch.device(device)
        torch.empty(1, device=place).tolist()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(f"Expected a device that is there ({', '.join(there)}); got {device!r}.") from error
    return place
